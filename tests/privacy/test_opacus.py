"""The accountant against Opacus's: another library, with its own RDP and its own distributions of privacy losses.

The figures are those of Opacus's own tests (accountants_test.py) and of dp-accounting's, with the settings used there.
"""

import math

import pytest

from hansa.privacy import gaussian
from hansa.privacy.accountant import PoissonSampling, Release, calibrated, cost

pytest.importorskip("dp_accounting", reason="the accountant under test composes with it")

RATE, DELTA = 0.04, 1e-5


def releases(noise_multiplier, times, rate=RATE):
    return [Release(noise_multiplier=noise_multiplier, times=times, sampling=PoissonSampling(rate))]


@pytest.fixture
def accountants():
    return pytest.importorskip("opacus.accountants", reason="Opacus is in hansa[dev]")


def theirs(accountant, noise_multiplier, times, rate=RATE, delta=DELTA):
    accountant.history = [(noise_multiplier, rate, times)]
    return accountant.get_epsilon(delta)


@pytest.mark.filterwarnings("ignore:Optimal order is the smallest alpha")
def test_renyi_differential_privacy_costs_what_opacus_publishes(accountants):
    """Ours is 3e-5 above: between whole orders dp-accounting's bound is a little looser; at whole ones they agree."""
    from dp_accounting import dp_event
    from dp_accounting.rdp import RdpAccountant

    published = 7.32911117143
    assert theirs(accountants.RDPAccountant(), 1.5, 2250) == pytest.approx(published, rel=1e-9)
    found = cost(releases(1.5, 2250), DELTA, accountant="RDP").epsilon
    assert published < found == pytest.approx(7.329335, rel=1e-5)
    sampled = dp_event.SelfComposedDpEvent(dp_event.PoissonSampledDpEvent(RATE, dp_event.GaussianDpEvent(1.5)), 2250)
    whole = accountants.RDPAccountant()
    whole.history = [(1.5, RATE, 2250)]
    for order in (3, 4, 5):
        below = RdpAccountant(orders=[order]).compose(sampled).get_epsilon(DELTA)
        assert whole.get_privacy_spent(delta=DELTA, alphas=[order])[0] == pytest.approx(below, rel=1e-9)


def test_distributions_of_privacy_losses_cost_what_opacus_publishes_for_its_own(accountants):
    published = 6.777395712
    assert theirs(accountants.PRVAccountant(), 1.5, 2249) == pytest.approx(published, rel=1e-8)
    found = cost(releases(1.5, 2249), DELTA, accountant="PLD").epsilon
    assert found == pytest.approx(published, abs=0.011)  # theirs is an upper bound by 0.01
    assert found < published


@pytest.mark.filterwarnings("ignore:Optimal order is the largest alpha")
@pytest.mark.parametrize(("rate", "z", "times", "delta"), [(0.01, 1.1, 1000, 1e-5), (0.1, 0.8, 100, 1e-4)])
def test_both_of_opacuss_accountants_agree_with_ours(accountants, rate, z, times, delta):
    ours = releases(z, times, rate)
    rdp, pld = (cost(ours, delta, accountant=name).epsilon for name in ("RDP", "PLD"))
    assert theirs(accountants.RDPAccountant(), z, times, rate, delta) == pytest.approx(rdp, rel=5e-3)
    assert pld - 1e-3 < theirs(accountants.PRVAccountant(), z, times, rate, delta) < pld + 0.02


@pytest.mark.parametrize(("times", "rdp", "prv"), [(90 * 25, 1.416, 1.34766), (2000, 1.3562, 1.2915)])
def test_the_noise_that_opacus_finds_for_epsilon_8_is_ours(times, rdp, prv):
    """Its search stops within 0.01 of epsilon; 90 epochs of batches of 4 % are 2,250 steps."""
    found = calibrated(lambda z: releases(z, times), 8.0, DELTA, accountant="RDP")
    assert found == pytest.approx(rdp, rel=1e-3)
    assert 7.96 < cost(releases(prv, times), DELTA, accountant="PLD").epsilon <= 8.0


# --------------------------------------------------------------------------------------- dp-accounting's own figures


def test_three_gaussians_have_the_published_delta():
    assert gaussian.delta(1.0, math.sqrt(3), 3) == pytest.approx(0.126936, rel=1e-5)


def test_three_poisson_sampled_gaussians_have_the_published_delta():
    assert cost(releases(0.5, 3, rate=0.2), 0.15594, accountant="PLD", interval=1e-3).epsilon == pytest.approx(
        1.0, abs=1e-3
    )


def test_pure_differential_privacy_in_renyis_terms_has_the_published_epsilon():
    from dp_accounting.rdp import rdp_privacy_accountant

    orders = list(range(2, 33))
    epsilon, order = rdp_privacy_accountant.compute_epsilon(orders, [1.1] * len(orders), 1e-5)
    assert (epsilon, order) == (pytest.approx(1.32783806176, rel=1e-10), 32)


# rho of zero-concentrated differential privacy at delta 1e-10: by RDP, by the textbook, exact
CONCENTRATED = [
    (0.2, 4.1675, 4.4919, 3.9842),
    (0.5, 6.8394, 7.2861, 6.5479),
    (0.81, 8.9223, 9.4473, 8.5489),
    (1.0, 10.0344, 10.5971, 9.6182),
    (2.0, 14.8708, 15.5723, 14.2741),
]


@pytest.mark.parametrize(("rho", "rdp", "textbook", "exact"), CONCENTRATED)
def test_zero_concentrated_privacy_is_a_gaussian_of_that_rho(rho, rdp, textbook, exact):
    one = [Release(noise_multiplier=1 / math.sqrt(2 * rho))]
    assert cost(one, 1e-10).epsilon == pytest.approx(exact, abs=6e-5)
    assert rho + 2 * math.sqrt(rho * math.log(1e10)) == pytest.approx(textbook, abs=6e-5)
    assert exact < cost(one, 1e-10, accountant="RDP").epsilon < textbook
    assert cost(one, 1e-10, accountant="RDP").epsilon == pytest.approx(rdp, rel=2e-3)
