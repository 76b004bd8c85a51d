"""Requests as they go over the wire, on TLS lines of one's own, and the answers to them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import socket
import ssl
from collections.abc import Mapping
from typing import Any, NamedTuple

from faults.sites import Site
from hansa.network import identity
from hansa.network.enrolment import Identity
from hansa.network.signing import Signer


def dial(site: Site, who: Identity | ssl.SSLContext | None = None, *, port: int | None = None) -> ssl.SSLSocket:
    """A TLS connection of a client, or of somebody without a certificate."""
    if who is None:
        who = identity.client_context(site.coordinator.authority.certificate)
    context = who.context() if isinstance(who, Identity) else who
    raw = socket.create_connection(("127.0.0.1", port or site.server.port), timeout=10)
    try:
        return context.wrap_socket(raw, server_hostname="127.0.0.1")
    except BaseException:
        raw.close()
        raise


def compose(method: str, target: str, body: bytes = b"", headers: Mapping[str, str] | None = None) -> bytes:
    """A request as it goes over the wire; a length is said unless ``headers`` say something of it."""
    said = {"Host": "x", **(headers or {})}
    if body and not {"Content-Length", "Transfer-Encoding"} & set(said):
        said["Content-Length"] = str(len(body))
    lines = "".join(f"{name}: {value}\r\n" for name, value in said.items())
    return f"{method} {target} HTTP/1.1\r\n{lines}\r\n".encode() + body


class Heard(NamedTuple):
    """An answer as it came."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


def hear(line: ssl.SSLSocket) -> Heard:
    """The next answer on a line, read to its end."""
    got = b""
    while b"\r\n\r\n" not in got:
        piece = line.recv(65536)
        assert piece, f"the line ended after {got[:200]!r}"
        got += piece
    head, _, body = got.partition(b"\r\n\r\n")
    first, *rest = head.decode().split("\r\n")
    headers = {name.lower(): value for name, _, value in (one.partition(": ") for one in rest)}
    while len(body) < int(headers.get("content-length", 0)):
        piece = line.recv(65536)
        assert piece, f"the line ended after {got[:200]!r}"
        body += piece
    return Heard(int(first.split()[1]), headers, body)


def once(site: Site, request: bytes, who: Identity | ssl.SSLContext | None = None) -> Heard:
    """One request on a line of its own."""
    with contextlib.closing(dial(site, who)) as line:
        line.sendall(request)
        return hear(line)


def in_step(site: Site, who: Identity) -> Signer:
    """What signs a client's requests, once the server has told it the time."""
    signer = who.signer()
    assert signer.learn(once(site, compose("GET", "/v1/work", headers=signer.headers("GET", b"/v1/work")), who).json)
    return signer


def sign(signer: Signer, method: str, target: str, body: bytes = b"") -> dict[str, str]:
    """The headers that sign a request."""
    return signer.headers(method, target.encode(), digest=hashlib.sha256(body).digest() if body else None)
