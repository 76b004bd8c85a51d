import dataclasses

import numpy as np
import pytest

import support
from hansa.aggregators.mean import Mean
from hansa.aggregators.median import Median
from hansa.aggregators.rows import Rows
from hansa.aggregators.secure_mean import SecureMean
from hansa.algorithms.fedavg import FedAvg
from hansa.algorithms.fedprox import FedProx
from hansa.algorithms.scaffold import SCAFFOLD
from hansa.core.chain import Raw
from hansa.core.errors import InputError
from hansa.core.key import Key
from hansa.core.protocols import Memory, Slot
from hansa.data.dataset import Dataset
from hansa.data.prepare import Standardize
from hansa.federation import Idle, array_hash, named_totals, totals_of
from hansa.learners.linear import LinearLearner
from hansa.transforms.clip import Clip
from hansa.transforms.noise import GaussianNoise
from hansa.transforms.quantize import Quantize
from hansa.wire import Nonzeros
from hansa.work import Work
from support_masked_sum import MaskedSum

NOISE = (Clip(norm=1.0), GaussianNoise(noise_multiplier=1.0))


def test_a_lone_transform_is_refused_with_the_tuple_to_write():
    with pytest.raises(InputError, match=r"Federation\(transforms=\): expected a tuple.*write transforms=\(Clip"):
        support.linear(transforms=Clip(norm=1.0))
    with pytest.raises(InputError, match=r"Federation\(prepare=\): expected a tuple"):
        support.linear(prepare=Standardize())


@pytest.mark.parametrize(
    "options", [{"algorithm": FedAvg}, {"aggregator": Median}, {"transforms": (Quantize,)}, {"prepare": (Standardize,)}]
)
def test_a_class_instead_of_a_value_is_refused_with_what_to_write(options):
    with pytest.raises(InputError, match=r"Federation: expected values, found the class (\w+); write \1\(...\)"):
        support.linear(**options)


@pytest.mark.parametrize("wrong", [None, "FedAvg", object()])
def test_an_algorithm_without_its_methods_is_refused(wrong):
    with pytest.raises(InputError, match=r"expected a value with init\(\)"):
        support.linear(algorithm=wrong)


def test_one_federation_can_be_changed_into_another():
    private = dataclasses.replace(support.linear(), transforms=NOISE, aggregator=Mean(weighting="clients"))
    assert private.is_private
    assert private.learner is not None


@pytest.mark.parametrize(
    ("options", "private", "losses"),
    [
        ({}, False, True),
        ({"aggregator": Median()}, False, True),
        ({"transforms": NOISE}, True, False),
        ({"aggregator": MaskedSum()}, True, True),
        ({"aggregator": SecureMean()}, True, True),
        ({"aggregator": SecureMean(), "transforms": NOISE}, True, False),
    ],
)
def test_noise_and_secrecy_make_it_private_and_losses_travel_beside_secrecy_alone(options, private, losses):
    federation = support.linear(**options)
    assert federation.is_private is private
    assert federation.task("train").train_loss is losses
    assert federation.sends_metrics is losses


def test_where_the_server_sees_rows_it_takes_metrics_as_rows_else_through_the_federations_own_sum():
    assert support.linear().task("evaluate").aggregator == Rows()
    assert support.linear(aggregator=Median()).task("evaluate").aggregator == Rows()
    assert support.linear(aggregator=MaskedSum()).task("evaluate").aggregator == MaskedSum()
    federation = support.linear(prepare=(Standardize(),), aggregator=Median())
    assert federation.task("prepare", 0).aggregator == Mean()
    assert dataclasses.replace(federation, aggregator=MaskedSum()).task("prepare", 0).aggregator == MaskedSum()


def test_the_list_of_tasks_is_closed():
    with pytest.raises(InputError, match="task: expected one of"):
        support.linear().task("delete everything")
    with pytest.raises(InputError, match="expected preparation 0 to -1, found 0"):
        support.linear().parts(Slot(0, 0, "update", "prepare"))


def test_sums_are_not_transformed_and_have_their_own_codec():
    federation = support.linear(transforms=(Quantize(bits=8),), prepare=(Standardize(),))
    assert type(federation.codec(Slot(0, 0, "update"))).__name__ == "Levels"
    for task in ("evaluate", "prepare"):
        assert isinstance(federation.codec(Slot(0, 0, "update", task)), Nonzeros)
        assert federation.parts(Slot(0, 0, "update", task)).transforms == ()
    assert support.linear().codec(Slot(0, 0, "update")) == Raw()


@pytest.mark.parametrize(("algorithm", "size"), [(FedAvg, 4), (SCAFFOLD, 8)])
def test_the_length_of_an_update_is_found_without_data(algorithm, size):
    federation = support.linear(algorithm=algorithm(client_learning_rate=0.1))
    assert federation.update_size() == size
    assert federation.size_of(Slot(0, 0, "update")) == size
    assert federation.size_of(Slot(0, 0, "update", "evaluate")) == federation.learner.metrics.size
    assert federation.size_of(Slot(0, 0, "update", "prepare")) is None


def test_a_length_that_only_real_data_can_tell_is_not_guessed():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Reader(FedAvg):
        def client_update(self, received, fit, memory):
            return fit.updates(np.stack([d.x[0] for d in fit.datasets])), {}

    assert support.linear(algorithm=Reader(client_learning_rate=0.1)).update_size() is None


@pytest.mark.parametrize(
    ("algorithm", "asked"),
    [
        (FedAvg(client_learning_rate=0.1), set()),
        (FedProx(client_learning_rate=0.1, strength=0.1), {"strength"}),
        (FedProx(client_learning_rate=0.1, strength=0.0), set()),
        (SCAFFOLD(client_learning_rate=0.1), {"linear"}),
    ],
)
def test_what_an_algorithm_asks_of_a_learner_is_found_without_one(algorithm, asked):
    idle = Idle(algorithm)
    algorithm.client_update(algorithm.broadcast(algorithm.init(np.zeros(3, np.float32))), idle, Memory([{}]))
    assert idle.asked == asked


# ---------------------------------------------------------------------------------------------------- preparations


def test_totals_are_named_as_the_preparations_sums():
    rows = Dataset(np.array([[1.0, 2], [3, 4]]))
    sums = Standardize(min_rows=1).sums(rows)
    flat = np.concatenate([sums[name] for name in sorted(sums)])
    named = named_totals(Standardize(min_rows=1), rows, flat)
    assert {name: value.tolist() for name, value in named.items()} == {n: v.tolist() for n, v in sums.items()}


def test_data_of_another_width_than_the_totals_are_refused():
    with pytest.raises(InputError, match="Standardize: expected data of 6 pooled sums, found data of 9"):
        support.linear(prepare=(Standardize(),)).prepared(Dataset(np.zeros((2, 3))), [np.zeros(6)])


def test_preparations_apply_in_order_and_as_far_as_totals_are_known():
    federation = support.linear(prepare=(Standardize(), Standardize()))
    rows = Dataset(np.array([[1.0], [3.0]]))
    assert federation.prepared(rows, []) is rows
    once = federation.prepared(rows, [np.array([2.0, 4.0, 10.0])])  # count, sum, sum of squares: mean 2, deviation 1
    assert once.x.tolist() == [[-1], [1]]


def test_totals_come_out_of_a_broadcast_in_order():
    broadcast = {"params": 0, **{f"prepare.{i}": i for i in range(12)}}
    assert totals_of(broadcast) == list(range(12))


def test_a_hash_is_of_an_arrays_bytes():
    assert array_hash(np.arange(3.0)) == array_hash(np.arange(6.0)[::2] / 2)
    assert array_hash(np.arange(3.0)) != array_hash(np.arange(1.0, 4.0))


# ------------------------------------------------------------------------------------------------------------ work


def work(**options):
    rows = [Dataset([[1.0, 0, 2]], [0]), Dataset([[3.0, 4, 0]] * 3, [0] * 3)]
    algorithm = FedAvg(client_learning_rate=0.5, local_steps=2)
    keys = [Key.of(0).child(c) for c in "ab"]
    return Work(support.QuadraticLearner(), algorithm, ("a", "b"), rows, rows, None, 0, keys, **options)


def test_work_trains_a_block_from_one_vector_or_from_rows():
    fit = work()
    local = fit(np.zeros(3, np.float32))
    assert local.tolist() == [[0.75, 0, 1.5], [2.25, 3, 0]]
    assert fit(np.array([[1.0, 0, 2], [3, 4, 0]])).tolist() == [[1, 0, 2], [3, 4, 0]]
    assert (fit.num_steps.tolist(), fit.num_examples.tolist()) == ([2, 2], [1, 3])


def test_work_takes_other_steps_and_corrections():
    fit = work()
    assert fit(np.zeros(3), steps=1).tolist() == [[0.5, 0, 1], [1.5, 2, 0]]
    assert fit(np.zeros(3), steps=1, linear=np.ones(3)).tolist() == [[0, -0.5, 0.5], [1, 1.5, -0.5]]


def test_gradients_and_losses_are_read_off_without_disturbing_the_last_fit():
    fit = work()
    fit(np.zeros(3, np.float32))
    before = fit.train_loss.tolist()
    assert fit.gradient(np.zeros(3, np.float32)).tolist() == [[-1, 0, -2], [-3, -4, 0]]
    assert fit.loss(np.zeros(3)).tolist() == [2.5, 12.5]
    assert fit.train_loss.tolist() == before
    assert fit.num_steps.tolist() == [2, 2]


def test_steps_before_any_fit_are_refused_and_a_loss_is_not_known():
    assert work().train_loss is None
    with pytest.raises(InputError, match=r"fit\.num_steps: expected a call of fit\(params\) before it"):
        _ = work().num_steps


def test_each_fit_of_a_round_draws_anew():
    rows = [Dataset(np.random.default_rng(0).normal(size=(9, 3)), np.arange(9.0))]
    learner, algorithm = LinearLearner(num_features=3), FedAvg(client_learning_rate=0.01, batch_size=2)
    fit = Work(learner, algorithm, ("a",), rows, (), None, 0, [Key.of(0)])
    first, second = fit(np.zeros(4, np.float32)), fit(np.zeros(4, np.float32))
    assert (first != second).any()
    again = Work(learner, algorithm, ("a",), rows, (), None, 0, [Key.of(0)])
    assert (again(np.zeros(4, np.float32)) == first).all()
