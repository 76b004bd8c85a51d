"""``Sums``: what a worker has added up so far of a plan's cohort."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from hansa.aggregators.blocks import beside
from hansa.aggregators.folds import FEW, Node
from hansa.core.protocols import Updates

FEW_ROWS = 2
_LONGEST = 1 << 24  # values of rows that may wait
_TOGETHER = 4  # rows that wait for their neighbours, to be summed while in cache: each sum of two rows costs as much


def waits(payload: Any) -> bool:
    """Whether rows are so few and so long that ``Sums`` had better be given them before they are folded."""
    values = payload.values if isinstance(payload, Updates) and not payload.folded else None
    return isinstance(values, np.ndarray) and 0 < len(values) <= FEW_ROWS and FEW < values.shape[1] <= _LONGEST


class Sums:
    """Folded rows of nodes, neighbours added as soon as both are there: few rows are held at a time.

    Rows that are not folded yet wait until some neighbours can be summed at once, by ``fold_rows(node, rows)``.

    >>> sums = Sums(lambda node, rows: fold(rows))
    >>> for i in (0, 2, 1):
    ...     sums.add(Node(0, i), Updates((str(i),), np.array([[float(i)]]), np.ones(1), folded=True))
    >>> {tuple(node): row.values.tolist() for node, row in sums.rows.items()}
    {(0, 2): [[2.0]], (1, 0): [[1.0]]}
    """

    def __init__(self, fold_rows: Callable[[Node, Updates], Updates]) -> None:
        self._fold, self._sums = fold_rows, dict[Node, Updates]()
        self._waiting: dict[Node, Updates] = {}

    @property
    def rows(self) -> dict[Node, Updates]:
        """One folded row a node, of nodes that are no neighbours."""
        for node in list(self._waiting):
            self._add(node, self._fold(node, self._waiting.pop(node)))
        return self._sums

    def add(self, node: Node, rows: Updates) -> None:
        """File what a node holds: its sum, which is added to in place, or rows that wait."""
        if rows.folded:
            self._add(node, rows)
            return
        while (other := self._waiting.pop(Node(node.level, node.index ^ 1), None)) is not None:
            rows = beside(other, rows) if node.index & 1 else beside(rows, other)
            node = Node(node.level + 1, node.index >> 1)
        if len(rows.clients) >= _TOGETHER:
            self._add(node, self._fold(node, rows))
            return
        self._waiting[node] = rows
        if len(self._waiting) > _TOGETHER:  # neighbours that do not come: somebody else has them
            first = next(iter(self._waiting))
            self._add(first, self._fold(first, self._waiting.pop(first)))

    def _add(self, node: Node, row: Updates) -> None:
        while (other := self._sums.pop(Node(node.level, node.index ^ 1), None)) is not None:
            left, right = (other, row) if node.index & 1 else (row, other)
            left.values.__iadd__(right.values)
            tail = {name: column + right.tail[name] for name, column in left.tail.items()}
            row = left._replace(clients=left.clients + right.clients, weights=left.weights + right.weights, tail=tail)
            node = Node(node.level + 1, node.index >> 1)
        self._sums[node] = row
