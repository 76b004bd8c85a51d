"""The coordinator's durable state: one SQLite file, its tables, and one transaction at a time for whoever writes.

Write-ahead log with ``synchronous=FULL``: what a transaction committed survives a loss of power. The times in it are
the server's own, in seconds since 1970.
"""

from __future__ import annotations

import contextlib
import errno
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects.sqlite import insert as upsert

from hansa.core.errors import InputError
from hansa.network.failpoints import fail_point
from hansa.network.lock import take
from hansa.network.messages import Refusal
from hansa.network.pragmas import tell

_SCHEMA = "2"
_FILE = "coordinator.db"
_BUSY_S = 10.0  # that a transaction waits for another process to let go of the database
_BRIEFLY_S = 0.25  # that a request's first look waits for it
_EPOCH = "epoch"  # key of how many coordinators have served this folder, one after the other
metadata = sa.MetaData()

meta = sa.Table("meta", metadata, sa.Column("key", sa.String, primary_key=True), sa.Column("value", sa.LargeBinary))
tokens = sa.Table(
    "tokens",
    metadata,
    sa.Column("id", sa.String, primary_key=True),
    sa.Column("secret_hash", sa.String, nullable=False),  # the secret itself is in the token alone
    sa.Column("pattern", sa.String, nullable=False),
    sa.Column("uses_left", sa.Integer, nullable=False),
    sa.Column("again", sa.Boolean, nullable=False),  # may replace the certificate of a client that exists
    sa.Column("created_at", sa.Float, nullable=False),
    sa.Column("expires_at", sa.Float),
)
token_uses = sa.Table(
    "token_uses",
    metadata,
    sa.Column("token", sa.String, primary_key=True),
    sa.Column("client", sa.String, primary_key=True),
    sa.Column("used_at", sa.Float, nullable=False),
)
clients = sa.Table(
    "clients",
    metadata,
    sa.Column("name", sa.String, primary_key=True),
    sa.Column("certificate_sha256", sa.String, nullable=False, unique=True),
    sa.Column("certificate", sa.LargeBinary, nullable=False),
    sa.Column("key_hash", sa.String, nullable=False),
    sa.Column("enrolled_at", sa.Float, nullable=False),
    sa.Column("revoked_at", sa.Float),
    sa.Column("last_seen", sa.Float),
)
presence = sa.Table(  # who takes part in a run
    "presence",
    metadata,
    sa.Column("run", sa.String, primary_key=True),
    sa.Column("client", sa.String, primary_key=True),
    sa.Column("hello_at", sa.Float, nullable=False),
    sa.Column("version", sa.String, nullable=False),
    sa.Column("said_goodbye", sa.Boolean, nullable=False, default=False),
)
slots = sa.Table(
    "slots",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("run", sa.String, nullable=False),
    sa.Column("slot", sa.String, nullable=False),
    sa.Column("task", sa.String, nullable=False),
    sa.Column("round", sa.Integer, nullable=False),
    sa.Column("attempt", sa.Integer, nullable=False),
    sa.Column("learn", sa.Boolean, nullable=False),
    sa.Column("state", sa.String, nullable=False),  # planned -> collecting -> frozen -> aggregated; or abandoned
    sa.Column("plan_hash", sa.String, nullable=False),
    sa.Column("started_at", sa.Float, nullable=False),
    sa.Column("elapsed_s", sa.Float, nullable=False, server_default="0"),  # open so far, by a clock that nobody sets
    sa.Column("deadline_s", sa.Float),  # how long it may be open; None: until everyone has answered
    sa.Column("goal", sa.Integer),  # accepted reports that close it; None: everyone is waited for
    sa.Column("buffered", sa.Boolean, nullable=False, server_default="0"),  # its reports are counted as they arrive
    sa.UniqueConstraint("run", "slot"),
    sa.Index("slots_by_state", "run", "state"),
)
assignments = sa.Table(
    "assignments",
    metadata,
    sa.Column("slot_id", sa.Integer, primary_key=True),
    sa.Column("client", sa.String, primary_key=True),
    sa.Column("position", sa.Integer, nullable=False),
    sa.Column("body", sa.LargeBinary),
    sa.Column("asked_s", sa.Float, nullable=False, server_default="0"),  # how long the slot had been open then
    sa.Column("given_up", sa.Boolean, nullable=False, server_default="0"),  # of a buffered slot: waited for no more
    sa.Index("assignments_by_client", "client"),
)
vectors = sa.Table(
    "vectors",
    metadata,
    sa.Column("slot_id", sa.Integer, primary_key=True),
    sa.Column("name", sa.String, primary_key=True),
    sa.Column("sha256", sa.String, nullable=False),
)
reports = sa.Table(
    "reports",
    metadata,
    sa.Column("slot_id", sa.Integer, primary_key=True),  # with the client: at most one report an exchange
    sa.Column("client", sa.String, primary_key=True),
    sa.Column("sha256", sa.String, nullable=False),
    sa.Column("size", sa.Integer, nullable=False),
    sa.Column("status", sa.String, nullable=False),  # accepted, refused, late
    sa.Column("reason", sa.String, nullable=False, default=""),
    sa.Column("form", sa.String, nullable=False, default=""),  # sizes and names, to compare rows of one slot
    sa.Column("received_at", sa.Float, nullable=False),
    sa.Column("arrival", sa.Integer, nullable=False, server_default="0"),  # 1, 2, 3, ... in the order of arrival
    sa.Column("took_s", sa.Float),  # from plan to report, where the coordinator was there all the while
    sa.Column("counted_in", sa.String),  # the buffer that holds it, named by its newest slot
    sa.Index("reports_by_arrival", "arrival"),
    sa.Index("reports_by_client", "client", "arrival"),
)
secrets = sa.Table(
    "secrets",
    metadata,
    sa.Column("run", sa.String, primary_key=True),
    sa.Column("name", sa.String, primary_key=True),
    sa.Column("material", sa.LargeBinary, nullable=False),
)
settlements = sa.Table(
    "settlements",
    metadata,
    sa.Column("number", sa.Integer, primary_key=True),
    sa.Column("run", sa.String, nullable=False),
    sa.Column("task", sa.String, nullable=False),
    sa.Column("round", sa.Integer, nullable=False),
    sa.Column("attempt", sa.Integer, nullable=False),
    sa.Column("client", sa.String, nullable=False),
    sa.Column("counted", sa.Boolean, nullable=False),
    sa.UniqueConstraint("run", "task", "round", "attempt", "client"),
    sa.Index("settlements_by_client", "client", "number"),
    sqlite_autoincrement=True,  # a number is never given twice
)
counters = sa.Table(
    "counters",
    metadata,
    sa.Column("run", sa.String, primary_key=True),
    sa.Column("kind", sa.String, primary_key=True),
    sa.Column("direction", sa.String, primary_key=True),
    sa.Column("task", sa.String, primary_key=True),
    sa.Column("round", sa.Integer, primary_key=True),
    sa.Column("count", sa.Integer, nullable=False),
    sa.Column("bytes", sa.Integer, nullable=False),
)
renewals = sa.Table(  # the next certificate of a client, until it is used for the first time
    "renewals",
    metadata,
    sa.Column("name", sa.String, primary_key=True),
    sa.Column("certificate_sha256", sa.String, nullable=False, unique=True),
    sa.Column("certificate", sa.LargeBinary, nullable=False),
    sa.Column("key_hash", sa.String, nullable=False),
)
audit = sa.Table(  # who did what; each line's hash covers the one before
    "audit",
    metadata,
    sa.Column("number", sa.Integer, primary_key=True),
    sa.Column("at", sa.Float, nullable=False),
    sa.Column("kind", sa.String, nullable=False),
    sa.Column("who", sa.String, nullable=False),
    sa.Column("what", sa.String, nullable=False),  # JSON
    sa.Column("hash", sa.String, nullable=False),
    sa.Index("audit_by_kind", "kind", "number"),
    sa.Index("audit_by_client", "kind", "who", "number"),
)


class Superseded(Refusal):
    """Another coordinator has taken over this folder since this one locked it: this one writes no more, and stops."""

    def __init__(self, folder: Path, epoch: int, found: int) -> None:
        super().__init__(
            "superseded",
            f"{folder}: expected to be its only coordinator (epoch {epoch}), found that another one has taken over "
            f"(epoch {found}); this one wrote nothing more and stops. Does the disk hold locks? Start one at a time",
            retry_after_s=1,
        )


class Store:
    """The database in a coordinator's state folder. Several processes may open it; one may serve it (``lock``).

    A lock file keeps a second coordinator out. Where it does not (some network file systems), the epoch does: the one
    that came later has the larger number, and the older one finds it in its next transaction that would write.
    """

    def __init__(self, folder: Path, clock: Callable[[], float] = time.time) -> None:
        self.folder, self.clock = folder, clock
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.engine = sa.create_engine(f"sqlite:///{folder / _FILE}", connect_args={"timeout": _BUSY_S})
        sa.event.listen(self.engine, "connect", _configure)
        sa.event.listen(self.engine, "begin", _begin)
        self._lock: Any = None
        self._mine, self._readers = threading.local(), list[sqlite3.Connection]()  # each thread's, for ``row``
        self._is_closed = False
        self._patient: int | None = None  # the thread that waits for as long as another process keeps the database
        self._epoch: int | None = None  # ours, once this folder is ours to serve
        with self.write() as db:
            if (found := _schema_of(db)) != _SCHEMA:
                _migrate(db, found, folder)
                metadata.create_all(db)
                put(db, "schema", _SCHEMA.encode())
            fail_point("coordinator.store.creating")
        fail_point("coordinator.store.created")

    @contextlib.contextmanager
    def write(self) -> Iterator[sa.Connection]:
        """One transaction that may write: committed at the end, rolled back by an exception.

        Raises ``OSError`` (ENOSPC) when the disk is full, ``Superseded`` when another coordinator has taken over, and
        ``OperationalError`` (see ``is_busy``) when another process does not let go of the database; the thread that
        called ``lock``, which drives the rounds, waits.
        """
        try:
            with self._begun() as db:
                yield db
        except sa.exc.OperationalError as error:
            if "disk is full" in str(error.orig):
                raise OSError(errno.ENOSPC, f"{_FILE}: {error.orig}") from error
            raise

    @contextlib.contextmanager
    def _begun(self) -> Iterator[sa.Connection]:
        """A transaction that may write, as soon as nobody else does."""
        while True:
            db = self.engine.connect().execution_options(hansa_begin="BEGIN IMMEDIATE")
            try:
                transaction = db.begin()
                break
            except sa.exc.OperationalError as error:
                db.close()
                if not is_busy(error) or threading.get_ident() != self._patient:
                    raise
        with db, transaction:
            self._refuse_superseded(db)
            yield db

    def refuse_superseded(self) -> None:
        """Raise ``Superseded`` when another coordinator has taken over: for whoever waits and writes nothing."""
        with self.read() as db:
            self._refuse_superseded(db)

    def _refuse_superseded(self, db: sa.Connection) -> None:
        """The same within a transaction; asked of the driver itself, as each transaction comes by here."""
        if self._epoch is None:
            return
        driver: Any = db.connection.driver_connection
        row = driver.execute("SELECT value FROM meta WHERE key = ?", (_EPOCH,)).fetchone()
        found = int(row[0]) if row else 0  # none: somebody put another database here
        if found != self._epoch:
            raise Superseded(self.folder, self._epoch, found)

    @contextlib.contextmanager
    def read(self) -> Iterator[sa.Connection]:
        """One transaction that sees one state of the database and waits for nobody."""
        with self.engine.connect().execution_options(hansa_begin="BEGIN") as db, db.begin():
            yield db

    def row(self, statement: str, *values: Any) -> Any:
        """The first row of one SELECT, or None: what every request asks, hence asked of the driver itself.

        It takes 20 microseconds, and is a transaction of its own. Raises ``OperationalError`` where another process
        keeps the database to itself.
        """
        found: sqlite3.Connection | None = getattr(self._mine, "reader", None)
        if found is None:
            brief: Any = {"timeout": _BRIEFLY_S, "isolation_level": None, "check_same_thread": False}
            found = sqlite3.connect(self.folder / _FILE, **brief)
            if not self._is_closed:  # else it ends with this call
                self._mine.reader = found
                self._readers.append(found)
        try:
            return found.execute(statement, values).fetchone()
        except sqlite3.OperationalError as error:
            raise sa.exc.OperationalError(statement, values, error) from error

    def get(self, key: str) -> bytes | None:
        """A value by its key."""
        with self.read() as db:
            value: bytes | None = db.scalar(sa.select(meta.c.value).where(meta.c.key == key))
            return value

    def put(self, key: str, value: bytes) -> None:
        """Store a value; a value that is there already is not written again."""
        if self.get(key) != value:
            with self.write() as db:
                put(db, key, value)

    @staticmethod
    def existing(folder: Path) -> Store:
        """The store in a folder that a coordinator has used; ``InputError`` for any other, which stays as it is."""
        if not (folder / _FILE).exists():
            raise InputError(
                f"{folder}: expected the state folder of a coordinator, found none there; "
                f"give --state, or begin with: hansa serve app.py --state {folder}"
            )
        return Store(folder)

    def lock(self) -> None:
        """Be the one coordinator of this folder until ``close``; ``InputError`` when another process is."""
        braced = str(self.folder).replace("{", "{{").replace("}", "}}")  # in a text that will be formatted
        self._lock = take(
            self.folder / "coordinator.lock",
            f"{braced}: expected a state folder that no coordinator is serving, found one at work "
            "(process {process}); stop it, or use another --state",
        )
        self._patient = threading.get_ident()
        with self.write() as db:
            epoch = int(db.scalar(sa.select(meta.c.value).where(meta.c.key == _EPOCH)) or 0) + 1
            put(db, _EPOCH, str(epoch).encode())
        self._epoch = epoch
        fail_point("coordinator.store.locked")

    def close(self) -> None:
        """Close every connection and let the next coordinator in."""
        self._is_closed, self._mine = True, threading.local()
        while self._readers:
            self._readers.pop().close()
        self.engine.dispose()
        if self._lock is not None:
            self._lock.close()
            self._lock = None


def is_busy(error: Exception) -> bool:
    """Whether a transaction failed because another process keeps the database to itself."""
    return isinstance(error, sa.exc.OperationalError) and "database is locked" in str(error)


def put(db: sa.Connection, key: str, value: bytes) -> None:
    """Store a value within a transaction."""
    row = upsert(meta).values(key=key, value=value)
    db.execute(row.on_conflict_do_update(index_elements=["key"], set_={"value": value}))


# What leads from a schema to the next, in one transaction; tables that are new need no step.
_ROUNDS_TO_2 = (
    "ALTER TABLE slots ADD COLUMN elapsed_s FLOAT DEFAULT '0' NOT NULL",
    "ALTER TABLE slots ADD COLUMN deadline_s FLOAT",
    "ALTER TABLE slots ADD COLUMN goal INTEGER",
    "ALTER TABLE slots ADD COLUMN buffered BOOLEAN DEFAULT '0' NOT NULL",
    "CREATE INDEX slots_by_state ON slots (run, state)",
    "ALTER TABLE assignments ADD COLUMN asked_s FLOAT DEFAULT '0' NOT NULL",
    "ALTER TABLE assignments ADD COLUMN given_up BOOLEAN DEFAULT '0' NOT NULL",
    "ALTER TABLE reports ADD COLUMN arrival INTEGER DEFAULT '0' NOT NULL",
    "ALTER TABLE reports ADD COLUMN took_s FLOAT",
    "ALTER TABLE reports ADD COLUMN counted_in VARCHAR",
    "UPDATE reports SET arrival = rowid",  # rows are never removed, hence these are in the order of arrival
    "CREATE INDEX reports_by_arrival ON reports (arrival)",
    "CREATE INDEX reports_by_client ON reports (client, arrival)",
)
_STEPS: Mapping[str, tuple[str, Sequence[str]]] = {"1": ("2", _ROUNDS_TO_2)}


def _schema_of(db: sa.Connection) -> str:
    """The schema of the tables that are there; empty where there are none.

    Tables without a number are of schema 1, and of a process that died between the two.
    """
    if not sa.inspect(db).has_table("meta"):
        return ""
    return (db.scalar(sa.select(meta.c.value).where(meta.c.key == "schema")) or b"1").decode()


def _migrate(db: sa.Connection, found: str, folder: Path) -> None:
    """Bring the tables of an older hansa to this schema; ``InputError`` for those of a newer one."""
    while found in _STEPS:
        found, steps = _STEPS[found]
        for step in steps:
            db.exec_driver_sql(step)
    if found not in ("", _SCHEMA):
        raise InputError(
            f"{folder}: expected a state folder of schema {_SCHEMA} or older, found {found}, of a newer hansa; "
            "install the version that made it, or use another --state"
        )


def _configure(connection: Any, _record: Any) -> None:
    """What every connection is told; transactions are begun by us, not by the driver."""
    connection.isolation_level = None
    own = (f"busy_timeout={_BUSY_S * 1000:.0f}", "journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON")
    tell(connection, own, _BUSY_S)


def _begin(db: sa.Connection) -> None:
    db.exec_driver_sql(db.get_execution_options().get("hansa_begin", "BEGIN"))
