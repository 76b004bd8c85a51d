"""What may be forgotten once a round's result is durable, and what a replay of the round at hand still needs."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa

from hansa.network.messages import slot_of
from hansa.network.store import Store, assignments, reports, secrets, slots, vectors


def forget(store: Store, run: str, before: int) -> tuple[set[str], set[str]]:
    """Drop secrets and plans of training rounds up to ``before``, whose result is durable elsewhere.

    Buffered slots are kept while they are open, or while the newest buffer holds a report to them, and with them the
    exchanges in which the next buffer is summed. Returns the SHA-256
    of the reports and of the vectors that are still needed.
    """
    other = sa.select(slots.c.id).where(slots.c.run != run)
    with store.write() as db:
        held = _held(db, run, before)
        is_open = sa.and_(slots.c.buffered, slots.c.state == "collecting")
        is_held = slots.c.id.in_(sa.select(reports.c.slot_id).where(held))
        is_summed = slots.c.slot.like(f"train-%-%.{before + 1}.%")  # as ``secagg/steps.py`` names exchanges
        done = sa.or_(
            sa.and_(slots.c.task != "prepare", slots.c.round <= before, sa.not_(sa.or_(is_open, is_held, is_summed))),
            sa.and_(slots.c.task == "prepare", slots.c.state.in_(("aggregated", "abandoned"))),
        )
        old = sa.select(slots.c.id).where(slots.c.run == run, done)
        shown_before = sa.or_(assignments.c.slot_id.in_(old), assignments.c.slot_id.in_(other))
        db.execute(assignments.update().where(shown_before, assignments.c.body.is_not(None)).values(body=None))
        for row in db.execute(sa.select(secrets.c.name).where(secrets.c.run == run)).all():
            if _is_past(row.name, before):
                db.execute(secrets.delete().where(secrets.c.run == run, secrets.c.name == row.name))
        db.execute(secrets.delete().where(secrets.c.run != run))
        live = sa.select(slots.c.id).where(slots.c.run == run, sa.not_(done))
        needed = sa.or_(reports.c.counted_in.is_(None), held)
        kept = db.execute(sa.select(reports.c.sha256).where(reports.c.slot_id.in_(live), needed))
        shown = db.execute(sa.select(vectors.c.sha256).where(vectors.c.slot_id.in_(live)))
        return {row.sha256 for row in kept}, {row.sha256 for row in shown}


def of_attempt(store: Store, run: str, task: str, number: int, attempt: int) -> set[str]:
    """The SHA-256 of every report to an attempt, but for those that are needed as a report to another.

    A client may well send the same bytes again, and a restart comes by here again.
    """
    here = sa.and_(slots.c.task == task, slots.c.round == number, slots.c.attempt == attempt)
    needed = sa.and_(slots.c.state != "abandoned", sa.or_(slots.c.round == number, slots.c.state != "aggregated"))
    mine = sa.select(slots.c.id).where(slots.c.run == run, here)
    others = sa.select(slots.c.id).where(slots.c.run == run, sa.not_(here), needed)
    kept = sa.select(reports.c.sha256).where(reports.c.slot_id.in_(others))
    chosen = sa.select(reports.c.sha256).where(reports.c.slot_id.in_(mine), reports.c.sha256.not_in(kept))
    with store.read() as db:
        return {row.sha256 for row in db.execute(chosen)}


def unsettled(store: Store, run: str) -> set[str]:
    """The slots of a run whose outcome is still open."""
    chosen = sa.select(slots.c.slot).where(slots.c.run == run, slots.c.state.not_in(("aggregated", "abandoned")))
    with store.read() as db:
        return {row.slot for row in db.execute(chosen)}


def _held(db: sa.Connection, run: str, before: int) -> Any:
    """The condition that a buffer after round ``before`` holds a report; reports are counted as they arrive."""
    newest = (
        sa.select(reports.c.counted_in)
        .join(slots, slots.c.id == reports.c.slot_id)
        .where(slots.c.run == run, reports.c.counted_in.is_not(None))
        .order_by(reports.c.arrival.desc())
        .limit(1)
    )
    name = db.scalar(newest)
    return reports.c.counted_in == name if name is not None and slot_of(name).round > before else sa.false()


def _is_past(name: str, before: int) -> bool:
    """Whether a secret (``secret TASK ROUND ATTEMPT``) is of a preparation or of a round up to ``before``."""
    parts = name.split(" ")
    if len(parts) != 4 or parts[0] != "secret":
        return False
    return parts[1] == "prepare" or int(parts[2]) <= before
