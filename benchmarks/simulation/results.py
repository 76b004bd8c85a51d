"""What a benchmark leaves behind: results.md for people, results.json for programs, results.svg to look at."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import picture
from bars import bars
from measure import Record
from rows import Row
from summary import lines
from table import markdown


def write(
    folder: Path, rows: Sequence[Row], records: Sequence[Record], versions: Mapping[str, Mapping[str, str]], said: str
) -> None:
    """Write all three into ``folder``; ``said`` is the machine and the options in a sentence."""
    folder.mkdir(parents=True, exist_ok=True)
    found = lines(rows, records)
    (folder / "results.md").write_text(markdown(found, records, versions, said), encoding="utf-8")
    stored = {
        "setting": said,
        "versions": versions,
        "bars": [{"says": bar.says, "figure": bar.as_number(), "is_met": bar.is_met} for bar in bars(found)],
        "lines": [line.as_json() for line in found],
        "records": [record.as_json() for record in records],
    }
    (folder / "results.json").write_text(_json(stored), encoding="utf-8")
    picture.draw(found, folder / "results.svg")
    print(f"wrote {folder / 'results.md'}, results.json, results.svg")


def _json(stored: Mapping[str, Any]) -> str:
    """An object of a few names; of a list, an entry a line."""
    parts = []
    for name, value in stored.items():
        text = json.dumps(value, allow_nan=False)
        if isinstance(value, list):
            text = "[\n" + ",\n".join(json.dumps(entry, allow_nan=False) for entry in value) + "\n]"
        parts.append(f"{json.dumps(name)}: {text}")
    return "{\n" + ",\n".join(parts) + "\n}\n"
