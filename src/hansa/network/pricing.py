"""What answering a plan costs the owner of the data, by the owner's own copy of the app and the plan's numbers.

A plan tells the settings of each transform, the noise multiplier among them. What is counted is the release of the sum
that this client's update enters, as if the client were in it for certain: whatever the server does about sampling, the
figure holds. Neighbours: the client's update is replaced by zeros.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from hansa.core import chain
from hansa.core.protocols import Settings, Slot
from hansa.federation import Federation
from hansa.privacy import events
from hansa.privacy.accountant import Everyone
from hansa.privacy.events import Event

SERVER, HERE = "promised by the server", "enforced here"
SHARED = "shared by honest clients"
LEAST, MOST = 1e-2, 1e6  # noise multipliers that are counted; less noise than the least is none


class Price(NamedTuple):
    """What one participation releases, and who adds the noise."""

    event: Event
    kept: str  # SERVER, HERE or SHARED


def priced(federation: Federation, slot: Slot, settings: tuple[Settings, ...]) -> Price | None:
    """The price of a plan in which this client learns; None where no finite price is known.

    None for exact sums (evaluation, preparations), without noise, with several noises, for noise that hides a record
    and not the client, under a mechanism that does not say what it releases, for the server's noise where the chain or
    the aggregator bounds no client's say, and for shares of noise where the server would see them one by one. Noise
    that this client adds itself, or its share, is as large as its own copy of the app has it.

    >>> import hansa
    >>> federation = Federation(
    ...     learner=hansa.LinearLearner(num_features=3, num_classes=2),
    ...     algorithm=hansa.FedAvg(client_learning_rate=0.1),
    ...     transforms=(hansa.Clip(norm=1.0), hansa.GaussianNoise(epsilon=4, delta=1e-6)),
    ...     aggregator=hansa.Mean(weighting="clients"),
    ... )
    >>> priced(federation, Slot(0, 0, "update"), (None, {"noise_multiplier": 2.0})).event.noise_multiplier
    2.0
    """
    transforms = federation.transforms
    of_records = any(getattr(transform, "bounds_records", False) for transform in transforms)
    if slot.task != "train" or len(settings) != len(transforms) or of_records:
        return None
    here: list[Any] = [transform for transform in transforms if getattr(transform, "adds_local_noise", False)]
    shared: list[Any] = [transform for transform in transforms if getattr(transform, "adds_distributed_noise", False)]
    there: list[Any] = [
        pair for pair in zip(transforms, settings, strict=True) if getattr(pair[0], "adds_noise", False)
    ]
    try:
        if shared and getattr(federation.aggregator, "reveals_rows", True):
            return None
        if here or shared:  # whatever the server adds or tells
            (noise,) = (*here, *shared)
        else:
            ((noise, told),) = there
            if not (math.isfinite(chain.norm_bound(transforms, settings)) and _bounds_say(federation)):
                return None
            noise = _as_told(noise, told)
        event = noise.part(slot.round, told) if hasattr(noise, "part") else noise.event(slot.round, slot.round + 1)
        amount = event.noise_multiplier
        is_counted = not isinstance(amount, bool) and LEAST <= float(amount) <= MOST and events.releases([event])
    except Exception:  # numbers of a stranger's, in methods of the user's own: whatever goes wrong, there is no price
        return None
    kept = HERE if here else SHARED if shared else SERVER
    return Price(events.with_sampling(event, Everyone()), kept) if is_counted else None


def _as_told(noise: Any, settings: Settings) -> Any:
    """The owner's own noise, with the numbers that the plan tells in the place of what they were found for."""
    names = {field.name for field in dataclasses.fields(noise) if field.init}
    told = dict(settings) if isinstance(settings, Mapping) else {}
    changed: dict[str, Any] = {name: None for name in ("epsilon", "budget") if name in names}
    changed |= {name: told[name] for name in names & set(told) - {"mechanism"}}
    return dataclasses.replace(noise, **changed)


def _bounds_say(federation: Federation) -> bool:
    """Whether one client's say in the sum has a bound; a mean's denominator is the server's to fix."""
    aggregator = federation.aggregator
    if math.isfinite(aggregator.sensitivity(1.0)):
        return True
    weighting, largest = getattr(aggregator, "weighting", ""), getattr(aggregator, "max_weight", None)
    return weighting == "clients" or (weighting == "examples" and largest is not None)


__all__ = ["HERE", "LEAST", "MOST", "SERVER", "SHARED", "Price", "priced"]
