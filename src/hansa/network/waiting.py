"""Who waits for work, and who of them has a reason to look again.

Ten thousand clients may wait, so waking one must not wake all, and a question that has no answer must not ask the
database. What may be new for whom is kept in memory (``News``). It is read anew, in one go for everyone, when something
happened and once a second: so a change by another process is noticed too, and a call that someone forgot does no harm.
What a client is really told is read from the database for it alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa
from starlette.concurrency import run_in_threadpool

from hansa.network.coordinator import Coordinator
from hansa.network.limits import Limits
from hansa.network.messages import Work, release_mark
from hansa.network.pace import CALLS_PER_S, hold_s, pace_s
from hansa.network.store import assignments, clients, presence, reports, settlements, slots

_LOOK_EVERY_S = 1.0
_RING_EVERY_S = 0.1

log = logging.getLogger("hansa.network")


@dataclass(frozen=True, kw_only=True)
class News:
    """What may be new for whom, as the database had it at one moment."""

    asked: Mapping[str, int] = field(default_factory=dict)  # each client's newest plan that it has not answered
    settled: Mapping[str, int] = field(default_factory=dict)  # each client's newest settlement
    newest: int = 0  # of all settlements
    released: str = ""  # the mark of the newest release
    finished: bool = False
    revoked: frozenset[str] = frozenset()
    present: frozenset[str] = frozenset()  # clients that said hello in this run
    greetings: tuple[Any, ...] = ()  # what changes with ``present``
    num_clients: int = 0  # of those, the ones that did not say goodbye

    def concerns(self, name: str, acknowledged: int, released: str) -> bool:
        """Whether there may be something for a client that knows settlements and releases up to these."""
        return (
            name not in self.present
            or name in self.asked
            or self.settled.get(name, 0) > acknowledged
            or (self.released != "" and self.released != released)
            or self.finished
            or name in self.revoked
        )

    def woken_since(self, before: News, waiting: Iterable[str]) -> list[str]:
        """Who of those that wait has a reason to look again that it had not before; plans come first."""
        first = {name for name, number in self.asked.items() if number > before.asked.get(name, 0)}
        moved = set[str]()
        if self.newest > before.newest:
            moved.update(name for name, number in self.settled.items() if number > before.newest)
        if self.released != before.released or self.finished != before.finished:
            moved.update(waiting)
        moved |= self.revoked - before.revoked
        return [*first, *(moved - first)]


def read_news(coordinator: Coordinator, before: News) -> News:
    """The news of now. Settlements are read on from ``before``."""
    run, released = coordinator.run, coordinator.released
    unanswered = (
        sa.select(assignments.c.client, sa.func.max(assignments.c.slot_id).label("number"))
        .join(slots, slots.c.id == assignments.c.slot_id)
        .outerjoin(
            reports, sa.and_(reports.c.slot_id == assignments.c.slot_id, reports.c.client == assignments.c.client)
        )
        .where(
            slots.c.run == run,
            slots.c.state == "collecting",
            reports.c.client.is_(None),
            assignments.c.given_up.is_(False),
        )
        .group_by(assignments.c.client)
    )
    new = (
        sa.select(settlements.c.client, sa.func.max(settlements.c.number).label("number"))
        .where(settlements.c.run == run, settlements.c.number > before.newest)
        .group_by(settlements.c.client)
    )
    here = presence.c.run == run
    counted = sa.select(sa.func.count(), sa.func.max(presence.c.hello_at), sa.func.sum(presence.c.said_goodbye))
    with coordinator.store.read() as db:
        asked = {row.client: int(row.number) for row in db.execute(unanswered)}
        moved = {row.client: int(row.number) for row in db.execute(new)}
        revoked = frozenset(db.scalars(sa.select(clients.c.name).where(clients.c.revoked_at.is_not(None))))
        greetings = tuple(db.execute(counted.where(here)).one())
        is_same = greetings == before.greetings
        present = before.present if is_same else frozenset(db.scalars(sa.select(presence.c.client).where(here)))
    return News(
        asked=asked,
        settled={**before.settled, **moved} if moved else before.settled,
        newest=max([before.newest, *moved.values()]),
        released="" if released is None else release_mark(released),
        finished=coordinator.finished,
        revoked=revoked,
        present=present,
        greetings=greetings,
        num_clients=greetings[0] - int(greetings[2] or 0),
    )


@dataclass
class Question:
    """A client's question for work: what it knows, until when (the loop's time) it may be held, and the news it saw."""

    name: str
    acknowledged: int
    released: str
    until: float
    news: News


class Bell:
    """Holds questions for work until there is an answer, and rings those alone that it may be there for.

    ``ring`` may be called from any thread; all else runs in the thread of the event loop. Rings are spread, so that
    those woken call at most ``calls_per_s`` times a second.
    """

    def __init__(
        self, coordinator: Coordinator, calls_per_s: float = CALLS_PER_S, most_held: int = Limits().held
    ) -> None:
        self.coordinator, self.calls_per_s, self.most_held, self.closing = coordinator, calls_per_s, most_held, False
        self.news = News()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._is_watching = False
        self._stirred: asyncio.Event | None = None
        self._waiting: dict[str, asyncio.Future[None]] = {}
        self._queue: deque[str] = deque()
        self._is_ringing = False

    @property
    def pace_s(self) -> float:
        """Seconds from one question of a client to its next."""
        return pace_s(self.news.num_clients, self.calls_per_s)

    @property
    def is_full(self) -> bool:
        """Whether as many questions are held as may be."""
        return len(self._waiting) >= self.most_held

    def ring(self) -> None:
        """Something happened: look who it is for. From any thread."""
        if self._loop is not None and self._stirred is not None:
            with contextlib.suppress(RuntimeError):  # the loop has just been closed
                self._loop.call_soon_threadsafe(self._stirred.set)

    async def watch(self) -> None:
        """Read the news whenever something happened, and ring; until cancelled."""
        self._loop, self._stirred = asyncio.get_running_loop(), asyncio.Event()
        while True:
            self._stirred.clear()
            try:
                before, self.news = self.news, await run_in_threadpool(read_news, self.coordinator, self.news)
                self._is_watching = True
                self._wake(self.news.woken_since(before, self._waiting))
            except Exception as error:  # a database that is locked or full: questions wait, and the next look may work
                self._is_watching = False
                log.warning("news could not be read: %s", error)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stirred.wait(), _LOOK_EVERY_S)

    async def now(self, name: str, acknowledged: int, released: str, wait_s: float) -> tuple[Work, Question]:
        """What there is for a client at once, and its question, which may be held when that is nothing.

        Raises ``Refusal`` for a client that is not in the run.
        """
        question = Question(name, acknowledged, released, _now() + hold_s(wait_s, self.pace_s), self.news)
        return await self._look(question), question

    async def hold(self, question: Question) -> Work:
        """What there is for a client as soon as there is something, or nothing at the end of its wait.

        A second question of one client ends the waiting of its first. Raises ``Refusal`` for a client that was revoked
        meanwhile.
        """
        loop = asyncio.get_running_loop()
        while not self.closing:
            if question.news is self.news or not self._concerns(question):
                rung = self._enter(question.name)
                timer = loop.call_at(question.until, _set, rung)
                try:
                    await rung
                finally:
                    timer.cancel()
                    is_last = self._waiting.get(question.name) is rung
                    if is_last:
                        del self._waiting[question.name]
                if not is_last or loop.time() >= question.until:
                    break
            if not self._is_watching or question.name in self.news.revoked:
                self.coordinator.registry.check_revoked(question.name)
            question.news = self.news
            message = await self._look(question)
            if message.says_something:
                return message
        return self.nothing()

    def end(self) -> None:
        """Answer all that wait."""
        self.closing = True
        for rung in self._waiting.values():
            _set(rung)

    async def _look(self, question: Question) -> Work:
        """What the database has for a client, if it may have anything."""
        if self._is_watching and not self._concerns(question):
            self.coordinator.hear(question.name)
            return self.nothing()
        found = await run_in_threadpool(
            self.coordinator.work, question.name, acknowledged=question.acknowledged, released=question.released
        )
        return dataclasses.replace(found, retry_after_s=self.pace_s)

    def _concerns(self, question: Question) -> bool:
        return self.news.concerns(question.name, question.acknowledged, question.released)

    def nothing(self) -> Work:
        """An answer that says nothing but the pace."""
        return Work(run=self.coordinator.run, retry_after_s=self.pace_s)

    def _enter(self, name: str) -> asyncio.Future[None]:
        """Wait as ``name``, in place of whoever did."""
        before = self._waiting.get(name)
        self._waiting[name] = asyncio.get_running_loop().create_future()
        if before is not None:
            _set(before)
        return self._waiting[name]

    def _wake(self, names: Iterable[str]) -> None:
        """Ring, a few at a time."""
        self._queue.extend(name for name in names if name in self._waiting)
        if self._queue and not self._is_ringing:
            self._ring_some()

    def _ring_some(self) -> None:
        for _ in range(min(len(self._queue), max(1, round(self.calls_per_s * _RING_EVERY_S)))):
            rung = self._waiting.get(self._queue.popleft())
            if rung is not None:
                _set(rung)
        self._is_ringing = bool(self._queue)
        if self._is_ringing:
            asyncio.get_running_loop().call_later(_RING_EVERY_S, self._ring_some)


def _now() -> float:
    return asyncio.get_running_loop().time()


def _set(rung: asyncio.Future[None]) -> None:
    if not rung.done():
        rung.set_result(None)


__all__ = ["Bell", "News", "Question", "read_news"]
