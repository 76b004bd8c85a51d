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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hansa.core import chain
from hansa.core.errors import Abandoned, InputError
from hansa.core.protocols import Ask, Client, Plan, Report, Runtime, Slot, Updates
from hansa.core.round import Context, ServerState
from hansa.core.tasks import Parts
from hansa.secagg.steps import in_buffer


@dataclass(frozen=True, kw_only=True)
class Buffered:
    """Asynchronous rounds: ``Schedule(cohort_size=100, buffer=Buffered(size=10))``.

    ``cohort_size`` clients are then at work at any moment. Whoever reports is replaced at once by a newly sampled
    client with the newest model, and after ``size`` reports the server steps: that is a round. An update ``s`` rounds
    late counts ``(1 + s)**-staleness`` times as much; one later than ``max_staleness`` rounds is wasted, and so is one
    that would count less than 1/16 in a secure sum, which would not be hidden by it nor hide others. The schedule's
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


def together(
    parts: Parts,
    state: ServerState,
    runtime: Runtime,
    context: Context,
    buffer: Slot,
    staleness: Callable[[int], float],
) -> OneSum | None:
    """How a buffer is opened as one; None where the reports of each slot are opened by themselves."""
    several = hasattr(parts.aggregator, "buffer_exchange")
    return OneSum(parts, state, runtime, context, buffer, staleness) if several else None


@dataclass(frozen=True)
class OneSum:
    """A buffer's updates opened as one, by an aggregator of several exchanges: called once they have all arrived.

    The clients of the buffer go through the aggregator's exchanges, each in the slot that it learned in, so that what
    it keeps, what it remembers and what it is told of the outcome are those of its update. The exchange's name says
    which buffer it is for. Whoever is lost on the way is left out; where too few are left, the buffer is settled
    without anybody, and ``Abandoned`` is raised.
    """

    parts: Parts
    state: ServerState
    runtime: Runtime
    context: Context
    buffer: Slot
    staleness: Callable[[int], float]

    def __call__(self, late: Mapping[Slot, Sequence[Report]]) -> list[tuple[Plan, Updates]]:
        """The plan that all of them answered in the end, and their sum; ``late`` are reports by slot."""
        where = {client: slot for slot in sorted(late) for report in late[slot] for client in report.clients}
        plan, aggregator = self._plan(), self.parts.aggregator
        scales = {client: self.staleness(self.buffer.round - slot.round) for client, slot in where.items()}
        cohort = tuple(client for client in where if scales[client] >= getattr(aggregator, "least_scale", 0.0))
        if hasattr(aggregator, "fitted"):
            aggregator = aggregator.fitted(chain.limits(self.parts.transforms, plan.settings))
        history: dict[str, tuple[Report, ...]] = {}
        try:
            if not cohort:
                raise Abandoned(f"round {self.buffer.round}: expected updates that may be summed, found none")
            while (ask := aggregator.ask(cohort, history)) is not None:
                history[ask.exchange] = self._asked(plan, ask, where, scales)
            return [(plan, aggregator.open(cohort, history))]
        except Abandoned:
            for slot in late:
                self.runtime.settle(slot, ())
            raise

    def _plan(self) -> Plan:
        """What every exchange of the sum has in common: nothing of the slots in which its clients learned."""
        number, attempt, transforms = self.buffer.round, self.buffer.attempt, self.parts.transforms
        return Plan(
            slot=self.buffer,
            learn=False,
            broadcast=self.context.constants,
            settings=tuple(t.settings(s) for t, s in zip(transforms, self.state.transforms, strict=True)),
            key=self.context.key.child("sum", number, attempt),
        )

    def _asked(
        self, plan: Plan, ask: Ask, where: Mapping[Client, Slot], scales: Mapping[Client, float]
    ) -> tuple[Report, ...]:
        """What the clients of an exchange say; where rows are made, each is told how much its own counts."""
        mail: dict[Client, Any] = dict(ask.mail)
        if ask.learn:
            mail = {client: {**mail.get(client, {}), "scale": scales[client]} for client in ask.clients}
        named = in_buffer(ask.exchange, self.buffer)
        slots: dict[Slot, list[Client]] = {}
        for client in ask.clients:
            slots.setdefault(where[client]._replace(exchange=named), []).append(client)
        for slot, clients in slots.items():
            own = {client: mail[client] for client in clients if client in mail}
            self.runtime.start(plan._replace(slot=slot, mail=own), clients)
        return tuple(report for slot in slots for report in self.runtime.reports(slot))
