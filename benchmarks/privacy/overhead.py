"""What differential privacy adds to a round of W1, the MLP of the simulation benchmark.

    OMP_NUM_THREADS=1 python benchmarks/privacy/overhead.py [--turns 6] [--rounds 22] [--check]

MLP 784-64-10, 100 of 1,000 clients of 50 examples, batches of 10, in blocks. The same federation without transforms,
and with ``AdaptiveClip`` and ``GaussianNoise``, in turns; medians of all rounds but each run's first two. A third one
has no transforms either, and an aggregator that looks at rows: to be clipped, a client's row must be written, where a
plain mean adds the first layer of many clients as one product (``hansa.unwritten``). The last line says where the time
goes, beside that third one: clipping is in "client", noise, ledger and accountant in "combining" and "rest".
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import hansa

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "simulation"))

import models
import workloads
from setting import setting

BAR = 1.05
KINDS = ("plain", "rows", "private")


class Looking(hansa.Mean):
    """A mean that wants rows, as a transform does."""

    def fold(self, updates: Any, cuts: Sequence[int] | None = None) -> Any:
        """The same sum."""
        return super().fold(updates, cuts)


def run(workload: workloads.Workload, kind: str, num_rounds: int) -> tuple[list[float], dict[str, float]]:
    """Seconds of each round but the first two, and milliseconds of a median one by stage."""
    own = workload.setting
    clients = {f"c{i}": hansa.Dataset(*workload.client(i)) for i in range(own.num_clients)}
    noisy = (hansa.AdaptiveClip(start=0.5), hansa.GaussianNoise(noise_multiplier=1.0, delta=1e-5))
    federation = hansa.Federation(
        learner=hansa.TorchLearner(lambda: models.build("W1"), loss="cross_entropy"),
        algorithm=hansa.FedAvg(client_learning_rate=own.learning_rate, local_epochs=1, batch_size=own.batch_size),
        transforms=noisy if kind == "private" else (),
        aggregator=(Looking if kind == "rows" else hansa.Mean)(weighting="clients"),
    )
    done = hansa.simulate(federation, clients, num_rounds=num_rounds, cohort_size=own.cohort_size, profile=True)
    stages = {name: 1000 * seconds for name, seconds in done.info["profile"]["median_round"].items()}
    return [row.seconds for row in done.history[2:]], stages


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=22)
    parser.add_argument("--check", action="store_true", help="exit status 1 where the bar is missed")
    options = parser.parse_args(arguments)
    workload = workloads.synthetic("W1")
    seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    stages: dict[str, dict[str, float]] = {}
    for _ in range(options.turns):
        for kind in KINDS:
            taken, stages[kind] = run(workload, kind, options.rounds)
            seconds[kind] += taken
    plain, rows, noisy = (1000 * median(seconds[kind]) for kind in KINDS)
    print(f"a round: {plain:.2f} ms without, {noisy:.2f} ms with privacy: {noisy / plain:.3f} times (bar {BAR})")
    print(f"a round whose aggregator looks at rows: {rows:.2f} ms; with privacy {noisy / rows:.3f} times")
    added = {name: noisy - stages["rows"].get(name, 0.0) for name, noisy in stages["private"].items()}
    print("added, ms:", ", ".join(f"{name} {value:.2f}" for name, value in added.items() if abs(value) >= 0.05))
    print(setting("torch"))
    return 1 if options.check and noisy / plain > BAR else 0


if __name__ == "__main__":
    sys.exit(main())
