"""Cases of crowds and bad lines: many idle clients, their return, one that floods, and lines that crawl.

Numbers are those of the table of forty fault and abuse cases; each case ends with the global checkers. The real numbers
of clients are measured by ``benchmarks/network``; here fewer of them keep the same laws.
"""

import asyncio
import importlib
import os
import resource
import socket
import statistics
import subprocess
import sys
import threading
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import httpx2 as httpx
import numpy as np
import pytest

from faults import checkers
from faults.proxy import At, FaultProxy, Faults
from faults.sites import APP, Rounds, Site, ask, make_federation, move, rows, stranger
from faults.trial import COORDINATOR, Trial, free_port
from hansa.core.protocols import Slot
from hansa.data.dataset import Dataset
from hansa.learners.linear import LinearLearner
from hansa.network import http as http_module
from hansa.network import identity, pace
from hansa.network import routes as routes_module
from hansa.network.calls import Unreachable
from hansa.network.identity import make_request
from hansa.network.limits import Limits
from hansa.network.messages import Enrol, Refusal, write
from hansa.network.outbox import Parcel
from hansa.network.quotas import Limits as Quota
from hansa.network.quotas import Quotas
from hansa.network.runtime import NetworkRuntime
from hansa.network.waiting import Bell
from hansa.training.apps import load_app
from network.conftest import OneByOne

pytestmark = pytest.mark.network
TESTS = Path(__file__).parents[1]


@pytest.fixture
def fleets(monkeypatch):
    """Clients of the protocol on asyncio, as the benchmark has them."""
    monkeypatch.syspath_prepend(TESTS.parent / "benchmarks" / "network")
    return importlib.import_module("fleet")


async def until(true, seconds=30.0):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not come in time"
        await asyncio.sleep(0.02)


# ------------------------------------------------------------------------------------------ idle ones, and their return


class Process:
    """What a coordinator's process takes up."""

    def __init__(self, pid):
        self.pid = pid

    def look(self):
        status = Path(f"/proc/{self.pid}/status").read_text()
        memory_kb, threads = (int(status.split(f"{name}:")[1].split()[0]) for name in ("VmRSS", "Threads"))
        return memory_kb, threads, len(os.listdir(f"/proc/{self.pid}/fd"))

    def cpu_s(self):
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@pytest.mark.parametrize("count", [150, pytest.param(2000, marks=pytest.mark.slow)])
def test_case_22_idle_clients_take_no_thread_little_memory_and_next_to_no_time(fast, fleets, count):
    trial = Trial(fast / "trial", free_port(), names=("nobody",))
    app = trial.folder / "app.py"
    app.write_text(app.read_text().replace("min_clients=1", "min_clients=100_000"))  # no round opens
    try:
        trial.start(COORDINATOR)
        trial.until(lambda: "serving on port" in trial.logs())
        names = [f"c{number}" for number in range(count)]
        authority = fleets.enrol(trial.folder, names)
        process = Process(trial.processes[COORDINATOR].pid)
        fleet = fleets.Fleet(trial.folder, authority, trial.port, load_app(app).fingerprint)
        asyncio.run(watch_idle(trial, process, fleet, names))
        trial.processes[COORDINATOR].terminate()
        trial.processes[COORDINATOR].join(15)
        assert trial.processes[COORDINATOR].exitcode == 0
    finally:
        trial.end()
    checkers.is_sound(trial.folder / "fed" / "coordinator.db")
    checkers.no_temporary_files(trial.folder / "fed")


async def watch_idle(trial, process, fleet, names):
    healthy = fleet_caller(fleet, names[-1])
    memory, threads, files = process.look()
    fleet.begin(names[:-1], per_s=150)
    try:
        await look_at_idle(trial, process, fleet, names, healthy, (memory, threads, files))
    finally:
        healthy.close()
        await fleet.end()
        await asyncio.sleep(0.1)  # until every line is closed
    await until(lambda: process.look()[2] <= files + 40)


async def look_at_idle(trial, process, fleet, names, healthy, before):
    memory, threads, files = before
    await until(lambda: trial.query("SELECT COUNT(*) FROM presence")[0][0] == len(names) - 1, seconds=300)
    await asyncio.sleep(0.5)
    asked, spent = num_asked(fleet), process.cpu_s()
    times = []
    for _ in range(20):
        began = time.monotonic()
        await healthy.ask("GET", "/v1/authority")
        times.append(time.monotonic() - began)
        await asyncio.sleep(0.05)
    now = process.look()
    assert num_asked(fleet) - asked <= len(names) / 4  # they are held for twenty seconds or more
    assert process.cpu_s() - spent < 0.5 + len(names) / 2000
    assert now[1] <= threads + 8
    assert now[2] <= files + len(names) + 40  # and a few files of the database
    assert now[0] - memory < 15_000 + 80 * len(names)  # kB
    assert statistics.median(times) < 0.25
    assert not fleet.refused
    assert not fleet.lost


def fleet_caller(fleet, name):
    from calls import Caller

    return Caller(fleet.port, fleet.authority, name, fleet.folder / f"{name}.pem")


def num_asked(fleet):
    return sum(len(client.caller.times) for client in fleet.clients)


def test_case_23_after_a_restart_all_are_back_in_time_and_never_more_at_once_than_the_pace(
    tmp_path, fleets, monkeypatch
):
    calls_per_s, count = 60.0, 90
    monkeypatch.setattr(http_module, "Bell", partial(Bell, calls_per_s=calls_per_s))
    monkeypatch.setattr(pace, "SHORTEST_WAIT_S", 0.5)  # they are held for the pace, and told it
    site = Site(tmp_path, make_federation())
    (tmp_path / "fed").symlink_to("server")
    names = [f"c{number}" for number in range(count)]
    fleet = fleets.Fleet(tmp_path, fleets.enrol(tmp_path, names), site.server.port, APP)

    async def come_back():
        fleet.begin(names, per_s=100)
        await until(lambda: all(client.patient.told_s == count / calls_per_s for client in fleet.clients))
        await asyncio.to_thread(site.close)
        gone = time.monotonic()
        await asyncio.to_thread(site.open, fleet.port)
        await until(lambda: fleet.num_answered_since(gone) == count, seconds=60)
        moments = [min(at for at, _ in client.caller.times if at > gone) - gone for client in fleet.clients]
        await fleet.end()
        await asyncio.sleep(0.1)  # until every line is closed
        return sorted(moments)

    try:
        moments = asyncio.run(come_back())
    finally:
        site.end()
    assert moments[-1] < 6 * count / calls_per_s
    peak = max(sum(start <= moment < start + 0.25 for moment in moments) for start in moments)
    assert peak <= 0.25 * 3 * calls_per_s
    assert not fleet.refused
    checkers.is_sound(tmp_path / "server" / "coordinator.db")
    checkers.no_temporary_files(tmp_path / "server")


# ---------------------------------------------------------------------------------------------------- lines that crawl


@pytest.mark.parametrize(
    ("num_params", "bytes_per_s", "latency_s"),
    [(20_000, 64_000, 0.05), pytest.param(30_000, 8_000, 0.5, marks=pytest.mark.slow)],
)
def test_case_25_over_a_late_slow_line_that_is_cut_a_model_arrives_by_progress(
    tmp_path, monkeypatch, num_params, bytes_per_s, latency_s
):
    """Each way takes longer than any silence is allowed to, and every cut comes before its end."""
    size = 4 * num_params
    silence_s = 4 * latency_s + 0.8
    strict = Limits(grace_s=silence_s, longest_silence_s=silence_s, slowest_bytes_per_s=bytes_per_s / 4)
    assert size / bytes_per_s > silence_s
    monkeypatch.setattr(http_module, "Limits", lambda: strict)
    federation = replace(make_federation(), learner=LinearLearner(num_features=num_params - 1, num_classes=2))
    draw = np.random.default_rng(1)
    data = (Dataset(draw.normal(size=(4, num_params - 1)).astype(np.float32), np.array([0, 1, 0, 1])), None)
    with checkers.returns_to_baseline():
        site = Site(tmp_path, federation)
        with FaultProxy(site.server.port) as proxy:
            move(site, "berlin", proxy)
            site.join("berlin", data)
            runtime = NetworkRuntime(site.coordinator)
            runtime.wait_for_clients(1, timeout_s=60)
            rounds = Rounds(federation, runtime, ("berlin",))
            for number, way in enumerate(("down", "up")):
                cut = At(way=way, after=12_000 + size // 3, times=number + 1)
                proxy.set(Faults(latency_s=latency_s, bytes_per_s=bytes_per_s, cut=cut))
                proxy.cut()  # the next connection is a new one
                before = proxy.counts[way], proxy.counts["connections"]
                found = rounds.run(number)
                assert proxy.counts["cut"] == number + 1
                others = 12_000 * (proxy.counts["connections"] - before[1] + 1)  # handshakes and small bodies
                assert proxy.counts[way] - before[0] < 1.4 * size + others
        reference = Rounds(federation, OneByOne(federation, {"berlin": data}), ("berlin",))
        assert found.tobytes() == reference.run(0, 1).tobytes()
        assert not site.problems
        assert not set(site.server.cuts) - {"client"}
        site.end()
    checkers.counted_once(tmp_path / "server" / "coordinator.db")
    checkers.no_temporary_files(tmp_path)


# ------------------------------------------------------------------------------------------------------------ a flood


def test_case_27_a_flood_by_one_client_is_refused_and_no_other_notices(site, monkeypatch):
    quota = Quota(requests_burst=60, requests_a_minute=600, guesses_a_minute=10)
    monkeypatch.setattr(routes_module, "Quotas", lambda: Quotas(quota))
    monkeypatch.setattr(http_module, "Limits", lambda: Limits(connections_by_client=8))
    site.restart()
    for number, name in enumerate(("berlin", "paris")):
        site.join(name, rows(number))
    stop, heard = threading.Event(), {"requests": set(), "reports": set(), "enrolments": set()}
    with stranger(site, "mallory") as mallory, stranger(site, "healthy") as healthy:
        run = mallory.hello((APP,)).run
        healthy.hello((APP,))
        context = mallory.who.context()
        lines = []
        for _ in range(40):
            plain = socket.create_connection(("127.0.0.1", site.server.port), timeout=10)
            lines.append(context.wrap_socket(plain, server_hostname="127.0.0.1"))

        def flood(what, once):
            while not stop.is_set():
                try:
                    once()
                except Refusal as error:
                    heard[what].add(error.code)
                except Unreachable as error:
                    heard[what].add(str(error)[:23])

        def enrol():
            wish = Enrol(token="t", secret=b"guess", name="mallory", request=make_request("mallory")[1])
            ask(mallory, "POST", "/v1/enrol", write(wish))

        def report():
            path = f"/v1/reports/{run}/{Slot(0, 7, 'update')}/{Parcel.of(b'x').sha256}"
            ask(mallory, "PUT", path, b"x")

        floods = [
            threading.Thread(target=flood, args=("requests", lambda: ask(mallory, "GET", "/v1/blobs/x"))),
            threading.Thread(target=flood, args=("reports", report)),
            threading.Thread(target=flood, args=("enrolments", enrol)),
        ]
        for thread in floods:
            thread.start()
        runtime = NetworkRuntime(site.coordinator)
        runtime.wait_for_clients(4, timeout_s=30)
        while not all("the server answered 429" in codes for codes in heard.values()):
            assert all(thread.is_alive() for thread in floods)
            time.sleep(0.01)
        times = []
        for _ in range(20):
            began = time.monotonic()
            with pytest.raises(Refusal):
                ask(healthy, "GET", "/v1/blobs/x")
            times.append(time.monotonic() - began)
        rounds = Rounds(site.federation, runtime, ("berlin", "paris"))
        rounds.run(0, 1)
        stop.set()
        for thread in floods:
            thread.join(30)
        for line in lines:
            line.close()
    assert rounds.mean.clients == ("berlin", "paris")
    assert statistics.median(times) < 0.25
    assert site.server.cuts["client"] >= 30
    other = {"the server answered 429", "the server asked for an"}  # two at once: their signatures come out of order
    assert heard["requests"] - other == {"not-found"}
    assert heard["reports"] - other <= {"not-asked"}
    assert heard["enrolments"] - other == {"token"}
    assert not site.problems


# -------------------------------------------------------------------------------------------- no descriptor is left

CROWD = """
import resource, sys, time
resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
sys.path.insert(0, sys.argv[2])
from pathlib import Path
from conftest import APP, make_federation
from hansa.network.coordinator import Coordinator
from hansa.network.http import serve_in_thread
from hansa.network.store import Store
from hansa.network import sockets
sockets._SPARE = int(sys.argv[3])
coordinator = Coordinator(Store(Path(sys.argv[1])), make_federation(), APP)
server = serve_in_thread(coordinator)
print(server.port, flush=True)
for line in sys.stdin:
    print(server.num_connections, sum(server.cuts.values()), time.process_time(), flush=True)
server.close()
coordinator.close()
"""


@pytest.mark.parametrize("spare", [-1000, pytest.param(64, marks=pytest.mark.slow)])
def test_case_35_a_process_without_a_descriptor_left_does_not_spin_and_recovers(tmp_path, spare):
    """With descriptors kept in reserve, and (negative) with the system's own limit alone."""
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] > 600
    words = [sys.executable, "-c", CROWD, tmp_path / "fed", TESTS / "network", spare]
    server = subprocess.Popen(list(map(str, words)), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        port = int(server.stdout.readline())

        def state():
            server.stdin.write("\n")
            server.stdin.flush()
            return [float(word) for word in server.stdout.readline().split()]

        def wait_for(true):
            end = time.monotonic() + 20
            while not true():
                assert time.monotonic() < end
                time.sleep(0.02)

        crowd = [socket.create_connection(("127.0.0.1", port), timeout=10) for _ in range(400)]
        wait_for(lambda: state()[1] > 0)
        before = state()
        threading.Event().wait(0.5)
        assert state()[2] - before[2] < 0.25
        for line in crowd:
            line.close()
        wait_for(lambda: state()[0] == 0)
        context = identity.unchecked_context()
        with httpx.Client(base_url=f"https://127.0.0.1:{port}", verify=context, trust_env=False) as http:
            assert http.get("/v1/authority").status_code == 200
        server.communicate(timeout=20)
        assert server.returncode == 0
    finally:
        server.kill()
        server.communicate()
    checkers.is_sound(tmp_path / "fed" / "coordinator.db")
    checkers.no_temporary_files(tmp_path / "fed")
