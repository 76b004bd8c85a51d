"""The audit's statistics, and the audit itself: it stays under correct claims and breaks broken ones, over 20 seeds."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import hansa
from hansa.core.errors import InputError
from hansa.privacy import gaussian
from hansa.privacy.audit import (
    normal_epsilon,
    one_run_bound,
    one_run_epsilon,
    one_run_p_value,
    one_shot_bound,
    one_shot_estimate,
)
from hansa.training.audit import audit
from support_audit import HalvedNoise, NoClip, SkewedMean, TwiceAsOften, controls, federation, population

SEEDS = range(20)


@pytest.mark.parametrize("delta", [0.0, 1e-5, 1e-3])
@pytest.mark.parametrize(("guesses", "correct"), [(10, 10), (100, 80), (500, 260), (50, 0)])
def test_the_one_run_p_value_is_the_theorems_sum(guesses, correct, delta):
    binom = pytest.importorskip("scipy.stats").binom
    for epsilon in (0.0, 0.5, 3.0):
        share = 1 / (1 + math.exp(-epsilon))
        worst, total = 0.0, 0.0
        for i in range(1, correct + 1):
            total += binom.pmf(correct - i, guesses, share)
            worst = max(worst, total / i)
        expected = min(1.0, binom.sf(correct - 1, guesses, share) + 2 * 1000 * delta * worst)
        assert one_run_p_value(1000, guesses, correct, epsilon, delta) == pytest.approx(expected, rel=1e-9)


@given(guesses=st.integers(1, 200), share=st.floats(0, 1), delta=st.sampled_from([0.0, 1e-6, 1e-4]))
def test_the_one_run_epsilon_is_where_the_p_value_crosses(guesses, share, delta):
    correct = round(share * guesses)
    epsilon = one_run_epsilon(400, guesses, correct, delta)
    assert one_run_p_value(400, guesses, correct, epsilon + 1e-5, delta) >= 0.05
    assert epsilon == 0 or one_run_p_value(400, guesses, correct, epsilon - 1e-5, delta) <= 0.05


def test_the_one_run_bound_of_randomised_response_errs_as_seldom_as_it_says_and_comes_near():
    draw, epsilon, found = np.random.default_rng(0), 2.0, []
    for _ in range(200):
        took_part = draw.integers(0, 2, 1000).astype(bool)
        told = took_part ^ (draw.random(1000) > 1 / (1 + math.exp(-epsilon)))
        found.append(one_run_bound(told + 0.1 * draw.random(1000), took_part, 0.0).epsilon)
    assert np.mean(np.array(found) > epsilon) <= 0.05
    assert np.mean(found) > 0.8 * epsilon


def test_two_normal_laws_of_one_deviation_cost_what_the_gaussian_mechanism_does():
    for multiplier in (0.5, 1.0, 4.0):
        expected = gaussian.epsilon(1e-5, multiplier, 1)
        assert normal_epsilon(1 / multiplier, 1.0, 0.0, 1.0, 1e-5) == pytest.approx(expected, rel=1e-4)
    assert normal_epsilon(0.0, 1.0, 0.0, 1.0, 1e-5) == 0


def test_two_normal_laws_of_different_deviation_cost_what_sums_over_a_grid_say():
    grid = np.linspace(-30, 30, 600_001)

    def density(mean, deviation):
        return np.exp(-0.5 * ((grid - mean) / deviation) ** 2) / deviation / math.sqrt(2 * math.pi)

    one, other = density(0.7, 1.2), density(0.0, 1.0)
    epsilon = normal_epsilon(0.7, 1.2, 0.0, 1.0, 1e-4)
    step = grid[1] - grid[0]
    deltas = [(np.maximum(a - math.exp(epsilon) * b, 0) * step).sum() for a, b in ((one, other), (other, one))]
    assert max(deltas) == pytest.approx(1e-4, rel=1e-3)


@pytest.mark.parametrize("distance", [0.5, 1.0, 2.0])
def test_cosines_of_a_gaussian_mechanism_give_its_epsilon_and_a_bound_below_it(distance):
    truth = gaussian.epsilon(1e-5, 1 / distance, 1)
    draw = np.random.default_rng(1)
    trials = [draw.normal(distance, 1, 2000) / 100 for _ in SEEDS]
    assert np.mean([one_shot_estimate(cosines, 10_000, 1e-5) for cosines in trials]) == pytest.approx(truth, rel=0.1)
    bounds = [one_shot_bound(cosines, 10_000, 1e-5).epsilon for cosines in trials]
    assert max(bounds) <= truth
    assert np.mean(bounds) > 0.4 * truth


def test_canaries_that_took_no_part_prove_nothing():
    draw = np.random.default_rng(2)
    for _ in SEEDS:
        scores = draw.normal(size=400)
        assert one_run_bound(scores, draw.integers(0, 2, 400).astype(bool), 1e-6).epsilon < 0.3
        assert one_shot_bound(scores / 100, 10_000, 1e-6).epsilon < 0.3


def test_the_audit_keeps_under_a_correct_claim_and_breaks_each_broken_one_over_20_seeds():
    clients, schedule = population(2000), hansa.Schedule(num_rounds=2)
    for name, one in controls(2000, noise_multiplier=0.7, delta=1e-5).items():
        found = [audit(one, clients, schedule, num_canaries=300, seed=seed) for seed in SEEDS]
        assert found[0].claim.epsilon == pytest.approx(gaussian.epsilon(1e-5, 0.7, 2))
        broken = [result.is_broken for result in found]
        assert broken == [name != "correct"] * len(SEEDS), name
        if name == "correct":
            assert np.mean([result.lower_bound for result in found]) > 0.3 * found[0].claim.epsilon
            assert np.mean([result.estimate for result in found]) == pytest.approx(found[0].claim.epsilon, rel=0.2)


def test_a_client_sampled_twice_as_often_breaks_the_claim_of_poisson_sampling_over_20_seeds():
    pytest.importorskip("dp_accounting")
    clients, one = population(1000, 2), federation(1000, noise=hansa.GaussianNoise(noise_multiplier=2.0, delta=1e-3))
    for sampler in (hansa.Poisson(), TwiceAsOften()):
        schedule = hansa.Schedule(num_rounds=20, cohort_size=1, sampler=sampler)
        found = [audit(one, clients, schedule, num_canaries=250, seed=seed).is_broken for seed in SEEDS]
        assert found == [isinstance(sampler, TwiceAsOften)] * len(SEEDS)


def test_the_one_run_bound_alone_breaks_a_claim_that_is_far_off():
    noise = hansa.GaussianNoise(noise_multiplier=2.8, delta=1e-6)
    for mean, is_broken in ((hansa.Mean(weighting="clients"), False), (SkewedMean(weighting="clients"), True)):
        one = federation(3000, noise=noise, mean=mean)
        found = audit(one, population(3000), hansa.Schedule(num_rounds=1), num_canaries=600)
        assert (found.one_run.epsilon > found.claim.epsilon) == is_broken


def test_what_breaks_a_small_claim_shows_at_a_large_delta_first():
    options = {"noise_multiplier": 2.8, "delta": 1e-5}
    for noise in (hansa.GaussianNoise(**options), HalvedNoise(**options)):
        one = federation(4000, noise=noise)
        found = audit(one, population(4000), hansa.Schedule(num_rounds=2), num_canaries=1000)
        for level in found.levels:
            assert level.claimed == pytest.approx(gaussian.epsilon(level.delta, 2.8, 2), rel=1e-3)
        is_broken = [level.is_broken for level in found.levels]
        assert [level.delta for level in found.levels] == [1e-5, 1e-3, 1e-2, 1e-1]
        assert is_broken == ([False, True, True, True] if isinstance(noise, HalvedNoise) else [False] * 4)
        assert found.verdict.startswith("the claim is broken" if any(is_broken) else "consistent with the claim")


def test_a_short_vector_gets_its_canaries_in_many_runs():
    one = federation(14, noise=hansa.GaussianNoise(noise_multiplier=0.7, delta=1e-5))
    found = audit(one, population(14), hansa.Schedule(num_rounds=2), num_canaries=400)
    assert found.num_runs == 50
    assert not found.is_broken
    broken = federation(14, noise=hansa.GaussianNoise(noise_multiplier=0.7, delta=1e-5), clip=NoClip(norm=1.0))
    assert audit(broken, population(14), hansa.Schedule(num_rounds=2), num_canaries=400).estimate > found.estimate


def test_adaptive_clipping_and_fewer_rounds_are_audited_through_the_same_chain():
    noise = hansa.GaussianNoise(epsilon=8.0, delta=1e-5)
    one = federation(1000, noise=noise, clip=hansa.AdaptiveClip())
    found = audit(one, population(1000), hansa.Schedule(num_rounds=6), num_canaries=250, num_rounds=3)
    assert found.num_rounds == 3
    assert 0.1 * found.claim.epsilon < found.lower_bound <= found.claim.epsilon < 8
    assert found.estimate == pytest.approx(found.claim.epsilon, rel=0.4)
    assert found.as_json()["broken"] is False


def test_an_audit_without_a_claim_or_enough_canaries_is_refused_with_a_sentence():
    plain = hansa.Federation(
        learner=hansa.LinearLearner(num_features=9, num_classes=2), algorithm=hansa.FedAvg(client_learning_rate=0.1)
    )
    with pytest.raises(InputError, match="expected a federation that adds noise, found none"):
        audit(plain, population(10), hansa.Schedule(num_rounds=2))
    one = federation(10, noise=hansa.GaussianNoise(noise_multiplier=1.0))
    with pytest.raises(InputError, match="--canaries: expected 16 or more, found 3"):
        audit(one, population(10), hansa.Schedule(num_rounds=2), num_canaries=3)
    with pytest.raises(InputError, match="--rounds: expected 1 to the schedule's 2, found 5"):
        audit(one, population(10), hansa.Schedule(num_rounds=2), num_rounds=5)


def test_a_survey_that_hides_records_is_attacked_by_records():
    x = np.random.default_rng(0).uniform(0, 1, (40, 1)).astype(np.float32)
    clients = hansa.Population({name: hansa.Dataset(x) for name in ("a", "b")})
    question = hansa.statistics.Histogram(0, edges=tuple(np.linspace(0, 1, 3001).tolist()))
    for seed in range(5):
        own = hansa.statistics.survey(question, epsilon=2.0, delta=1e-5)
        assert not audit(own, clients, hansa.Schedule(num_rounds=1), num_canaries=200, seed=seed).is_broken


def test_noise_that_clients_add_is_not_attacked_by_clients_that_add_none():
    own = hansa.Federation(
        learner=hansa.LinearLearner(num_features=3, num_classes=2),
        algorithm=hansa.FedAvg(client_learning_rate=0.1),
        transforms=(hansa.Clip(norm=1.0), hansa.LocalGaussianNoise(epsilon=8.0, delta=1e-5)),
        aggregator=hansa.Mean(weighting="clients"),
    )
    with pytest.raises(hansa.InputError, match="expected noise that the server adds"):
        audit(own, population(100), hansa.Schedule(num_rounds=2), num_canaries=50)
