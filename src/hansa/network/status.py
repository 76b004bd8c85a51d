"""What ``hansa status`` shows of a coordinator, read from its state folder: the round, and every client."""

from __future__ import annotations

import json
import shutil
from collections import defaultdict
from typing import Any

import sqlalchemy as sa

from hansa.network.store import Store, assignments, clients, presence, reports, settlements, slots


def status(store: Store) -> dict[str, Any]:
    """The newest slot and each client's state; safe while a coordinator is at work on the same folder.

    A client's ``state`` is ``revoked``, ``enrolled`` (it has not said hello in this run), ``working`` (asked, and not
    answered yet), ``left`` (it knows that the run is over) or ``waiting``; ``refused`` are its refusals since its last
    report to the same task that was accepted. ``late`` counts updates that came too late; ``cuts`` are connections
    that were cut or turned away, by why (``limits.CUTS``); ``over_selection`` is what was learned of it, None where it
    is not "auto". In buffered rounds ``asked`` and ``reported`` are of the newest model.
    """
    run = json.loads(store.get("run") or b"{}")
    now, run_id = store.clock(), run.get("id", "")
    with store.read() as db:
        newest = db.execute(sa.select(slots).where(slots.c.run == run_id).order_by(slots.c.id.desc()).limit(1)).first()
        asked, said = _asked(db, newest)
        here = {r.client: r for r in db.execute(sa.select(presence).where(presence.c.run == run_id))}
        counted = _rounds_counted(db, run_id)
        refused, late = _refused(db, run_id), _late(db, run_id)
        at_work = _at_work(db, run_id)
        everyone = db.execute(sa.select(clients).order_by(clients.c.name)).all()
    learned = json.loads(store.get("over_selection") or b"[[null], null]")
    return {
        "run": run_id,
        "fingerprint": run.get("fingerprint", ""),
        "state": "finished" if run.get("finished") else "running" if run else "no run yet",
        "task": newest.task if newest else None,
        "round": newest.round if newest else None,
        "phase": newest.state if newest else None,
        "asked": len(asked),
        "reported": len(said),
        "cuts": json.loads(store.get("cuts") or b"{}"),
        "free_bytes": shutil.disk_usage(store.folder).free,
        "late": sum(late.values()),
        "open_s": newest.elapsed_s if newest else None,
        "deadline_s": newest.deadline_s if newest else None,
        "over_selection": learned[1] if learned[0][0] == run_id else None,
        "clients": [
            {
                "name": client.name,
                "state": _state(client, here.get(client.name), client.name in at_work),
                "last_seen_s": None if client.last_seen is None else max(0.0, now - client.last_seen),
                "rounds_counted": counted.get(client.name, 0),
                "late": late.get(client.name, 0),
                "refused": refused.get(client.name, []),
            }
            for client in everyone
        ],
    }


def _state(client: Any, here: Any, is_working: bool) -> str:
    if client.revoked_at is not None:
        return "revoked"
    if here is None:
        return "enrolled"
    return "working" if is_working else "left" if here.said_goodbye else "waiting"


def _asked(db: sa.Connection, slot: Any) -> tuple[set[str], set[str]]:
    """Who was asked in a slot, and who answered in time."""
    if slot is None:
        return set(), set()
    asked = db.execute(sa.select(assignments.c.client).where(assignments.c.slot_id == slot.id))
    said = sa.select(reports.c.client).where(reports.c.slot_id == slot.id, reports.c.status != "late")
    return {r.client for r in asked}, {r.client for r in db.execute(said)}


def _rounds_counted(db: sa.Connection, run: str) -> dict[str, int]:
    chosen = (
        sa.select(settlements.c.client, sa.func.count().label("rounds"))
        .where(settlements.c.run == run, settlements.c.task == "train", settlements.c.counted.is_(True))
        .group_by(settlements.c.client)
    )
    return {r.client: int(r.rounds) for r in db.execute(chosen)}


def _refused(db: sa.Connection, run: str) -> dict[str, list[str]]:
    """Each client's refusals since its last report to the same task that was accepted, newest last, at most ten."""
    good, there = reports.alias(), slots.alias()
    again = (
        sa.select(good.c.arrival)
        .join(there, there.c.id == good.c.slot_id)
        .where(
            good.c.client == reports.c.client,
            good.c.arrival > reports.c.arrival,
            good.c.status == "accepted",
            there.c.task == slots.c.task,
            there.c.run == run,
        )
    )
    chosen = (
        sa.select(slots.c.round, reports.c.client, reports.c.reason)
        .join(reports, reports.c.slot_id == slots.c.id)
        .where(slots.c.run == run, reports.c.status == "refused", ~again.exists())
        .order_by(reports.c.arrival)
    )
    found: dict[str, list[str]] = defaultdict(list)
    for row in db.execute(chosen):
        found[row.client] = [*found[row.client], f"round {row.round}: {row.reason}"][-10:]
    return dict(found)


def _late(db: sa.Connection, run: str) -> dict[str, int]:
    """Each client's updates that came too late to count."""
    chosen = (
        sa.select(reports.c.client, sa.func.count().label("late"))
        .join(slots, slots.c.id == reports.c.slot_id)
        .where(slots.c.run == run, slots.c.task == "train", slots.c.learn, reports.c.status == "late")
        .group_by(reports.c.client)
    )
    return {r.client: int(r.late) for r in db.execute(chosen)}


def _at_work(db: sa.Connection, run: str) -> set[str]:
    """Who owes a report to a slot that collects: to the newest, or in buffered rounds to an older one too."""
    answered = sa.and_(reports.c.slot_id == slots.c.id, reports.c.client == assignments.c.client)
    chosen = (
        sa.select(assignments.c.client)
        .join(slots, slots.c.id == assignments.c.slot_id)
        .outerjoin(reports, answered)
        .where(
            slots.c.run == run,
            slots.c.state == "collecting",
            assignments.c.given_up.is_(False),
            reports.c.client.is_(None),
        )
    )
    return {r.client for r in db.execute(chosen)}
