"""``Buffered``: the server steps after every so many reports, whenever they were begun; nobody waits for the slowest.

    w <- w + 1/K sum_i (1 + s_i)**-staleness * update_i,     s_i = server steps since client i received its model

Nguyen, Malik, Zhan, Yousefpour, Rabbat, Malek and Huba, "Federated learning with buffered asynchronous aggregation",
AISTATS 2022, algorithm 1 (FedBuff) with the polynomial staleness scaling of its experiments. Differences: updates are
also weighted as the aggregator says, so that ``K`` is the sum of those weights (``Mean(weighting="clients")`` gives the
paper's ``K``); the client whose report fills the buffer is replaced after the step; and a client has one update in a
buffer at most, on which privacy relies.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from hansa.core.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Buffered:
    """Asynchronous rounds: ``Schedule(cohort_size=100, buffer=Buffered(size=10))``.

    ``cohort_size`` clients are then at work at any moment. Whoever reports is replaced at once by a newly sampled
    client with the newest model, and after ``size`` reports the server steps: that is a round. An update ``s`` rounds
    late counts ``(1 + s)**-staleness`` times as much; one later than ``max_staleness`` rounds is wasted. The schedule's
    ``min_clients`` says here only how many clients a deployment waits for before it begins.

    In a deployment a client that is at work for more than four times what nine tenths of all took lately, and more than
    four times what it took itself, loses its seat to another; the next round may ask it anew, with the newest model.

    >>> [round(Buffered(size=10).weight(late), 3) for late in (0, 1, 3)]
    [1.0, 0.707, 0.5]
    """

    size: int
    staleness: float = 0.5
    max_staleness: int | None = None

    def __post_init__(self) -> None:
        for name, least in (("size", 1), ("max_staleness", 0)):
            value = getattr(self, name)
            if value is None and name == "max_staleness":
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise InputError(f"Buffered({name}=): expected a whole number of {least} or more, found {value!r}")
        staleness = self.staleness
        if isinstance(staleness, bool) or not isinstance(staleness, int | float) or not 0 <= staleness < math.inf:
            raise InputError(f"Buffered(staleness=): expected an exponent of 0 or more, found {staleness!r}")

    def weight(self, late: int) -> float:
        """What an update counts that comes ``late`` rounds late."""
        return float((1 + late) ** -self.staleness)
