"""The privacy ledger of a run on a coordinator: each entry is an entry of the audit log, committed before the noise."""

from __future__ import annotations

import json

import sqlalchemy as sa

from hansa.network.failpoints import fail_point
from hansa.network.journal import append
from hansa.network.store import Store, audit
from hansa.privacy.ledger import Entry, Ledger

_KIND = "noised"


def stored_ledger(store: Store, run: str) -> Ledger:
    """What a run has released so far, and where its next entries go."""

    def write(entry: Entry) -> None:
        with store.write() as db:
            append(db, store.clock(), _KIND, "", {"run": run, **entry.as_json()})
            fail_point("coordinator.ledger.noting")
        fail_point("coordinator.ledger.noted")

    with store.read() as db:
        rows = db.execute(sa.select(audit.c.what).where(audit.c.kind == _KIND).order_by(audit.c.number)).all()
    found = [json.loads(row.what) for row in rows]
    return Ledger((Entry.of_json(entry) for entry in found if entry["run"] == run), write)


__all__ = ["stored_ledger"]
