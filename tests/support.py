"""Small worlds that many tests share: populations, a learner that can be worked out by hand, lost clients."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import psutil

from hansa.aggregators.mean import Mean
from hansa.algorithms.fedavg import FedAvg
from hansa.core.chain import encode
from hansa.core.errors import InputError
from hansa.core.key import Key
from hansa.core.layout import Layout
from hansa.core.protocols import Memory, Plan, Report, Slot, Updates
from hansa.core.round import Context, begin
from hansa.data.dataset import Dataset
from hansa.data.population import Population
from hansa.federation import Federation
from hansa.learners.linear import LinearLearner
from hansa.local_training import Fitted
from hansa.metrics import Metrics
from hansa.runtimes.inprocess import InProcess

SLOT = Slot(0, 0, "update")


class QuadraticLearner:
    """Learns ``w`` (num_params,): a client's loss is ``curvature / 2 * |w - target|²``.

    The target is the mean of the client's rows ``x``; its curvature is the mean of the rows' weights, or 1. Every local
    step takes all rows, so that each step is ``w <- w - rate * (curvature * (w - target) + corrections)``.
    """

    corrections = frozenset({"linear", "strength", "anchor"})
    reports_loss = True
    batches_clients = True

    def __init__(self, num_params: int = 3) -> None:
        self.layout = Layout.of({"w": np.zeros(num_params, np.float32)})
        self.metrics = Metrics(())

    def __repr__(self) -> str:
        return f"QuadraticLearner({self.layout.num_params})"

    def initial(self, key: Key) -> np.ndarray:
        return np.zeros(self.layout.num_params, np.float32)

    def fit(self, params: Any, datasets: Sequence[Dataset], local: Any, correction: Any, keys: Sequence[Key]) -> Fitted:
        rows = np.array(params, dtype=np.float64)
        linear = np.broadcast_to(0 if correction.linear is None else correction.linear, rows.shape)
        anchor = np.broadcast_to(params if correction.anchor is None else correction.anchor, rows.shape)
        steps = np.array([(local.steps or local.epochs) if len(d) else 0 for d in datasets])
        losses = np.array([self._loss(row, d) for row, d in zip(rows, datasets, strict=True)])
        for i, dataset in enumerate(datasets):
            for _ in range(steps[i]):
                gradient = self._curvature(dataset) * (rows[i] - dataset.x.mean(axis=0))
                pull = correction.strength * (rows[i] - anchor[i])
                rows[i] -= local.learning_rate * (gradient + linear[i] + pull)
        return Fitted(rows.astype(np.float32), steps, np.array([len(d) for d in datasets]), losses)

    def evaluate(self, params: Any, datasets: Sequence[Dataset]) -> np.ndarray:
        return np.array([[self._loss(p, d) * len(d), len(d)] for p, d in zip(params, datasets, strict=True)])

    def check(self, dataset: Dataset, client: str) -> None:
        if dataset.x.ndim != 2 or dataset.x.shape[1] != self.layout.num_params:
            raise InputError(f"client {client!r}: expected {self.layout.num_params} features, found {dataset.x.shape}")

    def model(self, params: Any) -> Any:
        return np.array(params)

    def _curvature(self, dataset: Dataset) -> float:
        return 1.0 if dataset.weights is None else float(dataset.weights.mean())

    def _loss(self, w: np.ndarray, dataset: Dataset) -> float:
        return self._curvature(dataset) / 2 * float(((w - dataset.x.mean(axis=0)) ** 2).sum()) if len(dataset) else 0.0


def targets(**clients: Sequence[float]) -> Population:
    """A population of quadratics: each client has one row, its target."""
    return Population({client: Dataset([list(map(float, row))], [0]) for client, row in clients.items()})


def regression(sizes: Sequence[int] = (7, 1, 12, 5), num_features: int = 3, seed: int = 0) -> Population:
    """Clients ``c0, c1, ...`` with so many rows each, whose features lie apart."""
    rng = np.random.default_rng(seed)
    truth = np.arange(1.0, num_features + 1)
    clients = {}
    for i, size in enumerate(sizes):
        x = rng.normal(size=(size, num_features)) + i % 4 / 4
        clients[f"c{i}"] = Dataset(x.astype(np.float32), (x @ truth + rng.normal(size=size) / 8).astype(np.float32))
    return Population(clients)


def classes(sizes: Sequence[int] = (9, 2, 14, 6), num_features: int = 3, seed: int = 0) -> Population:
    """As ``regression``, with labels 0 and 1."""
    rng = np.random.default_rng(seed)
    clients = {}
    for i, size in enumerate(sizes):
        x = rng.normal(size=(size, num_features)) + i % 4 / 4
        clients[f"c{i}"] = Dataset(x.astype(np.float32), (x.sum(axis=1) + rng.normal(size=size) > 1).astype(np.int64))
    return Population(clients)


def linear(**options: Any) -> Federation:
    """FedAvg of a linear regression on three features: two local epochs of batches of four."""
    return Federation(
        learner=options.pop("learner", LinearLearner(num_features=3)),
        algorithm=options.pop("algorithm", FedAvg(client_learning_rate=0.05, local_epochs=2, batch_size=4)),
        **options,
    )


def quadratic(algorithm: Any = None, num_params: int = 3, **options: Any) -> Federation:
    """A federation of quadratics; FedAvg with one step of rate 0.5 unless you say."""
    own = algorithm or FedAvg(client_learning_rate=0.5, local_steps=1)
    return Federation(learner=QuadraticLearner(num_params), algorithm=own, **options)


def world(federation: Federation, population: Population, block_size: int = 1, **options: Any) -> tuple[Any, Any, Any]:
    """State before round 0, the context and a runtime: what ``server_round`` needs."""
    site = InProcess(block_size=block_size, **options).open(federation, population.load, Key.of("secrets"))
    layout = federation.learner.layout
    state = begin(federation.task("train"), federation.learner.initial(Key.of(0)), federation.update_size())
    return state, Context(Key.of("run"), layout, {}, len(population)), site


def block(values: Any, weights: Any = None, clients: Sequence[str] | None = None, **tail: Any) -> Updates:
    """A block of float32 rows, by default each of weight 1 and named c0, c1, ...; keywords are tail columns."""
    rows = np.array(values, dtype=np.float32)
    names = tuple(clients or (f"c{i}" for i in range(len(rows))))
    own = np.ones(len(rows)) if weights is None else np.array(weights, dtype=np.float64)
    return Updates(names, rows, own, {name: np.array(column, dtype=np.float64) for name, column in tail.items()})


def encoded(
    transforms: Sequence[Any], updates: Updates, memory: Sequence[Mapping[str, Any]] = (), key: Key | None = None
) -> tuple[Updates, dict[str, Any], Plan]:
    """A copy of ``updates`` after the chain's client half, what clients remember, and the plan it was under."""
    own = updates._replace(
        values=np.array(updates.values) if isinstance(updates.values, np.ndarray) else updates.values
    )
    settings = tuple(t.settings(t.init(updates.values.shape[1])) for t in transforms)
    plan = Plan(SLOT, True, {}, settings, key or Key.of("plan"))
    rows = list(memory) or [{}] * len(updates.clients)
    kept = Memory(rows)
    secret = [plan.key.child("secret", client) for client in updates.clients]
    return *encode(transforms, own, plan, kept, secret), plan


@dataclass(frozen=True, kw_only=True)
class Unsummed(Mean):
    """A mean whose rows a runtime may not add up, so that a test sees what each client sends."""

    linear = False


class Lossy:
    """A runtime that loses clients: ``(when, exchange, client)``, before a plan reaches them or after they answered."""

    def __init__(self, inner: Any, lost: Sequence[tuple[str, str, str]]) -> None:
        self.inner, self.lost = inner, set(lost)

    def start(self, plan: Plan, clients: Sequence[str]) -> None:
        there = tuple(c for c in clients if ("before", plan.slot.exchange, c) not in self.lost)
        if len(there) == len(clients):
            self.inner.start(plan, clients)
        else:
            self.inner.start_some(plan, clients, there)

    def reports(self, slot: Slot) -> Any:
        for report in self.inner.reports(slot):
            kept = [i for i, c in enumerate(report.clients) if ("after", slot.exchange, c) not in self.lost]
            clients = tuple(report.clients[i] for i in kept)
            own = report.payload
            if len(kept) == len(report.clients):
                yield report
                continue
            assert not getattr(own, "folded", False), "who is in a sum cannot be lost after it: lose them before"
            payload = own.take(kept) if isinstance(own, Updates) else {c: own[c] for c in clients}
            yield Report(slot, clients, payload, report.refused)

    def settle(self, slot: Slot, counted: Sequence[str]) -> None:
        self.inner.settle(slot, counted)

    def once(self, name: str, make: Any) -> Key:
        return self.inner.once(name, make)


def forked(parent=None):
    """Forked processes of this one (or ``parent``); not the servers that Python keeps for tests that start theirs."""
    found = []
    for child in psutil.Process(parent).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if not re.search(r"multiprocessing\.(forkserver|resource_tracker|spawn)", " ".join(child.cmdline())):
                found.append(child)
    return found
