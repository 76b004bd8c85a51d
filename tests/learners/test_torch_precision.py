"""Training in bfloat16: close to float32, and refused by sentences that say what is known."""

import numpy as np
import pytest
import torch
from torch import nn

from hansa.core.errors import InputError
from hansa.core.key import Key
from hansa.data.dataset import Dataset
from hansa.learners.torch import TorchLearner
from hansa.local_training import SGD, Adam, Correction, LocalTraining

SIZES = (40, 0, 23, 1, 37)


def build_mlp():
    return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 4))


def build_cnn():
    layers = (nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(0.2), nn.Flatten())
    return nn.Sequential(nn.Unflatten(1, (1, 8, 8)), *layers, nn.Linear(36, 4))


class Words(nn.Module):
    def __init__(self, cells):
        super().__init__()
        self.tokens, self.cells, self.out = nn.Embedding(9, 8), cells(8, 8, batch_first=True), nn.Linear(8, 4)

    def forward(self, x):
        return self.out(self.cells(self.tokens(x.long().clamp(0, 8)))[0].mean(1))


class Attending(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.out = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True), nn.Linear(8, 4)

    def forward(self, x):
        return self.out(self.layer(x.view(-1, 8, 8)).mean(1))


def digits(size, seed):
    """Images of 8 x 8: each class brightens its own quarter."""
    generator = np.random.default_rng([size, seed])
    x, y = generator.standard_normal((size, 8, 8)).astype(np.float32), generator.integers(0, 4, size)
    for image, label in zip(x, y, strict=True):
        image[4 * (label // 2) :, 4 * (label % 2) :][:4, :4] += 1
    return Dataset(x.reshape(size, 64), y)


def fit(precision, build, local, batched=None, start=None, **options):
    learner = TorchLearner(build, device="cpu", precision=precision, batched=batched, **options)
    params = learner.initial(Key.of(0)) if start is None else start
    datasets, keys = [digits(n, i) for i, n in enumerate(SIZES)], [Key.of(i) for i in range(len(SIZES))]
    fitted = learner.fit(np.stack([params] * len(SIZES)), datasets, local, Correction(), keys)
    return learner, params, fitted


MODELS = {
    "mlp": build_mlp,
    "cnn": build_cnn,
    "lstm": lambda: Words(nn.LSTM),
    "transformer": Attending,
}


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_the_change_in_bfloat16_is_that_in_float32_within_five_percent(name, batched):
    local = LocalTraining(learning_rate=0.05, epochs=2, batch_size=8)
    _, start, exact = fit("float32", MODELS[name], local, batched=False)
    learner, _, lower = fit("bf16", MODELS[name], local, batched=batched)
    if batched and name != "lstm":  # PyTorch's recurrent layers in bfloat16 train one by one
        assert set(learner.choices.values()) == {"batched"}
    mask = learner.layout.mask("parameter")
    gap = np.linalg.norm((lower.params - exact.params)[:, mask], axis=1)
    moved = np.linalg.norm((exact.params - start)[:, mask], axis=1)
    assert (gap <= 0.05 * moved).all()
    assert gap.max() > 0
    np.testing.assert_allclose(lower.loss, exact.loss, rtol=0.02)
    np.testing.assert_array_equal(lower.params[1], start)
    assert lower.params.dtype == np.float32


@pytest.mark.parametrize("optimizer", [SGD(momentum=0.9), Adam()])
def test_small_steps_add_up_since_parameters_stay_float32(optimizer):
    local = LocalTraining(learning_rate=1e-4, optimizer=optimizer, epochs=1, batch_size=8)
    _, start, lower = fit("bf16", build_mlp, local)
    moved = np.abs(lower.params[0] - start)
    assert 0 < np.median(moved) < 2**-9  # bfloat16 would lose steps as small as these
    assert (moved > 0).mean() > 0.9


@pytest.mark.parametrize("batched", [True, False])
def test_it_learns(batched):
    learner = TorchLearner(build_mlp, precision="bf16", batched=batched)
    local = LocalTraining(learning_rate=0.1, epochs=3, batch_size=8)
    datasets, params = [digits(40, i) for i in range(4)], learner.initial(Key.of(0))
    for turn in range(5):
        keys = [Key.of(turn).child(i) for i in range(4)]
        params = learner.fit(np.stack([params] * 4), datasets, local, Correction(), keys).params.mean(0)
    test = digits(200, 9)
    assert (learner.predict(params, test.x) == test.y).mean() > 0.9


def test_evaluation_and_the_model_handed_out_are_float32():
    exact, lower = TorchLearner(build_mlp), TorchLearner(build_mlp, precision="bf16")
    params, test = exact.initial(Key.of(0)), digits(30, 0)
    np.testing.assert_array_equal(exact.scores(params, test.x), lower.scores(params, test.x))
    np.testing.assert_array_equal(exact.evaluate(params[None], [test]), lower.evaluate(params[None], [test]))
    assert lower.model(params).train()(torch.from_numpy(test.x)).dtype == torch.float32


def test_a_loss_of_ones_own_gets_float32_scores():
    seen = []

    def loss(model, x, y):
        seen.append(model(x).dtype)
        return nn.functional.cross_entropy(model(x), y)

    fit("bf16", build_mlp, LocalTraining(learning_rate=0.1, batch_size=8), loss=loss, num_classes=4)
    assert set(seen) == {torch.float32}


def test_the_choice_and_the_name_say_the_precision():
    learner, _, _ = fit("bf16", build_mlp, LocalTraining(learning_rate=0.1, batch_size=8))
    assert all("bfloat16" in situation for situation in learner.choices)
    assert "precision='bf16'" in repr(learner)
    assert "precision='bf16'" in repr(learner.on_device("cpu"))
    assert "precision" not in repr(TorchLearner(build_mlp))


def test_an_unknown_precision_is_refused():
    with pytest.raises(InputError, match=r"expected 'float32' or 'bf16', found 'fp8'"):
        TorchLearner(build_mlp, precision="fp8")
