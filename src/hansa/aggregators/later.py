"""The sum of long rows: some columns of all rows at a time, so that of rows in files little is in memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from hansa.aggregators.blocks import Apart, rows_of
from hansa.aggregators.folds import Node, Tree
from hansa.core.protocols import Client, Report, Updates
from hansa.long_vectors import Later, columns_of, is_long, let_go, spans

_VALUES = 2**22  # of all rows together, that are looked at at a time
_ALIGNED = 2**13


def are_long(reports: Sequence[Report]) -> bool:
    """Whether all rows are ones that nobody has folded, and long together."""
    payloads = [report.payload for report in reports]
    if not all(isinstance(one, Updates) and not one.folded and _lies_apart(one) for one in payloads):
        return False
    shapes = [one.values.shape for one in payloads]
    return shapes[0][1] > 1 and is_long(sum(rows * columns for rows, columns in shapes))


def sum_later(
    tree: Tree,
    reports: Sequence[Report],
    place: Mapping[Client, int],
    fold_rows: Callable[[Updates, Sequence[int]], Updates],
) -> Updates:
    """One folded row, of the bits that the tree's leaves and their sum have.

    A long one's columns are added when asked for: its rows must stay as they are until then.
    """
    where = rows_of(reports)
    clients = tuple(client for client in place if client in where)
    blocks = [where[client] for client in clients]
    rows = [block.values if len(block.values) == 1 else block.values[i : i + 1] for block, i in blocks]
    num_params = rows[0].shape[1]
    cuts = tree.cuts(Node(tree.depth, 0), [place[client] for client in clients])
    narrow = Updates(
        clients,
        np.zeros((len(rows), 0), np.float32),
        np.array([block.weights[i] for block, i in blocks], dtype=np.float64),
        {name: np.array([block.tail[name][i] for block, i in blocks]) for name in blocks[0][0].tail},
    )
    width = max(_VALUES // len(rows) // _ALIGNED, 1) * _ALIGNED

    def columns(first: int, stop: int) -> np.ndarray:
        total = np.empty((1, stop - first))
        for start, end in spans(stop, width, first):
            part = Apart([columns_of(row, start, end) for row in rows])
            total[:, start - first : end - first] = fold_rows(narrow._replace(values=part), cuts).values
            for row in rows:
                let_go(row)
        return total

    values = Later((1, num_params), columns)
    return fold_rows(narrow, cuts)._replace(values=values if is_long(num_params) else np.asarray(values))


def _lies_apart(updates: Updates) -> bool:
    """Whether rows can be had some columns at a time."""
    return isinstance(updates.values, np.ndarray | Later)
