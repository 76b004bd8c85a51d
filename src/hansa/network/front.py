"""In front of the app: small requests enter a few at a time, and questions for work wait outside."""

from __future__ import annotations

import asyncio

from fastapi import FastAPI, Response
from starlette.requests import ClientDisconnect
from starlette.types import Message, Receive, Scope, Send

from hansa.core.errors import HansaError
from hansa.network import gate
from hansa.network.messages import Work, write
from hansa.network.waiting import Bell, Question

_LONG = ("/v1/blobs/", "/v1/reports/")
_LONGEST_BODY = 64 * 1024
_AT_ONCE = 32  # requests within the app, beside long ones
_MOST_QUEUED = 64
_LONGEST_PAUSE_S = 1.0


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

        async def send_later(message: Message) -> None:
            if message.get("status") == 429:  # who asks too often waits, which costs us nothing
                await asyncio.sleep(_LONGEST_PAUSE_S)
            await send(message)

        try:
            if scope["path"].startswith(_LONG) or not _is_small(scope):
                await self.app(scope, receive, send_later)
            else:
                await self._let_in(scope, receive, send_later)
        except ClientDisconnect:  # the other end is gone, and nobody is left to answer
            pass
        except asyncio.CancelledError:  # it took too long for a server that closes
            if not self.bell.closing:
                raise

    async def _let_in(self, scope: Scope, receive: Receive, send: Send) -> None:
        """A small request, when its body is here and there is room."""
        received = await _read(scope, receive)
        self._num_queued += 1
        async with self._room:
            self._num_queued -= 1
            said, question = await self._ask(scope, received)
        if question is None:
            for message in said:
                await send(message)
            return
        needed = {name: scope[name] for name in ("type", "method", "headers")}
        scope.clear()  # it is full of what the app needed
        scope.update(needed)
        del said
        response = self._later(question) if self.bell.is_full else await self._answer(question, scope)
        await response(scope, receive, send)

    async def _ask(self, scope: Scope, receive: Receive) -> tuple[list[Message], Question | None]:
        """What the app answers, and its question if it is one that may be held."""
        said: list[Message] = []

        async def keep(message: Message) -> None:
            said.append(message)

        scope["state"] = {**scope.get("state", {}), "may_hold": True}
        await self.app(scope, receive, keep)
        return said, scope["state"].get("question")

    async def _answer(self, question: Question, scope: Scope) -> Response:
        try:
            return work_response(self.bell, question.name, await self.bell.hold(question))
        except Exception as error:
            told = gate.trouble(error, self.bell.pace_s)
            if not isinstance(told, HansaError):
                raise
            return gate.answer(told, scope)

    def _later(self, question: Question) -> Response:
        """Come back at the pace; a connection is not kept open for so long."""
        response = work_response(self.bell, question.name, self.bell.nothing())
        response.headers["Connection"] = "close"
        return response


def work_response(bell: Bell, name: str, message: Work) -> Response:
    """A client's next work, counted."""
    body = write(message)
    bell.coordinator.count_work(name, message, len(body))
    return Response(body, media_type="application/octet-stream")


def _length(scope: Scope) -> bytes:
    """What is said of a body's length; ``?`` where it is said in another way than once."""
    found = [value for name, value in scope["headers"] if name.lower() in (b"content-length", b"transfer-encoding")]
    return b"0" if not found else found[0] if len(found) == 1 else b"?"


def _is_small(scope: Scope) -> bool:
    """Whether a body is one that the app reads to its end; others it refuses."""
    said = _length(scope)
    return said.isdigit() and len(said) < 10 and int(said) <= _LONGEST_BODY


async def _read(scope: Scope, receive: Receive) -> Receive:
    """``receive`` for a body that has arrived."""
    if not int(_length(scope)):
        return receive
    read = [await receive()]
    while read[-1].get("more_body"):
        read.append(await receive())

    async def again() -> Message:
        return read.pop(0) if read else await receive()

    return again


__all__ = ["Front", "work_response"]
