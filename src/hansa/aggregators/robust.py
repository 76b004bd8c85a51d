"""What aggregators that look at rows share: they open a block, refuse inadmissible sizes and claim no sensitivity."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hansa.aggregators.blocks import stacked, to_numpy
from hansa.aggregators.one_exchange import answer_rows, ask_once
from hansa.core.errors import RunError
from hansa.core.key import Key
from hansa.core.protocols import Aggregate, Array, Ask, Client, Plan, Report, Updates

_COLUMNS = 65536


@dataclass(frozen=True, kw_only=True)
class RowAggregator:
    """One exchange, rows seen by the server, every client with the same say; ``merge`` is what differs."""

    linear = False
    reveals_rows = True

    def merge(self, rows: Array) -> Array:
        """(num_clients, num_params) -> (num_params,)."""
        raise NotImplementedError

    def ask(self, cohort: tuple[Client, ...], history: Mapping[str, tuple[Report, ...]]) -> Ask | None:
        """One exchange, in which everyone learns."""
        return ask_once(cohort, history)

    def answer(
        self, plan: Plan, updates: Updates | None, scratch: Mapping[Client, Any], secret: Sequence[Key]
    ) -> tuple[Any, Mapping[Client, Any], Mapping[Client, str]]:
        """The rows themselves."""
        return answer_rows(updates)

    def open(self, cohort: tuple[Client, ...], history: Mapping[str, tuple[Report, ...]]) -> Updates:
        """Every row, in the order of the cohort."""
        return stacked(cohort, history["update"])

    def reduce(self, blocks: Sequence[Updates], scales: Sequence[float]) -> Aggregate:
        """All rows of all blocks merged; staleness scales each row."""
        rows = [
            to_numpy(block.values) if scale == 1 else to_numpy(block.values) * np.float32(scale)
            for block, scale in zip(blocks, scales, strict=True)
        ]
        values = self.merge(np.concatenate(rows) if len(rows) > 1 else rows[0])
        names = blocks[0].tail
        tail = {name: float(np.mean(np.concatenate([np.asarray(b.tail[name]) for b in blocks]))) for name in names}
        return Aggregate(np.asarray(values, dtype=np.float64), tail)

    def sensitivity(self, bound: float) -> float:
        """Infinite: no bound is proved here."""
        return math.inf


def in_columns(rows: Array, merge: Callable[[Array], Array]) -> Array:
    """``merge`` of (num_clients, some columns) applied over all columns, so that memory stays near one model."""
    parts = [merge(rows[:, start : start + _COLUMNS]) for start in range(0, rows.shape[1], _COLUMNS)]
    return np.concatenate(parts) if parts else np.zeros(0)


def need(name: str, condition: bool, expected: str, num_clients: int) -> None:
    """Raise ``RunError`` when a cohort is too small for the rule."""
    if not condition:
        raise RunError(f"{name}: expected {expected}, found {num_clients}; raise cohort_size or min_clients")
