"""A coordinator without sockets, clients that sign for it, and its routes as a function."""

import asyncio
import hashlib
import json
from types import SimpleNamespace

import pytest

from hansa.algorithms.fedavg import FedAvg
from hansa.federation import Federation
from hansa.learners.linear import LinearLearner
from hansa.network import identity
from hansa.network.checker import Checker
from hansa.network.coordinator import Coordinator
from hansa.network.front import Front
from hansa.network.messages import PROTOCOL, Enrol, Hello, Refusal, write
from hansa.network.routes import make_app
from hansa.network.signing import Signer
from hansa.network.store import Store, audit, clients
from hansa.network.waiting import Bell

APP = "ab" * 32
DAY_S = 86_400.0


def raw(headers):
    return [(name.lower().encode(), value.encode("latin-1")) for name, value in headers.items()]


def scope_of(method, target, headers, state=None, address="192.0.2.1"):
    """A request as ASGI has it."""
    path, _, query = target.partition(b"?")
    return {
        **{"type": "http", "http_version": "1.1", "scheme": "https", "server": ("localhost", 1), "root_path": ""},
        **{"method": method, "path": path.decode("utf-8", "replace"), "raw_path": path, "query_string": query},
        **{"headers": list(headers), "client": (address, 5), "state": dict(state or {})},
    }


class SigningDesk:
    """A coordinator whose wall clock is ``now`` and whose monotonic clock is ``passed``."""

    def __init__(self, folder):
        self.now, self.passed = 1_800_000_000.0, 50.0
        self.store = Store(folder, clock=lambda: self.now)
        learner = LinearLearner(num_features=3, num_classes=2)
        federation = Federation(learner=learner, algorithm=FedAvg(client_learning_rate=0.1))
        self.coordinator = Coordinator(self.store, federation, APP)
        self.registry = self.coordinator.registry
        self.start()

    def start(self):
        """Begin again, as after a restart."""
        self.checker = Checker(self.registry, monotonic=lambda: self.passed)

    def invite(self, name, **more):
        authority = self.coordinator.authority.fingerprint
        return self.registry.invite(name, url="https://localhost:1", authority=authority, **more)

    def enrol(self, name="berlin", **more):
        token, (key, request) = self.invite(name, **more), identity.make_request(name)
        message = Enrol(token=token.id, secret=token.secret, name=name, request=request)
        return self.signer(key, self.coordinator.enrol(message).certificate)

    def signer(self, key, certificate):
        return Signer(key, identity.fingerprint(certificate), monotonic=lambda: self.passed)

    def in_step(self, signer):
        """The signer, after the server told it time and epoch."""
        assert signer.learn(self.refusal(self.scope(signer)))
        return signer

    def scope(self, signer, method="GET", target=b"/v1/work", body=b""):
        """A signed request."""
        digest = hashlib.sha256(body).digest() if body else None
        headers = raw(signer.headers(method, target, digest=digest))
        return scope_of(method, target, headers + length(body))

    def check(self, scope, shown=None):
        return self.checker.check(scope, shown)

    def refusal(self, scope, shown=None):
        """What a client is told, as JSON has it."""
        with pytest.raises(Refusal) as caught:
            self.check(scope, shown)
        return {"code": caught.value.code, "error": str(caught.value), **caught.value.more}

    def certificate(self, name="berlin"):
        with self.store.read() as db:
            return db.execute(clients.select().where(clients.c.name == name)).one().certificate

    def log(self, kind=None):
        """The entries of the audit log."""
        with self.store.read() as db:
            rows = db.execute(audit.select().order_by(audit.c.number)).all()
        return [row for row in rows if kind in (None, row.kind)]

    def close(self):
        self.coordinator.close()


class Routes:
    """The coordinator's routes as a function, and one client that signs with the real clock."""

    def __init__(self, desk, name="prague"):
        self.desk, self.bell, self.name = desk, Bell(desk.coordinator), name
        self.app = make_app(desk.coordinator, self.bell)
        token, (key, request) = desk.invite(name), identity.make_request(name)
        message = Enrol(token=token.id, secret=token.secret, name=name, request=request)
        certificate = desk.coordinator.enrol(message).certificate
        self.signer = Signer(key, identity.fingerprint(certificate))

    def send(self, scope, *pieces):
        """Status, headers, and the body, read where it is JSON; a piece that is a function is called in its turn."""
        sent, left = [], [*pieces, b""]

        async def receive():
            while left and callable(left[0]):
                left.pop(0)()
            if not left:
                return {"type": "http.disconnect"}
            return {"type": "http.request", "body": left.pop(0), "more_body": bool(left)}

        async def send(message):
            sent.append(message)

        async def run():
            watching = asyncio.create_task(self.bell.watch())
            await Front(self.app, self.bell)(scope, receive, send)
            watching.cancel()

        asyncio.run(run())
        body, headers = b"".join(message.get("body", b"") for message in sent), dict(sent[0]["headers"])
        is_json = headers.get(b"content-type") == b"application/json"
        return SimpleNamespace(
            status=sent[0]["status"], headers=headers, body=body, json=json.loads(body) if is_json else None
        )

    def ask(self, method, target, body=b"", more=(), signed=None):
        """A signed request, once more if the server tells the time; ``signed`` is the body that is signed instead."""
        for _ in range(2):
            scope = self.desk.scope(self.signer, method, target, body if signed is None else signed)
            scope["headers"] += list(more)
            answer = self.send(scope, body)
            if answer.status != 401 or not self.signer.learn(answer.json):
                break
        return answer

    def hello(self, version="1"):
        return write(Hello(protocol=PROTOCOL, version=version, fingerprints=(APP,)))


def length(body):
    return [(b"content-length", str(len(body)).encode())] if body else []
