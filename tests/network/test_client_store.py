import contextlib
import hashlib
import sqlite3

import numpy as np
import pytest

from hansa.core.errors import InputError
from hansa.core.protocols import Slot
from hansa.network.client_store import ClientStore
from hansa.network.messages import Receipt, Settlement
from hansa.network.outbox import Parcel
from hansa.wire import pack, unpack

SLOT, REPORT = Slot(1, 0, "update"), Parcel.of(b"report")
LONG = {"values": np.ones(2**18, np.float32)}  # 1 MiB, and a header


@pytest.fixture
def store(tmp_path):
    made = ClientStore(tmp_path)
    made.enter("run")
    yield made
    with contextlib.suppress(sqlite3.ProgrammingError):  # a test may have closed it
        made.close()


def settle(store, counted, number=1, slot=SLOT):
    where = {"run": "run", "task": slot.task, "round": slot.round, "attempt": slot.attempt}
    store.settle([Settlement(number=number, counted=counted, **where)])


def commit(store, slot=SLOT, value=1.0, scratch=None):
    store.commit("run", slot, REPORT, {"bias": np.full(2, value)}, scratch)


def test_memory_is_kept_when_the_update_counted(store):
    commit(store)
    assert store.memory("run") == {}
    settle(store, counted=True)
    assert store.memory("run")["bias"].tolist() == [1.0, 1.0]


def test_memory_is_dropped_when_the_update_did_not_count(store):
    commit(store)
    settle(store, counted=True)
    later = Slot(2, 0, "update")
    commit(store, later, value=9.0)
    settle(store, counted=False, number=2, slot=later)
    assert store.memory("run")["bias"].tolist() == [1.0, 1.0]


def test_a_settlement_is_applied_once(store):
    commit(store)
    settle(store, counted=True, number=5)
    commit(store, value=2.0)
    settle(store, counted=True, number=5)
    assert store.acknowledged == 5
    assert store.memory("run")["bias"].tolist() == [1.0, 1.0]


def test_a_report_is_the_same_after_a_restart_until_it_is_settled(store, tmp_path):
    commit(store, scratch={"key": 3})
    secret = store.secret("run", SLOT)
    store.close()
    again = ClientStore(tmp_path)
    assert again.outbox("run", SLOT) == REPORT
    assert again.secret("run", SLOT) == secret
    assert again.scratch("run", SLOT) == {"key": 3}
    settle(again, counted=True)
    assert (again.outbox("run", SLOT), again.scratch("run", SLOT)) == (None, None)
    assert again.secret("run", SLOT) != secret
    again.close()


def test_a_report_is_committed_whole_or_not_at_all(store):
    commit(store)
    with pytest.raises(sqlite3.IntegrityError):
        store.commit("run", SLOT, Parcel.of(b"other"), {"bias": np.zeros(2)}, None)
    assert store.outbox("run", SLOT) == REPORT
    settle(store, counted=True)
    assert store.memory("run")["bias"].tolist() == [1.0, 1.0]


def test_another_run_starts_without_memory(store):
    commit(store)
    settle(store, counted=True)
    store.enter("next")
    assert store.memory("run") == store.memory("next") == {}


def test_a_body_is_listed_with_its_hash(store):
    store.list_body(b"report", run="run", number=1, kind="update", protection="none")
    heading, line = (store.folder / "sent.csv").read_text().splitlines()
    assert heading == "time,run,round,kind,bytes,sha256,protection"
    assert line.split(",")[1:] == ["run", "1", "update", "6", hashlib.sha256(b"report").hexdigest(), "none"]


def test_a_note_is_read_at_once_and_written_in_the_end(store, tmp_path):
    store.note("released", b"x")
    assert store.get("released") == b"x"
    store.close()
    again = ClientStore(tmp_path)
    assert again.get("released") == b"x"
    again.close()


def test_a_second_participant_on_one_folder_is_refused(store):
    store.lock()
    other = ClientStore(store.folder)
    with pytest.raises(InputError, match="no other hansa join uses"):
        other.lock()
    other.close()


def test_what_was_asked_sent_and_counted_can_be_looked_up(store):
    commit(store)
    store.received("run", Receipt(slot=str(SLOT), sha256="", status="accepted"))
    settle(store, counted=True)
    [answer] = store.answers()
    assert (answer["round"], answer["bytes"], answer["status"], answer["counted"]) == (1, 6, "accepted", 1)


# ---------------------------------------------------------------------------------------------------- long reports


def files(store):
    return sorted(path.name for path in store.folder.glob("outbox/*"))


def test_a_long_report_lies_in_a_file_that_is_its_body_until_it_is_settled(store, tmp_path):
    made = store.pack(LONG)
    store.commit("run", SLOT, made, None, None)
    store.close()
    again = ClientStore(tmp_path)
    again.enter("run")
    found = again.outbox("run", SLOT)
    assert found == made
    assert found.path.read_bytes() == b"".join(found.stretch(0, found.size)) == pack(LONG)
    assert hashlib.sha256(pack(LONG)).hexdigest() == found.sha256 == files(again)[0]
    assert (unpack(found.path.read_bytes())["values"] == 1).all()
    settle(again, counted=True)
    assert files(again) == []
    again.close()


def test_a_short_report_needs_no_file(store):
    store.commit("run", SLOT, store.pack({"values": np.ones(9)}), None, None)
    assert files(store) == []


def test_files_that_no_row_names_are_removed(store, tmp_path):
    store.commit("run", SLOT, store.pack(LONG), None, None)
    store.pack({"values": np.zeros(2**18)})  # the process ended before the row was written
    (tmp_path / "outbox" / ".new-crash").write_bytes(b"half")
    store.close()
    again = ClientStore(tmp_path)
    again.enter("run")
    assert files(again) == [again.outbox("run", SLOT).sha256]
    again.enter("next")
    assert files(again) == []
    again.close()


@pytest.mark.parametrize("damage", ["changed", "cut", "gone"])
def test_a_damaged_report_is_made_anew(store, damage):
    made = store.pack(LONG)
    store.commit("run", SLOT, made, None, None)
    if damage == "gone":
        made.path.unlink()
    else:
        made.path.write_bytes(b"x" * (made.size if damage == "changed" else 7))
    assert store.outbox("run", SLOT) is None
    store.commit("run", SLOT, store.pack(LONG), None, None)
    assert store.outbox("run", SLOT) == made


def test_the_outbox_of_an_older_hansa_is_read(tmp_path):
    with contextlib.closing(sqlite3.connect(tmp_path / "client.db")) as db:
        db.execute(
            "CREATE TABLE outbox (run TEXT, task TEXT, round INTEGER, attempt INTEGER, slot TEXT, body BLOB NOT NULL,"
            " PRIMARY KEY (run, slot))"
        )
        db.execute("INSERT INTO outbox VALUES ('run', 'train', 1, 0, ?, ?)", (str(SLOT), b"report"))
        db.commit()
    store = ClientStore(tmp_path)
    assert store.outbox("run", SLOT) == REPORT
    store.close()
