"""``Block``: the datasets of several clients side by side in a few arrays, so that one gather serves them all."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from hansa.data.dataset import Dataset
from hansa.data.flat import FlatRows

Array = npt.NDArray[Any]
Columns = Mapping[str, Array]  # a dataset as a learner reads it: arrays (num_examples, ...) by name
Integers = npt.NDArray[np.int64]


class Block(Sequence[Dataset]):
    """Datasets as a sequence, and their rows: client ``i`` holds ``starts[i] : starts[i] + sizes[i]`` of each column.

    >>> two = Block.of([Dataset([[1.0], [2.0]], [0, 1]), Dataset([[3.0]], [1])], lambda d: {"x": d.x})
    >>> two.sizes.tolist(), two.columns["x"][two.starts[1]].tolist(), len(two[1])
    ([2, 1], [3.0], 1)
    """

    def __init__(
        self, columns: Columns, starts: Integers, sizes: Integers, num_rows: int, dataset: Callable[[int], Dataset]
    ) -> None:
        self.columns, self.starts, self.sizes = columns, starts, sizes
        self.num_rows = num_rows  # that mean something: a shelf's arrays may be longer
        self._dataset = dataset

    @staticmethod
    def of(datasets: Sequence[Dataset], read: Callable[[Dataset], Columns]) -> Block | None:
        """Datasets copied side by side (a single one as it is); None where they have not the same columns."""
        sizes = np.array([len(dataset) for dataset in datasets], dtype=np.int64)
        each = [read(dataset) for dataset, size in zip(datasets, sizes, strict=True) if size] or [read(datasets[0])]
        if any("weights" in columns for columns in each):
            each = [{"weights": _ones(columns), **columns} for columns in each]
        if any(_form(columns) != _form(each[0]) for columns in each[1:]):
            return None
        columns = each[0]
        if len(each) > 1:
            columns = {name: np.concatenate([columns[name] for columns in each]) for name in each[0]}
        return Block(columns, np.cumsum(sizes) - sizes, sizes, int(sizes.sum()), datasets.__getitem__)

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return self._dataset(index)


class Shelf:
    """Rows of clients that come again and again, copied once and side by side; up to ``limit_bytes`` of them."""

    def __init__(self, read: Callable[[Dataset], Columns], limit_bytes: int | None = None) -> None:
        self._read = read
        self._limit = _limit() if limit_bytes is None else limit_bytes
        self._columns: dict[str, Array] = {}
        self._form: Any = None
        self._room = self._filled = 0  # rows
        self._where: dict[str, int] = {}  # a client's place in the next three
        self._starts, self._sizes = np.zeros(0, np.int64), np.zeros(0, np.int64)
        self._datasets: Any = []  # a dataset a client, or a function of its place
        self._position: Callable[[str], int] | None = None

    def block(self, clients: Sequence[str], load: Callable[[str], Dataset]) -> Sequence[Dataset]:
        """The clients' datasets, as a ``Block`` where they fit together; ``load`` gives those not yet seen."""
        if self._position is not None:
            return self._taken(np.array([self._position(client) for client in clients], dtype=np.int64))
        if self._columns:
            try:
                known = np.fromiter(map(self._where.__getitem__, clients), np.int64, len(clients))
            except KeyError:
                pass
            else:
                return self._taken(known)
        places = [self._place(client, load) for client in clients]
        if None in places or not self._columns:
            datasets = [
                load(c) if place is None else self._datasets[place] for c, place in zip(clients, places, strict=True)
            ]
            return Block.of(datasets, self._read) or datasets
        return self._taken(np.array(places, dtype=np.int64))

    def _taken(self, index: Integers) -> Block:
        """The block of the clients at some places."""
        starts, sizes, datasets = self._starts[index], self._sizes[index], self._datasets
        dataset = datasets if callable(datasets) else datasets.__getitem__
        return Block(self._columns, starts, sizes, self._filled, lambda i: dataset(int(index[i])))

    @staticmethod
    def over(rows: FlatRows, read: Callable[[Dataset], Columns], position: Callable[[str], int]) -> Shelf:
        """A shelf of rows that lie side by side already; ``position`` is a client's place among them."""
        shelf = Shelf(read)
        shelf._columns, shelf._filled, shelf._position = dict(read(rows.dataset)), len(rows.dataset), position
        shelf._starts, shelf._sizes, shelf._datasets = rows.offsets[:-1], rows.sizes, rows
        return shelf

    def fill(self, clients: Iterable[str], load: Callable[[str], Dataset]) -> Dataset | None:
        """Put clients there ahead of their time; all rows so far as one dataset, where x is one array."""
        for client in clients:
            if self._place(client, load) is None:
                break
        if not {"x"} <= set(self._columns) <= {"x", "y", "weights"}:
            return None
        filled = {name: column[: self._filled] for name, column in self._columns.items()}
        return Dataset(filled["x"], filled.get("y"))

    def _place(self, client: str, load: Callable[[str], Dataset]) -> int | None:
        """Where a client stands, once it has been put there; None where it cannot."""
        place = self._where.get(client)
        return place if place is not None else self._put(client, load(client))

    def _put(self, client: str, dataset: Dataset) -> int | None:
        stop = self._filled + len(dataset)
        if self._columns and stop > self._room:
            return None
        columns = self._read(dataset) if len(dataset) else {}
        if columns and not self._columns:
            self._form = _form(columns)
            self._columns, self._room = _unwritten(columns, self._limit)
        if columns and (_form(columns) != self._form or stop > self._room):
            return None
        for name, array in columns.items():
            self._columns[name][self._filled : stop] = array
        place = self._where[client] = len(self._where)
        if place >= len(self._starts):
            grown = max(1024, 2 * len(self._starts))
            self._starts, self._sizes = (np.resize(a, grown) for a in (self._starts, self._sizes))
        self._starts[place], self._sizes[place] = self._filled, len(dataset)
        self._datasets.append(dataset)
        self._filled = stop
        return place


def _unwritten(like: Columns, limit_bytes: int) -> tuple[dict[str, Array], int]:
    """Arrays of the form of ``like``, as long as the limit allows (pages never written to cost nothing), and how long.

    Where a system counts such pages too, as long as it grants.
    """
    rows = limit_bytes // max(1, sum(a.dtype.itemsize * int(np.prod(a.shape[1:])) for a in like.values()))
    while True:
        try:
            return {name: np.empty((rows, *a.shape[1:]), a.dtype) for name, a in like.items()}, rows
        except MemoryError:
            rows //= 2


def _ones(columns: Columns) -> Array:
    """What the rows weigh where their client does not say."""
    return np.ones(len(next(iter(columns.values()))), np.float32)


def _form(columns: Columns) -> list[tuple[str, Any, tuple[int, ...]]]:
    """What columns must share to lie in one array."""
    return [(name, array.dtype, array.shape[1:]) for name, array in sorted(columns.items())]


def _limit() -> int:
    """A quarter of the machine's memory, at most 4 GiB."""
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not every system says
        memory = 4 * 2**30
    return min(memory // 4, 4 * 2**30)
