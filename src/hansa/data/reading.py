"""What a population does with tables and folders: how they are read, and whose each row is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hansa.core.errors import InputError
from hansa.data.columns import Reading, read_arrays
from hansa.data.dataset import Dataset
from hansa.data.table import cell_text, read_table, select_rows

Data = Dataset | tuple[Dataset, Dataset | None]


def reading_of(
    method: str,
    load: Callable[..., Data] | None,
    label: str | None,
    categories: Mapping[str, Sequence[Any]] | None,
    features: Sequence[str] | None,
    classes: Sequence[Any] | None,
    weights: str | None,
    drop_missing: bool,
    *without: str,
) -> Reading:
    """How tables are read; refuses both a function and a label, and neither."""
    options = (label, categories, features, classes, weights)
    if load is not None and (drop_missing or any(option is not None for option in options)):
        raise InputError(
            f"{method}: expected load= alone, found options of tables beside it; load() decides: drop them"
        )
    if load is None and label is None:
        raise InputError(f"{method}: expected label= or load=, found neither; name the label column: label='...'")
    return Reading(
        label=label,
        categories=categories,
        features=features,
        classes=classes,
        weights=weights,
        drop_missing=drop_missing,
        without=without,
    )


def owners_of(source: str, column: str, raw: Any) -> tuple[list[str], Any]:
    """The clients in order of first appearance, and each row's place among them."""
    cells = [_id(cell) for cell in raw.tolist()]
    without = [i + 1 for i, cell in enumerate(cells) if not cell]
    if without or not cells:
        found = f"none in row {', '.join(map(str, without[:3]))}" if without else "no rows"
        more = f" and {len(without) - 3} more" if len(without) > 3 else ""
        raise InputError(
            f"{source}: expected a client in each row of column {column!r}, found {found}{more}; fill it in, or drop "
            "these rows"
        )
    places: dict[str, int] = {}
    owner = np.fromiter((places.setdefault(cell, len(places)) for cell in cells), np.int64, len(cells))
    return list(places), owner


def _id(cell: Any) -> str:
    """A client's id as text: 7 for 7.0, "" where there is none."""
    try:
        return cell_text(cell).strip()
    except (TypeError, ValueError):
        return str(cell)


def load_rows(load: Callable[[Any], Data], frame: Any, rows: Any) -> Data:
    """A client's rows of a table, as a function makes a dataset of them."""
    return load(select_rows(frame, rows))


def load_table(reading: Reading, path: Path) -> Dataset:
    """A file that is one client's table."""
    arrays = read_arrays(read_table(path), reading)
    return Dataset(arrays.x, arrays.y, arrays.weights, feature_names=arrays.feature_names)
