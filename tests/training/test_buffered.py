"""Asynchronous rounds through the loop: what they need, whom they ask, what they keep."""

import math

import numpy as np
import pytest

import hansa
import support
from hansa.core.errors import InputError, RunError
from hansa.data.dataset import Dataset
from hansa.data.population import Population
from hansa.runtimes.devices import Devices, LogNormal
from hansa.runtimes.virtual_time import VirtualTime
from hansa.training.buffered import Buffered
from hansa.training.simulate import simulate
from support_devices import Delays
from support_masked_sum import MaskedSum

TEN = support.targets(**{f"c{i}": (i, -i, 2) for i in range(10)})
UNEVEN = VirtualTime(devices=Devices(latency_s=LogNormal(median=10, spread=4)))


def train(buffer, runtime=UNEVEN, federation=None, population=TEN, **options):
    options = {"cohort_size": 6, "num_rounds": 20, **options}
    return simulate(federation or support.quadratic(), population, runtime=runtime, buffer=buffer, **options)


@pytest.mark.parametrize(
    "options", [{"size": 0}, {"size": 2.0}, {"size": 3, "staleness": -1}, {"size": 3, "max_staleness": -1}]
)
def test_an_option_that_cannot_be_is_refused_by_name(options):
    with pytest.raises(InputError, match=rf"Buffered\({list(options)[-1]}=\): expected"):
        Buffered(**options)


def test_the_weight_of_a_late_update_by_hand():
    assert Buffered(size=1).weight(0) == 1
    assert Buffered(size=1).weight(3) == 0.5
    assert Buffered(size=1, staleness=1).weight(3) == 0.25
    assert Buffered(size=1, staleness=0).weight(100) == 1


def test_every_round_counts_a_full_buffer_and_time_goes_on():
    run = train(Buffered(size=4))
    assert [row.num_clients for row in run.history] == [4] * 20
    clock = [row.clock_s for row in run.history]
    assert clock == sorted(clock)
    assert clock[0] > 0
    assert run.info["virtual_time"]["asked"] == 20 * 4 + 5  # five were at work when the last buffer was full


def test_it_takes_less_time_than_waiting_for_everyone():
    waiting = simulate(support.quadratic(), TEN, runtime=UNEVEN, cohort_size=6, num_rounds=14)
    assert train(Buffered(size=6), num_rounds=14).history[-1].clock_s < waiting.history[-1].clock_s / 2


def test_a_slow_client_counts_less_the_later_it_comes_and_not_at_all_beyond_max_staleness():
    """c9 needs 3.5 s, the others 1 s: buffers of 9 are full at 1, 2, 3, 4 s; c9 comes with that of 4 s, three late."""
    slow = VirtualTime(devices=Delays({"c9": 3.5}))
    runs = {
        most: train(Buffered(size=9, max_staleness=most), slow, cohort_size=10, num_rounds=4) for most in (None, 3, 2)
    }
    assert [row.num_late for row in runs[None].history] == [0, 0, 0, 0]
    assert runs[3].parameters.tobytes() == runs[None].parameters.tobytes()
    assert [row.num_late for row in runs[2].history] == [0, 0, 0, 1]
    assert runs[2].info["virtual_time"]["wasted_examples"] == 1


def test_drop_outs_are_replaced():
    run = train(Buffered(size=3), VirtualTime(devices=Devices(latency_s=1.0, dropout=0.5)), num_rounds=30)
    assert [row.num_clients for row in run.history] == [3] * 30
    assert run.info["virtual_time"]["dropped"] > 40


def test_a_client_is_in_a_buffer_once_even_where_all_others_are_slow():
    fast = VirtualTime(devices=Delays({f"c{i}": 100 + i for i in range(1, 10)} | {"c0": 0.1}))
    run = train(Buffered(size=5), fast, cohort_size=10, num_rounds=3)
    assert [row.num_clients for row in run.history] == [5, 5, 5]
    assert run.history[0].clock_s == 104


def test_nobody_available_ends_with_a_sentence():
    with pytest.raises(RunError, match="expected somebody available within 48 simulated hours"):
        train(Buffered(size=2), VirtualTime(devices=Delays({}, away=TEN.ids)))


def test_a_population_without_rows_ends_with_a_sentence():
    empty = Dataset(np.zeros((0, 3)), np.zeros(0))
    with pytest.raises(InputError, match="expected training examples, found none"):
        train(Buffered(size=1), population=Population({"a": empty, "b": empty}), cohort_size=2)


def test_a_runtime_without_a_clock_is_refused_before_round_0():
    with pytest.raises(InputError, match=r"expected a runtime with a clock, found InProcess.*VirtualTime"):
        train(Buffered(size=2), hansa.InProcess())


def test_an_aggregator_of_several_exchanges_and_a_buffer_beyond_the_population_are_refused():
    with pytest.raises(InputError, match="one exchange"):
        train(Buffered(size=2), federation=support.quadratic(aggregator=MaskedSum()))
    with pytest.raises(InputError, match=r"Buffered\(size=\): expected up to the population's 10 clients, found 11"):
        train(Buffered(size=11))


def test_noise_is_for_one_client_among_a_full_buffer():
    """The denominator is the buffer's size, not the number of clients at work."""
    from hansa.training.privacy import bound
    from hansa.training.schedule import Schedule

    private = support.quadratic(
        transforms=(hansa.Clip(norm=1.0), hansa.GaussianNoise(noise_multiplier=1.0, delta=1e-3)),
        aggregator=hansa.Mean(weighting="clients"),
    )
    schedule = Schedule(num_rounds=5, cohort_size=8, buffer=Buffered(size=4))
    assert bound(private, schedule, 10).aggregator.denominator == 4
    run = train(Buffered(size=4), federation=private, evaluate_on=TEN.load("c1")[0], num_rounds=5)
    assert math.isfinite(run.history[-1].epsilon)


def test_staleness_shortens_the_step_and_not_what_is_said_of_it():
    one, two = (support.block([[value]], [1.0], loss=[loss]) for value, loss in ((4, 2), (8, 6)))
    mean = hansa.Mean()
    found = mean.reduce([mean.fold(one), mean.fold(two)], [1.0, 0.5])
    assert found.values.tolist() == [(4 + 0.5 * 8) / 2]
    assert found.tail["loss"] == (2 + 0.5 * 6) / 1.5
