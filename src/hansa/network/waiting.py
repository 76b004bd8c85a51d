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

import sqlalchemy as sa
from starlette.concurrency import run_in_threadpool

from hansa.network.coordinator import Coordinator
from hansa.network.messages import Work, release_mark
from hansa.network.pace import CALLS_PER_S, hold_s, pace_s
from hansa.network.store import assignments, clients, presence, reports, settlements, slots

_LOOK_EVERY_S = 1.0
_RING_EVERY_S = 0.1
_WRITE_EVERY_S = 10.0

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
    num_clients: int = 0

    def concerns(self, name: str, acknowledged: int, released: str) -> bool:
        """Whether there may be something for a client that knows settlements and releases up to these."""
        return (
            name in self.asked
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
        .where(slots.c.run == run, slots.c.state == "collecting", reports.c.client.is_(None))
        .group_by(assignments.c.client)
    )
    new = (
        sa.select(settlements.c.client, sa.func.max(settlements.c.number).label("number"))
        .where(settlements.c.run == run, settlements.c.number > before.newest)
        .group_by(settlements.c.client)
    )
    here = sa.select(sa.func.count()).select_from(presence)
    here = here.where(presence.c.run == run, presence.c.said_goodbye.is_(False))
    with coordinator.store.read() as db:
        asked = {row.client: int(row.number) for row in db.execute(unanswered)}
        moved = {row.client: int(row.number) for row in db.execute(new)}
        revoked = frozenset(db.scalars(sa.select(clients.c.name).where(clients.c.revoked_at.is_not(None))))
        num_clients = int(db.scalar(here) or 0)
    return News(
        asked=asked,
        settled={**before.settled, **moved} if moved else before.settled,
        newest=max([before.newest, *moved.values()]),
        released="" if released is None else release_mark(released),
        finished=coordinator.finished,
        revoked=revoked,
        num_clients=num_clients,
    )


class Bell:
    """Holds questions for work until there is an answer, and rings those alone that it may be there for.

    ``ring`` may be called from any thread; all else runs in the thread of the event loop. Rings are spread, so that
    those woken call at most ``calls_per_s`` times a second.
    """

    def __init__(self, coordinator: Coordinator, calls_per_s: float = CALLS_PER_S) -> None:
        self.coordinator, self.calls_per_s, self.closing = coordinator, calls_per_s, False
        self.news = News()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._is_watching = False
        self._stirred = asyncio.Event()
        self._waiting: dict[str, asyncio.Future[None]] = {}
        self._known: set[str] = set()  # clients that the database has seen in this run
        self._queue: deque[str] = deque()
        self._is_ringing = False

    @property
    def pace_s(self) -> float:
        """Seconds from one question of a client to its next."""
        return pace_s(self.news.num_clients, self.calls_per_s)

    def ring(self) -> None:
        """Something happened: look who it is for. From any thread."""
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop has just been closed
                self._loop.call_soon_threadsafe(self._stirred.set)

    async def watch(self) -> None:
        """Read the news whenever something happened, and ring; until cancelled."""
        self._loop = loop = asyncio.get_running_loop()
        written = loop.time()
        while True:
            self._stirred.clear()
            try:
                before, self.news = self.news, await run_in_threadpool(read_news, self.coordinator, self.news)
                self._is_watching = True
                self._wake(self.news.woken_since(before, self._waiting))
                if loop.time() - written > _WRITE_EVERY_S:
                    written = loop.time()
                    await run_in_threadpool(self.coordinator.registry.write_seen)
            except Exception as error:  # a database that is locked or full: questions wait, and the next look may work
                self._is_watching = False
                log.warning("news could not be read: %s", error)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stirred.wait(), _LOOK_EVERY_S)

    async def next_work(self, name: str, acknowledged: int, released: str, wait_s: float) -> Work:
        """A client's next work, waiting for it a while. A second question of one client ends the waiting of its first.

        Raises ``Refusal`` for a client that is not in the run, or that was revoked meanwhile.
        """
        loop = asyncio.get_running_loop()
        end = loop.time() + hold_s(wait_s, self.pace_s)
        while True:
            rung = self._enter(name)  # before the look, so that what happens after it is not missed
            try:
                message = await self._look(name, acknowledged, released)
                left = end - loop.time()
                if message.says_something or left <= 0 or self.closing:
                    break
                timer = loop.call_later(left, _set, rung)
                await rung
                timer.cancel()
                if self._waiting.get(name) is not rung:  # another question of this client waits in its place
                    break
            finally:
                if self._waiting.get(name) is rung:
                    del self._waiting[name]
            if not self._is_watching or name in self.news.revoked:
                await run_in_threadpool(self.coordinator.registry.check_revoked, name)
        return dataclasses.replace(message, retry_after_s=self.pace_s)

    def end(self) -> None:
        """Answer all that wait."""
        self.closing = True
        for rung in self._waiting.values():
            _set(rung)

    async def _look(self, name: str, acknowledged: int, released: str) -> Work:
        """What the database has for a client, if it may have anything."""
        if self._is_watching and name in self._known and not self.news.concerns(name, acknowledged, released):
            return Work(run=self.coordinator.run)
        found = await run_in_threadpool(self.coordinator.work, name, acknowledged=acknowledged, released=released)
        self._known.add(name)
        return found

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


def _set(rung: asyncio.Future[None]) -> None:
    if not rung.done():
        rung.set_result(None)


__all__ = ["Bell", "News", "read_news"]
