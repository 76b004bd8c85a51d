"""Messages between a simulation and its worker processes: small ones through a pipe, arrays through shared memory.

A message is a pickle whose large buffers are laid into a ``Region`` that both sides see, and read there without a copy
(pickle protocol 5, out-of-band buffers). Regions are anonymous shared mappings made before the fork, and not files
under /dev/shm, which containers often limit to 64 MB; pages that are never written to cost nothing. What does not fit
goes through the pipe.

Pickle is allowed here and nowhere else: both ends are one program on one machine, forked from one another, and nothing
that came from outside of it reaches this pipe as bytes to be unpickled.
"""

from __future__ import annotations

import mmap
import os
import pickle
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

_SMALL = 4096  # bytes: what is shorter travels in the pipe
_ALIGNED = 64
SAFE_BYTES = 4096  # a message that fits into any pipe, so that sending it never waits for a reader (macOS: 8 KiB)


class Place(NamedTuple):
    """Where a buffer lies in a region."""

    start: int
    size: int


class Letter(NamedTuple):
    """A value as it travels: its pickle, and where the large buffers of it lie. ``lane`` is the region they lie in."""

    head: bytes | Place
    places: tuple[Place, ...]
    lane: int = 0


class Region:
    """Anonymous memory that processes forked from here share; buffers are laid one after another.

    >>> region = Region(1 << 16)
    >>> place = region.put(memoryview(b"x" * 5000))
    >>> place.size, bytes(region.view(place)[:2]), region.put(memoryview(bytes(1 << 16))) is None
    (5000, b'xx', True)
    """

    def __init__(self, size: int) -> None:
        self._memory = memoryview(mmap.mmap(-1, max(size, mmap.PAGESIZE)))
        self._filled = 0

    def clear(self) -> None:
        """Begin again at the start; what lay there may be overwritten."""
        self._filled = 0

    def put(self, buffer: memoryview) -> Place | None:
        """Copy a buffer of bytes in; None where there is no room."""
        start, size = self._filled, buffer.nbytes
        if start + size > len(self._memory):
            return None
        self._memory[start : start + size] = buffer
        self._filled = -(-(start + size) // _ALIGNED) * _ALIGNED
        return Place(start, size)

    def view(self, place: Place) -> memoryview:
        """The bytes at a place."""
        return self._memory[place.start : place.start + place.size]


def wrap(value: Any, region: Region, lane: int = 0) -> Letter:
    """``value`` as a letter whose large buffers lie in ``region``, which is cleared."""
    region.clear()
    places: list[Place] = []

    def stays(buffer: pickle.PickleBuffer) -> bool:
        """Whether a buffer stays within the pickle."""
        try:
            raw = buffer.raw()
        except BufferError:  # not contiguous
            return True
        place = region.put(raw) if raw.nbytes >= _SMALL else None
        if place is not None:
            places.append(place)
        return place is None

    head: bytes | Place = pickle.dumps(value, protocol=5, buffer_callback=stays)
    assert isinstance(head, bytes)
    if len(head) > SAFE_BYTES:
        head = region.put(memoryview(head)) or head
    return Letter(head, tuple(places), lane)


def unwrap(letter: Letter, region: Region, *, writable: bool = True, owned: bool = False) -> Any:
    """The value of a letter; its large arrays are views of ``region``, or their own where they are to be ``owned``."""
    head = letter.head if isinstance(letter.head, bytes) else region.view(letter.head)
    views: list[Any] = [region.view(place) for place in letter.places]
    if owned:
        views = [bytearray(view) for view in views]
    elif not writable:
        views = [view.toreadonly() for view in views]
    return pickle.loads(head, buffers=views)


class Channel:
    """One end of the way between a simulation and one worker.

    Letters take two lanes in turn, so that what one side has read stays as it is until it has answered, while one more
    letter may wait behind it.
    """

    def __init__(self, pipe: Connection, outgoing: Sequence[Region], incoming: Sequence[Region]) -> None:
        self.pipe, self._outgoing, self._incoming = pipe, outgoing, incoming
        self._lane = 0

    def wrap(self, value: Any) -> bytes:
        """A message to ``post``, whose large arrays now lie in the next lane."""
        return pickle.dumps(wrap(value, self._outgoing[self._lane], self._lane), protocol=5)

    def post(self, message: bytes) -> None:
        """Send what was wrapped last; raises ``OSError`` where nobody listens any more."""
        self.pipe.send_bytes(message)
        self._lane = 1 - self._lane

    def send(self, value: Any) -> None:
        """Wrap a value and post it."""
        self.post(self.wrap(value))

    def receive(self, *, owned: bool = False) -> Any:
        """The next value (see ``unwrap``); raises ``EOFError`` or ``OSError`` where the other end is gone."""
        letter = pickle.loads(self.pipe.recv_bytes())
        return unwrap(letter, self._incoming[letter.lane], owned=owned)

    def close(self) -> None:
        """Hang up."""
        self.pipe.close()


def room(wanted: int, share: int) -> int:
    """How many bytes to map where ``wanted`` may be needed: at most one ``share``-th of the machine's memory."""
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not every system says
        memory = 4 << 30
    return max(1 << 20, min(wanted, memory // share))
