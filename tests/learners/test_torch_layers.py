"""Layers with a batched form of their own, against the plain loop, on ragged clients with short last batches."""

import logging

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from hansa.core.key import Key
from hansa.data.dataset import Dataset
from hansa.learners.torch import TorchLearner
from hansa.local_training import SGD, Adam, Correction, LocalTraining

SIZES = (5, 0, 13, 1, 8, 8, 9, 2)


def rows(*shape):
    def make(size, generator):
        return generator.standard_normal((size, *shape)).astype(np.float32)

    return make


def tokens(length, num_tokens=9):
    def make(size, generator):
        return generator.integers(0, num_tokens, (size, length))

    return make


class Recurrent(nn.Module):
    def __init__(self, kind, **options):
        super().__init__()
        self.tokens, self.cells = nn.Embedding(9, 4), kind(4, 5, **options)
        self.out = nn.Linear((self.cells.proj_size or 5) * (1 + self.cells.bidirectional), 3)
        self.time = 1 if self.cells.batch_first else 0

    def forward(self, x):
        out, state = self.cells(self.tokens(x if self.time else x.t()))
        last = state[0] if isinstance(state, tuple) else state
        return self.out(out.mean(self.time)) + last.mean((0, 2)).unsqueeze(1)


class Attending(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.tokens = nn.Embedding(9, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 12, **{"dropout": 0.0, "batch_first": True, **options})
        self.out = nn.Linear(8, 3)

    def forward(self, x):
        return self.out(self.layer(self.tokens(x)).mean(1))


class Looking(nn.Module):
    """Attention over other keys than its queries, with padding, a causal mask and weights that are used."""

    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(9, 8, padding_idx=0)
        self.attention, self.out = nn.MultiheadAttention(8, 2, dropout=0.2, batch_first=True), nn.Linear(8, 3)

    def forward(self, x):
        e = self.tokens(x)
        causal = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        mixed, weights = self.attention(e.flip(1), e, e, key_padding_mask=(x == 8) & (x.sum() < 0), attn_mask=causal)
        return self.out(mixed.mean(1)) + weights.square().mean()


class Own(nn.Module):
    """Functions rather than layers, and a weight that is used twice."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        x = functional.dropout(functional.relu(self.first(x)), 0.3, self.training)
        x = torch.tanh(functional.linear(x, self.first.weight))
        return self.second(x)


class Dotted(nn.Module):
    def __init__(self):
        super().__init__()
        self.query, self.key, self.out = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        q, k = self.query(x), self.key(x)
        mixed = functional.scaled_dot_product_attention(q, k, x, is_causal=True, dropout_p=0.3 if self.training else 0)
        return self.out(mixed.mean(1))


def norm(layer, size=5):
    return lambda: nn.Sequential(nn.Linear(6, size), layer(), nn.ReLU(), nn.Linear(size, 3))


def image(*layers, last):
    return lambda: nn.Sequential(*(make() for make in layers), nn.Flatten(), nn.Linear(last, 3))


def conv2d():
    return nn.Conv2d(1, 4, 3)


MODELS = {
    "linear, functions": (Own, rows(6)),
    "layer norm": (norm(lambda: nn.LayerNorm(5)), rows(6)),
    "group norm": (image(conv2d, lambda: nn.GroupNorm(2, 4), last=64), rows(1, 6, 6)),
    "batch norm": (norm(lambda: nn.BatchNorm1d(5)), rows(6)),
    "batch norm of images": (image(conv2d, lambda: nn.BatchNorm2d(4, affine=False), last=64), rows(1, 6, 6)),
    "dropout": (norm(lambda: nn.Dropout(0.4)), rows(6)),
    "dropout of channels": (image(conv2d, lambda: nn.Dropout2d(0.4), last=64), rows(1, 6, 6)),
    "conv2d, pooling": (image(conv2d, lambda: nn.MaxPool2d(2), lambda: nn.AvgPool2d(2), last=4), rows(1, 6, 6)),
    "conv1d": (image(lambda: nn.Conv1d(2, 4, 3, stride=2), lambda: nn.AdaptiveMaxPool1d(2), last=8), rows(2, 9)),
    "embedding": (lambda: nn.Sequential(nn.Embedding(9, 4, padding_idx=2), nn.Flatten(), nn.Linear(20, 3)), tokens(5)),
    "embedding bag": (lambda: nn.Sequential(nn.EmbeddingBag(9, 4), nn.Linear(4, 3)), tokens(5)),
    "largest in bag": (lambda: nn.Sequential(nn.EmbeddingBag(9, 4, mode="max"), nn.Linear(4, 3)), tokens(5)),
    "lstm": (lambda: Recurrent(nn.LSTM, num_layers=2, dropout=0.3, batch_first=True), tokens(5)),
    "lstm, both ways": (lambda: Recurrent(nn.LSTM, bidirectional=True, bias=False), tokens(5)),
    "gru": (lambda: Recurrent(nn.GRU, num_layers=2, batch_first=True), tokens(5)),
    "gru, both ways": (lambda: Recurrent(nn.GRU, bidirectional=True, bias=False, batch_first=True), tokens(5)),
    "rnn": (lambda: Recurrent(nn.RNN, num_layers=2, dropout=0.3, batch_first=True), tokens(5)),
    "rnn with relu": (lambda: Recurrent(nn.RNN, nonlinearity="relu"), tokens(5)),
    "transformer": (Attending, tokens(5)),
    "transformer with dropout": (lambda: Attending(dropout=0.2), tokens(5)),
    "attention with masks": (Looking, tokens(5)),
    "attention by function": (Dotted, rows(5, 6)),
}


def datasets_of(make, sizes=SIZES):
    found = []
    for client, size in enumerate(sizes):
        generator = np.random.default_rng([client, size])
        found.append(Dataset(make(size, generator), generator.integers(0, 3, size)))
    return found


def both(build, datasets, local, correct=None, **options):
    """Batched and looped, from different starts."""
    fitted = []
    for batched in (True, False):
        learner = TorchLearner(build, device="cpu", batched=batched, **options)
        params = np.stack([learner.initial(Key.of(i)) for i in range(len(datasets))])
        correction = correct(*params.shape) if correct else Correction()
        keys = [Key.of(i) for i in range(len(datasets))]
        fitted.append(learner.fit(params, datasets, local, correction, keys))
        if batched:
            assert set(learner.choices.values()) == {"batched"}, "it fell back to the loop"
    return fitted


def assert_alike(batched, looped, atol=2e-5):
    np.testing.assert_allclose(batched.params, looped.params, atol=atol)
    np.testing.assert_array_equal(batched.num_steps, looped.num_steps)
    np.testing.assert_allclose(batched.loss, looped.loss, rtol=1e-4)


def corrected(num_clients, num_params):
    generator = np.random.default_rng(0)
    linear = generator.standard_normal((num_clients, num_params)).astype(np.float32) / 10
    return Correction(linear=linear, strength=0.2, trainable=np.arange(num_params) % 3 > 0)


OPTIMIZERS = {
    "plain": (SGD(), None),
    "momentum": (SGD(momentum=0.9, nesterov=True, weight_decay=0.1), None),
    "corrected": (SGD(), corrected),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", MODELS)
def test_a_block_equals_the_loop(name, optimizer):
    build, make = MODELS[name]
    chosen, correct = OPTIMIZERS[optimizer]
    local = LocalTraining(learning_rate=0.05, optimizer=chosen, epochs=2, batch_size=4)
    assert_alike(*both(build, datasets_of(make), local, correct))


@pytest.mark.parametrize("name", ["linear, functions", "batch norm", "embedding", "gru", "transformer with dropout"])
def test_adam_in_a_block_equals_adam_in_the_loop(name):
    build, make = MODELS[name]
    # Adam divides by a gradient's own size: a large epsilon keeps rounding noise from becoming a step.
    local = LocalTraining(learning_rate=0.02, optimizer=Adam(eps=1e-2), epochs=2, batch_size=4)
    assert_alike(*both(build, datasets_of(make), local), atol=2e-4)


@pytest.mark.parametrize("name", MODELS)
def test_batches_of_one_and_of_all_examples_equal_the_loop(name):
    build, make = MODELS[name]
    for local in (
        LocalTraining(learning_rate=0.05, batch_size=1),
        LocalTraining(learning_rate=0.05, epochs=None, steps=3),
    ):
        assert_alike(*both(build, datasets_of(make), local), atol=1e-4)


def penalised(model, x, y):
    return functional.cross_entropy(model(x), y) + 0.1 * sum(p.square().sum() for p in model.parameters())


@pytest.mark.parametrize("name", ["linear, functions", "batch norm", "dropout", "lstm", "embedding"])
def test_a_loss_of_ones_own_finds_the_same_layers(name):
    build, make = MODELS[name]
    local = LocalTraining(learning_rate=0.05, epochs=2, batch_size=4)
    assert_alike(*both(build, datasets_of(make), local, loss=penalised, num_classes=3))


def test_running_statistics_move_in_blocks_as_in_the_loop():
    learner = TorchLearner(MODELS["batch norm"][0], batched=True)
    batched, looped = both(MODELS["batch norm"][0], datasets_of(rows(6)), LocalTraining(learning_rate=0.1))
    statistics = learner.layout.mask("buffer")
    np.testing.assert_allclose(batched.params[:, statistics], looped.params[:, statistics], atol=1e-6)
    assert len(np.unique(batched.params[:, statistics][:, 0])) == len(SIZES) - 1  # two clients have no values, or one
    assert learner.batches_clients


def test_a_client_draws_the_same_in_every_block():
    build, make = MODELS["lstm"]
    learner, local = TorchLearner(build, batched=True), LocalTraining(learning_rate=0.1, epochs=2, batch_size=4)
    datasets, params = datasets_of(make), learner.initial(Key.of(0))
    keys = [Key.of(i) for i in range(len(datasets))]

    def fit(clients):
        own = [datasets[i] for i in clients], local, Correction(), [keys[i] for i in clients]
        return learner.fit(np.stack([params] * len(clients)), *own).params

    everyone = fit(range(len(datasets)))
    np.testing.assert_allclose(fit([6, 2, 0]), everyone[[6, 2, 0]], atol=1e-5)


class Centred(nn.Module):
    """Looks at all examples of a batch, padding and all."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 3)

    def forward(self, x):
        return self.layer(x - x.mean(0))


def falls_back(build, datasets, caplog, reason):
    caplog.set_level(logging.INFO, "hansa")
    learner, local = TorchLearner(build, batched=True), LocalTraining(learning_rate=0.1, epochs=2, batch_size=4)
    params = np.stack([learner.initial(Key.of(0))] * len(datasets))
    keys = [Key.of(i) for i in range(len(datasets))]
    fitted = [learner.fit(params, datasets, local, Correction(), keys).params for _ in range(2)]
    looped = TorchLearner(build, batched=False).fit(params, datasets, local, Correction(), keys)
    np.testing.assert_array_equal(fitted[0], looped.params)
    np.testing.assert_array_equal(fitted[1], looped.params)
    said = [record.getMessage() for record in caplog.records if record.name == "hansa"]
    assert len(said) == 1
    assert "one by one" in said[0]
    assert reason in said[0]


def test_a_model_that_padding_would_change_falls_back_to_the_loop_though_the_first_batches_are_full(caplog):
    falls_back(Centred, datasets_of(rows(6), (8, 8, 8, 5)), caplog, "other parameters")


@pytest.mark.parametrize(
    ("build", "make", "reason"),
    [
        (lambda: Recurrent(nn.LSTM, proj_size=3), tokens(5), "projections"),
        (lambda: nn.Sequential(nn.Embedding(9, 2, max_norm=1), nn.Flatten(), nn.Linear(10, 3)), tokens(5), "max_norm"),
        (norm(lambda: nn.AlphaDropout(0.4)), rows(6), "random"),
        (norm(lambda: nn.BatchNorm1d(5, momentum=None)), rows(6), "momentum"),
    ],
)  # fmt: skip
def test_what_has_no_batched_form_falls_back_to_the_loop(build, make, reason, caplog):
    falls_back(build, datasets_of(make, (5, 0, 13, 8)), caplog, reason)
