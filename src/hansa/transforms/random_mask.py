"""Random masks: some coordinates of an update at random, the same ones for all clients of a round.

    sent = (size / k) * u[S],     S = k of the coordinates, drawn anew each round

Konečný, McMahan, Yu, Richtárik, Suresh and Bacon, "Federated learning: strategies for improving communication
efficiency", 2016, section 3 (random masks, as sketched updates: right on average). Difference: there each client draws
a mask of its own; one that all share keeps the map linear, so that sums under masks of secure aggregation are of k
numbers too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from hansa.core.chain import Limits, Raw, Transform
from hansa.core.errors import CheckError, InputError
from hansa.core.key import Key, words
from hansa.core.protocols import Array, Codec, Draws, Memory, Settings, State, Updates

_ROUNDING = 1e-6  # more than a product may be off by in float32
_LEAST = 2.0**-149


@dataclass(frozen=True, kw_only=True)
class RandomMask(Transform):
    """Send ``fraction`` of the coordinates, at least one, that all clients of a round share: 0 < fraction <= 1.

    What is sent is longer by 1 / ``fraction``, so that the mean over rounds is right; so is its bound. A row of k
    numbers leaves the client, also under secure aggregation. ``Rotate()`` before it makes all coordinates alike, so
    that any of them will do. ``CheckError`` for a row that was shortened before.

    >>> from hansa.core.key import Key
    >>> block = Updates(("a",), np.array([[1.0, 2.0, 3.0, 4.0]], np.float32), np.ones(1))
    >>> mask, draws = RandomMask(fraction=0.5), Draws(Key.of(0), [], [])
    >>> sent = mask.encode(block, 4, None, draws)[0].values
    >>> sent.tolist(), mask.decode(sent, 4, Key.of(0)).tolist()
    ([[4.0, 8.0]], [[0.0, 4.0, 0.0, 8.0]])
    """

    fraction: float

    shows_nonfinite = False

    def __post_init__(self) -> None:
        if not 0 < self.fraction <= 1:
            raise InputError(f"RandomMask(fraction=): expected 0 < fraction <= 1, found {self.fraction}")

    def init(self, num_params: int) -> State:
        """The length of an update."""
        return num_params

    def settings(self, state: State) -> Settings:
        """The length of an update."""
        return state

    def encoded_size(self, size: int) -> int:
        """Coordinates sent of ``size``."""
        return min(size, max(1, math.ceil(self.fraction * size)))

    def norm_bound(self, incoming: float, settings: Settings) -> float:
        """All of a row's norm may lie in the coordinates that are sent."""
        size: int = settings
        grown = size / self.encoded_size(size) * (1 + _ROUNDING)
        return incoming * grown + math.sqrt(size) * _LEAST

    def limits(self, incoming: Limits, settings: Settings) -> Limits:
        """No grid is kept."""
        norm = self.norm_bound(incoming.norm, settings)
        return Limits(norm, min(norm, self.norm_bound(incoming.value, settings)))

    def encode(
        self, updates: Updates, settings: Settings, memory: Memory, draws: Draws
    ) -> tuple[Updates, Mapping[str, Array]]:
        """Shorter rows (num_clients, k)."""
        values = np.asarray(updates.values)
        size = values.shape[1]
        if size != settings:
            raise CheckError([f"RandomMask: expected rows of {settings:,} numbers, found {size:,}; use one of them."])
        chosen = _chosen(draws.shared, size, self.encoded_size(size))
        return updates._replace(values=values[:, chosen] * np.float32(size / len(chosen))), {}

    def decode(self, values: Array, settings: Settings, shared: Key) -> Array:
        """Rows of the update's own length, zero where nothing was sent."""
        rows = np.asarray(values)
        out = np.zeros((len(rows), settings), rows.dtype)
        out[:, _chosen(shared, settings, rows.shape[1])] = rows
        return out

    def codec(self, inner: Codec) -> Codec:
        """Chosen values are packed as they are."""
        return Raw()


@lru_cache(maxsize=4)
def _chosen(shared: Key, size: int, count: int) -> npt.NDArray[np.intp]:
    """Places (count,) of ``size``, rising: those of the least of ``size`` random words."""
    found = np.sort(np.argsort(words([shared], size)[0], kind="stable")[:count])
    found.flags.writeable = False
    return found


__all__ = ["RandomMask"]
