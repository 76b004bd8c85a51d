"""``Schedule``: how many rounds, with whom, and how long to wait."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from hansa.core.errors import InputError
from hansa.data.sampling import Uniform
from hansa.training.buffered import Buffered


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """When rounds happen and who takes part.

    ``cohort_size=None`` asks everyone; ``min_clients`` is the fewest reports a round may close with (by default the
    cohort in a simulation has no drop-outs, and a deployment waits for ``cohort_size`` clients before it starts).
    ``evaluate_every`` rounds the model is scored; the first and the last always are.

    What has to do with time counts in a deployment and in ``VirtualTime``, and for nothing in a runtime without a
    clock, where nobody is late: ``deadline_s`` closes a round with whoever has reported, ``every_s`` is the least time
    between the starts of two rounds. ``over_selection=1.3`` asks ``ceil(1.3 * cohort_size)`` clients and counts the
    first ``cohort_size`` of them. ``buffer=Buffered(...)`` makes rounds asynchronous.

    ``"auto"`` learns both from the rounds before: ``over_selection`` from the share of clients that did not answer in
    time (1.3 at first, then 1 to 2), ``deadline_s`` from what the cohort's clients took (an hour at first, then twice
    what nine tenths of them are expected to need, and at least 30 seconds).

    >>> Schedule(num_rounds=50, cohort_size=10).clients_needed
    10
    >>> Schedule(num_rounds=50, cohort_size=10, over_selection=1.25).num_asked(1000)
    13
    """

    num_rounds: int
    cohort_size: int | None = None
    min_clients: int | None = None
    deadline_s: float | Literal["auto"] | None = None
    every_s: float | None = None
    sampler: Any = field(default_factory=Uniform)
    evaluate_every: int = 1
    over_selection: float | Literal["auto"] = 1.0
    buffer: Buffered | None = None

    def __post_init__(self) -> None:
        for name in ("num_rounds", "cohort_size", "min_clients", "evaluate_every"):
            value = getattr(self, name)
            if value is None and name in ("cohort_size", "min_clients"):
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise InputError(f"Schedule({name}=): expected a whole number of 1 or more, found {value!r}")
        for name in ("deadline_s", "every_s"):
            value = getattr(self, name)
            if value is None or (name == "deadline_s" and value == "auto"):
                continue
            if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
                more = ', "auto"' if name == "deadline_s" else ""
                raise InputError(f"Schedule({name}=): expected seconds above 0{more} or None, found {value!r}")
        if self.cohort_size and self.min_clients and self.min_clients > self.cohort_size:
            raise InputError(
                f"Schedule: expected min_clients up to cohort_size ({self.cohort_size}), found {self.min_clients}"
            )
        self._check_time()
        if not callable(getattr(self.sampler, "cohort", None)):
            raise InputError(f"Schedule(sampler=): expected hansa.Uniform() or another sampler, found {self.sampler!r}")
        if hasattr(self.sampler, "turn") and not callable(getattr(self.sampler, "of_round", None)):
            raise InputError(
                "Schedule(sampler=): expected of_round(ids, number) beside turn(number), found no such method of "
                f"{self.sampler!r}; use hansa.MinSeparation(rounds=..., within=...)"
            )

    def _check_time(self) -> None:
        """Over-selection and buffer."""
        over, buffer = self.over_selection, self.buffer
        if over != "auto" and (isinstance(over, bool) or not isinstance(over, int | float) or not 1 <= over < math.inf):
            raise InputError(f'Schedule(over_selection=): expected a factor of 1 or more or "auto", found {over!r}')
        if buffer is None:
            return
        if not isinstance(buffer, Buffered):
            raise InputError(f"Schedule(buffer=): expected hansa.Buffered(size=10) or None, found {buffer!r}")
        if self.selects_more or self.deadline_s is not None:
            other = "over_selection" if self.selects_more else "deadline_s"
            raise InputError(
                f"Schedule: expected buffer or {other}, found both; in buffered rounds nobody is waited for"
            )

    @property
    def selects_more(self) -> bool:
        """Whether a round asks more clients than it counts, and closes with those it counts."""
        return self.over_selection != 1

    def num_counted(self, num_clients: int) -> int:
        """Reports that a round counts at most, of a population of ``num_clients``."""
        size = self.buffer.size if self.buffer else self.cohort_size
        return min(size or num_clients, num_clients)

    def num_asked(self, num_clients: int, learned: float = 1.0) -> int:
        """Clients that a round asks where some may be late; in buffered rounds, those at work at any moment.

        ``learned`` stands for ``over_selection="auto"``.
        """
        counted = min(self.cohort_size or num_clients, num_clients)
        factor = learned if self.over_selection == "auto" else self.over_selection
        return min(num_clients, math.ceil(round(counted * factor, 9)))

    @property
    def num_groups(self) -> int:
        """Groups of clients that take turns, as a sampler such as ``MinSeparation`` lets them; 1 for any other."""
        turn = getattr(self.sampler, "turn", None)
        return turn(0)[1] if turn else 1

    @property
    def clients_needed(self) -> int:
        """Clients without which a deployment does not begin: enough for a round of any group, or to fill a buffer."""
        in_a_round = self.min_clients or self.cohort_size or 1
        return max(in_a_round * self.num_groups, self.buffer.size if self.buffer else 1)
