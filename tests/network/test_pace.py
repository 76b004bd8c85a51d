import math
import random
import threading
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hansa.network.calls import Unreachable
from hansa.network.client import Connection
from hansa.network.messages import Work, write
from hansa.network.pace import CALLS_PER_S, LONGEST_WAIT_S, Patient, hold_s, pace_s, retry_after


@given(st.integers(1, 10**6), st.floats(0.1, 1000.0))
def test_clients_that_keep_the_pace_call_no_more_often_than_was_asked(num_clients, calls_per_s):
    pace = pace_s(num_clients, calls_per_s)
    assert pace == 3600 or num_clients / pace == pytest.approx(calls_per_s)


@given(st.floats(0, 1e4), st.floats(0, 1e4))
def test_a_question_is_held_no_longer_than_the_client_waits_or_a_proxy_allows(wait_s, pace):
    assert 0 <= hold_s(wait_s, pace) <= min(wait_s, LONGEST_WAIT_S)


@given(st.floats(0, 3600))
def test_the_header_is_whole_seconds_around_the_pace(pace):
    assert max(1, math.floor(pace * 0.75)) <= int(retry_after(pace)) <= max(1, math.ceil(pace * 1.25))


def test_ten_thousand_clients_come_back_within_a_minute_and_in_no_second_many_more_than_in_others():
    draw = random.Random(0)
    clients = [Patient(uniform=draw.uniform) for _ in range(10_000)]
    for client in clients:
        client.hear(pace_s(10_000))
    delays = [client.until_retry() for client in clients]
    assert max(delays) < 60
    assert max(Counter(map(int, delays)).values()) < 1.5 * CALLS_PER_S


def test_clients_that_were_not_told_a_pace_back_off_from_soon_to_seldom():
    client = Patient(0.5, 30.0, uniform=lambda low, high: high)
    assert [client.until_retry() for _ in range(8)] == [0.5, 1, 2, 4, 8, 16, 30, 30]
    client.reached()
    assert client.until_retry() == 0.5


@given(st.floats(), st.floats(), st.floats(0, 1e9))
def test_whatever_a_server_tells_a_client_waits_for_a_finite_time(told, after, elapsed):
    client = Patient()
    client.hear(told)
    delays = [client.until_next(elapsed), client.until_retry(), client.until_retry(after)]
    assert all(0 <= delay <= 1.5 * 3600 for delay in delays)


class Line:
    """A line to no server: gives what it was filled with."""

    def __init__(self, *answers):
        self.answers, self.asked = list(answers), []

    def ask(self, method, path, **request):
        self.asked.append(path)
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


class Clock(threading.Event):
    """An event that is never set and notes for how long it was waited for."""

    def __init__(self):
        super().__init__()
        self.waited = []

    def wait(self, timeout=None):
        self.waited.append(timeout)
        return False


@pytest.fixture
def connection(site):
    made = site.connect("berlin", site.participant("berlin", None).store)
    made.stop = Clock()
    yield made
    made.close()
    made.store.close()


def fill(connection: Connection, *answers) -> Line:
    connection.close()
    connection._line = Line(*answers)
    connection._line.close = lambda: None
    return connection._line


@pytest.mark.network
def test_a_client_rests_for_the_pace_after_an_answer_that_says_nothing(connection):
    fill(connection, write(Work(run="r", retry_after_s=40.0)))
    connection.get_work()
    connection.rest()
    assert 0.7 * 40 < connection.stop.waited[-1] <= 1.25 * 40


@pytest.mark.network
def test_a_client_comes_back_when_the_answer_said_and_forgets_its_back_off_then(connection):
    later = Unreachable("the server answered 503")
    later.after_s = 7.0
    line = fill(connection, later, write(Work(run="r")))
    connection.get_work()
    assert line.asked == ["/v1/work", "/v1/work"]
    assert 7 <= connection.stop.waited[0] <= 1.5 * 7
