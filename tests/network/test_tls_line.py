"""Our TLS transport against OpenSSL's own blocking sockets."""

import asyncio
import hashlib
import random
import socket
import ssl
import threading
from contextlib import suppress
from functools import partial
from itertools import pairwise

import pytest

from hansa.network import identity
from hansa.network.tls import Tls, Turns

pytestmark = pytest.mark.network
SIZE, LARGE = 3_000_000, 30_000_000  # the system's own buffers take some megabytes


class Echo(asyncio.Protocol):
    """Says everything back, pausing as it is asked to; notes what happens."""

    def __init__(self, events):
        self.events, self.waiting = events, False

    def connection_made(self, transport):
        self.transport = transport
        self.events.append("made")

    def data_received(self, data):
        self.transport.write(data)

    def eof_received(self):
        self.events.append("eof")

    def pause_writing(self):
        self.events.append("pause")
        self.transport.pause_reading()

    def resume_writing(self):
        self.events.append("resume")
        self.transport.resume_reading()

    def connection_lost(self, error):
        self.events.append("lost")


class Server:
    """One accepted connection after another, in a loop of its own thread."""

    def __init__(self, folder, make=Echo):
        self.authority = identity.Authority.open(folder)
        files = self.authority.server_files(["127.0.0.1"])
        self.context = identity.server_context(*files, self.authority.certificate)
        self.listener, self.events, self.lost = socket.create_server(("127.0.0.1", 0)), [], []
        self.make, self.ready = make, threading.Event()
        self.thread = threading.Thread(target=lambda: asyncio.run(self.run()))
        self.thread.start()
        self.ready.wait(10)

    async def run(self):
        self.loop, self.done = asyncio.get_running_loop(), asyncio.Event()
        self.listener.setblocking(False)
        self.loop.add_reader(self.listener.fileno(), self.accept)
        self.ready.set()
        await self.done.wait()
        self.loop.remove_reader(self.listener.fileno())

    def accept(self):
        found, _ = self.listener.accept()
        self.line = Tls(found, self.context, lambda line: self.make(self.events), self.lost.append)

    def connect(self):
        context = identity.client_context(self.authority.certificate)
        raw = socket.create_connection(("127.0.0.1", self.listener.getsockname()[1]), timeout=10)
        return context.wrap_socket(raw, server_hostname="127.0.0.1")

    def until(self, event):
        for _ in range(1000):
            if event in self.events:
                return
            threading.Event().wait(0.01)
        pytest.fail(f"expected {event}, found {self.events}")

    def close(self):
        self.loop.call_soon_threadsafe(self.done.set)
        self.thread.join(10)
        self.listener.close()


def exchange(line, sent, size, missing=None):
    """Send, and read as much back (or ``missing`` bytes) at the same time; the SHA-256 of what came."""
    line.setblocking(False)
    found, at, missing = hashlib.sha256(), 0, missing or len(sent)
    piece = b""
    while missing:
        with suppress(ssl.SSLWantReadError, ssl.SSLWantWriteError):
            piece = piece or sent[at : at + size()]
            if piece:
                count = line.send(piece)
                at, piece = at + count, piece[count:]
        with suppress(ssl.SSLWantReadError, ssl.SSLWantWriteError):
            came = line.recv(size())
            found.update(came)
            missing -= len(came)
    return found.digest()


@pytest.fixture
def server(tmp_path):
    made = Server(tmp_path)
    yield made
    made.close()


def test_bytes_come_back_as_they_were_sent_in_pieces_of_any_size(server):
    draw = random.Random(0)
    sent, line = draw.randbytes(SIZE), server.connect()
    found = exchange(line, sent, lambda: draw.choice((1, 100, 16_384, 16_385, 100_000)))
    assert found == hashlib.sha256(sent).digest()
    line.close()
    server.until("lost")
    assert server.lost == [server.line]


def test_a_reader_that_waits_pauses_the_protocol_and_loses_nothing(server):
    line, sent = server.connect(), random.Random(0).randbytes(LARGE)
    line.settimeout(0.3)
    at = 0
    with suppress(TimeoutError):  # nobody reads, neither here nor, after a while, there
        while at < LARGE:
            at += line.send(sent[at : at + 10_000])
    server.until("pause")
    assert at < LARGE
    assert exchange(line, sent[at:], lambda: 65_536, LARGE) == hashlib.sha256(sent).digest()
    server.until("resume")
    line.close()


def test_closing_says_so_after_the_last_byte(server, tmp_path):
    class Last(Echo):
        def data_received(self, data):
            self.transport.write(b"y" * SIZE)
            self.transport.close()

    server.make = Last
    line = server.connect()
    line.sendall(b"x")
    size = 0
    while piece := line.recv(65_536):  # an end without TLS's goodbye would raise
        size += len(piece)
    assert size == SIZE
    server.until("lost")
    line.close()


def test_who_goes_without_a_word_is_noticed(server):
    line = server.connect()
    server.until("made")
    line.close()
    server.until("lost")
    assert server.events == ["made", "eof", "lost"]


@pytest.mark.parametrize("hello", [b"", b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x02\x00\x01"])
def test_who_does_not_speak_tls_never_reaches_the_protocol(server, hello):
    address = server.listener.getsockname()
    with socket.create_connection(address, timeout=10) as raw, suppress(OSError):  # cut before we have said all
        raw.sendall(hello)
        raw.shutdown(socket.SHUT_WR)
        while raw.recv(1000):
            pass
    for _ in range(1000):
        if server.lost:
            break
        threading.Event().wait(0.01)
    assert server.lost == [server.line]
    assert server.events == []


def test_an_end_in_the_middle_of_a_handshake_is_survived(server):
    for _ in range(20):
        context = identity.client_context(server.authority.certificate)
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        half = context.wrap_bio(incoming, outgoing, server_hostname="127.0.0.1")
        with suppress(ssl.SSLWantReadError):
            half.do_handshake()
        with socket.create_connection(("127.0.0.1", server.listener.getsockname()[1])) as raw:
            raw.sendall(outgoing.read())
    line = server.connect()
    line.sendall(b"x")
    assert line.recv(10) == b"x"
    line.close()


def test_the_handshakes_of_a_crowd_leave_turns_for_others():
    taken, seen = [], []

    async def run():
        turns = Turns()
        for number in range(100):
            turns.ask(steps[number])
        turns.ask(steps[0])  # it is due already
        assert turns.are_many
        while len(taken) < 100:
            seen.append(len(taken))
            await asyncio.sleep(0)
        assert not turns.are_many

    steps = [partial(taken.append, number) for number in range(100)]
    asyncio.run(run())
    assert taken == list(range(100))
    assert max(after - before for before, after in pairwise(seen)) <= 4
