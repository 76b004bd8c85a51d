"""The batched way of ``TorchLearner`` against its plain loop, on ragged clients."""

import logging

import numpy as np
import pytest
import torch
from torch import nn

from hansa.core.key import Key
from hansa.data.block import Shelf
from hansa.data.dataset import Dataset
from hansa.learners.torch import TorchLearner
from hansa.learners.torch_data import Reader
from hansa.learners.torch_layers import chain_of
from hansa.local_training import SGD, Adam, Correction, LocalTraining

SIZES = (5, 0, 13, 1, 8, 8, 30, 2, 0, 21)
RAGGED = LocalTraining(learning_rate=0.1, epochs=2, batch_size=4)


def build_mlp():
    return nn.Sequential(nn.Linear(6, 7), nn.ReLU(), nn.Sequential(nn.Linear(7, 5), nn.Tanh()), nn.Linear(5, 3))


def table(size, seed, shape=(6,), num_classes=3):
    generator = np.random.default_rng([size, seed])
    return Dataset(
        generator.standard_normal((size, *shape)).astype(np.float32), generator.integers(0, num_classes, size)
    )


def both(build, datasets, local, correction=None, **options):
    """Batched and looped, from different starts."""
    fitted = []
    for batched in (True, False):
        learner = TorchLearner(build, batched=batched, **options)
        params = np.stack([learner.initial(Key.of(i)) for i in range(len(datasets))])
        terms = correction(learner.layout.num_params, len(datasets)) if correction else Correction()
        fitted.append(learner.fit(params, datasets, local, terms, [Key.of(i) for i in range(len(datasets))]))
        if batched:
            assert set(learner.choices.values()) == {"batched"}, "it fell back to the loop"
    return fitted


def assert_alike(batched, looped, atol=1e-5):
    np.testing.assert_allclose(batched.params, looped.params, atol=atol)
    np.testing.assert_array_equal(batched.num_steps, looped.num_steps)
    np.testing.assert_allclose(batched.loss, looped.loss, rtol=1e-4)


def corrections(num_params, num_clients):
    generator = np.random.default_rng(0)
    return Correction(
        linear=generator.standard_normal((num_clients, num_params)).astype(np.float32) / 10,
        strength=0.2,
        trainable=np.arange(num_params) % 3 > 0,
    )


def anchored(num_params, num_clients):
    return Correction(strength=0.2, anchor=np.ones(num_params, np.float32))


CASES = {
    "plain SGD": (SGD(), None),
    "momentum": (SGD(momentum=0.9, nesterov=True), None),
    "weight decay": (SGD(weight_decay=0.1), None),
    "Adam": (Adam(), None),
    "corrected": (SGD(), corrections),
    "corrected momentum": (SGD(momentum=0.5, weight_decay=0.1), corrections),
    "anchored": (SGD(), anchored),
}


@pytest.mark.parametrize("name", CASES)
def test_a_block_of_ragged_clients_equals_the_loop(name):
    optimizer, correction = CASES[name]
    local = LocalTraining(learning_rate=0.05, optimizer=optimizer, epochs=2, batch_size=4)
    datasets = [table(size, i) for i, size in enumerate(SIZES)]
    # Adam divides by a gradient's own size: where that is rounding noise, so is the direction of the step.
    assert_alike(*both(build_mlp, datasets, local, correction), atol=2e-4 if name == "Adam" else 1e-5)


@pytest.mark.parametrize(
    "local",
    [
        LocalTraining(learning_rate=0.1, epochs=3),
        LocalTraining(learning_rate=0.1, epochs=None, steps=7, batch_size=4),
        LocalTraining(learning_rate=0.1, epochs=None, steps=5),
        LocalTraining(learning_rate=0.1, epochs=1, batch_size=1),
        LocalTraining(learning_rate=0.1, epochs=1, batch_size=1000),
    ],
)
def test_every_way_to_count_steps_gives_what_the_loop_gives(local):
    assert_alike(*both(build_mlp, [table(size, i) for i, size in enumerate(SIZES)], local))
    assert_alike(*both(build_mlp, [table(8, i) for i in range(3)], local))


@pytest.mark.parametrize("ahead", [1 << 22, 100])
def test_chunks_and_windows_change_nothing(monkeypatch, ahead):
    monkeypatch.setattr("hansa.learners.torch_layout._AHEAD", ahead)
    monkeypatch.setattr("hansa.learners.torch_batched._FEWEST", 3)
    monkeypatch.setitem(__import__("hansa.learners.torch_batched", fromlist=["x"])._CHUNK_BYTES, "cpu", 1)
    monkeypatch.setattr("hansa.learners.torch_layout._GATHERED_BYTES", 600)
    assert_alike(*both(build_mlp, [table(size, i) for i, size in enumerate(SIZES)], RAGGED))


def test_weights_of_examples_count_in_blocks_as_in_the_loop():
    datasets = [table(size, i) for i, size in enumerate(SIZES)]
    generator = np.random.default_rng(0)
    weighted = [d.replace(weights=generator.integers(0, 3, len(d))) if i % 3 else d for i, d in enumerate(datasets)]
    assert_alike(*both(build_mlp, weighted, RAGGED))
    all_zero = [d.replace(weights=np.zeros(len(d))) for d in datasets]
    batched, looped = both(build_mlp, all_zero, RAGGED)
    np.testing.assert_array_equal(batched.params, looped.params)


def build_cnn():
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(27, 3))


class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens, self.norm, self.out = nn.Embedding(9, 6), nn.LayerNorm(6), nn.Linear(6, 3)
        self.register_buffer("scale", torch.full((6,), 2.0))

    def forward(self, x):
        return self.out(self.norm(self.tokens(x) * self.scale).mean(1))


def sentences(size, seed):
    generator = np.random.default_rng([size, seed])
    return Dataset(generator.integers(0, 9, (size, 5)), generator.integers(0, 3, size))


def test_a_convolutional_model_is_mapped_over_clients():
    datasets = [table(size, i, (1, 8, 8)) for i, size in enumerate(SIZES)]
    assert_alike(*both(build_cnn, datasets, RAGGED))
    assert_alike(
        *both(build_cnn, datasets, LocalTraining(learning_rate=0.1, optimizer=SGD(momentum=0.9), batch_size=4))
    )


def test_a_model_of_words_with_a_buffer_is_mapped_over_clients():
    datasets = [sentences(size, i) for i, size in enumerate(SIZES)]
    batched, looped = both(Words, datasets, RAGGED, correction=corrections)
    assert_alike(batched, looped)
    is_buffer = TorchLearner(Words).layout.mask("buffer")
    np.testing.assert_array_equal(batched.params[:, is_buffer], 2)


def distill(model, x, y, teacher=None):
    loss = nn.functional.cross_entropy(model(x), y)
    return loss if teacher is None else loss + nn.functional.mse_loss(model(x), teacher(x))


@pytest.mark.parametrize("optimizer", [SGD(), SGD(momentum=0.9)])
def test_a_loss_of_ones_own_is_mapped_over_batches_of_one_length(optimizer):
    local = LocalTraining(learning_rate=0.1, optimizer=optimizer, epochs=2, batch_size=4)
    datasets = [table(size, i) for i, size in enumerate(SIZES)]

    def teachers(num_params, num_clients):
        rows = np.random.default_rng(0).standard_normal((num_clients, num_params)).astype(np.float32)
        return Correction(models={"teacher": rows})

    assert_alike(*both(build_mlp, datasets, local, loss=distill, num_classes=3))
    assert_alike(*both(build_mlp, datasets, local, teachers, loss=distill, num_classes=3), atol=1e-4)
    assert_alike(
        *both(Words, [sentences(n, i) for i, n in enumerate(SIZES)], local, teachers, loss=distill, num_classes=3),
        atol=1e-4,
    )


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(2, 3), nn.Linear(3, 3)

    def forward(self, a, b):
        return self.left(a) + self.right(b)


def test_dicts_of_arrays_are_batched():
    generator = np.random.default_rng(0)
    datasets = [
        Dataset(
            {"b": generator.standard_normal((n, 3)), "a": generator.standard_normal((n, 2))},
            generator.integers(0, 3, n),
        )
        for n in SIZES
    ]
    assert_alike(*both(Two, datasets, RAGGED))


def test_sequences_with_padding_are_batched():
    def build():
        return nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 9))

    generator = np.random.default_rng(0)
    datasets = []
    for n in SIZES:
        x = generator.integers(0, 9, (n, 5))
        y = np.where(generator.random((n, 5)) < 0.4, -100, x)
        datasets.append(Dataset(x, y))
    assert_alike(*both(build, datasets, RAGGED))


@pytest.mark.parametrize("loss", ["mse", "mae", "huber", "binary_cross_entropy"])
def test_other_losses_are_fused_too(loss):
    def build():
        return nn.Sequential(nn.Flatten(), nn.Linear(6, 4), nn.GELU(), nn.Identity(), nn.Linear(4, 1, bias=False))

    datasets = [table(size, i, (2, 3), num_classes=2) for i, size in enumerate(SIZES)]
    assert_alike(*both(build, datasets, RAGGED, loss=loss))


def test_a_chain_is_found_in_plain_sequences_only():
    def has_chain(build):
        learner = TorchLearner(build, device="cpu")
        return chain_of(learner._engine.flat, learner._engine._loss) is not None

    def hooked():
        model = nn.Sequential(nn.Linear(6, 3))
        model[0].register_forward_hook(lambda *_: None)
        return model

    def frozen():
        model = build_mlp()
        model[0].bias.requires_grad_(False)
        return model

    def shared():
        layer = nn.Linear(6, 6)
        return nn.Sequential(layer, nn.ReLU(), layer)

    def tied():
        model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))
        model[2].weight = model[0].weight
        return model

    assert has_chain(build_mlp)
    assert has_chain(lambda: nn.Linear(6, 3))
    found = [
        has_chain(b)
        for b in (
            hooked,
            frozen,
            shared,
            tied,
            build_cnn,
            Words,
            lambda: nn.Sequential(nn.Dropout(0.5), nn.Linear(6, 3)),
        )
    ]
    assert not any(found)


@pytest.mark.parametrize("build", [
    lambda: nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3, bias=False)),
    lambda: nn.Linear(6, 3),
])  # fmt: skip
def test_features_of_several_axes_go_through_linear_layers(build):
    generator = np.random.default_rng(0)
    datasets = [Dataset(generator.standard_normal((n, 4, 6)), generator.integers(0, 3, (n, 4))) for n in SIZES]
    assert_alike(*both(build, datasets, RAGGED))


def falls_back(build, datasets, caplog, reason, **options):
    """Trains in blocks, twice, by the loop, and says so once."""
    caplog.set_level(logging.INFO, "hansa")
    learner = TorchLearner(build, **options)
    params = np.stack([learner.initial(Key.of(0))] * len(datasets))
    keys = [Key.of(i) for i in range(len(datasets))]
    fitted = [learner.fit(params, datasets, RAGGED, Correction(), keys).params for _ in range(2)]
    looped = TorchLearner(build, **{**options, "batched": False}).fit(params, datasets, RAGGED, Correction(), keys)
    np.testing.assert_array_equal(fitted[0], looped.params)
    np.testing.assert_array_equal(fitted[1], looped.params)
    said = [record.getMessage() for record in caplog.records if record.name == "hansa"]
    assert len(said) == 1
    assert "one by one" in said[0]
    assert reason in said[0]
    return looped.params, learner


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 3)

    def forward(self, x):
        return self.layer(x) if x.sum() > 0 else self.layer(-x)


class Counting(nn.Module):
    """Its buffer changes in training by assignment, which a mapped call does not see."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 3)
        self.register_buffer("mean", torch.zeros(6))

    def forward(self, x):
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        return self.layer(x - self.mean)


def test_control_flow_that_looks_at_data_falls_back_to_the_loop(caplog):
    falls_back(Branching, [table(n, i) for i, n in enumerate(SIZES)], caplog, "cannot be batched", batched=True)


def test_a_buffer_that_training_changes_falls_back_to_the_loop(caplog):
    params, learner = falls_back(
        Counting, [table(n, i) for i, n in enumerate(SIZES)], caplog, "other parameters", batched=True
    )
    assert params[0][learner.layout.mask("buffer")].any()


def test_examples_of_differing_lengths_fall_back_to_the_loop(caplog):
    generator = np.random.default_rng(0)
    datasets = [
        Dataset(generator.integers(0, 9, (n, 3 + i % 2)), generator.integers(0, 3, n)) for i, n in enumerate(SIZES)
    ]
    falls_back(Words, datasets, caplog, "shapes", batched=True)


def test_one_client_alone_always_takes_the_plain_loop():
    batched, looped = (TorchLearner(build_mlp, batched=batched) for batched in (True, False))
    params, dataset = batched.initial(Key.of(0))[None], [table(13, 0)]
    one, two = (ln.fit(params, dataset, RAGGED, Correction(), [Key.of(1)]).params for ln in (batched, looped))
    np.testing.assert_array_equal(one, two)
    assert batched.choices == {}


def test_one_client_gives_the_same_bits_wherever_its_rows_lie_in_memory():
    learner, local = TorchLearner(build_mlp), LocalTraining(learning_rate=0.1, epochs=2)
    dataset, room = table(13, 0), np.zeros(200, np.float32)
    found = set()
    for offset in range(4):
        x = room[offset : offset + 78].reshape(13, 6)
        x[:] = dataset.x
        params = learner.initial(Key.of(0))[None]
        fitted = learner.fit(params, [dataset.replace(x=x)], local, Correction(), [Key.of(1)])
        found.add(fitted.params.tobytes())
    assert len(found) == 1


def test_the_faster_way_is_chosen_once_and_the_result_is_that_of_the_loop():
    learner = TorchLearner(build_mlp)
    datasets = [table(20, i) for i in range(30)]
    params = np.broadcast_to(learner.initial(Key.of(0)), (30, learner.layout.num_params))
    keys = [Key.of(i) for i in range(30)]
    fitted = learner.fit(params, datasets, RAGGED, Correction(), keys)
    chosen = learner.choices
    looped = TorchLearner(build_mlp, batched=False).fit(params, datasets, RAGGED, Correction(), keys)
    assert_alike(fitted, looped)
    learner.fit(params, datasets, RAGGED, Correction(), keys)
    assert learner.choices == chosen
    assert len(chosen) == 1


def test_arrays_that_need_no_conversion_are_not_copied_and_others_are_converted_once():
    reader, converted = Reader(torch.device("cpu"), torch.int64), []
    as_is, other = table(4, 0), table(4, 1)
    other = other.replace(x=other.x.astype(np.float64))
    assert reader.examples(as_is).x.data_ptr() == as_is.x.ctypes.data
    assert reader.rows([as_is]).everyone.x.data_ptr() == as_is.x.ctypes.data

    shelf = Shelf(lambda dataset: converted.append(dataset) or reader.columns(dataset))
    clients = {"a": as_is, "b": other}
    first, again = (reader.rows(shelf.block(("b", "a"), clients.__getitem__)) for _ in range(2))
    assert converted == [other, as_is]
    assert first.everyone.x.data_ptr() == again.everyone.x.data_ptr()
    for rows, dataset in zip(again, (other, as_is), strict=True):
        assert rows.x.dtype == torch.float32
        np.testing.assert_array_equal(rows.x.numpy(), dataset.x.astype(np.float32))
        np.testing.assert_array_equal(rows.y.numpy(), dataset.y)


def test_the_loop_gives_the_same_bits_in_a_block_and_alone():
    learner = TorchLearner(build_mlp, batched=False)
    datasets, keys = [table(size, i) for i, size in enumerate(SIZES)], [Key.of(i) for i in range(len(SIZES))]
    params = np.broadcast_to(learner.initial(Key.of(0)), (len(SIZES), learner.layout.num_params))
    together = learner.fit(params, datasets, RAGGED, Correction(), keys).params
    for row, dataset, key in zip(together, datasets, keys, strict=True):
        alone = TorchLearner(build_mlp).fit(params[:1], [dataset], RAGGED, Correction(), [key]).params[0]
        np.testing.assert_array_equal(row, alone)
