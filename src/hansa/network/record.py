"""An owner's record: entries that are only ever appended, chained by hash and signed, in one SQLite file.

A record is a folder: ``record.db`` and, beside it, the Ed25519 key that signs its entries (``key.pem``, mode 0600),
made for it alone. The folder is made whole under another name and gets its own by one rename, so that half a record is
never one that a crash left. An entry is that of the audit log (audit.py): canonical JSON with the SHA-256 over the hash
before it and the rest. One process at a time appends (``BEGIN IMMEDIATE``), after it has seen what others appended.
"""

from __future__ import annotations

import os
import shutil
import sqlite3
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hansa.core.errors import InputError, ProtocolError, RunError
from hansa.network.audit import START, entry_hash, read_line
from hansa.network.blobs import sync_folder
from hansa.network.failpoints import fail_point
from hansa.network.receipts import statement
from hansa.network.signing import canonical

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

FILE, KEY = "record.db", "key.pem"
_BUSY_S = 30.0
_SCHEMA = "CREATE TABLE entries (number INTEGER PRIMARY KEY, body BLOB NOT NULL, signature BLOB NOT NULL)"
_FIELDS = {"number", "at", "kind", "what", "hash"}
Entry = dict[str, Any]


class Broken(InputError):
    """A record that cannot be trusted."""


class Record:
    """The entries of a folder, all of them checked; ``Broken`` for one that is not whole.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp()) / "mine"
    >>> Record.make(folder, [("opened", {})], now=lambda: 0.0)
    >>> with Record(folder).appending() as record:
    ...     record.append("paid", {"epsilon": 1})
    >>> [entry["kind"] for entry in Record(folder).entries]
    ['opened', 'paid']
    """

    def __init__(self, folder: Path, now: Callable[[], float] = time.time) -> None:
        self.folder, self._now, self.entries = folder, now, list[Entry]()
        self._lock, self._begun = threading.RLock(), 0
        if not (folder / FILE).is_file() or not (folder / KEY).is_file():
            raise self._broken("no file or no key")
        try:
            self._key = _load_key((folder / KEY).read_bytes())
            address = f"{(folder / FILE).resolve().as_uri()}?mode=rw"
            self._db = sqlite3.connect(
                address, uri=True, isolation_level=None, check_same_thread=False, timeout=_BUSY_S
            )
        except (ValueError, TypeError, OSError, sqlite3.Error) as error:
            raise self._broken(f"{type(error).__name__}: {error}") from error
        try:
            self._db.execute("PRAGMA synchronous=EXTRA").close()  # FULL, and a journal that is gone for good
            self._catch_up()
            if not self.entries:
                raise self._broken("no entries")
        except sqlite3.Error as error:
            self._db.close()
            raise self._broken(str(error)) from error
        except BaseException:
            self._db.close()
            raise

    @staticmethod
    def make(
        folder: Path, first: Sequence[tuple[str, Mapping[str, Any]]], now: Callable[[], float] = time.time
    ) -> None:
        """A new record with its first entries, durable; a record that another process made meanwhile stays."""
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

        folder.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f"{folder.name}.new-"))  # its owner's alone
        key = Ed25519PrivateKey.generate()
        _write_private(temporary / KEY, _pem(key))
        with closing(sqlite3.connect(temporary / FILE, isolation_level=None)) as db:
            db.execute("PRAGMA synchronous=EXTRA").close()
            db.execute(_SCHEMA)
            before = START
            for number, (kind, what) in enumerate(first, 1):
                before = _insert(db, key, number, before, now(), kind, what)["hash"]
        sync_folder(temporary)
        fail_point("client.record.made")
        with suppress(OSError):  # there is one by now
            temporary.rename(folder)
        sync_folder(folder.parent)
        for left in folder.parent.glob(f"{folder.name}.new-*"):  # ours then, or of a process that was killed
            shutil.rmtree(left, ignore_errors=True)

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    @property
    def newest(self) -> Entry:
        """The last entry that was seen."""
        return self.entries[-1]

    @contextmanager
    def appending(self) -> Iterator[Record]:
        """One transaction that may append, and sees all that others appended before it; durable at its end."""
        with self._lock:
            if not (self.folder / FILE).is_file():
                raise self._broken("no file")
            try:
                self._db.execute("BEGIN IMMEDIATE").close()
            except sqlite3.OperationalError as error:  # another process keeps it, say
                raise RunError(f"{self.folder}: expected a record that can be written, found {error}") from error
            except sqlite3.Error as error:
                raise self._broken(str(error)) from error
            try:
                self._catch_up()
                self._begun = len(self.entries)
                yield self
                self._db.execute("COMMIT").close()
            except BaseException:
                del self.entries[self._begun :]
                with suppress(sqlite3.Error):  # a disk that is full has rolled back already
                    self._db.execute("ROLLBACK").close()
                raise

    def catch_up(self) -> None:
        """See what others appended, without a transaction of one's own."""
        with self._lock:
            self._catch_up()

    def append(self, kind: str, what: Mapping[str, Any]) -> None:
        """Append an entry, within ``appending``."""
        number, before = len(self.entries) + 1, self.newest["hash"]
        self.entries.append(_insert(self._db, self._key, number, before, self._now(), kind, what))

    def signature(self, what: str, fields: Mapping[str, Any]) -> str:
        """A statement signed by the record's key, in hex."""
        return self._key.sign(statement(what, fields)).hex()

    def is_signed(self, what: str, fields: Mapping[str, Any], signature: str) -> bool:
        """Whether ``signature`` is the one that this record's key gives a statement."""
        from cryptography.exceptions import InvalidSignature

        try:
            self._key.public_key().verify(bytes.fromhex(signature), statement(what, fields))
        except (InvalidSignature, ValueError):
            return False
        return True

    def _catch_up(self) -> None:
        """Check and keep the entries that are not known yet; the newest that is known must be there still."""
        known = len(self.entries)
        self._begun = known
        try:
            rows = self._db.execute(
                "SELECT number, body, signature FROM entries WHERE number >= ? ORDER BY number", (known,)
            ).fetchall()
        except sqlite3.Error as error:
            raise self._broken(str(error)) from error
        if known and (not rows or rows[0][1] != canonical(self.newest)):
            raise self._broken(f"entry {known} is gone or changed")
        for number, body, signature in rows[1 if known else 0 :]:
            self.entries.append(self._checked(number, body, signature))

    def _checked(self, number: int, body: Any, signature: Any) -> Entry:
        """The next entry, whose number, hash and signature must be right."""
        before = self.newest["hash"] if self.entries else START
        try:
            entry = read_line(body)
            fits = set(entry) == _FIELDS and entry["number"] == number == len(self.entries) + 1
            fits = fits and entry["hash"] == entry_hash(before, entry)
        except (ValueError, TypeError, AttributeError, RecursionError, ProtocolError):
            fits = False
        if not fits or not self.is_signed("record", {"hash": entry["hash"]}, bytes(signature).hex()):
            raise self._broken(f"entry {len(self.entries) + 1} is not what was signed")
        return entry

    def _broken(self, found: str) -> Broken:
        return Broken(f"{self.folder}: expected a record that is whole, found one that is broken ({found})")


def _insert(
    db: sqlite3.Connection,
    key: Ed25519PrivateKey,
    number: int,
    before: str,
    at: float,
    kind: str,
    what: Mapping[str, Any],
) -> Entry:
    """Write the entry that follows the one whose hash is ``before``."""
    fields = {"number": number, "at": round(at, 3), "kind": kind, "what": dict(what)}
    body = canonical({**fields, "hash": entry_hash(before, fields)})
    entry = read_line(body)
    signature = key.sign(statement("record", {"hash": entry["hash"]}))
    db.execute("INSERT INTO entries VALUES (?, ?, ?)", (number, body, signature)).close()
    return entry


def _write_private(path: Path, body: bytes) -> None:
    """A file that its owner alone can read, on the disk."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(handle, "wb") as file:
        file.write(body)
        file.flush()
        os.fsync(file.fileno())


def _pem(key: Ed25519PrivateKey) -> bytes:
    from cryptography.hazmat.primitives import serialization as form

    return key.private_bytes(form.Encoding.PEM, form.PrivateFormat.PKCS8, form.NoEncryption())


def _load_key(pem: bytes) -> Ed25519PrivateKey:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    key = load_pem_private_key(pem, None)
    if not isinstance(key, Ed25519PrivateKey):
        raise ValueError("another kind of key")
    return key


__all__ = ["FILE", "KEY", "Broken", "Entry", "Record"]
