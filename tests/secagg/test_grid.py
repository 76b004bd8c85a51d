"""Numbers as whole ones: bounds that hold, means that stay, sums that are exact."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hansa.core.chain import Limits
from hansa.core.errors import CheckError
from hansa.core.key import Key
from hansa.secagg.grid import exact_width, limbs_of, numbers_of, rounded, signed, step_of, width_of

UNIT = Limits(norm=1.0, value=1.0)


def unit_row(size, seed, norm=1.0):
    row = np.random.default_rng(seed).normal(size=size)
    return (row * norm / np.linalg.norm(row)).astype(np.float32)


@pytest.mark.parametrize("bits", [2, 4, 8, 16, 24])
@pytest.mark.parametrize("size", [1, 7, 5000, 40_000])
def test_a_rounded_row_is_no_longer_than_the_chain_proves(bits, size):
    for seed in range(3):
        row = unit_row(size, seed) * np.float32(1 - 1e-6)
        steps = rounded(row, UNIT, bits, Key.of(seed)).astype(float)
        assert np.linalg.norm(steps) * step_of(UNIT, bits) <= 1.0
        assert np.abs(steps).max() <= 2 ** (bits - 1)


def test_rounding_keeps_the_mean():
    row, count = unit_row(50, 1, norm=0.3), 4000
    step = step_of(UNIT, 6)
    mean = np.mean([rounded(row, UNIT, 6, Key.of(i)) for i in range(count)], axis=0) * step
    assert np.abs(mean - row).max() < 5 * step / 2 / math.sqrt(count)


def test_rows_that_lie_on_the_chains_own_grid_stay_as_they_are():
    levels = np.random.default_rng(0).integers(-900, 900, 1000)
    limits = Limits(norm=math.inf, value=1000 * 2.0**-9, step=2.0**-9)
    row = (levels * 2.0**-9).astype(np.float32)
    assert rounded(row, limits, 16, Key.of(0)).tolist() == levels.tolist()


def test_a_share_of_the_largest_weight_scales_a_row():
    row = unit_row(2000, 4)
    third = rounded(row, UNIT, 20, Key.of(0), 1 / 3) * step_of(UNIT, 20)
    np.testing.assert_allclose(third, row / 3, atol=1.01 * step_of(UNIT, 20))


def test_a_coordinate_beyond_the_bound_is_refused():
    with pytest.raises(CheckError, match="coordinates up to 1"):
        rounded(np.array([1.1]), UNIT, 16, Key.of(0))
    with pytest.raises(CheckError, match="coordinates up to 1"):
        rounded(np.array([np.nan]), UNIT, 16, Key.of(0))
    with pytest.raises(CheckError, match="Clip"):
        step_of(Limits(), 16)


@given(st.integers(2, 24), st.integers(1, 5000), st.floats(1e-6, 1e6))
def test_the_largest_sum_of_all_clients_fits_its_words(bits, clients, value):
    limits = Limits(norm=value, value=value)
    most = math.floor(value / step_of(limits, bits))
    assert 2 ** (bits - 2) <= most <= 2 ** (bits - 1)
    try:
        width = width_of(limits, bits, clients)
    except CheckError:
        assert 2 * most * clients >= 2**32
        return
    total = np.array([most * clients, -most * clients])
    assert signed((total % 2**32).astype(np.uint32), width).tolist() == total.tolist()


@given(st.lists(st.floats(-(2.0**54), 2.0**54, allow_subnormal=False), min_size=1, max_size=40))
def test_exact_sums_are_right_to_the_last_digit(numbers):
    limbs = sum(limbs_of(np.array([number])) for number in numbers)
    from fractions import Fraction

    exact = sum(Fraction(round(Fraction(number) * 2**40), 2**40) for number in numbers)
    assert numbers_of(limbs)[0] == float(exact)
    assert np.abs(limbs).max() < 2 ** (exact_width(len(numbers)) - 1)


def test_numbers_too_large_for_exact_sums_are_refused():
    for number in (2.0**55, np.inf, np.nan):
        with pytest.raises(CheckError, match=r"below 2\*\*55"):
            limbs_of(np.array([number]))
