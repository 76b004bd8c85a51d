"""Federated averaging: every client trains locally, the server adds the mean of their updates.

    w <- w + mean_i (w_i - w),     w_i = local training from w on client i

McMahan, Moore, Ramage, Hampson and Agüera y Arcas, "Communication-efficient learning of deep networks from
decentralized data", AISTATS 2017, algorithm 1. FedSGD is ``local_steps=1, batch_size=None``: one full-batch step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from numbers import Real

import numpy as np

from hansa.core.errors import InputError
from hansa.core.protocols import Aggregate, Array, Fit, Memory, State, Updates
from hansa.local_training import SGD, ClientOptimizer, Rate
from hansa.long_vectors import columnwise
from hansa.unwritten import passes_rows_on


@dataclass(frozen=True, kw_only=True)
class FedAvg:
    """FedAvg. ``client_learning_rate`` is a number or a function of the round; give epochs or steps, not both.

    ``batch_size=None`` is the full batch. SklearnLearner keeps its estimator's own rate: leave the rate out there.

    >>> FedAvg(client_learning_rate=0.1, local_epochs=2, batch_size=32).local_epochs
    2
    """

    client_learning_rate: Rate = float("nan")
    client_optimizer: ClientOptimizer = field(default_factory=SGD)
    local_epochs: int | None = None
    local_steps: int | None = None
    batch_size: int | None = None

    def __post_init__(self) -> None:
        name = type(self).__name__
        rate = self.client_learning_rate
        if not callable(rate) and (not isinstance(rate, Real) or rate <= 0 or math.isinf(rate)):
            raise InputError(
                f"{name}(client_learning_rate=): expected above 0 or a function of the round, found {rate!r}"
            )
        if self.local_epochs is not None and self.local_steps is not None:
            raise InputError(f"{name}: expected local_epochs or local_steps, found both; leave one out")
        for option in ("local_epochs", "local_steps", "batch_size"):
            value = getattr(self, option)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise InputError(f"{name}({option}=): expected a whole number of 1 or more, found {value!r}")

    @columnwise()
    def init(self, params: Array) -> State:
        """The parameters are the whole state."""
        return {"params": params}

    def broadcast(self, state: State) -> Mapping[str, Array]:
        """The parameters."""
        return {"params": state["params"]}

    @passes_rows_on
    def client_update(
        self, received: Mapping[str, Array], fit: Fit, memory: Memory
    ) -> tuple[Updates, Mapping[str, Array]]:
        """Local minus received parameters, weighted by examples."""
        return fit.updates(fit.change(received["params"])), {}

    @columnwise()
    def server_update(self, state: State, mean: Aggregate) -> State:
        """Add the mean update; the server's parameters stay float32."""
        return {**state, "params": moved(state["params"], mean.values)}


def moved(params: Array, step: Array) -> Array:
    """``params + step`` in float64, rounded to float32, without a float64 vector in between."""
    out = np.empty(np.shape(params), np.float32)
    return np.add(params, step, out=out, dtype=np.float64, casting="same_kind")
