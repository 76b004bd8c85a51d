"""Fed-Heart-Disease with record-level differential privacy: DP-SGD at each hospital, beside FLamby's published column.

    python benchmarks/privacy/heart.py [--data heart.csv] [--splits 20] [--seeds 3] [--check]

Logistic regression on FLamby's 13 features; each hospital adds noise to its full-batch sum of clipped gradients
(``hansa.DPSGD``), and nothing else leaves it. Features are scaled by public constants: statistics of the rows would
be releases of their own. Rounds, learning rate and constants are chosen anew for every split and epsilon from a short
list, by accuracy on rows held out from that split's training rows (three inner splits), never on its test rows. That
choice looks at training rows without noise, and is not in epsilon.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

import hansa

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "heart"))

import flamby
from setting import SHARED_DATA, need, setting

DATA = SHARED_DATA / "uci_heart_4hospitals" / "heart.csv"
DELTA = 1e-4
BARS = {0.1: 0.70, 1.0: 0.79, 5.0: 0.80}
# FLamby's dp_example, mean of the four hospitals' accuracies, 5 seeds of one split.
PUBLISHED = {0.1: 0.606, 1.0: 0.685, 5.0: 0.704}
REMARK = (
    "FLamby's own epsilons are too small: its accountant counts epochs for steps (15, where 1,500 steps run, drawn "
    "from a shuffled loader and not from the Poisson one that is accounted). Recomputed for the true steps by RDP they "
    "are about 0.14 / 1.46 / 7.0 at Cleveland and 0.38 / 4.1 / 22 at Switzerland."
)
DIVISOR = 100.0  # public: about what a hospital has; with it no number of records leaves
_INNER = 3  # splits of the training rows, by which settings are chosen

# What is common knowledge of adults: center and scale. All others are 0 or 1.
_PUBLIC = {"age": (50, 10), "trestbps": (130, 20), "chol": (200, 100), "thalach": (140, 25), "oldpeak": (1, 1)}


class Setting(NamedTuple):
    """What is chosen on training rows."""

    num_rounds: int
    learning_rate: float
    is_centered: bool  # yes and no as +1 and -1, not as 1 and 0


CANDIDATES = tuple(
    Setting(rounds, rate, centered)
    for rounds, rate in ((1, 2.0), (3, 1.0), (3, 2.0), (6, 1.0))
    for centered in (False, True)
)


def trained(parts: flamby.Split, epsilon: float, chosen: Setting, names: tuple[str, ...], seed: int) -> hansa.Run:
    """A run over the hospitals' training rows."""
    other = (0.5, 0.5) if chosen.is_centered else (0, 1)
    constants = [_PUBLIC.get(name, other) for name in names]
    federation = hansa.Federation(
        learner=hansa.LinearLearner(num_features=flamby.NUM_FEATURES, num_classes=2),
        algorithm=hansa.FedAvg(
            client_learning_rate=chosen.learning_rate,
            client_optimizer=hansa.DPSGD(clipping_norm=1.0, epsilon=epsilon, delta=DELTA, divisor=DIVISOR),
            local_steps=1,
        ),
        prepare=(hansa.Rescale(center=tuple(c for c, _ in constants), scale=tuple(s for _, s in constants)),),
        aggregator=hansa.Mean(weighting="clients"),
    )
    data = {name: train for name, (train, _) in parts.items()}
    return hansa.simulate(federation, data, num_rounds=chosen.num_rounds, seed=seed)


def client_mean(run: hansa.Run, parts: flamby.Split) -> float:
    """Mean of the hospitals' accuracies on their own held-out rows."""
    return float(np.mean([run.evaluate(test)["accuracy"] for _, test in parts.values()]))


def inner(parts: flamby.Split, number: int, seed: int) -> flamby.Split:
    """A split of the training rows of a split."""
    found: flamby.Split = {}
    for name, (train, _) in parts.items():
        order = np.random.default_rng([seed, number, len(train)]).permutation(len(train))
        cut = round(len(train) * 0.66)
        found[name] = (train.take(order[:cut]), train.take(order[cut:]))
    return found


def choose(parts: flamby.Split, epsilon: float, names: tuple[str, ...], seed: int) -> Setting:
    """The candidate that does best on rows held out from the training rows."""
    folds = [inner(parts, number, seed) for number in range(_INNER)]

    def score(candidate: Setting) -> float:
        runs = [trained(fold, epsilon, candidate, names, 1000 + i) for i, fold in enumerate(folds)]
        return float(np.mean([client_mean(run, fold) for run, fold in zip(runs, folds, strict=True)]))

    return max(CANDIDATES, key=score)


class Column(NamedTuple):
    """What came out at one epsilon."""

    accuracies: list[float]  # one a split: the mean over seeds
    spent: float  # the accountant's epsilon
    chosen: Counter[Setting]


def measured(by_hospital: dict[str, hansa.Dataset], epsilon: float, num_splits: int, num_seeds: int) -> Column:
    """Accuracy at one epsilon."""
    names = tuple(next(iter(by_hospital.values())).feature_names or ())
    accuracies, spent, chosen = [], 0.0, Counter[Setting]()
    for seed in range(num_splits):
        parts = flamby.split(by_hospital, seed)
        best = choose(parts, epsilon, names, seed)
        chosen[best] += 1
        runs = [trained(parts, epsilon, best, names, noise) for noise in range(num_seeds)]
        accuracies.append(float(np.mean([client_mean(run, parts) for run in runs])))
        spent = max(spent, *(run.info["privacy"]["epsilon"] for run in runs))
    return Column(accuracies, spent, chosen)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--splits", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--check", action="store_true", help="exit status 1 where a bar is missed")
    options = parser.parse_args()
    need(options.splits > 0 and options.seeds > 0, "expected --splits and --seeds of 1 or more")
    by_hospital, screen, started = flamby.hospitals(options.data), Console(), time.perf_counter()
    table = Table(title=f"client mean accuracy, {options.splits} splits x {options.seeds} seeds, delta {DELTA:g}")
    for column in ("epsilon asked", "accountant's", "hansa (se over splits)", "bar", "FLamby's", "chosen most"):
        table.add_column(column)
    missed = []
    for epsilon, bar in BARS.items():
        found = measured(by_hospital, epsilon, options.splits, options.seeds)
        mean, error = np.mean(found.accuracies), np.std(found.accuracies) / np.sqrt(len(found.accuracies))
        (most, times), *_ = found.chosen.most_common(1)
        scaling = "±1" if most.is_centered else "0/1"
        words = f"{most.num_rounds} rounds, rate {most.learning_rate:g}, {scaling} ({times})"
        row = (f"{epsilon:g}", f"{found.spent:.4f}", f"{mean:.3f} ({error:.3f})", f"{bar:.2f}")
        table.add_row(*row, f"{PUBLISHED[epsilon]:.3f}", words)
        missed += [epsilon] if mean < bar else []
    screen.print(table)
    screen.print(REMARK)
    screen.print(f"{time.perf_counter() - started:.0f} s; {setting('dp-accounting', 'scikit-learn')}")
    if missed:
        screen.print(f"below the bar at epsilon {', '.join(f'{one:g}' for one in missed)}")
    raise SystemExit(1 if missed and options.check else 0)


if __name__ == "__main__":
    main()
