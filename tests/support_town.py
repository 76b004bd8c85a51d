"""A town: a coordinator and its clients on one simulated clock, without sockets, and with everything else as it is.

Clients are the participants of a deployment with their own files, and the coordinator has its database: what is left
out is HTTP. Whenever the coordinator waits, what would happen next happens: a client finishes, or time passes.
So a test can kill it between any two events, and the order of arrivals is a matter of the delays alone.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sqlalchemy as sa

from hansa.core.key import Key
from hansa.federation import Federation, Pair
from hansa.network import audit, journal
from hansa.network.client_store import ClientStore
from hansa.network.coordinator import Coordinator
from hansa.network.credentials import witnessed
from hansa.network.messages import Receipt, slot_of
from hansa.network.participant import Participant
from hansa.network.rounds import Terms
from hansa.network.runtime import NetworkRuntime
from hansa.network.store import Store, clients, presence, reports, slots
from hansa.training.checkpoint import Checkpoint
from hansa.training.loop import Loop
from hansa.training.schedule import Schedule
from support_secagg import Signed

APP = "ab" * 32


class Killed(BaseException):
    """The coordinator's process ends here."""


class Stuck(Exception):
    """The coordinator waits, and nothing will ever happen."""


class Instantly(threading.Condition):
    """Nobody has to wait in real time for what happens on a simulated clock."""

    def wait(self, timeout: float | None = None) -> bool:
        return True


class StandsStill:
    """The time of day of a town's coordinator."""

    @staticmethod
    def monotonic() -> float:
        return 0.0


class Town:
    """``delays`` are the seconds that a client takes (1 unless named); ``gone`` clients answer nothing."""

    def __init__(
        self,
        folder: Path,
        federation: Federation,
        data: Mapping[str, Pair],
        *,
        delays: Mapping[str, float] | None = None,
        settings: str = "",
    ) -> None:
        self.folder, self.federation, self.data, self.settings = folder, federation, dict[str, Pair](), settings
        self.delays, self.gone = dict(delays or {}), set[str]()
        self.clock_s = 0.0
        self.at_event: Callable[[int], None] = lambda number: None
        self.receipts: list[tuple[str, Receipt]] = []
        self.options: dict[str, Any] = {}
        self._due: dict[str, tuple[float, int, Any, bytes]] = {}  # when, how many began before, slot, report
        self._num_begun = self._num_events = 0
        self.people: dict[str, Participant] = {}
        self._patch = pytest.MonkeyPatch()
        self._patch.setattr("os.fsync", lambda handle: None)  # nobody loses power here
        self._patch.setattr("hansa.network.runtime.time", StandsStill)  # what happens in a look is no reason to rest
        self.roster: dict[str, bytes] = {}  # clients of a town have no certificates
        self.open()
        for name, pair in data.items():
            self.add(name, pair)

    def open(self) -> None:
        store = Store(self.folder / "server")
        sa.event.listen(store.engine, "checkout", lambda db, *_: db.execute("PRAGMA synchronous=OFF").close())
        self.coordinator = Coordinator(store, self.federation, APP, settings=self.settings)
        self.coordinator.federation = witnessed(self.federation, Signed("coordinator", self.roster))
        self.coordinator.arrived = Instantly()
        self.make_runtime()

    def make_runtime(self, **options: Any) -> NetworkRuntime:
        self.options |= options
        self.runtime = NetworkRuntime(
            self.coordinator, on_wait=self._wait, monotonic=lambda: self.clock_s, **self.options
        )
        return self.runtime

    def restart(self) -> None:
        """Another process goes on with the same folder."""
        self.coordinator.close()
        self.open()

    def close(self) -> None:
        """The end; whatever happened, the audit log tells of each report once."""
        authority = self.coordinator.authority.certificate
        found = audit.check(journal.lines(self.coordinator.store), authority, live=True)
        self.coordinator.close()
        for person in self.people.values():
            person.store.close()
        self._patch.undo()
        assert found.problems == ()

    def add(self, name: str, pair: Pair) -> None:
        """A client enrols and says hello."""
        self.data[name] = pair
        store = ClientStore(self.folder / name)
        store._db.execute("PRAGMA synchronous=OFF").close()
        self.people[name] = Participant(
            self.federation, name, lambda: self.data[name], store, credentials=Signed(name, self.roster)
        )
        with self.coordinator.store.write() as db:
            row = {"certificate_sha256": name, "certificate": b"", "key_hash": "", "enrolled_at": 0.0}
            db.execute(clients.insert().values(name=name, **row))
            db.execute(presence.insert().values(run=self.coordinator.run, client=name, hello_at=0.0, version=""))

    def is_busy(self, name: str) -> bool:
        """Whether a client has a report to send."""
        return name in self._due

    def begin(self, name: str) -> bool:
        """A client asks for work, and learns if there is any; its report is due later."""
        person = self.people[name]
        work = self.coordinator.work(name, acknowledged=person.store.acknowledged)
        done = person.handle(work, self.coordinator.models.get)
        if done is not None:
            due_s = self.clock_s + self.delays.get(name, 1.0)
            self._due[name] = (due_s, self._num_begun, *done)
            self._num_begun += 1
        return done is not None

    def poll(self, *names: str) -> None:
        """Idle clients ask for work, as they do every few seconds."""
        for name in names:
            self.coordinator.work(name, acknowledged=self.people[name].store.acknowledged)

    def finish(self, name: str) -> Receipt:
        """A client sends the report it has ready."""
        _, _, slot, parcel = self._due.pop(name)
        receipt = self.coordinator.report(name, slot, parcel.body)
        self.people[name].store.received(self.coordinator.run, receipt)
        self.receipts.append((name, receipt))
        self.poll(name)
        return receipt

    def settle(self) -> None:
        """Everybody hears what became of their updates."""
        for name, person in self.people.items():
            person.settle(self.coordinator.work(name, acknowledged=person.store.acknowledged))

    def memory(self, name: str) -> dict[str, Any]:
        return self.people[name].store.memory(self.coordinator.run)

    def _wait(self, slot: Any, waiting: Sequence[str], accepted: int) -> None:
        """What happens next, in the order of time: a client finishes, or the deadline of ``slot`` passes."""
        self.at_event(self._num_events)
        self._num_events += 1
        for name in waiting:
            if name not in self._due and name not in self.gone:
                self.begin(name)
        coming = [(due[0], due[1], name) for name, due in self._due.items() if name not in self.gone]
        due_s, _, name = min(coming, default=(math.inf, 0, ""))
        terms = self._terms(slot)
        elapsed_s = self.coordinator.rounds.times.elapsed_s(str(slot)) or 0.0
        closes_s = math.inf if terms.deadline_s is None else self.clock_s + terms.deadline_s - elapsed_s
        if math.isinf(min(due_s, closes_s)):
            raise Stuck(f"{slot} waits for {list(waiting)}")
        self.clock_s = max(self.clock_s, min(due_s, closes_s))
        if due_s < closes_s:
            self.finish(name)

    def _terms(self, slot: Any) -> Terms:
        """When a slot closes; the newest of buffered rounds may not have been shown to anybody yet."""
        with self.coordinator.store.read() as db:
            row = db.execute(sa.select(slots).where(slots.c.slot == str(slot))).first()
        return Terms(row.goal, row.deadline_s, row.buffered) if row else Terms(buffered=True)

    # ------------------------------------------------------------------------------------------------------ training

    def loop(self, schedule: Schedule, **more: Any) -> Loop:
        """Training as ``hansa serve`` does it; scored on rows of the server, unless you say."""
        params = np.zeros(self.federation.learner.layout.num_params, np.float32)
        more.setdefault("evaluate_on", next(iter(self.data.values()))[0])
        return Loop(
            federation=self.federation, schedule=schedule, runtime=self.runtime, key=Key.of(3), params=params,
            clients=self.runtime.clients, release=self.runtime.release, **more,
        )  # fmt: skip

    def train(self, schedule: Schedule, **more: Any) -> Checkpoint:
        """Train, from where the last process stood: it saved what it had done after every round."""
        path = self.folder / "checkpoint"
        loop = self.loop(schedule, save=lambda point: point.write_twice(path), **more)
        resume = Checkpoint.read_either(path, pytest.fail)
        if resume is not None and resume.next_round:  # a crash may have come in the middle of a release
            self.runtime.release(resume.next_round - 1, resume.state.algorithm["params"], {})
        return loop.run(resume)

    def train_through(self, schedule: Schedule, kills: Collection[int], **more: Any) -> Checkpoint:
        """Train, killed at these events, each time begun again."""
        left = sorted(kills)

        def at_event(number: int) -> None:
            if left and number >= left[0]:
                left.pop(0)
                raise Killed

        self.at_event = at_event
        while True:
            try:
                return self.train(schedule, **more)
            except Killed:
                self.restart()

    def buffers(self) -> list[list[tuple[Any, str]]]:
        """What each buffer of the run held, in the order of arrival: slot and client."""
        chosen = (
            sa.select(reports.c.counted_in, reports.c.client, slots.c.slot)
            .join(slots, slots.c.id == reports.c.slot_id)
            .where(reports.c.counted_in.is_not(None))
            .order_by(reports.c.arrival)
        )
        found: dict[Any, list[tuple[Any, str]]] = {}
        with self.coordinator.store.read() as db:
            for row in db.execute(chosen):
                found.setdefault(slot_of(row.counted_in), []).append((slot_of(row.slot), row.client))
        return [found[slot] for slot in sorted(found)]

    def statuses(self, slot: Any) -> dict[str, str]:
        """What each client's report to a slot is."""
        chosen = sa.select(reports).join(slots, slots.c.id == reports.c.slot_id).where(slots.c.slot == str(slot))
        with self.coordinator.store.read() as db:
            return {row.client: row.status for row in db.execute(chosen.order_by(reports.c.arrival))}
