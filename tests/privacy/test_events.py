"""Events as data: what is written can be read, and what they cost is what the accountant says."""

import json
from dataclasses import replace

import pytest

from hansa.core.errors import InputError
from hansa.privacy import accountant, gaussian
from hansa.privacy.accountant import Everyone, FixedSizeSampling, PoissonSampling, Release, Turn
from hansa.privacy.events import GaussianEvent, as_json, calibrated, cost, event_of, neighbours_of

SAMPLINGS = [Everyone(), PoissonSampling(0.25), FixedSizeSampling(3, 10), Turn(1, 4)]


def event(sampling, noise_multiplier=1.5):
    return GaussianEvent(noise_multiplier=noise_multiplier, sampling=sampling)


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=repr)
def test_an_event_survives_being_written(sampling):
    assert event_of(json.loads(json.dumps(as_json(event(sampling))))) == event(sampling)


@pytest.mark.parametrize(
    "damage",
    [
        {"kind": "magic"},
        {"noise_multiplier": -1.0},
        {"noise_multiplier": "1"},
        {"sampling": {"kind": "poisson", "rate": 2.0}},
        {"sampling": {"kind": "os.system"}},
        {"sampling": None},
        {"more": 1},
    ],
    ids=repr,
)
def test_what_is_not_an_event_is_a_sentence(damage):
    with pytest.raises(InputError):
        event_of({**as_json(event(Everyone())), **damage})


def test_events_one_by_one_cost_what_they_cost_counted():
    several = [event(Everyone()), event(Everyone(), 2.0), event(Everyone())]
    assert cost(several, 1e-5) == cost({several[0]: 2, several[1]: 1}, 1e-5)


def test_neighbours_are_those_that_hold_for_all():
    coins, fixed, all_of = event(PoissonSampling(0.1)), event(FixedSizeSampling(1, 9)), event(Everyone())
    assert neighbours_of([coins, coins]) == "add or remove one"
    assert neighbours_of([coins, all_of]) == neighbours_of([all_of]) == neighbours_of([]) == "zero out one"
    assert neighbours_of([coins, fixed]) == "replace one"


def test_a_client_pays_for_the_turns_of_its_own_group_alone():
    turns = [event(Turn(number % 4, 4), 1.0 + (number % 4)) for number in range(20)]
    assert cost(turns, 1e-5).epsilon == pytest.approx(gaussian.epsilon(1e-5, 1.0, 5))
    both = [*turns, event(Everyone(), 1.0)]
    assert cost(both, 1e-5).epsilon == pytest.approx(gaussian.epsilon(1e-5, 1.0, 6))


def test_turns_of_two_cycles_add_up():
    turns = [event(Turn(0, 2), 1.0), event(Turn(1, 2), 1.0), event(Turn(2, 3), 1.0)]
    assert cost(turns, 1e-5).epsilon == pytest.approx(gaussian.epsilon(1e-5, 1.0, 2))


@pytest.mark.parametrize("sampling", [Everyone(), PoissonSampling(0.1), Turn(0, 2)], ids=repr)
def test_calibrated_noise_is_the_least_that_keeps_to_epsilon(sampling):
    pytest.importorskip("dp_accounting")
    found = calibrated({event(sampling): 10}, 2.0, 1e-5, interval=1e-3)
    spent = [cost({event(sampling, found * more): 10}, 1e-5, interval=1e-3).epsilon for more in (1.0, 0.999)]
    assert spent[0] <= 2.0 < spent[1]


def test_a_turn_outside_its_cycle_is_refused():
    with pytest.raises(InputError, match="expected a group of 0 to 3, found 4"):
        Turn(4, 4)


def test_the_accountant_reads_events_as_releases():
    assert cost([event(PoissonSampling(0.25))] * 3, 1e-5) == accountant.cost(
        [Release(noise_multiplier=1.5, times=3, sampling=PoissonSampling(0.25))], 1e-5
    )
    assert replace(event(Everyone()), noise_multiplier=2.0) == event(Everyone(), 2.0)
