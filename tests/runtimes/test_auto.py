import re

import numpy as np
import pytest

import support
from hansa.algorithms.scaffold import SCAFFOLD
from hansa.core.errors import InputError
from hansa.core.key import Key
from hansa.runtimes import auto
from hansa.runtimes.auto import Auto
from hansa.runtimes.inprocess import InProcess
from hansa.training.simulate import simulate
from hansa.transforms.sparsify import TopK

FEDERATION = support.linear(
    algorithm=SCAFFOLD(client_learning_rate=0.05, local_epochs=2, batch_size=4), transforms=(TopK(fraction=0.4),)
)
PEOPLE = support.regression((7, 1, 12, 5, 0, 9, 2, 4))


class Clock:
    """Seconds that pass as they are told to: so many for a round in this process, so many for one in others."""

    def __init__(self, monkeypatch, here, apart):
        self.now, self.here, self.apart = 0.0, here, apart
        monkeypatch.setattr(auto.time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(auto, "num_cores", lambda: 2)
        one = auto.InProcessRuntime._reports
        made = auto.new_crew

        def here_reports(runtime, plan, cohort, clients):
            yield from one(runtime, plan, cohort, clients)
            self.now += self.here * (plan.slot.task == "train")

        def new_crew(worker, num_workers):
            crew = made(worker, num_workers)
            several = crew.reports

            def reports(home, plan, cohort, clients, width):
                yield from several(home, plan, cohort, clients, width)
                self.now += self.apart * (plan.slot.task == "train")

            crew.reports = reports
            return crew

        monkeypatch.setattr(auto.InProcessRuntime, "_reports", here_reports)
        monkeypatch.setattr(auto, "new_crew", new_crew)


def run(num_rounds=9, runtime=None, **options):
    """A run, and how many processes there were beside this one after each round."""
    beside = []
    result = simulate(
        FEDERATION, PEOPLE, num_rounds=num_rounds, holdout=0.2, runtime=runtime or Auto(num_workers=2),
        on_round=lambda row: beside.append(len(support.forked())), **options,
    )  # fmt: skip
    assert not support.forked()
    return result, beside


@pytest.mark.parametrize("value", [0, -1, 1.5, "all"])
def test_a_number_of_workers_that_cannot_be_is_refused(value):
    with pytest.raises(InputError, match=r"Auto\(num_workers=\): expected 1 or more"):
        Auto(num_workers=value)


def test_only_auto_is_a_runtime_by_name():
    assert "auto" in run(1, "auto")[0].info["runtime"]
    with pytest.raises(InputError, match=r"expected hansa.InProcess.* found 'ray'"):
        run(1, "ray")


def test_three_rounds_each_way_and_then_the_faster_one(monkeypatch):
    Clock(monkeypatch, here=0.5, apart=0.3)
    result, beside = run()
    assert beside == [0, 0, 2, 2, 2, 2, 2, 2, 2]  # the third round is scored by those who train the fourth
    assert result.info["runtime"] == "auto: Processes(num_workers=2) (0.3 s a round; in process 0.5)"


def test_where_processes_are_slower_they_end(monkeypatch):
    Clock(monkeypatch, here=0.25, apart=0.75)
    result, beside = run()
    assert beside == [0, 0, 2, 2, 2, 0, 0, 0, 0]
    assert result.info["runtime"] == "auto: InProcess(block_size=1024) (0.25 s a round; processes 0.75)"


def test_rounds_of_other_cohorts_are_compared_by_client(monkeypatch):
    Clock(monkeypatch, here=0.0, apart=0.0)
    site = Auto(num_workers=2).open(FEDERATION, PEOPLE.load, Key.of(0))
    rounds = ((8, 0.1), (8, 0.1), (8, 0.4), (8, 0.1), (2, 0.06), (2, 0.05))  # the last are slow, for so few
    for size, seconds in rounds:
        site._note(size, seconds)
    assert str(site) == "auto: InProcess(block_size=1024) (0.025 s a round; processes 0.05)"


@pytest.mark.parametrize("why", ["one core", "one worker", "short rounds", "no fork", "CUDA"])
def test_processes_are_not_tried_where_they_cannot_pay(why, monkeypatch):
    Clock(monkeypatch, here=0.009 if why == "short rounds" else 0.5, apart=0.1)
    if why == "one core":
        monkeypatch.setattr(auto, "num_cores", lambda: 1)
    if why == "no fork":
        monkeypatch.setattr(auto, "why_not", lambda: "this is a phone")
    if why == "CUDA":
        monkeypatch.setattr(type(FEDERATION.learner), "device", "cuda:0", raising=False)
    result, beside = run(5, Auto(num_workers=1 if why == "one worker" else 2))
    assert beside == [0] * 5
    assert result.info["runtime"].startswith("auto: InProcess(block_size=1024) (0.")
    assert result.parameters.tobytes() == simulate(FEDERATION, PEOPLE, num_rounds=5, holdout=0.2).parameters.tobytes()


@pytest.mark.parametrize("apart", [0.1, 0.9])
def test_memory_traffic_and_refusals_are_one_whoever_does_the_work(apart, monkeypatch):
    Clock(monkeypatch, here=0.5, apart=apart)
    found, expected = run()[0], simulate(FEDERATION, PEOPLE, num_rounds=9, holdout=0.2, runtime=InProcess())
    np.testing.assert_allclose(found.parameters, expected.parameters, atol=2e-5)
    assert found.info["bodies"] == expected.info["bodies"]
    assert found.info["refused"] == expected.info["refused"] != []
    assert [row.bytes_up for row in found.history] == [row.bytes_up for row in expected.history]


@pytest.mark.parametrize("stop", [1, 4, 7])
def test_a_run_that_goes_on_keeps_its_choice_and_its_bits(stop, monkeypatch, tmp_path):
    Clock(monkeypatch, here=0.5, apart=0.3)
    whole, _ = run()
    run(stop, checkpoint=tmp_path / "point")
    resumed, beside = run(checkpoint=tmp_path / "point")
    assert beside == [0, 0, 2, 2, 2, 2, 2, 2, 2][stop:]
    assert resumed.parameters.tobytes() == whole.parameters.tobytes()
    assert resumed.info["runtime"] == whole.info["runtime"]


def test_a_checkpoint_of_another_runtime_holds_no_choice_and_one_of_auto_goes_on_anywhere(monkeypatch, tmp_path):
    Clock(monkeypatch, here=0.5, apart=0.3)
    run(3, InProcess(), checkpoint=tmp_path / "point")
    assert run(checkpoint=tmp_path / "point")[1] == [0, 0, 2, 2, 2, 2]
    run(11, InProcess(), checkpoint=tmp_path / "point")
    run(7, checkpoint=tmp_path / "other")
    monkeypatch.setattr(auto, "why_not", lambda: "another machine")
    assert run(11, checkpoint=tmp_path / "other")[1] == [0] * 4


def test_really_measured_it_says_what_it_found():
    said = run(6)[0].info["runtime"]
    assert re.fullmatch(r"auto: InProcess\(block_size=1024\) \(0\.\d+ s a round(; processes [\d.]+)?\)", said) or (
        said.startswith("auto: Processes(num_workers=2)")
    )
