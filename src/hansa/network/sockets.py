"""The coordinator's sockets: accepted within limits, and cut when the other end dawdles.

uvicorn has no deadline for a request that arrives slowly (its issue 157), no lowest speed and no cap by address or
client. They are here, below the app.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hashlib
import ipaddress
import socket
import ssl
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from hansa.network.limits import Groups, Limits, Patience
from hansa.network.tls import Tls, Turns

_ACCEPT_AT_ONCE = 16  # then those that are open have their turn
_FAIR_S = 2.0  # what every stranger is given before it has to make room for another
_BACK_OFF_S, _LONGEST_BACK_OFF_S = 0.05, 1.0
_SPARE = 64  # descriptors, for the database, blobs and whatever else a process opens
_LINGER_S, _LINGER_BYTES = 2.0, 4 * 2**20  # of a body after its answer: by then the answer was read, or never will be
_NO_ROOM = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
_NOT_SENT_LOWAT = 25  # TCP_NOTSENT_LOWAT, which Python has a name for from 3.12 on
_NOT_SENT = 128 * 1024  # that the system takes of an answer beyond what the other end is ready for; it would megabytes
_EVERYONE = ""


class Door:
    """Lets connections in to one server, watches those that owe it bytes, and counts those it cut (``limits.CUTS``).

    Everything here runs in the thread of ``loop``.
    """

    def __init__(
        self,
        listener: socket.socket,
        context: ssl.SSLContext,
        limits: Limits,
        make_http: Callable[[Door], Http],
        is_busy: Callable[[], bool],
    ) -> None:
        self.loop, self.limits, self.context = asyncio.get_running_loop(), limits, context
        self.cuts: Counter[str] = Counter()
        self.lines: set[Tls] = set()
        self._listener, self._make_http, self._is_busy, self._most = listener, make_http, is_busy, room(limits)
        self._strangers = Groups[Tls](limits.strangers)
        self._by_address = Groups[Tls](limits.strangers_by_address)
        self._by_client = Groups[Tls](limits.connections_by_client)
        self._watched, self._turns = set[Http](), Turns()
        self._back_off_s = _BACK_OFF_S
        self._every_s = min(1.0, limits.headers_s / 4, limits.grace_s / 4)
        self._timers: dict[str, asyncio.TimerHandle] = {}
        listener.setblocking(False)
        self._open()
        self._sweep()

    def close(self) -> None:
        """Accept no more."""
        self.loop.remove_reader(self._listener.fileno())
        if "open" in self._timers:
            self._timers["open"].cancel()
        self._listener.close()

    def cut_all(self) -> None:
        """End every connection without waiting for its other end."""
        for timer in self._timers.values():
            timer.cancel()
        for line in list(self.lines):
            line.abort()

    def cut(self, line: Tls, why: str) -> None:
        """End one connection at once, and count why."""
        self.cuts[why] += 1
        line.abort()

    def watch(self, http: Http) -> None:
        """Look at a connection now and then, until it has no deadline any more."""
        self._watched.add(http)

    def recognized(self, line: Tls, certificate: bytes) -> None:
        """The other end showed a client's certificate."""
        self._strangers.remove(_EVERYONE, line)
        self._by_address.remove(line.address, line)
        line.client = hashlib.sha256(certificate).hexdigest()
        oldest = self._by_client.add(line.client, line)
        if oldest is not None:
            self.cut(oldest, "client")

    def left(self, line: Tls) -> None:
        """A connection is gone."""
        self.lines.discard(line)
        self._strangers.remove(_EVERYONE, line)
        self._by_address.remove(line.address, line)
        self._by_client.remove(line.client, line)

    def _open(self) -> None:
        self.loop.add_reader(self._listener.fileno(), self._accept)

    def _pause(self, seconds: float) -> None:
        """Leave those that knock to the system's queue for a moment."""
        self.loop.remove_reader(self._listener.fileno())
        self._timers["open"] = self.loop.call_later(seconds, self._open)

    def _accept(self) -> None:
        """Let some in; where the process has no descriptor left, try again a little later, and later still."""
        for _ in range(_ACCEPT_AT_ONCE):
            if not self._has_room():
                return
            try:
                found, address = self._listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                if error.errno not in _NO_ROOM:
                    raise
                self.cuts["descriptors"] += 1
                self._pause(self._back_off_s)
                self._back_off_s = min(2 * self._back_off_s, _LONGEST_BACK_OFF_S)
                return
            self._back_off_s = _BACK_OFF_S
            if len(self.lines) >= self._most:
                self.cuts["full"] += 1
                found.close()
                continue
            self._admit(found, _outside(address[0]))

    def _has_room(self) -> bool:
        """Make room for one more: the oldest stranger goes, but not before it had a fair time to say who it is.

        While requests or handshakes queue, who knocks waits in the system's queue, which costs less than a connection.
        """
        if self._turns.are_many or self._is_busy():
            self._pause(_BACK_OFF_S)
            return False
        strangers = self._strangers.members.get(_EVERYONE, {})
        if len(strangers) < self.limits.strangers and len(self.lines) < self._most:
            return True
        oldest = next(iter(strangers), None)
        if oldest is None:
            return True  # all are clients: who knocks is turned away
        wait_s = oldest.since + _FAIR_S - self.loop.time()
        if wait_s > 0:
            self._pause(min(wait_s, _BACK_OFF_S))
            return False
        self.cut(oldest, "full")
        return True

    def _admit(self, found: socket.socket, address: str) -> None:
        """Begin TLS on an accepted socket; nothing is known of its other end but the address."""
        try:
            if sys.platform == "linux":
                found.setsockopt(socket.IPPROTO_TCP, _NOT_SENT_LOWAT, _NOT_SENT)
            line = Tls(found, self.context, lambda _: self._make_http(self), self.left, address, self._turns)
        except OSError:  # gone already
            found.close()
            return
        self.lines.add(line)
        oldest = self._strangers.add(_EVERYONE, line)
        if oldest is not None:
            self.cut(oldest, "full")
        if address and (oldest := self._by_address.add(address, line)) is not None:
            self.cut(oldest, "address")

    def _sweep(self) -> None:
        """Cut every connection that is overdue."""
        now = self.loop.time()
        for line in list(self._strangers.members.get(_EVERYONE, ())):
            if line.is_shaking_hands and now - line.since > self.limits.handshake_s:
                self.cut(line, "handshake")
        for http in list(self._watched):
            why = http.overdue(now)
            if why is None:
                self._watched.discard(http)
            elif why:
                self._watched.discard(http)
                self.cut(http.line, why)
        self._timers["sweep"] = self.loop.call_later(self._every_s, self._sweep)


class Http(H11Protocol):
    """HTTP/1.1 that tells the app which certificate the client showed, and knows what the other end owes it."""

    __slots__ = ("_body", "_from", "_owes", "_reader", "_received", "_since", "_unavailable", "_unsent", "door", "line")

    def __init__(self, door: Door, unavailable: Callable[[], Any], **uvicorn: Any) -> None:
        super().__init__(**uvicorn)
        self.access_log = False  # whatever the program that serves does with its logging
        self.door, self._unavailable = door, unavailable
        self._received, self._unsent = 0, 0
        self._owes, self._since, self._from = "", 0.0, 0  # what is due, since when, and what was received before
        self._body: Patience | None = None
        self._reader: Patience | None = None

    def connection_made(self, transport: Tls) -> None:  # type: ignore[override]  # as uvicorn's own
        """TLS is agreed on: the headers of a first request are due."""
        self.line = transport
        super().connection_made(transport)
        certificate = transport.certificate
        self.app_state = {**self.app_state, "certificate": certificate, "unread": self._unread}
        if certificate is not None:
            self.door.recognized(self.line, certificate)
        self._now_owes("headers")

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is gone."""
        super().connection_lost(exc)
        self.app_state = {}  # it refers to this

    def data_received(self, data: bytes) -> None:
        """Bytes came: see what is due now."""
        self._received += len(data)
        super().data_received(data)
        self._look()

    def on_response_complete(self) -> None:
        """An answer is out: forget its request, and see what is due now."""
        answered = self.cycle
        super().on_response_complete()
        if self.cycle is answered and self.conn.their_state is h11.IDLE:  # idle connections are many
            self.cycle = self.scope = self.headers = None  # type: ignore[assignment]  # as before the first request
        self._look()

    def handle_events(self) -> None:
        """Requests that are complete go to the app, or are told to come back when the server is closing."""
        self.app = self._unavailable() or self.app
        super().handle_events()

    def send_400_response(self, msg: str) -> None:
        """What came is not HTTP, or too long."""
        self.door.cuts["malformed"] += 1
        super().send_400_response(msg)

    def pause_writing(self) -> None:
        """More is to be sent than the other end reads."""
        super().pause_writing()
        self._unsent = self.line.get_write_buffer_size()
        self._reader = Patience(self.door.limits, self.loop.time())
        self.door.watch(self)

    def resume_writing(self) -> None:
        """The other end has read."""
        super().resume_writing()
        self._reader = None

    def overdue(self, now: float) -> str | None:
        """Why this connection has to be cut, nothing yet (``""``), or that nothing is due from it (None)."""
        if self.transport.is_closing():
            return None
        if self._reader is not None:
            return "slow reader" if self._reader.is_over(now, self._unsent - self.line.get_write_buffer_size()) else ""
        if self._owes == "headers":
            return "headers" if now - self._since > self.door.limits.headers_s else ""
        if self._owes == "body":
            assert self._body is not None
            if self.flow.read_paused:  # it is the app that dawdles
                self._body = Patience(self.door.limits, now, self._received)
            return "slow body" if self._body.is_over(now, self._received) else ""
        if self._owes == "rest of a body":
            return "unread body" if now - self._since > _LINGER_S else ""
        return None

    def _unread(self) -> bytes:
        """What arrived of a body and nobody has read: uvicorn tells of a cut line before it hands out the rest."""
        if self.cycle is None:
            return b""
        rest, self.cycle.body = bytes(self.cycle.body), bytearray()
        return rest

    def _look(self) -> None:
        """Note what is due from the other end."""
        if self.transport.is_closing():
            self._owes = ""
            return
        theirs = self.conn.their_state
        if theirs is h11.IDLE:
            self._now_owes("headers" if self.conn.trailing_data[0] else "")
        elif theirs is h11.SEND_BODY:
            self._now_owes("rest of a body" if self.conn.our_state is h11.DONE else "body")
            if self._owes == "rest of a body" and self._received - self._from > _LINGER_BYTES:
                self.door.cut(self.line, "unread body")
        else:
            self._owes = ""

    def _now_owes(self, what: str) -> None:
        if what == self._owes:
            return
        self._owes, self._since, self._from = what, self.loop.time(), self._received
        if what == "body":
            self._body = Patience(self.door.limits, self._since, self._received)
        if what:
            self.door.watch(self)


def raise_descriptor_limit() -> None:
    """Let this process open as many files as the system allows it to."""
    try:
        import resource
    except ImportError:  # a system without such limits
        return
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):  # some systems do not let it be raised so far
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def room(limits: Limits) -> int:
    """How many connections this process can hold open: ``limits.connections``, or what its file descriptors allow."""
    try:
        import resource
    except ImportError:
        return limits.connections
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return limits.connections if soft == resource.RLIM_INFINITY else max(1, min(limits.connections, soft - _SPARE))


def _outside(address: str) -> str:
    """An address of another machine; nothing for one of this machine."""
    try:
        return "" if ipaddress.ip_address(address.partition("%")[0]).is_loopback else address
    except ValueError:
        return address


__all__ = ["Door", "Http", "raise_descriptor_limit", "room"]
