"""What a schedule means for privacy: noise sized for the planned rounds, each release in the ledger, epsilon so far."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

from hansa.core import round as core
from hansa.core.errors import RunError
from hansa.core.key import Key
from hansa.core.protocols import Aggregate, Plan, Updates
from hansa.core.round import Context, ServerState
from hansa.core.tasks import Parts
from hansa.federation import Federation
from hansa.local_training import DPSGD
from hansa.privacy import events
from hansa.privacy.accountant import Everyone, Neighbours, PoissonSampling, Release, Sampling, Turn, calibrated, cost
from hansa.privacy.events import Event, RecordBudgetEvent, SkellamEvent
from hansa.privacy.ledger import Entry, Ledger
from hansa.training.distributed_privacy import shared_out
from hansa.training.local_privacy import record_noise
from hansa.training.schedule import Schedule

Combine = Callable[..., tuple[ServerState, Aggregate]]
Counted = tuple[tuple[Event, int], ...]  # events, and how often each
_FINE, _COARSE = (
    1e-4,
    1e-3,
)  # intervals of privacy losses; the coarse ones are within a thousandth, and ten times faster
_GROWTH = 1.1


def noise_of(federation: Federation) -> Any:
    """What adds noise: the transform that does, or the clients' DP-SGD, or None."""
    found = next((t for t in federation.transforms if getattr(t, "adds_noise", False)), None)
    for kind in ("adds_local_noise", "adds_distributed_noise"):
        found = found or next((t for t in federation.transforms if getattr(t, kind, False)), None)
    return found or record_noise(federation)


def bound_locally(federation: Federation, schedule: Schedule) -> Federation:
    """The federation with clients' own noise sized for the planned rounds: each client does this for itself."""
    federation = _grouped(federation)
    optimizer = getattr(federation.algorithm, "client_optimizer", None)
    if isinstance(optimizer, DPSGD) and optimizer.epsilon is not None:
        sized = replace(optimizer, num_rounds=schedule.num_rounds)
        algorithm = replace(federation.algorithm, client_optimizer=sized)
        return replace(federation, algorithm=algorithm)
    transforms = tuple(_sized_locally(t, schedule) for t in shared_out(federation).transforms)
    return federation if transforms == federation.transforms else replace(federation, transforms=transforms)


def bound(federation: Federation, schedule: Schedule, num_clients: int) -> Federation:
    """The federation as this schedule runs it: noise calibrated, the mean's denominator the expected cohort.

    A mean without noise keeps its own denominator, the weights that come.
    """
    is_own = federation.is_locally_private or federation.adds_distributed_noise
    federation = bound_locally(federation, schedule) if is_own else _grouped(federation)
    if not any(getattr(t, "adds_noise", False) for t in federation.transforms):
        return federation
    transforms = tuple(
        _calibrated(_planned(t, schedule), schedule, num_clients) if getattr(t, "adds_noise", False) else t
        for t in federation.transforms
    )
    aggregator: Any = federation.aggregator
    if hasattr(aggregator, "denominator") and aggregator.denominator is None:
        largest = 1.0 if aggregator.weighting == "clients" else aggregator.max_weight
        if largest is not None:
            aggregator = replace(aggregator, denominator=_expected(schedule, num_clients) * largest)
    return replace(federation, transforms=transforms, aggregator=aggregator)


def _grouped(federation: Federation) -> Federation:
    """The federation with secure sums in groups, where its updates are very long: a rule that both sides know."""
    sized = getattr(federation.aggregator, "sized", None)
    return federation if sized is None else replace(federation, aggregator=sized(federation.learner.layout.num_params))


def min_separation(schedule: Schedule) -> int:
    """A client that takes part in round t is in none before t + this, as far as the sampler sees to it."""
    return schedule.num_groups if schedule.buffer is None else 1


def sampling_of(schedule: Schedule, num_clients: int, number: int) -> Sampling:
    """How a round's clients are drawn, as far as privacy may count on it.

    Only a sampler that tosses a coin a client amplifies, and only where nobody's coming displaces another: not in a
    round that counts the first of many, and not in a buffer. One that lets groups take turns bounds how often a client
    takes part. All else earns nothing.
    """
    sampler = schedule.sampler
    if hasattr(sampler, "turn") and schedule.buffer is None:
        return Turn(*sampler.turn(number))
    if hasattr(sampler, "rate") and schedule.buffer is None and not schedule.selects_more:
        rate = sampler.rate(min(schedule.cohort_size or num_clients, num_clients), num_clients)
        return PoissonSampling(rate) if rate < 1 else Everyone()
    return Everyone()


def coming(noise: Any, schedule: Schedule, num_clients: int, number: int) -> Event:
    """What round ``number`` will release, with ``num_clients`` to draw from."""
    event: Event = noise.event(number, schedule.num_rounds)
    sampling = sampling_of(schedule, num_clients, number)
    if (_is_local(event) or isinstance(event, SkellamEvent)) and not isinstance(sampling, Turn):
        sampling = Everyone()  # the server sees who reports: no chance hides it
    return events.with_sampling(event, sampling)


def planned(noise: Any, schedule: Schedule, num_clients: int) -> list[Event]:
    """What every round of the schedule will release."""
    return [coming(noise, schedule, num_clients, number) for number in range(schedule.num_rounds)]


class Accounts:
    """A run's privacy as it goes: entries for the ledger, epsilon so far, and whether another round is affordable.

    Without noise there is nothing to note, and every round is affordable.
    """

    def __init__(self, federation: Federation, schedule: Schedule, ledger: Ledger) -> None:
        self.noise, self.schedule, self.ledger = noise_of(federation), schedule, ledger
        self._plan: tuple[int, Counter[Event]] | None = None

    def noting(self, combine: Combine | None, *, number: int, attempt: int, num_clients: int) -> Combine | None:
        """What takes the place of ``combine`` (None: the core's): the same, once the release is in the ledger."""
        if self.noise is None:
            return combine
        event = coming(self.noise, self.schedule, num_clients, number)
        if _is_local(event):  # clients release by reporting, even in an attempt that comes to nothing
            if attempt and not self._affords(event, number, attempt, num_clients):
                raise RunError(f"round {number}: another attempt would cost clients more than epsilon; begin anew")
            self.ledger.add(self._local_entry(event, number, attempt))
            return combine

        def noted(
            parts: Parts,
            state: ServerState,
            groups: Sequence[tuple[Plan, Updates]],
            scales: Sequence[float],
            secret: Key,
            context: Context,
        ) -> tuple[ServerState, Aggregate]:
            clients = [client for _, block in groups for client in block.clients]
            self.ledger.add(Entry.of("train", number, attempt, secret, clients, event))
            return (combine or core.combine)(parts, state, groups, scales, secret, context)

        return noted

    def spent(self, num_clients: int) -> dict[str, Any]:
        """Epsilon and delta of all that the ledger holds, for a row of the history.

        Where clients are sampled, a row on the way says what up to a tenth more such rounds cost: an exact figure takes
        half a second. That of the last planned round is exact.
        """
        if self.noise is None or self.noise.delta is None:
            return {"epsilon": None, "delta": None}
        counted, interval = Counter(self.ledger.counted), _FINE
        for event, times in self.ledger.counted.items():
            if not isinstance(event.sampling, PoissonSampling):
                continue
            most = self._foreseen(num_clients)[event]
            if times != most:
                step = math.ceil(_GROWTH ** math.ceil(round(math.log(times, _GROWTH), 9)))
                counted[event] = min(step, most) if times < most else times
                interval = interval if counted[event] == most else _COARSE
        return {"epsilon": _cost(counted, self.noise.delta, interval), "delta": self.noise.delta}

    def has_room(self, number: int, num_clients: int) -> bool:
        """Whether round ``number`` keeps to the noise's budget, if it has one."""
        if self.noise is None or self.noise.budget is None:
            return True
        return self._affords(coming(self.noise, self.schedule, num_clients, number), number, 0, num_clients)

    def _affords(self, event: Event, number: int, attempt: int, num_clients: int) -> bool:
        """Whether a release more keeps to the budget; one that is in the ledger already, after a crash, is none."""
        if self.noise.budget is None:
            return True
        if _is_local(event) and self._local_entry(event, number, attempt) in self.ledger.entries:
            return True
        then = Counter(self.ledger.counted)
        then[event] += 1
        if not any(isinstance(event.sampling, PoissonSampling) for event in then):
            return self._keeps(then)  # a closed form
        foreseen = self._foreseen(num_clients)
        whole = foreseen if then <= foreseen else then  # where the whole run is affordable, so is its beginning
        if self._keeps(whole):
            return True
        return whole is not then and self._keeps(then)

    def _local_entry(self, event: Event, number: int, attempt: int) -> Entry:
        """The entry of all reports of an attempt, whose noise comes from secrets that the server does not know."""
        own = Key.of(f"clients' own noise in round {number}, attempt {attempt}")
        return Entry.of("train", number, attempt, own, (), event)

    def _keeps(self, counted: Counter[Event]) -> bool:
        budget: float = self.noise.budget
        return _cost(counted, self.noise.delta, _COARSE) <= budget * (1 + 1e-6)

    def _foreseen(self, num_clients: int) -> Counter[Event]:
        """The events of the whole schedule."""
        if self._plan is None or self._plan[0] != num_clients:
            self._plan = num_clients, Counter(planned(self.noise, self.schedule, num_clients))
        return self._plan[1]


def _planned(noise: Any, schedule: Schedule) -> Any:
    """Noise whose rounds depend on each other, made for this schedule."""
    if not hasattr(noise, "planned_for"):
        return noise
    return noise.planned_for(schedule.num_rounds, min_separation(schedule))


def _expected(schedule: Schedule, num_clients: int) -> float:
    """How many updates a mean is of: a cohort, or where everybody whose turn it is takes part, a group's mean size."""
    if schedule.cohort_size is None and schedule.buffer is None:
        return max(1.0, num_clients / schedule.num_groups)
    return schedule.num_counted(num_clients)


def _is_local(event: Event) -> bool:
    """Whether clients release it, by reporting."""
    return getattr(event, "unit", "client") != "client"


def _calibrated(noise: Any, schedule: Schedule, num_clients: int) -> Any:
    """Noise with a multiplier: its own, or the least that keeps epsilon and delta over the planned rounds."""
    if noise.noise_multiplier is not None or noise.epsilon is None or noise.delta is None:
        return noise
    template = Counter(planned(replace(noise, epsilon=None, noise_multiplier=1.0), schedule, num_clients))
    if any(isinstance(event, SkellamEvent) for event in template):
        return replace(noise, epsilon=None, noise_multiplier=_in_shares(noise, template), budget=noise.epsilon)
    found = _multiplier(tuple(template.items()), noise.epsilon, noise.delta)
    return replace(noise, epsilon=None, noise_multiplier=found, budget=noise.epsilon)


def _in_shares(noise: Any, template: Counter[Event]) -> float:
    """The least multiplier of noise whose grid depends on it: more noise takes larger steps."""

    def released(noise_multiplier: float) -> list[Release]:
        one = replace(noise, epsilon=None, noise_multiplier=noise_multiplier).event(0, template.total())
        return events.releases({events.with_sampling(one, e.sampling): times for e, times in template.items()})

    neighbours = events.neighbours_of(template)
    return calibrated(released, noise.epsilon, noise.delta, neighbours=neighbours, tolerance=1e-6)


def _sized_locally(transform: Any, schedule: Schedule) -> Any:
    """A client's own noise, calibrated, with the number of rounds beyond which the client does not report."""
    is_shared = getattr(transform, "adds_distributed_noise", False) and transform.num_noising is not None
    if not (is_shared or getattr(transform, "adds_local_noise", False)):
        return transform
    sized = _calibrated(transform, schedule, 1)
    return sized if sized is transform else replace(sized, num_rounds=schedule.num_rounds)


@lru_cache(maxsize=64)
def _multiplier(counted: Counted, epsilon: float, delta: float) -> float:
    """The least noise multiplier for a run of these events."""
    return events.calibrated(dict(counted), epsilon, delta, interval=_COARSE, tolerance=1e-6)


def _cost(counted: Counter[Event], delta: float, interval: float) -> float:
    """Epsilon of events, each so many times."""
    if any(isinstance(event, RecordBudgetEvent) for event in counted):
        return events.cost(counted, delta).epsilon
    return _cost_of(tuple(events.releases(counted)), delta, events.neighbours_of(counted), interval)


@lru_cache(maxsize=256)
def _cost_of(released: tuple[Release, ...], delta: float, neighbours: Neighbours, interval: float) -> float:
    return cost(released, delta, neighbours=neighbours, interval=interval).epsilon
