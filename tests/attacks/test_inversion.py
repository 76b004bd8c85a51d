"""Rows are read back from updates: by a division, and by matching gradients."""

import numpy as np
import pytest

import hansa
from hansa.attacks.inversion import by_matching, first_layer, from_first_layer, likeness
from hansa.core.key import Key
from hansa.work import Work


def update_of(learner, rows, **local):
    algorithm = hansa.FedAvg(client_learning_rate=0.1, **local)
    start = np.asarray(learner.initial(Key.of(3)))
    fit = Work(learner, algorithm, ("a",), (rows,), keys=(Key.of(0),))
    return start, np.asarray(fit.change(start))[0]


@pytest.mark.parametrize("num_classes", [None, 2, 4])
def test_one_row_comes_back_from_a_linear_models_update_whatever_the_steps(num_classes):
    x = np.random.default_rng(0).normal(size=(1, 9)).astype(np.float32)
    learner = hansa.LinearLearner(num_features=9, num_classes=num_classes)
    _, update = update_of(learner, hansa.Dataset(x, np.array([1])), local_epochs=3)
    found = from_first_layer(0.01 * update, learner.layout, first_layer(learner.layout, 9))
    np.testing.assert_allclose(found, x[0], rtol=1e-4)


def test_several_rows_come_back_as_their_mean_by_error():
    draw = np.random.default_rng(1)
    rows = hansa.Dataset(draw.normal(size=(5, 4)).astype(np.float32), np.array([1.0, 2.0, 3.0, 4.0, 5.0]))
    learner = hansa.LinearLearner(num_features=4)
    _, update = update_of(learner, rows, local_steps=1)
    found = from_first_layer(update, learner.layout, first_layer(learner.layout, 4))
    np.testing.assert_allclose(found, np.average(rows.x, axis=0, weights=rows.y), rtol=1e-4)


def test_an_update_of_nothing_gives_zeros():
    learner = hansa.LinearLearner(num_features=3, num_classes=2)
    assert from_first_layer(np.zeros(4, np.float32), learner.layout, ("weight", "bias")).tolist() == [0.0, 0.0, 0.0]


def test_rows_of_a_convolutional_model_come_back_by_matching_one_alone_and_two_together():
    torch = pytest.importorskip("torch")
    from torch import nn

    def build():
        return nn.Sequential(
            nn.Unflatten(1, (1, 6, 6)), nn.Conv2d(1, 8, 3), nn.Sigmoid(), nn.Flatten(), nn.Linear(128, 3)
        )

    learner = hansa.TorchLearner(build)
    assert first_layer(learner.layout, 36) is None
    x = np.random.default_rng(0).random((2, 36)).astype(np.float32)
    for labels in (np.array([2]), np.array([0, 2])):
        rows = hansa.Dataset(x[: len(labels)], labels)
        start, update = update_of(learner, rows, local_steps=1)
        y = torch.as_tensor(labels)

        def loss(module, x, y=y):
            return nn.functional.cross_entropy(module(x), y)

        found = by_matching(
            learner.model(start), loss, update, learner.layout, rows.x.shape, key=Key.of(0), num_starts=1, num_steps=200
        )
        assert min(likeness(one, other) for one, other in zip(rows.x, found, strict=True)) > 0.9
