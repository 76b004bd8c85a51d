"""A run directory as plain records, checked: what the report and the comparison read.

A figure that is not known (an empty cell, ``null``, NaN or infinity) is None everywhere after this file.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hansa.core.errors import InputError

Figures = dict[str, float | None]

HISTORY_COLUMNS = (
    "round", "num_clients", "num_late", "bytes_up", "bytes_down", "seconds", "clock_s", "epsilon", "delta",
)  # fmt: skip
CLIENT_COLUMNS = ("client", "num_examples", "num_test")

# run.json: what each value must be where it is present. None is accepted everywhere: "not known".
_KINDS: dict[str, type] = {
    "schedule": dict, "federation": dict, "final": dict, "skew": dict, "baselines": dict, "privacy": dict,
    "refused": list, "bodies": list, "notes": list, "secrecy": list, "num_clients": int, "rounds_done": int,
    "num_rounds": int, "num_params": int, "scored_on": str, "runtime": str,
}  # fmt: skip
_JSON_NAMES = {dict: "an object", list: "a list", int: "a whole number", str: "a text"}


@dataclass(frozen=True, kw_only=True)
class ClientRow:
    """One line of clients.csv: sizes, and the metrics on the client's own held-out rows."""

    client: str
    num_examples: float | None
    num_test: float | None
    metrics: Figures


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """What a run directory says."""

    path: Path
    info: Mapping[str, Any]
    history: tuple[Figures, ...]
    clients: tuple[ClientRow, ...]

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of the metrics that have at least one value, loss first, in the order of history.csv."""
        return metrics_of(self.history) or tuple(self.final)

    @property
    def final(self) -> dict[str, float]:
        """Final metrics: those of run.json, else each metric's last known value in history.csv."""
        said = {name: number(value) for name, value in (self.info.get("final") or {}).items()}
        last = {name: last_known(self.history, name) for name in metrics_of(self.history)}
        return {name: value for name, value in {**last, **said}.items() if value is not None}

    @property
    def num_clients(self) -> int:
        """Clients in the population: as stated, else as listed."""
        return int(self.info.get("num_clients") or len(self.clients))

    @property
    def num_rounds(self) -> int:
        """Rounds done: as stated, else as listed."""
        done = self.info.get("rounds_done")
        return int(done) if done is not None else len(self.history)

    def total(self, column: str) -> float | None:
        """Sum of a history column over the rounds in which it is known; None where it never is."""
        known = [row[column] for row in self.history if row.get(column) is not None]
        return sum(value for value in known if value is not None) if known else None


def number(value: object) -> float | None:
    """``value`` as a finite float, else None: empty, ``null``, a text, NaN and infinity are "not known".

    >>> number("0.5"), number(""), number(float("nan")), number(3)
    (0.5, None, None, 3.0)
    """
    if value is None or isinstance(value, bool) or value == "":
        return None
    try:
        found = float(value)  # type: ignore[arg-type]  # anything that is no number is caught just below
    except (TypeError, ValueError):
        return None
    return found if math.isfinite(found) else None


def metrics_of(history: Sequence[Mapping[str, float | None]]) -> tuple[str, ...]:
    """Metric columns of ``history`` with at least one known value, loss first.

    >>> metrics_of([{"round": 0, "auc": 0.5, "loss": 0.7, "f1": None}])
    ('loss', 'auc')
    """
    names = list(dict.fromkeys(name for row in history for name in row if name not in HISTORY_COLUMNS))
    known = [name for name in names if any(row.get(name) is not None for row in history)]
    return tuple(sorted(known, key=lambda name: name != "loss"))


def last_known(history: Sequence[Mapping[str, float | None]], name: str) -> float | None:
    """The last value of a column that is known.

    >>> last_known([{"auc": 0.5}, {"auc": 0.75}, {"auc": None}], "auc")
    0.75
    """
    return next((row[name] for row in reversed(history) if row.get(name) is not None), None)


def read_run(run_dir: Path) -> RunRecord:
    """The run directory ``run_dir``; clients.csv may be absent (under secure sums nothing is known of one client).

    Raises InputError for a directory, file, column or cell that is missing or is not as the format says.
    """
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        what = "a file" if run_dir.exists() else "nothing"
        raise InputError(
            f"run directory: expected a directory at {run_dir}, found {what}; "
            "give the folder that `hansa simulate --out DIR` or `run.save(DIR)` wrote"
        )
    clients_path = run_dir / "clients.csv"
    return RunRecord(
        path=run_dir,
        info=_read_info(run_dir / "run.json"),
        history=_read_history(run_dir / "history.csv"),
        clients=_read_clients(clients_path) if clients_path.exists() else (),
    )


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise InputError(
            f"run directory {path.parent}: expected a file {path.name}, found none; "
            "is this the folder of a finished run? Save it again with `hansa simulate --out DIR` or `run.save(DIR)`"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: expected a readable UTF-8 text, found: {error}; save the run again") from None


def _read_info(path: Path) -> Mapping[str, Any]:
    try:
        info = json.loads(_read_text(path))
    except json.JSONDecodeError as error:
        raise InputError(
            f"{path}: expected JSON, found {error.msg} in line {error.lineno}; save the run again"
        ) from None
    if not isinstance(info, dict):
        raise InputError(f"{path}: expected a JSON object, found {type(info).__name__}; save the run again")
    for name, kind in _KINDS.items():
        value = info.get(name)
        if value is not None and not isinstance(value, kind):
            raise InputError(
                f"{path}: expected {_JSON_NAMES[kind]} for {name!r}, found {value!r:.60}; save the run again"
            )
    return info


def _read_table(path: Path, column: str) -> list[dict[str, str]]:
    reader = csv.DictReader(io.StringIO(_read_text(path), newline=""), strict=True)
    try:
        rows = list(reader)
    except csv.Error as error:
        raise InputError(f"{path}: expected CSV, found: {error} (line {reader.line_num}); save the run again") from None
    if not rows and not any(reader.fieldnames or ()):
        return []  # a table of no rows has no columns either
    if column not in (reader.fieldnames or ()):
        raise InputError(
            f"{path}: expected a column {column!r}, found {list(reader.fieldnames or ())}; save the run again"
        )
    for line, row in enumerate(rows, 2):
        if None in row or None in row.values():
            expected = len(reader.fieldnames or ())
            raise InputError(f"{path}: expected {expected} cells in line {line}, found another number; was it cut off?")
    return rows


def _cell(path: Path, line: int, column: str, text: str) -> float | None:
    """A cell as a number; only text that is no number at all is refused (``nan`` is "not known")."""
    try:
        return number(float(text)) if text.strip() else None
    except ValueError:
        raise InputError(
            f"{path}: expected a number or nothing in column {column!r}, line {line}, found {text!r:.60}; correct it"
        ) from None


def _read_history(path: Path) -> tuple[Figures, ...]:
    rows = [
        {name: _cell(path, line, name, text) for name, text in row.items()}
        for line, row in enumerate(_read_table(path, "round"), 2)
    ]
    for line, row in enumerate(rows, 2):
        if row["round"] is None:
            raise InputError(f"{path}: expected a round in line {line}, found an empty cell; correct it")
    return tuple(rows)


def _read_clients(path: Path) -> tuple[ClientRow, ...]:
    found = []
    for line, row in enumerate(_read_table(path, "client"), 2):
        cells = {name: _cell(path, line, name, text) for name, text in row.items() if name != "client"}
        found.append(
            ClientRow(
                client=row["client"],
                num_examples=cells.pop("num_examples", None),
                num_test=cells.pop("num_test", None),
                metrics=cells,
            )
        )
    return tuple(found)
