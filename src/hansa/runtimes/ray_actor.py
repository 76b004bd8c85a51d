"""What runs in a Ray actor: a ``Hand`` that stays, with the federation, its rows and one thread a CPU."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

from hansa.aggregators.folds import Node
from hansa.core.protocols import Client, Updates
from hansa.federation import Pair
from hansa.runtimes.failure import Failed
from hansa.runtimes.hand import Hand, Job, Outcome, collect, keep_memory, one_thread

T = TypeVar("T")


class Setup(NamedTuple):
    """How a worker is to run, known before anything is unpickled there."""

    paths: tuple[str, ...]  # where the simulation finds its modules
    num_threads: int
    has_gpu: bool
    log_level: int


class Answer(NamedTuple):
    """What came of a job, and all sums where they were asked for."""

    outcome: Outcome
    sums: dict[Node, Updates] | None


class Shard:
    """A population as one worker sees it: what lies in flat arrays, and else the clients that are given to it.

    ``Source.in_memory`` is left out: a worker that read all clients ahead would hold a copy of them all.
    """

    def __init__(self, load: Callable[[Client], Pair]) -> None:
        self._load = load

    def __call__(self, client: Client) -> Pair:
        """One client's training and held-out rows."""
        return self._load(client)

    def position(self, client: Client) -> int:
        """The client's place in the population."""
        place: int = self._load.position(client)  # type: ignore[attr-defined]  # asked only where there is ``flat``
        return place

    @property
    def flat(self) -> Any:
        """All training rows in flat arrays, or None."""
        return getattr(self._load, "flat", None)


class RayWorker:
    """A worker of the ``Ray`` runtime. What is large comes as a reference within a list, which Ray hands on unread.

    Whatever a user's code raises is an answer, ``Failed``: only a worker that is lost is an error of Ray's.
    """

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        self._hand: Hand | None = None

    def start(self, box: Sequence[Any]) -> Failed | None:
        """Unpickle the ``Worker``; its arrays are read where Ray keeps them, for all workers of a machine."""
        return self._answer(lambda: self._start(box))

    def do(self, job: Job, begin: tuple[Sequence[Any], int] | None, is_last: bool) -> Failed | Answer:
        """One part, the first one of a plan with that plan and its width; all sums too where it is likely the last."""
        return self._answer(lambda: self._do(job, begin, is_last))

    def sums(self) -> Failed | dict[Node, Updates]:
        """The sums of all that was done since they were last sent."""
        return self._answer(self._own.sums)

    @property
    def _own(self) -> Hand:
        assert self._hand is not None
        return self._hand

    def _start(self, box: Sequence[Any]) -> None:
        setup = self._setup
        sys.path += [path for path in setup.paths if path not in sys.path]
        if not setup.has_gpu:  # Ray hides the GPUs from those who asked for none in some of its versions only
            os.environ["CUDA_VISIBLE_DEVICES"] = ""
        keep_memory()
        said = collect()
        logging.getLogger("hansa").setLevel(setup.log_level)
        _threads(setup.num_threads)
        worker = _fetched(box)
        _threads(setup.num_threads)  # again: the libraries are there now
        self._hand = Hand(worker, said)

    def _do(self, job: Job, begin: tuple[Sequence[Any], int] | None, is_last: bool) -> Answer:
        if begin is not None:
            self._own.begin(_fetched(begin[0]), begin[1])
        outcome = self._own.do(job)
        return Answer(outcome, self._own.sums() if is_last else None)

    @staticmethod
    def _answer(work: Callable[[], T]) -> Failed | T:
        try:
            return work()
        except Exception as error:  # whatever a user's code raises: the simulation is told
            return Failed.of(error)


def _fetched(box: Sequence[Any]) -> Any:
    import ray

    return ray.get(box[0])


def _threads(count: int) -> None:
    """Let libraries use so many threads."""
    if count == 1:
        one_thread()
        return
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = str(count)
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(count)
