"""FedProx: federated averaging with a pull towards the received parameters.

    local gradient <- g + strength * (w - received)

Li, Sahu, Zaheer, Sanjabi, Talwalkar and Smith, "Federated optimization in heterogeneous networks", MLSys 2020,
algorithm 2 (strength is the paper's mu). Difference: a fixed number of local steps or epochs instead of a
gamma-inexact solution. ``strength=0`` is FedAvg.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Real

from hansa.algorithms.fedavg import FedAvg
from hansa.core.errors import InputError
from hansa.core.protocols import Array, Fit, Memory, Updates


@dataclass(frozen=True, kw_only=True)
class FedProx(FedAvg):
    """FedProx with proximal ``strength`` (mu), 0 or more.

    >>> FedProx(client_learning_rate=0.1, strength=0.01).strength
    0.01
    """

    strength: float

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (isinstance(self.strength, Real) and 0 <= self.strength < math.inf):
            raise InputError(f"FedProx(strength=): expected 0 or more, found {self.strength!r}")

    def client_update(
        self, received: Mapping[str, Array], fit: Fit, memory: Memory
    ) -> tuple[Updates, Mapping[str, Array]]:
        """FedAvg's update, with every gradient pulled towards the received parameters."""
        start = received["params"]
        return fit.updates(fit.change(start, strength=self.strength, anchor=start)), {}
