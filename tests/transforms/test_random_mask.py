import math

import numpy as np
import pytest

import support
from hansa.aggregators.secure_mean import SecureMean
from hansa.core import chain
from hansa.core.chain import Limits
from hansa.core.errors import CheckError, InputError
from hansa.core.key import Key
from hansa.core.protocols import Draws, Slot
from hansa.secagg.grid import width_of
from hansa.training.check import leaves, problems
from hansa.training.schedule import Schedule
from hansa.training.simulate import simulate
from hansa.transforms.clip import Clip
from hansa.transforms.random_mask import RandomMask, _chosen
from hansa.transforms.rotate import Rotate


def test_rows_are_right_on_average_over_rounds():
    row, mask = np.array([[1.0, -2.0, 0.5, 4.0, 0.0]], np.float32), RandomMask(fraction=0.4)
    found = np.zeros(5)
    for number in range(3000):
        sent, _ = mask.encode(support.block(row), 5, None, Draws(Key.of(number), [], []))
        assert sent.values.shape == (1, 2)
        found += mask.decode(sent.values, 5, Key.of(number))[0]
    np.testing.assert_allclose(found / 3000, row[0], atol=5 * 4 * math.sqrt(1.5 / 3000))


def test_places_are_distinct_rising_and_equally_likely():
    count = np.zeros(50)
    for key in range(2000):
        places = _chosen(Key.of(key), 50, 10)
        assert (np.diff(places) > 0).all()
        count[places] += 1
    assert ((count - 400) ** 2 / 400 / 0.8).sum() < 49 + 5 * math.sqrt(98)


def test_what_is_proved_of_short_rows_is_true_of_them():
    transforms = (Clip(norm=2.0), RandomMask(fraction=0.3))
    sent, _, plan = support.encoded(transforms, support.block(np.eye(20, 20) * 9))
    limits = chain.limits(transforms, plan.settings)
    assert limits == Limits(pytest.approx(2 * 20 / 6, rel=1e-5), pytest.approx(2 * 20 / 6, rel=1e-5), 0.0)
    norms = np.linalg.norm(sent.values.astype(float), axis=1)
    assert limits.norm * 0.999 < norms.max() <= limits.norm


@pytest.mark.parametrize("after", [Rotate(), RandomMask(fraction=0.5)], ids=repr)
def test_what_needs_whole_rows_is_refused_after_it(after):
    with pytest.raises(CheckError, match="expected rows of 40 numbers, found 20"):
        support.encoded((RandomMask(fraction=0.5), after), support.block(np.ones((1, 40))))


def test_a_secure_sum_is_of_the_chosen_numbers_and_the_model_learns():
    """4 parameters, of which 2 travel; in a federation, over its wire, and through a run."""
    federation = support.linear(
        transforms=(Clip(norm=5.0), Rotate(), RandomMask(fraction=0.5)), aggregator=SecureMean(min_survivors=3)
    )
    assert (federation.update_size(), federation.sent_size(), federation.size_of(Slot(0, 0, "masked"))) == (4, 2, 2)
    assert problems(federation, Schedule(num_rounds=3), 8) == []
    whole = support.linear(transforms=federation.transforms[:2], aggregator=SecureMean(min_survivors=3))
    widths = [
        width_of(chain.limits(one.transforms, [t.settings(t.init(4)) for t in one.transforms]), 16, 100)
        for one in (whole, federation)
    ]
    fewer = -(-4 * widths[0] // 8) - -(-2 * widths[1] // 8)  # bytes of words under masks
    assert leaves(whole, 0.0)[0]["bytes"] - leaves(federation, 0.0)[0]["bytes"] == fewer > 0
    people = support.regression([9] * 8)
    found = simulate(federation, people, num_rounds=60, seed=0)
    assert found.evaluate(people.load(people.ids[0])[0])["r2"] > 0.9


@pytest.mark.parametrize("fraction", [0.0, -0.1, 1.1])
def test_fractions_that_cannot_be_are_refused(fraction):
    with pytest.raises(InputError, match="RandomMask"):
        RandomMask(fraction=fraction)
