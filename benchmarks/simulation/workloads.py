"""The four workloads as arrays: every client's examples, who trains in which round, and where the parameters start.

NumPy only, fixed seeds: the same numbers reach every peer, through a folder of ``.npy`` files.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Integers = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What a workload is, in numbers; one local epoch of plain SGD over batches in the order of the rows."""

    name: str
    says: str
    num_clients: int
    shape: tuple[int, ...]
    num_classes: int
    cohort_size: int
    batch_size: int
    learning_rate: float
    num_rounds: int
    num_examples: int = 0  # of each client; 0: they differ
    signal: float = 0.0  # how far apart the classes lie


SETTINGS = {
    setting.name: setting
    for setting in (
        Setting(
            name="W1",
            says="MLP 784-64-10, 100 of 1,000 clients of 50 examples, batch 10",
            num_clients=1000,
            num_examples=50,
            shape=(784,),
            num_classes=10,
            cohort_size=100,
            batch_size=10,
            learning_rate=0.1,
            num_rounds=20,
            signal=0.12,
        ),
        Setting(
            name="W2",
            says="CNN of 1.2 million parameters, 20 of 200 clients of 64 images 28x28, batch 16",
            num_clients=200,
            num_examples=64,
            shape=(1, 28, 28),
            num_classes=62,
            cohort_size=20,
            batch_size=16,
            learning_rate=0.05,
            num_rounds=12,
            signal=1.0,
        ),
        Setting(
            name="W3",
            says="logistic regression of 30 features, 1,000 of 10,000 clients of 20 examples, full batch",
            num_clients=10_000,
            num_examples=20,
            shape=(30,),
            num_classes=2,
            cohort_size=1000,
            batch_size=20,
            learning_rate=0.1,
            num_rounds=30,
            signal=0.3,
        ),
        Setting(
            name="lr_mnist",
            says="softmax regression on MNIST, 10 of 1,000 clients with 9 to some 2,000 examples, batch 10",
            num_clients=1000,
            shape=(784,),
            num_classes=10,
            cohort_size=10,
            batch_size=10,
            learning_rate=0.03,
            num_rounds=100,
        ),
    )
}


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A setting with its arrays: client ``c`` has the rows from ``starts[c]`` to ``starts[c + 1]``."""

    setting: Setting
    x: Floats  # (num_rows, *shape)
    y: Integers  # (num_rows,)
    starts: Integers  # (num_clients + 1,)
    schedule: Integers  # (num_rounds, cohort_size): client numbers
    initial: tuple[Floats, ...]  # one array a tensor, in the order of a PyTorch model's parameters
    test_x: Floats  # no rows where nothing is held out
    test_y: Integers

    def client(self, number: int) -> tuple[Floats, Integers]:
        """The examples of one client, as views."""
        start, stop = self.starts[number : number + 2]
        return self.x[start:stop], self.y[start:stop]

    @cached_property
    def sizes(self) -> Integers:
        """How many examples each client has."""
        return np.diff(self.starts)

    def save(self, folder: Path) -> None:
        """Write the arrays into ``folder``."""
        folder.mkdir(parents=True)
        for name in ("x", "y", "starts", "schedule", "test_x", "test_y"):
            np.save(folder / f"{name}.npy", getattr(self, name))
        np.savez(folder / "initial.npz", *self.initial)
        (folder / "setting.json").write_text(json.dumps(asdict(self.setting)), encoding="utf-8")


def load(folder: Path, *, mapped: bool = False) -> Workload:
    """What ``save`` wrote; ``mapped`` leaves the examples in files shared by all processes."""
    setting: dict[str, Any] = json.loads((folder / "setting.json").read_text(encoding="utf-8"))
    arrays = {name: np.load(folder / f"{name}.npy") for name in ("starts", "schedule", "test_x", "test_y")}
    examples = {name: np.load(folder / f"{name}.npy", mmap_mode="c" if mapped else None) for name in ("x", "y")}
    with np.load(folder / "initial.npz") as stored:
        initial = tuple(stored[name] for name in stored.files)
    return Workload(
        setting=Setting(**(setting | {"shape": tuple(setting["shape"])})), initial=initial, **arrays, **examples
    )


def synthetic(name: str, num_rounds: int | None = None) -> Workload:
    """W1, W2 or W3: noise around a prototype a class; each client's mix of classes is Dirichlet(0.5)."""
    setting = SETTINGS[name]
    drawn = np.random.default_rng(1234)
    size = int(np.prod(setting.shape))
    prototypes = drawn.standard_normal((setting.num_classes, size)).astype(np.float32)
    mixes = drawn.dirichlet(np.full(setting.num_classes, 0.5), size=setting.num_clients)
    y = np.stack([drawn.choice(setting.num_classes, size=setting.num_examples, p=mix) for mix in mixes]).reshape(-1)
    x = drawn.standard_normal((len(y), size), dtype=np.float32)
    x += setting.signal * prototypes[y]
    return Workload(
        setting=setting if num_rounds is None else replace(setting, num_rounds=num_rounds),
        x=x.reshape(-1, *setting.shape),
        y=y.astype(np.int64),
        starts=np.arange(setting.num_clients + 1) * setting.num_examples,
        schedule=cohorts(setting, num_rounds or setting.num_rounds, np.random.default_rng(99)),
        initial=_INITIAL[name](np.random.default_rng(7)),
        test_x=np.zeros((0, *setting.shape), np.float32),
        test_y=np.zeros(0, np.int64),
    )


def first_clients(workload: Workload, count: int) -> Workload:
    """The workload of its first clients alone, all of them in every round: for a peer that cannot hold more."""
    end = int(workload.starts[count])
    return replace(
        workload,
        setting=replace(workload.setting, num_clients=count, cohort_size=count),
        x=workload.x[:end],
        y=workload.y[:end],
        starts=workload.starts[: count + 1],
        schedule=np.tile(np.arange(count), (len(workload.schedule), 1)),
    )


def cohorts(setting: Setting, num_rounds: int, drawn: np.random.Generator) -> Integers:
    """Different clients in each round, all equally likely."""
    chosen = [drawn.choice(setting.num_clients, size=setting.cohort_size, replace=False) for _ in range(num_rounds)]
    return np.stack(chosen).astype(np.int64)


def _layer(drawn: np.random.Generator, *shape: int) -> tuple[Floats, Floats]:
    """Weight and bias as PyTorch draws them: uniform within one over the root of the fan-in."""
    bound = 1 / np.sqrt(np.prod(shape[1:]))
    weight, bias = drawn.uniform(-bound, bound, shape), drawn.uniform(-bound, bound, shape[0])
    return weight.astype(np.float32), bias.astype(np.float32)


_INITIAL: dict[str, Callable[[np.random.Generator], tuple[Floats, ...]]] = {
    "W1": lambda d: (*_layer(d, 64, 784), *_layer(d, 10, 64)),
    "W2": lambda d: (*_layer(d, 32, 1, 3, 3), *_layer(d, 64, 32, 3, 3), *_layer(d, 128, 9216), *_layer(d, 62, 128)),
    "W3": lambda d: _layer(d, 2, 30),
}
