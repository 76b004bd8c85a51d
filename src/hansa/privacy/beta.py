"""The incomplete beta function, and what follows from it: exact limits of a share, and tails of a random cosine.

Clopper and Pearson, "The use of confidence or fiducial limits illustrated in the case of the binomial", Biometrika
1934. The function itself is the continued fraction 8.17.22 of the NIST Digital Library of Mathematical Functions,
evaluated by Lentz's method in logarithms, so that tails far below 1e-300 keep their digits.
"""

from __future__ import annotations

import math
from functools import lru_cache

from hansa.core.errors import InputError

_TINY = 1e-300
_MOST_TERMS = 100_000


def log_beta_cdf(x: float, a: float, b: float) -> float:
    """Log of the regularised incomplete beta function I_x(a, b), the chance that a Beta(a, b) number is below ``x``.

    >>> round(math.exp(log_beta_cdf(0.5, 2.0, 2.0)), 6)
    0.5
    """
    if x <= 0:
        return -math.inf
    if x >= 1:
        return 0.0
    if x <= (a + 1) / (a + b + 2):
        return _log_near_zero(x, a, b)
    return math.log1p(-min(1.0, math.exp(_log_near_zero(1 - x, b, a)))) if x < 1 else 0.0


@lru_cache(maxsize=4096)
def lower_limit(successes: int, trials: int, confidence: float = 0.95) -> float:
    """The share that, with ``confidence``, the true one is not below, for ``successes`` of ``trials``: one-sided.

    | input | result |
    |---|---|
    | no success, or no trial | 0 |
    | nothing but successes | ``(1 - confidence) ** (1 / trials)`` |

    >>> round(lower_limit(20, 20), 4), round(lower_limit(5, 100), 4)
    (0.8609, 0.0199)
    """
    _check(successes, trials, confidence)
    if successes == 0:
        return 0.0
    target = math.log1p(-confidence)
    low, high = 0.0, 1.0
    for _ in range(60):  # I_p(k, n - k + 1) is the chance of k successes or more
        middle = (low + high) / 2
        low, high = (
            (middle, high) if log_beta_cdf(middle, successes, trials - successes + 1) < target else (low, middle)
        )
    return low


def upper_limit(successes: int, trials: int, confidence: float = 0.95) -> float:
    """The share that, with ``confidence``, the true one is not above: one-sided.

    >>> round(upper_limit(0, 20), 4)
    0.1391
    """
    _check(successes, trials, confidence)
    return 1.0 - lower_limit(trials - successes, trials, confidence)


@lru_cache(maxsize=4096)
def log_cosine_tail(cosine: float, dimensions: int) -> float:
    """Log of the chance that a direction drawn evenly has at least this cosine with a fixed vector.

    Exact: ``(1 + cosine) / 2`` of a random direction in d dimensions is Beta((d-1)/2, (d-1)/2). For many dimensions it
    is the tail of N(0, 1/d).

    >>> round(math.exp(log_cosine_tail(0.5, 3)), 6), round(math.exp(log_cosine_tail(2 / 1000, 1_000_000)), 4)
    (0.25, 0.0228)
    """
    if dimensions < 2:
        raise InputError(f"log_cosine_tail: expected 2 dimensions or more, found {dimensions}")
    a = (dimensions - 1) / 2
    if cosine <= 0:
        return math.log1p(-math.exp(log_cosine_tail(-cosine, dimensions))) if cosine < 0 else math.log(0.5)
    square = cosine * cosine
    if square >= 1:
        return -math.inf
    if 1 - square <= (a + 1) / (a + 2.5):
        return math.log(0.5) + _log_near_zero(1 - square, a, 0.5)
    return math.log(0.5) + math.log1p(-math.exp(_log_near_zero(square, 0.5, a)))


def _check(successes: int, trials: int, confidence: float) -> None:
    if not 0 <= successes <= trials:
        raise InputError(f"successes: expected 0 to {trials} (trials), found {successes}")
    if not 0 < confidence < 1:
        raise InputError(f"confidence: expected between 0 and 1, found {confidence}")


def _log_near_zero(x: float, a: float, b: float) -> float:
    """Log I_x(a, b) by the continued fraction, which converges fast below x = (a + 1) / (a + b + 2)."""
    front = a * math.log(x) + b * math.log1p(-x) - math.log(a)
    front += math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)
    fraction, c, d = 1.0, 1.0, 0.0
    for i in range(_MOST_TERMS):
        m = i // 2
        if i == 0:
            term = 1.0
        elif i % 2:
            term = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        else:
            term = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        d = 1 + term * d
        d = 1 / (d if abs(d) > _TINY else _TINY)
        c = 1 + term / c
        c = c if abs(c) > _TINY else _TINY
        fraction *= c * d
        if i > 1 and abs(1 - c * d) < 1e-14:
            break
    return front + math.log(fraction - 1)


__all__ = ["log_beta_cdf", "log_cosine_tail", "lower_limit", "upper_limit"]
