"""Federations that keep what they claim, and controls that do not: each is broken in one place only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

import hansa
from hansa.core.key import Key


def federation(num_params: int, *, noise: Any, clip: Any = None, mean: Any = None) -> hansa.Federation:
    """Logistic regression of so many parameters, of clients that train one step."""
    return hansa.Federation(
        learner=hansa.LinearLearner(num_features=num_params - 1, num_classes=2),
        algorithm=hansa.FedAvg(client_learning_rate=0.1, local_steps=1),
        transforms=(clip or hansa.Clip(norm=1.0), noise),
        aggregator=mean or hansa.Mean(weighting="clients"),
    )


def population(num_params: int, num_clients: int = 3) -> hansa.Population:
    """Clients of two rows each."""
    draw = np.random.default_rng(0)
    rows = [draw.normal(size=(2, num_params - 1)).astype(np.float32) for _ in range(num_clients)]
    return hansa.Population({f"c{i}": hansa.Dataset(x, np.array([0, 1])) for i, x in enumerate(rows)})


@dataclass(frozen=True, kw_only=True)
class HalvedNoise(hansa.GaussianNoise):
    """Half of the noise that it says it adds."""

    def release(self, mean: Any, state: Any, sensitivity: float, secret: Key) -> Any:
        return super().release(mean, state, sensitivity / 2, secret)


@dataclass(frozen=True, kw_only=True)
class ReusedNoise(hansa.GaussianNoise):
    """The same noise in every round, as after a replay with an old secret."""

    def release(self, mean: Any, state: Any, sensitivity: float, secret: Key) -> Any:
        return super().release(mean, state, sensitivity, Key.of("old"))


@dataclass(frozen=True, kw_only=True)
class NoClip(hansa.Clip):
    """Claims a bound and does not clip."""

    def encode(self, updates: Any, settings: Any, memory: Any, draws: Any) -> tuple[Any, Mapping[str, Any]]:
        return updates, {}


@dataclass(frozen=True, kw_only=True)
class SkewedMean(hansa.Mean):
    """Claims that a client weighs 1, and lets it weigh 5."""

    def _weighted(self, updates: Any) -> Any:
        return updates._replace(weights=np.minimum(updates.weights, 5.0))


@dataclass(frozen=True, kw_only=True)
class TwiceAsOften(hansa.Poisson):
    """Claims one chance and draws with twice that."""

    def cohort(self, ids: Sequence[str], cohort_size: int, key: Key) -> tuple[str, ...]:
        return super().cohort(ids, 2 * cohort_size, key)


def controls(num_params: int, noise_multiplier: float, delta: float) -> dict[str, hansa.Federation]:
    """The correct mechanism and those that are broken in what they do with updates, by name."""
    options = {"noise_multiplier": noise_multiplier, "delta": delta}
    noise = hansa.GaussianNoise(**options)
    return {
        "correct": federation(num_params, noise=noise),
        "noise halved": federation(num_params, noise=HalvedNoise(**options)),
        "noise re-used": federation(num_params, noise=ReusedNoise(**options)),
        "clip removed": federation(num_params, noise=noise, clip=NoClip(norm=1.0)),
        "weight skew 5": federation(num_params, noise=noise, mean=SkewedMean(weighting="clients")),
    }
