"""Buffered asynchronous rounds: the same plans and reports, but nobody waits for the slowest."""

import math

import numpy as np
import pytest

import support
from hansa.aggregators.one_exchange import only_exchange
from hansa.algorithms.fedavg import FedAvg
from hansa.algorithms.scaffold import SCAFFOLD
from hansa.core.errors import Abandoned, InputError
from hansa.core.protocols import Slot
from hansa.core.round import buffered_round, make_plan
from hansa.data.dataset import Dataset
from hansa.data.population import Population
from hansa.training.buffered import Buffered
from hansa.transforms.quantize import Quantize
from hansa.transforms.sparsify import TopK
from support_devices import Delays, clocked
from support_masked_sum import MaskedSum

EIGHT = support.targets(**{f"c{i}": (i, -i, 2) for i in range(8)})
SLOW = {f"c{i}": 1 + 2 * (i % 4) for i in range(8)}


def train(federation, population=EIGHT, delays=SLOW, *, buffer_size, num_rounds, staleness=None, watch=None):
    """Rounds in which everyone is at work, and whoever may is asked again, in the order of the population."""
    state, context, site = clocked(federation, population, Delays(delays))
    parts, rounds = federation.task("train"), []
    site.concurrency = len(population)
    if watch:
        watch(site)
    for number in range(num_rounds):

        def refill(count, number=number, state=state):
            there = site.available(population.ids)
            cohort = [c for c, is_there in zip(population.ids, there, strict=True) if is_there][:count]
            if cohort:
                site.start(make_plan(parts, state, context, cohort, Slot(number, 0, "update")), cohort)

        state, mean = buffered_round(
            parts, state, site, site.plans, context, number, buffer_size=buffer_size,
            staleness=staleness or Buffered(size=buffer_size).weight, refill=refill,
        )  # fmt: skip
        rounds.append(mean)
    return state.algorithm, rounds, site


def test_a_late_update_alone_in_the_buffer_is_shortened_by_hand():
    """a answers after 1 s, b after 2 s; buffer 1, rate 1/2, targets 4 and 8.

    Version 0 gives a: w = 2. Version 1 goes to a at 1 s; b's answer from version 0 (step 4) and a's from version 1 are
    both due at 2 s: b began first. b is one round late: its step counts 1 / sqrt(2).
    """
    two = support.targets(a=(4, 0, 0), b=(8, 0, 0))
    state, rounds, _ = train(support.quadratic(), two, {"a": 1, "b": 2}, buffer_size=1, num_rounds=2)
    np.testing.assert_allclose(state["params"], [2 + 4 / math.sqrt(2), 0, 0], rtol=1e-6)
    assert [mean.clients for mean in rounds] == [("a",), ("b",)]


@pytest.mark.parametrize(("staleness", "late"), [(None, 1 / math.sqrt(2)), (lambda rounds: 0.25**rounds, 0.25)])
def test_a_late_update_weighs_less_beside_a_fresh_one_by_hand(staleness, late):
    """Buffer of 2: a and b (1 s, 2 s) make version 1; then c (3 s, version 0, late) meets a, who was replaced at 2 s.

    The sum is divided by the size of the buffer, as in FedBuff, not by the sum of the scaled weights.
    """
    three = support.targets(a=(4, 0, 0), b=(8, 0, 0), c=(-8, 0, 0))
    state, rounds, _ = train(
        support.quadratic(), three, {"a": 1, "b": 2, "c": 3}, buffer_size=2, num_rounds=2, staleness=staleness
    )  # fmt: skip
    first = (2 + 4) / 2
    second = first + ((4 - first) / 2 + late * -4) / 2
    assert [sorted(mean.clients) for mean in rounds] == [["a", "b"], ["a", "c"]]
    np.testing.assert_allclose(state["params"], [second, 0, 0], rtol=1e-6)


def test_it_learns_what_the_cohort_would():
    federation = support.quadratic(FedAvg(client_learning_rate=0.05, local_steps=1))
    state, rounds, _ = train(federation, buffer_size=3, num_rounds=400)
    assert all(len(mean.clients) == 3 for mean in rounds)
    np.testing.assert_allclose(state["params"], [3, -3, 2], atol=1.2)  # fast clients come more often
    np.testing.assert_allclose(state["params"][2], 2, atol=1e-3)


@pytest.mark.parametrize("transforms", [(), (TopK(fraction=0.4),), (Quantize(bits=4),)], ids=repr)
@pytest.mark.parametrize("algorithm", [FedAvg, SCAFFOLD])
def test_the_same_arrivals_give_the_same_bits(transforms, algorithm):
    federation = support.quadratic(algorithm(client_learning_rate=0.2, local_steps=2), transforms=transforms)
    first, second = (train(federation, buffer_size=3, num_rounds=20)[0]["params"] for _ in range(2))
    assert first.tobytes() == second.tobytes()
    assert np.abs(first).max() > 0.1


@pytest.mark.parametrize("buffer_size", [1, 2, 3, 5, 8])
def test_every_client_that_counted_keeps_its_memory_and_nobody_else(buffer_size):
    federation = support.quadratic(transforms=(TopK(fraction=0.4),))
    _, rounds, site = train(federation, buffer_size=buffer_size, num_rounds=12)
    assert set(site.kept()["memory"]) == {client for mean in rounds for client in mean.clients}
    assert all(len(mean.clients) == buffer_size for mean in rounds)


def test_what_a_client_remembers_is_of_its_last_counted_update():
    """A residual that was lost would show: each client's sent and remembered parts make up its whole updates."""
    federation = support.quadratic(FedAvg(client_learning_rate=0.5, local_steps=1), transforms=(TopK(fraction=0.3),))
    owed = {client: np.zeros(3) for client in EIGHT.ids}

    def watch(site):
        exchange = site.inner.worker.federation.exchange

        def watched(plan, block, rows, memory, *more):
            before = memory.part("0").get("residual", np.zeros(3, np.float32))
            report, *rest = exchange(plan, block, rows, memory, *more)
            for i, c in enumerate(block):
                np.testing.assert_allclose(before[i], owed[c], atol=1e-5)
                whole = 0.5 * (EIGHT.load(c)[0].x[0] - np.asarray(plan.broadcast["params"], np.float64))
                owed[c] = owed[c] + whole - report.payload.values[i]
            return report, *rest

        object.__setattr__(federation, "exchange", watched)

    train(federation, buffer_size=3, num_rounds=30, watch=watch)
    assert max(np.abs(residual).max() for residual in owed.values()) > 0.1


def test_plans_that_nobody_is_at_work_on_are_dropped():
    _, _, site = train(support.quadratic(), buffer_size=2, num_rounds=25)
    assert len(site.plans) <= 8
    assert min(slot.round for slot in site.plans) > 15
    assert site.inner._pending == {}


def test_a_client_with_nothing_to_learn_from_does_not_hold_the_others_up():
    clients = {c: EIGHT.load(c)[0] for c in EIGHT.ids} | {"c3": Dataset(np.zeros((0, 3)), np.zeros(0))}
    _, rounds, site = train(support.quadratic(), Population(clients), buffer_size=2, num_rounds=10)
    assert len(rounds) == 10
    assert all("c3" not in mean.clients for mean in rounds)
    assert {refusal["client"] for refusal in site.refusals()} == {"c3"}


def test_a_buffer_of_refusals_alone_is_abandoned_and_leaves_nothing_behind():
    none = Population({"a": Dataset(np.zeros((0, 3)), np.zeros(0))})
    with pytest.raises(Abandoned, match="expected at least one client's update"):
        train(support.quadratic(), none, buffer_size=1, num_rounds=1)


def test_an_aggregator_of_several_exchanges_is_refused_with_what_to_use():
    federation = support.quadratic(aggregator=MaskedSum())
    with pytest.raises(InputError, match=r"one exchange.*use Mean\(\)"):
        only_exchange(federation.task("train").aggregator, EIGHT.ids)
