"""``Processes``: the clients of a cohort train in several processes of this machine, each with one thread."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from hansa.core.errors import InputError
from hansa.core.key import Key
from hansa.core.protocols import Client, Plan, Report
from hansa.federation import Federation, Pair
from hansa.runtimes.crew import Crew
from hansa.runtimes.simulated import SimulatedRuntime
from hansa.runtimes.worker import Worker, part_rows

_LOG = logging.getLogger("hansa")


@dataclass(frozen=True, kw_only=True)
class Processes:
    """Run clients in ``num_workers`` processes (by default as many as there are cores), one thread each.

    The same seed gives the same bits whatever the number of workers. Processes are forked from this one at the first
    round: models and data need no pickling, and data in memory are shared, not copied. A worker that is killed costs
    its clients' work only, which is done again. ``block_size`` is the most clients in a part of a cohort; it may change
    the speed, and the result within rounding.

    Raises ``InputError`` where the system cannot fork (Windows), or once this process has used CUDA.

    >>> Processes(num_workers=2)
    Processes(num_workers=2, block_size='auto')
    """

    num_workers: int | None = None
    block_size: int | Literal["auto"] = "auto"

    def __post_init__(self) -> None:
        if self.num_workers is not None and not _is_count(self.num_workers):
            raise InputError(
                f"Processes(num_workers=): expected 1 or more, or None for all cores, found {self.num_workers!r}"
            )
        if self.block_size != "auto" and not _is_count(self.block_size):
            raise InputError(f'Processes(block_size=): expected "auto" or 1 or more, found {self.block_size!r}')

    def open(
        self, federation: Federation, load: Callable[[Client], Pair], key: Key, keep: bool = True
    ) -> ProcessesRuntime:
        """The runtime of one run; ``load`` gives a client's raw training and held-out rows, asked once if ``keep``."""
        reason = why_not()
        if reason:
            raise InputError(f"Processes: {reason}; use runtime=hansa.InProcess() or hansa.Ray()")
        worker = Worker(federation, load, key, keep)
        return ProcessesRuntime(federation, worker, key, self.num_workers or num_cores(), self.block_size)


class ProcessesRuntime(SimulatedRuntime):
    """One run's clients in worker processes."""

    def __init__(
        self,
        federation: Federation,
        worker: Worker,
        key: Key,
        num_workers: int,
        block_size: int | Literal["auto"] = "auto",
    ) -> None:
        super().__init__(federation, key)
        self.block_size, self.crew = block_size, Crew(worker, num_workers)

    def __str__(self) -> str:
        size = "" if self.block_size == "auto" else f", block_size={self.block_size}"
        return f"Processes(num_workers={self.crew.num_workers}{size})"

    def close(self) -> None:
        """End the workers."""
        self.crew.close()

    def _reports(self, plan: Plan, cohort: Sequence[Client], clients: Sequence[Client]) -> Iterator[Report]:
        rows = part_rows(self.federation, len(cohort)) if self.block_size == "auto" else self.block_size
        return self.crew.reports(self, plan, cohort, clients, rows)


def why_not() -> str:
    """Why this process cannot fork workers, in words; empty where it can."""
    if not hasattr(os, "fork") or sys.platform == "win32":
        return f"expected a system that can fork, found {sys.platform}"
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        return "expected a process that has not used CUDA, which does not survive a fork; found that this one has"
    return ""


def num_cores() -> int:
    """Cores that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on every system
        return os.cpu_count() or 1


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
