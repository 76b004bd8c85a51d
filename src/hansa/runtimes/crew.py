"""``Crew``: worker processes forked from this one, and how a plan's parts are handed out among them.

What a worker has done is safe once it is here: the reports of each part come back with it, sums of rows when there is
nothing left to do. Whatever died with a worker is done again by the others, to the same bits.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import warnings
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkProcess
from typing import Any

from hansa.aggregators.folds import Node
from hansa.core.errors import RunError
from hansa.core.protocols import Client, Plan, Report
from hansa.runtimes.blame import first_line
from hansa.runtimes.channel import SAFE_BYTES, Channel, Region, room, wrap
from hansa.runtimes.crew_member import SUMS, Begin, Order, serve
from hansa.runtimes.failure import Failed
from hansa.runtimes.hand import Outcome
from hansa.runtimes.handing_out import HandingOut
from hansa.runtimes.simulated import SimulatedRuntime
from hansa.runtimes.worker import Part, Worker, parts_of

_LOG = logging.getLogger("hansa")
_PATIENCE_S = 5.0  # for a worker that was told to end


class Crew:
    """``num_workers`` processes, forked when there is work for them and again when one is lost."""

    def __init__(self, worker: Worker, num_workers: int) -> None:
        self.num_workers = num_workers
        self.heard: set[str] = set()  # lines of the workers' logs
        self._worker = worker
        self._members: list[Member | None] = [None] * num_workers
        row = 4 * max(1, worker.federation.learner.layout.num_params)
        self.board = Region(room(8 * row + (16 << 20), 8))  # where plans lie, for all to read
        size = room(64 * row + (4 << 20), 16 * num_workers)
        self._lanes = [Lanes(size) for _ in range(num_workers)]

    def reports(
        self, home: SimulatedRuntime, plan: Plan, cohort: Sequence[Client], clients: Sequence[Client], width: int
    ) -> Iterator[Report]:
        """A plan's reports from ``clients``, filed with ``home``; all are there when the first one comes."""
        places = {client: i for i, client in enumerate(cohort)}
        parts = parts_of(cohort, clients, width)
        if plan.slot.task == "prepare" or not parts:
            home.traffic.down(plan, clients)
        if plan.slot.task == "prepare":  # reads everybody once: here, so that what was read is there to be shared
            for part in parts:
                done = self._worker.run(plan, part, places, home.memory.rows, home.scratch_of(plan.slot), width)
                yield from home.take(plan.slot, done)
        elif parts:
            yield from _Round(self, home, plan, parts, places, width).reports()

    @property
    def members(self) -> list[Member]:
        """The processes that live."""
        return [member for member in self._members if member is not None]

    def at(self, index: int) -> Member | None:
        """A worker's process, if it lives."""
        return self._members[index]

    def fork(self, index: int, plan: Plan, clients: Sequence[Client]) -> Member:
        """A worker's process, new; it finds the rows that were read here."""
        if not self.members:  # rows in memory are put side by side here, once for all
            with contextlib.suppress(Exception):  # the worker will find the same, and name the client
                self._worker.rows(plan, clients[:1])
        others = [member.channel.pipe for member in self.members]
        member = Member(index, self._worker, self._lanes[index], self.board, others)
        self._members[index] = member
        return member

    def lose(self, index: int, *, kill: bool = False) -> str:
        """Forget a process that has ended or is to end now; says how it ended."""
        member, self._members[index] = self._members[index], None
        return member.end(kill=kill) if member is not None else ""

    def kill(self) -> None:
        """End all processes at once."""
        for member in self.members:
            self.lose(member.index, kill=True)

    def close(self) -> None:
        """End all processes, whose work is done."""
        for member in self.members:
            member.channel.close()  # all of them first, then wait for each
        for member in self.members:
            self.lose(member.index)


class Lanes:
    """The regions between the simulation and one worker; a worker that follows another takes them over."""

    def __init__(self, size: int) -> None:
        self.jobs = (Region(size), Region(size))
        self.outcomes = (Region(size), Region(size))


class Member:
    """One worker process, seen from the simulation."""

    def __init__(self, index: int, worker: Worker, lanes: Lanes, board: Region, others: Sequence[Connection]) -> None:
        self.index = index
        self.running: deque[int] = deque()  # parts that it was sent
        self.unsummed: set[int] = set()  # parts whose sums it holds
        self.is_summing = False
        self.idly = "adding up"
        self.plan: object = None  # the round that it was told of
        fork = multiprocessing.get_context("fork")
        ours, theirs = fork.Pipe()
        self.channel = Channel(ours, lanes.jobs, lanes.outcomes)
        channel = Channel(theirs, lanes.outcomes, lanes.jobs)
        arguments = (worker, channel, board, [*others, ours], os.getpid())
        self._process: ForkProcess = fork.Process(
            target=serve, args=arguments, name=f"hansa-worker-{index}", daemon=True
        )
        with warnings.catch_warnings():
            # Python warns of forking beside threads. A worker uses none that its parent started: see one_thread().
            warnings.simplefilter("ignore", DeprecationWarning)
            try:
                self._process.start()
            except OSError as error:
                raise RunError(
                    f"Processes: expected to start worker process {index + 1}, found {error}; give fewer num_workers"
                ) from error
            finally:
                theirs.close()

    @property
    def busy(self) -> bool:
        """Whether an answer is due."""
        return bool(self.running) or self.is_summing

    @property
    def pid(self) -> int | None:
        """The process's id."""
        return self._process.pid

    def end(self, *, kill: bool = False) -> str:
        """End the process, at once if it is busy; says how it ended."""
        if kill or self.busy:
            self._process.kill()
        self.channel.close()
        self._process.join(_PATIENCE_S)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        code = self._process.exitcode or 0
        self._process.close()
        return f"killed by signal {-code}" if code < 0 else f"exit status {code}"


class _Round(HandingOut[Member]):
    """One plan's parts among processes."""

    worker, advice = "a worker process", "give Processes fewer num_workers or a smaller block_size"

    def __init__(
        self,
        crew: Crew,
        home: SimulatedRuntime,
        plan: Plan,
        parts: Sequence[Part],
        places: Mapping[Client, int],
        width: int,
    ) -> None:
        super().__init__(home, plan, parts, places, width, crew.num_workers, crew.heard)
        self._crew = crew
        self._borrowed: dict[int, list[Node]] = {}  # sums that lie in a worker's lane, by worker
        try:
            self._letter = wrap(plan, crew.board)
        except Exception as error:  # there are many reasons why a value cannot be pickled
            raise RunError(
                f"round {plan.slot.round}: expected a plan that can travel between processes, found "
                f"{first_line(error)}; use runtime=hansa.InProcess()"
            ) from error

    def _is_over(self) -> bool:
        held = any(member.busy or member.unsummed for member in self._crew.members)
        return not held and len(self._done) == len(self._parts)

    def _give_up(self) -> None:
        self._crew.kill()

    def _feed(self) -> None:
        for index in range(self._num):
            self._feed_one(index)

    def _feed_one(self, index: int) -> None:
        """Give a worker what it can do now: parts, or the word to send its sums."""
        member = self._crew.at(index)
        while member is None or self._takes_more(member):
            number = self._shares.take(index)
            if number is None:
                break
            member = member or self._crew.fork(index, self._plan, self._parts[number].clients)
            if not self._send(member, number):
                return
        if member is not None and member.unsummed and not member.busy:
            member.is_summing = True
            try:
                member.channel.send(SUMS)
            except OSError:
                self._gone(member)

    def _send(self, member: Member, number: int, may_choose: bool = False) -> bool:
        for node in self._borrowed.pop(member.index, ()):
            self._sums[node] = self._sums[node]._replace(values=self._sums[node].values.copy())
        begin = None if member.plan is self._letter else Begin(self._letter, self._width)
        message = member.channel.wrap(Order(begin, self._job(number, may_choose)))
        if member.running and len(message) > SAFE_BYTES:  # both sides might be stuck in writing
            self._shares.give_back(member.index, [number])
            return False
        member.running.append(number)
        member.plan = self._letter
        try:
            member.channel.post(message)
        except OSError:
            self._gone(member)
            return False
        return True

    def _listen(self) -> None:
        busy = {member.channel.pipe: member for member in self._crew.members if member.busy}
        for pipe in wait(list(busy)) if busy else ():
            member = busy[pipe]  # type: ignore[index]  # wait() gives what it was given
            if self._crew.at(member.index) is not member:  # lost while another was heard
                continue
            try:
                # Sums stay where they are: nobody overwrites them before this worker gets another part.
                message = member.channel.receive(owned=not member.is_summing)
            except (EOFError, OSError):
                self._gone(member)
                continue
            self._hear(member, message)

    def _hear(self, member: Member, message: Any) -> None:
        if isinstance(message, Failed):
            _LOG.info("a worker process failed:\n%s", message.trace)
            raise message.error()
        if not isinstance(message, Outcome):
            member.is_summing = False
            self._hear_sums(member, message)
            self._borrowed.setdefault(member.index, []).extend(message)
            return
        member.running.remove(message.number)
        self._hear_outcome(member, message)

    def _gone(self, member: Member) -> None:
        """A worker has died."""
        self._lost(member, self._crew.lose(member.index, kill=True))
