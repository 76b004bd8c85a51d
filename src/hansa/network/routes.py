"""What a coordinator answers over HTTP: a thin binding of requests to ``Coordinator``.

Sizes are known before a body is read, no body is logged, and an error is ``{"error": sentence, "code": code}``. Idle
clients wait in one request for up to 20 seconds and cost no thread.
"""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass, field

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from sqlalchemy.exc import OperationalError
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.responses import FileResponse, JSONResponse

from hansa.core.errors import HansaError
from hansa.network import gate
from hansa.network.checker import RENEW, Checker
from hansa.network.coordinator import Coordinator
from hansa.network.failpoints import fail_point
from hansa.network.gate import Gate
from hansa.network.messages import Refusal, Work, read_enrol, read_hello, read_renew, slot_of, write
from hansa.network.quotas import Quotas
from hansa.network.registry import Caller
from hansa.network.store import is_busy

LONGEST_WAIT_S = 20.0
_SMALL_BODY = 64 * 1024
_BINARY = "application/octet-stream"


@dataclass
class Bell:
    """Wakes every request that waits: each waits for the event that was there when it looked last."""

    loop: asyncio.AbstractEventLoop | None = None
    event: asyncio.Event = field(default_factory=asyncio.Event)
    closing: bool = False

    def ring(self) -> None:
        """From any thread."""
        if self.loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop has just been closed
                self.loop.call_soon_threadsafe(self._ring)

    def _ring(self) -> None:
        self.event.set()
        self.event = asyncio.Event()


def make_app(coordinator: Coordinator, bell: Bell | None = None) -> FastAPI:
    """The routes of a coordinator."""
    bell = bell or Bell()
    app = FastAPI(openapi_url=None)
    app.add_middleware(Gate, checker=Checker(coordinator.registry), quotas=Quotas())
    for kind in (HansaError, HTTPException, RequestValidationError):
        app.add_exception_handler(kind, _refused)
    app.add_exception_handler(OperationalError, _busy)

    async def who(request: Request) -> Caller:
        caller: Caller = request.state.caller  # set by the gate, which lets nobody else in
        return caller

    def answer(body: bytes, kind: str) -> Response:
        coordinator.count(kind, "down", len(body))
        return Response(body, media_type=_BINARY)

    @app.get("/v1/authority")
    async def authority() -> Response:
        return Response(coordinator.authority.certificate, media_type="application/x-pem-file")

    @app.post("/v1/enrol")
    async def enrol(request: Request) -> Response:
        body = await _body(request, _SMALL_BODY)
        address = request.client.host if request.client else ""
        enrolled = await run_in_threadpool(coordinator.enrol, read_enrol(body), address=address)
        coordinator.count("certificate request", "up", len(body))
        return answer(write(enrolled), "certificate")

    @app.post(RENEW)
    async def renew(request: Request) -> Response:
        name = await who(request)
        body = await _body(request, _SMALL_BODY)
        enrolled = await run_in_threadpool(coordinator.registry.renew, name, read_renew(body), coordinator.authority)
        coordinator.count("certificate request", "up", len(body))
        return answer(write(enrolled), "certificate")

    @app.post("/v1/hello")
    async def hello(request: Request) -> Response:
        name = await who(request)
        body = await _body(request, _SMALL_BODY)
        welcome = await run_in_threadpool(coordinator.hello, name, read_hello(body))
        coordinator.count("hello", "up", len(body))
        return answer(write(welcome), "welcome")

    @app.get("/v1/work")
    async def work(request: Request, acknowledged: int = 0, released: str = "", wait: float = 0.0) -> Response:
        name = await who(request)
        message = await _next_work(coordinator, bell, name, max(0, min(acknowledged, 2**62)), released[:64], wait)
        body = write(message)
        coordinator.count_work(name, message, len(body))
        return Response(body, media_type=_BINARY)

    @app.get("/v1/blobs/{sha256}")
    async def blob(request: Request, sha256: str) -> Response:
        name = await who(request)
        path = await run_in_threadpool(coordinator.vector, name, sha256)
        headers = {"ETag": f'"{sha256}"', "Cache-Control": "private, immutable, max-age=31536000"}
        return FileResponse(path, media_type=_BINARY, headers=headers)

    @app.put("/v1/reports/{run}/{slot}")
    async def report(request: Request, run: str, slot: str) -> Response:
        name = await who(request)
        if run != coordinator.run:
            raise Refusal("not-asked", "report: expected one for the run that is on, found another run; ask for work")
        where = slot_of(slot)
        largest = await run_in_threadpool(coordinator.largest_report, name, where)
        body = await _body(request, largest)
        receipt = await run_in_threadpool(coordinator.report, name, where, body)
        fail_point("coordinator.receipt.ready")
        return answer(write(receipt), "receipt")

    @app.post("/v1/goodbye")
    async def goodbye(request: Request) -> Response:
        await run_in_threadpool(coordinator.goodbye, await who(request))
        return Response(status_code=204)

    return app


async def _next_work(
    coordinator: Coordinator, bell: Bell, name: str, acknowledged: int, released: str, wait: float
) -> Work:
    """A client's next work, waiting for it a while."""
    loop = asyncio.get_running_loop()
    end = loop.time() + (min(wait, LONGEST_WAIT_S) if wait > 0 else 0.0)
    while True:
        rung = bell.event  # taken before the look, so that what happens after it is not missed
        message = await run_in_threadpool(coordinator.work, name, acknowledged=acknowledged, released=released)
        left = end - loop.time()
        if message.says_something or left <= 0 or bell.closing:
            return message
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(rung.wait(), left)
        await run_in_threadpool(coordinator.registry.check_revoked, name)


async def _body(request: Request, largest: int) -> bytes:
    """A body of at most ``largest`` bytes; what is declared larger is not read at all."""
    declared = request.headers.get("content-length", "")
    if not declared.isdigit():
        raise Refusal("length-required", "expected a body with its length in Content-Length, found none")
    if int(declared) > largest:
        raise Refusal("too-large", f"expected a body of at most {largest} bytes, found {int(declared)}")
    pieces, size = [], 0
    async for piece in request.stream():
        pieces.append(piece)
        size += len(piece)
    if size != int(declared):
        raise Refusal("malformed", f"expected a body of {declared} bytes, found {size}")
    return b"".join(pieces)


def _refused(_request: Request, error: Exception) -> Response:
    """An error in the one form that every refusal has."""
    if isinstance(error, HansaError):
        return gate.answer(error)
    status = getattr(error, "status_code", 400)
    if status in (404, 405):
        code = "not-found" if status == 404 else "method"
        return gate.answer(Refusal(code, "expected a method and path of the protocol, found none such"))
    return gate.answer(Refusal("malformed", "expected a request of the protocol's form, found another"))


def _busy(_request: Request, error: Exception) -> Response:
    """Another process keeps the database to itself: nothing was kept, and a client comes again."""
    if not is_busy(error):
        raise error
    said = {"error": "the coordinator's database is in use by another process; try again", "code": "busy"}
    return JSONResponse(said, status_code=503, headers={"Retry-After": "2"})
