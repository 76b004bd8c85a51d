"""The gate before every route: who asks, by a signature; how often they may; and whether a body is the one signed.

Only the authority's certificate and enrolment are open. Everything else, routes that do not exist too, needs a request
signed with the key of an enrolled client's certificate; the connection, where it shows a certificate, must show that.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial

from sqlalchemy.exc import OperationalError
from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hansa.core.errors import HansaError
from hansa.network.blobs import SMALL
from hansa.network.checker import RENEW, Checker
from hansa.network.messages import CODES, PROTOCOL, Refusal
from hansa.network.pace import retry_after
from hansa.network.quotas import Quotas
from hansa.network.registry import Caller
from hansa.network.room import is_full
from hansa.network.signing import Claim
from hansa.network.store import is_busy
from hansa.version import __version__

_OPEN = {("GET", "/v1/authority"), ("POST", "/v1/enrol")}
_BUSY_S = 2.0
_LOG = logging.getLogger("hansa")
_LOOK_AGAIN_S = 1.0  # at the registry, while a body arrives
_DRAINED = 2 * 2**20  # a body up to this size is read to its end before its client is asked to sign again


@dataclass
class Gate:
    """The middleware. Who asks is in ``request.state.caller`` for the routes behind it."""

    app: ASGIApp
    checker: Checker
    quotas: Quotas

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request: passed on, or answered here if it is refused."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            await self._pass(scope, receive, send)
        except Refusal as refusal:
            if refusal.code in ("clock", "replay"):
                await _drain(scope, receive)
            await answer(refusal, scope)(scope, receive, send)

    async def _pass(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on. ``Refusal`` only before anything was answered."""
        size, address = _framing(scope), _address(scope)
        der = scope.get("state", {}).get("certificate")
        shown = None if der is None else hashlib.sha256(der).hexdigest()
        if (scope["method"], scope["path"]) in _OPEN:
            self.quotas.stranger(address)
            await self._pass_stranger(scope, receive, send, address)
            return
        if shown is not None:
            self.quotas.request(shown)
        caller, claim = await self._check(scope, shown, address)
        if shown is None:
            self.quotas.request(claim.keyid)
        if scope["path"] == RENEW:
            self.quotas.renewal(caller)
        with self.quotas.under_way(caller, size):
            scope["state"] = {**scope.get("state", {}), "caller": caller}
            await self.app(scope, _Body(receive, claim, self._looker(caller), self._noter(caller, scope)), send)

    async def _check(self, scope: Scope, shown: str | None, address: str) -> tuple[Caller, Claim]:
        """Who asks; what nobody signed is counted by address. Only what has to be written costs a turn in a thread."""
        writes: list[Callable[[], None]] = []
        try:
            try:
                return self.checker.check(scope, shown, writes.append)
            finally:
                for write in writes:
                    await run_in_threadpool(write)
        except (OSError, OperationalError) as error:
            raise trouble(error) from error
        except Refusal as refusal:
            if refusal.code in ("unauthenticated", "signature"):
                self.quotas.stranger(address)
                if shown is not None and not any(name.lower() == b"signature" for name, _ in scope["headers"]):
                    raise _older() from refusal
            raise

    async def _pass_stranger(self, scope: Scope, receive: Receive, send: Send, address: str) -> None:
        """An open route; tokens that are refused are counted by address."""
        enrols = scope["method"] == "POST"
        if enrols:
            self.quotas.may_enrol(address)

        async def count(message: Message) -> None:
            if enrols and message["type"] == "http.response.start" and message["status"] >= 400:
                self.quotas.guessed(address)
            await send(message)

        await self.app(scope, receive, count)

    def _looker(self, caller: Caller) -> Callable[[], None]:
        """Refuses a client that has been revoked meanwhile."""
        return partial(self.checker.registry.check_revoked, caller)

    def _noter(self, caller: Caller, scope: Scope) -> Callable[[], Awaitable[None]]:
        """Notes a body that is not the one signed."""
        return partial(run_in_threadpool, self.checker.note, caller, "a body that was not signed", scope)


class _Body:
    """A body as it arrives: its client may be revoked on the way, and at its end it must be the one signed."""

    def __init__(
        self,
        receive: Receive,
        claim: Claim,
        look: Callable[[], None],
        note: Callable[[], Awaitable[None]],
    ) -> None:
        self._receive, self._expected, self._look, self._note = receive, claim.digest, look, note
        self._found, self._looked_at = hashlib.sha256(), asyncio.get_running_loop().time()

    async def __call__(self) -> Message:
        """The next piece. The last one is handed on only if all of them are what was signed."""
        message = await self._receive()
        if message["type"] != "http.request":
            return message
        now = asyncio.get_running_loop().time()
        if now - self._looked_at > _LOOK_AGAIN_S:
            self._looked_at = now
            self._look()
        if self._expected is not None:
            self._found.update(message.get("body", b""))
            if not message.get("more_body", False) and self._found.digest() != self._expected:
                await self._note()
                raise Refusal("signature", "body: expected the one whose digest was signed, found another")
        return message


def answer(error: HansaError, scope: Scope) -> Response:
    """An error as JSON with a fitting status: always a sentence and a code, and for some what the client needs.

    The line is cut where a long body would have to be read first.
    """
    code = error.code if isinstance(error, Refusal) else "malformed"
    more = error.more if isinstance(error, Refusal) else {}
    headers = {"Retry-After": str(more["retry_after_s"])} if "retry_after_s" in more else {}
    lengths = [value for name, value in scope["headers"] if name.lower() == b"content-length"]
    chunked = any(name.lower() == b"transfer-encoding" for name, _ in scope["headers"])
    if chunked or len(lengths) > 1 or any(not re.fullmatch(rb"[0-9]{1,18}", v) or int(v) > SMALL for v in lengths):
        headers["Connection"] = "close"
    return JSONResponse({"error": str(error), "code": code, **more}, status_code=CODES[code], headers=headers)


def trouble(error: Exception, pace_s: float = 0.0) -> Exception:
    """What a client is told when the coordinator's disk is full or its database is kept by another process.

    Nothing was kept, and the client comes again. Another error is given back as it is.
    """
    if is_full(error):
        _LOG.error("the coordinator's disk is full: %s; free some space, clients try again", error)
        return Refusal("no-space", "coordinator: expected room on its disk, found it full; try again later")
    if is_busy(error):
        later = int(retry_after(max(_BUSY_S, pace_s)))
        return Refusal(
            "busy", "the coordinator's database is in use by another process; try again", retry_after_s=later
        )
    return error


def _framing(scope: Scope) -> int:
    """The length that a body announces; ``Refusal`` for two lengths, or one and chunks: proxies read them apart."""
    lengths = [value for name, value in scope["headers"] if name.lower() == b"content-length"]
    chunked = any(name.lower() == b"transfer-encoding" for name, _ in scope["headers"])
    if len(lengths) + chunked > 1 or not all(re.fullmatch(rb"[0-9]{1,18}", value) for value in lengths):
        raise Refusal("malformed", "body: expected one Content-Length, found several, another form, or chunks too")
    return int(lengths[0]) if lengths else 0


def _address(scope: Scope) -> str:
    """Where a request comes from."""
    return str((scope.get("client") or ("", 0))[0])


def _older() -> Refusal:
    """What a client of an older protocol is told."""
    return Refusal(
        "protocol",
        f"expected a request signed as protocol {PROTOCOL} has it (hansa {__version__}), found none; "
        "install the coordinator's version of hansa",
    )


async def _drain(scope: Scope, receive: Receive) -> None:
    """Read a small body to its end, so that the connection can be used again and the answer is not cut off."""
    if _framing(scope) > _DRAINED:
        return
    while True:
        message = await receive()
        if message["type"] != "http.request" or not message.get("more_body", False):
            return
