"""What a coordinator answers over HTTP: a thin binding of requests to ``Coordinator``.

Sizes are known before a body is read, no body is logged, and an error is ``{"error": sentence, "code": code}``. Idle
clients wait in one request and cost no thread (``front.py``).
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from sqlalchemy.exc import OperationalError
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, StreamingResponse

from hansa.core.errors import HansaError
from hansa.network import gate
from hansa.network.blobs import SMALL, at_hand, cut
from hansa.network.checker import RENEW, Checker
from hansa.network.coordinator import Coordinator
from hansa.network.failpoints import fail_point
from hansa.network.front import work_response
from hansa.network.gate import Gate
from hansa.network.messages import Receipt, Refusal, read_enrol, read_hello, read_renew, slot_of, write
from hansa.network.quotas import Quotas
from hansa.network.ranges import Part, asked_part, read_length, uploaded_part
from hansa.network.registry import Caller
from hansa.network.uploads import Growing, Sent, Uploads, WrongOffset
from hansa.network.waiting import Bell

_SMALL_BODY = 64 * 1024
_TOGETHER, _TOGETHER_S = 2**16, 1.0  # bytes of a body, and seconds, after which they are written
_BINARY = "application/octet-stream"
_PATIENCE, _PATIENCE_S = 20, 0.01  # how often, and how long, a request waits for an older one for the same report


def make_app(coordinator: Coordinator, bell: Bell | None = None) -> FastAPI:
    """The routes of a coordinator."""
    app, desk = FastAPI(openapi_url=None, redirect_slashes=False), _Desk(coordinator, bell or Bell(coordinator))
    app.add_middleware(Gate, checker=Checker(coordinator.registry), quotas=Quotas())
    for kind in (HansaError, HTTPException, RequestValidationError):
        app.add_exception_handler(kind, _refused)
    for trouble in (OperationalError, OSError):
        app.add_exception_handler(trouble, lambda request, error: _trouble(request, error, desk.bell.pace_s))
    app.add_exception_handler(ClientDisconnect, _gone)
    _add_enrolment(app, desk)
    _add_work(app, desk)
    _add_vectors(app, desk)
    _add_reports(app, desk)
    return app


@dataclass(frozen=True)
class _Desk:
    """What every route needs. ``counting`` is held while a long report is looked through, so that it is but one."""

    coordinator: Coordinator
    bell: Bell
    counting: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def who(self, request: Request) -> Caller:
        """The client that asks."""
        caller: Caller = request.state.caller  # set by the gate, which lets nobody else in
        return caller

    def answer(self, body: bytes, kind: str) -> Response:
        """A body, counted."""
        self.coordinator.count(kind, "down", len(body))
        return Response(body, media_type=_BINARY)


def _add_enrolment(app: FastAPI, desk: _Desk) -> None:
    """Becoming a client."""

    @app.get("/v1/authority")
    async def authority() -> Response:
        return Response(desk.coordinator.authority.certificate, media_type="application/x-pem-file")

    @app.post("/v1/enrol")
    async def enrol(request: Request) -> Response:
        body = await _body(request, _SMALL_BODY)
        address = request.client.host if request.client else ""
        enrolled = await run_in_threadpool(desk.coordinator.enrol, read_enrol(body), address=address)
        desk.coordinator.count("certificate request", "up", len(body))
        return desk.answer(write(enrolled), "certificate")

    @app.post(RENEW)
    async def renew(request: Request) -> Response:
        name, coordinator = await desk.who(request), desk.coordinator
        body = await _body(request, _SMALL_BODY)
        enrolled = await run_in_threadpool(coordinator.registry.renew, name, read_renew(body), coordinator.authority)
        coordinator.count("certificate request", "up", len(body))
        return desk.answer(write(enrolled), "certificate")


def _add_work(app: FastAPI, desk: _Desk) -> None:
    """Taking part: hello, what to do next, goodbye."""
    coordinator = desk.coordinator

    @app.post("/v1/hello")
    async def hello(request: Request) -> Response:
        name = await desk.who(request)
        body = await _body(request, _SMALL_BODY)
        welcome = await run_in_threadpool(coordinator.hello, name, read_hello(body))
        coordinator.count("hello", "up", len(body))
        return desk.answer(write(welcome), "welcome")

    @app.get("/v1/work")
    async def work(request: Request, acknowledged: int = 0, released: str = "", wait: float = 0.0) -> Response:
        name = await desk.who(request)
        message, question = await desk.bell.now(name, max(0, min(acknowledged, 2**62)), released[:64], wait)
        if not message.says_something and wait > 0 and getattr(request.state, "may_hold", False):
            request.state.question = question
            return Response(status_code=204)
        return work_response(desk.bell, name, message)

    @app.post("/v1/goodbye")
    async def goodbye(request: Request) -> Response:
        await run_in_threadpool(coordinator.goodbye, await desk.who(request))
        return Response(status_code=204)


def _add_vectors(app: FastAPI, desk: _Desk) -> None:
    """Downloads: a vector by its SHA-256, whole or from some byte on."""
    coordinator = desk.coordinator

    @app.get("/v1/blobs/{sha256}")
    async def blob(request: Request, sha256: str) -> Response:
        name, tag = await desk.who(request), f'"{sha256}"'
        path, size = await run_in_threadpool(coordinator.vector, sha256)
        asked = request.headers.get("range") if request.headers.get("if-range", tag) == tag else None
        part = asked_part(asked, size)
        if part.first == 0:
            coordinator.count_vector(name, sha256, size)
        headers = {
            "ETag": tag,
            "Accept-Ranges": "bytes",
            "Cache-Control": "private, immutable, max-age=31536000",
            "Content-Length": str(part.stop - part.first),
        }
        if not part.is_whole:
            headers["Content-Range"] = part.content_range
        return StreamingResponse(_read(path, part), 200 if part.is_whole else 206, headers, media_type=_BINARY)


def _add_reports(app: FastAPI, desk: _Desk) -> None:
    """Uploads: a report by its SHA-256, whole or in parts, each from where the last one ended."""
    path = "/v1/reports/{run}/{slot}/{sha256}"
    coordinator = desk.coordinator

    @app.put(path)
    async def put(request: Request, run: str, slot: str, sha256: str) -> Response:
        sent = Sent(await desk.who(request), slot_of(slot), sha256)
        part = uploaded_part(_length(request), request.headers.get("content-range"))
        found: Receipt | int | None = await run_in_threadpool(coordinator.expect, run, sent, part.total)
        if found is None:
            found = await _receive(desk, request, run, sent, part)
        elif part.stop - part.first <= SMALL:
            await _body(request, SMALL)  # else the connection could not be used again
        if isinstance(found, int):
            return _offset(found, 202)
        fail_point("coordinator.receipt.ready")
        return desk.answer(write(found), "receipt")

    @app.get(path)
    async def get(request: Request, run: str, slot: str, sha256: str) -> Response:
        sent = Sent(await desk.who(request), slot_of(slot), sha256)
        found = await run_in_threadpool(coordinator.expect, run, sent)
        if found is None:
            return _offset(await run_in_threadpool(coordinator.uploads.size, sent), 200)
        return desk.answer(write(found), "receipt")


async def _receive(desk: _Desk, request: Request, run: str, sent: Sent, part: Part) -> Receipt | int:
    """Take in a part of a report: its receipt when it is complete, else how many of its bytes are there.

    What arrived is kept, also when the line is cut in the middle.
    """
    coordinator, uploads = desk.coordinator, desk.coordinator.uploads
    if part.is_whole and part.total <= SMALL and not await run_in_threadpool(uploads.size, sent):
        return await _receive_small(desk, request, sent, part)
    if part.stop == part.first:
        size = await _final_size(uploads, sent)
    else:
        file = await run_in_threadpool(uploads.open, sent, part)
        with file:
            try:
                await _write(file, request)
            except ClientDisconnect:
                if file.size < part.total:
                    raise
        size = file.size
    if size != part.total:
        return size
    with uploads.claimed(sent):
        if await run_in_threadpool(uploads.hash, sent) not in ("", sent.sha256):
            await run_in_threadpool(uploads.forget, sent)
            raise _wrong_bytes(sent)
        fail_point("coordinator.upload.whole")
        async with desk.counting:
            return await run_in_threadpool(coordinator.uploaded, run, sent, part.total)


async def _write(file: Growing, request: Request) -> None:
    """Write a body as it arrives, to the last byte before a cut: some pieces together, as each write costs a turn."""
    held, since, now = bytearray(), 0.0, asyncio.get_running_loop().time
    try:
        async for piece in _pieces(request):
            since = since if held else now()
            held += piece
            if len(held) >= _TOGETHER or now() - since > _TOGETHER_S:
                await run_in_threadpool(file.write, bytes(held))
                held.clear()
    finally:
        if held:
            await run_in_threadpool(file.write, bytes(held))


async def _final_size(uploads: Uploads, sent: Sent) -> int:
    """How many bytes of a report are there, once what came over a line that was cut is written."""
    for _ in range(_PATIENCE):
        if not uploads.is_open(sent):
            break
        await asyncio.sleep(_PATIENCE_S)
    return await run_in_threadpool(uploads.close, sent)


async def _receive_small(desk: _Desk, request: Request, sent: Sent, part: Part) -> Receipt:
    """Take in a whole report in memory; only what a cut line leaves of it is written down."""
    body = bytearray()
    try:
        async for piece in _pieces(request):
            body += piece
    except ClientDisconnect:
        if len(body) < part.total:
            with await run_in_threadpool(desk.coordinator.uploads.open, sent, part) as file:
                await run_in_threadpool(file.write, bytes(body))
            raise
    if hashlib.sha256(body).hexdigest() != sent.sha256:
        raise _wrong_bytes(sent)
    return await run_in_threadpool(desk.coordinator.report, sent.client, sent.slot, bytes(body))


def _wrong_bytes(sent: Sent) -> Refusal:
    """Why a report is not kept."""
    text = f"report: expected bytes with SHA-256 {sent.sha256[:16]}..., found others; send it once more"
    return Refusal("digest", text)


async def _read(path: Path, part: Part) -> AsyncIterator[bytes]:
    """A part of a file, piece by piece; only what has to come from the disk costs a turn in a thread."""
    with path.open("rb", buffering=0) as file:
        for first, stop in cut(part.first, part.stop):
            while first < stop:
                piece = at_hand(file, first, stop - first)
                if piece is None:
                    file.seek(first)
                    piece = await run_in_threadpool(file.read, stop - first)
                if not piece:  # it was cut short on the disk: the receiver misses the rest
                    return
                yield piece
                first += len(piece)


async def _pieces(request: Request) -> AsyncIterator[bytes]:
    """A body as it arrives, to the last byte before a cut (``ClientDisconnect``)."""
    try:
        async for piece in request.stream():
            if piece:
                yield piece
    except ClientDisconnect:
        rest = getattr(request.state, "unread", bytes)()
        if rest:
            yield rest
        raise


async def _body(request: Request, largest: int) -> bytes:
    """A body of at most ``largest`` bytes; what is declared larger is not read at all."""
    declared, body = _length(request), bytearray()
    if declared > largest:
        raise Refusal("too-large", f"expected a body of at most {largest} bytes, found {declared}")
    async for piece in request.stream():
        body += piece
    return bytes(body)


def _length(request: Request) -> int:
    """The length that a body is declared to have, which the server's HTTP holds it to."""
    return read_length(request.headers.get("content-length"), request.headers.get("transfer-encoding"))


def _offset(size: int, status: int) -> Response:
    """How far an upload is."""
    return JSONResponse({"offset": size}, status, {"Upload-Offset": str(size)})


def _refused(request: Request, error: Exception) -> Response:
    """An error in the one form that every refusal has."""
    found = gate.answer(_refusal(error), request.scope)
    if isinstance(error, WrongOffset):
        found.headers["Upload-Offset"] = str(error.offset)
    return found


def _refusal(error: Exception) -> HansaError:
    """What an error says to a client."""
    if isinstance(error, HansaError):
        return error
    status = getattr(error, "status_code", 400)
    if status in (404, 405):
        code = "not-found" if status == 404 else "method"
        return Refusal(code, "expected a method and path of the protocol, found none such")
    return Refusal("malformed", "expected a request of the protocol's form, found another")


def _trouble(request: Request, error: Exception, pace_s: float) -> Response:
    """A full disk and a database that another process keeps are the coordinator's trouble; other errors stay errors."""
    found = gate.trouble(error, pace_s)
    if not isinstance(found, Refusal):
        raise error
    return _refused(request, found)


def _gone(_request: Request, _error: Exception) -> Response:
    """Nobody is there to be answered."""
    return Response(status_code=400)
