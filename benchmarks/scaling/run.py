"""How time and memory of a simulated round grow: with the cohort, with the model, with the population.

    python benchmarks/scaling/run.py [--rounds 12] [--check] [--output FOLDER]

Every point is a process of its own. Each client holds 20 examples of 30 features and trains one epoch of one batch:
logistic regression for cohorts and populations (``LinearLearner``), a perceptron of growing width for parameters
(``TorchLearner``). Datasets of the populations are made on demand and not kept. ``--check`` asks the bar: a million
clients, cohort 1,000, under 0.1 s a round and 1.5 GB, and no more memory after 1,000 rounds than after 100.
"""

from __future__ import annotations

import argparse
import itertools
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from setting import setting

import hansa

NUM_FEATURES, NUM_EXAMPLES = 30, 20
COHORTS = (10, 100, 1_000, 10_000)
PARAMETERS = (1_000, 10_000, 100_000, 1_000_000, 10_000_000)
POPULATIONS = (1_000, 10_000, 100_000, 1_000_000)
BAR_SECONDS, BAR_MB, BAR_GROWTH = 0.1, 1536, 1.05


def main() -> int:
    options = _options()
    if options.point:
        print(json.dumps(point(**json.loads(options.point))))
        return 0
    tables = {
        "cohort": [_apart(cohort=n, population=max(n, 10_000), rounds=options.rounds) for n in COHORTS],
        "parameters": [
            _apart(cohort=100, population=1_000, parameters=n, rounds=min(options.rounds, 4 if n > 1_000_000 else 12))
            for n in PARAMETERS
        ],
        "population": [_apart(cohort=1_000, population=n, rounds=options.rounds) for n in POPULATIONS],
    }
    print(setting())
    for name, points in tables.items():
        print(f"\n| {name} | ms a round | peak memory, MB |\n|---|---|---|")
        for one in points:
            print(f"| {one[name]:,} | {one['seconds'] * 1e3:.1f} | {one['peak_mb']:.0f} |")
    if options.output:
        Path(options.output).mkdir(parents=True, exist_ok=True)
        (Path(options.output) / "scaling.json").write_text(json.dumps(tables, indent=1) + "\n")
    return _check(options) if options.check else 0


def _check(options: argparse.Namespace) -> int:
    """The bar on a million clients."""
    long = _apart(cohort=1_000, population=1_000_000, rounds=1_000)
    growth = long["peak_mb"] / long["peak_mb_at_100"]
    print(
        f"\na million clients, cohort 1,000, 1,000 rounds: {long['seconds']:.3f} s a round (bar {BAR_SECONDS}), "
        f"{long['peak_mb']:.0f} MB (bar {BAR_MB}), {growth:.3f} times the memory of 100 rounds (bar {BAR_GROWTH})"
    )
    return 0 if long["seconds"] < BAR_SECONDS and long["peak_mb"] < BAR_MB and growth < BAR_GROWTH else 1


def _apart(**settings: int) -> dict[str, Any]:
    """One point, measured in a process of its own."""
    command = [sys.executable, __file__, "--point", json.dumps(settings)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, Any] = {**settings, **json.loads(done.stdout.splitlines()[-1])}
    return found


def point(cohort: int, population: int, rounds: int, parameters: int = 0) -> dict[str, Any]:
    """Median seconds a round, without the first, and peak memory."""
    ended, peaks = [], []

    def on_round(row: Any) -> None:
        ended.append(time.perf_counter())
        peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)

    hansa.simulate(
        _federation(parameters),
        hansa.Population.on_demand(population, _client, sizes=np.full(population, NUM_EXAMPLES)),
        num_rounds=rounds,
        cohort_size=cohort,
        evaluate_every=rounds,
        runtime=hansa.InProcess(),
        on_round=on_round,
    )
    seconds = statistics.median(b - a for a, b in itertools.pairwise(ended))
    return {"seconds": seconds, "peak_mb": peaks[-1], "peak_mb_at_100": peaks[min(99, len(peaks) - 1)]}


def _client(position: int) -> hansa.Dataset:
    """The examples of one client, from its position alone."""
    rng = np.random.default_rng(position)
    x = rng.standard_normal((NUM_EXAMPLES, NUM_FEATURES), dtype=np.float32)
    return hansa.Dataset(x, (x[:, 0] > 0).astype(np.int64))


def _federation(parameters: int) -> hansa.Federation:
    algorithm = hansa.FedAvg(client_learning_rate=0.1, local_epochs=1, batch_size=NUM_EXAMPLES)
    learner: Any = hansa.LinearLearner(num_features=NUM_FEATURES, num_classes=2)
    if parameters:
        hidden = max(1, parameters // (NUM_FEATURES + 4))

        def build() -> Any:
            from torch import nn

            return nn.Sequential(nn.Linear(NUM_FEATURES, hidden), nn.ReLU(), nn.Linear(hidden, 2))

        learner = hansa.TorchLearner(build)
    return hansa.Federation(learner=learner, algorithm=algorithm)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=12, help="rounds of each point (default: %(default)s)")
    parser.add_argument("--output", help="folder for scaling.json")
    parser.add_argument("--check", action="store_true", help="measure the bar too; exit status 1 if it is missed")
    parser.add_argument("--point", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
