import errno
from types import SimpleNamespace

import pytest

from hansa.network import room
from hansa.network.room import NoRoom, check_room, is_full, when_there_is_room


@pytest.fixture
def free(monkeypatch):
    """The bytes that are free; 10 more with each look."""
    state = SimpleNamespace(now=0)

    def usage(_folder):
        state.now += 10
        return SimpleNamespace(free=state.now)

    monkeypatch.setattr(room.shutil, "disk_usage", usage)
    return state


def test_too_little_room_is_said_with_what_is_needed(free, tmp_path):
    check_room(tmp_path, 10, "a round")
    with pytest.raises(NoRoom, match=r"expected 5 MB free for a round, found 2e-05") as caught:
        check_room(tmp_path, 5_000_000, "a round")
    assert is_full(caught.value)


def test_work_is_begun_again_when_as_much_is_free_as_it_needs(free, tmp_path):
    said, paused, tries = [], [], []

    def work():
        tries.append(free.now)
        check_room(tmp_path, 100, "a round")
        return "done"

    assert when_there_is_room(work, tmp_path / "not" / "there", said.append, paused.append) == "done"
    assert len(tries) == 2
    assert free.now >= 100
    assert len(paused) > 5  # it was not tried before
    assert [sentence[:24] for sentence in said] == [
        "the disk is full (" + str(tmp_path)[:6],
        "there is room on the dis",
    ]


def test_a_quota_is_tried_again_now_and_then(free, tmp_path, monkeypatch):
    monkeypatch.setattr(room.shutil, "disk_usage", lambda folder: SimpleNamespace(free=7))
    left, paused = [OSError(errno.EDQUOT, "quota"), OSError(errno.ENOSPC, "full")], []

    def work():
        if left:
            raise left.pop()

    when_there_is_room(work, tmp_path, lambda sentence: None, paused.append)
    assert sum(paused) == 120


def test_another_error_is_raised(tmp_path):
    with pytest.raises(OSError, match="gone"):
        when_there_is_room(lambda: (_ for _ in ()).throw(OSError(errno.EIO, "gone")), tmp_path, pytest.fail)
