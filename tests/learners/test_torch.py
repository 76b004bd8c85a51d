"""``TorchLearner``: its vector, its plain loop against ``torch.optim``, its losses, and what it refuses."""

import pickle
import subprocess
import sys
from unittest import mock

import numpy as np
import pytest
import torch
from torch import nn

from hansa import long_vectors
from hansa.core.errors import InputError
from hansa.core.key import Key
from hansa.data.dataset import Dataset
from hansa.learners.batches import batches
from hansa.learners.torch import TorchLearner
from hansa.local_training import SGD, Adam, Correction, LocalTraining
from hansa.metrics import Metric


def build_mlp():
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def build_normed():
    return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3))


def data(size, seed=0, num_classes=3):
    generator = np.random.default_rng(seed)
    x = generator.standard_normal((size, 4)).astype(np.float32)
    return Dataset(x, generator.integers(0, num_classes, size))


def fit(learner, params, datasets, local, correction=None, seed=7):
    keys = [Key.of(seed).child(i) for i in range(len(datasets))]
    block = np.broadcast_to(params, (len(datasets), len(params)))
    return learner.fit(block, datasets, local, correction or Correction(), keys)


def by_torch_optim(learner, params, dataset, local, optimizer, seed=7):
    """The same steps with a hand-written PyTorch loop."""
    model = learner.model(params).train()
    stepper = optimizer(model.parameters())
    x, y = torch.from_numpy(dataset.x), torch.from_numpy(dataset.y)
    for rows, real in batches([Key.of(seed).child(0)], np.array([len(dataset)]), local):
        index = torch.from_numpy(rows[0][real[0]])
        stepper.zero_grad()
        nn.functional.cross_entropy(model(x[index]), y[index]).backward()
        stepper.step()
    return model


OPTIMIZERS = {
    "plain": (SGD(), lambda p: torch.optim.SGD(p, lr=0.1)),
    "momentum": (SGD(momentum=0.9, weight_decay=0.01), lambda p: torch.optim.SGD(p, 0.1, 0.9, weight_decay=0.01)),
    "nesterov": (SGD(momentum=0.9, nesterov=True), lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True)),
    "adam": (Adam(weight_decay=0.01), lambda p: torch.optim.Adam(p, lr=0.1, weight_decay=0.01)),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_loop_takes_the_steps_of_torch_optim(name):
    ours, theirs = OPTIMIZERS[name]
    learner, dataset = TorchLearner(build_mlp), data(23)
    local = LocalTraining(learning_rate=0.1, optimizer=ours, epochs=3, batch_size=5)
    params = learner.initial(Key.of(1))
    fitted = fit(learner, params, [dataset], local)
    model = by_torch_optim(learner, params, dataset, local, theirs)
    np.testing.assert_allclose(
        fitted.params[0], nn.utils.parameters_to_vector(model.parameters()).detach().numpy(), atol=1e-6
    )
    assert fitted.num_steps.tolist() == [15]
    assert fitted.num_examples.tolist() == [23]


def test_batch_norm_is_trained_as_pytorch_does_and_its_statistics_are_in_the_vector():
    learner, dataset = TorchLearner(build_normed), data(20)
    local = LocalTraining(learning_rate=0.1, epochs=2, batch_size=5)
    params = learner.initial(Key.of(1))
    fitted = fit(learner, params, [dataset], local)
    model = by_torch_optim(learner, params, dataset, local, lambda p: torch.optim.SGD(p, lr=0.1))
    expected = learner.layout.flatten({n: model.state_dict()[n].numpy() for n in learner.layout.names})
    np.testing.assert_allclose(fitted.params[0], expected, atol=1e-6)
    is_buffer = learner.layout.mask("buffer")
    assert (fitted.params[0] != params)[is_buffer].all()


def test_a_batch_of_one_example_uses_the_running_statistics_of_batch_norm():
    learner, dataset = TorchLearner(build_normed), data(1)
    params = learner.initial(Key.of(1))
    fitted = fit(learner, params, [dataset], LocalTraining(learning_rate=0.1, batch_size=5))
    model = learner.model(params).eval()
    loss = nn.functional.cross_entropy(model(torch.from_numpy(dataset.x)), torch.from_numpy(dataset.y))
    gradient = torch.autograd.grad(loss, list(model.parameters()))
    is_buffer = learner.layout.mask("buffer")
    moved = (params - fitted.params[0])[~is_buffer] / 0.1
    np.testing.assert_allclose(moved, torch.cat([g.reshape(-1) for g in gradient]).numpy(), atol=1e-5)
    np.testing.assert_array_equal(fitted.params[0][is_buffer], params[is_buffer])
    assert fitted.num_steps.tolist() == [1]


def test_training_goes_on_with_batch_statistics_after_a_batch_of_one():
    learner, local = TorchLearner(build_normed), LocalTraining(learning_rate=0.1, epochs=2, batch_size=5)
    params = learner.initial(Key.of(1))
    fit(learner, params, [data(6)], local)
    once = fit(learner, params, [data(20)], local)
    again = fit(TorchLearner(build_normed), params, [data(20)], local)
    np.testing.assert_array_equal(once.params, again.params)


def test_the_layout_follows_the_state_dict_and_marks_buffers():
    layout = TorchLearner(build_normed).layout
    assert layout.names == (
        *("0.weight", "0.bias", "1.weight", "1.bias", "1.running_mean", "1.running_var"),
        *("3.weight", "3.bias"),
    )
    assert layout.roles == (*["parameter"] * 4, "buffer", "buffer", "parameter", "parameter")
    assert set(layout.dtypes) == {"float32"}


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(6, 3)
        self.inner = nn.Linear(3, 3)
        self.inner.bias.requires_grad_(False)
        self.out = nn.Linear(3, 6, bias=False)
        self.out.weight = self.tokens.weight
        self.register_buffer("scale", torch.ones(1), persistent=False)
        self.register_buffer("count", torch.zeros(1, dtype=torch.int64))

    def forward(self, x):
        self.count += 1
        return self.out(self.inner(self.tokens(x)) * self.scale)


def tokens(size, seed=0):
    generator = np.random.default_rng(seed)
    x = generator.integers(0, 6, (size, 7))
    return Dataset(x, np.roll(x, -1, axis=1))


def test_tied_parameters_appear_once_and_what_is_not_learned_stays_outside():
    learner = TorchLearner(Tied)
    assert learner.layout.names == ("tokens.weight", "inner.weight")
    params = learner.initial(Key.of(0))
    fitted = fit(learner, params, [tokens(8)], LocalTraining(learning_rate=0.1, batch_size=4))
    model = learner.model(fitted.params[0])
    assert model.out.weight is model.tokens.weight
    assert model.count.item() == 0


def test_frozen_parameters_are_equal_for_every_key_and_have_a_hash():
    learner = TorchLearner(Tied)
    one, two = (learner.model(learner.initial(Key.of(i))) for i in range(2))
    torch.testing.assert_close(one.inner.bias, two.inner.bias, rtol=0, atol=0)
    assert not torch.equal(one.inner.weight, two.inner.weight)
    assert learner.frozen_hash == TorchLearner(Tied).frozen_hash
    assert len(learner.frozen_hash) == 64
    assert TorchLearner(build_mlp).frozen_hash is None


def test_a_sequence_model_averages_over_its_labels_and_leaves_padding_out():
    learner, dataset = TorchLearner(Tied), tokens(4)
    dataset.y[0, 2:] = -100
    params = learner.initial(Key.of(0))
    learner.check(dataset, "berlin")
    scores = torch.from_numpy(learner.scores(params, dataset.x))
    expected = nn.functional.cross_entropy(scores.flatten(0, 1), torch.from_numpy(dataset.y).flatten())
    total = learner.evaluate(params[None], [dataset])[0]
    assert learner.metrics.finish(total)["loss"] == pytest.approx(expected.item(), rel=1e-5)
    fitted = fit(learner, params, [dataset], LocalTraining(learning_rate=0.1))
    assert fitted.loss[0] == pytest.approx(expected.item(), rel=1e-5)


def test_equal_keys_give_equal_parameters_and_pytorchs_generator_is_left_alone():
    learner = TorchLearner(lambda: nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 3)))
    before = torch.get_rng_state()
    first = learner.initial(Key.of(3))
    np.testing.assert_array_equal(first, learner.initial(Key.of(3)))
    assert not np.array_equal(first, learner.initial(Key.of(4)))
    local = LocalTraining(learning_rate=0.1, batch_size=4)
    one, two = (fit(learner, first, [data(9)], local).params for _ in range(2))
    np.testing.assert_array_equal(one, two)
    assert not np.array_equal(one, fit(learner, first, [data(9)], local, seed=8).params)
    learner.evaluate(one, [data(9)])
    assert torch.equal(before, torch.get_rng_state())


def test_an_empty_client_keeps_its_parameters_and_given_parameters_are_not_modified():
    learner = TorchLearner(build_mlp)
    params = np.stack([learner.initial(Key.of(i)) for i in range(2)])
    kept = params.copy()
    keys = [Key.of(i) for i in range(2)]
    local = LocalTraining(learning_rate=0.1, batch_size=4)
    fitted = learner.fit(params, [data(0), data(1)], local, Correction(), keys)
    np.testing.assert_array_equal(params, kept)
    np.testing.assert_array_equal(fitted.params[0], kept[0])
    assert (fitted.params[1] != kept[1]).any()
    assert fitted.num_steps.tolist() == [0, 1]
    assert np.isnan(fitted.loss[0])
    assert fitted.params.dtype == np.float32


def test_the_corrected_gradient_is_linear_plus_strength_times_the_way_from_the_anchor():
    learner, dataset = TorchLearner(build_mlp), data(10)
    params = learner.initial(Key.of(0))
    num = len(params)
    local = LocalTraining(learning_rate=0.5, epochs=None, steps=1)
    plain = fit(learner, params, [dataset], local).params[0]
    linear, anchor = np.linspace(-1, 1, num), np.zeros(num, np.float32)
    trainable = np.arange(num) % 2 == 0
    terms = Correction(linear=linear, strength=0.3, anchor=anchor, trainable=trainable)
    corrected = fit(learner, params, [dataset], local, terms).params[0]
    expected = np.where(trainable, plain - 0.5 * (linear + 0.3 * params), params)
    np.testing.assert_allclose(corrected, expected, atol=1e-6)
    np.testing.assert_array_equal(corrected[~trainable], params[~trainable])


def test_an_anchor_left_out_is_what_the_client_received():
    learner, local = TorchLearner(build_mlp), LocalTraining(learning_rate=0.1, epochs=2, batch_size=4)
    params = learner.initial(Key.of(0))
    named = fit(learner, params, [data(9)], local, Correction(strength=0.5, anchor=params))
    silent = fit(learner, params, [data(9)], local, Correction(strength=0.5))
    np.testing.assert_array_equal(named.params, silent.params)


def test_buffers_take_no_correction():
    learner, local = TorchLearner(build_normed), LocalTraining(learning_rate=0.1, epochs=None, steps=1)
    params = learner.initial(Key.of(0))
    plain = fit(learner, params, [data(9)], local).params[0]
    corrected = fit(learner, params, [data(9)], local, Correction(linear=np.ones_like(params))).params[0]
    is_buffer = learner.layout.mask("buffer")
    np.testing.assert_array_equal(plain[is_buffer], corrected[is_buffer])
    np.testing.assert_allclose(plain[~is_buffer] - 0.1, corrected[~is_buffer], atol=1e-6)


def test_examples_of_weight_zero_do_not_matter_and_a_batch_of_them_takes_no_gradient():
    learner, dataset = TorchLearner(build_mlp), data(6)
    params = learner.initial(Key.of(0))
    local = LocalTraining(learning_rate=0.1)
    weights = np.array([1, 2, 0, 0, 1, 1.0])
    weighted = fit(learner, params, [dataset.replace(weights=weights)], local)
    repeated = fit(learner, params, [dataset.take([0, 1, 1, 4, 5])], local)
    np.testing.assert_allclose(weighted.params, repeated.params, atol=1e-6)
    assert weighted.loss[0] == pytest.approx(repeated.loss[0], rel=1e-5)
    nothing = fit(learner, params, [dataset.replace(weights=np.zeros(6))], local)
    np.testing.assert_array_equal(nothing.params[0], params)
    assert nothing.num_steps.tolist() == [1]
    assert np.isnan(nothing.loss[0])


def distill(model, x, y, teacher=None):
    loss = nn.functional.cross_entropy(model(x), y)
    if teacher is not None:
        loss = loss + nn.functional.mse_loss(model(x), teacher(x))
    return loss


def test_a_loss_of_ones_own_sees_the_models_that_the_algorithm_names():
    learner, dataset = TorchLearner(build_mlp, loss=distill, num_classes=3), data(6)
    params, other = learner.initial(Key.of(0)), learner.initial(Key.of(1))
    local = LocalTraining(learning_rate=0.1, epochs=None, steps=1)
    fitted = fit(learner, params, [dataset], local, Correction(models={"teacher": other})).params[0]
    model, teacher = learner.model(params), learner.model(other)
    loss = distill(model, torch.from_numpy(dataset.x), torch.from_numpy(dataset.y), teacher)
    gradient = torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, list(model.parameters()))])
    np.testing.assert_allclose(fitted, params - 0.1 * gradient.numpy(), atol=1e-6)
    assert not np.allclose(fitted, fit(learner, params, [dataset], local).params[0], atol=1e-4)


@pytest.mark.parametrize(
    ("learner", "models", "words"),
    [
        (TorchLearner(build_mlp, loss=distill), "global", "global_model"),
        (TorchLearner(build_mlp, loss=distill), "student", "refuses"),
        (TorchLearner(build_mlp), "teacher", "loss of your own"),
    ],
)
def test_models_that_the_loss_cannot_take_are_refused_at_once(learner, models, words):
    params = np.zeros(learner.layout.num_params, np.float32)
    with pytest.raises(InputError, match=words):
        fit(learner, params, [data(0)], LocalTraining(learning_rate=0.1), Correction(models={models: params}))


def test_a_loss_of_ones_own_refuses_weights_and_anything_but_one_number():
    local, weighted = LocalTraining(learning_rate=0.1), data(3).replace(weights=np.ones(3))
    learner = TorchLearner(build_mlp, loss=distill)
    with pytest.raises(InputError, match="cannot weigh examples"):
        fit(learner, learner.initial(Key.of(0)), [weighted], local)
    learner = TorchLearner(build_mlp, loss=lambda model, x, y: model(x).sum(1))
    with pytest.raises(InputError, match="one number"):
        fit(learner, learner.initial(Key.of(0)), [data(3)], local)


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(2, 3), nn.Linear(3, 3)

    def forward(self, a, b):
        return self.left(a) + self.right(b)


def test_a_dict_of_arrays_reaches_the_model_by_name():
    generator = np.random.default_rng(0)
    x = {"b": generator.standard_normal((8, 3)), "a": generator.standard_normal((8, 2))}
    dataset, learner = Dataset(x, generator.integers(0, 3, 8)), TorchLearner(Named)
    learner.check(dataset, "berlin")
    params = learner.initial(Key.of(0))
    fitted = fit(learner, params, [dataset], LocalTraining(learning_rate=0.1, epochs=20, batch_size=4))
    before, after = (
        learner.metrics.finish(learner.evaluate(p[None], [dataset])[0]) for p in (params, fitted.params[0])
    )
    assert after["loss"] < before["loss"]
    assert learner.scores(params, x).shape == (8, 3)


def test_evaluation_is_the_same_however_clients_are_put_together():
    learner = TorchLearner(build_mlp, metrics=("accuracy", "auc"))
    params, datasets = learner.initial(Key.of(0)), [data(n, n) for n in (5, 0, 1, 9)]
    together = learner.evaluate(np.broadcast_to(params, (4, len(params))), datasets)
    apart = np.concatenate([learner.evaluate(params[None], [d]) for d in datasets])
    np.testing.assert_allclose(together, learner.evaluate(np.stack([params] * 4), datasets), atol=1e-5)
    np.testing.assert_allclose(together, apart, atol=1e-5)
    assert not together[1].any()
    scores = torch.from_numpy(learner.scores(params, datasets[3].x))
    expected = nn.functional.cross_entropy(scores, torch.from_numpy(datasets[3].y)).item()
    assert learner.metrics.finish(together[3])["loss"] == pytest.approx(expected, rel=1e-5)


def test_predictions_follow_the_scores():
    learner, x = TorchLearner(build_mlp), data(5).x
    params = learner.initial(Key.of(0))
    scores = learner.scores(params, x)
    np.testing.assert_array_equal(learner.predict(params, x), scores.argmax(1))
    np.testing.assert_allclose(learner.predict_proba(params, x).sum(1), 1, atol=1e-6)
    np.testing.assert_allclose(learner.model(params)(torch.from_numpy(x)).detach().numpy(), scores, atol=1e-6)


def test_one_logit_is_two_classes():
    learner = TorchLearner(lambda: nn.Linear(4, 1), loss="binary_cross_entropy", metrics=("accuracy", "auc"))
    dataset = data(40, num_classes=2)
    learner.check(dataset, "berlin")
    fitted = fit(learner, learner.initial(Key.of(0)), [dataset], LocalTraining(learning_rate=0.5, epochs=50)).params
    finished = learner.metrics.finish(learner.evaluate(fitted, [dataset])[0])
    logits = learner.scores(fitted[0], dataset.x)
    assert logits.shape == (40,)
    expected = nn.functional.binary_cross_entropy_with_logits(
        torch.from_numpy(logits), torch.from_numpy(dataset.y).float()
    )
    assert finished["loss"] == pytest.approx(expected.item(), rel=1e-5)
    assert finished["accuracy"] == ((logits > 0) == dataset.y).mean()
    assert learner.predict_proba(fitted[0], dataset.x).shape == (40, 2)


def test_values_are_fitted_without_broadcasting_a_column_against_a_row():
    generator = np.random.default_rng(0)
    x = generator.standard_normal((50, 4))
    dataset = Dataset(x, x @ [1, -2, 0.5, 3] + 1)
    learner = TorchLearner(lambda: nn.Linear(4, 1), loss="mse")
    learner.check(dataset, "berlin")
    fitted = fit(learner, learner.initial(Key.of(0)), [dataset], LocalTraining(learning_rate=0.1, epochs=300)).params
    assert learner.metrics.finish(learner.evaluate(fitted, [dataset])[0])["r2"] > 0.999
    assert learner.predict(fitted[0], x).shape == (50,)
    with pytest.raises(InputError, match="predict_proba"):
        learner.predict_proba(fitted[0], x)


def test_a_model_without_labels_trains_with_a_loss_of_its_own():
    learner = TorchLearner(lambda: nn.Linear(4, 4), loss=lambda model, x, y: ((model(x) - x) ** 2).mean(), metrics=())
    dataset = Dataset(data(12).x)
    learner.check(dataset, "berlin")
    params = learner.initial(Key.of(0))
    fitted = fit(learner, params, [dataset], LocalTraining(learning_rate=0.1, epochs=5, batch_size=4))
    sums = learner.evaluate(np.stack([params, fitted.params[0]]), [dataset, dataset])
    assert learner.metrics.finish(sums[1])["loss"] < learner.metrics.finish(sums[0])["loss"]


@pytest.mark.parametrize(
    ("dataset", "words"),
    [
        (Dataset(np.zeros((2, 3)), [0, 1]), r"4 features.*found x of shape \(2, 3\)"),
        (Dataset(np.zeros((2, 4)), [0, 3]), r"labels 0\.\.2, found 0\.\.3"),
        (Dataset(np.zeros((2, 4)), [0.5, 1]), "integers 0..2"),
        (Dataset(np.full((2, 4), np.nan), [0, 1]), r"Standardize\(impute="),
        (Dataset(np.zeros((2, 4))), "expected labels y, found none"),
        (Dataset(np.zeros((2, 4)), [[0], [1]]), "one label a row"),
    ],
)
def test_data_that_do_not_fit_are_refused_with_the_clients_name(dataset, words):
    learner = TorchLearner(build_mlp)
    learner.check(data(3), "berlin")
    learner.check(data(0), "berlin")
    with pytest.raises(InputError, match=words) as refused:
        learner.check(dataset, "lyon")
    assert "'lyon'" in str(refused.value)


def test_labels_that_a_loss_cannot_take_are_refused():
    binary = TorchLearner(lambda: nn.Linear(4, 1), loss="binary_cross_entropy")
    with pytest.raises(InputError, match="0 or 1"):
        binary.check(data(50), "lyon")
    with pytest.raises(InputError, match="as many outputs"):
        TorchLearner(build_mlp, loss="mse").check(data(5), "lyon")
    with pytest.raises(InputError, match="one output"):
        TorchLearner(lambda: nn.Linear(4, 1)).check(data(5), "lyon")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"loss": "cross-entropy"}, "did you mean 'cross_entropy'"),
        ({"loss": lambda model, x: 0}, r"loss\(model, x, y\)"),
        ({"metrics": ("acuracy",)}, "did you mean 'accuracy'"),
        ({"loss": "mse", "metrics": ("accuracy",), "num_classes": None}, None),
        ({"batched": "yes"}, "batched="),
    ],
)
def test_options_are_refused_at_once_with_what_to_do(options, words):
    if words is None:
        assert TorchLearner(build_mlp, **options).num_classes == 3  # metrics of classes ask for classes
        return
    with pytest.raises(InputError, match=words):
        TorchLearner(build_mlp, **options)


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: 3, "found int"),
        (lambda: nn.Sequential(nn.LazyLinear(3)), "lazy"),
        (nn.ReLU, "found none; unfreeze"),
        (lambda: nn.Linear(4, 3, dtype=torch.complex64), "real parameters"),
    ],
)
def test_models_that_cannot_be_a_vector_are_refused(build, words):
    with pytest.raises(InputError, match=words):
        _ = TorchLearner(build).layout


def test_a_model_in_place_of_a_function_is_refused():
    with pytest.raises(InputError, match="fresh model"):
        TorchLearner(build_mlp())


def test_a_model_that_differs_from_call_to_call_is_refused():
    sizes = iter([4, 5])
    learner = TorchLearner(lambda: nn.Linear(next(sizes), 3))
    assert learner.layout.num_params == 15
    with pytest.raises(InputError, match="same model at every call"):
        learner.initial(Key.of(0))


def test_double_precision_models_are_trained_in_single():
    learner = TorchLearner(lambda: build_mlp().double())
    fitted = fit(learner, learner.initial(Key.of(0)), [data(5)], LocalTraining(learning_rate=0.1))
    assert fitted.params.dtype == np.float32
    assert learner.model(fitted.params[0])[0].weight.dtype == torch.float32


def test_read_only_arrays_and_other_types_train_without_a_warning():
    dataset = data(6)
    x = dataset.x.astype(np.float64)
    x.flags.writeable = False
    other = Dataset(x[::-1][::-1], dataset.y.astype(np.uint8))
    frozen = dataset.replace(x=np.broadcast_to(dataset.x, dataset.x.shape))
    learner, local = TorchLearner(build_mlp), LocalTraining(learning_rate=0.1, batch_size=4)
    params = learner.initial(Key.of(0))
    expected = fit(learner, params, [dataset], local).params
    np.testing.assert_array_equal(fit(learner, params, [other], local).params, expected)
    np.testing.assert_array_equal(fit(learner, params, [frozen], local).params, expected)


def test_tensors_come_back_as_tensors():
    learner = TorchLearner(build_mlp, device="cpu")
    params = torch.from_numpy(learner.initial(Key.of(0)))[None]
    fitted = learner.fit(params, [data(5)], LocalTraining(learning_rate=0.1), Correction(), [Key.of(0)])
    assert isinstance(fitted.params, torch.Tensor)
    assert not torch.equal(fitted.params, params)


def test_a_learner_travels_to_another_process_and_reads_well():
    own = Metric("miss", sums=lambda s, y: np.array([1.0]), finish=lambda v: v[0], size=1)
    learner = TorchLearner(build_mlp, metrics=("auc", own), num_classes=3)
    assert repr(learner) == "TorchLearner(build_mlp, loss='cross_entropy', metrics=('auc', 'miss'), num_classes=3)"
    plain = TorchLearner(nn.Linear, loss="mse")
    assert plain.corrections == {"linear", "strength", "anchor", "trainable", "models"}
    assert repr(pickle.loads(pickle.dumps(plain))) == "TorchLearner(Linear, loss='mse', metrics=('r2',))"


def test_importing_and_making_a_learner_does_not_import_pytorch():
    code = (
        "import sys; from hansa.learners.torch import TorchLearner; "
        "TorchLearner(dict, loss='mse'); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_without_pytorch_the_extra_is_named():
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from hansa.core.errors import InputError\n"
        "from hansa.learners.torch import TorchLearner\n"
        "try:\n    TorchLearner(dict).layout\n"
        "except InputError as error:\n    assert \"pip install 'hansa[torch]'\" in str(error)\n"
        "else:\n    raise SystemExit(1)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("build", [build_mlp, build_normed])
def test_the_parameters_of_a_large_model_are_moved_and_it_trains_as_a_small_one(build):
    small, large = TorchLearner(build, batched=False), TorchLearner(build, batched=False)
    params = small.initial(Key.of(1))
    with mock.patch.object(long_vectors, "LONG", 1):
        assert large.initial(Key.of(1)).tobytes() == params.tobytes()
    assert not any(bool(parameter.any()) for parameter in large._engine.flat.parameters)  # it has but one copy
    local = LocalTraining(learning_rate=0.1, epochs=2, batch_size=3)
    fitted = [fit(learner, params, [data(10), data(7, seed=1)], local).params for learner in (small, large)]
    assert fitted[0].tobytes() == fitted[1].tobytes()


def test_a_model_that_is_the_one_of_the_call_before_is_refused():
    model = build_mlp()
    learner = TorchLearner(lambda: model)
    with pytest.raises(InputError, match="expected a fresh model at every call"):
        learner.initial(Key.of(1))
