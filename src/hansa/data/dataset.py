"""``Dataset``: the examples that one client holds, and ``hold_out``, which sets a share of them aside for good."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from hansa.core.errors import InputError
from hansa.core.key import Key
from hansa.data import adapters
from hansa.data.columns import Reading, read_arrays
from hansa.data.permutations import permutations
from hansa.data.table import read_table

Array = npt.NDArray[Any]
Features = Array | dict[str, Array]

_SAME: Any = object()  # stands for "as it was" where None means something


class Dataset:
    """Examples along the first axis: features ``x``, labels ``y`` and weights, all of one length.

    ``x`` is an array (num_examples, ...) or a dict of such arrays; NaN means missing. ``y`` is (num_examples, ...) or
    None. ``weights`` (num_examples,) are finite numbers >= 0, kept as float64, or None (every example counts 1).
    ``feature_names`` names the last axis of an array ``x``. Nothing is copied: views (windows made by stride tricks,
    memory maps) stay views, so do not change an array after you gave it.

    Zero examples are ordinary. Raises ``InputError`` for unequal lengths, anything but numbers, and bad weights.

    >>> data = Dataset([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], [0, 1, 1])
    >>> data.take([0, 2]).y
    array([0, 1])
    >>> Dataset.concatenate([data, data]).num_examples
    6
    """

    __slots__ = ("feature_names", "num_examples", "weights", "x", "y")

    def __init__(
        self,
        x: npt.ArrayLike | Mapping[str, npt.ArrayLike],
        y: npt.ArrayLike | None = None,
        weights: npt.ArrayLike | None = None,
        *,
        feature_names: Sequence[str] | None = None,
    ) -> None:
        self.x: Features = _features(x)
        self.y: Array | None = None if y is None else _numbers("y", y)
        self.weights: npt.NDArray[np.float64] | None = None if weights is None else _weights(weights)
        self.feature_names: tuple[str, ...] | None = _names(feature_names, self.x)
        self.num_examples: int = len(next(iter(_parts(self.x).values())))
        for name, part in {**_parts(self.x), "y": self.y, "weights": self.weights}.items():
            if part is not None and len(part) != self.num_examples:
                raise InputError(
                    f"Dataset: expected {self.num_examples} examples everywhere (the length of "
                    f"{next(iter(_parts(self.x)))}), found {len(part)} in {name}; give arrays of one length"
                )

    def __len__(self) -> int:
        return self.num_examples

    def __repr__(self) -> str:
        parts = {**_parts(self.x), "y": self.y, "weights": self.weights}
        return f"Dataset({', '.join(f'{n}: {a.shape} {a.dtype}' for n, a in parts.items() if a is not None)})"

    def take(self, indices: npt.ArrayLike) -> Dataset:
        """The examples at ``indices`` (whole numbers), in that order, copied."""
        rows = np.asarray(indices)
        rows = rows.astype(np.intp) if not rows.size else rows
        if rows.ndim != 1 or rows.dtype.kind not in "iu":
            raise InputError(
                f"take: expected a list of row numbers, found shape {rows.shape} of {rows.dtype}; "
                "turn a mask into row numbers with numpy.flatnonzero"
            )
        x = {name: part[rows] for name, part in self.x.items()} if isinstance(self.x, dict) else self.x[rows]
        y = None if self.y is None else self.y[rows]
        weights = None if self.weights is None else self.weights[rows]
        return Dataset(x, y, weights, feature_names=self.feature_names)

    def rows(self, start: int, stop: int) -> Dataset:
        """The examples ``start`` to ``stop - 1``, as views; what was checked once is not checked again.

        >>> Dataset([1.0, 2.0, 3.0], [0, 1, 1]).rows(1, 3).y
        array([1, 1])
        """
        if not 0 <= start <= stop <= self.num_examples:
            raise InputError(
                f"rows: expected 0 <= start <= stop <= {self.num_examples}, found {start} and {stop}; "
                "give places of rows"
            )
        part = Dataset.__new__(Dataset)
        x = self.x
        part.x = {name: values[start:stop] for name, values in x.items()} if isinstance(x, dict) else x[start:stop]
        part.y = None if self.y is None else self.y[start:stop]
        part.weights = None if self.weights is None else self.weights[start:stop]
        part.feature_names, part.num_examples = self.feature_names, stop - start
        return part

    def replace(
        self, *, x: Any = _SAME, y: Any = _SAME, weights: Any = _SAME, feature_names: Sequence[str] | None = _SAME
    ) -> Dataset:
        """The dataset with other parts; the rest stays. Feature names that no longer fit a new ``x`` are dropped.

        >>> Dataset([[1.0], [2.0]], [0, 1]).replace(y=[5, 6]).y
        array([5, 6])
        """
        new = self.x if x is _SAME else _features(x)
        names = self.feature_names if feature_names is _SAME else feature_names
        if feature_names is _SAME and names and (isinstance(new, dict) or new.ndim < 2 or new.shape[-1] != len(names)):
            names = None
        return Dataset(
            new,
            self.y if y is _SAME else y,
            self.weights if weights is _SAME else weights,
            feature_names=names,
        )

    @staticmethod
    def concatenate(datasets: Iterable[Dataset]) -> Dataset:
        """All examples, one dataset after another; datasets without examples are left out, unless all are empty.

        Where only some have weights, an example of the others weighs 1. Raises ``InputError`` when features, labels
        or feature names do not fit together.
        """
        given = list(datasets)
        if not given:
            raise InputError("concatenate: expected at least one dataset, found none; give the datasets to join")
        some = [dataset for dataset in given if len(dataset)] or given[:1]
        first = some[0]
        for dataset in some[1:]:
            _refuse_misfit(first, dataset)
        joined = {name: np.concatenate([_parts(d.x)[name] for d in some]) for name in _parts(first.x)}
        y = None if first.y is None else np.concatenate([d.y for d in some if d.y is not None])
        weights = None
        if any(d.weights is not None for d in some):
            weights = np.concatenate([np.ones(len(d)) if d.weights is None else d.weights for d in some])
        names = next((d.feature_names for d in some if d.feature_names is not None), None)
        x = dict(zip(first.x, joined.values(), strict=True)) if isinstance(first.x, dict) else joined["x"]
        return Dataset(x, y, weights, feature_names=names)

    @staticmethod
    def from_table(
        path_or_frame: str | os.PathLike[str] | Any,
        *,
        label: str | None,
        categories: Mapping[str, Sequence[Any]] | None = None,
        features: Sequence[str] | None = None,
        classes: Sequence[Any] | None = None,
        weights: str | None = None,
        drop_missing: bool = False,
    ) -> Dataset:
        """A table with named columns: ``x`` (num_rows, num_features) float32 and ``y`` (num_rows,).

        The table is a path (``.csv``, ``.tsv``, either also ``.gz``; ``.parquet``) or a pandas, Polars or pyarrow
        frame. An empty cell, ``NA``, ``NaN``, ``?`` and ``null`` are missing, and become NaN.

        - ``features``: the columns to use, in order; by default all but the label and the weights, as they stand.
        - ``categories={column: levels}``: that column becomes one 0/1 column a level, named ``column=level``, in the
          stated order, so that every client has the same columns whatever levels it happens to hold.
        - ``label``: whole numbers become int64 (written ``1`` or ``1.0``), a column with any fraction float32. With
          ``classes`` the label is the class's place in that list; text labels need it. None: no labels. Rows without
          a label are dropped.
        - ``weights``: a column of example weights.
        - ``drop_missing=True`` drops each row with a missing feature.

        Raises ``InputError``, with the line to paste, for a missing file or column, a level or class not stated, a
        text column without levels, and when every row is lost to missing values.

        >>> rows = {"age": [63, 41], "pain": ["typical", "none"], "sick": [1, 0]}
        >>> data = Dataset.from_table(rows, label="sick", categories={"pain": ["none", "typical"]})
        >>> data.feature_names
        ('age', 'pain=none', 'pain=typical')
        >>> data.x
        array([[63.,  0.,  1.],
               [41.,  1.,  0.]], dtype=float32)
        """
        reading = Reading(
            label=label,
            categories=categories,
            features=features,
            classes=classes,
            weights=weights,
            drop_missing=drop_missing,
        )
        arrays = read_arrays(read_table(path_or_frame), reading)
        return Dataset(arrays.x, arrays.y, arrays.weights, feature_names=arrays.feature_names)

    @staticmethod
    def from_torch(torch_dataset: Any) -> Dataset:
        """A map-style torch dataset of pairs (x, y), read once and stacked; x may be a dict of tensors.

        Random augmentation is thereby fixed: put it into the model or the loss instead.
        """
        return Dataset(*adapters.from_torch(torch_dataset))

    @staticmethod
    def from_hugging_face(dataset: Any, *, features: str | Sequence[str], label: str | None) -> Dataset:
        """One split of a Hugging Face dataset.

        ``features`` is one column's name (``x`` is its array) or several (``x`` is a dict of arrays by column).
        """
        return Dataset(*adapters.from_hugging_face(dataset, features, label))


def hold_out(dataset: Dataset, share: float, key: Key) -> tuple[Dataset, Dataset]:
    """``(train, test)``: a share of the rows set aside, the same rows every time for equal key, labels and size.

    The test part has ``share * num_examples`` rows, rounded (halves up). Where ``y`` is (num_examples,) whole numbers
    and each class has 2 rows or more, each class gives its share to within one row; else rows are drawn without regard
    to y. Rows keep their order in both parts. 0 or 1 examples all stay in train; train always keeps one.

    Raises ``InputError`` unless 0 <= share < 1.

    >>> train, test = hold_out(Dataset(range(10), [0] * 6 + [1] * 4), 0.5, Key.of(0))
    >>> sorted(test.y.tolist())
    [0, 0, 0, 1, 1]
    """
    if not 0 <= share < 1:
        raise InputError(f"holdout: expected a share from 0 up to but not 1, found {share}; give 0.2, say")
    size = len(dataset)
    num_test = min(int(share * size + 0.5), size - 1) if size > 1 else 0
    if not num_test:
        return dataset, dataset.take([])
    rank = np.argsort(permutations([key], np.array([size]))[0])  # each row's place in a random order
    in_test = rank < num_test
    y = dataset.y
    if y is not None and y.ndim == 1 and y.dtype.kind in "biu":
        _, classes, counts = np.unique(y, return_inverse=True, return_counts=True)
        if counts.min() >= 2:
            in_test = _stratified(rank, classes, counts, num_test)
    return dataset.take(np.flatnonzero(~in_test)), dataset.take(np.flatnonzero(in_test))


def _stratified(rank: Array, classes: Array, counts: Array, num_test: int) -> npt.NDArray[np.bool_]:
    """Which rows are held out: of each class the first by ``rank``, as many as largest remainders (Hamilton) give."""
    quota = num_test * counts / len(rank)
    seats = np.floor(quota).astype(np.int64)
    order = np.lexsort((rank, classes))
    starts = np.cumsum(counts) - counts
    chance = rank[order][starts]  # a class's best rank decides between equal remainders
    seats[np.lexsort((chance, seats - quota))[: num_test - seats.sum()]] += 1
    in_test = np.zeros(len(rank), bool)
    in_test[order] = np.arange(len(rank)) - np.repeat(starts, counts) < np.repeat(seats, counts)
    return in_test


def _parts(x: Features) -> dict[str, Array]:
    """The arrays of x by the name that a message gives them."""
    return {f"x[{name!r}]": part for name, part in x.items()} if isinstance(x, dict) else {"x": x}


def _features(x: Any) -> Features:
    if not isinstance(x, Mapping):
        return _numbers("x", x)
    if not x:
        raise InputError("x: expected at least one array, found an empty dict; give {name: array}")
    return {str(name): _numbers(f"x[{name!r}]", part) for name, part in x.items()}


def _numbers(name: str, values: Any) -> Array:
    """``values`` as an array of numbers with at least one axis; refused with what to do about it otherwise."""
    try:
        array = np.asarray(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{name}: expected an array of numbers, found what NumPy refuses: {error}") from error
    if array.dtype.kind not in "biuf":
        raise InputError(
            f"{name}: expected numbers, found dtype {array.dtype} (text, dates, or rows of unequal length); "
            "turn them into numbers first: Dataset.from_table(..., categories=..., classes=...) does it for tables"
        )
    if array.ndim == 0:
        raise InputError(f"{name}: expected one value an example, found the single number {array}; give an array")
    return array


def _weights(values: Any) -> npt.NDArray[np.float64]:
    weights = _numbers("weights", values).astype(np.float64, copy=False)
    if weights.ndim != 1:
        raise InputError(f"weights: expected one number an example, found shape {weights.shape}; give (num_examples,)")
    bad = np.flatnonzero(~(np.isfinite(weights) & (weights >= 0)))
    if len(bad):
        raise InputError(
            f"weights: expected finite numbers >= 0, found {weights[bad[0]]} for example {bad[0]}; "
            "0 makes an example count for nothing"
        )
    return weights


def _names(names: Sequence[str] | None, x: Features) -> tuple[str, ...] | None:
    if names is None:
        return None
    if isinstance(names, str):
        raise InputError(f"feature_names: expected a list of names, found the text {names!r}; write [{names!r}]")
    if isinstance(x, dict) or x.ndim < 2 or x.shape[-1] != len(names):
        found = "a dict of arrays" if isinstance(x, dict) else f"x of shape {x.shape}"
        raise InputError(
            f"feature_names: expected one name for each place of the last axis of x, found {len(names)} names "
            f"and {found}; leave feature_names out, or name each column"
        )
    return tuple(str(name) for name in names)


def _refuse_misfit(first: Dataset, other: Dataset) -> None:
    """Raise when ``other`` cannot be put under ``first``."""
    ours = {**_parts(first.x), "y": first.y}
    theirs = {**_parts(other.x), "y": other.y}
    shapes = [{n: None if a is None else a.shape[1:] for n, a in parts.items()} for parts in (ours, theirs)]
    if shapes[0] != shapes[1]:
        raise InputError(
            f"concatenate: expected examples of one form, found {first} and {other}; "
            "every client needs the same features in the same order, and labels or none"
        )
    if first.feature_names and other.feature_names and first.feature_names != other.feature_names:
        differ = [(a, b) for a, b in zip(first.feature_names, other.feature_names, strict=True) if a != b]
        raise InputError(
            f"concatenate: expected the same features in the same order, found {differ[0][0]!r} at one client where "
            f"another has {differ[0][1]!r}; state features=[...] for all"
        )
