"""What a schedule means for privacy: a fixed denominator, a noise multiplier for the planned rounds, epsilon so far."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hansa.aggregators.mean import Mean
from hansa.federation import Federation
from hansa.privacy import gaussian
from hansa.training.schedule import Schedule
from hansa.transforms.noise import GaussianNoise


def bound(federation: Federation, schedule: Schedule, num_clients: int) -> Federation:
    """The federation as this schedule runs it: noise calibrated, the mean's denominator the expected cohort.

    A mean without noise keeps its own denominator, the weights that come.
    """
    noise = [t for t in federation.transforms if isinstance(t, GaussianNoise)]
    if not noise:
        return federation
    transforms = tuple(_calibrated(t, schedule) if isinstance(t, GaussianNoise) else t for t in federation.transforms)
    aggregator = federation.aggregator
    if isinstance(aggregator, Mean) and aggregator.denominator is None:
        largest = 1.0 if aggregator.weighting == "clients" else aggregator.max_weight
        if largest is not None:
            aggregator = replace(aggregator, denominator=schedule.num_counted(num_clients) * largest)
    return replace(federation, transforms=transforms, aggregator=aggregator)


def spent(federation: Federation, num_rounds: int) -> dict[str, Any]:
    """Epsilon and delta after ``num_rounds`` releases of a bound federation, for a row of the history."""
    noise = [t for t in federation.transforms if isinstance(t, GaussianNoise)]
    if not noise or noise[0].noise_multiplier is None:
        return {"epsilon": None, "delta": None}
    if noise[0].delta is None:
        return {"epsilon": None, "delta": None}
    return {
        "epsilon": gaussian.epsilon(noise[0].delta, noise[0].noise_multiplier, num_rounds),
        "delta": noise[0].delta,
    }


def statement(federation: Federation, num_rounds: int) -> dict[str, Any] | None:
    """What the report says of privacy; None where no noise was added."""
    noise = [t for t in federation.transforms if isinstance(t, GaussianNoise)]
    if not noise:
        return None
    multiplier, cost = noise[0].noise_multiplier, spent(federation, num_rounds)
    figure = (
        f"epsilon {cost['epsilon']:.3g} at delta {cost['delta']:.1g}"
        if cost["epsilon"] is not None
        else "no delta was given, so no epsilon is stated (GaussianNoise(noise_multiplier=, delta=) states one)"
    )
    return {
        "statement": (
            f"Central noise on the mean of clipped updates, noise multiplier {multiplier:.4g}, {num_rounds} rounds: "
            f"{figure}. Unit: one client; neighbours: one client added or removed; no amplification is claimed; "
            "accountant: exact composition of Gaussian mechanisms (Balle and Wang 2018). The server sees each client's "
            "clipped update before the noise."
        ),
        **cost,
    }


def _calibrated(noise: GaussianNoise, schedule: Schedule) -> GaussianNoise:
    """Noise with a multiplier: its own, or the least that keeps epsilon and delta over the planned rounds."""
    if noise.noise_multiplier is not None or noise.epsilon is None or noise.delta is None:
        return noise
    return replace(
        noise, epsilon=None, noise_multiplier=gaussian.noise_multiplier(noise.epsilon, noise.delta, schedule.num_rounds)
    )
