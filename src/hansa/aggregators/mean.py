"""The weighted mean of the clients' updates: what FedAvg does on the server.

    mean = sum_i w_i * u_i / sum_i w_i,     w_i = the number of examples, or 1

McMahan, Moore, Ramage, Hampson and Agüera y Arcas, "Communication-efficient learning of deep networks from
decentralized data", AISTATS 2017, algorithm 1. Differences: ``denominator`` replaces the sum of weights by a fixed
number, without which no bound on one client's say holds; and weights may be capped.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from hansa.aggregators.blocks import stacked
from hansa.aggregators.folds import Positions, fold, leaves, total, tree_of
from hansa.aggregators.later import are_long, sum_later
from hansa.aggregators.one_exchange import answer_rows, ask_once
from hansa.core.errors import InputError
from hansa.core.key import Key
from hansa.core.protocols import Aggregate, Ask, Client, Plan, Report, Updates
from hansa.long_vectors import columnwise, is_columnwise
from hansa.unwritten import passes_rows_on


@dataclass(frozen=True, kw_only=True)
class Mean:
    """Weighted mean. ``max_weight`` caps what one client can weigh, in examples; the server applies it again.

    | input | result |
    |---|---|
    | no client | refused by ``server_round``: the attempt is abandoned |
    | all weights zero | ``Abandoned`` likewise: clients without examples do not report |
    | one client | that client's update |
    | NaN or infinity in a row | that client is refused before it is counted |

    >>> block = Updates(("a", "b"), np.array([[0.0], [3.0]]), np.array([1.0, 2.0]))
    >>> Mean().reduce([Mean().fold(block)], [1.0]).values.tolist()
    [2.0]
    """

    weighting: Literal["examples", "clients"] = "examples"
    max_weight: float | None = None
    denominator: float | None = None

    linear = True
    reveals_rows = True

    def __post_init__(self) -> None:
        if self.weighting not in ("examples", "clients"):
            raise InputError(f'Mean(weighting=): expected "examples" or "clients", found {self.weighting!r}')
        for name in ("max_weight", "denominator"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise InputError(f"Mean({name}=): expected a positive number or None, found {value}")

    def ask(self, cohort: tuple[Client, ...], history: Mapping[str, tuple[Report, ...]]) -> Ask | None:
        """One exchange, in which everyone learns."""
        return ask_once(cohort, history)

    def answer(
        self, plan: Plan, updates: Updates | None, scratch: Mapping[Client, Any], secret: Sequence[Key]
    ) -> tuple[Any, Mapping[Client, Any], Mapping[Client, str]]:
        """The rows themselves, with the weights that this mean gives them."""
        payload, kept, refused = answer_rows(updates)
        return self._weighted(payload), kept, refused

    @passes_rows_on
    @columnwise()
    def fold(self, updates: Updates, cuts: Sequence[int] | None = None) -> Updates:
        """One row for all, here or on a worker; ``cuts`` are the leaves of a tree (see folds.py)."""
        return fold(self._weighted(updates), cuts)

    def open(self, cohort: tuple[Client, ...], history: Mapping[str, tuple[Report, ...]]) -> Updates:
        """The sum of everyone's rows, added as the cohort's tree has it, whoever folded them.

        Of rows that are long together some columns are added at a time (see later.py).
        """
        reports = [report for report in history["update"] if report.clients]
        if not reports:
            return Updates((), np.zeros((1, 0)), np.zeros(1))
        place, tree, nodes = Positions(cohort), tree_of(len(cohort)), {}
        if are_long(reports) and is_columnwise(self.fold):
            return sum_later(tree, reports, place, self.fold)
        for report in reports:
            if report.payload.folded:
                is_whole = len(report.clients) == len(cohort)
                ends = (0, len(cohort) - 1) if is_whole else (place[report.clients[0]], place[report.clients[-1]])
                nodes[tree.around(*ends)] = report.payload
        rows = [report for report in reports if not report.payload.folded]
        if rows:
            nodes.update(leaves(tree, stacked(cohort, rows), place, self.fold))
        whole = total(tree, nodes)
        assert whole is not None
        assert len(whole.clients) == sum(len(report.clients) for report in reports), "nodes that overlap"
        return whole

    @columnwise()
    def reduce(self, blocks: Sequence[Updates], scales: Sequence[float]) -> Aggregate:
        """Folded blocks, one a plan, each scaled for its staleness, over the denominator or the sum of weights.

        Scales are not in that sum: stale updates shorten the step, as in FedBuff. The tail's means are by scale.
        """
        over = self.denominator or sum(float(block.weights[0]) for block in blocks)
        values = blocks[0].values[0] * scales[0]
        for block, scale in zip(blocks[1:], scales[1:], strict=True):
            values += block.values[0] * scale
        values /= over
        scaled = sum(float(block.weights[0]) * scale for block, scale in zip(blocks, scales, strict=True))
        tail = {
            name: sum(float(block.tail[name][0]) * scale for block, scale in zip(blocks, scales, strict=True))
            / (self.denominator or scaled)
            for name in blocks[0].tail
        }
        return Aggregate(values, tail)

    def sensitivity(self, bound: float) -> float:
        """How far one client can move the mean: ``bound * max weight / denominator``; infinite without both."""
        largest = 1.0 if self.weighting == "clients" else self.max_weight
        if self.denominator is None or largest is None:
            return math.inf
        return bound * largest / self.denominator

    def _weighted(self, updates: Updates) -> Updates:
        """The block with this mean's weights; applying it twice changes nothing."""
        if self.weighting == "clients":
            return updates._replace(weights=np.ones(len(updates.clients)))
        if self.max_weight is not None:
            return updates._replace(weights=np.minimum(updates.weights, self.max_weight))
        return updates
