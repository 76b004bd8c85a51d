"""``Hand``: a worker's side of a simulation with several of them, in a process of its own or in a Ray actor.

It does the parts that it is given, and adds neighbouring sums, so that about one row comes back of all that it did.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

from hansa.aggregators.folds import Node
from hansa.aggregators.sums import Sums
from hansa.core.protocols import Client, Memory, Plan, Updates
from hansa.runtimes.worker import Done, Part, Worker
from hansa.stopwatch import Stage, stage, watching

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of glibc's mallopt(3)

Said = tuple[int, str]  # a line of the log: level, text


class Job(NamedTuple):
    """One part to do, with what its clients remember."""

    number: int
    part: Part
    places: Mapping[Client, int]
    memory: Mapping[tuple[Client, ...], Memory]  # by block
    scratch: Mapping[Client, Any]
    choices: Mapping[str, str]  # what the learner's trials have chosen anywhere so far
    may_choose: bool  # whether this worker may try, where nobody has
    is_watched: bool = False  # whether the outcome is to tell where the time went


class Outcome(NamedTuple):
    """What came of a job; ``done`` is None where a choice is missing that another worker is to make."""

    number: int
    done: Done | None
    choices: Mapping[str, str]
    said: tuple[Said, ...]
    is_summed: bool = False  # the part's sum is still to come
    seconds: Mapping[Stage, float] = {}  # of a job that is watched


class Undecided(BaseException):
    """A learner wants to try which way is faster, and may not: workers must not choose differently.

    No error, hence not an ``Exception``, which a user's own code might catch.
    """


class Choices(dict[str, str]):
    """What trials have chosen, for a worker that may not add to it unless ``may_choose``."""

    def __init__(self, known: Mapping[str, str], may_choose: bool) -> None:
        super().__init__(known)
        self.may_choose = may_choose

    def __contains__(self, situation: object) -> bool:
        if super().__contains__(situation):
            return True
        if not self.may_choose:
            raise Undecided(str(situation))
        return False


class Hand:
    """Does jobs of one plan after another with a ``Worker``; ``said`` is where its log goes (``collect``)."""

    def __init__(self, worker: Worker, said: list[Said]) -> None:
        self._worker, self._said = worker, said
        self._plan: Plan | None = None
        self._width = 1
        self._sums: Sums | None = None
        self._places: dict[Client, int] = {}

    def begin(self, plan: Plan, width: int) -> None:
        """Forget the plan before; do this one."""
        self._plan, self._width, self._sums, self._places = plan, width, None, {}

    def do(self, job: Job) -> Outcome:
        """One part. Where rows are added, the outcome tells all but their sum."""
        with watching(job.is_watched) as watch, stage("rest"):  # whatever the simulation's own counted before a fork
            outcome = self._do(job)
        return outcome._replace(seconds=watch.seconds)

    def _do(self, job: Job) -> Outcome:
        assert self._plan is not None
        learner = self._worker.federation.learner
        if hasattr(learner, "choose"):
            learner.choose(Choices(job.choices, job.may_choose))
        memory, width = job.memory, self._width
        try:
            done = self._worker.run(
                self._plan, job.part, job.places, lambda clients: memory[tuple(clients)], job.scratch, width
            )
        except Undecided:
            return Outcome(job.number, None, {}, self._heard())
        choices = dict(getattr(learner, "choices", {}))
        payload = done.reports[0].payload if len(done.reports) == 1 else None
        if not isinstance(payload, Updates) or not self._worker.adds_up(self._plan):
            return Outcome(job.number, done, choices, self._heard())
        if self._sums is None:
            self._sums = self._worker.sums(self._plan, job.part.num_cohort, self._places)
        self._places.update(job.places)
        with stage("folding"):
            self._sums.add(job.part.node, payload)
        told = done._replace(reports=(done.reports[0]._replace(payload=None),))
        return Outcome(job.number, told, choices, self._heard(), is_summed=True)

    def sums(self) -> dict[Node, Updates]:
        """The sums of all that was done since the last call, neighbours in one."""
        sums, self._sums = self._sums, None
        return {} if sums is None else sums.rows

    def _heard(self) -> tuple[Said, ...]:
        """What was logged since the last call."""
        said = tuple(self._said)
        self._said.clear()
        return said


class _Collector(logging.Handler):
    """Keeps lines for the simulation's own log."""

    def __init__(self, lines: list[Said]) -> None:
        super().__init__()
        self._lines = lines

    def emit(self, record: logging.LogRecord) -> None:
        self._lines.append((record.levelno, record.getMessage()))


def collect() -> list[Said]:
    """From now on, this process's log goes into a list."""
    lines: list[Said] = []
    log = logging.getLogger("hansa")
    log.handlers, log.propagate = [_Collector(lines)], False
    return lines


def repeat(said: tuple[Said, ...], heard: set[str]) -> None:
    """Log what a worker logged, once whatever the number of workers that said it."""
    for level, text in said:
        if text not in heard:
            heard.add(text)
            logging.getLogger("hansa").log(level, "%s", text)


def one_thread() -> None:
    """Keep this process to one thread (workers share the cores), and the memory that it has freed to itself."""
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = "1"  # for libraries that are loaded from now on
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)
    try:
        from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]  # it ships no types
    except ModuleNotFoundError:
        return
    threadpool_limits(limits=1)


def own_output() -> None:
    """Write by line, through locks of this process's own.

    A thread of the parent, a progress bar's say, may have held the locks of its streams when this process was forked.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not None and stream is getattr(sys, f"__{name}__"):  # else somebody else looks after it
            own = open(  # noqa: SIM115  # it stays open as long as this process
                stream.fileno(), "w", buffering=1, encoding=stream.encoding, errors=stream.errors, closefd=False
            )
            setattr(sys, name, own)


def keep_memory() -> None:
    """Let the C library keep freed memory for the next step, instead of asking the system for new pages each time.

    Under Linux with glibc; elsewhere nothing happens. A client of a 1.2 million parameter CNN trains 4 % faster so.
    """
    if not sys.platform.startswith("linux"):
        return
    import ctypes

    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):  # another C library
        return
    mallopt(_MMAP_THRESHOLD, 1 << 28)
    mallopt(_TRIM_THRESHOLD, 1 << 29)
