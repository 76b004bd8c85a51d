"""Sums in fixed places: whoever sums which node of the tree, the total has the same bits."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import support
from hansa.aggregators.blocks import gather, stacked
from hansa.aggregators.folds import Node, Tree, add, fold, fold_node, total, weighted_sums
from hansa.aggregators.mean import Mean
from hansa.aggregators.sums import Sums
from hansa.core.protocols import Report, Updates

SIZES = st.integers(1, 300)


def cohort(count, num_params=5, seed=0, dtype=np.float32):
    """Rows of which every order of addition rounds in another way."""
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(count, num_params)) * 10.0 ** rng.integers(-9, 9, (count, num_params))
    names = tuple(f"c{i}" for i in range(count))
    return Updates(names, values.astype(dtype), rng.uniform(0.5, 9, count), {"loss": rng.normal(size=count)})


def bits(updates):
    assert updates.folded
    return updates.clients, updates.values.tobytes(), updates.weights.tobytes(), updates.tail["loss"].tobytes()


def by_hand(tree, rows, present):
    """The tree as its docstring says it: rows of a leaf from left to right, then two and two."""

    def sums(first, last, numbers):
        so_far = np.zeros(numbers.shape[1:])
        for i in range(first, last):
            so_far = so_far + numbers[i] if i in present else so_far
        return so_far

    def node(level, index, numbers):
        if level == 0:
            return sums(tree.edges[index], tree.edges[index + 1], numbers)
        return node(level - 1, 2 * index, numbers) + node(level - 1, 2 * index + 1, numbers)

    weighted = rows.values.astype(np.float64) * rows.weights[:, None]
    return [node(tree.depth, 0, own) for own in (weighted, rows.weights, rows.tail["loss"] * rows.weights)]


# --------------------------------------------------------------------------------------------------------- the tree


@given(count=st.integers(0, 20_000))
def test_leaves_lie_side_by_side_and_hold_every_position_once(count):
    tree = Tree(count)
    sizes = np.diff(tree.edges)
    assert (tree.edges[0], tree.edges[-1]) == (0, count)
    assert len(sizes) == 2**tree.depth
    assert 0 <= sizes.min() <= sizes.max() <= sizes.min() + 1


@pytest.mark.parametrize(
    ("count", "num_leaves"), [(0, 16), (1, 16), (16, 16), (128, 16), (129, 32), (256, 32), (10_000, 2048)]
)
def test_there_are_sixteen_leaves_or_more_and_a_leaf_holds_eight_or_fewer(count, num_leaves):
    tree = Tree(count)
    assert len(tree.edges) == num_leaves + 1
    assert np.diff(tree.edges).max() <= 8


def test_the_leaves_of_forty_positions_by_hand():
    """Sixteen leaves at the whole part of ``i * 40 / 16``: two, three, two, three, ..."""
    tree = Tree(40)
    assert tree.edges == [0, 2, 5, 7, 10, 12, 15, 17, 20, 22, 25, 27, 30, 32, 35, 37, 40]
    assert [tree.span(Node(2, i)) for i in range(4)] == [(0, 10), (10, 20), (20, 30), (30, 40)]
    assert tree.around(3, 4) == Node(0, 1)
    assert tree.around(4, 5) == Node(2, 0)
    assert tree.around(19, 20) == Node(4, 0)
    assert tree.cuts(Node(2, 1), [10, 14, 15, 19]) == [0, 1, 2, 3, 4]
    assert tree.cuts(Node(1, 0), [4]) == [0, 0, 1]


def test_a_cohort_of_nobody_has_no_nodes():
    assert Tree(0).nodes(8) == []
    assert total(Tree(0), {}) is None


@given(count=SIZES, rows=st.integers(1, 400))
def test_nodes_hold_everybody_and_are_as_large_as_they_may(count, rows):
    tree = Tree(count)
    nodes = tree.nodes(rows)
    spans = [tree.span(node) for node in nodes]
    assert [position for first, last in spans for position in range(first, last)] == list(range(count))
    assert all(first < last for first, last in spans)
    level = {node.level for node in nodes}.pop()
    assert {node.level for node in nodes} == {level}
    if level:
        assert max(last - first for first, last in spans) <= rows
    if level < tree.depth:
        above = [tree.span(Node(level + 1, i)) for i in range(2 ** (tree.depth - level - 1))]
        assert max(last - first for first, last in above) > rows


@given(count=SIZES, data=st.data())
def test_the_node_around_two_positions_is_the_smallest_that_holds_them(count, data):
    tree = Tree(count)
    first = data.draw(st.integers(0, count - 1))
    last = data.draw(st.integers(first, count - 1))
    holders = [
        Node(level, i)
        for level in range(tree.depth + 1)
        for i in range(2 ** (tree.depth - level))
        if tree.span(Node(level, i))[0] <= first and last < tree.span(Node(level, i))[1]
    ]
    assert tree.around(first, last) == min(holders)


@given(count=SIZES, data=st.data())
def test_cuts_put_every_position_in_its_own_leaf(count, data):
    tree = Tree(count)
    node = data.draw(st.sampled_from([Node(level, 0) for level in range(tree.depth + 1)] + tree.nodes(20)))
    first, last = tree.span(node)
    positions = sorted(data.draw(st.sets(st.sampled_from(range(first, last))))) if first < last else []
    cuts = tree.cuts(node, positions)
    assert len(cuts) == 2**node.level + 1
    leaf = node.index << node.level
    for i, (start, stop) in enumerate(itertools.pairwise(cuts)):
        expected = [p for p in positions if tree.edges[leaf + i] <= p < tree.edges[leaf + i + 1]]
        assert positions[start:stop] == expected


# -------------------------------------------------------------------------------------------------------- the sums


@st.composite
def ways(draw, count):
    """How a cohort may be summed: nodes of any levels, by any number of workers, with anybody missing."""
    tree, nodes = Tree(count), []
    waiting = [Node(tree.depth, 0)]
    while waiting:
        node = waiting.pop()
        if node.level and draw(st.integers(0, 9)) < 6:
            waiting += [Node(node.level - 1, 2 * node.index + side) for side in (0, 1)]
        else:
            nodes.append(node)
    missing = draw(st.sets(st.integers(0, count - 1), max_size=count - 1))
    workers = draw(st.integers(1, 4))
    return nodes, [draw(st.integers(0, workers - 1)) for _ in nodes], [i for i in range(count) if i not in missing]


def summed(rows, nodes, workers, present, unfolded=frozenset()):
    """Each worker sums its nodes and merges what it can; then the server adds what came, the last worker's first.

    Nodes of ``unfolded`` are given to the worker's sums as rows.
    """
    tree, place = Tree(len(rows.clients)), {client: i for i, client in enumerate(rows.clients)}
    found = {}
    for worker in sorted(set(workers), reverse=True):
        mine, num_leaves = Sums(lambda node, own: fold_node(tree, node, own, place, Mean())), 0
        for node, who in zip(nodes, workers, strict=True):
            first, last = tree.span(node)
            own = rows.take([i for i in present if first <= i < last])
            if who == worker and own.clients and node in unfolded:
                mine.add(node, own)
                num_leaves += 2**node.level
            elif who == worker and own.clients:
                one = fold_node(tree, node, own, place, Mean())
                mine.add(node, one._replace(values=one.values.copy()))
                num_leaves += 2**node.level
        assert sum(2**node.level for node in mine.rows) == num_leaves
        found |= mine.rows
    return total(tree, found)


@pytest.mark.parametrize("num_params", [1, 2, 7, 33])
@pytest.mark.parametrize("count", [1, 3, 16, 17, 40, 150])
@given(data=st.data())
def test_however_a_cohort_is_cut_and_shared_out_the_total_has_the_same_bits(count, num_params, data):
    nodes, workers, present = data.draw(ways(count))
    rows = cohort(count, num_params)
    expected = summed(rows, [Node(Tree(count).depth, 0)], [0], present)
    unfolded = data.draw(st.sets(st.sampled_from(nodes)))
    found = summed(rows, nodes, workers, present, unfolded)
    assert bits(found) == bits(expected)
    assert found.clients == tuple(rows.clients[i] for i in present)


@pytest.mark.parametrize(
    ("num_params", "dtype"),
    [(1, np.float32), (1, np.float64), (5, np.float64), (2048, np.float32), (2049, np.float32), (8193, np.float32)],
)
@pytest.mark.parametrize("width", [1, 3, 10, 20, 100])
def test_narrow_and_wide_rows_give_the_same_bits_in_nodes_of_every_size(num_params, dtype, width):
    """Rows of up to 2048 values are summed for all leaves at once, longer ones leaf by leaf and 8192 at a time."""
    rows, tree = cohort(45, num_params, dtype=dtype), Tree(45)
    present = [i for i in range(45) if i % 4]
    nodes = tree.nodes(width)
    leaves = summed(rows, [Node(0, i) for i in range(16)], [0] * 16, present)
    assert bits(summed(rows, nodes, [0] * len(nodes), present)) == bits(leaves)
    assert bits(summed(rows, nodes, [0] * len(nodes), present, set(nodes))) == bits(leaves)


@given(num_params=st.integers(1, 80), count=st.integers(1, 40), data=st.data())
def test_the_sum_of_a_run_does_not_depend_on_the_other_runs(num_params, count, data):
    rows = cohort(count, num_params)
    cuts = [0, *sorted(data.draw(st.lists(st.integers(0, count), max_size=9))), count]
    together = weighted_sums(rows.values, rows.weights, cuts)
    assert together.shape == (len(cuts) - 1, num_params)
    for found, (start, stop) in zip(together, itertools.pairwise(cuts), strict=True):
        alone = weighted_sums(rows.values[start:stop], rows.weights[start:stop], [0, stop - start])[0]
        assert found.tobytes() == alone.tobytes()


@pytest.mark.parametrize("num_params", [1, 6, 3000])
@given(count=st.integers(1, 120), data=st.data())
def test_the_total_is_the_trees_by_hand(num_params, count, data):
    """To a last bit that a processor may round once where Python rounds twice; weights and losses in every bit."""
    present = sorted(data.draw(st.sets(st.integers(0, count - 1), min_size=1)))
    rows = cohort(count, num_params, seed=count)
    found = summed(rows, [Node(Tree(count).depth, 0)], [0], present)
    values, weight, loss = by_hand(Tree(count), rows, set(present))
    np.testing.assert_allclose(found.values[0], values, rtol=1e-11, atol=1e-9)
    assert (found.weights.tolist(), found.tail["loss"].tolist()) == ([weight], [loss])


def test_values_of_one_column_are_added_as_a_tail_column_is():
    rows = cohort(40, 1)
    twin = rows._replace(tail={"loss": rows.values[:, 0].astype(np.float64)})
    found = summed(twin, [Node(4, 0)], [0], range(40))
    assert found.values[0].tobytes() == found.tail["loss"].tobytes()


def test_whole_numbers_are_summed_exactly():
    rows = support.block(np.arange(90.0).reshape(30, 3), np.arange(1.0, 31), loss=np.arange(30))
    found = summed(rows, Tree(30).nodes(4), [i % 3 for i in range(len(Tree(30).nodes(4)))], range(30))
    assert found.values[0].tolist() == (rows.values.astype(int) * np.arange(1, 31)[:, None]).sum(axis=0).tolist()
    assert found.weights.tolist() == [465]
    assert found.tail["loss"].tolist() == [(np.arange(30) * np.arange(1, 31)).sum()]


@pytest.mark.parametrize("num_params", [1, 4, 3000])
def test_zero_with_a_sign_is_zero_in_every_sum(num_params):
    """Else adding a node without clients would turn a bit."""
    rows = support.block(np.full((5, num_params), -0.0), loss=[-0.0] * 5)
    tree, place = Tree(5), {client: i for i, client in enumerate(rows.clients)}
    for node in (Node(tree.depth, 0), tree.around(2, 2)):
        own = rows if node.level else rows.take([2])
        found = fold_node(tree, node, own, place, Mean())
        assert not np.signbit(found.values).any()
        assert not np.signbit(found.tail["loss"]).any()


def test_a_node_without_rows_has_no_sum():
    tree = Tree(20)
    assert fold_node(tree, Node(1, 0), cohort(20).take([]), {}, Mean()) is None
    assert add(None, None) is None


def test_few_rows_wait_for_neighbours_that_do_not_come():
    folded = []
    sums = Sums(lambda node, rows: folded.append(node) or fold(rows))
    for i in range(0, 40, 2):
        sums.add(Node(0, i), cohort(1, seed=i))
        assert i // 2 - len(folded) < 6
    assert [node.index for node in folded[:3]] == [0, 2, 4]
    assert len(sums.rows) == 20


@pytest.mark.parametrize("order", [(0, 1, 2, 3, 5, 6), (6, 5, 3, 1, 2, 0)])
def test_neighbours_are_added_as_often_as_it_goes_and_others_are_not(order):
    sums = Sums(lambda node, rows: fold(rows))
    for i in order:
        sums.add(Node(0, i), fold(cohort(2, seed=i)))
    assert set(sums.rows) == {Node(2, 0), Node(0, 5), Node(0, 6)}
    first, second, third, fourth = (fold(cohort(2, seed=i)) for i in range(4))
    assert bits(sums.rows[Node(2, 0)]) == bits(add(add(first, second), add(third, fourth)))


def test_nodes_that_overlap_are_not_taken_for_a_total():
    one = fold(cohort(1))
    for above in (Node(1, 2), Node(3, 0), Node(4, 0)):
        with pytest.raises(AssertionError, match="lies within"):
            total(Tree(16), {Node(0, 4): one, above: one})


def test_torch_rows_are_summed_alike_in_nodes_of_every_size():
    torch = pytest.importorskip("torch")
    rows = cohort(45, 6)
    there = rows._replace(values=torch.tensor(rows.values))
    found = [summed(there, nodes, [0] * len(nodes), range(45)) for nodes in map(Tree(45).nodes, (1, 9, 45))]
    assert bits(found[0]) == bits(found[1]) == bits(found[2])
    expected = summed(rows, [Node(4, 0)], [0], range(45))
    np.testing.assert_allclose(found[0].values, expected.values, rtol=1e-12, atol=1e-9)


# ------------------------------------------------------------------------------------------------------------ folds


def test_without_cuts_a_block_is_one_run():
    block = cohort(7)
    assert bits(fold(block)) == bits(fold(block, [0, 7]))
    assert fold(block).values.shape == (1, 5)


@pytest.mark.parametrize("num_params", [5, 100_000])
def test_runs_are_added_as_a_tree_and_a_run_of_no_rows_adds_nothing(num_params):
    block = cohort(6, num_params)
    first, second, third = (fold(block.take(rows)) for rows in ((0, 1), (2,), (3, 4, 5)))
    assert bits(fold(block, [0, 2, 3, 3, 6])) == bits(add(add(first, second), third))
    assert bits(fold(block, [0, 2, 2, 3, 6])) == bits(add(first, add(second, third)))


def test_rows_are_stacked_in_the_order_of_the_cohort_whoever_answered_first():
    block = cohort(5)
    reports = [Report(support.SLOT, part.clients, part) for part in (block.take([3, 1]), block.take([4]))]
    found = stacked(("c0", "c1", "c2", "c3", "c4"), reports)
    assert found.clients == ("c1", "c3", "c4")
    assert found.values.tobytes() == block.values[[1, 3, 4]].tobytes()
    assert found.weights.tolist() == block.weights[[1, 3, 4]].tolist()


def test_nobodys_rows_are_an_empty_block():
    assert gather([], ()).clients == ()
