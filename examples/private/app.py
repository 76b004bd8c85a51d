"""Handwritten digits of 300 writers, each of them hidden at epsilon 4: accuracy 0.94 on digits of others, in seconds.

hansa check examples/private/app.py
hansa simulate examples/private/app.py --out run
hansa audit examples/private/app.py --out run
"""

import numpy as np
from sklearn.datasets import load_digits

import hansa


def digits():
    x, y = load_digits(return_X_y=True)
    return hansa.Dataset((x / 16).astype(np.float32), y).take(np.random.default_rng(0).permutation(len(y)))


def population():
    return hansa.Population.split(digits().take(range(1500)), by=hansa.IID(), num_clients=300, seed=0)


def evaluate_on():
    return digits().take(range(1500, 1797))


app = hansa.App(
    federation=hansa.Federation(
        learner=hansa.LinearLearner(num_features=64, num_classes=10, metrics=("accuracy",)),
        algorithm=hansa.Averaged(algorithm=hansa.FedAvgM(client_learning_rate=0.5, local_epochs=2)),
        transforms=(hansa.AdaptiveClip(start=0.1), hansa.GaussianNoise(epsilon=4, delta=1e-4)),
        aggregator=hansa.Mean(weighting="clients"),
    ),
    schedule=hansa.Schedule(num_rounds=60, cohort_size=60, sampler=hansa.Poisson()),
    population=population,
    evaluate_on=evaluate_on,
)
