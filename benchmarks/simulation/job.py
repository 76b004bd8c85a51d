"""The peer's side of a measurement: what to run, a clock for its rounds, and the one JSON line it prints at the end.

A peer's script reads its ``Job``, prepares, calls ``begin()``, and ``round_done(values)`` at the end of each round.
What ``values`` costs lies between two rounds and is not timed.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from workloads import Floats, Workload, load

Values = Callable[[], Sequence[Floats]]


class Job:
    """One run of one peer, as ``measure.py`` asked for it on the command line."""

    def __init__(self, *, mapped: bool = False) -> None:
        asked: dict[str, Any] = json.loads(sys.argv[1])
        self.folder = Path(asked["folder"])  # of the workload
        self.num_rounds: int = asked["num_rounds"]
        self.options: dict[str, Any] = asked["options"]
        self.workload: Workload = load(self.folder, mapped=mapped)
        self.schedule: list[list[int]] = self.workload.schedule[: self.num_rounds].tolist()
        self._launched: float = asked["launched"]
        self._results = Path(asked["results"])
        self._keep = set(asked["keep"])  # numbers of rounds, from 1, after which the parameters are wanted
        self._seconds: list[float] = []
        self._kept: dict[str, Any] = {}
        self._said: dict[str, Any] = {}

    @property
    def threads(self) -> int:
        """The threads that PyTorch may use, by the setting."""
        return int(self.options.get("threads", 1))

    def begin(self) -> None:
        """All is prepared: the first round starts now."""
        self._said["startup"] = time.time() - self._launched
        self._clock = time.perf_counter()

    def round_done(self, values: Values) -> None:
        """A round has ended; ``values()`` are the parameters after it."""
        self._seconds.append(time.perf_counter() - self._clock)
        number = len(self._seconds)
        if number == 1:
            self._said["first_result"] = time.time() - self._launched
        if number in self._keep or number == self.num_rounds:
            self.keep(number, values())
        self._clock = time.perf_counter()

    def rounds_were(self, seconds: Sequence[float], first_result_at: float) -> None:
        """The rounds of a peer that keeps the time elsewhere; ``first_result_at`` is seconds since the epoch."""
        self._seconds = list(seconds)
        self._said["first_result"] = first_result_at - self._launched

    def keep(self, number: int, values: Sequence[Floats]) -> None:
        """The parameters after round ``number``, for a peer that gives them only at the end."""
        self._kept |= {f"{number}.{i}": np.array(value) for i, value in enumerate(values)}

    def report(self, **more: Any) -> None:
        """Hand the parameters over in a file and print the JSON line."""
        np.savez(self._results, **self._kept)
        print(json.dumps(self._said | {"seconds": self._seconds} | more), flush=True)


def is_first_process() -> bool:
    """Whether this is the process that reports, where ``torchrun`` started several."""
    return os.environ.get("RANK", "0") == "0"
