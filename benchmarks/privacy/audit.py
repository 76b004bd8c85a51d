"""How much an audit proves: correct mechanisms and broken ones, several claims, 20 seeds.

    python benchmarks/privacy/audit.py                    # some four minutes
    python benchmarks/privacy/audit.py --canaries 4000 --seeds 5

Each line is a mechanism of the tests (``tests/support_audit.py``), attacked through the whole chain: the lower bound as
a share of the claim, what the one-run audit alone proves, the estimate, and how many seeds called the claim broken.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import numpy as np

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(REPOSITORY / "tests"), str(REPOSITORY / "benchmarks")]

from setting import setting  # noqa: E402  # the folder must be on the path before

import hansa  # noqa: E402
from hansa.training.audit import Audit, audit  # noqa: E402
from hansa.training.privacy import bound, noise_of  # noqa: E402
from support_audit import TwiceAsOften, controls, federation, population  # noqa: E402

NUM_PARAMS, DELTA, ROUNDS = 4000, 1e-5, 10


def line(name: str, found: list[Audit], took_s: float) -> str:
    """One row of the table."""
    claim = found[0].claim.epsilon
    bounds = np.array([one.lower_bound for one in found])
    run = np.mean([one.one_run.epsilon for one in found])
    estimate = np.mean([one.estimate for one in found])
    broken = sum(one.is_broken for one in found)
    large = np.mean([one.levels[-1].proved for one in found])
    return (
        f"| {claim:.3g} | {name} | {bounds.mean():.2f} ({bounds.min():.2f} to {bounds.max():.2f}) | "
        f"{bounds.mean() / claim:.0%} | {run:.2f} | {large:.2f} of "
        f"{found[0].levels[-1].claimed:.2f} | {estimate:.3g} | {broken} of {len(found)} | {took_s:.2f} s |"
    )


def attack(name: str, one: hansa.Federation, schedule: hansa.Schedule, num_canaries: int, num_seeds: int) -> bool:
    """Print a mechanism's row; whether no seed was wrong about it."""
    clients = population(NUM_PARAMS, 2)
    began = time.perf_counter()
    found = [audit(one, clients, schedule, num_canaries=num_canaries, seed=seed) for seed in range(num_seeds)]
    print(line(name, found, (time.perf_counter() - began) / num_seeds), flush=True)
    return all(result.is_broken != name.startswith("correct") for result in found)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--canaries", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=20)
    given = parser.parse_args()
    print(setting("dp-accounting"))
    print(f"{NUM_PARAMS} parameters, {ROUNDS} rounds, {given.canaries} canaries, {given.seeds} seeds, delta {DELTA}\n")
    head = "claimed | mechanism | lower bound (range) | of it | one-run alone | at delta 0.1 | estimate | broken"
    print(f"| {head} | an audit |\n|{'---|' * 9}")
    right = True
    for epsilon in (2, 4, 8):
        schedule = hansa.Schedule(num_rounds=ROUNDS)
        claimed = federation(NUM_PARAMS, noise=hansa.GaussianNoise(epsilon=epsilon, delta=DELTA))
        multiplier = noise_of(bound(claimed, schedule, 2)).noise_multiplier
        for name, one in controls(NUM_PARAMS, multiplier, DELTA).items():
            right &= attack(name, one, schedule, given.canaries, given.seeds)
    sampled = federation(NUM_PARAMS, noise=hansa.GaussianNoise(noise_multiplier=2.0, delta=1e-3))
    for sampler, name in ((hansa.Poisson(), "correct, Poisson"), (TwiceAsOften(), "sampled twice as often")):
        schedule = hansa.Schedule(num_rounds=24, cohort_size=1, sampler=sampler)
        right &= attack(f"{name} (24 rounds, delta 0.001)", sampled, schedule, given.canaries, given.seeds)
    print("\nno seed was wrong" if right else "\nsome seeds did not see what is broken: more canaries see more")


if __name__ == "__main__":
    main()
