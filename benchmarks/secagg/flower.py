"""A round of secure aggregation beside Flower's SecAgg+: the same vectors, the same drop-out, one table.

    python benchmarks/secagg/flower.py [--clients 100] [--params 1000000] [--dropped 10] [--repeats 3] [--check]

Each side runs in a process of its own, in turn, ``--repeats`` times; the least seconds count. Flower gets a virtual
environment of its own, outside the repository (``../simulation/environments.toml``). What each side is timed for, and
what it leaves out, says the first line of ``flower_side.py`` and ``hansa_side.py``. Both must find the mean of those
that are left. With ``--check`` the exit status is 1 where hansa's round is not ten times as fast, or takes 15 s.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.append(str(Path(__file__).resolve().parents[1] / "simulation"))  # for its environments

import environments
from setting import need, setting

from hansa.secagg.graph import graph_of  # the neighbours that hansa's clients have by default

HERE = Path(__file__).resolve().parent
FASTER, BAR_S = 10.0, 15.0
BITS = 22  # of a coordinate: Flower's own default
Run = dict[str, Any]


def main(words: list[str] | None = None) -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--clients", type=int, default=100)
    options.add_argument("--params", type=int, default=1_000_000)
    options.add_argument("--dropped", type=int, default=10)
    options.add_argument("--repeats", type=int, default=3)
    options.add_argument("--envs", default=str(environments.FOLDER), help="where Flower's environment is (%(default)s)")
    options.add_argument("--check", action="store_true", help="exit status 1 where a bar is missed")
    given = options.parse_args(words)
    graph = graph_of(given.clients)
    need(0 <= given.dropped < given.clients, "--dropped: expected fewer than --clients")
    try:
        python = environments.python_of("flower", Path(given.envs))
    except environments.InstallError as error:
        need(False, str(error))
    size = {"clients": given.clients, "params": given.params, "dropped": given.dropped}
    sides = {
        "Flower": (python, "flower_side.py", {**size, "shares": graph.degree + 1, "threshold": graph.threshold + 1}),
        "hansa": (Path(sys.executable), "hansa_side.py", {**size, "bits": BITS}),
    }
    runs: dict[str, list[Run]] = {name: [] for name in sides}
    for _ in range(given.repeats):
        for name, (interpreter, script, told) in sides.items():
            runs[name].append(run_side(interpreter, script, told))
    found = {name: min(own, key=lambda run: float(run["round_s"])) for name, own in runs.items()}
    flwr = environments.versions(python, ("flwr", "numpy"))
    print(setting("cryptography"), "; Flower's:", ", ".join(f"{n} {v}" for n, v in flwr.items()))
    print(
        f"{given.clients} clients, {given.params:,} parameters, {given.dropped} lost after giving out shares, "
        f"{graph.degree} neighbours; least of {given.repeats}"
    )
    for name, run in found.items():
        spent = f"{run['round_s']:7.2f} s a round ({run['core_s']:.2f} of a core in all)"
        print(f"{name:>7}: {spent}; largest error {run['error']:.1e}; {run['said']}")
    ratio = found["Flower"]["round_s"] / found["hansa"]["round_s"]
    right = all(run["error"] <= run["tolerance"] for own in runs.values() for run in own)
    met = ratio >= FASTER and found["hansa"]["whole_s"] < BAR_S and right
    print(
        f"hansa is {ratio:.1f} times as fast (bar {FASTER:g}), {found['hansa']['whole_s']:.1f} s in all (bar {BAR_S:g})"
    )
    return int(given.check and not met)


def run_side(python: Path, script: str, told: dict[str, int]) -> Run:
    """What one side printed; its failure ends the benchmark with its last line."""
    done = subprocess.run(
        [python, HERE / script, json.dumps(told)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    last = (done.stdout if not done.returncode else done.stderr).strip().splitlines()[-1:]
    need(not done.returncode and bool(last), f"{script} ended with status {done.returncode}: {' '.join(last)}")
    found: Run = json.loads(last[0])
    return found


if __name__ == "__main__":
    raise SystemExit(main())
