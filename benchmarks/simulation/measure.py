"""One run of one peer: a process of its own in the peer's environment, watched from outside, and what came of it."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import models
import numpy as np
from rows import Row
from workloads import Workload

HERE = Path(__file__).resolve().parent
TIMEOUT_S = 600
MIB = 2**20


@dataclass(kw_only=True)
class Record:
    """What one run gave; ``error`` is empty, or a sentence and the rest has no meaning."""

    row: str
    workload: str
    setting: str
    repeat: int
    error: str = ""
    seconds: list[float] = field(default_factory=list)  # every round, the first too
    startup: float = 0.0  # s, from the command until the first round begins
    first_result: float = 0.0  # s, from the command until the first round has ended
    rss_mib: float = 0.0  # highest sum over its processes; what they share counts in each
    pss_mib: float = 0.0  # the same with what they share counted once; 0 where the system does not tell
    loss: float = 0.0
    reference: dict[str, float] = field(default_factory=dict)  # of the bare loop alone: loss after some rounds
    accuracies: list[float] = field(default_factory=list)
    note: str = ""

    def as_json(self) -> dict[str, Any]:
        """The record as plain values, times to a tenth of a microsecond."""
        return asdict(self) | {"seconds": [round(seconds, 7) for seconds in self.seconds]}


def measure(
    row: Row,
    workload: Workload,
    folder: Path,
    python: Path,
    repeat: int,
    *,
    num_rounds: int,
    keep: set[int],
    options: dict[str, Any],
) -> Record:
    """Run ``row`` on the workload saved in ``folder``, for fewer rounds if it is slow; ``keep``: see ``job.py``."""
    name = workload.setting.name
    setting, own = row.setting_for(name)
    record = Record(row=row.name, workload=name, setting=setting, repeat=repeat)
    num_rounds = min(num_rounds, row.rounds.get(name, num_rounds))
    with tempfile.TemporaryDirectory() as scratch:
        results = Path(scratch) / "parameters.npz"
        job = {"folder": str(folder), "num_rounds": num_rounds, "options": own | options, "keep": sorted(keep)}
        job |= {"results": str(results), "launched": time.time()}
        command = [*_launcher(python, own), str(HERE / "peers" / f"{row.script}.py"), json.dumps(job)]
        said, record.error, record.rss_mib, record.pss_mib = _watched(command, own, scratch)
        if record.error:
            return record
        for key, value in said.items():
            setattr(record, key, value)
        with np.load(results) as stored:
            kept = _by_round(stored)
    record.loss = models.loss(workload, kept[num_rounds])
    if row.name == "R0":
        record.reference = {str(number): models.loss(workload, kept[number]) for number in sorted(kept)}
    if len(workload.test_y) and not record.accuracies:
        record.accuracies = [models.accuracy(workload, kept[number]) for number in sorted(kept)]
    return record


def _launcher(python: Path, own: dict[str, Any]) -> list[str]:
    if own.get("processes", 1) == 1:
        return [str(python)]
    return [str(python), "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={own['processes']}"]


def _environment(own: dict[str, Any], scratch: str) -> dict[str, str]:
    """Our own without Python's settings; with a safe path a script may be called as the package that it imports."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "OMP_", "MKL_"))}
    threads = {"OMP_NUM_THREADS": str(own["threads"])} if "threads" in own else {}
    own_path = {"PYTHONPATH": str(HERE), "PYTHONSAFEPATH": "1"}
    return kept | threads | own_path | {"TMPDIR": scratch, "PYTHONWARNINGS": "ignore"}


def _watched(command: list[str], own: dict[str, Any], scratch: str) -> tuple[dict[str, Any], str, float, float]:
    """What the peer printed, an error or "", and its peaks of memory in MiB (RSS, PSS)."""
    with open(Path(scratch) / "out", "w+") as out, open(Path(scratch) / "err", "w+") as err:
        process = subprocess.Popen(
            command, stdout=out, stderr=err, env=_environment(own, scratch), cwd=scratch, start_new_session=True
        )
        memory = _Memory(process.pid)
        try:
            status = process.wait(TIMEOUT_S)
            error = f"exit status {status}" if status else ""
        except subprocess.TimeoutExpired:
            error = f"stopped after {TIMEOUT_S} s"
        finally:
            memory.stop()
            _end(process)
        lines = [line for line in _text(out) if line.startswith('{"')]
        if not error and not lines:
            error = "printed no result"
        if error:
            last = [line for line in _text(err) if line.strip()][-1:]
            return {}, ": ".join([error, *last]), 0.0, 0.0
        return json.loads(lines[-1]), "", memory.rss / MIB, memory.pss / MIB


def _text(file: Any) -> list[str]:
    file.seek(0)
    return str(file.read()).splitlines()


def _end(process: subprocess.Popen[bytes]) -> None:
    """End what is left of the peer's own session, its workers too."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _by_round(stored: Any) -> dict[int, list[np.ndarray]]:
    kept: dict[int, list[np.ndarray]] = {}
    for name in stored.files:  # "round.tensor", in order
        kept.setdefault(int(name.split(".")[0]), []).append(stored[name])
    return kept


class _Memory:
    """The highest memory of a process and all that it started, four times a second; shared pages once a second.

    To count shared pages, the system walks all pages of a process, which holds up what is being timed.
    """

    def __init__(self, pid: int) -> None:
        self.rss = self.pss = 0.0
        self._pid, self._over = pid, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Look no more."""
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        if sys.platform != "linux":
            return
        for look in itertools.count(1):
            if self._over.wait(0.25):
                return
            family = _family(self._pid)
            self.rss = max(self.rss, sum(_kilobytes(pid, "status", "VmRSS:") for pid in family) * 1024)
            if look % 4 == 0:
                self.pss = max(self.pss, sum(_kilobytes(pid, "smaps_rollup", "Pss:") for pid in family) * 1024)


def _family(pid: int) -> list[int]:
    """A process and all below it, by Linux's table of children."""
    family = [pid]
    for one in family:
        for listed in Path(f"/proc/{one}/task").glob("*/children"):
            try:
                family += [int(child) for child in listed.read_text().split()]
            except OSError:
                continue
    return family


def _kilobytes(pid: int, file: str, name: str) -> int:
    """One line of /proc, or 0 where the process has just ended."""
    try:
        lines = Path(f"/proc/{pid}/{file}").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith(name)), 0)
