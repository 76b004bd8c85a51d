"""The laws of aggregators, each asked of every member: a new aggregator is one line of ``AGGREGATORS``."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

import support
from hansa.aggregators.folds import Tree, fold_node
from hansa.aggregators.krum import Krum
from hansa.aggregators.mean import Mean
from hansa.aggregators.median import Median
from hansa.aggregators.rows import Rows
from hansa.aggregators.trimmed_mean import TrimmedMean
from hansa.core.errors import RunError
from hansa.core.protocols import Plan, Report, Updates


def weighted(rows, weights):
    return np.average(rows.astype(np.float64), axis=0, weights=weights)


def krum(num_byzantine, num_selected):
    def brute_force(rows, weights):
        rows, n = rows.astype(np.float64), len(rows)
        away = [sorted(float(((a - b) ** 2).sum()) for j, b in enumerate(rows) if j != i) for i, a in enumerate(rows)]
        scores = [sum(d[: n - num_byzantine - 2]) for d in away]
        best = sorted(range(n), key=lambda i: (scores[i], i))[:num_selected]
        return rows[best].mean(axis=0)

    return brute_force


# Each member beside an oracle of its values: (rows, weights) -> (num_params,).
AGGREGATORS = {
    Mean(): weighted,
    Mean(weighting="clients"): lambda rows, weights: weighted(rows, np.ones(len(rows))),
    Mean(max_weight=3): lambda rows, weights: weighted(rows, np.minimum(weights, 3)),
    Mean(denominator=40): lambda rows, weights: weighted(rows, weights) * weights.sum() / 40,
    Mean(weighting="clients", denominator=9): lambda rows, weights: rows.astype(np.float64).sum(axis=0) / 9,
    Median(): lambda rows, weights: np.median(rows, axis=0),
    TrimmedMean(): lambda rows, weights: stats.trim_mean(rows.astype(np.float64), 0.2),
    TrimmedMean(fraction=0.0): lambda rows, weights: weighted(rows, np.ones(len(rows))),
    TrimmedMean(fraction=0.45): lambda rows, weights: stats.trim_mean(rows.astype(np.float64), 0.45),
    Krum(num_byzantine=1): krum(1, 1),
    Krum(num_byzantine=2, num_selected=3): krum(2, 3),
    Rows(): lambda rows, weights: rows.reshape(-1),
}
FOLDING = [one for one in AGGREGATORS if hasattr(one, "fold")]
BOUNDED = [one for one in AGGREGATORS if math.isfinite(one.sensitivity(1.0))]
TOO_FEW = [
    (Krum(num_byzantine=0), 2),
    (Krum(num_byzantine=1), 4),
    (Krum(num_byzantine=3), 8),
    (Krum(num_byzantine=0, num_selected=4), 3),
    (TrimmedMean(fraction=0.4999999999), 2),
]

every_aggregator = pytest.mark.parametrize("aggregator", AGGREGATORS, ids=repr)
COHORT = 40


def cohort_block(count=COHORT, num_params=23, seed=0):
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(count, num_params)) * 10.0 ** rng.integers(-9, 9, (count, num_params))
    return support.block(values, rng.uniform(0.5, 9, count), loss=rng.normal(size=count))


BLOCK = cohort_block()


def answered(aggregator, block):
    """What a client of this block sends."""
    payload, kept, refused = aggregator.answer(Plan(support.SLOT, True, {}, (), None), block, {}, ())
    assert (kept, refused) == ({}, {})
    return payload


def opened(aggregator, cohort, payloads):
    return aggregator.open(tuple(cohort), {"update": [Report(support.SLOT, p.clients, p) for p in payloads]})


def merged(aggregator, block, payloads=None):
    payloads = [answered(aggregator, block)] if payloads is None else payloads
    return aggregator.reduce([opened(aggregator, block.clients, payloads)], [1.0])


def in_pieces(block, pieces):
    """The block cut into consecutive pieces of these sizes."""
    edges = np.cumsum([0, *pieces])
    return [block.take(range(a, b)) for a, b in itertools.pairwise(edges) if b > a]


def assert_same_bits(found, expected):
    assert found.values.tobytes() == expected.values.tobytes()
    assert found.tail == expected.tail


# -------------------------------------------------------------------------------------------------------- oracles


@every_aggregator
@pytest.mark.parametrize("seed", range(3))
def test_it_agrees_with_an_independent_oracle(aggregator, seed):
    rng = np.random.default_rng(seed)
    block = support.block(rng.normal(size=(11, 6)), rng.integers(1, 9, 11))
    expected = AGGREGATORS[aggregator](block.values, block.weights)
    np.testing.assert_allclose(merged(aggregator, block).values, expected, rtol=1e-5, atol=1e-7)


@every_aggregator
def test_equal_rows_are_their_own_aggregate(aggregator):
    block = support.block(np.tile([1.5, -2.0, 0.25], (9, 1)), [4] * 9)
    values = merged(aggregator, block).values.reshape(-1, 3)[0]
    scale = {Mean(denominator=40): 36 / 40}.get(aggregator, 1.0)
    assert (values == np.array([1.5, -2.0, 0.25]) * scale).all()


@every_aggregator
def test_the_aggregate_is_float64_in_the_length_of_a_row(aggregator):
    values = merged(aggregator, BLOCK).values
    assert values.dtype == np.float64
    assert values.size == BLOCK.values.shape[1] * (COHORT if aggregator == Rows() else 1)


def test_a_tie_of_krum_goes_to_the_first_client():
    rows = np.array([[5.0], [0.0], [1.0], [0.0], [1.0]])
    assert merged(Krum(num_byzantine=1), support.block(rows)).values.tolist() == [0.0]
    assert merged(Krum(num_byzantine=1), support.block(1 - rows)).values.tolist() == [1.0]


def test_krum_tells_neighbours_apart_far_from_the_origin():
    rows = np.array([[0.0], [0.25], [0.5], [0.25], [4.0]]) + 1e6
    assert merged(Krum(num_byzantine=1), support.block(rows)).values.tolist() == [1e6 + 0.25]


# ------------------------------------------------------------------------------------------------- order and folds


@every_aggregator
def test_it_does_not_matter_who_answered_first(aggregator):
    rows = [answered(aggregator, BLOCK.take([i])) for i in range(COHORT)]
    expected = merged(aggregator, BLOCK, rows)
    order = np.random.default_rng(1).permutation(COHORT)
    assert_same_bits(merged(aggregator, BLOCK, [rows[i] for i in order]), expected)


@every_aggregator
@given(pieces=st.lists(st.integers(1, 20), min_size=5, max_size=40))
def test_it_does_not_matter_how_reports_are_grouped(aggregator, pieces):
    pieces = [*pieces, COHORT][: np.searchsorted(np.cumsum([*pieces, COHORT]), COHORT) + 1]
    pieces[-1] -= sum(pieces) - COHORT
    found = merged(aggregator, BLOCK, [answered(aggregator, piece) for piece in in_pieces(BLOCK, pieces)])
    assert_same_bits(found, merged(aggregator, BLOCK))


@st.composite
def nodes_of_the_cohort(draw):
    """A way of cutting the cohort: nodes of the tree that hold every client between them, of any levels."""
    tree, whole = Tree(COHORT), []
    waiting = tree.nodes(COHORT)
    while waiting:
        node = waiting.pop()
        if node.level and draw(st.booleans()):
            waiting += [type(node)(node.level - 1, 2 * node.index + side) for side in (0, 1)]
        else:
            whole.append(node)
    return draw(st.permutations(whole))


@pytest.mark.parametrize("aggregator", FOLDING, ids=repr)
@given(nodes=nodes_of_the_cohort(), missing=st.sets(st.integers(0, COHORT - 1), max_size=38), data=st.data())
def test_sums_made_by_workers_give_the_same_bits(aggregator, nodes, missing, data):
    """However the cohort is cut into nodes, whoever is missing, and whether a node comes as its sum or as its rows."""
    present = [i for i in range(COHORT) if i not in missing]
    expected = opened(aggregator, BLOCK.clients, [answered(aggregator, BLOCK.take(present))])
    tree, place = Tree(COHORT), {client: i for i, client in enumerate(BLOCK.clients)}
    payloads = []
    for node in nodes:
        here = answered(aggregator, BLOCK.take([i for i in range(*tree.span(node)) if i not in missing]))
        if here.clients:
            by_worker = data.draw(st.booleans())
            payloads.append(fold_node(tree, node, here, place, aggregator) if by_worker else here)
    found = opened(aggregator, BLOCK.clients, payloads)
    assert found.clients == expected.clients
    assert found.values.tobytes() == expected.values.tobytes()
    assert found.weights.tobytes() == expected.weights.tobytes()
    assert found.tail == expected.tail


@pytest.mark.parametrize("aggregator", FOLDING, ids=repr)
def test_how_rows_lie_in_memory_does_not_change_a_fold(aggregator):
    block = answered(aggregator, BLOCK.take(range(16)))
    wide = np.zeros((16, 99), np.float32)
    wide[:, 5 : 5 + block.values.shape[1]] = block.values
    for cuts in (None, [0, 5, 5, 11, 16]):
        expected = aggregator.fold(block, cuts).values
        for values in (np.asfortranarray(block.values), wide[:, 5 : 5 + block.values.shape[1]], block.values.copy()):
            assert aggregator.fold(block._replace(values=values), cuts).values.tobytes() == expected.tobytes()


def test_a_leaf_is_summed_left_to_right_in_float64():
    block = BLOCK.take(range(16))
    total = np.zeros(block.values.shape[1])
    for row, weight in zip(block.values, block.weights, strict=True):
        total = total + weight * row.astype(np.float64)
    np.testing.assert_allclose(Mean().fold(block).values[0], total, rtol=1e-15)


@every_aggregator
def test_another_order_of_the_cohort_changes_rounding_only(aggregator):
    if aggregator == Rows():
        return  # in the order of the cohort by definition
    block = support.block(np.random.default_rng(2).normal(size=(11, 6)), np.arange(1, 12))
    found = merged(aggregator, block.take(np.random.default_rng(3).permutation(11).tolist()))
    np.testing.assert_allclose(found.values, merged(aggregator, block).values, rtol=1e-6, atol=1e-9)


@every_aggregator
def test_nobody_opens_to_nobody(aggregator):
    assert opened(aggregator, BLOCK.clients, []).clients == ()


@every_aggregator
def test_what_it_was_given_stays_as_it_was(aggregator):
    block = cohort_block(seed=5)
    before = block.values.tobytes(), block.weights.tobytes()
    merged(aggregator, block, [answered(aggregator, piece) for piece in in_pieces(block, [1, 5, 30, 4])])
    assert (block.values.tobytes(), block.weights.tobytes()) == before


# --------------------------------------------------------------------------------------------------- sizes and say


@pytest.mark.parametrize(("aggregator", "count"), TOO_FEW, ids=repr)
def test_an_inadmissible_cohort_is_refused_with_what_was_expected(aggregator, count):
    block = support.block(np.arange(count * 2.0).reshape(count, 2))
    with pytest.raises(RunError, match=rf"{type(aggregator).__name__}: expected .* found {count}; raise cohort_size"):
        merged(aggregator, block)
    merged(aggregator, support.block(np.arange((count + 1) * 2.0).reshape(-1, 2)))


@pytest.mark.parametrize("fraction", [0, 0.1, 0.2, 0.25, 1 / 3, 0.4, 0.49, 0.499999])
@pytest.mark.parametrize("count", [1, 2, 3, 5, 10, 30])
def test_a_trimmed_mean_always_leaves_somebody(fraction, count):
    rows = np.arange(count, dtype=float)[:, None]
    assert merged(TrimmedMean(fraction=fraction), support.block(rows)).values.tolist() == [(count - 1) / 2]


@pytest.mark.parametrize(
    "aggregator", [Median(), TrimmedMean(fraction=0.3), Krum(num_byzantine=3), Krum(num_byzantine=3, num_selected=4)],
    ids=repr,
)  # fmt: skip
def test_three_liars_of_eleven_cannot_move_it_far(aggregator):
    rows = np.random.default_rng(0).normal(size=(11, 4))
    lies = rows.copy()
    lies[[1, 4, 9]] = 1e6
    assert np.abs(merged(aggregator, support.block(lies)).values).max() < np.abs(rows).max()
    assert np.abs(merged(Mean(), support.block(lies)).values).min() > 1e5


@pytest.mark.parametrize("aggregator", [*BOUNDED, Mean(max_weight=3, denominator=12)], ids=repr)
@pytest.mark.parametrize("bound", [0.5, 2.0])
def test_no_client_can_move_it_further_than_the_sensitivity(aggregator, bound):
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(9, 5))
    rows *= bound / np.linalg.norm(rows, axis=1, keepdims=True) * (1 - 1e-6)
    block = support.block(rows, rng.uniform(0.1, 50, 9))
    whole, moved = merged(aggregator, block).values, []
    for i in range(9):
        others = [j for j in range(9) if j != i]
        without = opened(aggregator, block.clients, [answered(aggregator, block.take(others))])
        moved.append(np.linalg.norm(whole - aggregator.reduce([without], [1.0]).values))
    assert max(moved) <= aggregator.sensitivity(bound)
    assert max(moved) > aggregator.sensitivity(bound) * 0.9  # and the bound is not idle


@every_aggregator
def test_without_a_fixed_divisor_and_a_largest_weight_nothing_is_claimed(aggregator):
    provable = getattr(aggregator, "denominator", None) is not None and aggregator != Mean(denominator=40)
    assert math.isfinite(aggregator.sensitivity(1.0)) == provable
    assert aggregator.sensitivity(math.inf) == math.inf


def test_a_weight_is_capped_again_by_the_server():
    boast = support.block([[1.0], [0.0]], [1000, 1])
    mean = Mean(max_weight=3)
    found = mean.reduce([opened(mean, boast.clients, [boast])], [1.0])  # not through the honest client's answer
    assert found.values.tolist() == [0.75]


# ------------------------------------------------------------------------------------------------ tails and scales


@pytest.mark.parametrize("aggregator", FOLDING, ids=repr)
def test_a_tail_column_is_treated_as_one_more_parameter(aggregator):
    values = np.random.default_rng(0).normal(size=(20, 3)).astype(np.float32)
    block = support.block(values, np.arange(1.0, 21), twin=values[:, 1])
    found = merged(aggregator, block)
    assert found.tail["twin"] == pytest.approx(found.values[1], rel=1e-12)


@every_aggregator
def test_tail_columns_come_out_as_numbers_by_name(aggregator):
    assert set(merged(aggregator, BLOCK).tail) == {"loss"}
    assert math.isfinite(merged(aggregator, BLOCK).tail["loss"])


def test_staleness_scales_a_whole_plan():
    """A stale update shortens the step, as in FedBuff: its scale is not in the sum of weights."""
    now, late = support.block([[6.0]], [2], ["a"], loss=[1.0]), support.block([[3.0]], [4], ["b"], loss=[5.0])
    blocks = [opened(Mean(), ("a", "b"), [one]) for one in (now, late)]
    found = Mean().reduce(blocks, [1.0, 0.5])
    assert found.values.tolist() == [(2 * 6 + 0.5 * 4 * 3) / (2 + 4)]
    assert found.tail == {"loss": (2 * 1 + 0.5 * 4 * 5) / (2 + 0.5 * 4)}  # a mean of what was measured stays a mean
    assert Mean(denominator=6).reduce(blocks, [1.0, 0.5]).values.tolist() == [(2 * 6 + 0.5 * 4 * 3) / 6]
    rows = [opened(Median(), ("a", "b"), [one]) for one in (now, late)]
    assert Median().reduce(rows, [1.0, 0.5]).values.tolist() == [(6 + 1.5) / 2]


# ------------------------------------------------------------------------------------------------------ namespaces


@every_aggregator
def test_torch_rows_give_what_numpy_rows_give(aggregator):
    torch = pytest.importorskip("torch")
    rows = support.block(np.random.default_rng(0).normal(size=(20, 6)), np.arange(1, 21), loss=np.arange(20))
    pieces = [piece._replace(values=torch.tensor(piece.values)) for piece in in_pieces(rows, [3, 17])]
    found = merged(aggregator, rows, [answered(aggregator, piece) for piece in pieces])
    assert isinstance(found.values, np.ndarray)
    np.testing.assert_allclose(found.values, merged(aggregator, rows).values, rtol=1e-6)
    assert found.tail == pytest.approx(merged(aggregator, rows).tail)


def test_an_opened_mean_says_that_it_is_folded():
    block = opened(Mean(), BLOCK.clients, [BLOCK])
    assert isinstance(block, Updates)
    assert block.folded
    assert block.values.shape == (1, BLOCK.values.shape[1])
