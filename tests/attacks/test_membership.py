"""Members are told from others by their losses as well as any threshold does, and no better than chance by none."""

import numpy as np
import pytest

from hansa.attacks.membership import membership
from hansa.core.errors import InputError


def test_the_area_is_that_of_all_pairs():
    draw = np.random.default_rng(0)
    members, others = draw.integers(0, 9, 60), draw.integers(3, 12, 40)
    pairs = [(m < o) + 0.5 * (m == o) for m in members for o in others]
    assert membership(members, others).auc == pytest.approx(np.mean(pairs))


def test_losses_that_say_everything_and_nothing():
    assert membership([0.0, 0.1], [0.2, np.nan]).auc == 1.0
    assert membership([0.0, 0.1], [0.2, 0.3]).found_at_1 == 1.0
    same = membership(np.ones(10), np.ones(10))
    assert (same.auc, same.found_at_1) == (0.5, 0.0)


def test_no_rows_are_refused():
    with pytest.raises(InputError, match="found 2 and 0"):
        membership([0.1, 0.2], [])
