"""The coordinator over HTTPS: a server thread, its sockets and its TLS."""

from __future__ import annotations

import asyncio
import errno
import socket
import threading
from collections.abc import Callable
from urllib.parse import urlsplit

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from hansa.core.errors import InputError, RunError
from hansa.network.coordinator import Coordinator
from hansa.network.identity import server_context
from hansa.network.routes import Bell, make_app

_LAST_ANSWERS_S = 3.0
_EVERYWHERE = ("0.0.0.0", "::", "")


class _PeerProtocol(H11Protocol):
    """HTTP/1.1 that tells the app which certificate the client showed, and what arrived before a line was cut."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's own
        super().connection_made(transport)
        tls = transport.get_extra_info("ssl_object")
        certificate = tls.getpeercert(binary_form=True) if tls else None
        self.app_state = {**self.app_state, "certificate": certificate, "unread": self._unread}

    def _unread(self) -> bytes:
        """What arrived of a body and nobody has read: uvicorn tells of a cut line before it hands out the rest."""
        rest, self.cycle.body = bytes(self.cycle.body), bytearray()
        return rest


class _Server(uvicorn.Server):
    """Says when it has started."""

    def __init__(self, config: uvicorn.Config, bell: Bell) -> None:
        super().__init__(config)
        self.bell, self.ready = bell, threading.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Open the sockets, then say so."""
        self.bell.loop = asyncio.get_running_loop()
        await super().startup(sockets)
        self.ready.set()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Accept no more, let requests be answered, then cut every line without waiting for the other end."""
        for server in self.servers:
            server.close()
        if self.server_state.tasks:
            await asyncio.wait(set(self.server_state.tasks), timeout=_LAST_ANSWERS_S)
        for transport in list(getattr(self.bell.loop, "_transports", {}).values()):  # those in a handshake too
            transport.abort()
        await super().shutdown(sockets)


class ServerThread:
    """A coordinator that is being served. ``url`` is what clients call; ``close`` ends it."""

    def __init__(
        self, url: str, port: int, server: _Server, thread: threading.Thread, forget: Callable[[], None]
    ) -> None:
        self.url, self.port = url, port
        self._server, self._thread, self._forget = server, thread, forget

    def close(self) -> None:
        """Answer what waits, then stop listening."""
        self._forget()
        self._server.bell.closing = True
        self._server.bell.ring()
        self._server.should_exit = True
        self._thread.join(30)


def serve_in_thread(
    coordinator: Coordinator, listen: str = "127.0.0.1:0", *, url: str | None = None, backlog: int = 2048
) -> ServerThread:
    """Serve a coordinator over TLS in a thread of its own. ``listen`` is HOST:PORT (port 0: any that is free).

    ``url`` is the public address that clients use, by default that of ``listen``; it is noted for ``hansa invite``,
    and its host is in the certificate. Raises ``InputError`` when the port is in use or an address cannot be.
    """
    if url is not None and (urlsplit(url).scheme != "https" or not urlsplit(url).hostname):
        raise InputError(f"--url: expected https://HOST:PORT, found {url!r}")
    host, port = parse_listen(listen)
    listener = _bind(host, port, backlog)
    address = listener.getsockname()
    public = url or _public_url(host, address[1])
    coordinator.store.put("url", public.encode())
    bell = Bell()
    files = coordinator.authority.server_files(_hosts(host, public))
    config = uvicorn.Config(
        make_app(coordinator, bell),
        http=_PeerProtocol,
        loop="asyncio",
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=75,
        timeout_graceful_shutdown=1,
    )
    config.load()
    config.ssl = server_context(*files, coordinator.authority.certificate)
    server = _Server(config, bell)
    thread = threading.Thread(target=server.run, args=([listener],), name="hansa-coordinator", daemon=True)
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
        listener = socket.create_server((host, port), family=family, backlog=backlog)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # asyncio leaves it out of such sockets
        return listener
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
