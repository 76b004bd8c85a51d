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
LEAST, MOST = 1e-2, 1e6  # noise multipliers that are counted; less noise than the least is none


class Price(NamedTuple):
    """What one participation releases, and who adds the noise."""

    event: Event
    kept: str  # SERVER or HERE


def priced(federation: Federation, slot: Slot, settings: tuple[Settings, ...]) -> Price | None:
    """The price of a plan in which this client learns; None where no finite price is known.

    None for exact sums (evaluation, preparations), without noise, with several noises, under a mechanism that does not
    say what it releases, and where the chain or the aggregator bounds no client's say.

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
    noises = [one for one in zip(federation.transforms, settings, strict=False) if getattr(one[0], "adds_noise", False)]
    if slot.task != "train" or len(settings) != len(federation.transforms) or len(noises) != 1:
        return None
    try:
        if not (math.isfinite(chain.norm_bound(federation.transforms, settings)) and _bounds_say(federation)):
            return None
        event = _as_told(*noises[0]).event(slot.round, slot.round + 1)
        multiplier = event.noise_multiplier
        is_counted = (
            not isinstance(multiplier, bool) and LEAST <= float(multiplier) <= MOST and events.releases([event])
        )
    except Exception:  # numbers of a stranger's, in methods of the user's own: whatever goes wrong, there is no price
        return None
    if not is_counted:
        return None
    kept = HERE if getattr(noises[0][0], "is_local", False) else SERVER
    return Price(events.with_sampling(event, Everyone()), kept)


def _as_told(noise: Any, settings: Settings) -> Any:
    """The owner's own noise, with the numbers that the plan tells in the place of what they were found for."""
    names = {field.name for field in dataclasses.fields(noise) if field.init}
    told = dict(settings) if isinstance(settings, Mapping) else {}
    changed: dict[str, Any] = {name: None for name in ("epsilon", "budget") if name in names}
    changed |= {name: told[name] for name in names & set(told)}
    return dataclasses.replace(noise, **changed)


def _bounds_say(federation: Federation) -> bool:
    """Whether one client's say in the sum has a bound; a mean's denominator is the server's to fix."""
    aggregator = federation.aggregator
    if math.isfinite(aggregator.sensitivity(1.0)):
        return True
    weighting, largest = getattr(aggregator, "weighting", ""), getattr(aggregator, "max_weight", None)
    return weighting == "clients" or (weighting == "examples" and largest is not None)


__all__ = ["HERE", "LEAST", "MOST", "SERVER", "Price", "priced"]
