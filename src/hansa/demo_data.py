"""The demo's files: one CSV a hospital, each in a folder of its own, and the app that reads them."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hansa.core.errors import InputError
from hansa.core.key import Key

Columns = dict[str, np.ndarray[Any, Any]]

# Patients dealt to each hospital and the share that is ill: unequal sizes and label skew.
_HOSPITALS = {"berlin": (220, 0.25), "hamburg": (160, 0.60), "cologne": (110, 0.35), "munich": (69, 1 / 3)}

_APP = '''"""{title}"""

import hansa


def load_data(folder):
    return hansa.Dataset.from_table(folder / "patients.csv", label="{label}"{categories})


app = hansa.App(
    federation=hansa.Federation(
        learner=hansa.LinearLearner(num_features={num_features}, num_classes=2, metrics=("auc", "accuracy")),
        algorithm=hansa.FedAvg(client_learning_rate={rate}, local_epochs=2, batch_size=16),
        prepare=(hansa.Standardize(impute="mean"),),
{secure}    ),
    schedule=hansa.Schedule(num_rounds={num_rounds}, cohort_size={num_hospitals}{scoring}),
    load_data=load_data,
    holdout=0.3,
)
'''


_SECURE = """        transforms=(hansa.Clip(norm=1.0),),
        aggregator=hansa.SecureMean(weighting="examples", max_weight={max_weight}),
"""


def write_hospitals(
    folder: Path, data: Path | None, client: str, label: str | None, *, num_rounds: int = 20, secure: bool = False
) -> dict[str, tuple[int, int]]:
    """Write ``app.py`` and ``hospitals/NAME/patients.csv``; gives each hospital's patients and how many are ill.

    ``secure``: the app's mean is one under secure aggregation.
    """
    if data is None:
        tables, label = _breast_cancer(), "malignant"
        title = "Four hospitals and one model of breast cancer (569 real patients; scikit-learn's copy of UCI's data)."
        categories: dict[str, list[int]] = {}
        rate = 0.1
    else:
        tables, label, categories = _own_table(data, client, label)
        title = f"Hospitals of {data.name} and one model of {label}."
        rate = 0.05
    found = {}
    for name, columns in tables.items():
        own = folder / "hospitals" / name
        own.mkdir(parents=True)
        _write_csv(own / "patients.csv", columns)
        ill = columns[label].astype(int)
        found[name] = (len(ill), int(ill.sum()))
    first = next(iter(tables.values()))
    width = len(first) - 1 - len(categories) + sum(len(levels) for levels in categories.values())
    source = _APP.format(
        title=title,
        label=label,
        categories=f", categories={categories!r}" if categories else "",
        num_features=width,
        num_rounds=num_rounds,
        num_hospitals=len(tables),
        rate=rate,
        scoring=", evaluate_every=5" if secure else "",
        secure=_SECURE.format(max_weight=_above(max(patients for patients, _ in found.values()))) if secure else "",
    )
    (folder / "app.py").write_text(source, encoding="utf-8")
    return found


def _above(number: int) -> int:
    """The next round number: public, so that it says little of how many patients the largest hospital has.

    >>> _above(69), _above(220), _above(1000)
    (70, 300, 1000)
    """
    unit = int(10 ** (len(str(number)) - 1))
    return -(-number // unit) * unit


def _breast_cancer() -> dict[str, Columns]:
    """scikit-learn's breast cancer patients, dealt out unequally and with label skew; 10 are left over."""
    try:
        from sklearn.datasets import load_breast_cancer
    except ImportError as error:
        raise InputError(
            "demo: expected scikit-learn, whose clinical data it uses; pip install 'hansa[sklearn]', or give --data CSV"
        ) from error
    loaded = load_breast_cancer()
    ill = 1 - loaded.target
    shuffle = Key.of("demo hospitals").generator()
    sick, well = (list(shuffle.permutation(np.flatnonzero(ill == value))) for value in (1, 0))
    tables = {}
    for name, (patients, share) in _HOSPITALS.items():
        take = round(patients * share)
        rows = np.sort(np.array(sick[:take] + well[: patients - take]))
        sick, well = sick[take:], well[patients - take :]
        names = [str(n).replace(" ", "_") for n in loaded.feature_names]
        columns = {n: loaded.data[rows, i] for i, n in enumerate(names)}
        tables[name] = {**columns, "malignant": ill[rows]}
    return tables


def _own_table(data: Path, client: str, label: str | None) -> tuple[dict[str, Columns], str, dict[str, list[int]]]:
    """The user's table, cut by its column that names the hospital; the label is yes where it is above 0."""
    header, rows = _read(data)
    for column in [client, *([label] if label else [])]:
        if column not in header:
            raise InputError(
                f"{data}: expected a column {column!r}, found {', '.join(header)}; give --client and --label"
            )
    label = label or _guess_label(data, [name for name in header if name != client])
    columns = {name: np.array([row[i] for row in rows], dtype=object) for i, name in enumerate(header)}
    wrong = [value for value in columns[label] if not _is_number(value)]
    if wrong:
        raise InputError(
            f"{data}: expected numbers in the label column {label!r}, found {wrong[0]!r}; give another --label"
        )
    columns[label] = np.array([int(float(value) > 0) for value in columns[label]])
    categories = _categories({n: v for n, v in columns.items() if n not in (client, label)}, data)
    names = list(dict.fromkeys(columns[client]))
    if len(names) < 2:
        raise InputError(f"{data}: expected at least two hospitals in column {client!r}, found {len(names)}")
    tables = {}
    for name in names:
        here = columns[client] == name
        tables[_folder_name(str(name))] = {n: v[here] for n, v in columns.items() if n != client}
    return tables, label, categories


def _guess_label(data: Path, names: Sequence[str]) -> str:
    """The last column, as is the custom; said in the error when it does not serve."""
    if not names:
        raise InputError(f"{data}: expected columns beside the hospital's name, found none")
    return names[-1]


def _categories(columns: Columns, data: Path) -> dict[str, list[int]]:
    """Levels of columns that hold few whole numbers from 3 to 10 of them; text columns are refused with a sentence."""
    found = {}
    for name, values in columns.items():
        known = [value for value in values if value not in ("", "NA", "NaN", "?")]
        if not all(_is_number(value) for value in known):
            raise InputError(
                f"{data}: expected numbers in column {name!r}, found text; code it as numbers, or leave it out"
            )
        levels = sorted({float(value) for value in known})
        if 3 <= len(levels) <= 5 and all(level.is_integer() for level in levels):
            found[name] = [int(level) for level in levels]
    return found


def _read(data: Path) -> tuple[list[str], list[list[str]]]:
    if not data.is_file():
        raise InputError(f"--data {data}: expected a CSV file, found none")
    with data.open(newline="", encoding="utf-8-sig") as file:
        lines = [line for line in csv.reader(file) if line]
    if len(lines) < 2:
        raise InputError(f"{data}: expected a header and rows, found {len(lines)} lines")
    return [name.strip() for name in lines[0]], lines[1:]


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _folder_name(name: str) -> str:
    kept = "".join(c if c.isalnum() or c in "-_." else "-" for c in name.strip().lower()).strip("-.")
    if not kept:
        raise InputError(f"--client: expected names with letters or digits, found {name!r}")
    return kept


def _write_csv(path: Path, columns: Columns) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))
