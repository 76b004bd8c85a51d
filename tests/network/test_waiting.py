import asyncio
import threading
import time
from contextlib import contextmanager

import numpy as np
import pytest
import sqlalchemy as sa

from hansa.core.key import Key
from hansa.core.protocols import Slot
from hansa.core.round import Context, begin, make_plan
from hansa.network.coordinator import Coordinator
from hansa.network.messages import PROTOCOL, Hello, Refusal
from hansa.network.registry import Registry
from hansa.network.runtime import NetworkRuntime
from hansa.network.store import Store, clients
from hansa.network.waiting import Bell, News, read_news

NAMES = tuple(f"c{number:02}" for number in range(30))
ASKED = NAMES[:2]


@pytest.fixture
def desk(tmp_path, tools):
    made = Coordinator(Store(tmp_path), tools.federation(), tools.app)
    rows = [{"name": n, "certificate_sha256": n, "certificate": b"", "key_hash": "", "enrolled_at": 0.0} for n in NAMES]
    with made.store.write() as db:
        db.execute(clients.insert(), rows)
    for name in NAMES:
        made.hello(name, Hello(protocol=PROTOCOL, version="0", fingerprints=(tools.app,)))
    yield made
    made.close()


def open_slot(desk):
    parts = desk.federation.task("train")
    state = begin(parts, np.zeros(4, np.float32))
    plan = make_plan(parts, state, Context(Key.of(1)), ASKED, Slot(0, 0, "update"))
    NetworkRuntime(desk).start(plan, ASKED)


@contextmanager
def queries(desk):
    """What was asked of the database meanwhile."""
    found, note = [], lambda _c, _cursor, statement, *_: found.append(statement)
    sa.event.listen(desk.store.engine, "before_cursor_execute", note)
    yield found
    sa.event.remove(desk.store.engine, "before_cursor_execute", note)


@contextmanager
def looks(desk):
    """Who the database was asked for."""
    found, work = [], desk.work
    desk.work = lambda name, **more: (found.append(name), work(name, **more))[1]
    yield found
    desk.work = work


def run(desk, scenario, calls_per_s=1000.0):
    """Let a scenario happen beside a bell that watches."""

    async def all_of_it():
        bell = Bell(desk, calls_per_s)
        desk.listeners.append(bell.ring)
        watching = asyncio.create_task(bell.watch())
        while not bell.news.num_clients:
            await asyncio.sleep(0.01)
        try:
            return await asyncio.wait_for(scenario(bell), 20)
        finally:
            watching.cancel()
            desk.listeners.remove(bell.ring)

    return asyncio.run(all_of_it())


async def ask(bell, *question):
    """As the coordinator's routes do."""
    work, asked = await bell.now(*question)
    return work if work.says_something or not question[-1] else await bell.hold(asked)


async def everyone_waits(bell):
    """A question of each client, none of which has an answer yet."""
    for name in NAMES:
        await ask(bell, name, 0, "", 0.0)
    asked = [asyncio.create_task(ask(bell, name, 0, "", 50.0)) for name in NAMES]
    await until_waiting(bell, len(NAMES))
    return asked


async def until_waiting(bell, number):
    while len(bell._waiting) < number:
        await asyncio.sleep(0.01)


def test_a_plan_wakes_those_alone_that_it_is_for(desk):
    async def scenario(bell):
        asked = await everyone_waits(bell)
        with looks(desk) as looked:
            await asyncio.to_thread(open_slot, desk)
            done, waiting = await asyncio.wait(asked, return_when=asyncio.FIRST_COMPLETED)
            while len(done) < len(ASKED):
                more, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                done |= more
        bell.end()
        await asyncio.gather(*asked)
        assert all(task.result().plan is not None for task in done)
        assert sorted(looked) == sorted(ASKED)

    run(desk, scenario)


def test_questions_that_have_no_answer_ask_the_database_nothing(desk):
    async def scenario(bell):
        for name in NAMES:
            await ask(bell, name, 0, "", 0.0)
        with queries(desk) as found:
            for name in NAMES:
                await ask(bell, name, 0, "", 0.0)
        assert len(found) < len(NAMES)  # what the watch reads meanwhile

    run(desk, scenario)


def test_a_release_wakes_everyone_and_no_more_a_second_than_may_call(desk):
    async def scenario(bell):
        asked = await everyone_waits(bell)
        began = time.monotonic()
        await asyncio.to_thread(desk.release, 0, {"params": b"model"})
        found = await asyncio.gather(*asked)
        assert all(work.released.round == 0 for work in found)
        assert time.monotonic() - began > 0.9 * (len(NAMES) / 100 - 0.1)  # some are rung at once

    run(desk, scenario, calls_per_s=100.0)


def test_a_client_revoked_by_another_process_is_told_so_while_it_waits(desk):
    async def scenario(bell):
        asked = asyncio.create_task(ask(bell, "c05", 0, "", 50.0))
        await until_waiting(bell, 1)
        other = Store(desk.store.folder)
        await asyncio.to_thread(Registry(other).revoke, "c05")
        other.close()
        with pytest.raises(Refusal, match="revoked"):
            await asked

    run(desk, scenario)


def test_a_second_question_of_a_client_ends_its_first(desk):
    async def scenario(bell):
        first = asyncio.create_task(ask(bell, "c05", 0, "", 50.0))
        await until_waiting(bell, 1)
        second = asyncio.create_task(ask(bell, "c05", 0, "", 50.0))
        assert not (await first).says_something
        assert len(bell._waiting) == 1
        bell.end()
        await second
        assert not bell._waiting

    run(desk, scenario)


def test_a_client_that_is_not_in_the_run_is_told_to_say_hello(desk):
    async def scenario(bell):
        with pytest.raises(Refusal, match="say hello"):
            await ask(bell, "stranger", 0, "", 50.0)
        assert not bell._waiting

    run(desk, scenario)


def test_every_answer_tells_the_pace_of_all_clients(desk):
    async def scenario(bell):
        return await ask(bell, "c05", 0, "", 0.0)

    assert run(desk, scenario, calls_per_s=10.0).retry_after_s == len(NAMES) / 10


def test_news_that_are_read_on_are_the_news_that_are_read_anew(desk):
    open_slot(desk)
    before = read_news(desk, News())
    desk.rounds.settle(Slot(0, 0, ""), ASKED)
    desk.release(0, {"params": b"model"})
    on = read_news(desk, before)
    assert on == read_news(desk, News())
    assert set(before.asked) == set(ASKED)
    assert not on.asked
    assert set(on.woken_since(before, NAMES)) == set(NAMES)
    assert all(on.concerns(name, 0, on.released) for name in ASKED)
    assert not on.concerns("c05", 0, on.released)


def test_the_watch_survives_a_database_that_fails(desk, monkeypatch):
    async def scenario(bell):
        failed = threading.Event()

        def fail(*_):
            failed.set()
            raise sa.exc.OperationalError("locked", None, Exception())

        with monkeypatch.context() as broken:
            broken.setattr("hansa.network.waiting.read_news", fail)
            bell.ring()
            await asyncio.to_thread(failed.wait, 10)
        asked = asyncio.create_task(ask(bell, ASKED[0], 0, "", 50.0))
        await asyncio.to_thread(open_slot, desk)
        return await asked

    assert run(desk, scenario).plan is not None
