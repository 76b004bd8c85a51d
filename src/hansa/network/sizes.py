"""How long a report may be: its row as it is packed, or an aggregator's mail, and a little for names beside it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import sqlalchemy as sa

from hansa.core import chain
from hansa.core.protocols import Plan, Slot
from hansa.federation import Federation
from hansa.network.lengths import Lengths
from hansa.network.store import assignments, slots
from hansa.secagg.steps import buffer_of, in_buffer

_SLACK, _NAMES = 2**20, 2**16  # bytes of a report beside its row: where that may be longer than it is packed, or not
_UNKNOWN_SIZE = 2**28  # reports whose length no one knows before: statistics and the mail of an aggregator


class Sizes:
    """Of the reports of one run; ``lengths`` knows what the clients of a slot were told."""

    def __init__(self, lengths: Lengths, federation: Federation, num_params: int | None) -> None:
        self.lengths, self.federation, self.num_params = lengths, federation, num_params
        self._largest = lru_cache(maxsize=64)(self._found)

    def of(self, slot: Slot) -> int | None:
        """Length of an update in a slot, where it is known before."""
        metrics = getattr(self.federation.learner, "metrics", None)
        sizes: dict[str, int | None] = {"train": self.num_params, "evaluate": getattr(metrics, "size", None)}
        return sizes.get(slot.task)

    def largest(self, slot: Slot, learn: bool) -> int:
        """The most bytes that a report in a slot may have, once its clients were asked."""
        return self._largest(slot, learn)

    def room(self, plan: Plan, num_clients: int) -> int:
        """Bytes that the reports of so many clients to a plan take on the disk, as far as that is known."""
        return num_clients * self._packed(plan.slot, plan.learn, plan.settings, num_clients)[0]

    def _found(self, slot: Slot, learn: bool) -> int:
        if not hasattr(self.federation.parts(slot).aggregator, "report_bytes"):
            return sum(self._packed(slot, learn, (), 1))
        plan = self.lengths.told(slot) if learn or buffer_of(slot.exchange) else None
        return sum(self._packed(slot, learn, () if plan is None else plan.settings, self._num_asked(slot)))

    def _packed(self, slot: Slot, learn: bool, settings: Sequence[Any], num_clients: int) -> tuple[int, int]:
        """Bytes of a slot's row as it is packed, where that is known, and how many a report may have beside it."""
        size, parts = self.of(slot) if learn else None, self.federation.parts(slot)
        says = getattr(parts.aggregator, "report_bytes", None)
        if says is not None and (size is not None or not learn):
            if settings and len(settings) == len(parts.transforms):
                says = parts.aggregator.fitted(chain.limits(parts.transforms, settings)).report_bytes  # type: ignore[attr-defined]  # optional
            return int(says(slot.exchange, self.of(slot) or 0, num_clients)), _NAMES
        if size is None:
            return 0, _UNKNOWN_SIZE
        packed = getattr(self.federation.codec(slot), "row_bytes", None)
        if packed is None or not getattr(parts.aggregator, "reveals_rows", True):
            return 8 * size, _SLACK
        return int(packed(size)), _NAMES

    def _num_asked(self, slot: Slot) -> int:
        """How many clients an attempt began with: those of its largest slot; a buffer's sum, those that sent keys."""
        run, buffer = self.lengths.rounds.run, buffer_of(slot.exchange)
        if buffer is not None:
            return self._num_summed(in_buffer("keys", buffer))
        mine = (slots.c.run == run, slots.c.task == slot.task, slots.c.round == slot.round)
        asked = (
            sa.select(sa.func.count().label("clients"))
            .select_from(assignments.join(slots, slots.c.id == assignments.c.slot_id))
            .where(*mine, slots.c.attempt == slot.attempt)
            .group_by(slots.c.id)
        )
        with self.lengths.rounds.store.read() as db:
            return max((row.clients for row in db.execute(asked)), default=1)

    def _num_summed(self, exchange: str) -> int:
        """How many clients were asked in an exchange, whatever slot they learned in."""
        chosen = (
            sa.select(sa.func.count())
            .select_from(assignments.join(slots, slots.c.id == assignments.c.slot_id))
            .where(slots.c.run == self.lengths.rounds.run, slots.c.slot.endswith(f"-{exchange}", autoescape=True))
        )
        with self.lengths.rounds.store.read() as db:
            return max(1, int(db.scalar(chosen) or 0))


__all__ = ["Sizes"]
