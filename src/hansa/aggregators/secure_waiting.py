"""Rows that wait for a buffer: of a client that has learned, until its row is summed with those of the same buffer.

So, Ali, Güler and Avestimehr, "Secure aggregation for buffered asynchronous federated learning", arXiv 2110.02177,
2021, make masks that cancel although clients chose them in different rounds. Here masks are agreed on when the buffer
is full, and clients scale their late rows themselves: the protocol is that of a round, and so is what it proves.

A row is for one sum. Whoever could have it summed twice, among different others, would know it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from hansa.core.protocols import Client, Updates
from hansa.secagg.errors import SecAggError
from hansa.secagg.refusals import OutOfOrder

LEAST_SCALE = 2.0**-4  # what a late row counts at least: of rows that counted less, too little would hide the others
_READY, _SCALED = "ready", "secure.scaled"  # a column of ones, whose scaled sum is what the columns are means over


class Waiting(NamedTuple):
    """A row that is in no sum yet, as it is stored: ``values`` (num_params,), ``weight``, ``tail``."""

    row: Mapping[str, Any]

    @staticmethod
    def of(held: Any, *, buffered: bool, first: bool) -> tuple[Mapping[str, Any], Waiting | None]:
        """What a client kept of the protocol, and its row; ``OutOfOrder`` unless the next exchange may follow.

        A sum begins once in an attempt: in a round with nothing at hand, and for a buffer with a row that waits.
        """
        kept = dict(held or {})
        row = kept.pop("row", None)
        done = kept.get("step")
        if first and done != (_READY if buffered else None):
            raise OutOfOrder(f"expected a sum to begin once, and a buffer's with a row; found {done or 'nothing'} done")
        if done in (_READY, "keys", "shares") and buffered != (row is not None):
            raise OutOfOrder("expected the exchanges of one sum, found those of a round and of a buffer")
        return kept, None if row is None else Waiting(row)

    def block(self, name: Client) -> Updates:
        """The row as a block; beside columns, one that its scale shows in."""
        columns = {**self.row["tail"], _SCALED: 1.0} if self.row["tail"] else {}
        tail = {column: np.array([value]) for column, value in columns.items()}
        return Updates((name,), self.row["values"][None], np.array([self.row["weight"]]), tail)


def keep_rows(
    updates: Updates | None, scratch: Mapping[Client, Any]
) -> tuple[dict[Client, Any], dict[Client, Any], dict[Client, str]]:
    """What clients say that have learned (nothing), what they keep, and who had learned before."""
    if updates is None:
        return {}, {}, dict.fromkeys(scratch, "expected to learn, and was not asked to")
    payload, kept, refused = dict[Client, Any](), dict[Client, Any](), dict[Client, str]()
    for i, name in enumerate(updates.clients):
        if scratch.get(name):
            refused[name] = "expected to learn once in an attempt, was asked to learn again"
            continue
        row = updates.take([i])
        tail = {column: float(values[0]) for column, values in row.tail.items()}
        values, weight = np.asarray(row.values[0]), float(row.weights[0])
        payload[name], kept[name] = {}, {"step": _READY, "row": {"values": values, "weight": weight, "tail": tail}}
    return payload, kept, refused


def scale_of(told: Any) -> tuple[float, dict[str, Any]]:
    """What a late row counts, and the rest of the mail; ``SecAggError`` where it would not hide or be hidden."""
    rest = dict(told) if isinstance(told, Mapping) else {}
    scale = rest.pop("scale", None)
    if not isinstance(scale, int | float) or not math.isfinite(scale) or not LEAST_SCALE <= scale <= 1:
        raise SecAggError(f"expected a late row to count from {LEAST_SCALE} to 1, was asked for {scale!r:.40}")
    return float(scale), rest


def by_scale(row: Updates, *, divides: bool) -> Updates:
    """A sum without the column of scales; where the mean ``divides`` by weights, columns become means by scale."""
    tail = dict(row.tail)
    scaled = tail.pop(_SCALED, None)
    if divides and scaled is not None and scaled[0] > 0:
        tail = {name: column * (row.weights / scaled) for name, column in tail.items()}
    return row._replace(tail=tail)


__all__ = ["LEAST_SCALE", "Waiting", "by_scale", "keep_rows", "scale_of"]
