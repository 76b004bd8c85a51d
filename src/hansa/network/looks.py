"""What a coordinator sees in a client's row before it counts: what is wrong with it, and what form it has."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np

from hansa.core import chain
from hansa.core.protocols import Updates

_COLUMNS = 2**21
_LONGEST_NAMES = 200


def fault_of(updates: Updates, must_be_finite: bool, let_go: Callable[[], None]) -> str:
    """What is wrong with a row, or nothing; ``let_go`` is called wherever what was read is not needed any more."""
    weight = np.asarray(updates.weights)
    if weight.dtype.kind not in "fiu" or not np.isfinite(weight).all() or not (weight > 0).all():
        return "weight is not a positive number"
    if np.asarray(updates.values).dtype.kind not in "fiu":
        return "update holds no numbers"
    columns = [column for name, column in updates.tail.items() if name != "train_loss"]
    if must_be_finite and not (_is_finite(updates.values, let_go) and all(np.isfinite(c).all() for c in columns)):
        return "update is not finite"
    if must_be_finite and not _has_length(np.asarray(updates.values), let_go):
        return "update is too large"
    return ""


def _is_finite(values: np.ndarray[Any, Any], let_go: Callable[[], None]) -> bool:
    """Whether all of it is, looked at some columns at a time."""
    for start in range(0, values.shape[1], _COLUMNS):
        if not chain.finite_rows(values[:, start : start + _COLUMNS]).all():
            return False
        let_go()
    return True


def _has_length(values: np.ndarray[Any, Any], let_go: Callable[[], None]) -> bool:
    """Whether rows' squared lengths are numbers: sums of anything longer may not be."""
    if values.dtype.kind != "f":
        return True
    squares = np.zeros(len(values), values.dtype)
    with np.errstate(over="ignore"):
        for start in range(0, values.shape[1], _COLUMNS):
            part = values[:, start : start + _COLUMNS]
            squares += np.einsum("np,np->n", part, part)
            let_go()
    return bool(np.isfinite(squares).all())


def form_of(updates: Updates) -> str:
    """Sizes and names: rows of one slot must agree in them to be combined."""
    values = np.asarray(updates.values)
    names = plain(", ".join([*sorted(updates.tail), *(f"side {name}" for name in sorted(updates.side))]))
    if len(names) > _LONGEST_NAMES:
        names = f"{names[:_LONGEST_NAMES]}... ({hashlib.sha256(names.encode()).hexdigest()})"
    return f"{values.shape[1]} values of {values.dtype}" + (f" with {names}" if names else "")


def plain(text: str) -> str:
    """A client's text without what no database or terminal takes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
