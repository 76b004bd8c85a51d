"""The federation as hansa runs it: the training of ``task.py`` as a loop of one's own, and the mean."""

from pathlib import Path

import numpy as np
import task

import hansa


def train(tensors, dataset, settings):
    return {"values": task.train(tensors["values"], int(dataset.y[0]))}


def rows(client, count):
    """Rows whose label is the client's number; only how many they are counts."""
    return hansa.Dataset(np.zeros((count, 1), np.float32), np.full(count, client, np.float32))


def load_data(path):
    client = int(Path(path).name)
    return rows(client, task.num_examples(client))


app = hansa.App(
    federation=hansa.Federation(
        learner=hansa.FunctionLearner(
            initial=lambda: {"values": task.initial()}, train=train, predict=lambda tensors, x: np.zeros(len(x))
        ),
        algorithm=hansa.FedAvg(),
    ),
    schedule=hansa.Schedule(num_rounds=2, cohort_size=task.NUM_CLIENTS, evaluate_every=10_000),
    load_data=load_data,
    evaluate_on=lambda: rows(0, 1),  # the server's own, so that no client is asked to score
)
