"""Room on the coordinator's disk: asked for before a round opens, and waited for when it is gone."""

from __future__ import annotations

import errno
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
LEAST_FREE = 2**26  # bytes of the disk that long reports leave to the database and the log
_LOOK_EVERY_S, _TRY_EVERY_S = 1.0, 60.0  # a quota's end shows in no free space, but in a try

T = TypeVar("T")


class NoRoom(OSError):
    """Less room than what is about to happen needs; ``needed`` is how many bytes have to be free."""

    def __init__(self, sentence: str, needed: int) -> None:
        super().__init__(errno.ENOSPC, sentence)
        self.needed = needed


def is_full(error: BaseException) -> bool:
    """Whether a write failed because the disk, or a quota on it, is full."""
    return isinstance(error, OSError) and error.errno in _FULL


def check_room(folder: Path, needed: int, what: str) -> None:
    """Raise ``NoRoom`` unless so many bytes are free where ``folder`` lies."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise NoRoom(f"{folder}: expected {needed / 1e6:.6g} MB free for {what}, found {free / 1e6:.6g}", needed)


def when_there_is_room(
    work: Callable[[], T],
    folder: Path,
    say: Callable[[str], None],
    pause: Callable[[float], None] = time.sleep,
) -> T:
    """What ``work`` gives; it is begun again, as often as needed, once a full disk has room again.

    ``say(sentence)`` is told when that begins to be waited for, and when it goes on. Other errors are raised.
    """
    waited = False
    folder = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    while True:
        try:
            done = work()
        except OSError as error:
            if not is_full(error):
                raise
            if not waited:
                say(f"the disk is full ({error.strerror or error}); free some space: this goes on by itself then")
            waited = True
            _wait(folder, getattr(error, "needed", shutil.disk_usage(folder).free + 1), pause)
            continue
        if waited:
            say("there is room on the disk again")
        return done


def _wait(folder: Path, needed: int, pause: Callable[[float], None]) -> None:
    """Until so much is free, or it is time for another try."""
    for _ in range(round(_TRY_EVERY_S / _LOOK_EVERY_S)):
        pause(_LOOK_EVERY_S)
        if shutil.disk_usage(folder).free >= needed:
            return


__all__ = ["LEAST_FREE", "NoRoom", "check_room", "is_full", "when_there_is_room"]
