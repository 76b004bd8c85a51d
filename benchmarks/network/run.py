"""A coordinator under many clients: idle ones, all of them after its restart, slow sockets, and a whole round.

    python benchmarks/network/run.py [idle] [restart] [slow] [round] [--clients 10000] [--check] [--quick] [--json]

`hansa serve` runs in a process of its own; this process is all clients, each with a TLS connection and a certificate of
its own, on loopback. Latencies are measured by a client in a third process. Linux only: memory is read from /proc.
"""

import argparse
import asyncio
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import slow
from calls import LOST, Caller
from fleet import Client, Fleet, enrol

import hansa
from hansa.network import messages as m

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from setting import need, setting  # noqa: E402  # beside this folder

BARS = {"idle": "below 500 MB, p99 below 250 ms", "restart": "all in less than 60 s", "slow": "p99 not doubled"}


class Coordinator:
    """`hansa serve` on a free port, which stays the same over restarts."""

    def __init__(self, state, num_params, app="app.py", **schedule):
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.state, self.num_params, self.schedule = state, num_params, schedule
        os.environ["HANSA_BENCHMARK_PARAMS"] = str(num_params)
        self.app = HERE / app
        self.fingerprint = hansa.load_app(self.app).fingerprint
        self.log = (state / "serve.log").open("w")

    def start(self):
        """Serve; the seconds until it does."""
        began = time.perf_counter()
        words = [sys.executable, "-u", "-m", "hansa", "serve", self.app, "--state", self.state / "fed"]
        words += ["--listen", f"127.0.0.1:{self.port}", "--out", self.state / "run"]
        for name, value in self.schedule.items():
            words += ["--set", f"schedule.{name}={value}"]
        self.process = subprocess.Popen([str(word) for word in words], stdout=self.log, stderr=self.log)
        while True:
            need(self.process.poll() is None, f"hansa serve ended: {(self.state / 'serve.log').read_text()[-2000:]}")
            try:
                socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
                return time.perf_counter() - began
            except OSError:
                time.sleep(0.02)

    def stop(self, how=signal.SIGTERM):
        """End it; its exit status and the seconds that took."""
        began = time.perf_counter()
        self.process.send_signal(how)
        status = self.process.wait(30)
        return status, time.perf_counter() - began

    def memory_mb(self):
        """Resident memory now, and at its highest."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return tuple(int(status.split(f"{name}:")[1].split()[0]) * 1024 / 1e6 for name in ("VmRSS", "VmHWM"))

    def cpu_s(self):
        """Seconds of processor time so far."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def p99(times):
    """The 99th percentile in milliseconds."""
    return float(np.percentile(times, 99)) * 1000 if len(times) else float("nan")


async def probe(fleet, run_for_s):
    """A healthy client's control requests for a while, from a process of its own: the seconds that each took."""
    given = fleet.port, fleet.authority, str(fleet.folder / "probe.pem"), fleet.fingerprint, run_for_s
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return await asyncio.get_running_loop().run_in_executor(pool, probe_here, *given)


def probe_here(port, authority, pem, fingerprint, run_for_s):
    """The same, in this process."""
    return asyncio.run(ask_often(Caller(port, authority, "probe", Path(pem)), fingerprint, run_for_s))


async def ask_often(caller, fingerprint, run_for_s, every_s=0.02):
    """One request at a time, now and then with a handshake or a write."""
    hello = m.write(m.Hello(protocol=m.PROTOCOL, version="benchmark", fingerprints=(fingerprint,)))
    await caller.ask("POST", "/v1/hello", hello)
    times, end, number = [], time.perf_counter() + run_for_s, 0
    while time.perf_counter() < end:
        began = time.perf_counter()
        if number % 50 == 0:
            await caller.ask("POST", "/v1/hello", hello)
        elif number % 50 == 25:
            caller.close()  # and so with a handshake
            await caller.ask("GET", "/v1/authority")
        else:
            await caller.ask("GET", "/v1/work", query={"wait": 0})
        times.append(time.perf_counter() - began)
        number += 1
        await asyncio.sleep(max(0.0, every_s - times[-1]))
    return times


async def until(fleet, true, seconds, every_s=0.2):
    """Wait for something that clients bring about; the seconds it took. NaN when it did not come."""
    began = time.monotonic()
    while not true():
        fleet.check()
        if time.monotonic() - began > seconds:
            return float("nan")
        await asyncio.sleep(every_s)
    return time.monotonic() - began


async def idle_and_restart(folder, given):
    """Clients that wait for a round which needs one more; then the coordinator is killed and started again."""
    count, settle_s, measure_s = given.clients, 3.0 if given.quick else 60.0, 4.0 if given.quick else 60.0
    names = [f"c{number:05}" for number in range(count)]
    authority = enrol_all(folder, [*names, "probe"])
    coordinator = Coordinator(folder, 4, cohort_size=count + 10)
    coordinator.start()
    base_mb = coordinator.memory_mb()[0]
    fleet = Fleet(folder, authority, coordinator.port, coordinator.fingerprint)
    began = time.monotonic()
    fleet.begin(names, per_s=given.per_s)
    here_s = await until(fleet, lambda: sum(bool(c.run) for c in fleet.clients) == count, 20 * 60)
    need(
        here_s == here_s, f"idle: expected {count} clients to be here, found {sum(bool(c.run) for c in fleet.clients)}"
    )
    print(f"{count} clients here after {time.monotonic() - began:.0f} s", flush=True)
    await asyncio.sleep(settle_s)
    cpu, asked = coordinator.cpu_s(), num_asked(fleet)
    times = await probe(fleet, measure_s)
    now_mb, most_mb = coordinator.memory_mb()
    found = {
        "clients": count,
        "open connections": sum(1 for c in fleet.clients if c.caller.answers and not c.caller.answers.lost),
        "MB without clients": round(base_mb),
        "MB": round(now_mb),
        "MB at most": round(most_mb),
        "KB a client": round((now_mb - base_mb) * 1000 / count, 1),
        "requests for work a second": round((num_asked(fleet) - asked) / measure_s, 1),
        "cores used": round((coordinator.cpu_s() - cpu) / measure_s, 3),
        "p50 ms": round(float(np.median(times)) * 1000, 1),
        "p99 ms": round(p99(times), 1),
        "longest ms": round(max(times) * 1000),
    }
    results = {"idle": found}
    if "restart" in given.scenarios:
        results["restart"] = await restart(coordinator, fleet, given)
    await fleet.end()
    coordinator.stop()
    return results


async def restart(coordinator, fleet, given):
    """Kill the coordinator under all of its clients, start it again, and count how many have an answer when."""
    coordinator.stop(signal.SIGKILL)
    for client in fleet.clients:  # those that were between two questions too: a held one would be answered much later
        client.was_lost = True
    await asyncio.sleep(1.0 if given.quick else 5.0)
    ready_s = coordinator.start()
    began = time.monotonic()
    probing = asyncio.create_task(probe(fleet, 5.0 if given.quick else 60.0))
    curve, count = [], len(fleet.clients)
    while fleet.num_answered_since(began) < count and time.monotonic() - began < 180:
        await asyncio.sleep(1)
        curve.append(fleet.num_answered_since(began))
    back_s = time.monotonic() - began
    try:
        times = await probing
    except LOST as error:
        sys.exit(f"restart: a healthy client's request failed: {error}")
    steps = np.diff([0, *curve])
    return {
        "serving again s": round(ready_s, 2),
        "all back s": round(back_s, 1),
        "not back": count - curve[-1],
        "most answered in a second": int(max(steps)),
        "p99 ms": round(p99(times), 1),
        "MB at most": round(coordinator.memory_mb()[1]),
        "failed calls": sum(fleet.lost.values()),
    }


def num_asked(fleet):
    return sum(len(client.caller.times) for client in fleet.clients)


def enrol_all(folder, names):
    began = time.monotonic()
    authority = enrol(folder, names)
    print(f"{len(names)} certificates in {time.monotonic() - began:.1f} s", flush=True)
    return authority


async def slow_sockets(folder, given):
    """A healthy client beside sockets that dawdle, and without them."""
    count, measure_s = (60, 4.0) if given.quick else (500, 40.0)
    attackers = [f"slow{number:02}" for number in range(1 + count // 12)]
    authority = enrol_all(folder, ["probe", "one", "two", *attackers])
    coordinator = Coordinator(folder, 262_144, cohort_size=2)
    coordinator.start()
    fleet = Fleet(folder, authority, coordinator.port, coordinator.fingerprint)
    asked = [Client(fleet, name) for name in ("one", "two")]
    for client in asked:
        await client.hello()
    plan = m.read_plan((await asked[0].work()).plan)  # and it never answers: the round stays open
    path = f"/v1/blobs/{plan.vectors['params']}"
    times = await probe(fleet, measure_s)
    tasks = []
    for number in range(count):
        name = attackers[number % len(attackers)]
        kind, who = number % 3, None if number % 3 == 0 else name
        caller = Caller(fleet.port, authority, who, fleet.folder / f"{name}.pem" if who else None)
        dawdle, more = ((slow.headers, ()), (slow.body, ()), (slow.reader, (path,)))[kind]
        tasks.append(asyncio.create_task(slow.again(dawdle, caller, *more)))
    await asyncio.sleep(2.0 if given.quick else 15.0)
    cpu = coordinator.cpu_s()
    beside = await probe(fleet, measure_s)
    found = {
        "slow sockets": count,
        "p50 ms without": round(float(np.median(times)) * 1000, 1),
        "p50 ms": round(float(np.median(beside)) * 1000, 1),
        "p99 ms without": round(p99(times), 1),
        "p99 ms": round(p99(beside), 1),
        "cores used": round((coordinator.cpu_s() - cpu) / measure_s, 3),
        "MB at most": round(coordinator.memory_mb()[1]),
    }
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    coordinator.stop()
    return {"slow": found}


async def a_round(folder, given):
    """Rounds in which every client downloads a 1 MiB model and reports as much."""
    count, rounds = (20, 2) if given.quick else (1000, 3)
    names = [f"c{number:05}" for number in range(count)]
    authority = enrol_all(folder, names)
    coordinator = Coordinator(folder, 262_144, cohort_size=count, num_rounds=rounds)
    coordinator.start()
    fleet = Fleet(folder, authority, coordinator.port, coordinator.fingerprint, 262_144)
    began = time.monotonic()
    fleet.begin(names, per_s=given.per_s)
    took = await until(fleet, lambda: len(fleet.receipts) == count * rounds, 1200)
    need(took == took, f"round: expected {count * rounds} receipts, found {len(fleet.receipts)}; {fleet.lost}")
    ends = [max(at for number, _, at in fleet.receipts if number == one) for one in range(rounds)]
    each = np.diff(ends)  # from the last receipt of a round to that of the next: everything is in it
    accepted = sum(status == "accepted" for _, status, _ in fleet.receipts)
    found = {
        "clients": count,
        "rounds": rounds,
        "s until the first is done": round(ends[0] - began, 1),
        "s a round": round(float(np.mean(each)), 2),
        "MB a second": round((fleet.bytes_up + fleet.bytes_down) / rounds / float(np.mean(each)) / 1e6, 1),
        "accepted": accepted,
        "failed calls": sum(fleet.lost.values()),
        "cpu s": round(coordinator.cpu_s(), 1),
        "MB at most": round(coordinator.memory_mb()[1]),
    }
    await fleet.end()
    coordinator.stop()
    return {"round": found}


def missed(results):
    """Bars that were missed, in words."""
    found = []
    idle, back, beside, rounds = (results.get(name) for name in ("idle", "restart", "slow", "round"))
    if idle and (idle["MB at most"] >= 500 or not idle["p99 ms"] < 250):
        found.append("idle")
    if back and (back["not back"] or back["all back s"] >= 60):
        found.append("restart")
    if beside and beside["p99 ms"] > 2 * beside["p99 ms without"]:
        found.append("slow")
    if rounds and rounds["accepted"] != rounds["clients"] * rounds["rounds"]:
        found.append("round")
    return found


def main():
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("scenarios", nargs="*", metavar="idle|restart|slow|round", help="by default all")
    options.add_argument("--clients", type=int, default=10_000, help="idle clients")
    options.add_argument("--per-s", type=float, default=100.0, help="clients that begin each second")
    options.add_argument("--check", action="store_true", help="exit status 1 when a bar is missed")
    options.add_argument("--quick", action="store_true", help="a few clients: a check that all of this works")
    options.add_argument("--json", action="store_true", help="write results.json beside this file")
    given = options.parse_args()
    given.scenarios = given.scenarios or ["idle", "restart", "slow", "round"]
    unknown = set(given.scenarios) - {"idle", "restart", "slow", "round"}
    need(not unknown, f"expected idle, restart, slow or round, found {', '.join(sorted(unknown))}")
    if given.quick:
        given.clients = min(given.clients, 100)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    need(hard > given.clients + 1000, f"expected to open {given.clients + 1000} files, found a limit of {hard}")
    results = {}
    for one, wanted in ((idle_and_restart, {"idle", "restart"}), (slow_sockets, {"slow"}), (a_round, {"round"})):
        if wanted & set(given.scenarios):
            with tempfile.TemporaryDirectory() as folder:
                results |= asyncio.run(one(Path(folder), given))
    print(setting("uvicorn", "fastapi", "cryptography"))
    for name, found in results.items():
        print(f"\n{name}" + (f" (bar: {BARS[name]})" if name in BARS else ""))
        for what, value in found.items():
            print(f"  {what:30} {value}")
    if given.json:
        (HERE / "results.json").write_text(json.dumps({"setting": setting("uvicorn"), **results}, indent=1) + "\n")
    if given.check and missed(results):
        sys.exit(f"missed: {', '.join(missed(results))}")


if __name__ == "__main__":
    main()
