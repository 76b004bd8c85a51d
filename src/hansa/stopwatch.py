"""``stage``: which part of a round the present seconds belong to. ``watching`` turns the counting on.

    with watching() as watch:
        with one_round(), stage("plan"):
            ...
            with stage("rows"):  # taken from "plan"
                ...
    watch.rounds[0].seconds  # {"plan": ..., "rows": ..., "rest": ...}

The stopwatch is the one of the present context (``contextvars``), so that the loop, a runtime, a worker and ``fit``
need not hand it on to one another. Nobody but a profile reads it; where there is none, a stage costs next to nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Literal, NamedTuple

Stage = Literal[
    "sampling",  # who is asked
    "plan",  # what they are told: the plan, its hashes, its bytes, handing it out
    "rows",  # reading and preparing clients' rows
    "training",  # the learner's fit
    "client",  # what else clients do: the algorithm's and the transforms' half
    "folding",  # adding up updates where they are made
    "waiting",  # for workers, who count their own seconds
    "combining",  # from the last report to the new state
    "evaluation",  # all of it, wherever it is done
    "saving",
    "on_round",
    "rest",
]
Seconds = dict[Stage, float]


class Round(NamedTuple):
    """One round: the seconds of this process, which add up to the whole round, and those of each worker."""

    seconds: Mapping[Stage, float]
    workers: Mapping[int, Mapping[Stage, float]]


class Stopwatch:
    """Seconds by stage; those of a stage within another one count for the inner one alone.

    ``now()`` is a clock, in seconds; by default ``time.perf_counter``.

    >>> ticks = iter([0.0, 1.0, 5.0, 6.0])
    >>> watch = Stopwatch(lambda: next(ticks))
    >>> with watch.stage("client"):  # from 0 to 6, less what is within
    ...     with watch.stage("training"):  # from 1 to 5
    ...         pass
    >>> watch.seconds
    {'client': 2.0, 'training': 4.0}
    """

    def __init__(self, now: Callable[[], float] | None = None) -> None:
        self.seconds: Seconds = {}  # since the last round began, or before it
        self.workers: dict[int, Seconds] = {}
        self.rounds: list[Round] = []
        self._now, self._open, self._since = now or time.perf_counter, list[Stage](), 0.0
        self._stages: dict[Stage, _Open] = {}

    def stage(self, name: Stage) -> AbstractContextManager[None]:
        """From ``with`` to its end, time counts for ``name``."""
        return self._stages.get(name) or self._stages.setdefault(name, _Open(self, name))

    def switch(self, name: Stage) -> None:
        """From now on, the innermost open stage is another one."""
        if self._open:
            self.end()
            self.begin(name)

    def begin(self, name: Stage) -> None:
        """Open a stage."""
        self._count()
        self._open.append(name)

    def end(self) -> None:
        """Close the innermost stage."""
        self._count()
        self._open.pop()

    def add_worker(self, index: int, seconds: Mapping[Stage, float]) -> None:
        """Seconds of a worker, which run beside this process's own."""
        own = self.workers.setdefault(index, {})
        for name, count in seconds.items():
            own[name] = own.get(name, 0.0) + count

    def begin_round(self) -> None:
        """Forget what came before."""
        self.seconds, self.workers = {}, {}

    def end_round(self) -> None:
        """File the round."""
        self.rounds.append(Round(self.seconds, self.workers))
        self.begin_round()

    def _count(self) -> None:
        """What has passed is the innermost stage's."""
        now = self._now()
        if self._open:
            name = self._open[-1]
            self.seconds[name] = self.seconds.get(name, 0.0) + now - self._since
        self._since = now


class _Open:
    """A stage of a stopwatch, open within ``with``, as often as one likes."""

    __slots__ = ("_name", "_watch")

    def __init__(self, watch: Stopwatch, name: Stage) -> None:
        self._watch, self._name = watch, name

    def __enter__(self) -> None:
        self._watch.begin(self._name)

    def __exit__(self, *_: object) -> None:
        self._watch.end()


_PRESENT: ContextVar[Stopwatch | None] = ContextVar("hansa stopwatch", default=None)
_NOTHING = nullcontext()


@contextmanager
def watching(on: bool = True) -> Iterator[Stopwatch]:
    """Count with a new stopwatch; or count nothing, though a stopwatch runs outside, where ``on`` is False."""
    watch = Stopwatch()
    token = _PRESENT.set(watch if on else None)
    try:
        yield watch
    finally:
        _PRESENT.reset(token)


def is_watched() -> bool:
    """Whether anybody counts."""
    return _PRESENT.get() is not None


def stage(name: Stage) -> AbstractContextManager[None]:
    """From ``with`` to its end, time counts for ``name``. Nothing may be yielded within."""
    watch = _PRESENT.get()
    return _NOTHING if watch is None else watch.stage(name)


def switch(name: Stage) -> None:
    """From now on, the innermost open stage is another one: for what ends within a function that one cannot change."""
    watch = _PRESENT.get()
    if watch is not None:
        watch.switch(name)


def add_worker(index: int, seconds: Mapping[Stage, float]) -> None:
    """Seconds of a worker, which run beside this process's own."""
    watch = _PRESENT.get()
    if watch is not None:
        watch.add_worker(index, seconds)


@contextmanager
def one_round() -> Iterator[None]:
    """A round from ``with`` to its end; one that raises is not filed."""
    watch = _PRESENT.get()
    if watch is None:
        yield
        return
    watch.begin_round()
    with watch.stage("rest"):
        yield
    watch.end_round()
