"""A small federation served on loopback, with participants in threads."""

from __future__ import annotations

import threading
from pathlib import Path

import httpx2 as httpx
import numpy as np
import pytest

from hansa.algorithms.fedavg import FedAvg
from hansa.core.key import Key
from hansa.core.protocols import Memory, Slot
from hansa.core.round import Context, begin, server_round
from hansa.data.dataset import Dataset
from hansa.federation import Federation
from hansa.learners.linear import LinearLearner
from hansa.network.budget import budget_of
from hansa.network.calls import Signed
from hansa.network.client import Connection, run_participant
from hansa.network.client_store import ClientStore
from hansa.network.coordinator import Coordinator
from hansa.network.credentials import Enrolled
from hansa.network.enrolment import Identity, enrol
from hansa.network.http import serve_in_thread
from hansa.network.participant import Participant
from hansa.network.runtime import NetworkRuntime
from hansa.network.store import Store
from hansa.network.token import JoinToken

APP = "ab" * 32


def make_federation(**more):
    learner = more.pop("learner", None) or LinearLearner(num_features=3, num_classes=2)
    algorithm = FedAvg(client_learning_rate=0.1, local_epochs=2, batch_size=4)
    return Federation(learner=learner, algorithm=algorithm, **more)


def rows(seed, count=12):
    draw = np.random.default_rng(seed)
    x = draw.normal(size=(count, 3)).astype(np.float32)
    return Dataset(x, (x.sum(axis=1) > 0).astype(np.int64)), None


class Site:
    """A coordinator on loopback, its tokens, and participants in threads."""

    def __init__(self, folder: Path, federation: Federation) -> None:
        self.folder, self.federation, self.threads, self.problems = folder, federation, [], {}
        self.budgets: dict[str, float] = {}  # epsilon by client, at a delta of 1e-3
        self.stop = threading.Event()
        self.coordinator = self.server = None
        self.open()

    def open(self, port: int = 0) -> None:
        self.store = Store(self.folder / "server")
        self.store.lock()
        self.coordinator = Coordinator(self.store, self.federation, APP)
        self.server = serve_in_thread(self.coordinator, f"127.0.0.1:{port}")
        self.url = f"https://127.0.0.1:{self.server.port}"

    def close(self) -> None:
        if self.server is not None:
            self.server.close()
            self.coordinator.close()
            self.server = None

    def restart(self) -> None:
        port = self.server.port
        self.close()
        self.open(port)

    def invite(self, name: str, **more) -> JoinToken:
        authority = self.coordinator.authority.fingerprint
        return self.coordinator.registry.invite(name, url=self.url, authority=authority, **more)

    def enrol(self, name: str) -> Identity:
        return enrol(self.invite(name), self.folder / name)

    def participant(self, name: str, data) -> Participant:
        load = data if callable(data) else lambda: data
        store, budget = ClientStore(self.folder / name), None
        if name in self.budgets:
            terms = {"epsilon": self.budgets[name], "delta": 1e-3}
            budget = budget_of(str(self.folder / f"{name}.csv"), self.folder / "budgets", store, **terms)
        return Participant(self.federation, name, load, store, budget=budget, credentials=self.credentials(name))

    def credentials(self, name: str) -> Enrolled | None:
        """Of a client whose word its peers check."""
        if not hasattr(self.federation.aggregator, "enrolled"):
            return None
        if Identity.of(self.folder / name) is None:
            self.enrol(name)
        return Enrolled(self.folder / name)

    def connect(self, name: str, store: ClientStore, on_event=None) -> Connection:
        who = Identity.of(self.folder / name) or self.enrol(name)
        return Connection(who, store, on_event=on_event, stop=self.stop, first_delay_s=0.02)

    def http(self, who: Identity, signer) -> httpx.Client:
        """Requests of a client, signed."""
        return httpx.Client(base_url=self.url, verify=who.context(), auth=Signed(signer), trust_env=False)

    def trusting(self, connection: Connection) -> Connection:
        """A connection as its hello would leave it: it knows the server's time and the key of receipts."""
        connection._trust(self.coordinator.seal.certificate)
        with self.http(connection.who, connection._signer) as http:
            http.get("/v1/work")
        return connection

    def join(self, name: str, data, *, stop=None, on_event=None, app: str = APP, offered=None) -> threading.Thread:
        """A participant in a thread; what it raises is kept by name."""

        def run() -> None:
            one = self.participant(name, data)
            connection = self.connect(name, one.store, on_event)
            connection.stop = stop or self.stop
            try:
                run_participant(
                    connection, lambda: {name: lambda: one for name in (offered if offered is not None else [app])}
                )
            except BaseException as error:  # a kill too
                self.problems[name] = error
            finally:
                connection.close()
                one.store.close()

        thread = threading.Thread(target=run, name=name)
        thread.start()
        self.threads.append(thread)
        return thread

    def end(self) -> None:
        self.stop.set()
        if self.server is not None:
            self.coordinator.store.put("run", b'{"finished": true}')
        self.close()
        for thread in self.threads:
            thread.join(30)
            assert not thread.is_alive()


@pytest.fixture
def site(tmp_path):
    made = Site(tmp_path, make_federation())
    yield made
    made.end()


@pytest.fixture
def make_site(tmp_path):
    made = []

    def make(federation):
        made.append(Site(tmp_path, federation))
        return made[-1]

    yield make
    for one in made:
        one.end()


class OneByOne:
    """The reference: clients in this process, one at a time."""

    def __init__(self, federation, data) -> None:
        self.federation, self.data, self.memory, self.pending = federation, data, {}, {}

    def start(self, plan, clients):
        self.plan, self.clients = plan, clients

    def reports(self, slot):
        for client in self.clients:
            memory = Memory([self.memory.get(client, {})])
            report, new, _ = self.federation.exchange(
                self.plan, (client,), [self.data[client][0]], memory, {}, [Key.of(client)]
            )
            self.pending |= {c: {n: a[i] for n, a in new.arrays.items()} for i, c in enumerate(new.clients)}
            yield report

    def settle(self, slot, counted):
        for client in counted:
            self.memory[client] = {**self.memory.get(client, {}), **self.pending.get(client, {})}
        self.pending = {}

    def once(self, name, make):
        return Key.of(name)


class Rounds:
    """Rounds of training, by number, from wherever they were left."""

    def __init__(self, federation, runtime, cohort) -> None:
        self.federation, self.runtime, self.cohort = federation, runtime, tuple(cohort)
        self.parts = federation.task("train")
        self.context = Context(Key.of(7), federation.learner.layout)
        self.state = begin(
            self.parts, np.zeros(federation.learner.layout.num_params, np.float32), federation.update_size()
        )

    def run(self, *numbers):
        for number in numbers:
            self.state, self.mean = server_round(
                self.parts, self.state, self.runtime, self.cohort, self.context, Slot(number, 0, "")
            )
        return self.state.algorithm["params"]


@pytest.fixture
def tools():
    class Tools:
        federation, data, reference, rounds, runtime, app = (
            staticmethod(make_federation),
            staticmethod(rows),
            OneByOne,
            Rounds,
            NetworkRuntime,
            APP,
        )

    return Tools
