"""Devices whose times are written down: ``Delays`` by client, for answers that can be worked out by hand."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from hansa.core.key import Key
from hansa.core.round import Context, begin
from hansa.data.population import Population
from hansa.federation import Federation
from hansa.runtimes.devices import Traits
from hansa.runtimes.inprocess import InProcess
from hansa.runtimes.virtual_time import VirtualTime


class Delays:
    """Each client takes so many seconds (1 unless it is named); ``lost`` ones drop out, ``away`` ones are offline."""

    def __init__(self, seconds: Mapping[str, float], lost: Collection[str] = (), away: Collection[str] = ()) -> None:
        self.seconds, self.lost, self.away = dict(seconds), set(lost), set(away)

    def traits(self, clients: Any, key: Key) -> Traits:
        latency = np.array([float(self.seconds.get(client, 1)) for client in clients])
        never = np.full(len(clients), np.inf)
        dropout = np.array([1.0 if client in self.lost else 0.0 for client in clients])
        return Traits(never, never, never, latency, dropout)

    def online(self, clients: Any, time_s: float, key: Key) -> np.ndarray:
        return np.array([client not in self.away for client in clients], bool)


def clocked(federation: Federation, population: Population, devices: Any, block_size: int = 1) -> tuple[Any, Any, Any]:
    """State before round 0, the context and a runtime with a clock: what ``server_round`` and the buffered one need."""
    runtime = VirtualTime(InProcess(block_size=block_size), devices=devices)
    site = runtime.open(federation, population.load, Key.of("secrets"))
    state = begin(federation.task("train"), federation.learner.initial(Key.of(0)), federation.update_size())
    return state, Context(Key.of("run"), federation.learner.layout, {}, len(population)), site
