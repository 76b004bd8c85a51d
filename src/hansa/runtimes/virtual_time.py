"""``VirtualTime``: rounds on a simulated clock, without waiting. Who reports when is known before anybody trains.

So only the clients that will count are trained, by another runtime, in blocks as ever; the others cost nothing here.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np

from hansa.core.errors import Abandoned, InputError, RunError
from hansa.core.key import Key
from hansa.core.protocols import Client, Plan, Report, Slot
from hansa.federation import Federation, Pair
from hansa.runtimes.costs import Work, plan_bytes, report_bytes
from hansa.runtimes.devices import DevicePopulation, Devices, chances
from hansa.runtimes.inprocess import InProcess
from hansa.runtimes.learned import Learned
from hansa.runtimes.tally import Tally

_PAUSE_S, _LONGEST_PAUSE_S = 600.0, 48 * 3600.0


@dataclass(frozen=True)
class VirtualTime:
    """Run ``inner``'s rounds on a simulated clock: what would this take on those ``devices``?

    A client takes ``latency + bytes down / download + examples / speed + bytes up / upload``. A round of training
    closes when the schedule's cohort size has reported (``over_selection`` asks more than that), or at ``deadline_s``;
    later reports are wasted, and so is what drop-outs did. Only clients that are online and not still at work are
    asked. With ``Schedule(buffer=Buffered(...))`` rounds are asynchronous. A client that drops out does so at a random
    point of its work; without a deadline a round ends with the last report that still comes.

    Only training takes time: preparations, evaluation and exchanges in which nobody learns are free, as is the
    server's own work. A client downloads every vector of a plan. The result is the inner runtime's, bit for bit,
    whenever the same clients count; the same seed gives the same run.

    >>> VirtualTime(InProcess(block_size=1), devices=Devices(latency_s=2.0)).devices.latency_s
    2.0
    """

    inner: Any = field(default_factory=InProcess)
    devices: DevicePopulation = field(default_factory=Devices.phones, kw_only=True)

    def __post_init__(self) -> None:
        if not callable(getattr(self.inner, "open", None)) or isinstance(self.inner, VirtualTime):
            raise InputError(f"VirtualTime(inner): expected a runtime such as hansa.InProcess(), found {self.inner!r}")
        if not callable(getattr(self.devices, "traits", None)) or isinstance(self.devices, type):
            raise InputError(
                f"VirtualTime(devices=): expected hansa.Devices(...) or hansa.Devices.from_csv(path), "
                f"found {self.devices!r}"
            )

    def open(
        self, federation: Federation, load: Callable[[Client], Pair], key: Key, keep: bool = True
    ) -> VirtualTimeRuntime:
        """The runtime of one run, around the inner one."""
        site = self.inner.open(federation, load, key, keep=keep)
        return VirtualTimeRuntime(site, self.devices, Work(federation, load), key.child("devices"))


class Job(NamedTuple):
    """One client's work on one plan. Jobs are ordered by when they end, then by when they began."""

    due_s: float
    number: int
    client: Client
    slot: Slot
    examples: float  # until it ends
    reports: bool  # False: drops out


class VirtualTimeRuntime:
    """One run on a simulated clock.

    ``goal_clients`` reports close a round (None: all that come), ``deadline_s`` after its start at the latest ("auto":
    learned). In buffered rounds ``concurrency`` clients are at work at any moment, and plans of rounds before
    ``oldest_round`` count no more. ``plans`` are those that somebody is at work on.
    """

    def __init__(self, inner: Any, devices: DevicePopulation, work: Work, key: Key) -> None:
        self.inner, self.devices, self.tally, self.clock_s = inner, devices, Tally(), 0.0
        self.min_clients = 0
        self.goal_clients: int | None = None
        self.deadline_s: float | Literal["auto"] | None = None
        self.concurrency, self.oldest_round = 0, 0
        self.filling: Slot | None = None  # the newest slot of buffered rounds
        self.learned = Learned()
        self.plans: dict[Slot, Plan] = {}
        self._work, self._key = work, key
        self._down: tuple[Slot | None, int] = (None, 0)  # bytes of the newest plan
        self._up: int | None = None  # of one update
        self._num_jobs = 0
        self._started: dict[Slot, list[tuple[tuple[Client, ...], list[Job]]]] = {}
        self._under_way: list[Job] = []  # a heap, of buffered rounds
        self._busy: dict[Client, float] = {}  # until when a client cannot be asked
        self._resting: list[Client] = []  # in the buffer: they may not come twice

    def __str__(self) -> str:
        return f"VirtualTime({self.inner}, devices={self.devices!r})"

    def __getattr__(self, name: str) -> Any:
        """What simulated runtimes keep of their clients (memory, traffic, refusals, ...) is the inner runtime's."""
        if name.startswith("__") or name == "inner":
            raise AttributeError(name)
        return getattr(self.inner, name)

    @property
    def num_rounds(self) -> int:
        """How many rounds are planned, which the inner runtime may want to know."""
        known: int = self.inner.num_rounds
        return known

    @num_rounds.setter
    def num_rounds(self, value: int) -> None:
        self.inner.num_rounds = value

    # ------------------------------------------------------------------------------------------- what a runtime does

    def start(self, plan: Plan, clients: Sequence[Client]) -> None:
        """Hand a plan to its clients; of training, only note when each will be done."""
        if plan.slot.task != "train" or not plan.learn:
            self.inner.start(plan, clients)
            return
        known = self.plans.get(plan.slot)
        self.plans[plan.slot] = plan if known is None else known._replace(variants={**known.variants, **plan.variants})
        self._started.setdefault(plan.slot, []).append((tuple(clients), self._jobs(plan, tuple(clients))))

    def reports(self, slot: Slot) -> Iterator[Report]:
        """A round's reports that came in time, in the inner runtime's order; the clock moves to the round's end."""
        if slot not in self._started:
            yield from self.inner.reports(slot)
            return
        ((cohort, jobs),) = self._started.pop(slot)
        plan, began_s = self.plans.pop(slot), self.clock_s
        deadline_s = self.learned.deadline_s(cohort, slot.attempt) if self.deadline_s == "auto" else self.deadline_s
        counted, self.clock_s = closing(jobs, began_s, self.goal_clients, deadline_s)
        self.tally.rounds += 1
        here = {job.client for job in counted}
        late = [job for job in jobs if job.reports and job.client not in here]
        self._learn(jobs, counted, began_s)
        self._busy = {client: until for client, until in self._busy.items() if until > self.clock_s}
        self._busy |= {job.client: job.due_s for job in late if job.due_s > self.clock_s}
        self._waste(plan, late, [job for job in jobs if not job.reports])
        accepted = 0
        for report in self._trained(plan, cohort, [client for client in cohort if client in here]):
            accepted += len(report.clients)
            yield report
        if accepted < self.min_clients:
            raise Abandoned(f"round {slot.round}: expected {self.min_clients} reports or more, found {accepted}")

    def arrivals(self, count: int, refill: Callable[[int], None]) -> Iterator[Report]:
        """The next ``count`` clients' reports by the simulated clock, trained in blocks, a plan at a time.

        ``refill(n)`` starts ``n`` more clients, as soon as so many are missing; whoever reports at the very moment that
        fills the buffer is replaced after the server's step, with the new model. A client's refusal takes its place.
        """
        self._end_rest()
        for slot in self.plans.keys() - {job.slot for job in self._under_way}:
            del self.plans[slot]
        buffer: dict[Slot, list[Job]] = {}
        waited = 0.0
        while sum(map(len, buffer.values())) < count:
            if not self._under_way or self._under_way[0].due_s > self.clock_s:
                self._refill(refill)
            if not self._under_way:
                if waited >= _LONGEST_PAUSE_S:
                    raise RunError(
                        f"buffered round: expected somebody available within {_LONGEST_PAUSE_S / 3600:g} simulated "
                        "hours, found nobody; look at availability and the population's size"
                    )
                self.wait(_PAUSE_S)
                waited += _PAUSE_S
                continue
            waited, job = 0.0, heapq.heappop(self._under_way)
            self.clock_s = max(self.clock_s, job.due_s)
            if job.reports and job.slot.round >= self.oldest_round:
                buffer.setdefault(job.slot, []).append(job)
                self._resting.append(job.client)
                continue
            del self._busy[job.client]
            gone = ([job], []) if job.reports else ([], [job])
            self._waste(self.plans[job.slot], *gone)
        self.tally.rounds += 1
        for slot in sorted(buffer):
            cohort = tuple(job.client for job in buffer[slot])
            self.tally.examples += sum(job.examples for job in buffer[slot])
            yield from self._trained(self.plans[slot], cohort, cohort, counts_examples=False)

    def settle(self, slot: Slot, counted: Sequence[Client]) -> None:
        """As the inner runtime does; clients that are still at work stay so."""
        self._started.pop(slot, None)
        self.inner.settle(slot, counted)

    def once(self, name: str, make: Callable[[], bytes]) -> Key:
        """As the inner runtime does."""
        secret: Key = self.inner.once(name, make)
        return secret

    # ------------------------------------------------------------------------------------------------- what time adds

    def available(self, clients: Sequence[Client]) -> list[bool]:
        """Who could be asked now: those that are online and not at work."""
        free = [self._busy.get(client, -np.inf) <= self.clock_s for client in clients]
        online: list[bool] = self.devices.online(clients, self.clock_s, self._key).tolist()
        return [a and b for a, b in zip(free, online, strict=True)]

    def of_attempt(self, attempt: int, clients: Sequence[Client], without: Collection[Client]) -> Sequence[Client]:
        """Who could take part in an attempt: the population, ``without`` some."""
        return [client for client in clients if client not in without] if without else clients

    def known(self, clients: Sequence[Client]) -> Sequence[Client]:
        """Whom buffered rounds may draw from: the population."""
        return clients

    def idle(self, clients: Sequence[Client]) -> Sequence[Client]:
        """Whom to score a model on: everyone, as that takes no time here."""
        return clients

    def over_selection(self) -> float:
        """How many times the goal to ask, learned from the rounds before."""
        return self.learned.over_selection()

    @property
    def num_late(self) -> int:
        """Updates so far that came too late to count."""
        return self.tally.late

    def wait(self, seconds: float) -> None:
        """Let time pass."""
        self.clock_s += seconds

    def summary(self) -> dict[str, Any]:
        """What became of everyone so far, for ``run.info["virtual_time"]``."""
        return self.tally.summary(self.clock_s)

    def kept(self) -> dict[str, Any]:
        """What a checkpoint must hold: the inner runtime's, the clock, and whoever is at work on which plan."""
        slots = sorted({job.slot for job in self._under_way})
        return {
            **self.inner.kept(),
            "virtual": {
                "devices": repr(self.devices),
                "clock_s": self.clock_s,
                "num_jobs": self._num_jobs,
                "tally": asdict(self.tally),
                "learned": self.learned.kept(),
                "busy": dict(self._busy),
                "resting": list(self._resting),
                "under_way": [[*job[:3], slots.index(job.slot), *job[4:]] for job in self._under_way],
                "plans": [_packed(self.plans[slot]) for slot in slots],
            },
        }

    def restore(self, kept: Mapping[str, Any]) -> None:
        """Go on from what ``kept`` gave."""
        own = kept.get("virtual", {})
        if own.get("devices") != repr(self.devices):
            raise InputError(
                f"checkpoint: expected one of these devices ({self.devices!r}), found "
                f"{own.get('devices', 'no clock')}; give the same devices, or delete it"
            )
        self.inner.restore({name: value for name, value in kept.items() if name != "virtual"})
        plans = [_unpacked(tree) for tree in own["plans"]]
        self.clock_s, self._num_jobs, self.tally = own["clock_s"], own["num_jobs"], Tally(**own["tally"])
        self.learned.restore(own["learned"])
        self._busy, self._resting = dict(own["busy"]), list(own["resting"])
        self._under_way = [
            Job(due_s, number, client, plans[place].slot, examples, reports)
            for due_s, number, client, place, examples, reports in own["under_way"]
        ]
        self.plans = {plan.slot: plan for plan in plans}

    # --------------------------------------------------------------------------------------------------------- inside

    def _jobs(self, plan: Plan, clients: tuple[Client, ...]) -> list[Job]:
        """When each client that can be asked will be done, or drop out."""
        there = self.available(clients)
        here = tuple(client for client, is_there in zip(clients, there, strict=True) if is_there)
        self.tally.asked += len(clients)
        self.tally.unavailable += len(clients) - len(here)
        if not here:
            return []
        traits, examples = self.devices.traits(here, self._key), self._work(here, plan.slot.round)
        down, up = self._plan_bytes(plan, here[0]), self._update_bytes()
        seconds = traits.latency_s + down / traits.download + examples / traits.examples_per_s + up / traits.upload
        first = self._num_jobs
        self._num_jobs += len(here)
        drawn = chances([self._key.child("drop out", client, first + i) for i, client in enumerate(here)])[:, 0]
        drops = drawn < traits.dropout
        share = np.where(drops, drawn / np.where(drops, traits.dropout, 1.0), 1.0)  # of the work, before it ends
        due, done = (self.clock_s + share * seconds).tolist(), (share * examples).tolist()
        return [Job(due[i], first + i, client, plan.slot, done[i], not bool(drops[i])) for i, client in enumerate(here)]

    def _learn(self, jobs: Sequence[Job], counted: Sequence[Job], began_s: float) -> None:
        """Note who did not answer in time, and where it will be asked for, how long each answer takes.

        Where the goal closed a round, those that were only slower than others are not missing.
        """
        answered = len(counted)
        if self.goal_clients is not None and answered >= self.goal_clients:
            answered = sum(job.reports for job in jobs)
        times = {job.client: job.due_s - began_s for job in jobs if job.reports} if self.deadline_s == "auto" else {}
        if jobs:
            self.learned.note(1 - answered / len(jobs), times)

    def _plan_bytes(self, plan: Plan, client: Client) -> int:
        """Bytes of a plan, found once a slot."""
        if self._down[0] != plan.slot:
            self._down = (plan.slot, plan_bytes(plan, client))
        return self._down[1]

    def _update_bytes(self) -> int:
        """Bytes of one update, found once."""
        if self._up is None:
            federation = self.inner.federation
            self._up = report_bytes(federation, federation.update_size() or federation.learner.layout.num_params)
        return self._up

    def _trained(
        self, plan: Plan, cohort: tuple[Client, ...], clients: Sequence[Client], counts_examples: bool = True
    ) -> Iterator[Report]:
        """The inner runtime's reports of the clients that count."""
        if counts_examples and clients:
            self.tally.examples += float(self._work(tuple(clients), plan.slot.round).sum())
        self.inner.start_some(plan, cohort, clients)
        for report in self.inner.reports(plan.slot):
            self.tally.accepted += len(report.clients)
            self.tally.refused += len(report.refused)
            yield report

    def _refill(self, refill: Callable[[int], None]) -> None:
        """Bring the number of clients at work to ``concurrency``, as far as any are available."""
        missing = self.concurrency - len(self._under_way)
        if missing > 0:
            refill(missing)
        for started in self._started.values():
            for job in (job for _, jobs in started for job in jobs):
                heapq.heappush(self._under_way, job)
                self._busy[job.client] = np.inf
        self._started.clear()

    def _end_rest(self) -> None:
        """Clients whose reports the server has used may be asked again."""
        for client in self._resting:
            self._busy.pop(client, None)
        self._resting = []

    def _waste(self, plan: Plan, late: Sequence[Job], dropped: Sequence[Job]) -> None:
        """Count work and bytes that reached no model: late clients sent theirs all the same."""
        lost = [job.client for job in (*late, *dropped)]
        if not lost:
            return
        before = sum(self.inner.traffic_totals())
        self.inner.traffic.down(plan, lost)
        self.inner.traffic.bodies.count("update", "up", len(late), len(late) * self._update_bytes())
        self.tally.wasted_bytes += sum(self.inner.traffic_totals()) - before
        examples = sum(job.examples for job in (*late, *dropped))
        self.tally.examples += examples
        self.tally.wasted_examples += examples
        self.tally.late += len(late)
        self.tally.dropped += len(dropped)


def closing(jobs: Sequence[Job], now_s: float, goal: int | None, deadline_s: float | None) -> tuple[list[Job], float]:
    """Whose reports count, and when the round ends.

    | who comes | ends | counts |
    |---|---|---|
    | `goal` of them within the deadline | with the last of these | the first `goal` (at one instant: as begun) |
    | fewer | at the deadline | all that came until then |
    | fewer, without a deadline | with the last that comes | all that come |
    """
    coming = sorted(job for job in jobs if job.reports)
    if deadline_s is not None:
        coming = [job for job in coming if job.due_s <= now_s + deadline_s]
    if goal is not None and len(coming) >= goal:
        return coming[:goal], coming[goal - 1].due_s
    if deadline_s is not None and len(coming) < len(jobs):
        return coming, now_s + deadline_s
    return coming, max((job.due_s for job in coming), default=now_s)


def _packed(plan: Plan) -> dict[str, Any]:
    """A plan as a tree for a checkpoint."""
    return {**plan._asdict(), "slot": list(plan.slot), "settings": list(plan.settings), "key": plan.key.material}


def _unpacked(tree: Mapping[str, Any]) -> Plan:
    """The plan again."""
    own = {**tree, "slot": Slot(*tree["slot"]), "settings": tuple(tree["settings"]), "key": Key(tree["key"])}
    return Plan(**own)
