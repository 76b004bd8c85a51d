"""Runs with correlated noise: the ledger, epsilon, turns of clients, and going on after a stop."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

import support
from hansa.aggregators.mean import Mean
from hansa.core.errors import InputError
from hansa.core.key import Key
from hansa.data.sampling import Uniform
from hansa.data.separation import MinSeparation
from hansa.privacy import gaussian
from hansa.privacy.accountant import Turn
from hansa.privacy.blt import BLT
from hansa.privacy.ledger import Entry, Ledger
from hansa.privacy.strategies import Banded, Tree
from hansa.runtimes.devices import Devices
from hansa.runtimes.inprocess import InProcess
from hansa.runtimes.virtual_time import VirtualTime
from hansa.training.buffered import Buffered
from hansa.training.check import problems
from hansa.training.checkpoint import Checkpoint
from hansa.training.loop import Loop
from hansa.training.privacy import Accounts, bound, coming, min_separation, noise_of, planned, sampling_of
from hansa.training.privacy_statement import statement
from hansa.training.schedule import Schedule
from hansa.training.simulate import simulate
from hansa.transforms.adaptive_clip import AdaptiveClip
from hansa.transforms.clip import Clip
from hansa.transforms.correlated_noise import CorrelatedNoise

POPULATION = support.targets(**{f"c{i}": (i % 5, -1, 2) for i in range(40)})
STRATEGIES = {"tree": Tree(), "banded": Banded(), "blt": BLT()}
every_strategy = pytest.mark.parametrize("strategy", STRATEGIES.values(), ids=STRATEGIES)
TURNS = {"num_rounds": 12, "cohort_size": 4, "sampler": MinSeparation(rounds=4)}


def private(strategy=None, clip=None, **amounts):
    noise = CorrelatedNoise(strategy=strategy or BLT(), **(amounts or {"epsilon": 6.0, "delta": 1e-3}))
    return support.quadratic(transforms=(clip or AdaptiveClip(start=1.0), noise), aggregator=Mean(weighting="clients"))


@every_strategy
def test_the_last_rounds_epsilon_is_that_of_one_gaussian_release_and_the_target(strategy):
    run = simulate(private(strategy), POPULATION, **TURNS)
    own = noise_of(bound(private(strategy), Schedule(**TURNS), 40))
    spent = [row.epsilon for row in run.history]
    assert spent == sorted(spent)
    assert spent[-1] == pytest.approx(gaussian.epsilon(1e-3, own.noise_multiplier, 1), rel=1e-9)
    assert 5.999 < spent[-1] <= 6.0
    assert run.info["privacy"]["epsilon"] == spent[-1]


@every_strategy
def test_a_run_goes_on_from_its_checkpoint_to_the_same_bits(strategy, tmp_path):
    whole = simulate(private(strategy), POPULATION, **TURNS)
    stop = {"checkpoint": tmp_path / "run", **TURNS}
    simulate(private(strategy), POPULATION, on_round=lambda row: row.round < 6, **stop)
    replace(Checkpoint.read(tmp_path / "run"), stopped=False).write(tmp_path / "run")  # as a crash would have left it
    resumed = simulate(private(strategy), POPULATION, **stop)
    assert resumed.parameters.tobytes() == whole.parameters.tobytes()
    assert [row.epsilon for row in resumed.history] == [row.epsilon for row in whole.history]


def open_loop(federation, schedule, clients, ledger):
    own = bound(federation, schedule, len(POPULATION))
    site = InProcess(block_size=4).open(own, POPULATION.load, Key.of("secrets"))
    params = own.learner.initial(Key.of(0))
    return Loop(
        federation=own, schedule=schedule, runtime=site, key=Key.of(0), clients=clients, params=params, ledger=ledger
    )


def test_over_joins_and_leaves_nobody_is_in_two_near_rounds_and_the_ledger_has_one_entry_a_round():
    schedule, draw, asked = Schedule(**TURNS | {"num_rounds": 30}), np.random.default_rng(0), []
    here = [tuple(c for c in POPULATION.ids if draw.random() < 0.6) for _ in range(31)]
    ledger = Ledger()
    loop = open_loop(private(), schedule, lambda: here[len(ledger.entries)], ledger)
    start = loop.runtime.start
    loop.runtime.start = lambda plan, clients: asked.append((plan.slot.round, clients)) or start(plan, clients)
    loop.run()
    rounds = {client: [n for n, cohort in asked if client in cohort] for client in POPULATION.ids}
    assert all(np.diff(found).min(initial=99) >= 4 for found in rounds.values())
    assert max(map(len, rounds.values())) > 2
    assert [entry.event.round for entry in ledger.entries] == list(range(30))
    assert [entry.event.sampling for entry in ledger.entries] == [Turn(n % 4, 4) for n in range(30)]


def test_a_group_of_nobody_leaves_its_round_out_and_epsilon_counts_who_came_nearer_for_it():
    sampler = MinSeparation(rounds=4)
    away = set(sampler.of_round(POPULATION.ids, 2))
    here = tuple(client for client in POPULATION.ids if client not in away)
    ledger = Ledger()
    schedule = Schedule(**TURNS)
    loop = open_loop(private(noise_multiplier=1.0, delta=1e-3), schedule, lambda: here, ledger)
    point = loop.run()
    assert [row.num_clients for row in point.history] == [4, 4, 0, 4] * 3
    assert len(ledger.entries) == 9
    strategy = noise_of(loop.federation).mechanism.strategy
    takes = np.array([1.0, 0, 0] * 3)  # rows of the noise: every third one
    part = np.linalg.norm(strategy.applied(takes)) / noise_of(loop.federation).mechanism.sensitivity
    assert point.history[-1].epsilon == pytest.approx(gaussian.epsilon(1e-3, 1.0 / part, 1))


def test_a_run_stops_before_the_round_that_would_overspend():
    run = simulate(private(noise_multiplier=0.8, delta=1e-3, budget=3.0), POPULATION, **TURNS)
    assert 0 < len(run.history) < 12
    assert run.history[-1].epsilon <= 3.0
    whole = simulate(private(noise_multiplier=0.8, delta=1e-3), POPULATION, **TURNS)
    assert whole.history[len(run.history)].epsilon > 3.0


def test_without_turns_noise_is_sized_for_clients_in_every_round():
    schedule = Schedule(num_rounds=12, cohort_size=4, sampler=Uniform())
    own = noise_of(bound(private(Tree(), noise_multiplier=1.0), schedule, 40))
    assert own.mechanism.min_separation == min_separation(schedule) == 1
    assert own.mechanism.sensitivity > 12**0.5


def test_a_virtual_clock_keeps_turns_too():
    runtime = VirtualTime(devices=Devices(latency_s=1.0, dropout=0.2))
    run = simulate(private(), POPULATION, runtime=runtime, over_selection=1.5, **TURNS)
    assert run.history[-1].epsilon == pytest.approx(6.0, rel=1e-3)


@pytest.mark.parametrize(
    ("cohort_size", "denominator"), [(4, 4), (30, 30), (None, 10)], ids=["small", "above a group", "whole group"]
)
def test_the_divisor_is_fixed_whoever_comes(cohort_size, denominator):
    schedule = Schedule(num_rounds=4, cohort_size=cohort_size, sampler=MinSeparation(rounds=4))
    assert bound(private(), schedule, 40).aggregator.denominator == denominator
    run = simulate(private(), POPULATION, num_rounds=4, cohort_size=cohort_size, sampler=MinSeparation(rounds=4))
    group = [len(MinSeparation(rounds=4).of_round(POPULATION.ids, number)) for number in range(4)]
    assert [row.num_clients for row in run.history] == [min(cohort_size or 40, size) for size in group]


def test_a_deployment_waits_for_enough_clients_for_every_group():
    assert Schedule(**TURNS).clients_needed == 16
    assert Schedule(**TURNS, min_clients=2).clients_needed == 8


def test_a_sampler_that_promises_turns_must_keep_them():
    class Promising(Uniform):
        def turn(self, number):
            return number % 2, 2

    with pytest.raises(InputError, match=r"expected of_round\(ids, number\) beside turn\(number\)"):
        Schedule(num_rounds=3, sampler=Promising())


def test_a_buffer_and_turns_do_not_go_together():
    schedule = Schedule(num_rounds=4, sampler=MinSeparation(rounds=4), buffer=Buffered(size=5))
    found = problems(private(clip=Clip(norm=1.0)), schedule, 40)
    assert [problem.sentence for problem in found] == [
        "MinSeparation lets groups take turns by rounds, and a buffer counts whoever comes."
    ]
    assert min_separation(schedule) == 1
    assert not isinstance(sampling_of(schedule, 40, 0), Turn)


def test_the_statement_says_that_rounds_are_one_mechanism_and_that_nothing_is_amplified():
    schedule = Schedule(**TURNS)
    own = bound(private(), schedule, 40)
    said = statement(own, Counter(planned(noise_of(own), schedule, 40)), 40, simulated=False)
    for part in (
        "12 releases that are one Gaussian mechanism together (noise multiplier ",
        "correlated by BLT",
        "one round of 4",
        "no amplification",
    ):
        assert part in said["statement"]
    assert "checkpoints" in said["facts"]["not covered"]
    assert said["epsilon"] == pytest.approx(6.0, rel=1e-3)


def test_accounts_of_a_long_run_stay_exact():
    schedule = Schedule(num_rounds=300, cohort_size=2, sampler=MinSeparation(rounds=20))
    own = bound(private(), schedule, 40)
    ledger = Ledger()
    accounts = Accounts(own, schedule, ledger)
    for number in range(300):
        assert accounts.has_room(number, 40)
        event = coming(noise_of(own), schedule, 40, number)
        ledger.add(Entry.of("train", number, 0, Key.of(number), ("c0",), event))
        spent = accounts.spent(40)["epsilon"]
    assert 5.999 < spent <= 6.0
    ledger.add(Entry.of("train", 299, 1, Key.of("again"), ("c0",), event))
    assert accounts.spent(40)["epsilon"] > 6.0
