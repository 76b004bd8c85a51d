"""Gaussian noise on the mean, sized by the bound that the chain proves.

    mean <- mean + N(0, (noise_multiplier * sensitivity)^2)

McMahan, Ramage, Talwar and Zhang, "Learning differentially private recurrent language models", ICLR 2018, algorithm 1.
There is no clip parameter: the sensitivity comes from the chain and the aggregator, and a chain that proves none is
refused. With ``epsilon`` and ``delta`` the noise multiplier is found for the planned rounds and the schedule's sampler
(``training/privacy.py``). The noise is drawn from a cryptographic stream and lies on a grid (``privacy/noise.py``).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from hansa.core.chain import Transform
from hansa.core.errors import CheckError, InputError
from hansa.core.key import Key
from hansa.core.protocols import Aggregate, Settings, State
from hansa.privacy.events import GaussianEvent
from hansa.privacy.noise import deviation_of, noised, secure_normal


@dataclass(frozen=True, kw_only=True)
class GaussianNoise(Transform):
    """Noise of standard deviation ``noise_multiplier * sensitivity`` on every coordinate and tail column.

    Give ``noise_multiplier``, or ``epsilon`` and ``delta`` together (client level, for all rounds of the schedule).
    With ``noise_multiplier`` a ``delta`` says at which one the history states epsilon, and ``budget`` is the epsilon
    that a run stops short of. ``CheckError`` when the sensitivity is infinite.

    >>> noise = GaussianNoise(noise_multiplier=1.0)
    >>> mean, _ = noise.release(Aggregate(np.zeros(1000), {}), None, 0.5, Key.of(0))
    >>> bool(0.45 < mean.values.std() < 0.55)
    True
    """

    noise_multiplier: float | None = None
    epsilon: float | None = None
    delta: float | None = None
    budget: float | None = None

    adds_noise = True
    shows_nonfinite = True

    def __post_init__(self) -> None:
        refuse_amounts(type(self).__name__, self.noise_multiplier, self.epsilon, self.delta, self.budget)

    def norm_bound(self, incoming: float, settings: Settings) -> float:
        """Clients' rows are not changed."""
        return incoming

    def release(self, mean: Aggregate, state: State, sensitivity: float, secret: Key) -> tuple[Aggregate, State]:
        """The noised mean; values and tail are one vector with one bound."""
        multiplier = sized("GaussianNoise", self.noise_multiplier, sensitivity)
        whole = joined(mean)
        deviation = deviation_of(multiplier, sensitivity, len(whole))
        return parted(mean, noised(whole, secure_normal(secret, len(whole)), deviation)), state

    def settings(self, state: State) -> Settings:
        """What an owner of data is told: the noise multiplier."""
        return {"noise_multiplier": self.noise_multiplier}

    def event(self, number: int, num_rounds: int) -> GaussianEvent:
        """What round ``number`` releases, for the ledger."""
        assert self.noise_multiplier is not None
        return GaussianEvent(noise_multiplier=self.noise_multiplier)


def refuse_amounts(
    kind: str, noise_multiplier: float | None, epsilon: float | None, delta: float | None, budget: float | None
) -> None:
    """Say what a noise of this kind cannot be made of."""
    if noise_multiplier is not None:
        if epsilon is not None:
            raise InputError(f"{kind}: expected noise_multiplier or epsilon, found both; leave one out")
        if not (math.isfinite(noise_multiplier) and noise_multiplier > 0):
            raise InputError(f"{kind}(noise_multiplier=): expected above 0, found {noise_multiplier}")
    elif epsilon is None or delta is None:
        raise InputError(f"{kind}: expected noise_multiplier, or epsilon and delta together; found neither")
    if epsilon is not None and not epsilon > 0:
        raise InputError(f"{kind}(epsilon=): expected above 0, found {epsilon}")
    if delta is not None and not 0 < delta < 1:
        raise InputError(f"{kind}(delta=): expected between 0 and 1, found {delta}")
    if budget is not None and not (budget > 0 and noise_multiplier and delta):
        raise InputError(
            f"{kind}(budget=): expected an epsilon above 0, beside noise_multiplier and delta, found {budget}; "
            "epsilon= and delta= alone keep to a budget too"
        )


def sized(kind: str, noise_multiplier: float | None, sensitivity: float) -> float:
    """The noise multiplier, where there is one and something to multiply."""
    if not math.isfinite(sensitivity):
        raise CheckError([UNBOUNDED.format(kind=kind)])
    if noise_multiplier is None:
        raise CheckError([f"{kind}(epsilon=, delta=) needs a schedule to be calibrated for; use simulate or serve"])
    return noise_multiplier


def joined(mean: Aggregate) -> np.ndarray:
    """Values and tail as one vector: they have one bound."""
    return np.concatenate([np.asarray(mean.values, np.float64), [mean.tail[name] for name in sorted(mean.tail)]])


def parted(mean: Aggregate, whole: np.ndarray) -> Aggregate:
    """``mean`` with the values and the tail of such a vector."""
    count = len(whole) - len(mean.tail)
    tail = dict(zip(sorted(mean.tail), whole[count:].tolist(), strict=True))
    return mean._replace(values=whole[:count], tail=tail)


UNBOUNDED = (
    "{kind} needs a finite bound on what one client adds, and finds none; put a Clip before it and nothing that "
    "changes values after the Clip, and fix the mean's weights and denominator: "
    'transforms=(hansa.Clip(norm=1.0), hansa.{kind}(...)), aggregator=hansa.Mean(weighting="clients")'
)
