"""Who is measured, how one run of each is measured, and what came of it."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import flower_side
import hansa_side
import numpy as np
import task
from counting import CountingProxy
from processes import Failed, Memory, until

Side = hansa_side.HansaSide | flower_side.FlowerSide
SLOW_S = 10.0  # how long half of the clients dawdle in the run whose server is killed: it is in mid-round for sure
KILLED_ROUND = 1
_TOLERANCE = 1e-5
_ASK_EVERY_S = 3.0  # by a command of its own, which takes a second of processor time


@dataclass(frozen=True, kw_only=True)
class Row:
    """A side and its settings; ``only_killed`` rows are not timed."""

    name: str
    title: str
    setting: flower_side.Setting | None = None  # None: hansa
    is_counted: bool = False
    is_killed: bool = False
    only_killed: bool = False

    @property
    def kinds(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The processes of the server and of a client."""
        side = hansa_side if self.setting is None else flower_side
        return side.SERVER_KINDS, side.CLIENT_KINDS

    def make(self, folder: Path, python: Path, **given: Any) -> Side:
        """One run in a folder."""
        if self.setting is None:
            return hansa_side.HansaSide(folder, **given)
        return flower_side.FlowerSide(folder, python=python, setting=self.setting, **given)


ROWS = (
    Row(name="hansa", title="**hansa**", is_counted=True, is_killed=True),
    Row(name="flower", title="Flower, as it comes", setting=flower_side.Setting()),
    Row(
        name="flower-often",
        title="Flower, asking every 0.1 s",
        setting=flower_side.Setting(poll_s=0.1),
        is_counted=True,
    ),
    Row(
        name="flower-database",
        title="the same with `--database`",
        setting=flower_side.Setting(poll_s=0.1, database=True),
        is_killed=True,
    ),
    Row(
        name="flower-apart",
        title="the same with `--isolation process`",
        setting=flower_side.Setting(poll_s=0.1, database=True, apart=True),
        is_killed=True,
        only_killed=True,
    ),
    Row(
        name="flower-all",
        title="the same, the ServerApp killed too",
        setting=flower_side.Setting(poll_s=0.1, database=True, apart=True, all_killed=True),
        is_killed=True,
        only_killed=True,
    ),
)


@dataclass(kw_only=True)
class Timed:
    """A run without trouble; ``error`` is empty, or a sentence and the rest has no meaning."""

    row: str
    megabytes: float
    error: str = ""
    setup_s: float = 0.0  # from the first command to the beginning of the first round
    seconds: list[float] = field(default_factory=list)  # every round; the first is a warm-up
    server_bytes: dict[str, int] = field(default_factory=dict)  # peak of each kind of process of the server
    server_together: int = 0
    client_bytes: dict[str, int] = field(default_factory=dict)  # of the first client
    client_together: int = 0
    off: float = 0.0  # the largest difference to NumPy's result

    @property
    def is_right(self) -> bool:
        """Whether the result is NumPy's, but for rounding to float32."""
        return not self.error and self.off <= _TOLERANCE


@dataclass(kw_only=True)
class Traffic:
    """Bytes between the server and all clients in a round after the first."""

    row: str
    megabytes: float
    error: str = ""
    up: int = 0
    down: int = 0


@dataclass(kw_only=True)
class Killed:
    """A run whose server was killed in mid-round and started again by the same command."""

    row: str
    error: str = ""
    serving_s: float = 0.0  # until it answers again
    status: str = ""  # of the run in the end
    goes_on: bool = False
    waited_s: float = 0.0  # from the kill to the run's end, or until we stopped waiting
    reported: int = 0  # updates of the round that the server had when it was killed
    again: int = 0  # trainings that were done a second time
    same_bits: bool = False  # the result is that of a run without the kill
    afresh_s: float | None = None  # where it did not go on: what another run, by hand, took; None if it failed too


def timed(row: Row, python: Path, num_params: int, num_clients: int, num_rounds: int) -> Timed:
    """Set-up, rounds, memory and the result of one run; ``num_rounds`` are counted, after one to warm up."""
    found = Timed(row=row.name, megabytes=4 * num_params / 1e6)
    given = {"num_params": num_params, "num_clients": num_clients, "num_rounds": num_rounds + 1}

    def measure(side: Side) -> None:
        began = time.time()
        server, client = Memory(side.server_pids, row.kinds[0]), Memory(side.client_pids, row.kinds[1])
        try:
            side.start()
            side.wait(_limit_s(num_params, num_rounds))
        finally:
            server.stop()
            client.stop()
        moments = side.moments()
        found.setup_s, found.seconds = moments[0] - began, np.diff(moments).tolist()
        found.server_bytes, found.server_together = server.peaks, server.together
        found.client_bytes, found.client_together = client.peaks, client.together
        found.off = float(np.abs(side.result() - task.expected(num_params, num_clients, num_rounds + 1)).max())

    found.error = _in_a_folder(row, python, given, measure)
    return found


def traffic(row: Row, python: Path, num_params: int, num_clients: int) -> Traffic:
    """Bytes of the second of two rounds, through a proxy that counts."""
    found, proxies = Traffic(row=row.name, megabytes=4 * num_params / 1e6), []

    def through(port: int) -> int:
        proxies.append(CountingProxy(port))
        return proxies[-1].port

    def measure(side: Side) -> None:
        side.start()
        side.wait(_limit_s(num_params, 2))
        _, began, ended = side.moments()[:3]
        found.up, found.down = proxies[0].between(began, ended)

    given = {"num_params": num_params, "num_clients": num_clients, "num_rounds": 2, "through": through}
    found.error = _in_a_folder(row, python, given, measure)
    for proxy in proxies:
        proxy.close()
    return found


def killed(row: Row, python: Path, num_params: int, num_clients: int, patience_s: float) -> Killed:
    """Kill the server in the second of three rounds, when half of the clients have reported."""
    found, reference = Killed(row=row.name), []
    given: dict[str, Any] = {"num_params": num_params, "num_clients": num_clients, "num_rounds": 3}

    def undisturbed(side: Side) -> None:
        side.start()
        side.wait(_limit_s(num_params, 3))
        reference.append(side.result())

    def measure(side: Side) -> None:
        side.start()
        quick = sum(not task.is_slow(client, num_clients) for client in range(num_clients))
        until(lambda: side.num_reported(KILLED_ROUND) >= quick, _limit_s(num_params, 3), "half of round 2")
        found.reported = side.num_reported(KILLED_ROUND)
        side.kill_server()
        at = time.monotonic()
        side.start_server()
        found.serving_s = time.monotonic() - at
        found.goes_on = _ends_well(side, patience_s)
        found.waited_s, found.status = time.monotonic() - at, side.status()
        if found.goes_on:
            found.same_bits = bool(reference) and np.array_equal(side.result(), reference[0])
            found.again = len(side.trainings.read_text().splitlines()) - 3 * num_clients
        elif isinstance(side, flower_side.FlowerSide):
            found.afresh_s = _afresh_s(side, patience_s)

    found.error = _in_a_folder(row, python, given, undisturbed)
    if not found.error:
        found.error = _in_a_folder(row, python, given | {"slow_s": SLOW_S}, measure)
    return found


def _ends_well(side: Side, patience_s: float) -> bool:
    """Whether a run comes to its end; False as soon as its server says that it failed."""
    began = asked = time.monotonic()
    while not side.is_done and time.monotonic() - began < patience_s:
        time.sleep(0.2)
        if time.monotonic() - asked > _ASK_EVERY_S:
            asked = time.monotonic()
            if side.status().startswith("finished"):
                time.sleep(2)  # what it leaves may follow
                break
    return side.is_done


def _afresh_s(side: flower_side.FlowerSide, patience_s: float) -> float | None:
    """Seconds that another run takes, with what is still there; None when it is not done in time."""
    began = time.monotonic()
    try:
        side.start_run()
        side.wait(patience_s)
    except Failed:
        return None
    return time.monotonic() - began


def as_json(record: Timed | Traffic | Killed) -> dict[str, Any]:
    """A record as plain values."""
    return asdict(record)


def _in_a_folder(row: Row, python: Path, given: dict[str, Any], measure: Callable[[Side], None]) -> str:
    """Measure one run; what went wrong, or ""."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        side = row.make(Path(folder), python, **given)
        try:
            measure(side)
        except Failed as error:
            return " ".join(str(error).split())
        finally:
            side.end()
    return ""


def _limit_s(num_params: int, num_rounds: int) -> float:
    """How long a run may take: far more than it should."""
    return 300.0 + (num_rounds + 1) * num_params / 50_000
