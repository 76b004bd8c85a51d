"""The history of a run: one row a round, as attributes, as a flat mapping and as CSV."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

_BEFORE = ("round", "loss")
_AFTER = ("num_clients", "num_late", "bytes_up", "bytes_down", "seconds", "clock_s", "epsilon", "delta")
_WHOLE = ("round", "num_clients", "num_late", "bytes_up", "bytes_down")
_UNKNOWN = {"num_late": 0, "clock_s": math.nan, "epsilon": None, "delta": None}  # in a file of an older version


class Row(Mapping[str, Any]):
    """One round. Its fields are attributes (``row.loss``, ``row.metrics["auc"]``); as a mapping metrics are flat.

    ``seconds`` is what the round took here. On a simulated clock (``VirtualTime``) ``clock_s`` is the seconds since
    the start at the round's end, NaN otherwise. ``num_late`` are the updates that came too late to count: on that clock
    the round's own, in a deployment those that came since the row before.

    >>> row = Row(round=0, loss=0.5, metrics={"auc": 0.8}, num_clients=4, bytes_up=10, bytes_down=20, seconds=0.1)
    >>> row.metrics["auc"], row["auc"], list(row)[:3]
    (0.8, 0.8, ['round', 'loss', 'auc'])
    """

    def __init__(
        self,
        *,
        round: int,
        loss: float,
        metrics: Mapping[str, float],
        num_clients: int,
        bytes_up: int,
        bytes_down: int,
        seconds: float,
        epsilon: float | None = None,
        delta: float | None = None,
        clock_s: float = math.nan,
        num_late: int = 0,
    ) -> None:
        self.round, self.loss, self.metrics = round, loss, dict(metrics)
        self.num_clients, self.bytes_up, self.bytes_down, self.seconds = num_clients, bytes_up, bytes_down, seconds
        self.epsilon, self.delta = epsilon, delta
        self.clock_s, self.num_late = clock_s, num_late

    def __getitem__(self, name: str) -> Any:
        if name in self.metrics:
            return self.metrics[name]
        if name in _BEFORE + _AFTER:
            return getattr(self, name)
        raise KeyError(name)

    def __iter__(self) -> Iterator[str]:
        yield from _BEFORE
        yield from self.metrics
        yield from _AFTER

    def __len__(self) -> int:
        return len(_BEFORE) + len(self.metrics) + len(_AFTER)

    def __repr__(self) -> str:
        shown = ", ".join(f"{name}={value:.4g}" for name, value in [("loss", self.loss), *self.metrics.items()])
        return f"Row(round={self.round}, {shown}, num_clients={self.num_clients}, bytes_up={self.bytes_up})"

    @staticmethod
    def of(flat: Mapping[str, Any]) -> Row:
        """A row from its flat mapping."""
        known = {name: flat.get(name, _UNKNOWN[name]) if name in _UNKNOWN else flat[name] for name in _BEFORE + _AFTER}
        return Row(metrics={name: value for name, value in flat.items() if name not in known}, **known)


def hours_to(rows: Sequence[Row], metric: str, target: float, lower_is_better: bool) -> float:
    """Simulated hours until ``metric`` first reached ``target``; NaN where it never did, or where there is no clock.

    >>> row = Row(round=0, loss=0.5, metrics={}, num_clients=4, bytes_up=0, bytes_down=0, seconds=0.1, clock_s=7200.0)
    >>> hours_to([row], "loss", 0.6, lower_is_better=True)
    2.0
    """
    sign = -1 if lower_is_better else 1
    return next((row.clock_s / 3600 for row in rows if sign * row[metric] >= sign * target), math.nan)


def write_csv(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Rows as CSV, one column a key of any of them; an empty cell is not known."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    order = [n for n in names if n not in _AFTER] + [n for n in names if n in _AFTER]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(order)
        for row in rows:
            writer.writerow([_cell(row.get(name)) for name in order])


def read_history(path: Path) -> list[Row]:
    """The rows of a ``history.csv``."""
    with path.open(newline="", encoding="utf-8") as file:
        return [Row.of({name: _value(name, cell) for name, cell in line.items()}) for line in csv.DictReader(file)]


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a ``clients.csv``: the client's name, whole numbers, and metrics."""
    with path.open(newline="", encoding="utf-8") as file:
        return [
            {n: c if n == "client" else int(c) if n.startswith("num_") else _value(n, c) for n, c in line.items()}
            for line in csv.DictReader(file)
        ]


def _cell(value: Any) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    return repr(float(value)) if isinstance(value, float) else str(value)


def _value(name: str, cell: str) -> Any:
    if cell == "":
        return None if name in ("epsilon", "delta") else math.nan
    return int(cell) if name in _WHOLE else float(cell)
