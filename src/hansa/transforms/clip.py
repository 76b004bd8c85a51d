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
    """Rows of norm ``norm`` at most, whose norms were ``norms``; the same array where none was longer."""
    scale = np.where(norms > norm, norm / np.maximum(norms, 1e-300) * (1 - 1e-6), 1.0)
    return values if (scale == 1.0).all() else scale_rows(values, scale)


def row_norms(values: Array) -> np.ndarray:
    """L2 norm of each row, in float64: (num_clients,)."""
    if isinstance(values, np.ndarray):
        squares: np.ndarray = np.einsum("np,np->n", values, values, dtype=np.float64, casting="safe")
        norms: np.ndarray = np.sqrt(squares)
        return norms
    import array_api_compat

    xp = array_api_compat.array_namespace(values)
    wide = xp.astype(values, xp.float64)
    found: list[float] = xp.sqrt(xp.sum(wide * wide, axis=1)).tolist()
    return np.array(found)


def scale_rows(values: Array, scale: np.ndarray) -> Array:
    """Each row times its number, in the rows' own type and namespace; rows of scale 1 keep their bits."""
    if isinstance(values, np.ndarray):
        return (values * scale[:, None]).astype(values.dtype, copy=False)
    import array_api_compat

    xp = array_api_compat.array_namespace(values)
    factor = xp.asarray(scale, dtype=xp.float64, device=array_api_compat.device(values))
    return xp.astype(xp.astype(values, xp.float64) * factor[:, None], values.dtype)
