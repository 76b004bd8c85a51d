import contextlib
import socket
import threading
import time

import pytest

from faults.proxy import At, FaultProxy, Faults

pytestmark = pytest.mark.network


@pytest.fixture
def echo():
    """A server that sends everything back; gives its port."""
    listener, ends = socket.create_server(("127.0.0.1", 0)), []

    def answer(one):
        with one:
            try:
                while piece := one.recv(65536):
                    one.sendall(piece)
            except OSError:
                pass

    def accept():
        while True:
            try:
                one, _ = listener.accept()
            except OSError:
                return
            ends.append(threading.Thread(target=answer, args=(one,)))
            ends[-1].start()

    thread = threading.Thread(target=accept)
    thread.start()
    yield listener.getsockname()[1]
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    thread.join(10)
    for end in ends:
        end.join(10)


def say(port, body, size=None):
    """What comes back of ``body`` (until ``size`` bytes, the end or a reset), and after how many seconds."""
    began, found = time.monotonic(), b""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as line:
        sending = threading.Thread(target=send, args=(line, body))
        sending.start()
        try:
            while len(found) < (len(body) if size is None else size) and (piece := line.recv(65536)):
                found += piece
        except ConnectionError:
            pass
        seconds = time.monotonic() - began
        line.close()
        sending.join(10)
    return found, seconds


def send(line, body):
    """All of it, or as much as the other end takes."""
    with contextlib.suppress(OSError):
        line.sendall(body)


def test_without_faults_every_byte_arrives(echo):
    body = bytes(range(256)) * 4000
    with FaultProxy(echo) as proxy:
        assert say(proxy.port, body)[0] == body
        assert (proxy.counts["up"], proxy.counts["down"]) == (len(body), len(body))


def test_latency_delays_each_way(echo):
    with FaultProxy(echo, Faults(latency_s=0.1)) as proxy:
        found, seconds = say(proxy.port, b"hello")
    assert found == b"hello"
    assert 0.2 <= seconds < 2


def test_a_throttled_line_passes_so_many_bytes_a_second(echo):
    with FaultProxy(echo, Faults(bytes_per_s=40_000)) as proxy:
        found, seconds = say(proxy.port, b"x" * 8000)
    assert len(found) == 8000
    assert 0.2 <= seconds < 2


@pytest.mark.parametrize("way", ["up", "down"])
def test_a_cut_comes_after_exactly_so_many_bytes_of_each_connection(echo, way):
    with FaultProxy(echo, Faults(cut=At(way=way, after=1000))) as proxy:
        for _ in range(2):
            assert len(say(proxy.port, b"x" * 5000)[0]) <= 1000
        assert proxy.counts["cut"] == 2
        assert proxy.counts[way] == 2000


def test_a_cut_may_come_once(echo):
    with FaultProxy(echo, Faults(cut=At(way="down", after=3, times=1))) as proxy:
        assert say(proxy.port, b"hello")[0] == b"hel"
        assert say(proxy.port, b"hello")[0] == b"hello"


def test_one_byte_is_corrupted(echo):
    with FaultProxy(echo, Faults(corrupt=At(way="up", after=2, times=1))) as proxy:
        assert say(proxy.port, b"abcd")[0] == b"abbd"
        assert say(proxy.port, b"abcd")[0] == b"abcd"


def test_a_refused_connection_gives_nothing_until_the_line_heals(echo):
    with FaultProxy(echo, Faults(refuse=True)) as proxy:
        assert say(proxy.port, b"hello")[0] == b""
        proxy.set(Faults())
        assert say(proxy.port, b"hello")[0] == b"hello"


@pytest.mark.parametrize("silent", [("up",), ("down",), ("up", "down")])
def test_a_silent_line_holds_what_it_is_given_and_passes_it_on_when_it_heals(echo, silent):
    with FaultProxy(echo, Faults(silent=silent)) as proxy:
        healing = threading.Timer(0.2, proxy.set, (Faults(),))
        healing.start()
        found, seconds = say(proxy.port, b"hello")
        healing.join()
    assert found == b"hello"
    assert seconds >= 0.15


def test_every_connection_can_be_cut_at_once(echo):
    with FaultProxy(echo, Faults(silent=("down",))) as proxy:
        cutting = threading.Timer(0.2, proxy.cut)
        cutting.start()
        assert say(proxy.port, b"hello")[0] == b""
        cutting.join()


def test_a_server_that_is_away_ends_the_connection():
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    with FaultProxy(port) as proxy:
        assert say(proxy.port, b"hello")[0] == b""
