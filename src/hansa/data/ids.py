"""``NumberedIds``: the ids of a large population as a sequence that holds no strings, only how to make them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from hansa.core.errors import InputError

_MOST_DIGITS = 20  # of a number that may be a place in a range; Python refuses to read very long ones


class NumberedIds(Sequence[str]):
    """``prefix`` and a number: made when asked for, and found again by reading the number; all but iteration is O(1).

    ``numbers`` is how many (``client-0``, ``client-1``, ...), or a range, which is what a slice has. Equal to another
    of the same prefix and numbers, never to a tuple.

    Raises ``InputError`` for a prefix that is no text and for numbers below 0.

    >>> ids = NumberedIds("client-", 1_000_000)
    >>> ids[7], ids.index("client-7"), "client-07" in ids, ids[2:4]
    ('client-7', 7, False, NumberedIds('client-', range(2, 4)))
    """

    __slots__ = ("_numbers", "_prefix")

    def __init__(self, prefix: str, numbers: int | range) -> None:
        if not isinstance(prefix, str):
            raise InputError(f"NumberedIds(prefix): expected a text, found {prefix!r}; give 'client-', say")
        if isinstance(numbers, int) and not isinstance(numbers, bool) and numbers >= 0:
            numbers = range(numbers)
        if not isinstance(numbers, range) or min((*numbers[:1], *numbers[-1:]), default=0) < 0:
            raise InputError(f"NumberedIds(numbers): expected a count or a range, 0 or more, found {numbers!r}")
        self._numbers = numbers
        self._prefix = prefix

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> NumberedIds: ...
    def __getitem__(self, index: int | slice) -> str | NumberedIds:
        if isinstance(index, slice):
            return NumberedIds(self._prefix, self._numbers[index])
        return f"{self._prefix}{self._numbers[index]}"

    def __iter__(self) -> Iterator[str]:
        prefix = self._prefix
        return (f"{prefix}{number}" for number in self._numbers)

    def __contains__(self, value: object) -> bool:
        return self._number(value) in self._numbers

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, NumberedIds):
            return NotImplemented
        return self._prefix == other._prefix and self._numbers == other._numbers

    def __hash__(self) -> int:
        return hash((self._prefix, self._numbers))

    def __repr__(self) -> str:
        numbers = self._numbers
        return f"NumberedIds({self._prefix!r}, {len(numbers) if numbers == range(len(numbers)) else numbers})"

    def index(self, value: Any, start: int = 0, stop: int | None = None) -> int:
        """The position of an id; ``ValueError`` where it is not there, as of any sequence."""
        number = self._number(value)
        if number in self._numbers:
            position = self._numbers.index(number)
            if (not start and stop is None) or position in range(*slice(start, stop).indices(len(self))):
                return position
        raise ValueError(f"{value!r} is not in {self!r}")

    def count(self, value: Any) -> int:
        """1 for an id that is there, else 0."""
        return int(value in self)

    def take(self, positions: npt.ArrayLike) -> tuple[str, ...]:
        """The ids at ``positions``, each from 0 to the last."""
        prefix, places = self._prefix, np.asarray(positions, np.int64)
        numbers = places * self._numbers.step + self._numbers.start
        return tuple([f"{prefix}{number}" for number in numbers.tolist()])

    def _number(self, value: object) -> int:
        """The number in an id as this class writes it; -1, which none has, for anything else."""
        if not isinstance(value, str) or not value.startswith(self._prefix):
            return -1
        digits = value[len(self._prefix) :]
        if not (digits.isascii() and digits.isdigit() and len(digits) <= _MOST_DIGITS):
            return -1
        return int(digits) if digits == "0" or digits[0] != "0" else -1


class SomeIds(Sequence[str]):
    """Those of a sequence of ids that are at some positions, which are looked up when they are asked for.

    >>> some = SomeIds(NumberedIds("c", 10**6), np.array([7, 999_999]))
    >>> len(some), some[1], some.take([0])
    (2, 'c999999', ('c7',))
    """

    __slots__ = ("_ids", "_positions")

    def __init__(self, ids: Sequence[str], positions: npt.NDArray[np.int64]) -> None:
        self._ids, self._positions = ids, positions

    def __len__(self) -> int:
        return len(self._positions)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> SomeIds: ...
    def __getitem__(self, index: int | slice) -> str | SomeIds:
        if isinstance(index, slice):
            return SomeIds(self._ids, self._positions[index])
        return self._ids[int(self._positions[index])]

    def take(self, positions: npt.ArrayLike) -> tuple[str, ...]:
        """The ids at ``positions`` among these."""
        return look_up(self._ids, self._positions[np.asarray(positions, np.int64)])


def look_up(ids: Sequence[str], positions: npt.ArrayLike) -> tuple[str, ...]:
    """The ids at some positions of any sequence of ids, touching no others.

    >>> look_up(("a", "b", "c"), [0, 2]), look_up(NumberedIds("c", 10**6), [999_999])
    (('a', 'c'), ('c999999',))
    """
    if isinstance(ids, NumberedIds | SomeIds):
        return ids.take(positions)
    return tuple([ids[i] for i in np.asarray(positions, np.int64).tolist()])
