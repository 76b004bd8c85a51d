"""Cases of lines that dawdle, answers that are packed bombs, and a coordinator that ends while requests are under way.

Numbers are those of the table of forty fault and abuse cases; each case ends with the global checkers.
"""

import contextlib
import socket
import threading
import time
import tracemalloc
import zlib
from dataclasses import replace

import pytest

from faults.lines import compose, dial, hear, in_step, once, sign
from faults.sites import APP, watched_site
from hansa.core.errors import ProtocolError, RunError
from hansa.network import http, identity
from hansa.network.client import Connection
from hansa.network.client_store import ClientStore
from hansa.network.enrolment import enrol
from hansa.network.http import serve_in_thread
from hansa.network.limits import Limits
from hansa.network.messages import read_receipt
from hansa.network.outbox import Parcel
from hansa.network.token import JoinToken
from support_quay import SLOT, Quay, federation_of, wait_until

pytestmark = pytest.mark.network


def test_case_03_a_coordinator_that_ends_finishes_what_it_was_sent_and_tells_others_when_to_come_back(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(http, "_LAST_ANSWERS_S", 8.0)  # this machine may be busy
    with watched_site(tmp_path, federation_of(8)) as site, contextlib.closing(Quay(site, 8)) as quay:
        entered, go_on, count = threading.Event(), threading.Event(), site.coordinator.report

        def slow(*report):
            entered.set()
            go_on.wait(10)
            return count(*report)

        site.coordinator.report = slow
        parcel = quay.parcel()
        signers = {name: in_step(site, who) for name, who in quay.identities.items()}
        lines = {name: dial(site, who) for name, who in quay.identities.items()}
        target = quay.path(parcel.sha256)
        lines["berlin"].sendall(
            compose("PUT", target, parcel.body, sign(signers["berlin"], "PUT", target, parcel.body))
        )
        assert entered.wait(10)
        began, closing = time.monotonic(), threading.Thread(target=site.server.close)
        closing.start()
        wait_until(lambda: site.server._server.bell.closing)
        lines["paris"].sendall(compose("GET", "/v1/work", headers=sign(signers["paris"], "GET", "/v1/work")))
        told = hear(lines["paris"])
        assert (told.status, told.json["code"]) == (503, "stopping")
        assert int(told.headers["retry-after"]) >= 1
        with pytest.raises(OSError):  # noqa: PT011  # nobody is let in any more
            dial(site)
        go_on.set()
        receipt = read_receipt(hear(lines["berlin"]).body)
        closing.join(20)
        assert time.monotonic() - began < 10
        for line in lines.values():
            line.close()
        site.restart()
        assert site.coordinator.rounds.receipt(SLOT, "berlin") == receipt
        assert receipt.status == "accepted"


# ------------------------------------------------------------------------------------------------------------ slowness

SHORT = Limits(headers_s=1.0, grace_s=1.0, longest_silence_s=1.0, connections_by_client=100)
MANY = 8  # of each kind; benchmarks/network has 500 in all, and the real figure


def test_case_10_slow_sockets_are_closed_by_their_deadlines_and_slow_nobody_down(site, monkeypatch):
    berlin, sha256 = site.enrol("berlin"), site.coordinator.publish({"params": bytes(16_000_000)})["params"]
    server = serve_in_thread(site.coordinator, limits=SHORT)
    monkeypatch.setattr(site, "server", server)  # so that requests go there
    signer, path = in_step(site, berlin), f"/v1/blobs/{sha256}"
    with contextlib.closing(dial(site, berlin)) as healthy, contextlib.ExitStack() as closing:
        closing.callback(server.close)

        def ask():
            began = time.monotonic()
            healthy.sendall(compose("GET", "/v1/authority"))
            assert hear(healthy).status == 200
            return time.monotonic() - began

        slow = b"GET / HTTP/1.1\r\nX-Slow: ", compose("POST", "/v1/enrol", headers={"Content-Length": "60000"})
        before = max(ask() for _ in range(40))
        crowd = []
        for number in range(2 * MANY):
            crowd.append(closing.enter_context(contextlib.closing(dial(site, (None, berlin)[number % 2]))))
            crowd[-1].sendall(slow[number % 2])
        for _ in range(MANY):
            line = closing.enter_context(contextlib.closing(dial(site, berlin)))
            line.sendall(compose("GET", path, headers=sign(signer, "GET", path)))
            assert line.recv(12) == b"HTTP/1.1 200"  # and no more
        during, began = [ask()], time.monotonic()
        while server.num_connections > 1:
            assert time.monotonic() - began < 20, (server.cuts, server.num_connections)
            during.append(ask())
            for line in crowd:
                with contextlib.suppress(OSError):
                    line.sendall(b"x")
            time.sleep(0.05)
        assert max(during) < 10 * before + 1.0
        assert server.cuts == {"headers": MANY, "slow body": MANY, "slow reader": MANY}


# --------------------------------------------------------------------------------------------------------------- bombs

BOMB_BYTES, LITTLE = 2**26, 2**23


def packed(body_of_zeros, wbits):
    """So many zeros, packed."""
    packer = zlib.compressobj(9, zlib.DEFLATED, wbits)
    return b"".join(packer.compress(bytes(2**20)) for _ in range(body_of_zeros // 2**20)) + packer.flush()


@pytest.fixture(scope="module")
def bombs():
    """Bodies of some kilobytes that would become 64 megabytes, by the name of their coding."""
    gzip, deflate = packed(BOMB_BYTES, 31), packed(BOMB_BYTES, 15)
    again = zlib.compressobj(9, zlib.DEFLATED, 31)
    return {"gzip": gzip, "deflate": deflate, "gzip, gzip": again.compress(gzip) + again.flush()}


@contextlib.contextmanager
def little_memory():
    """Less than 8 MB more than before, at any moment."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < LITTLE
    finally:
        tracemalloc.stop()


def test_case_13_nothing_that_a_client_sends_is_unpacked(tmp_path, bombs):
    with watched_site(tmp_path, federation_of(8)) as site, contextlib.closing(Quay(site, 8)) as quay:
        who = quay.identities["berlin"]
        signer = in_step(site, who)
        for encoding, body in bombs.items():
            assert len(body) < 80_000
            with little_memory():
                headers = {**sign(signer, "POST", "/v1/hello", body), "Content-Encoding": encoding}
                answer = once(site, compose("POST", "/v1/hello", body, headers), who)
                assert (answer.status, answer.json["code"]) in ((400, "malformed"), (413, "too-large"))
        parcel = Parcel.of(bombs["gzip, gzip"])
        target = quay.path(parcel.sha256)
        headers = {**sign(signer, "PUT", target, parcel.body), "Content-Encoding": "gzip, gzip"}
        with little_memory():
            receipt = read_receipt(once(site, compose("PUT", target, parcel.body, headers), who).body)
        assert receipt.status == "refused"
        assert "expected a safetensors body" in receipt.reason


class Liar:
    """Whoever has the federation's certificate, and gives every request the same answer; ``more`` without end."""

    def __init__(self, site, answer, more=b""):
        self._answer, self._more = answer, more
        authority = site.coordinator.authority
        self._context = identity.server_context(*authority.server_files(["127.0.0.1"]), authority.certificate)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"https://127.0.0.1:{self._listener.getsockname()[1]}"
        self._thread = threading.Thread(target=self._serve, daemon=True)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(10)

    def _serve(self):
        with contextlib.suppress(OSError):
            while True:
                self._reply(self._listener.accept()[0])

    def _reply(self, plain):
        plain.settimeout(10)
        with contextlib.suppress(OSError), self._context.wrap_socket(plain, server_side=True) as line:
            while line.recv(65536):
                line.sendall(self._answer)
                while self._more:
                    line.sendall(self._more)


def answer(status, encoding, body):
    head = f"HTTP/1.1 {status} x\r\nContent-Length: {len(body)}\r\nContent-Encoding: {encoding}\r\n"
    return f"{head}ETag: x\r\nContent-Range: bytes 0-{len(body) - 1}/{len(body)}\r\n\r\n".encode() + body


@pytest.fixture
def call(site):
    """A client, enrolled, that calls whomever one likes, and once."""
    who, hurry = site.enrol("berlin"), threading.Event()
    hurry.set()

    @contextlib.contextmanager
    def make(url):
        with (
            contextlib.closing(ClientStore(site.folder / "berlin")) as store,
            contextlib.closing(Connection(replace(who, url=url), store, stop=hurry)) as made,
        ):
            yield made

    return make


OTHERS = {"br": b"\x5b" * 100, "zstd": b"\x28\xb5\x2f\xfd" * 9, "GZIP": b"x", "identity, gzip": b"x", "x": b"x"}


@pytest.mark.parametrize("status", [200, 401, 503])
def test_case_13_nothing_that_a_server_sends_is_unpacked(site, bombs, call, status):
    token = site.invite("paris")
    for encoding, body in {**bombs, **OTHERS}.items():
        with Liar(site, answer(status, encoding, body)) as liar, call(liar.url) as calls, little_memory():
            elsewhere = JoinToken.decode(replace(token, url=liar.url).encode())
            attempts = {
                "hello": lambda calls=calls: calls.hello((APP,)),
                "work": lambda calls=calls: calls.get_work(wait_s=0),
                "blob": lambda calls=calls: calls.get_blob("0" * 64),
                "enrol": lambda token=elsewhere: enrol(token, site.folder / "paris"),
            }
            for attempt in attempts.values() if encoding in bombs else [attempts["hello"]]:
                with pytest.raises(RunError, match="expected an answer that is not packed, found Content-Encoding"):
                    attempt()


CHUNKS = "HTTP/1.1 {} x\r\nTransfer-Encoding: chunked\r\n{}\r\n"
CHUNK = b"10000\r\n" + bytes(65536) + b"\r\n"


@pytest.mark.parametrize(
    ("head", "path", "error"),
    [
        (CHUNKS.format(401, ""), "/v1/hello", RunError),
        (CHUNKS.format(403, ""), "/v1/hello", RunError),
        (CHUNKS.format(200, ""), "/v1/blobs/", RunError),
        (CHUNKS.format(206, "Content-Range: bytes 0-9/10\r\n"), "/v1/blobs/", ProtocolError),
    ],
    ids=["401", "403", "200", "206"],
)
def test_case_13_an_answer_without_end_is_given_up(site, call, head, path, error):
    with (
        Liar(site, head.encode(), CHUNK) as liar,
        call(liar.url) as calls,
        little_memory(),
        pytest.raises(error, match="expected"),
    ):
        calls.get_blob("0" * 64) if "blobs" in path else calls.hello((APP,))
