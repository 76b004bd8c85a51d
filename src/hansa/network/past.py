"""What became of everyone who was asked so far: who was refused, who came late, how long answers took. Reading only."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from hansa import pace
from hansa.core.protocols import Client, Slot
from hansa.network.rounds import REVOKED
from hansa.network.store import Store, assignments, presence, reports, slots
from hansa.secagg.steps import buffer_of, step_in


@dataclass(frozen=True)
class Past:
    """The slots of one run in a store, as a whole."""

    store: Store
    run: str

    def refusals(self) -> list[dict[str, Any]]:
        """Every refusal of this run while training or preparing: round, client, reason."""
        chosen = (
            sa.select(slots.c.round, reports.c.client, reports.c.reason)
            .join(reports, reports.c.slot_id == slots.c.id)
            .where(slots.c.run == self.run, reports.c.status == "refused", slots.c.task != "evaluate")
            .order_by(slots.c.id, reports.c.client)
        )
        with self.store.read() as db:
            return [{"round": r.round, "client": r.client, "reason": r.reason} for r in db.execute(chosen)]

    def num_late(self) -> int:
        """Updates of this run that came too late to count."""
        chosen = (
            sa.select(sa.func.count())
            .select_from(reports.join(slots, slots.c.id == reports.c.slot_id))
            .where(slots.c.run == self.run, slots.c.task == "train", slots.c.learn, reports.c.status == "late")
        )
        with self.store.read() as db:
            return int(db.scalar(chosen) or 0)

    def num_here(self) -> int:
        """Clients that said hello in this run and were not revoked."""
        chosen = sa.select(sa.func.count()).where(presence.c.run == self.run, presence.c.client.not_in(REVOKED))
        with self.store.read() as db:
            return int(db.scalar(chosen) or 0)

    def missing(self, number: int) -> list[float]:
        """Shares of clients that did not answer in time, one a slot of training before round ``number``, oldest first.

        A slot that closed at its deadline misses whoever had not answered. In one that closed with its goal, those who
        were only slower than others are not missing: whoever reported late counts as in time, and it is left out until
        a round has passed, for them to report.
        """
        answered = sa.func.count(reports.c.client).filter(reports.c.status != "late")
        accepted = sa.func.count(reports.c.client).filter(reports.c.status == "accepted")
        late = sa.func.count(reports.c.client).filter(reports.c.status == "late")
        chosen = (
            sa.select(
                slots.c.round,
                (accepted >= slots.c.goal).label("by_goal"),
                sa.func.count().label("asked"),
                answered.label("answered"),
                late.label("late"),
            )
            .join(assignments, assignments.c.slot_id == slots.c.id)
            .outerjoin(reports, sa.and_(reports.c.slot_id == slots.c.id, reports.c.client == assignments.c.client))
            .where(
                slots.c.run == self.run,
                slots.c.task == "train",
                slots.c.learn,
                slots.c.state.in_(("frozen", "aggregated", "abandoned")),
                slots.c.round < number,
            )
            .group_by(slots.c.id)
            .order_by(slots.c.id.desc())
            .limit(pace.MISSING_KEPT + 1)
        )
        with self.store.read() as db:
            rows = [row for row in db.execute(chosen) if row.round < number - 1 or not row.by_goal]
        return [1 - (row.answered + (row.late if row.by_goal else 0)) / row.asked for row in reversed(rows)]

    def deadline_s(self, slot: Slot, clients: Sequence[Client], learn: bool = True) -> float:
        """How long to wait for these clients in a slot, learned from slots like it: see ``pace.py``.

        Of an aggregator's several exchanges each is learned by itself; those without learning are quick at first, too.
        """
        times, recent = self.times(slot, max(pace.RECENT_KEPT, 2 * pace.TIMES_KEPT * len(clients)))
        first_s = pace.FIRST_DEADLINE_S if learn else pace.FIRST_ANSWER_S
        return pace.deadline_s([times.get(client, []) for client in clients], recent, slot.attempt, first_s)

    def times(self, slot: Slot, limit: int) -> tuple[dict[Client, list[float]], list[float]]:
        """Each client's latest times, and the latest of anybody, among the newest ``limit`` reports to slots like it.

        Seconds from plan to report, in slots of the same task and exchange.
        """
        times: dict[Client, list[float]] = defaultdict(list)
        newest = self._times(slot, limit)
        for client, took_s in newest:
            if len(times[client]) < pace.TIMES_KEPT:
                times[client].append(took_s)
        return dict(times), [took_s for _, took_s in newest[: pace.RECENT_KEPT]]

    def _times(self, slot: Slot, limit: int) -> list[tuple[Client, float]]:
        """Who took how long in slots of the same task and exchange, newest first; of buffers' sums the same step."""
        step, of_sum = step_in(slot.exchange), buffer_of(slot.exchange) is not None
        alike = slots.c.slot.contains if of_sum else slots.c.slot.endswith
        chosen = (
            sa.select(reports.c.client, reports.c.took_s)
            .join(slots, slots.c.id == reports.c.slot_id)
            .where(
                slots.c.run == self.run,
                slots.c.task == slot.task,
                alike(f"-{step}." if of_sum else f"-{slot.exchange}", autoescape=True),
                reports.c.took_s.is_not(None),
                reports.c.status != "refused",
            )
            .order_by(reports.c.arrival.desc())
            .limit(limit)
        )
        with self.store.read() as db:
            return [(row.client, row.took_s) for row in db.execute(chosen)]
