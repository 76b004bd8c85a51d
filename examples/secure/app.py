"""Handwritten digits of 30 clients, of which the server sees sums alone: as accurate as the plain mean, 0.96.

python examples/secure/app.py                     # all of the cryptography, beside the plain mean
hansa check examples/secure/app.py                # what leaves a client, and who can read it
hansa simulate examples/secure/app.py --out run   # the same sums without the cryptography, faster
"""

from dataclasses import replace

import numpy as np
from sklearn.datasets import load_digits

import hansa


def population():
    return hansa.Population.split(digits.take(range(1500)), by=hansa.Dirichlet(alpha=0.5), num_clients=30, seed=0)


x, y = load_digits(return_X_y=True)
digits = hansa.Dataset((x / 16).astype(np.float32), y).take(np.random.default_rng(0).permutation(len(y)))
federation = hansa.Federation(
    learner=hansa.LinearLearner(num_features=64, num_classes=10, metrics=("accuracy",)),
    algorithm=hansa.FedAvg(client_learning_rate=0.5, local_epochs=5, batch_size=10),
    transforms=(hansa.Clip(norm=2.0),),
    aggregator=hansa.SecureMean(),
)
app = hansa.App(
    federation=federation,
    schedule=hansa.Schedule(num_rounds=30, cohort_size=20),
    population=population,
    evaluate_on=lambda: digits.take(range(1500, 1797)),
)

if __name__ == "__main__":
    means = {"plain": hansa.Mean(weighting="clients"), "secure": hansa.SecureMean(simulate="protocol")}
    for name, mean in means.items():
        run = hansa.simulate(replace(app, federation=replace(federation, aggregator=mean)))
        print(f"{name} mean: accuracy {run.final['accuracy']:.3f}")
