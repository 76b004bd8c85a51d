"""One process of a trial: it runs a command line of hansa, notes what it does, and dies where it was told to."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import json
import os
import shutil
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

COORDINATOR = "coordinator"
Point = tuple[str, str]  # a fail point, and the phase (``start`` or ``train-1``, say) in which it is reached


@dataclass(frozen=True, kw_only=True)
class Order:
    """What a process is told: the words after ``hansa``, where to note things, and where to die."""

    name: str
    folder: Path
    words: tuple[str, ...]
    kills: tuple[Point, ...] = ()
    trace: bool = False
    seeded: bool = True  # secrets follow from their names, so that two runs have the same bits
    small: int | None = None  # bytes beyond which a body counts as long, and lies and travels as such
    notes_often: bool = False  # how long slots have been open is noted at every look, not now and then
    by_exchange: bool = False  # phases are those of exchanges: ``train-1-keys``
    starve: Point | None = None  # where memory runs out, once
    memory_bytes: int | None = None  # RLIMIT_AS, beyond what the process has when it starts
    clock: tuple[float, ...] = ()  # seconds by which the wall clock is wrong, another one at every fail point


def secret_of(name: str) -> bytes:
    """What a trial's coordinator draws for a secret, so that two runs have the same noise."""
    return hashlib.sha256(f"{COORDINATOR} {name}".encode()).digest()


def run_process(order: Order) -> None:
    """A process's whole life."""
    os.chdir(order.folder)
    log = os.open(f"logs/{order.name}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    Observer(order).install()
    from hansa.cli import main

    sys.argv = ["hansa", *order.words]
    main()


def send_report(folder: Path, app: str, name: str, url: str, run: str, slot: Any) -> None:
    """A client that has committed a report and sends it; for a process of its own, to be killed."""
    from dataclasses import replace

    from hansa.network.client import Connection
    from hansa.network.client_store import ClientStore
    from hansa.network.enrolment import Identity

    who, store = Identity.of(folder / name), ClientStore(folder / name)
    assert who is not None
    connection, parcel = Connection(replace(who, url=url), store), store.outbox(run, slot)
    connection.hello((app,))
    assert parcel is not None
    connection.put_report(run, slot, parcel)


class Observer:
    """Notes what a process does, and kills it where it was told to."""

    def __init__(self, order: Order) -> None:
        self.order, self.phase, self._starved = order, "start", False
        self._steps = itertools.cycle(order.clock or (0.0,))
        self._ahead_s = next(self._steps)
        self._file = os.open(f"notes/{order.name}.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def install(self) -> None:
        from hansa.network import failpoints

        failpoints.watch(self.at)
        self.note("started", at=time.time())
        if self.order.small is not None:
            _call_long(self.order.small)
        if self.order.memory_bytes is not None:
            _limit_memory(self.order.memory_bytes)
        if self.order.clock:
            self._set_clock()
        if self.order.notes_often:
            _note_often()
        if self.order.name == COORDINATOR:
            self._watch_coordinator()
        else:
            self._watch_client()

    def note(self, kind: str, **more: Any) -> None:
        """One line, in one write: it is there whole, or not at all."""
        os.write(self._file, (json.dumps({"kind": kind, **more}) + "\n").encode())

    def at(self, name: str) -> None:
        """A fail point."""
        self._ahead_s = next(self._steps)
        if self.order.trace:
            self.note("point", point=name, phase=self.phase, at=time.time())
        if (name, self.phase) in self.order.kills:
            self.note("kill", point=name, phase=self.phase)
            os.kill(os.getpid(), signal.SIGKILL)
        if (name, self.phase) == self.order.starve and not self._starved:
            self._starved = True
            self.note("starved", point=name, phase=self.phase)
            raise MemoryError

    def _phase(self, slot: Any) -> str:
        """What everything is noted under until the next plan."""
        return f"{slot.task}-{slot.round}" + (f"-{slot.exchange}" if self.order.by_exchange else "")

    def _set_clock(self) -> None:
        """Let everything in this process that asks for the time of day hear a wrong one; monotonic clocks are right."""
        from datetime import UTC, datetime

        from hansa.network.client_store import ClientStore
        from hansa.network.store import Store

        real = time.time
        time.time = lambda: real() + self._ahead_s
        Store.__init__.__defaults__ = (lambda: time.time(),)  # type: ignore[misc]
        ClientStore.__init__.__defaults__ = (lambda: datetime.fromtimestamp(time.time(), UTC),)  # type: ignore[misc]

    def _watch_coordinator(self) -> None:
        """Know the slot that is open; keep reports that are no longer needed, for a recomputation."""
        from hansa.network.blobs import Blobs
        from hansa.network.runtime import NetworkRuntime

        def start(runtime: Any, plan: Any, clients: Any, *, real: Any = NetworkRuntime.start) -> None:
            self.phase = self._phase(plan.slot)
            real(runtime, plan, clients)

        def keep_only(blobs: Any, names: Any, *, real: Any = Blobs.keep_only) -> None:
            for path in blobs.folder.iterdir():
                if blobs.folder.name == "updates" and not path.name.startswith("."):
                    with contextlib.suppress(FileExistsError, FileNotFoundError):
                        _link(path, Path("archive", path.name))
            real(blobs, names)

        def once(runtime: Any, name: str, make: Any, *, real: Any = NetworkRuntime.once) -> Any:
            return real(runtime, name, (lambda: secret_of(name)) if self.order.seeded else make)

        NetworkRuntime.start, NetworkRuntime.once = start, once  # type: ignore[method-assign]
        Blobs.keep_only = keep_only  # type: ignore[method-assign]

    def _watch_client(self) -> None:
        """Know the plan that is worked on, note receipts and models, and be quick to call again."""
        from hansa.network import client
        from hansa.network.client_store import ClientStore
        from hansa.network.participant import Participant

        def answer(joined: Any, work: Any, *, real: Any = client._Joined._answer) -> None:
            slot = client.read_plan(work.plan).slot
            self.phase = self._phase(slot)
            real(joined, work)

        def put_report(
            connection: Any, run: str, slot: Any, *more: Any, real: Any = client.Connection.put_report
        ) -> Any:
            receipt = real(connection, run, slot, *more)
            self.note("receipt", run=run, slot=str(slot), sha256=receipt.sha256, status=receipt.status)
            return receipt

        def keep(participant: Any, released: Any, *more: Any, real: Any = Participant.keep) -> None:
            self.note("release", run=released.run, round=released.round, params=released.vectors["params"])
            real(participant, released, *more)

        def secret(store: Any, run: str, slot: Any, *, real: Any = ClientStore.secret) -> bytes:
            drawn = hashlib.sha256(f"{self.order.name} {slot.task} {slot.round} {slot.attempt}".encode()).digest()
            if self.order.seeded:
                store._fresh.setdefault((run, slot.task, slot.round, slot.attempt), drawn)
            return bytes(real(store, run, slot))

        client._Joined._answer, client.Connection.put_report = answer, put_report  # type: ignore[method-assign]
        Participant.keep, ClientStore.secret = keep, secret  # type: ignore[method-assign]
        client.Connection.__init__.__kwdefaults__["first_delay_s"] = 0.02  # type: ignore[index]
        client._LONGEST_DELAY_S, client._GOODBYES = 0.2, 50


def _link(path: Path, other: Path) -> None:
    """A second name of a file, or a second file where it lies on another disk."""
    try:
        os.link(path, other)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        shutil.copyfile(path, other)


def _call_long(small: int) -> None:
    """Treat bodies of a few bytes as if they were gigabytes."""
    from hansa import long_vectors
    from hansa.network import blobs, outbox, routes, transfers

    for module in (blobs, outbox, routes, transfers):
        module.SMALL = small  # type: ignore[misc]
    long_vectors.LONG = 1  # vectors have no header, and are shorter than any body


def _note_often() -> None:
    """Note with every look how long slots have been open."""
    from hansa.network import runtime

    runtime._NOTE_AGAIN_S = runtime._NOTED_SHARE = 0.0


def _limit_memory(more: int) -> None:
    """No more address space than ``more`` bytes beyond what is in use."""
    import resource

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + more
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
