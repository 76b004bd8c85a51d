"""``Averaged``: any algorithm, whose result is a running average of its models.

    a_t = d_t * a_{t-1} + (1 - d_t) * w_t,     d_t = min(decay, (t - 1) / t),     t = 1, 2, ...

Polyak and Juditsky, "Acceleration of stochastic approximation by averaging", SIAM J. Control Optim. 30(4), 1992, with
exponential forgetting as De, Berrada, Hayes, Smith and Balle, "Unlocking high-accuracy differentially private image
classification through scale", 2022, section 3.3: noise that was added in many rounds averages out. The models were
released, so that the average costs no privacy. Training goes on from the newest model; the average is what a run
evaluates, releases and gives back.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from hansa.core.errors import InputError
from hansa.core.protocols import Aggregate, Array, Fit, Memory, State, Updates


@dataclass(frozen=True, kw_only=True)
class Averaged:
    """``algorithm``, whose models are averaged over rounds: the plain mean at first, later rounds forget by ``decay``.

    The state's ``params`` is the average, ``trained`` the model that clients train from.

    >>> from hansa.algorithms.fedavg import FedAvg
    >>> averaged = Averaged(algorithm=FedAvg(client_learning_rate=0.1), decay=0.5)
    >>> state = averaged.init(np.zeros(1, np.float32))
    >>> for step in (2.0, 2.0, 2.0):  # models 2, 4, 6
    ...     state = averaged.server_update(state, Aggregate(np.array([step]), {}))
    >>> state["params"].tolist(), averaged.broadcast(state)["params"].tolist()
    ([4.5], [6.0])
    """

    algorithm: Any
    decay: float = 0.9

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise InputError(f"Averaged(decay=): expected 0 or more and below 1, found {self.decay}")
        if not callable(getattr(self.algorithm, "server_update", None)):
            raise InputError(f"Averaged(algorithm=): expected an algorithm, found {self.algorithm!r}")

    def __getattr__(self, name: str) -> Any:
        """All else is the algorithm's own."""
        if name.startswith("__") or name == "algorithm":
            raise AttributeError(name)
        return getattr(self.algorithm, name)

    def init(self, params: Array) -> State:
        """The algorithm's state under ``trained``, and no model averaged yet."""
        return {"params": params, "trained": self.algorithm.init(params), "num_averaged": 0}

    def broadcast(self, state: State) -> Mapping[str, Array]:
        """What the algorithm sends: its newest model."""
        sent: Mapping[str, Array] = self.algorithm.broadcast(state["trained"])
        return sent

    def evaluated(self, state: State) -> Mapping[str, Array]:
        """What clients are sent to score: the average in the place of the newest model."""
        return {**self.broadcast(state), "params": state["params"]}

    def client_update(
        self, received: Mapping[str, Array], fit: Fit, memory: Memory
    ) -> tuple[Updates, Mapping[str, Array]]:
        """The algorithm's."""
        done: tuple[Updates, Mapping[str, Array]] = self.algorithm.client_update(received, fit, memory)
        return done

    def server_update(self, state: State, mean: Aggregate) -> State:
        """The algorithm's step, then the average's."""
        trained, number = self.algorithm.server_update(state["trained"], mean), state["num_averaged"] + 1
        keep = min(self.decay, (number - 1) / number)
        average = keep * np.asarray(state["params"], np.float64) + (1 - keep) * np.asarray(trained["params"])
        return {"params": average.astype(np.float32), "trained": trained, "num_averaged": number}
