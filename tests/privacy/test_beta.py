"""Limits of a share and tails of a cosine against SciPy's."""

import math

import pytest

from hansa.core.errors import InputError
from hansa.privacy.beta import log_beta_cdf, log_cosine_tail, lower_limit, upper_limit

scipy_stats = pytest.importorskip("scipy.stats")


@pytest.mark.parametrize(("successes", "trials"), [(1, 10), (5, 100), (250, 500), (499, 500), (9, 4000)])
def test_limits_of_a_share_are_clopper_and_pearsons(successes, trials):
    beta = scipy_stats.beta
    expected = beta.ppf(0.05, successes, trials - successes + 1), beta.ppf(0.95, successes + 1, trials - successes)
    found = lower_limit(successes, trials), upper_limit(successes, trials)
    assert found == pytest.approx(expected, rel=1e-9)


def test_limits_at_the_ends_are_closed_forms():
    assert lower_limit(0, 7) == 0
    assert upper_limit(7, 7) == 1
    assert lower_limit(7, 7, 0.9) == pytest.approx(0.1 ** (1 / 7))


@pytest.mark.parametrize("dimensions", [2, 3, 14, 2000, 10**6])
@pytest.mark.parametrize("deviations", [-1.0, 0.0, 0.3, 1.0, 1.3, 5.0, 30.0])
def test_the_tail_of_a_cosine_is_the_beta_laws(dimensions, deviations):
    cosine = deviations / math.sqrt(dimensions)
    if abs(cosine) >= 1:
        return
    expected = scipy_stats.beta.logsf((1 + cosine) / 2, (dimensions - 1) / 2, (dimensions - 1) / 2)
    assert log_cosine_tail(cosine, dimensions) == pytest.approx(expected, rel=1e-7, abs=1e-9)


def test_the_beta_law_keeps_its_digits_far_in_the_tail():
    x, a = 1e-4, 1000.0  # of Beta(a, 2) the chance is x^a (a + 1 - a x)
    assert log_beta_cdf(x, a, 2.0) == pytest.approx(a * math.log(x) + math.log(a + 1 - a * x), rel=1e-12)
    assert (log_beta_cdf(0.0, 1.0, 1.0), log_beta_cdf(1.0, 1.0, 1.0)) == (-math.inf, 0.0)


def test_what_makes_no_share_is_refused():
    with pytest.raises(InputError, match="expected 0 to 3"):
        lower_limit(4, 3)
    with pytest.raises(InputError, match="confidence"):
        lower_limit(1, 3, 1.0)
    with pytest.raises(InputError, match="2 dimensions"):
        log_cosine_tail(0.5, 1)
