"""hansa's simulation against its peers: the same data, the same clients, one table and one picture.

    python benchmarks/simulation/run.py [--workloads W1,W2,W3,lr_mnist] [--peers hansa,R0,...] [--repeats 3] [--check]

Each peer gets a virtual environment of its own (``environments.toml``), outside the repository, and each run a process
of its own. Repeats take turns: every row once, then every row again. ``--quick`` is hansa and the lines written by hand
alone, for three rounds, with nothing installed. What was measured lies in results.md, results.json and results.svg.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import environments
import mnist
import results
import workloads
from bars import bars
from measure import Record, measure
from rows import ROWS, Row
from setting import SHARED_DATA, need, setting
from summary import lines, seconds_a_round
from workloads import first_clients

HERE = Path(__file__).resolve().parent
QUICK = ("hansa", "R0", "R2b")
NUM_SEEDS = 3  # of LR-on-MNIST: the repeats take them in turn


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    names, rows = _chosen(options)
    pythons, failed = _install(rows, names, Path(options.envs))
    rows = [row for row in rows if row.name in pythons]
    if options.tune:
        rows = [tried for row in rows for tried in row.tried()]
    records = [*failed, *_measured(rows, names, pythons, options)]
    if options.tune:
        return 0
    for bar in (verdicts := bars(lines(rows, records))):
        print(bar)
    if options.output:
        versions = {row.name: environments.versions(pythons[row.name], row.packages) for row in rows}
        said = f"{setting('torch')}. {options.repeats} repeats; hansa's runtime: {options.runtime}."
        results.write(Path(options.output), rows, records, versions, said)
    return 1 if options.check and not all(bar.is_met for bar in verdicts) else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", default=",".join(workloads.SETTINGS), help="some of %(default)s")
    parser.add_argument("--peers", default=",".join(row.name for row in ROWS), help="some of %(default)s")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each row; the figures are medians over them")
    parser.add_argument("--rounds", type=int, help="at most so many rounds a run, to try things out")
    parser.add_argument("--runtime", default="auto", help="of hansa's rows: auto, InProcess, Processes:2, Ray:2")
    parser.add_argument("--mnist", default=str(SHARED_DATA), help="where mnist_writers.npz lies (default: %(default)s)")
    parser.add_argument("--envs", default=str(environments.FOLDER), help="the peers' environments (%(default)s)")
    parser.add_argument("--output", help="folder of the results (default: this one; with --quick: none)")
    parser.add_argument("--quick", action="store_true", help="three rounds of hansa and the hand-written lines")
    parser.add_argument("--tune", action="store_true", help="run every setting of each row instead of the best")
    parser.add_argument("--check", action="store_true", help="exit status 1 if a bar is missed")
    return parser


def _chosen(options: argparse.Namespace) -> tuple[list[str], list[Row]]:
    """The workloads and rows asked for; fills in what ``--quick`` means."""
    if options.quick:
        options.peers, options.rounds, options.repeats = ",".join(QUICK), 3, 1
    elif options.output is None:
        options.output = str(HERE)
    names, asked = options.workloads.split(","), options.peers.split(",")
    known = [row.name for row in ROWS]
    need(
        set(names) <= set(workloads.SETTINGS),
        f"--workloads: expected some of {','.join(workloads.SETTINGS)}, found {names}",
    )
    need(set(asked) <= set(known), f"--peers: expected some of {','.join(known)}, found {asked}")
    need(options.repeats >= 1, f"--repeats: expected 1 or more, found {options.repeats}")
    if "lr_mnist" in names and mnist.find(Path(options.mnist)) is None:
        print(f"lr_mnist is left out: no {mnist.FILE} in {options.mnist}; give its folder with --mnist")
        names.remove("lr_mnist")
    return names, [row for row in ROWS if row.name in asked]


def _install(rows: Sequence[Row], names: Sequence[str], folder: Path) -> tuple[dict[str, Path], list[Record]]:
    """Each row's interpreter, and a record of each that cannot be had."""
    pythons, failed = {}, []
    for row in rows:
        try:
            pythons[row.name] = environments.python_of(row.name, folder)
        except environments.InstallError as error:
            print(error)
            failed += [Record(row=row.name, workload=n, setting="", repeat=0, error=str(error)) for n in names]
    return pythons, failed


def _measured(
    rows: Sequence[Row], names: Sequence[str], pythons: dict[str, Path], options: argparse.Namespace
) -> list[Record]:
    """Every row once in each repeat."""
    records: list[Record] = []
    for repeat in range(options.repeats):
        for name in names:
            with tempfile.TemporaryDirectory() as scratch:
                workload = _workload(name, repeat, options)
                folder = Path(scratch) / name
                workload.save(folder)
                for row in rows:
                    if name in row.best and not _has_failed(row, name, records):
                        record = _one(row, workload, folder, pythons[row.name], repeat, options)
                        print(_progress(record), flush=True)
                        records.append(record)
    return records


def _workload(name: str, repeat: int, options: argparse.Namespace) -> workloads.Workload:
    if name != "lr_mnist":
        return workloads.synthetic(name)
    path = mnist.find(Path(options.mnist))
    assert path is not None
    return mnist.power_law(path, repeat % NUM_SEEDS)


def _one(
    row: Row, workload: workloads.Workload, folder: Path, python: Path, repeat: int, options: argparse.Namespace
) -> Record:
    """One run; hansa's accuracies come from a second one, which scores every round and is not timed."""
    name = workload.setting.name
    if row.only_clients:
        return _cut(row, first_clients(workload, row.only_clients), folder, python, repeat)
    num_rounds = min(workload.setting.num_rounds, options.rounds or workload.setting.num_rounds)
    keep = set(range(max(1, num_rounds - 9), num_rounds + 1)) if len(workload.test_y) else set()
    if row.name == "R0":
        keep |= {min(num_rounds, other.rounds.get(name, num_rounds)) for other in ROWS}
    extra: dict[str, Any] = {"runtime": options.runtime} if row.kind == "hansa" else {}
    record = measure(row, workload, folder, python, repeat, num_rounds=num_rounds, keep=keep, options=extra)
    if row.kind == "hansa" and len(workload.test_y) and not record.error:
        scored = measure(
            row, workload, folder, python, repeat, num_rounds=num_rounds, keep=set(), options=extra | {"score": True}
        )
        record.accuracies = scored.accuracies
    return record


def _cut(row: Row, few: workloads.Workload, folder: Path, python: Path, repeat: int) -> Record:
    """A row that takes few clients, and what the bare loop reaches with them."""
    bare, cut = next(row for row in ROWS if row.name == "R0"), folder.with_name(f"{row.name}-clients")
    few.save(cut)
    num_rounds = row.rounds[few.setting.name]
    reached = measure(bare, few, cut, Path(sys.executable), repeat, num_rounds=num_rounds, keep=set(), options={})
    record = measure(row, few, cut, python, repeat, num_rounds=num_rounds, keep=set(), options={})
    record.reference = reached.reference
    return record


def _has_failed(row: Row, name: str, records: Sequence[Record]) -> bool:
    return any(r.error and (r.row, r.workload, r.setting) == (row.name, name, row.best[name]) for r in records)


def _progress(record: Record) -> str:
    start = f"{record.workload} {record.row} ({record.setting}), repeat {record.repeat + 1}"
    if record.error:
        return f"{start}: {record.error}"
    figures = f"{1000 * seconds_a_round(record):.2f} ms a round, first result after {record.first_result:.1f} s"
    return f"{start}: {figures}, loss {record.loss:.4f}, {record.rss_mib:.0f} MiB {record.note}"


if __name__ == "__main__":
    raise SystemExit(main())
