"""A client of the protocol without a participant behind it: one TLS connection, one request at a time, on asyncio.

Every request of the benchmark goes through ``Caller.ask``, which signs it.
"""

import asyncio
import hashlib
import json
import ssl
import time
from asyncio import sslproto
from urllib.parse import urlencode

from hansa.network.identity import client_context, fingerprint
from hansa.network.signing import Signer

sslproto.SSLProtocol.max_size = 16 * 1024  # asyncio's 256 KiB a connection would be most of this process


class Refused(Exception):
    """An answer that is not a success."""

    def __init__(self, status, headers, body):
        super().__init__(f"{status} {body[:200]!r}")
        self.status, self.headers, self.body = status, headers, body

    @property
    def json(self):
        try:
            return json.loads(self.body)
        except ValueError:
            return {}

    @property
    def code(self):
        return self.json.get("code", "")

    @property
    def after_s(self):
        found = self.headers.get("retry-after")
        return None if found is None else float(found)


class _Answers(asyncio.Protocol):
    """Reads one answer at a time: status, headers and a body of known length."""

    def __init__(self):
        self.buffer, self.waiter, self.head, self.missing = bytearray(), None, None, 0
        self.transport, self.lost = None, False

    def connection_made(self, transport):
        self.transport = transport

    def connection_lost(self, exc):
        self.lost = True
        if self.waiter and not self.waiter.done():
            self.waiter.set_exception(ConnectionResetError("closed"))

    def data_received(self, data):
        self.buffer += data
        if self.head is None:
            end = self.buffer.find(b"\r\n\r\n")
            if end < 0:
                return
            lines = bytes(self.buffer[:end]).decode("latin-1").split("\r\n")
            del self.buffer[: end + 4]
            headers = {k.lower(): v.strip() for k, _, v in (line.partition(":") for line in lines[1:])}
            self.head, self.missing = (int(lines[0].split()[1]), headers), int(headers.get("content-length", 0))
        if len(self.buffer) >= self.missing and self.waiter and not self.waiter.done():
            (status, headers), self.head = self.head, None
            body = bytes(self.buffer[: self.missing])
            del self.buffer[: self.missing]
            self.waiter.set_result((status, headers, body))


class Caller:
    """One client, with a file of its key and certificate; without one a stranger."""

    def __init__(self, port, authority, name="", pem=None):
        self.port, self.name, self.signer = port, name, None
        self.context = client_context(authority, pem, pem) if pem else client_context(authority)
        if pem:
            key, begin, certificate = pem.read_bytes().partition(b"-----BEGIN CERTIFICATE-----")
            self.signer = Signer(key, fingerprint(begin + certificate))
        self.answers = None
        self.times = []  # of requests answered at once: (when, seconds)

    async def connect(self, sock=None):
        """Open the connection, unless it is open; ``sock`` is a socket that is connected already."""
        if self.answers is None or self.answers.lost:
            where = {"sock": sock} if sock else {"host": "127.0.0.1", "port": self.port}
            loop = asyncio.get_running_loop()
            _, self.answers = await loop.create_connection(
                _Answers, **where, ssl=self.context, server_hostname="127.0.0.1"
            )

    async def ask(self, method, path, body=b"", query=None, timeout_s=90.0):
        """The body of a request's answer; sent again once when the server tells the time.

        Raises ``Refused``, ``OSError`` or ``TimeoutError``.
        """
        try:
            return await self._ask(method, path, body, query, timeout_s)
        except Refused as refused:
            if self.signer is None or refused.status != 401 or not self.signer.learn(refused.json):
                raise
            return await self._ask(method, path, body, query, timeout_s)

    async def _ask(self, method, path, body, query, timeout_s):
        target = f"{path}?{urlencode(query)}" if query else path
        signed = {}
        if self.signer is not None:
            digest = hashlib.sha256(body).digest() if body else None
            signed = self.signer.headers(method, target.encode(), digest=digest)
        began = time.perf_counter()
        async with asyncio.timeout(timeout_s):
            await self.connect()
            head = f"{method} {target} HTTP/1.1\r\nHost: 127.0.0.1:{self.port}\r\n"
            if method in ("POST", "PUT"):
                head += f"Content-Length: {len(body)}\r\n"
            head += "".join(f"{name}: {value}\r\n" for name, value in signed.items())
            self.answers.waiter = asyncio.get_running_loop().create_future()
            self.answers.transport.write(head.encode() + b"\r\n" + body)
            status, headers, found = await self.answers.waiter
        if headers.get("connection") == "close":
            self.close()
        self.times.append((began, time.perf_counter() - began))
        if status >= 300:
            raise Refused(status, headers, found)
        return found

    def close(self):
        """Close the connection."""
        if self.answers is not None and self.answers.transport is not None:
            self.answers.transport.abort()
        self.answers = None


LOST = (OSError, TimeoutError, ssl.SSLError, asyncio.IncompleteReadError)
