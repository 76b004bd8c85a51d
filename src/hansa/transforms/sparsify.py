"""Top-k sparsification with error feedback: send the largest coordinates, remember the rest.

    full = u + residual;   sent = the k largest of |full|;   residual <- full - sent

Stich, Cordonnier and Jaggi, "Sparsified SGD with memory", NeurIPS 2018, algorithm 1; in federated form Sattler,
Wiedemann, Müller and Samek, "Robust and communication-efficient federated learning from non-i.i.d. data", IEEE TNNLS
2020, section IV. The residual is the client's memory: it is committed only when the report was counted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from hansa.core.chain import Transform
from hansa.core.errors import InputError
from hansa.core.protocols import Array, Codec, Draws, Memory, Settings, Updates


@dataclass(frozen=True, kw_only=True)
class TopK(Transform):
    """Send ``fraction`` of the coordinates, at least one: 0 < fraction <= 1. Claims no norm bound with feedback.

    Ties are broken by position, so that exactly k coordinates are sent.

    >>> TopK(fraction=0.01).count(250), largest(np.array([[1.0, -5.0, 3.0]]), 2).tolist()
    (3, [[1, 2]])
    """

    fraction: float = 0.01
    error_feedback: bool = True

    def __post_init__(self) -> None:
        if not 0 < self.fraction <= 1:
            raise InputError(f"TopK(fraction=): expected 0 < fraction <= 1, found {self.fraction}")

    def count(self, num_params: int) -> int:
        """Coordinates sent of ``num_params``."""
        return min(num_params, max(1, math.ceil(self.fraction * num_params)))

    def norm_bound(self, incoming: float, settings: Settings) -> float:
        """Dropping coordinates shortens a row; a remembered residual may lengthen it without bound."""
        return math.inf if self.error_feedback else incoming

    def encode(
        self, updates: Updates, settings: Settings, memory: Memory, draws: Draws
    ) -> tuple[Updates, Mapping[str, Array]]:
        """Sparse rows, and the residual (num_clients, num_params) to remember."""
        values = np.asarray(updates.values, dtype=np.float32)
        if self.error_feedback:
            values = values + memory.get("residual", np.zeros(values.shape[1], np.float32))
        keep = largest(values, self.count(values.shape[1]))
        sent = np.zeros_like(values)
        np.put_along_axis(sent, keep, np.take_along_axis(values, keep, axis=1), axis=1)
        remembered = {"residual": values - sent} if self.error_feedback else {}
        return updates._replace(values=sent), remembered

    def codec(self, inner: Codec) -> Codec:
        """Positions and values."""
        return Sparse(fraction=self.fraction)


@dataclass(frozen=True, kw_only=True)
class Sparse:
    """Packs the k largest coordinates of each row as positions and float32 values."""

    fraction: float

    def pack(self, updates: Updates) -> Mapping[str, Array]:
        """Positions (num_rows, k) uint32 in rising order, and values (num_rows, k)."""
        values = np.asarray(updates.values, dtype=np.float32)
        where = largest(values, TopK(fraction=self.fraction).count(values.shape[1]))
        return {"positions": where.astype(np.uint32), "values": np.take_along_axis(values, where, axis=1)}

    def unpack(self, arrays: Mapping[str, Array], num_params: int) -> tuple[Array, Mapping[str, Array]]:
        """Dense rows. ``ValueError`` when positions repeat, fall or lie outside, or their number is not k."""
        where, values = np.asarray(arrays["positions"]), np.asarray(arrays["values"])
        expected = TopK(fraction=self.fraction).count(num_params)
        if where.dtype != np.uint32 or where.ndim != 2 or where.shape != values.shape or where.shape[1] != expected:
            raise ValueError(f"expected {expected} positions and values a row, found {where.shape} and {values.shape}")
        where = where.astype(np.int64)
        if (where >= num_params).any() or (np.diff(where, axis=1) <= 0).any():
            raise ValueError("positions that repeat, fall or lie outside the vector")
        out = np.zeros((len(where), num_params), np.float32)
        np.put_along_axis(out, where, values, axis=1)
        return out, {}

    def row_bytes(self, num_params: int) -> int:
        """A position and a float32 for each coordinate sent."""
        return 8 * TopK(fraction=self.fraction).count(num_params)


def largest(values: np.ndarray, count: int) -> np.ndarray:
    """Positions of the ``count`` largest magnitudes of each row, rising: (num_rows, count); ties go to the first."""
    order = np.argsort(-np.abs(values), axis=1, kind="stable")[:, :count]
    return np.sort(order, axis=1)
