"""What an attack on canaries says of epsilon: lower bounds with a confidence, and an estimate.

A canary is a client of the auditor's own, whose update is a direction that nobody else knows. From how well the
released values tell which canaries took part follows how much epsilon must be, at least:

* ``one_run_bound``: Steinke, Nasr and Jagielski, "Privacy auditing with one (1) training run", NeurIPS 2023. Each
  canary took part or not by a fair coin, and the auditor guesses some of the coins. Holds for every (epsilon,
  delta)-private mechanism, whatever the canaries have to do with each other (theorem 5.2).
* ``one_shot_estimate``: Andrew, Kairouz, Oh, Oprea, McMahan and Suriyakumar, "One-shot empirical privacy estimation for
  federated learning", ICLR 2024, algorithm 1. Cosines of the canaries that took part against the cosine of a direction
  that did not. It supposes that both are normal: an estimate, not a bound.
* ``one_shot_bound``: the same cosines, with limits of Clopper and Pearson in the place of normal curves, at thresholds
  that are fixed beforehand and share the doubt (in trials that found more, and scattered less, than one threshold
  chosen on half of the canaries and counted on the other). The cosine of a direction drawn evenly that took no part has
  a law that is known exactly, whatever was released; that canaries' cosines are independent is supposed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hansa.core.errors import InputError
from hansa.privacy.beta import log_cosine_tail, lower_limit

Floats = npt.NDArray[np.float64]
_SHARES = (0.01, 0.025, 0.05, 0.1, 0.2, 0.5)  # of all canaries: guessed at either end
_THRESHOLDS = (
    1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5, 5.0, 5.5, 6.0, 7.0, 8.0, 9.0, 10.0, 12.0, 14.0, 17.0, 20.0, 25.0, 30.0,
)  # deviations of the cosine of a direction that took no part  # fmt: skip
_PRECISION = 1e-6


@dataclass(frozen=True, kw_only=True)
class OneRun:
    """Epsilon is at least ``epsilon``: of ``num_guesses`` guesses ``num_correct`` were right."""

    epsilon: float
    num_guesses: int
    num_correct: int


@dataclass(frozen=True, kw_only=True)
class OneShot:
    """Epsilon is at least ``epsilon``: ``num_above`` of ``num_canaries`` cosines reached ``threshold``.

    Of directions that took no part a share ``false_positives`` does.
    """

    epsilon: float
    threshold: float
    num_above: int
    num_canaries: int
    false_positives: float


def one_run_p_value(num_canaries: int, num_guesses: int, num_correct: int, epsilon: float, delta: float) -> float:
    """How likely at most so many guesses are right, or more, if the mechanism is (epsilon, delta)-private.

    Theorem 5.2 and appendix D of the paper: of randomised response, which has no delta, the chance is that of a
    binomial number; delta adds at most ``2 * num_canaries * delta`` times the greatest mean chance just below.

    >>> round(one_run_p_value(100, 10, 10, 0.0, 0.0), 6) == round(0.5**10, 6)
    True
    """
    if not 0 <= num_correct <= num_guesses <= num_canaries:
        raise InputError(
            f"one-run audit: expected correct <= guesses <= canaries, found {num_correct}, {num_guesses}, "
            f"{num_canaries}"
        )
    chances = _binomial(num_guesses, epsilon)
    p_value = float(chances[num_correct:].sum())
    if delta > 0 and num_correct > 0:
        below = np.cumsum(chances[:num_correct][::-1])  # v - i <= number < v, for i = 1 to v
        p_value += 2 * num_canaries * delta * float((below / np.arange(1, num_correct + 1)).max())
    return min(p_value, 1.0)


def one_run_epsilon(
    num_canaries: int, num_guesses: int, num_correct: int, delta: float, confidence: float = 0.95
) -> float:
    """The epsilon below which so many right guesses are refused with ``confidence``; 0 where nothing is.

    >>> round(one_run_epsilon(1000, 500, 500, 0.0), 2)  # all right: -log(0.05 ** (-1/500) - 1)
    5.11
    """

    def refused(epsilon: float) -> bool:
        return one_run_p_value(num_canaries, num_guesses, num_correct, epsilon, delta) < 1 - confidence

    if not refused(0.0):
        return 0.0
    low, high = 0.0, 1.0
    while refused(high):
        low, high = high, 2 * high
    while high - low > _PRECISION:
        middle = (low + high) / 2
        low, high = (middle, high) if refused(middle) else (low, middle)
    return low


def one_run_bound(scores: Floats, took_part: npt.NDArray[np.bool_], delta: float, confidence: float = 0.95) -> OneRun:
    """The best of six guessing rules, each at a sixth of the doubt, so that all together keep the confidence.

    The highest scores (num_canaries,) are guessed to have taken part, as many lowest not to; for the others no guess.

    >>> found = one_run_bound(np.arange(1000.0), np.arange(1000) >= 500, delta=0.0)
    >>> found.num_guesses, found.num_correct, round(found.epsilon, 1)
    (1000, 1000, 5.3)
    """
    if scores.shape != took_part.shape or scores.ndim != 1:
        raise InputError(f"one-run audit: expected a score a canary, found {scores.shape} and {took_part.shape}")
    order, best = np.argsort(-scores, kind="stable"), OneRun(epsilon=0.0, num_guesses=0, num_correct=0)
    each = 1 - (1 - confidence) / len(_SHARES)
    for share in _SHARES:
        count = int(share * len(scores))
        if not count:
            continue
        correct = int(took_part[order[:count]].sum() + (~took_part[order[-count:]]).sum())
        epsilon = one_run_epsilon(len(scores), 2 * count, correct, delta, each)
        if epsilon > best.epsilon or not best.num_guesses:
            best = OneRun(epsilon=epsilon, num_guesses=2 * count, num_correct=correct)
    return best


def one_shot_bound(cosines: Floats, dimensions: int, delta: float, confidence: float = 0.95) -> OneShot:
    """A lower bound from the cosines (num_canaries,) of canaries that took part.

    At each threshold epsilon is at least ``log((share above - delta) / share above of a direction that took no part)``;
    the best of all counts.

    >>> round(one_shot_bound(np.full(100, 0.2), 1000, 1e-5).epsilon), one_shot_bound(-np.ones(100), 1000, 1e-5).epsilon
    (21, 0.0)
    """
    ordered, each = np.sort(cosines), 1 - (1 - confidence) / len(_THRESHOLDS)
    found = []
    for deviations in _THRESHOLDS:
        threshold = deviations / math.sqrt(dimensions)
        above = len(ordered) - int(np.searchsorted(ordered, threshold))
        log_false = log_cosine_tail(threshold, dimensions) if threshold < 1 else -math.inf
        share = lower_limit(above, len(ordered), each) - delta
        found.append(
            OneShot(
                epsilon=max(0.0, math.log(share) - log_false) if share > 0 and threshold < 1 else 0.0,
                threshold=threshold,
                num_above=above,
                num_canaries=len(ordered),
                false_positives=math.exp(log_false),
            )
        )
    return max(found, key=lambda one: one.epsilon)


def one_shot_estimate(cosines: Floats, dimensions: int, delta: float) -> float:
    """Epsilon of N(mean, deviation²) of the cosines against N(0, 1/d), at ``delta``: an estimate, not a bound.

    >>> cosines = 0.05 + 0.01 * np.array([-1.0, 1.0] * 50)  # five deviations away
    >>> round(one_shot_estimate(cosines, 10_000, 1e-5))
    33
    """
    if len(cosines) < 2:
        return 0.0
    deviation = max(float(np.std(cosines, ddof=1)), _PRECISION / math.sqrt(dimensions))
    return normal_epsilon(float(np.mean(cosines)), deviation, 0.0, 1 / math.sqrt(dimensions), delta)


def normal_epsilon(mean: float, deviation: float, other_mean: float, other_deviation: float, delta: float) -> float:
    """The least epsilon for which two normal laws are (epsilon, delta)-close, both ways; infinite where none is.

    >>> round(normal_epsilon(1.0, 1.0, 0.0, 1.0, 1e-5), 3)
    4.377
    """
    one, other = (mean, deviation), (other_mean, other_deviation)

    def close(epsilon: float) -> bool:
        return max(_normal_delta(one, other, epsilon), _normal_delta(other, one, epsilon)) <= delta

    low, high = 0.0, 1.0
    if close(0.0):
        return 0.0
    while not close(high):
        low, high = high, 2 * high
        if high > 1e6:
            return math.inf
    while high - low > _PRECISION * max(1.0, high):
        middle = (low + high) / 2
        low, high = (low, middle) if close(middle) else (middle, high)
    return high


def _binomial(trials: int, epsilon: float) -> Floats:
    """The chances of 0 to ``trials`` right guesses, each right with chance e^epsilon / (1 + e^epsilon)."""
    logs = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1.0, trials + 1)))])
    number = np.arange(trials + 1.0)
    log_right, log_wrong = -math.log1p(math.exp(-epsilon)), -epsilon - math.log1p(math.exp(-epsilon))
    chances: Floats = np.exp(logs[-1] - logs - logs[::-1] + number * log_right + (trials - number) * log_wrong)
    return chances


def _normal_delta(one: tuple[float, float], other: tuple[float, float], epsilon: float) -> float:
    """P_one(S) - e^epsilon P_other(S) on the set S where one's density is more than e^epsilon times the other's."""
    (mean, deviation), (other_mean, other_deviation) = one, other
    square = 0.5 / other_deviation**2 - 0.5 / deviation**2
    linear = mean / deviation**2 - other_mean / other_deviation**2
    constant = 0.5 * (other_mean / other_deviation) ** 2 - 0.5 * (mean / deviation) ** 2
    constant += math.log(other_deviation / deviation) - epsilon
    parts = _where_positive(square, linear, constant)

    def mass(law: tuple[float, float]) -> float:
        return math.fsum(_normal_between((low - law[0]) / law[1], (high - law[0]) / law[1]) for low, high in parts)

    weighted = mass(other)
    return mass(one) - (math.exp(min(epsilon + math.log(weighted), 700.0)) if weighted > 0 else 0.0)


def _where_positive(square: float, linear: float, constant: float) -> list[tuple[float, float]]:
    """The intervals on which ``square x² + linear x + constant`` is positive."""
    if abs(square) < 1e-12 * max(1.0, abs(linear)):
        if linear == 0:
            return [(-math.inf, math.inf)] if constant > 0 else []
        root = -constant / linear
        return [(root, math.inf)] if linear > 0 else [(-math.inf, root)]
    inside = linear * linear - 4 * square * constant
    if inside <= 0:
        return [(-math.inf, math.inf)] if square > 0 else []
    roots = sorted((-linear + sign * math.sqrt(inside)) / (2 * square) for sign in (-1, 1))
    return [(roots[0], roots[1])] if square < 0 else [(-math.inf, roots[0]), (roots[1], math.inf)]


def _normal_between(low: float, high: float) -> float:
    """Phi(high) - Phi(low), from the tail that both are nearer to."""
    if low > 0:
        return 0.5 * (math.erfc(low / math.sqrt(2)) - math.erfc(high / math.sqrt(2)))
    return 0.5 * (math.erfc(-high / math.sqrt(2)) - math.erfc(-low / math.sqrt(2)))


__all__ = [
    "OneRun",
    "OneShot",
    "normal_epsilon",
    "one_run_bound",
    "one_run_epsilon",
    "one_run_p_value",
    "one_shot_bound",
    "one_shot_estimate",
]
