"""What would have travelled, in bytes and by kind, measured by packing it as the network does."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from hansa.core.chain import limits
from hansa.core.protocols import Client, Plan, Report, Slot, Updates
from hansa.federation import Federation, array_hash
from hansa.wire import pack, pack_report, plan_parts

_KINDS = {"train": "update", "evaluate": "metrics", "prepare": "statistics"}


class Bodies:
    """How many bodies of each kind went each way, and their bytes."""

    def __init__(self) -> None:
        self.counts: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0])  # (kind, direction): count, bytes

    def count(self, kind: str, direction: str, count: int, size: int) -> None:
        """``count`` bodies of ``size`` bytes in all."""
        if count:
            entry = self.counts[kind, direction]
            entry[0] += count
            entry[1] += size

    def add(self, other: Bodies) -> None:
        """All that ``other`` counted."""
        for (kind, direction), (count, size) in other.counts.items():
            self.count(kind, direction, count, size)

    def __reduce__(self) -> tuple[Any, ...]:
        return _bodies, (self.as_json(),)

    def as_json(self) -> list[dict[str, Any]]:
        """One entry a kind and direction."""
        return [
            {"kind": kind, "direction": direction, "count": count, "bytes": size}
            for (kind, direction), (count, size) in sorted(self.counts.items())
        ]


def _bodies(entries: Sequence[Mapping[str, Any]]) -> Bodies:
    bodies = Bodies()
    for entry in entries:
        bodies.count(entry["kind"], entry["direction"], entry["count"], entry["bytes"])
    return bodies


class Traffic:
    """Counts of bodies: up (reports) and down (plans, and vectors that a client does not hold yet)."""

    def __init__(self) -> None:
        self.bodies = Bodies()
        self._held: dict[str, tuple[Any, Collection[Client]]] = {}  # newest vector of a name (or its hash), who has it
        self._sizes: dict[Any, int] = {}  # of a vector's body, by its shape and type
        self._plans: dict[tuple[Any, ...], int] = {}  # sizes of plans that are alike for everyone

    def totals(self) -> tuple[int, int]:
        """Bytes up and down so far."""
        up = sum(size for (_, direction), (_, size) in self.bodies.counts.items() if direction == "up")
        return up, sum(size for _, size in self.bodies.counts.values()) - up

    def as_json(self) -> list[dict[str, Any]]:
        """One entry a kind and direction."""
        return self.bodies.as_json()

    def kept(self) -> dict[str, Any]:
        """All of it, for a checkpoint."""
        held = {
            name: [newest if isinstance(newest, str) else array_hash(newest), sorted(clients)]
            for name, (newest, clients) in self._held.items()
        }
        return {"bodies": self.as_json(), "held": held}

    def restore(self, kept: Mapping[str, Any]) -> None:
        """Go on from what ``kept`` gave."""
        self.bodies = _bodies(kept["bodies"])
        self._held = {name: (newest, set(clients)) for name, (newest, clients) in kept["held"].items()}

    def down(self, plan: Plan, clients: Sequence[Client]) -> None:
        """Count a plan, and the vectors of it that its clients do not hold."""
        self.bodies.count("plan", "down", len(clients), self._plan_bytes(plan, clients))
        for name, vector in plan.broadcast.items():
            newest, who = self._held.get(name, (None, ()))
            held: Collection[Client] = tuple(clients)
            fresh = len(held)
            if _same(newest, vector):
                held = set(who).union(clients)
                fresh = len(held) - len(who)
            self._held[name] = (vector, held)
            self.bodies.count("model" if name == "params" else name, "down", fresh, self._size(vector) * fresh)

    def _plan_bytes(self, plan: Plan, clients: Sequence[Client]) -> int:
        """Bodies of a plan: all alike unless variants or mail differ by client."""
        named = {name: "0" * 64 for name in plan.broadcast}
        if plan.variants or plan.mail:
            return sum(len(pack({**plan_parts(plan, client)[0], "broadcast": named})) for client in clients)
        if not clients:
            return 0
        slot = plan.slot  # plans that say the same but for the digits of a number and a key are of one size
        said = slot.task, slot.exchange, len(str(slot.round)), len(str(slot.attempt)), plan.learn, len(plan.settings)
        form = (slot, *named) if any(plan.settings) else (*said, *named)
        if form not in self._plans:
            if len(self._plans) > 64:
                self._plans.clear()
            self._plans[form] = len(pack({**plan_parts(plan, clients[0])[0], "broadcast": named}))
        return self._plans[form] * len(clients)

    def _size(self, vector: Any) -> int:
        """Body size of a broadcast vector."""
        form = (vector.shape, str(vector.dtype))
        if form not in self._sizes:
            self._sizes[form] = len(pack(vector))
        return self._sizes[form]


def _same(newest: Any, vector: Any) -> bool:
    """Whether what clients were sent last, which may be known by its hash alone, is this vector."""
    if isinstance(newest, str):
        return newest == array_hash(vector)
    if newest is vector or newest is None:
        return newest is vector
    if newest.shape != vector.shape or newest.dtype != vector.dtype:
        return False
    before, now = (np.ascontiguousarray(array).reshape(-1).view(np.uint8) for array in (newest, vector))
    few = slice(0, 4096)  # where two vectors differ, they nearly always do so here
    return np.array_equal(before[few], now[few]) and np.array_equal(before, now)


class ReportSizes:
    """Bodies of reports, from where the rows are: rows of one codec and one form are all of one size."""

    def __init__(self, federation: Federation) -> None:
        self._federation = federation
        self._sizes: dict[tuple[int | str, ...], int] = {}  # of a report, by the form of its row

    def bodies(self, plan: Plan, report: Report, num_cohort: int = 1) -> Bodies:
        """What a block's report is over the network: a body for each client.

        Where sums are those of an ideal functionality, about what its protocol would send, as one body.
        """
        bodies, codec = Bodies(), self._federation.codec(plan.slot)
        kind = _KINDS[plan.slot.task] if plan.learn else "mail"
        bodies.count(kind, "up", len(report.clients), self._bytes(plan, report, num_cohort))
        for client, reason in report.refused.items():
            body = pack_report(Report(plan.slot, (), {}, {client: reason}), codec)
            bodies.count("refusal", "up", 1, len(body))
        return bodies

    def _bytes(self, plan: Plan, report: Report, num_cohort: int) -> int:
        if not report.clients:
            return 0
        parts = self._federation.parts(plan.slot)
        secure = getattr(parts.aggregator, "secure", None)
        if secure is not None and isinstance(report.payload, Updates):  # in buffers rows wait, of which nothing is said
            size, tail = report.payload.values.shape[1], len(report.payload.tail)
            fitted = secure.fitted(limits(parts.transforms, plan.settings))
            return int(fitted.round_bytes(size, tail, num_cohort)) * len(report.clients)
        codec, payload = self._federation.codec(plan.slot), report.payload
        if isinstance(payload, Updates) and plan.slot.task == "train":
            form = (payload.values.shape[1], *sorted(payload.tail))
            if form not in self._sizes:
                one = Report(plan.slot, report.clients[:1], payload.take([0]))
                self._sizes[form] = len(pack_report(one, codec))
            return self._sizes[form] * len(report.clients)
        return sum(len(pack_report(one, codec)) for one in _single(plan.slot, report))


def _single(slot: Slot, report: Report) -> Iterator[Report]:
    """A report for each client of a block."""
    for i, client in enumerate(report.clients):
        row = report.payload.take([i]) if isinstance(report.payload, Updates) else {client: report.payload[client]}
        yield Report(slot, (client,), row)
