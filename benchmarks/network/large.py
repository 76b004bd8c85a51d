"""A model of a gigabyte and twenty clients: the coordinator's peak memory over the model's size.

    python benchmarks/network/large.py [--megabytes 1000] [--clients 20] [--torch] [--json]

`hansa serve` runs in a process of its own; this process is all clients: each downloads the model and uploads an update
of its length over TLS, signed, without holding either in memory. Exit status 1 when the peak (VmHWM, which counts
mapped pages too) is 1.5 times the model or more. The disk needs room for the updates and six models. Linux only.
"""

import argparse
import hashlib
import json
import os
import shutil
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from fleet import enrol
from large_app import pattern
from run import Coordinator

from hansa.core.chain import Raw
from hansa.core.protocols import Report, Updates
from hansa.network import messages as m
from hansa.network.blobs import cut
from hansa.network.calls import Line, Unreachable
from hansa.network.identity import client_context, fingerprint
from hansa.network.outbox import Parcel
from hansa.network.signing import Signer
from hansa.network.transfers import Upload
from hansa.version import __version__
from hansa.wire import lay_out, pack_report, report_tree

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from setting import need, setting  # noqa: E402  # beside this folder

BAR = 1.5


@dataclass(frozen=True, kw_only=True)
class Endless(Parcel):
    """A report that is made as it is sent: a head, then a pattern again and again."""

    head: bytes
    tile: memoryview  # two periods of the pattern

    def stretch(self, first, stop):
        """The bytes from ``first`` up to ``stop``."""
        for start, end in cut(first, min(stop, max(first, len(self.head)))):
            yield self.head[start:end]
        period = len(self.tile) // 2
        place, rest = max(first - len(self.head), 0) % period, stop - max(first, len(self.head))
        while rest > 0:
            size = min(rest, period)
            yield self.tile[place : place + size]
            place, rest = (place + size) % period, rest - size


def endless(slot, values, num_params, weight):
    """The report of a client whose update repeats ``values``."""
    row = np.broadcast_to(np.float32(0), (1, num_params))
    packed = lay_out(report_tree(Report(slot, ("x",), Updates(("x",), row, np.array([float(weight)]))), Raw()))
    head, pieces = b"", packed.pieces()
    while len(head) < packed.size - 4 * num_params:
        head += bytes(next(pieces))
    tile = memoryview(np.tile(values, 2)).cast("B")
    made = Endless(sha256="", size=packed.size, path=HERE, head=head, tile=tile)
    digest = hashlib.sha256()
    for piece in made.stretch(0, made.size):
        digest.update(piece)
    return Endless(sha256=digest.hexdigest(), size=packed.size, path=HERE, head=head, tile=tile)


class Client:
    """One client's whole life, in a thread; ``values`` is what its update repeats."""

    def __init__(self, folder, authority, coordinator, name, values, weight):
        pem = folder / "fleet" / f"{name}.pem"
        key, begin, certificate = pem.read_bytes().partition(b"-----BEGIN CERTIFICATE-----")
        signer = Signer(key, fingerprint(begin + certificate))
        context = client_context(authority, pem, pem)
        self.line = Line(f"https://127.0.0.1:{coordinator.port}", authority, context, signer)
        self.name, self.values, self.weight = name, values, weight
        self.fingerprint, self.num_params = coordinator.fingerprint, coordinator.num_params
        self.bytes_down, self.bytes_up, self.acknowledged, self.released = 0, 0, 0, ""

    def live(self):
        """From the hello to the goodbye."""
        hello = m.write(m.Hello(protocol=m.PROTOCOL, version=__version__, fingerprints=(self.fingerprint,)))
        self.again(lambda: self.line.ask("POST", "/v1/hello", content=hello))
        while True:
            query = {"acknowledged": str(self.acknowledged), "released": self.released, "wait": "20"}
            work = m.read_work(self.again(partial(self.line.ask, "GET", "/v1/work", params=query)))
            if work.settlements:
                self.acknowledged = work.settlements[-1].number
            if work.released is not None:
                self.released = m.release_mark(work.released)
            if work.plan is not None:
                self.answer(work)
            elif work.finished:
                self.again(lambda: self.line.ask("POST", "/v1/goodbye"))
                self.line.close()
                return

    def answer(self, work):
        """Train: download, and upload an update. Anything else is refused."""
        plan = m.read_plan(work.plan)
        if plan.slot.task == "train":
            for sha256 in plan.vectors.values():
                self.again(partial(self.download, sha256))
            parcel = endless(plan.slot, self.values, self.num_params, self.weight)
        else:
            parcel = Parcel.of(pack_report(Report(plan.slot, (), {}, {self.name: "it holds no rows"}), Raw()))
        upload = Upload(self.line, f"/v1/reports/{work.run}/{plan.slot}/{parcel.sha256}", parcel)
        receipt = m.read_receipt(self.again(upload.go_on))
        self.bytes_up += parcel.size
        need(receipt.status in ("accepted", "refused"), f"{self.name}: expected a receipt, found {receipt}")

    def download(self, sha256):
        """Read a vector, and hold nothing of it."""
        digest = hashlib.sha256()
        with self.line.open("GET", f"/v1/blobs/{sha256}") as answer:
            for piece in answer.iter_raw():
                digest.update(piece)
                self.bytes_down += len(piece)
        need(digest.hexdigest() == sha256, f"{self.name}: expected the vector of that hash, found another")

    def again(self, once):
        """Try until it succeeds."""
        while True:
            try:
                return once()
            except Unreachable as error:
                time.sleep(error.after_s or 0.1)


def watch(coordinator, found):
    """Keep the coordinator's highest memory, until it ends."""
    while coordinator.process.poll() is None:
        try:
            found["peak"] = coordinator.memory_mb()[1]
        except (OSError, IndexError):
            return
        time.sleep(0.02)


def a_run(folder, num_params, count):
    """One run, from nothing to the saved model: its peak in MB, and what it took."""
    names = [f"c{number:02}" for number in range(count)]
    (folder / "fed").mkdir(parents=True)
    authority = enrol(folder, names)
    coordinator = Coordinator(folder, num_params, "large_app.py", cohort_size=count)
    found, began = {}, time.monotonic()
    coordinator.start()
    watching = threading.Thread(target=watch, args=(coordinator, found))
    watching.start()
    patterns = [pattern(name) for name in names]
    clients = [
        Client(folder, authority, coordinator, *given, weight)
        for weight, given in enumerate(zip(names, patterns, strict=True), 1)
    ]
    with ThreadPoolExecutor(count) as threads:
        list(threads.map(Client.live, clients))
    sent_s = time.monotonic() - began
    status = coordinator.process.wait(600)
    watching.join()
    need(status == 0, f"hansa serve ended with status {status}: {(folder / 'serve.log').read_text()[-2000:]}")
    bytes_moved = sum(client.bytes_down + client.bytes_up for client in clients)
    found |= {"seconds": time.monotonic() - began, "MB a second": bytes_moved / 1e6 / sent_s}
    found["wrong"] = num_wrong(folder, num_params, patterns)
    return found


def num_wrong(folder, num_params, patterns):
    """Parameters of the saved model that are not the start plus the weighted mean, in float64, of all updates."""
    weights = np.arange(1, len(patterns) + 1, dtype=np.float64)
    mean = sum(weight * row.astype(np.float64) for weight, row in zip(weights, patterns, strict=True)) / weights.sum()
    expected = pattern("initial") + mean
    path = folder / "run" / "parameters.safetensors"
    values = np.memmap(path, np.float32, "r", offset=path.stat().st_size - 4 * num_params)
    wrong, period = 0, len(mean)
    for start in range(0, num_params, period):
        part = values[start : start + period]
        wrong += int((~np.isclose(part, expected[: len(part)], rtol=1e-6, atol=1e-7)).sum())
    return wrong


def main():
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--megabytes", type=int, default=1000, help="size of the model, 4 bytes a parameter")
    options.add_argument("--clients", type=int, default=20)
    options.add_argument("--torch", action="store_true", help="a TorchLearner's model, which the server never runs")
    options.add_argument("--json", action="store_true", help="write large.json beside this file")
    given = options.parse_args()
    need(given.megabytes > 0 and given.clients > 0, "expected numbers above 0")
    os.environ["HANSA_BENCHMARK_LEARNER"] = "torch" if given.torch else ""
    num_params = given.megabytes * 250_000
    with tempfile.TemporaryDirectory() as folder:
        room_mb = shutil.disk_usage(folder).free // 10**6
        needed_mb = given.megabytes * (given.clients + 6)
        need(room_mb > needed_mb, f"{folder}: expected {needed_mb} MB of free disk, found {room_mb}; set TMPDIR")
        small = a_run(Path(folder) / "small", 1000, given.clients)
        large = a_run(Path(folder) / "large", num_params, given.clients)
    ratio = large["peak"] / given.megabytes
    results = {
        "learner": "TorchLearner" if given.torch else "NumPy",
        "model MB": given.megabytes,
        "clients": given.clients,
        "peak MB": round(large["peak"]),
        "peak of the same with 1,000 parameters MB": round(small["peak"]),
        "peak / model": round(ratio, 3),
        "seconds": round(large["seconds"], 1),
        "MB a second": round(large["MB a second"]),
        "wrong parameters": large["wrong"],
    }
    print(setting("uvicorn", "cryptography"))
    print(f"(bar: peak / model below {BAR}, no wrong parameter)")
    for what, value in results.items():
        print(f"  {what:42} {value}")
    if given.json:
        (HERE / "large.json").write_text(json.dumps({"setting": setting("uvicorn"), **results}, indent=1) + "\n")
    if ratio >= BAR or large["wrong"]:
        sys.exit("missed")


if __name__ == "__main__":
    main()
