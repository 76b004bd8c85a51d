"""The laws of runtimes with several workers: neither their number nor the death of one changes a bit of a run."""

import dataclasses
import logging
import os
import signal
from typing import Any

import numpy as np
import pytest

import support
from hansa.aggregators.secure_mean import SecureMean
from hansa.algorithms.scaffold import SCAFFOLD
from hansa.core.errors import RunError
from hansa.core.key import Key
from hansa.core.protocols import Slot
from hansa.core.round import make_plan
from hansa.runtimes.hand import Hand
from hansa.runtimes.inprocess import InProcess
from hansa.runtimes.processes import Processes
from hansa.runtimes.virtual_time import VirtualTime
from hansa.training.simulate import simulate
from hansa.transforms.clip import Clip
from hansa.transforms.sparsify import TopK
from support_devices import Delays
from support_federations import FEDERATIONS, LOCAL
from support_masked_sum import MaskedSum

FEDERATIONS = FEDERATIONS | {
    "MaskedSum": support.linear(algorithm=SCAFFOLD(**LOCAL), aggregator=MaskedSum()),
    "SecureMean, protocol": support.linear(
        transforms=(Clip(norm=2.0),), aggregator=SecureMean(bits=20, simulate="protocol")
    ),
}
SIZES = (7, 1, 12, 5, 0, 9, 2, 4, 6, 8, 10, 1, 3, 2, 5, 5, 4, 3)  # one client is empty
REGRESSION, CLASSES = support.regression(SIZES), support.classes(SIZES)

every_federation = pytest.mark.parametrize("name", FEDERATIONS)


def run(federation, runtime, people=REGRESSION, num_rounds=3, **options):
    named = {"cohort_size": 17, "seed": 3, "holdout": 0.2} | options
    return simulate(federation, people, num_rounds=num_rounds, runtime=runtime, **named)


def told(result):
    """All that a run says, but for its stopwatch."""
    history = [{name: value for name, value in row.items() if name != "seconds"} for row in result.history]
    info = [result.info[name] for name in ("bodies", "refused")]
    return result.parameters.tobytes(), repr(history), repr(result.final), info


@every_federation
def test_the_number_of_workers_changes_no_bit_of_a_run(name):
    federation, people = FEDERATIONS[name], CLASSES if name == "classes" else REGRESSION
    one, two, three = (run(federation, Processes(num_workers=count), people) for count in (1, 2, 3))
    assert told(one) == told(two) == told(three)
    assert np.abs(one.parameters).max() > 0.02

    here = run(federation, InProcess(), people)
    atol = 0.05 if "Quantize" in str(federation.transforms) or name == "MaskedSum" else 2e-5
    np.testing.assert_allclose(one.parameters, here.parameters, atol=atol)
    assert [row.num_clients for row in one.history] == [row.num_clients for row in here.history]
    assert one.info["bodies"] == here.info["bodies"]
    assert one.info["refused"] == here.info["refused"]
    assert (name == "noise") or here.info["refused"]


@every_federation
def test_processes_give_the_bits_of_this_process_with_blocks_of_the_same_size(name):
    federation, people = FEDERATIONS[name], CLASSES if name == "classes" else REGRESSION
    apart = run(federation, Processes(num_workers=2, block_size=3), people)
    assert told(apart) == told(run(federation, InProcess(block_size=3), people))


def test_many_more_workers_than_parts_change_no_bit():
    federation = FEDERATIONS["SCAFFOLD"]
    one, many = (run(federation, Processes(num_workers=count), cohort_size=2) for count in (1, 5))
    assert told(one) == told(many)


@pytest.mark.parametrize("name", ["SCAFFOLD", "Median", "MaskedSum"])
def test_rows_that_outgrow_the_shared_memory_take_the_pipe_to_the_same_bits(name, monkeypatch):
    federation = dataclasses.replace(FEDERATIONS[name], learner=support.QuadraticLearner(30_000))
    people = support.regression((7, 1, 0, 5, 3, 9), num_features=30_000)

    def found():
        return told(run(federation, Processes(num_workers=2, block_size=2), people, num_rounds=2, cohort_size=6))

    expected = found()
    monkeypatch.setattr("hansa.runtimes.crew.room", lambda wanted, share: 1)
    assert found() == expected


def test_a_run_in_processes_that_crashed_and_went_on_has_the_bits_of_one_that_did_not(tmp_path):
    class Stop(Exception):
        """The power fails."""

    def fail(row):
        if row.round == 1:
            raise Stop

    federation, runtime = FEDERATIONS["SCAFFOLD, TopK, Quantize"], Processes(num_workers=2)
    with pytest.raises(Stop):
        run(federation, runtime, checkpoint=tmp_path / "point", on_round=fail)
    assert not support.forked()
    assert told(run(federation, runtime, checkpoint=tmp_path / "point")) == told(run(federation, runtime))


def test_on_a_simulated_clock_only_those_who_come_in_time_are_trained_and_stand_where_they_stood():
    devices = Delays({f"c{i}": 1 + i % 5 for i in range(len(SIZES))}, lost=["c7"])
    federation = FEDERATIONS["SCAFFOLD"]
    runs = [
        run(federation, VirtualTime(inner, devices=devices), cohort_size=9, over_selection=1.8)
        for inner in (InProcess(block_size=2), *(Processes(num_workers=count, block_size=2) for count in (1, 3)))
    ]
    assert told(runs[0]) == told(runs[1]) == told(runs[2])
    assert all(5 <= row.num_clients <= 9 for row in runs[0].history)


@pytest.mark.parametrize("here", [("c1", "c5", "c6"), ("c0", "c2", "c3", "c16"), ("c4",), ()])
def test_some_of_a_cohort_are_summed_where_they_stand_in_it(here):
    federation, sums = FEDERATIONS["FedAvg"], []
    for runtime in (InProcess(block_size=2), *(Processes(num_workers=count, block_size=2) for count in (1, 2))):
        state, context, _ = support.world(federation, REGRESSION)
        site = runtime.open(federation, REGRESSION.load, Key.of("secrets"))
        plan = make_plan(federation.task("train"), state, context, REGRESSION.ids, Slot(0, 0, "update"))
        site.start_some(plan, REGRESSION.ids, here)
        reports = tuple(site.reports(plan.slot))
        sums.append(federation.aggregator.open(REGRESSION.ids, {"update": reports}))
        site.close()
    assert [found.clients for found in sums] == [tuple(c for c in here if c != "c4")] * 3
    assert len({np.asarray(found.values).tobytes() for found in sums}) == 1


# --------------------------------------------------------------------------------------------------- lost workers


TEST = os.getpid()  # it must not end itself


class Mark:
    """Files in a folder that say how often something has happened, in whichever process."""

    def __init__(self, folder):
        self.folder, self.times = folder, 0

    def spend(self):
        """Whether this is one of the first ``times`` calls, outside of the test's own process."""
        for number in range(0 if os.getpid() == TEST else self.times):
            try:
                (self.folder / f"{number}").touch(exist_ok=False)
            except FileExistsError:
                continue
            return True
        return False

    @property
    def spent(self):
        return len(list(self.folder.iterdir()))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Deadly(SCAFFOLD):
    """SCAFFOLD whose client ``c3`` ends the process that it is trained in, before its report is made or as it is sent.

    It does so as often as ``mark`` lets it.
    """

    mark: Any
    when: str

    def client_update(self, received, fit, memory):
        updates, new = super().client_update(received, fit, memory)
        if self.when in ("training", "sending") and "c3" in fit.clients and self.mark.spend():
            if self.when == "training":
                end()
            new = {name: np.asarray(value).view(Bomb) for name, value in new.items()}
        return updates, new


class Bomb(np.ndarray):
    """An array whose pickling ends the process."""

    def __reduce_ex__(self, protocol):
        end()


def end():
    assert os.getpid() != TEST
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture
def mark(tmp_path):
    return Mark(tmp_path)


@pytest.fixture(autouse=True)
def no_process_stays():
    yield
    assert not support.forked()


def undisturbed(federation, runtime):
    """What ``federation`` gives where nobody ends a process."""
    return told(run(federation, runtime, cohort_size=18))


@pytest.mark.parametrize("when", ["training", "sending", "summing"])
@pytest.mark.parametrize(("num_workers", "times"), [(1, 1), (2, 1), (3, 2)])
def test_a_worker_that_is_killed_costs_its_work_only(when, num_workers, times, mark, caplog, monkeypatch):
    if when == "summing":
        sums = Hand.sums
        monkeypatch.setattr(Hand, "sums", lambda hand: end() if mark.spend() else sums(hand))
    federation = support.linear(algorithm=Deadly(**LOCAL, mark=mark, when=when), transforms=(TopK(fraction=0.4),))
    runtime = Processes(num_workers=num_workers, block_size=2)
    whole = undisturbed(federation, runtime)
    mark.times = times
    with caplog.at_level(logging.WARNING, "hansa"):
        disturbed = run(federation, runtime, cohort_size=18)
    assert told(disturbed) == whole
    assert [row.num_clients for row in disturbed.history] == [17, 17, 17]
    assert mark.spent == times
    assert sum("a worker process was lost (killed by signal 9)" in line for line in caplog.messages) == times


def test_workers_that_are_killed_between_rounds_are_replaced():
    federation, runtime = FEDERATIONS["SCAFFOLD"], Processes(num_workers=3)
    killed = []

    def kill(row):
        for child in support.forked()[: row.round + 1]:
            child.kill()
            killed.append(child.pid)

    disturbed = run(federation, runtime, cohort_size=18, num_rounds=4, on_round=kill)
    assert told(disturbed) == told(run(federation, runtime, cohort_size=18, num_rounds=4))
    assert len(set(killed)) >= 1 + 2 + 3


def test_a_part_that_three_workers_die_of_ends_the_run_with_the_names_of_its_clients(mark):
    mark.times = 3
    federation = support.linear(algorithm=Deadly(**LOCAL, mark=mark, when="training"))
    said = r"round 0: client 'c3': expected a worker process .* 3 of them were lost \(killed by signal 9\)"
    with pytest.raises(RunError, match=said):
        simulate(federation, REGRESSION, num_rounds=1, runtime=Processes(num_workers=2, block_size=2))


def test_sums_that_three_workers_die_of_end_the_run(mark, monkeypatch):
    mark.times = 3
    monkeypatch.setattr(Hand, "sums", lambda hand: end() if mark.spend() else {})
    with pytest.raises(RunError, match="round 0: adding up: expected a worker process"):
        run(support.linear(), Processes(num_workers=1))
