"""What secure aggregation computes, without the cryptography: the same grid, the same rounding, the same sums.

The ideal functionality of the protocol, for simulations at full speed: whatever it gives, ``SecureMean`` with all five
exchanges gives, too, bit for bit where nobody is lost on the way (columns beside the update to their last digit).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np

from hansa.aggregators.blocks import beside, stacked
from hansa.aggregators.mean import Mean
from hansa.aggregators.secure_rows import heaviest, share_of, sums_of, weight_of
from hansa.aggregators.secure_waiting import Waiting, by_scale, keep_rows, scale_of
from hansa.core.chain import Limits
from hansa.core.errors import Abandoned, CheckError
from hansa.core.key import Key
from hansa.core.protocols import Aggregate, Ask, Client, Plan, Report, Updates
from hansa.secagg.graph import groups_of
from hansa.secagg.grid import UNBOUNDED, limbs_of, numbers_of, rounded, step_of, width_of
from hansa.secagg.steps import step_in

_WEIGHT = "secure.weight"
History = Mapping[str, tuple[Report, ...]]
_SUM = Mean(weighting="clients")


@dataclass(frozen=True, kw_only=True)
class IdealSum:
    """``secure`` (a ``SecureMean``) as a trusted party would do it, who sees rows and tells their sum.

    Rows are multiples of the grid's step, weighted by a share of the largest weight; columns come weighted, with the
    weight among them. Sums of both are exact, so that they may be folded anywhere.
    """

    secure: Any

    linear = True
    reveals_rows = False

    def __getattr__(self, name: str) -> Any:
        """What it is asked about weights, bits and groups is the secure mean's own."""
        if name.startswith("__") or name in ("secure", "fitted", "check_mail", "fold"):
            raise AttributeError(name)
        return getattr(self.secure, name)

    def __repr__(self) -> str:
        return f"{self.secure!r}, simulated by its ideal functionality"

    def fitted(self, limits: Limits) -> Any:
        """The same for one round."""
        return type(self)(secure=self.secure.fitted(limits))

    def of_sums(self) -> Any:
        """The same for sums of metrics and statistics."""
        return ideal(self.secure.of_sums())

    def ask(self, cohort: tuple[Client, ...], history: History) -> Ask | None:
        """One exchange, in which everyone learns: the one in which masked rows would travel."""
        return None if "masked" in history else Ask("masked", cohort, True)

    def answer(
        self, plan: Plan, updates: Updates | None, scratch: Mapping[Client, Any], secret: Sequence[Key]
    ) -> tuple[Any, Mapping[Client, Any], Mapping[Client, str]]:
        """Rows on the grid; a row that a client would refuse to mask is refused. For a buffer they wait in between."""
        if step_in(plan.slot.exchange) == self.buffer_exchange:
            return keep_rows(updates, scratch)
        if updates is not None:
            return self._on_grid(plan, updates, secret, [1.0] * len(updates.clients))
        found = [Waiting(held["row"]).block(name) for name, held in scratch.items()]
        scales = [scale_of(plan.mail[name])[0] for name in scratch]
        block, _, refused = self._on_grid(plan, reduce(beside, found), secret, scales)
        return block, {name: {"step": "done"} for name in scratch}, refused

    def _on_grid(
        self, plan: Plan, updates: Updates, secret: Sequence[Key], scales: Sequence[float]
    ) -> tuple[Updates, Mapping[Client, Any], Mapping[Client, str]]:
        """Rows as whole multiples of the grid's step; each counts its scale."""
        limits, most, bits = self.secure.limits, heaviest(self.secure), self.secure.bits
        has_grid = math.isfinite(limits.value)
        if not has_grid and plan.slot.task == "train":
            raise CheckError([UNBOUNDED])
        step = step_of(limits, bits) if has_grid else 0.0
        source, dtype = np.asarray(updates.values), np.float32 if has_grid else np.float64
        values, refused = np.empty(source.shape, dtype), dict[Client, str]()
        columns = np.zeros((len(source), 1 + len(updates.tail)))
        for i, client in enumerate(updates.clients):
            row = updates.take([i])
            weight = weight_of(row, most)
            scaled = weight * scales[i]
            numbers = np.array([weight, *(float(column[0]) * scaled for column in row.tail.values())])
            try:
                columns[i] = numbers_of(limbs_of(numbers))
                if has_grid:
                    share = share_of(weight, most, scales[i])
                    values[i] = rounded(source[i], limits, bits, secret[i], share)
                    values[i] *= np.float32(step)
                else:
                    values[i] = numbers_of(limbs_of(np.asarray(source[i], np.float64) * scaled))
            except CheckError as error:
                refused[client] = f"secure aggregation: {error}"
        tail = {name: columns[:, j] for j, name in enumerate((_WEIGHT, *updates.tail))}
        block = Updates(updates.clients, values, np.ones(len(updates.clients)), tail)
        if refused:
            block = block.take([i for i, client in enumerate(block.clients) if client not in refused])
        return block, {}, refused

    def open(self, cohort: tuple[Client, ...], history: History) -> Updates:
        """The sum of everyone's rows, or the means of random groups; ``Abandoned`` where too few are left."""
        reports = history["masked"]
        present = [client for report in reports for client in report.clients]
        terms = self.secure.terms
        if self.secure.across is None:
            self._refuse_few(len(present), len(cohort))
            return self._weighed(_SUM.open(cohort, {"update": reports}))
        rows = stacked(cohort, [report for report in reports if report.clients])
        session = Key.of(f"groups {reports[0].slot} {present}").material
        num_groups = terms.groups(len(present))
        groups = [sorted(int(place) for place in group) for group in groups_of(session, len(present), num_groups)]
        self._refuse_few(min(map(len, groups)), max(1, len(cohort) // num_groups))
        return sums_of([self._weighed(_SUM.fold(rows.take(group))) for group in groups], apart=True)

    def reduce(self, blocks: Sequence[Updates], scales: Sequence[float]) -> Aggregate:
        """As the secure mean."""
        found: Aggregate = self.secure.reduce(blocks, scales)
        return found

    def sensitivity(self, bound: float) -> float:
        """As the secure mean."""
        found: float = self.secure.sensitivity(bound)
        return found

    def _refuse_few(self, num_left: int, num_asked: int) -> None:
        terms = self.secure.terms
        fewest = terms.fewest(terms.graph(num_asked))
        if num_left < fewest:
            raise Abandoned(f"secure sum: expected at least {fewest} clients, found {num_left}", may_heal=True)
        if math.isfinite(self.secure.limits.value):
            width_of(self.secure.limits, self.secure.bits, num_left)  # refuses what could overflow

    def _weighed(self, row: Updates) -> Updates:
        """A folded sum with its own weight, and values in units of it."""
        tail, most = dict(row.tail), heaviest(self.secure)
        weights = tail.pop(_WEIGHT)
        values = row.values if most is None or not math.isfinite(self.secure.limits.value) else row.values * most
        return by_scale(
            row._replace(values=values, weights=weights, tail=tail), divides=self.secure.denominator is None
        )


class _Folding(IdealSum):
    """Rows that are added anywhere: whole multiples of one step."""

    def fold(self, updates: Updates, cuts: Sequence[int] | None = None) -> Updates:
        """One row for all, here or on a worker."""
        return _SUM.fold(updates, cuts)


def ideal(secure: Any, *, buffered: bool = False) -> IdealSum:
    """The ideal functionality of a secure mean; groups that meet in a rule are not folded, nor rows that wait."""
    return IdealSum(secure=secure) if buffered or secure.across is not None else _Folding(secure=secure)


__all__ = ["IdealSum", "ideal"]
