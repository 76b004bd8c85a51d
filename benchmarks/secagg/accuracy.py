"""What secure sums cost in accuracy on MNIST: alone, with noise in shares, and among clients that lie.

    python benchmarks/secagg/accuracy.py [--task sum|noise|liars] [--seeds 3] [--check]

``sum``: FedAvg with the 2NN of McMahan et al. 2017, 100 clients, 10 a round, with a plain mean and with 16-bit secure
sums. ``noise``: 1,000 clients, everyone in every round, a small network, epsilon 8 at delta 1e-5: noise of the server's
on a plain mean, and shares of Skellam noise in secure sums, sized for 810 honest clients (900 survivors, a tenth of
which collude). ``liars``: a tenth of the clients send ten times the opposite of what they learned, and keep to no
bound; a secure mean, and the median over 16 random groups of 3 clients that are summed apart. MNIST's test digits are
scored after the last round, and the bars are those of the means over all seeds.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.table import Table

import hansa
from hansa.attacks.sign_flip import SignFlip

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "mnist"))

import digits
from setting import SHARED_DATA, need, setting

if TYPE_CHECKING:
    from torch import nn

DATA = SHARED_DATA / "mnist_writers" / "mnist_writers.npz"
NUM_ROUNDS = {"sum": 60, "noise": 40, "liars": 15}
HONEST = 0.9  # of the clients
Runs = dict[str, Callable[[digits.Pair, int], float]]


def build(*hidden: int) -> nn.Module:
    """A network of 784 pixels, hidden layers and 10 digits; (200, 200) has 199,210 parameters, (32,) 25,450."""
    from torch import nn

    sizes = (784, *hidden)
    layers = [part for pair in pairwise(sizes) for part in (nn.Linear(*pair), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(sizes[-1], 10))


def accuracy(
    algorithm: Any,
    transforms: tuple[Any, ...],
    aggregator: Any,
    data: digits.Pair,
    seed: int,
    *,
    hidden: tuple[int, ...] = (200, 200),
    **schedule: Any,
) -> float:
    """On the test digits, after the last round."""
    training, test = data
    federation = hansa.Federation(
        learner=hansa.TorchLearner(partial(build, *hidden), loss="cross_entropy", metrics=("accuracy",)),
        algorithm=algorithm,
        transforms=transforms,
        aggregator=aggregator,
    )
    num_clients = schedule.pop("num_clients")
    run = hansa.simulate(
        federation,
        hansa.Population.split(training, by=hansa.IID(), num_clients=num_clients, seed=seed),
        evaluate_on=test,
        evaluate_every=schedule["num_rounds"],
        runtime=hansa.Processes(num_workers=2),
        seed=seed,
        **schedule,
    )
    return run.history[-1].metrics["accuracy"]


def sum_runs(num_rounds: int) -> Runs:
    """A plain mean and a secure one, behind a bound that no update reaches."""
    fedavg = hansa.FedAvg(client_learning_rate=0.1, local_epochs=1, batch_size=20)
    setup = {"num_clients": 100, "cohort_size": 10, "num_rounds": num_rounds}
    averaged = hansa.Averaged(algorithm=fedavg, decay=0.9)
    bounded = (hansa.Clip(norm=10.0),)
    return {
        "plain mean": partial(accuracy, averaged, (), hansa.Mean(), **setup),
        "secure mean, 16 bits": partial(
            accuracy, averaged, bounded, hansa.SecureMean(bits=16, weighting="examples", max_weight=600), **setup
        ),
    }


def noise_runs(num_rounds: int) -> Runs:
    """Central and distributed noise at the same epsilon."""
    algorithm = hansa.Averaged(
        algorithm=hansa.FedAvgM(
            client_learning_rate=0.2,
            local_steps=3,
            batch_size=20,
            server_learning_rate=0.7,
            server_momentum=0.9,
        ),
        decay=0.9,
    )
    clip, target = hansa.Clip(norm=0.3), {"epsilon": 8.0, "delta": 1e-5}
    setup: dict[str, Any] = {"num_clients": 1000, "num_rounds": num_rounds, "sampler": hansa.All(), "hidden": (32,)}
    return {
        "noise of the server's": partial(
            accuracy, algorithm, (clip, hansa.GaussianNoise(**target)), hansa.Mean(weighting="clients"), **setup
        ),
        "noise in shares": partial(
            accuracy, algorithm, (clip, hansa.SkellamNoise(**target)), hansa.SecureMean(min_survivors=900), **setup
        ),
    }


def liars_runs(num_rounds: int) -> Runs:
    """Nobody lies; a tenth do, with and without groups."""
    fedavg = hansa.FedAvg(client_learning_rate=0.1, local_epochs=1, batch_size=20)
    setup = {"num_clients": 100, "cohort_size": 48, "num_rounds": num_rounds}
    rows = (hansa.Clip(norm=50.0), hansa.Rotate())
    groups = hansa.SecureMean(num_groups=16, across=hansa.Median())

    def lied_to(aggregator: Any, data: digits.Pair, seed: int) -> float:
        clients = [f"client-{i:03d}" for i in np.random.default_rng(seed).permutation(100)[: round(100 * (1 - HONEST))]]
        return accuracy(SignFlip(fedavg, clients=tuple(clients), scale=10.0), rows, aggregator, data, seed, **setup)

    return {
        "nobody lies": partial(accuracy, fedavg, rows, hansa.SecureMean(), **setup),
        "a tenth lie": partial(lied_to, hansa.SecureMean()),
        "a tenth lie, median over groups": partial(lied_to, groups),
    }


RUNS = {"sum": sum_runs, "noise": noise_runs, "liars": liars_runs}


def misses(task: str, found: list[float]) -> list[str]:
    """Which bars the mean accuracies of a task miss."""
    first, second = found[0], found[1]
    bars = {
        "sum": [(abs(first - second) <= 0.001, "secure sums more than 0.1 points from plain ones")],
        "noise": [(second >= first - 0.01, "noise in shares more than a point below the server's")],
        "liars": [
            (second <= first - 0.2, "liars do not spoil a secure mean, so that nothing is shown"),
            (found[-1] >= first - 0.03, "the median over groups more than 3 points below what nobody lies to"),
        ],
    }
    return [words for is_met, words in bars[task] if not is_met]


def main(arguments: list[str] | None = None) -> int:
    options = _options(arguments)
    need(options.data.is_file(), f"{options.data}: expected MNIST as an npz file, found none; give --data")
    data = digits.mnist(options.data)
    screen = Console(width=140)
    shown = Table(title="MNIST: accuracy on the test digits after the last round")
    for head in ("task", "rounds", "run", "seeds", "mean", "s a seed"):
        shown.add_column(head, justify="right" if head in ("rounds", "mean", "s a seed") else "left")
    missed = []
    for task in [options.task] if options.task else RUNS:
        num_rounds, means = options.rounds or NUM_ROUNDS[task], []
        for name, run in RUNS[task](num_rounds).items():
            started = time.perf_counter()
            found = [run(data, seed) for seed in range(options.seeds)]
            seconds = (time.perf_counter() - started) / options.seeds
            means.append(mean(found))
            each = " ".join(f"{value:.4f}" for value in found)
            print(f"{task}, {name}: {each} ({seconds:.0f} s a seed)", file=sys.stderr, flush=True)
            shown.add_row(task, str(num_rounds), name, each, f"{means[-1]:.4f}", f"{seconds:.0f}")
        missed += misses(task, means)
    screen.print(shown)
    screen.print(setting("torch"))
    for words in missed:
        screen.print(f"missed: {words}")
    return 1 if missed and options.check else 0


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=sorted(RUNS), help="one of them; all without it")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, help="in the place of each task's own")
    parser.add_argument("--data", type=Path, default=DATA, help="npz with x_train, y_train, x_test, y_test")
    parser.add_argument("--check", action="store_true", help="exit status 1 where a bar is missed")
    options = parser.parse_args(arguments)
    need(options.seeds >= 1, f"--seeds: expected 1 or more, found {options.seeds}")
    return options


if __name__ == "__main__":
    raise SystemExit(main())
