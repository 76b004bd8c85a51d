import dataclasses
import logging
import multiprocessing
import os
import pathlib
import signal
import subprocess
import sys
import threading
import types

import numpy as np
import psutil
import pytest

import support
from hansa.algorithms.fedavg import FedAvg
from hansa.core.errors import CheckError, InputError, RunError
from hansa.core.key import Key
from hansa.core.protocols import Slot
from hansa.core.round import server_round
from hansa.data.population import Population
from hansa.federation import Federation
from hansa.learners.function import FunctionLearner
from hansa.runtimes.failure import WorkerTraceback
from hansa.runtimes.processes import Processes, num_cores
from hansa.training.simulate import simulate

PEOPLE = support.regression((3, 1, 4, 7, 5, 9, 2, 6))
TWO = Processes(num_workers=2, block_size=2)


def function(train, **options):
    """A federation whose clients run ``train(client, tensors)``; a client is known by its number of rows."""
    names = {len(PEOPLE.load(client)[0]): client for client in PEOPLE.ids}

    def named(tensors, dataset, settings):
        return {"w": tensors["w"] + 1} if train(names[len(dataset)]) is None else {}

    learner = FunctionLearner(lambda: {"w": np.zeros(3)}, named, lambda tensors, x: x @ tensors["w"])
    return Federation(learner=learner, algorithm=FedAvg(local_epochs=1), **options)


def run(federation, people=PEOPLE, runtime=TWO, num_rounds=1, **options):
    return simulate(federation, people, num_rounds=num_rounds, runtime=runtime, **options)


@pytest.fixture(autouse=True)
def nothing_stays():
    yield
    assert not support.forked()


@pytest.mark.parametrize("option", ["num_workers", "block_size"])
@pytest.mark.parametrize("value", [0, -1, 2.0, "all", True])
def test_options_that_cannot_be_are_refused(option, value):
    with pytest.raises(InputError, match=rf"Processes\({option}=\): expected .*, found {value!r}"):
        Processes(**{option: value})


def test_a_run_says_where_it_was_run():
    assert run(support.linear()).info["runtime"] == "Processes(num_workers=2, block_size=2)"
    everything = run(support.linear(), runtime=Processes()).info["runtime"]
    assert everything == f"Processes(num_workers={num_cores()})"


# ---------------------------------------------------------------------------------------- where one cannot fork


def test_a_system_that_cannot_fork_is_refused_with_what_to_use(monkeypatch):
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(InputError, match=r"expected a system that can fork, found win32; use runtime=hansa.InProcess"):
        run(support.linear())


def test_a_process_of_a_pool_is_refused(monkeypatch):
    monkeypatch.setitem(multiprocessing.current_process()._config, "daemon", True)
    with pytest.raises(InputError, match="found a daemonic one"):
        run(support.linear())


def test_a_process_in_which_ray_runs_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", types.SimpleNamespace(is_initialized=lambda: True))
    with pytest.raises(InputError, match="expected a process in which Ray does not run"):
        run(support.linear())


def test_a_process_that_has_used_cuda_is_refused_when_it_opens_and_when_it_forks(monkeypatch):
    torch = pytest.importorskip("torch")
    site = TWO.open(support.linear(), PEOPLE.load, Key.of(0))
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with pytest.raises(InputError, match="has not used CUDA"):
        run(support.linear())
    with pytest.raises(InputError, match="has not used CUDA"):
        site._reports(None, (), ())


def test_a_system_without_room_for_another_process_is_an_error_that_says_so(monkeypatch):
    def refuse(self):
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr("multiprocessing.context.ForkProcess.start", refuse)
    with pytest.raises(RunError, match=r"start worker process 1, found .*unavailable; give fewer num_workers"):
        run(support.linear())


# ------------------------------------------------------------------------------------------------- what goes wrong


def test_a_function_that_raises_names_the_client_and_shows_where():
    def divide(client):
        if client == "c4":
            return 1 / 0

    with pytest.raises(RunError, match=r"round 0: client 'c4': .* found ZeroDivisionError: division by zero") as found:
        run(function(divide))
    assert isinstance(found.value.__cause__, WorkerTraceback)
    assert "return 1 / 0" in str(found.value.__cause__)


def test_a_client_whose_memory_runs_out_is_named():
    def large(client):
        if client == "c2":
            raise MemoryError

    with pytest.raises(RunError, match=r"client 'c2': out of memory \(MemoryError: .*fewer workers"):
        run(function(large))


class Odd(RunError):
    """An error of a user's own, with a constructor of its own."""

    def __init__(self, first, second):
        super().__init__(f"{first} and {second}")
        self.second = second


@pytest.mark.parametrize(
    ("error", "fields"),
    [
        (InputError("expected a cat, found a dog"), {}),
        (RunError("enough"), {}),
        (CheckError(["one", "two"]), {"problems": ("one", "two")}),
        (Odd("one", 2), {"second": 2}),
    ],
    ids=lambda value: type(value).__name__,
)
def test_an_error_of_hansas_own_kind_comes_back_as_it_was(error, fields):
    def fail(client):
        raise error

    with pytest.raises(type(error)) as found:
        run(function(fail))
    assert type(found.value) is type(error)
    assert str(found.value) == str(error)
    assert vars(found.value) == fields
    assert found.value.exit_status == error.exit_status


def test_an_error_that_cannot_be_sent_comes_back_as_words():
    class Local(RunError):
        """Known in this function alone."""

    def fail(client):
        raise Local("what a pity")

    with pytest.raises(RunError, match="in a worker process: Local: what a pity"):
        run(function(fail))


def test_a_forked_process_in_which_pytorch_does_not_train_is_explained():
    def fail(client):
        raise RuntimeError("Unable to handle autograd's threading in combination with fork-based multiprocessing.")

    with pytest.raises(RunError, match="expected a process that has not trained with PyTorch before"):
        run(function(fail))


@pytest.mark.parametrize("guilty", ["c0", "c5"])
def test_a_client_whose_rows_cannot_be_read_is_named(guilty):
    def load(client):
        if client == guilty:
            raise KeyError("column 'age'")
        return PEOPLE.load(client)

    federation = support.linear()
    state, context, _ = support.world(federation, PEOPLE)
    site = TWO.open(federation, load, Key.of("secrets"))
    with pytest.raises(RunError, match=f"client '{guilty}': .* KeyError"):
        server_round(federation.task("train"), state, site, PEOPLE.ids, context, Slot(0, 0, ""))


class Unsendable(FedAvg):
    """Sends what no other process can be sent, or has its clients keep it."""

    def broadcast(self, state):
        return {**super().broadcast(state), "odd": lambda: 0}


def test_a_plan_that_cannot_be_sent_is_an_error_that_says_what_to_do():
    federation = support.linear(algorithm=Unsendable(client_learning_rate=0.1))
    with pytest.raises(RunError, match=r"round 0: expected a plan that can travel .* use runtime=hansa.InProcess"):
        run(federation)


class Secretive(FedAvg):
    def client_update(self, received, fit, memory):
        updates, _ = super().client_update(received, fit, memory)
        return updates, {"odd": np.array([lambda: 0] * len(fit.clients), dtype=object)}


def test_what_a_client_keeps_and_cannot_be_sent_is_an_error_that_says_what_to_do():
    federation = support.linear(algorithm=Secretive(client_learning_rate=0.1))
    with pytest.raises(RunError, match=r"expected what a client keeps .* use runtime=hansa.InProcess"):
        run(federation)


# ----------------------------------------------------------------------------------------- no process stays behind


@pytest.fixture
def minds_ctrl_c():
    """Python's own handler, also where this was started by a shell's ``&``, which has Ctrl-C ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("minds_ctrl_c")
def test_ctrl_c_in_the_middle_of_a_round_ends_all_workers():
    here = os.getpid()

    def interrupt(client):
        while client == "c1":  # for ever: this worker is ended
            while len(support.forked(here)) < 2:  # Python drops an interrupt that comes while it forks,
                threading.Event().wait(0.01)
            threading.Event().wait(0.2)
            os.kill(here, signal.SIGINT)
            threading.Event().wait(5)  # or collects garbage

    with pytest.raises(KeyboardInterrupt):
        run(function(interrupt))
    _, left = psutil.wait_procs(support.forked(), timeout=10)  # whoever was ended may take a moment to die
    assert not left


def test_a_worker_does_not_mind_ctrl_c():
    def interrupted(client):
        os.kill(os.getpid(), signal.SIGINT)

    assert run(function(interrupted)).history[0].num_clients == len(PEOPLE)


def test_a_caller_that_stops_leaves_no_process_and_no_file_descriptor():
    class Stop(Exception):
        """Enough."""

    def stop(row):
        assert len(support.forked()) == 2
        raise Stop

    def descriptors():
        return len(os.listdir("/proc/self/fd"))

    before = None
    for _ in range(3):
        with pytest.raises(Stop):
            run(support.linear(), on_round=stop)
        run(support.linear())
        before = before or descriptors()
    assert descriptors() == before


ORPHANS = """
import os, signal, sys
import numpy as np, psutil
sys.path[:0] = ["tests"]
import support
from hansa.runtimes.processes import Processes
from hansa.training.simulate import simulate

def die(row):
    if row.round == 1:
        print(*[child.pid for child in psutil.Process().children()], flush=True)
        os.kill(os.getpid(), signal.SIGKILL)

simulate(support.linear(), support.regression(), num_rounds=3, runtime=Processes(num_workers=3), on_round=die)
"""


def test_workers_end_by_themselves_when_their_simulation_is_killed():
    root = pathlib.Path(__file__).parents[2]
    script = subprocess.run([sys.executable, "-c", ORPHANS], capture_output=True, text=True, cwd=root, timeout=60)
    assert script.returncode == -signal.SIGKILL, script.stderr
    orphans = [psutil.Process(int(pid)) for pid in script.stdout.split() if psutil.pid_exists(int(pid))]
    _, alive = psutil.wait_procs(orphans, timeout=20)
    assert [process for process in alive if process.status() != psutil.STATUS_ZOMBIE] == []
    assert len(script.stdout.split()) == 3


# -------------------------------------------------------------------------------------------- what workers share


def test_what_a_client_logs_is_logged_here_once(caplog):
    def log(client):
        logging.getLogger("hansa").warning("looks odd: %s", client[:1])

    with caplog.at_level(logging.WARNING, "hansa"):
        run(function(log), num_rounds=2)
    assert caplog.messages == ["looks odd: c"]


def test_a_forked_worker_trains_after_this_process_has_used_two_threads():
    torch = pytest.importorskip("torch")
    from hansa.learners.torch import TorchLearner

    def model():
        return torch.nn.Sequential(torch.nn.Linear(3, 20_000), torch.nn.ReLU(), torch.nn.Linear(20_000, 1))

    learner = TorchLearner(model, loss="mse", batched=False)
    federation = support.linear(learner=learner, algorithm=FedAvg(client_learning_rate=0.05, local_epochs=1))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        torch.randn(400, 400, requires_grad=True).relu().sum().backward()  # OpenMP has threads now, which no fork has
        one, two = (run(federation, runtime=Processes(num_workers=count)) for count in (1, 2))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert one.parameters.tobytes() == two.parameters.tobytes()


class Choosy(support.QuadraticLearner):
    """Chooses a way for each number of rows that a block holds, by a trial whose outcome differs by process."""

    def __init__(self, notes):
        super().__init__()
        self.notes, self.choices = notes, {}

    def choose(self, choices):
        self.choices = choices

    def fit(self, params, datasets, local, correction, keys):
        situation = f"{sum(map(len, datasets)) % 4} rows"
        if len(datasets) > 1 and situation not in self.choices:
            self.choices[situation] = f"as {os.getpid()} says"
        if len(datasets) > 1:
            with self.notes.open("a") as file:
                file.write(f"{situation}: {self.choices[situation]}\n")
        return super().fit(params, datasets, local, correction, keys)


@pytest.mark.parametrize("num_workers", [1, 3])
def test_workers_choose_alike_and_the_simulation_learns_what_they_chose(num_workers, tmp_path):
    learner = Choosy(tmp_path / "notes")
    people = support.regression([1 + i % 3 for i in range(40)])
    federation = support.linear(learner=learner)
    run(federation, people, Processes(num_workers=num_workers, block_size=3), num_rounds=2)
    said = set((tmp_path / "notes").read_text().splitlines())
    assert sorted(said) == sorted(f"{situation}: {choice}" for situation, choice in learner.choices.items())
    assert len(said) == 4
    assert all(f"as {os.getpid()} says" not in line for line in said)


def test_arrays_that_a_plan_brings_cannot_be_changed_by_a_client():
    class Careless(FedAvg):
        def client_update(self, received, fit, memory):
            received["params"][:] = 0
            raise AssertionError("reached")

    federation = support.quadratic(Careless(client_learning_rate=0.1), num_params=3000)
    people = Population({"a": support.regression((2,), 3000).load("c0")[0]})
    with pytest.raises(RunError, match=r"client 'a': .*read-only"):
        run(federation, people)


def test_equal_options_are_equal_runtimes():
    assert Processes(num_workers=2) == dataclasses.replace(Processes(), num_workers=2)
