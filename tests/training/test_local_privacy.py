"""Noise that clients add themselves, through a whole run: what is refused, written down, spent and said."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

import support
from hansa.aggregators.mean import Mean
from hansa.algorithms.fedavg import FedAvg
from hansa.algorithms.fedprox import FedProx
from hansa.commands.join import Owner
from hansa.core.errors import CheckError, RunError
from hansa.core.key import Key
from hansa.core.protocols import Memory, Plan, Slot
from hansa.data.prepare import Standardize
from hansa.data.rescale import Rescale
from hansa.local_training import DPSGD
from hansa.network.participant import in_the_clear
from hansa.privacy import events, gaussian
from hansa.privacy.events import LocalEvent, RecordBudgetEvent, RecordEvent
from hansa.privacy.ledger import Ledger
from hansa.runtimes.inprocess import InProcess
from hansa.runtimes.processes import Processes
from hansa.training.buffered import Buffered
from hansa.training.check import leaves, problems
from hansa.training.privacy import Accounts, bound, bound_locally, noise_of, planned
from hansa.training.privacy_statement import statement
from hansa.training.schedule import Schedule
from hansa.training.simulate import simulate
from hansa.transforms.adaptive_clip import AdaptiveClip
from hansa.transforms.clip import Clip
from hansa.transforms.local_noise import LocalGaussianNoise, LocalLaplaceNoise
from hansa.transforms.noise import GaussianNoise
from support_town import Town

EQUALLY = Mean(weighting="clients")
GAUSSIAN = (Clip(norm=1.0), LocalGaussianNoise(epsilon=8.0, delta=1e-3))
LAPLACE = (LocalLaplaceNoise(norm=1.0, epsilon=8.0),)


def trained_by(optimizer, algorithm=FedAvg, **options):
    options = {"local_steps": 2, **options}
    return algorithm(client_learning_rate=0.1, client_optimizer=optimizer, **options)


def local(transforms=GAUSSIAN, **options):
    return support.linear(transforms=transforms, **{"aggregator": EQUALLY, **options})


def by_record(optimizer=None, **options):
    optimizer = optimizer or DPSGD(clipping_norm=1.0, epsilon=3.0, delta=1e-2, divisor=5.0)
    return support.linear(algorithm=trained_by(optimizer, **options), aggregator=EQUALLY)


def stated(federation, schedule, num_clients=20):
    own = bound(federation, schedule, num_clients)
    return statement(own, Counter(planned(noise_of(own), schedule, num_clients)), num_clients, simulated=False)


# ------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("federation", "schedule", "says"),
    [
        (local(aggregator=Mean()), {}, "weights by examples tell how many each client has"),
        (local(prepare=(Standardize(),)), {}, "beside which LocalGaussianNoise protects nothing"),
        (local(), {"buffer": Buffered(size=2)}, "in buffered rounds a client may send more"),
        (local((LocalGaussianNoise(noise_multiplier=1.0),)), {}, "LocalGaussianNoise needs a bound"),
        (local((AdaptiveClip(), *GAUSSIAN[1:])), {}, "clip.below would leave beside it"),
        (local((*LAPLACE, Clip(norm=1.0), GaussianNoise(noise_multiplier=1.0))), {}, "in several places"),
        (local(algorithm=trained_by(DPSGD(clipping_norm=1.0, noise_multiplier=1.0))), {}, "in several places"),
        (local((*GAUSSIAN[:1], LocalGaussianNoise(epsilon=1.0, delta=0.5))), {}, "delta 0.5 is not below 1 / 20"),
        (by_record(batch_size=4, local_steps=None), {}, "steps are counted, not epochs"),
        (support.linear(algorithm=by_record().algorithm), {}, "does not cover"),
        (support.quadratic(by_record().algorithm, aggregator=EQUALLY), {}, "QuadraticLearner cannot train by DPSGD"),
    ],
)
def test_what_the_noise_would_not_cover_is_a_problem_in_one_sentence(federation, schedule, says):
    found = problems(federation, Schedule(num_rounds=5, **schedule), 20)
    assert [says in one.sentence for one in found].count(True) == 1
    assert all("\n" not in one.sentence for one in found)


def test_a_model_with_buffers_is_a_problem_beside_dp_sgd():
    pytest.importorskip("torch")
    from torch import nn

    from hansa.learners.torch import TorchLearner

    learner = TorchLearner(lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)))
    federation = support.linear(algorithm=by_record().algorithm, learner=learner, aggregator=EQUALLY)
    (found,) = problems(federation, Schedule(num_rounds=5), 20)
    assert found.sentence.startswith("the model's buffers (1.running_mean, ...) leave without noise")


@pytest.mark.parametrize(
    "federation",
    [
        local(),
        local(LAPLACE),
        by_record(),
        by_record(algorithm=FedProx, strength=0.1),
        local(prepare=(Rescale(scale=2.0),)),
    ],
)
def test_what_is_covered_has_no_problem_and_tells_no_metrics(federation):
    schedule = Schedule(num_rounds=5)
    assert problems(federation, schedule, 20) == []
    assert federation.is_private
    (row,) = leaves(bound(federation, schedule, 20), 0.2)
    assert "with the client's own noise" in row["what"]
    assert not federation.task("train").train_loss
    assert in_the_clear(federation, support.SLOT).startswith("noise of this client's own")


@pytest.mark.parametrize("federation", [local(), by_record()])
@pytest.mark.parametrize("task", ["evaluate", "prepare"])
def test_a_client_does_not_answer_a_server_that_asks_for_exact_sums(federation, task):
    with_sums = replace(federation, prepare=(Standardize(),))
    data = support.regression().load("c0")[0]
    plan = Plan(Slot(0, 0, "update", task), True, {"params": np.zeros(4, np.float32)}, (), Key.of(0))
    with pytest.raises(CheckError, match="the server asks for exact sums"):
        with_sums.exchange(plan, ("c0",), [data], Memory([{}]), {}, [Key.of(1)])


@pytest.mark.parametrize("federation", [local(), local(LAPLACE), by_record()])
def test_a_client_does_not_report_in_more_rounds_than_its_noise_is_sized_for(federation):
    own, data = bound_locally(federation, Schedule(num_rounds=3)), support.regression().load("c0")[0]
    settings = tuple(t.settings(None) for t in own.transforms)
    plan = Plan(Slot(2, 0, "update"), True, {"params": np.zeros(4, np.float32)}, settings, Key.of(0))
    report, _, _ = own.exchange(plan, ("c0",), [data], Memory([{}]), {}, [Key.of(1)])
    assert report.clients == ("c0",)
    with pytest.raises(CheckError, match="sized for 3 rounds, and the server asks for more"):
        own.exchange(plan._replace(slot=Slot(3, 0, "update")), ("c0",), [data], Memory([{}]), {}, [Key.of(1)])


class Curious(FedAvg):
    """Asks a client for more than DP-SGD has counted: ``what(fit, params)`` is sent."""

    what = staticmethod(lambda fit, params: params)

    def client_update(self, received, fit, memory):
        return fit.updates(type(self).what(fit, fit.block(received["params"]))), {}


@pytest.mark.parametrize(
    ("what", "says"),
    [
        (lambda fit, params: fit.gradient(params), "asks for others without noise"),
        (lambda fit, params: params * fit.loss(params)[:, None], "asks for losses without noise"),
        (lambda fit, params: fit.change(params) + fit.change(params), "asks for a second one"),
        (lambda fit, params: fit.updates(params, tail={"sum": params[:, 0]}).values, "sum would leave beside it"),
    ],
)
def test_an_algorithm_gets_nothing_of_the_records_but_its_noisy_steps(what, says):
    algorithm = type("Asking", (Curious,), {"what": staticmethod(what)})
    optimizer = DPSGD(clipping_norm=1.0, noise_multiplier=1.0)
    federation = support.linear(algorithm=trained_by(optimizer, algorithm), aggregator=EQUALLY)
    with pytest.raises((CheckError, RunError), match=says):
        simulate(federation, support.regression(), num_rounds=1, seed=0)


# ----------------------------------------------------------------------------------------------------- what is spent


def test_local_noise_is_calibrated_for_a_client_that_takes_part_in_every_round():
    schedule = Schedule(num_rounds=50)
    assert bound(local(), schedule, 20).transforms[1].noise_multiplier == pytest.approx(
        2 * gaussian.noise_multiplier(8.0, 1e-3, 50), rel=1e-5
    )
    assert bound(local(LAPLACE), schedule, 20).transforms[0].noise_multiplier == pytest.approx(2 * 50 / 8, rel=1e-5)


def test_a_client_finds_the_noise_that_the_server_plans_with():
    schedule = Schedule(num_rounds=7)
    for federation in (local(), local(LAPLACE), by_record()):
        ours, theirs = bound_locally(federation, schedule), bound(federation, schedule, 20)
        assert ours.transforms == theirs.transforms
        assert ours.algorithm == theirs.algorithm
    assert bound_locally(by_record(), schedule).algorithm.client_optimizer.num_rounds == 7


@pytest.mark.parametrize(
    ("federation", "costs"),
    [
        (local(), [gaussian.epsilon(1e-3, gaussian.noise_multiplier(8.0, 1e-3, 4), n) for n in (1, 2, 3, 4)]),
        (local(LAPLACE), [2.0, 4.0, 6.0, 8.0]),
        (by_record(), [gaussian.epsilon(1e-2, gaussian.noise_multiplier(3.0, 1e-2, 8), 2 * n) for n in (1, 2, 3, 4)]),
        (by_record(DPSGD(clipping_norm=1.0, epsilon=3.0, delta=1e-2), batch_size=50), [3.0] * 4),
    ],
    ids=["gaussian", "laplace", "records", "records by coins"],
)
def test_each_row_of_a_run_says_what_has_been_spent(federation, costs):
    run = simulate(federation, support.regression(), num_rounds=4, seed=0)
    assert [row.epsilon for row in run.history] == pytest.approx(costs, rel=1e-4)
    assert run.info["privacy"]["epsilon"] == run.history[-1].epsilon
    assert {row.num_clients for row in run.history} == {4}


def test_what_a_client_may_release_is_in_the_ledger_before_it_is_asked_and_once_for_each_attempt():
    schedule, ledger = Schedule(num_rounds=3), Ledger()
    own = bound(local(), schedule, 20)
    accounts = Accounts(own, schedule, ledger)
    for number, attempt in ((0, 0), (0, 0), (0, 1), (1, 0)):  # the second time as after a crash
        assert accounts.has_room(number, 20)
        assert accounts.noting(None, number=number, attempt=attempt, num_clients=20) is None
    assert [(entry.round, entry.attempt) for entry in ledger.entries] == [(0, 0), (0, 1), (1, 0)]
    assert not accounts.has_room(2, 20)  # an attempt that came to nothing was one of three
    with pytest.raises(RunError, match="another attempt would cost clients more"):
        accounts.noting(None, number=1, attempt=1, num_clients=20)
    assert accounts.has_room(1, 20)  # after a crash, its entry is there


def test_no_sampling_of_clients_amplifies_what_the_server_sees_of_them():
    from hansa.data.sampling import Poisson

    schedule = Schedule(num_rounds=3, cohort_size=2, sampler=Poisson())
    for federation in (local(), by_record()):
        assert len(set(planned(noise_of(bound(federation, schedule, 20)), schedule, 20))) == 1
        assert stated(federation, schedule)["epsilon"] == pytest.approx(
            stated(federation, Schedule(num_rounds=3))["epsilon"]
        )


def test_with_a_noise_multiplier_the_smallest_clients_epsilon_is_stated():
    federation = by_record(DPSGD(clipping_norm=1.0, noise_multiplier=2.0, delta=1e-3), batch_size=4)
    words = stated(federation, Schedule(num_rounds=5))
    assert words["epsilon"] == pytest.approx(gaussian.epsilon(1e-3, 2.0, 10))
    assert "holds for the smallest client" in words["facts"]["sampling"]


# ------------------------------------------------------------------------------------------------------ what is said


@pytest.mark.parametrize(
    ("federation", "says"),
    [
        (local(), ("local: each client", "one client's report", "every round", "replaced by any other", "epsilon 8")),
        (local(LAPLACE), ("at delta 0 ", "pure epsilons added up", "LocalLaplaceNoise", "twice the norm bound")),
        (by_record(), ("one record of one client", "steps are counted, not epochs", "does not leave", "no metrics")),
    ],
    ids=["gaussian", "laplace", "records"],
)
def test_the_statement_names_setting_unit_neighbours_and_who_is_trusted(federation, says):
    words = stated(federation, Schedule(num_rounds=5))
    whole = words["statement"] + " ".join(f"{name}: {fact}" for name, fact in words["facts"].items())
    for part in says:
        assert part in whole
    assert "The server sees each client's clipped update" not in whole


def test_one_report_costs_less_than_all_rounds():
    facts = stated(local(LAPLACE), Schedule(num_rounds=4))["facts"]
    assert facts["one report"] == "epsilon 2 at delta 0"


def test_a_number_of_records_is_called_hidden_only_where_nothing_depends_on_it():
    schedule = Schedule(num_rounds=2)
    hidden = stated(by_record(), schedule)["facts"]["neighbours"]
    shown = stated(by_record(DPSGD(clipping_norm=1.0, noise_multiplier=2.0)), schedule)["facts"]["neighbours"]
    assert "does not leave" in hidden
    assert "is not hidden" in shown


# ------------------------------------------------------------------------------------------------ everywhere the same


@pytest.mark.parametrize("federation", [local(), local(LAPLACE), by_record()], ids=["gaussian", "laplace", "records"])
def test_a_seed_gives_the_same_run_in_blocks_and_one_by_one(federation):
    runs = [
        simulate(federation, support.regression(), num_rounds=3, seed=5, runtime=InProcess(block_size=size))
        for size in (1, 4)
    ]
    np.testing.assert_allclose(runs[0].parameters, runs[1].parameters, rtol=1e-4, atol=1e-5)
    assert (simulate(federation, support.regression(), num_rounds=3, seed=6).parameters != runs[0].parameters).all()


def test_worker_processes_draw_the_noise_of_one_process():
    alone, apart = (
        simulate(by_record(), support.regression(), num_rounds=2, seed=5, runtime=runtime)
        for runtime in (InProcess(block_size=1), Processes(num_workers=1, block_size=1))
    )
    assert alone.parameters.tobytes() == apart.parameters.tobytes()


def test_over_the_network_noise_comes_from_secrets_that_no_seed_gives(tmp_path):
    schedule = Schedule(num_rounds=1)
    own = bound(replace(by_record(), prepare=(Rescale(scale=2.0),)), schedule, 4)
    data = {client: support.regression().load(client) for client in support.regression().ids}
    found = []
    for folder in ("one", "two"):
        town = Town(tmp_path / folder, own, data)
        found.append(town.train(schedule))
        town.close()
    one, two = (point.state.algorithm["params"] for point in found)
    assert np.isfinite(one).all()
    assert (one != two).all()
    assert found[0].history[-1].epsilon == found[1].history[-1].epsilon == pytest.approx(3.0, rel=1e-4)
    assert [entry.round for entry in found[0].ledger] == [0]


APP = """
import hansa
app = hansa.App(
    federation=hansa.Federation(
        learner=hansa.LinearLearner(num_features=3),
        algorithm=hansa.FedAvg(client_learning_rate=0.1),
        transforms=(hansa.Clip(norm=1.0), hansa.LocalGaussianNoise(epsilon=4, delta=1e-3)),
        aggregator=hansa.Mean(weighting="clients"),
    ),
    schedule=hansa.Schedule(num_rounds=9),
)
"""


def test_a_client_that_joins_sizes_its_noise_by_its_own_copy_of_the_app(tmp_path):
    (tmp_path / "app.py").write_text(APP)
    _, federation = Owner(apps=tmp_path, data="", device=None).app(tmp_path / "app.py")
    noise = federation.transforms[1]
    assert noise.noise_multiplier == pytest.approx(2 * gaussian.noise_multiplier(4.0, 1e-3, 9), rel=1e-5)
    assert noise.event(0, 9) == LocalEvent(noise_multiplier=noise.noise_multiplier)


def test_what_an_algorithm_releases_of_records_is_one_event_a_round():
    schedule = Schedule(num_rounds=3)
    for optimizer, options, kind in (
        (DPSGD(clipping_norm=1.0, epsilon=3.0, delta=1e-3), {}, RecordEvent),
        (DPSGD(clipping_norm=1.0, epsilon=3.0, delta=1e-3), {"batch_size": 4}, RecordBudgetEvent),
    ):
        found = planned(noise_of(bound(by_record(optimizer, **options), schedule, 9)), schedule, 9)
        assert len(found) == 3
        assert {type(event) for event in found} == {kind}
        assert events.cost(found, 1e-3).epsilon == pytest.approx(3.0, rel=1e-5)
