"""Adaptive clipping: the clipping norm follows a quantile of the updates' norms, found privately.

    u_i <- u_i * min(1, C / ||u_i||),     b_i = 1 if ||u_i|| <= C else 0
    C   <- C * exp(-learning_rate * (mean of b - quantile))

Andrew, Thakkar, McMahan and Ramaswamy, "Differentially private learning with adaptive clipping", NeurIPS 2021,
algorithm 1. Difference: the indicator travels as one more coordinate, ``count_scale * C * (b_i - 1/2)``, of the same
vector, so that one bound, one noise and one entry of the ledger cover both. That is the paper's split of the privacy
budget (theorem 1): noise of multiplier z on the whole is noise of multiplier ``z * sqrt(1 + count_scale**2 / 4)`` on
the updates, and ``z * sqrt(1 + count_scale**2 / 4) / count_scale`` on the count. The paper's count noise of a twentieth
of 100 clients at z = 1 is ``count_scale=0.2``, for which updates get 0.5 % more noise.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from hansa.core.chain import Raw, Transform
from hansa.core.errors import InputError
from hansa.core.key import Key
from hansa.core.protocols import Aggregate, Array, Codec, Draws, Memory, Settings, State, Updates
from hansa.transforms.clip import clipped, row_norms

_MAX_CHANGE = 20.0  # of the logarithm in one round: a guard against a noisy count, never met in earnest


@dataclass(frozen=True, kw_only=True)
class AdaptiveClip(Transform):
    """Clip to a norm that begins at ``start`` and moves towards the ``quantile`` of norms by a factor a round.

    The state is the clipping norm. Give it before ``GaussianNoise``, which noises the count with the rest; without
    noise the count is exact.

    >>> block = Updates(("a", "b"), np.array([[3.0, 4.0], [0.0, 0.5]]), np.ones(2))
    >>> clip = AdaptiveClip(start=1.0)
    >>> clip.encode(block, 1.0, None, None)[0].tail["clip.below"].tolist()
    [-0.1, 0.1]
    """

    start: float = 0.1
    quantile: float = 0.5
    learning_rate: float = 0.2
    count_scale: float = 0.2

    tail_names = ("clip.below",)
    shows_nonfinite = True

    def __post_init__(self) -> None:
        for name in ("start", "learning_rate", "count_scale"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise InputError(f"AdaptiveClip({name}=): expected a positive number, found {value}")
        if not 0 < self.quantile < 1:
            raise InputError(f"AdaptiveClip(quantile=): expected between 0 and 1, found {self.quantile}")

    def init(self, num_params: int) -> State:
        """The first clipping norm."""
        return float(self.start)

    def settings(self, state: State) -> Settings:
        """The round's clipping norm."""
        return state

    def norm_bound(self, incoming: float, settings: Settings) -> float:
        """At most the round's clipping norm."""
        return min(incoming, float(settings))

    def tail_bound(self, settings: Settings) -> float:
        """The indicator is half of ``count_scale`` clipping norms away from zero."""
        return self.count_scale * float(settings) / 2

    def encode(
        self, updates: Updates, settings: Settings, memory: Memory, draws: Draws
    ) -> tuple[Updates, Mapping[str, Array]]:
        """Rows of norm at most the round's, and a column that says which were short enough before."""
        norms = row_norms(updates.values)
        below = (np.asarray(norms <= settings, np.float64) - 0.5) * (self.count_scale * settings)
        tail = {**updates.tail, "clip.below": below}
        return updates._replace(values=clipped(updates.values, norms, settings), tail=tail), {}

    def release(self, mean: Aggregate, state: State, sensitivity: float, secret: Key) -> tuple[Aggregate, State]:
        """The next clipping norm, from the (noised) share of updates that were short enough."""
        tail = dict(mean.tail)
        share = tail.pop("clip.below") / (self.count_scale * state) + 0.5
        change = self.learning_rate * (share - self.quantile)
        return mean._replace(tail=tail), state * math.exp(-min(max(change, -_MAX_CHANGE), _MAX_CHANGE))

    def codec(self, inner: Codec) -> Codec:
        """Scaled values leave every grid."""
        return Raw()
