"""MNIST dealt to 1,000 clients as FedProx's generator does it: two classes each, sizes that follow a power law.

Li, Sahu, Zaheer, Sanjabi, Talwalkar and Smith: Federated Optimization in Heterogeneous Networks, MLSys 2020; the rule
is that of their ``data/mnist/generate_niid.py``. All 70,000 digits are standardised by each pixel's mean and standard
deviation. Client u gets five digits of class u mod 10 and five of the next, then lognormal(0, 2) shares of what is
left of them; one in ten of its rows is held out, and these rows together are the test.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from workloads import SETTINGS, Floats, Integers, Workload, cohorts

FILE = "mnist_writers/mnist_writers.npz"
ARRAYS = ("x_train", "y_train", "x_test", "y_test")


def find(folder: Path) -> Path | None:
    """The npz file below or in ``folder``, or ``folder`` itself where it is one; None where there is none."""
    places = (folder / FILE, folder / Path(FILE).name, folder)
    return next((place for place in places if place.is_file()), None)


def power_law(path: Path, seed: int) -> Workload:
    """LR-on-MNIST: who holds what, and the 100 cohorts, by ``seed``."""
    setting, drawn = SETTINGS["lr_mnist"], np.random.default_rng(seed)
    x, y = _digits(path)
    owned = _deal(y, setting.num_clients, drawn)
    train, test = [], []
    for rows in owned:
        drawn.shuffle(rows)
        cut = int(0.9 * len(rows))
        train.append(rows[:cut])
        test.append(rows[cut:])
    kept, held = np.concatenate(train), np.concatenate(test)
    return Workload(
        setting=setting,
        x=x[kept],
        y=y[kept],
        starts=np.concatenate([[0], np.cumsum([len(rows) for rows in train])]).astype(np.int64),
        schedule=cohorts(setting, setting.num_rounds, drawn),
        initial=(np.zeros((10, 784), np.float32), np.zeros(10, np.float32)),
        test_x=x[held],
        test_y=y[held],
    )


def _digits(path: Path) -> tuple[Floats, Integers]:
    """All 70,000 digits: (70000, 784), each pixel standardised over them, and their labels."""
    with np.load(path) as arrays:
        images, labels = (np.concatenate([arrays[f"{part}_train"], arrays[f"{part}_test"]]) for part in "xy")
    pixels = images.reshape(len(images), -1).astype(np.float32)
    standard: Floats = (pixels - pixels.mean(axis=0)) / (pixels.std(axis=0) + np.float32(0.001))
    return standard, labels.astype(np.int64)


def _deal(y: Integers, num_clients: int, drawn: np.random.Generator) -> list[Integers]:
    """The rows of each client."""
    by_class = [drawn.permutation(np.flatnonzero(y == label)) for label in range(10)]
    given = np.zeros(10, np.int64)
    owned: list[list[Integers]] = [[] for _ in range(num_clients)]

    def give(client: int, label: int, count: int) -> None:
        owned[client].append(by_class[label][given[label] : given[label] + count])
        given[label] += count

    for client in range(num_clients):
        for label in (client % 10, (client + 1) % 10):
            give(client, label, 5)
    shares = drawn.lognormal(0, 2.0, (10, num_clients // 10, 2))
    shares /= shares.sum(axis=(1, 2), keepdims=True)
    left = np.array([len(rows) - 1000 for rows in by_class])
    for client in range(num_clients):
        for j, label in enumerate((client % 10, (client + 1) % 10)):
            count = int(left[label] * shares[label, client // 10, j])
            if given[label] + count < len(by_class[label]):
                give(client, label, count)
    return [np.concatenate(parts) for parts in owned]
