"""Gaussian noise that protects: from a cryptographic stream, on a grid on which no value gives away the one below it.

Numbers of a stream of AES-256 in counter mode, whose key is the attempt's secret, become normal ones by Box and
Muller's method (53 bits each). Floating-point addition leaves traces of both addends in the last bits of a sum
(Mironov, "On significance of the least significant bits for differential privacy", CCS 2012; for Gaussian noise Jin,
McMurtry, Rubinstein and Ohrimenko, "Are we there yet? Timing and floating-point attacks on differential privacy
systems", S&P 2022). Here the value is rounded to a grid before the noise is added, and the sum after it, so that every
result is a whole number of steps and all of them can come from every value. The grid is ``2**-31`` to ``2**-30`` of the
noise's standard deviation: rounding moves a value by at most half a step in each coordinate, which for 1e8 coordinates
is below 1e-5 of the standard deviation; ``deviation_of`` adds it to the sensitivity.
What is published is the rounded Gaussian, a function of the exact one. Normal numbers beyond 8.6 standard deviations do
not occur, which changes delta by less than 2e-17 a coordinate.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from hansa.core.key import Key

_STEPS = 30  # binary digits of a standard deviation
_PIECE = 2**17  # normal numbers at a time: what stays in a processor's cache


def secure_normal(secret: Key, count: int) -> npt.NDArray[np.float64]:
    """Standard normal numbers (count,) of a secret; equal secrets give equal numbers.

    >>> numbers = secure_normal(Key.of(0), 100_000)
    >>> bool(abs(numbers.mean()) < 0.02), bool(abs(numbers.std() - 1) < 0.01)
    (True, True)
    """
    out = np.empty(count + count % 2)

    def draw(first: int, stop: int) -> None:
        here = out[first:stop]
        block = (first // 2).to_bytes(16, "big")  # a block of the cipher is two words
        cipher = Cipher(algorithms.AES(secret.material), modes.CTR(block)).encryptor()
        raw = np.frombuffer(cipher.update(bytes(8 * len(here))), "<u8")
        unit = (raw >> np.uint64(11)).astype(np.float64) * 2.0**-53
        half = len(here) // 2
        radius, angle = np.sqrt(-2.0 * np.log1p(-unit[:half])), 2.0 * np.pi * unit[half:]
        np.multiply(radius, np.cos(angle), out=here[:half])
        np.multiply(radius, np.sin(angle), out=here[half:])

    in_pieces(len(out), draw)
    return out[:count]


def in_pieces(count: int, work: Callable[[int, int], None]) -> None:
    """``work(first, stop)`` on all of ``count`` numbers, piece by piece, on every core.

    Pieces are the same wherever they are worked on, so that the number of cores does not change a bit.
    """
    pieces = [(first, min(first + _PIECE, count)) for first in range(0, count, _PIECE)]
    num_threads = min(len(pieces) // 4, _num_cores())
    if num_threads < 2:
        for piece in pieces:
            work(*piece)
        return
    with ThreadPoolExecutor(num_threads) as pool:
        for _ in pool.map(lambda piece: work(*piece), pieces):
            pass


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def noised(
    values: npt.NDArray[np.float64], noise: npt.NDArray[np.float64], deviation: float
) -> npt.NDArray[np.float64]:
    """``values + deviation * noise`` on the grid of ``deviation``; ``noise`` (len(values),) is used up.

    >>> step = grid(1.0)
    >>> found = noised(np.array([0.1, 1 / 3]), secure_normal(Key.of(0), 2), 1.0) / step
    >>> bool((found == np.rint(found)).all())
    True
    """
    step = grid(deviation)

    def add(first: int, stop: int) -> None:
        here = noise[first:stop]
        here *= deviation / step
        here += np.rint(np.asarray(values[first:stop], np.float64) / step)
        np.rint(here, out=here)
        here *= step

    in_pieces(len(noise), add)
    return noise


def grid(deviation: float) -> float:
    """The step of the grid for a standard deviation: a power of two, so that multiples of it are exact."""
    return float(2.0 ** (math.floor(math.log2(deviation)) - _STEPS))


def deviation_of(noise_multiplier: float, sensitivity: float, size: int) -> float:
    """The standard deviation of noise on ``size`` coordinates, for vectors that the grid may move further apart.

    Two vectors are ``sensitivity`` apart, and up to ``grid * sqrt(size)`` more once both are rounded; the grid's step
    is at most ``2**-30`` of the deviation.

    >>> deviation_of(2.0, 0.5, 0), 1.0 < deviation_of(2.0, 0.5, 10**8) < 1.00002
    (1.0, True)
    """
    return noise_multiplier * sensitivity / (1.0 - noise_multiplier * math.sqrt(size) * 2.0**-_STEPS)


__all__ = ["deviation_of", "grid", "in_pieces", "noised", "secure_normal"]
