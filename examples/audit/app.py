"""Handwritten digits of 40 writers, five each, with differential privacy: what `hansa audit` attacks."""

from sklearn.datasets import load_digits
from torch import nn

import hansa


def build_model():
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))


def population():
    x, y = load_digits(return_X_y=True)
    digits = hansa.Dataset((x[:200] / 16).astype("float32"), y[:200])
    return hansa.Population.split(digits, by=hansa.IID(), num_clients=40, seed=0)


app = hansa.App(
    name="digits of 40 writers",
    federation=hansa.Federation(
        learner=hansa.TorchLearner(build_model, loss="cross_entropy", metrics=("accuracy",)),
        algorithm=hansa.FedAvg(client_learning_rate=0.1, local_epochs=5, batch_size=8),
        transforms=(hansa.Clip(norm=1.0), hansa.GaussianNoise(epsilon=8, delta=1e-4)),
        aggregator=hansa.Mean(weighting="clients"),
    ),
    schedule=hansa.Schedule(num_rounds=100),
    population=population,
    holdout=0.5,
)
