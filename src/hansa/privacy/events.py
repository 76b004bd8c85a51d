"""What was released, as data: a noise says what it does, a ledger keeps it, the accountant says what it costs.

An event is one release of one sum. It holds numbers and names only, so that it can lie in a database, travel in a plan
and be read by another version. ``releases`` is the one place that knows how events compose.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from hansa.core.errors import InputError
from hansa.privacy import accountant
from hansa.privacy.accountant import (
    Cost,
    Everyone,
    FixedSizeSampling,
    Neighbours,
    PoissonSampling,
    Release,
    Sampling,
    Turn,
)
from hansa.privacy.matrix_mechanism import Mechanism

_SAMPLINGS: Mapping[str, type[Any]] = {
    "everyone": Everyone, "poisson": PoissonSampling, "fixed size": FixedSizeSampling, "turn": Turn
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class GaussianEvent:
    """A sum with fresh Gaussian noise of standard deviation ``noise_multiplier * sensitivity``.

    >>> event_of(as_json(GaussianEvent(noise_multiplier=1.0, sampling=PoissonSampling(0.1))))
    GaussianEvent(noise_multiplier=1.0, sampling=PoissonSampling(rate=0.1))
    """

    noise_multiplier: float
    sampling: Sampling = field(default_factory=Everyone)

    def __post_init__(self) -> None:
        if not (math.isfinite(self.noise_multiplier) and self.noise_multiplier > 0):
            raise InputError(f"GaussianEvent(noise_multiplier=): expected above 0, found {self.noise_multiplier}")


@dataclass(frozen=True, kw_only=True)
class MatrixEvent:
    """One round of a run whose releases are one Gaussian mechanism, of ``noise_multiplier`` for all of them.

    >>> from hansa.privacy.strategies import Tree
    >>> mechanism = Mechanism(strategy=Tree(), num_rounds=4, min_separation=2)
    >>> event = MatrixEvent(mechanism=mechanism, noise_multiplier=1.0, round=3, sampling=Turn(1, 2))
    >>> event_of(as_json(event)) == event
    True
    """

    mechanism: Mechanism
    noise_multiplier: float
    round: int
    sampling: Sampling = field(default_factory=Everyone)

    def __post_init__(self) -> None:
        if not (math.isfinite(self.noise_multiplier) and self.noise_multiplier > 0):
            raise InputError(f"MatrixEvent(noise_multiplier=): expected above 0, found {self.noise_multiplier}")


Event = GaussianEvent | MatrixEvent
_KINDS: Mapping[str, type[Any]] = {"gaussian": GaussianEvent, "matrix": MatrixEvent}


Events = Iterable[Event] | Mapping[Event, int]  # one by one, or how often each


def releases(events: Events) -> list[Release]:
    """What one unit pays for at most, for the accountant.

    The rounds of a matrix mechanism are one release, the i-th of them its i-th row. One that was released again, with
    other noise, counts all of them again.
    """
    found: list[Release] = []
    runs: dict[tuple[Mechanism, float], list[tuple[int, int | None, int]]] = {}
    for event, times in Counter(events).items():
        if isinstance(event, MatrixEvent):
            rows = runs.setdefault((event.mechanism, event.noise_multiplier), [])
            rows.append((event.round, _group(event), times))
        else:
            found.append(Release(noise_multiplier=event.noise_multiplier, times=times, sampling=event.sampling))
    for (mechanism, noise_multiplier), rows in runs.items():
        times_of, groups = Counter[int](), dict[int, int | None]()
        for number, group, times in rows:
            times_of[number] += times
            groups[number] = group if groups.get(number, group) == group else None
        part = mechanism.sensitivity_of(tuple(groups[number] for number in sorted(groups))) / mechanism.sensitivity
        found.append(Release(noise_multiplier=noise_multiplier / part, times=max(times_of.values())))
    return found


def _group(event: MatrixEvent) -> int | None:
    """Whose turn it was, of the groups that the mechanism was planned for; None: it could be anybody."""
    turn = event.sampling
    if isinstance(turn, Turn) and turn.num_groups == event.mechanism.min_separation:
        return turn.group
    return None


def neighbours_of(events: Events) -> Neighbours:
    """The neighbouring relation that holds for all of them: only a coin of one's own hides that one is there."""
    if any(isinstance(event.sampling, FixedSizeSampling) for event in events):
        return "replace one"
    sampled = [isinstance(event.sampling, PoissonSampling) for event in events]
    return "add or remove one" if sampled and all(sampled) else "zero out one"


def cost(events: Events, delta: float, **options: Any) -> Cost:
    """The epsilon of events together at ``delta``, by the neighbours that hold for them unless others are given.

    >>> print(cost([GaussianEvent(noise_multiplier=2.0)] * 4, 1e-5))
    epsilon 4.377 at delta 1.0e-05 (neighbours: zero out one; exact)
    """
    return accountant.cost(releases(events), delta, **{"neighbours": neighbours_of(events), **options})


def calibrated(planned: Mapping[Event, int], epsilon: float, delta: float, **options: Any) -> float:
    """The least noise multiplier with which the events of a whole run, each so often, keep to (epsilon, delta).

    >>> round(calibrated({GaussianEvent(noise_multiplier=1.0): 100}, 8.0, 1e-5), 2)
    6.0
    """

    def with_noise(noise_multiplier: float) -> list[Release]:
        return releases({replace(e, noise_multiplier=noise_multiplier): times for e, times in planned.items()})

    return accountant.calibrated(with_noise, epsilon, delta, **{"neighbours": neighbours_of(planned), **options})


def as_json(event: Event) -> dict[str, Any]:
    """An event as numbers and names."""
    kind = next(name for name, known in _KINDS.items() if isinstance(event, known))
    found = {"kind": kind, **vars(event)}
    if isinstance(event, MatrixEvent):
        found["mechanism"] = event.mechanism.as_json()
    sampling = next(name for name, known in _SAMPLINGS.items() if isinstance(event.sampling, known))
    return {**found, "sampling": {"kind": sampling, **asdict(event.sampling)}}


def event_of(found: Mapping[str, Any]) -> Event:
    """The event that ``as_json`` wrote; ``InputError`` for anything else."""
    try:
        fields = {name: value for name, value in found.items() if name != "kind"}
        sampling = dict(fields.pop("sampling"))
        if "mechanism" in fields:
            fields["mechanism"] = Mechanism.of_json(fields["mechanism"])
        event: Event = _KINDS[found["kind"]](sampling=_SAMPLINGS[sampling.pop("kind")](**sampling), **fields)
        return event
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise InputError(f"privacy event: expected one of hansa's, found {found!r} ({error})") from error


def with_sampling(event: Event, sampling: Sampling) -> Event:
    """The event, with how its clients were drawn."""
    return replace(event, sampling=sampling)


__all__ = [
    "Event",
    "Events",
    "GaussianEvent",
    "MatrixEvent",
    "as_json",
    "calibrated",
    "cost",
    "event_of",
    "neighbours_of",
    "releases",
    "with_sampling",
]
