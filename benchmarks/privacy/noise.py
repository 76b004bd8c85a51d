"""What noise costs the server: seconds a round and memory, for the mean of a model of ten million parameters.

    python benchmarks/privacy/noise.py [--params 10000000] [--rounds 5] [--buffers 4] [--check]

Each noise runs in a process of its own. The seconds are of ``release`` alone: fresh normal numbers from AES, the noise
that is taken back, and the grid. Memory is the process's peak above what it held with the mean before the first round;
the numbers that are remembered between rounds are named beside it. With ``--check`` the exit status is 1 where buffered
noise takes a second a round or more, or remembers more than its buffers.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import statistics
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from setting import setting  # benchmarks are scripts

from hansa import BLT, Banded, CorrelatedNoise, GaussianNoise, Tree
from hansa.core.key import Key
from hansa.core.protocols import Aggregate

BAR_S = 1.0


def noises(buffers: int) -> dict[str, Any]:
    """What is measured; the cost of buffers does not depend on their decays."""
    decays = tuple(1 - 0.5 * 8.0**-i for i in range(buffers))
    blt = BLT(buffers=buffers, decays=decays, scales=(0.9 / buffers,) * buffers)
    correlated = {f"BLT, {buffers} buffers": blt, "Tree": Tree(), "Banded, width 8": Banded(width=8)}
    planned = {n: CorrelatedNoise(strategy=s, noise_multiplier=1.0).planned_for(64, 8) for n, s in correlated.items()}
    return {"GaussianNoise": GaussianNoise(noise_multiplier=1.0), **planned}


class Cost(NamedTuple):
    """Seconds of each round, by the clock and of all cores; memory above the start; how many numbers are remembered."""

    taken: list[float]
    worked: list[float]
    peak_mb: float
    remembered: int


def measure(name: str, num_params: int, num_rounds: int, buffers: int) -> Cost:
    """What one noise costs, in this process."""
    noise, mean = noises(buffers)[name], Aggregate(np.full(num_params, 0.01), {"clip.below": 0.0})
    state, taken, worked, before = noise.init(num_params), [], [], peak_mb()
    for number in range(num_rounds):
        began, at_work = time.perf_counter(), time.process_time()
        released, state = noise.release(mean, state, 0.01, Key.of(number))
        taken.append(time.perf_counter() - began)
        worked.append(time.process_time() - at_work)
        assert np.isfinite(released.values[::1000]).all()
    remembered = 0 if state is None else sum(len(vector) for vector in state["vectors"])
    return Cost(taken, worked, peak_mb() - before, remembered)


def peak_mb() -> float:
    """The most memory that this process has held."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def main(words: list[str] | None = None) -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--params", type=int, default=10_000_000)
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--buffers", type=int, default=4)
    options.add_argument("--check", action="store_true", help="exit status 1 when the bar is missed")
    given = options.parse_args(words)
    print(setting("cryptography"))
    print(f"{given.params:,} parameters, {given.rounds} rounds")
    missed = False
    for name in noises(given.buffers):
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            cost = pool.apply(measure, (name, given.params, given.rounds, given.buffers))
        print(
            f"{name:>16}: {statistics.median(cost.taken):.3f} s a round (at most {max(cost.taken):.3f}; "
            f"{statistics.median(cost.worked):.3f} s of a core), peak {cost.peak_mb:,.0f} MB, "
            f"remembers {cost.remembered / given.params:.1f} numbers a parameter"
        )
        if name.startswith("BLT"):
            missed = statistics.median(cost.taken) >= BAR_S or cost.remembered > given.buffers * (given.params + 1)
    return int(given.check and missed)


if __name__ == "__main__":
    raise SystemExit(main())
