"""DP-SGD in both learners: what a record can change, what noise there is, which records a step takes."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from hansa.core.errors import CheckError, InputError, RunError
from hansa.core.key import Key
from hansa.data.dataset import Dataset
from hansa.learners.dp_sgd import factors, noise_multiplier_of, poisson_batches
from hansa.learners.linear import LinearLearner
from hansa.local_training import DPSGD, Correction, LocalTraining
from hansa.privacy.accountant import PoissonSampling
from hansa.privacy.events import RecordEvent, cost

KEYS = [Key.of("secret").child(name) for name in "abcdefgh"]
SILENT = 1e-6  # a noise multiplier that leaves the sums of clipped gradients to be seen


def local(noise_multiplier=1.0, *, clip=1.0, rate=1.0, steps=1, batch_size=None, divisor=None):
    optimizer = DPSGD(clipping_norm=clip, noise_multiplier=noise_multiplier, divisor=divisor)
    return LocalTraining(learning_rate=rate, optimizer=optimizer, epochs=None, steps=steps, batch_size=batch_size)


def fit(learner, datasets, training, correction=None, params=None, keys=KEYS):
    start = np.zeros(learner.layout.num_params, np.float32) if params is None else params
    block = np.tile(np.asarray(start, np.float32), (len(datasets), 1))
    return learner.fit(block, datasets, training, correction or Correction(), keys[: len(datasets)]).params


def classes(*sizes, num_classes=2, weights=False, seed=0):
    rng = np.random.default_rng(seed)
    return [
        Dataset(
            rng.normal(size=(n, 3)).astype(np.float32),
            rng.integers(0, num_classes, n),
            rng.uniform(0.5, 2, n) if weights else None,
        )
        for n in sizes
    ]


LOGISTIC = LinearLearner(num_features=3, num_classes=2)


def torch_learner(build=None, loss="cross_entropy", **options):
    pytest.importorskip("torch")
    from torch import nn

    from hansa.learners.torch import TorchLearner

    return TorchLearner(build or (lambda: nn.Linear(3, 1)), loss=loss, **options)


# ------------------------------------------------------------------------------------------------ answers by hand


def test_each_records_gradient_is_clipped_and_the_sum_is_divided_by_a_fixed_number():
    """At zero the slope is -1/2: records (0, 0, 0) and (2, 2, 0) have gradients of norm 1/2 and 3/2."""
    data = Dataset([[0.0, 0.0, 0.0], [2.0, 2.0, 0.0]], [1, 1])
    found = fit(LOGISTIC, [data], local(SILENT, clip=0.75, divisor=4.0))
    expected = np.array([0.5, 0.5, 0.0, 0.5 + 0.25]) / 4  # the second is halved
    np.testing.assert_allclose(found[0], expected, atol=1e-5)


def test_without_a_divisor_the_mean_over_the_expected_batch_is_taken():
    data = Dataset([[0.0, 0.0, 0.0], [2.0, 2.0, 0.0]], [1, 1])
    whole = fit(LOGISTIC, [data], local(SILENT, clip=9.0))
    np.testing.assert_allclose(whole[0], [0.5, 0.5, 0.0, 0.5], atol=1e-5)
    same = LocalTraining(learning_rate=1.0, epochs=None, steps=1)
    np.testing.assert_allclose(whole, fit(LOGISTIC, [data], same), atol=1e-5)


@pytest.mark.parametrize("num_classes", [None, 2, 4])
def test_gradients_below_the_clipping_norm_give_the_steps_of_sgd(num_classes):
    learner = LinearLearner(num_features=3, num_classes=num_classes, l2=0.1)
    data = classes(7, 4, num_classes=num_classes or 5)
    pull = Correction(strength=0.3)
    found = fit(learner, data, local(SILENT, clip=1e3, steps=3, rate=0.05), pull)
    plain = LocalTraining(learning_rate=0.05, epochs=None, steps=3)
    np.testing.assert_allclose(found, fit(learner, data, plain, pull), atol=2e-3)


# --------------------------------------------------------------------------------------------- what a record changes

far = st.floats(-(2.0**100), 2.0**100, width=32)
records = st.tuples(st.tuples(far, far, far), st.integers(0, 2))


@given(st.lists(records, min_size=0, max_size=5), records, st.floats(0.1, 3))
@settings(deadline=None, max_examples=60)
def test_one_record_moves_the_noisy_gradient_by_the_clipping_norm_at_most(shared, more, clip):
    """The same noise with and without a record, however large: the divisor is fixed, so the sums are left."""
    learner = LinearLearner(num_features=3, num_classes=3)
    without = Dataset(np.array([x for x, _ in shared], np.float32).reshape(-1, 3), [y for _, y in shared])
    with_one = Dataset(np.array([x for x, _ in [*shared, more]], np.float32), [y for _, y in [*shared, more]])
    training = local(1.0, clip=clip, divisor=1.0)
    start = np.linspace(-1, 1, 12).astype(np.float32)
    one, other = (fit(learner, [data], training, params=start)[0] for data in (without, with_one))
    assert np.isfinite(other).all()
    assert np.linalg.norm(other.astype(float) - one.astype(float)) <= clip * (1 + 1e-5) + 1e-5


def test_a_record_whose_gradient_is_no_number_gives_nothing():
    assert factors(np.array([0.5, 2.0, math.inf, math.nan]), 1.0).round(5).tolist() == [1.0, 0.5, 0.0, 0.0]


def test_a_client_without_records_sends_noise_as_any_other_would():
    found = fit(LOGISTIC, classes(0, 5), local(1.0, divisor=10.0))
    assert np.isfinite(found).all()
    assert (found[0] != 0).all()


# ------------------------------------------------------------------------------------------------------- the noise


@pytest.mark.parametrize("kind", ["linear", "torch"])
def test_noise_has_the_stated_deviation_over_the_divisor(kind):
    learner = LinearLearner(num_features=4999, num_classes=2)
    if kind == "torch":
        from torch import nn

        learner = torch_learner(lambda: nn.Linear(4999, 1), "binary_cross_entropy")
    nothing = Dataset(np.zeros((0, 4999), np.float32), np.zeros(0, np.int64))
    found = fit(learner, [nothing], local(2.0, clip=0.5, rate=3.0, divisor=10.0))[0]
    assert stats.kstest(found / (3.0 * 2.0 * 0.5 / 10.0), "norm").pvalue > 1e-3


def test_every_step_and_every_client_has_noise_of_its_own():
    nothing = classes(0, 0)
    one = fit(LOGISTIC, nothing, local(1.0, divisor=1.0))
    two = fit(LOGISTIC, nothing, local(1.0, divisor=1.0, steps=2))
    assert len(set(np.concatenate([one, two - one]).ravel().tolist())) == 16


def test_the_same_secret_gives_the_same_update_and_another_another():
    data, training = classes(30), local(1.0, batch_size=8, steps=3)
    assert fit(LOGISTIC, data, training).tobytes() == fit(LOGISTIC, data, training).tobytes()
    assert (fit(LOGISTIC, data, training) != fit(LOGISTIC, data, training, keys=KEYS[1:])).all()


# ----------------------------------------------------------------------------------------------- batches and blocks


def test_each_record_is_in_a_batch_by_a_coin_of_its_own():
    sizes = np.array([400, 20, 5, 0])
    counts, taken = np.zeros(400), []
    for rows, real in poisson_batches(KEYS[:4], sizes, local(batch_size=20, steps=300)):
        counts[rows[0][real[0]]] += 1
        taken.append(int(real[0].sum()))
        assert [rows[i][real[i]].tolist() for i in (1, 2, 3)] == [list(range(20)), list(range(5)), []]
    assert stats.kstest(counts, stats.binom(300, 0.05).cdf).pvalue > 1e-6
    assert abs(np.mean(taken) - 20) < 5 * math.sqrt(19 / 300)
    assert abs(np.var(taken) / 19 - 1) < 0.4  # of a binomial: batches are not of one size


@pytest.mark.parametrize("batch_size", [None, 4])
@pytest.mark.parametrize("weights", [False, True])
def test_a_block_of_clients_is_its_clients_one_by_one(batch_size, weights):
    learner = LinearLearner(num_features=3, num_classes=3)
    data = classes(9, 2, 30, num_classes=3, weights=weights)
    training = local(1.0, batch_size=batch_size, steps=3, rate=0.5)
    block = fit(learner, data, training)
    for i, one in enumerate(data):
        np.testing.assert_allclose(block[[i]], fit(learner, [one], training, keys=KEYS[i:]), rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------------------------------------------ with PyTorch


@pytest.mark.parametrize("batch_size", [None, 4])
@pytest.mark.parametrize("weights", [False, True])
def test_both_learners_take_the_same_steps(batch_size, weights):
    learner = torch_learner(loss="binary_cross_entropy")
    data = classes(9, 1, 30, 0, weights=weights)
    training, pull = local(1.0, clip=0.4, batch_size=batch_size, steps=3, rate=0.5), Correction(strength=0.2)
    ours = fit(LOGISTIC, data, training, pull)
    np.testing.assert_allclose(fit(learner, data, training, pull), ours, rtol=1e-4, atol=1e-5)


def _convolutional():
    from torch import nn

    layers = (nn.Unflatten(1, (1, 3)), nn.Conv1d(1, 4, 2), nn.GroupNorm(2, 4), nn.Tanh(), nn.Flatten())
    return nn.Sequential(*layers, nn.Linear(8, 2))


def _recurrent():
    from torch import nn

    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm, self.out = nn.LSTM(1, 4, batch_first=True), nn.Linear(4, 2)

        def forward(self, x):
            return self.out(self.lstm(x[:, :, None])[0][:, -1])

    return Recurrent()


@pytest.mark.parametrize("build", [_convolutional, _recurrent])
def test_records_mapped_at_once_give_what_they_give_one_by_one(build):
    data, training = classes(6), local(SILENT, clip=0.3)
    params = np.random.default_rng(1).normal(size=torch_learner(build).layout.num_params).astype(np.float32)
    found = []
    for can_map in (True, False):
        learner = torch_learner(build)
        learner._engine.trainer._private._can_map = can_map
        found.append(fit(learner, data, training, params=params))
    np.testing.assert_allclose(*found, rtol=1e-4, atol=1e-5)
    assert (np.abs(found[0] - params) > 1e-5).mean() > 0.5


@pytest.mark.filterwarnings("ignore")  # PyTorch's, of its own hooks that Opacus uses
def test_gradients_by_record_are_those_of_opacus():
    opacus = pytest.importorskip("opacus", reason="Opacus is in hansa[dev]")
    import torch

    learner, (data,) = torch_learner(_convolutional), classes(6)
    params = np.random.default_rng(2).normal(size=learner.layout.num_params).astype(np.float32)
    model = opacus.GradSampleModule(learner.model(params).train())
    torch.nn.functional.cross_entropy(model(torch.from_numpy(data.x)), torch.from_numpy(data.y)).backward()
    rows = torch.cat([p.grad_sample.flatten(1) for p in model.parameters()], dim=1).double().numpy()
    clipped = rows * np.minimum(1, 0.3 / np.linalg.norm(rows, axis=1))[:, None]
    found = fit(learner, [data], local(SILENT, clip=0.3, divisor=1.0), params=params)[0]
    np.testing.assert_allclose(params - found, clipped.sum(axis=0), atol=2e-5)


def test_a_loss_of_ones_own_is_clipped_by_record_too():
    import torch

    def own(model, x, y):
        return torch.nn.functional.binary_cross_entropy_with_logits(model(x)[:, 0], y.float())

    data, training = classes(8), local(1.0, clip=0.4, steps=2)
    named, called = torch_learner(loss="binary_cross_entropy"), torch_learner(loss=own)
    np.testing.assert_allclose(fit(named, data, training), fit(called, data, training), atol=1e-6)


def test_a_model_with_buffers_is_refused():
    from torch import nn

    learner = torch_learner(lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)))
    with pytest.raises(CheckError, match="expected a model without buffers"):
        fit(learner, classes(5), local())


# --------------------------------------------------------------------------------------------------- sizes of noise


def test_each_client_sizes_its_noise_for_its_own_number_of_records():
    pytest.importorskip("dp_accounting")
    optimizer = DPSGD(clipping_norm=1.0, epsilon=8.0, delta=1e-3, num_rounds=10)
    few, many = (noise_multiplier_of(optimizer, n, 16, 2) for n in (10, 64))
    assert many < few
    for z, rate in ((few, 1.0), (many, 0.25)):
        event = RecordEvent(noise_multiplier=z, num_steps=20, sampling=PoissonSampling(rate))
        assert 7.0 < cost([event], 1e-3).epsilon <= 8.0


@pytest.mark.parametrize(
    ("optimizer", "num_records", "says"),
    [
        (DPSGD(clipping_norm=1.0, epsilon=1.0, delta=1e-3), 10, "needs a schedule"),
        (DPSGD(clipping_norm=1.0, epsilon=1.0, delta=0.1, num_rounds=3), 10, "expected delta below 1"),
    ],
)
def test_noise_that_cannot_be_sized_is_refused(optimizer, num_records, says):
    with pytest.raises(CheckError, match=says):
        noise_multiplier_of(optimizer, num_records, None, 1)


def test_epochs_of_batches_are_not_steps():
    training = LocalTraining(learning_rate=0.1, optimizer=DPSGD(clipping_norm=1.0, noise_multiplier=1.0), batch_size=4)
    with pytest.raises((InputError, RunError), match="steps are counted, not epochs"):
        fit(LOGISTIC, classes(9), training)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({}, "found neither"),
        ({"epsilon": 1.0}, "found no delta"),
        ({"epsilon": 1.0, "delta": 1e-5, "noise_multiplier": 1.0}, "found both"),
        ({"noise_multiplier": 0.0}, "noise_multiplier"),
        ({"noise_multiplier": math.nan}, "noise_multiplier"),
        ({"noise_multiplier": 1.0, "delta": 1.0}, "delta"),
        ({"noise_multiplier": 1.0, "divisor": 0.0}, "divisor"),
        ({"noise_multiplier": 1.0, "clipping_norm": -1.0}, "clipping_norm"),
    ],
)
def test_options_that_cannot_be_are_refused(options, says):
    with pytest.raises(InputError, match=says):
        DPSGD(**{"clipping_norm": 1.0, **options})
