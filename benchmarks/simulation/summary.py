"""Records made into figures: one ``Line`` a row and workload, medians over the repeats, and whether losses agree.

A run's seconds a round are the median over its rounds without the first. On LR-on-MNIST rounds are as uneven as the
clients, so there it is their mean: what a hundred of them take.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, median
from typing import Any

from measure import Record
from rows import Row

MEAN_OF_ROUNDS = ("lr_mnist",)
# How far a final loss may lie from the bare loop's after as many rounds, as a share of it, by what a row draws itself.
TOLERANCE = {"nothing": 0.001, "filling": 0.01, "order": 0.03, "clients": 0.05}
# Where that is not enough. W2's CNN grows rounding errors: the bare loop itself ends at 3.1501 with one thread, at
# 3.1514 with two and at 3.1486 in two processes. On LR-on-MNIST, ten two-class clients a round make the loss swing.
WIDER_TOLERANCE = {"W2": {"nothing": 0.005}, "lr_mnist": {"clients": 0.5}}


@dataclass(frozen=True, kw_only=True)
class Line:
    """One row of one workload's table; times in seconds, memory in MiB."""

    row: Row
    workload: str
    setting: str
    num_rounds: int
    repeats: tuple[float, ...]  # seconds a round, of each repeat
    first_result: float
    startup: float
    rss: float
    pss: float
    loss: float
    off: float  # from the bare loop's loss, as a share of it; NaN: nothing to compare with
    tolerance: float
    accuracy: float  # NaN where nothing is held out
    note: str

    @property
    def seconds(self) -> float:
        """Seconds a round: the median of the repeats."""
        return median(self.repeats)

    @property
    def agrees(self) -> bool:
        """Whether the final loss is as near as it must be, where there is one to compare with."""
        return math.isnan(self.off) or self.off <= self.tolerance

    def as_json(self) -> dict[str, Any]:
        """What goes into results.json."""
        named = {name: getattr(self, name) for name in ("workload", "setting", "num_rounds", "seconds", "repeats")}
        named |= {name: getattr(self, name) for name in ("startup", "first_result", "rss", "pss", "loss", "tolerance")}
        absent = {name: None if math.isnan(value := getattr(self, name)) else value for name in ("off", "accuracy")}
        return {"row": self.row.name, **named, **absent, "agrees": self.agrees, "note": self.note}


def seconds_a_round(record: Record) -> float:
    """One run's figure."""
    steady = record.seconds[1:] or record.seconds
    return mean(steady) if record.workload in MEAN_OF_ROUNDS else median(steady)


def lines(rows: Sequence[Row], records: Sequence[Record]) -> list[Line]:
    """The rows that gave a result, workload by workload, fastest first."""
    good = [record for record in records if not record.error]
    workloads = list(dict.fromkeys(record.workload for record in good))
    found = []
    for workload in workloads:
        here = [record for record in good if record.workload == workload]
        own = {row.name: [record for record in here if record.row == row.name] for row in rows}
        made = [_line(row, own[row.name], own.get("R0", [])) for row in rows if own[row.name]]
        found += sorted(made, key=lambda line: line.seconds)
    return found


def _line(row: Row, records: Sequence[Record], bare: Sequence[Record]) -> Line:
    first = records[0]
    offs = [off for record in records if not math.isnan(off := _off(record, bare))]
    accuracies = [mean(record.accuracies[-10:]) for record in records if record.accuracies]
    return Line(
        row=row,
        workload=first.workload,
        setting=first.setting,
        num_rounds=len(first.seconds),
        repeats=tuple(seconds_a_round(record) for record in records),
        first_result=median(record.first_result for record in records),
        startup=median(record.startup for record in records),
        rss=max(record.rss_mib for record in records),
        pss=max(record.pss_mib for record in records),
        loss=median(record.loss for record in records),
        off=max(offs, default=math.nan),
        tolerance=tolerance(row, first.workload),
        accuracy=mean(accuracies) if accuracies else math.nan,
        note=first.note,
    )


def tolerance(row: Row, workload: str) -> float:
    """How far this row's final loss may be off."""
    return (TOLERANCE | WIDER_TOLERANCE.get(workload, {}))[row.draws]


def _off(record: Record, bare: Sequence[Record]) -> float:
    """Against the bare loop of the same repeat, hence of the same data, or the row's own run of it."""
    against = [record] if record.reference else [one for one in bare if one.repeat == record.repeat]
    expected = next((one.reference.get(str(len(record.seconds))) for one in against), None)
    return abs(record.loss - expected) / expected if expected else math.nan
