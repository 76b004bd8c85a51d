"""``MemoryStore``: what the clients of a simulation keep between rounds, for up to a million of them.

Rows of one name, shape and dtype lie in one array with room to grow, whoever they belong to; a client has a place, and
a place has a slot in such an array or none. So a cohort's rows are read and written by one indexing each, in
O(cohort), and clients without an entry cost nothing. Arrays grow by doubling, and the slots of dropped rows are used
again. Beyond a number of bytes all arrays move to memory-mapped files: from then on the operating system keeps in
memory what is in use, and rows keep their bits.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from hansa.core.errors import InputError
from hansa.core.protocols import Client, Memory
from hansa.runtimes.arena import Arena, Room

Array = npt.NDArray[Any]
Integers = npt.NDArray[np.int64]
Form = tuple[tuple[int, ...], np.dtype[Any]]

_NONE, _ODD = -1, -2  # a place without a row; a row that lies on its own, not in an array
_MOST_FORMS = 16  # arrays a name; rows of more shapes and dtypes than that lie on their own


class MemoryStore:
    """Rows by client and name, at most ``limit_bytes`` of them in memory and the rest in files.

    Beyond the limit (which counts the room to grow too) the rows move to memory-mapped files in a new folder within
    ``folder``, the system's folder for temporary files by default; it should lie on a disk with room for twice the
    rows. It is removed with the store, or when Python ends. The log says so once. Rows of more than 16 shapes and
    dtypes under one name stay in memory.

    Raises ``InputError`` for rows that are not numbers, or not one a client, and ``RunError`` where files cannot be
    written.

    >>> store = MemoryStore()
    >>> store.put(["a", "b"], {"bias": np.array([[1.0, 2.0], [3.0, 4.0]])})
    >>> store.rows(["b", "somebody new"]).get("bias", np.zeros(2)).tolist()
    [[3.0, 4.0], [0.0, 0.0]]
    """

    def __init__(self, limit_bytes: int = 1 << 30, folder: str | os.PathLike[str] | None = None) -> None:
        if limit_bytes < 0:
            raise InputError(f"MemoryStore(limit_bytes=): expected 0 or more, found {limit_bytes}")
        self._limit, self._folder = limit_bytes, folder
        self._clear()

    def _clear(self) -> None:
        self._places: dict[Client, int] = {}
        self._next = 0  # places are not used again, so that rows asked for before a drop stay those of their clients
        self._columns: dict[str, _Column] = {}
        self._room = Room(self._limit, self._folder)

    @property
    def bytes(self) -> int:
        """Bytes of all rows and of the room made for more, in memory or in files."""
        return self._room.bytes

    def rows(self, clients: Sequence[Client]) -> StoredRows:
        """What these clients keep; it is read when it is asked for."""
        places = self._places
        index = np.full(len(clients), _NONE, np.int64)
        if places:
            index[:] = [places.get(client, _NONE) for client in clients]
        return StoredRows(self._columns, index)

    def put(self, clients: Sequence[Client], arrays: Mapping[str, Array | Sequence[Array]]) -> None:
        """Replace the rows of these names, (num_clients, ...) each; what else the clients keep stays.

        ``clients`` are different. A list of rows may be ragged. The values are copied.
        """
        for name, values in arrays.items():
            for index, rows in _by_form(name, values, len(clients)):
                some = clients if isinstance(index, range) else [clients[i] for i in index]
                self._put(name, self._claim(some), rows)

    def drop(self, client: Client) -> None:
        """Forget a client; nothing happens where it has no entry."""
        place = self._places.pop(client, None)
        if place is not None:
            for column in self._columns.values():
                column.release(np.array([place]))

    def kept(self) -> dict[Client, dict[str, Array]]:
        """Everything, as ``{client: {name: row}}`` in the order in which clients got an entry: a copy, in memory."""
        copies = {name: column.copies() for name, column in self._columns.items()}
        tree: dict[Client, dict[str, Array]] = {client: {} for client in self._places}
        for name, column in self._columns.items():
            for client, place in self._places.items():
                row = column.row(place, copies[name])
                if row is not None:
                    tree[client][name] = row
        return tree

    def restore(self, tree: Mapping[Client, Mapping[str, Array]]) -> None:
        """Hold what ``kept`` gave, and nothing else."""
        self._clear()
        self._claim([client for client, rows in tree.items() if rows])
        groups: dict[tuple[str, Form], tuple[list[Client], list[Array]]] = {}
        for client, rows in tree.items():
            for name, row in rows.items():
                array = np.asarray(row)
                clients, values = groups.setdefault((name, (array.shape, array.dtype)), ([], []))
                clients.append(client)
                values.append(array)
        for (name, _), (clients, values) in groups.items():
            self._put(name, self._claim(clients), np.stack(values))

    def _claim(self, clients: Sequence[Client]) -> Integers:
        """The places of clients; those without one get the next."""
        places = self._places
        for client in clients:
            if client not in places:
                places[client] = self._next
                self._next += 1
        return np.fromiter((places[client] for client in clients), np.int64, len(clients))

    def _put(self, name: str, places: Integers, rows: Array) -> None:
        if rows.dtype.kind not in "biufc":
            raise InputError(f"memory {name!r}: expected numbers, found dtype {rows.dtype}; keep arrays of numbers")
        if len(places):
            self._columns.setdefault(name, _Column(name, self._room)).put(places, rows)


class StoredRows(Memory):
    """What a block of clients keeps, as a part of a federation sees it: names after ``prefix``, arrays by block.

    A copy of the rows travels where this is sent to another process, and no other client's.

    >>> store = MemoryStore()
    >>> store.put(["a"], {"0.residual": np.ones((1, 2))})
    >>> store.rows(["a", "b"]).part("0").get("residual", np.zeros(2)).tolist(), store.rows(["b"]).row(0)
    ([[1.0, 1.0], [0.0, 0.0]], {})
    """

    def __init__(self, columns: Mapping[str, _Column], places: Integers, prefix: str = "") -> None:
        self._columns, self._places, self._prefix = columns, places, prefix

    def __len__(self) -> int:
        return len(self._places)

    def get(self, name: str, default: Any) -> Array:
        """The rows called ``name``: (num_clients, ...), a copy; clients without an entry get the ``default`` row."""
        column = self._columns.get(self._prefix + name)
        if column is not None:
            return column.gather(self._places, np.asarray(default))
        row = np.asarray(default)
        return np.array(np.broadcast_to(row, (len(self), *row.shape)))

    def part(self, name: str) -> StoredRows:
        """What the clients keep for one part: the algorithm (``a``) or the transform at a position (``0``)."""
        return StoredRows(self._columns, self._places, f"{self._prefix}{name}.")

    def row(self, index: int) -> dict[str, Array]:
        """All that one of the clients keeps, by name: copies."""
        place = int(self._places[index])
        rows = ((name, column.row(place)) for name, column in self._named())
        return {name: row.copy() for name, row in rows if row is not None}

    def _named(self) -> Iterator[tuple[str, _Column]]:
        for name, column in self._columns.items():
            if name.startswith(self._prefix):
                yield name[len(self._prefix) :], column

    def __reduce__(self) -> tuple[Any, ...]:
        entries = [(name, *found) for name, column in self._named() for found in column.found(self._places)]
        return _received, (len(self), entries)


def _received(num_clients: int, entries: Sequence[tuple[str, Integers, Array]]) -> StoredRows:
    """The rows of a block as they came from another process."""
    columns: dict[str, _Column] = {}
    for name, index, rows in entries:
        columns.setdefault(name, _Column(name, Room(math.inf, None))).put(index, rows)
    return StoredRows(columns, np.arange(num_clients))


class _Column:
    """All rows of one name: by place, the array of its form (``kinds``) and the slot in it."""

    def __init__(self, name: str, room: Room) -> None:
        self._name, self._room = name, room
        self._forms: dict[Form, int] = {}
        self._arenas: list[Arena] = []
        self._kinds, self._slots = np.full(0, _NONE, np.int8), np.zeros(0, np.int64)
        self._odd: dict[int, Array] = {}

    def put(self, places: Integers, rows: Array) -> None:
        """Replace the rows at places, which are different."""
        self._reach(int(places.max()) + 1)
        kind = self._kind(rows)
        new = places[self._kinds[places] != kind]
        if len(new):
            self.release(new)
            if kind != _ODD:
                self._slots[new] = self._arenas[kind].claim(len(new), self._room)
            self._kinds[new] = kind
        if kind == _ODD:
            self._drop_odd(places)
            self._odd.update(zip(places.tolist(), map(np.array, rows), strict=True))
            self._room.odd_bytes += rows.nbytes
        else:
            self._arenas[kind].rows[self._slots[places]] = rows

    def release(self, places: Integers) -> None:
        """Forget the rows at places."""
        places = places[places < len(self._kinds)]
        for kind, index in self._split(places):
            if kind >= 0:
                self._arenas[kind].free.extend(self._slots[places[index]].tolist())
            elif kind == _ODD:
                self._drop_odd(places[index])
        self._kinds[places] = _NONE

    def gather(self, places: Integers, default: Array) -> Array:
        """The rows at places, or the default: (num_places, ...)."""
        found = self.found(places)
        if len(found) == 1 and len(found[0][0]) == len(places):
            return found[0][1]
        parts = [rows for _, rows in found]
        if sum(len(index) for index, _ in found) < len(places) or not found:
            parts.append(default[None])
        shapes = list(dict.fromkeys(part.shape[1:] for part in parts))
        if len(shapes) > 1:
            raise InputError(
                f"memory {self._name!r}: expected rows of one shape in a block, found {shapes[0]} and {shapes[1]}; "
                "let the default have the shape of what is kept, and keep one shape where clients train one model"
            )
        out = np.empty((len(places), *shapes[0]), np.result_type(*parts))
        if parts[len(found) :]:
            out[:] = default
        for index, rows in found:
            out[index] = rows
        return out

    def found(self, places: Integers) -> list[tuple[Integers, Array]]:
        """The rows that are there, copied: which of ``places`` they belong to, and (num_found, ...), form by form."""
        out = []
        for kind, index in self._split(places):
            if kind >= 0:
                out.append((index, np.take(self._arenas[kind].rows, self._slots[places[index]], axis=0)))
            elif kind == _ODD:
                rows = [self._odd[place] for place in places[index].tolist()]
                out += [
                    (index if at is None else index[at], some) for at, some in _by_form(self._name, rows, len(rows))
                ]
        return out

    def row(self, place: int, arrays: Sequence[Array] | None = None) -> Array | None:
        """The row at a place as it lies, here or in what ``copies`` gave; None where there is none."""
        kind = int(self._kinds[place]) if 0 <= place < len(self._kinds) else _NONE
        if kind == _ODD:
            return self._odd[place].copy()
        if kind == _NONE:
            return None
        rows: Array = self._arenas[kind].rows if arrays is None else arrays[kind]
        return np.asarray(rows[self._slots[place], ...])

    def copies(self) -> list[Array]:
        """A copy of each form's rows."""
        return [arena.rows[: arena.used].copy() for arena in self._arenas]

    def _split(self, places: Integers) -> list[tuple[int, Integers]]:
        """Which of ``places`` are of each kind."""
        kinds = np.full(len(places), _NONE, np.int8)
        known = (places >= 0) & (places < len(self._kinds))
        kinds[known] = self._kinds[places[known]]
        if len(kinds) and (kinds == kinds[0]).all():
            return [(int(kinds[0]), np.arange(len(kinds)))]
        return [(kind, np.flatnonzero(kinds == kind)) for kind in np.unique(kinds).tolist()]

    def _kind(self, rows: Array) -> int:
        """Where rows of this form lie."""
        form = rows.shape[1:], rows.dtype
        if form not in self._forms and len(self._arenas) < _MOST_FORMS:
            self._forms[form] = len(self._arenas)
            self._arenas.append(Arena(*form))
            self._room.arenas.append(self._arenas[-1])
        return self._forms.get(form, _ODD)

    def _reach(self, num_places: int) -> None:
        """Have an entry for so many places."""
        more = max(num_places, 2 * len(self._kinds)) - len(self._kinds)
        if num_places > len(self._kinds):
            self._kinds = np.concatenate([self._kinds, np.full(more, _NONE, np.int8)])
            self._slots = np.concatenate([self._slots, np.zeros(more, np.int64)])

    def _drop_odd(self, places: Integers) -> None:
        for place in places.tolist():
            if place in self._odd:
                self._room.odd_bytes -= self._odd.pop(place).nbytes


def _by_form(name: str, values: Any, count: int) -> list[tuple[Sequence[int], Array]]:
    """One row a client as arrays (num_rows, ...), with whose they are; a list of rows may be ragged."""
    if not isinstance(values, list | tuple):
        rows = np.asarray(values)
        if not rows.ndim or len(rows) != count:
            raise InputError(f"memory {name!r}: expected one row for each of {count} clients, found shape {rows.shape}")
        return [(range(count), rows)]
    if len(values) != count:
        raise InputError(f"memory {name!r}: expected one row for each of {count} clients, found {len(values)} rows")
    given = [np.asarray(row) for row in values]
    forms: dict[Form, list[int]] = {}
    for i, row in enumerate(given):
        forms.setdefault((row.shape, row.dtype), []).append(i)
    return [(index, np.stack([given[i] for i in index])) for index in forms.values()]
