from unittest import mock

import numpy as np
import pytest

import support
from hansa import long_vectors
from hansa.core.chain import Raw
from hansa.core.errors import InputError
from hansa.long_vectors import Later, columns_of
from hansa.transforms.quantize import Levels, Quantize


def rounded(rows, bits=8):
    return support.encoded((Quantize(bits=bits),), support.block(rows))[0]


@pytest.mark.parametrize("bits", range(2, 17))
def test_each_value_moves_by_less_than_a_step_on_a_grid_of_its_row(bits):
    rows = np.random.default_rng(0).normal(size=(3, 500)).astype(np.float32)
    sent, levels = rounded(rows, bits), 2 ** (bits - 1) - 1
    step = sent.side["quantize_step"][:, None].astype(np.float64)
    np.testing.assert_allclose(step[:, 0], np.abs(rows).max(axis=1) / levels, rtol=1e-6)
    assert (np.abs(sent.values - rows) < step * 1.01).all()
    level = sent.values / step
    np.testing.assert_allclose(level, np.rint(level), atol=1e-3)
    assert np.abs(np.rint(level)).max() <= levels


def test_values_on_the_grid_stay():
    rows = np.array([[-127, -3, 0, 1, 64, 127]], np.float32)
    assert rounded(rows).values.tolist() == rows.tolist()


@pytest.mark.parametrize("value", [1.0, -0.37, 1e30, -1e-30])
def test_one_value_stays_to_within_rounding(value):
    np.testing.assert_allclose(rounded([[value]], 5).values, [[value]], rtol=2e-7)


@pytest.mark.parametrize("row", [[0.0, 0.0], [1e-42, -3e-43]])
def test_a_row_without_a_step_becomes_zero(row):
    assert rounded([row]).values.tolist() == [[0, 0]]


@pytest.mark.parametrize("bits", [2, 3, 5, 8, 11, 16])
def test_levels_take_their_bits_and_no_more(bits):
    sent = rounded(np.random.default_rng(0).normal(size=(1, 1001)), bits)
    packed = Quantize(bits=bits).codec(Raw()).pack(sent)
    assert packed["levels"].nbytes == -(-1001 * bits // 8)
    assert packed["step"].nbytes == 4


@pytest.mark.parametrize("bits", [1, 17, 8.0, "8"])
def test_bits_that_cannot_be_are_refused(bits):
    with pytest.raises(InputError, match=r"Quantize\(bits=\): expected a whole number from 2 to 16"):
        Quantize(bits=bits)


@pytest.mark.parametrize("bits", range(2, 17))
def test_some_columns_of_long_rows_are_unpacked_to_the_same_bits(bits):
    sent = rounded(np.random.default_rng(0).normal(size=(2, 301)).astype(np.float32), bits)
    packed, codec = Levels(bits=bits).pack(sent), Levels(bits=bits)
    whole, side = codec.unpack(packed, 301)
    with mock.patch.object(long_vectors, "LONG", 1):
        later, same = codec.unpack(packed, 301)
    assert isinstance(later, Later)
    assert (later.shape, later.dtype, same["quantize_step"].tobytes()) == (
        whole.shape, whole.dtype, side["quantize_step"].tobytes()
    )  # fmt: skip
    for first, stop in ((0, 301), (0, 1), (3, 3), (7, 64), (130, 301), (299, 300)):
        assert columns_of(later, first, stop).tobytes() == whole[:, first:stop].tobytes()
    with mock.patch.object(long_vectors, "LONG", 1), pytest.raises(ValueError, match="bytes a row of levels"):
        codec.unpack({**packed, "levels": packed["levels"][:, 1:]}, 301)
