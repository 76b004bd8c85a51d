"""The round as a durable state machine: planned, collecting, frozen, aggregated; each step is one transaction.

A slot's row names its plan by hash, so that a coordinator that starts again can only go on with the same plan. The
set of reports is frozen once and read for ever. Slots of buffered rounds stay open over several rounds: see buffers.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import sqlalchemy as sa
from sqlalchemy.dialects.sqlite import insert as upsert

from hansa.core.errors import Abandoned, RunError
from hansa.core.protocols import Slot
from hansa.network import lasting
from hansa.network.failpoints import fail_point
from hansa.network.forgetting import forget
from hansa.network.journal import append, append_seldom
from hansa.network.messages import Receipt, Refusal, Settlement
from hansa.network.receipts import Seal
from hansa.network.registry import refuse_revoked
from hansa.network.slot_times import SlotTimes
from hansa.network.store import (
    Store,
    assignments,
    clients,
    reports,
    secrets,
    settlements,
    slots,
    vectors,
)

UNSETTLED = ("planned", "collecting", "frozen")  # states of a slot before anybody was told what it came to
REVOKED = sa.select(clients.c.name).where(clients.c.revoked_at.is_not(None))


@dataclass(frozen=True, kw_only=True)
class Arrival:
    """A report as it was received and checked, before it is recorded."""

    client: str
    sha256: str
    size: int
    refused: str = ""
    form: str = ""


class Terms(NamedTuple):
    """When a slot closes: with ``goal`` accepted reports, or ``deadline_s`` after it was opened; None: not for that.

    One that is ``buffered`` does not close so: its reports are counted as they arrive (buffers.py).
    """

    goal: int | None = None
    deadline_s: float | None = None
    buffered: bool = False


WITH_EVERYONE = Terms()


class Progress(NamedTuple):
    """Where a slot stands: its state, who is waited for, reports accepted (those of the commonest form), its terms."""

    state: str
    waiting: list[str]
    accepted: int
    terms: Terms

    @property
    def is_over(self) -> bool:
        """Whether nobody need be waited for: it is closed, everybody has answered, or its goal is reached."""
        goal = self.terms.goal
        return self.state != "collecting" or not self.waiting or (goal is not None and self.accepted >= goal)


@dataclass(frozen=True)
class Rounds:
    """The slots of one run in a store. ``seal`` signs receipts; without it they are not signed."""

    store: Store
    run: str
    seal: Seal | None = None
    times: SlotTimes = field(default_factory=SlotTimes)

    def plan(self, slot: Slot, learn: bool, plan_hash: str, terms: Terms = WITH_EVERYONE) -> str:
        """Note a plan before anything of it is shown; the slot's state (``planned``, or further after a restart).

        The slot's stopwatch starts, or goes on; its terms are those of the first time. Raises ``RunError`` when another
        plan was made for it before.
        """
        with self.store.write() as db:
            row = self._row(db, slot)
            if row is None:
                values = {"run": self.run, "slot": str(slot), "task": slot.task, "round": slot.round}
                more = {"attempt": slot.attempt, "learn": learn, "state": "planned", "plan_hash": plan_hash}
                more |= {**terms._asdict(), "started_at": self.store.clock()}
                db.execute(slots.insert().values(**values, **more))
                self.log(db, "planned", "", slot=str(slot), plan=plan_hash)
        self.times.begin(str(slot), row.elapsed_s if row else 0.0)
        if row is not None and row.plan_hash != plan_hash:
            raise RunError(
                f"{slot}: expected the plan that was made before the restart, found another; "
                "start again with the same app, settings, seed and version of hansa, or use another --state"
            )
        return str(row.state) if row else "planned"

    def collect(self, slot: Slot, bodies: Mapping[str, bytes], named: Mapping[str, str]) -> None:
        """Show each client its part of the plan, in the order of ``bodies``; ``named`` are the vectors' SHA-256."""
        with self.store.write() as db:
            row = self._known(db, slot)
            if row.state != "planned":
                return
            for position, (client, body) in enumerate(bodies.items()):
                db.execute(assignments.insert().values(slot_id=row.id, client=client, position=position, body=body))
            for name, sha256 in named.items():
                db.execute(vectors.insert().values(slot_id=row.id, name=name, sha256=sha256))
            db.execute(slots.update().where(slots.c.id == row.id).values(state="collecting"))
            fail_point("coordinator.plan.showing")

    def next_plan(self, client: str) -> tuple[Slot, bytes] | None:
        """The oldest plan that a client has not answered, while its slot collects."""
        with self.store.read() as db:
            row = db.execute(
                sa.select(slots.c.round, slots.c.attempt, slots.c.slot, slots.c.task, assignments.c.body)
                .join(assignments, assignments.c.slot_id == slots.c.id)
                .outerjoin(reports, sa.and_(reports.c.slot_id == slots.c.id, reports.c.client == client))
                .where(
                    slots.c.run == self.run,
                    slots.c.state == "collecting",
                    assignments.c.client == client,
                    assignments.c.given_up.is_(False),
                    reports.c.client.is_(None),
                )
                .order_by(slots.c.id)
                .limit(1)
            ).one_or_none()
        if row is None:
            return None
        return Slot(row.round, row.attempt, row.slot.split("-", 3)[3], row.task), row.body

    def asked(self, slot: Slot, client: str) -> Any:
        """The slot's row, with ``given_up``, if this client was asked in it; ``Refusal`` otherwise."""
        chosen = (
            sa.select(slots, assignments.c.given_up)
            .join(assignments, assignments.c.slot_id == slots.c.id)
            .where(slots.c.run == self.run, slots.c.slot == str(slot), assignments.c.client == client)
        )
        with self.store.read() as db:
            row = db.execute(chosen).one_or_none()
        if row is None:
            raise Refusal("not-asked", f"report: expected a slot that {client} was asked in, found {slot}")
        return row

    def receipt(self, slot: Slot, client: str) -> Receipt | None:
        """What became of a client's report in a slot, if it sent one."""
        with self.store.read() as db:
            row = self._row(db, slot)
            found = (
                row
                and db.execute(
                    sa.select(reports).where(reports.c.slot_id == row.id, reports.c.client == client)
                ).one_or_none()
            )
        return self._receipt(slot, found) if found else None

    def record(self, slot: Slot, arrival: Arrival) -> Receipt:
        """Count a report once: the same bytes again get the same receipt, other bytes a ``Refusal``.

        A report to a slot that no longer collects, or whose goal is reached, is recorded as late: hence a slot never
        holds more accepted reports of a form than its goal, and those are the first.
        """
        with self.store.write() as db:
            row = self._known(db, slot)
            mine = sa.and_(reports.c.slot_id == row.id, reports.c.client == arrival.client)
            found = db.execute(sa.select(reports).where(mine)).one_or_none()
            refuse_revoked(db, arrival.client)
            if found is None:
                elapsed_s = self.times.elapsed_s(str(slot))
                asked_s, status = self._status(db, row, arrival)
                db.execute(
                    reports.insert().values(
                        slot_id=row.id,
                        client=arrival.client,
                        sha256=arrival.sha256,
                        size=arrival.size,
                        status=status,
                        reason=arrival.refused[:500],
                        form=arrival.form,
                        received_at=self.store.clock(),
                        arrival=sa.select(sa.func.coalesce(sa.func.max(reports.c.arrival), 0) + 1).scalar_subquery(),
                        took_s=None if elapsed_s is None else elapsed_s - asked_s,
                    )
                )
                found = db.execute(sa.select(reports).where(mine)).one()
                more = {"reason": found.reason} if found.reason else {}
                told = {"sha256": found.sha256, "size": found.size, **more}
                self.log(db, "report", arrival.client, slot=str(slot), status=status, **told)
                lasting.note(db, self.run, arrival.client, found.reason)
                fail_point("coordinator.report.recording")
            elif found.sha256 != arrival.sha256:
                self.log(db, "conflict", arrival.client, slot=str(slot), first=found.sha256, second=arrival.sha256)
        fail_point("coordinator.report.recorded")
        if found.sha256 != arrival.sha256:
            raise Refusal(
                "conflict",
                f"report: expected the bytes that {arrival.client} sent for {slot} before "
                f"(SHA-256 {found.sha256[:16]}...), found others; the first report stands",
            )
        return self._receipt(slot, found)

    def progress(self, slot: Slot) -> Progress:
        """Where a slot stands; clients that were revoked are not waited for."""
        with self.store.read() as db:
            row = self._known(db, slot)
            said = sa.select(reports.c.client).where(reports.c.slot_id == row.id)
            waiting = db.execute(
                sa.select(assignments.c.client)
                .where(
                    assignments.c.slot_id == row.id,
                    assignments.c.client.not_in(said),
                    assignments.c.client.not_in(REVOKED),
                )
                .order_by(assignments.c.position)
            )
            alike = (
                sa.select(sa.func.count().label("accepted"))
                .where(reports.c.slot_id == row.id, reports.c.status == "accepted")
                .group_by(reports.c.form)
            )
            accepted = max((r.accepted for r in db.execute(alike)), default=0)
            terms = Terms(row.goal, row.deadline_s, row.buffered)
            return Progress(row.state, [one.client for one in waiting], accepted, terms)

    def note_elapsed(self, slot: Slot, every_s: float) -> None:
        """Note how long a slot has been open, if that was last noted ``every_s`` ago or more."""
        elapsed_s = self.times.due(str(slot), every_s)
        if elapsed_s is not None:
            mine = sa.and_(slots.c.run == self.run, slots.c.slot == str(slot))
            with self.store.write() as db:
                db.execute(slots.update().where(mine).values(elapsed_s=elapsed_s))
                fail_point("coordinator.elapsed.noting")
            fail_point("coordinator.elapsed.noted")

    def freeze(self, slot: Slot, min_clients: int) -> None:
        """Close a slot: rows of another form than most are refused; with too few left the attempt is abandoned.

        Raises ``Abandoned`` then, and every time the slot is closed again. It may heal where somebody was silent.
        """
        with self.store.write() as db:
            row = self._known(db, slot)
            state = row.state
            if state == "collecting":
                accepted = [r for r in _reports(db, row.id) if r.status == "accepted"]
                forms = Counter(r.form for r in accepted)
                usual = forms.most_common(1)[0][0] if forms else ""
                refused = []
                for odd in (r for r in accepted if r.form != usual):
                    reason = f"update of another form than most: expected {usual}, found {odd.form}"
                    mine = sa.and_(reports.c.slot_id == row.id, reports.c.client == odd.client)
                    db.execute(reports.update().where(mine).values(status="refused", reason=reason[:500]))
                    refused.append([odd.client, reason])
                state = "frozen" if forms[usual] >= min_clients else "abandoned"
                elapsed_s = self.times.elapsed_s(str(slot)) or row.elapsed_s
                db.execute(slots.update().where(slots.c.id == row.id).values(state=state, elapsed_s=elapsed_s))
                kept = [[r.client, r.sha256] for r in accepted if r.form == usual]
                self.log(db, state, "", slot=str(slot), reports=kept, refused=refused)
                fail_point("coordinator.slot.freezing")
            num_asked = db.scalar(sa.select(sa.func.count()).where(assignments.c.slot_id == row.id))
            num_silent = num_asked - sum(r.status != "late" for r in _reports(db, row.id))
        fail_point("coordinator.slot.frozen")
        if state == "abandoned":
            raise Abandoned(
                f"{slot.task} round {slot.round}: expected reports of at least {min_clients} clients, found fewer; "
                "nothing was released",
                may_heal=num_silent > 0 or row.state == "abandoned",
            )

    def frozen(self, slot: Slot) -> list[Any]:
        """The reports of a frozen slot (accepted and refused), in the order of the plan's cohort."""
        with self.store.read() as db:
            return [r for r in _reports(db, self._known(db, slot).id) if r.status != "late"]

    def settle(self, slot: Slot, counted: Sequence[str]) -> bool:
        """Tell every client of an attempt whether its update counted; False when that was done before."""
        same = (slots.c.run == self.run, slots.c.task == slot.task, slots.c.round == slot.round)
        attempt = sa.and_(*same, slots.c.attempt == slot.attempt)
        did = set(counted)
        with self.store.write() as db:
            open_slots = sa.and_(attempt, slots.c.state.in_(UNSETTLED))
            state = "aggregated" if counted else "abandoned"
            changed = db.execute(slots.update().where(open_slots).values(state=state)).rowcount > 0
            in_attempt = sa.select(slots.c.id).where(attempt)
            named = sa.select(assignments.c.client).where(assignments.c.slot_id.in_(in_attempt)).distinct()
            names = sorted(row.client for row in db.execute(named))
            told = self.tell(db, slot, {name: name in did for name in names}, closed=changed)
            fail_point("coordinator.slot.settling")
        return changed or told

    def settled_since(self, client: str, number: int) -> tuple[Settlement, ...]:
        """A client's settlements of this run after the one it saw last."""
        chosen = sa.select(settlements).where(
            settlements.c.client == client, settlements.c.number > number, settlements.c.run == self.run
        )
        with self.store.read() as db:
            rows = db.execute(chosen.order_by(settlements.c.number).limit(1000)).all()
        return tuple(
            Settlement(number=r.number, run=r.run, task=r.task, round=r.round, attempt=r.attempt, counted=r.counted)
            for r in rows
        )

    def once(self, name: str, material: bytes) -> bytes:
        """The bytes filed under ``name``: ``material`` the first time, the same for ever after."""
        with self.store.write() as db:
            db.execute(upsert(secrets).values(run=self.run, name=name, material=material).on_conflict_do_nothing())
            chosen = sa.select(secrets.c.material).where(secrets.c.run == self.run, secrets.c.name == name)
            kept: bytes = db.execute(chosen).scalar_one()
            return kept

    def forget(self, before: int) -> tuple[set[str], set[str]]:
        """Drop what only a replay of rounds up to ``before`` would need; see forgetting.py."""
        return forget(self.store, self.run, before)

    def tell(self, db: sa.Connection, slot: Slot, counted: Mapping[str, bool], *, closed: bool = False) -> bool:
        """Settle, within a transaction, clients of an attempt that were not settled before; whether there were any.

        ``closed``: the attempt's slots were closed with it, which is an entry of the log even if nobody is told.
        """
        where = {"run": self.run, "task": slot.task, "round": slot.round, "attempt": slot.attempt}
        rows = {name: upsert(settlements).values(**where, client=name, counted=did) for name, did in counted.items()}
        told = [name for name, row in rows.items() if db.execute(row.on_conflict_do_nothing()).rowcount]
        if told or closed:
            yes, no = [name for name in told if counted[name]], [name for name in told if not counted[name]]
            self.log(db, "settled", "", attempt=f"{slot.task}-{slot.round}-{slot.attempt}", counted=yes, dropped=no)
        return bool(told)

    def log(self, db: sa.Connection, kind: str, who: str, **what: Any) -> None:
        """An entry of the audit log, in the transaction of what it tells of."""
        write = append_seldom if kind == "conflict" else append
        write(db, self.store.clock(), kind, who, {"run": self.run, **what})

    def _status(self, db: sa.Connection, row: Any, arrival: Arrival) -> tuple[float, str]:
        """When a client was asked, and what its report is to this slot: accepted, refused or late."""
        mine = sa.and_(assignments.c.slot_id == row.id, assignments.c.client == arrival.client)
        asked = db.execute(sa.select(assignments.c.asked_s, assignments.c.given_up).where(mine)).one()
        if row.state != "collecting" or asked.given_up:
            return asked.asked_s, "late"
        if arrival.refused:
            return asked.asked_s, "refused"
        alike = sa.and_(reports.c.slot_id == row.id, reports.c.status == "accepted", reports.c.form == arrival.form)
        is_full = row.goal is not None and db.scalar(sa.select(sa.func.count()).where(alike)) >= row.goal
        return asked.asked_s, "late" if is_full else "accepted"

    def _receipt(self, slot: Slot, row: Any) -> Receipt:
        """The receipt of a report's row, signed."""
        receipt = Receipt(
            slot=str(slot),
            sha256=row.sha256,
            status=row.status,
            reason=row.reason,
            client=row.client,
            run=self.run,
            received_at=round(row.received_at, 3),
        )
        return receipt if self.seal is None else self.seal.receipt(receipt)

    def _row(self, db: sa.Connection, slot: Slot) -> Any:
        chosen = sa.select(slots).where(slots.c.run == self.run, slots.c.slot == str(slot))
        return db.execute(chosen).one_or_none()

    def _known(self, db: sa.Connection, slot: Slot) -> Any:
        row = self._row(db, slot)
        assert row is not None, f"{slot} was never planned"
        return row


def _reports(db: sa.Connection, slot_id: int) -> list[Any]:
    """A slot's reports in the order of its cohort."""
    return list(
        db.execute(
            sa.select(reports)
            .join(
                assignments,
                sa.and_(assignments.c.slot_id == reports.c.slot_id, assignments.c.client == reports.c.client),
            )
            .where(reports.c.slot_id == slot_id)
            .order_by(assignments.c.position)
        )
    )
