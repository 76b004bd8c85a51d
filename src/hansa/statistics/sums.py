"""The statistics of a survey: each is a sum over records of a vector of bounded length.

Dwork, McSherry, Nissim and Smith, "Calibrating noise to sensitivity in private data analysis", TCC 2006, section 3. The
bounds of a column are yours to state and not the data's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from hansa.core.errors import InputError
from hansa.data.dataset import Dataset

Vector = npt.NDArray[np.float64]
LABEL = "label"  # the column of ``Dataset.y``


class Statistic(Protocol):
    """A sum over records. ``norm`` is the L2 norm that one record's vector (size,) cannot exceed."""

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def size(self) -> int: ...  # noqa: D102
    @property
    def norm(self) -> float: ...  # noqa: D102
    def sums(self, dataset: Dataset) -> Vector: ...  # noqa: D102
    def answer(self, sums: Vector, deviation: float) -> Any: ...  # noqa: D102


class Estimate(NamedTuple):
    """A value, and the standard deviation that the noise gives it."""

    value: float
    deviation: float


@dataclass(frozen=True, kw_only=True)
class Count:
    """How many records there are.

    >>> Count().sums(Dataset(np.zeros((3, 1)))).tolist()
    [3.0]
    """

    name: str = "count"
    size = 1
    norm = 1.0

    def sums(self, dataset: Dataset) -> Vector:
        """The number of records: (1,)."""
        return np.array([float(len(dataset))])

    def answer(self, sums: Vector, deviation: float) -> Estimate:
        """The count."""
        return Estimate(float(sums[0]), deviation)


@dataclass(frozen=True)
class Mean:
    """The mean of a column whose values are held to ``low`` and ``high``; missing ones do not count.

    >>> Mean("age", low=0, high=100).sums(Dataset([[20.0], [200.0], [np.nan]], feature_names=["age"])).tolist()
    [0.4, 2.0]
    """

    column: str | int
    low: float
    high: float
    size = 2
    norm = math.sqrt(2.0)

    def __post_init__(self) -> None:
        _check_range("Mean", self.low, self.high)

    @property
    def name(self) -> str:
        """``mean of`` the column."""
        return f"mean of {self.column}"

    def sums(self, dataset: Dataset) -> Vector:
        """Values from -1 to 1 added up, and how many there are: (2,)."""
        values = column_of(dataset, self.column)
        known = values[~np.isnan(values)]
        centred = (np.clip(known, self.low, self.high) - self._middle) / self._half
        return np.array([centred.sum(), float(len(known))])

    def answer(self, sums: Vector, deviation: float) -> Estimate:
        """The mean; its deviation to first order."""
        count = max(float(sums[1]), 1.0)
        centred = min(max(float(sums[0]) / count, -1.0), 1.0)
        spread = self._half * deviation * math.sqrt(1 + centred**2) / count
        return Estimate(self._middle + self._half * centred, spread)

    @property
    def _middle(self) -> float:
        return (self.low + self.high) / 2

    @property
    def _half(self) -> float:
        return (self.high - self.low) / 2


@dataclass(frozen=True)
class Histogram:
    """How many values lie between one edge and the next; those outside lie in the first and the last cell.

    >>> Histogram("age", edges=(0, 40, 80)).sums(Dataset([[20.0], [40.0], [90.0]], feature_names=["age"])).tolist()
    [1.0, 2.0]
    """

    column: str | int
    edges: tuple[float, ...]
    norm = 1.0

    def __post_init__(self) -> None:
        if len(self.edges) < 2 or not all(a < b for a, b in zip(self.edges, self.edges[1:], strict=False)):
            raise InputError(f"Histogram(edges=): expected two or more that rise, found {self.edges}")

    @property
    def name(self) -> str:
        """``histogram of`` the column."""
        return f"histogram of {self.column}"

    @property
    def size(self) -> int:
        """The number of cells."""
        return len(self.edges) - 1

    def sums(self, dataset: Dataset) -> Vector:
        """Counts: (num_cells,)."""
        values = column_of(dataset, self.column)
        cells = np.searchsorted(np.asarray(self.edges[1:-1], float), values[~np.isnan(values)], side="right")
        return np.bincount(cells, minlength=self.size).astype(np.float64)

    def answer(self, sums: Vector, deviation: float) -> list[Estimate]:
        """The counts as they came: below zero, noise is seen to be noise."""
        return [Estimate(float(value), deviation) for value in sums]


@dataclass(frozen=True)
class Categories:
    """How many records hold each of the ``values``; others count for none.

    >>> Categories("label", values=(0, 1)).sums(Dataset(np.zeros((3, 1)), [1, 1, 2])).tolist()
    [0.0, 2.0]
    """

    column: str | int
    values: tuple[Any, ...]
    norm = 1.0

    @property
    def name(self) -> str:
        """``categories of`` the column."""
        return f"categories of {self.column}"

    @property
    def size(self) -> int:
        """The number of values."""
        return len(self.values)

    def sums(self, dataset: Dataset) -> Vector:
        """Counts: (num_values,)."""
        found = column_of(dataset, self.column, numbers=False)
        return np.array([float(np.sum(found == value)) for value in self.values])

    def answer(self, sums: Vector, deviation: float) -> dict[Any, Estimate]:
        """The counts by value."""
        return {value: Estimate(float(n), deviation) for value, n in zip(self.values, sums, strict=True)}


@dataclass(frozen=True)
class Quantiles:
    """Values below which given shares of a column lie, read off a noisy histogram of equal cells.

    >>> ages = Quantiles("age", low=0, high=100, shares=(0.5,), num_cells=10)
    >>> ages.answer(ages.sums(Dataset(np.arange(100.0)[:, None], feature_names=["age"])), 0.0)
    {0.5: 50.0}
    """

    column: str | int
    low: float
    high: float
    shares: tuple[float, ...] = (0.25, 0.5, 0.75)
    num_cells: int = 100
    norm = 1.0

    def __post_init__(self) -> None:
        _check_range("Quantiles", self.low, self.high)
        if not self.shares or not all(0 <= share <= 1 for share in self.shares):
            raise InputError(f"Quantiles(shares=): expected shares from 0 to 1, found {self.shares}")
        if self.num_cells < 1:
            raise InputError(f"Quantiles(num_cells=): expected 1 or more, found {self.num_cells}")

    @property
    def name(self) -> str:
        """``quantiles of`` the column."""
        return f"quantiles of {self.column}"

    @property
    def size(self) -> int:
        """The number of cells."""
        return self.num_cells

    def sums(self, dataset: Dataset) -> Vector:
        """Counts: (num_cells,)."""
        return Histogram(self.column, tuple(self._edges.tolist())).sums(dataset)

    def answer(self, sums: Vector, deviation: float) -> dict[float, float]:
        """Each share's value, as if a cell's values lay evenly in it; counts that noise made negative are zero."""
        below = np.concatenate([[0.0], np.cumsum(np.maximum(sums, 0.0))])
        if not below[-1] > 0:
            return dict.fromkeys(self.shares, math.nan)
        rising = below + np.arange(len(below)) * 1e-12 * below[-1]  # where no value lies, the first edge counts
        return {share: float(np.interp(share * rising[-1], rising, self._edges)) for share in self.shares}

    @property
    def _edges(self) -> Vector:
        return np.linspace(self.low, self.high, self.num_cells + 1)


@dataclass(frozen=True)
class Accuracy:
    """The share of records that a trained model predicts right; ``predict(x)`` gives labels, as ``run.predict`` does.

    >>> Accuracy(lambda x: np.zeros(len(x))).sums(Dataset(np.zeros((3, 1)), [0, 1, 0])).tolist()
    [2.0, 3.0]
    """

    predict: Any
    name: str = "accuracy"
    size = 2
    norm = math.sqrt(2.0)

    def sums(self, dataset: Dataset) -> Vector:
        """Right ones, and all: (2,)."""
        if not len(dataset):
            return np.zeros(2)
        right = np.asarray(self.predict(dataset.x)) == column_of(dataset, LABEL, numbers=False)
        return np.array([float(right.sum()), float(len(dataset))])

    def answer(self, sums: Vector, deviation: float) -> Estimate:
        """The share; its deviation to first order."""
        count = max(float(sums[1]), 1.0)
        share = min(max(float(sums[0]) / count, 0.0), 1.0)
        return Estimate(share, deviation * math.sqrt(1 + share**2) / count)


def column_of(dataset: Dataset, column: str | int, *, numbers: bool = True) -> Any:
    """A column of a dataset by name or position, or its labels: (num_examples,)."""
    if column == LABEL and (dataset.feature_names is None or LABEL not in dataset.feature_names):
        if dataset.y is None:
            raise InputError("expected labels, found none")
        found = dataset.y
    elif isinstance(dataset.x, dict):
        if column not in dataset.x:
            raise InputError(f"expected a column {column!r}, found {', '.join(map(str, dataset.x))}")
        found = dataset.x[column]
    elif isinstance(column, int):
        if not (dataset.x.ndim == 2 and 0 <= column < dataset.x.shape[1]):
            raise InputError(f"expected a column {column}, found features of shape {dataset.x.shape[1:]}")
        found = dataset.x[:, column]
    else:
        names = dataset.feature_names or ()
        if column not in names:
            raise InputError(f"expected a column {column!r}, found {', '.join(names) or 'features without names'}")
        found = dataset.x[:, names.index(column)]
    return np.asarray(found, np.float64) if numbers else np.asarray(found)


def _check_range(kind: str, low: float, high: float) -> None:
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise InputError(f"{kind}(low=, high=): expected numbers with low below high, found {low} and {high}")
