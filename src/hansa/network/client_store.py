"""A client's durable state: memory, what is pending, its secrets and its outbox, in one SQLite file of its own.

Memory, scratch and the report are one transaction before anything is sent; asked again, the client sends the same
bytes. A report over 1 MiB lies in a file, which is there before the row that names it. ``sent.csv`` has a line for
every body that left.

Of an attempt of secure aggregation the file holds what its masks are made from, so that a crash costs nobody a round;
with the last report it is forgotten, and once the attempt is settled no file holds a trace of it. In between the rights
of the folder (its owner's alone) protect it, as they protect the rows themselves and the memory beside it: a key in
another file of the folder would be in the same backup. Whoever has such a copy and what the server holds of that very
round, has that one update.
"""

from __future__ import annotations

import csv
import logging
import os
import sqlite3
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from hansa.core.protocols import Slot
from hansa.network.failpoints import fail_point
from hansa.network.lock import take
from hansa.network.messages import Receipt, Settlement, write
from hansa.network.outbox import Outbox, Parcel
from hansa.network.pragmas import tell
from hansa.wire import lay_out, pack, unpack

_LOG = logging.getLogger("hansa")
_COLUMNS = ("time", "run", "round", "kind", "bytes", "sha256", "protection")
_ATTEMPT = "WHERE run = ? AND task = ? AND round = ? AND attempt = ?"
_SCHEMA = """
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value BLOB) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS memory (run TEXT PRIMARY KEY, body BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS attempts (
    run TEXT, task TEXT, round INTEGER, attempt INTEGER, secret BLOB NOT NULL, pending BLOB, scratch BLOB,
    PRIMARY KEY (run, task, round, attempt));
CREATE TABLE IF NOT EXISTS outbox (
    run TEXT, task TEXT, round INTEGER, attempt INTEGER, slot TEXT, body BLOB NOT NULL, file TEXT NOT NULL DEFAULT '',
    PRIMARY KEY (run, slot));
CREATE TABLE IF NOT EXISTS answers (
    run TEXT, slot TEXT, task TEXT, round INTEGER, attempt INTEGER, asked_at TEXT, bytes INTEGER, status TEXT,
    reason TEXT, counted INTEGER, PRIMARY KEY (run, slot));
CREATE TABLE IF NOT EXISTS receipts (
    run TEXT, slot TEXT, status TEXT, body BLOB NOT NULL, signed_by BLOB NOT NULL, PRIMARY KEY (run, slot));
"""


class ClientStore:
    """What a participant keeps in ``folder`` between rounds and over restarts."""

    def __init__(self, folder: Path, now: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        self.folder, self._now, self._run = folder, now, ""
        self._held: IO[str] | None = None
        self._fresh: dict[tuple[str, str, int, int], bytes] = {}  # secrets of which nothing has left
        self._files = Outbox(folder / "outbox")
        self._receipts: list[tuple[str, str, str, str]] = []
        self._proofs: list[tuple[str, str, str, bytes, bytes]] = []
        self._notes: dict[str, bytes] = {}
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._db = sqlite3.connect(
            folder / "client.db", isolation_level=None, check_same_thread=False, timeout=30, cached_statements=16
        )
        self._lock = threading.RLock()
        tell(self._db, ("journal_mode=WAL", "synchronous=FULL", "secure_delete=ON"), patience_s=30)
        self._db.executescript(_SCHEMA)
        if "file" not in [row[1] for row in self._db.execute("PRAGMA table_info(outbox)")]:  # of an older hansa
            self._db.execute("ALTER TABLE outbox ADD COLUMN file TEXT NOT NULL DEFAULT ''").close()

    def lock(self) -> None:
        """Be the one participant of this folder until ``close``; ``InputError`` when another process is."""
        self._held = take(
            self.folder / "client.lock",
            "client: expected a state folder that no other hansa join uses, found one at work (process {process}); "
            "stop it, or use another --state",
        )

    def close(self) -> None:
        """Close the file and let go of the folder."""
        if self._receipts or self._proofs or self._notes:
            with self._write():
                pass
        self._db.close()
        if self._held is not None:
            self._held.close()

    def memory(self, run: str) -> dict[str, Any]:
        """The vectors that this client keeps in a run, by name."""
        row = self._one("SELECT body FROM memory WHERE run = ?", run)
        return dict(unpack(row[0])) if row else {}

    def secret(self, run: str, slot: Slot) -> bytes:
        """The 32 secret bytes of an attempt, from the operating system; durable with the report, before it leaves."""
        stored: bytes | None = self._attempt("secret", run, slot)
        if stored is None:
            stored = self._fresh.setdefault((run, slot.task, slot.round, slot.attempt), os.urandom(32))
        return stored

    def scratch(self, run: str, slot: Slot) -> Any:
        """What an earlier exchange of this attempt left, or None."""
        body = self._attempt("scratch", run, slot)
        return None if body is None else unpack(body)

    def unsettled(self) -> Slot | None:
        """The slot that was answered last, if its attempt is not settled."""
        row = self._one("SELECT round, attempt, slot, task, counted FROM answers ORDER BY rowid DESC LIMIT 1")
        if row is None or row[4] is not None:
            return None
        return Slot(row[0], row[1], row[2].split("-", 3)[3], row[3])

    def outbox(self, run: str, slot: Slot) -> Parcel | None:
        """The report that was committed for a slot, if there is one; a file that was damaged is none, and forgotten."""
        row = self._one("SELECT body, file FROM outbox WHERE run = ? AND slot = ?", run, str(slot))
        if row is None or not row[1]:
            return None if row is None else Parcel.of(row[0])
        found = self._files.find(row[1])
        if found is None:
            _LOG.warning("%s: expected the report of %s, found it damaged; it is made anew", self._files.folder, slot)
            with self._write() as db:
                db.execute("DELETE FROM outbox WHERE run = ? AND slot = ?", (run, str(slot)))
        return found

    def pack(self, tree: Any) -> Parcel:
        """A report to be committed; a long one is in its file already."""
        return self._files.write(lay_out(tree))

    def commit(
        self,
        run: str,
        slot: Slot,
        report: Parcel,
        memory: Mapping[str, Any] | None,
        scratch: Any,
        *,
        is_last: bool = False,
    ) -> None:
        """Store a report with what it leaves behind, all or nothing; only then may it be sent.

        ``memory`` (None: as before) waits for the settlement of the attempt; its secret is forgotten with the report of
        its last exchange.
        """
        key, secret = (run, slot.task, slot.round, slot.attempt), self.secret(run, slot)
        with self._write() as db:
            columns = "run, task, round, attempt, secret"
            db.execute(f"INSERT OR IGNORE INTO attempts ({columns}) VALUES (?, ?, ?, ?, ?)", (*key, secret))
            if memory is not None:
                db.execute(f"UPDATE attempts SET pending = ? {_ATTEMPT}", (pack(dict(memory)), *key))
            if scratch is not None:
                db.execute(f"UPDATE attempts SET scratch = ? {_ATTEMPT}", (pack(scratch), *key))
            if is_last:
                db.execute(f"UPDATE attempts SET secret = ? {_ATTEMPT}", (os.urandom(len(secret)), *key))
            file = "" if report.path is None else report.sha256
            db.execute(
                "INSERT INTO outbox (run, task, round, attempt, slot, body, file) VALUES (?, ?, ?, ?, ?, ?, ?)",
                (*key, str(slot), report.body, file),
            )
            when = self._now().isoformat(timespec="seconds")
            row = (run, str(slot), slot.task, slot.round, slot.attempt, when, report.size)
            columns = "run, slot, task, round, attempt, asked_at, bytes"
            db.execute(f"INSERT OR REPLACE INTO answers ({columns}) VALUES (?, ?, ?, ?, ?, ?, ?)", row)
            fail_point("client.outbox.committing")
        fail_point("client.outbox.committed")
        self._fresh.clear()

    def received(self, run: str, receipt: Receipt, certificate: bytes = b"") -> None:
        """Note what became of a report and keep its receipt; written with the next transaction, to spare the disk.

        ``certificate`` (PEM) is that of the key which signed it: with ``authority.pem`` it proves the receipt.
        """
        self._receipts.append((receipt.status, receipt.reason, run, receipt.slot))
        self._proofs.append((run, receipt.slot, receipt.status, write(receipt), certificate))

    def receipts(self) -> dict[str, int]:
        """How many receipts are kept, by status."""
        with self._lock:
            rows = self._db.execute("SELECT status, COUNT(*) FROM receipts GROUP BY status ORDER BY status").fetchall()
        return {status: count for status, count in rows}

    def answers(self, limit: int = 100) -> list[dict[str, Any]]:
        """The newest plans that this client answered, newest first: what was asked, sent, refused and counted."""
        columns = ("run", "task", "round", "attempt", "asked_at", "bytes", "status", "reason", "counted")
        with self._lock:
            query = f"SELECT {', '.join(columns)} FROM answers ORDER BY rowid DESC LIMIT ?"
            rows = self._db.execute(query, (limit,)).fetchall()
        return [dict(zip(columns, row, strict=True)) for row in rows]

    def settle(self, settlements: Sequence[Settlement]) -> None:
        """Keep pending memory where the update counted, drop it elsewhere; forget secrets, scratch and reports."""
        if not settlements:
            return
        held_secrets = False
        with self._write() as db:
            for one in settlements:
                key = (one.run, one.task, one.round, one.attempt)
                if one.number <= self.acknowledged:
                    continue
                held = db.execute(f"SELECT scratch FROM attempts {_ATTEMPT}", key).fetchone()
                held_secrets = held_secrets or (held is not None and held[0] is not None)
                pending = db.execute(f"SELECT pending FROM attempts {_ATTEMPT}", key).fetchone()
                if one.counted and pending and pending[0] is not None:
                    db.execute("INSERT OR REPLACE INTO memory (run, body) VALUES (?, ?)", (one.run, pending[0]))
                db.execute(f"DELETE FROM attempts {_ATTEMPT}", key)
                db.execute(f"DELETE FROM outbox {_ATTEMPT}", key)
                db.execute(f"UPDATE answers SET counted = ? {_ATTEMPT}", (int(one.counted), *key))
                row = ("acknowledged", str(one.number).encode())
                db.execute("INSERT OR REPLACE INTO meta (key, value) VALUES (?, ?)", row)
            fail_point("client.settlement.applying")
        fail_point("client.settlement.applied")
        if held_secrets:
            self._empty_log()
        self._keep_named_files()

    def _empty_log(self) -> None:
        """Secure deletion reaches the database, and not what its log holds of what was deleted."""
        with self._lock:
            self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()

    def enter(self, run: str) -> None:
        """Begin or go on with a run: what is left of other runs is forgotten."""
        if run == self._run:
            return
        with self._write() as db:
            for table in ("memory", "attempts", "outbox"):
                db.execute(f"DELETE FROM {table} WHERE run != ?", (run,))
        fail_point("client.run.entered")
        self._keep_named_files()
        self._run = run

    def _keep_named_files(self) -> None:
        """Remove the files of reports that no row names."""
        with self._lock:
            rows = self._db.execute("SELECT file FROM outbox WHERE file != ''").fetchall()
        self._files.keep_only({row[0] for row in rows})

    @property
    def acknowledged(self) -> int:
        """The number of the last settlement that was applied."""
        return int(self.get("acknowledged") or 0)

    def get(self, key: str) -> bytes | None:
        """A small value by its key."""
        if key in self._notes:
            return self._notes[key]
        row = self._one("SELECT value FROM meta WHERE key = ?", key)
        return row[0] if row else None

    def noted(self, prefix: str) -> dict[str, bytes]:
        """The small values whose keys begin with ``prefix``, by key."""
        with self._lock:
            rows = self._db.execute("SELECT key, value FROM meta ORDER BY key").fetchall()
        return {key: value for key, value in rows + list(self._notes.items()) if key.startswith(prefix)}

    def note(self, key: str, value: bytes) -> None:
        """Store a small value whose loss does no harm, with the next transaction."""
        self._notes[key] = value

    def list_body(
        self, body: bytes | Parcel, *, kind: str, run: str = "", number: int | None = None, protection: str = ""
    ) -> None:
        """Add a line to ``sent.csv`` for a body that is about to leave."""
        path, parcel = self.folder / "sent.csv", body if isinstance(body, Parcel) else Parcel.of(body)
        with self._lock, path.open("a", newline="", encoding="utf-8") as file:
            lines = csv.writer(file)
            if not file.tell():
                lines.writerow(_COLUMNS)
            when, named = self._now().isoformat(timespec="seconds"), "" if number is None else number
            lines.writerow([when, run, named, kind, parcel.size, parcel.sha256, protection])

    def _attempt(self, column: str, run: str, slot: Slot) -> Any:
        row = self._one(f"SELECT {column} FROM attempts {_ATTEMPT}", run, slot.task, slot.round, slot.attempt)
        return row[0] if row else None

    def _one(self, query: str, *values: Any) -> Any:
        with self._lock:
            return self._db.execute(query, values).fetchone()

    @contextmanager
    def _write(self) -> Iterator[sqlite3.Connection]:
        """One transaction: all of it or nothing."""
        with self._lock:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                self._db.executemany(
                    "UPDATE answers SET status = ?, reason = ? WHERE run = ? AND slot = ?", self._receipts
                )
                self._db.executemany("INSERT OR REPLACE INTO receipts VALUES (?, ?, ?, ?, ?)", self._proofs)
                yield self._db
                for key, value in self._notes.items():
                    self._db.execute("INSERT OR REPLACE INTO meta (key, value) VALUES (?, ?)", (key, value))
            except BaseException:
                self._db.execute("ROLLBACK")
                raise
            self._db.execute("COMMIT")
            self._receipts, self._proofs, self._notes = [], [], {}
