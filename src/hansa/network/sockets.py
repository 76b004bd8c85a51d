"""The coordinator's sockets: accepted within limits, TLS in little memory, and cut when the other end dawdles.

uvicorn has no deadline for a request that arrives slowly (its issue 157), no lowest speed and no cap by address or
client, and asyncio's TLS keeps 256 KiB for each connection. Both are mended here, below the app.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hashlib
import ipaddress
import socket
import ssl
from asyncio import sslproto
from collections import Counter
from collections.abc import Callable
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from hansa.network.limits import Groups, Limits, Patience

_ACCEPT_AT_ONCE = 16  # then those that are open have their turn
_FAIR_S = 2.0  # what every stranger is given before it has to make room for another
_BACK_OFF_S, _LONGEST_BACK_OFF_S = 0.05, 1.0
_SPARE = 64  # descriptors, for the database, blobs and whatever else a process opens
_READ_BYTES = _WRITE_BUFFER = 64 * 1024
_CLOSE_S = 5.0  # for the other end to close its side of TLS
_LINGER_S, _LINGER_BYTES = 2.0, 2**20  # of a body after its answer: by then the answer was read, or never will be
_NO_ROOM = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
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
        make_http: Callable[[], Http],
    ) -> None:
        self.loop, self.limits, self.context = asyncio.get_running_loop(), limits, context
        self.cuts: Counter[str] = Counter()
        self.lines: set[Line] = set()
        self.buffer = memoryview(bytearray(_READ_BYTES))  # one for all: it is emptied at once
        self._listener, self._make_http, self._most = listener, make_http, room(limits)
        self._strangers = Groups[Line](limits.strangers)
        self._by_address = Groups[Line](limits.strangers_by_address)
        self._by_client = Groups[Line](limits.connections_by_client)
        self._watched: set[Http] = set()
        self._back_off_s = _BACK_OFF_S
        self._opening: set[asyncio.Task[Any]] = set()
        self._every_s = min(1.0, limits.headers_s / 4, limits.grace_s / 4)
        self._timers: dict[str, asyncio.TimerHandle] = {}
        listener.setblocking(False)
        self._open()
        self._sweep()

    def close(self) -> None:
        """Accept no more."""
        self.loop.remove_reader(self._listener.fileno())
        self._timers.pop("open", None)
        self._listener.close()

    def cut_all(self) -> None:
        """End every connection without waiting for its other end."""
        for timer in self._timers.values():
            timer.cancel()
        for line in list(self.lines):
            line.raw.abort()

    def cut(self, line: Line, why: str) -> None:
        """End one connection at once, and count why."""
        self.cuts[why] += 1
        line.raw.abort()

    def watch(self, http: Http) -> None:
        """Look at a connection now and then, until it has no deadline any more."""
        self._watched.add(http)

    def entered(self, line: Line) -> None:
        """A connection was made; nothing is known of its other end but the address."""
        self.lines.add(line)
        oldest = self._strangers.add(_EVERYONE, line)
        if oldest is not None:
            self.cut(oldest, "full")
        if line.address and (oldest := self._by_address.add(line.address, line)) is not None:
            self.cut(oldest, "address")

    def recognized(self, line: Line, certificate: bytes) -> None:
        """The other end showed a client's certificate."""
        self._strangers.remove(_EVERYONE, line)
        self._by_address.remove(line.address, line)
        line.client = hashlib.sha256(certificate).hexdigest()
        oldest = self._by_client.add(line.client, line)
        if oldest is not None:
            self.cut(oldest, "client")

    def left(self, line: Line) -> None:
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
            task = self.loop.create_task(self._admit(found, _outside(address[0])))
            self._opening.add(task)
            task.add_done_callback(self._opening.discard)

    def _has_room(self) -> bool:
        """Make room for one more: the oldest stranger goes, but not before it had a fair time to say who it is."""
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
        self.left(oldest)
        return True

    async def _admit(self, found: socket.socket, address: str) -> None:
        """Begin TLS on an accepted socket."""
        found.setblocking(False)
        with contextlib.suppress(OSError):  # gone already
            # asyncio does so for sockets of its own making; without it the end of an answer waits 40 ms for an ACK
            found.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            await self.loop.connect_accepted_socket(lambda: Line(self, self._make_http(), address), found)

    def _sweep(self) -> None:
        """Cut every connection that is overdue."""
        now = self.loop.time()
        for http in list(self._watched):
            why = http.overdue(now)
            if why is None:
                self._watched.discard(http)
            elif why:
                self._watched.discard(http)
                self.cut(http.line, why)
        self._timers["sweep"] = self.loop.call_later(self._every_s, self._sweep)


class Line(sslproto.SSLProtocol):
    """One connection: asyncio's TLS, with a buffer that it shares, and with a place in the door's lists."""

    max_size = _READ_BYTES

    def __init__(self, door: Door, http: Http, address: str) -> None:
        waiter: asyncio.Future[None] = door.loop.create_future()
        super().__init__(
            door.loop,
            http,
            door.context,
            waiter,
            server_side=True,
            ssl_handshake_timeout=door.limits.handshake_s,  # type: ignore[arg-type]  # typeshed says int; any number will do
            ssl_shutdown_timeout=_CLOSE_S,
        )
        self._ssl_buffer = self._ssl_buffer_view = door.buffer
        self.door, self.address, self.client, self.since = door, address, "", door.loop.time()
        self.raw: asyncio.Transport
        http.line = self
        waiter.add_done_callback(self._shook_hands)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as asyncio's own
        """The socket is open: begin the handshake."""
        self.raw = transport
        self.door.entered(self)
        super().connection_made(transport)

    def connection_lost(self, exc: BaseException | None) -> None:
        """The socket is closed."""
        self.door.left(self)
        super().connection_lost(exc)

    def _shook_hands(self, waiter: asyncio.Future[None]) -> None:
        """Count a handshake that took too long; one that failed has had its answer from TLS."""
        if not waiter.cancelled() and isinstance(waiter.exception(), ConnectionAbortedError):
            self.door.cuts["handshake"] += 1


class Http(H11Protocol):
    """HTTP/1.1 that tells the app which certificate the client showed, and knows what the other end owes it."""

    line: Line

    def __init__(self, limits: Limits, unavailable: Callable[[], Any], **uvicorn: Any) -> None:
        super().__init__(**uvicorn)
        self._limits, self._unavailable = limits, unavailable
        self._received, self._unsent = 0, 0
        self._owes, self._since, self._from = "", 0.0, 0  # what is due, since when, and what was received before
        self._body: Patience | None = None
        self._reader: Patience | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's own
        """TLS is agreed on: the headers of a first request are due."""
        super().connection_made(transport)
        transport.set_write_buffer_limits(_WRITE_BUFFER)
        tls = transport.get_extra_info("ssl_object")
        certificate = tls.getpeercert(binary_form=True)
        self.app_state = {**self.app_state, "certificate": certificate}
        if certificate is not None:
            self.line.door.recognized(self.line, certificate)
        self._now_owes("headers")

    def data_received(self, data: bytes) -> None:
        """Bytes came: see what is due now."""
        self._received += len(data)
        super().data_received(data)
        self._look()

    def on_response_complete(self) -> None:
        """An answer is out: see what is due now."""
        super().on_response_complete()
        self._look()

    def handle_events(self) -> None:
        """Requests that are complete go to the app, or are told to come back when the server is closing."""
        self.app = self._unavailable() or self.app
        super().handle_events()

    def send_400_response(self, msg: str) -> None:
        """What came is not HTTP, or too long."""
        self.line.door.cuts["malformed"] += 1
        super().send_400_response(msg)

    def pause_writing(self) -> None:
        """More is to be sent than the other end reads."""
        super().pause_writing()
        self._unsent = self._to_send()
        self._reader = Patience(self._limits, self.loop.time())
        self.line.door.watch(self)

    def resume_writing(self) -> None:
        """The other end has read."""
        super().resume_writing()
        self._reader = None

    def overdue(self, now: float) -> str | None:
        """Why this connection has to be cut, nothing yet (``""``), or that nothing is due from it (None)."""
        if self.transport.is_closing():
            return None
        if self._reader is not None:
            return "slow reader" if self._reader.is_over(now, self._unsent - self._to_send()) else ""
        if self._owes == "headers":
            return "headers" if now - self._since > self._limits.headers_s else ""
        if self._owes == "body":
            assert self._body is not None
            if self.flow.read_paused:  # it is the app that dawdles
                self._body = Patience(self._limits, now, self._received)
            return "slow body" if self._body.is_over(now, self._received) else ""
        if self._owes == "rest of a body":
            return "unread body" if now - self._since > _LINGER_S else ""
        return None

    def _to_send(self) -> int:
        """Bytes of answers that have not gone to the system yet."""
        return self.transport.get_write_buffer_size() + self.line.raw.get_write_buffer_size()

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
                self.line.door.cut(self.line, "unread body")
        else:
            self._owes = ""

    def _now_owes(self, what: str) -> None:
        if what == self._owes:
            return
        self._owes, self._since, self._from = what, self.loop.time(), self._received
        if what == "body":
            self._body = Patience(self._limits, self._since, self._received)
        if what:
            self.line.door.watch(self)


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


__all__ = ["Door", "Http", "Line", "raise_descriptor_limit", "room"]
