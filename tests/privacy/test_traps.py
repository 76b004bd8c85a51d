"""Ways in which published epsilons were wrong, each configured as one would by mistake: refused, or told the truth.

The list and its figures: the issue trackers and papers named at each test.
"""

import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

import hansa
import support
from hansa.core.errors import Abandoned
from hansa.core.key import Key
from hansa.core.protocols import Aggregate, Draws
from hansa.privacy import events, gaussian
from hansa.privacy.ledger import Entry, Ledger
from hansa.training.check import problems
from hansa.training.privacy import Accounts, bound, coming, noise_of, planned
from hansa.training.privacy_statement import statement
from support_secagg import Table, grid_rows

CLIPPED = (hansa.Clip(norm=1.0), hansa.GaussianNoise(noise_multiplier=1.0, delta=1e-3))
EQUAL = hansa.Mean(weighting="clients")


def federation(transforms=CLIPPED, aggregator=EQUAL, **more):
    return support.linear(transforms=transforms, aggregator=aggregator, **more)


def sentences(own, num_clients=100, **schedule):
    schedule = hansa.Schedule(**{"num_rounds": 100, "cohort_size": 10, **schedule})
    return " ".join(str(problem) for problem in problems(own, schedule, num_clients))


def stated(own, num_clients=100, **schedule):
    schedule = hansa.Schedule(**{"num_rounds": 100, "cohort_size": 10, **schedule})
    own = bound(own, schedule, num_clients)
    return statement(own, Counter(planned(noise_of(own), schedule, num_clients)), num_clients, simulated=False)


def test_the_settings_of_these_tests_are_sound():
    assert sentences(federation()) == ""


# 1. Sampling


def test_cohorts_of_a_fixed_size_are_not_reported_as_coins():
    """10 of 100 clients, z = 1, 100 rounds, delta 1e-3: 4.784 if it were Poisson sampling, 80.03 if nothing is."""
    pytest.importorskip("dp_accounting")
    coins, fixed = stated(federation(), sampler=hansa.Poisson()), stated(federation(), sampler=hansa.Uniform())
    assert coins["epsilon"] == pytest.approx(4.784, rel=1e-3)
    assert fixed["epsilon"] == pytest.approx(80.03, rel=1e-3)
    assert "no amplification is claimed" in fixed["statement"]
    assert "Poisson" in coins["statement"]


def test_coins_that_are_not_the_whole_story_are_not_reported_as_coins():
    """The first ten of thirteen to answer are not a Poisson sample, nor is a buffer of whoever comes."""
    for more in ({"over_selection": 1.3}, {"buffer": hansa.Buffered(size=10)}):
        assert stated(federation(), sampler=hansa.Poisson(), **more)["epsilon"] > 80


# 2. Weights


@pytest.mark.parametrize("aggregator", [hansa.Mean(), hansa.Mean(denominator=10.0), hansa.Mean(weighting="examples")])
def test_a_mean_weighted_by_examples_is_refused(aggregator):
    assert "no bound: one client can weigh any amount" in sentences(federation(aggregator=aggregator))


def test_capped_weights_get_noise_for_the_largest():
    """Skewed weights with noise for equal ones: a true epsilon of 229 instead of 1.8 at a skew of five."""
    schedule = hansa.Schedule(num_rounds=1, cohort_size=10)
    equal, capped = (bound(federation(aggregator=a), schedule, 100) for a in (EQUAL, hansa.Mean(max_weight=5.0)))
    assert equal.aggregator.sensitivity(1.0) == 1 / 10
    assert capped.aggregator.sensitivity(1.0) == 5 / 50
    block = hansa.Updates(("a",), np.ones((1, 1)), np.array([500.0]))
    assert capped.aggregator.fold(block).values[0, 0] == 5.0  # no client weighs more than the cap, whatever it says


# 3. The divisor


def test_the_divisor_does_not_follow_who_happened_to_come():
    own = bound(federation(), hansa.Schedule(num_rounds=1, cohort_size=10), 100)
    three = own.aggregator.fold(hansa.Updates(("a", "b", "c"), np.ones((3, 1)), np.ones(3)))
    assert own.aggregator.reduce([three], [1.0]).values.tolist() == [0.3]


def test_noise_for_a_mean_over_whoever_came_is_refused():
    with pytest.raises(hansa.CheckError, match="needs a finite bound"):
        CLIPPED[1].release(
            Aggregate(np.zeros(3), {}), None, hansa.Mean(weighting="clients").sensitivity(1.0), Key.of(0)
        )


# 4. Neighbours


def test_every_figure_names_its_neighbours_and_replacing_one_costs_twice():
    pytest.importorskip("dp_accounting")
    event = events.GaussianEvent(noise_multiplier=4.0)
    zeroed, replaced = (events.cost([event], 1e-5, neighbours=n) for n in ("zero out one", "replace one"))
    assert (zeroed.epsilon, replaced.epsilon) == (pytest.approx(0.926342, rel=1e-5), pytest.approx(1.993091, rel=1e-5))
    assert "zero out one" in str(zeroed)
    assert "replace one" in str(replaced)
    assert "replaced by zeros (zero-out)" in stated(federation())["facts"]["neighbours"]
    assert "added or removed" in stated(federation(), sampler=hansa.Poisson())["facts"]["neighbours"]


# 5. One clip for everything


def test_running_statistics_are_clipped_and_noised_with_the_parameters():
    torch = pytest.importorskip("torch")

    def build():
        return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 2))

    learner = hansa.TorchLearner(build, loss="cross_entropy")
    own = hansa.Federation(
        learner=learner,
        algorithm=hansa.FedAvg(client_learning_rate=1.0, local_steps=3, batch_size=8),
        transforms=(hansa.Clip(norm=0.5), hansa.GaussianNoise(noise_multiplier=1e-6)),
        aggregator=hansa.Mean(weighting="clients"),
    )
    rng = np.random.default_rng(0)
    rows = hansa.Dataset(100 * rng.normal(size=(32, 3)).astype(np.float32), rng.integers(0, 2, 32))
    run = hansa.simulate(own, {"a": rows}, num_rounds=1, seed=0)
    moved = run.parameters - learner.initial(Key.of(0).child("initial"))
    assert "buffer" in learner.layout.roles
    assert np.linalg.norm(moved) <= 0.5 * (1 + 1e-4)  # with the variances of 100 in the vector
    silent = replace(own, transforms=(hansa.Clip(norm=0.5), hansa.GaussianNoise(noise_multiplier=10.0)))
    noisy = hansa.simulate(silent, {"a": rows}, num_rounds=1, seed=0)
    buffers = ~learner.layout.mask("parameter")
    assert (np.abs((noisy.parameters - run.parameters)[buffers]) > 1e-3).all()


# 6. Clipping is the server's, too: tests/network/test_lengths.py


# 8. What is released and not accounted for


def test_no_metric_and_no_loss_leaves_a_client_beside_noise():
    run = hansa.simulate(federation(), support.regression(), num_rounds=2, holdout=0.3)
    assert all(math.isnan(row.loss) for row in run.history)
    assert {body["kind"] for body in run.info["bodies"] if body["direction"] == "up"} == {"update"}


def test_pooled_statistics_beside_noise_are_refused():
    assert "sends exact sums" in sentences(federation(prepare=(hansa.Standardize(),)))


def test_a_column_that_an_algorithm_adds_needs_a_bound():
    class Counting(hansa.FedAvg):
        def client_update(self, received, fit, memory):
            updates, new = super().client_update(received, fit, memory)
            return updates._replace(tail={"steps": np.ones(len(updates.clients))}), new

    own = federation(algorithm=Counting(client_learning_rate=0.1))
    with pytest.raises(hansa.CheckError, match="needs a finite bound"):
        hansa.simulate(own, support.regression(), num_rounds=1)


def test_every_release_of_a_round_counts_and_an_attempt_without_one_does_not():
    own, schedule, ledger = federation(), hansa.Schedule(num_rounds=4), Ledger()
    event = coming(noise_of(own), schedule, 10, 0)
    for attempt in (0, 1):  # a round that was released twice, after its first result was lost
        ledger.add(Entry.of("train", 0, attempt, Key.of(attempt), ("a",), event))
    assert Accounts(own, schedule, ledger).spent(10)["epsilon"] == gaussian.epsilon(1e-3, 1.0, 2)


def test_an_abandoned_attempt_spends_nothing():
    attempts = []

    class Shaky(hansa.Mean):
        def open(self, cohort, history):
            attempts.append(cohort)
            if len(attempts) < 3:
                raise hansa.Abandoned("expected everybody, found that somebody is gone", may_heal=True)
            return super().open(cohort, history)

    own = federation(aggregator=Shaky(weighting="clients", denominator=10.0))
    run = hansa.simulate(own, support.regression(), num_rounds=1)
    assert len(attempts) == 3
    assert run.history[-1].epsilon == pytest.approx(gaussian.epsilon(1e-3, 1.0, 1))


# 9. Noise that is used again


def test_noise_for_a_second_sum_is_refused():
    ledger, event = Ledger(), events.GaussianEvent(noise_multiplier=1.0)
    ledger.add(Entry.of("train", 0, 0, Key.of(1), ("a", "b"), event))
    ledger.add(Entry.of("train", 0, 0, Key.of(1), ("b", "a"), event))  # the same clients: a replay
    for again in (
        Entry.of("train", 0, 0, Key.of(1), ("a",), event),
        Entry.of("train", 1, 0, Key.of(1), ("a", "b"), event),
        Entry.of("train", 0, 1, Key.of(1), ("a", "b"), event),
    ):
        with pytest.raises(hansa.RunError, match="expected noise of its own"):
            ledger.add(again)
    assert len(ledger.entries) == 1


# 10. Floating point: tests/privacy/test_noise.py

# 11. A delta that promises nothing, and an epsilon of one round


def test_a_delta_of_one_in_all_clients_is_refused():
    noisy = (hansa.Clip(norm=1.0), hansa.GaussianNoise(epsilon=4.0, delta=0.01))
    assert "delta 0.01 is not below 1 / 100 clients" in sentences(federation(noisy))


def test_a_rows_epsilon_is_that_of_the_run_so_far():
    run = hansa.simulate(federation(), support.regression(), num_rounds=9)
    expected = [gaussian.epsilon(1e-3, 1.0, n) for n in range(1, 10)]
    assert [row.epsilon for row in run.history] == pytest.approx(expected)


# Chains whose bound does not hold


@pytest.mark.parametrize(
    ("transforms", "says"),
    [
        ((CLIPPED[1],), "needs a bound on one client's update"),
        ((hansa.Clip(norm=1.0), hansa.TopK(fraction=0.1), CLIPPED[1]), "breaks the norm bound"),
        ((hansa.TopK(fraction=0.1), CLIPPED[1]), "needs a bound on one client's update"),
    ],
    ids=["no clip", "error feedback after the clip", "error feedback alone"],
)
def test_noise_without_a_bound_is_refused(transforms, says):
    assert says in sentences(federation(transforms))


@pytest.mark.parametrize(
    "aggregator", [hansa.Median(), hansa.TrimmedMean(fraction=0.1), hansa.Krum(num_byzantine=1)], ids=repr
)
def test_a_robust_rule_that_proves_no_bound_is_refused(aggregator):
    assert "proves no bound on one client's say" in sentences(federation(aggregator=aggregator))


# ------------------------------------------------------------------ noise in shares, sized for more clients than stayed


def shared(aggregator):
    return federation((hansa.Clip(norm=1.0), hansa.SkellamNoise(noise_multiplier=1.0, delta=1e-3)), aggregator)


def test_noise_in_shares_without_a_fewest_number_of_clients_is_refused():
    for aggregator in (EQUAL, hansa.SecureMean()):
        said = " ".join(map(str, problems(shared(aggregator), hansa.Schedule(num_rounds=2), 20)))
        assert "hansa.SecureMean(min_survivors=" in said


def test_the_fewest_honest_clients_that_may_stay_bring_all_the_noise_that_is_counted():
    """Ten stay of twenty, and one of them tells the server its share."""
    own = bound(shared(hansa.SecureMean(min_survivors=10, corrupt=0.1)), hansa.Schedule(num_rounds=2), 20)
    noise, keys = own.transforms[-1], [Key.of(i) for i in range(9)]
    block = support.block(np.zeros((9, 20_000)))
    sent, _ = noise.encode(block, None, None, Draws(Key.of(0), keys, keys, norm_bound=1.0, value_bound=1.0))
    found = sent.values.astype(np.float64).sum(axis=0).std()
    assert found == pytest.approx(1.0, rel=0.02)
    assert coming(noise, hansa.Schedule(num_rounds=2), 20, 0).noise_multiplier == 1.0


def test_a_noisy_sum_of_fewer_than_that_is_not_opened():
    table = Table(hansa.SecureMean(min_survivors=4), grid_rows(5))
    table.dropped["masked"] = {"c00", "c01"}
    with pytest.raises(Abandoned):
        table.play()
