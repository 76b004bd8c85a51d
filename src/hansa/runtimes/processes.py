"""``Processes``: the clients of a cohort train in several processes of this machine, each with one thread."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from hansa.core.errors import InputError
from hansa.core.key import Key
from hansa.core.protocols import Client, Plan, Report
from hansa.federation import Federation, Pair
from hansa.runtimes.simulated import SimulatedRuntime
from hansa.runtimes.worker import Worker, part_rows

if TYPE_CHECKING:
    from hansa.runtimes.crew import Crew


@dataclass(frozen=True, kw_only=True)
class Processes:
    """Run clients in ``num_workers`` processes (by default as many as there are cores), one thread each.

    The same seed gives the same bits whatever the number of workers. Processes are forked from this one at the first
    round: models and data need no pickling, and data in memory are shared, not copied. A worker that is killed costs
    its clients' work only, which is done again. ``block_size`` is the most clients in a part of a cohort; it may change
    the speed, and the result within rounding.

    Raises ``InputError`` where this process cannot fork: under Windows, in a multiprocessing pool, or once it has used
    CUDA.

    >>> Processes(num_workers=2)
    Processes(num_workers=2, block_size='auto')
    """

    num_workers: int | None = None
    block_size: int | Literal["auto"] = "auto"

    def __post_init__(self) -> None:
        if self.num_workers is not None and not is_count(self.num_workers):
            raise InputError(
                f"Processes(num_workers=): expected 1 or more, or None for all cores, found {self.num_workers!r}"
            )
        if self.block_size != "auto" and not is_count(self.block_size):
            raise InputError(f'Processes(block_size=): expected "auto" or 1 or more, found {self.block_size!r}')

    def open(
        self, federation: Federation, load: Callable[[Client], Pair], key: Key, keep: bool = True
    ) -> ProcessesRuntime:
        """The runtime of one run; ``load`` gives a client's raw training and held-out rows, asked once if ``keep``."""
        refuse()
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
        self.block_size, self.crew = block_size, new_crew(worker, num_workers)

    def __str__(self) -> str:
        size = "" if self.block_size == "auto" else f", block_size={self.block_size}"
        return f"Processes(num_workers={self.crew.num_workers}{size})"

    def close(self) -> None:
        """End the workers."""
        self.crew.close()

    def _reports(self, plan: Plan, cohort: Sequence[Client], clients: Sequence[Client]) -> Iterator[Report]:
        if not self.crew.members:
            refuse()
        rows = part_rows(self.federation, len(cohort)) if self.block_size == "auto" else self.block_size
        return self.crew.reports(self, plan, cohort, clients, rows)


def why_not() -> str:
    """Why this process cannot fork workers, in words; empty where it can."""
    if not hasattr(os, "fork") or sys.platform == "win32":
        return f"expected a system that can fork, found {sys.platform}"
    multiprocessing = sys.modules.get("multiprocessing")
    if multiprocessing is not None and multiprocessing.current_process().daemon:
        return "expected a process that may have processes of its own, found a daemonic one (of a pool, say)"
    ray = sys.modules.get("ray")
    if ray is not None and ray.is_initialized():  # its objects wait for its threads, which a forked process has not
        return "expected a process in which Ray does not run, found that it does"
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        return "expected a process that has not used CUDA, which does not survive a fork; found that this one has"
    return ""


def refuse() -> None:
    """Raise ``InputError`` where this process cannot fork workers."""
    reason = why_not()
    if reason:
        raise InputError(f"Processes: {reason}; use runtime=hansa.InProcess() or hansa.Ray()")


def new_crew(worker: Worker, num_workers: int) -> Crew:
    """Worker processes, none of which has begun."""
    from hansa.runtimes.crew import Crew  # multiprocessing takes 15 ms to import, and most runs do without

    return Crew(worker, num_workers)


def num_cores() -> int:
    """Cores that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on every system
        return os.cpu_count() or 1


def is_count(value: object) -> bool:
    """Whether an option is a whole number from 1."""
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
