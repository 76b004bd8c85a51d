"""The first linear layer without a stack of its weights, against a stack and against the plain loop."""

import numpy as np
import pytest
import torch
from torch import nn

from hansa.core.key import Key
from hansa.data.dataset import Dataset
from hansa.learners.torch import TorchLearner
from hansa.learners.torch_dual import Dual
from hansa.local_training import SGD, Correction, LocalTraining

SIZES = (5, 0, 13, 1, 8, 8, 30, 2, 21)
MODELS = {
    "linear": lambda: nn.Linear(6, 3),
    "no bias": lambda: nn.Linear(6, 3, bias=False),
    "hidden": lambda: nn.Sequential(nn.Linear(6, 70), nn.ReLU(), nn.Linear(70, 3)),
    "flattened": lambda: nn.Sequential(nn.Flatten(), nn.Tanh(), nn.Linear(6, 5), nn.GELU(), nn.Linear(5, 3)),
}
STEPS = {
    "an epoch": LocalTraining(learning_rate=0.1, epochs=1, batch_size=4),
    "epochs": LocalTraining(learning_rate=0.1, epochs=3, batch_size=4),
    "steps": LocalTraining(learning_rate=0.1, epochs=None, steps=6, batch_size=4),
    "a full batch": LocalTraining(learning_rate=0.1, epochs=1),
    "full batches": LocalTraining(learning_rate=0.1, epochs=5),
}


def table(size, seed, shape):
    generator = np.random.default_rng([size, seed])
    return Dataset(generator.standard_normal((size, *shape)).astype(np.float32), generator.integers(0, 3, size))


def trained(model, local, *, batched, sizes=SIZES, own_start=False, weights=False, change=True):
    shape = (2, 3) if model == "flattened" else (6,)
    datasets = [table(size, i, shape) for i, size in enumerate(sizes)]
    if weights:
        datasets = [d.replace(weights=np.random.default_rng(len(d)).random(len(d))) for d in datasets]
    learner = TorchLearner(MODELS[model], batched=batched)
    keys = [Key.of(i) for i in range(len(sizes))]
    starts = [learner.initial(Key.of(i if own_start else 0)) for i in range(len(sizes))]
    params = np.stack(starts) if own_start else np.broadcast_to(starts[0], (len(sizes), len(starts[0])))
    fitted = learner.fit(params, datasets, local, Correction(), keys, change=change)
    assert not batched or set(learner.choices.values()) == {"batched"}, "it fell back to the loop"
    return fitted


@pytest.fixture
def used(monkeypatch):
    """How often the dual form was taken, which is always."""
    made = []
    begin = Dual.__init__
    monkeypatch.setattr(Dual, "pays", staticmethod(lambda *_: True))
    monkeypatch.setattr(Dual, "__init__", lambda self, *rest: (made.append(1), begin(self, *rest))[0])
    return made


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("model", MODELS)
def test_the_dual_form_gives_what_the_loop_gives(used, model, steps):
    for options in ({}, {"own_start": True}, {"weights": True}, {"change": False}, {"sizes": (8, 8, 8)}):
        looped = trained(model, STEPS[steps], batched=False, **options)
        dual = trained(model, STEPS[steps], batched=True, **options)
        np.testing.assert_allclose(dual.params, looped.params, atol=2e-6)
        np.testing.assert_allclose(dual.loss, looped.loss, rtol=1e-4)
    assert used


def test_it_is_taken_where_it_pays_and_only_for_plain_steps(monkeypatch):
    taken = []
    begin = Dual.__init__
    monkeypatch.setattr(Dual, "__init__", lambda self, *rest: (taken.append(1), begin(self, *rest))[0])
    trained("hidden", STEPS["an epoch"], batched=True)
    assert taken
    taken.clear()
    trained(
        "hidden", LocalTraining(learning_rate=0.1, epochs=1, batch_size=4, optimizer=SGD(momentum=0.5)), batched=True
    )
    assert not taken


def test_where_it_pays():
    assert Dual.pays(num_steps=5, width=10, repeats=False, num_outputs=64)
    assert not Dual.pays(num_steps=50, width=10, repeats=False, num_outputs=64)
    assert Dual.pays(num_steps=1, width=1000, repeats=True, num_outputs=2)
    assert Dual.pays(num_steps=20, width=30, repeats=True, num_outputs=2)
    assert not Dual.pays(num_steps=2, width=1000, repeats=True, num_outputs=2)


def test_who_has_finished_is_not_moved_by_what_others_do():
    x, received = torch.randn(2, 4, 3), [torch.zeros(2, 2, 3)]
    dual = Dual(x, 2, False, received, 0.5)
    dual.forward(x)
    dual.backward(torch.ones(2, 2, 2), 0.5, False)
    dual.keep(1)
    dual.forward(x)
    dual.backward(torch.ones(1, 2, 2), 0.5, False)
    place = torch.empty(2, 2, 3)
    dual.write([place], change=True)
    torch.testing.assert_close(place[0], -0.5 * x[0].sum(0).expand(2, 3))
    torch.testing.assert_close(place[1], -0.5 * x[1, :2].sum(0).expand(2, 3))
