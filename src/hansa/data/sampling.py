"""Samplers: which clients of a population make a round's cohort.

Each is a value with ``cohort(ids, cohort_size, key)``: some of ``ids``, in the order of ``ids``. The key alone decides;
where sampling is counted on for privacy, it must be secret. Only the ids of the chosen are ever asked for, so that
``ids`` may be a sequence that makes them (``NumberedIds``).

Positions come from one stream of 32-bit words a key: the halves, low first, of the 64-bit words of NumPy's
Philox-4x64-10, whose stream is the same in every release.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from hansa.core.errors import InputError
from hansa.core.key import Key
from hansa.data.ids import look_up

_WORDS = 2**32
_CHUNK = 2**18  # words at a time: what stays in a processor's cache


class Sampler(Protocol):
    """How a cohort is chosen. One whose groups take turns also has ``turn`` and ``of_round``: see separation.py."""

    def cohort(self, ids: Sequence[str], cohort_size: int, key: Key) -> tuple[str, ...]:
        """The clients of one round, in the order of ``ids``."""
        ...


@dataclass(frozen=True, kw_only=True)
class All:
    """Every client, whatever the cohort size.

    >>> All().cohort(("a", "b"), 1, Key.of(0))
    ('a', 'b')
    """

    def cohort(self, ids: Sequence[str], cohort_size: int, key: Key) -> tuple[str, ...]:
        """All of ``ids``."""
        return tuple(ids)


@dataclass(frozen=True, kw_only=True)
class Uniform:
    """``cohort_size`` different clients, each set of that size equally likely; all of them if there are fewer.

    >>> len(Uniform().cohort(("a", "b", "c"), 2, Key.of(0)))
    2
    """

    def cohort(self, ids: Sequence[str], cohort_size: int, key: Key) -> tuple[str, ...]:
        """A fixed number of ``ids``."""
        _check(cohort_size)
        if cohort_size >= len(ids):
            return tuple(ids)
        return look_up(ids, distinct(key, len(ids), cohort_size))


@dataclass(frozen=True, kw_only=True)
class Poisson:
    """Each client on its own with chance ``cohort_size / len(ids)``: a cohort varies in size and may be empty.

    What amplification of privacy by sampling assumes. The chance is rounded down to a multiple of 2**-32, so that the
    privacy spent is never above what was counted. Every client has a word of its own to be compared with the chance,
    so that chances are exact and independent: skipping from one chosen client to the next, or drawing their number
    first, would be O(cohort) but needs logarithms or powers, whose rounding changes the chances. A million
    words take 2 to 3 ms, and memory is that of the cohort.

    >>> Poisson().cohort(("a", "b", "c"), 3, Key.of(0))
    ('a', 'b', 'c')
    """

    def rate(self, cohort_size: int, num_clients: int) -> float:
        """Each client's chance to be in a cohort: what amplification of privacy may count on.

        >>> Poisson().rate(10, 100) <= 0.1
        True
        """
        return min(1.0, cohort_size * _WORDS // num_clients / _WORDS)

    def cohort(self, ids: Sequence[str], cohort_size: int, key: Key) -> tuple[str, ...]:
        """The ``ids`` whose own draw came up."""
        _check(cohort_size)
        if not ids:
            return ()
        threshold = cohort_size * _WORDS // len(ids)
        if threshold >= _WORDS:
            return tuple(ids)
        words = _Words(key)
        chosen = [
            start + np.flatnonzero(words.next(min(_CHUNK, len(ids) - start)) < np.uint32(threshold))
            for start in range(0, len(ids), _CHUNK)
        ]
        return look_up(ids, np.concatenate(chosen))


def distinct(key: Key, population_size: int, size: int) -> npt.NDArray[np.int64]:
    """``size`` different positions below ``population_size``, ascending, each set of that size equally likely.

    All of them where there are no more. O(size), whatever the population: words become positions by a multiplication
    and a shift (Lemire, "Fast random integer generation in an interval", ACM Trans. Model. Comput. Simul. 29(1), 2019,
    algorithm 5: the fewer than ``population_size`` of the 2**32 words that would favour some positions are passed
    over, so that there is no bias), and the first different ones are taken. Beyond half of the population, the
    positions left out are drawn instead.

    Raises ``InputError`` for negative numbers and for more than 2**32 positions.

    >>> distinct(Key.of(0), 1_000_000, 3).shape, distinct(Key.of(0), 3, 3)
    ((3,), array([0, 1, 2]))
    """
    if size < 0 or population_size < 0:
        raise InputError(f"distinct: expected numbers of 0 or more, found size {size} of {population_size}")
    if population_size > _WORDS:
        raise InputError(f"distinct: expected at most {_WORDS:,} clients, found {population_size:,}")
    if size >= population_size:
        return np.arange(population_size, dtype=np.int64)
    if 2 * size <= population_size:
        return _first(key, population_size, size)
    stays = np.ones(population_size, bool)
    stays[_first(key, population_size, population_size - size)] = False
    return np.flatnonzero(stays)


def _first(key: Key, population_size: int, size: int) -> npt.NDArray[np.int64]:
    """The first ``size`` different positions of the key's stream, ascending; ``size`` is half of them at most."""
    if not size:
        return np.zeros(0, np.int64)
    words, drawn = _Words(key), np.zeros(0, np.int64)
    expected = -population_size * math.log1p(-size / population_size)  # draws until so many are different
    while True:
        drawn = np.concatenate(
            [drawn, _positions(words.next(int(expected + 5 * math.sqrt(expected)) + 8), population_size)]
        )
        positions, first = np.unique(drawn, return_index=True)
        if len(positions) >= size:
            latest = np.partition(first, size - 1)[size - 1]
            chosen: npt.NDArray[np.int64] = positions[first <= latest]
            return chosen


def _positions(words: npt.NDArray[np.uint32], population_size: int) -> npt.NDArray[np.int64]:
    """Positions below ``population_size``, each equally likely; some words give none."""
    products = words * np.uint64(population_size)
    fair = products.astype(np.uint32) >= np.uint32(_WORDS % population_size)  # the low half
    return (products[fair] >> np.uint64(32)).astype(np.int64)


class _Words:
    """A key's stream of 32-bit words, so many at a time."""

    def __init__(self, key: Key) -> None:
        self._bits = key.generator().bit_generator
        self._rest = np.zeros(0, np.uint32)

    def next(self, count: int) -> npt.NDArray[np.uint32]:
        """The next ``count`` words."""
        raw = self._bits.random_raw(max(0, count - len(self._rest) + 1) // 2)
        words = np.concatenate([self._rest, raw.astype("<u8", copy=False).view("<u4")])
        self._rest = words[count:]
        return words[:count]


def _check(cohort_size: int) -> None:
    if cohort_size < 1:
        raise InputError(f"cohort_size: expected 1 or more, found {cohort_size}")
