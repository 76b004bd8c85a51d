"""The ``Ray`` runtime: the bits of one process whatever the number of workers, and what is lost is done again."""

import importlib.util
import logging
import os
import signal
import subprocess
import sys
import threading
from functools import partial

import numpy as np
import pytest

import support
from hansa.aggregators.median import Median
from hansa.algorithms.scaffold import SCAFFOLD
from hansa.core.errors import InputError, RunError
from hansa.core.key import Key
from hansa.core.protocols import Slot
from hansa.core.round import server_round
from hansa.data.prepare import Standardize
from hansa.learners.linear import LinearLearner
from hansa.learners.torch import TorchLearner
from hansa.runtimes.inprocess import InProcess
from hansa.runtimes.processes import Processes
from hansa.runtimes.ray import Ray
from hansa.training.simulate import simulate
from hansa.transforms.quantize import Quantize
from hansa.transforms.sparsify import TopK
from support_masked_sum import MaskedSum

has_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed: hansa[ray]")

SIZES = (7, 1, 0, 12, 5, 3, 9, 2, 4, 6, 8, 10, 1, 3, 2, 5, 5, 4, 3)  # of which one client has nothing
PEOPLE = support.regression(SIZES)
LOCAL = {"client_learning_rate": 0.05, "local_epochs": 2, "batch_size": 4}


def mlp():
    from torch import nn

    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))


FEDERATIONS = {
    "FedAvg": support.linear(),
    "SCAFFOLD": support.linear(algorithm=SCAFFOLD(**LOCAL)),
    "TopK, Quantize, prepared": support.linear(
        transforms=(TopK(fraction=0.4), Quantize(bits=6)), prepare=(Standardize(min_rows=1),)
    ),
    "rows": support.linear(aggregator=Median(), transforms=(Quantize(bits=8),)),
    "four exchanges": support.linear(aggregator=MaskedSum()),
    "Torch": support.linear(learner=TorchLearner(mlp, loss="mse", metrics=(), batched=True)),
}


@pytest.fixture(scope="module")
def by_processes():
    """What two processes make of SCAFFOLD, which are forked before Ray has its threads here."""
    return run(FEDERATIONS["SCAFFOLD"], Processes(num_workers=2))


@pytest.fixture(scope="module")
def cluster(by_processes):
    """Ray with two CPUs and little memory, for all tests here."""
    import ray

    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        ray.init(
            address="local", num_cpus=2, object_store_memory=200 << 20,
            include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR,
        )  # fmt: skip
        yield ray
        ray.shutdown()


def run(federation, runtime, num_rounds=3, **options):
    return simulate(
        federation, PEOPLE, num_rounds=num_rounds, cohort_size=17, seed=3, holdout=0.2, runtime=runtime, **options
    )


def timeless(result):
    """A run's history without its stopwatch, NaN as text."""
    return [{name: repr(value) for name, value in row.items() if name != "seconds"} for row in result.history]


def assert_same(found, expected):
    assert found.parameters.tobytes() == expected.parameters.tobytes()
    assert timeless(found) == timeless(expected)
    assert np.abs(expected.parameters).max() > 0.05


# ------------------------------------------------------------------------------------------------------------- laws


@has_ray
@pytest.mark.parametrize("name", FEDERATIONS)
def test_any_number_of_workers_gives_the_bits_of_one_process(cluster, name):
    federation = FEDERATIONS[name]
    expected = run(federation, InProcess(block_size=4))
    for runtime in (Ray(num_workers=1, block_size=4), Ray(num_workers=2, block_size=4)):
        found = run(federation, runtime)
        assert_same(found, expected)
        assert found.info["runtime"] == f"Ray(num_workers={runtime.num_workers}, block_size=4)"


@has_ray
def test_parts_are_those_of_processes(cluster, by_processes):
    assert_same(run(FEDERATIONS["SCAFFOLD"], Ray()), by_processes)


@has_ray
def test_a_checkpoint_goes_on_to_the_same_bits(cluster, by_processes, tmp_path):
    federation, point = FEDERATIONS["SCAFFOLD"], tmp_path / "point"
    run(federation, Ray(num_workers=2), num_rounds=1, checkpoint=point)
    resumed = run(federation, Ray(num_workers=1), checkpoint=point)
    assert resumed.parameters.tobytes() == by_processes.parameters.tobytes()


@has_ray
def test_workers_choose_the_same_way_of_training(cluster):
    learner = TorchLearner(mlp, loss="mse", metrics=())
    run(support.linear(learner=learner), Ray(num_workers=2, block_size=4), num_rounds=2)
    assert len(learner.choices) >= 1
    assert set(learner.choices.values()) <= {"loop", "batched"}


# ------------------------------------------------------------------------------------------------------------- data


def read(client, book):
    """A client's rows, by a function that notes in which process it was called."""
    with open(book, "a", encoding="utf-8") as lines:
        lines.write(f"{os.getpid()} {client}\n")
    return PEOPLE.load(client)


@has_ray
def test_workers_read_the_data_of_their_clients_themselves_and_once(cluster, tmp_path):
    federation, book = FEDERATIONS["FedAvg"], tmp_path / "book"
    state, context, _ = support.world(federation, PEOPLE)
    site = Ray(num_workers=2).open(federation, partial(read, book=str(book)), Key.of("secrets"))
    try:
        for number in range(3):
            slot = Slot(number, 0, "update")
            state, _ = server_round(federation.task("train"), state, site, PEOPLE.ids, context, slot)
    finally:
        site.close()
    lines = book.read_text("utf-8").splitlines()
    assert len(lines) == len(set(lines))
    assert {line.split()[1] for line in lines} == set(PEOPLE.ids)
    assert str(os.getpid()) not in {line.split()[0] for line in lines}


@has_ray
def test_what_cannot_be_sent_is_refused_in_a_sentence(cluster):
    lock = threading.Lock()
    with pytest.raises(InputError, match=r"can be sent to workers, found TypeError: .*lock"):
        Ray().open(FEDERATIONS["FedAvg"], lambda client: (lock, client), Key.of(0))


# ----------------------------------------------------------------------------------------------------- what goes wrong


class Fragile(LinearLearner):
    """A linear learner that meets a client of 12 rows: ``fate`` is the path of a file, or a word."""

    def __init__(self, fate):
        super().__init__(num_features=3)
        self.fate = str(fate)

    def fit(self, params, datasets, *arguments, **options):
        if any(len(dataset) == 12 for dataset in datasets):
            self.meet()
        return super().fit(params, datasets, *arguments, **options)

    def meet(self):
        if self.fate == "raise":
            raise ValueError("spoilt rows")
        if self.fate != "die":
            try:
                os.unlink(self.fate)  # one worker only
            except FileNotFoundError:
                return
        os.kill(os.getpid(), signal.SIGKILL)


@has_ray
def test_a_worker_that_is_lost_costs_its_work_only(cluster, tmp_path, caplog):
    fate = tmp_path / "fate"
    fate.touch()
    federation = support.linear(learner=Fragile(fate))
    found = simulate(federation, PEOPLE, num_rounds=2, runtime=Ray(num_workers=2, block_size=2))
    assert not fate.exists()
    assert "round 0: a worker was lost" in caplog.text
    expected = simulate(support.linear(), PEOPLE, num_rounds=2, runtime=InProcess(block_size=2))
    assert found.parameters.tobytes() == expected.parameters.tobytes()
    assert [row.num_clients for row in found.history] == [18, 18]


@has_ray
def test_a_part_that_loses_three_workers_ends_the_run_and_is_named(cluster):
    federation = support.linear(learner=Fragile("die"))
    with pytest.raises(RunError, match=r"round 0: client 'c3': expected a worker .* 3 of them were lost .*exit"):
        simulate(federation, PEOPLE, num_rounds=1, runtime=Ray(num_workers=2, block_size=1))


@has_ray
def test_an_error_of_a_users_own_names_the_client(cluster):
    federation = support.linear(learner=Fragile("raise"))
    with pytest.raises(RunError, match=r"round 0: client 'c3': expected .* found ValueError: spoilt rows") as found:
        simulate(federation, PEOPLE, num_rounds=1, runtime=Ray(num_workers=2, block_size=8))
    assert "in meet" in str(found.value.__cause__)


# ----------------------------------------------------------------------------------------------------------- the engine

SCRIPT = """
import hansa, numpy as np, psutil
from hansa.runtimes.ray import Ray

class Learner(hansa.LinearLearner):
    pass

rows = {f"c{i}": hansa.Dataset(np.full((3, 1), i, np.float32), np.full(3, 2.0 * i, np.float32)) for i in range(4)}
federation = hansa.Federation(learner=Learner(num_features=1), algorithm=hansa.FedAvg(client_learning_rate=0.05))
run = hansa.simulate(federation, rows, num_rounds=40, runtime=Ray(num_workers=2))
psutil.wait_procs(psutil.Process().children(recursive=True), timeout=5)
print(run.predict(np.array([[3.0]], np.float32)).round().tolist(), len(psutil.Process().children(recursive=True)))
"""


@has_ray
def test_an_engine_that_hansa_starts_ends_with_the_run_in_silence(tmp_path):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", SCRIPT],
        capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=120,
    )  # fmt: skip
    assert (done.stdout.strip(), done.stderr.strip()) == ("[6.0] 0", "")


@has_ray
def test_a_worker_that_fits_nowhere_is_refused_with_what_there_is(cluster):
    for options, needs in (({"num_gpus": 1}, "1 CPU, 1 GPU"), ({"resources": {"ward": 0.5}}, "1 CPU, 0.5 ward")):
        with pytest.raises(InputError, match=rf"room for a worker \({needs}\), found none .*'CPU': 2.0"):
            Ray(**options).open(FEDERATIONS["FedAvg"], PEOPLE.load, Key.of(0))


@has_ray
def test_shares_of_a_cpu_make_more_workers(cluster):
    site = Ray(num_cpus=0.5).open(FEDERATIONS["FedAvg"], PEOPLE.load, Key.of(0))
    assert str(site) == "Ray(num_workers=4, num_cpus=0.5)"
    site.close()


def test_without_ray_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InputError, match=r"expected Ray to be installed, .*; pip install 'hansa\[ray\]'"):
        Ray().open(FEDERATIONS["FedAvg"], PEOPLE.load, Key.of(0))


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"num_workers": 0}, "num_workers"),
        ({"num_cpus": 0}, "num_cpus"),
        ({"num_gpus": 1.5}, "num_gpus"),
        ({"num_gpus": -1}, "num_gpus"),
        ({"block_size": "wide"}, "block_size"),
        ({"resources": {"GPU": 1}}, "resources"),
        ({"resources": {"ward": float("nan")}}, "resources"),
    ],
)
def test_options_that_cannot_be_are_refused(options, found):
    with pytest.raises(InputError, match=rf"Ray\({found}=\): expected"):
        Ray(**options)
