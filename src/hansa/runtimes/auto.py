"""``Auto``: the first rounds of a run tell whether its clients train faster in this process or in several."""

from __future__ import annotations

import logging
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hansa.core.errors import InputError
from hansa.core.key import Key
from hansa.core.protocols import Client, Plan, Report
from hansa.federation import Federation, Pair
from hansa.runtimes.inprocess import InProcessRuntime
from hansa.runtimes.processes import is_count, new_crew, num_cores, why_not
from hansa.runtimes.worker import Worker, block_rows, part_rows

if TYPE_CHECKING:
    from hansa.runtimes.crew import Crew

_LOG = logging.getLogger("hansa")
_HERE, _APART = "in process", "processes"
_TRIED = 3  # rounds each way: the first one warms up, the faster of the others counts
_WORTH_S = 0.01  # a round that takes less in this process stays there


@dataclass(frozen=True, kw_only=True)
class Auto:
    """Train three rounds in this process, then three in ``num_workers`` processes, and go on in the faster way.

    The faster of the last two rounds of each way counts, per client. No round is run for the trial alone. Processes are
    not tried where a round takes less than 10 ms, on one core, with a learner on CUDA, or where ``Processes`` would be
    refused. What was picked stands in ``run.info["runtime"]``.

    The two ways agree within rounding, and which one is faster is a matter of the day: for the same bits from the same
    seed name a runtime. By default there are as many workers as cores.

    >>> Auto(num_workers=2)
    Auto(num_workers=2)
    """

    num_workers: int | None = None

    def __post_init__(self) -> None:
        if self.num_workers is not None and not is_count(self.num_workers):
            raise InputError(f"Auto(num_workers=): expected 1 or more, or None for all cores, found {self.num_workers}")

    def open(self, federation: Federation, load: Callable[[Client], Pair], key: Key, keep: bool = True) -> AutoRuntime:
        """The runtime of one run; ``load`` gives a client's raw training and held-out rows, asked once if ``keep``."""
        worker = Worker(federation, load, key, keep)
        return AutoRuntime(federation, worker, key, self.num_workers or num_cores())


class AutoRuntime(InProcessRuntime):
    """One run's clients in this process, or in a crew of others from its fourth round on."""

    def __init__(self, federation: Federation, worker: Worker, key: Key, num_workers: int) -> None:
        super().__init__(federation, worker, key, block_rows(federation))
        self.num_workers = num_workers
        self._crew: Crew | None = None
        self._way, self._is_settled = _HERE, False
        self._num_tried = 0  # rounds in the present way
        self._seconds: dict[str, float] = {}  # per client, by way
        self._num_clients = 0  # of the round that was timed last

    def __str__(self) -> str:
        apart = f"Processes(num_workers={self.num_workers})"
        picked, other = (super().__str__(), _APART) if self._way == _HERE else (apart, _HERE)
        said = [f"{self._round_s(self._way):.3g} s a round"] if self._way in self._seconds else []
        said += [f"{other} {self._round_s(other):.3g}"] if other in self._seconds else []
        return f"auto: {picked}" + (f" ({'; '.join(said)})" if said else "")

    def close(self) -> None:
        """End the workers, if there are any."""
        if self._crew is not None:
            self._crew.close()
            self._crew = None

    def kept(self) -> dict[str, Any]:
        """What a checkpoint must hold, the choice too."""
        own = {
            "way": self._way,
            "is_settled": self._is_settled,
            "num_tried": self._num_tried,
            "seconds": dict(self._seconds),
            "num_clients": self._num_clients,
        }
        return {**super().kept(), "auto": own}

    def restore(self, kept: Mapping[str, Any]) -> None:
        """Go on from what ``kept`` gave; what another runtime kept holds no choice."""
        super().restore(kept)
        own = kept.get("auto")
        if own is None or (own["way"] == _APART and not self._may_try()):
            return
        self._way, self._is_settled, self._num_tried = own["way"], own["is_settled"], own["num_tried"]
        self._seconds, self._num_clients = dict(own["seconds"]), own["num_clients"]

    def _reports(self, plan: Plan, cohort: Sequence[Client], clients: Sequence[Client]) -> Iterator[Report]:
        """The present way's reports; a round of training is timed until it is known which is faster."""
        started = time.perf_counter()
        if self._way == _HERE:
            yield from super()._reports(plan, cohort, clients)
        else:
            if self._crew is None:
                self._crew = new_crew(self.worker, self.num_workers)
            yield from self._crew.reports(self, plan, cohort, clients, part_rows(self.federation, len(cohort)))
        if plan.slot.task == "train" and plan.learn and clients and not self._is_settled:
            self._note(len(clients), time.perf_counter() - started)

    def _note(self, num_clients: int, seconds: float) -> None:
        """A round of training is over: perhaps try the other way, or settle."""
        self._num_tried += 1
        if self._num_tried == 1:
            return
        self._seconds[self._way] = min(seconds / num_clients, self._seconds.get(self._way, math.inf))
        self._num_clients = num_clients
        if self._num_tried < _TRIED:
            return
        if self._way == _HERE and self._round_s(_HERE) > _WORTH_S and self._may_try():
            self._way, self._num_tried = _APART, 0
            return
        self._way, self._is_settled = min(self._seconds, key=self._seconds.__getitem__), True
        if self._way == _HERE:
            self.close()
        _LOG.info("runtime %s", self)

    def _may_try(self) -> bool:
        """Whether processes may pay, and can be had."""
        return self.num_workers > 1 and num_cores() > 1 and not _has_cuda(self.federation.learner) and not why_not()

    def _round_s(self, way: str) -> float:
        """Seconds that a round like the last one takes."""
        return self._seconds[way] * self._num_clients


def _has_cuda(learner: Any) -> bool:
    """Whether a learner trains on CUDA; or in PyTorch where it could: its autograd then bears no fork once used."""
    if not hasattr(learner, "device"):
        return False
    torch = sys.modules.get("torch")
    return "cuda" in str(learner.device) or (torch is not None and torch.cuda.device_count() > 0)
