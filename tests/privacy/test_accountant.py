"""The accountant against published and recomputed epsilons, and against itself."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hansa.core.errors import InputError
from hansa.privacy.accountant import FixedSizeSampling, PoissonSampling, Release, calibrated, cost

pytest.importorskip("dp_accounting")

# sampling rate, noise multiplier, rounds, delta: RDP, PLD (add or remove one), PLD (replace one)
POISSON = [
    (0.04, 1.5, 2250, 1e-5, 7.329335, 6.768787, 13.488479),
    (0.01, 1.1, 1000, 1e-5, 1.711770, 1.515370, 2.477805),
    (256 / 60000, 1.1, 14062, 1e-5, 2.596556, 2.381686, 4.221357),
    (256 / 60000, 1.3, 3515, 1e-5, 0.954430, 0.864459, 1.555239),
    (0.01, 4.0, 10000, 1e-5, 1.035490, 0.946999, 1.993194),
    (0.1, 1.0, 100, 1e-5, 7.903850, 7.046603, 10.516380),
    (0.1, 0.8, 100, 1e-4, 10.757298, 9.329345, 13.073098),
    (0.02, 1.0, 500, 1e-6, 3.602588, 3.213577, 4.744923),
    (1.0, 10.0, 100, 1e-6, 5.221540, 4.886554, 10.997151),
    (1.0, 4.0, 1, 1e-5, 1.012551, 0.926342, 1.993091),
    (0.5, 2.0, 50, 1e-3, 7.992425, 6.981136, 15.781557),
    (0.001, 0.6, 20000, 1e-7, 5.276294, 4.451404, 5.050745),
]
# population, cohort, noise multiplier, rounds, delta: RDP (replace one)
FIXED_SIZE = [
    (10_000, 100, 1.1, 1000, 1e-5, 3.189999),
    (60_000, 256, 1.1, 14062, 1e-5, 5.243254),
    (100, 10, 1.0, 100, 1e-3, 10.8154),
    (3400, 100, 1.0, 1500, 1 / 3400, 13.7831),
]
# noise multiplier, rounds, delta: exact
EVERYONE = [
    (1.0, 1, 1e-5, 4.377178),
    (2.0, 1, 1e-5, 1.993091),
    (10.0, 1, 1e-6, 0.396857),
    (5.0, 50, 1e-3, 4.845252),
    (1.0, 100, 1e-3, 80.032526),
]


def sampled(rate, noise_multiplier, times):
    return [Release(noise_multiplier=noise_multiplier, times=times, sampling=PoissonSampling(rate))]


@pytest.mark.parametrize(("rate", "z", "times", "delta", "rdp", "pld", "replaced"), POISSON)
def test_poisson_sampled_gaussians_cost_what_was_published(rate, z, times, delta, rdp, pld, replaced):
    releases = sampled(rate, z, times)
    assert cost(releases, delta, accountant="RDP").epsilon == pytest.approx(rdp, rel=1e-5)
    assert cost(releases, delta, accountant="PLD").epsilon == pytest.approx(pld, rel=1e-3)
    found = cost(releases, delta, accountant="PLD", neighbours="replace one")
    assert found.epsilon == pytest.approx(replaced, rel=1e-3)


@pytest.mark.parametrize(("population", "count", "z", "times", "delta", "rdp"), FIXED_SIZE)
def test_cohorts_of_fixed_size_are_accounted_as_such(population, count, z, times, delta, rdp):
    releases = [Release(noise_multiplier=z, times=times, sampling=FixedSizeSampling(count, population))]
    found = cost(releases, delta, neighbours="replace one")
    assert (found.accountant, found.neighbours) == ("RDP", "replace one")
    assert found.epsilon == pytest.approx(rdp, rel=1e-5)
    with pytest.raises(InputError, match='expected neighbours="replace one"'):
        cost(releases, delta)


@pytest.mark.parametrize(("z", "times", "delta", "epsilon"), EVERYONE)
def test_without_sampling_the_cost_is_exact(z, times, delta, epsilon):
    found = cost([Release(noise_multiplier=z, times=times)], delta)
    assert found.accountant == "exact"
    assert found.epsilon == pytest.approx(epsilon, rel=2e-5)


@given(z=st.floats(0.7, 20), times=st.integers(1, 50), delta=st.sampled_from([1e-3, 1e-5, 1e-8]))
@settings(max_examples=15, deadline=None)
def test_pld_is_a_close_upper_bound_of_the_closed_form_and_rdp_a_looser_one(z, times, delta):
    releases = [Release(noise_multiplier=z, times=times)]
    exact, pld, rdp = (cost(releases, delta, accountant=name).epsilon for name in ("best", "PLD", "RDP"))
    assert exact <= pld * (1 + 1e-6)
    assert pld <= exact * (1 + 2e-3) + 1e-3
    assert pld <= rdp * (1 + 1e-6) + 1e-3


@given(
    parts=st.lists(st.tuples(st.floats(0.7, 20), st.integers(0, 9)), min_size=1, max_size=4),
    delta=st.sampled_from([1e-3, 1e-6]),
)
def test_more_is_never_cheaper_and_nothing_is_free(parts, delta):
    releases = [Release(noise_multiplier=z, times=times) for z, times in parts]
    found = cost(releases, delta).epsilon
    assert (found == 0) == (sum(times for _, times in parts) == 0) or found < 1e-3
    assert cost([*releases, Release(noise_multiplier=3.0)], delta).epsilon >= found
    assert cost(releases, delta, neighbours="replace one").epsilon >= found


@pytest.mark.parametrize(
    ("epsilon", "delta", "releases_of"),
    [
        (8.0, 1e-5, lambda z: [Release(noise_multiplier=z, times=50)]),
        (1.0, 1e-6, lambda z: sampled(0.01, z, 1000)),
        (2.0, 1e-5, lambda z: [*sampled(0.1, z, 20), Release(noise_multiplier=10 * z, times=20)]),
    ],
)
def test_the_calibrated_noise_keeps_to_the_target_and_is_not_far_above_it(epsilon, delta, releases_of):
    z = calibrated(releases_of, epsilon, delta, tolerance=1e-3)
    assert cost(releases_of(z), delta).epsilon <= epsilon
    assert cost(releases_of(z * 0.998), delta).epsilon > epsilon


def test_the_target_of_dp_accountings_own_test_is_met_with_the_noise_of_the_closed_form():
    """RDP needs 4.530877 for (1, 1e-6); by the closed form that noise costs 0.927392."""
    assert cost([Release(noise_multiplier=4.530877117)], 1e-6).epsilon == pytest.approx(0.927392, rel=1e-5)
    z = calibrated(lambda z: [Release(noise_multiplier=z)], 1.0, 1e-6, accountant="RDP", tolerance=1e-7)
    assert z == pytest.approx(4.530877117, rel=1e-5)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Release(noise_multiplier=0.0), "expected above 0, found 0.0"),
        (lambda: Release(noise_multiplier=math.nan), "expected above 0, found nan"),
        (lambda: Release(noise_multiplier=1.0, times=-1), "expected 0 or more"),
        (lambda: PoissonSampling(0.0), "expected above 0 and at most 1"),
        (lambda: FixedSizeSampling(5, 4), "expected 1 to 4 of 4, found 5"),
        (lambda: cost([], 0.0), "delta: expected between 0 and 1"),
        (lambda: calibrated(lambda z: [], -1.0, 1e-5), "epsilon: expected a positive number"),
    ],
)
def test_what_cannot_be_is_refused(make, words):
    with pytest.raises(InputError, match=words):
        make()
