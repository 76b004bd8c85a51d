"""Canaries go through the chain as clients do, and the attacker sees what is released less what honest clients add."""

import numpy as np
import pytest

import hansa
from hansa.attacks.canaries import Canaries, Directions, Observed, Tap, WithCanaries, cosines
from hansa.core.key import Key
from hansa.core.protocols import Aggregate, Updates


def test_directions_are_the_same_however_they_are_asked_for_and_nearly_orthogonal():
    drawn = Directions(Key.of(0), num_canaries=20, num_params=4000)
    rows = drawn.rows(range(20))
    np.testing.assert_array_equal(drawn.rows([7])[0], rows[7])
    np.testing.assert_array_equal(Directions(Key.of(0), num_canaries=9, num_params=4000).rows([7])[0], rows[7])
    np.testing.assert_allclose(rows @ rows.T, np.eye(20), atol=0.1)
    assert set(drawn.signs(3)) == {-1.0, 1.0}
    assert not (drawn.signs(3) == drawn.signs(4)).all()


def test_the_attacker_sees_the_release_less_what_honest_clients_added():
    observed, mean = Observed(), hansa.Mean(weighting="clients", denominator=4)
    tap = Tap(ids=frozenset({"c"}), aggregator=mean, observed=observed)
    rows = np.array([[1.0, 2.0], [3.0, 0.0], [0.0, 8.0]])
    tap.encode(Updates(("a",), rows[:1], np.ones(1)), None, None, None)
    tap.encode(Updates(("b", "c"), rows[1:], np.ones(2)), None, None, None)
    released = Aggregate(rows.sum(axis=0) / 4 + 0.5, {})
    tap.release(released, None, 1.0, Key.of(0))
    algorithm = hansa.FedAvg(client_learning_rate=1.0)
    mixed = Canaries(algorithm, ("c",), Directions(Key.of(0), num_canaries=1, num_params=2), 1.0, observed)
    state = mixed.server_update(mixed.init(np.zeros(2, np.float32)), released)
    np.testing.assert_allclose(observed.releases[0], rows[2] / 4 + 0.5)
    np.testing.assert_allclose(state["params"], released.values)
    assert mixed.client_learning_rate == 1.0
    assert not hasattr(mixed, "variants")


@pytest.mark.parametrize("sampler", [hansa.Uniform(), hansa.All()])
def test_canaries_come_every_round_where_nobody_tosses_coins(sampler):
    observed = Observed()
    mixed = WithCanaries(sampler, num_honest=4, cohort_size=2, out=frozenset({"y"}), observed=observed)
    cohort = mixed.cohort(("a", "b", "c", "d", "x", "y", "z"), 7, Key.of(0))
    assert cohort[-2:] == ("x", "z")
    assert len(cohort) == (4 if isinstance(sampler, hansa.Uniform) else 6)
    assert observed.planned[0].all()


def test_canaries_toss_the_samplers_own_coins():
    ids = tuple(map(str, range(2000)))
    mixed = WithCanaries(hansa.Poisson(), num_honest=100, cohort_size=30, out=frozenset(), observed=Observed())
    share = np.mean([int(client) >= 100 for client in mixed.cohort(ids, 2000, Key.of(0))])
    assert share == pytest.approx(0.95, abs=0.03)
    assert len(mixed.cohort(ids, 2000, Key.of(1))) == pytest.approx(600, abs=80)


def test_noise_that_two_rounds_share_is_taken_off():
    drawn = Directions(Key.of(1), num_canaries=20, num_params=3000)
    noise = np.random.default_rng(0).normal(size=3000)
    rows = drawn.rows(range(20)).astype(np.float64)
    shared, fresh = Observed(), Observed()
    for number in range(2):
        signal = drawn.signs(number)[:10] @ rows[:10]
        shared.releases.append((signal + noise).astype(np.float32))
        fresh.releases.append((signal + np.random.default_rng(number).normal(size=3000)).astype(np.float32))
    differ = (drawn.signs(0) != drawn.signs(1))[:10]
    assert differ.any()
    assert cosines(shared, drawn)[:10][differ].min() > 0.2 > cosines(fresh, drawn)[:10].max()
    assert abs(cosines(shared, drawn)[10:]).max() < 0.1


def test_torch_rows_stay_torch_rows():
    torch = pytest.importorskip("torch")

    class Two:
        def client_update(self, received, fit, memory):
            return Updates(("a", "b"), torch.ones(2, 3), np.ones(2)), {}

    mixed = Canaries(Two(), ("b",), Directions(Key.of(0), num_canaries=1, num_params=3), 2.0, Observed())
    updates, _ = mixed.client_update({}, None, None)
    assert torch.equal(updates.values[0], torch.ones(3))
    assert float(updates.values[1].norm()) == pytest.approx(2.0)
    assert updates.weights[1] > updates.weights[0]
