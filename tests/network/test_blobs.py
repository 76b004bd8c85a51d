import hashlib
import stat

import pytest

from hansa.core.errors import ProtocolError
from hansa.network.blobs import Blobs, write_file


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
