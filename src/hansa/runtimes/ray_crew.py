"""``RayCrew``: resident Ray actors, and how a plan's parts are handed out among them.

What a worker has done is safe once it is here: the reports of each part come back with it, sums of rows when there is
nothing left to do. Whatever was lost with a worker is done again by others, to the same bits. Ray decides where workers
run and when there is room for one; a part goes to none that has not started.
"""

from __future__ import annotations

import logging
import math
import sys
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from hansa.aggregators.folds import Node, Tree, total
from hansa.core.errors import RunError
from hansa.core.protocols import Client, Memory, Plan, Report, Updates
from hansa.runtimes.blame import first_line, names
from hansa.runtimes.failure import Failed
from hansa.runtimes.hand import Job, Outcome, repeat
from hansa.runtimes.ray_actor import RayWorker, Setup
from hansa.runtimes.ray_cluster import own_modules_travel, put
from hansa.runtimes.shares import Shares
from hansa.runtimes.simulated import SimulatedRuntime
from hansa.runtimes.worker import Done, Part, Worker, blocks_of, parts_of
from hansa.stopwatch import add_worker, is_watched, stage

_LOG = logging.getLogger("hansa")
_TRIES = 3  # of a part whose worker is lost
_PATIENCE_S = 20.0  # for a first worker to start, before the log says what is waited for


class RayCrew:
    """``num_workers`` actors, made when there is work for them and again when one is lost."""

    def __init__(self, ray: Any, worker: Worker, num_workers: int, needs: Mapping[str, float]) -> None:
        self.ray, self.num_workers = ray, num_workers
        self.heard: set[str] = set()  # lines of the workers' logs
        with own_modules_travel(ray):
            self._worker = put(ray, worker, "a federation and a population")
        self._members: list[Member | None] = [None] * num_workers
        own = dict(needs)
        num_cpus, num_gpus = own.pop("CPU"), own.pop("GPU")
        self._setup = Setup(tuple(sys.path), max(1, math.floor(num_cpus)), num_gpus > 0, _LOG.getEffectiveLevel())
        self._actor = ray.remote(num_cpus=num_cpus, num_gpus=num_gpus, resources=own, max_restarts=0)(RayWorker)

    def reports(
        self, home: SimulatedRuntime, plan: Plan, cohort: Sequence[Client], clients: Sequence[Client], width: int
    ) -> Iterator[Report]:
        """A plan's reports from ``clients``, filed with ``home``; all are there when the first one comes."""
        parts = parts_of(cohort, clients, width)
        if parts:
            places = {client: i for i, client in enumerate(cohort)}
            yield from _Round(self, home, plan, parts, places, width).reports()
        else:
            home.traffic.down(plan, clients)

    @property
    def members(self) -> list[Member]:
        """The workers that live, or are about to."""
        return [member for member in self._members if member is not None]

    def at(self, index: int) -> Member | None:
        """A worker, if it lives."""
        return self._members[index]

    def hire(self, index: int) -> Member:
        """A new worker, which starts as soon as Ray has room for it."""
        member = Member(index, self._actor.remote(self._setup))
        member.call("start", [self._worker])
        self._members[index] = member
        return member

    def lose(self, index: int) -> None:
        """Forget a worker, and end it if it is not at its end."""
        member, self._members[index] = self._members[index], None
        if member is not None:
            self.ray.kill(member.actor)

    def close(self) -> None:
        """End all workers at once."""
        for member in self.members:
            self.lose(member.index)


class Call(NamedTuple):
    """Something a worker was asked for: the reference to its answer, and the part it is about, if any."""

    answer: Any
    method: str
    number: int | None = None


class Member:
    """One actor, seen from the simulation. It answers its calls in their order."""

    def __init__(self, index: int, actor: Any) -> None:
        self.index, self.actor = index, actor
        self.calls: deque[Call] = deque()  # not answered yet
        self.has_started = False
        self.unsummed: set[int] = set()  # parts whose sums it holds
        self.plan: object = None  # the round that it was told of

    def call(self, method: str, *arguments: Any, number: int | None = None) -> None:
        """Ask for something, now or when what was asked before is done."""
        self.calls.append(Call(getattr(self.actor, method).remote(*arguments), method, number))

    @property
    def running(self) -> list[int]:
        """Parts that it was given."""
        return [call.number for call in self.calls if call.number is not None]

    @property
    def is_summing(self) -> bool:
        """Whether its sums are due."""
        return any(call.method == "sums" for call in self.calls)


class _Round:
    """One plan's parts, from the first to the last sum."""

    def __init__(
        self,
        crew: RayCrew,
        home: SimulatedRuntime,
        plan: Plan,
        parts: Sequence[Part],
        places: Mapping[Client, int],
        width: int,
    ) -> None:
        self._crew, self._home, self._plan, self._parts, self._width = crew, home, plan, parts, width
        self._places = places
        self._num = min(crew.num_workers, len(parts))
        self._shares = Shares([len(part.clients) for part in parts], self._num)
        self._done: dict[int, Done] = {}
        self._sums: dict[Node, Updates] = {}
        self._deaths: Counter[int] = Counter()  # by the part that a lost worker was doing; below 0: by worker
        self._choices: dict[str, str] = dict(getattr(home.federation.learner, "choices", {}))
        self._deciding: tuple[Member, int] | None = None  # who tries which way is faster, with which part
        self._undecided: list[tuple[Member, int]] = []
        self._letter = [put(crew.ray, plan, "a plan")]
        self._has_waited = False

    def reports(self) -> Iterator[Report]:
        """All reports; workers are ended when this is given up."""
        try:
            self._feed()
            self._home.traffic.down(self._plan, [client for part in self._parts for client in part.clients])
            while not self._is_over():
                with stage("waiting"):
                    self._listen()
                self._feed()
        except BaseException:
            self._crew.close()
            raise
        learner = self._home.federation.learner
        if self._choices and hasattr(learner, "choose"):
            learner.choose(self._choices)
        yield from self._told()

    def _is_over(self) -> bool:
        """Whether every part is done, and every sum here. Who has not started yet is not waited for."""
        return len(self._done) == len(self._parts) and not any(member.unsummed for member in self._crew.members)

    def _feed(self) -> None:
        """Give every worker what it can do now: parts, or the word to send its sums."""
        for index in range(self._num):
            member = self._crew.at(index)
            if member is None:
                if self._shares.left:
                    self._crew.hire(index)
                continue
            while self._takes_more(member) and (number := self._shares.take(index)) is not None:
                self._send(member, number)
            if member.unsummed and not member.calls:
                member.call("sums")

    def _takes_more(self, member: Member) -> bool:
        """Whether a worker may get a part: also a second one, unless others may soon have nothing to do."""
        if not member.has_started or member.is_summing or any(member is other for other, _ in self._undecided):
            return False
        running = len(member.running)
        return not running or (running == 1 and self._shares.left >= 2 * self._num)

    def _send(self, member: Member, number: int, may_choose: bool = False) -> None:
        begin = None if member.plan is self._letter else (self._letter, self._width)
        member.plan = self._letter
        is_last = self._shares.left < self._num  # likely; if not, more sums travel
        member.call("do", self._job(number, may_choose), begin, is_last, number=number)

    def _job(self, number: int, may_choose: bool) -> Job:
        part, memory, scratch = self._parts[number], self._home.memory, self._home.scratch_of(self._plan.slot)
        blocks = list(blocks_of(self._plan, part.clients, self._width))
        return Job(
            number,
            part,
            {client: self._places[client] for client in part.clients},
            {block: memory.rows(block) if self._reads_memory else Memory([{}] * len(block)) for block in blocks},
            {client: scratch[client] for client in part.clients if client in scratch},
            self._choices,
            may_choose,
            is_watched(),
        )

    @property
    def _reads_memory(self) -> bool:
        """Whether clients look at what they remember: to learn, or to score a model of their own."""
        slot = self._plan.slot
        return self._plan.learn and (slot.task == "train" or hasattr(self._home.federation.algorithm, "model"))

    def _listen(self) -> None:
        """Wait until a worker answers or is lost."""
        ray = self._crew.ray
        due = {member.calls[0].answer: member for member in self._crew.members if member.calls}
        is_waiting = not any(member.has_started for member in self._crew.members)
        found, _ = ray.wait(list(due), timeout=_PATIENCE_S if is_waiting else None)
        if not found and not self._has_waited:
            self._has_waited = True
            _LOG.warning("round %d: waits for room for a worker on the Ray cluster", self._plan.slot.round)
        for reference in found:
            member = due[reference]
            try:
                answer = ray.get(reference)
            except ray.exceptions.RayTaskError as error:  # an error of a worker's own is an answer: see RayWorker
                raise RunError(
                    f"expected what a client keeps or sends to travel between processes, found "
                    f"{first_line(error.cause or error)}; use runtime=hansa.InProcess()"
                ) from error
            except ray.exceptions.RayError as error:
                self._lost(member, error)
                continue
            self._hear(member, member.calls.popleft(), answer)

    def _hear(self, member: Member, call: Call, answer: Any) -> None:
        if isinstance(answer, Failed):
            _LOG.info("a worker failed:\n%s", answer.trace)
            raise answer.error()
        if call.method == "start":
            member.has_started = True
            return
        if call.method == "do":
            self._hear_outcome(member, answer.outcome)
            answer = answer.sums
        if answer is not None:
            member.unsummed.clear()
            self._sums.update(answer)

    def _hear_outcome(self, member: Member, outcome: Outcome) -> None:
        repeat(outcome.said, self._crew.heard)
        add_worker(member.index, outcome.seconds)
        if outcome.done is None:
            self._wants_to_choose(member, outcome.number)
            return
        self._choices = {**outcome.choices, **self._choices}
        self._done[outcome.number] = outcome.done
        if outcome.is_summed:
            member.unsummed.add(outcome.number)
        if self._deciding == (member, outcome.number):
            self._decided()

    def _wants_to_choose(self, member: Member, number: int) -> None:
        """Let one worker at a time try which way a learner is faster; the others wait for what it finds."""
        if self._deciding is not None:
            self._undecided.append((member, number))
        else:
            self._deciding = (member, number)
            self._send(member, number, may_choose=True)

    def _decided(self) -> None:
        """Nobody is trying any more: who waited goes on."""
        self._deciding, again, self._undecided = None, self._undecided, []
        for member, number in again:
            self._shares.give_back(member.index, [number])

    def _lost(self, member: Member, error: Exception) -> None:
        """A worker is gone: what it was doing, and what it had summed, is to be done again."""
        running, how = member.running, _how(error)
        waiting = [number for other, number in self._undecided if other is member]
        self._undecided = [pair for pair in self._undecided if pair[0] is not member]
        again = sorted({*running, *waiting, *member.unsummed})
        self._crew.lose(member.index)
        if member.index < self._num:
            self._shares.give_back(member.index, again)
        if self._deciding is not None and self._deciding[0] is member:
            self._decided()
        for part in again:
            self._done.pop(part, None)
        number, count = self._plan.slot.round, sum(len(self._parts[part].clients) for part in again)
        _LOG.warning("round %d: a worker was lost (%s); the work of %d clients is done again", number, how, count)
        blamed = running[0] if running else ~member.index
        self._deaths[blamed] += 1
        if self._deaths[blamed] >= _TRIES:
            doing = "adding up" if member.has_started else "starting"
            who = names(self._parts[blamed].clients) if running else doing
            raise RunError(
                f"round {number}: {who}: expected a worker to do this part, found that {_TRIES} of them were lost "
                f"({how}), as happens where memory runs out; give Ray fewer num_workers or a smaller block_size"
            )

    def _told(self) -> Iterator[Report]:
        """The reports in the order of the cohort, sums as one."""
        slot = self._plan.slot
        clients, refused = list[Client](), dict[Client, str]()
        is_summed = False
        for number in range(len(self._parts)):
            for report in self._home.take(slot, self._done.pop(number)):
                if report.payload is None:
                    is_summed = True
                    clients += report.clients
                    refused |= report.refused
                else:
                    yield report
        if is_summed:
            with stage("folding"):
                row = total(Tree(self._parts[0].num_cohort), self._sums)
            if row is not None and len(self._sums) == 1:  # as it lies in Ray's store, where nobody may write
                row = row._replace(values=row.values.copy())
            yield Report(slot, tuple(clients), row, refused)


def _how(error: Exception) -> str:
    """What Ray says of a worker's end, on one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return next((line for line in lines if "memory" in line or "exit" in line), lines[0] if lines else "nothing said")
