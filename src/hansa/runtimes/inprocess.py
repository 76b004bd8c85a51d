"""``InProcess``: every client runs in this process, blocks of them at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from hansa.aggregators.folds import Positions, total, tree_of
from hansa.core.errors import InputError
from hansa.core.key import Key
from hansa.core.protocols import Client, Plan, Report, Slot, Updates
from hansa.data.dataset import Dataset
from hansa.federation import Federation, Pair
from hansa.runtimes.simulated import SimulatedRuntime
from hansa.runtimes.worker import Worker, block_rows, parts_of
from hansa.stopwatch import stage


@dataclass(frozen=True, kw_only=True)
class InProcess:
    """Run clients in this process, ``block_size`` of them at once.

    The size may change the speed, not the result beyond rounding: blocks of one give the bits of a deployment.

    >>> InProcess(block_size=1).block_size
    1
    """

    block_size: int | Literal["auto"] = "auto"

    def __post_init__(self) -> None:
        if self.block_size != "auto" and (not isinstance(self.block_size, int) or self.block_size < 1):
            raise InputError(f'InProcess(block_size=): expected "auto" or 1 or more, found {self.block_size!r}')

    def open(
        self, federation: Federation, load: Callable[[Client], Pair], key: Key, keep: bool = True
    ) -> InProcessRuntime:
        """The runtime of one run; ``load`` gives a client's raw training and held-out rows, asked once if ``keep``."""
        rows = block_rows(federation) if self.block_size == "auto" else self.block_size
        return InProcessRuntime(federation, Worker(federation, load, key, keep), key, rows)


class InProcessRuntime(SimulatedRuntime):
    """One run's clients in this process."""

    def __init__(self, federation: Federation, worker: Worker, key: Key, block_size: int) -> None:
        super().__init__(federation, key)
        self.block_size, self.worker = block_size, worker

    def __str__(self) -> str:
        return f"InProcess(block_size={self.block_size})"

    def _reports(self, plan: Plan, cohort: Sequence[Client], clients: Sequence[Client]) -> Iterator[Report]:
        """Part after part, each when it is asked for; sums come last, as one."""
        with stage("plan"):
            self.traffic.down(plan, clients)
        places, refused, adds_up = Positions(cohort), dict[Client, str](), self.worker.adds_up(plan)
        sums = self.worker.sums(plan, len(cohort), places)
        for part in parts_of(cohort, clients, self.block_size):
            scratch = self.scratch_of(plan.slot)
            done = self.worker.run(plan, part, places, self.memory.rows, scratch, self.block_size)
            for report in self.take(plan.slot, done):
                if adds_up and isinstance(report.payload, Updates):
                    with stage("folding"):
                        sums.add(part.node, report.payload)
                    refused |= report.refused
                else:
                    yield report
        with stage("folding"):
            row = total(tree_of(len(cohort)), sums.rows)
        if row is not None:
            yield Report(plan.slot, row.clients, row, refused)

    def rows(self, plan: Plan, block: Sequence[Client]) -> Sequence[Dataset]:
        """The clients' rows, prepared."""
        return self.worker.rows(plan, block)

    def holds(self, slot: Slot) -> bool:
        """Whether a plan of this slot waits to be asked for."""
        return slot in self._started
