"""Clipping: no client's update is longer than a norm.

    u <- u * min(1, norm / ||u||)          over all released coordinates jointly

Abadi, Chu, Goodfellow, McMahan, Mironov, Talwar and Zhang, "Deep learning with differential privacy", CCS 2016,
section 3.1, applied to a client's whole update as in McMahan, Ramage, Talwar and Zhang, "Learning differentially
private recurrent language models", ICLR 2018, section 3 (flat clipping).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from hansa.core.chain import Raw, Transform
from hansa.core.errors import InputError
from hansa.core.protocols import Array, Codec, Draws, Memory, Settings, Updates

_MARGIN = 3e-6  # below the norm: more than norms and products may be off by
_PIECE = 1024
_SMALLEST, _LARGEST = 1e-24, 1e34  # sums of squares that float32 is good for
_TINY = 1e-30  # scales that a row's own type may not hold
_LONG = 2**12


@dataclass(frozen=True, kw_only=True)
class Clip(Transform):
    """Scale each client's update down to L2 norm ``norm``; shorter ones stay bit for bit as they are.

    | input | output |
    |---|---|
    | norm at most ``norm`` | unchanged |
    | zero | zero |
    | so long that its square overflows | scaled in float64, still at most ``norm`` |
    | NaN or infinity | refused before it reaches the chain |

    >>> block = Updates(("a",), np.array([[3.0, 4.0]], np.float32), np.ones(1))
    >>> Clip(norm=1.0).encode(block, None, None, None)[0].values.round(4)
    array([[0.6, 0.8]], dtype=float32)
    """

    norm: float

    shows_nonfinite = True

    def __post_init__(self) -> None:
        if not (math.isfinite(self.norm) and self.norm > 0):
            raise InputError(f"Clip(norm=): expected a positive number, found {self.norm}")

    def norm_bound(self, incoming: float, settings: Settings) -> float:
        """At most ``norm``."""
        return min(incoming, self.norm)

    def encode(
        self, updates: Updates, settings: Settings, memory: Memory, draws: Draws
    ) -> tuple[Updates, Mapping[str, Array]]:
        """Rows of norm at most ``norm``: the scale is rounded down, so that float32 cannot exceed it."""
        values = clipped(updates.values, row_norms(updates.values), self.norm)
        return (updates, {}) if values is updates.values else (updates._replace(values=values), {})

    def codec(self, inner: Codec) -> Codec:
        """Scaled values leave every grid."""
        return Raw()


def clipped(values: Array, norms: np.ndarray, norm: float) -> Array:
    """Rows of norm ``norm`` at most, whose norms were ``norms``: in place where that may be, longer ones alone."""
    near = np.flatnonzero(np.abs(norms - norm) <= 4 * _MARGIN * norm)
    if len(near):  # whether they are longer is for exact norms to say
        norms = norms.copy()
        norms[near] = [_exact_norm(values[i]) for i in near]
    scale = np.where(norms > norm, norm / np.maximum(norms, 1e-300) * (1 - _MARGIN), 1.0)
    longer = np.flatnonzero(scale != 1.0)
    if not len(longer):
        return values
    if not isinstance(values, np.ndarray):
        return scale_rows(values, scale)
    values = values if values.flags.writeable else values.copy()
    tiny = scale < _TINY
    if values.shape[1] < _LONG and not tiny.any():  # a call for all rows costs less than one for each
        values *= scale.astype(values.dtype)[:, None]
        return values
    for i in longer:
        if tiny[i]:
            values[i] = values[i] * scale[i]
        else:
            values[i] *= values.dtype.type(scale[i])
    return values


def row_norms(values: Array) -> np.ndarray:
    """L2 norm of each row: (num_clients,) float64, within a relative 2e-6.

    Squares are added in the rows' own type, a thousand at a time, and in float64 where they could overflow or vanish.
    """
    if isinstance(values, np.ndarray):
        whole = values.shape[1] // _PIECE * _PIECE
        pieces, rest = values[:, :whole].reshape(len(values), -1, _PIECE), values[:, whole:]
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            squares = np.vecdot(pieces, pieces).sum(axis=1, dtype=np.float64) + np.vecdot(rest, rest)
        for i in np.flatnonzero(~((squares > _SMALLEST) & (squares < _LARGEST))):
            squares[i] = _exact_norm(values[i]) ** 2
        norms: np.ndarray = np.sqrt(squares)
        return norms
    import array_api_compat

    xp = array_api_compat.array_namespace(values)
    wide = xp.astype(values, xp.float64)
    found: list[float] = xp.sqrt(xp.sum(wide * wide, axis=1)).tolist()
    return np.array(found)


def _exact_norm(row: Array) -> float:
    """The L2 norm of one row, in float64."""
    if not isinstance(row, np.ndarray):
        return float(row_norms(row[None])[0])
    wide = row.astype(np.float64)
    return float(np.sqrt(np.vecdot(wide, wide)))


def scale_rows(values: Array, scale: np.ndarray) -> Array:
    """Each row times its number, in the rows' own type and namespace; rows of scale 1 keep their bits."""
    if isinstance(values, np.ndarray):
        return (values * scale[:, None]).astype(values.dtype, copy=False)
    import array_api_compat

    xp = array_api_compat.array_namespace(values)
    factor = xp.asarray(scale, dtype=xp.float64, device=array_api_compat.device(values))
    return xp.astype(xp.astype(values, xp.float64) * factor[:, None], values.dtype)
