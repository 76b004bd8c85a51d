"""Real numbers as whole ones, so that they can be masked: rows on a grid, and exact sums of anything else.

A row's coordinates, bounded by what the chain proves, become whole multiples of a power of two, rounded up or down at
random so that on average they stay what they are (Suresh et al., "Distributed mean estimation with limited
communication", ICML 2017, section 2.1). Weights, counts and metrics, of which nothing is known before, are cut into
three whole numbers of 32 bits each: exact to ``2**-40`` up to ``2**55``.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from hansa.core.chain import Limits
from hansa.core.errors import CheckError
from hansa.core.key import Key

LIMBS, LIMB_BITS = 3, 33  # whole numbers that stand for a real one, and the bits of each with its sign
_FINEST, _LARGEST = 40, 2.0**55
_TRIES = 16
_COLUMNS = 2**14
WORD_BITS = 32


class TooLarge(CheckError):
    """Numbers that cannot be summed under masks without overflow."""


def step_of(limits: Limits, bits: int) -> float:
    """The grid's step: the chain's own, or the power of two on which ``bits`` bits hold every coordinate.

    Raises ``TooLarge`` where the chain bounds no coordinate.

    >>> step_of(Limits(norm=1.0, value=1.0), 8), step_of(Limits(value=1.0, step=0.5), 8)
    (0.0078125, 0.5)
    """
    if not math.isfinite(limits.value):
        raise TooLarge([UNBOUNDED])
    return limits.step or 2.0 ** math.ceil(math.log2(max(limits.value, 2.0**-100) / 2 ** (bits - 1)))


UNBOUNDED = (
    "secure sums need a bound on an update's coordinates, and no transform gives one; "
    "transforms=(hansa.Clip(norm=1.0), ...)"
)


def width_of(limits: Limits, bits: int, num_clients: int) -> int:
    """Bits of a word that holds the sum of ``num_clients`` coordinates, whatever they are; at most 32.

    Raises ``TooLarge`` where it would take more.

    >>> width_of(Limits(norm=1.0, value=1.0), 16, 1000)
    26
    """
    levels = math.floor(limits.value / step_of(limits, bits))
    width = (2 * levels * num_clients).bit_length()
    if width > WORD_BITS:
        raise TooLarge(
            [
                f"secure sums of {num_clients} clients with {bits} bits each need words of {width} bits, and have "
                f"{WORD_BITS}; SecureMean(bits={max(2, bits - width + WORD_BITS)})"
            ]
        )
    return width


def exact_width(num_clients: int) -> int:
    """Bits of a word that holds the sum of ``num_clients`` limbs.

    >>> exact_width(1000)
    43
    """
    return LIMB_BITS + max(1, (num_clients - 1).bit_length())


def rounded(
    values: npt.NDArray[np.floating], limits: Limits, bits: int, secret: Key, share: float = 1.0
) -> npt.NDArray[np.int32]:
    """``share * values`` in whole steps (num_params,), rounded up or down at random, the mean kept.

    The rounded row is no longer than the norm that the chain proves: one that would be is shortened by as much first.
    ``share`` (of the largest weight) is at most 1. Raises ``TooLarge`` for a coordinate beyond the chain's bound.
    """
    step, most = step_of(limits, bits), limits.value * (1 + 1e-6)
    reach = float(max(values.max(initial=0.0), -values.min(initial=0.0)))
    if not reach <= most:
        raise TooLarge([f"update: expected coordinates up to {limits.value:g} as the chain proves, found {reach:g}."])
    highest, scale = math.floor(limits.value / step), share / step
    if limits.step and share == 1.0:
        return np.clip(np.rint(np.asarray(values, np.float64) / step), -highest, highest).astype(np.int32)
    longest = limits.norm / step
    for attempt in range(_TRIES):
        found, square = _drawn(values, scale, secret.child("rounding", attempt))
        if reach * scale > highest:  # by the last digits of a float
            np.clip(found, -highest, highest, out=found)
        if square <= longest * longest:
            return found
        scale *= longest / math.sqrt(square) * (1 - 2.0**-20)
    return np.trunc(np.asarray(values, np.float64) * scale).astype(np.int32)  # towards zero: no longer than it was


def _drawn(values: npt.NDArray[np.floating], scale: float, key: Key) -> tuple[npt.NDArray[np.int32], float]:
    """Whole steps drawn at random around ``values * scale``, and their squared length."""
    cipher = Cipher(algorithms.AES(key.material), modes.CTR(bytes(16))).encryptor()
    found, square = np.empty(len(values), np.int32), 0.0
    zeros = bytes(4 * _COLUMNS)
    for start in range(0, len(values), _COLUMNS):
        part = np.multiply(values[start : start + _COLUMNS], scale, dtype=np.float64)
        part += np.frombuffer(cipher.update(zeros[: 4 * len(part)]), "<u4") * 2.0**-32
        np.floor(part, out=part)
        square += float(part @ part)
        found[start : start + len(part)] = part
    return found, square


def limbs_of(numbers: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
    """Real numbers (n,) as signed limbs (3, n), rounded to ``2**-40``; ``TooLarge`` beyond ``2**55``.

    >>> limbs_of(np.array([-1.5])).tolist(), numbers_of(limbs_of(np.array([-1.5, 0.1])))
    ([[0], [-384], [0]], array([-1.5,  0.1]))
    """
    size = np.abs(numbers)
    if not (size < _LARGEST).all():
        raise TooLarge([f"secure sums: expected numbers below 2**55, found {float(size.max(initial=0.0)):g}."])
    high = np.floor(size * 2.0**-24)
    size = size - high * 2.0**24  # exact: what is left are the number's own lower digits
    middle = np.floor(size * 2.0**8)
    low = np.rint((size - middle * 2.0**-8) * 2.0**_FINEST)
    signs = np.where(numbers < 0, -1, 1).astype(np.int64)
    return np.stack([limb.astype(np.int64) * signs for limb in (high, middle, low)])


def numbers_of(limbs: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """The numbers (n,) that sums of limbs (3, n) stand for, each rounded once."""
    high, middle, low = limbs.tolist()
    whole = ((h << 64) + (m << 32) + lo for h, m, lo in zip(high, middle, low, strict=True))
    return np.array([math.ldexp(number, -_FINEST) for number in whole])


def as_words(levels: npt.NDArray[np.int32]) -> npt.NDArray[np.uint32]:
    """Signed whole numbers as words modulo ``2**32``."""
    return levels.view(np.uint32)


def signed(words: npt.NDArray[np.unsignedinteger], width: int) -> npt.NDArray[np.int64]:
    """Words modulo ``2**width`` as the whole numbers around zero that they stand for.

    >>> signed(np.array([1, 255], np.uint32), 8).tolist()
    [1, -1]
    """
    shift = np.int64(64 - width)
    found: npt.NDArray[np.int64] = (words.astype(np.uint64) << np.uint64(shift)).view(np.int64) >> shift
    return found


__all__ = [
    "LIMBS",
    "UNBOUNDED",
    "TooLarge",
    "as_words",
    "exact_width",
    "limbs_of",
    "numbers_of",
    "rounded",
    "signed",
    "step_of",
    "width_of",
]
