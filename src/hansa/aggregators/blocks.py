"""Rows of a cohort, wherever they lie: in one block, in several, in single reports."""

from __future__ import annotations

import bisect
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any

import numpy as np

from hansa.core.protocols import Array, Client, Report, Updates


class Apart:
    """Rows of a block that lie in several arrays. Whoever asks for more than ``runs`` is given them as one.

    >>> rows = Apart([np.ones((1, 2)), np.zeros((2, 2))])
    >>> rows.shape, [run.tolist() for run in rows.runs([0, 1, 3])], rows.tolist()
    ((3, 2), [[[1.0, 1.0]], [[0.0, 0.0], [0.0, 0.0]]], [[1.0, 1.0], [0.0, 0.0], [0.0, 0.0]])
    """

    def __init__(self, pieces: Sequence[np.ndarray]) -> None:
        self.pieces = list(pieces)

    @property
    def shape(self) -> tuple[int, int]:
        """(num_rows, num_params)."""
        return sum(map(len, self.pieces)), self.pieces[0].shape[1]

    def __len__(self) -> int:
        return self.shape[0]

    def runs(self, cuts: Sequence[int]) -> list[np.ndarray]:
        """The rows from each cut to the next; only those that lie in several pieces are copied."""
        ends = list(accumulate(map(len, self.pieces)))
        found = []
        for start, stop in pairwise(cuts):
            piece = bisect.bisect_right(ends, start)
            first = ends[piece] - len(self.pieces[piece])
            if stop <= ends[piece]:
                found.append(self.pieces[piece][start - first : stop - first])
                continue
            last = bisect.bisect_left(ends, stop)
            together = np.concatenate(self.pieces[piece : last + 1])
            found.append(together[start - first : stop - first])
        return found

    @cached_property
    def _whole(self) -> np.ndarray:
        return np.concatenate(self.pieces)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self._whole, dtype=dtype, copy=copy)

    def __getitem__(self, index: Any) -> Any:
        return self._whole[index]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._whole, name)


def beside(left: Updates, right: Updates) -> Updates:
    """Two blocks as one, whose rows stay where they are."""
    pieces = [piece for rows in (left.values, right.values) for piece in getattr(rows, "pieces", [rows])]
    tail = {name: np.concatenate([column, right.tail[name]]) for name, column in left.tail.items()}
    weights = np.concatenate([left.weights, right.weights])
    return Updates(left.clients + right.clients, Apart(pieces), weights, tail)


def rows_of(reports: Sequence[Report]) -> Mapping[Client, tuple[Updates, int]]:
    """Where each client's row lies; a folded row is filed under each of its clients."""
    return {
        client: (report.payload, 0 if report.payload.folded else i)
        for report in reports
        for i, client in enumerate(report.clients)
    }


def stacked(cohort: Sequence[Client], reports: Sequence[Report]) -> Updates:
    """Every reported row as one block, in the order of the cohort."""
    where = rows_of(reports)
    present = [client for client in cohort if client in where]
    return gather([where[client] for client in present], present)


def gather(rows: Sequence[tuple[Updates, int]], clients: Sequence[Client]) -> Updates:
    """One block of single rows that lie in several; rows that already lie together are not copied."""
    if not rows:
        return Updates((), np.zeros((0, 0)), np.zeros(0))
    first = rows[0][0]
    if all(block is first for block, _ in rows):
        index = [i for _, i in rows]
        if index == list(range(index[0], index[0] + len(index))):
            part = slice(index[0], index[0] + len(index))
            tail = {name: column[part] for name, column in first.tail.items()}
            return Updates(tuple(clients), first.values[part], first.weights[part], tail)
    stack = _stack([block.values[i] for block, i in rows])
    weights = np.array([block.weights[i] for block, i in rows], dtype=np.float64)
    tail = {name: np.array([block.tail[name][i] for block, i in rows]) for name in first.tail}
    return Updates(tuple(clients), stack, weights, tail)


def _stack(rows: Sequence[Array]) -> Array:
    """Rows as one block, in the namespace they come in."""
    if isinstance(rows[0], np.ndarray):
        return np.stack(rows)
    import array_api_compat

    return array_api_compat.array_namespace(rows[0]).stack(list(rows))


def to_numpy(values: Array) -> np.ndarray:
    """An array of any namespace and device as a NumPy array."""
    if isinstance(values, np.ndarray):
        return values
    import array_api_compat

    return np.asarray(array_api_compat.to_device(values, "cpu"))
