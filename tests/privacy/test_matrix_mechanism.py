import itertools
import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from hansa.core.errors import InputError, RunError
from hansa.privacy import events, gaussian
from hansa.privacy.accountant import Everyone, Turn
from hansa.privacy.blt import BLT
from hansa.privacy.events import MatrixEvent, as_json, event_of, releases
from hansa.privacy.matrix_mechanism import Mechanism
from hansa.privacy.strategies import Banded, Tree, begin
from hansa.wire import pack, unpack

STRATEGIES = [Tree(), Banded(), Banded(width=3), BLT(), BLT(buffers=1)]
TOEPLITZ = STRATEGIES[1:]
every_strategy = pytest.mark.parametrize("strategy", STRATEGIES, ids=repr)
every_toeplitz = pytest.mark.parametrize("strategy", TOEPLITZ, ids=repr)


def dense(strategy, num_rounds):
    """C, a column a round."""
    return np.stack([strategy.applied(row) for row in np.eye(num_rounds)], axis=1)


def streamed(strategy, fresh):
    stream, rows = begin(), []
    for row in fresh:
        noise, stream = strategy.next(stream, row.copy())
        rows.append(noise)
    return np.array(rows)


def apart(num_rounds, separation):
    """Every set of rounds that are at least so far apart, as ones and zeros."""
    for takes in itertools.product((0.0, 1.0), repeat=num_rounds):
        rounds = np.flatnonzero(takes)
        if len(rounds) and (np.diff(rounds) >= separation).all():
            yield np.array(takes)


# --------------------------------------------------------------------------------------------------------- the noise


@every_strategy
def test_the_encoder_turns_streamed_noise_back_into_the_fresh_one(strategy):
    own, fresh = strategy.planned_for(37, 5), np.random.default_rng(0).normal(size=(37, 4))
    noise = streamed(own, fresh)
    np.testing.assert_allclose(dense(own, 37) @ noise, fresh, atol=1e-12)
    np.testing.assert_allclose(noise, np.linalg.solve(dense(own, 37), fresh), atol=1e-12)


@every_strategy
def test_no_round_sees_noise_of_a_later_one_and_every_entry_is_nonnegative(strategy):
    matrix = dense(strategy.planned_for(20, 4), 20)
    assert (np.triu(matrix, 1) == 0).all()
    assert (np.diag(matrix) == 1).all()
    assert (matrix >= 0).all()


@every_strategy
def test_noise_on_sums_has_the_stated_variance(strategy):
    own = strategy.planned_for(30, 6)
    sums = np.tril(np.ones((30, 30))) @ np.linalg.inv(dense(own, 30))
    np.testing.assert_allclose(own.variances(30), (sums**2).sum(axis=1), rtol=1e-9)


@every_strategy
def test_a_stream_goes_on_from_its_bytes_and_is_left_as_it_was(strategy):
    own, fresh = strategy.planned_for(9, 4), np.random.default_rng(1).normal(size=(9, 3))
    stream = begin()
    for row in fresh[:6]:
        _, stream = own.next(stream, row.copy())
    kept = unpack(pack({"state": stream}))["state"]
    for row in fresh[6:]:
        first, after = own.next(stream, row.copy())
        again, _ = own.next(stream, row.copy())
        resumed, kept = own.next(kept, row.copy())
        assert first.tobytes() == again.tobytes() == resumed.tobytes()
        stream = after


@every_strategy
def test_a_column_gets_the_same_noise_however_many_there_are(strategy):
    own, fresh = strategy.planned_for(5, 3), np.random.default_rng(2).normal(size=(5, 1_200_000))
    some = [0, 131_071, 131_072, 1_199_999]
    np.testing.assert_array_equal(streamed(own, fresh)[:, some], streamed(own, fresh[:, some]))


def test_a_round_with_other_columns_than_the_first_is_refused():
    for strategy in (Tree(), Banded(width=3), BLT().planned_for(9, 3)):
        _, stream = strategy.next(begin(), np.zeros(4))
        with pytest.raises(RunError, match="expected 4 numbers in every round, as in the first, found 5"):
            strategy.next(stream, np.zeros(5))


def test_buffers_and_levels_bound_what_a_stream_remembers():
    for strategy, most in ((Tree(), 6), (BLT(buffers=4).planned_for(50, 25), 4), (Banded(width=7), 6)):
        stream = begin()
        for _ in range(50):
            _, stream = strategy.next(stream, np.zeros(1))
            assert len(stream["vectors"]) <= most


# -------------------------------------------------------------------------------------------------------- sensitivity


@every_toeplitz
@pytest.mark.parametrize("separation", [1, 2, 3, 5, 10])
def test_no_rounds_that_are_so_far_apart_move_the_releases_further_than_the_sensitivity(strategy, separation):
    mechanism = Mechanism.planned(strategy, 10, separation)
    matrix = dense(mechanism.strategy, 10)
    worst = max(float(np.linalg.norm(matrix @ takes)) for takes in apart(10, separation))
    assert mechanism.sensitivity == pytest.approx(worst, rel=1e-12)


@every_strategy
@pytest.mark.parametrize("separation", [1, 3, 4, 12])
def test_the_sensitivity_of_groups_that_take_turns_is_that_of_their_worst_subset(strategy, separation):
    mechanism = Mechanism.planned(strategy, 12, separation)
    matrix, worst = dense(mechanism.strategy, 12), 0.0
    for group in range(separation):
        turns = range(group, 12, separation)
        for takes in itertools.product((0.0, 1.0), repeat=len(turns)):
            worst = max(worst, float(np.linalg.norm(matrix[:, list(turns)] @ takes)))
    assert mechanism.sensitivity == pytest.approx(worst, rel=1e-12)


@every_strategy
def test_vectors_in_any_directions_move_the_releases_no_further(strategy):
    mechanism, draw = Mechanism.planned(strategy, 12, 4), np.random.default_rng(0)
    matrix = dense(mechanism.strategy, 12)
    for _ in range(200):
        moves = np.zeros((12, 3))
        moves[draw.integers(4) :: 4] = draw.normal(size=3)
        moves *= draw.choice([-1, 1], size=(12, 1)) / np.maximum(np.linalg.norm(moves, axis=1, keepdims=True), 1e-9)
        assert np.linalg.norm(matrix @ moves) <= mechanism.sensitivity * (1 + 1e-12)


def test_a_band_as_wide_as_the_separation_makes_participations_independent():
    mechanism = Mechanism.planned(Banded(), 100, 10)
    once = np.linalg.norm(mechanism.strategy.coefficients(10))
    assert mechanism.sensitivity == pytest.approx(math.sqrt(10) * once)


# ------------------------------------------------------------------------------------------------- figures of others


@pytest.mark.parametrize(("noise", "bound", "rdp"), [(1.13, 19.74, 18.7096), (8.83, 2.04, 1.7732)])
def test_the_tree_costs_what_dp_accounting_says(noise, bound, rdp):
    """Its test bounds for StackOverflow: one tree of 1600 steps, in which a client is once; noise is that of a node."""
    dp_accounting = pytest.importorskip("dp_accounting")
    from dp_accounting.rdp import RdpAccountant

    mechanism = Mechanism.planned(Tree(), 1600, 1600)
    whole = [
        MatrixEvent(
            mechanism=mechanism, noise_multiplier=noise / mechanism.sensitivity, round=t, sampling=Turn(t, 1600)
        )
        for t in range(1600)
    ]
    (release,) = releases(whole)
    assert release.times == 1
    assert release.noise_multiplier == pytest.approx(noise / math.sqrt(11))
    tree = dp_accounting.dp_event.SingleEpochTreeAggregationDpEvent(noise, 1600)
    zero_out = dp_accounting.NeighboringRelation.REPLACE_SPECIAL
    theirs = RdpAccountant(neighboring_relation=zero_out).compose(tree).get_epsilon(1e-6)
    ours = events.cost(whole, 1e-6, accountant="RDP").epsilon
    assert ours == pytest.approx(theirs, rel=1e-9)
    assert ours == pytest.approx(rdp, abs=1e-4)
    assert events.cost(whole, 1e-6).epsilon < ours < bound


def test_sensitivity_and_loss_of_given_buffers_are_those_of_jax_privacy():
    """jax-privacy 2.0.0: buffered_toeplitz.optimize(n=2000, min_sep=100, max_participations=20, error="mean")."""
    theirs = BLT(decays=(0.98455145, 0.57383509), scales=(0.25292003, 0.25649705))
    mechanism = Mechanism(strategy=theirs, num_rounds=2000, min_separation=100)
    assert mechanism.sensitivity == pytest.approx(9.718243476636761, rel=1e-6)
    assert mechanism.loss == pytest.approx(21.37401605217954, rel=1e-6)
    np.testing.assert_allclose(theirs.coefficients(4)[1:], [0.50941708, 0.39619979, 0.32962697], rtol=1e-6)


@pytest.mark.parametrize(
    ("num_rounds", "separation", "theirs"),
    [
        (100, 10, 9.893516903451772),
        (2000, 20, 81.69737208607698),
        (2000, 100, 21.37401605217954),
        (2000, 400, 8.160831531233821),
        (2000, 2000, 3.270376513465832),
    ],
)
def test_buffers_are_as_good_as_those_that_jax_privacy_finds(num_rounds, separation, theirs):
    """jax-privacy 2.0.0, float64, error="mean", as many buffers as help (its numbers after up to a minute each)."""
    assert Mechanism.planned(BLT(), num_rounds, separation).loss < theirs * 1.002


def test_buffers_are_near_the_best_band_and_far_below_the_tree_and_independent_noise():
    """The best Toeplitz band of width 100, by L-BFGS over its 99 free coefficients from the square root's: 20.2067."""
    loss = {
        name: Mechanism.planned(strategy, 2000, 100).loss
        for name, strategy in {"blt": BLT(), "tree": Tree(), "band": Banded(), "independent": Banded(width=1)}.items()
    }
    assert 20.2067 < loss["blt"] < 1.06 * 20.2067
    assert loss["blt"] < loss["band"] < 1.1 * 20.2067
    assert loss["blt"] < loss["tree"] / 1.9
    assert loss["independent"] == pytest.approx(math.sqrt(20 * 2001 / 2))
    assert loss["blt"] < loss["independent"] / 6.5


def test_the_inverse_of_buffers_is_buffers():
    blt = BLT().planned_for(200, 50)
    decays, scales = blt.inverse()
    powers = decays[:, None] ** np.arange(199)
    found = np.concatenate([[1.0], scales @ powers])
    np.testing.assert_allclose(np.convolve(found, blt.coefficients(200))[:200], np.eye(1, 200)[0], atol=1e-12)


# -------------------------------------------------------------------------------------------------------- the ledger


def run_of(num_rounds, separation, strategy=None, planned=None, noise=1.0):
    mechanism = Mechanism.planned(strategy or BLT(), planned or num_rounds, separation)
    return [
        MatrixEvent(mechanism=mechanism, noise_multiplier=noise, round=t, sampling=Turn(t % separation, separation))
        for t in range(num_rounds)
    ]


@every_strategy
def test_a_whole_run_is_one_release_and_its_beginning_costs_less(strategy):
    whole = run_of(24, 6, strategy, noise=0.7)
    costs = [events.cost(whole[:count], 1e-5).epsilon for count in range(1, 25)]
    assert costs[-1] == pytest.approx(gaussian.epsilon(1e-5, 0.7, 1))
    assert costs == sorted(costs)
    assert costs[0] == pytest.approx(gaussian.epsilon(1e-5, 0.7 * whole[0].mechanism.sensitivity, 1))


def test_a_round_that_left_no_release_is_no_row_and_what_follows_moves_up():
    """Four rounds, two groups; round 1 had nobody: group 0 was in rows 0 and 1 of the noise, not in 0 and 2."""
    events_of = [e for e in run_of(4, 2) if e.round != 1]
    mechanism = events_of[0].mechanism
    matrix = dense(mechanism.strategy, 4)[:3, :3]
    worst = max(np.linalg.norm(matrix @ [1, 1, 0]), np.linalg.norm(matrix @ [0, 0, 1]))
    (release,) = releases(events_of)
    assert release.noise_multiplier == pytest.approx(mechanism.sensitivity / worst)


def test_a_client_that_could_be_in_every_round_pays_for_every_round():
    free = [replace(event, sampling=Everyone()) for event in run_of(12, 4)]
    matrix = dense(free[0].mechanism.strategy, 12)
    (release,) = releases(free)
    assert release.noise_multiplier == pytest.approx(
        free[0].mechanism.sensitivity / np.linalg.norm(matrix @ np.ones(12))
    )


def test_a_round_released_twice_counts_all_rounds_twice():
    whole = run_of(8, 4)
    again = Counter({**Counter(whole), whole[3]: 2})
    assert events.cost(again, 1e-5).epsilon == pytest.approx(gaussian.epsilon(1e-5, 1.0, 2))


def test_runs_of_other_noise_add_up():
    both = [*run_of(8, 4), *run_of(8, 4, Tree())]
    assert events.cost(both, 1e-5).epsilon == pytest.approx(gaussian.epsilon(1e-5, 1.0, 2))


def test_noise_is_calibrated_for_the_whole_run():
    found = events.calibrated(Counter(run_of(30, 6)), 4.0, 1e-5)
    assert found == pytest.approx(gaussian.noise_multiplier(4.0, 1e-5, 1), rel=1e-3)


@every_strategy
def test_an_event_survives_its_json(strategy):
    event = run_of(6, 3, strategy)[4]
    found = unpack(pack(as_json(event)))
    assert event_of(found) == event
    assert hash(event_of(found)) == hash(event)


@pytest.mark.parametrize(
    "broken", [{"strategy": {"kind": "other"}}, {"num_rounds": 0}, {"strategy": {"kind": "blt", "buffers": -1}}]
)
def test_an_event_of_something_else_is_refused(broken):
    found = as_json(run_of(6, 3)[0])
    with pytest.raises(InputError, match="expected"):
        event_of({**found, "mechanism": {**found["mechanism"], **broken}})


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: BLT(buffers=0), r"BLT\(buffers=\)"),
        (lambda: BLT(decays=(0.5,)), r"as many scales"),
        (lambda: BLT(decays=(1.0,), scales=(0.1,)), r"decays in \[0, 1\)"),
        (lambda: BLT(decays=(0.5, 0.6), scales=(0.9, 0.2)), "add up to 1"),
        (lambda: Banded(width=0), r"Banded\(width=\)"),
        (lambda: Mechanism(strategy=Tree(), num_rounds=3, min_separation=0), "min_separation"),
        (lambda: BLT().coefficients(3), "call planned_for first"),
        (lambda: Banded().coefficients(3), "call planned_for first"),
    ],
)
def test_what_is_no_strategy_is_refused(make, says):
    with pytest.raises(InputError, match=says):
        make()
