"""What was released, as data: a noise says what it does, a ledger keeps it, the accountant says what it costs.

An event is one release of one sum. It holds numbers and names only, so that it can lie in a database, travel in a plan
and be read by another version. ``releases`` is the one place that knows how events compose.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

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


@dataclass(frozen=True, kw_only=True)
class MatrixPartEvent:
    """A round of such a run that a client took part in, as the client counts it: with what later rounds will release.

    >>> from hansa.privacy.strategies import Tree
    >>> mechanism = Mechanism(strategy=Tree(), num_rounds=4, min_separation=4)
    >>> parts = [MatrixPartEvent(mechanism=mechanism, noise_multiplier=2.0, round=0)]
    >>> print(cost(parts, 1e-5))  # the first round is in as many nodes as any
    epsilon 1.993 at delta 1.0e-05 (neighbours: zero out one; exact)
    """

    mechanism: Mechanism
    noise_multiplier: float
    round: int
    sampling: Sampling = field(default_factory=Everyone)


@dataclass(frozen=True, kw_only=True)
class SkellamEvent:
    """A secure sum to which clients' shares of Skellam noise were added, by as many honest ones as it was sized for.

    The sum's noise has standard deviation ``noise_multiplier`` times the bound on one client's row, which is
    ``norm_steps`` steps of the grid at least. Whoever opens the sum sees who reports: no sampling hides it.

    >>> event = SkellamEvent(noise_multiplier=2.0, norm_steps=1024.0)
    >>> print(cost([event] * 4, 1e-5))
    epsilon 4.753 at delta 1.0e-05 (neighbours: zero out one; Skellam)
    """

    noise_multiplier: float
    norm_steps: float
    sampling: Sampling = field(default_factory=Everyone)

    def __post_init__(self) -> None:
        for name in ("noise_multiplier", "norm_steps"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise InputError(f"SkellamEvent({name}=): expected above 0, found {value}")


@dataclass(frozen=True, kw_only=True)
class LocalEvent:
    """A report that its client made noisy before it left: whatever its data, the report may have come from any other.

    ``noise`` is Gaussian of standard deviation, or Laplace of scale, ``noise_multiplier`` times the bound on one
    report's norm (L2, or L1). Any two reports are twice the bound apart, hence neighbours that replace one.

    >>> event = LocalEvent(noise="laplace", noise_multiplier=8.0)
    >>> print(cost([event] * 4, 0.0))
    epsilon 1 at delta 0.0e+00 (neighbours: replace one; sum)
    """

    noise_multiplier: float
    noise: Literal["gaussian", "laplace"] = "gaussian"
    sampling: Sampling = field(default_factory=Everyone)

    unit = "report"


@dataclass(frozen=True, kw_only=True)
class RecordEvent:
    """``num_steps`` noisy sums of the clipped gradients of one client's records, each with noise of its own.

    >>> print(cost([RecordEvent(noise_multiplier=4.0, num_steps=2)] * 2, 1e-5))
    epsilon 1.993 at delta 1.0e-05 (neighbours: zero out one; exact)
    """

    noise_multiplier: float
    num_steps: int
    sampling: Sampling = field(default_factory=Everyone)

    unit = "record"


@dataclass(frozen=True, kw_only=True)
class RecordBudgetEvent:
    """One round of ``num_rounds`` over which every client keeps its records to (``epsilon``, ``delta``) by itself.

    Each has sized its noise for its own number of records, which nobody else knows; so a part of the rounds is counted
    as all of them, and more rounds than planned, or a smaller delta, are not covered.

    >>> event = RecordBudgetEvent(epsilon=1.0, delta=1e-4, num_rounds=3)
    >>> cost([event], 1e-4).epsilon, cost([event] * 4, 1e-4).epsilon
    (1.0, inf)
    """

    epsilon: float
    delta: float
    num_rounds: int
    sampling: Sampling = field(default_factory=Everyone)

    unit = "record"


Event = GaussianEvent | MatrixEvent | MatrixPartEvent | SkellamEvent | LocalEvent | RecordEvent | RecordBudgetEvent
_KINDS: Mapping[str, type[Any]] = {
    "gaussian": GaussianEvent,
    "matrix": MatrixEvent,
    "matrix part": MatrixPartEvent,
    "skellam": SkellamEvent,
    "local": LocalEvent,
    "record": RecordEvent,
    "record budget": RecordBudgetEvent,
}


Events = Iterable[Event] | Mapping[Event, int]  # one by one, or how often each


def releases(events: Events) -> list[Release]:
    """What one unit pays for at most, for the accountant.

    The rounds of a matrix mechanism are one release, the i-th of them its i-th row. One that was released again, with
    other noise, counts all of them again.
    """
    found: list[Release] = []
    runs: dict[tuple[Mechanism, float], list[tuple[int, int | None, int]]] = {}
    parts: dict[tuple[Mechanism, float], Counter[int]] = {}
    for event, times in Counter(events).items():
        if isinstance(event, MatrixPartEvent):
            parts.setdefault((event.mechanism, event.noise_multiplier), Counter())[event.round] += times
            continue
        if isinstance(event, RecordBudgetEvent):
            raise InputError("releases: expected noise whose size is known, found a client's own; ask for its cost")
        if isinstance(event, MatrixEvent):
            rows = runs.setdefault((event.mechanism, event.noise_multiplier), [])
            rows.append((event.round, _group(event), times))
            continue
        found.append(_release(event, times))
    for (mechanism, multiplier), rounds in parts.items():
        part = mechanism.sensitivity_to(rounds) / mechanism.sensitivity
        found.append(Release(noise_multiplier=multiplier / part, times=max(rounds.values())))
    return found + [_whole(mechanism, multiplier, rows) for (mechanism, multiplier), rows in runs.items()]


def _release(event: GaussianEvent | SkellamEvent | LocalEvent | RecordEvent, times: int) -> Release:
    """The release that an event is which does not hang together with others."""
    release = Release(noise_multiplier=event.noise_multiplier, times=times, sampling=event.sampling)
    if isinstance(event, SkellamEvent):
        return replace(release, noise="skellam", norm_steps=event.norm_steps)
    if isinstance(event, LocalEvent):
        return replace(release, noise=event.noise)
    return replace(release, times=event.num_steps * times) if isinstance(event, RecordEvent) else release


def _whole(mechanism: Mechanism, noise_multiplier: float, rows: Sequence[tuple[int, int | None, int]]) -> Release:
    """The one release that rounds of a matrix mechanism are: (round, whose turn, how often) of each."""
    times_of, groups = Counter[int](), dict[int, int | None]()
    for number, group, times in rows:
        times_of[number] += times
        groups[number] = group if groups.get(number, group) == group else None
    part = mechanism.sensitivity_of(tuple(groups[number] for number in sorted(groups))) / mechanism.sensitivity
    return Release(noise_multiplier=noise_multiplier / part, times=max(times_of.values()))


def _group(event: MatrixEvent) -> int | None:
    """Whose turn it was, of the groups that the mechanism was planned for; None: it could be anybody."""
    turn = event.sampling
    if isinstance(turn, Turn) and turn.num_groups == event.mechanism.min_separation:
        return turn.group
    return None


def neighbours_of(events: Events) -> Neighbours:
    """The neighbouring relation that holds for all of them: only a coin of one's own hides that one is there."""
    if any(isinstance(event, LocalEvent) or isinstance(event.sampling, FixedSizeSampling) for event in events):
        return "replace one"
    sampled = [isinstance(event.sampling, PoissonSampling) for event in events]
    return "add or remove one" if sampled and all(sampled) else "zero out one"


def cost(events: Events, delta: float, **options: Any) -> Cost:
    """The epsilon of events together at ``delta``, by the neighbours that hold for them unless others are given.

    >>> print(cost([GaussianEvent(noise_multiplier=2.0)] * 4, 1e-5))
    epsilon 4.377 at delta 1.0e-05 (neighbours: zero out one; exact)
    """
    counted = Counter(events)
    budgets = {event: times for event, times in counted.items() if isinstance(event, RecordBudgetEvent)}
    if not counted:
        return Cost(epsilon=0.0, delta=delta, neighbours="zero out one", accountant="exact")
    if budgets:
        epsilon = _promised(budgets, len(budgets) == len(counted), delta)
        return Cost(epsilon=epsilon, delta=delta, neighbours="zero out one", accountant="each client's own")
    return accountant.cost(releases(counted), delta, **{"neighbours": neighbours_of(counted), **options})


def _promised(budgets: Mapping[RecordBudgetEvent, int], are_all: bool, delta: float) -> float:
    """What rounds cost of which only the budget of all of them is known; infinite where it does not cover them."""
    (event, times), *others = budgets.items()
    is_covered = are_all and not others and times <= event.num_rounds and delta >= event.delta
    return event.epsilon if is_covered else math.inf


def calibrated(planned: Mapping[Event, int], epsilon: float, delta: float, **options: Any) -> float:
    """The least noise multiplier with which the events of a whole run, each so often, keep to (epsilon, delta).

    >>> round(calibrated({GaussianEvent(noise_multiplier=1.0): 100}, 8.0, 1e-5), 2)
    6.0
    """

    def with_noise(noise_multiplier: float) -> list[Release]:
        return releases({_with_noise(e, noise_multiplier): times for e, times in planned.items()})

    return accountant.calibrated(with_noise, epsilon, delta, **{"neighbours": neighbours_of(planned), **options})


def _with_noise(event: Event, noise_multiplier: float) -> Event:
    return event if isinstance(event, RecordBudgetEvent) else replace(event, noise_multiplier=noise_multiplier)


def as_json(event: Event) -> dict[str, Any]:
    """An event as numbers and names."""
    kind = next(name for name, known in _KINDS.items() if isinstance(event, known))
    found = {"kind": kind, **vars(event)}
    if isinstance(event, MatrixEvent | MatrixPartEvent):
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
    "LocalEvent",
    "MatrixEvent",
    "MatrixPartEvent",
    "RecordBudgetEvent",
    "RecordEvent",
    "SkellamEvent",
    "as_json",
    "calibrated",
    "cost",
    "event_of",
    "neighbours_of",
    "releases",
    "with_sampling",
]
