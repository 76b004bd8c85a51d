"""Plans as the server needs them again: those of buffered rounds read from what clients were told, others by hash."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

from hansa.core.protocols import Client, Plan, Slot
from hansa.network.buffers import Buffers
from hansa.network.messages import read_plan


class OpenPlans(Mapping[Slot, Plan]):
    """Plans by slot, without their vectors: what decoding and counting need, whatever process made them."""

    def __init__(self, buffers: Buffers, algorithm: Any) -> None:
        self._buffers, self._varies = buffers, hasattr(algorithm, "variants")

    def __getitem__(self, slot: Slot) -> Plan:
        told = self._buffers.bodies(slot, None if self._varies else 1)
        plans = [read_plan(body).plan(client, {}) for client, body in told.items()]
        if not plans:
            raise KeyError(slot)
        return plans[0]._replace(variants={client: v for plan in plans for client, v in plan.variants.items()})

    def __iter__(self) -> Iterator[Slot]:
        return iter(self._buffers.open_slots())

    def __len__(self) -> int:
        return len(self._buffers.open_slots())


def plan_hash(bodies: Mapping[Client, bytes]) -> str:
    """One hash of what every client is sent."""
    digest = hashlib.sha256()
    for client, body in bodies.items():
        digest.update(f"{client} {len(body)} ".encode() + body)
    return digest.hexdigest()


__all__ = ["OpenPlans", "plan_hash"]
