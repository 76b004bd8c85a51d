"""Coordinators and clients in threads of this process, for cases in which nobody need die."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from faults import checkers
from hansa.federation import Federation
from hansa.network.client_store import ClientStore
from hansa.network.messages import read_plan
from network.conftest import APP, Rounds, Site, make_federation, rows

_TABLES = ("tokens", "token_uses", "clients", "presence", "slots", "assignments", "reports", "settlements", "renewals")


@contextlib.contextmanager
def stranger(site: Site, name: str) -> Iterator[Any]:
    """A connection of somebody who has enrolled and says what it likes."""
    store = ClientStore(site.folder / name)
    connection = site.connect(name, store)
    try:
        yield connection
    finally:
        connection.close()
        store.close()


def ask(connection: Any, method: str, path: str, body: bytes = b"") -> bytes:
    """One request as that client makes them, once: its answer, or what it raises."""
    return bytes(connection._line.ask(method, path, content=body))


def next_work(connection: Any, number: int) -> Any:
    """The work that holds the plan of a round, as soon as there is one; what is settled on the way is noted."""
    while True:
        work = connection.get_work(wait_s=5)
        connection.store.settle(work.settlements)
        if work.plan is not None and read_plan(work.plan).slot.round == number:
            return work


@contextlib.contextmanager
def watched_site(folder: Path, federation: Federation | None = None) -> Iterator[Site]:
    """A coordinator on loopback; when it has ended, this process is as it was and what it left is sound."""
    with checkers.returns_to_baseline():
        made = Site(folder, federation or make_federation())
        yield made
        made.end()
    checkers.of_a_site(folder)


def state_of(site: Site) -> tuple[list[Any], list[str]]:
    """All that a request may change, but for the log and for when clients were seen: rows, and files."""
    with site.store.read() as db:
        found = [
            [{**row, "last_seen": None} for row in db.exec_driver_sql(f"SELECT * FROM {table}").mappings()]
            for table in _TABLES
        ]
    folders = [site.folder / "server" / name for name in ("blobs", "updates", "uploads")]
    return found, sorted(str(path) for folder in folders for path in folder.rglob("*") if path.is_file())


def move(site: Site, name: str, proxy: Any) -> None:
    """Let a client call through a proxy from now on."""
    site.enrol(name)
    path = site.folder / name / "identity" / "identity.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "url": proxy.url}))


__all__ = [
    "APP",
    "Rounds",
    "Site",
    "ask",
    "make_federation",
    "move",
    "next_work",
    "rows",
    "state_of",
    "stranger",
    "watched_site",
]
