"""How long slots have been open, by a clock that nobody sets; a new process goes on from what an old one noted."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

_MOST_SLOTS = 10_000  # remembered; only reports to older ones come without their time


class SlotTimes:
    """Stopwatches by slot. They run on after a slot has closed, so that a late report's time is known too.

    >>> now = [5.0]
    >>> times = SlotTimes(lambda: now[0])
    >>> times.begin("train-0-0-update", noted_s=60.0)
    >>> now[0] = 7.0
    >>> times.elapsed_s("train-0-0-update"), times.elapsed_s("train-1-0-update")
    (62.0, None)
    """

    def __init__(self, monotonic: Callable[[], float] = time.monotonic) -> None:
        self.monotonic = monotonic
        self._began: dict[str, float] = {}
        self._noted: dict[str, float] = {}
        self._lock = threading.Lock()

    def begin(self, slot: str, noted_s: float = 0.0) -> None:
        """Start a slot's stopwatch at what was noted of it; one that runs goes on."""
        with self._lock:
            if slot not in self._began:
                self._began[slot] = self.monotonic() - noted_s
                self._noted[slot] = noted_s
            while len(self._began) > _MOST_SLOTS:
                oldest = next(iter(self._began))
                del self._began[oldest], self._noted[oldest]

    def elapsed_s(self, slot: str) -> float | None:
        """Seconds that a slot has been open; None where this process has not seen it."""
        began = self._began.get(slot)
        return None if began is None else self.monotonic() - began

    def due(self, slot: str, every_s: float) -> float | None:
        """The seconds to note now, where the last were noted ``every_s`` ago or more."""
        elapsed = self.elapsed_s(slot)
        if elapsed is None or elapsed - self._noted[slot] < every_s:
            return None
        self._noted[slot] = elapsed
        return elapsed
