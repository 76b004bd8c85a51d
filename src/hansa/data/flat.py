"""``FlatRows``: the examples of many clients in flat arrays, one client after another; a client's are views."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from hansa.core.errors import InputError
from hansa.data.dataset import Dataset

Array = npt.NDArray[Any]


@dataclass(frozen=True, kw_only=True, eq=False)
class FlatRows:
    """All examples, and ``offsets`` (num_clients + 1,) int64: client i's are the rows ``offsets[i]:offsets[i + 1]``.

    >>> rows = FlatRows(dataset=Dataset([1.0, 2.0, 3.0]), offsets=np.array([0, 1, 3]))
    >>> rows(1).x
    array([2., 3.])
    """

    dataset: Dataset
    offsets: npt.NDArray[np.int64]

    def __call__(self, position: int) -> Dataset:
        """The rows of one client, as views."""
        return self.dataset.rows(self.offsets.item(position), self.offsets.item(position + 1))

    @property
    def sizes(self) -> npt.NDArray[np.int64]:
        """Each client's number of rows."""
        return np.diff(self.offsets)


def cut_rows(
    x: Any,
    y: Any,
    weights: Any,
    feature_names: Sequence[str] | None,
    *,
    client: npt.ArrayLike | None,
    offsets: npt.ArrayLike | None,
    num_clients: int | None,
) -> FlatRows:
    """Arrays cut into clients, as ``Population.from_arrays`` says; ``num_clients`` where it is known already."""
    if client is not None and offsets is not None:
        raise InputError("from_arrays: expected client= or offsets=, found both; give one of them")
    if client is None and offsets is None:
        return _dense(x, y, weights, feature_names)
    dataset = Dataset(x, y, weights, feature_names=feature_names)
    if offsets is not None:
        return FlatRows(dataset=dataset, offsets=_offsets(offsets, len(dataset)))
    owners = _owners(client, len(dataset), num_clients)
    if (owners[1:] < owners[:-1]).any():
        order = np.argsort(owners, kind="stable")
        dataset, owners = dataset.take(order), owners[order]
    if num_clients is None:
        num_clients = int(owners[-1]) + 1 if len(owners) else 0
    if num_clients > np.iinfo(owners.dtype).max:
        owners = owners.astype(np.int64)
    ends = np.searchsorted(owners, np.arange(num_clients, dtype=owners.dtype), side="right")
    return FlatRows(dataset=dataset, offsets=np.concatenate([[0], ends]).astype(np.int64, copy=False))


def _dense(x: Any, y: Any, weights: Any, feature_names: Sequence[str] | None) -> FlatRows:
    """Arrays (num_clients, num_examples, ...), with their first two axes made one."""
    parts = {f"x[{n!r}]": np.asarray(p) for n, p in x.items()} if isinstance(x, Mapping) else {"x": np.asarray(x)}
    shape = next(iter(parts.values())).shape[:2] if parts else ()
    parts |= {name: np.asarray(part) for name, part in (("y", y), ("weights", weights)) if part is not None}
    for name, part in parts.items():
        if len(shape) < 2 or part.shape[:2] != shape:
            alike = f", alike {shape}" if len(shape) == 2 else ""
            raise InputError(
                f"from_arrays: {name}: expected (num_clients, num_examples, ...){alike}, found shape {part.shape}; "
                "for rows of all clients one after another give offsets= or client="
            )
    flat = {name: part.reshape(shape[0] * shape[1], *part.shape[2:]) for name, part in parts.items()}
    features = {name: flat[f"x[{name!r}]"] for name in x} if isinstance(x, Mapping) else flat["x"]
    dataset = Dataset(features, flat.get("y"), flat.get("weights"), feature_names=feature_names)
    return FlatRows(dataset=dataset, offsets=np.arange(shape[0] + 1, dtype=np.int64) * shape[1])


def _offsets(given: npt.ArrayLike, num_rows: int) -> npt.NDArray[np.int64]:
    offsets = np.asarray(given)
    fits = offsets.ndim == 1 and offsets.dtype.kind in "iu" and len(offsets) > 1
    if not fits or offsets[0] != 0 or offsets[-1] != num_rows or (offsets[1:] < offsets[:-1]).any():
        raise InputError(
            f"from_arrays(offsets=): expected (num_clients + 1,) whole numbers that rise from 0 to {num_rows} (the "
            f"number of rows), found {offsets.dtype} of shape {offsets.shape}: {np.array2string(offsets, threshold=6)}"
        )
    return offsets.astype(np.int64)


def _owners(given: npt.ArrayLike | None, num_rows: int, num_clients: int | None) -> Array:
    owners = np.asarray(given)
    limit = np.iinfo(np.int64).max if num_clients is None else num_clients
    fits = owners.shape == (num_rows,) and owners.dtype.kind in "iu"
    if not fits or (num_rows and not (owners.min() >= 0 and owners.max() < limit)):
        below = "" if num_clients is None else f", below {num_clients}"
        raise InputError(
            f"from_arrays(client=): expected a client's number for each of {num_rows} rows, from 0{below}, found "
            f"{owners.dtype} of shape {owners.shape}: {np.array2string(owners, threshold=6)}; for ids that are text "
            "use Population.from_table"
        )
    return owners
