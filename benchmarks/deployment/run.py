"""hansa's deployment beside Flower's SuperLink and SuperNodes: the same model and clients, TLS on, one table.

    python benchmarks/deployment/run.py [--sizes 1,100] [--rounds 5] [--clients 10] [--sides hansa,...] [--check]

Round time, memory, bytes, and what ``kill -9`` of the server in mid-round does. Every process is one that a user would
start. Flower gets a virtual environment of its own, outside the repository (``../simulation/environments.toml``).
``--quick`` is hansa alone on a small model, with nothing installed. The table lies in results.md.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from pathlib import Path
from typing import TypeVar

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.append(str(Path(__file__).resolve().parents[1] / "simulation"))  # for its environments

import environments
import page
import trials
from setting import need, setting

HERE = Path(__file__).resolve().parent
KILLED_MB = 1.0
Record = TypeVar("Record", trials.Timed, trials.Traffic, trials.Killed)


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    chosen = _chosen(options)
    sizes = _sizes(options.sizes)
    python = Path(sys.executable)
    if any(row.setting is not None for row in chosen):
        try:
            python = environments.python_of("flower", Path(options.envs))
        except environments.InstallError as error:
            need(False, f"{error}; give --sides hansa to measure hansa alone")
    results = _measured(chosen, python, sizes, options)
    for said in (page.table(results), *page.bars(results), *results.errors()):
        print(said)
    if options.output:
        flower = any(row.setting is not None for row in chosen)
        versions = environments.versions(python, ("flwr", "numpy", "grpcio", "uvicorn", "httpx")) if flower else {}
        legend = {"num_rounds": options.rounds, "num_clients": options.clients}
        legend |= {"killed_mb": min(*sizes, KILLED_MB), "slow_s": trials.SLOW_S}
        _write(Path(options.output), results, versions, legend)
    met = all(bar.is_met is not False for bar in page.bars(results)) and not results.errors()
    return 1 if options.check and not met else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ",".join(row.name for row in trials.ROWS)
    parser.add_argument("--sizes", default="1,100", help="megabytes of the models (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="counted rounds, after one to warm up")
    parser.add_argument("--clients", type=int, default=10)
    parser.add_argument("--sides", default=names, help="some of %(default)s")
    parser.add_argument("--patience", type=float, default=180.0, help="seconds to wait for a run after kill -9")
    parser.add_argument("--no-kill", action="store_true", help="leave the runs with kill -9 out")
    parser.add_argument("--no-bytes", action="store_true", help="leave the runs that count bytes out")
    parser.add_argument("--envs", default=str(environments.FOLDER), help="where Flower's environment is (%(default)s)")
    parser.add_argument("--output", help="folder of results.md and results.json (default: this one; --quick: none)")
    parser.add_argument("--quick", action="store_true", help="hansa alone, three clients, 0.1 MB, two rounds")
    parser.add_argument("--check", action="store_true", help="exit status 1 if a bar is missed")
    return parser


def _sizes(text: str) -> list[float]:
    try:
        sizes = [float(size) for size in text.split(",")]
    except ValueError:
        sizes = []
    need(bool(sizes) and min(sizes) > 0, f"--sizes: expected megabytes above 0, such as 1,100, found {text}")
    return sizes


def _chosen(options: argparse.Namespace) -> list[trials.Row]:
    """The sides asked for; fills in what ``--quick`` means."""
    if options.quick:
        options.sides, options.sizes, options.clients, options.rounds = "hansa", "0.1", 3, 2
    elif options.output is None:
        options.output = str(HERE)
    known, asked = [row.name for row in trials.ROWS], options.sides.split(",")
    need(set(asked) <= set(known), f"--sides: expected some of {','.join(known)}, found {options.sides}")
    need(options.rounds >= 1, f"--rounds: expected 1 or more, found {options.rounds}")
    need(options.clients >= 2, f"--clients: expected 2 or more, found {options.clients}")
    return [row for row in trials.ROWS if row.name in asked]


def _measured(chosen: list[trials.Row], python: Path, sizes: list[float], options: argparse.Namespace) -> page.Results:
    """Every run of every side, one after the other."""
    timed, traffic, killed = [], [], []
    lengths, clients = [round(size * 1e6 / 4) for size in sizes], options.clients
    for num_params, row in itertools.product(lengths, chosen):
        if not row.only_killed:
            timed.append(_told(trials.timed(row, python, num_params, clients, options.rounds)))
        if row.is_counted and not options.no_bytes:
            traffic.append(_told(trials.traffic(row, python, num_params, clients)))
    for row in chosen:
        if row.is_killed and not options.no_kill:
            num_params = min(*lengths, round(KILLED_MB * 1e6 / 4))
            killed.append(_told(trials.killed(row, python, num_params, clients, options.patience)))
    return page.Results(rows=chosen, timed=timed, traffic=traffic, killed=killed)


def _told(record: Record) -> Record:
    """Print what a run gave."""
    print(json.dumps(trials.as_json(record)), flush=True)
    return record


def _write(folder: Path, results: page.Results, versions: dict[str, str], legend: dict[str, float]) -> None:
    said = setting("uvicorn", "cryptography")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.md").write_text(page.markdown(results, said, versions, legend), encoding="utf-8")
    records = [trials.as_json(one) for one in (*results.timed, *results.traffic, *results.killed)]
    (folder / "results.json").write_text(json.dumps({"setting": said, "records": records}, indent=1) + "\n")


if __name__ == "__main__":
    raise SystemExit(main())
