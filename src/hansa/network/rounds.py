"""The round as a durable state machine: planned, collecting, frozen, aggregated; each step is one transaction.

A slot's row names its plan by hash, so that a coordinator that starts again can only go on with the same plan. The
set of reports is frozen once and read for ever.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects.sqlite import insert as upsert

from hansa.core.errors import Abandoned, RunError
from hansa.core.protocols import Slot
from hansa.network.failpoints import fail_point
from hansa.network.journal import append, append_seldom
from hansa.network.messages import Receipt, Refusal, Settlement
from hansa.network.receipts import Seal
from hansa.network.registry import refuse_revoked
from hansa.network.store import (
    Store,
    assignments,
    clients,
    counters,
    reports,
    secrets,
    settlements,
    slots,
    vectors,
)


@dataclass(frozen=True, kw_only=True)
class Arrival:
    """A report as it was received and checked, before it is recorded."""

    client: str
    sha256: str
    size: int
    refused: str = ""
    form: str = ""


@dataclass(frozen=True)
class Rounds:
    """The slots of one run in a store. ``seal`` signs receipts; without it they are not signed."""

    store: Store
    run: str
    seal: Seal | None = None

    def plan(self, slot: Slot, learn: bool, plan_hash: str) -> str:
        """Note a plan before anything of it is shown; the slot's state (``planned``, or further after a restart).

        Raises ``RunError`` when another plan was made for this slot before.
        """
        with self.store.write() as db:
            row = self._row(db, slot)
            if row is None:
                values = {"run": self.run, "slot": str(slot), "task": slot.task, "round": slot.round}
                more = {"attempt": slot.attempt, "learn": learn, "state": "planned", "plan_hash": plan_hash}
                db.execute(slots.insert().values(**values, **more, started_at=self.store.clock()))
                self._log(db, "planned", "", slot=str(slot), plan=plan_hash)
                return "planned"
        if row.plan_hash != plan_hash:
            raise RunError(
                f"{slot}: expected the plan that was made before the restart, found another; "
                "start again with the same app, settings, seed and version of hansa, or use another --state"
            )
        return str(row.state)

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
                    reports.c.client.is_(None),
                )
                .order_by(slots.c.id)
                .limit(1)
            ).one_or_none()
        if row is None:
            return None
        return Slot(row.round, row.attempt, row.slot.split("-", 3)[3], row.task), row.body

    def asked(self, slot: Slot, client: str) -> Any:
        """The slot's row if this client was asked in it; ``Refusal`` otherwise."""
        with self.store.read() as db:
            row = self._row(db, slot)
            mine = (
                row
                and db.execute(
                    sa.select(assignments.c.position).where(
                        assignments.c.slot_id == row.id, assignments.c.client == client
                    )
                ).one_or_none()
            )
        if not mine:
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

        A report to a slot that no longer collects is recorded as late.
        """
        with self.store.write() as db:
            row = self._known(db, slot)
            mine = sa.and_(reports.c.slot_id == row.id, reports.c.client == arrival.client)
            found = db.execute(sa.select(reports).where(mine)).one_or_none()
            refuse_revoked(db, arrival.client)
            if found is None:
                status = "late" if row.state != "collecting" else "refused" if arrival.refused else "accepted"
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
                    )
                )
                found = db.execute(sa.select(reports).where(mine)).one()
                more = {"reason": found.reason} if found.reason else {}
                told = {"sha256": found.sha256, "size": found.size, **more}
                self._log(db, "report", arrival.client, slot=str(slot), status=status, **told)
                fail_point("coordinator.report.recording")
            elif found.sha256 != arrival.sha256:
                self._log(db, "conflict", arrival.client, slot=str(slot), first=found.sha256, second=arrival.sha256)
        fail_point("coordinator.report.recorded")
        if found.sha256 != arrival.sha256:
            raise Refusal(
                "conflict",
                f"report: expected the bytes that {arrival.client} sent for {slot} before "
                f"(SHA-256 {found.sha256[:16]}...), found others; the first report stands",
            )
        return self._receipt(slot, found)

    def progress(self, slot: Slot) -> tuple[str, list[str], int]:
        """A slot's state, the clients that are still waited for, and the number of reports accepted."""
        with self.store.read() as db:
            row = self._known(db, slot)
            gone = sa.select(clients.c.name).where(clients.c.revoked_at.is_not(None))
            said = sa.select(reports.c.client).where(reports.c.slot_id == row.id)
            waiting = db.execute(
                sa.select(assignments.c.client)
                .where(
                    assignments.c.slot_id == row.id,
                    assignments.c.client.not_in(said),
                    assignments.c.client.not_in(gone),
                )
                .order_by(assignments.c.position)
            )
            accepted = sa.select(sa.func.count()).where(reports.c.slot_id == row.id, reports.c.status == "accepted")
            return str(row.state), [one.client for one in waiting], int(db.scalar(accepted) or 0)

    def freeze(self, slot: Slot, min_clients: int) -> None:
        """Close a slot: rows of another form than most are refused; with too few left the attempt is abandoned.

        Raises ``Abandoned`` then, and every time the slot is closed again.
        """
        with self.store.write() as db:
            row = self._known(db, slot)
            if row.state == "collecting":
                accepted = [r for r in _reports(db, row.id) if r.status == "accepted"]
                forms = Counter(r.form for r in accepted)
                usual = forms.most_common(1)[0][0] if forms else ""
                refused = []
                for odd in (r for r in accepted if r.form != usual):
                    reason = f"update of another form than most: expected {usual}, found {odd.form}"
                    mine = sa.and_(reports.c.slot_id == row.id, reports.c.client == odd.client)
                    db.execute(reports.update().where(mine).values(status="refused", reason=reason[:500]))
                    refused.append([odd.client, reason])
                state = "frozen" if forms and forms[usual] >= min_clients else "abandoned"
                db.execute(slots.update().where(slots.c.id == row.id).values(state=state))
                kept = [[r.client, r.sha256] for r in accepted if r.form == usual]
                self._log(db, state, "", slot=str(slot), reports=kept, refused=refused)
                row = self._known(db, slot)
                fail_point("coordinator.slot.freezing")
        fail_point("coordinator.slot.frozen")
        if row.state == "abandoned":
            raise Abandoned(
                f"{slot.task} round {slot.round}: expected reports of at least {min_clients} clients, found fewer; "
                "nothing was released"
            )

    def frozen(self, slot: Slot) -> list[Any]:
        """The reports of a frozen slot (accepted and refused), in the order of the plan's cohort."""
        with self.store.read() as db:
            return [r for r in _reports(db, self._known(db, slot).id) if r.status != "late"]

    def settle(self, slot: Slot, counted: Sequence[str]) -> bool:
        """Tell every client of an attempt whether its update counted; False when that was done before."""
        same = (slots.c.run == self.run, slots.c.task == slot.task, slots.c.round == slot.round)
        attempt = sa.and_(*same, slots.c.attempt == slot.attempt)
        where = {"run": self.run, "task": slot.task, "round": slot.round, "attempt": slot.attempt}
        with self.store.write() as db:
            open_slots = sa.and_(attempt, slots.c.state.in_(("planned", "collecting", "frozen")))
            state = "aggregated" if counted else "abandoned"
            changed = db.execute(slots.update().where(open_slots).values(state=state)).rowcount
            in_attempt = sa.select(slots.c.id).where(attempt)
            named = sa.select(assignments.c.client).where(assignments.c.slot_id.in_(in_attempt)).distinct()
            names, told = sorted(row.client for row in db.execute(named)), list[str]()
            for name in names:
                row = upsert(settlements).values(**where, client=name, counted=name in set(counted))
                if db.execute(row.on_conflict_do_nothing()).rowcount:
                    told.append(name)
            if changed or told:
                said = {"attempt": f"{slot.task}-{slot.round}-{slot.attempt}"}
                yes = [name for name in told if name in set(counted)]
                no = [name for name in told if name not in set(counted)]
                self._log(db, "settled", "", **said, counted=yes, dropped=no)
            fail_point("coordinator.slot.settling")
        return bool(changed or told)

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
        """Drop secrets and plans of training rounds up to ``before``, whose result is durable elsewhere.

        Returns the SHA-256 of the reports and of the vectors that are still needed.
        """
        done = sa.or_(
            sa.and_(slots.c.task != "prepare", slots.c.round <= before),
            sa.and_(slots.c.task == "prepare", slots.c.state == "aggregated"),
        )
        old = sa.select(slots.c.id).where(slots.c.run == self.run, done)
        other = sa.select(slots.c.id).where(slots.c.run != self.run)
        with self.store.write() as db:
            shown_before = sa.or_(assignments.c.slot_id.in_(old), assignments.c.slot_id.in_(other))
            db.execute(assignments.update().where(shown_before, assignments.c.body.is_not(None)).values(body=None))
            for row in db.execute(sa.select(secrets.c.name).where(secrets.c.run == self.run)).all():
                if _is_past(row.name, before):
                    db.execute(secrets.delete().where(secrets.c.run == self.run, secrets.c.name == row.name))
            db.execute(secrets.delete().where(secrets.c.run != self.run))
            live = sa.select(slots.c.id).where(slots.c.run == self.run, sa.not_(done))
            kept = db.execute(sa.select(reports.c.sha256).where(reports.c.slot_id.in_(live)))
            shown = db.execute(sa.select(vectors.c.sha256).where(vectors.c.slot_id.in_(live)))
            return {row.sha256 for row in kept}, {row.sha256 for row in shown}

    def unsettled(self) -> set[str]:
        """The slots of this run whose outcome is still open."""
        chosen = sa.select(slots.c.slot).where(
            slots.c.run == self.run, slots.c.state.not_in(("aggregated", "abandoned"))
        )
        with self.store.read() as db:
            return {row.slot for row in db.execute(chosen)}

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

    def add_traffic(self, counts: Mapping[tuple[str, str, str, int], tuple[int, int]]) -> None:
        """Add counts of bodies and their bytes, by kind, direction, task and round."""
        with self.store.write() as db:
            for (kind, direction, task, number), (count, size) in counts.items():
                row = upsert(counters).values(
                    run=self.run, kind=kind, direction=direction, task=task, round=number, count=count, bytes=size
                )
                more = {"count": counters.c.count + count, "bytes": counters.c.bytes + size}
                key = ["run", "kind", "direction", "task", "round"]
                db.execute(row.on_conflict_do_update(index_elements=key, set_=more))

    def traffic(self) -> list[Any]:
        """Every counter of this run."""
        with self.store.read() as db:
            return list(db.execute(sa.select(counters).where(counters.c.run == self.run)))

    def _log(self, db: sa.Connection, kind: str, who: str, **what: Any) -> None:
        """An entry of the audit log, in the transaction of what it tells of."""
        write = append_seldom if kind == "conflict" else append
        write(db, self.store.clock(), kind, who, {"run": self.run, **what})

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


def _is_past(name: str, before: int) -> bool:
    """Whether a secret (``secret TASK ROUND ATTEMPT``) is of a preparation or of a round up to ``before``."""
    parts = name.split(" ")
    if len(parts) != 4 or parts[0] != "secret":
        return False
    return parts[1] == "prepare" or int(parts[2]) <= before


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
