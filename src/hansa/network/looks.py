"""What a coordinator sees in a client's row before it counts: what is wrong with it, and what form it has."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np

from hansa.core import chain
from hansa.core.protocols import Updates
from hansa.long_vectors import Later, columns_of, spans

_COLUMNS = 2**19
_LONGEST_NAMES = 200


def fault_of(updates: Updates, must_be_finite: bool, let_go: Callable[[], None]) -> str:
    """What is wrong with a row, or nothing; ``let_go`` is called wherever what was read is not needed any more."""
    weight, values = np.asarray(updates.weights), _array(updates)
    if weight.dtype.kind not in "fiu" or not np.isfinite(weight).all() or not (weight > 0).all():
        return "weight is not a positive number"
    if values.dtype.kind not in "fiu":
        return "update holds no numbers"
    columns = [column for name, column in updates.tail.items() if name != "train_loss"]
    if must_be_finite and not (_is_finite(values, let_go) and all(np.isfinite(c).all() for c in columns)):
        return "update is not finite"
    if must_be_finite and not _has_length(values, let_go):
        return "update is too large"
    return ""


def _array(updates: Updates) -> Any:
    """The values, whose columns may be yet to be made."""
    return updates.values if isinstance(updates.values, Later) else np.asarray(updates.values)


def _is_finite(values: Any, let_go: Callable[[], None]) -> bool:
    """Whether all of it is, looked at some columns at a time."""
    for start, stop in spans(values.shape[1], _COLUMNS):
        if not chain.finite_rows(columns_of(values, start, stop)).all():
            return False
        let_go()
    return True


def _has_length(values: Any, let_go: Callable[[], None]) -> bool:
    """Whether rows' squared lengths are numbers: sums of anything longer may not be."""
    if values.dtype.kind != "f":
        return True
    squares = np.zeros(len(values), values.dtype)
    with np.errstate(over="ignore"):
        for start, stop in spans(values.shape[1], _COLUMNS):
            part = columns_of(values, start, stop)
            squares += np.einsum("np,np->n", part, part)
            let_go()
    return bool(np.isfinite(squares).all())


def form_of(updates: Updates) -> str:
    """Sizes and names: rows of one slot must agree in them to be combined."""
    values = _array(updates)
    names = plain(", ".join([*sorted(updates.tail), *(f"side {name}" for name in sorted(updates.side))]))
    if len(names) > _LONGEST_NAMES:
        names = f"{names[:_LONGEST_NAMES]}... ({hashlib.sha256(names.encode()).hexdigest()})"
    return f"{values.shape[1]} values of {values.dtype}" + (f" with {names}" if names else "")


def plain(text: str) -> str:
    """A client's text without what no database or terminal takes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
