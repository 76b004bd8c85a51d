"""A coordinator on loopback with one open slot, and every way to upload a report to it."""

import hashlib
import threading
from dataclasses import replace

import numpy as np
import pytest

from hansa.algorithms.fedavg import FedAvg
from hansa.core.key import Key
from hansa.core.protocols import Report, Slot, Updates
from hansa.core.round import Context, begin, make_plan
from hansa.federation import Federation
from hansa.learners.linear import LinearLearner
from hansa.network.client import Connection
from hansa.network.client_store import ClientStore
from hansa.network.runtime import NetworkRuntime
from hansa.network.uploads import Sent
from hansa.wire import pack_report, report_tree

SLOT, SHORT, LONG = Slot(0, 0, "update"), 75_000, 340_000  # numbers: bodies of 300 kB and of 1.36 MB


def federation_of(num_params):
    """A federation whose updates have so many numbers."""
    algorithm = FedAvg(client_learning_rate=0.1, local_epochs=2, batch_size=4)
    return Federation(learner=LinearLearner(num_features=num_params - 1, num_classes=2), algorithm=algorithm)


class Quay:
    """A site with an open slot for two clients, and what it takes to upload to it.

    ``options`` are those of the runtime that opens the slot.
    """

    def __init__(self, site, num_params, **options):
        self.site, self.num_params = site, num_params
        self.cohort = ("berlin", "paris")
        self.identities = {name: site.enrol(name) for name in self.cohort}
        self.stores = {name: ClientStore(site.folder / name) for name in self.cohort}
        self.runtime = self.open_slot(SLOT, **options)
        self.connections = []

    def open_slot(self, slot, **options):
        parts = self.site.federation.task("train")
        state = begin(parts, np.zeros(self.num_params, np.float32))
        plan = make_plan(parts, state, Context(Key.of(1)), self.cohort, slot)
        runtime = NetworkRuntime(self.site.coordinator, **options)
        runtime.start(plan, self.cohort)
        return runtime

    def report(self, seed=0, slot=SLOT):
        row = np.random.default_rng(seed).normal(size=(1, self.num_params)).astype(np.float32)
        updates = Updates(("x",), row, np.array([3.0]), {"train_loss": np.array([0.5])})
        return Report(slot, ("x",), updates), self.site.federation.codec(slot)

    def body(self, seed=0):
        return pack_report(*self.report(seed))

    def parcel(self, seed=0, name="berlin"):
        return self.stores[name].pack(report_tree(*self.report(seed)))

    def path(self, sha256, slot=SLOT):
        return f"/v1/reports/{self.site.coordinator.run}/{slot}/{sha256}"

    def connection(self, name="berlin", port=None):
        who = self.identities[name]
        if port is not None:
            who = replace(who, url=f"https://127.0.0.1:{port}")
        made = self.site.trusting(Connection(who, self.stores[name], stop=self.site.stop, first_delay_s=0.002))
        self.connections.append(made)
        return made

    def http(self, name="berlin"):
        return self.site.http(self.identities[name], self.identities[name].signer())

    def put_head(self, path, fields, body):
        signer = self.identities["berlin"].signer()
        with self.site.http(self.identities["berlin"], signer) as http:
            http.get(path)  # tells the server's time
        signed = signer.headers("PUT", path.encode(), digest=hashlib.sha256(body).digest())
        lines = "".join(f"{name}: {value}\r\n" for name, value in signed.items())
        return f"PUT {path} HTTP/1.1\r\nHost: x\r\n{fields}{lines}\r\n".encode()

    def send(self, parcel, **more):
        return self.connection(**more).put_report(self.site.coordinator.run, SLOT, parcel)

    def status(self, name="berlin"):
        found = self.site.coordinator.rounds.receipt(SLOT, name)
        return None if found is None else found.status

    def kept(self):
        return [path for path in self.site.coordinator.uploads.folder.rglob("*") if path.is_file()]

    def size(self, parcel, name="berlin"):
        return self.site.coordinator.uploads.size(Sent(name, SLOT, parcel.sha256))

    def close(self):
        for one in (*self.connections, *self.stores.values()):
            one.close()


def part(body, first, stop):
    return {"content": body[first:stop], "headers": {"Content-Range": f"bytes {first}-{stop - 1}/{len(body)}"}}


def wait_until(true):
    moment = threading.Event()
    for _ in range(1000):
        if true():
            return
        moment.wait(0.01)
    pytest.fail("it never came true")
