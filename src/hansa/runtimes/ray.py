"""``Ray``: the clients of a cohort train in the workers of a Ray cluster, on this machine or on many."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from hansa.core.errors import InputError
from hansa.core.key import Key
from hansa.core.protocols import Client, Plan, Report
from hansa.federation import Federation, Pair
from hansa.runtimes.processes import is_count, num_cores
from hansa.runtimes.ray_actor import Shard
from hansa.runtimes.ray_cluster import connect, engine, num_fitting
from hansa.runtimes.ray_crew import RayCrew
from hansa.runtimes.simulated import SimulatedRuntime
from hansa.runtimes.worker import Worker, part_rows


@dataclass(frozen=True, kw_only=True)
class Ray:
    """Run clients in ``num_workers`` Ray actors, by default as many as the cluster can hold.

    The engine is the one that this process has initialised; else the cluster at ``address`` (``"auto"``: the one that
    runs on this machine; by default the environment's ``RAY_ADDRESS``); else one is started here, without a dashboard
    and without Ray's usage statistics, and ended with the run. Ray alone decides where workers run; each gets
    ``num_cpus`` CPUs, hence so many threads, ``num_gpus`` GPUs and ``resources``, all of which may be fractions. With
    ``num_gpus`` a worker trains on its own GPU where the learner's device is ``"auto"``; without, it sees none.

    A worker stays for the whole run. It receives the federation and the population once, reads the data of its own
    clients itself, and takes the same stretch of the population in every round as far as the cohort allows, so that
    what it has read is of use again. The federation, the population's functions and, unless they can be imported
    there, the modules that they come from are pickled; hansa must be installed on every machine.

    The same seed gives the same bits whatever the number of workers, those of ``Processes`` on the same kind of
    machine and threads. A worker or a machine that is lost costs its clients' work only, which is done again.
    ``block_size`` is the most clients in a part of a cohort; it may change the speed, and the result within rounding.

    Raises ``InputError`` where Ray is not installed, does not answer, or has no machine with room for one worker.

    >>> Ray(num_workers=8, num_gpus=0.25)
    Ray(num_workers=8, num_cpus=1, num_gpus=0.25, address=None, block_size='auto', resources=None)
    """

    num_workers: int | None = None
    num_cpus: float = 1
    num_gpus: float = 0
    address: str | None = None
    block_size: int | Literal["auto"] = "auto"
    resources: Mapping[str, float] | None = None

    def __post_init__(self) -> None:
        if self.num_workers is not None and not is_count(self.num_workers):
            raise InputError(
                f"Ray(num_workers=): expected 1 or more, or None for all that fit, found {self.num_workers!r}"
            )
        if not _is_amount(self.num_cpus) or self.num_cpus == 0:
            raise InputError(f"Ray(num_cpus=): expected more than 0 CPUs for each worker, found {self.num_cpus!r}")
        if not _is_amount(self.num_gpus) or (self.num_gpus > 1 and self.num_gpus != int(self.num_gpus)):
            raise InputError(
                f"Ray(num_gpus=): expected a share of a GPU, or whole GPUs, for each worker, found {self.num_gpus!r}"
            )
        if self.block_size != "auto" and not is_count(self.block_size):
            raise InputError(f'Ray(block_size=): expected "auto" or 1 or more, found {self.block_size!r}')
        for name, amount in (self.resources or {}).items():
            if not isinstance(name, str) or name in ("CPU", "GPU") or not _is_amount(amount):
                raise InputError(
                    f"Ray(resources=): expected amounts of the cluster's own resources by name, found "
                    f"{name!r}: {amount!r}; CPUs and GPUs have num_cpus= and num_gpus="
                )

    def open(self, federation: Federation, load: Callable[[Client], Pair], key: Key, keep: bool = True) -> RayRuntime:
        """The runtime of one run; ``load`` gives a client's raw training and held-out rows, asked once if ``keep``."""
        ray = engine()
        num_cpus = num_cores() if self.num_workers is None else math.ceil(self.num_workers * self.num_cpus)
        owned = connect(ray, self.address, num_cpus)
        try:
            worker = Worker(federation, Shard(load), key, keep)
            return RayRuntime(self, federation, RayCrew(ray, worker, self._num_workers(ray), self._needs), key, owned)
        except BaseException:
            if owned:
                ray.shutdown()
            raise

    @property
    def _needs(self) -> dict[str, float]:
        """What a worker takes of a machine."""
        return {"CPU": self.num_cpus, "GPU": self.num_gpus, **(self.resources or {})}

    def _num_workers(self, ray: Any) -> int:
        fitting = num_fitting(ray, self._needs)
        if not fitting:
            needs = ", ".join(f"{amount:g} {name}" for name, amount in self._needs.items() if amount)
            raise InputError(
                f"Ray: expected a machine with room for a worker ({needs}), found none in the cluster, which has "
                f"{ {name: amount for name, amount in ray.cluster_resources().items() if ':' not in name} }; ask for "
                "less, or add a machine"
            )
        return self.num_workers or fitting


class RayRuntime(SimulatedRuntime):
    """One run's clients in the workers of a Ray cluster, which is shut down with the run if ``owned``."""

    def __init__(self, options: Ray, federation: Federation, crew: RayCrew, key: Key, owned: bool) -> None:
        super().__init__(federation, key)
        self.options, self.crew, self._owned = options, crew, owned

    def __str__(self) -> str:
        own = self.options
        named = (("num_cpus", own.num_cpus, 1), ("num_gpus", own.num_gpus, 0), ("block_size", own.block_size, "auto"))
        more = "".join(f", {name}={value}" for name, value, default in named if value != default)
        return f"Ray(num_workers={self.crew.num_workers}{more})"

    def close(self) -> None:
        """End the workers, and Ray itself if it was started for them."""
        self.crew.close()
        if self._owned:
            self._owned = False
            self.crew.ray.shutdown()

    def _reports(self, plan: Plan, cohort: Sequence[Client], clients: Sequence[Client]) -> Iterator[Report]:
        size = self.options.block_size
        return self.crew.reports(
            self, plan, cohort, clients, part_rows(self.federation, len(cohort)) if size == "auto" else size
        )


def _is_amount(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf
