"""``Unwritten``: rows of clients, of which some columns are products that nobody has multiplied out.

Under plain SGD a layer's change is a product of its inputs with the loss's slopes in its outputs, ``Sᵀ X``, and the
weighted sum over clients is one product too:

    sum_i w_i S_iᵀ X_i = [w_1 S_1; w_2 S_2; ...]ᵀ [X_1; X_2; ...]

so that where only the sum is wanted, a learner need not write, and nobody need read, a row as long as the model for
each client. Whoever wants rows after all gets them: they are written once, when they are first looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

Function = TypeVar("Function", bound=Callable[..., Any])
_MARK = "hansa_passes_rows_on"


def passes_rows_on(function: Function) -> Function:
    """Mark a method that passes rows on, or adds them up, without looking at them: they may come ``Unwritten``."""
    setattr(function, _MARK, True)
    return function


def takes_unwritten(method: Any) -> bool:
    """Whether a method is marked."""
    return bool(getattr(method, _MARK, False))


class Product(Protocol):
    """Some columns of some rows as a product."""

    @property
    def clients(self) -> npt.NDArray[np.int64]:
        """The rows that it is of, in its own order."""
        ...

    @property
    def columns(self) -> Sequence[slice]:
        """Where in a row its values are: a slice a vector of ``sums``."""
        ...

    def write(self, rows: npt.NDArray[np.float32]) -> None:
        """Write the columns of its clients into ``rows`` (all rows, all columns)."""
        ...

    def sums(self, weights: npt.NDArray[np.float64]) -> Sequence[npt.NDArray[np.float64]]:
        """The weighted sum over its clients, in its order: a vector for each of ``columns``."""
        ...


def other_columns(products: Sequence[Product], num_params: int) -> list[slice]:
    """The columns that are in no product, in runs."""
    taken = sorted({(columns.start, columns.stop) for product in products for columns in product.columns})
    edges = [0, *(edge for pair in taken for edge in pair), num_params]
    return [slice(start, stop) for start, stop in list(pairwise(edges))[::2] if start < stop]


class Unwritten:
    """Rows (num_clients, num_params) float32; ``held`` has all columns but those of ``products``.

    A NumPy array for whoever asks: ``np.asarray(rows)``, ``rows[index]``. ``products`` is empty once rows are written.
    """

    ndim = 2
    dtype = np.dtype(np.float32)

    def __init__(self, held: npt.NDArray[np.float32], products: Sequence[Product]) -> None:
        self.held, self.products = held, list(products)
        self.shape = held.shape

    def __len__(self) -> int:
        return len(self.held)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> npt.NDArray[Any]:
        while self.products:
            self.products.pop().write(self.held)
        return np.array(self.held, dtype=dtype, copy=copy)

    def __getitem__(self, index: Any) -> Any:
        return np.asarray(self)[index]

    def astype(self, dtype: Any, copy: bool = True) -> Any:
        """The rows in another type; as they are where nothing is to be changed or copied."""
        return self if not copy and np.dtype(dtype) == self.dtype else np.asarray(self).astype(dtype)

    def sum(self, axis: int | None = None) -> Any:
        """The sum of the rows' values, as NumPy gives it."""
        return np.asarray(self).sum(axis=axis)
