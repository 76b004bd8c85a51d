"""Shares: any ``threshold`` of them give the secret, fewer say nothing, false ones are refused."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from hansa.core.errors import InputError
from hansa.core.key import Key
from hansa.secagg import shamir
from hansa.secagg.errors import BadShares
from hansa.secagg.shamir import NUM_LIMBS, PRIME, join, split

SECRETS = np.random.default_rng(5).integers(0, 256, (3, 32), dtype=np.uint8)


def at_zero(places, values):
    """Lagrange's formula in plain whole numbers."""
    total = 0
    for i, x in enumerate(places):
        for j, other in enumerate(places):
            if i != j:
                values[i] = values[i] * other * pow(other - x, -1, PRIME)
        total += values[i]
    return total % PRIME


def number(secret):
    return int.from_bytes(secret.tobytes(), "little")


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_shares_as_many_as_the_threshold_give_the_secret(data):
    places = data.draw(st.lists(st.integers(1, PRIME - 1), min_size=1, max_size=9, unique=True))
    threshold = data.draw(st.integers(1, len(places)))
    secrets = np.frombuffer(data.draw(st.binary(min_size=64, max_size=64)), np.uint8).reshape(2, 32)
    shares = split(secrets, threshold, places, Key.of(data.draw(st.integers(0, 99))))
    chosen = [data.draw(st.permutations(range(len(places))))[: data.draw(st.integers(threshold, len(places)))]] * 2
    assert (join(np.asarray(places)[chosen], shares[[[0], [1]], chosen]) == secrets).all()


def test_shares_are_values_of_polynomials_whose_degree_is_the_threshold_less_one():
    places = [3, 1, PRIME - 1, 70, 12_345]
    shares = split(SECRETS, 3, places, Key.of(1))
    assert shares.shape == (3, 5, NUM_LIMBS)
    assert (shares < PRIME).all()
    for secret, its in zip(SECRETS, shares.tolist(), strict=True):
        for chosen in itertools.combinations(range(5), 3):
            limbs = [at_zero([places[i] for i in chosen], [its[i][limb] for i in chosen]) for limb in range(NUM_LIMBS)]
            assert all(limb < 2**30 for limb in limbs)
            assert sum(limb << 30 * i for i, limb in enumerate(limbs)) == number(secret)


def test_shares_made_by_plain_arithmetic_are_joined():
    drawn = np.random.default_rng(6)
    places = np.stack([drawn.permutation(200)[:67] + 1 for _ in SECRETS])
    shares = np.zeros((3, 67, NUM_LIMBS), np.uint32)
    for s, limb in itertools.product(range(3), range(NUM_LIMBS)):
        rest = [int(c) for c in drawn.integers(0, PRIME, 66)]
        polynomial = [number(SECRETS[s]) >> 30 * limb & (2**30 - 1), *rest]
        for i, x in enumerate(places[s].tolist()):
            shares[s, i, limb] = sum(c * pow(x, power, PRIME) for power, c in enumerate(polynomial)) % PRIME
    assert (join(places, shares) == SECRETS).all()


def test_shares_fewer_than_the_threshold_are_the_same_whatever_the_secret():
    for secret in (np.zeros(32, np.uint8), np.full(32, 255, np.uint8)):
        shares = split(np.tile(secret, (4000, 1)), 3, [1, 2, 3], Key.of(int(secret[0])))
        for limb in (0, 8):
            first, second = (shares[:, i, limb].astype(np.int64) * 8 // PRIME for i in (0, 2))
            cells = np.bincount(8 * first + second, minlength=64)
            assert stats.chisquare(cells).pvalue > 1e-4


def test_equal_secrets_have_other_shares_and_equal_keys_the_same():
    twice = np.tile(SECRETS[:1], (2, 1))
    shares = split(twice, 2, [1, 2], Key.of(1))
    assert (shares[0] != shares[1]).all()
    assert (split(twice, 2, [1, 2], Key.of(1)) == shares).all()
    assert (split(twice, 2, [1, 2], Key.of(2)) != shares).all()


def test_the_one_word_that_is_the_prime_is_drawn_again(monkeypatch):
    class Words:
        drawn = iter([[PRIME, 5, 2**32 - 1], [2**31 + 7, PRIME], [9]])

        def update(self, nothing):
            return np.array(next(self.drawn), "<u4").tobytes()

    monkeypatch.setattr(shamir, "stream", lambda key: Words())
    assert shamir._uniform(Key.of(0), 3).tolist() == [5, 7, 9]


@pytest.mark.parametrize(
    ("threshold", "places", "sentence"),
    [
        (3, [1, 2], "threshold from 1 to 2 places, found 3"),
        (0, [1, 2], "threshold from 1 to 2 places, found 0"),
        (2, [1, 2, 1], "different places"),
        (2, [0, 1], "different places"),
        (2, [1, PRIME], "different places"),
    ],
)
def test_thresholds_and_places_that_cannot_be_are_refused(threshold, places, sentence):
    with pytest.raises(InputError, match=sentence):
        split(SECRETS, threshold, places, Key.of(0))


def test_secrets_of_another_length_are_refused():
    with pytest.raises(InputError, match="secrets"):
        split(SECRETS[:, :31], 1, [1], Key.of(0))


def test_shares_that_cannot_be_are_refused():
    shares = split(SECRETS, 2, [1, 2, 3], Key.of(0))[:, :2]
    places = np.array([[1, 2]] * 3)
    for wrong in ([1, 1], [0, 2], [1, PRIME]):
        with pytest.raises(BadShares, match="different places"):
            join(np.array([[1, 2], wrong, [1, 2]]), shares)
    above = shares.copy()
    above[1, 1, 3] = PRIME
    with pytest.raises(BadShares, match="below"):
        join(places, above)
    with pytest.raises(BadShares, match="threshold"):
        join(places, shares[:, :1])
    false = shares.copy()
    false[2, 0] = (false[2, 0].astype(np.int64) + 1_000_003) % PRIME
    with pytest.raises(BadShares, match="one secret"):
        join(places, false)
    with pytest.raises(BadShares, match="one secret"):
        join(places[:, :1], shares[:, :1])
