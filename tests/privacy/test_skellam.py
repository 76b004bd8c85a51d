import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import special, stats

from hansa.core.errors import InputError
from hansa.core.key import Key
from hansa.privacy import accountant, events, skellam
from hansa.privacy.accountant import PoissonSampling, Release, Turn, cost
from hansa.privacy.events import GaussianEvent, LocalEvent, SkellamEvent
from hansa.privacy.skellam import largest, renyi_divergence, secure_skellam


def log_law(variance, most):
    """Logarithms of the law's chances of 0, 1, ..., most: ratios of Bessel functions, by their continued fraction."""
    ratio, ratios = 0.0, np.empty(most)
    for k in range(most, 0, -1):
        ratio = 1 / (2 * k / variance + ratio)
        ratios[k - 1] = ratio
    return math.log(special.ive(0, variance)) + np.concatenate([[0.0], np.cumsum(np.log(ratios))])


def exact_divergence(order, shift, variance):
    """The Renyi divergence of two Skellam laws that are ``shift`` apart, summed over all whole numbers that matter."""
    most = int(60 * math.sqrt(variance) + 6 * order * shift + 300)
    law = log_law(variance, most + shift)
    x = np.arange(-most, most + 1)
    return special.logsumexp(order * law[abs(x)] + (1 - order) * law[abs(x - shift)]) / (order - 1)


@pytest.mark.parametrize("variance", [0.5, 3.0, 40.0, 1e4])
@pytest.mark.parametrize("shift", [1, 2, 7, 50])
def test_the_bound_is_above_the_exact_divergence_and_near_it_on_fine_grids(variance, shift):
    for order in (2, 3, 5, 16, 100, 400):
        exact = exact_divergence(order, shift, variance)
        bound = renyi_divergence(order, math.sqrt(variance) / shift, shift)
        assert exact <= bound * (1 + 1e-9)
        if variance >= 1e4 and order * shift <= 500:
            assert bound <= exact * 1.01


def test_the_divergence_of_a_vector_is_within_the_bound_of_its_norm():
    """Coordinates add up: ones and twos, of a norm that their number makes."""
    for counts in ({1: 16}, {1: 3, 2: 1}, {2: 9, 5: 1}):
        norm = math.sqrt(sum(number * size**2 for size, number in counts.items()))
        for order, variance in ((2, 4.0), (8, 30.0), (40, 200.0)):
            exact = sum(number * exact_divergence(order, size, variance) for size, number in counts.items())
            assert exact <= renyi_divergence(order, math.sqrt(variance) / norm, norm)


def test_the_bound_falls_as_the_grid_gets_finer():
    for order in (2, 7, 300):
        found = [renyi_divergence(order, 0.7, 2.0**power) for power in range(16)]
        assert found == sorted(found, reverse=True)
        assert found[-1] == pytest.approx(order / (2 * 0.7**2), rel=1e-6)


@pytest.mark.parametrize("variance", [0.02, 1.0, 2.5, 300.0, 5e4])
def test_numbers_are_of_skellams_law(variance):
    count = 100_000
    found = secure_skellam(Key.of("law"), count, variance)
    edges = np.unique(np.round(stats.norm.ppf(np.linspace(0.01, 0.99, 40)) * math.sqrt(variance)))
    seen = np.histogram(found, [-np.inf, *(edges + 0.5), np.inf])[0]
    chances = np.diff([0.0, *stats.skellam.cdf(edges, variance / 2, variance / 2), 1.0])
    assert stats.chisquare(seen, chances * count).pvalue > 1e-3
    assert (found == np.rint(found)).all()


def test_shares_add_up_to_the_noise_of_the_sum():
    shares = [secure_skellam(Key.of(i), 50_000, 12.0 / 8) for i in range(8)]
    whole = sum(shares)
    values = np.arange(-12, 13)
    seen = np.histogram(np.clip(whole, -12, 12), np.arange(-12.5, 13.5))[0]
    chances = stats.skellam.pmf(values, 6.0, 6.0)
    chances[[0, -1]] = stats.skellam.cdf(-12, 6.0, 6.0)
    assert stats.chisquare(seen, chances / chances.sum() * 50_000).pvalue > 1e-3
    assert max(abs(np.corrcoef(shares)[np.triu_indices(8, 1)])) < 0.02


def test_the_table_holds_the_laws_chances_to_a_last_digit():
    variance = 9.7
    boundaries = [b / 2**127 for b in skellam._table(variance)[1]]
    law = np.exp(log_law(variance, len(boundaries)))
    expected = law[0] + 2 * np.concatenate([[0.0], np.cumsum(law[1:-1])])
    np.testing.assert_allclose(boundaries, expected, rtol=1e-13)


def test_larger_noise_than_the_largest_has_hardly_a_chance():
    for variance in (0.01, 1.0, 40.0, 1e4, 1e6):
        most = largest(variance)
        law = log_law(variance, 2 * most)
        assert math.log(2) + special.logsumexp(law[most:]) < math.log(2) - 74


def test_numbers_that_begin_like_a_boundary_are_told_apart_by_more_bits():
    first_bits, whole = np.array([5, 5, 9], np.uint64), (5 << 64, (5 << 64) + 2**63, (9 << 64) + 7)

    class More:
        """The stream whose next word is this."""

        def __init__(self, word):
            self.word = word

        def update(self, _empty):
            return self.word.to_bytes(8, "little")

    for drawn, word, expected in ((4, 0, 0), (5, 0, 1), (5, 2**63, 2), (8, 0, 2), (9, 6, 2), (9, 7, 3), (12, 0, 3)):
        found = skellam._magnitudes(np.array([drawn], np.uint64), first_bits, whole, More(word))
        assert found.tolist() == [expected]


def test_secrets_are_streams_of_noise_of_their_own():
    one, again, other = (secure_skellam(Key.of(i), 70_000, 100.0) for i in (1, 1, 2))
    assert (one == again).all()
    assert abs(np.corrcoef(one, other)[0, 1]) < 0.02
    assert (secure_skellam(Key.of(1), 300, 100.0) == one[:300]).all()


# ------------------------------------------------------------------------------------------------------- accounting


def test_divergences_become_epsilon_as_dp_accounting_makes_it():
    rdp = pytest.importorskip("dp_accounting").rdp
    for multiplier, norm_steps, times in ((1.0, 4.0, 1), (3.0, 100.0, 50), (20.0, 1e4, 1000)):
        orders = accountant._ORDERS
        divergences = [times * renyi_divergence(order, multiplier, norm_steps) for order in orders]
        expected, _ = rdp.compute_epsilon(orders, divergences, 1e-6)
        found = events.cost([SkellamEvent(noise_multiplier=multiplier, norm_steps=norm_steps)] * times, 1e-6)
        assert found.epsilon == pytest.approx(expected, rel=1e-12)
        assert (found.neighbours, found.accountant) == ("zero out one", "Skellam")


def test_on_a_fine_grid_skellam_noise_costs_what_gaussian_noise_does_by_the_same_accountant():
    pytest.importorskip("dp_accounting")
    for multiplier, times in ((1.0, 1), (4.0, 100), (30.0, 500)):
        gauss = cost([Release(noise_multiplier=multiplier, times=times)], 1e-6, accountant="RDP").epsilon
        grid = SkellamEvent(noise_multiplier=multiplier, norm_steps=1024.0)
        found = events.cost({grid: times}, 1e-6).epsilon
        assert gauss * 0.999 < found < gauss * 1.01


def test_beside_skellam_noise_gaussian_and_laplace_noise_are_counted_no_less():
    delta, one = 1e-6, SkellamEvent(noise_multiplier=4.0, norm_steps=1e6)
    same = events.cost([one] * 9, delta).epsilon
    mixed = events.cost([one] * 5 + [GaussianEvent(noise_multiplier=4.0)] * 4, delta).epsilon
    assert mixed == pytest.approx(same, rel=1e-6)
    small = LocalEvent(noise="laplace", noise_multiplier=8.0)  # of two reports: an epsilon of 1/4
    with_laplace = events.cost([one] * 5 + [small] * 4, delta)
    assert with_laplace.neighbours == "replace one"
    doubled = [SkellamEvent(noise_multiplier=2.0, norm_steps=2e6)] * 5 + [GaussianEvent(noise_multiplier=4.0)] * 4
    assert with_laplace.epsilon == pytest.approx(events.cost(doubled, delta).epsilon)


def test_groups_that_take_turns_pay_for_their_own_rounds():
    turns = [SkellamEvent(noise_multiplier=4.0, norm_steps=512.0, sampling=Turn(i % 4, 4)) for i in range(40)]
    everyone = [SkellamEvent(noise_multiplier=4.0, norm_steps=512.0)] * 10
    assert events.cost(turns, 1e-6).epsilon == events.cost(everyone, 1e-6).epsilon


def test_no_amplification_by_sampling_is_claimed_or_lost_unsaid():
    sampled = [GaussianEvent(noise_multiplier=1.0, sampling=PoissonSampling(0.1))]
    one = SkellamEvent(noise_multiplier=4.0, norm_steps=512.0)
    for beside in ([replace(one, sampling=PoissonSampling(0.1))], [one, *sampled]):
        with pytest.raises(InputError, match="expected units that are not sampled"):
            events.cost(beside, 1e-6)


def test_an_event_is_read_as_it_was_written():
    event = SkellamEvent(noise_multiplier=2.5, norm_steps=4096.0, sampling=Turn(1, 3))
    assert events.event_of(events.as_json(event)) == event
    for name in ("noise_multiplier", "norm_steps"):
        with pytest.raises(InputError):
            SkellamEvent(**{"noise_multiplier": 1.0, "norm_steps": 1.0, name: 0.0})
