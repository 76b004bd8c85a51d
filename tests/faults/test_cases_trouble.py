"""Cases of a database that is busy, a network that is cut in two, and many rounds in which participants die.

Numbers are those of the table of forty fault and abuse cases; each case ends with the global checkers.
"""

import contextlib
import random
import sqlite3
import threading

import httpx2 as httpx
import numpy as np
import pytest

from faults import checkers
from faults.proxy import FaultProxy, Faults
from faults.sites import Rounds, Site, make_federation, move, rows
from hansa.network import store as store_module
from hansa.network.identity import make_request
from hansa.network.messages import Enrol, write
from hansa.network.runtime import NetworkRuntime

pytestmark = pytest.mark.network


class Killed(BaseException):
    """A participant that ends in the middle of something."""


def test_case_19_a_database_that_is_locked_for_a_while_loses_no_report(tmp_path, monkeypatch):
    monkeypatch.setattr(store_module, "_BUSY_S", 0.05)
    site = Site(tmp_path, make_federation())
    answers = []
    try:
        data = {"berlin": rows(1), "paris": rows(2)}
        for name, pair in data.items():
            site.join(name, pair)
        runtime = NetworkRuntime(site.coordinator)
        runtime.wait_for_clients(2, timeout_s=30)
        rounds = Rounds(site.federation, runtime, data)
        rounds.run(0)
        done, token = threading.Event(), site.invite("rome")
        wish = Enrol(token=token.id, secret=token.secret, name="rome", request=make_request("rome")[1])

        def lock():
            """Somebody's backup, again and again, longer than any request waits."""
            for _ in range(3):
                done.wait(0.3)
                with contextlib.closing(sqlite3.connect(tmp_path / "server" / "coordinator.db", timeout=30)) as other:
                    other.isolation_level = None
                    other.execute("BEGIN EXCLUSIVE")
                    answers.append(httpx.post(f"{site.url}/v1/enrol", content=write(wish), verify=False))
                    done.wait(0.3)
                    other.execute("ROLLBACK")

        nemesis = threading.Thread(target=lock)
        nemesis.start()
        found = rounds.run(1, 2)
        done.set()
        nemesis.join(30)
        assert not site.problems
        quiet = Rounds(site.federation, NetworkRuntime(site.coordinator), data)
        assert found.tobytes() == quiet.run(0, 1, 2).tobytes()  # a replay of what was committed
    finally:
        site.end()
    assert {answer.status_code for answer in answers} == {503}
    assert {answer.headers["Retry-After"] for answer in answers} <= {"2", "3"}
    checkers.is_sound(tmp_path / "server" / "coordinator.db")
    checkers.counted_once(tmp_path / "server" / "coordinator.db")


def test_case_24_a_round_closes_without_who_is_cut_off_and_all_are_back_when_the_line_heals(site):
    names, receipts = ("a", "b", "c", "d"), []

    def hear(what, more):
        if what == "receipt":
            receipts.append((more["round"], more["status"]))

    with FaultProxy(site.server.port) as one, FaultProxy(site.server.port) as other:
        for number, name in enumerate(names):
            if name in "cd":
                move(site, name, one if name == "c" else other)
            site.join(name, rows(number), on_event=hear)
        runtime = NetworkRuntime(site.coordinator, deadline_s=30, min_clients=2)
        runtime.wait_for_clients(4, timeout_s=30)
        rounds = Rounds(site.federation, runtime, names)
        rounds.run(0)
        assert rounds.mean.clients == names
        one.set(Faults(silent=("up", "down")))
        other.set(Faults(silent=("down",)))  # what it asks arrives, what it is told does not
        runtime.deadline_s = 1.0
        rounds.run(1)
        assert rounds.mean.clients == ("a", "b")
        one.set(Faults())
        other.set(Faults())
        runtime.deadline_s = 30
        rounds.run(2)
        assert rounds.mean.clients == names
        runtime.finish()
        for thread in site.threads:
            thread.join(30)
    assert sorted(receipts).count((1, "accepted")) == 2
    assert not site.problems


def test_case_34_many_rounds_with_deaths_leave_nothing_behind(site):
    names, draw = tuple(f"c{i}" for i in range(6)), random.Random(7)
    stops = {}

    def hear(name):
        def listen(what, more):
            if what == "plan" and draw.random() < 0.1:
                raise Killed

        return listen

    def again():
        """Whoever died joins again."""
        for name in names:
            if name not in stops or not stops[name].is_alive():
                site.problems.pop(name, None)
                stops[name] = site.join(name, rows(names.index(name)), on_event=hear(name))

    again()
    runtime = NetworkRuntime(site.coordinator, on_wait=lambda *_: again())
    runtime.wait_for_clients(len(names), timeout_s=30)
    rounds, used = Rounds(site.federation, runtime, names), []
    for number in range(40):
        rounds.run(number)
        runtime.release(number, rounds.state.algorithm["params"], {})
        assert rounds.mean.clients == names
        if number >= 10:
            used.append((checkers.rss_mb(), len(checkers.open_files())))
    slope = np.polyfit(range(len(used)), [memory for memory, _ in used], 1)[0]
    assert slope < 0.25, f"{slope:.3f} MB a round"
    runtime.finish(wait_s=0.0)
