"""Buffered rounds in the store: plans of several rounds are open, and a buffer is the next so many reports to arrive.

The order of arrival is durable with each report, and so is which reports a buffer holds, before anything is made of
them: a coordinator that starts again fills the same buffers. A slot is named by the round whose model it hands out; a
buffer by the newest slot there was when it was filled.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import sqlalchemy as sa
from sqlalchemy.dialects.sqlite import insert as upsert

from hansa.core.protocols import Client, Slot
from hansa.network.failpoints import fail_point
from hansa.network.messages import slot_of
from hansa.network.rounds import REVOKED, UNSETTLED, Rounds, Terms
from hansa.network.store import assignments, reports, slots, vectors
from hansa.secagg.steps import in_buffer

_FORMS_LOOKED_AT = 200  # of the newest reports, to tell which form is the usual one


class AtWork(NamedTuple):
    """A client that owes a report, and for how many seconds."""

    slot: Slot
    client: Client
    age_s: float


@dataclass(frozen=True)
class Patience:
    """How long a client may be at work before its seat is another's: ``usual_s``, or longer if it was slow before."""

    usual_s: float
    own_s: Mapping[Client, float]

    def is_lost(self, work: AtWork) -> bool:
        """Whether a client has been at work for too long."""
        return work.age_s > max(self.usual_s, self.own_s.get(work.client, 0.0))

    def seats(self, at_work: Sequence[AtWork]) -> int:
        """Seats that are taken."""
        return sum(not self.is_lost(work) for work in at_work)


@dataclass(frozen=True)
class Buffers:
    """The open slots of one run, and the reports that came to them."""

    rounds: Rounds

    def ask(self, slot: Slot, plan_hash: str, bodies: Mapping[Client, bytes], named: Mapping[str, str]) -> None:
        """Show these clients a slot's plan, in the order of ``bodies``; others may be asked before and after.

        Raises ``RunError`` when another plan was made for this slot before.
        """
        rounds = self.rounds
        rounds.plan(slot, True, plan_hash, Terms(buffered=True))
        fail_point("coordinator.buffer.noted")
        asked_s = rounds.times.elapsed_s(str(slot)) or 0.0
        with rounds.store.write() as db:
            number = self._id(db, slot)
            mine = assignments.c.slot_id == number
            first = db.scalar(sa.select(sa.func.count()).where(mine)) or 0
            for position, (client, body) in enumerate(bodies.items(), first):
                values = {"slot_id": number, "client": client, "position": position, "body": body, "asked_s": asked_s}
                db.execute(upsert(assignments).values(**values).on_conflict_do_nothing())
            for name, sha256 in named.items():
                db.execute(upsert(vectors).values(slot_id=number, name=name, sha256=sha256).on_conflict_do_nothing())
            db.execute(slots.update().where(slots.c.id == number).values(state="collecting"))
            fail_point("coordinator.buffer.showing")
        fail_point("coordinator.buffer.shown")

    def at_work(self) -> list[AtWork]:
        """Everyone who owes a report to an open slot, those asked first first; nobody who was revoked."""
        with self.rounds.store.read() as db:
            return self._at_work(db)

    def resting(self) -> set[Client]:
        """Clients whose report waits to be counted: they may not be in a buffer twice."""
        with self.rounds.store.read() as db:
            return {row.client for row in self._uncounted(db)}

    def num_arrived(self) -> int:
        """Reports that wait to be counted."""
        with self.rounds.store.read() as db:
            return len(self._uncounted(db))

    def fill(self, buffer: Slot, size: int) -> list[tuple[Slot, Any]] | None:
        """The next ``size`` reports (accepted and refused) as they arrived; the same ever after for this ``buffer``.

        None while too few have come. Rows of another form than most of the newest are refused.
        """
        with self.rounds.store.read() as db:
            held = self._held(db, buffer)
            if held or len(self._uncounted(db)) < size:
                return held or None
        with self.rounds.store.write() as db:
            self._hold(db, buffer, self._uncounted(db)[:size])
            held = self._held(db, buffer)
            fail_point("coordinator.buffer.filling")
        fail_point("coordinator.buffer.filled")
        return held

    def settle(self, buffer: Slot, slot: Slot, counted: Sequence[Client]) -> bool:
        """Tell the clients of a buffer that answered one slot whether their update counted; False if that was done.

        The exchanges of a secure sum, in which they took part from this slot, are over.
        """
        attempt = (slots.c.task == slot.task, slots.c.round == slot.round, slots.c.attempt == slot.attempt)
        of_sum = slots.c.slot.endswith(in_buffer("", buffer), autoescape=True)
        with self.rounds.store.write() as db:
            over = sa.and_(slots.c.run == self.rounds.run, *attempt, of_sum, slots.c.state.in_(UNSETTLED))
            db.execute(slots.update().where(over).values(state="aggregated" if counted else "abandoned"))
            mine = self._id(db, slot)
            held = [row.client for _, row in self._held(db, buffer) if row.slot_id == mine]
            told = self.rounds.tell(db, slot, {client: client in set(counted) for client in held})
            fail_point("coordinator.buffer.settling")
        return told

    def tidy(self, newest: Slot | None, oldest_round: int, is_lost: Callable[[AtWork], bool]) -> set[Client]:
        """Close what is too old, in one transaction, before a buffer is filled; the clients that are lost.

        Of slots before ``oldest_round`` nobody is waited for and nothing counts any more; of other slots but the
        ``newest`` a client that ``is_lost`` is not waited for. A slot that waits for nobody is closed. Without a newest
        slot every slot is closed: training is over.
        """
        lost, dropped = set(), defaultdict[Slot, dict[Client, bool]](dict)
        with self.rounds.store.write() as db:
            for work in self._at_work(db):
                if newest is None or work.slot.round < oldest_round or (work.slot != newest and is_lost(work)):
                    self._give_up(db, work)
                    dropped[work.slot][work.client] = False
                    lost |= {work.client} if is_lost(work) else set()
            for row in self._uncounted(db):
                slot = slot_of(row.slot)
                if newest is None or slot.round < oldest_round:
                    db.execute(reports.update().where(_is(row)).values(status="late"))
                    dropped[slot][row.client] = False
            for slot, told in dropped.items():
                self.rounds.tell(db, slot, told)
            self._close(db, newest)
            fail_point("coordinator.buffer.tidying")
        fail_point("coordinator.buffer.tidied")
        return lost

    def note_elapsed(self, every_s: float) -> None:
        """Note how long each open slot has been open, where that was last noted ``every_s`` ago or more."""
        for slot in self.open_slots():
            self.rounds.note_elapsed(slot, every_s)

    def begin(self) -> None:
        """Let the stopwatches of open slots go on after a restart."""
        with self.rounds.store.read() as db:
            for row in db.execute(sa.select(slots.c.slot, slots.c.elapsed_s).where(self._is_open())):
                self.rounds.times.begin(row.slot, row.elapsed_s)

    def bodies(self, slot: Slot, limit: int | None = None) -> dict[Client, bytes]:
        """What clients of a slot were told, in the order in which they were asked."""
        with self.rounds.store.read() as db:
            mine = sa.and_(assignments.c.slot_id == self._id(db, slot), assignments.c.body.is_not(None))
            chosen = sa.select(assignments).where(mine).order_by(assignments.c.position).limit(limit)
            return {row.client: row.body for row in db.execute(chosen)}

    def open_slots(self) -> list[Slot]:
        """Slots that wait for reports, or whose reports wait to be counted; the oldest first."""
        with self.rounds.store.read() as db:
            chosen = sa.select(slots.c.slot).where(self._is_open()).order_by(slots.c.id)
            return [slot_of(row.slot) for row in db.execute(chosen)]

    # --------------------------------------------------------------------------------------------------------- inside

    def _id(self, db: sa.Connection, slot: Slot) -> int:
        chosen = sa.select(slots.c.id).where(slots.c.run == self.rounds.run, slots.c.slot == str(slot))
        return int(db.execute(chosen).scalar_one())

    def _is_open(self) -> Any:
        return sa.and_(slots.c.run == self.rounds.run, slots.c.state == "collecting", slots.c.buffered)

    def _at_work(self, db: sa.Connection) -> list[AtWork]:
        answered = sa.and_(reports.c.slot_id == slots.c.id, reports.c.client == assignments.c.client)
        chosen = (
            sa.select(slots.c.slot, assignments.c.client, assignments.c.asked_s)
            .join(assignments, assignments.c.slot_id == slots.c.id)
            .outerjoin(reports, answered)
            .where(
                self._is_open(),
                reports.c.client.is_(None),
                assignments.c.given_up.is_(False),
                assignments.c.client.not_in(REVOKED),
            )
            .order_by(slots.c.id, assignments.c.position)
        )
        elapsed = self.rounds.times.elapsed_s
        return [AtWork(slot_of(r.slot), r.client, (elapsed(r.slot) or 0.0) - r.asked_s) for r in db.execute(chosen)]

    def _uncounted(self, db: sa.Connection) -> list[Any]:
        """Reports to open slots that no buffer holds yet, in the order of arrival."""
        chosen = (
            sa.select(reports, slots.c.slot)
            .join(slots, slots.c.id == reports.c.slot_id)
            .where(self._is_open(), reports.c.counted_in.is_(None), reports.c.status.in_(("accepted", "refused")))
            .order_by(reports.c.arrival)
        )
        return list(db.execute(chosen))

    def _held(self, db: sa.Connection, buffer: Slot) -> list[tuple[Slot, Any]]:
        """The reports that a buffer holds: by slot, each slot's in the order of arrival."""
        chosen = (
            sa.select(reports, slots.c.slot)
            .join(slots, slots.c.id == reports.c.slot_id)
            .where(slots.c.run == self.rounds.run, reports.c.counted_in == str(buffer))
            .order_by(reports.c.arrival)
        )
        return sorted(((slot_of(row.slot), row) for row in db.execute(chosen)), key=lambda pair: pair[0])

    def _usual_form(self, db: sa.Connection) -> str:
        """The commonest form of the newest accepted updates, those that wait included."""
        chosen = (
            sa.select(reports.c.form)
            .join(slots, slots.c.id == reports.c.slot_id)
            .where(slots.c.run == self.rounds.run, slots.c.buffered, reports.c.status == "accepted")
            .order_by(reports.c.arrival.desc())
            .limit(_FORMS_LOOKED_AT)
        )
        forms = Counter(row.form for row in db.execute(chosen))
        return forms.most_common(1)[0][0] if forms else ""

    def _hold(self, db: sa.Connection, buffer: Slot, chosen: Sequence[Any]) -> None:
        """Let a buffer hold these reports; rows of another form than most of the newest are refused."""
        usual, taken, refused = self._usual_form(db), [], []
        for row in chosen:
            values = {"counted_in": str(buffer)}
            if row.status == "accepted" and row.form != usual:
                reason = f"update of another form than most: expected {usual}, found {row.form}"
                values |= {"status": "refused", "reason": reason[:500]}
                refused.append([row.client, reason, row.slot])
            elif row.status == "accepted":
                taken.append([row.client, row.sha256, row.slot])
            db.execute(reports.update().where(_is(row)).values(**values))
        self.rounds.log(db, "filled", "", slot=str(buffer), reports=taken, refused=refused)

    def _give_up(self, db: sa.Connection, work: AtWork) -> None:
        """Wait for a client no more; a report that comes all the same is late."""
        mine = sa.and_(assignments.c.slot_id == self._id(db, work.slot), assignments.c.client == work.client)
        db.execute(assignments.update().where(mine).values(given_up=True))

    def _close(self, db: sa.Connection, newest: Slot | None) -> None:
        """Close the slots but the newest that wait for nobody, and whose reports are all counted or late."""
        waiting = {work.slot for work in self._at_work(db)} | {slot_of(row.slot) for row in self._uncounted(db)}
        for row in db.execute(sa.select(slots).where(self._is_open())).all():
            if (slot := slot_of(row.slot)) != newest and slot not in waiting:
                counted = sa.select(reports.c.client).where(
                    reports.c.slot_id == row.id, reports.c.status == "accepted", reports.c.counted_in.is_not(None)
                )
                state = "aggregated" if db.execute(counted.limit(1)).first() else "abandoned"
                db.execute(slots.update().where(slots.c.id == row.id).values(state=state))
                self.rounds.log(db, "closed", "", slot=row.slot)


def _is(row: Any) -> Any:
    """The condition that names one report."""
    return sa.and_(reports.c.slot_id == row.slot_id, reports.c.client == row.client)
