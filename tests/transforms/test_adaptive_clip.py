import math

import numpy as np
import pytest

import support
from hansa.aggregators.mean import Mean
from hansa.core.chain import norm_bound
from hansa.core.errors import InputError
from hansa.core.key import Key
from hansa.core.protocols import Aggregate
from hansa.training.simulate import simulate
from hansa.transforms.adaptive_clip import AdaptiveClip
from hansa.transforms.noise import GaussianNoise

CLIP = AdaptiveClip(start=2.0)


def counted(share, norm=2.0, clip=CLIP):
    """The next norm where ``share`` of the updates were short enough."""
    tail = {"clip.below": (share - 0.5) * clip.count_scale * norm}
    return clip.release(Aggregate(np.zeros(3), tail), norm, 1.0, Key.of(0))


@pytest.mark.parametrize(("share", "factor"), [(1.0, math.exp(-0.1)), (0.5, 1.0), (0.0, math.exp(0.1))])
def test_the_norm_steps_towards_the_quantile(share, factor):
    mean, norm = counted(share)
    assert norm == pytest.approx(2.0 * factor)
    assert dict(mean.tail) == {}


def test_each_client_says_whether_it_was_short_enough_and_is_clipped():
    block = support.block([[3.0, 0.0], [0.0, 1.0], [2.0, 0.0]])
    sent, _, plan = support.encoded((CLIP,), block)
    assert sent.values[[0, 2]] == pytest.approx(np.array([[2.0, 0.0], [2.0, 0.0]]), rel=1e-5)
    assert sent.values[1].tolist() == [0.0, 1.0]
    assert sent.tail["clip.below"].tolist() == [-0.2, 0.2, 0.2]
    bound = norm_bound((CLIP,), plan.settings)
    whole = np.column_stack([sent.values, sent.tail["clip.below"]])
    assert (np.linalg.norm(whole, axis=1) <= bound).all()
    assert bound == pytest.approx(math.hypot(2.0, 0.2))


@pytest.mark.parametrize(("noise_multiplier", "num_clients", "published"), [(1.0, 100, 1.005038)])
def test_updates_get_the_noise_that_the_paper_gives_them(noise_multiplier, num_clients, published):
    """Theorem 1: z_delta = (z**-2 - (2 sigma_b)**-2)**-0.5 for count noise sigma_b, here a twentieth of the clients."""
    count_noise = num_clients / 20
    scale = noise_multiplier / math.sqrt(count_noise**2 - noise_multiplier**2 / 4)
    clip = AdaptiveClip(start=1.0, count_scale=scale)
    deviation = noise_multiplier * norm_bound((clip,), (1.0,))
    assert deviation == pytest.approx(published, abs=1e-6)
    assert deviation / scale == pytest.approx(count_noise)
    assert scale == pytest.approx(CLIP.count_scale, rel=0.01)


@pytest.mark.parametrize("start", [1e-3, 30.0])
def test_the_norm_finds_the_median_of_the_updates_from_far_away(start):
    clip = AdaptiveClip(start=start, learning_rate=0.5)
    norm, rng = clip.init(10), np.random.default_rng(0)
    for number in range(100):
        block = support.block(rng.normal(size=(200, 25)) * 0.3)
        updates, _ = clip.encode(block, norm, None, None)
        deviation = 1.0 * norm_bound((clip,), (norm,)) / 200
        noisy = float(updates.tail["clip.below"].mean()) + deviation * rng.normal()
        _, norm = clip.release(Aggregate(np.zeros(25), {"clip.below": noisy}), norm, 1.0, Key.of(number))
    assert norm == pytest.approx(0.3 * 5, rel=0.1)  # the median of |N(0, 0.09 I_25)| is about 1.48


def test_a_run_with_adaptive_clipping_costs_what_the_noise_alone_costs():
    federation = support.linear(
        transforms=(AdaptiveClip(start=0.5), GaussianNoise(epsilon=8.0, delta=1e-5)),
        aggregator=Mean(weighting="clients"),
    )
    run = simulate(federation, support.regression(), num_rounds=5)
    assert run.history[-1].epsilon == pytest.approx(8.0, rel=1e-4)
    assert np.isfinite(run.parameters).all()


def test_a_count_that_noise_has_blown_up_moves_the_norm_by_a_finite_factor():
    _, norm = counted(1e9)
    assert 0 < norm < 2.0


@pytest.mark.parametrize(
    "options", [{"start": 0.0}, {"quantile": 1.0}, {"learning_rate": -1.0}, {"count_scale": math.nan}], ids=repr
)
def test_what_cannot_be_is_refused(options):
    with pytest.raises(InputError, match="expected"):
        AdaptiveClip(**options)


def test_another_tail_column_that_nobody_bounds_leaves_no_finite_sensitivity():
    class Counting(type(support.linear().algorithm)):
        def client_update(self, received, fit, memory):
            updates, new = super().client_update(received, fit, memory)
            return updates._replace(tail={"steps": np.ones(len(updates.clients))}), new

    federation = support.linear(
        algorithm=Counting(client_learning_rate=0.1),
        transforms=(AdaptiveClip(start=0.5), GaussianNoise(noise_multiplier=1.0)),
        aggregator=Mean(weighting="clients"),
    )
    with pytest.raises(InputError, match="needs a finite bound"):
        simulate(federation, support.regression(), num_rounds=1)
