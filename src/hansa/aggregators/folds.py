"""Sums in fixed places: a cohort is cut by position into the leaves of a binary tree.

The rows of a leaf are summed left to right in float64, leaves are added pairwise. So any node of the tree may be summed
anywhere, by whoever holds its clients, and the total depends neither on who answered first nor on how many workers
there are.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, lru_cache
from itertools import count, pairwise
from typing import Any, NamedTuple

import numpy as np

from hansa.aggregators.blocks import Apart, to_numpy
from hansa.core.protocols import Array, Client, Updates
from hansa.unwritten import Unwritten, other_columns

_FEWEST_LEAVES = 16
_LEAF_ROWS = 8  # whoever sums a leaf holds all of its rows
_COLUMNS = 8192  # values of a row that stay in cache together with their sum
FEW = 1 << 18  # values that are summed for all leaves in one call: one for each leaf would cost more than the sums


class Node(NamedTuple):
    """``2**level`` leaves that lie side by side: those from ``index * 2**level``."""

    level: int
    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody needs of a node


class Positions(Mapping[Client, int]):
    """Where each client stands in a cohort; looked up only where somebody asks.

    >>> Positions(("a", "b"))["b"]
    1
    """

    def __init__(self, cohort: Sequence[Client]) -> None:
        self._cohort = cohort

    def __getitem__(self, client: Client) -> int:
        return self._found[client]

    def __iter__(self) -> Iterator[Client]:
        return iter(self._cohort)

    def __len__(self) -> int:
        return len(self._cohort)

    @cached_property
    def _found(self) -> dict[Client, int]:
        return {client: i for i, client in enumerate(self._cohort)}


class Tree:
    """Where the rows of ``num_clients`` positions are added.

    >>> tree = Tree(40)
    >>> tree.edges[:4], tree.span(Node(1, 0)), tree.nodes(rows=20)
    ([0, 2, 5, 7], (0, 5), [Node(level=3, index=0), Node(level=3, index=1)])
    """

    def __init__(self, num_clients: int) -> None:
        self.depth = int(np.ceil(np.log2(max(_FEWEST_LEAVES, num_clients / _LEAF_ROWS))))
        self.num_clients, self._num_leaves = num_clients, 1 << self.depth

    @cached_property
    def edges(self) -> list[int]:
        """Leaf ``i`` holds positions ``edges[i]`` up to ``edges[i + 1]``; it may hold none."""
        return [i * self.num_clients // self._num_leaves for i in range(self._num_leaves + 1)]

    def span(self, node: Node) -> tuple[int, int]:
        """The positions of a node: from the first up to, but not with, the second."""
        return self.edges[node.index << node.level], self.edges[(node.index + 1) << node.level]

    def nodes(self, rows: int) -> list[Node]:
        """Nodes of one level that hold every client between them, as large as hold at most ``rows`` (or one leaf)."""
        level = 0
        while level < self.depth and -(-self.num_clients // (self._num_leaves >> (level + 1))) <= rows:
            level += 1
        nodes = [Node(level, i) for i in range(self._num_leaves >> level)]
        return [node for node in nodes if self.span(node)[0] < self.span(node)[1]]

    def around(self, first: int, last: int) -> Node:
        """The smallest node that holds two positions."""
        left, right = (bisect.bisect_right(self.edges, position) - 1 for position in (first, last))
        level = (left ^ right).bit_length()
        return Node(level, left >> level)

    def cuts(self, node: Node, positions: Sequence[int]) -> list[int]:
        """Where sorted ``positions`` within ``node`` pass from leaf to leaf: ``2**level + 1`` places."""
        return [bisect.bisect_left(positions, edge) for edge in self.leaves(node)]

    def leaves(self, node: Node) -> list[int]:
        """The edges of a node's leaves, as positions in the cohort."""
        start = node.index << node.level
        return self.edges[start : start + (1 << node.level) + 1]


@lru_cache(maxsize=4)
def tree_of(num_clients: int) -> Tree:
    """The tree of a cohort: that of the round before, where as many take part."""
    return Tree(num_clients)


def fold(updates: Updates, cuts: Sequence[int] | None = None) -> Updates:
    """One row: the sum of ``weight * row`` in float64, of weights and of the tail likewise.

    ``cuts`` are ``2**k + 1`` places between the rows: each run between two of them is a leaf, summed left to right, and
    leaves are added as a balanced tree; a run may be empty. By default all rows are one run. The clients of the block
    stay in one tuple.

    >>> block = Updates(("a", "b"), np.array([[1.0, 2.0], [3.0, 4.0]], np.float32), np.array([1.0, 2.0]))
    >>> fold(block).values.tolist(), fold(block).weights.tolist(), fold(block, [0, 1, 2]).values.tolist()
    ([[7.0, 10.0]], [3.0], [[7.0, 10.0]])
    """
    edges = [0, len(updates.clients)] if cuts is None else list(cuts)
    filled = [i for i, (start, stop) in enumerate(pairwise(edges)) if start < stop]
    edges = [*(edges[i] for i in filled), edges[-1]]
    weights = np.asarray(updates.weights, dtype=np.float64)
    columns = np.array([weights, *(np.asarray(column) * weights for column in updates.tail.values())])
    sums = _sums(columns, edges)
    add_leaves(sums.T, filled)
    tail = {name: column[:1] for name, column in zip(updates.tail, sums[1:], strict=True)}
    return Updates(updates.clients, _tree_sum(updates.values, weights, edges, filled), sums[0, :1], tail, folded=True)


def add_leaves(leaves: np.ndarray, places: Sequence[int]) -> None:
    """Rows, each a leaf at its place among its neighbours, added as a tree until the first is the sum; in place.

    >>> leaves = np.array([[1.0], [2.0], [4.0]])
    >>> add_leaves(leaves, [0, 2, 3])
    >>> leaves[0]
    array([7.])
    """
    num = len(leaves)
    if num & (num - 1) == 0 and list(places) == list(range(num)):  # no leaf is missing: all pairs at once
        step = 1
        while step < num:
            leaves[:: 2 * step] += leaves[step :: 2 * step]
            step *= 2
        return
    here = list(zip(places, count()))
    while len(here) > 1:
        above: list[tuple[int, int]] = []
        for place, row in here:
            if above and above[-1][0] == place >> 1:
                leaves[above[-1][1]] += leaves[row]
            else:
                above.append((place >> 1, row))
        here = above


def add(left: Updates | None, right: Updates | None) -> Updates | None:
    """Two neighbouring nodes as one; one that is None holds nobody."""
    if left is None or right is None:
        return right if left is None else left
    tail = {name: column + right.tail[name] for name, column in left.tail.items()}
    clients, weights = left.clients + right.clients, left.weights + right.weights
    return Updates(clients, left.values + right.values, weights, tail, {}, folded=True)


def total(tree: Tree, nodes: Mapping[Node, Updates]) -> Updates | None:
    """The sum of nodes that do not overlap, as the tree adds them; None for no nodes."""
    sums: dict[Node, Updates | None] = dict(nodes)
    for level in range(tree.depth):
        for node in [node for node in sums if node.level == level]:
            if node in sums:
                above, other = Node(level + 1, node.index >> 1), Node(level, node.index ^ 1)
                assert above not in sums, f"{node} lies within {above}, which is there too"
                left, right = sorted((node, other))
                sums[above] = add(sums.get(left), sums.get(right))
                sums.pop(node)
                sums.pop(other, None)
    return sums.get(Node(tree.depth, 0))


def leaves(
    tree: Tree, rows: Updates, place: Mapping[Client, int], fold_rows: Callable[[Updates], Updates]
) -> dict[Node, Updates]:
    """The sums of all leaves that ``rows``, in the order of the cohort, lie in."""
    positions = [place[client] for client in rows.clients]
    cuts = tree.cuts(Node(tree.depth, 0), positions)
    filled = [(i, start, stop) for i, (start, stop) in enumerate(pairwise(cuts)) if start < stop]
    return {Node(0, i): fold_rows(rows.take(range(start, stop))) for i, start, stop in filled}


def fold_node(tree: Tree, node: Node, rows: Updates, place: Mapping[Client, int], aggregator: Any) -> Updates | None:
    """One row for a whole node, of ``rows`` in the order of the cohort; None where there are none."""
    if not rows.clients:
        return None
    first, last = tree.span(node)
    if len(rows.clients) == last - first:  # nobody is missing
        cuts = [edge - first for edge in tree.leaves(node)]
    else:
        cuts = tree.cuts(node, [place[client] for client in rows.clients])
    with np.errstate(over="ignore", invalid="ignore"):  # whoever asks looks for what is not finite in the sum
        folded: Updates = aggregator.fold(rows, cuts)
        return folded


def _tree_sum(values: Array, weights: np.ndarray, cuts: Sequence[int], places: Sequence[int]) -> np.ndarray:
    """The sums of the runs between ``cuts``, which are leaves at ``places``, added as a tree: (1, num_params).

    Some columns at a time, so that the leaves stay in cache until they are added.
    """
    if isinstance(values, Unwritten) and values.products:
        return _sum_unwritten(values, weights, cuts, places)
    values = np.asarray(values) if isinstance(values, Unwritten) else values
    is_long = len(values) * values.shape[1] > FEW and values.shape[1] > 1
    if isinstance(values, Apart):
        if is_long:
            return _long_tree_sum(values.runs(cuts), weights, cuts, places)
        values = np.asarray(values)
    if not isinstance(values, np.ndarray) or not is_long:
        sums = weighted_sums(values, weights, cuts) if len(cuts) > 1 else np.zeros((1, values.shape[1]))
        add_leaves(sums, places)
        return sums[:1].copy() if len(sums) > 1 else sums  # no view: all leaves would stay
    values = np.ascontiguousarray(values)
    return _long_tree_sum([values[first:last] for first, last in pairwise(cuts)], weights, cuts, places)


def _long_tree_sum(
    runs: Sequence[np.ndarray], weights: np.ndarray, cuts: Sequence[int], places: Sequence[int]
) -> np.ndarray:
    """The same of long rows, contiguous in each run."""
    num_params = runs[0].shape[1]
    total, leaves = np.empty((1, num_params)), np.empty((len(runs), _COLUMNS))
    for start in range(0, num_params, _COLUMNS):
        part = slice(start, min(start + _COLUMNS, num_params))
        here = leaves[:, : part.stop - start]
        for leaf, run, (first, last) in zip(here, runs, pairwise(cuts), strict=True):
            _add_up(run[:, part], weights[first:last], leaf)
        add_leaves(here, places)
        total[0, part] = here[0]
    return total


def _sum_unwritten(values: Unwritten, weights: np.ndarray, cuts: Sequence[int], places: Sequence[int]) -> np.ndarray:
    """The same of rows whose products stay as they are: each is added up as one product, in float32, not as a tree."""
    total = np.zeros((1, values.shape[1]))
    for columns in other_columns(values.products, values.shape[1]):
        total[:, columns] = _tree_sum(values.held[:, columns], weights, cuts, places)
    for product in values.products:
        for columns, sums in zip(product.columns, product.sums(weights[product.clients]), strict=True):
            total[0, columns] += sums
    return total


def weighted_sums(values: Array, weights: np.ndarray, cuts: Sequence[int]) -> np.ndarray:
    """For each run of rows between ``cuts`` the sum of ``weights * values`` in float64: (num_runs, num_params).

    A run of no rows is zero. A run's sum does not depend on the other runs.
    """
    if isinstance(values, np.ndarray) and values.shape[1] == 1:  # einsum would add one column in another order
        return _sums((values[:, 0].astype(np.float64) * weights)[None], cuts).T
    if isinstance(values, np.ndarray) and values.size <= FEW and len(cuts) > 2:
        return _narrow_sums(values, weights, np.asarray(cuts))
    sums = np.empty((len(cuts) - 1, values.shape[1]))
    for total, (start, stop) in zip(sums, pairwise(cuts), strict=True):
        weighted_sum(values[start:stop], weights[start:stop], total)
    return sums


def _narrow_sums(values: np.ndarray, weights: np.ndarray, cuts: np.ndarray) -> np.ndarray:
    """The same for rows so short that a call for each run would cost more than the sums."""
    if (cuts[1:] == cuts[:-1] + 1).all():
        rows = slice(cuts[0], cuts[-1])
        sums: np.ndarray = np.multiply(values[rows], weights[rows, None], dtype=np.float64)
        sums += 0.0  # a sum begins with zero, which has a sign
        return sums
    places, real = _padded(cuts, len(values))
    own = np.where(real, weights[places], 0.0)
    found: np.ndarray = np.einsum("fm,fmp->fp", own, values[places], dtype=np.float64, casting="safe")
    return found


def _padded(cuts: np.ndarray, num_rows: int) -> tuple[np.ndarray, np.ndarray]:
    """The rows of each run side by side, and which of them are real: both (num_runs, rows of the longest run)."""
    places = cuts[:-1, None] + np.arange(int(np.diff(cuts).max()))
    real = places < cuts[1:, None]
    return np.minimum(places, num_rows - 1), real


def _sums(columns: np.ndarray, edges: Sequence[int]) -> np.ndarray:
    """Sums of each column's runs, left to right, of (num_columns, num_rows): (num_columns, num_runs) float64."""
    cuts = np.asarray(edges)
    sums = np.zeros((len(columns), len(cuts) - 1))
    if len(cuts) > 2 and columns.shape[1]:  # all runs at once, a row of each after the other
        places, real = _padded(cuts, columns.shape[1])
        for place, is_there in zip(places.T, real.T, strict=True):
            np.add(sums, columns[:, place], out=sums, where=is_there)
    elif columns[:, cuts[0] : cuts[-1]].size:
        sums[:, 0] += np.cumsum(columns[:, cuts[0] : cuts[-1]], axis=1)[:, -1]  # not sum(), which adds otherwise
    return sums


def weighted_sum(values: Array, weights: np.ndarray, total: np.ndarray) -> None:
    """Write the sum over rows of ``weights * values``, left to right, into ``total`` (num_params,) float64."""
    if not isinstance(values, np.ndarray):
        total[:] = _weighted_sum_any(values, weights)
        return
    values = np.ascontiguousarray(values)  # einsum's order of summation is that of the memory
    for start in range(0, values.shape[1], _COLUMNS):
        part = slice(start, start + _COLUMNS)
        _add_up(values[:, part], weights, total[part])


def _add_up(values: np.ndarray, weights: np.ndarray, total: np.ndarray) -> None:
    """The same for a few columns of an array that is contiguous."""
    if values.shape[1] == 1 and len(values) > 1:  # einsum would add one column in another order
        total[:] = _sums((values[:, 0].astype(np.float64) * weights)[None], [0, len(values)])[0]
    elif len(values) != 1:
        np.einsum("n,np->p", weights, values, dtype=np.float64, casting="safe", out=total)
    else:
        np.multiply(values[0], weights[0], dtype=np.float64, out=total)  # in half the time, to the same bits:
        total += 0.0  # a sum begins with zero, which has a sign


def _weighted_sum_any(values: Array, weights: np.ndarray) -> Array:
    """The same sum in another array namespace, on the device where the rows lie; only the sum is brought to NumPy."""
    import array_api_compat

    xp = array_api_compat.array_namespace(values)
    total = xp.zeros(values.shape[1], dtype=xp.float64, device=array_api_compat.device(values))
    for row, weight in zip(values, weights, strict=True):
        total = total + xp.astype(row, xp.float64) * float(weight)
    return to_numpy(total)
