import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

import support
from hansa.core import chain
from hansa.core.errors import CheckError, InputError
from hansa.core.key import Key
from hansa.core.protocols import Memory, Plan
from hansa.transforms import distributed_noise
from hansa.transforms.clip import Clip
from hansa.transforms.distributed_noise import SkellamNoise
from hansa.transforms.rotate import Rotate

KEYS = [Key.of("own").child(i) for i in range(40)]
SHARED = SkellamNoise(noise_multiplier=2.0, num_noising=10)


def sent(transforms, block, keys=KEYS, plan_key="plan"):
    settings = tuple(t.settings(t.init(block.values.shape[1])) for t in transforms)
    plan = Plan(support.SLOT, True, {}, settings, Key.of(plan_key))
    secret = keys[: len(block.clients)]
    found = chain.encode(transforms, block, plan, Memory([{}] * len(block.clients)), secret)[0]
    return found, chain.limits(transforms, settings)


@pytest.mark.parametrize("bits", [14, 16])
def test_the_sum_of_the_fewest_clients_has_the_noise_that_is_accounted(bits):
    noise = SkellamNoise(noise_multiplier=2.0, num_noising=10, bits=bits)
    block = support.block(np.zeros((10, 20_000)))
    found, limits = sent((Clip(norm=0.5), noise), block)
    total = found.values.astype(np.float64).sum(axis=0)
    variance = (2.0 * 0.5 / limits.step) ** 2
    at = np.sort(total / limits.step)
    chances = stats.norm.cdf((at + 0.5) / math.sqrt(variance))  # its third moment is 0, and its fourth near normal's
    assert np.abs(chances - np.arange(1, 20_001) / 20_000).max() < 1.95 / math.sqrt(20_000) + 0.4 / math.sqrt(variance)
    assert total.var() == pytest.approx(1.0, rel=0.05)


def test_fewer_clients_have_less_and_more_have_more():
    for count in (5, 40):
        found, _ = sent((Clip(norm=1.0), SHARED), support.block(np.zeros((count, 10_000))))
        assert found.values.sum(axis=0).var() == pytest.approx(4.0 * count / 10, rel=0.06)


@pytest.mark.parametrize(
    "before", [(Clip(norm=0.7),), (Clip(norm=0.7), Rotate()), (Clip(norm=3e-9),), (Clip(norm=2e7),)]
)
def test_values_lie_on_the_grid_and_within_the_limit_and_in_the_bits(before):
    for bits in (10, 16, 18):
        noise = SkellamNoise(noise_multiplier=1.0, num_noising=100, bits=bits)
        rows = np.random.default_rng(0).normal(size=(3, 200)) * 1e6
        found, limits = sent((*before, noise), support.block(rows))
        level = found.values.astype(np.float64) / limits.step
        assert (level == np.rint(level)).all()
        assert np.abs(found.values).max() <= limits.value
        assert limits.value / limits.step < 2 ** (bits - 1)
        assert math.log2(limits.step) % 1 == 0


def test_a_rotation_before_it_makes_the_grid_finer():
    noise = SkellamNoise(noise_multiplier=1.0, num_noising=100_000)
    block = support.block(np.ones((1, 10_000)))
    steps = [sent((*before, noise), block)[1].step for before in ((Clip(norm=1.0),), (Clip(norm=1.0), Rotate()))]
    assert steps[1] <= steps[0] / 8


@given(seed=st.integers(0, 50), size=st.integers(1, 400), scale=st.sampled_from([0.1, 0.99, 1.0]))
def test_no_row_is_longer_than_the_norm_bound_after_rounding(seed, size, scale):
    norm = 40.0 + 3 * math.sqrt(size)
    row = np.random.default_rng(seed).normal(size=size)
    row *= scale * norm / np.linalg.norm(row)
    room = SHARED._room(norm, size)
    found = distributed_noise._rounded(row, room, norm, Key.of(seed))
    assert (found == np.rint(found)).all()
    assert np.linalg.norm(found) <= norm
    shrunk = row * min(1.0, room / np.linalg.norm(row))
    assert np.abs(found - shrunk).max() < 1


def test_rounding_is_right_on_average_and_seldom_towards_zero():
    size, norm = 300, 60.0
    row = np.random.default_rng(0).normal(size=size)
    row *= norm / np.linalg.norm(row)
    room = SHARED._room(norm, size)
    found = np.array([distributed_noise._rounded(row, room, norm, Key.of(i)) for i in range(4000)])
    shrunk = row * (room / norm)
    assert 0.7 < room / norm < 1
    assert np.abs(found.mean(axis=0) - shrunk).max() < 5 * 0.5 / math.sqrt(4000)
    towards_zero = (found == np.trunc(shrunk)).all(axis=1)
    assert towards_zero.mean() < 1 / 1000


def test_a_row_too_long_by_chance_is_rounded_towards_zero(monkeypatch):
    monkeypatch.setattr(distributed_noise, "secure_uniform", lambda _key, count: np.full(count, 1 - 2.0**-53))
    row = np.full(100, 1.5)
    assert distributed_noise._rounded(row, 15.0, 15.1, Key.of(0)).tolist() == [1.0] * 100


def test_what_is_added_does_not_depend_on_the_row():
    rows = np.random.default_rng(0).normal(size=(2, 500))
    noise = SkellamNoise(noise_multiplier=1.0, num_noising=4)
    with_zeros = sent((Clip(norm=1.0), noise), support.block(np.zeros((2, 500))))[0].values.astype(np.float64)
    with_rows, limits = sent((Clip(norm=1.0), noise), support.block(rows))
    clipped = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    assert np.abs(with_rows.values - with_zeros - clipped).max() < 1.25 * limits.step


def test_a_block_of_clients_is_its_clients_one_by_one_bit_for_bit():
    rows = np.random.default_rng(0).normal(size=(4, 33))
    whole = sent((Clip(norm=1.0), SHARED), support.block(rows))[0]
    for i in range(4):
        one = sent((Clip(norm=1.0), SHARED), support.block(rows[[i]], clients=[f"c{i}"]), KEYS[i:])[0]
        assert one.values.tobytes() == whole.values[[i]].tobytes()


def test_noise_and_rounding_come_from_the_clients_secret_and_not_from_what_the_server_knows():
    block = support.block(np.full((1, 99), 0.01))
    first = sent((Clip(norm=1.0), SHARED), block)[0]
    assert sent((Clip(norm=1.0), SHARED), block, plan_key="another")[0].values.tobytes() == first.values.tobytes()
    assert (sent((Clip(norm=1.0), SHARED), block, KEYS[1:])[0].values != first.values).any()


def test_rows_weigh_the_same_and_those_that_are_not_finite_stay_so():
    block = support.block([[1.0, math.nan], [math.inf, 1.0], [1.0, 2.0]], weights=[3, 4, 5])
    with np.errstate(invalid="ignore"):
        found = sent((Clip(norm=1.0), SHARED), block)[0]
    assert found.weights.tolist() == [1, 1, 1]
    assert np.isfinite(found.values).all(axis=1).tolist() == [False, False, True]


def test_the_event_claims_no_finer_grid_than_any_row_has():
    for norm in (1.0, 0.7, 1.99, 3e-5):
        for noise in (SHARED, SkellamNoise(noise_multiplier=30.0, num_noising=3, bits=18)):
            _, limits = sent((Clip(norm=norm), noise), support.block(np.zeros((1, 4))))
            event = noise.event(0, 10)
            assert event.norm_steps <= norm / limits.step < 2 * event.norm_steps
            assert event.noise_multiplier == noise.noise_multiplier


@pytest.mark.parametrize(
    ("transforms", "size", "words"),
    [
        ((SHARED,), 4, "needs a bound on one client's update"),
        ((Clip(norm=1.0), SkellamNoise(noise_multiplier=1.0)), 4, "sized by a schedule and by SecureMean"),
        ((Clip(norm=1.0), SkellamNoise(epsilon=1.0, delta=1e-6, num_noising=3)), 4, "sized by a schedule"),
        ((Clip(norm=1.0), SkellamNoise(noise_multiplier=50.0, num_noising=2, bits=8)), 4, "no room for noise"),
        ((Clip(norm=1.0), SkellamNoise(noise_multiplier=1.0, num_noising=100, bits=8)), 50_000, "too coarse"),
    ],
)
def test_what_cannot_be_is_refused_at_the_client(transforms, size, words):
    with pytest.raises(CheckError, match=words):
        sent(transforms, support.block(np.zeros((1, size))))


def test_columns_beside_the_update_are_refused():
    with pytest.raises(CheckError, match="SkellamNoise covers the update alone, and loss"):
        sent((Clip(norm=1.0), SHARED), support.block(np.zeros((1, 3)), loss=[0.5]))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"noise_multiplier": 0.0},
        {"noise_multiplier": 1.0, "bits": 7},
        {"noise_multiplier": 1.0, "num_noising": 0},
        {"epsilon": 1.0},
    ],
)
def test_options_that_cannot_be_are_refused(options):
    with pytest.raises(InputError, match="SkellamNoise"):
        SkellamNoise(**options)
