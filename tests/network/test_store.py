import errno
import subprocess
import sys

import pytest

from hansa.core.errors import InputError
from hansa.network.store import Store, put


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


def test_a_folder_of_another_schema_is_refused(tmp_path):
    store = Store(tmp_path)
    store.put("schema", b"99")
    store.close()
    with pytest.raises(InputError, match="schema 1, found 99"):
        Store(tmp_path)


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
