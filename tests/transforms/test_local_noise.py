import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import stats

import support
from hansa.core import chain
from hansa.core.errors import CheckError, InputError
from hansa.core.key import Key
from hansa.core.protocols import Draws, Memory, Plan
from hansa.privacy.noise import laplaced, scale_of, secure_laplace, secure_uniform
from hansa.transforms.adaptive_clip import AdaptiveClip
from hansa.transforms.clip import Clip
from hansa.transforms.local_noise import LocalGaussianNoise, LocalLaplaceNoise
from hansa.transforms.quantize import Quantize
from hansa.transforms.sparsify import TopK

GAUSSIAN, LAPLACE = LocalGaussianNoise(noise_multiplier=2.0), LocalLaplaceNoise(norm=0.5, noise_multiplier=2.0)
KEYS = [Key.of("own").child(i) for i in range(5)]


def sent(transforms, block, keys=KEYS, plan_key="plan"):
    settings = tuple(t.settings(t.init(block.values.shape[1])) for t in transforms)
    plan = Plan(support.SLOT, True, {}, settings, Key.of(plan_key))
    secret = keys[: len(block.clients)]
    return chain.encode(transforms, block, plan, Memory([{}] * len(block.clients)), secret)[0]


@pytest.mark.parametrize(
    ("transforms", "law", "scale"),
    [((Clip(norm=0.5), GAUSSIAN), "norm", 1.0), ((LAPLACE,), "laplace", 1.0)],
    ids=["gaussian", "laplace"],
)
def test_noise_is_of_the_stated_law_and_of_multiplier_times_bound(transforms, law, scale):
    found = sent(transforms, support.block(np.zeros((1, 20_000)))).values[0]
    assert stats.kstest(found / scale, law).pvalue > 1e-3
    assert abs(np.corrcoef(found[:-1], found[1:])[0, 1]) < 0.03


def test_noise_is_added_to_the_clipped_update():
    rows = np.array([[3.0, 4.0, 0.0], [0.1, 0.0, 0.2]])
    for transforms, clipped in (
        ((Clip(norm=0.5), GAUSSIAN), [[0.3, 0.4, 0.0], [0.1, 0.0, 0.2]]),
        ((LAPLACE,), [[1.5 / 7, 2 / 7, 0.0], [0.1, 0.0, 0.2]]),
    ):
        bare = sent(transforms, support.block(np.zeros((2, 3)))).values
        np.testing.assert_allclose(sent(transforms, support.block(rows)).values - bare, clipped, atol=3e-6)


finite = st.floats(-(2.0**60), 2.0**60, width=32)


@pytest.mark.parametrize(("transforms", "order"), [((Clip(norm=0.5), GAUSSIAN), 2), ((LAPLACE,), 1)], ids=["2", "1"])
@given(pair=hnp.arrays(np.float32, (2, 6), elements=finite))
def test_any_two_updates_are_twice_the_bound_apart_at_most(transforms, order, pair):
    """With equal noise, what is left is the difference of what the noise has to hide."""
    one, other = (sent(transforms, support.block(row[None]), KEYS[:1]).values.astype(float) for row in pair)
    assert np.linalg.norm(one[0] - other[0], order) <= 2 * 0.5 * (1 + 1e-5) + 1e-6


@pytest.mark.parametrize("transforms", [(Clip(norm=0.5), GAUSSIAN), (LAPLACE,)], ids=["gaussian", "laplace"])
def test_a_block_of_clients_is_its_clients_one_by_one_bit_for_bit(transforms):
    rows = np.random.default_rng(0).normal(size=(4, 33))
    whole = sent(transforms, support.block(rows))
    for i in range(4):
        one = sent(transforms, support.block(rows[[i]], clients=[f"c{i}"]), KEYS[i:])
        assert one.values.tobytes() == whole.values[[i]].tobytes()


@pytest.mark.parametrize("transforms", [(Clip(norm=0.5), GAUSSIAN), (LAPLACE,)], ids=["gaussian", "laplace"])
def test_noise_comes_from_the_clients_secret_and_not_from_what_the_server_knows(transforms):
    block = support.block(np.zeros((1, 9)))
    first = sent(transforms, block)
    assert sent(transforms, block, plan_key="another").values.tobytes() == first.values.tobytes()
    assert (sent(transforms, block, KEYS[1:]).values != first.values).all()


@pytest.mark.parametrize("transforms", [(Clip(norm=0.5), GAUSSIAN), (LAPLACE,)], ids=["gaussian", "laplace"])
def test_the_number_of_examples_does_not_leave(transforms):
    assert sent(transforms, support.block(np.ones((2, 3)), weights=[7.0, 120.0])).weights.tolist() == [1.0, 1.0]


def test_what_comes_after_works_on_noisy_values():
    block = support.block(np.zeros((1, 50)))
    noisy = sent((Clip(norm=0.5), GAUSSIAN), block).values
    after = sent((Clip(norm=0.5), GAUSSIAN, TopK(fraction=0.1, error_feedback=False)), block).values
    kept = after != 0
    assert kept.sum() == 5
    assert (after[kept] == noisy[kept]).all()


# --------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("transforms", "says"),
    [
        ((GAUSSIAN,), "needs a bound on one client's update"),
        ((Clip(norm=1.0), TopK(fraction=0.5), GAUSSIAN), "needs a bound on one client's update"),
        ((AdaptiveClip(), GAUSSIAN), "clip.below would leave beside it"),
        ((Clip(norm=1.0), Quantize(bits=8), GAUSSIAN), "would leave beside it"),
        ((AdaptiveClip(), LAPLACE), "clip.below would leave beside it"),
        ((Clip(norm=1.0), LocalGaussianNoise(epsilon=1.0, delta=1e-5)), "needs a schedule"),
        ((LocalLaplaceNoise(norm=1.0, epsilon=1.0),), "needs a schedule"),
    ],
)
def test_what_the_noise_would_not_cover_is_refused_at_the_client(transforms, says):
    with pytest.raises(CheckError, match=says):
        sent(transforms, support.block(np.ones((1, 9))))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: LocalGaussianNoise(), "found neither"),
        (lambda: LocalGaussianNoise(epsilon=1.0), "found no delta"),
        (lambda: LocalGaussianNoise(epsilon=1.0, delta=1e-5, noise_multiplier=1.0), "found both"),
        (lambda: LocalGaussianNoise(noise_multiplier=-1.0), r"noise_multiplier=\): expected above 0"),
        (lambda: LocalGaussianNoise(noise_multiplier=1.0, delta=0.0), r"delta=\): expected between 0 and 1"),
        (lambda: LocalLaplaceNoise(norm=0.0, epsilon=1.0), r"norm=\): expected a positive number"),
        (lambda: LocalLaplaceNoise(norm=1.0, epsilon=math.inf), r"epsilon=\): expected above 0"),
        (lambda: LocalLaplaceNoise(norm=1.0, epsilon=1.0, delta=1.0), r"delta=\): expected between 0 and 1"),
        (lambda: scale_of(20.0, 1.0, 10**8), "use LocalGaussianNoise for vectors this long"),
    ],
)
def test_options_that_cannot_be_are_refused(make, says):
    with pytest.raises(InputError, match=says):
        make()


# --------------------------------------------------------------------------------------------------- draws on a grid


def test_secure_numbers_are_uniform_or_laplace_and_lie_on_their_grid():
    assert stats.kstest(secure_uniform(KEYS[0], 20_000), "uniform").pvalue > 1e-3
    found = secure_laplace(KEYS[0], 20_000)
    assert stats.kstest(found, "laplace").pvalue > 1e-3
    steps = found * 2.0**30
    assert (steps == np.rint(steps)).all()
    odd = steps.astype(np.int64) % 2
    assert abs(odd.mean() - 0.5) < 0.02  # the last digit, too, is a coin


def test_every_sum_lies_on_the_grid_of_its_noise_whatever_the_value():
    noise = secure_laplace(KEYS[0], 1000)
    for value in (0.0, 0.1, -1 / 3, 1e-9):
        found = laplaced(np.full(1000, value), noise, 0.5) / (0.5 * 2.0**-30)
        assert (found == np.rint(found)).all()
        assert np.abs(found * 0.5 * 2.0**-30 - value - 0.5 * noise).max() <= 0.5 * 2.0**-31 + 1e-15


def test_the_scale_covers_rounding_and_the_bound_that_the_chain_proves():
    bound = Draws(KEYS[0], KEYS[:1], KEYS[:1], norm_bound=3.0)
    noisy, _ = GAUSSIAN.encode(support.block(np.zeros((1, 20_000))), None, Memory([{}]), bound)
    assert noisy.values.std() == pytest.approx(6.0, rel=0.03)
    assert scale_of(2.0, 0.5, 1000) > 1.0
