"""Flower's deployment, as its documentation starts it: a SuperLink, a SuperNode for each client, ``flwr run``.

TLS with an authority of our own, SuperNodes authenticated by keys that were registered. No telemetry, no look for
updates, no installing of packages when a run starts.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from certificates import authenticated_key, server_certificate
from processes import Failed, Started, answers, call, free_port, until

HERE = Path(__file__).resolve().parent
SERVER_KINDS = ("flower-superlink", "flower-superexec", "flwr-serverapp")
CLIENT_KINDS = ("flower-supernode", "flower-superexec", "flwr-clientapp")


@dataclass(frozen=True, kw_only=True)
class Setting:
    """How Flower is run.

    ``poll_s``: how often SuperExec looks for a task and the ServerApp for replies (its own: every 1 s and every 3 s).
    ``database``: the SuperLink's state in a file instead of in memory. ``apart``: the ServerApp's SuperExec is started
    on its own (``--isolation process``), so that a ServerApp outlives its SuperLink. ``all_killed``: and ``kill -9``
    takes the SuperLink, that SuperExec and the ServerApp, as a machine that goes down does.
    """

    poll_s: float | None = None
    database: bool = False
    apart: bool = False
    all_killed: bool = False


class FlowerSide:
    """One run in a folder. ``through`` is given the server's port and says which one SuperNodes are to call."""

    def __init__(
        self,
        folder: Path,
        *,
        python: Path,
        setting: Setting,
        num_params: int,
        num_clients: int,
        num_rounds: int,
        slow_s: float = 0.0,
        through: Callable[[int], int] = lambda port: port,
    ) -> None:
        self.folder, self.setting, self.num_clients, self.num_rounds = folder, setting, num_clients, num_rounds
        self.trainings, self.port, self._bin = folder / "trainings", free_port(), python.parent
        self._marks, self._called = folder / "marks", through(self.port)
        kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        self._environment = kept | {
            "PATH": f"{self._bin}:{os.environ['PATH']}",
            "PYTHONUNBUFFERED": "1",
            "FLWR_HOME": str(folder / "home"),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "DEPLOYMENT_PARAMS": str(num_params),
            "DEPLOYMENT_CLIENTS": str(num_clients),
            "DEPLOYMENT_SLOW_S": str(slow_s),
            "DEPLOYMENT_TRAININGS": str(self.trainings),
            "DEPLOYMENT_MARKS": str(self._marks),
            "DEPLOYMENT_RESULT": str(folder / "result.npy"),
        }
        if setting.poll_s is not None:
            self._environment |= {
                "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": str(setting.poll_s),
                "DEPLOYMENT_POLL_S": str(setting.poll_s),
            }
        self._nodes: list[Started] = []
        self._servers: list[Started] = []
        self._superexecs: list[Started] = []
        self.run = ""

    def start(self) -> None:
        """Everything from nothing: certificates, the SuperLink, keys, SuperNodes, and the run."""
        server_certificate(self.folder)
        shutil.copytree(HERE / "flower_app", self.folder / "app")
        shutil.copy(HERE / "task.py", self.folder / "app" / "task.py")
        (self.folder / "home").mkdir()
        (self.folder / "home" / "config.toml").write_text(
            f'[superlink]\ndefault = "here"\n\n[superlink.here]\naddress = "127.0.0.1:{self.port}"\n'
            f'root-certificates = "{self.folder / "ca.crt"}"\n'
        )
        self.start_server()
        self._nodes = [self._start_node(client) for client in range(self.num_clients)]
        self.start_run()

    def start_server(self) -> None:
        """The SuperLink, and its SuperExec where that is apart; after a kill, by the same commands."""
        words = [self._bin / "flower-superlink", "--port", self.port, "--enable-supernode-auth"]
        words += ["--ssl-ca-certfile", self.folder / "ca.crt", "--ssl-certfile", self.folder / "server.crt"]
        words += ["--ssl-keyfile", self.folder / "server.key", "--disable-runtime-dependency-installation"]
        words += ["--database", self.folder / "state.db"] if self.setting.database else []
        words += ["--isolation", "process"] if self.setting.apart else []
        self._servers.append(Started("server", words, self.folder, self._environment))
        if self.setting.apart and not any(one.is_running for one in self._superexecs):
            words = [self._bin / "flower-superexec", "--root-certificates", self.folder / "ca.crt"]
            words += ["--runtime-api-address", f"127.0.0.1:{self.port}"]
            self._superexecs.append(Started("superexec", words, self.folder, self._environment))
        until(lambda: answers(self.port), 90, "flower-superlink", [self.server])

    def start_run(self) -> None:
        """``flwr run``."""
        words = ["run", self.folder / "app", "here", "--run-config", f"num-rounds={self.num_rounds}"]
        self.run = json.loads(self._flwr(*words, "--format", "json"))["run-id"]

    @property
    def server(self) -> Started:
        """The newest SuperLink."""
        return self._servers[-1]

    def kill_server(self) -> None:
        """``kill -9`` of the SuperLink; what it started ends by itself, what is apart only where that is wanted."""
        self.server.kill()
        if self.setting.all_killed:
            for one in self._superexecs:
                one.kill_family()

    def status(self) -> str:
        """What became of the run, as ``flwr list`` says it: "finished:completed", say."""
        try:
            listed = json.loads(self._flwr("list", "here", "--run-id", self.run, "--format", "json"))
        except Failed as error:
            return f"not known ({str(error)[-200:]})"
        found = re.search(r'"status": "([^"]*)"', json.dumps(listed))
        return found[1] if found else f"not known ({json.dumps(listed)[:200]})"

    @property
    def is_done(self) -> bool:
        """Whether the ServerApp came to its end and saved the result."""
        return any(mark["what"] == "end" for mark in self.marks())

    def wait(self, limit_s: float) -> None:
        """Until the run is done."""
        until(lambda: self.is_done, limit_s, "Flower's run", [self.server, *self._nodes])

    def num_reported(self, number: int) -> int:
        """How many SuperNodes say that they sent all of round ``number``'s update."""
        return sum(node.said().count("Sent successfully") > number for node in self._nodes)

    def marks(self) -> list[dict[str, object]]:
        """What the run's ServerApp noted."""
        lines = self._marks.read_text().splitlines() if self._marks.exists() else []
        return [mark for mark in map(json.loads, lines) if str(mark["run"]) == str(self.run)]

    def moments(self) -> list[float]:
        """When the first round began and when each ended."""
        return [float(str(mark["at"])) for mark in self.marks()]

    def result(self) -> np.ndarray:
        """The parameters in the end."""
        found: np.ndarray = np.load(self.folder / "result.npy")
        return found

    def server_pids(self) -> Sequence[int]:
        """The processes that are the server; what they start belongs to them."""
        return [one.process.pid for one in (*self._servers[-1:], *self._superexecs[-1:])]

    def client_pids(self) -> Sequence[int]:
        """The processes that are the first client."""
        return [self._nodes[0].process.pid] if self._nodes else []

    def end(self) -> None:
        """Leave nothing running."""
        for one in [*self._nodes, *self._superexecs, *self._servers]:
            one.end()

    def _start_node(self, client: int) -> Started:
        private, public = authenticated_key(self.folder, f"node-{client}")
        self._flwr("supernode", "register", public, "here", "--format", "json")
        words = [self._bin / "flower-supernode", "--superlink", f"127.0.0.1:{self._called}"]
        words += ["--root-certificates", self.folder / "ca.crt", "--auth-supernode-private-key", private]
        words += ["--port", free_port(), "--node-config", f"client={client}"]
        own = self._environment | {"FLWR_HOME": str(self.folder / f"home-{client}")}
        return Started(f"node-{client}", words, self.folder, own)

    def _flwr(self, *words: object) -> str:
        return call([self._bin / "flwr", *words], self._environment)
