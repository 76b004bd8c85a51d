"""What both frameworks train: a vector of float32, and clients whose training is a trivial change of what they receive.

NumPy alone: hansa's app imports this file, and Flower's gets a copy. Every stretch of the vector is another one, as is
every client's answer, so that nobody gains by sending equal bytes once.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

NUM_PARAMS = int(os.environ.get("DEPLOYMENT_PARAMS", "1000"))
NUM_CLIENTS = int(os.environ.get("DEPLOYMENT_CLIENTS", "10"))
_KEPT, _STEP, _PERIOD = 0.9, 0.01, 65_521
Vector = npt.NDArray[Any]


def initial(num_params: int = NUM_PARAMS) -> Vector:
    """Where training begins: numbers from 0 to 1, with a period that no chunk's length divides."""
    return np.resize(np.arange(_PERIOD, dtype=np.float32) / np.float32(_PERIOD), num_params)


def num_examples(client: int) -> int:
    """A client's weight in the mean: 1, 2, 3, ..."""
    return client + 1


def train(values: Vector, client: int) -> Vector:
    """A client's training; who counts trainings or wants slow clients says so in the environment."""
    if "DEPLOYMENT_TRAININGS" in os.environ:
        with Path(os.environ["DEPLOYMENT_TRAININGS"]).open("a") as file:
            file.write(f"{client}\n")
    if is_slow(client):
        time.sleep(float(os.environ.get("DEPLOYMENT_SLOW_S", "0")))
    return values * np.float32(_KEPT) + np.float32(_STEP * (client + 1))


def is_slow(client: int, num_clients: int = NUM_CLIENTS) -> bool:
    """Whether a client is of the half that dawdles, where any does."""
    return client >= num_clients // 2


def expected(num_params: int, num_clients: int, num_rounds: int) -> Vector:
    """What comes out after ``num_rounds``, by NumPy in float64."""
    values = initial(num_params).astype(np.float64)
    weights = np.array([num_examples(client) for client in range(num_clients)], dtype=np.float64)
    step = _STEP * np.average(np.arange(1, num_clients + 1), weights=weights)
    for _ in range(num_rounds):
        values = _KEPT * values + step
    return values
