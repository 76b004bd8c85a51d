"""SCAFFOLD: federated averaging whose local gradients are corrected by control variates.

    local gradient <- g + (c - c_i);     c_i+ = c_i - c + (w - w_i) / (num_steps * client_learning_rate)
    w <- w + server_learning_rate * mean(w_i - w);     c <- c + |cohort| / num_population * mean(c_i+ - c_i)

Karimireddy, Kale, Mohri, Reddi, Stich and Suresh, "SCAFFOLD: stochastic controlled averaging for federated learning",
ICML 2020, algorithm 1 with option II. Update and control travel as one vector of twice the length; c_i is the client's
memory. Difference: both means are weighted as the aggregator says. ``correction=0`` is FedAvg.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from hansa.algorithms.fedavg import FedAvg, moved
from hansa.core.errors import InputError
from hansa.core.protocols import Aggregate, Array, Fit, Memory, State, Updates
from hansa.local_training import SGD
from hansa.long_vectors import columnwise


@dataclass(frozen=True, kw_only=True)
class SCAFFOLD(FedAvg):
    """SCAFFOLD; local training must be plain SGD, for which the control variate's formula holds.

    >>> SCAFFOLD(client_learning_rate=0.1).server_learning_rate
    1.0
    """

    server_learning_rate: float = 1.0
    correction: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (isinstance(self.client_optimizer, SGD) and self.client_optimizer.is_plain):
            raise InputError(
                f"SCAFFOLD(client_optimizer=): expected plain SGD(), for which option II's control holds, "
                f"found {self.client_optimizer}; leave it out"
            )

    @columnwise()
    def init(self, params: Array) -> State:
        """Parameters and the server's control variate."""
        return {"params": params, "control": np.zeros_like(params)}

    def broadcast(self, state: State) -> Mapping[str, Array]:
        """Both vectors."""
        return {"params": state["params"], "control": state["control"]}

    def client_update(
        self, received: Mapping[str, Array], fit: Fit, memory: Memory
    ) -> tuple[Updates, Mapping[str, Array]]:
        """``[w_i - w, c_i+ - c_i]``, and c_i+ to remember."""
        control, own = received["control"], memory.get("control", np.zeros_like(received["control"]))
        step = fit.change(received["params"], linear=self.correction * (control - own))
        walked = np.maximum(fit.num_steps, 1)[:, None] * fit.local.learning_rate
        change = (-control - step / walked).astype(np.float32)
        return fit.updates(np.concatenate([step, change], axis=1)), {"control": own + change}

    @columnwise()
    def server_update(self, state: State, mean: Aggregate) -> State:
        """Step along the mean update; move the control by the cohort's share of the population."""
        step, change = np.split(np.asarray(mean.values), 2)
        share = len(mean.clients) / max(mean.num_population, len(mean.clients), 1)
        return {
            "params": moved(state["params"], self.server_learning_rate * step),
            "control": moved(state["control"], share * change),
        }
