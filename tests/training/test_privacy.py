import math
from collections import Counter
from dataclasses import replace

import pytest

import support
from hansa.aggregators.mean import Mean
from hansa.aggregators.median import Median
from hansa.core.key import Key
from hansa.data.sampling import Poisson, Uniform
from hansa.privacy import events, gaussian
from hansa.privacy.accountant import Everyone, PoissonSampling
from hansa.privacy.ledger import Entry, Ledger
from hansa.training.buffered import Buffered
from hansa.training.privacy import Accounts, bound, coming, noise_of, planned, sampling_of
from hansa.training.privacy_statement import statement
from hansa.training.schedule import Schedule
from hansa.training.simulate import simulate
from hansa.transforms.clip import Clip
from hansa.transforms.noise import GaussianNoise

CALIBRATED = (Clip(norm=1.0), GaussianNoise(epsilon=8.0, delta=1e-5))


def released(federation, schedule, num_rounds, num_clients=1000):
    """A ledger as so many rounds leave it."""
    ledger = Ledger()
    for number in range(num_rounds):
        event = coming(noise_of(federation), schedule, num_clients, number)
        ledger.add(Entry.of("train", number, 0, Key.of(number), ("a", "b"), event))
    return ledger


def spent(federation, schedule, num_rounds, num_clients=1000):
    return Accounts(federation, schedule, released(federation, schedule, num_rounds, num_clients)).spent(num_clients)


def stated(federation, schedule, num_clients=1000):
    noise = noise_of(federation)
    events = Counter(planned(noise, schedule, num_clients)) if noise else Counter()
    return statement(federation, events, num_clients, simulated=False)


def private(transforms=CALIBRATED, aggregator=None):
    return support.linear(transforms=transforms, aggregator=aggregator or Mean(weighting="clients"))


def test_without_noise_nothing_is_bound_spent_or_stated():
    federation = support.linear(transforms=(Clip(norm=1.0),))
    schedule = Schedule(num_rounds=5)
    assert bound(federation, schedule, 9) is federation
    assert Accounts(federation, schedule, Ledger()).spent(9) == {"epsilon": None, "delta": None}
    assert stated(federation, schedule) is None


def test_noise_is_calibrated_for_the_planned_rounds():
    schedule = Schedule(num_rounds=50)
    own = bound(private(), schedule, 1000)
    assert own.transforms[1].noise_multiplier == pytest.approx(4.244, abs=1e-3)
    cost = spent(own, schedule, 50)
    assert 7.99 < cost["epsilon"] <= 8.0
    assert cost["delta"] == 1e-5
    assert spent(own, schedule, 10)["epsilon"] < 4


@pytest.mark.parametrize(
    ("aggregator", "cohort_size", "denominator"),
    [
        (Mean(weighting="clients"), None, 30),
        (Mean(weighting="clients"), 10, 10),
        (Mean(weighting="clients"), 99, 30),
        (Mean(max_weight=5), 10, 50),
        (Mean(weighting="clients", denominator=7), 10, 7),
        (Mean(), 10, None),
    ],
)
def test_the_divisor_is_the_expected_cohort_unless_it_is_given(aggregator, cohort_size, denominator):
    own = bound(private(aggregator=aggregator), Schedule(num_rounds=2, cohort_size=cohort_size), 30)
    assert own.aggregator.denominator == denominator


def test_another_aggregator_is_left_for_the_check_to_refuse():
    assert bound(private(aggregator=Median()), Schedule(num_rounds=2), 9).aggregator == Median()


def test_without_a_delta_rows_hold_no_epsilon_and_the_statement_gives_several():
    schedule = Schedule(num_rounds=2)
    own = bound(private((Clip(norm=1.0), GaussianNoise(noise_multiplier=2.0))), schedule, 9)
    assert spent(own, schedule, 2)["epsilon"] is None
    words = stated(own, schedule, 9)
    assert words["epsilon"] is None
    assert [one["delta"] for one in words["epsilons"]] == [1e-5, 1e-6, 1e-7]
    for one in words["epsilons"]:
        assert one["epsilon"] == pytest.approx(gaussian.epsilon(one["delta"], 2.0, 2))
        assert one["epsilon"] < one["rdp"] < 1.2 * one["epsilon"]


def test_the_statement_names_unit_neighbours_accountant_and_who_sees_what():
    schedule = Schedule(num_rounds=50)
    words = stated(bound(private(), schedule, 1000), schedule)["statement"]
    for part in (
        "one client",
        "zero-out",
        "epsilon 8",
        "delta 1e-05",
        "50 releases",
        "tier 2",
        "amplification",
        "The server",
    ):
        assert part in words


def test_each_row_of_a_run_carries_what_has_been_spent_so_far():
    run = simulate(private(), support.regression(), num_rounds=4, seed=0)
    costs = [row.epsilon for row in run.history]
    assert costs == sorted(costs)
    assert costs[-1] == pytest.approx(8.0, rel=1e-6)
    z = gaussian.noise_multiplier(8.0, 1e-5, 4)
    assert costs[0] == pytest.approx(gaussian.epsilon(1e-5, z, 1))
    assert {row.delta for row in run.history} == {1e-5}
    assert run.info["privacy"]["epsilon"] == costs[-1]
    assert all(math.isnan(row.loss) for row in run.history)  # nothing else leaves a client
    assert "give evaluate_on=" in run.info["notes"][0]


SAMPLED = Schedule(num_rounds=20, cohort_size=10, sampler=Poisson())


def test_only_coins_of_their_own_amplify():
    cost = {}
    for name, sampler in (("coins", Poisson()), ("fixed", Uniform())):
        schedule = Schedule(num_rounds=20, cohort_size=10, sampler=sampler)
        own = bound(private((Clip(norm=1.0), GaussianNoise(noise_multiplier=1.0, delta=1e-5))), schedule, 100)
        cost[name] = spent(own, schedule, 20, 100)["epsilon"]
    assert cost["fixed"] == pytest.approx(gaussian.epsilon(1e-5, 1.0, 20))
    assert cost["coins"] < cost["fixed"] / 5


@pytest.mark.parametrize("more", [{"over_selection": 1.3}, {"buffer": Buffered(size=5)}])
def test_coins_do_not_amplify_where_one_clients_coming_displaces_another(more):
    assert sampling_of(replace(SAMPLED, **more), 100, 0) == Everyone()
    assert isinstance(sampling_of(SAMPLED, 100, 0), PoissonSampling)


def test_sampled_noise_is_calibrated_to_the_planned_rounds_and_rows_never_understate():
    own = bound(private(), SAMPLED, 100)
    rounds = (1, 2, 7, 12, 19, 20)
    costs = [spent(own, SAMPLED, n, 100)["epsilon"] for n in rounds]
    exact = [events.cost({coming(noise_of(own), SAMPLED, 100, 0): n}, 1e-5).epsilon for n in (1, 7, 20)]
    assert costs == sorted(costs)
    assert costs[-1] == pytest.approx(8.0, rel=2e-3)
    assert costs[-1] <= 8.0
    for n, cost in zip((1, 7, 20), exact, strict=True):
        assert cost * (1 - 1e-9) <= costs[rounds.index(n)] <= cost * 1.1


def test_the_rate_that_counts_is_that_of_the_clients_that_were_there():
    own = bound(private((Clip(norm=1.0), GaussianNoise(noise_multiplier=1.0, delta=1e-5))), SAMPLED, 100)
    few, many = (coming(noise_of(own), SAMPLED, count, 0) for count in (20, 100))
    assert few.sampling.rate == pytest.approx(0.5)
    assert many.sampling.rate == pytest.approx(0.1)
    assert "0.1 to 0.5" in statement(own, Counter([few, many]), 100, simulated=False)["facts"]["sampling"]


def test_a_run_stops_before_the_round_that_would_overspend():
    noise = GaussianNoise(noise_multiplier=2.0, delta=1e-5, budget=4.0)
    run = simulate(private((Clip(norm=1.0), noise)), support.regression(), num_rounds=10, seed=0)
    affordable = next(n for n in range(1, 10) if gaussian.epsilon(1e-5, 2.0, n + 1) > 4.0)
    assert len(run.history) == affordable == run.info["rounds_done"]
    assert run.history[-1].epsilon <= 4.0


def test_a_calibrated_run_stops_when_more_was_released_than_was_planned():
    schedule = Schedule(num_rounds=4)
    own = bound(private(), schedule, 30)
    ledger = released(own, schedule, 3)
    assert Accounts(own, schedule, ledger).has_room(3, 30)
    ledger.add(Entry.of("train", 2, 1, Key.of("again"), ("a",), coming(noise_of(own), schedule, 30, 2)))
    assert not Accounts(own, schedule, ledger).has_room(3, 30)
