"""What one client, or one address, may ask for in a minute, in memory: token buckets and counts of what is under way.

A quota keeps one client's flood from the others; an honest client does not notice it.
"""

from __future__ import annotations

import contextlib
import ipaddress
import math
import random
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from hansa.network.messages import Refusal

_MOST_KEYS = 50_000


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Every limit in one place. A burst is what may come at once after a quiet time."""

    requests_a_minute: float = 12_000.0  # of one client: rounds of a few milliseconds need some
    requests_burst: float = 2000.0
    strangers_a_minute: float = 6000.0  # enrolments, and requests that nobody signed, of one address
    strangers_burst: float = 2000.0
    guesses_a_minute: float = 20.0  # enrolments of one address that were refused
    renewals_a_minute: float = 0.5  # of one client, ten at once
    requests_at_once: int = 32  # of one client, waiting ones too
    upload_bytes: int = 8 * 2**30  # of one client, in requests under way


class Quotas:
    """The quotas of one coordinator. Each call raises ``Refusal`` (``too-many``) for whoever is over the limit."""

    def __init__(self, limits: Limits | None = None, monotonic: Callable[[], float] = time.monotonic) -> None:
        self.limits = limits or Limits()
        one = self.limits
        self._requests = Bucket(one.requests_a_minute, one.requests_burst, monotonic)
        self._strangers = Bucket(one.strangers_a_minute, one.strangers_burst, monotonic)
        self._guesses = Bucket(one.guesses_a_minute, one.guesses_a_minute, monotonic)
        self._renewals = Bucket(one.renewals_a_minute, 10.0, monotonic)
        self._lock = threading.Lock()
        self._under_way: dict[str, list[int]] = defaultdict(lambda: [0, 0])  # requests and bytes

    def request(self, who: str) -> None:
        """One request of a client, named by its certificate."""
        _refuse(self._requests.take(who), "requests")

    def stranger(self, address: str) -> None:
        """One request of an address that may be anybody's."""
        _refuse(self._strangers.take(_network(address)), "requests")

    def may_enrol(self, address: str) -> None:
        """Whether an address may try a token: not after many wrong ones."""
        _refuse(self._guesses.wait_s(_network(address)), "wrong tokens")

    def guessed(self, address: str) -> None:
        """An address tried a token that was refused."""
        self._guesses.take(_network(address))

    def renewal(self, who: str) -> None:
        """One renewal of a client's certificate."""
        _refuse(self._renewals.take(who), "renewals")

    @contextlib.contextmanager
    def under_way(self, who: str, size: int) -> Iterator[None]:
        """Count a request and the bytes that it announces, while it is being answered."""
        with self._lock:
            held = self._under_way[who]
            too_many = held[0] >= self.limits.requests_at_once
            too_large = held[1] + size > self.limits.upload_bytes
            if not (too_many or too_large):
                held[0] += 1
                held[1] += size
        if too_many or too_large:
            _refuse(1.0, "requests at once" if too_many else "bytes at once")
        try:
            yield
        finally:
            with self._lock:
                held[0] -= 1
                held[1] -= size
                if not held[0]:
                    self._under_way.pop(who, None)


class Bucket:
    """Token buckets, one a key: ``a_minute`` tokens come back, and at most ``burst`` are there at once.

    >>> bucket = Bucket(60, 2, monotonic=lambda: 0.0)
    >>> [bucket.take("berlin") for _ in range(3)]
    [0.0, 0.0, 1.0]
    """

    def __init__(self, a_minute: float, burst: float, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._rate, self._burst, self._monotonic = a_minute / 60.0, burst, monotonic
        self._lock = threading.Lock()
        self._levels: dict[str, tuple[float, float]] = {}  # tokens left, and when

    def take(self, key: str) -> float:
        """Take a token: 0, or the seconds until there is one (then none is taken)."""
        with self._lock:
            now = self._monotonic()
            level = self._level(key, now)
            if level < 1.0:
                return (1.0 - level) / self._rate
            if key not in self._levels and len(self._levels) >= _MOST_KEYS:
                self._forget(now)
            self._levels[key] = (level - 1.0, now)
            return 0.0

    def wait_s(self, key: str) -> float:
        """The seconds until there is a token, without taking it."""
        with self._lock:
            return max(0.0, (1.0 - self._level(key, self._monotonic())) / self._rate)

    def _level(self, key: str, now: float) -> float:
        level, at = self._levels.get(key, (self._burst, now))
        return min(self._burst, level + (now - at) * self._rate)

    def _forget(self, now: float) -> None:
        """Forget whoever is back at a full bucket; if that is nobody, the half that was here longest ago."""
        for key in [key for key in self._levels if self._level(key, now) >= self._burst]:
            del self._levels[key]
        if len(self._levels) >= _MOST_KEYS:
            oldest = sorted(self._levels, key=lambda key: self._levels[key][1])
            for key in oldest[: _MOST_KEYS // 2]:
                del self._levels[key]


def _refuse(wait_s: float, what: str) -> None:
    """Refuse with the time to come back, spread out so that not everybody comes at once."""
    if wait_s > 0:
        later = math.ceil(wait_s * random.uniform(1.0, 1.5))
        raise Refusal(
            "too-many",
            f"expected fewer {what}, found more than the quota allows; come back in {later} s",
            retry_after_s=later,
        )


def _network(address: str) -> str:
    """Whom an address belongs to: itself, or the /64 network of an IPv6 address."""
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return address
    if isinstance(found, ipaddress.IPv4Address):
        return address
    return str(found.ipv4_mapped or ipaddress.IPv6Network((found, 64), strict=False))
