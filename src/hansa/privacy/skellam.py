"""Skellam noise: whole numbers that many clients can draw shares of, what they cost, and a sampler without error.

    Sk(v) = A - B,   A and B of Poisson's law with mean v / 2 each;   Sk(v) + Sk(w) = Sk(v + w)

Agarwal, Kairouz and Liu, "The Skellam mechanism for differentially private federated learning", NeurIPS 2021: whole
vectors that are D2 apart in L2 and D1 in L1, with noise Sk(v) on every coordinate, have Renyi divergence of order
a = 2, 3, ... at most (theorem 3.5 and corollary 3.6)

    a D2^2 / (2 v) + min(((2 a - 1) D2^2 + 6 D1) / (4 v^2), 3 D1 / (2 v)).

Whole vectors have D1 <= D2^2, which is what is counted here: no bound on D1 is needed, nor their length.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.ciphers import CipherContext

from hansa.core.key import Key
from hansa.privacy.noise import PIECE, in_pieces, stream, words

_LOG_TAIL = 74.0  # larger noise is drawn with probability 2 * exp(-74), below 2e-32 a number: it is left out
_FIRST, _MORE = 63, 64  # bits of a random number that are looked at first, and those that are where they do not tell


def renyi_divergence(order: int, noise_multiplier: float, norm_steps: float) -> float:
    """Of two sums that one client's rows make different, up to ``norm_steps`` steps of the grid in L2.

    ``noise_multiplier`` is the noise's standard deviation over that norm. It falls as ``norm_steps`` rises, so that a
    lower bound on it will do. For fine grids it is that of Gaussian noise, ``order / (2 noise_multiplier^2)``.

    >>> renyi_divergence(2, 1.0, 1.0), round(renyi_divergence(2, 1.0, 1000.0), 5)
    (2.5, 1.0)
    """
    square = norm_steps**2
    variance = noise_multiplier**2 * square
    rest = min(((2 * order - 1) * square + 6 * square) / (4 * variance**2), 3 * square / (2 * variance))
    return order * square / (2 * variance) + rest


def largest(variance: float) -> int:
    """The largest magnitude that ``secure_skellam`` gives: by Bernstein's inequality larger noise has hardly a chance.

    >>> largest(0.0), largest(1.0), largest(1e6)
    (50, 53, 12191)
    """
    third = _LOG_TAIL / 3
    return math.ceil(third + math.sqrt(third**2 + 2 * _LOG_TAIL * variance))


def secure_skellam(secret: Key, count: int, variance: float) -> npt.NDArray[np.float64]:
    """Whole numbers (count,) of Skellam's law with this variance, from a secret; equal secrets give equal numbers.

    A number's magnitude is found in the table of the law's distribution function, in 127 bits: each number's law is
    within 2e-32 of Skellam's in total variation, which is added to delta as often as one is drawn, and is too little to
    be seen in it.

    >>> numbers = secure_skellam(Key.of(0), 100_000, 4.0)
    >>> bool(abs(numbers.mean()) < 0.05), bool(abs(numbers.var() - 4) < 0.1), set(numbers % 1)
    (True, True, {np.float64(0.0)})
    """
    first_bits, whole = _table(variance)
    out = np.empty(count)

    def draw(first: int, stop: int) -> None:
        cipher = stream(secret, first // PIECE)
        drawn = words(cipher, stop - first)
        found = _magnitudes(drawn >> np.uint64(1), first_bits, whole, cipher).astype(np.float64)
        np.negative(found, out=found, where=(drawn & np.uint64(1)).astype(bool))
        out[first:stop] = found

    in_pieces(count, draw)
    return out


def _magnitudes(
    drawn: npt.NDArray[np.uint64], first_bits: npt.NDArray[np.uint64], whole: tuple[int, ...], cipher: CipherContext
) -> npt.NDArray[np.intp]:
    """How many boundaries each number reaches; where its first bits are those of one, more bits are drawn to tell."""
    found = np.searchsorted(first_bits, drawn, side="right")
    below = np.flatnonzero(first_bits[np.maximum(found - 1, 0)] == drawn)
    for i in below:  # once in about 1e14 numbers
        found[i] = bisect_right(whole, (int(drawn[i]) << _MORE) | int(words(cipher, 1)[0]))
    return found


@lru_cache(maxsize=8)
def _table(variance: float) -> tuple[npt.NDArray[np.uint64], tuple[int, ...]]:
    """Boundaries between magnitudes 0, 1, ..., ``largest(variance)``: their first 63 bits, and all 127."""
    weights = list(_weights(variance))
    weights.reverse()
    total = weights[0] + 2 * sum(weights[1:])
    reached, boundaries = weights[0], []
    for weight in weights[1 : largest(variance) + 1]:
        boundaries.append((reached << (_FIRST + _MORE)) // total)
        reached += 2 * weight
    return np.array([whole >> _MORE for whole in boundaries], np.uint64), tuple(boundaries)


def _weights(variance: float) -> Iterator[int]:
    """Whole numbers in proportion to the chances of ..., 2, 1 and 0, from far in the tail.

    They are values of the Bessel function ``I_k(variance)``, by Miller's method: ``I_(k-1) = I_(k+1) + 2 k I_k /
    variance``, from any two values far out, whose error dies away: to 2^-127 of the value at ``largest(variance)``. All
    terms are positive, and of 128 bits at least.
    """
    above, here = 0, 1 << 128
    numerator, denominator = variance.as_integer_ratio()
    for k in range(7 * largest(variance) // 5, 0, -1):
        yield here
        above, here = here, above + 2 * k * here * denominator // numerator
    yield here


__all__ = ["largest", "renyi_divergence", "secure_skellam"]
