"""Noise that clients add in shares, for a secure sum: sized from both, what does not fit beside it, what to say of it.

A share alone protects next to nothing: what is accounted is the noise of a whole sum. So it takes an aggregator of
which the server, and whoever works with it, learns nothing but sums of so many clients at least.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from hansa.core import chain
from hansa.core.check import Problem
from hansa.core.errors import CheckError
from hansa.federation import Federation
from hansa.training.local_privacy import encode_problems, leak_problems
from hansa.training.schedule import Schedule


def num_noising(aggregator: Any) -> int:
    """The fewest honest clients of a sum that is opened: of ``min_survivors``, all but the ``corrupt`` share.

    >>> import hansa
    >>> num_noising(hansa.SecureMean(min_survivors=50, corrupt=0.1))
    45
    """
    honest = (1.0 - getattr(aggregator, "corrupt", 0.0)) * getattr(aggregator, "min_survivors", 0)
    return math.floor(honest + 1e-9)


def shared_out(federation: Federation) -> Federation:
    """The federation whose distributed noise knows among how many it is shared; as it was where too few are sure."""
    shares = num_noising(federation.aggregator)
    if shares < 1:
        return federation
    transforms: list[Any] = list(federation.transforms)
    for i, transform in enumerate(transforms):
        if getattr(transform, "adds_distributed_noise", False):
            transforms[i] = replace(transform, num_noising=shares)
    return replace(federation, transforms=tuple(transforms))


def distributed_problems(federation: Federation, schedule: Schedule, num_clients: int) -> list[Problem]:
    """What does not fit beside noise in shares, each with the line to paste."""
    if not federation.adds_distributed_noise:
        return []
    name, aggregator = "SkellamNoise", type(federation.aggregator).__name__
    fewest = max(2, math.floor(0.8 * (schedule.cohort_size or schedule.clients_needed)))
    paste = f"aggregator=hansa.SecureMean(min_survivors={fewest})"
    if getattr(federation.aggregator, "reveals_rows", True):
        return [
            Problem(
                f"{name} gives each client a share of a sum's noise, and {aggregator} shows the server each client's "
                "update with that share alone, which hides next to nothing.",
                paste,
            )
        ]
    found = leak_problems(federation, name)
    if num_noising(federation.aggregator) < 1:
        found.append(Problem(f"{name} is sized for the fewest clients of a sum, and {aggregator} names none.", paste))
    cohort = schedule.cohort_size or num_clients
    if _num_groups(federation, cohort) > 1:
        words = f"{name} counts on a share of a sum's clients being honest, and in a random group fewer may be."
        found.append(Problem(words, f"num_groups=1, group_size={cohort}"))
    if schedule.buffer is not None:
        found.append(
            Problem(
                f"{name} sizes noise for updates that count whole, and in a buffer late ones count less.", "no buffer"
            )
        )
    if not getattr(federation.transforms[-1], "adds_distributed_noise", False):
        last = type(federation.transforms[-1]).__name__
        found.append(Problem(f"{last} after {name} moves rows off the grid that noise lies on; put {name} last."))
    return found + encode_problems(federation, _trial)


def coarseness_problems(federation: Federation) -> list[Problem]:
    """Whether the bits of a grid are enough, once the noise is sized."""
    size = federation.update_size() or federation.learner.layout.num_params
    settings = [t.settings(t.init(size)) for t in federation.transforms]
    for i, transform in enumerate(list[Any](federation.transforms)):
        if getattr(transform, "num_noising", None) is not None:
            try:
                transform.refuse_coarse(chain.limits(federation.transforms[:i], settings[:i]), size)
            except CheckError as error:
                return [Problem(sentence) for sentence in error.problems]
    return []


def distributed_facts(federation: Federation, num_released: int, num_shares: int) -> Mapping[str, str]:
    """What a privacy statement says of noise in shares."""
    aggregator: Any = federation.aggregator
    return {
        "title": "Distributed Skellam noise on secure sums of clipped updates",
        "setting": "distributed: each client adds its share of the noise before anything leaves it, and the server "
        f"sees sums of at least {aggregator.min_survivors} clients",
        "unit": "one client, with all its data and all its rounds",
        "noise": f"sized for {num_shares} honest clients: the fewest survivors, {aggregator.min_survivors}, less "
        f"{aggregator.corrupt:.0%} that collude; larger sums have more noise",
        "released": f"{num_released} noisy sums, SkellamNoise: every released model, and all that is made of them",
        "not covered": "who took part, when, and who was lost on the way; more colluding clients in a sum than that; "
        "other runs on the same data add to this",
        "trust": f"It holds against the server itself, if at most {aggregator.corrupt:.0%} of the clients in a sum "
        f"collude with it: the noise of the other {num_shares} is what is accounted.",
    }


def _num_groups(federation: Federation, cohort: int) -> int:
    """How many sums a round opens."""
    aggregator: Any = federation.aggregator
    if not hasattr(aggregator, "terms"):
        return 1
    found: int = aggregator.sized(federation.learner.layout.num_params).terms.groups(cohort)
    return found


def _trial(transform: Any) -> Any:
    """Distributed noise of any size, to see what its client half refuses."""
    if not getattr(transform, "adds_distributed_noise", False):
        return transform
    return replace(transform, epsilon=None, noise_multiplier=1.0, budget=None, num_noising=1, bits=20)


__all__ = ["coarseness_problems", "distributed_facts", "distributed_problems", "num_noising", "shared_out"]
