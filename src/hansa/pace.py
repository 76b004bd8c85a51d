"""How many clients to ask and how long to wait, learned from what past rounds took: pure functions.

Bonawitz et al., "Towards federated learning at scale: system design", MLSys 2019, ask 1.3 times the goal and close a
round by a timeout (section 2.2); both are fixed there and learned here.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

FIRST_OVER_SELECTION = 1.3
FIRST_DEADLINE_S = 3600.0
FIRST_ANSWER_S = 120.0  # for an answer without learning
TIMES_KEPT = 5  # of a client's latest times
MISSING_KEPT = 50  # shares of past rounds
RECENT_KEPT = 1000  # latest times of anybody

_SMOOTHING = 0.2
_QUANTILE, _FACTOR, _LEAST_S = 0.9, 2.0, 30.0
_LONGER = (1.0, 2.0, 4.0)  # at each new attempt, the last for ever


def over_selection(missing: Sequence[float]) -> float:
    """How many times the goal to ask, so that the goal is expected to answer in time: from 1 to 2.

    ``missing`` are the shares (0 to 1, oldest first) of clients asked in past rounds that did not answer in time. Their
    exponential mean is taken, in which the newest counts a fifth. Without a past round the answer is 1.3.

    >>> over_selection([]), over_selection([0.0]), over_selection([0.2, 0.2]), over_selection([0.9])
    (1.3, 1.0, 1.25, 2.0)
    """
    if not missing:
        return FIRST_OVER_SELECTION
    mean = missing[0]
    for share in missing[1:]:
        mean += _SMOOTHING * (share - mean)
    return min(2.0, 1 / max(0.5, 1 - mean))


def deadline_s(
    cohort: Sequence[Sequence[float]], recent: Sequence[float], attempt: int = 0, first_s: float = FIRST_DEADLINE_S
) -> float:
    """How long to wait for a cohort: twice what all but the slowest tenth of it are expected to need.

    ``cohort`` holds each client's latest times in seconds (empty for one without any): its expected time is their
    median. Where that is known of less than half the cohort, ``recent`` (times of anybody) stand for it. Of up to ten
    clients, none counts as the slowest tenth. At least 30 seconds, ``first_s`` where nothing is known; at a second
    attempt twice as long, from the third on four times.

    >>> deadline_s([[40.0, 50.0, 900.0], [20.0]], []), deadline_s([[], []], [60.0]), deadline_s([[], []], [], attempt=1)
    (100.0, 120.0, 7200.0)
    """
    known = [statistics.median(times) for times in cohort if times]
    if 2 * len(known) < len(cohort) or not known:
        known = list(recent)
    if not known:
        return first_s * _LONGER[min(attempt, 2)]
    return max(_LEAST_S, _FACTOR * _quantile(known)) * _LONGER[min(attempt, 2)]


def _quantile(values: Sequence[float]) -> float:
    """The least value that nine tenths of the others do not exceed; of up to ten values, the largest."""
    return sorted(values)[math.ceil(_QUANTILE * (len(values) - 1))]
