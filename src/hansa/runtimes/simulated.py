"""What every simulated runtime keeps of its clients, whoever does the work: memory, scratch, refusals and traffic."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from hansa.core.errors import Abandoned, InputError
from hansa.core.key import Key
from hansa.core.protocols import Client, Plan, Remembered, Report, Slot
from hansa.federation import Federation
from hansa.runtimes.memory import MemoryStore
from hansa.runtimes.traffic import Traffic
from hansa.runtimes.worker import Done
from hansa.stopwatch import switch

Where = tuple[str, int, int]  # task, round, attempt


class SimulatedRuntime:
    """The half of a simulated runtime that is the same for all; ``_reports`` is what differs."""

    def __init__(self, federation: Federation, key: Key) -> None:
        self.federation = federation
        self.min_clients = 0  # reports without which a round of training is abandoned
        self.memory, self.traffic = MemoryStore(), Traffic()
        self._key = key
        self._refused: list[dict[str, Any]] = []
        self._pending: dict[Where, list[Remembered]] = {}
        self._scratch: dict[Where, dict[Client, Any]] = {}
        self._started: dict[Slot, list[tuple[Plan, Sequence[Client], Sequence[Client]]]] = {}

    def start(self, plan: Plan, clients: Sequence[Client]) -> None:
        """Hand a plan to its clients, who are the whole cohort of the exchange."""
        self.start_some(plan, clients, clients)

    def start_some(self, plan: Plan, cohort: Sequence[Client], clients: Sequence[Client]) -> None:
        """Hand a plan to those ``clients`` of a cohort that will answer in time."""
        self._started.setdefault(plan.slot, []).append((plan, cohort, clients))

    def reports(self, slot: Slot) -> Iterator[Report]:
        """A slot's reports, folded where the aggregator allows."""
        accepted = 0
        for plan, cohort, clients in self._started.pop(slot, []):
            for report in self._reports(plan, cohort, clients):
                accepted += len(report.clients)
                yield report
        switch("combining")  # what the round does now that all have reported
        if slot.task == "train" and accepted < self.min_clients:
            raise Abandoned(f"round {slot.round}: expected {self.min_clients} reports or more, found {accepted}")

    def arrivals(self, count: int, refill: Callable[[int], None]) -> Iterator[Report]:
        """Reports as they come need a clock."""
        raise InputError(
            f"buffered rounds: expected a runtime with a clock, found {type(self).__name__.removesuffix('Runtime')}; "
            "use runtime=hansa.VirtualTime(hansa.InProcess(), devices=...)"
        )

    def settle(self, slot: Slot, counted: Sequence[Client]) -> None:
        """Commit the memory of the clients that counted; forget the rest of the round."""
        where = slot[3], slot.round, slot.attempt
        for block in self._pending.pop(where, []):
            self.memory.put(*_only(block, counted))
        self._scratch.pop(where, None)
        self._started.pop(slot, None)

    def once(self, name: str, make: Callable[[], bytes]) -> Key:
        """A simulation's secrets come from its seed, so that a run can be repeated."""
        return self._key.child("once", name)

    def traffic_totals(self) -> tuple[int, int]:
        """Bytes up and down so far, as they would have travelled."""
        return self.traffic.totals()

    def refusals(self) -> list[dict[str, Any]]:
        """Every refusal so far: round, client, reason."""
        return list(self._refused)

    def kept(self) -> dict[str, Any]:
        """What a checkpoint must hold of the clients: their memory, and what they have downloaded."""
        return {"memory": self.memory.kept(), **self.traffic.kept(), "refused": self._refused}

    def restore(self, kept: Mapping[str, Any]) -> None:
        """Go on from what ``kept`` gave."""
        self.memory.restore(kept["memory"])
        self.traffic.restore(kept)
        self._refused = [dict(entry) for entry in kept["refused"]]

    def scratch_of(self, slot: Slot) -> dict[Client, Any]:
        """What the aggregator's client half keeps between the exchanges of an attempt."""
        return self._scratch.setdefault((slot.task, slot.round, slot.attempt), {})

    def take(self, slot: Slot, done: Done) -> Iterator[Report]:
        """File what came of a part, and pass its reports on."""
        self._pending.setdefault((slot.task, slot.round, slot.attempt), []).extend(done.remembered)
        self.scratch_of(slot).update(done.scratch)
        self.traffic.bodies.add(done.bodies)
        for report in done.reports:
            for client, reason in report.refused.items():
                self._refused.append({"round": slot.round, "client": client, "reason": reason})
            yield report

    def close(self) -> None:
        """Give back what the runtime holds: nothing, here."""

    def _reports(self, plan: Plan, cohort: Sequence[Client], clients: Sequence[Client]) -> Iterator[Report]:
        """One plan's reports from ``clients``, some of ``cohort``; it also counts the plan's own traffic."""
        raise NotImplementedError


def _only(block: Remembered, counted: Sequence[Client]) -> tuple[Sequence[Client], Mapping[str, Any]]:
    """The rows of the clients that counted."""
    who = frozenset(counted)
    index = [i for i, client in enumerate(block.clients) if client in who]
    if len(index) == len(block.clients):
        return block.clients, block.arrays
    return [block.clients[i] for i in index], {name: array[index] for name, array in block.arrays.items()}
