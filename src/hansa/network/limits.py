"""What one connection may cost a coordinator: deadlines, lowest speeds, sizes and numbers, and a count of every cut.

Nothing here does I/O or looks at a clock: times are seconds of one monotonic clock, given as arguments. ``sockets.py``
holds connections to these limits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Generic, TypeVar

from hansa.core.errors import InputError

T = TypeVar("T")

CUTS: Mapping[str, str] = {
    "handshake": "TLS was not agreed on in time",
    "headers": "a request's headers were not complete in time",
    "slow body": "a request's body came slower than it may",
    "slow reader": "an answer was read slower than it may be",
    "unread body": "a body went on after its request had been answered",
    "malformed": "a request was not HTTP, or its headers were too large",
    "full": "as many connections were open as may be",
    "address": "an address had more connections without a client's certificate than it may",
    "client": "a client had more connections than it may",
    "descriptors": "the process had no file descriptor left",
}


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a coordinator grants a connection. Times are in seconds.

    A *stranger* is a connection whose other end has not shown a client's certificate: it is still in its handshake, or
    about to enrol. Where there are too many connections, the oldest stranger goes; no client has to make room for one.

    >>> Limits(headers_s=0)
    Traceback (most recent call last):
    ...
    hansa.core.errors.InputError: Limits: expected headers_s above 0, found 0
    """

    handshake_s: float = 10.0
    """To agree on TLS, from connecting."""
    headers_s: float = 10.0
    """To send the whole of a request's headers, from connecting or from their first byte."""
    idle_s: float = 75.0
    """Between two requests on one connection."""
    slowest_bytes_per_s: float = 512.0
    """What a body has to bring, and what has to be read of an answer; see ``Patience``."""
    grace_s: float = 10.0
    """Silence that is allowed at the beginning of a body or of an answer."""
    longest_silence_s: float = 30.0
    """Silence that is allowed later, once bytes moved fast enough."""
    header_bytes: int = 16 * 1024
    """The most that a request's headers may have."""
    connections: int = 12_000
    """Open at one time; fewer where the process may not open as many files, see ``sockets.room``."""
    connections_by_client: int = 16
    """Open at one time with one client's certificate."""
    held: int = 5_000
    """Questions for work that are held open at one time, some 45 kB each. Who asks beyond is told when to come back and
    its connection is closed, so that memory has a bound however many clients there are."""
    strangers: int = 512
    """Open at one time without a client's certificate."""
    strangers_by_address: int = 64
    """Of those from one address; those from this machine itself (a proxy, say) are counted by ``strangers`` alone."""

    def __post_init__(self) -> None:
        for one in fields(self):
            if not getattr(self, one.name) > 0:
                raise InputError(f"Limits: expected {one.name} above 0, found {getattr(self, one.name)}")


class Patience:
    """How long a transfer may still stand still.

    It begins with ``grace_s`` seconds. Each second costs one, each ``slowest_bytes_per_s`` bytes earn one, up to
    ``longest_silence_s``. So a transfer at the lowest speed goes on for ever, one byte a second ends after about
    ``grace_s``, and a fast one may pause for ``longest_silence_s``.

    >>> patience = Patience(Limits(slowest_bytes_per_s=100, grace_s=10), now=0.0)
    >>> patience.is_over(now=9.0, moved=9), patience.is_over(now=11.0, moved=11)
    (False, True)
    """

    __slots__ = ("_left_s", "_limits", "_moved", "_now")

    def __init__(self, limits: Limits, now: float, moved: int = 0) -> None:
        self._limits, self._now, self._moved, self._left_s = limits, now, moved, limits.grace_s

    def is_over(self, now: float, moved: int) -> bool:
        """Whether it is used up, ``moved`` bytes having moved since the beginning."""
        earned = (moved - self._moved) / self._limits.slowest_bytes_per_s
        most = max(self._limits.longest_silence_s, self._limits.grace_s)
        self._left_s = min(most, self._left_s - (now - self._now) + earned)
        self._now, self._moved = now, moved
        return self._left_s <= 0


@dataclass
class Groups(Generic[T]):
    """Connections by address or by client, oldest first: beyond ``most`` of one group, its oldest has to go.

    >>> groups = Groups[str](most=1)
    >>> groups.add("berlin", "first"), groups.add("berlin", "second"), groups.add("paris", "third")
    (None, 'first', None)
    """

    most: int
    members: dict[str, dict[T, None]] = field(default_factory=dict)

    def add(self, group: str, one: T) -> T | None:
        """Count one more; the one that has to go for it, if any (it stays counted until ``remove``)."""
        found = self.members.setdefault(group, {})
        found[one] = None
        return next(iter(found)) if len(found) > self.most else None

    def remove(self, group: str, one: T) -> None:
        """Count one less, if it was counted; a group without any is forgotten."""
        found = self.members.get(group)
        if found is not None:
            found.pop(one, None)
            if not found:
                del self.members[group]


__all__ = ["CUTS", "Groups", "Limits", "Patience"]
