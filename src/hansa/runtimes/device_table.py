"""``DeviceTable``: the devices of a trace file, one a row."""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from hansa.core.errors import InputError
from hansa.core.key import Key
from hansa.core.protocols import Client
from hansa.runtimes.devices import Traits, chances

_FIGURES = {"examples_per_s": np.inf, "download": np.inf, "upload": np.inf, "latency_s": 0.0, "dropout": 0.0}
_WINDOW = ("available_from", "available_to")
_COLUMNS = ("client", *_FIGURES, *_WINDOW)


class Device(NamedTuple):
    """One device: its figures, and from when to when it is online each day (in hours; empty: always)."""

    figures: tuple[float, ...]
    windows: tuple[tuple[float, float], ...] = ()

    def is_online(self, hour: float) -> bool:
        """Whether one of its windows holds an hour of the day; a window may pass midnight (22 to 7)."""
        within = (a <= hour < b if a <= b else hour >= a or hour < b for a, b in self.windows)
        return not self.windows or any(within)


@dataclass(frozen=True, kw_only=True)
class DeviceTable:
    """Devices read from a CSV file by ``Devices.from_csv``.

    All columns are optional, and so is every cell.

    | column | meaning | where empty |
    |---|---|---|
    | `client` | whose device this is | no such column: each client is given a row by its own draw |
    | `examples_per_s` | training speed | no time |
    | `download`, `upload` | bytes per second | no time |
    | `latency_s` | seconds that each round costs beside | 0 |
    | `dropout` | chance of not reporting, 0 or more and below 1 | 0 |
    | `available_from`, `available_to` | hours of the day, 0 to 24, from the run's start; may pass midnight | always |

    A client that is online more than once a day has a row for each time; its other cells are alike or empty.
    A client of the run without a row is refused by name.
    """

    path: str
    devices: tuple[Device, ...]
    places: Mapping[Client, int] | None  # of a client's device; None: drawn

    def __repr__(self) -> str:
        return f"Devices.from_csv({self.path!r})"

    def traits(self, clients: Sequence[Client], key: Key) -> Traits:
        """The clients' figures."""
        rows = np.array([self.devices[i].figures for i in self._rows(clients, key)]).reshape(len(clients), -1)
        return Traits(*rows.T)

    def online(self, clients: Sequence[Client], time_s: float, key: Key) -> npt.NDArray[np.bool_]:
        """Who is online ``time_s`` seconds after the start, which is midnight."""
        hour = time_s / 3600 % 24
        return np.array([self.devices[i].is_online(hour) for i in self._rows(clients, key)], dtype=bool)

    def _rows(self, clients: Sequence[Client], key: Key) -> list[int]:
        if self.places is None:
            drawn = chances([key.child("device", client) for client in clients])[:, 0]
            rows: list[int] = (drawn * len(self.devices)).astype(np.int64).tolist()
            return rows
        try:
            return [self.places[client] for client in clients]
        except KeyError as error:
            raise InputError(
                f"{self.path}: expected a row for every client, found none for {error.args[0]!r}; add one, or leave "
                "the column client out so that rows are drawn"
            ) from None


def read_devices(path: str | os.PathLike[str]) -> DeviceTable:
    """The devices of a CSV file. Raises ``InputError`` that names the line and what was expected there."""
    name = os.fspath(path)
    try:
        with Path(name).open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, restkey="")
            header, lines = list(reader.fieldnames or ()), list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{name}: expected a CSV file of devices, found {error}") from error
    unknown = [column for column in header if column not in _COLUMNS]
    if unknown or not header or len(set(header)) < len(header):
        found = f"the column {unknown[0]!r}" if unknown else "one twice" if header else "no columns"
        raise InputError(f"{name}: expected columns among {', '.join(_COLUMNS)}, found {found}")
    if not lines:
        raise InputError(f"{name}: expected one device or more, found no rows")
    rows = [_device(f"{name}, line {i}", line) for i, line in enumerate(lines, 2)]
    if "client" not in header:
        return DeviceTable(path=name, devices=tuple(rows), places=None)
    places: dict[Client, int] = {}
    devices: list[Device] = []
    for i, (line, row) in enumerate(zip(lines, rows, strict=True), 2):
        client = (line["client"] or "").strip()
        if not client:
            raise InputError(f"{name}, line {i}: expected a client's id, found none")
        if client not in places:
            places[client] = len(devices)
            devices.append(row)
            continue
        devices[places[client]] = _merged(f"{name}, line {i}", client, devices[places[client]], row, line)
    return DeviceTable(path=name, devices=tuple(devices), places=places)


def _device(where: str, line: Mapping[str, str | None]) -> Device:
    """One row's device."""
    if "" in line or None in line.values():
        raise InputError(f"{where}: expected as many cells as there are columns, found another number")
    figures = tuple(_number(where, column, line.get(column), default) for column, default in _FIGURES.items())
    for column, value in zip(_FIGURES, figures, strict=True):
        least_is_zero = column in ("latency_s", "dropout")
        if value < 0 or (value == 0 and not least_is_zero) or (column == "dropout" and value >= 1):
            expected = "a chance below 1" if column == "dropout" else "0 or more" if least_is_zero else "above 0"
            raise InputError(f"{where}: expected {column} to be {expected}, found {value:g}")
    first, last = (_number(where, column, line.get(column), np.nan) for column in _WINDOW)
    if np.isnan(first) and np.isnan(last):
        return Device(figures)
    if not (0 <= first <= 24 and 0 <= last <= 24):
        raise InputError(
            f"{where}: expected available_from and available_to from 0 to 24, found {first:g} and {last:g}"
        )
    return Device(figures, ((first, last),))


def _number(where: str, column: str, cell: str | None, default: float) -> float:
    if not (cell or "").strip():
        return default
    try:
        value = float(cell or "")
    except ValueError:
        value = np.nan
    if not np.isfinite(value):
        raise InputError(f"{where}: expected {column} to be a number, found {cell!r}")
    return value


def _merged(where: str, client: Client, known: Device, more: Device, line: Mapping[str, str | None]) -> Device:
    """A client's device with the window of another of its rows."""
    given = [(line.get(column) or "").strip() for column in _FIGURES]
    alike = all(not cell or a == b for cell, a, b in zip(given, known.figures, more.figures, strict=True))
    if not alike or not (known.windows and more.windows):
        raise InputError(
            f"{where}: expected one row for client {client!r}, or rows that differ in available_from and available_to "
            "alone, found another device"
        )
    return Device(known.figures, (*known.windows, *more.windows))
