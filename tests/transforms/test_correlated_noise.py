import math

import numpy as np
import pytest
from scipy import stats

from hansa.core.errors import CheckError, InputError, RunError
from hansa.core.key import Key
from hansa.core.protocols import Aggregate
from hansa.privacy.blt import BLT
from hansa.privacy.noise import secure_normal
from hansa.privacy.strategies import Banded, Tree
from hansa.transforms.adaptive_clip import AdaptiveClip
from hansa.transforms.correlated_noise import CorrelatedNoise
from hansa.wire import pack, unpack

STRATEGIES = [Tree(), Banded(), BLT()]
every_strategy = pytest.mark.parametrize("strategy", STRATEGIES, ids=repr)


def planned(strategy=None, noise_multiplier=2.0, num_rounds=16, min_separation=4):
    noise = CorrelatedNoise(strategy=strategy or BLT(), noise_multiplier=noise_multiplier)
    return noise.planned_for(num_rounds, min_separation)


def rounds(noise, values, sensitivities, state=None, **tail):
    """The values and tails that are released of the same mean in every round."""
    state, found = noise.init(len(values)) if state is None else state, []
    for number, sensitivity in enumerate(sensitivities):
        mean = Aggregate(np.array(values, dtype=float), tail)
        mean, state = noise.release(mean, state, sensitivity, Key.of(f"round {number}"))
        found.append(np.concatenate([mean.values, [mean.tail[name] for name in sorted(tail)]]))
    return np.array(found), state


def encoder(noise):
    mechanism = noise.mechanism
    return np.stack([mechanism.strategy.applied(row) for row in np.eye(mechanism.num_rounds)], axis=1)


@every_strategy
def test_the_encoder_gives_back_normal_noise_of_multiplier_times_what_a_client_can_change(strategy):
    noise = planned(strategy)
    released, _ = rounds(noise, np.zeros(2000), [0.5] * 16)
    fresh = encoder(noise) @ released / (2.0 * noise.mechanism.sensitivity * 0.5)
    assert stats.kstest(fresh.ravel(), "norm").pvalue > 1e-3
    expected = [secure_normal(Key.of(f"round {t}"), 2000) for t in range(16)]
    np.testing.assert_allclose(fresh, expected, atol=1e-5)


@every_strategy
def test_a_bound_that_changes_from_round_to_round_scales_each_rounds_noise_alone(strategy):
    noise, bounds = planned(strategy), [0.5 * 1.1**t for t in range(16)]
    equal, _ = rounds(noise, np.zeros(5), [1.0] * 16)
    changing, _ = rounds(noise, np.zeros(5), bounds)
    np.testing.assert_allclose(changing, equal * np.array(bounds)[:, None], rtol=1e-6, atol=1e-7)


def test_values_and_tail_columns_are_noised_alike_whatever_the_tails_order():
    noise = planned()
    whole, _ = rounds(noise, [1.0, 2.0, 3.0, 4.0], [1.0] * 5)
    parted, _ = rounds(noise, [1.0, 2.0], [1.0] * 5, b=4.0, a=3.0)
    np.testing.assert_array_equal(whole, parted)


def test_the_norm_adapts_to_a_count_with_its_own_share_of_the_noise():
    clip, noise = AdaptiveClip(start=1.0), planned(noise_multiplier=1e-6)
    state, norm = noise.init(3), 1.0
    for number in range(4):
        mean = Aggregate(np.zeros(3), {"clip.below": 0.5 * clip.count_scale * norm})  # all were short enough
        mean, state = noise.release(mean, state, 0.1 * norm, Key.of(number))
        _, norm = clip.release(mean, norm, 0.1, Key.of(0))
    assert norm == pytest.approx(math.exp(-4 * 0.2 * 0.5), rel=1e-3)


@every_strategy
def test_a_state_that_was_saved_goes_on_to_the_same_bits(strategy):
    noise = planned(strategy)
    whole, _ = rounds(noise, [1.0, 2.0], [1.0] * 8)
    _, state = rounds(noise, [1.0, 2.0], [1.0] * 5)
    resumed = unpack(pack({"state": state}))["state"]
    for number in (5, 6, 7):
        mean, resumed = noise.release(Aggregate(np.array([1.0, 2.0]), {}), resumed, 1.0, Key.of(f"round {number}"))
        assert mean.values.tobytes() == whole[number].tobytes()


def test_an_attempt_that_is_repeated_gets_other_noise_of_the_same_state():
    noise = planned()
    _, state = rounds(noise, [0.0], [1.0] * 3)
    first, again = (noise.release(Aggregate(np.zeros(1), {}), state, 1.0, Key.of(i))[0].values for i in range(2))
    assert first != again


def test_the_sum_of_many_rounds_has_less_noise_than_independent_noise_at_the_same_epsilon():
    spread = {}
    for name, strategy in (("blt", BLT()), ("tree", Tree()), ("independent", Banded(width=1))):
        released, _ = rounds(planned(strategy, 1.0, 128, 32), np.zeros(500), [1.0] * 128)
        spread[name] = math.sqrt(np.square(released.cumsum(axis=0)).mean())
    assert spread["blt"] < 0.35 * spread["independent"]
    assert spread["blt"] < 0.6 * spread["tree"]


def test_a_mean_with_other_columns_than_the_first_is_refused():
    noise = planned()
    _, state = rounds(noise, [0.0], [1.0], a=1.0)
    with pytest.raises(RunError, match="expected 2 numbers in every round"):
        noise.release(Aggregate(np.zeros(1), {}), state, 1.0, Key.of(1))


@pytest.mark.parametrize(
    ("noise", "sensitivity", "says"),
    [
        (planned(), math.inf, r"CorrelatedNoise needs a finite bound"),
        (CorrelatedNoise(noise_multiplier=1.0), 1.0, "needs a schedule to be planned for"),
        (CorrelatedNoise(epsilon=4.0, delta=1e-5), 1.0, "needs a schedule to be calibrated for"),
    ],
)
def test_what_cannot_be_sized_is_refused(noise, sensitivity, says):
    with pytest.raises(CheckError, match=says):
        noise.release(Aggregate(np.zeros(1), {}), noise.init(1), sensitivity, Key.of(0))


@pytest.mark.parametrize(
    "options", [{}, {"epsilon": 4.0}, {"noise_multiplier": -1.0}, {"epsilon": 1.0, "noise_multiplier": 1.0}]
)
def test_options_that_cannot_be_are_refused(options):
    with pytest.raises(InputError, match="CorrelatedNoise"):
        CorrelatedNoise(**options)
