"""A coordinator without sockets, for tests that speak to it directly."""

from __future__ import annotations

import numpy as np

from hansa.core.key import Key
from hansa.core.protocols import Report, Slot, Updates
from hansa.core.round import Context, begin, make_plan
from hansa.network.coordinator import Coordinator
from hansa.network.identity import fingerprint, make_request
from hansa.network.messages import PROTOCOL, Enrol, Hello
from hansa.network.runtime import NetworkRuntime
from hansa.network.store import Store
from hansa.wire import pack_report

SLOT = Slot(0, 0, "update")
ROW = np.array([[0.1, 0.2, 0.3, 0.4]], np.float32)


class Desk:
    """A coordinator without sockets, and a first plan for two clients."""

    def __init__(self, folder, federation, app, cohort=("berlin", "paris")):
        self.federation, self.app, self.cohort = federation, app, cohort
        self.coordinator = Coordinator(Store(folder), federation, app)
        self.runtime = NetworkRuntime(self.coordinator)
        self.certificates = {}

    def enrol(self, name):
        desk = self.coordinator
        token = desk.registry.invite(name, url="https://localhost:1", authority=desk.authority.fingerprint)
        message = Enrol(token=token.id, secret=token.secret, name=name, request=make_request(name)[1])
        self.certificates[name] = fingerprint(desk.enrol(message).certificate)

    def hello(self, name, *apps):
        return self.coordinator.hello(name, Hello(protocol=PROTOCOL, version="0", fingerprints=apps or (self.app,)))

    def open_slot(self, slot=SLOT):
        parts = self.federation.task("train")
        state = begin(parts, np.zeros(4, np.float32))
        plan = make_plan(parts, state, Context(Key.of(1)), self.cohort, slot)
        self.runtime.start(plan, self.cohort)
        return plan

    def body(self, values=ROW, weight=3.0, slot=SLOT, **tail):
        columns = {"train_loss": np.array([0.5])} | {name: np.array([value]) for name, value in tail.items()}
        updates = Updates(("x",), values, np.array([weight]), columns)
        return pack_report(Report(slot, ("x",), updates), self.federation.codec(slot))
