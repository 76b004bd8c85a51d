"""Noise that protects: from a cryptographic stream, on a grid on which no value gives away the one below it.

Numbers of a stream of AES-256 in counter mode, whose key is the attempt's secret, become normal ones by Marsaglia's
polar method (53 bits each). Floating-point addition leaves traces of both addends in the last bits of a sum
(Mironov, "On significance of the least significant bits for differential privacy", CCS 2012; for Gaussian noise Jin,
McMurtry, Rubinstein and Ohrimenko, "Are we there yet? Timing and floating-point attacks on differential privacy
systems", S&P 2022). Here the value is rounded to a grid before the noise is added, and the sum after it, so that every
result is a whole number of steps and all of them can come from every value. The grid is ``2**-31`` to ``2**-30`` of the
noise's standard deviation: rounding moves a value by at most half a step in each coordinate, which for 1e8 coordinates
is below 1e-5 of the standard deviation; ``deviation_of`` adds it to the sensitivity.
What is published is the rounded Gaussian, a function of the exact one. Normal numbers beyond 12 standard deviations do
not occur, which changes delta by less than 1e-32 a coordinate.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext, algorithms, modes

from hansa.core.errors import InputError
from hansa.core.key import Key

_STEPS = 30  # binary digits of a standard deviation
PIECE = 2**16  # normal numbers at a time: what stays in a processor's cache


def secure_normal(secret: Key, count: int) -> npt.NDArray[np.float64]:
    """Standard normal numbers (count,) of a secret; equal secrets give equal numbers.

    >>> numbers = secure_normal(Key.of(0), 100_000)
    >>> bool(abs(numbers.mean()) < 0.02), bool(abs(numbers.std() - 1) < 0.01)
    (True, True)
    """
    out = np.empty(count + count % 2)
    in_pieces(len(out), lambda first, stop: _fill_with_normal(out[first:stop], stream(secret, first // PIECE)))
    return out[:count]


def _fill_with_normal(out: npt.NDArray[np.float64], cipher: CipherContext) -> None:
    """Marsaglia's polar method: points of the square that fall into the unit circle, until there are enough."""
    filled = 0
    while filled < len(out):
        missing = (len(out) - filled) // 2
        num_points = math.ceil(missing * 4 / math.pi + 4 * math.sqrt(missing)) + 8  # too few once in many thousands
        signed = words(cipher, 2 * num_points).view(np.int64) >> np.int64(11)
        unit = signed.astype(np.float64) * 2.0**-52  # from -1 up to 1
        x, y = unit[:num_points], unit[num_points:]
        square = x * x + y * y
        good = np.flatnonzero((square < 1) & (square > 0))[:missing]
        square = square[good]
        factor = np.sqrt(-2.0 * np.log(square) / square)
        np.multiply(x[good], factor, out=out[filled : filled + len(good)])
        np.multiply(y[good], factor, out=out[filled + len(good) : filled + 2 * len(good)])
        filled += 2 * len(good)


def in_pieces(count: int, work: Callable[[int, int], None]) -> None:
    """``work(first, stop)`` on all of ``count`` numbers, piece by piece, on every core.

    Pieces are the same wherever they are worked on, so that the number of cores does not change a bit.
    """
    pieces = [(first, min(first + PIECE, count)) for first in range(0, count, PIECE)]
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


def secure_uniform(secret: Key, count: int) -> npt.NDArray[np.float64]:
    """Numbers in [0, 1) of a secret: (count,), 53 bits each.

    >>> bool(0.49 < secure_uniform(Key.of(0), 100_000).mean() < 0.51)
    True
    """
    found: npt.NDArray[np.float64] = (words(stream(secret), count) >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return found


def secure_laplace(secret: Key, count: int) -> npt.NDArray[np.float64]:
    """Laplace numbers (count,) of scale 1 on the grid of step ``2**-30``: the discrete Laplace distribution.

    Each is the difference of two geometric numbers of steps, whose binary digits are independent coins: digit ``k`` is
    1 with probability ``1 / (1 + exp(2**(k - 30)))``. No logarithm is taken, so that no value is out of reach for want
    of digits. A digit's probability is rounded to 64 bits, and none is drawn beyond 128 scales: together less than
    1e-17 a coordinate.

    >>> numbers = secure_laplace(Key.of(0), 100_000)
    >>> bool(abs(numbers.mean()) < 0.02), bool(abs(abs(numbers).mean() - 1) < 0.02)
    (True, True)
    """
    cipher = stream(secret)
    chances = [1 / (1 + math.exp(2.0 ** (digit - _STEPS))) for digit in range(_STEPS + 6)]
    out = np.zeros(count)
    for start in range(0, count, PIECE):
        here = out[start : start + PIECE]
        for sign in (1.0, -1.0):
            steps = np.zeros(len(here), np.int64)
            for digit, chance in enumerate(chances):
                ones = words(cipher, len(here)) < np.uint64(math.floor(math.ldexp(chance, 64)))
                steps += ones.astype(np.int64) << digit
            here += sign * steps
    out *= 2.0**-_STEPS
    return out


def laplaced(values: npt.NDArray[np.float64], noise: npt.NDArray[np.float64], scale: float) -> npt.NDArray[np.float64]:
    """``values + scale * noise`` on a grid of ``noise``'s own steps, of which the values become whole numbers.

    >>> bool((laplaced(np.zeros(3), np.ones(3), 0.5) == 0.5).all())
    True
    """
    step = scale * 2.0**-_STEPS
    return np.asarray((np.rint(np.asarray(values, np.float64) / step) + noise * 2.0**_STEPS) * step)


def scale_of(noise_multiplier: float, norm: float, size: int) -> float:
    """The scale of Laplace noise for vectors (size,) of L1 norm up to ``norm``, whose rounding it covers too.

    Rounding to a grid of step ``2**-30`` of the scale moves each of two vectors by half a step in each coordinate.
    Raises ``InputError`` where the grid is too coarse for so long a vector and so much noise.

    >>> scale_of(2.0, 0.5, 0), 1.0 < scale_of(2.0, 0.5, 10**6) < 1.001
    (1.0, True)
    """
    left = 1.0 - noise_multiplier * size * 2.0 ** -(_STEPS + 1)
    if left <= 0.5:
        raise InputError(
            f"Laplace noise: expected noise_multiplier * parameters below {2**_STEPS:,}, found {noise_multiplier:g} * "
            f"{size:,}; use LocalGaussianNoise for vectors this long"
        )
    return noise_multiplier * norm / left


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
        here += np.rint(np.asarray(values[first:stop], np.float64) * (1.0 / step))  # exact: a power of two
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


def stream(secret: Key, piece: int = 0) -> CipherContext:
    """AES-256 in counter mode; pieces are ``2**64`` blocks apart, so that none meets another's numbers."""
    return Cipher(algorithms.AES(secret.material), modes.CTR((piece << 64).to_bytes(16, "big"))).encryptor()


def words(cipher: CipherContext, count: int) -> npt.NDArray[np.uint64]:
    """The stream's next words of 64 bits."""
    return np.frombuffer(cipher.update(bytes(8 * count)), "<u8")


__all__ = [
    "PIECE",
    "deviation_of",
    "grid",
    "in_pieces",
    "laplaced",
    "noised",
    "scale_of",
    "secure_laplace",
    "secure_normal",
    "secure_uniform",
    "stream",
    "words",
]
