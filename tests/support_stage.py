"""A coordinator without sockets whose two halves are driven step by step, and what its database holds at each.

The server's half runs in ``Turns``; what clients ask is called from the test. Either may die at a fail point: the next
process begins with the same folder. ``Seen`` is read past the code under test, by SQL of its own.
"""

from __future__ import annotations

import functools
import json
import sqlite3
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import sqlalchemy as sa

from hansa.core.errors import ProtocolError
from hansa.core.key import Key
from hansa.network import audit, identity, journal
from hansa.network.coordinator import Coordinator
from hansa.network.messages import PROTOCOL, Enrol, Hello, Work, slot_of
from hansa.network.ranges import Part
from hansa.network.registry import Caller, Registry
from hansa.network.runtime import NetworkRuntime
from hansa.network.store import Store
from hansa.network.uploads import Sent
from hansa.training.checkpoint import Checkpoint
from hansa.training.loop import Loop
from hansa.wire import pack
from support_turns import Fuse, Turns

APP = "ab" * 32
RANK = {"planned": 0, "collecting": 1, "frozen": 2, "aggregated": 3, "abandoned": 3}


@functools.cache
def key_and_request(name: str) -> tuple[bytes, bytes]:
    """A client's key, made once for all tests."""
    return identity.make_request(name)


def report_of(values: Any, weight: float, **tail: float) -> bytes:
    """A report as a client of FedAvg sends it."""
    columns = {name: np.array([value]) for name, value in tail.items()}
    content = {"arrays": {"values": values}, "weights": np.array([weight]), "tail": columns}
    return pack({"updates": content, "refused": None})


@dataclass
class SlotSeen:
    """A slot's row with what belongs to it."""

    state: str
    round: int
    attempt: int
    goal: int | None
    deadline_s: float | None
    buffered: bool
    asked: list[str] = field(default_factory=list)  # in the order of the cohort
    given_up: set[str] = field(default_factory=set)
    reports: dict[str, Any] = field(default_factory=dict)  # by client: a row of the table

    def waiting(self, revoked: set[str]) -> list[str]:
        """Who owes a report."""
        return [name for name in self.asked if name not in self.reports and name not in revoked | self.given_up]

    def accepted(self) -> Counter[str]:
        """How many reports of each form were accepted."""
        return Counter(row["form"] for row in self.reports.values() if row["status"] == "accepted")

    def is_over(self, revoked: set[str]) -> bool:
        """Whether it may close before its deadline."""
        goal_reached = self.goal is not None and max(self.accepted().values(), default=0) >= self.goal
        return goal_reached or not self.waiting(revoked)


@dataclass
class Seen:
    """The database at one moment; slots by their text, oldest first."""

    slots: dict[str, SlotSeen]
    settlements: dict[tuple[str, str], bool]  # attempt and client -> whether it counted
    newest: int  # of the settlements' numbers
    revoked: set[str]
    released: tuple[int, dict[str, str]] | None

    @staticmethod
    def of(path: Path) -> Seen:
        """Read it."""
        with sqlite3.connect(path) as db:
            db.row_factory = sqlite3.Row
            found, names = dict[str, SlotSeen](), dict[int, str]()
            for row in db.execute("SELECT * FROM slots ORDER BY id"):
                wanted = ("state", "round", "attempt", "goal", "deadline_s")
                found[row["slot"]] = SlotSeen(*(row[name] for name in wanted), bool(row["buffered"]))
                names[row["id"]] = row["slot"]
            for row in db.execute("SELECT * FROM assignments ORDER BY slot_id, position"):
                slot = found[names[row["slot_id"]]]
                slot.asked.append(row["client"])
                slot.given_up |= {row["client"]} if row["given_up"] else set()
            for row in db.execute("SELECT * FROM reports ORDER BY arrival"):
                found[names[row["slot_id"]]].reports[row["client"]] = dict(row)
            told, newest = {}, 0
            for row in db.execute("SELECT * FROM settlements"):
                attempt = f"{row['task']}-{row['round']}-{row['attempt']}"
                told[attempt, row["client"]], newest = bool(row["counted"]), max(newest, row["number"])
            revoked = {row["name"] for row in db.execute("SELECT name FROM clients WHERE revoked_at IS NOT NULL")}
            kept = db.execute("SELECT value FROM meta WHERE key = 'released'").fetchone()
        db.close()
        released = None if kept is None else tuple(json.loads(kept["value"])[1:])
        return Seen(found, told, newest, revoked, released)


class Stage:
    """One process of a coordinator after the other, and the clock."""

    def __init__(self, folder: Path, federation: Any, schedule: Any, data: Any) -> None:
        self.folder, self.federation, self.schedule, self.data = folder, federation, schedule, data
        self.now, self.fuse, self.turns = 1e9, Fuse(), Turns()
        self.num_starts, self.point = 0, None
        self.callers: dict[str, Caller] = {}
        self.num_params = federation.learner.layout.num_params
        self.start()

    # ----------------------------------------------------------------------------------------------------- the server

    def start(self) -> None:
        """The next process."""
        self.num_starts += 1
        store = Store(self.folder / "server", clock=lambda: self.now)
        sa.event.listen(store.engine, "checkout", lambda db, *_: db.execute("PRAGMA synchronous=OFF").close())
        self.store = store
        self.coordinator = Coordinator(store, self.federation, APP)
        self.coordinator.arrived = self.turns
        self.serve()

    def serve(self) -> None:
        """Train from where the last process stood, as ``hansa serve`` does."""
        runtime = NetworkRuntime(
            self.coordinator, min_clients=self.schedule.min_clients or 1, monotonic=lambda: self.now
        )
        path = self.folder / "checkpoint"

        def run() -> None:
            runtime.wait_for_clients(self.schedule.clients_needed)
            loop = Loop(
                federation=self.federation, schedule=self.schedule, runtime=runtime, key=Key.of(3),
                params=np.zeros(self.num_params, np.float32), clients=runtime.clients, evaluate_on=self.data,
                save=lambda point: point.write(path), release=runtime.release,
            )  # fmt: skip
            resume = Checkpoint.read(path) if path.exists() else None
            newest = self.coordinator.released
            if resume and resume.next_round and (newest is None or newest.round < resume.next_round - 1):
                runtime.release(resume.next_round - 1, resume.state.algorithm["params"], {})
            self.point = loop.run(resume)
            runtime.let_go()
            self.coordinator.finish()

        self.turns.begin(run)

    def die(self) -> None:
        """This process ends here; nothing is written any more."""
        self.fuse.left = 0
        self.turns.kill()
        self.store.close()

    def close(self) -> None:
        """This process ends as it should."""
        self.turns.kill()
        self.coordinator.close()

    @property
    def seen(self) -> Seen:
        """The database now."""
        return Seen.of(self.folder / "server" / "coordinator.db")

    def check_log(self, *, live: bool = True) -> tuple[str, ...]:
        """What is wrong with the audit log."""
        authority = self.coordinator.authority.certificate
        if live:
            return audit.check(journal.lines(self.store), authority, live=True).problems
        path = self.coordinator.save_log(self.folder / "run")
        with path.open("rb") as file:
            return audit.check((line.rstrip(b"\n") for line in file), authority).problems

    # ------------------------------------------------------------------------------------------------------- clients

    def enrol(self, name: str, *, again: bool = False) -> None:
        """A client gets its certificate and says hello."""
        certified = self.coordinator.authority.fingerprint
        token = self.coordinator.registry.invite(name, url="https://localhost:1", authority=certified, again=again)
        request = key_and_request(name)[1]
        self._token = Enrol(token=token.id, secret=token.secret, name=name, request=request)
        self.enrol_again(name)

    def enrol_again(self, name: str) -> None:
        """The same token once more, as after a cut line; and hello."""
        certificate = self.coordinator.enrol(self._token).certificate
        self.callers[name] = Caller(name, identity.fingerprint(certificate))
        self.hello(name)

    def who(self, name: str) -> Caller:
        """Who asks, as the gate finds out."""
        return self.coordinator.registry.authenticate(self.callers[name].certificate)

    def hello(self, name: str) -> None:
        welcome = self.coordinator.hello(self.who(name), Hello(protocol=PROTOCOL, version="1", fingerprints=(APP,)))
        assert welcome.run == self.coordinator.run

    def work(self, name: str, acknowledged: int) -> Work:
        return self.coordinator.work(self.who(name), acknowledged=acknowledged)

    def send(self, name: str, slot: str, body: bytes, sha256: str, *, in_parts: bool = False) -> Any:
        """Send a report as a client does it, in one piece or in two: its receipt."""
        coordinator, sent = self.coordinator, Sent(self.who(name), slot_of(slot), sha256)
        receipt = coordinator.expect(coordinator.run, sent, len(body))
        if receipt is not None:
            return receipt
        if not in_parts:
            return coordinator.report(sent.client, sent.slot, body)
        uploads, half = coordinator.uploads, len(body) // 2
        if (there := uploads.size(sent)) < half:
            with uploads.open(sent, Part(there, half, len(body))) as file:
                file.write(body[there:half])
        there = uploads.size(sent)
        if there < len(body):
            with uploads.open(sent, Part(there, len(body), len(body))) as file:
                file.write(body[there:])
        with uploads.claimed(sent):
            assert uploads.hash(sent) == sha256
            return coordinator.uploaded(coordinator.run, sent, len(body))

    def revoke(self, name: str, *, elsewhere: bool) -> None:
        """Revoked by this process or by another (``hansa revoke``)."""
        if elsewhere:
            store = Store(self.folder / "server", clock=lambda: self.now)
            try:
                Registry(store).revoke(name)
            finally:
                store.close()
        else:
            self.coordinator.revoke(name)

    def can_fetch(self, vectors: Any) -> bool:
        """Whether what a message names can be downloaded."""
        try:
            return all(self.coordinator.models.get(sha256) for sha256 in vectors.values())
        except (KeyError, ProtocolError):
            return False
