"""The coordinator's side of every request, without sockets: who asks, what they may have, what their report is worth.

``http.py`` binds it to HTTP; ``runtime.py`` drives rounds through it. All state is in the store and in two folders of
blobs: vectors that clients download, and the updates that they sent.
"""

from __future__ import annotations

import hashlib
import json
import logging
import secrets
import threading
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from hansa.core.errors import InputError, ProtocolError
from hansa.core.protocols import Plan, Slot, Updates
from hansa.federation import Federation
from hansa.long_vectors import let_go, map_file
from hansa.network.blobs import Blobs
from hansa.network.credentials import Roster, witnessed
from hansa.network.failpoints import fail_point
from hansa.network.forgetting import unsettled
from hansa.network.journal import append, save_log, sign_head, tell_of_older
from hansa.network.lengths import Lengths
from hansa.network.looks import fault_of, form_of, plain
from hansa.network.messages import (
    NO_FROZEN,
    PROTOCOL,
    SHA256,
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
from hansa.network.receipts import Seal
from hansa.network.registry import Registry, open_authority
from hansa.network.room import check_room, is_full
from hansa.network.rounds import Arrival, Rounds
from hansa.network.sizes import Sizes
from hansa.network.status import status
from hansa.network.store import Store, Superseded, put
from hansa.network.traffic import Counts
from hansa.network.uploads import Sent, Uploads, WrongOffset
from hansa.secagg.steps import step_in
from hansa.tensors import Packed
from hansa.version import __version__
from hansa.wire import unpack_report

_LOG = logging.getLogger("hansa")
KINDS = {"train": "update", "evaluate": "metrics", "prepare": "statistics"}


class Coordinator:
    """One run of a federation, served to its clients. ``listeners`` are called when clients may find something new."""

    def __init__(self, store: Store, federation: Federation, fingerprint: str, *, settings: str = "") -> None:
        self.store, self.fingerprint, self.registry = store, fingerprint, Registry(store)
        self.authority = open_authority(store)
        self.federation = witnessed(federation, Roster(self.authority.certificate, now=None))
        self.seal = Seal.open(self.authority)
        self.models, self.updates = Blobs(store.folder / "blobs"), Blobs(store.folder / "updates")
        self.models.drop_damaged()  # what is missing then is published again with the round at hand
        self.run = open_run(store, fingerprint, settings)
        fail_point("coordinator.run.opened")
        self.rounds = Rounds(store, self.run, self.seal)
        self.lengths = Lengths(self.rounds, self.federation)
        self.uploads = Uploads(store.folder / "uploads", self.run)
        self.counts = Counts(self.rounds)
        self.arrived = threading.Condition()  # a report, a hello or a goodbye came: for whoever waits on this side
        self.listeners: list[Callable[[], None]] = []
        self.sizes = Sizes(self.lengths, self.federation, federation.sent_size())
        self.heard_s: dict[str, float] = {}  # when each client asked for work last, by the clock of the rounds
        self._working: dict[str, Slot] = {}  # the plan that each client was given last
        self._kinds: dict[str, str] = {}
        with store.write() as db:
            tell_of_older(db, store.clock())
            append(db, store.clock(), "started", "", {"run": self.run, "version": __version__})
        if self.released is not None:  # before anybody asks: a crash may have come in the middle of it
            self._forget(self.released)

    # -------------------------------------------------------------------------------------------- what clients ask

    def enrol(self, message: Enrol, *, address: str = "") -> Enrolled:
        """A certificate for a good token."""
        return self.registry.enrol(message, self.authority, address=address)

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
        frozen = str(getattr(self.federation.learner, "frozen_hash", None) or "")
        if message.frozen and message.frozen != (frozen or NO_FROZEN):
            raise Refusal(
                "another-model",
                f"hello: expected frozen parameters with hash {(frozen or NO_FROZEN)[:8]}, found {message.frozen[:8]}; "
                "build_model must give the same ones everywhere: take the same files and versions as the coordinator",
            )
        if message.frozen or not frozen:
            self.registry.hello(name, self.run, message)
            self._notify()
        certificate = self.seal.certificate
        return Welcome(
            run=self.run, fingerprint=self.fingerprint, version=__version__, receipts=certificate, frozen=frozen
        )

    def work(self, name: str, *, acknowledged: int = 0, released: str = "") -> Work:
        """What a client is to do next. It says the last settlement it applied and the last release it keeps."""
        here = self.registry.here(self.run, name)
        if here is None:
            raise Refusal("hello-first", "work: expected a hello for this run first, found none; say hello")
        self.hear(name)
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
            finished=here and self.finished,
        )

    def count_work(self, name: str, work: Work, size: int) -> None:
        """Count a message that was sent in answer to a request for work."""
        self.count("no plan yet" if work.plan is None else "plan", "down", size, self._working.get(name))

    def largest_report(self, slot: Slot, learn: bool) -> int:
        """The most bytes that a report in a slot may have: those of one packed row, and a little for names."""
        return self.sizes.largest(slot, learn)

    def check_room(self, plan: Plan, clients: int, vectors: Mapping[str, Packed]) -> None:
        """Raise ``NoRoom`` unless the disk has room for a round: its vectors, its reports, two checkpoints after it."""
        needed = 3 * sum(packed.size for packed in vectors.values()) + self.sizes.room(plan, clients)
        check_room(self.store.folder, needed, f"a round (clients asked: {clients})")

    def hear(self, name: str) -> None:
        """Note that a client asks for work."""
        self.heard_s[name] = self.rounds.times.monotonic()

    def expect(self, run: str, sent: Sent, size: int | None = None) -> Receipt | None:
        """The receipt that a report has already, or None when its bytes are welcome: ``size`` of them, where known.

        A report that can count no more (its slot is closed, or nobody waits for it) is recorded as late without its
        bytes. Raises ``Refusal`` for a report that was not asked for, is too large, or is another than the one that
        stands.
        """
        if run != self.run:
            raise Refusal("not-asked", "report: expected one for the run that is on, found another run; ask for work")
        if not SHA256.fullmatch(sent.sha256):
            raise Refusal("malformed", "report: expected its SHA-256 in hex at the end of the path, found another text")
        row = self.rounds.asked(sent.slot, sent.client)
        receipt = self.rounds.receipt(sent.slot, sent.client)
        if size is not None:
            largest = self.largest_report(sent.slot, bool(row.learn))
            if size > largest:
                raise Refusal("too-large", f"report: expected at most {largest} bytes, found {size}")
        if receipt is not None and receipt.sha256 == sent.sha256:
            return receipt
        settled = size is not None and (row.given_up or row.state in ("frozen", "aggregated", "abandoned"))
        if receipt is None and not settled:
            return None
        return self.rounds.record(sent.slot, Arrival(client=sent.client, sha256=sent.sha256, size=size or 0))

    def report(self, name: str, slot: Slot, body: bytes | Path) -> Receipt:
        """Check a report and count it once; see ``Rounds.record`` for reports that come twice or late.

        A file, whose name is its SHA-256, is moved to the updates if it is accepted, and else removed.
        """
        row = self.rounds.asked(slot, name)
        sha256 = body.name if isinstance(body, Path) else hashlib.sha256(body).hexdigest()
        size = body.stat().st_size if isinstance(body, Path) else len(body)
        before = self.rounds.receipt(slot, name)
        fail_point("coordinator.report.received")
        is_welcome = before is None and row.state == "collecting" and not row.given_up  # else nobody looks at it
        arrival = Arrival(client=name, sha256=sha256, size=size)
        if is_welcome:
            arrival = self._check(slot, bool(row.learn), name, sha256, body)
        with self.updates.storing():
            if is_welcome and not arrival.refused:
                self.updates.put(body)
            fail_point("coordinator.report.stored")
            receipt = self.rounds.record(slot, arrival)
            masked = row.learn or step_in(slot.exchange) == "masked"
            if receipt.status == "late" and masked and not getattr(self._aggregator(slot), "reveals_rows", True):
                self.updates.drop({sha256})  # its slot was closed meanwhile: nobody may ever unmask it
        if isinstance(body, Path):
            body.unlink(missing_ok=True)
        if before is None:
            kind = KINDS.get(slot.task, slot.task) if row.learn else "mail"
            self.count("refusal" if receipt.status == "refused" else kind, "up", size, slot)
        self._notify()
        return receipt

    def uploaded(self, run: str, sent: Sent, size: int) -> Receipt:
        """Count a report that has been uploaded and ``claimed``, and whose hash is right."""
        receipt = self.expect(run, sent, size)
        if receipt is not None:  # an earlier request was cut before its answer, or the slot has been settled
            self.uploads.forget(sent)
            return receipt
        if self.uploads.size(sent) != size:
            raise WrongOffset(self.uploads.size(sent), size)
        return self.report(sent.client, sent.slot, self.uploads.path(sent))

    def vector(self, sha256: str) -> tuple[Path, int]:
        """Where a vector lies that clients may download, and its size."""
        path = self.models.path(sha256)
        if path is None:
            raise Refusal("not-found", "blob: expected a vector of the current round, found none; ask for work again")
        return path, path.stat().st_size

    def count_vector(self, name: str, sha256: str, size: int) -> None:
        """Count a vector that a client begins to download."""
        self.count(self._kinds.get(sha256, "model"), "down", size, self._working.get(name))

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

    def publish(self, vectors: Mapping[str, bytes | Packed]) -> dict[str, str]:
        """Store packed vectors for download: name to SHA-256."""
        named = {name: self.models.put(body) for name, body in vectors.items()}
        self._kinds |= {sha256: "model" if name == "params" else name for name, sha256 in named.items()}
        return named

    def release(self, number: int, vectors: Mapping[str, bytes | Packed]) -> None:
        """Publish the model of a round whose result is durable, and forget what only a replay of it would need."""
        released = Released(run=self.run, round=number, vectors=self.publish(vectors))
        fail_point("coordinator.release.stored")
        if released != self.released:
            stored = [released.run, released.round, dict(released.vectors)]
            with self.store.write() as db:
                put(db, "released", json.dumps(stored).encode())
                what = {"run": self.run, "round": number, "vectors": dict(released.vectors)}
                append(db, self.store.clock(), "released", "", what)
        fail_point("coordinator.release.named")
        self._forget(released)
        self.wake()

    def _forget(self, released: Released) -> None:
        """Forget what only a replay of a released round would need."""
        with self.updates.sweeping():
            reports, shown = self.rounds.forget(released.round)
            fail_point("coordinator.release.forgotten")
            self.updates.keep_only(reports)
        self.models.keep_only(shown | set(released.vectors.values()))
        self.uploads.keep_only(unsettled(self.store, self.run))
        fail_point("coordinator.release.cleaned")

    def finish(self) -> None:
        """Tell clients that the run is over."""
        self.counts.flush()
        if not self.finished:
            run = json.loads(self.store.get("run") or b"{}")
            with self.store.write() as db:
                put(db, "run", json.dumps({**run, "finished": True}).encode())
                append(db, self.store.clock(), "finished", "", {"run": self.run})
        fail_point("coordinator.run.finished")
        self.wake()

    def save_log(self, folder: Path) -> Path:
        """Write the audit log with its signed head, and the authority that proves it, to a run directory."""
        return save_log(self.store, self.seal, self.authority.certificate, folder)

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
        """Write what is counted, sign the audit log, and let go of the state folder; a full disk is no hindrance.

        Nothing is written to a folder that is another's by now.
        """
        try:
            self.counts.flush()
            with self.store.write() as db:
                append(db, self.store.clock(), "stopped", "", {"run": self.run})
            sign_head(self.store, self.seal)
        except Superseded:
            pass
        except OSError as error:
            if not is_full(error):
                raise
            _LOG.error("the coordinator's disk is full: %s; that it stopped is not in the audit log", error)
        self.store.close()

    def _notify(self) -> None:
        with self.arrived:
            self.arrived.notify_all()

    def _unsigned(self, slot: Slot, name: str, said: Any) -> str:
        """What is wrong with the signature of a client's word, where its peers would look at one."""
        check = getattr(self._aggregator(slot), "check_signed", None)
        return "" if check is None or (told := self.lengths.told(slot)) is None else str(check(told, name, said))

    def _aggregator(self, slot: Slot) -> Any:
        return self.federation.parts(slot).aggregator

    def size_of(self, slot: Slot) -> int | None:
        """Length of an update in a slot, where it is known before."""
        return self.sizes.of(slot)

    def _check(self, slot: Slot, learn: bool, name: str, sha256: str, body: bytes | Path) -> Arrival:
        """A report and what is wrong with it, if anything: whatever a client sent, the round goes on."""
        parts, size = self.federation.parts(slot), self.size_of(slot)
        refused, form = "", "mail"
        content = map_file(body) if isinstance(body, Path) else body
        try:
            report = unpack_report(content, slot, name, self.federation.codec(slot), size)
            refused = report.refused.get(name, "")
            if not refused and isinstance(report.payload, Updates):
                free = partial(let_go, content)
                refused, form = fault_of(report.payload, parts.must_be_finite, free), form_of(report.payload)
                refused = refused or self.lengths.fault(slot, report.payload)
            elif not refused and learn and getattr(parts.aggregator, "reveals_rows", True):
                refused = "report holds no update"
            elif not refused and hasattr(parts.aggregator, "check_mail"):
                refused = parts.aggregator.check_mail(slot.exchange, report.payload[name])
                refused = refused or self._unsigned(slot, name, report.payload[name])
        except ProtocolError as error:
            refused = str(error)
        except Exception as error:  # a codec may fail in any way on bytes that it did not make
            refused = f"report cannot be read ({type(error).__name__})"
        return Arrival(client=name, sha256=sha256, size=len(content), refused=plain(refused), form=form)


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


__all__ = ["KINDS", "Coordinator", "open_run"]
