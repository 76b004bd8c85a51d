"""A federation of real processes in one folder: started, killed, started again by the same command, and watched.

Each process runs the command line of ``hansa serve`` or ``hansa join``, in a fork of a server that has imported hansa
once, so that a start costs hundredths of a second. What a process hears and does is noted in files beside its state,
one line a note, so that the notes outlive it.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import socket
import sqlite3
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import forkserver
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import numpy as np

from faults.process import COORDINATOR, Order, Point, run_process

NAMES = ("berlin", "paris", "rome")
_PRELOAD = (
    "hansa.cli",
    "hansa.commands.serve",
    "hansa.commands.join",
    "hansa.network.http",
    "hansa.network.runtime",
    "hansa.network.client",
    "hansa.algorithms.scaffold",
    "hansa.transforms.quantize",
    "hansa.aggregators.secure_mean",
    "hansa.learners.linear",
    "hansa.training.report",
    "uvicorn.lifespan.off",
    "uvicorn.loops.asyncio",
    "uvicorn.protocols.websockets.auto",
    "sqlalchemy.dialects.sqlite.pysqlite",
    "cryptography.x509",
    "cryptography.hazmat.primitives.asymmetric.ec",
    "cryptography.hazmat.primitives.serialization",
    "anyio._backends._asyncio",
    "anyio.streams.tls",
    "httpcore2",
    "truststore",
    "pydantic.v1",
    "typer._adapters",
    "rich.progress",
    "rich._emoji_codes",
    "stringprep",
    "encodings.idna",
    "encodings.ascii",
    "encodings.cp437",
    "jinja2",
)
_APP = """
import numpy as np
import hansa


def load(path):
    with np.load(path) as found:
        return hansa.Dataset(found["x"], found["y"])


app = hansa.App(
    federation=hansa.Federation(
        learner=hansa.LinearLearner(num_features=3, num_classes=2),
        algorithm=hansa.SCAFFOLD(client_learning_rate=0.1, local_steps=3, batch_size=4),
        prepare=(hansa.Standardize(min_rows=1),),
        transforms=(hansa.Quantize(bits=8),),
    ),
    schedule=hansa.Schedule(num_rounds=NUM_ROUNDS, min_clients=NUM_CLIENTS, evaluate_every=NUM_ROUNDS, buffer=BUFFER),
    load_data=load,
    holdout=0.25,
)
"""
_NOISY = """
import numpy as np
import hansa


def load(path):
    with np.load(path) as found:
        return hansa.Dataset(found["x"], found["y"])


app = hansa.App(
    federation=hansa.Federation(
        learner=hansa.LinearLearner(num_features=3, num_classes=2),
        algorithm=hansa.FedAvg(client_learning_rate=0.1, local_steps=3, batch_size=4),
        transforms=(hansa.Clip(norm=1.0), hansa.GaussianNoise(epsilon=8, delta=1e-3)),
        aggregator=hansa.Mean(weighting="clients"),
    ),
    schedule=hansa.Schedule(num_rounds=NUM_ROUNDS + 1, min_clients=NUM_CLIENTS, buffer=BUFFER),
    load_data=load,
)
"""
_SECURE = """
import numpy as np
import hansa


def load(path):
    with np.load(path) as found:
        return hansa.Dataset(found["x"], found["y"])


app = hansa.App(
    federation=hansa.Federation(
        learner=hansa.LinearLearner(num_features=3, num_classes=2),
        algorithm=hansa.FedAvg(client_learning_rate=0.1, local_steps=3, batch_size=4),
        transforms=(hansa.Clip(norm=1.0),),
        aggregator=hansa.SecureMean(),
    ),
    schedule=hansa.Schedule(num_rounds=NUM_ROUNDS, min_clients=NUM_CLIENTS, evaluate_every=NUM_ROUNDS, buffer=BUFFER),
    holdout=0.25,
    load_data=load,
)
"""


class Failure(AssertionError):
    """A trial that did not end as it should; the message holds the end of every log."""


class Trial:
    """One federation. ``folder`` holds its app, its data, the state of everyone, logs and notes."""

    def __init__(
        self,
        folder: Path,
        port: int,
        *,
        names: Sequence[str] = NAMES,
        num_rounds: int = 3,
        seeded: bool = True,
        url: str | None = None,
        kills: Mapping[str, Sequence[Point]] | None = None,
        trace: bool = False,
        small: int | None = None,
        buffer: str | None = None,
        noisy: bool = False,
        secure: bool = False,
    ) -> None:
        self.folder, self.port, self.names, self.seeded, self.url = folder, port, tuple(names), seeded, url
        self.kills, self.trace = dict(kills or {}), trace  # who dies at which points, once at each
        self.small = small  # bytes beyond which bodies are treated as long ones
        self.noisy = noisy  # releases get noise, and owners have a privacy budget
        self.secure = secure  # updates travel under masks; phases name the exchange, too
        self.buffer = buffer  # options of ``Buffered``, where rounds are buffered ones
        self.starve: dict[str, Point] = {}  # whose memory runs out where, once
        self.clocks: dict[str, tuple[float, ...]] = {}  # whose wall clock is wrong, by how many seconds
        self.processes: dict[str, Any] = {}
        self.num_kills = 0
        self._context = forks()
        if not (folder / "app.py").exists():
            self._write(num_rounds)

    def _write(self, num_rounds: int) -> None:
        for part in ("data", "notes", "logs", "archive"):
            (self.folder / part).mkdir(parents=True, exist_ok=True)
        source = (
            (_NOISY if self.noisy else _SECURE if self.secure else _APP)
            .replace("NUM_ROUNDS", str(num_rounds))
            .replace("NUM_CLIENTS", str(len(self.names)))
        )
        source = source.replace("BUFFER", f"hansa.Buffered({self.buffer})" if self.buffer else "None")
        (self.folder / "app.py").write_text(source)
        for number, name in enumerate(self.names):
            draw = np.random.default_rng(number)
            x = draw.normal(size=(16 + number, 3)).astype(np.float32)
            np.savez(self.folder / "data" / f"{name}.npz", x=x, y=(x.sum(axis=1) > 0).astype(np.int64))

    # ------------------------------------------------------------------------------------------------- processes

    def start(self, name: str, **more: Any) -> None:
        """Start the coordinator or a client, by the line that always starts it."""
        if name == COORDINATOR:
            words = ("serve", "app.py", "--state", "fed", "--listen", f"127.0.0.1:{self.port}", "--out", "run")
            words += ("--url", self.url) if self.url else ()
        else:
            words = ("join", f"@{name}.token", "app.py", "--data", f"data/{name}.npz", "--state", name)
            words += ("--epsilon-budget", "100", "--budget-dir", "budgets") if self.noisy else ()
            words += ("--peers", "peers.txt") if (self.folder / "peers.txt").exists() else ()
        done = {(note["point"], note["phase"]) for note in self.notes(name, "kill")}
        kills = tuple(point for point in self.kills.get(name, ()) if point not in done)
        shared = {
            "kills": kills,
            "trace": self.trace,
            "seeded": self.seeded,
            "small": self.small,
            "notes_often": self.buffer is not None,
            "by_exchange": self.secure,
            "starve": self.starve.get(name),
            "clock": self.clocks.get(name, ()),
        }
        order = Order(name=name, folder=self.folder, words=words, **shared, **more)
        process = self._context.Process(target=run_process, args=(order,), daemon=True)
        process.start()
        self.processes[name] = process

    def start_everyone(self) -> None:
        """The coordinator, tokens for the clients that have none, and every client."""
        self.start(COORDINATOR)
        self.invite()
        for name in self.names:
            self.start(name)

    def invite(self, limit_s: float = 30.0) -> None:
        """A token in a file for each client that has none; waits until the coordinator has said where it is."""
        from hansa.core.errors import InputError
        from hansa.network.registry import invite

        end = time.monotonic() + limit_s
        for name in self.names:
            token = self.folder / f"{name}.token"
            while not token.exists():
                self._check_time(end)
                self._again(COORDINATOR)
                try:
                    token.write_text(invite(self.folder / "fed", name).encode())
                except (InputError, sqlite3.OperationalError):
                    time.sleep(0.01)

    def kill(self, name: str) -> bool:
        """SIGKILL a process, now; False when it has ended already."""
        if not self.is_running(name):
            return False
        process = self.processes[name]
        process.kill()
        process.join(10)
        self.num_kills += process.exitcode == -signal.SIGKILL
        return bool(process.exitcode == -signal.SIGKILL)

    def run(self, *, limit_s: float = 60.0) -> None:
        """Start everyone and wait for the end, as ``finish``."""
        self.start_everyone()
        self.finish(limit_s=limit_s)

    def finish(self, *, limit_s: float = 60.0) -> None:
        """Until all have ended well; whoever was killed is started again, to die at the points that are left.

        Raises ``Failure`` when a process ends in another way, or not in time.
        """
        end = time.monotonic() + limit_s
        while True:
            self.tend()
            running = [p.sentinel for p in self.processes.values() if p.exitcode is None]
            if not running:
                return
            self._check_time(end)
            wait(running, timeout=0.5)

    def tend(self, seconds: float = 0.0) -> None:
        """Let time pass, while whoever was killed is started again."""
        end = time.monotonic() + seconds
        while True:
            for name in list(self.processes):
                self._again(name)
            self._dismiss()
            left = end - time.monotonic()
            if left <= 0:
                return
            running = [p.sentinel for p in self.processes.values() if p.exitcode is None]
            if not wait(running, timeout=left):
                return

    def until(self, true: Callable[[], bool], *, limit_s: float = 30.0) -> None:
        """Let time pass until something has happened; nobody is started again meanwhile."""
        end = time.monotonic() + limit_s
        while not true():
            self._check_time(end)
            time.sleep(0.005)

    def is_running(self, name: str) -> bool:
        """Whether a process has not ended."""
        return name in self.processes and self.processes[name].exitcode is None

    def _again(self, name: str) -> None:
        """Start a process again if it was killed; ``Failure`` if it ended badly."""
        code = self.processes[name].exitcode
        if code == -signal.SIGKILL:
            self.start(name)
        elif code == 1 and "try the same command again" in self._last_words(name):
            time.sleep(0.05)  # it came to enrol while the coordinator was away
            self.start(name)
        elif code not in (None, 0):
            done = name == COORDINATOR and "is done; give another" in self._last_words(name)
            if not done:  # as a coordinator says when it is started once more and has nobody left to tell
                raise Failure(f"{name} ended with status {code}\n{self.logs()}")

    def _last_words(self, name: str) -> str:
        """What a process said in the end."""
        return (self.folder / "logs" / f"{name}.log").read_text()[-600:]

    def _dismiss(self) -> None:
        """End clients that said goodbye before they were killed; for those that did not, start the coordinator again.

        Both wait for a coordinator whose run is over and that has ended.
        """
        if self.processes[COORDINATOR].exitcode is None or not self.finished:
            return
        told = {name for (name,) in self.query("SELECT client FROM presence WHERE said_goodbye")}
        for name in [name for name in self.names if self.is_running(name)]:
            process = self.processes[name]
            process.join(0.5)
            if process.exitcode is None and name not in told:
                self.start(COORDINATOR)
                return
            process.terminate()
            process.join(10)
            self.processes.pop(name)

    def _check_time(self, end: float) -> None:
        if time.monotonic() > end:
            waiting = [name for name, process in self.processes.items() if process.exitcode is None]
            raise Failure(f"not done in time; still running: {waiting}\n{self.logs()}")

    def end(self) -> None:
        """Kill what is left."""
        for process in self.processes.values():
            if process.exitcode is None:
                process.kill()
            process.join(10)
            process.close()
        self.processes = {}

    # ----------------------------------------------------------------------------------------------- what they left

    @property
    def finished(self) -> bool:
        """Whether the run is marked as over."""
        rows = self.query("SELECT value FROM meta WHERE key = 'run'")
        return bool(rows and json.loads(rows[0][0])["finished"])

    def query(self, query: str, *values: Any, file: str = "fed/coordinator.db") -> list[Any]:
        """Rows of a database in the trial's folder."""
        with contextlib.closing(sqlite3.connect(self.folder / file, timeout=30)) as db:
            return db.execute(query, values).fetchall()

    def notes(self, name: str, *kinds: str) -> list[dict[str, Any]]:
        """What a process noted, in order."""
        path = self.folder / "notes" / f"{name}.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [note for note in map(json.loads, lines) if note["kind"] in kinds]

    def parameters(self) -> bytes:
        """The run's last word."""
        return (self.folder / "run" / "parameters.safetensors").read_bytes()

    def memories(self) -> dict[str, list[Any]]:
        """What every client remembers of the run."""
        return {name: self.query("SELECT body FROM memory", file=f"{name}/client.db") for name in self.names}

    def reached(self, name: str) -> dict[str, list[str]]:
        """Points that a traced process came by, each with the phases in which it did."""
        found: dict[str, dict[str, None]] = defaultdict(dict)
        for note in self.notes(name, "point"):
            found[note["point"]][note["phase"]] = None
        return {point: list(phases) for point, phases in found.items()}

    def logs(self) -> str:
        """The end of every log."""
        texts = [f"--- {path.name}\n{path.read_text()[-3000:]}" for path in sorted((self.folder / "logs").iterdir())]
        return "\n".join(texts)


def forks() -> Any:
    """Where processes come from: forks of a server that has imported hansa."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(_PRELOAD))
    forkserver.ensure_running()
    return context


def free_port() -> int:
    """A port below those that the system gives to calls, so that it stays free while its server is away."""
    for _ in range(1000):
        port = random.SystemRandom().randrange(20_000, 32_000)
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
    raise Failure("no free port between 20000 and 32000")


def fast_folder() -> Path:
    """Where files cost nothing to sync, if there is such a place: a kill does not lose what the kernel was given."""
    import tempfile

    memory = Path("/dev/shm")
    return Path(tempfile.mkdtemp(prefix="hansa-", dir=memory if os.access(memory, os.W_OK) else None))


def enrolled(folder: Path, **more: Any) -> Trial:
    """A trial whose clients have enrolled and whose round 0 has not begun; nobody is running."""
    trial = Trial(folder, free_port(), **more)
    trial.kills = dict.fromkeys(trial.names, (("client.identity.kept", "start"),))
    trial.start_everyone()
    for name in trial.names:
        trial.processes[name].join(30)
        if trial.processes[name].exitcode != -signal.SIGKILL:
            raise Failure(f"{name} did not enrol\n{trial.logs()}")
    trial.end()
    for part in ("notes", "logs"):
        for path in (folder / part).iterdir():
            path.unlink()
    return trial


def copied(trial: Trial, folder: Path, **more: Any) -> Trial:
    """Another trial that begins where ``trial`` stands; they cannot run at the same time, as they share a port."""
    shutil.copytree(trial.folder, folder, symlinks=True)
    same = {"seeded": trial.seeded, "url": trial.url, "buffer": trial.buffer, "noisy": trial.noisy}
    same |= {"secure": trial.secure}
    return Trial(folder, trial.port, names=trial.names, **{**same, **more})
