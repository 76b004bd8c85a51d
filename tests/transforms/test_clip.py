import numpy as np
import pytest

import support
from hansa.core.errors import InputError
from hansa.transforms.clip import Clip, row_norms


def clipped(rows, norm=1.0):
    block = support.block(rows)
    return support.encoded((Clip(norm=norm),), block)[0].values


def test_a_long_update_is_scaled_to_the_norm_in_its_own_direction():
    np.testing.assert_allclose(clipped([[3.0, 4.0], [-30.0, 40.0]]), [[0.6, 0.8], [-0.6, 0.8]], rtol=5e-6)


def test_clip_leaves_short_updates_alone_bit_for_bit():
    rows = np.array([[0.1, 0.2, 0.3], [1 / 3, 0, 0], [0, 0, 0], [1, 0, 0], [3, 4, 0]], np.float32)
    assert clipped(rows)[:4].tobytes() == rows[:4].tobytes()


def test_an_update_whose_square_overflows_is_clipped_all_the_same():
    np.testing.assert_allclose(row_norms(clipped([[3e30, 4e30], [3e38, 0]])), 1.0, rtol=1e-5)


@pytest.mark.parametrize("norm", [0, -1.0, float("inf"), float("nan")])
def test_a_norm_that_cannot_be_is_refused(norm):
    with pytest.raises(InputError, match=r"Clip\(norm=\): expected a positive number"):
        Clip(norm=norm)
