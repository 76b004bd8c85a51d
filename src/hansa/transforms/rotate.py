"""Random rotation: an update's norm is spread evenly over its coordinates, so that few bits a coordinate are enough.

    u <- H D u,     D = diagonal of random signs,  H = Walsh and Hadamard's matrix over sqrt(size)

Suresh, Yu, Kumar and McMahan, "Distributed mean estimation with limited communication", ICML 2017, section 3; with
secure sums Bonawitz, Salehi, Konečný, McMahan and Gruteser, "Federated learning with autotuned
communication-efficient secure aggregation", Asilomar 2019. The signs are the same for all clients of a round, so that
the server turns their sum back. Difference: a length that is no power of two is not padded. With ``size`` the largest
power of two in it, the first ``size`` coordinates are rotated and then, by other signs, the last ``size``.

Each coordinate is then a sum of the row's values, or of values already turned, with signs of their own and weights of
1 / sqrt(size): for rows that do not depend on the signs it is sub-Gaussian, of variance ``norm^2 / size`` at most, and
is larger than ``t * norm / sqrt(size)`` with a chance of at most ``2 exp(-t^2 / 2)`` (Hoeffding 1963).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hansa.core.chain import Limits, Raw, Transform
from hansa.core.errors import CheckError
from hansa.core.key import Key, words
from hansa.core.protocols import Array, Codec, Draws, Memory, Settings, State, Updates

Rows = npt.NDArray[np.float64]
_TAIL = 6.0  # standard deviations, beyond which a coordinate is cut off: a chance of 2 exp(-18), below 4e-8
_ROUNDING = 1e-6  # more than the results may be off by in float32, relative to a row's norm
_LEAST = 2.0**-149  # and of each coordinate, where that norm is next to nothing
_PIECE = 2**20  # values at a time


@dataclass(frozen=True, kw_only=True)
class Rotate(Transform):
    """Turn each update by a random rotation that all clients of a round share; the server turns the sum back.

    Norms stay as they are. Where the chain before it bounds the norm, coordinates are held to six times
    ``norm / sqrt(size)``: a chance below 4e-8 for each, and it only shortens a row. What the server turns back is off
    by float32's rounding. Whole rows are in memory, in float64, also long ones.

    >>> from hansa.core.key import Key
    >>> block = Updates(("a",), np.array([[4.0, 0.0, 0.0, 0.0]], np.float32), np.ones(1))
    >>> sent, _ = Rotate().encode(block, None, None, Draws(Key.of(0), [], []))
    >>> abs(sent.values).tolist(), abs(Rotate().decode(sent.values, None, Key.of(0))).round(6).tolist()
    ([[2.0, 2.0, 2.0, 2.0]], [[4.0, 0.0, 0.0, 0.0]])
    """

    shows_nonfinite = True

    def init(self, num_params: int) -> State:
        """The length of an update, for the bounds."""
        return num_params

    def settings(self, state: State) -> Settings:
        """The length of an update."""
        return state

    def norm_bound(self, incoming: float, settings: Settings) -> float:
        """A rotation keeps lengths, up to rounding."""
        return incoming * (1 + _ROUNDING) + math.sqrt(settings) * _LEAST

    def limits(self, incoming: Limits, settings: Settings) -> Limits:
        """No coordinate is larger than its share of the norm allows."""
        norm = self.norm_bound(incoming.norm, settings)
        return Limits(norm, min(norm, _most(incoming.norm, settings) * (1 + _ROUNDING)))

    def encode(
        self, updates: Updates, settings: Settings, memory: Memory, draws: Draws
    ) -> tuple[Updates, Mapping[str, Array]]:
        """Turned rows."""
        values = np.asarray(updates.values)
        size = values.shape[1]
        if settings not in (None, size):
            raise CheckError([f"Rotate: expected rows of {settings:,} numbers, found {size:,}; put it first."])
        most = _most(draws.norm_bound, size)
        out = np.empty(values.shape, np.float32)
        for first, stop in _spans(*values.shape):
            turned = _turned(values[first:stop].astype(np.float64), _signs(draws.shared, size))
            out[first:stop] = turned if math.isinf(most) else np.clip(turned, -most, most)
        return updates._replace(values=out), {}

    def decode(self, values: Array, settings: Settings, shared: Key) -> Array:
        """Rows turned back."""
        rows = np.asarray(values)
        out = np.empty(rows.shape, np.float64)
        for first, stop in _spans(*rows.shape):
            out[first:stop] = _turned_back(rows[first:stop].astype(np.float64), _signs(shared, rows.shape[1]))
        return out

    def codec(self, inner: Codec) -> Codec:
        """Turned values leave every grid."""
        return Raw()


def _size(length: int) -> int:
    """The largest power of two in it."""
    return 1 << (length.bit_length() - 1)


def _most(norm: float, length: int) -> float:
    """The largest value of a turned row of that norm."""
    return _TAIL * norm / math.sqrt(_size(length))


def _spans(num_rows: int, length: int) -> list[tuple[int, int]]:
    """Some rows at a time."""
    width = max(1, _PIECE // max(length, 1))
    return [(first, min(first + width, num_rows)) for first in range(0, num_rows, width)]


def _signs(shared: Key, length: int) -> tuple[Rows, Rows]:
    """Signs over sqrt(size), for the first coordinates and for the last."""
    size = _size(length)
    drawn = np.unpackbits(words([shared], -(-size // 16))[0].astype("<u4").view(np.uint8))[: 2 * size]
    signs = (drawn.astype(np.float64) * 2 - 1) / math.sqrt(size)
    return signs[:size], signs[size:]


def _turned(rows: Rows, signs: tuple[Rows, Rows]) -> Rows:
    """Rows (num_rows, length), in place: the first ``size`` values turned and then, if there are more, the last."""
    size = len(signs[0])
    rows[:, :size] = _transformed(rows[:, :size] * signs[0])
    if rows.shape[1] > size:
        rows[:, -size:] = _transformed(rows[:, -size:] * signs[1])
    return rows


def _turned_back(rows: Rows, signs: tuple[Rows, Rows]) -> Rows:
    """What ``_turned`` made such rows of."""
    size = len(signs[0])
    if rows.shape[1] > size:
        rows[:, -size:] = _transformed(rows[:, -size:]) * signs[1]
    rows[:, :size] = _transformed(rows[:, :size]) * signs[0]
    return rows


def _transformed(rows: Rows) -> Rows:
    """Walsh and Hadamard's transform of rows (num_rows, a power of two), without its 1 / sqrt(size).

    Each pass adds and subtracts the two halves and lays the results side by side: after as many passes as the size has
    binary digits, all are where they began.
    """
    half = rows.shape[1] // 2
    other = np.empty_like(rows)
    for _ in range(half.bit_length()):
        np.add(rows[:, :half], rows[:, half:], out=other[:, 0::2])
        np.subtract(rows[:, :half], rows[:, half:], out=other[:, 1::2])
        rows, other = other, rows
    return rows


__all__ = ["Rotate"]
