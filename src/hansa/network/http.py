"""The coordinator over HTTPS: a server thread, its sockets and its TLS."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import logging
import math
import socket
import ssl
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

import uvicorn
from anyio import to_thread
from starlette.responses import JSONResponse

from hansa.core.errors import InputError, RunError
from hansa.network.coordinator import Coordinator
from hansa.network.front import Front
from hansa.network.identity import server_context
from hansa.network.limits import Limits
from hansa.network.pace import retry_after
from hansa.network.routes import make_app
from hansa.network.sockets import Door, Http
from hansa.network.waiting import Bell

_LAST_ANSWERS_S = 3.0
_LAST_BYTES_S = 0.1
_WRITE_EVERY_S = 10.0
_THREADS = 8  # for the database and for files
_EVERYWHERE = ("0.0.0.0", "::", "")

log = logging.getLogger("hansa.network")


class _Server(uvicorn.Server):
    """Says when it has started."""

    door: Door

    def __init__(
        self, config: uvicorn.Config, front: Front, listener: socket.socket, context: ssl.SSLContext, limits: Limits
    ) -> None:
        super().__init__(config)
        self.bell, self.ready = front.bell, threading.Event()
        self._listener, self._context, self._limits = listener, context, limits
        self._front, self._coordinator = front, front.bell.coordinator
        self._written: Counter[str] = Counter()

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve until ``should_exit``, on the one loop of asyncio's that every system has and that knows sockets."""
        with asyncio.Runner(loop_factory=asyncio.SelectorEventLoop) as runner:
            runner.run(self.serve())

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Open the door, then say so."""
        self.servers = []  # uvicorn's own; connections come through the door alone
        await self.lifespan.startup()
        to_thread.current_default_thread_limiter().total_tokens = _THREADS
        self._chores = [asyncio.create_task(chore) for chore in (self.bell.watch(), self._write_notes())]
        self.door = Door(self._listener, self._context, self._limits, self._http, lambda: self._front.is_busy)
        self.started = True
        self.ready.set()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Accept no more, let requests be answered, then cut every line without waiting for the other end."""
        self.door.close()
        self.bell.end()
        if self.server_state.tasks:
            await asyncio.wait(set(self.server_state.tasks), timeout=_LAST_ANSWERS_S)
        await asyncio.sleep(_LAST_BYTES_S)
        for chore in self._chores:
            chore.cancel()
        with contextlib.suppress(Exception):  # statistics: closing does not fail for them
            await to_thread.run_sync(self._write_cuts)
        self.door.cut_all()
        await asyncio.sleep(0)  # until each connection knows
        for task in list(self.server_state.tasks):
            task.cancel()
        await asyncio.gather(*self.server_state.tasks, return_exceptions=True)

    async def _write_notes(self) -> None:
        """Write now and then what was cut."""
        while True:
            await asyncio.sleep(_WRITE_EVERY_S)
            try:
                await to_thread.run_sync(self._write_cuts)
            except Exception as error:  # a database that is locked or full
                log.warning("statistics could not be written: %s", error)

    def _write_cuts(self) -> None:
        """Add to what was cut before, in this state folder."""
        new, self._written = self.door.cuts - self._written, self.door.cuts.copy()
        if new:
            store = self._coordinator.store
            before = Counter(json.loads(store.get("cuts") or b"{}"))
            store.put("cuts", json.dumps(before + new).encode())

    def _http(self, door: Door) -> Http:
        """The protocol of a new connection."""
        return Http(
            door,
            lambda: self._come_back if self.bell.closing else None,
            config=self.config,
            server_state=self.server_state,
            app_state=self.lifespan.state,
        )

    async def _come_back(self, scope: Any, receive: Any, send: Any) -> None:
        """The answer to what is asked while the server is closing."""
        body = {"error": "the coordinator is stopping; it goes on where it was when it is back", "code": "stopping"}
        headers = {"Retry-After": retry_after(self.bell.pace_s), "Connection": "close"}
        await JSONResponse(body, status_code=503, headers=headers)(scope, receive, send)


class ServerThread:
    """A coordinator that is being served. ``url`` is what clients call; ``close`` ends it."""

    def __init__(
        self, url: str, port: int, server: _Server, thread: threading.Thread, forget: Callable[[], None]
    ) -> None:
        self.url, self.port = url, port
        self._server, self._thread, self._forget = server, thread, forget

    @property
    def cuts(self) -> dict[str, int]:
        """How many connections were cut, or turned away, and why (``limits.CUTS``)."""
        return dict(self._server.door.cuts)

    @property
    def num_connections(self) -> int:
        """How many connections are open now."""
        return len(self._server.door.lines)

    def close(self) -> None:
        """Listen no more and answer what waits; whoever asks for more meanwhile is told to come back."""
        if not self._thread.is_alive():
            return
        self._forget()
        self._server.should_exit = True
        self._thread.join(30)


def serve_in_thread(
    coordinator: Coordinator,
    listen: str = "127.0.0.1:0",
    *,
    url: str | None = None,
    backlog: int = 2048,
    limits: Limits | None = None,
) -> ServerThread:
    """Serve a coordinator over TLS in a thread of its own. ``listen`` is HOST:PORT (port 0: any that is free).

    ``url`` is the public address that clients use, by default that of ``listen``; it is noted for ``hansa invite``,
    and its host is in the certificate. ``limits`` is what one connection may cost. Raises ``InputError`` when the port
    is in use or an address cannot be.
    """
    limits = limits or Limits()
    if url is not None and (urlsplit(url).scheme != "https" or not urlsplit(url).hostname):
        raise InputError(f"--url: expected https://HOST:PORT, found {url!r}")
    host, port = parse_listen(listen)
    listener = _bind(host, port, backlog)
    address = listener.getsockname()
    public = url or _public_url(host, address[1])
    coordinator.store.put("url", public.encode())
    bell = Bell(coordinator, most_held=limits.held)
    front = Front(make_app(coordinator, bell), bell)
    config = uvicorn.Config(
        front,
        loop="asyncio",
        ws="none",
        lifespan="off",
        log_config=None,
        log_level="error",  # what is no HTTP is counted
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=math.ceil(limits.idle_s),
        h11_max_incomplete_event_size=limits.header_bytes,
    )
    config.load()
    files = coordinator.authority.server_files(_hosts(host, public))
    context = server_context(*files, coordinator.authority.certificate)
    context.num_tickets = 0  # no client of ours resumes a session
    server = _Server(config, front, listener, context, limits)
    thread = threading.Thread(target=server.run, name="hansa-coordinator", daemon=True)
    coordinator.listeners.append(bell.ring)
    thread.start()
    if not server.ready.wait(30):
        raise RunError(f"coordinator: expected to listen on {listen} within 30 seconds, found that it did not start")
    return ServerThread(public, address[1], server, thread, lambda: coordinator.listeners.remove(bell.ring))


def parse_listen(listen: str) -> tuple[str, int]:
    """Host and port of HOST:PORT, [IPV6]:PORT or PORT.

    >>> parse_listen("[::1]:8443"), parse_listen("8443")
    (('::1', 8443), ('0.0.0.0', 8443))
    """
    host, _, port = listen.rpartition(":")
    if not (port.isascii() and port.isdigit()) or int(port) > 65535:
        raise InputError(f"--listen: expected HOST:PORT, found {listen!r}; write 0.0.0.0:8443, say")
    return host.strip("[]") or "0.0.0.0", int(port)


def _bind(host: str, port: int, backlog: int) -> socket.socket:
    """A listening socket."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=backlog)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise InputError(
                f"port {port}: expected a free port on {host}, found it in use; "
                f"stop the other program, or choose another with --listen {host}:{port + 1}"
            ) from error
        raise InputError(
            f"--listen {host}:{port}: expected an address of this machine, found {error.strerror or error}; "
            "write 0.0.0.0 to listen on all of them"
        ) from error


def _public_url(host: str, port: int) -> str:
    """What clients call when nothing else was said."""
    if host in _EVERYWHERE:
        host = socket.getfqdn()
    return f"https://[{host}]:{port}" if ":" in host else f"https://{host}:{port}"


def _hosts(host: str, url: str) -> list[str]:
    """Every name or address that a client may write for this server."""
    named = [] if host in _EVERYWHERE else [host]
    return list(dict.fromkeys([urlsplit(url).hostname or "localhost", *named, "localhost", "127.0.0.1", "::1"]))


__all__ = ["ServerThread", "parse_listen", "serve_in_thread"]
