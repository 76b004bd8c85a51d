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
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkProcess
from typing import Any

from hansa.aggregators.folds import Node, Tree, total
from hansa.core.errors import RunError
from hansa.core.protocols import Client, Memory, Plan, Report, Updates
from hansa.runtimes.blame import first_line, names
from hansa.runtimes.channel import SAFE_BYTES, Channel, Region, room, wrap
from hansa.runtimes.crew_member import SUMS, Begin, Order, serve
from hansa.runtimes.failure import Failed
from hansa.runtimes.hand import Job, Outcome, repeat
from hansa.runtimes.shares import Shares
from hansa.runtimes.simulated import SimulatedRuntime
from hansa.runtimes.worker import Done, Part, Worker, blocks_of, parts_of
from hansa.stopwatch import add_worker, is_watched, stage

_LOG = logging.getLogger("hansa")
_TRIES = 3  # of a part whose worker dies
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


class _Round:
    """One plan's parts, from the first to the last sum."""

    def __init__(
        self,
        crew: Crew,
        home: SimulatedRuntime,
        plan: Plan,
        parts: Sequence[Part],
        places: dict[Client, int],
        width: int,
    ) -> None:
        self._crew, self._home, self._plan, self._parts, self._width = crew, home, plan, parts, width
        self._places = places
        self._num = min(crew.num_workers, len(parts))
        self._shares = Shares([len(part.clients) for part in parts], self._num)
        self._done: dict[int, Done] = {}
        self._sums: dict[Node, Updates] = {}
        self._borrowed: dict[int, list[Node]] = {}  # sums that lie in a worker's lane, by worker
        self._deaths: Counter[int | None] = Counter()  # by the part that a lost worker was doing
        self._choices: dict[str, str] = dict(getattr(home.federation.learner, "choices", {}))
        self._deciding: tuple[Member, int] | None = None  # who tries which way is faster, with which part
        self._undecided: list[tuple[Member, int]] = []
        try:
            self._letter = wrap(plan, crew.board)
        except Exception as error:  # there are many reasons why a value cannot be pickled
            raise RunError(
                f"round {plan.slot.round}: expected a plan that can travel between processes, found "
                f"{first_line(error)}; use runtime=hansa.InProcess()"
            ) from error

    def reports(self) -> Iterator[Report]:
        """All reports; a worker that is busy when this is given up is ended."""
        try:
            for index in range(self._num):
                self._feed(index)
            self._home.traffic.down(self._plan, [client for part in self._parts for client in part.clients])
            while not self._is_over():
                with stage("waiting"):
                    self._listen()
                for index in range(self._num):
                    self._feed(index)
        except BaseException:
            self._crew.kill()
            raise
        learner = self._home.federation.learner
        if self._choices and hasattr(learner, "choose"):
            learner.choose(self._choices)
        yield from self._told()

    def _is_over(self) -> bool:
        """Whether every part is done, and every sum here."""
        held = any(member.busy or member.unsummed for member in self._crew.members)
        return not held and len(self._done) == len(self._parts)

    def _feed(self, index: int) -> None:
        """Give a worker what it can do now: parts, or the word to send its sums."""
        member = self._crew.at(index)
        while self._takes_more(member):
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
                self._lost(member)

    def _takes_more(self, member: Member | None) -> bool:
        """Whether a worker may get a part: also a second one, unless others may soon have nothing to do."""
        if member is None:
            return True
        if member.is_summing or any(member is other for other, _ in self._undecided):
            return False
        return not member.running or (len(member.running) == 1 and self._shares.left >= 2 * self._num)

    def _send(self, member: Member, number: int, may_choose: bool = False) -> bool:
        """Send a part; False where it has to wait, or the worker is gone."""
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
            self._lost(member)
            return False
        return True

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
        """Wait until a worker answers or dies, and hear all that have."""
        busy = {member.channel.pipe: member for member in self._crew.members if member.busy}
        for pipe in wait(list(busy)) if busy else ():
            member = busy[pipe]  # type: ignore[index]  # wait() gives what it was given
            if self._crew.at(member.index) is not member:  # lost while another was heard
                continue
            try:
                # Sums stay where they are: nobody overwrites them before this worker gets another part.
                message = member.channel.receive(owned=not member.is_summing)
            except (EOFError, OSError):
                self._lost(member)
                continue
            self._hear(member, message)

    def _hear(self, member: Member, message: Any) -> None:
        if isinstance(message, Failed):
            _LOG.info("a worker process failed:\n%s", message.trace)
            raise message.error()
        if not isinstance(message, Outcome):
            member.is_summing = False
            member.unsummed.clear()
            self._sums.update(message)
            self._borrowed.setdefault(member.index, []).extend(message)
            return
        repeat(message.said, self._crew.heard)
        add_worker(member.index, message.seconds)
        member.running.remove(message.number)
        if message.done is None:
            self._wants_to_choose(member, message.number)
            return
        self._choices = {**message.choices, **self._choices}
        self._done[message.number] = message.done
        if message.is_summed:
            member.unsummed.add(message.number)
        if self._deciding == (member, message.number):
            self._decided()

    def _wants_to_choose(self, member: Member, number: int) -> None:
        """Let one worker at a time try which way a learner is faster; the others wait for what it finds."""
        if self._deciding is not None:
            self._undecided.append((member, number))
        elif self._send(member, number, may_choose=True):
            self._deciding = (member, number)

    def _decided(self) -> None:
        """Nobody is trying any more: who waited goes on."""
        self._deciding, again, self._undecided = None, self._undecided, []
        for member, number in again:
            self._shares.give_back(member.index, [number])

    def _lost(self, member: Member) -> None:
        """A worker is gone: what it was doing, and what it had summed, is to be done again."""
        number = self._plan.slot.round
        blamed = member.running[0] if member.running else None
        again = sorted({*member.running, *member.unsummed})
        how = self._crew.lose(member.index, kill=True)
        self._shares.give_back(member.index, again)
        if self._deciding is not None and self._deciding[0] is member:
            self._decided()
        for part in again:
            self._done.pop(part, None)
        count = sum(len(self._parts[part].clients) for part in again)
        _LOG.warning(
            "round %d: a worker process was lost (%s); the work of %d clients is done again", number, how, count
        )
        self._deaths[blamed] += 1
        if self._deaths[blamed] >= _TRIES:
            who = "adding up" if blamed is None else names(self._parts[blamed].clients)
            raise RunError(
                f"round {number}: {who}: expected a worker process to do this part, found that {_TRIES} of them were "
                f"lost ({how}), as happens where memory runs out; give Processes fewer num_workers or a smaller "
                "block_size"
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
                if row is not None and len(self._sums) == 1:
                    row = row._replace(values=row.values.copy())
            yield Report(slot, tuple(clients), row, refused)
