import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import linalg, stats

import support
from hansa.core import chain
from hansa.core.chain import Limits
from hansa.core.key import Key
from hansa.core.protocols import Draws
from hansa.transforms import rotate
from hansa.transforms.clip import Clip
from hansa.transforms.rotate import Rotate


def turned(rows, key="shared", **draws):
    return Rotate().encode(support.block(rows), None, None, Draws(Key.of(key), [], [], **draws))[0].values


def test_the_transform_is_hadamards_matrix():
    for size in (1, 2, 8, 64):
        found = rotate._transformed(np.eye(size))
        assert (found == linalg.hadamard(size)).all()


@given(length=st.integers(1, 70), seed=st.integers(0, 9))
def test_any_length_is_turned_and_turned_back_and_keeps_its_norm(length, seed):
    rows = np.random.default_rng(seed).normal(size=(2, length)).astype(np.float32)
    sent = turned(rows)
    np.testing.assert_allclose(np.linalg.norm(sent, axis=1), np.linalg.norm(rows, axis=1), rtol=1e-6)
    np.testing.assert_allclose(Rotate().decode(sent, None, Key.of("shared")), rows, atol=1e-6)


def test_one_large_value_is_spread_over_all_coordinates():
    for length in (64, 100, 127):
        for place in (0, length // 2, length - 1):
            sent = turned(np.eye(1, length, place))
            assert np.abs(sent).max() <= 3.5 / math.sqrt(64)


def test_each_coordinate_is_nearly_normal_of_at_most_the_stated_variance():
    row = np.random.default_rng(0).exponential(size=(1, 3000)) ** 2
    norm = np.linalg.norm(row)
    found = np.array([turned(row, key)[0] for key in range(40)]) / norm * math.sqrt(2048)
    assert found[:, : 3000 - 2048].std() < 1.02
    assert found[:, 3000 - 2048 :].std() < 1.02
    for column in (0, 951, 952, 2047, 2999):
        assert stats.kstest(found[:, column] / max(found[:, column].std(), 0.5), "norm").pvalue > 1e-3


def test_coordinates_are_cut_off_where_a_norm_is_proved_and_no_row_gets_longer():
    """A row made of the signs themselves is the worst there is: all of it would come to lie in one coordinate."""
    worst = Rotate().decode(np.eye(1, 256), None, Key.of("shared"))
    assert np.abs(turned(worst)).max() == pytest.approx(1.0)
    cut = turned(worst, norm_bound=1.0)
    assert np.abs(cut).max() == pytest.approx(6 / 16)
    assert np.linalg.norm(cut) < 1


def test_what_is_proved_of_coordinates_holds_for_clipped_rows():
    transforms = (Clip(norm=2.0), Rotate())
    block = support.block(np.random.default_rng(0).normal(size=(4, 5000)) * 10)
    sent, _, plan = support.encoded(transforms, block)
    limits = chain.limits(transforms, plan.settings)
    assert limits == Limits(pytest.approx(2.0, rel=1e-5), pytest.approx(12 / 64, rel=1e-5), 0.0)
    assert np.abs(sent.values).max() <= limits.value
    assert (np.linalg.norm(sent.values.astype(float), axis=1) <= limits.norm).all()


@pytest.mark.parametrize(("bits", "least_gain"), [(8, 100), (12, 100), (16, 100)])
def test_a_uniform_grid_of_few_bits_is_good_for_turned_rows_and_bad_for_others(bits, least_gain):
    """Each row is rounded to the grid that its proved largest value needs; errors are relative to squared norms."""
    rng, length = np.random.default_rng(0), 20_000
    rows = rng.normal(size=(8, length))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)

    def error(transforms):
        sent, _, plan = support.encoded(transforms, support.block(rows))
        step = 2 * chain.limits(transforms, plan.settings).value / 2**bits
        grid = np.floor(sent.values / step + rng.random(rows.shape)) * step
        return ((chain.decode(transforms, grid, plan) - rows) ** 2).sum(axis=1).mean()

    plain, spread = error((Clip(norm=1.1),)), error((Clip(norm=1.1), Rotate()))
    assert spread < 2.0 ** (-2 * bits) * 144 / 6 * length / 2**14 * 1.25
    assert plain > least_gain * spread


def test_signs_are_the_keys_and_half_are_negative():
    first, last = rotate._signs(Key.of(1), 100_000)
    assert len(first) == len(last) == 65_536
    for signs in (first, last):
        assert abs(signs.mean() * 256) < 0.02
    assert abs((first * last).mean()) * 65_536 < 0.02
    assert (turned(np.ones((1, 50)), "one") != turned(np.ones((1, 50)), "other")).any()
