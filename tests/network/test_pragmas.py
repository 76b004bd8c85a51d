"""A database that is being brought in order by somebody else is waited for."""

import contextlib
import sqlite3

import pytest

from hansa.network.pragmas import tell


@pytest.fixture
def holder(tmp_path):
    """A connection that holds the database alone, and where it lies."""
    path = tmp_path / "own.db"
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute("CREATE TABLE some (value)").close()
        db.execute("BEGIN EXCLUSIVE").close()
        yield db, path


def test_a_locked_database_is_told_once_it_is_free(holder):
    db, path = holder
    slept = []

    def sleep(seconds):
        slept.append(seconds)
        if len(slept) == 3:
            db.execute("COMMIT").close()

    with contextlib.closing(sqlite3.connect(path, timeout=0)) as waiting:
        tell(waiting, ("journal_mode=WAL", "synchronous=FULL"), 10, sleep)
        assert waiting.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert len(slept) == 3


def test_patience_ends_and_other_errors_are_told_at_once(holder):
    _, path = holder
    with contextlib.closing(sqlite3.connect(path, timeout=0)) as waiting:
        with pytest.raises(sqlite3.OperationalError, match="locked"):
            tell(waiting, ("journal_mode=WAL",), 0)
        with pytest.raises(sqlite3.OperationalError, match="syntax"):
            tell(waiting, ("=",), 10)
