"""hansa's deployment, as its README starts it: ``hansa serve``, a token for each client, and ``hansa join`` each."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from processes import Started, answers, call, free_port, until
from safetensors.numpy import load_file

HERE = Path(__file__).resolve().parent
APP = HERE / "app.py"
SERVER_KINDS = ("hansa serve",)
CLIENT_KINDS = ("hansa join",)


class HansaSide:
    """One run in a folder. ``through`` is given the server's port and says which one clients are to call."""

    def __init__(
        self,
        folder: Path,
        *,
        num_params: int,
        num_clients: int,
        num_rounds: int,
        slow_s: float = 0.0,
        through: Callable[[int], int] = lambda port: port,
    ) -> None:
        self.folder, self.num_clients, self.num_rounds = folder, num_clients, num_rounds
        self.trainings, self.port = folder / "trainings", free_port()
        self._called = through(self.port)
        self._environment = os.environ | {
            "DEPLOYMENT_PARAMS": str(num_params),
            "DEPLOYMENT_CLIENTS": str(num_clients),
            "DEPLOYMENT_SLOW_S": str(slow_s),
            "DEPLOYMENT_TRAININGS": str(self.trainings),
        }
        self._clients: list[Started] = []
        self._servers: list[Started] = []

    def start(self) -> None:
        """Everything from nothing: the coordinator, its authority, tokens, clients that enrol and join."""
        self.start_server()
        for client in range(self.num_clients):
            token = call([*_hansa("invite"), f"client-{client}", "--state", self.folder / "fed"], self._environment)
            (self.folder / f"{client}.token").write_text(token.splitlines()[-1])
            (self.folder / str(client)).touch()
        self._clients = [self._join(client) for client in range(self.num_clients)]

    def start_server(self) -> None:
        """The coordinator; after a kill, by the same command."""
        words = [*_hansa("serve"), APP, "--state", self.folder / "fed", "--listen", f"127.0.0.1:{self.port}"]
        words += ["--out", self.folder / "run", "--set", f"schedule.num_rounds={self.num_rounds}"]
        words += ["--url", f"https://127.0.0.1:{self._called}"]
        self._servers.append(Started("server", words, self.folder, self._environment))
        until(lambda: answers(self.port), 60, "hansa serve", [self.server])

    @property
    def server(self) -> Started:
        """The newest coordinator."""
        return self._servers[-1]

    def kill_server(self) -> None:
        """``kill -9``."""
        self.server.kill()

    @property
    def is_done(self) -> bool:
        """Whether the run came to its end and everybody knows."""
        return not self.server.is_running and self.status() == "completed"

    def wait(self, limit_s: float) -> None:
        """Until the run is done."""
        until(lambda: self.is_done, limit_s, "hansa's run", [self.server])

    def num_reported(self, number: int) -> int:
        """How many updates of a round were accepted, as clients were told."""
        return sum(f"round {number + 1}: update accepted" in client.said() for client in self._clients)

    def moments(self) -> list[float]:
        """When the first round began and when each ended, by the coordinator's log."""
        lines = [json.loads(line) for line in (self.folder / "run" / "log.jsonl").read_text().splitlines()]
        began = next(line["at"] for line in lines if line.get("kind") == "planned")
        return [began, *(line["at"] for line in lines if line.get("kind") == "released")]

    def result(self) -> np.ndarray:
        """The parameters in the end."""
        return load_file(self.folder / "run" / "parameters.safetensors")["values"]

    def server_pids(self) -> Sequence[int]:
        """The processes that are the server."""
        return [self.server.process.pid] if self._servers else []

    def client_pids(self) -> Sequence[int]:
        """The processes that are the first client."""
        return [self._clients[0].process.pid] if self._clients else []

    def status(self) -> str:
        """What became of the run, in a word."""
        return "completed" if "is done" in self.server.said() else "not completed"

    def _join(self, client: int) -> Started:
        words = [*_hansa("join"), f"@{self.folder}/{client}.token", APP, "--data", self.folder / str(client)]
        words += ["--state", self.folder / f"client-{client}"]
        return Started(f"client-{client}", words, self.folder, self._environment)

    def end(self) -> None:
        """Leave nothing running."""
        for one in [*self._clients, *self._servers]:
            one.end()


def _hansa(command: str) -> list[object]:
    return [sys.executable, "-m", "hansa", command]
