"""Stochastic uniform quantisation: each coordinate in a few bits, unbiased.

    q = floor(u / step + r),   r uniform in [0, 1),   step = max|u| / (2^(bits-1) - 1)

Alistarh, Grubic, Li, Tomioka and Vojnovic, "QSGD: communication-efficient SGD via gradient quantization and encoding",
NeurIPS 2017, section 3.1. Differences: the scale is the row's largest value instead of its norm, and levels are packed
at a fixed width instead of by Elias coding. The variance added to a row is at most num_params * step^2 / 4.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from hansa.core.chain import Transform
from hansa.core.errors import InputError
from hansa.core.key import uniform
from hansa.core.protocols import Array, Codec, Draws, Memory, Settings, State, Updates
from hansa.long_vectors import Later, is_long

_SIDE = "quantize_step"


@dataclass(frozen=True, kw_only=True)
class Quantize(Transform):
    """Round each update to ``2**bits - 1`` levels between minus and plus its largest value, 2 to 16 bits.

    | row | result |
    |---|---|
    | zero | zero |
    | one value | that value exactly |
    | subnormal largest value | zero (its step is not a number float32 can divide by) |

    >>> Quantize(bits=8).levels, round(Quantize(bits=8).norm_bound(1.0, 100), 3)
    (127, 1.079)
    """

    bits: int = 8

    def __post_init__(self) -> None:
        if not (isinstance(self.bits, int) and 2 <= self.bits <= 16):
            raise InputError(f"Quantize(bits=): expected a whole number from 2 to 16, found {self.bits!r}")

    @property
    def levels(self) -> int:
        """Levels on either side of zero."""
        return int(2 ** (self.bits - 1) - 1)

    def init(self, num_params: int) -> State:
        """The length of an update, for the norm bound."""
        return num_params

    def settings(self, state: State) -> Settings:
        """The length of an update."""
        return state

    def norm_bound(self, incoming: float, settings: Settings) -> float:
        """A coordinate moves by less than one step, and a step is at most the row's norm over the levels."""
        return incoming * (1 + math.sqrt(settings) / self.levels) * (1 + 1e-5)

    def encode(
        self, updates: Updates, settings: Settings, memory: Memory, draws: Draws
    ) -> tuple[Updates, Mapping[str, Array]]:
        """Rows on their own grids; each row's step travels beside it."""
        values = np.asarray(updates.values, dtype=np.float32)
        step = (np.abs(values).max(axis=1, initial=0.0) / np.float32(self.levels)).astype(np.float32)
        step[step < np.finfo(np.float32).tiny] = 0.0
        safe = np.where(step > 0, step, np.float32(1.0)).astype(np.float32)[:, None]
        level = np.floor(values / safe + uniform(draws.rows, values.shape[1]))
        level = np.where(step[:, None] > 0, np.clip(level, -self.levels, self.levels), 0)
        return updates._replace(values=level.astype(np.float32) * step[:, None], side={**updates.side, _SIDE: step}), {}

    def codec(self, inner: Codec) -> Codec:
        """Levels at a fixed width."""
        return Levels(bits=self.bits)


@dataclass(frozen=True, kw_only=True)
class Levels:
    """Packs values on a row's grid as whole numbers of ``bits`` bits."""

    bits: int

    def pack(self, updates: Updates) -> Mapping[str, Array]:
        """Levels as bytes (num_rows, ceil(num_params * bits / 8)), and each row's step."""
        step = np.asarray(updates.side[_SIDE], dtype=np.float32)
        safe = np.where(step > 0, step, np.float32(1.0))[:, None]
        offset = 2 ** (self.bits - 1) - 1
        level = (np.rint(updates.values / safe).astype(np.int32) + offset).astype(np.uint16)
        return {"levels": _to_bits(level, self.bits), "step": step}

    def unpack(self, arrays: Mapping[str, Array], num_params: int) -> tuple[Array, Mapping[str, Array]]:
        """The values, bit for bit, and the steps. ``ValueError`` when the sizes do not fit.

        Long rows stay packed: their columns are made when they are asked for.
        """
        step, stream = np.asarray(arrays["step"], dtype=np.float32), np.asarray(arrays["levels"])
        size = -(-num_params * self.bits // 8)
        if stream.dtype != np.uint8 or stream.shape != (len(step), size):
            raise ValueError(f"expected {size} bytes a row of levels, found {stream.dtype} {stream.shape}")

        def columns(first: int, stop: int) -> np.ndarray:
            level = _from_bits(stream, self.bits, first, stop).astype(np.int32)
            level -= 2 ** (self.bits - 1) - 1
            return level.astype(np.float32) * step[:, None]

        is_later = is_long(num_params)
        values = Later((len(step), num_params), columns, np.float32, [stream]) if is_later else columns(0, num_params)
        return values, {_SIDE: step}

    def row_bytes(self, num_params: int) -> int:
        """The levels of a row, and its step."""
        return -(-num_params * self.bits // 8) + 4


def _to_bits(level: np.ndarray, bits: int) -> np.ndarray:
    """Whole numbers (num_rows, n) as a bit stream a row."""
    if bits == 8:
        return level.astype(np.uint8)
    if bits == 16:
        return level.astype("<u2").view(np.uint8).reshape(len(level), -1)
    places = np.arange(bits, dtype=np.uint16)
    spread = ((level[..., None] >> places) & 1).astype(np.uint8)
    return np.packbits(spread.reshape(len(level), -1), axis=1, bitorder="little")


def _from_bits(stream: np.ndarray, bits: int, first: int, stop: int) -> np.ndarray:
    """The whole numbers from ``first`` up to ``stop`` of a bit stream a row."""
    if bits == 8:
        return stream[:, first:stop]
    if bits == 16:
        return np.ascontiguousarray(stream[:, 2 * first : 2 * stop]).view("<u2")
    start = first * bits // 8
    spread = np.unpackbits(stream[:, start : -(-stop * bits // 8)], axis=1, bitorder="little")
    spread = spread[:, first * bits - 8 * start :][:, : (stop - first) * bits]
    weights = (1 << np.arange(bits, dtype=np.uint32)).astype(np.uint32)
    found: np.ndarray = (spread.reshape(len(stream), stop - first, bits).astype(np.uint32) * weights).sum(axis=2)
    return found
