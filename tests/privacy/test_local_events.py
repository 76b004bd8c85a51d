import math

import pytest

from hansa.core.errors import InputError
from hansa.privacy import events, gaussian
from hansa.privacy.accountant import PoissonSampling, Release, cost
from hansa.privacy.events import GaussianEvent, LocalEvent, RecordBudgetEvent, RecordEvent

LAPLACE = LocalEvent(noise="laplace", noise_multiplier=2.0)
BUDGET = RecordBudgetEvent(epsilon=1.0, delta=1e-4, num_rounds=3)


@pytest.mark.parametrize(
    "event",
    [
        GaussianEvent(noise_multiplier=1.0),
        LocalEvent(noise_multiplier=1.0),
        LAPLACE,
        RecordEvent(noise_multiplier=1.5, num_steps=4, sampling=PoissonSampling(0.1)),
        BUDGET,
    ],
    ids=repr,
)
def test_an_event_is_read_as_it_was_written(event):
    assert events.event_of(events.as_json(event)) == event


@pytest.mark.parametrize("times", [1, 3])
def test_pure_laplace_epsilons_add_up(times):
    found = events.cost([LAPLACE] * times, 0.0)
    assert (found.epsilon, found.neighbours, found.accountant) == (times * 1.0, "replace one", "sum")


def test_one_laplace_release_has_the_delta_of_its_closed_form():
    """delta(epsilon) = 1 - exp((epsilon - sensitivity / scale) / 2)."""
    pytest.importorskip("dp_accounting")
    for epsilon in (0.2, 0.5, 0.9):
        delta = 1 - math.exp((epsilon - 1.0) / 2)
        assert events.cost([LAPLACE], delta).epsilon == pytest.approx(epsilon, abs=2e-4)


def test_many_laplace_releases_cost_less_than_their_sum_at_a_delta():
    pytest.importorskip("dp_accounting")
    many = [LocalEvent(noise="laplace", noise_multiplier=20.0)] * 100
    pld, rdp, pure = events.cost(many, 1e-5), events.cost(many, 1e-5, accountant="RDP"), events.cost(many, 0.0)
    assert pld.epsilon < rdp.epsilon < pure.epsilon == pytest.approx(10.0)


def test_two_reports_are_twice_the_bound_apart():
    found = events.cost([LocalEvent(noise_multiplier=4.0)] * 9, 1e-5)
    assert found.neighbours == "replace one"
    assert found.epsilon == pytest.approx(gaussian.epsilon(1e-5, 2.0, 9))


def test_a_records_steps_are_counted_each():
    steps = [RecordEvent(noise_multiplier=4.0, num_steps=5)] * 2
    assert events.cost(steps, 1e-5).epsilon == pytest.approx(gaussian.epsilon(1e-5, 4.0, 10))
    assert events.cost(steps, 1e-5).neighbours == "zero out one"


@pytest.mark.parametrize(
    ("paid", "delta", "epsilon"),
    [
        ([BUDGET], 1e-4, 1.0),
        ([BUDGET] * 3, 1e-3, 1.0),
        ([BUDGET] * 4, 1e-4, math.inf),
        ([BUDGET], 1e-5, math.inf),
        ([BUDGET, GaussianEvent(noise_multiplier=1.0)], 1e-4, math.inf),
        ([], 1e-5, 0.0),
        ([], 0.0, 0.0),
    ],
)
def test_what_clients_size_for_themselves_is_worth_its_budget_and_covers_nothing_else(paid, delta, epsilon):
    assert events.cost(paid, delta).epsilon == epsilon


def test_laplace_noise_alone_is_pure_and_is_not_of_sampled_units():
    with pytest.raises(InputError, match="delta: expected between 0 and 1"):
        cost([Release(noise_multiplier=1.0), Release(noise_multiplier=1.0, noise="laplace")], 0.0)
    with pytest.raises(InputError, match="expected units that are not sampled"):
        Release(noise_multiplier=1.0, noise="laplace", sampling=PoissonSampling(0.1))
