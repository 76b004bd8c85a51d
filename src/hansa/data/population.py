"""``Population``: all clients that could take part, by id, each with its data or a function that makes them."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hansa.core.errors import HansaError, InputError
from hansa.core.key import Key
from hansa.data.columns import read_arrays
from hansa.data.dataset import Dataset
from hansa.data.flat import FlatRows, cut_rows
from hansa.data.ids import NumberedIds
from hansa.data.kept import Kept, Pair
from hansa.data.partition import Partition, split_rows
from hansa.data.reading import Data, load_rows, load_table, owners_of, reading_of
from hansa.data.skew import Skew, measure
from hansa.data.table import PARQUET_SUFFIXES, TEXT_SUFFIXES, read_table, suffix

Client = Data | Callable[[], Data]

KEPT_BYTES = 2**30  # of datasets made on demand, where they are kept at all
_MOST_COMPARED = 10_000  # ids that a misspelt one is compared with


class Population:
    """Clients by id, in the order given: each a ``Dataset``, a pair (train, test), or a function that makes either.

    A function is called when its client is first loaded; what it made is kept, so that rounds do not read it again,
    unless ``keep=False``. For very many clients see ``on_demand`` and ``from_arrays``, which hold no object a client.

    Raises ``InputError`` for no clients at all, an id that is not a non-empty text, and a client that is none of the
    above; ``load`` also for an id that is not there, and for whatever a client's function raises (as its cause).

    >>> population = Population({"berlin": Dataset([1.0, 2.0], [0, 1]), "oslo": lambda: Dataset([3.0], [1])})
    >>> population.ids, population.load("oslo")
    (('berlin', 'oslo'), (Dataset(x: (1,) float64, y: (1,) int64), None))
    """

    def __init__(self, clients: Mapping[str, Client], *, keep: bool = True) -> None:
        clients = dict(clients)
        for client, value in clients.items():
            _check_id(client)
            if not callable(value):
                _pair(client, value)
        values, sizes = list(clients.values()), None
        if not any(callable(value) for value in values):
            sizes = np.array([len(_pair(client, value)[0]) for client, value in clients.items()], np.int64)
        self._fill(tuple(clients), partial(_value, values), sizes, None if keep else 0)

    @staticmethod
    def _of(
        ids: Sequence[str], make: Callable[[int], Data], sizes: npt.NDArray[np.int64] | None, kept_bytes: int | None
    ) -> Population:
        """A population that makes clients by position; keeps ``kept_bytes`` of what was made (None: all)."""
        population = Population.__new__(Population)
        population._fill(ids, make, sizes, kept_bytes)
        return population

    def _fill(
        self,
        ids: Sequence[str],
        make: Callable[[int], Data],
        sizes: npt.NDArray[np.int64] | None,
        kept_bytes: int | None,
    ) -> None:
        if not len(ids):
            raise InputError("Population: expected at least one client, found none; give {name: Dataset(x, y), ...}")
        if sizes is not None:
            sizes.flags.writeable = False
        self._ids, self._make, self._sizes, self._kept = ids, make, sizes, Kept(kept_bytes)
        self._places = None if isinstance(ids, NumberedIds) else {client: place for place, client in enumerate(ids)}

    def __getstate__(self) -> dict[str, Any]:
        """Without what was made of clients: another process makes its own."""
        return {**self.__dict__, "_kept": self._kept.emptied()}

    @property
    def ids(self) -> Sequence[str]:
        """All clients, in population order: a tuple, or a sequence that makes the ids it is asked for."""
        return self._ids

    @property
    def sizes(self) -> npt.NDArray[np.int64] | None:
        """Training examples of each client (num_clients,), read-only; None where clients must be loaded to tell.

        >>> Population({"a": Dataset([1.0, 2.0]), "b": Dataset([3.0])}).sizes
        array([2, 1])
        """
        return self._sizes

    @property
    def flat(self) -> FlatRows | None:
        """All clients' examples in flat arrays, for a population made ``from_arrays``; None for any other.

        What serves many clients at once without a dataset for each.
        """
        return self._make if isinstance(self._make, FlatRows) else None

    @property
    def keeps(self) -> bool:
        """Whether what was made of a client stays, so that it may be used again and again."""
        return self._kept.keeps_all

    def __len__(self) -> int:
        return len(self._ids)

    def __repr__(self) -> str:
        return f"Population({len(self)} client{'' if len(self) == 1 else 's'})"

    def position(self, client: str) -> int:
        """The client's place among ``ids``, in O(1); ``InputError`` for an id that is not there.

        >>> Population({"berlin": Dataset([1.0]), "oslo": Dataset([2.0])}).position("oslo")
        1
        """
        try:
            return self._ids.index(client) if self._places is None else self._places[client]
        except (KeyError, TypeError, ValueError):
            compared = self._ids if len(self) <= _MOST_COMPARED else ()
            near = difflib.get_close_matches(str(client), compared, n=3, cutoff=0.5) or self._ids[:3]
            raise InputError(
                f"Population: expected the id of a client, found {client!r}; ids are like {', '.join(near)}"
            ) from None

    def load(self, client: str) -> Pair:
        """The client's training data, and its own test data or None."""
        return self._load(self.position(client))

    def _load(self, position: int) -> Pair:
        pair = self._kept.get(position)
        if pair is not None:
            return pair
        try:
            made = self._make(position)
        except HansaError as error:
            raise InputError(f"client {self._ids[position]!r}: {error}") from error
        except Exception as error:
            raise InputError(
                f"client {self._ids[position]!r}: expected its function to load data, found {type(error).__name__}: "
                f"{error}; correct the function or the client's data"
            ) from error
        pair = (made, None) if isinstance(made, Dataset) else _pair(self._ids[position], made)
        if self._sizes is not None and len(pair[0]) != self._sizes.item(position):
            raise InputError(
                f"client {self._ids[position]!r}: expected {self._sizes[position]} training examples (sizes), found "
                f"{len(pair[0])}; correct sizes= or the function"
            )
        self._kept.put(position, pair)
        return pair

    def skew(self, max_clients: int = 1000) -> Skew:
        """How unlike the clients' training data are; at most ``max_clients``, evenly spaced, are loaded for it."""
        if max_clients < 1:
            raise InputError(f"skew(max_clients=): expected 1 or more, found {max_clients}")
        count = min(max_clients, len(self))
        seen = (np.arange(count) * len(self) // count).tolist()
        return measure(len(self), [(self._ids[place], self._load(place)[0]) for place in seen])

    @staticmethod
    def on_demand(
        num_clients: int,
        load: Callable[[int], Data],
        *,
        sizes: npt.ArrayLike | None = None,
        keep: bool = False,
        prefix: str = "client-",
    ) -> Population:
        """``num_clients`` clients ``client-0``, ``client-1``, ..., each made by ``load(position)`` when it takes part.

        ``load`` gives what a client of a ``Population`` is: a ``Dataset`` or a pair (train, test). It is called each
        time a client is loaded, unless ``keep=True``: then the datasets used last stay, up to 1 GiB of arrays.
        ``sizes`` (num_clients,) whole numbers say how many training examples each has, so that nobody need be loaded
        to be counted. Nothing else is held for a client that takes no part.

        >>> population = Population.on_demand(1_000_000, lambda i: Dataset([[float(i)]], [i % 2]))
        >>> population.load("client-765432")[0].x
        array([[765432.]])
        """
        if not isinstance(num_clients, int) or isinstance(num_clients, bool) or num_clients < 1:
            raise InputError(f"on_demand(num_clients=): expected 1 or more, found {num_clients!r}")
        if not callable(load):
            raise InputError(
                f"on_demand(load=): expected a function of a client's position, found {type(load).__name__}; give "
                "lambda position: Dataset(...)"
            )
        known = None if sizes is None else _checked_sizes(sizes, num_clients)
        return Population._of(NumberedIds(prefix, num_clients), load, known, KEPT_BYTES if keep else 0)

    @staticmethod
    def from_arrays(
        x: npt.ArrayLike | Mapping[str, npt.ArrayLike],
        y: npt.ArrayLike | None = None,
        *,
        offsets: npt.ArrayLike | None = None,
        client: npt.ArrayLike | None = None,
        weights: npt.ArrayLike | None = None,
        feature_names: Sequence[str] | None = None,
        ids: Sequence[str] | None = None,
        prefix: str = "client-",
    ) -> Population:
        """Flat arrays that hold the examples of all clients; a client's dataset is views of them, nothing is copied.

        Whose each row is, one of three ways:

        - ``offsets`` (num_clients + 1,): rows ``offsets[i]:offsets[i + 1]`` are client i's;
        - ``client`` (num_rows,): the number of each row's client. Rows that are not in order of the clients are put
          in order, once, which does copy them;
        - neither: the first axis is the client and the second the example, ``x`` (num_clients, num_examples, ...).

        The rest is as in ``Dataset`` (weights are float64, others are converted). Ids are ``client-0``, ``client-1``,
        ..., or ``ids``, which may name clients beyond the last that has a row.

        >>> population = Population.from_arrays([[1.0], [2.0], [3.0]], [0, 1, 1], offsets=[0, 2, 3])
        >>> population.load("client-0")[0].x.tolist(), population.sizes
        ([[1.0], [2.0]], array([2, 1]))
        """
        rows = cut_rows(
            x, y, weights, feature_names,
            client=client, offsets=offsets, num_clients=None if ids is None else len(ids),
        )  # fmt: skip
        sizes = rows.sizes
        if ids is None:
            return Population._of(NumberedIds(prefix, len(sizes)), rows, sizes, 0)
        return Population._of(_checked_ids(ids, len(sizes)), rows, sizes, 0)

    @staticmethod
    def split(
        dataset: Dataset, *, by: Partition, num_clients: int = 100, seed: int = 0, keep: bool = True
    ) -> Population:
        """``dataset`` cut into clients ``client-000``, ``client-001``, ...; a client's rows are copied when loaded.

        >>> from hansa.data.partition import IID
        >>> Population.split(Dataset(range(6), [0, 1] * 3), by=IID(), num_clients=2).ids
        ('client-000', 'client-001')
        """
        labels = np.full(len(dataset), np.nan) if dataset.y is None else dataset.y
        parts = by.assign(labels, num_clients, Key.of(seed).child("population", "split"))
        width = max(3, len(str(num_clients - 1)))
        return _taken(tuple(f"client-{i:0{width}d}" for i in range(len(parts))), dataset, parts, keep)

    @staticmethod
    def from_table(
        path_or_frame: str | os.PathLike[str] | Any,
        *,
        client: str,
        load: Callable[[Any], Data] | None = None,
        label: str | None = None,
        categories: Mapping[str, Sequence[Any]] | None = None,
        features: Sequence[str] | None = None,
        classes: Sequence[Any] | None = None,
        weights: str | None = None,
        drop_missing: bool = False,
        keep: bool = True,
    ) -> Population:
        """One table of many clients: column ``client`` says whose each row is. Ids are in order of first appearance.

        With ``load``, a client's rows are given to that function when the client is loaded: from a frame as a frame of
        the same kind, from a file as a dict of columns (num_rows,), which are float64, or text as objects with None
        where missing (as stored, for Parquet). Without, ``label`` and the rest say how to read the rows, as in
        ``Dataset.from_table``; a client all of whose rows are dropped stays, with no examples.

        The table is read and sorted once, whatever the number of clients.

        >>> rows = {"ward": ["a", "b", "a"], "age": [63, 41, 59], "sick": [1, 0, 0]}
        >>> Population.from_table(rows, client="ward", label="sick").load("a")[0].x.tolist()
        [[63.0], [59.0]]
        """
        reading = reading_of("from_table", load, label, categories, features, classes, weights, drop_missing, client)
        table = read_table(path_or_frame, text=(client,))
        ids, owner = owners_of(table.source, client, table.raw(client, "the client"))
        if load is None:
            arrays = read_arrays(table, reading)
            dataset = Dataset(arrays.x, arrays.y, arrays.weights, feature_names=arrays.feature_names)
            return _taken(tuple(ids), dataset, split_rows(owner[arrays.rows], len(ids)), keep)
        frame = table.columns if isinstance(path_or_frame, str | os.PathLike) else path_or_frame
        parts = split_rows(owner, len(ids))
        return Population({i: partial(load_rows, load, frame, r) for i, r in zip(ids, parts, strict=True)}, keep=keep)

    @staticmethod
    def from_folder(
        folder: str | os.PathLike[str],
        *,
        load: Callable[[Path], Data] | None = None,
        label: str | None = None,
        categories: Mapping[str, Sequence[Any]] | None = None,
        features: Sequence[str] | None = None,
        classes: Sequence[Any] | None = None,
        weights: str | None = None,
        drop_missing: bool = False,
        keep: bool = True,
    ) -> Population:
        """One file a client, named by its stem (``berlin.csv.gz`` is ``berlin``), in order of the stems.

        ``load(path)`` reads a file when its client is loaded (then a folder may be a client too, of its own files);
        without it the files are tables, read as by ``Dataset.from_table``. Hidden entries are left aside.
        """
        reading = reading_of("from_folder", load, label, categories, features, classes, weights, drop_missing)
        root = Path(folder)
        if not root.is_dir():
            found = (
                "a file; give the folder it lies in" if root.exists() else f"nothing there; looked from {Path.cwd()}"
            )
            raise InputError(f"{root}: expected a folder of one file a client, found {found}")
        files: dict[str, Path] = {}
        for path in sorted(p for p in root.iterdir() if not p.name.startswith(".") and (load or p.is_file())):
            stem = path.name if path.is_dir() else path.name[: len(path.name) - len(suffix(path))]
            if stem in files:
                raise InputError(
                    f"{root}: expected one file a client, found {files[stem].name} and {path.name}; "
                    f"both are client {stem!r}: rename or remove one"
                )
            if load is None and suffix(path) not in (*TEXT_SUFFIXES, *PARQUET_SUFFIXES):
                raise InputError(
                    f"{root}: expected tables ({', '.join((*TEXT_SUFFIXES, *PARQUET_SUFFIXES))}), found {path.name}; "
                    "move it away, or give load=function(path)"
                )
            files[stem] = path
        if not files:
            raise InputError(f"{root}: expected one file a client, found no files; put the clients' data there")
        make = load or partial(load_table, reading)
        return Population({stem: partial(make, files[stem]) for stem in sorted(files)}, keep=keep)


def _check_id(client: Any) -> None:
    if not isinstance(client, str) or not client:
        raise InputError(f"Population: expected ids that are non-empty text, found {client!r}; name each client")


def _checked_ids(ids: Sequence[str], num_clients: int) -> Sequence[str]:
    """Ids given for arrays, as a tuple where they are not numbered; each different, one a client."""
    if isinstance(ids, NumberedIds) and len(ids) == num_clients:
        return ids
    named = (ids,) if isinstance(ids, str) else tuple(ids)
    for client in named:
        _check_id(client)
    if isinstance(ids, str) or len(named) != num_clients or len(set(named)) != num_clients:
        found = f"the text {ids!r}" if isinstance(ids, str) else f"{len(set(named))}"
        raise InputError(f"from_arrays(ids=): expected {num_clients} different ids, found {found}; name each client")
    return named


def _pair(client: str, value: Any) -> tuple[Dataset, Dataset | None]:
    """What a client holds as (train, test or None)."""
    if isinstance(value, Dataset):
        return value, None
    if isinstance(value, tuple | list) and len(value) == 2:
        train, test = value
        if isinstance(train, Dataset) and (test is None or isinstance(test, Dataset)):
            return train, test
    found = f"({', '.join(type(v).__name__ for v in value)})" if isinstance(value, tuple) else type(value).__name__
    raise InputError(
        f"client {client!r}: expected a Dataset, a pair (train, test) of them, or a function that makes one, found "
        f"{found}; give hansa.Dataset(x, y)"
    )


def _value(values: Sequence[Client], position: int) -> Data:
    """What the client at a position is, or makes."""
    value = values[position]
    return value() if callable(value) else value


def _taken(ids: tuple[str, ...], dataset: Dataset, parts: Sequence[Any], keep: bool) -> Population:
    """Clients that take their rows of one dataset when they are loaded."""
    sizes = np.array([len(rows) for rows in parts], np.int64)
    return Population._of(ids, partial(_take, dataset, parts), sizes, None if keep else 0)


def _take(dataset: Dataset, parts: Sequence[Any], position: int) -> Dataset:
    return dataset.take(parts[position])


def _checked_sizes(given: npt.ArrayLike, num_clients: int) -> npt.NDArray[np.int64]:
    sizes = np.asarray(given)
    if sizes.shape != (num_clients,) or sizes.dtype.kind not in "iu" or sizes.min() < 0:
        raise InputError(
            f"on_demand(sizes=): expected one whole number of 0 or more for each of {num_clients} clients, found "
            f"{sizes.dtype} of shape {sizes.shape}: {np.array2string(sizes, threshold=6)}"
        )
    return sizes.astype(np.int64)
