"""The coordinator's side of every request, without sockets: who asks, what they may have, what their report is worth.

``http.py`` binds it to HTTP; ``runtime.py`` drives rounds through it. All state is in the store and in two folders of
blobs: vectors that clients download, and the updates that they sent.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from hansa.core import chain
from hansa.core.errors import InputError, ProtocolError
from hansa.core.protocols import Slot, Updates
from hansa.federation import Federation
from hansa.network.blobs import Blobs
from hansa.network.messages import (
    PROTOCOL,
    Enrol,
    Enrolled,
    Hello,
    Receipt,
    Refusal,
    Released,
    Welcome,
    Work,
    release_mark,
)
from hansa.network.registry import Registry, open_authority
from hansa.network.rounds import Arrival, Rounds
from hansa.network.status import status
from hansa.network.store import Store
from hansa.network.traffic import Counts
from hansa.version import __version__
from hansa.wire import unpack_report

KINDS = {"train": "update", "evaluate": "metrics", "prepare": "statistics"}
_SLACK = 2**20
_LONGEST_NAMES = 200
_UNKNOWN_SIZE = 2**28  # reports whose length no one knows before: statistics and the mail of an aggregator


class Coordinator:
    """One run of a federation, served to its clients. ``listeners`` are called when clients may find something new."""

    def __init__(self, store: Store, federation: Federation, fingerprint: str, *, settings: str = "") -> None:
        self.store, self.federation, self.fingerprint = store, federation, fingerprint
        self.registry = Registry(store)
        self.authority = open_authority(store)
        self.models, self.updates = Blobs(store.folder / "blobs"), Blobs(store.folder / "updates")
        self.run = open_run(store, fingerprint, settings)
        self.rounds = Rounds(store, self.run)
        self.counts = Counts(self.rounds)
        self.arrived = threading.Condition()  # a report, a hello or a goodbye came: for whoever waits on this side
        self.listeners: list[Callable[[], None]] = []
        self.num_params = federation.update_size()
        self.heard_s: dict[str, float] = {}  # when each client asked for work last, by the clock of the rounds
        self._working: dict[str, Slot] = {}  # the plan that each client was given last
        self._kinds: dict[str, str] = {}

    # -------------------------------------------------------------------------------------------- what clients ask

    def enrol(self, message: Enrol) -> Enrolled:
        """A certificate for a good token."""
        return self.registry.enrol(message, self.authority)

    def authenticate(self, der: bytes | None) -> str:
        """The client that shows this certificate; ``Refusal`` when it is none of ours or was revoked."""
        return self.registry.authenticate(None if der is None else hashlib.sha256(der).hexdigest())

    def hello(self, name: str, message: Hello) -> Welcome:
        """Let a client take part in the run, if its owner agreed to this app."""
        if message.protocol != PROTOCOL:
            raise Refusal(
                "protocol",
                f"hello: expected protocol {PROTOCOL} (hansa {__version__}), found {message.protocol} "
                f"(hansa {message.version[:40]}); install the coordinator's version of hansa",
            )
        if self.fingerprint not in message.fingerprints:
            found = ", ".join(f"{text[:8]}..." for text in message.fingerprints[:5]) or "none"
            raise Refusal(
                "another-app",
                f"hello: expected the app with fingerprint {self.fingerprint[:8]}..., found another app than the "
                f"server's (fingerprint {found}); get the coordinator's app.py and join with it",
            )
        self.registry.hello(name, self.run, message)
        self._notify()
        return Welcome(run=self.run, fingerprint=self.fingerprint, version=__version__)

    def work(self, name: str, *, acknowledged: int = 0, released: str = "") -> Work:
        """What a client is to do next. It says the last settlement it applied and the last release it keeps."""
        here = self.registry.here(self.run, name)
        if here is None:
            raise Refusal("hello-first", "work: expected a hello for this run first, found none; say hello")
        self.heard_s[name] = self.rounds.times.monotonic()
        given = self.rounds.next_plan(name)
        settled = self.rounds.settled_since(name, acknowledged)  # read after the plan: it holds all that came before it
        newest = self.released
        if given is not None:
            self._working[name] = given[0]
        return Work(
            run=self.run,
            settlements=settled,
            plan=None if given is None else given[1],
            released=newest if newest is not None and release_mark(newest) != released else None,
            finished=self.finished and not here.said_goodbye,
        )

    def count_work(self, name: str, work: Work, size: int) -> None:
        """Count a message that was sent in answer to a request for work."""
        self.count("no plan yet" if work.plan is None else "plan", "down", size, self._working.get(name))

    def largest_report(self, name: str, slot: Slot) -> int:
        """The most bytes that a client's report may have; ``Refusal`` when it was not asked."""
        row = self.rounds.asked(slot, name)
        size = self.size_of(slot) if row.learn else None
        return _UNKNOWN_SIZE if size is None else 8 * size + _SLACK

    def report(self, name: str, slot: Slot, body: bytes) -> Receipt:
        """Check a report and count it once; see ``Rounds.record`` for reports that come twice or late."""
        row = self.rounds.asked(slot, name)
        sha256 = hashlib.sha256(body).hexdigest()
        before = self.rounds.receipt(slot, name)
        if before is None:
            arrival = self._check(slot, bool(row.learn), name, sha256, body)
            if not arrival.refused:
                self.updates.put(body)
        else:
            arrival = Arrival(client=name, sha256=sha256, size=len(body))
        receipt = self.rounds.record(slot, arrival)
        if before is None:
            kind = KINDS.get(slot.task, slot.task) if row.learn else "mail"
            self.count("refusal" if receipt.status == "refused" else kind, "up", len(body), slot)
        self._notify()
        return receipt

    def vector(self, name: str, sha256: str) -> Path:
        """Where a vector lies that clients may download; it is counted as sent to ``name``."""
        path = self.models.path(sha256)
        if path is None:
            raise Refusal("not-found", "blob: expected a vector of the current round, found none; ask for work again")
        self.count(self._kinds.get(sha256, "model"), "down", path.stat().st_size, self._working.get(name))
        return path

    def goodbye(self, name: str) -> None:
        """The client knows that the run is over."""
        self.registry.goodbye(name, self.run)
        self._notify()

    # -------------------------------------------------------------------------------------- what the server's side does

    def revoke(self, name: str) -> None:
        """Refuse a client from now on; a round that waits for it goes on."""
        self.registry.revoke(name)
        self._notify()
        self.wake()

    def publish(self, vectors: dict[str, bytes]) -> dict[str, str]:
        """Store packed vectors for download: name to SHA-256."""
        named = {name: self.models.put(body) for name, body in vectors.items()}
        self._kinds |= {sha256: "model" if name == "params" else name for name, sha256 in named.items()}
        return named

    def release(self, number: int, vectors: dict[str, bytes]) -> None:
        """Publish the model of a round whose result is durable, and forget what only a replay of it would need."""
        released = Released(run=self.run, round=number, vectors=self.publish(vectors))
        self.store.put("released", json.dumps([released.run, released.round, dict(released.vectors)]).encode())
        reports, shown = self.rounds.forget(number)
        self.updates.keep_only(reports)
        self.models.keep_only(shown | set(released.vectors.values()))
        self.wake()

    def finish(self) -> None:
        """Tell clients that the run is over."""
        self.counts.flush()
        run = json.loads(self.store.get("run") or b"{}")
        self.store.put("run", json.dumps({**run, "finished": True}).encode())
        self.wake()

    @property
    def finished(self) -> bool:
        """Whether the run is over."""
        return bool(json.loads(self.store.get("run") or b"{}").get("finished"))

    @property
    def released(self) -> Released | None:
        """The newest release of this run."""
        stored = self.store.get("released")
        if stored is None:
            return None
        run, number, vectors = json.loads(stored)
        return Released(run=run, round=number, vectors=vectors) if run == self.run else None

    def status(self) -> dict[str, Any]:
        """The round and every client, as ``hansa status`` shows them."""
        return status(self.store)

    def count(self, kind: str, direction: str, size: int, slot: Slot | None = None) -> None:
        """Count one body."""
        self.counts.add(kind, direction, size, slot)

    def wake(self) -> None:
        """Let clients that wait for work look again."""
        for listener in list(self.listeners):
            listener()

    def close(self) -> None:
        """Write what is counted and let go of the state folder."""
        self.counts.flush()
        self.store.close()

    def _notify(self) -> None:
        with self.arrived:
            self.arrived.notify_all()

    def size_of(self, slot: Slot) -> int | None:
        """Length of an update in a slot, where it is known before."""
        if slot.task == "train":
            return self.num_params
        if slot.task == "evaluate":
            size: int | None = getattr(getattr(self.federation.learner, "metrics", None), "size", None)
            return size
        return None

    def _check(self, slot: Slot, learn: bool, name: str, sha256: str, body: bytes) -> Arrival:
        """A report and what is wrong with it, if anything: whatever a client sent, the round goes on."""
        parts, size = self.federation.parts(slot), self.size_of(slot)
        refused, form = "", "mail"
        try:
            report = unpack_report(body, slot, name, self.federation.codec(slot), size)
            refused = report.refused.get(name, "")
            if not refused and isinstance(report.payload, Updates):
                refused, form = _fault(report.payload, parts.must_be_finite), _form(report.payload)
            elif not refused and learn and getattr(parts.aggregator, "reveals_rows", True):
                refused = "report holds no update"
            elif not refused and hasattr(parts.aggregator, "check_mail"):
                refused = parts.aggregator.check_mail(slot.exchange, report.payload[name])
        except ProtocolError as error:
            refused = str(error)
        except Exception as error:  # a codec may fail in any way on bytes that it did not make
            refused = f"report cannot be read ({type(error).__name__})"
        return Arrival(client=name, sha256=sha256, size=len(body), refused=_plain(refused), form=form)


def open_run(store: Store, fingerprint: str, settings: str = "") -> str:
    """The id of the run that a state folder holds: that of the same app and settings, or else a new one.

    Raises ``InputError`` when the unfinished run is of another app or has other settings.
    """
    found = json.loads(store.get("run") or b"{}")
    if found and (found["fingerprint"], found["settings"]) == (fingerprint, settings):
        return str(found["id"])
    if found and not found["finished"]:
        what = "another app" if found["fingerprint"] != fingerprint else "other settings"
        raise InputError(
            f"{store.folder}: expected the app and settings of its unfinished run (fingerprint "
            f"{found['fingerprint'][:8]}...), found {what} (fingerprint {fingerprint[:8]}...); "
            "go on with the same, or use another --state"
        )
    run = {"id": secrets.token_hex(8), "fingerprint": fingerprint, "settings": settings, "finished": False}
    store.put("run", json.dumps(run).encode())
    return str(run["id"])


def _fault(updates: Updates, must_be_finite: bool) -> str:
    """What is wrong with a row, or nothing."""
    weight = np.asarray(updates.weights)
    if weight.dtype.kind not in "fiu" or not np.isfinite(weight).all() or not (weight > 0).all():
        return "weight is not a positive number"
    if np.asarray(updates.values).dtype.kind not in "fiu":
        return "update holds no numbers"
    columns = [column for name, column in updates.tail.items() if name != "train_loss"]
    if must_be_finite and not (chain.finite_rows(updates.values).all() and all(np.isfinite(c).all() for c in columns)):
        return "update is not finite"
    return ""


def _form(updates: Updates) -> str:
    """Sizes and names: rows of one slot must agree in them to be combined."""
    values = np.asarray(updates.values)
    names = _plain(", ".join([*sorted(updates.tail), *(f"side {name}" for name in sorted(updates.side))]))
    if len(names) > _LONGEST_NAMES:
        names = f"{names[:_LONGEST_NAMES]}... ({hashlib.sha256(names.encode()).hexdigest()})"
    return f"{values.shape[1]} values of {values.dtype}" + (f" with {names}" if names else "")


def _plain(text: str) -> str:
    """A client's text without what no database or terminal takes."""
    return text.encode("utf-8", "backslashreplace").decode()


__all__ = ["KINDS", "Coordinator", "open_run"]
