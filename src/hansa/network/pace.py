"""How often clients call: the server names a pace, each client spreads its calls over it with its own random numbers.

The pace is the time from one question for work to the next: as many seconds as the clients together need to ask once,
at the rate that the server is glad to answer. It is also the window over which a client spreads its first call after
the line broke, so that ten thousand of them do not come back in the same second.

The idea is the pace steering of Bonawitz et al., "Towards Federated Learning at Scale: System Design", MLSys 2019,
section 2.3. There the server plans each device's return; here it tells all of them one number.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable

CALLS_PER_S = 250.0
LONGEST_WAIT_S = 50.0  # in one request: proxies on the way give up after 60
SHORTEST_WAIT_S = 20.0
_LONGEST_WINDOW_S = 45.0  # all clients call within this time after a coordinator is back
_LONGEST_PACE_S = 3600.0

Uniform = Callable[[float, float], float]


def pace_s(num_clients: int, calls_per_s: float = CALLS_PER_S) -> float:
    """Seconds from one question of a client to its next, so that all together ask ``calls_per_s`` times a second.

    >>> pace_s(10), pace_s(10_000)
    (0.04, 40.0)
    """
    return min(num_clients / calls_per_s, _LONGEST_PACE_S)


def hold_s(wait_s: float, pace_s: float) -> float:
    """How long to hold a question that has no answer yet, when the client is ready to wait for ``wait_s``.

    >>> hold_s(50.0, pace_s(10)), hold_s(50.0, pace_s(8_000)), hold_s(0.0, pace_s(8_000))
    (20.0, 32.0, 0.0)
    """
    return max(0.0, min(wait_s, LONGEST_WAIT_S, max(SHORTEST_WAIT_S, pace_s)))


def retry_after(pace_s: float, uniform: Uniform = random.uniform) -> str:
    """The header ``Retry-After`` of an answer that says to come back: whole seconds, at least one.

    >>> retry_after(0.05), retry_after(50.0, uniform=lambda low, high: high)
    ('1', '63')
    """
    return str(max(1, math.ceil(pace_s * uniform(0.75, 1.25))))


class Patient:
    """One client's side: how long it waits before it calls again. ``told_s`` is the last pace that the server told."""

    def __init__(
        self, first_delay_s: float = 0.5, longest_delay_s: float = 30.0, uniform: Uniform = random.uniform
    ) -> None:
        self._first_s, self._longest_s, self._uniform = first_delay_s, longest_delay_s, uniform
        self._delay_s = first_delay_s
        self.told_s = 0.0

    def hear(self, pace_s: float) -> None:
        """Keep the pace that the server tells; one that cannot be is taken for the nearest that can."""
        self.told_s = min(max(pace_s, 0.0), _LONGEST_PACE_S) if pace_s == pace_s else 0.0

    def until_next(self, elapsed_s: float) -> float:
        """Seconds to wait after an answer that said nothing and that came ``elapsed_s`` after it was asked for.

        >>> patient = Patient(uniform=lambda low, high: high)
        >>> patient.hear(40.0)
        >>> patient.until_next(elapsed_s=20.0), patient.until_next(elapsed_s=50.0)
        (30.0, 0.0)
        """
        return max(0.0, self.told_s * self._uniform(0.75, 1.25) - elapsed_s)

    def reached(self) -> None:
        """The server answered, or bytes moved: the next failure is a first one."""
        self._delay_s = self._first_s

    def until_retry(self, after_s: float | None = None) -> float:
        """Seconds to wait after a call that failed; ``after_s`` is what the answer itself asked for, if it did.

        The first delay is anywhere in the window that the server told before; delays double, within ``longest_delay_s``
        or that window.

        >>> patient = Patient(first_delay_s=1.0, uniform=lambda low, high: high)
        >>> [patient.until_retry(), patient.until_retry(), patient.until_retry(after_s=10.0)]
        [1.0, 2.0, 15.0]
        >>> patient.hear(300.0)
        >>> patient.until_retry()
        45.0
        """
        window = min(self.told_s, _LONGEST_WINDOW_S)
        if after_s is not None:
            drawn = min(max(after_s, 0.0), _LONGEST_PACE_S) * self._uniform(1.0, 1.5)
        elif window > self._delay_s:
            drawn = self._uniform(0.0, window)
        else:
            drawn = self._delay_s * self._uniform(0.5, 1.0)
        self._delay_s = min(2 * self._delay_s, self._longest_s)
        return drawn


__all__ = ["CALLS_PER_S", "LONGEST_WAIT_S", "Patient", "hold_s", "pace_s", "retry_after"]
