"""Where a round's time goes, on a clock that only the parts of a federation move: each by its own number."""

import dataclasses
import json

import pytest

import support
from hansa.algorithms.fedavg import FedAvg
from hansa.data.population import Population
from hansa.data.sampling import Uniform
from hansa.runtimes.inprocess import InProcess
from hansa.runtimes.processes import Processes
from hansa.runtimes.virtual_time import VirtualTime
from hansa.stopwatch import Round
from hansa.training.profile import WORDS, advice, profile_of
from hansa.training.simulate import simulate
from hansa.transforms.clip import Clip

SPENT = {"fit": 3.0, "rows": 0.5, "encode": 0.25, "score": 7.0, "server": 11.0, "row": 13.0, "draw": 17.0}
PEOPLE = support.targets(a=(1, 0, 2), b=(3, 4, 0), c=(0, 0, 1), d=(2, 2, 2))


class Clock:
    """Seconds that pass where somebody says so."""

    s = 0.0

    def __call__(self):
        return Clock.s

    @staticmethod
    def spend(what):
        Clock.s += SPENT[what]


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    monkeypatch.setattr("time.perf_counter", Clock())


class Learner(support.QuadraticLearner):
    def fit(self, *arguments):
        Clock.spend("fit")
        return super().fit(*arguments)

    def evaluate(self, params, datasets):
        Clock.spend("score")
        return super().evaluate(params, datasets)


class Algorithm(FedAvg):
    def server_update(self, state, mean):
        Clock.spend("server")
        return super().server_update(state, mean)


class Stretch(Clip):
    def encode(self, *arguments):
        Clock.spend("encode")
        return super().encode(*arguments)


class Draw(Uniform):
    def cohort(self, *arguments):
        Clock.spend("draw")
        return super().cohort(*arguments)


def load(position):
    Clock.spend("rows")
    return PEOPLE.load(PEOPLE.ids[position])[0]


def on_round(row):
    Clock.spend("row")


def run(runtime, num_rounds=3, **options):
    """Four clients in blocks of two, whose rows are read whenever they take part; each is scored by its rows."""
    federation = support.quadratic(Algorithm(client_learning_rate=0.5, local_steps=1), transforms=(Stretch(norm=9.0),))
    federation = dataclasses.replace(federation, learner=Learner())
    options = {"profile": True, "evaluate_on": PEOPLE.load("a")[0], "sampler": Draw(), "on_round": on_round} | options
    people = Population.on_demand(4, load)
    return simulate(federation, people, num_rounds=num_rounds, runtime=runtime, **options)


# ------------------------------------------------------------------------------------------------ what is measured


def test_every_second_of_a_round_is_counted_for_what_took_it():
    told = run(InProcess(block_size=2)).info["profile"]
    spent = {  # two blocks; four clients
        "sampling": 17.0,
        "plan": 0.0,
        "rows": 4 * 0.5,
        "training": 2 * 3.0,
        "client": 2 * 0.25,
        "folding": 0.0,
        "combining": 11.0,
        "evaluation": 7.0,
        "saving": 0.0,
        "on_round": 13.0,
        "rest": 0.0,
    }
    assert told == {"rounds": 3, "first_round": spent, "median_round": spent, "workers": None}
    assert list(told["median_round"]) == [name for name in WORDS if name != "waiting"]


def test_workers_count_their_own_seconds_and_the_round_is_waiting_for_them():
    told = run(Processes(num_workers=2, block_size=2)).info["profile"]
    assert told["workers"]["median_round"] == {
        "plan": 0.0,
        "rows": 4 * 0.5,
        "training": 2 * 3.0,
        "client": 2 * 0.25,
        "folding": 0.0,
        "rest": 0.0,
    }
    assert told["workers"]["first_round"] == told["workers"]["median_round"]
    assert 1 <= told["workers"]["num_workers"] <= 2
    assert set(told["median_round"]) == {*WORDS} - {"rows", "training", "client"}
    assert told["median_round"]["combining"] == 11.0  # in this process, where the workers' clocks move nothing
    assert told["median_round"]["waiting"] == 0.0


def test_a_simulated_clock_and_buffered_rounds_are_measured_as_any():
    told = run(VirtualTime(InProcess(block_size=2))).info["profile"]
    assert told["median_round"]["training"] == 6.0
    from hansa.training.buffered import Buffered

    told = run(VirtualTime(InProcess(block_size=1)), buffer=Buffered(size=2), cohort_size=2).info["profile"]
    assert told["median_round"]["training"] == 2 * 3.0
    assert told["median_round"]["combining"] == 11.0
    assert told["median_round"]["sampling"] > 0


@pytest.mark.parametrize("runtime", [InProcess(block_size=2), Processes(num_workers=2)])
def test_by_the_real_clock_stages_add_up_to_the_rounds_seconds(runtime, monkeypatch):
    monkeypatch.undo()
    rows = {}
    ended = run(runtime, num_rounds=1, on_round=lambda row: rows.update({row.round: row.seconds}))
    stages = dict(ended.info["profile"]["first_round"])
    del stages["on_round"], stages["saving"]  # which come after a row's seconds are taken
    assert sum(stages.values()) == pytest.approx(rows[0], rel=0.05, abs=0.02)


def test_evaluation_is_one_stage_wherever_rows_are_scored():
    told = run(InProcess(), evaluate_on=None, holdout=0.5, num_rounds=1).info["profile"]
    assert told["first_round"]["evaluation"] >= 7.0


def test_saving_is_a_stage(tmp_path):
    told = run(InProcess(), checkpoint=tmp_path / "checkpoint").info["profile"]
    assert "saving" in told["median_round"]


def test_nothing_is_measured_unless_asked_for_and_the_bits_are_the_same():
    plain, measured = run(InProcess(), profile=False), run(InProcess())
    assert "profile" not in plain.info
    assert plain.parameters.tobytes() == measured.parameters.tobytes()


def test_a_profile_is_kept_in_the_run_directory(tmp_path):
    ended = run(InProcess())
    ended.save(tmp_path / "run")
    assert json.loads((tmp_path / "run" / "run.json").read_text())["profile"] == ended.info["profile"]


# ---------------------------------------------------------------------------------------------------- what is told


def test_what_takes_a_second_in_every_second_round_takes_half_a_second_a_round():
    rounds = [Round({"rest": 1.0, **({"evaluation": 4.0} if i % 2 else {})}, {}) for i in range(5)]
    told = profile_of(rounds)
    assert told["first_round"] == {"rest": 1.0}
    assert told["median_round"] == {"evaluation": 2.0, "rest": 1.0}


def test_an_only_round_is_the_median_one_and_no_round_has_nothing():
    assert profile_of([Round({"rest": 2.0}, {})])["median_round"] == {"rest": 2.0}
    assert profile_of([]) == {"rounds": 0, "first_round": {}, "median_round": {}, "workers": None}


def test_workers_seconds_are_summed():
    told = profile_of([Round({"waiting": 2.0}, {0: {"training": 1.0}, 1: {"training": 2.0, "rows": 1.0}})])
    seconds = {"rows": 1.0, "training": 3.0}
    assert told["workers"] == {"num_workers": 2, "first_round": seconds, "median_round": seconds}


def info(seconds, workers=None, choices=None, evaluate_every=1):
    told = profile_of([Round(seconds, workers or {})])
    return {"profile": told, "choices": choices or {}, "schedule": {"evaluate_every": evaluate_every}}


LOOP = {"SGD, batch_size=8, 4 clients or more": "loop"}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (info({"rows": 3.0, "training": 1.0}), "keep them in memory, in a Population of datasets or with"),
        (info({"evaluation": 3.0, "training": 1.0}), "--set schedule.evaluate_every=10"),
        (info({"evaluation": 3.0, "training": 1.0}, evaluate_every=5), "--set schedule.evaluate_every=50"),
        (info({"training": 3.0}, choices=LOOP), "one by one (SGD, batch_size=8, 4 clients or more); the log says why."),
        (info({"training": 3.0}, choices=LOOP), "--runtime auto"),
        (info({"saving": 3.0}), "without a checkpoint"),
        (info({"on_round": 3.0}), "called after each round"),
        (info({"waiting": 4.0}, {0: {"training": 3.0}, 1: {"training": 1.0}}), "have work 50 % of the time"),
        (info({"waiting": 4.0}, {0: {"rows": 3.0}, 1: {"rows": 3.5}}), "keep them in memory"),
    ],
)
def test_the_largest_part_has_its_advice(given, said):
    assert said in advice(given)


@pytest.mark.parametrize(
    "given",
    [
        info({"training": 3.0, "rows": 1.0}),  # as it should be
        info({"training": 3.0}, choices={"SGD": "batched"}),
        info({"combining": 3.0}),
        info({"waiting": 4.0}, {0: {"training": 3.9}, 1: {"training": 3.9}}),
    ],
)
def test_where_nothing_is_to_be_done_nothing_is_said(given):
    assert advice(given) == ""


def test_in_worker_processes_no_others_are_advised():
    said = advice(info({"waiting": 4.0}, {0: {"training": 3.9}}, choices=LOOP))
    assert said.endswith("the log says why.")
