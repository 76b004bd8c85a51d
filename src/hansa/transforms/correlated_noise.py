"""Correlated noise on the mean: later rounds take back noise of earlier ones, which needs no sampling in secret.

    mean_t <- mean_t + noise_multiplier * sensitivity_t * |C| * (C^-1 z)_t,     z ~ N(0, I)

DP-FTRL: Kairouz, McMahan, Song, Thakkar, Thakurta and Xu, "Practical and private (deep) learning without sampling or
shuffling", ICML 2021, algorithm 1, with any strategy C of the matrix mechanism (``privacy/strategies.py``,
``privacy/blt.py``) in place of the tree; ``|C|`` is what one client can change over the whole run (see
``privacy/matrix_mechanism.py``), ``sensitivity_t`` what it can change in round t. Difference: there the server sums all
gradients and their noise anew in each round; here a round's mean gets the difference of two such noises, which is the
same, so that every server optimizer may follow. Means divided by their ``sensitivity_t`` are the
stream of the theorem, which may depend on what was released before: so a clipping norm may adapt from round to round.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from hansa.core.chain import Transform
from hansa.core.errors import CheckError, InputError
from hansa.core.key import Key
from hansa.core.protocols import Aggregate, Settings, State
from hansa.privacy.blt import BLT
from hansa.privacy.events import MatrixEvent, MatrixPartEvent
from hansa.privacy.matrix_mechanism import Mechanism
from hansa.privacy.noise import deviation_of, noised, secure_normal
from hansa.privacy.strategies import Strategy, begin
from hansa.transforms.noise import joined, parted, refuse_amounts, sized

_MOST_ROUNDS = 100_000  # that a client counts with: more would be work for nothing


@dataclass(frozen=True, kw_only=True)
class CorrelatedNoise(Transform):
    """Noise by a strategy: ``BLT()``, ``Banded()`` or ``Tree()``. All rounds together are one Gaussian mechanism.

    ``noise_multiplier`` is that of the whole run; or give ``epsilon`` and ``delta`` together, for which it is found.
    ``delta`` and ``budget`` are as in ``GaussianNoise``. The less often a client takes part the less noise: use it with
    ``Schedule(sampler=MinSeparation(rounds=...))``; with another sampler it is sized for clients that are in
    every round. ``mechanism`` is the strategy's plan for the schedule, which fills it in.

    The state is the noise that later rounds take back: a secret as long as the run lasts, as checkpoints are.
    ``CheckError`` when the sensitivity is infinite, ``RunError`` when a round has other columns than the first.

    >>> import numpy as np
    >>> noise = CorrelatedNoise(noise_multiplier=1.0).planned_for(num_rounds=100, min_separation=10)
    >>> mean, state = noise.release(Aggregate(np.zeros(1000), {}), noise.init(1000), 0.5, Key.of(0))
    >>> bool(abs(mean.values.std() / (0.5 * noise.mechanism.sensitivity) - 1) < 0.1), state["step"]
    (True, 1)
    """

    strategy: Strategy = field(default_factory=BLT)
    noise_multiplier: float | None = None
    epsilon: float | None = None
    delta: float | None = None
    budget: float | None = None
    mechanism: Mechanism | None = None

    adds_noise = True

    def __post_init__(self) -> None:
        refuse_amounts("CorrelatedNoise", self.noise_multiplier, self.epsilon, self.delta, self.budget)

    def planned_for(self, num_rounds: int, min_separation: int) -> CorrelatedNoise:
        """The noise for a schedule in which a client takes part every ``min_separation`` rounds at most."""
        return replace(self, mechanism=Mechanism.planned(self.strategy, num_rounds, min_separation))

    def init(self, num_params: int) -> State:
        """Nothing to take back; the first round says how many columns there are beside the parameters."""
        return begin()

    def norm_bound(self, incoming: float, settings: Settings) -> float:
        """Clients' rows are not changed."""
        return incoming

    def release(self, mean: Aggregate, state: State, sensitivity: float, secret: Key) -> tuple[Aggregate, State]:
        """The noised mean, and the noise to take back; values and tail are one vector with one bound."""
        multiplier = sized("CorrelatedNoise", self.noise_multiplier, sensitivity)
        mechanism = self._planned()
        whole = joined(mean)
        noise, state = mechanism.strategy.next(state, secure_normal(secret, len(whole)))
        deviation = deviation_of(multiplier * mechanism.sensitivity, sensitivity, len(whole))
        return parted(mean, noised(whole, noise, deviation)), state

    def settings(self, state: State) -> Settings:
        """What an owner of data is told: the noise multiplier of the whole run, and how its rounds hang together."""
        mechanism = None if self.mechanism is None else self.mechanism.as_json()
        return {"noise_multiplier": self.noise_multiplier, "mechanism": mechanism}

    def part(self, number: int, settings: Mapping[str, Any]) -> MatrixPartEvent:
        """What a client that takes part in round ``number`` counts, by what a plan tells."""
        told = settings["mechanism"]
        if told["num_rounds"] > _MOST_ROUNDS:
            raise InputError(f"plan: expected {_MOST_ROUNDS:,} rounds at most, found {told['num_rounds']:,}")
        mechanism = Mechanism.of_json(told)
        return MatrixPartEvent(mechanism=mechanism, noise_multiplier=settings["noise_multiplier"], round=number)

    def event(self, number: int, num_rounds: int) -> MatrixEvent:
        """What round ``number`` releases, for the ledger."""
        assert self.noise_multiplier is not None
        return MatrixEvent(mechanism=self._planned(), noise_multiplier=self.noise_multiplier, round=number)

    def _planned(self) -> Mechanism:
        if self.mechanism is None:
            raise CheckError(["CorrelatedNoise needs a schedule to be planned for; use simulate or serve"])
        return self.mechanism
