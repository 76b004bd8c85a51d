"""Rounds on a simulated clock: laws first, then who is late and what was wasted, by hand."""

import dataclasses

import numpy as np
import pytest

import hansa
import support
from hansa.core.errors import InputError, RunError
from hansa.core.protocols import Slot
from hansa.runtimes.devices import Devices, Diurnal, LogNormal
from hansa.runtimes.inprocess import InProcess
from hansa.runtimes.virtual_time import Job, VirtualTime, closing
from hansa.training.simulate import simulate
from support_devices import Delays

SIZES = (7, 1, 12, 5, 3, 9, 2, 4, 6, 8, 10, 1, 3, 2, 5, 5, 4, 3)
LOCAL = {"client_learning_rate": 0.05, "local_epochs": 2, "batch_size": 4}
FEDERATIONS = {
    "FedAvg": support.linear(),
    "SCAFFOLD": support.linear(algorithm=hansa.SCAFFOLD(**LOCAL)),
    "TopK": support.linear(transforms=(hansa.TopK(fraction=0.4),)),
    "Quantize": support.linear(transforms=(hansa.Quantize(bits=4),)),
    "Median": support.linear(aggregator=hansa.Median()),
    "prepared": support.linear(prepare=(hansa.Standardize(min_rows=1),)),
}
POPULATION = support.regression(SIZES)
EQUAL = VirtualTime(InProcess(), devices=Devices(latency_s=2.0))
PHONES = VirtualTime(devices=dataclasses.replace(Devices.phones(), dropout=0.2))
TEN = support.targets(**{f"c{i}": (i, -i, 2) for i in range(10)})

every_federation = pytest.mark.parametrize("name", FEDERATIONS)


def run(name, runtime, num_rounds=5, **options):
    options = {"cohort_size": 7, "seed": 3, "holdout": 0.2, **options}
    return simulate(FEDERATIONS[name], POPULATION, num_rounds=num_rounds, runtime=runtime, **options)


def same(one, two):
    """Equal in every bit and figure but the stopwatch."""
    columns = [[{**row, "seconds": 0, "clock_s": 0} for row in result.history] for result in (one, two)]
    assert one.parameters.tobytes() == two.parameters.tobytes()
    assert repr(columns[0]) == repr(columns[1])
    assert one.info["bodies"] == two.info["bodies"]


# ------------------------------------------------------------------------------------------------------------- laws


@every_federation
def test_equal_devices_give_the_inner_runtimes_bits(name):
    same(run(name, EQUAL), run(name, InProcess()))


@every_federation
def test_buffered_rounds_of_the_whole_cohort_on_equal_devices_are_synchronous_rounds(name):
    same(run(name, EQUAL, buffer=hansa.Buffered(size=7)), run(name, InProcess()))


@every_federation
@pytest.mark.parametrize("buffer", [None, hansa.Buffered(size=3)])
def test_the_same_seed_gives_the_same_run(name, buffer):
    options = {"buffer": buffer} if buffer else {"over_selection": 1.3}
    first, second = run(name, PHONES, **options), run(name, PHONES, **options)
    same(first, second)
    assert [row.clock_s for row in first.history] == [row.clock_s for row in second.history]
    assert first.info["virtual_time"] == second.info["virtual_time"]
    assert run(name, PHONES, **options, seed=4).parameters.tobytes() != first.parameters.tobytes()


@pytest.mark.parametrize("options", [{"over_selection": 1.6}, {"deadline_s": 2.0}, {"buffer": hansa.Buffered(size=3)}])
def test_what_became_of_everyone_adds_up(options):
    told = run("FedAvg", PHONES, num_rounds=12, min_clients=1, **options).info["virtual_time"]
    at_work = 7 if "buffer" in options else 0
    known = sum(told[kind] for kind in ("accepted", "refused", "late", "dropped", "unavailable"))
    assert known <= told["asked"] <= known + at_work
    assert told["asked"] == known or at_work
    assert told["dropped"] > 0
    assert told["rounds"] >= 12
    assert 0 < told["wasted_examples"] < told["examples"]


@pytest.mark.parametrize("options", [{"over_selection": 1.5}, {"buffer": hansa.Buffered(size=3, max_staleness=1)}])
@pytest.mark.parametrize("name", ["SCAFFOLD", "TopK"])
def test_a_run_that_crashed_and_went_on_has_the_bits_of_one_that_did_not(name, options, tmp_path):
    class Stop(Exception):
        pass

    def fail(row):
        if row.round == 3:
            raise Stop

    with pytest.raises(Stop):
        run(name, PHONES, 7, checkpoint=tmp_path / "point", on_round=fail, **options)
    resumed, whole = run(name, PHONES, 7, checkpoint=tmp_path / "point", **options), run(name, PHONES, 7, **options)
    same(resumed, whole)
    assert resumed.info["virtual_time"] == whole.info["virtual_time"]
    assert [row.clock_s for row in resumed.history] == [row.clock_s for row in whole.history]


def test_a_checkpoint_of_other_devices_is_refused(tmp_path):
    run("FedAvg", EQUAL, 2, checkpoint=tmp_path / "timed")
    run("FedAvg", InProcess(), 2, checkpoint=tmp_path / "plain")
    for name, found in (("timed", "Devices"), ("plain", "no clock")):
        with pytest.raises(InputError, match=f"checkpoint: expected one of these devices .*, found {found}"):
            run("FedAvg", PHONES, 4, checkpoint=tmp_path / name)


# ------------------------------------------------------------------------------------------------- rounds, by hand


def jobs(*due, lost=()):
    return [Job(when, i, f"c{i}", Slot(0, 0, "update"), 1.0, i not in lost) for i, when in enumerate(due)]


@pytest.mark.parametrize(
    ("due", "lost", "goal", "deadline", "counted", "end"),
    [
        ((3, 1, 2), (), 2, None, [1, 2], 2),  # the first two
        ((3, 1, 2), (), None, None, [1, 2, 0], 3),  # everyone
        ((3, 1, 2), (), 3, 2.5, [1, 2], 12.5),  # until the deadline
        ((3, 1, 2), (), 2, 2.5, [1, 2], 2),  # the goal before it
        ((3, 1, 2), (1,), 2, None, [2, 0], 3),  # a drop-out is made up for
        ((3, 1, 2), (0,), 3, None, [1, 2], 2),  # nobody is waited for that will not come
        ((3, 1, 2), (0,), 3, 9.0, [1, 2], 19),  # the server does not know: it waits until the deadline
        ((1, 1, 1), (), 2, None, [0, 1], 1),  # at one instant, as begun
        ((3, 1), (0, 1), 2, None, [], 10),
        ((), (), 2, 5.0, [], 10),
    ],
)
def test_when_a_round_closes_and_who_counts(due, lost, goal, deadline, counted, end):
    began = jobs(*(10 + when for when in due), lost=lost)
    here, closed = closing(began, 10.0, goal, deadline)
    assert [job.number for job in here] == counted
    assert closed == (end if end >= 10 else 10 + end)


def test_a_clients_time_is_latency_download_work_and_upload():
    devices = Devices(examples_per_s=10.0, download=1e3, upload=500.0, latency_s=3.0)
    population = hansa.Population({"a": hansa.Dataset(np.zeros((20, 3)), np.zeros(20))})
    for local, examples in (
        (dict(local_epochs=2), 40),
        (dict(local_steps=3, batch_size=5), 15),
        (dict(local_steps=2), 40),
    ):
        federation = support.linear(algorithm=hansa.FedAvg(client_learning_rate=0.01, **local))
        done = simulate(federation, population, num_rounds=1, runtime=VirtualTime(devices=devices))
        sent = {(b["kind"], b["direction"]): b["bytes"] / b["count"] for b in done.info["bodies"]}
        down = sent["plan", "down"] + 4 * 4  # four float32 parameters
        expected = 3 + down / 1e3 + examples / 10 + sent["update", "up"] / 500
        assert done.history[-1].clock_s == pytest.approx(expected, rel=1e-9)
        assert done.info["virtual_time"]["examples"] == examples


def test_over_selection_counts_the_first_and_wastes_the_rest():
    slow = {f"c{i}": i + 1.0 for i in range(10)}
    done = simulate(
        support.quadratic(), TEN, num_rounds=1, cohort_size=8, over_selection=1.25,
        runtime=VirtualTime(devices=Delays(slow)),
    )  # fmt: skip
    (row,), told = done.history, done.info["virtual_time"]
    assert (row.num_clients, row.num_late, row.clock_s) == (8, 2, 8.0)
    np.testing.assert_allclose(done.parameters, np.array([3.5, -3.5, 2]) / 2)  # of c0 to c7, at rate 1/2
    assert (told["late"], told["wasted_share"]) == (2, 0.2)
    plain = simulate(support.quadratic(), TEN, num_rounds=1, cohort_size=10)
    assert row.bytes_up + row.bytes_down == plain.history[0].bytes_up + plain.history[0].bytes_down
    each = [b["bytes"] / b["count"] for b in done.info["bodies"] if b["kind"] in ("plan", "model", "update")]
    assert told["wasted_bytes"] == 2 * sum(each)


def test_over_selection_asks_nobody_more_where_nobody_is_late():
    plain = simulate(support.quadratic(), TEN, num_rounds=2, cohort_size=8)
    same(simulate(support.quadratic(), TEN, num_rounds=2, cohort_size=8, over_selection=1.25), plain)


def test_a_late_client_stays_at_work_and_is_not_asked_meanwhile():
    done = simulate(
        support.quadratic(), TEN, num_rounds=4, cohort_size=9, over_selection=1.2,
        runtime=VirtualTime(devices=Delays({"c9": 3.5})),
    )  # fmt: skip
    assert [row.num_late for row in done.history] == [1, 0, 0, 0]  # asked again at 4 s only
    assert [row.clock_s for row in done.history] == [1, 2, 3, 4]
    assert [row.num_clients for row in done.history] == [9, 9, 9, 9]


def test_memory_is_of_the_clients_that_counted_alone(tmp_path):
    federation = support.quadratic(hansa.SCAFFOLD(client_learning_rate=0.5, local_steps=1))
    site = []
    runtime = VirtualTime(devices=Delays({f"c{i}": i for i in range(10)}, lost=["c2"]))
    opened = VirtualTime.open

    def open_and_keep(self, *arguments, **options):
        site.append(opened(self, *arguments, **options))
        return site[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(VirtualTime, "open", open_and_keep)
        done = simulate(federation, TEN, num_rounds=1, cohort_size=5, over_selection=2.0, runtime=runtime)
    assert set(site[0].kept()["memory"]) == {"c0", "c1", "c3", "c4", "c5"}
    assert done.info["virtual_time"]["dropped"] == 1


def test_clients_that_are_away_are_not_asked_and_the_cohort_is_made_up_from_others():
    away = [f"c{i}" for i in range(5)]
    done = simulate(
        support.quadratic(), TEN, num_rounds=6, cohort_size=4, runtime=VirtualTime(devices=Delays({}, away=away))
    )
    assert [row.num_clients for row in done.history] == [4] * 6
    assert done.info["virtual_time"]["unavailable"] == 0
    assert done.info["virtual_time"]["asked"] == 24


def test_time_passes_until_somebody_is_available():
    table = Devices(latency_s=1.0, availability=Diurnal(low=0, high=1, peak_hour=12, zones_h=0))
    done = simulate(
        support.quadratic(), TEN, num_rounds=1, cohort_size=9, min_clients=8, runtime=VirtualTime(devices=table)
    )
    assert 6 * 3600 < done.history[0].clock_s < 12 * 3600  # from midnight on
    nobody = VirtualTime(devices=Delays({}, away=TEN.ids))
    with pytest.raises(RunError, match="expected 1 clients available within 48 simulated hours"):
        simulate(support.quadratic(), TEN, num_rounds=1, runtime=nobody)


def test_a_round_below_min_clients_is_abandoned_and_its_time_is_spent():
    gone = VirtualTime(devices=Delays({}, lost=TEN.ids[:6]))
    with pytest.raises(RunError, match="enough reports in 3 attempts"):
        simulate(support.quadratic(), TEN, num_rounds=1, min_clients=5, runtime=gone)
    flaky = VirtualTime(devices=Devices(latency_s=1.0, dropout=0.25))
    done = simulate(support.quadratic(), TEN, num_rounds=8, cohort_size=4, min_clients=3, runtime=flaky, seed=1)
    assert min(row.num_clients for row in done.history) >= 3
    assert done.info["virtual_time"]["rounds"] > 8


def test_every_s_keeps_rounds_apart_on_the_clock():
    done = simulate(support.quadratic(), TEN, num_rounds=3, every_s=60.0, runtime=VirtualTime(devices=Delays({})))
    assert [row.clock_s for row in done.history] == [1, 61, 121]


def test_hours_to_a_target():
    devices = VirtualTime(devices=Devices(latency_s=1800.0))
    done = run("FedAvg", devices, num_rounds=10)
    losses = [row.loss for row in done.history]
    assert done.hours_to("loss", losses[3]) == 0.5 * (1 + next(i for i, x in enumerate(losses) if x <= losses[3]))
    assert np.isnan(done.hours_to("loss", -1.0))
    assert np.isnan(run("FedAvg", InProcess()).hours_to("loss", 1e9))
    with pytest.raises(InputError, match="hours_to: expected one of"):
        done.hours_to("speed", 1.0)


# ------------------------------------------------------------------------------------------------- learned by itself


def test_over_selection_follows_the_share_that_drops_out():
    """Of ten clients two always drop out; cohorts of five in which one may be missing."""
    lossy = VirtualTime(devices=Delays({}, lost=["c0", "c1"]))
    done = simulate(
        support.quadratic(), TEN, num_rounds=60, cohort_size=5, over_selection="auto", runtime=lossy, deadline_s=9.0
    )
    asked, rounds = done.info["virtual_time"]["asked"], done.info["virtual_time"]["rounds"]
    assert 6.0 < asked / rounds < 7.0  # 5 / (1 - 2/10) = 6.25, rounded up
    steady = simulate(
        support.quadratic(), TEN, num_rounds=20, cohort_size=5, over_selection="auto",
        runtime=VirtualTime(devices=Delays({})),
    )  # fmt: skip
    assert steady.info["virtual_time"]["asked"] == 7 + 19 * 5  # 1.3 times at first, and nobody was missing


def test_a_deadline_is_learned_after_a_generous_first_round():
    lossy = VirtualTime(devices=Delays({f"c{i}": 20.0 + i for i in range(10)}, lost=["c0"]))
    done = simulate(support.quadratic(), TEN, num_rounds=3, deadline_s="auto", runtime=lossy)
    clock = [row.clock_s for row in done.history]
    assert clock == [3600.0, 3600.0 + 2 * 29, 3600.0 + 4 * 29]
    assert [row.num_clients for row in done.history] == [9, 9, 9]


def test_what_was_learned_is_in_the_checkpoint(tmp_path):
    options = {"over_selection": "auto", "deadline_s": "auto"}
    run("FedAvg", PHONES, 4, checkpoint=tmp_path / "point", **options)
    resumed, whole = (
        run("FedAvg", PHONES, 8, checkpoint=tmp_path / "point", **options),
        run("FedAvg", PHONES, 8, **options),
    )
    same(resumed, whole)
    assert [row.clock_s for row in resumed.history] == [row.clock_s for row in whole.history]


def test_a_cohort_of_random_size_counts_all_of_it():
    """Poisson sampling is only private if nobody beyond an expected number is left out."""
    done = simulate(
        support.quadratic(), TEN, num_rounds=20, cohort_size=4, sampler=hansa.Poisson(),
        runtime=VirtualTime(devices=Delays({})), seed=2,
    )  # fmt: skip
    assert max(row.num_clients for row in done.history) > 4
    assert sum(row.num_late for row in done.history) == 0


# ----------------------------------------------------------------------------------------------------- odd arguments


def test_it_says_what_it_is():
    assert "InProcess" in run("FedAvg", EQUAL, 1).info["runtime"]
    assert run("FedAvg", EQUAL, 1).info["runtime"].startswith("VirtualTime(")
    assert VirtualTime().devices == Devices.phones()


@pytest.mark.parametrize("make", [lambda: VirtualTime(3), lambda: VirtualTime(VirtualTime())])
def test_what_is_no_runtime_is_refused(make):
    with pytest.raises(InputError, match=r"VirtualTime\(inner\): expected a runtime"):
        make()


@pytest.mark.parametrize("devices", [None, Devices, LogNormal(median=3)])
def test_what_are_no_devices_is_refused(devices):
    with pytest.raises(InputError, match=r"VirtualTime\(devices=\): expected hansa.Devices"):
        VirtualTime(devices=devices)
