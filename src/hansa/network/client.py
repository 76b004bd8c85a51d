"""A client on the network: requests that are tried again, and the loop of ``hansa join``.

A client only calls out. ``HTTPS_PROXY`` is honoured; TLS is checked against the federation's authority alone, so that
a proxy that opens TLS is noticed and named.
"""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import quote

from hansa.core.errors import InputError, RunError
from hansa.core.protocols import Slot
from hansa.network import identity, renewal
from hansa.network.calls import Line, Unreachable
from hansa.network.client_store import ClientStore
from hansa.network.enrolment import Identity
from hansa.network.failpoints import fail_point
from hansa.network.messages import (
    NO_FROZEN,
    PROTOCOL,
    Hello,
    Receipt,
    Refusal,
    Welcome,
    Work,
    read_plan,
    read_receipt,
    read_welcome,
    read_work,
    release_mark,
    write,
)
from hansa.network.outbox import Parcel
from hansa.network.pace import LONGEST_WAIT_S, Patient
from hansa.network.participant import Participant
from hansa.network.receipts import check_receipt
from hansa.network.transfers import Upload, Vectors
from hansa.tensors import Buffer
from hansa.version import __version__

_FIRST_DELAY_S, _LONGEST_DELAY_S = 0.5, 30.0
_GOODBYES = 5  # tries, some ten seconds

T = TypeVar("T")
OnEvent = Callable[[str, Mapping[str, Any]], None]


class Connection:
    """Requests of one client, tried again for as long as the server cannot be reached (said once by ``on_event``)."""

    def __init__(
        self,
        who: Identity,
        store: ClientStore,
        *,
        on_event: OnEvent | None = None,
        stop: threading.Event | None = None,
        first_delay_s: float = _FIRST_DELAY_S,
    ) -> None:
        self.who, self.store, self.on_event = who, store, on_event
        self.stop = stop or threading.Event()
        self._patient, self._asked_at = Patient(first_delay_s, _LONGEST_DELAY_S), 0.0
        self._signer, self._receipts_key = who.signer(), b""
        self.receipts_certificate = b""
        self.has_ended = False  # the certificate: it can only sign its own renewal now
        self._may_forget = True  # files of an identity before this one
        self._line = self._open()
        self._vectors = Vectors(lambda: self._line, store.folder / "downloads")

    def close(self) -> None:
        """Close what is open."""
        self._line.close()

    def hello(self, fingerprints: tuple[str, ...], frozen: str = "") -> Welcome:
        """Say which apps this client's owner agreed to, and the hash of the one app's frozen parameters once known."""
        body = write(Hello(protocol=PROTOCOL, version=__version__, fingerprints=fingerprints, frozen=frozen))
        self.store.list_body(body, kind="hello", protection="none: it holds fingerprints of apps")
        welcome = read_welcome(self._ask("POST", "/v1/hello", content=body))
        self._trust(welcome.receipts)
        return welcome

    def renew_if_due(self) -> None:
        """Get the next certificate where less than a third of this one's life is left, or where it has ended."""
        if not (self.has_ended or renewal.is_due(self.who, self._signer.now)):
            return
        self._line.close()
        self._line = self._open()

        def ask(body: bytes) -> bytes:
            self.store.list_body(body, kind="certificate request", protection="none: it holds the public key")
            return self._ask("POST", renewal.PATH, content=body)

        self.who = renewal.renew(self.who, ask)
        self._signer, self.has_ended, self._may_forget = self.who.signer(), False, True
        self._line.close()
        self._line = self._open()
        self.say("renewed", ends=self.who.ends)

    def get_work(self, wait_s: float = LONGEST_WAIT_S) -> Work:
        """What to do next; waits at the server for up to ``wait_s``."""
        kept = (self.store.get("released") or b"").decode()
        query = {"acknowledged": str(self.store.acknowledged), "released": kept, "wait": str(wait_s)}
        self._asked_at = time.monotonic()
        work = read_work(self._ask("GET", "/v1/work", params=query))
        self._patient.hear(work.retry_after_s)
        self.store.enter(work.run)
        return work

    def rest(self) -> None:
        """After an answer that said nothing: wait as long as the pace that the server told."""
        self.stop.wait(self._patient.until_next(time.monotonic() - self._asked_at))

    def get_blob(self, sha256: str) -> Buffer:
        """A vector by its hash, checked against it; one that is still at hand is not downloaded again."""
        held = self._vectors.get(sha256)
        if held is None:
            self._keep_trying(self._vectors.fetch(sha256))
            held = self._vectors.get(sha256)
            assert held is not None
        return held

    def keep_blobs(self, wanted: set[str]) -> None:
        """Let go of vectors that the newest plan and release do not name."""
        self._vectors.keep_only(wanted)

    def put_report(self, run: str, slot: Slot, report: Parcel) -> Receipt:
        """Send a report; the same bytes may be sent any number of times."""
        path = f"/v1/reports/{quote(run)}/{quote(str(slot), safe='')}/{report.sha256}"
        receipt = read_receipt(self._keep_trying(Upload(self._line, path, report).go_on))
        self.check(receipt, run, slot, report.sha256)
        return receipt

    def check(self, receipt: Receipt, run: str, slot: Slot, sha256: str) -> None:
        """Raise ``ProtocolError`` unless a receipt is for this report and signed by the federation's key for them."""
        check_receipt(receipt, self._receipts_key, client=self.who.name, run=run, slot=str(slot), sha256=sha256)

    def goodbye(self) -> None:
        """Say that this client knows that the run is over; a coordinator that is gone for good is not waited for."""
        with contextlib.suppress(Unreachable):
            self._ask("POST", "/v1/goodbye", tries=_GOODBYES)

    def say(self, what: str, **more: Any) -> None:
        """Tell whoever listens."""
        if self.on_event:
            self.on_event(what, more)

    def _ask(self, method: str, path: str, *, tries: int | None = None, **request: Any) -> bytes:
        """One request, until it is answered, or ``tries`` times. Raises ``Refusal`` when the answer is no."""
        return self._keep_trying(lambda: self._line.ask(method, path, **request), tries)

    def _keep_trying(self, once: Callable[[], T], tries: int | None = None) -> T:
        """What ``once`` gives when the server can be reached: tried later and later, but soon after it has got on."""
        told = False
        while True:
            try:
                answer = once()
                self._patient.reached()
                if told:
                    self.say("connected", url=self.who.url)
                if self._may_forget:
                    self.who.forget_other()
                    self._may_forget = False
                return answer
            except Unreachable as error:
                if time.time() > self.who.ends and not self.has_ended:  # TLS fails without a word, or by the wrong one
                    raise Refusal("expired", f"certificate of {self.who.name}: it seems to have ended") from error
                tries = None if tries is None else tries - 1
                if tries == 0:
                    raise
                if not told:
                    self.say("unreachable", url=self.who.url, reason=str(error))
                told, after_s = True, error.after_s
                if error.moved:
                    self._patient.reached()
            if self.stop.wait(self._patient.until_retry(after_s)):
                raise Stopped("stopped while the server could not be reached")

    def _open(self) -> Line:
        """A line on which each request is signed; a certificate that has ended is not shown, as TLS would refuse it."""
        authority = self.who.authority_pem
        context = identity.client_context(authority) if self.has_ended else self.who.context()
        return Line(self.who.url, authority, context, self._signer)

    def _trust(self, certificate: bytes) -> None:
        """Know the key that signs receipts by its certificate, which the authority must have made; looked at once."""
        key = self.store.get("receipts.key")
        if key is None or self.store.get("receipts.pem") != certificate:
            key = identity.key_of_receipts(certificate, self.who.authority_pem)
            self.store.note("receipts.pem", certificate)
            self.store.note("receipts.key", key)
        self._receipts_key, self.receipts_certificate = key, certificate


class Stopped(RunError):
    """The client was asked to stop."""


Apps = Callable[[], Mapping[str, Callable[[], Participant]]]  # by fingerprint; looked at again before every plan


def run_participant(connection: Connection, apps: Apps, *, stay: bool = False) -> None:
    """Take part until the run is over; with ``stay``, in every run whose app the owner agreed to, for ever.

    ``connection.on_event(what, more)`` hears: ``welcome``, ``plan``, ``receipt``, ``released``, ``finished``,
    ``unreachable``, ``connected``, ``another-app``, ``renewed``. Raises ``InputError`` for another app, ``RunError``
    when revoked.
    """
    joined: _Joined | None = None
    while not connection.stop.is_set():
        try:
            if joined is None or not joined.participant.is_amid or connection.has_ended:
                connection.renew_if_due()
            joined = joined or _join(connection, apps)
            if not joined.step(stay):
                return
        except Refusal as error:
            if error.code == "hello-first":
                joined = None
            elif error.code == "expired" and not connection.has_ended:
                connection.has_ended = True
            elif error.code in ("another-app", "another-model") and stay:
                connection.say("another-app", reason=str(error))
                connection.stop.wait(_LONGEST_DELAY_S * random.uniform(0.5, 1.0))
            elif error.code in ("another-app", "another-model", "protocol"):
                raise InputError(str(error)) from error
            else:
                raise RunError(str(error)) from error


def _join(connection: Connection, apps: Apps) -> _Joined:
    """Say hello and build the participant of the app that the run asks for."""
    offered = apps()
    welcome = connection.hello(tuple(offered))
    fail_point("client.run.welcomed")
    connection.store.enter(welcome.run)
    connection.say("welcome", run=welcome.run, fingerprint=welcome.fingerprint)
    participant = offered[welcome.fingerprint]()
    if welcome.frozen:
        frozen = getattr(participant.federation.learner, "frozen_hash", None) or NO_FROZEN
        welcome = connection.hello((welcome.fingerprint,), frozen)
    return _Joined(connection, apps, welcome, participant)


@dataclass(frozen=True)
class _Joined:
    """A client in a run."""

    connection: Connection
    apps: Apps
    welcome: Welcome
    participant: Participant

    def step(self, stay: bool) -> bool:
        """Ask for work and do it; False when the run is over and this client is not to stay."""
        work = self.connection.get_work()
        self.participant.settle(work)
        if work.released is not None:
            self._keep(work)
        if work.plan is not None:
            self._answer(work)
        if work.plan is not None or work.released is not None:
            self.connection.keep_blobs(_vectors(work))
        if work.finished and work.plan is None:
            fail_point("client.run.finished")
            self.connection.goodbye()
            fail_point("client.goodbye.said")
            self.connection.say("finished", run=work.run)
            return stay
        if not work.says_something:
            self.connection.rest()
        return True

    def _keep(self, work: Work) -> None:
        """Keep the newest released model; one that has been replaced meanwhile is named by the next message."""
        assert work.released is not None
        try:
            self.participant.keep(work.released, self.connection.get_blob)
        except Refusal as error:
            if error.code != "not-found":
                raise
            return
        self.connection.store.note("released", release_mark(work.released).encode())
        fail_point("client.release.noted")
        self.connection.say("released", round=work.released.round)

    def _answer(self, work: Work) -> None:
        """Work on a plan and send what comes of it."""
        connection = self.connection
        fail_point("client.plan.received")
        try:
            if self.welcome.fingerprint in self.apps():
                done = self.participant.handle(work, connection.get_blob)
            else:
                done = self.participant.refuse(work, "the owner withdrew this app")
            assert done is not None
            slot, body = done
            connection.say("plan", task=slot.task, round=slot.round)
            fail_point("client.report.sending")
            receipt = connection.put_report(work.run, slot, body)
            fail_point("client.receipt.received")
        except Refusal as error:
            if error.code not in ("not-found", "not-asked"):
                raise
            return  # the round went on without this client
        connection.store.received(work.run, receipt, connection.receipts_certificate)
        fail_point("client.receipt.noted")
        connection.say("receipt", task=slot.task, round=slot.round, status=receipt.status, reason=receipt.reason)


def _vectors(work: Work) -> set[str]:
    """The blobs that a message names."""
    shown = set() if work.plan is None else set(read_plan(work.plan).vectors.values())
    return shown | (set() if work.released is None else set(work.released.vectors.values()))
