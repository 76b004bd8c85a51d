"""The bars that hansa sets itself here, each a sentence with its figure: met, missed, or not measured."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from summary import Line


class Bar(NamedTuple):
    """What was asked and what came out; ``figure`` is NaN where a row that it needs was not run."""

    says: str
    figure: float
    is_met: bool

    def as_number(self) -> float | None:
        """The figure, None where it was not measured."""
        return None if math.isnan(self.figure) else self.figure

    def __str__(self) -> str:
        if math.isnan(self.figure):
            return f"{self.says}: not measured"
        return f"{self.says}: {self.figure:.3g}, {'met' if self.is_met else 'MISSED'}"


def bars(lines: Sequence[Line]) -> list[Bar]:
    """Those of the workloads that ran, and that losses agree."""
    found: list[Bar] = []
    for name in dict.fromkeys(line.workload for line in lines):
        found += _OF[name]({line.row.name: line for line in lines if line.workload == name})
    off = [line for line in lines if not line.agrees]
    named = ", ".join(f"{line.row.name} on {line.workload}" for line in off)
    found.append(Bar(f"final losses agree{f' ({named} does not)' if off else ''}", float(len(off)), not off))
    return found


Rows = dict[str, Line]


def _w1(rows: Rows) -> list[Bar]:
    return [
        _at_most("W1: times the hand-written batched line, at most 1.3", _times(rows, "hansa", "R2b"), 1.3),
        _at_least("W1: the fastest peer's time over hansa's, at least 4", _fastest(rows, _peers(rows)), 4),
        _at_least("W1: Flower's time over hansa's, at least 100", _times(rows, "flower", "hansa"), 100),
    ]


def _w2(rows: Rows) -> list[Bar]:
    """Beyond the noise: hansa's fastest repeat is slower than a peer's slowest."""
    ahead = math.nan
    if "hansa" in rows and (peers := _peers(rows)):
        ahead = max(min(rows["hansa"].repeats) / max(rows[peer].repeats) for peer in peers)
    return [
        _at_most("W2: times the bare loop in two processes, at most 1.05", _times(rows, "hansa", "R1"), 1.05),
        _at_most("W2: fastest repeat over the slowest of the best peer, at most 1", ahead, 1),
    ]


def _w3(rows: Rows) -> list[Bar]:
    return [
        _at_most("W3: times the hand-written batched line, at most 2", _times(rows, "hansa", "R2b"), 2),
        _at_least("W3: the fastest peer's time over hansa's, at least 50", _fastest(rows, _peers(rows)), 50),
    ]


def _lr_mnist(rows: Rows) -> list[Bar]:
    accuracy = rows["hansa"].accuracy if "hansa" in rows else math.nan
    return [
        _at_least("LR-on-MNIST: accuracy, at least 0.85", accuracy, 0.85),
        _at_least("LR-on-MNIST: the bare loop's time over hansa's, at least 4", _times(rows, "R0", "hansa"), 4),
        _at_least("LR-on-MNIST: the fastest peer's time over hansa's, at least 4", _fastest(rows, _peers(rows)), 4),
    ]


_OF = {"W1": _w1, "W2": _w2, "W3": _w3, "lr_mnist": _lr_mnist}


def _peers(rows: Rows) -> list[str]:
    return [name for name, line in rows.items() if line.row.kind == "peer"]


def _times(rows: Rows, above: str, below: str) -> float:
    return rows[above].seconds / rows[below].seconds if above in rows and below in rows else math.nan


def _fastest(rows: Rows, names: Iterable[str]) -> float:
    return min((_times(rows, name, "hansa") for name in names), default=math.nan)


def _at_most(says: str, figure: float, bar: float) -> Bar:
    return Bar(says, figure, figure <= bar)


def _at_least(says: str, figure: float, bar: float) -> Bar:
    return Bar(says, figure, figure >= bar)
