"""A client's weighted row as whole numbers, and the sum of such rows as an update again: for real and ideal sums."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from hansa.core.chain import Limits
from hansa.core.key import Key
from hansa.core.protocols import Updates
from hansa.secagg.grid import LIMBS, TooLarge, as_words, limbs_of, numbers_of, rounded, step_of
from hansa.secagg.server import Sums


def heaviest(aggregator: Any) -> float | None:
    """What one client can weigh at most; None where all weigh the same."""
    weighs: float | None = aggregator.max_weight if aggregator.weighting == "examples" else None
    return weighs


def weight_of(row: Updates, most: float | None) -> float:
    """What a row weighs: 1, or its examples up to the most."""
    return 1.0 if most is None else min(float(row.weights[0]), most)


def share_of(weight: float, most: float | None, scale: float) -> float:
    """How much of a whole row counts: its share of the largest weight, and less if it is late."""
    return scale if most is None else scale * weight / most


def words_of(
    row: Updates, limits: Limits, bits: int, most: float | None, secret: Key, scale: float = 1.0
) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.float64]]:
    """One client's coordinates on the grid (weighted by a share of ``most``), and its exact numbers.

    Exact are the weight and the weighted columns, in the order of their names, and all coordinates where the chain
    bounds none (sums of metrics, say): then there are none on the grid. A late row counts ``scale`` times as much, but
    for its weight.
    """
    weight = weight_of(row, most)
    scaled = weight * scale
    numbers = [np.array([weight]), *(np.asarray(row.tail[n], np.float64) * scaled for n in sorted(row.tail))]
    if not math.isfinite(limits.value):
        return np.empty(0, np.uint32), np.concatenate([*numbers, np.asarray(row.values[0], np.float64) * scaled])
    levels = rounded(np.asarray(row.values[0]), limits, bits, secret, share_of(weight, most, scale))
    return as_words(levels), np.concatenate(numbers)


def exact_words(numbers: npt.NDArray[np.float64]) -> npt.NDArray[np.uint64]:
    """Exact numbers as the words that are masked."""
    limbs = limbs_of(numbers)
    return limbs.reshape(-1).view(np.uint64)


def row_of(sums: Sums, limits: Limits, bits: int, most: float | None) -> Updates:
    """A group's sum as one folded row."""
    if len(sums.exact) % LIMBS or len(sums.exact) // LIMBS < 1 + len(sums.names):
        raise TooLarge(["secure sums: expected a weight and the columns that are named, found another number of them."])
    numbers = numbers_of(sums.exact.reshape(LIMBS, -1))
    tail = {name: numbers[[i]] for i, name in enumerate(sums.names, 1)}
    if math.isfinite(limits.value):
        values = sums.values * (step_of(limits, bits) * (1.0 if most is None else most))
    else:
        values = numbers[1 + len(sums.names) :]
    return Updates(sums.clients, values[None], numbers[:1], tail, {}, folded=True)


def sums_of(rows: Sequence[Updates], *, apart: bool) -> Updates:
    """Groups as one folded row; ``apart``: their means, a row a group."""
    clients = tuple(client for row in rows for client in row.clients)
    if apart:
        weights = np.concatenate([row.weights for row in rows])
        values = np.concatenate([row.values / row.weights[:, None] for row in rows])
        tail = {name: np.concatenate([row.tail[name] / row.weights for row in rows]) for name in rows[0].tail}
        return Updates(clients, values, weights, tail)
    values, weights = rows[0].values, rows[0].weights
    tail = dict(rows[0].tail)
    for row in rows[1:]:
        values, weights = values + row.values, weights + row.weights
        tail = {name: column + row.tail[name] for name, column in tail.items()}
    return Updates(clients, values, weights, tail, {}, folded=True)


__all__ = ["exact_words", "heaviest", "row_of", "share_of", "sums_of", "weight_of", "words_of"]
