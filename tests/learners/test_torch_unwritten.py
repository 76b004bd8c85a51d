"""Rows whose first layer stays a product until somebody looks at them; their sums, without them."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import support
from hansa.aggregators.folds import fold
from hansa.aggregators.mean import Mean
from hansa.algorithms.fedavg import FedAvg
from hansa.attacks.sign_flip import SignFlip
from hansa.core.key import Key
from hansa.core.protocols import Updates
from hansa.data.dataset import Dataset
from hansa.data.population import Population
from hansa.federation import Federation
from hansa.learners import torch_batched, torch_dual
from hansa.learners.torch import TorchLearner
from hansa.local_training import Correction, LocalTraining
from hansa.runtimes.inprocess import InProcess
from hansa.runtimes.processes import Processes
from hansa.training.simulate import simulate
from hansa.transforms.clip import Clip
from hansa.unwritten import Unwritten, other_columns

MODELS = {
    "hidden": lambda: nn.Sequential(nn.Linear(6, 70), nn.ReLU(), nn.Linear(70, 3)),
    "no bias": lambda: nn.Sequential(nn.Linear(6, 70, bias=False), nn.Tanh(), nn.Linear(70, 3)),
    "linear": lambda: nn.Linear(6, 3),
    "later": lambda: nn.Sequential(nn.Flatten(), nn.ReLU(), nn.Linear(6, 40), nn.Linear(40, 3)),
}
STEPS = {
    "an epoch": LocalTraining(learning_rate=0.1, epochs=1, batch_size=4),
    "epochs": LocalTraining(learning_rate=0.1, epochs=2, batch_size=4),
    "full batches": LocalTraining(learning_rate=0.1, epochs=3),
}
MAY_WAIT = torch_dual.Dual.may_wait
SIZES = {"ragged": (5, 0, 13, 1, 8, 8, 30, 2, 21), "even": (8, 8, 8, 8), "falling": (9, 7, 7, 4, 0)}


def table(size, seed=0):
    drawn = np.random.default_rng([size, seed])
    return Dataset(drawn.standard_normal((size, 6)).astype(np.float32), drawn.integers(0, 3, size))


@pytest.fixture(autouse=True)
def every_layer_counts_as_long(monkeypatch):
    monkeypatch.setattr(torch_dual.Dual, "may_wait", True)
    monkeypatch.setattr(torch_dual.Dual, "pays", staticmethod(lambda *_: True))


@pytest.fixture
def made(monkeypatch):
    """The rows that came as products."""
    found, begin = [], Unwritten.__init__
    monkeypatch.setattr(Unwritten, "__init__", lambda self, *rest: (found.append(self), begin(self, *rest))[1])
    return found


def changes(model, local, sizes, **options):
    learner = TorchLearner(MODELS[model], batched=True)
    params = np.broadcast_to(start := learner.initial(Key.of(0)), (len(sizes), len(start)))
    datasets, keys = [table(size, i) for i, size in enumerate(sizes)], [Key.of(i) for i in range(len(sizes))]
    return learner.fit(params, datasets, local, Correction(), keys, change=True, **options).params


def relative(found, expected):
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("model", MODELS)
def test_rows_are_the_same_bits_for_whoever_looks(model, steps, sizes):
    rows = changes(model, STEPS[steps], SIZES[sizes])
    left = changes(model, STEPS[steps], SIZES[sizes], unwritten=True)
    assert isinstance(left, Unwritten)
    assert left.products
    assert left.shape == rows.shape
    assert left.astype(np.float32, copy=False) is left
    np.testing.assert_array_equal(np.asarray(left), rows)
    assert not left.products
    np.testing.assert_array_equal(left[[2, 0]], rows[[2, 0]])
    np.testing.assert_array_equal(left.astype(np.float64), rows)


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("model", MODELS)
@given(
    sizes=st.lists(st.integers(0, 9), min_size=2, max_size=9).filter(lambda sizes: sum(map(bool, sizes)) > 1),
    weighs=st.data(),
)
def test_sums_are_those_of_the_rows_but_for_rounding(model, steps, sizes, weighs):
    weight = st.one_of(st.just(1.0), st.floats(1e-3, 1e3))
    weights = np.array(weighs.draw(st.lists(weight, min_size=len(sizes), max_size=len(sizes))))
    clients = tuple(map(str, range(len(sizes))))
    cuts = [0, weighs.draw(st.integers(0, len(sizes))), len(sizes)]
    left = changes(model, STEPS[steps], sizes, unwritten=True)
    assert isinstance(left, Unwritten)
    found = fold(Updates(clients, left, weights), cuts)
    assert left.products, "it was written to be added up"
    expected = fold(Updates(clients, np.array(left), weights), cuts)
    assert relative(found.values, expected.values) < 2e-6
    assert found.weights == expected.weights
    written = fold(Updates(clients, left, weights), cuts)
    np.testing.assert_array_equal(written.values, expected.values)


@pytest.mark.parametrize(("num_rows", "num_inputs", "may_wait"), [(128, 128, True), (129, 128, False), (1, 127, False)])
def test_examples_are_held_where_they_are_no_more_than_twice_the_rows_that_they_spare(num_rows, num_inputs, may_wait):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_dual.Dual, "may_wait", MAY_WAIT)
        dual = torch_dual.Dual(torch.zeros(2, num_rows, num_inputs), 1, False, [torch.zeros(2, 64, num_inputs)], 0.1)
        assert dual.may_wait is may_wait


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("steps", STEPS)
def test_each_of_several_chunks_keeps_its_own_examples(monkeypatch, steps, sizes):
    rows = changes("hidden", STEPS[steps], SIZES[sizes])
    monkeypatch.setattr(torch_batched, "_CHUNK_BYTES", {"cpu": 1})
    monkeypatch.setattr(torch_batched, "_FEWEST", 2)
    left = changes("hidden", STEPS[steps], SIZES[sizes], unwritten=True)
    assert len(left.products) > 1
    weights = np.arange(1.0, 1 + len(rows))
    found = fold(Updates(("",) * len(rows), left, weights))
    assert relative(found.values, fold(Updates(("",) * len(rows), rows, weights)).values) < 2e-6
    np.testing.assert_allclose(np.asarray(left), rows, atol=2e-6)


def test_many_rows_are_added_in_several_products(monkeypatch):
    once = fold(Updates(("",) * 9, changes("hidden", STEPS["epochs"], SIZES["ragged"], unwritten=True), np.ones(9)))
    monkeypatch.setattr(torch_dual, "_SUMMED", 70)
    left = changes("hidden", STEPS["epochs"], SIZES["ragged"], unwritten=True)
    several = fold(Updates(("",) * 9, left, np.ones(9)))
    assert 0 < relative(several.values, once.values) < 1e-6


def test_large_products_go_by_a_convolution_and_small_ones_need_not(monkeypatch):
    small = np.asarray(fold(Updates(("",) * 4, changes("hidden", STEPS["epochs"], SIZES["even"]), np.ones(4))).values)
    monkeypatch.setattr(torch_dual, "_CONVOLVED", 0)
    left = changes("hidden", STEPS["epochs"], SIZES["even"], unwritten=True)
    assert relative(fold(Updates(("",) * 4, left, np.ones(4))).values, small) < 1e-5
    assert relative(np.asarray(left).sum(0), small) < 1e-5


def test_the_columns_of_no_product():
    class Two:
        columns = (slice(4, 9), slice(2, 4))

    assert other_columns([Two(), Two()], 12) == [slice(0, 2), slice(9, 12)]
    assert other_columns([Two()], 9) == [slice(0, 2)]
    assert other_columns([], 3) == [slice(0, 3)]


# ------------------------------------------------------------------------------------------------------- whole rounds

PEOPLE = Population({f"c{i}": table(size, i) for i, size in enumerate((5, 13, 1, 8, 8, 30, 2, 21, 4, 6, 7, 9))})
PLAIN = {"client_learning_rate": 0.1, "batch_size": 4}


def federation(**options):
    own = {"learner": TorchLearner(MODELS["hidden"], batched=True), "algorithm": FedAvg(**PLAIN)}
    return Federation(**own | options)


def run(own, **options):
    return simulate(own, PEOPLE, **{"num_rounds": 3, "seed": 1, "runtime": InProcess()} | options)


class Looking(FedAvg):
    """An algorithm of a user's, who looks at what clients send."""

    def client_update(self, received, fit, memory):
        values = fit.change(received["params"])
        assert type(values) is np.ndarray
        return fit.updates(values), {}


class Folding(Mean):
    """An aggregator of a user's, who adds rows up otherwise."""

    def fold(self, updates, cuts=None):
        assert type(updates.values) is np.ndarray
        return super().fold(updates, cuts)


@pytest.mark.parametrize(
    "seen",
    [
        {"algorithm": Looking(**PLAIN)},
        {"aggregator": Folding()},
        {"aggregator": support.Unsummed()},
        {"transforms": (Clip(norm=100.0),)},
        {"algorithm": SignFlip(FedAvg(**PLAIN), clients=())},
    ],
    ids=["algorithm", "fold", "rows", "transform", "attack"],
)
def test_whoever_looks_at_rows_is_given_rows_and_a_run_is_the_same(made, seen):
    left = run(federation())
    assert made
    made.clear()
    rows = run(federation(**seen))
    assert not made
    assert relative(left.parameters, rows.parameters) < 1e-5
    assert [row.num_clients for row in left.history] == [row.num_clients for row in rows.history]
    assert left.info["bodies"] == rows.info["bodies"]


def test_the_number_of_workers_changes_no_bit():
    one, two, three = (run(federation(), runtime=Processes(num_workers=n)) for n in (1, 2, 3))
    assert one.parameters.tobytes() == two.parameters.tobytes() == three.parameters.tobytes()
    assert relative(one.parameters, run(federation()).parameters) < 1e-5


def test_who_has_no_finite_update_is_refused_alone(made):
    wild = {**{client: PEOPLE.load(client)[0] for client in PEOPLE.ids}, "wild": table(8)}
    wild["wild"] = Dataset(wild["wild"].x * np.float32(1e30), wild["wild"].y)
    result = simulate(federation(), Population(wild), num_rounds=1, runtime=InProcess())
    assert made
    assert [(entry["client"], entry["reason"]) for entry in result.info["refused"]] == [
        ("wild", "update is not finite")
    ]
    assert result.history[0].num_clients == len(PEOPLE.ids)
    assert np.isfinite(result.parameters).all()
