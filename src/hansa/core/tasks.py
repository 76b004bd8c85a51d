"""The closed list of tasks that a plan may name: training, evaluating, and sums over the clients' rows.

Each is an ``Algorithm`` run by the same two functions of ``core/round.py``, so that evaluation and preparation travel
exactly as training does, and through the federation's own aggregator where the server may not see rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from hansa.core.protocols import Aggregate, Aggregator, Array, Memory, State, Updates, UpdateTransform

TASKS = ("train", "evaluate", "prepare")


class Parts(NamedTuple):
    """What one task is made of: what ``client_round`` and ``server_round`` need of a federation."""

    algorithm: Any
    transforms: tuple[UpdateTransform, ...]
    aggregator: Aggregator
    dtype: str = "float32"  # of the values on the wire
    must_be_finite: bool = True
    look_at_values: bool = True  # False: whoever adds the rows looks at the sum, and may ``refuse``
    train_loss: bool = False  # each client's mean training loss travels in the tail


def model_of(algorithm: Any, received: Mapping[str, Array], memory: Memory) -> Array:
    """What each client starts from and evaluates: (num_clients, num_params); ``params`` unless the algorithm says."""
    if hasattr(algorithm, "model"):
        return algorithm.model(received, memory)
    params = received["params"]
    return np.broadcast_to(params, (len(memory), params.shape[0]))


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Sums of metrics over the clients' held-out rows; the state is the training algorithm's own, unchanged."""

    trained: Any

    def init(self, params: Array) -> State:
        """The training algorithm's state."""
        return self.trained.init(params)

    def broadcast(self, state: State) -> Mapping[str, Array]:
        """What the training algorithm would send, or wants scored in its place (``evaluated``)."""
        broadcast: Mapping[str, Array] = getattr(self.trained, "evaluated", self.trained.broadcast)(state)
        return broadcast

    def client_update(
        self, received: Mapping[str, Array], fit: Any, memory: Memory
    ) -> tuple[Updates, Mapping[str, Array]]:
        """Metric sums (num_clients, metrics.size), each client with weight 1."""
        sums = fit.evaluate(model_of(self.trained, received, memory))
        return fit.updates(sums, weights=np.ones(len(fit.clients))), {}

    def server_update(self, state: State, mean: Aggregate) -> State:
        """Evaluation changes nothing."""
        return state


@dataclass(frozen=True, kw_only=True)
class Summation:
    """Sums of a statistic over the clients' training rows, as one vector a client."""

    statistic: Any  # has sums(dataset) -> {name: array}

    def init(self, params: Array) -> State:
        """There is no state but the broadcast: nothing."""
        return {}

    def broadcast(self, state: State) -> Mapping[str, Array]:
        """Clients need nothing to begin."""
        return {}

    def client_update(
        self, received: Mapping[str, Array], fit: Any, memory: Memory
    ) -> tuple[Updates, Mapping[str, Array]]:
        """The statistic's sums, flattened in the order of their names; weight 1, and 0 for a client without rows."""
        rows = [flat_sums(self.statistic.sums(dataset)) if len(dataset) else np.zeros(0) for dataset in fit.datasets]
        empty = np.zeros(max(row.size for row in rows))
        stacked = np.stack([row if row.size else empty for row in rows])
        return fit.updates(stacked, weights=np.array([float(row.size > 0) for row in rows])), {}

    def server_update(self, state: State, mean: Aggregate) -> State:
        """The total over the cohort: mean times the number of clients counted."""
        return {"total": mean.values * len(mean.clients)}


def flat_sums(sums: Mapping[str, Array]) -> Array:
    """Named arrays as one float64 vector, in the order of their names."""
    return np.concatenate([np.asarray(sums[name], dtype=np.float64).reshape(-1) for name in sorted(sums)])
