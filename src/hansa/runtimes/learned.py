"""``Learned``: what a server on a simulated clock has seen of its clients, for what it does by itself ("auto")."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hansa import pace
from hansa.core.protocols import Client


class Learned:
    """Shares of clients that did not answer in time, round by round, and the latest times of clients.

    >>> learned = Learned()
    >>> learned.note(0.25, {"a": 40.0, "b": 50.0, "c": 45.0})
    >>> round(learned.over_selection(), 3), learned.deadline_s(["a", "b", "c", "d"])
    (1.333, 100.0)
    """

    def __init__(self) -> None:
        self._missing: list[float] = []
        self._times: dict[Client, list[float]] = {}
        self._recent: list[float] = []

    def note(self, missing: float, times: Mapping[Client, float]) -> None:
        """A round is over: the share that did not answer in time, and how many seconds each answer took."""
        self._missing = [*self._missing, missing][-pace.MISSING_KEPT :]
        for client, took_s in times.items():
            self._times[client] = [*self._times.get(client, []), took_s][-pace.TIMES_KEPT :]
        self._recent = [*self._recent, *times.values()][-pace.RECENT_KEPT :]

    def over_selection(self) -> float:
        """How many times the goal to ask."""
        return pace.over_selection(self._missing)

    def deadline_s(self, cohort: Sequence[Client], attempt: int = 0) -> float:
        """How long to wait for a cohort."""
        return pace.deadline_s([self._times.get(client, []) for client in cohort], self._recent, attempt)

    def kept(self) -> dict[str, Any]:
        """What a checkpoint must hold."""
        return {"missing": self._missing, "times": self._times, "recent": self._recent}

    def restore(self, kept: Mapping[str, Any]) -> None:
        """Go on from what ``kept`` gave."""
        self._missing, self._recent = list(kept["missing"]), list(kept["recent"])
        self._times = {client: list(times) for client, times in kept["times"].items()}
