"""What a coordinator answers over HTTP: a thin binding of requests to ``Coordinator``.

Sizes are known before a body is read, no body is logged, and an error is ``{"error": sentence, "code": code}``. Idle
clients wait in one request and cost no thread (``waiting.py``).
"""

from __future__ import annotations

import asyncio

from fastapi import FastAPI, Request, Response
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect
from starlette.responses import FileResponse, JSONResponse
from starlette.types import Message, Receive, Scope, Send

from hansa.core.errors import HansaError
from hansa.network.coordinator import Coordinator
from hansa.network.messages import CODES, Refusal, Work, read_enrol, read_hello, slot_of, write
from hansa.network.pace import retry_after
from hansa.network.waiting import Bell, Question

_SMALL_BODY = 64 * 1024
_BINARY = "application/octet-stream"
_LONG = ("/v1/blobs/", "/v1/reports/")
_AT_ONCE = 32  # requests within the app, beside vectors and reports
_MOST_QUEUED = 64


def make_app(coordinator: Coordinator, bell: Bell | None = None) -> FastAPI:
    """The routes of a coordinator."""
    bell = bell or Bell(coordinator)
    app = FastAPI(openapi_url=None)
    app.add_exception_handler(HansaError, lambda _request, error: _refused(error, bell))

    async def who(request: Request) -> str:
        der = getattr(request.state, "certificate", None)
        return await run_in_threadpool(coordinator.authenticate, der)

    def answer(body: bytes, kind: str) -> Response:
        coordinator.count(kind, "down", len(body))
        return Response(body, media_type=_BINARY)

    @app.get("/v1/authority")
    async def authority() -> Response:
        return Response(coordinator.authority.certificate, media_type="application/x-pem-file")

    @app.post("/v1/enrol")
    async def enrol(request: Request) -> Response:
        body = await _body(request, _SMALL_BODY)
        enrolled = await run_in_threadpool(coordinator.enrol, read_enrol(body))
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
        message, question = await bell.now(name, min(acknowledged, 2**62), released[:64], wait)
        if not message.says_something and wait > 0 and getattr(request.state, "may_hold", False):
            request.state.question = question
            return Response(status_code=204)
        return _work(coordinator, name, message)

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
        return answer(write(receipt), "receipt")

    @app.post("/v1/goodbye")
    async def goodbye(request: Request) -> Response:
        await run_in_threadpool(coordinator.goodbye, await who(request))
        return Response(status_code=204)

    return app


class Front:
    """The app of ``make_app``, entered by few requests at a time, with questions that have no answer yet held outside.

    A request within the app costs ten times the memory of one that waits to enter, so a crowd waits here: until its
    bodies have arrived (a slow one keeps nobody out), and then its turn. Vectors and reports do not: they take as long
    as their lines need.
    """

    def __init__(self, app: FastAPI, bell: Bell) -> None:
        self.app, self.bell, self._room, self._num_queued = app, bell, asyncio.Semaphore(_AT_ONCE), 0

    @property
    def is_busy(self) -> bool:
        """Whether so many requests wait to enter that it is better to let in no more connections."""
        return self._num_queued > _MOST_QUEUED

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        try:
            await self._let_in(scope, receive, send)
        except ClientDisconnect:  # the other end is gone, and nobody is left to answer
            pass
        except asyncio.CancelledError:  # it took too long for a server that closes
            if not self.bell.closing:
                raise

    async def _let_in(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"].startswith(_LONG):
            return await self.app(scope, receive, send)
        received = await _small_body(scope, receive)
        self._num_queued += 1
        async with self._room:
            self._num_queued -= 1
            question = await self._ask(scope, received, send)
        if question is None:
            return
        needed = {name: scope[name] for name in ("type", "method", "headers")}
        scope.clear()
        scope.update(needed)
        response = self._later(question) if self.bell.is_full else await self._answer(question)
        await response(scope, receive, send)

    async def _ask(self, scope: Scope, receive: Receive, send: Send) -> Question | None:
        """Let the app answer, unless it has nothing to say: then the question."""
        answer: list[Message] = []

        async def keep(message: Message) -> None:
            answer.append(message)

        scope["state"]["may_hold"] = True
        await self.app(scope, receive, keep)
        question: Question | None = scope["state"].pop("question", None)
        if question is None:
            for message in answer:
                await send(message)
        return question

    def _later(self, question: Question) -> Response:
        """Come back at the pace; a connection is not kept open for so long."""
        response = _work(self.bell.coordinator, question.name, self.bell.nothing())
        response.headers["Connection"] = "close"
        return response

    async def _answer(self, question: Question) -> Response:
        try:
            message = await self.bell.hold(question)
        except HansaError as error:
            return _refused(error, self.bell)
        return _work(self.bell.coordinator, question.name, message)


async def _small_body(scope: Scope, receive: Receive) -> Receive:
    """``receive`` again, with the body read already if it is one that the app would read."""
    declared = dict(scope["headers"]).get(b"content-length", b"0")
    if not declared.isdigit() or not 0 < int(declared) <= _SMALL_BODY:
        return receive
    read = [await receive()]
    while read[-1].get("more_body"):
        read.append(await receive())

    async def again() -> Message:
        return read.pop(0) if read else await receive()

    return again


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


def _work(coordinator: Coordinator, name: str, message: Work) -> Response:
    """A client's next work."""
    body = write(message)
    coordinator.count_work(name, message, len(body))
    return Response(body, media_type=_BINARY)


def _refused(error: Exception, bell: Bell) -> Response:
    """An error as JSON with a fitting status; one that will pass says when to come back."""
    code = error.code if isinstance(error, Refusal) else "malformed"
    status = CODES[code]
    later = {"Retry-After": retry_after(bell.pace_s)} if status in (429, 503) else None
    return JSONResponse({"error": str(error), "code": code}, status_code=status, headers=later)
