"""An attack on a federation's privacy by canaries, through the real chain: a lower bound beside the claimed epsilon.

Canary clients join a simulation of the app: their rows go through its transforms, its aggregator, its noise and its
sampler as everybody's do, and the attacker sees every round's released values. ``privacy/audit.py`` says which papers
the bounds are from, ``attacks/canaries.py`` how canaries are told.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from hansa.attacks.canaries import Canaries, Directions, Observed, Tap, WithCanaries, cosines
from hansa.core import chain
from hansa.core.errors import InputError
from hansa.core.key import Key
from hansa.core.protocols import Client
from hansa.data.dataset import Dataset
from hansa.data.population import Population
from hansa.data.source import Source
from hansa.federation import Federation, Pair
from hansa.privacy import events
from hansa.privacy.accountant import Cost
from hansa.privacy.audit import OneRun, OneShot, one_run_bound, one_shot_bound, one_shot_estimate
from hansa.runtimes.inprocess import InProcess
from hansa.training.check import refuse_unfit
from hansa.training.loop import Loop
from hansa.training.privacy import Counted, bound, noise_of, planned
from hansa.training.schedule import Schedule
from hansa.training.simulate import initial_params

CONFIDENCE = 0.95
_DELTA = 1e-5
_LONG = 1e4  # times the norm bound: what a canary sends, for the clip to cut
_FEWEST = 8  # canaries of one run, however short the model's vector
_LARGE = (1e-3, 1e-2, 1e-1)  # deltas at which few canaries tell much
_FINE, _COARSE = 1e-4, 1e-3  # intervals of privacy losses: for the claim as it is stated, and at large deltas


@dataclass(frozen=True, kw_only=True)
class Level:
    """What is claimed and what was proved of epsilon at one delta."""

    delta: float
    claimed: float
    proved: float

    @property
    def is_broken(self) -> bool:
        """Whether more was proved than is claimed."""
        return self.proved > self.claimed


@dataclass(frozen=True, kw_only=True)
class Audit:
    """What the attack found: ``lower_bound`` holds with ``confidence``; ``estimate`` is the likely value, no bound.

    ``levels`` are the claim's own delta and larger ones: a mechanism has an epsilon at each, and what is broken by
    little shows at a large delta first. The one-shot bound holds at all of them at once, with one confidence.
    ``cosines`` (num_canaries,) in units of their deviation where a canary took no part, and ``took_part`` are what the
    bounds were made from.
    """

    claim: Cost
    levels: tuple[Level, ...]
    confidence: float
    num_rounds: int
    num_canaries: int
    num_runs: int
    num_params: int
    one_run: OneRun
    one_shot: OneShot
    estimate: float
    cosines: npt.NDArray[np.float64]
    took_part: npt.NDArray[np.bool_]

    @property
    def lower_bound(self) -> float:
        """At the claim's delta: the larger of two bounds that leave half of the doubt each."""
        return self.levels[0].proved

    @property
    def is_broken(self) -> bool:
        """Whether the mechanism does not keep the claim, with the stated confidence."""
        return any(level.is_broken for level in self.levels)

    @property
    def verdict(self) -> str:
        """One sentence."""
        level = next((level for level in self.levels if level.is_broken), self.levels[0])
        said = (
            f"with {self.confidence:.0%} confidence epsilon is at least {level.proved:.3g} at delta {level.delta:.0e}, "
            f"for which {level.claimed:.3g} is claimed"
        )
        if self.is_broken:
            return (
                f"the claim is broken: {said}; something between clip, weights, sampling and noise is not what the "
                "accounting takes it for"
            )
        return f"consistent with the claim: {said}; an attack that finds nothing proves nothing"

    def as_json(self) -> dict[str, Any]:
        """Numbers and names, for ``audit.json``."""
        return {
            "claimed": asdict(self.claim),
            "levels": [asdict(level) for level in self.levels],
            "confidence": self.confidence,
            "lower_bound": self.lower_bound,
            "estimate": self.estimate if math.isfinite(self.estimate) else None,
            "broken": self.is_broken,
            "verdict": self.verdict,
            "num_rounds": self.num_rounds,
            "num_canaries": self.num_canaries,
            "num_runs": self.num_runs,
            "num_params": self.num_params,
            "one_run": asdict(self.one_run),
            "one_shot": asdict(self.one_shot),
        }


def audit(
    federation: Federation,
    population: Population,
    schedule: Schedule,
    *,
    num_canaries: int = 1000,
    num_rounds: int | None = None,
    seed: int = 0,
    confidence: float = CONFIDENCE,
    holdout: float | None = None,
    start_from: Any = None,
    on_run: Callable[[int, int], None] | None = None,
) -> Audit:
    """Attack a federation that adds noise, over ``num_rounds`` of its schedule (all of them by default).

    Half of the canaries take part, by coins from ``seed``. Where the model's vector is short they would drown each
    other: they are spread over several runs. ``on_run(done, of)`` is called after each.

    Raises ``InputError`` for a federation without noise of the server's, and ``CheckError`` for one that does not fit
    together.

    >>> import hansa
    >>> rows = Dataset(np.eye(4, 199, dtype=np.float32), np.array([0, 1, 0, 1]))
    >>> private = Federation(
    ...     learner=hansa.LinearLearner(num_features=199, num_classes=2),
    ...     algorithm=hansa.FedAvg(client_learning_rate=0.1),
    ...     transforms=(hansa.Clip(norm=1.0), hansa.GaussianNoise(epsilon=4, delta=1e-5)),
    ...     aggregator=hansa.Mean(weighting="clients"),
    ... )
    >>> audit(private, Population({"a": rows, "b": rows}), Schedule(num_rounds=3), num_canaries=50).is_broken
    False
    """
    if noise_of(federation) is None:
        raise InputError(
            "audit: expected a federation that adds noise, found none: its epsilon is infinite, and there is no claim "
            "to attack; hansa audit APP --show leaks shows what leaks"
        )
    if federation.is_locally_private or federation.adds_distributed_noise:
        raise InputError(
            "audit: expected noise that the server adds, found noise of the clients' own: canaries, which are clients, "
            "would add none; hansa audit APP --show leaks shows what the server sees"
        )
    if num_canaries < 2 * _FEWEST:
        raise InputError(f"--canaries: expected {2 * _FEWEST} or more, found {num_canaries}; 1000 is a good number")
    rounds = schedule.num_rounds if num_rounds is None else num_rounds
    if not 1 <= rounds <= schedule.num_rounds:
        raise InputError(f"--rounds: expected 1 to the schedule's {schedule.num_rounds}, found {rounds}")
    refuse_unfit(federation, schedule, len(population))
    own = bound(federation, schedule, len(population))
    noise = noise_of(own)
    delta = _DELTA if noise.delta is None else noise.delta
    counted = tuple(Counter(planned(noise, schedule, len(population))[:rounds]).items())
    trial = _Trial(own, population, schedule, rounds, Key.of(seed).child("audit"), holdout, start_from)
    sizes = trial.sizes(num_canaries)
    found = []
    for number, size in enumerate(sizes):
        found.append(trial.run(number, size))
        if on_run:
            on_run(number + 1, len(sizes))
    scores, took_part = (np.concatenate(parts) for parts in zip(*found, strict=True))
    each = 1 - (1 - confidence) / 2
    one_run = one_run_bound(scores, took_part, delta, each)
    shots = [one_shot_bound(scores[took_part], trial.num_params, at, each) for at in (delta, *_above(delta))]
    claims = [_claim(counted, delta, _FINE), *(_claim(counted, at, _COARSE) for at in _above(delta))]
    levels = [
        Level(delta=claim.delta, claimed=claim.epsilon, proved=shot.epsilon)
        for claim, shot in zip(claims, shots, strict=True)
    ]
    levels[0] = replace(levels[0], proved=max(one_run.epsilon, shots[0].epsilon))
    return Audit(
        claim=claims[0],
        levels=tuple(levels),
        confidence=confidence,
        num_rounds=rounds,
        num_canaries=num_canaries,
        num_runs=len(sizes),
        num_params=trial.num_params,
        one_run=one_run,
        one_shot=shots[0],
        estimate=one_shot_estimate(scores[took_part], trial.num_params, delta),
        cosines=scores * math.sqrt(trial.num_params),
        took_part=took_part,
    )


def _above(delta: float) -> list[float]:
    return [large for large in _LARGE if large > delta]


@lru_cache(maxsize=64)
def _claim(counted: Counted, delta: float, interval: float) -> Cost:
    """Epsilon of events, each so many times."""
    return events.cost(dict(counted), delta, interval=interval)


class _Trial:
    """Runs of a bound federation with canaries among its clients."""

    def __init__(
        self,
        own: Federation,
        population: Population,
        schedule: Schedule,
        num_rounds: int,
        key: Key,
        holdout: float | None,
        start_from: Any,
    ) -> None:
        self.own, self.population, self.schedule, self.num_rounds = own, population, schedule, num_rounds
        self._key, self._load, self._start_from = key, Source(population, holdout), start_from
        self.num_params: int = own.update_size() or own.learner.layout.num_params

    def sizes(self, num_canaries: int) -> list[int]:
        """Canaries of each run: so few that together they add at most an eighth to the noise."""
        multiplier = getattr(noise_of(self.own), "noise_multiplier", None) or 1.0
        most = max(_FEWEST, int(self.num_params / 4 * min(1.0, multiplier**2)))
        num_runs = math.ceil(num_canaries / most)
        return [len(part) for part in np.array_split(np.arange(num_canaries), num_runs)]

    def run(self, number: int, num_canaries: int) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_]]:
        """The cosines of one run's canaries, and which of them took part."""
        key = self._key.child("run", number)
        ids = tuple(f"hansa canary {i}" for i in range(num_canaries))
        took_part = key.child("coins").generator().integers(0, 2, num_canaries).astype(bool)
        directions = Directions(key.child("canaries"), num_canaries=num_canaries, num_params=self.num_params)
        observed = Observed()
        federation = self._with(Canaries(self.own.algorithm, ids, directions, self._scale(), observed))
        out = frozenset(client for client, came in zip(ids, took_part, strict=True) if not came)
        everyone = (*self.population.ids, *ids)
        site = InProcess().open(federation, self._rows(ids), key.child("secrets"), keep=True)
        try:
            Loop(
                federation=federation,
                schedule=self._schedule(out, observed),
                runtime=site,
                key=key,
                clients=lambda: everyone,
                params=initial_params(self.own, key, self._start_from),
            ).run()
        finally:
            site.close()
        if not observed.releases:
            return np.zeros(num_canaries), took_part
        return cosines(observed, directions), took_part

    def _with(self, canaries: Canaries) -> Federation:
        """The federation with canaries, and without what stops or describes a run."""
        transforms = tuple(_unstopped(transform) for transform in self.own.transforms)
        tap = Tap(ids=frozenset(canaries.ids), aggregator=self.own.aggregator, observed=canaries.observed)
        known = hasattr(self.own.aggregator, "fold") and not any(_decodes(t) for t in transforms)
        return replace(self.own, algorithm=canaries, transforms=(*transforms, *((tap,) if known else ())))

    def _scale(self) -> float:
        """A canary's length: of one record at most where records are hidden, else so long that the clip must cut."""
        transforms = self.own.transforms
        of_records = any(getattr(transform, "bounds_records", False) for transform in transforms)
        return (1.0 if of_records else _LONG) * chain.norm_bound(
            transforms, [t.settings(t.init(self.num_params)) for t in transforms]
        )

    def _schedule(self, out: frozenset[Client], observed: Observed) -> Schedule:
        size, count = self.schedule.num_counted(len(self.population)), len(self.population)
        sampler = WithCanaries(self.schedule.sampler, count, size, out, observed)
        return Schedule(num_rounds=self.num_rounds, sampler=sampler, evaluate_every=self.num_rounds + 1)

    def _rows(self, ids: tuple[Client, ...]) -> Callable[[Client], Pair]:
        """Everybody's own rows; canaries have none."""
        canaries, first = frozenset(ids), self._load(self.population.ids[0])[0]
        empty: Dataset = first.take([])
        return lambda client: (empty, None) if client in canaries else self._load(client)


def _unstopped(transform: Any) -> Any:
    """A noise transform without the budget that would stop a run, and without a delta to state epsilon at."""
    named = {field.name for field in fields(transform)} if getattr(transform, "adds_noise", False) else set()
    changes = {name: None for name in ("budget", "delta") if name in named}
    return replace(transform, **changes) if changes else transform


def _decodes(transform: Any) -> bool:
    """Whether sums must be decoded before they are values of the model."""
    return getattr(type(transform), "decode", None) is not chain.Transform.decode


__all__ = ["CONFIDENCE", "Audit", "audit"]
