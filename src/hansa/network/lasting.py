"""Who need not be asked: clients whose owner's privacy budget is spent, until they say hello again."""

from __future__ import annotations

import sqlalchemy as sa

from hansa.network.messages import is_lasting
from hansa.network.store import Store, meta, put


def note(db: sa.Connection, run: str, client: str, reason: str) -> None:
    """Within the transaction of a report: a client that refuses for good is not asked again in this run."""
    if is_lasting(reason):
        put(db, _key(run, client), b"")


def forget(db: sa.Connection, run: str, client: str) -> None:
    """Within the transaction of a hello: its owner may have raised the budget."""
    db.execute(meta.delete().where(meta.c.key == _key(run, client)))


def resting(store: Store, run: str) -> set[str]:
    """The clients that need not be asked in a run."""
    first = _key(run, "")
    chosen = sa.select(meta.c.key).where(meta.c.key.startswith(first, autoescape=True))
    with store.read() as db:
        return {row.key[len(first) :] for row in db.execute(chosen)}


def _key(run: str, client: str) -> str:
    return f"spent {run} {client}"


__all__ = ["forget", "note", "resting"]
