"""Whether a client's row is as short as its plan asked: a client that does not clip is refused, not trusted.

Where the server sees rows, it holds each to the bound that the chain proves: it protects the model from
an update of any length, and makes the bound that noise is sized for the server's own. Under secure aggregation nobody
can look, and the bound holds for clients that clip.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import numpy as np
import sqlalchemy as sa

from hansa.core import chain
from hansa.core.chain import Transform
from hansa.core.protocols import Plan, Slot, Updates
from hansa.federation import Federation
from hansa.long_vectors import Later, columns_of, spans
from hansa.network.messages import read_plan
from hansa.network.rounds import Rounds
from hansa.network.store import assignments, slots

_COLUMNS = 2**19
_ROUNDING = 1e-5  # of the bound: rows are float32
TOO_LONG = "update is longer than its clipping norm"


class Lengths:
    """Holds the rows of a run, with the tail columns that the chain adds, to the norm bounds of their plans."""

    def __init__(self, rounds: Rounds, federation: Federation) -> None:
        self.rounds, self.federation = rounds, federation
        self.told = lru_cache(maxsize=64)(self._plan)  # a slot's plan without vectors, or None

    def fault(self, slot: Slot, updates: Updates) -> str:
        """``TOO_LONG`` for a row that is longer than its plan allows; nothing where no bound is proved."""
        parts = self.federation.parts(slot)
        of_records = any(getattr(transform, "bounds_records", False) for transform in parts.transforms)
        if not parts.transforms or of_records or not getattr(parts.aggregator, "reveals_rows", True):
            return ""
        plan = self.told(slot)
        if plan is None:
            return ""
        bound = chain.norm_bound(parts.transforms, plan.settings)
        if math.isinf(bound):
            return ""
        squares = self._squares(plan, updates.values)
        for name in (name for transform in parts.transforms for name in getattr(transform, "tail_names", ())):
            squares += np.asarray(updates.tail.get(name, 0.0), np.float64) ** 2
        return TOO_LONG if (np.sqrt(squares) > bound * (1 + _ROUNDING)).any() else ""

    def _plan(self, slot: Slot) -> Plan | None:
        """What the clients of a slot were told, without vectors; None where it has been forgotten."""
        mine = sa.and_(slots.c.run == self.rounds.run, slots.c.slot == str(slot), assignments.c.body.is_not(None))
        chosen = sa.select(assignments.c.body).join(slots, slots.c.id == assignments.c.slot_id).where(mine).limit(1)
        with self.rounds.store.read() as db:
            body = db.execute(chosen).scalar_one_or_none()
        return None if body is None else read_plan(body).plan("", {})

    def _squares(self, plan: Plan, values: Any) -> np.ndarray[Any, np.dtype[np.float64]]:
        """Squared length of each decoded row, some columns at a time where decoding leaves them alone."""
        transforms = self.federation.parts(plan.slot).transforms
        if all(getattr(type(t), "decode", None) is Transform.decode for t in transforms):
            squares = np.zeros(values.shape[0])
            for start, stop in spans(values.shape[1], _COLUMNS):
                part = np.asarray(columns_of(values, start, stop), np.float64)
                squares += np.einsum("np,np->n", part, part)
            return squares
        if isinstance(values, Later):  # a long row that only a whole one could be decoded from
            return np.zeros(values.shape[0])
        whole = np.asarray(chain.decode(transforms, np.asarray(values), plan), np.float64)
        found: np.ndarray[Any, np.dtype[np.float64]] = np.einsum("np,np->n", whole, whole)
        return found


__all__ = ["TOO_LONG", "Lengths"]
