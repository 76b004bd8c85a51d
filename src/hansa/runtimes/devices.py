"""``Devices``: how fast, how well connected and how often reachable each client of a population is.

A client's figures follow from the run's key and its id alone: nothing is held for a client that takes no part.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from hansa.core.errors import InputError
from hansa.core.key import Key
from hansa.core.protocols import Client

if TYPE_CHECKING:
    from hansa.runtimes.device_table import DeviceTable

Floats = npt.NDArray[np.float64]
_HOUR, _DAY_H = 3600.0, 24.0


def chances(keys: Sequence[Key]) -> Floats:
    """Four numbers in [0, 1) a key, of 53 bits: (num_keys, 4). They are the key's own bytes: one hash each, no more."""
    words = np.frombuffer(b"".join([key.material for key in keys]), dtype=">u8").reshape(len(keys), 4)
    return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53


def standard(keys: Sequence[Key]) -> Floats:
    """Four standard normal numbers a key, by Box and Muller's method: (num_keys, 4)."""
    drawn = chances(keys)
    radius, angle = np.sqrt(-2 * np.log1p(-drawn[:, :2])), 2 * np.pi * drawn[:, 2:]
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)], axis=1)


class Traits(NamedTuple):
    """What some clients' devices can do, each (num_clients,) float64."""

    examples_per_s: Floats
    download: Floats  # bytes per second
    upload: Floats
    latency_s: Floats  # what every round costs beside work and transfers
    dropout: Floats  # chance that a client that began does not report


class DevicePopulation(Protocol):
    """What ``VirtualTime`` asks: ``Devices``, or the ``DeviceTable`` of a trace file."""

    def traits(self, clients: Sequence[Client], key: Key) -> Traits:
        """The clients' figures, the same whenever asked."""
        ...

    def online(self, clients: Sequence[Client], time_s: float, key: Key) -> npt.NDArray[np.bool_]:
        """Who could be asked at that time since the start: (num_clients,)."""
        ...


@dataclass(frozen=True, kw_only=True)
class LogNormal:
    """Positive figures whose logarithms are normal: half of all lie below ``median``, two thirds within ``spread``.

    ``spread`` is a factor (the geometric standard deviation): with 3, one client in six is more than 3 times slower
    than the median and one in fifty more than 8 times. That is the heavy tail that makes rounds wait.

    >>> LogNormal(median=10, spread=3).of(np.array([-1.0, 0.0, 1.0])).round(2).tolist()
    [3.33, 10.0, 30.0]
    """

    median: float
    spread: float = 2.0

    def __post_init__(self) -> None:
        if not (self.median > 0 and math.isfinite(self.median)):
            raise InputError(f"LogNormal(median=): expected above 0, found {self.median!r}")
        if not (self.spread >= 1 and math.isfinite(self.spread)):
            raise InputError(f"LogNormal(spread=): expected a factor of 1 or more, found {self.spread!r}")

    def of(self, standard: Floats) -> Floats:
        """The figures of standard normal numbers, elementwise."""
        return np.exp(math.log(self.median) + math.log(self.spread) * np.asarray(standard))


@dataclass(frozen=True, kw_only=True)
class Diurnal:
    """The share of clients online by local hour: a wave from ``low`` to ``high``, which it reaches at ``peak_hour``.

        share(hour) = low + (high - low) * (1 + cos(2π (hour - peak_hour) / 24)) / 2

    Every client lives in a time zone of its own, drawn within ``zones_h`` hours. Each day it draws anew how long it is
    online: one stretch around the peak, the whole day for a share ``low`` of the clients, not at all for ``1 - high``.
    The defaults follow Bonawitz et al., "Towards federated learning at scale: system design", MLSys 2019, where four
    times as many phones of one country are idle, charging and on Wi-Fi by night as by day; the heights are a guess.

    >>> Diurnal(low=0.1, high=0.5).share(np.array([2.0, 8.0, 14.0])).round(2).tolist()
    [0.5, 0.3, 0.1]
    """

    low: float = 0.05
    high: float = 0.2
    peak_hour: float = 2.0
    zones_h: float = 3.0
    start_hour: float = 0.0  # of the day, at the westernmost clients, when the run starts

    def __post_init__(self) -> None:
        if not 0 <= self.low <= self.high <= 1 or not self.high:
            raise InputError(f"Diurnal: expected 0 <= low <= high <= 1, high above 0, found {self.low} and {self.high}")
        for name in ("peak_hour", "zones_h", "start_hour"):
            if not 0 <= getattr(self, name) <= _DAY_H:
                raise InputError(f"Diurnal({name}=): expected 0 to 24 hours, found {getattr(self, name)!r}")

    def share(self, hour: Floats) -> Floats:
        """The share online at local hours, elementwise."""
        wave = (1 + np.cos(2 * np.pi * (np.asarray(hour) - self.peak_hour) / _DAY_H)) / 2
        return self.low + (self.high - self.low) * wave

    def online(self, clients: Sequence[Client], time_s: float, key: Key) -> npt.NDArray[np.bool_]:
        """Who is online: (num_clients,)."""
        zones = chances([key.child("zone", client) for client in clients])[:, 0]
        local = self.start_hour + time_s / _HOUR + zones * self.zones_h
        days = np.floor((local - self.peak_hour + _DAY_H / 2) / _DAY_H).astype(np.int64).tolist()  # from low to low
        keys = [key.child("online", client, day) for client, day in zip(clients, days, strict=True)]
        return chances(keys)[:, 0] < self.share(local)


Figure = float | LogNormal


@dataclass(frozen=True, kw_only=True)
class Devices:
    """A population of devices by its distributions; each figure is a number, the same for all, or a ``LogNormal``.

    ``examples_per_s`` is the speed of training on *your* model; ``download`` and ``upload`` are in bytes per second;
    ``latency_s`` is what each round costs beside; ``dropout`` is the chance that a client that began does not report.
    ``availability=None`` is always online. A client that goes offline after it began still reports.
    The defaults cost no time at all.

    >>> slow = Devices(examples_per_s=LogNormal(median=100, spread=3), download=1e6, upload=1e6, dropout=0.08)
    >>> slow.traits(("a", "b"), Key.of(0)).download.tolist()
    [1000000.0, 1000000.0]
    """

    examples_per_s: Figure = math.inf
    download: Figure = math.inf
    upload: Figure = math.inf
    latency_s: Figure = 0.0
    dropout: float = 0.0
    availability: Diurnal | None = None

    def __post_init__(self) -> None:
        for name in ("examples_per_s", "download", "upload"):
            value = getattr(self, name)
            if not isinstance(value, LogNormal) and not (isinstance(value, int | float) and value > 0):
                raise InputError(f"Devices({name}=): expected a number above 0 or LogNormal(...), found {value!r}")
        latency = self.latency_s
        if not isinstance(latency, LogNormal) and not (isinstance(latency, int | float) and 0 <= latency < math.inf):
            raise InputError(f"Devices(latency_s=): expected seconds or LogNormal(...), found {latency!r}")
        if not (isinstance(self.dropout, int | float) and 0 <= self.dropout < 1):
            raise InputError(f"Devices(dropout=): expected a chance of 0 or more and below 1, found {self.dropout!r}")
        if self.availability is not None and not isinstance(self.availability, Diurnal):
            raise InputError(f"Devices(availability=): expected Diurnal(...) or None, found {self.availability!r}")

    def traits(self, clients: Sequence[Client], key: Key) -> Traits:
        """The clients' figures: each from its own key."""
        figures = (self.examples_per_s, self.download, self.upload, self.latency_s)
        drawn = np.zeros((len(clients), 4))
        if any(isinstance(figure, LogNormal) for figure in figures):
            drawn = standard([key.child("device", client) for client in clients])
        pairs = zip(figures, drawn.T, strict=True)
        columns = [f.of(z) if isinstance(f, LogNormal) else np.full(len(z), float(f)) for f, z in pairs]
        speed, download, upload, latency = columns
        return Traits(speed, download, upload, latency, np.full(len(clients), float(self.dropout)))

    def online(self, clients: Sequence[Client], time_s: float, key: Key) -> npt.NDArray[np.bool_]:
        """Who is online ``time_s`` seconds after the start."""
        if self.availability is None or not clients:
            return np.ones(len(clients), bool)
        return self.availability.online(clients, time_s, key)

    @staticmethod
    def phones(examples_per_s: float = 50.0) -> Devices:
        """Phones on Wi-Fi, in round figures: ``examples_per_s`` is what the median phone trains of your model.

        Approximations. The spread of speeds (a factor 2.2) is that of 978 times of training a ResNet measured on
        phones, the bandwidths (4.3 Mbit/s down, 3.3 up) are the medians of 19 phones from MobiPerf, both as published
        with FLHetBench (Zhang et al., CVPR 2024); their spread and the latency are guesses. The drop-out is that of
        Bonawitz et al. (MLSys 2019: 6 to 10 %). Always online: add ``availability=Diurnal()`` with
        ``dataclasses.replace`` for the times of day.

        >>> Devices.phones(examples_per_s=200).examples_per_s
        LogNormal(median=200, spread=2.2)
        """
        return Devices(
            examples_per_s=LogNormal(median=examples_per_s, spread=2.2),
            download=LogNormal(median=540e3, spread=2.5),
            upload=LogNormal(median=410e3, spread=2.5),
            latency_s=LogNormal(median=1.0, spread=1.5),
            dropout=0.08,
        )

    @staticmethod
    def from_csv(path: str | os.PathLike[str]) -> DeviceTable:
        """The devices of a trace file: see ``DeviceTable``."""
        from hansa.runtimes.device_table import read_devices

        return read_devices(path)
