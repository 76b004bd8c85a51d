import errno
import shutil
import sqlite3
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest
import sqlalchemy as sa

from hansa.core.errors import InputError
from hansa.core.protocols import Slot
from hansa.network import audit
from hansa.network.coordinator import Coordinator
from hansa.network.journal import lines
from hansa.network.store import Store, is_busy, put

FIXTURES = Path(__file__).parent / "fixtures"


def unpack_fixture(name, folder):
    """A state folder as an older version left it: its database as SQL, and its blobs."""
    shutil.copytree(FIXTURES / name, folder, dirs_exist_ok=True)
    with sqlite3.connect(folder / "coordinator.db") as db:
        db.executescript((folder / "coordinator.sql").read_text())
    db.close()


def test_a_second_coordinator_is_refused_and_told_of_the_first(tmp_path):
    first, second = Store(tmp_path), Store(tmp_path)
    first.lock()
    with pytest.raises(InputError, match=r"found one at work \(process \d+\)"):
        second.lock()
    first.close()
    second.lock()
    second.close()


def test_another_process_is_refused_too(tmp_path):
    first = Store(tmp_path)
    first.lock()
    code = f"from pathlib import Path; from hansa.network.store import Store; Store(Path({str(tmp_path)!r})).lock()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "InputError" in done.stderr
    first.close()


def test_what_was_written_is_there_for_the_next_process(tmp_path):
    first = Store(tmp_path)
    first.put("key", b"value")
    first.close()
    second = Store(tmp_path)
    assert second.get("key") == b"value"
    assert second.get("other") is None
    second.close()


def test_every_commit_is_synced(tmp_path):
    store = Store(tmp_path)
    with store.read() as db:
        assert db.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
        assert db.exec_driver_sql("PRAGMA synchronous").scalar() == 2
    store.close()


# ------------------------------------------------------------------------------------------------ from schema 1 to 2


def tables(store):
    """Every table's columns and indexes, as the database has them; the order of columns does not matter."""
    with store.read() as db:
        look = sa.inspect(db)
        return {
            table: (
                sorted((c["name"], str(c["type"]), c["nullable"], c["default"]) for c in look.get_columns(table)),
                sorted((i["name"], tuple(i["column_names"])) for i in look.get_indexes(table)),
            )
            for table in look.get_table_names()
        }


def test_an_older_folder_gets_the_tables_of_a_new_one(tmp_path):
    unpack_fixture("schema_1", tmp_path / "old")
    old, new = Store(tmp_path / "old"), Store(tmp_path / "new")
    assert tables(old) == tables(new)
    assert old.get("schema") == new.get("schema") == b"2"
    old.close()
    new.close()


def test_tables_of_a_process_that_died_before_it_numbered_them_are_brought_up_to_date(tmp_path):
    unpack_fixture("schema_1", tmp_path / "old")
    with sqlite3.connect(tmp_path / "old" / "coordinator.db") as db:
        db.execute("DELETE FROM meta WHERE key = 'schema'")
    db.close()
    old, new = Store(tmp_path / "old"), Store(tmp_path / "new")
    assert tables(old) == tables(new)
    old.close()
    new.close()


def test_a_migration_that_fails_in_the_middle_leaves_the_old_tables(tmp_path, monkeypatch):
    unpack_fixture("schema_1", tmp_path)
    steps = {"1": ("2", ["ALTER TABLE slots ADD COLUMN goal INTEGER", "ALTER TABLE nonsense ADD COLUMN x INTEGER"])}
    with monkeypatch.context() as patch:
        patch.setattr("hansa.network.store._STEPS", steps)
        with pytest.raises(sa.exc.OperationalError):
            Store(tmp_path)
    store = Store(tmp_path)
    assert store.get("schema") == b"2"
    store.close()


def test_reports_that_an_older_version_froze_are_told_of_once(tmp_path, tools):
    unpack_fixture("schema_1", tmp_path)
    with sqlite3.connect(tmp_path / "coordinator.db") as db:
        db.execute("UPDATE slots SET state = 'frozen' WHERE round = 1")
    db.close()
    for _ in range(2):
        coordinator = Coordinator(Store(tmp_path), tools.federation(), tools.app)
        tools.runtime(coordinator).settle(Slot(1, 0, "update"), ("berlin",))
        coordinator.finish()
        found = audit.check(lines(coordinator.store), coordinator.authority.certificate, live=True)
        assert (found.problems, found.num_reports) == ((), 1)
        coordinator.close()


def test_looking_into_a_folder_that_is_none_of_ours_leaves_it_alone(tmp_path):
    with pytest.raises(InputError, match="expected the state folder of a coordinator"):
        Store.existing(tmp_path / "typo")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_said_as_one_and_nothing_of_the_transaction_stays(tmp_path):
    store = Store(tmp_path)

    def fill():
        with store.write() as db:
            db.exec_driver_sql("PRAGMA max_page_count = 1")
            put(db, "key", b"short")
            put(db, "key", bytes(10**6))

    with pytest.raises(OSError, match="disk is full") as caught:
        fill()
    assert caught.value.errno == errno.ENOSPC
    assert store.get("key") is None
    store.close()


def test_a_row_is_asked_for_from_any_thread_and_not_after_the_end(tmp_path):
    store = Store(tmp_path)
    store.put("name", b"value")
    chosen = "SELECT value FROM meta WHERE key = ?"
    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(lambda _: store.row(chosen, "name"), range(20))) == {(b"value",)}
    assert store.row(chosen, "another") is None
    store.close()
    assert not (tmp_path / "coordinator.db-wal").exists()  # nobody holds the database any more


def test_a_row_of_a_database_that_another_keeps_to_itself_is_busy(tmp_path):
    store = Store(tmp_path)
    store.engine.dispose()
    with closing(sqlite3.connect(tmp_path / "coordinator.db", isolation_level=None, check_same_thread=False)) as other:
        other.execute("PRAGMA locking_mode=EXCLUSIVE")
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(sa.exc.OperationalError) as caught:
            store.row("SELECT 1 FROM meta")
        assert is_busy(caught.value)
        timer = threading.Timer(0.6, other.close)  # it lets go, and who can wait has waited
        timer.start()
        assert store.get("schema") is not None
        timer.join()
    store.close()
