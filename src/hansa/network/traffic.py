"""Bodies counted by kind, direction and round: in memory, and written now and then, as they are but statistics."""

from __future__ import annotations

import threading
from collections import defaultdict
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects.sqlite import insert as upsert

from hansa.core.protocols import Slot
from hansa.network.rounds import Rounds
from hansa.network.store import counters


class Counts:
    """What was really sent and received in one run."""

    def __init__(self, rounds: Rounds) -> None:
        self._store, self._run, self._lock = rounds.store, rounds.run, threading.Lock()
        self._new: dict[tuple[str, str, str, int], list[int]] = defaultdict(lambda: [0, 0])

    def add(self, kind: str, direction: str, size: int, slot: Slot | None) -> None:
        """Count one body of ``size`` bytes; ``slot`` is the exchange it belongs to, if any."""
        key = (kind, direction, slot.task if slot else "", slot.round if slot else -1)
        with self._lock:
            entry = self._new[key]
            entry[0] += 1
            entry[1] += size

    def flush(self) -> None:
        """Write what was counted."""
        with self._lock:
            new, self._new = self._new, defaultdict(lambda: [0, 0])
        if not new:
            return
        with self._store.write() as db:
            for (kind, direction, task, number), (count, size) in new.items():
                row = upsert(counters).values(
                    run=self._run, kind=kind, direction=direction, task=task, round=number, count=count, bytes=size
                )
                more = {"count": counters.c.count + count, "bytes": counters.c.bytes + size}
                key = ["run", "kind", "direction", "task", "round"]
                db.execute(row.on_conflict_do_update(index_elements=key, set_=more))

    def totals(self, number: int | None = None) -> tuple[int, int]:
        """Bytes up and down so far, or those of one round (training and its evaluation)."""
        self.flush()
        rows = [r for r in self._rows() if number is None or (r.round == number and r.task != "prepare")]
        up = sum(r.bytes for r in rows if r.direction == "up")
        return up, sum(r.bytes for r in rows) - up

    def bodies(self) -> list[dict[str, Any]]:
        """One entry a kind and direction: kind, direction, count, bytes."""
        self.flush()
        sums: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0])
        for row in self._rows():
            sums[row.kind, row.direction][0] += row.count
            sums[row.kind, row.direction][1] += row.bytes
        return [
            {"kind": kind, "direction": direction, "count": count, "bytes": size}
            for (kind, direction), (count, size) in sorted(sums.items())
        ]

    def _rows(self) -> list[Any]:
        """Every counter of this run."""
        with self._store.read() as db:
            return list(db.execute(sa.select(counters).where(counters.c.run == self._run)))
