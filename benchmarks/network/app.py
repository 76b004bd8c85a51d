"""The federation of the network benchmark: logistic regression on as many features as NUM_PARAMS has parameters."""

import os

import numpy as np

import hansa

NUM_FEATURES = int(os.environ.get("HANSA_BENCHMARK_PARAMS", "4")) - 1


def evaluate_on():
    """Two rows of the server's own, so that no client is asked to evaluate."""
    return hansa.Dataset(np.zeros((2, NUM_FEATURES), np.float32), np.array([0, 1]))


app = hansa.App(
    federation=hansa.Federation(
        learner=hansa.LinearLearner(num_features=NUM_FEATURES, num_classes=2),
        algorithm=hansa.FedAvg(client_learning_rate=0.1),
    ),
    schedule=hansa.Schedule(num_rounds=1, cohort_size=2, evaluate_every=1000),
    evaluate_on=evaluate_on,
)
