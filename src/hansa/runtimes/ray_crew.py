"""``RayCrew``: resident Ray actors, and how a plan's parts are handed out among them.

What a worker has done is safe once it is here: the reports of each part come back with it, sums of rows when there is
nothing left to do. Whatever was lost with a worker is done again by others, to the same bits. Ray decides where workers
run and when there is room for one; a part goes to none that has not started.
"""

from __future__ import annotations

import logging
import math
import sys
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from hansa.core.errors import RunError
from hansa.core.protocols import Client, Plan, Report
from hansa.runtimes.blame import first_line
from hansa.runtimes.failure import Failed
from hansa.runtimes.handing_out import HandingOut
from hansa.runtimes.ray_actor import RayWorker, Setup
from hansa.runtimes.ray_cluster import own_modules_travel, put
from hansa.runtimes.simulated import SimulatedRuntime
from hansa.runtimes.worker import Part, Worker, parts_of

_LOG = logging.getLogger("hansa")
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

    @property
    def idly(self) -> str:
        """What it is doing when it has no part."""
        return "adding up" if self.has_started else "starting"


class _Round(HandingOut[Member]):
    """One plan's parts among actors."""

    worker, advice = "a worker", "give Ray fewer num_workers or a smaller block_size"

    def __init__(
        self,
        crew: RayCrew,
        home: SimulatedRuntime,
        plan: Plan,
        parts: Sequence[Part],
        places: Mapping[Client, int],
        width: int,
    ) -> None:
        super().__init__(home, plan, parts, places, width, crew.num_workers, crew.heard)
        self._crew = crew
        self._letter = [put(crew.ray, plan, "a plan")]
        self._has_waited = False

    def _is_over(self) -> bool:
        """Who has not started yet is not waited for."""
        return len(self._done) == len(self._parts) and not any(member.unsummed for member in self._crew.members)

    def _give_up(self) -> None:
        self._crew.close()

    def _feed(self) -> None:
        for index in range(self._num):
            member = self._crew.at(index)
            if member is None:
                if self._shares.left:
                    self._crew.hire(index)
                continue
            while member.has_started and self._takes_more(member) and (number := self._shares.take(index)) is not None:
                self._send(member, number)
            if member.unsummed and not member.calls:
                member.call("sums")

    def _send(self, member: Member, number: int, may_choose: bool = False) -> bool:
        begin = None if member.plan is self._letter else (self._letter, self._width)
        member.plan = self._letter
        is_last = self._shares.left < self._num  # likely; if not, more sums travel
        member.call("do", self._job(number, may_choose), begin, is_last, number=number)
        return True

    def _listen(self) -> None:
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
                self._crew.lose(member.index)
                self._lost(member, _how(error))
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
            self._hear_sums(member, answer)


def _how(error: Exception) -> str:
    """What Ray says of a worker's end, on one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return next((line for line in lines if "memory" in line or "exit" in line), lines[0] if lines else "nothing said")
