import numpy as np
import pytest

import support
from hansa.core.errors import InputError
from hansa.data.dataset import Dataset
from hansa.data.rescale import Rescale
from hansa.training.simulate import simulate


def test_each_feature_has_constants_of_its_own_and_missing_cells_stay():
    found = Rescale(center=(50, 0), scale=(10, 2)).apply(Dataset([[60, np.nan], [45, 3]], [0, 1]), {})
    np.testing.assert_array_equal(found.x, np.array([[1, np.nan], [-0.5, 1.5]], np.float32))
    assert found.x.dtype == np.float32
    assert found.y.tolist() == [0, 1]


def test_one_constant_is_for_all_features():
    assert Rescale(scale=255.0).apply(Dataset([[0.0, 255.0]]), {}).x.tolist() == [[0.0, 1.0]]


def test_no_client_is_asked_and_the_model_takes_raw_rows():
    population = support.regression()
    scaled = support.linear(prepare=(Rescale(center=1.0, scale=2.0),))
    run = simulate(scaled, population, num_rounds=2, seed=0)
    by_hand = {c: d.replace(x=(d.x - 1) / 2) for c in population.ids for d in [population.load(c)[0]]}
    same = simulate(support.linear(), by_hand, num_rounds=2, seed=0)
    assert run.parameters.tobytes() == same.parameters.tobytes()
    assert [row.bytes_up for row in run.history] == [row.bytes_up for row in same.history]
    rows = population.load("c0")[0]
    np.testing.assert_allclose(run.evaluate(rows)["loss"], same.evaluate(rows.replace(x=(rows.x - 1) / 2))["loss"])


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Rescale(scale=0.0), r"scale=\): expected numbers above 0"),
        (lambda: Rescale(scale=(1.0, -1.0)), r"scale=\): expected numbers above 0"),
        (lambda: Rescale(center=float("nan")), r"center=\): expected finite numbers"),
        (lambda: Rescale(center=(1.0, 2.0)).apply(Dataset([[1.0]]), {}), "expected 2 features"),
        (lambda: Rescale().apply(Dataset({"a": np.ones((1, 1))}), {}), "found a dict"),
    ],
)
def test_what_cannot_be_is_refused(make, says):
    with pytest.raises(InputError, match=says):
        make()
