"""``Kept``: datasets that were made and may be wanted again, those used last up to a limit of bytes."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from hansa.data.dataset import Dataset

Pair = tuple[Dataset, Dataset | None]


class Kept:
    """Pairs (train, test) by position; beyond ``limit_bytes`` the pair used longest ago goes first.

    ``limit_bytes`` counts the arrays that the datasets show (a view as if it were a copy); None is no limit, 0 keeps
    nothing.

    >>> kept = Kept(limit_bytes=20)
    >>> for position in (0, 1, 2):
    ...     kept.put(position, (Dataset([1.5]), None))  # 8 bytes
    >>> kept.get(0) is None, kept.get(1) is None
    (True, False)
    """

    def __init__(self, limit_bytes: int | None) -> None:
        self._limit, self._bytes = limit_bytes, 0
        self._pairs: OrderedDict[int, Pair] = OrderedDict()

    def emptied(self) -> Kept:
        """One with the same limit that holds nothing yet."""
        return Kept(self._limit)

    @property
    def keeps_all(self) -> bool:
        """Whether nothing ever goes."""
        return self._limit is None

    def get(self, position: int) -> Pair | None:
        """The pair at a position, if it is kept."""
        pair = self._pairs.get(position)
        if pair is not None and self._limit is not None:
            self._pairs.move_to_end(position)
        return pair

    def put(self, position: int, pair: Pair) -> None:
        """Keep a pair that ``get`` did not find."""
        if self._limit is None:
            self._pairs[position] = pair
            return
        size = _num_bytes(pair)
        if size > self._limit or not self._limit:
            return
        self._pairs[position] = pair
        self._bytes += size
        while self._bytes > self._limit:
            self._bytes -= _num_bytes(self._pairs.popitem(last=False)[1])


def _num_bytes(pair: Pair) -> int:
    return sum(
        part.nbytes
        for dataset in pair
        if dataset is not None
        for part in (*_arrays(dataset.x), dataset.y, dataset.weights)
        if part is not None
    )


def _arrays(x: Any) -> list[Any]:
    return list(x.values()) if isinstance(x, dict) else [x]
