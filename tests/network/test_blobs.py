import errno
import hashlib
import stat
import threading

import numpy as np
import pytest

from hansa.core.errors import ProtocolError
from hansa.network.blobs import SMALL, Blobs, at_hand, read_pieces, write_file
from hansa.wire import lay_out, pack


def test_a_blob_is_named_by_its_content(tmp_path):
    blobs = Blobs(tmp_path)
    name = blobs.put(b"one")
    assert name == hashlib.sha256(b"one").hexdigest()
    assert blobs.put(b"one") == name
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_changed_file_is_not_believed(tmp_path):
    blobs = Blobs(tmp_path)
    name = blobs.put(b"one")
    (tmp_path / name).write_bytes(b"two")
    with pytest.raises(ProtocolError, match="expected content with this SHA-256"):
        blobs.get(name)


@pytest.mark.parametrize("name", ["../secret", "a" * 63, "A" * 64, "", "0" * 64])
def test_only_a_hash_that_is_there_names_a_blob(tmp_path, name):
    (tmp_path / "secret").write_bytes(b"x")
    blobs = Blobs(tmp_path / "blobs")
    assert blobs.path(name) is None
    with pytest.raises(KeyError):
        blobs.get(name)


def test_what_is_not_kept_is_removed_with_what_a_crash_left(tmp_path):
    blobs = Blobs(tmp_path)
    kept, other = blobs.put(b"kept"), blobs.put(b"other")
    (tmp_path / ".new-crash").write_bytes(b"half")
    blobs.keep_only({kept})
    assert [path.name for path in tmp_path.iterdir()] == [kept]
    assert blobs.path(other) is None


def test_a_private_file_is_its_owners_alone(tmp_path):
    write_file(tmp_path / "key", b"secret", private=True)
    assert stat.S_IMODE((tmp_path / "key").stat().st_mode) == 0o600


def test_what_a_killed_writer_left_is_removed_by_the_next_one_of_the_same_file(tmp_path):
    for name in (".new-key-1", ".new-key-2", ".new-other-1"):
        (tmp_path / name).write_bytes(b"half")
    write_file(tmp_path / "key", b"secret")
    assert {path.name for path in tmp_path.iterdir()} == {"key", ".new-other-1"}


def test_a_tree_is_stored_as_its_body_piece_by_piece(tmp_path):
    tree = {"values": np.arange(2.0**18), "name": "x"}
    blobs = Blobs(tmp_path)
    name = blobs.put(lay_out(tree))
    assert blobs.get(name) == pack(tree)
    assert name == hashlib.sha256(pack(tree)).hexdigest()


def test_a_long_blob_is_mapped_and_a_short_one_read(tmp_path):
    blobs = Blobs(tmp_path)
    for size in (2**16, 2**16 + 1):
        body = blobs.get(blobs.put(bytes(size)))
        assert body == bytes(size)
        assert isinstance(body, bytes) == (size == 2**16)


def test_a_blob_that_cannot_be_mapped_is_read(tmp_path, monkeypatch):
    def full(_path):
        raise OSError(errno.EMFILE, "too many open files")

    monkeypatch.setattr("hansa.network.blobs.map_file", full)
    blobs = Blobs(tmp_path)
    assert blobs.get(blobs.put(bytes(2**17))) == bytes(2**17)


def test_what_is_at_hand_of_a_file_is_a_beginning_of_what_was_asked_for_or_nothing(tmp_path, monkeypatch):
    path, body = tmp_path / "file", bytes(range(256)) * 300
    path.write_bytes(body)
    with path.open("rb", buffering=0) as file:
        for first, size in ((0, 10), (100, 70_000), (76_790, 100), (76_800, 5)):
            found = at_hand(file, first, size) or b""
            assert body[first : first + size].startswith(found)
        monkeypatch.delattr("os.RWF_NOWAIT", raising=False)  # as on other systems
        assert at_hand(file, 0, 10) is None


def test_what_is_written_to_a_mapped_blob_changes_no_file(tmp_path):
    blobs = Blobs(tmp_path)
    name = blobs.put(bytes(2 * SMALL))
    blobs.get(name)[0] = 7
    assert blobs.get(name)[0] == 0


def test_a_file_is_taken_in_under_its_name(tmp_path):
    blobs, name = Blobs(tmp_path / "blobs"), hashlib.sha256(b"one").hexdigest()
    for _ in range(2):
        (tmp_path / name).write_bytes(b"one")
        assert blobs.put(tmp_path / name) == name
        assert not (tmp_path / name).exists()
        assert blobs.get(name) == b"one"


@pytest.mark.parametrize("damage", [b"", b"on", b"two"])
def test_a_blob_that_was_damaged_is_replaced_by_the_next_process_that_stores_it(tmp_path, damage):
    name = Blobs(tmp_path).put(b"one")
    (tmp_path / name).write_bytes(damage)
    again = Blobs(tmp_path)
    with pytest.raises(ProtocolError, match="the disk may be failing"):
        again.get(name)
    assert again.put(b"one") == name
    assert again.get(name) == b"one"


def test_a_full_disk_leaves_nothing_behind_and_the_next_try_works(tmp_path, monkeypatch):
    blobs = Blobs(tmp_path)
    first = blobs.put(b"first")

    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("hansa.network.blobs.os.fsync", full)
        for body in (b"one", lay_out({"a": 1})):
            with pytest.raises(OSError, match="No space"):
                blobs.put(body)
    assert [path.name for path in tmp_path.iterdir()] == [first]
    assert blobs.get(first) == b"first"
    assert blobs.get(blobs.put(b"one")) == b"one"


def test_nothing_is_removed_while_somebody_stores(tmp_path):
    blobs, rows = Blobs(tmp_path), set()

    def sweep():
        with blobs.sweeping():
            blobs.keep_only(rows)

    with blobs.storing():
        sweeper = threading.Thread(target=sweep)
        sweeper.start()
        name = blobs.put(b"one")
        rows.add(name)
    sweeper.join(10)
    assert blobs.get(name) == b"one"


@pytest.mark.parametrize(("first", "stop"), [(0, 0), (0, 1), (3, 5000), (0, 3_000_000), (2_999_999, 3_000_000)])
def test_pieces_of_a_file_are_its_bytes_and_small_at_first(tmp_path, first, stop):
    body = np.arange(750_000, dtype=np.uint32).tobytes()
    (tmp_path / "file").write_bytes(body)
    pieces = list(read_pieces(tmp_path / "file", first, stop))
    assert b"".join(pieces) == body[first:stop]
    assert all(len(piece) <= 4096 + 1024 * i for i, piece in enumerate(pieces))
