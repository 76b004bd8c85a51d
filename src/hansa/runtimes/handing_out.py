"""``HandingOut``: one plan's parts among several workers, wherever those run: ``crew.py`` and ``ray_crew.py``."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Generic, Protocol, TypeVar

from hansa.aggregators.folds import Node, total, tree_of
from hansa.core.errors import RunError
from hansa.core.protocols import Client, Memory, Plan, Report, Updates
from hansa.runtimes.blame import names
from hansa.runtimes.hand import Job, Outcome, repeat
from hansa.runtimes.shares import Shares
from hansa.runtimes.simulated import SimulatedRuntime
from hansa.runtimes.worker import Done, Part, blocks_of
from hansa.stopwatch import add_worker, is_watched, stage

_LOG = logging.getLogger("hansa")
_TRIES = 3  # of a part whose worker is lost


class Member(Protocol):
    """A worker, seen from the simulation."""

    index: int
    unsummed: set[int]  # parts whose sums it holds

    @property
    def running(self) -> Sequence[int]: ...  # parts that it was given

    @property
    def is_summing(self) -> bool: ...  # whether its sums are due

    @property
    def idly(self) -> str: ...  # what it is doing when it has no part


M = TypeVar("M", bound=Member)


class HandingOut(ABC, Generic[M]):
    """One plan's parts, from the first to the last sum.

    ``worker`` is what a worker is called in messages, ``advice`` what to do where workers are lost again and again.
    """

    worker: str
    advice: str

    def __init__(
        self,
        home: SimulatedRuntime,
        plan: Plan,
        parts: Sequence[Part],
        places: Mapping[Client, int],
        width: int,
        num_workers: int,
        heard: set[str],
    ) -> None:
        self._home, self._plan, self._parts, self._width, self._heard = home, plan, parts, width, heard
        self._places = places
        self._num = min(num_workers, len(parts))
        self._shares = Shares([len(part.clients) for part in parts], self._num)
        self._done: dict[int, Done] = {}
        self._sums: dict[Node, Updates] = {}
        self._deaths: Counter[int] = Counter()  # by the part that a lost worker was doing; below 0: by worker
        self._choices: dict[str, str] = dict(getattr(home.federation.learner, "choices", {}))
        self._deciding: tuple[M, int] | None = None  # who tries which way is faster, with which part
        self._undecided: list[tuple[M, int]] = []

    @abstractmethod
    def _feed(self) -> None:
        """Give every worker what it can do now: parts, or the word to send its sums."""

    @abstractmethod
    def _send(self, member: M, number: int, may_choose: bool = False) -> bool:
        """Send a part; False where it has to wait, or the worker is gone."""

    @abstractmethod
    def _listen(self) -> None:
        """Wait until a worker answers or is lost, and hear all that have."""

    @abstractmethod
    def _is_over(self) -> bool:
        """Whether every part is done, and every sum here."""

    @abstractmethod
    def _give_up(self) -> None:
        """End the workers: what they are doing is not wanted any more."""

    def reports(self) -> Iterator[Report]:
        """All reports, in the order of the cohort; workers are ended when this is given up."""
        try:
            self._feed()
            self._home.traffic.down(self._plan, [client for part in self._parts for client in part.clients])
            while not self._is_over():
                with stage("waiting"):
                    self._listen()
                self._feed()
        except BaseException:
            self._give_up()
            raise
        learner = self._home.federation.learner
        if self._choices and hasattr(learner, "choose"):
            learner.choose(self._choices)
        yield from self._told()

    def _takes_more(self, member: M) -> bool:
        """Whether a worker may get a part: also a second one, unless others may soon have nothing to do."""
        if member.is_summing or any(member is other for other, _ in self._undecided):
            return False
        running = len(member.running)
        return not running or (running == 1 and self._shares.left >= 2 * self._num)

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

    def _hear_outcome(self, member: M, outcome: Outcome) -> None:
        """What came of a part that a worker is not running any more."""
        repeat(outcome.said, self._heard)
        add_worker(member.index, outcome.seconds)
        if outcome.done is None:
            self._wants_to_choose(member, outcome.number)
            return
        self._choices = {**outcome.choices, **self._choices}
        self._done[outcome.number] = outcome.done
        if outcome.is_summed:
            member.unsummed.add(outcome.number)
        if self._deciding is not None and self._deciding[0] is member and self._deciding[1] == outcome.number:
            self._decided()

    def _hear_sums(self, member: M, sums: Mapping[Node, Updates]) -> None:
        """The sums of all that a worker had done."""
        member.unsummed.clear()
        self._sums.update(sums)

    def _wants_to_choose(self, member: M, number: int) -> None:
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

    def _lost(self, member: M, how: str) -> None:
        """A worker is gone, ``how`` in words: what it was doing, and what it had summed, is to be done again."""
        running = list(member.running)
        waiting = [number for other, number in self._undecided if other is member]
        self._undecided = [pair for pair in self._undecided if pair[0] is not member]
        again = sorted({*running, *waiting, *member.unsummed})
        if member.index < self._num:
            self._shares.give_back(member.index, again)
        if self._deciding is not None and self._deciding[0] is member:
            self._decided()
        for part in again:
            self._done.pop(part, None)
        number, count = self._plan.slot.round, sum(len(self._parts[part].clients) for part in again)
        _LOG.warning(
            "round %d: %s was lost (%s); the work of %d clients is done again", number, self.worker, how, count
        )
        blamed = running[0] if running else ~member.index
        self._deaths[blamed] += 1
        if self._deaths[blamed] >= _TRIES:
            who = names(self._parts[blamed].clients) if running else member.idly
            raise RunError(
                f"round {number}: {who}: expected {self.worker} to do this part, found that {_TRIES} of them were lost "
                f"({how}), as happens where memory runs out; {self.advice}"
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
                row = total(tree_of(self._parts[0].num_cohort), self._sums)
                if row is not None and len(self._sums) == 1:  # it lies where a worker may write again, or nobody may
                    row = row._replace(values=row.values.copy())
            yield Report(slot, tuple(clients), row, refused)
