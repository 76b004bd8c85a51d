"""The coordinator's side of the audit log: an entry is part of the transaction of the event that it tells of."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from hansa.network.audit import KINDS, START, entry_hash, plain, signed_head
from hansa.network.blobs import write_all, write_file
from hansa.network.receipts import Seal
from hansa.network.signing import canonical
from hansa.network.store import Store, audit, put, reports, slots

_A_MINUTE_S = 60.0
_OF_STRANGERS = 10
_HEAD = "audit-head"


def append(db: sa.Connection, at: float, kind: str, who: str, what: Mapping[str, Any]) -> None:
    """Append an entry within a transaction that writes; texts are made plain and short."""
    assert kind in KINDS
    newest = db.execute(sa.select(audit.c.number, audit.c.hash).order_by(audit.c.number.desc()).limit(1)).first()
    number, before = (newest.number + 1, newest.hash) if newest else (1, START)
    fields = {"number": number, "at": round(at, 3), "kind": kind, "who": plain(who), "what": plain(what)}
    stored = {**fields, "what": canonical(fields["what"]).decode("ascii"), "hash": entry_hash(before, fields)}
    db.execute(audit.insert().values(**stored))


def append_seldom(db: sa.Connection, at: float, kind: str, who: str, what: Mapping[str, Any]) -> None:
    """Append what a client can bring about as often as it likes: once a minute."""
    mine = sa.select(audit.c.at).where(audit.c.kind == kind, audit.c.who == plain(who))
    if not _is_recent(db.scalar(mine.order_by(audit.c.number.desc()).limit(1)), at):
        append(db, at, kind, who, what)


def append_of_strangers(db: sa.Connection, at: float, kind: str, who: str, what: Mapping[str, Any]) -> None:
    """Append what anybody can bring about under any name: ten times a minute in all."""
    tenth = sa.select(audit.c.at).where(audit.c.kind == kind).order_by(audit.c.number.desc())
    if not _is_recent(db.scalar(tenth.limit(1).offset(_OF_STRANGERS - 1)), at):
        append(db, at, kind, who, what)


def tell_of_older(db: sa.Connection, at: float) -> None:
    """Begin the log with what an older hansa, which kept none, left in open slots: later entries tell how it ended."""
    if db.execute(sa.select(audit.c.number).where(audit.c.kind == "started").limit(1)).first() is not None:
        return
    joined = sa.select(reports, slots.c.run, slots.c.slot, slots.c.state).join(slots, slots.c.id == reports.c.slot_id)
    frozen = defaultdict[tuple[str, str], list[list[str]]](list)
    for row in db.execute(joined.where(slots.c.state.in_(("collecting", "frozen"))).order_by(reports.c.arrival)).all():
        what = {"run": row.run, "slot": row.slot, "status": row.status, "sha256": row.sha256, "size": row.size}
        append(db, at, "report", row.client, {**what, **({"reason": row.reason} if row.reason else {})})
        if row.state == "frozen":
            frozen[row.run, row.slot] += [[row.client, row.sha256]] if row.status == "accepted" else []
    for (run, slot), kept in frozen.items():
        append(db, at, "frozen", "", {"run": run, "slot": slot, "reports": kept, "refused": []})


def _is_recent(then: float | None, at: float) -> bool:
    """Whether an entry was made in the last minute; one of the future, before a clock was set back, was not."""
    return then is not None and at - _A_MINUTE_S < then <= at


def sign_head(store: Store, seal: Seal) -> None:
    """Sign the newest entry, in the store: from now on no entry up to it can be removed unnoticed."""
    with store.write() as db:
        newest = db.execute(sa.select(audit).order_by(audit.c.number.desc()).limit(1)).first()
        if newest is None:
            return
        put(db, _HEAD, signed_head(seal, newest.number, newest.hash, newest.at))


def lines(store: Store) -> Iterator[bytes]:
    """The log as lines; the newest signed head comes after the entry that it names, or at the end."""
    head = store.get(_HEAD)
    due = json.loads(head)["head"]["number"] if head else None
    with store.read() as db:
        for row in db.execute(sa.select(audit).order_by(audit.c.number)):
            yield _line(row)
            if head is not None and row.number == due:
                yield head
                head = None
    if head is not None:
        yield head


def save_log(store: Store, seal: Seal, authority: bytes, folder: Path) -> Path:
    """Write ``log.jsonl``, whose last line is the signed head, and ``authority.pem`` into a run directory."""
    sign_head(store, seal)
    path = folder / "log.jsonl"
    head = store.get(_HEAD)
    last = json.loads(head)["head"]["number"] if head else 0
    with store.read() as db:
        chosen = sa.select(audit).where(audit.c.number <= last).order_by(audit.c.number)
        write_all(path, chain((_line(row) + b"\n" for row in db.execute(chosen)), [(head or b"{}") + b"\n"]))
    write_file(folder / "authority.pem", authority)
    return path


def _line(row: Any) -> bytes:
    """A row as its line: what was stored, byte for byte, so that a change of it shows."""
    at, number, kind, who, found = (canonical(value) for value in (row.at, row.number, row.kind, row.who, row.hash))
    what = row.what.encode("utf-8")
    return b'{"at":%b,"hash":%b,"kind":%b,"number":%b,"what":%b,"who":%b}' % (at, found, kind, number, what, who)


__all__ = ["append", "append_of_strangers", "append_seldom", "lines", "save_log", "sign_head", "tell_of_older"]
