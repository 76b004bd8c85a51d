"""Raw bytes on a TLS line: what is no request, nearly one, several at once, or one that can be read in two ways."""

from __future__ import annotations

import logging
import os
import re
import socket
import ssl
from contextlib import closing, suppress

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hansa.network import identity
from hansa.network.http import serve_in_thread
from hansa.network.limits import Limits
from support_fuzz import mutated

pytestmark = pytest.mark.network
SHORT = Limits(handshake_s=0.5, headers_s=0.2, grace_s=0.2, longest_silence_s=0.2, strangers=50, idle_s=1.0)
PUBLIC = b"GET /v1/authority HTTP/1.1\r\nHost: x\r\n\r\n"
LAST = PUBLIC.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")
HIDDEN = PUBLIC + b"\r\n"
SIGNATURE = (
    b'Signature-Input: hansa=("@method" "@path" "@query");created=0;nonce="1";keyid="%b";tag=""\r\n'
    b"Signature: hansa=:%b==:\r\n" % (b"ab" * 32, b"A" * 86)
)
SEEDS = [
    PUBLIC,
    b"GET /v1/work?acknowledged=0&released=&wait=0 HTTP/1.1\r\nHost: x\r\n%b\r\n" % SIGNATURE,
    b"POST /v1/enrol HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nhello",
    b"POST /v1/enrol HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
    b"PUT /v1/reports/r/train-0-0-update/%b HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\nContent-Range: bytes 0-2/9\r\n"
    b"%b\r\nabc" % (b"0" * 64, SIGNATURE),
    b"GET /v1/blobs/%b HTTP/1.0\r\nRange: bytes=0-\r\nConnection: keep-alive\r\n\r\n" % (b"0" * 64),
    b"OPTIONS * HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nUpgrade: websocket\r\nConnection: upgrade\r\n\r\n",
    b"CONNECT x:443 HTTP/1.1\r\nHost: x\r\n\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
]


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A coordinator that is served, which nobody's bytes may disturb, and a line of a client to ask how it is."""
    from hansa.algorithms.fedavg import FedAvg
    from hansa.federation import Federation
    from hansa.learners.linear import LinearLearner
    from hansa.network.coordinator import Coordinator
    from hansa.network.store import Store

    learner = LinearLearner(num_features=3, num_classes=2)
    federation = Federation(learner=learner, algorithm=FedAvg(client_learning_rate=0.1))
    coordinator = Coordinator(Store(tmp_path_factory.mktemp("fuzz")), federation, "ab" * 32)
    server = serve_in_thread(coordinator, limits=SHORT)
    context = identity.client_context(coordinator.authority.certificate)
    yield server, context
    server.close()
    coordinator.close()


@pytest.fixture(autouse=True)
def nothing_is_logged_as_an_error(caplog):
    caplog.set_level(logging.WARNING)
    yield
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR] == []


def connect(served):
    server, context = served
    plain = socket.create_connection(("127.0.0.1", server.port), timeout=10)
    return context.wrap_socket(plain, server_hostname="127.0.0.1")


def said(line, sent, quiet_s):
    """What comes back until the line is closed or quiet for so long."""
    found = b""
    with suppress(TimeoutError, OSError):  # it may have been cut before all was sent
        line.settimeout(10)
        line.sendall(sent)
    with suppress(TimeoutError, OSError):
        line.settimeout(quiet_s)
        while piece := line.recv(65536):
            found += piece
    return found


def statuses(found):
    return [int(number) for number in re.findall(rb"HTTP/1\.1 ([0-9]{3}) ", found)]


def ask(served, sent, quiet_s=0.1):
    """The statuses that bytes earn on a line of their own, and all that was said."""
    with closing(connect(served)) as line:
        found = said(line, sent, quiet_s)
    return statuses(found), found


def assert_well(served):
    """Others are answered."""
    codes, found = ask(served, LAST, quiet_s=10)
    assert codes == [200]
    assert b"END CERTIFICATE" in found


@settings(max_examples=60, suppress_health_check=list(HealthCheck))
@given(
    body=st.one_of(mutated(SEEDS), mutated(SEEDS), st.binary(max_size=500), st.sampled_from(SEEDS)), tail=st.booleans()
)
def test_no_bytes_on_a_line_are_a_fault_of_the_server_or_disturb_others(served, body, tail):
    codes, _ = ask(served, body + (b"\r\n\r\n" if tail else b""))
    assert all(code < 500 for code in codes)
    assert_well(served)


@settings(max_examples=20, suppress_health_check=list(HealthCheck))
@given(bodies=st.lists(st.sampled_from(SEEDS), min_size=2, max_size=12))
def test_requests_in_a_row_are_answered_in_their_order_until_one_ends_the_line(served, bodies):
    codes, _ = ask(served, b"".join([*bodies, LAST]), quiet_s=10)
    assert 1 <= len(codes) <= len(bodies) + 1
    assert all(code < 500 for code in codes)
    assert (codes[0] == 200) == (bodies[0] == PUBLIC)


def test_a_thousand_requests_in_a_row_are_all_answered(served):
    codes, _ = ask(served, PUBLIC * 1000 + LAST, quiet_s=10)
    assert set(codes) <= {200, 429}
    assert len(codes) == 1001
    assert_well(served)


AMBIGUOUS = {
    "two lengths": b"Content-Length: 0\r\nContent-Length: %d\r\n",
    "a list of lengths": b"Content-Length: 0, %d\r\n",
    "a length and chunks": b"Content-Length: %d\r\nTransfer-Encoding: chunked\r\n",
    "chunks and a length": b"Transfer-Encoding: chunked\r\nContent-Length: %d\r\n",
    "chunks of another kind": b"Transfer-Encoding: xchunked\r\nContent-Length: %d\r\n",
    "chunks twice": b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\nContent-Length: %d\r\n",
    "a folded length": b"Content-Length:\r\n %d\r\nX: y\r\n Content-Length: 0\r\n",
    "a folded encoding": b"Content-Length: %d\r\nTransfer-Encoding:\r\n chunked\r\n",
    "a space before the colon": b"Content-Length : 0\r\nContent-Length: %d\r\n",
    "a tab before the colon": b"Transfer-Encoding\t: chunked\r\nContent-Length: %d\r\n",
    "a sign": b"Content-Length: +%d\r\n",
    "hex": b"Content-Length: 0x%x\r\n",
    "an underscore": b"Content-Length: 1_%d\r\n",
    "NUL in a name": b"Content-Length\x00: 0\r\nContent-Length: %d\r\n",
    "NUL in a value": b"X: \x00\r\nContent-Length: %d\r\n",
    "a bare CR": b"X: a\rContent-Length: 0\r\nContent-Length: %d\r\n",
    "no name": b": x\r\nContent-Length: %d\r\n",
}


@pytest.mark.parametrize("name", AMBIGUOUS)
@pytest.mark.parametrize("path", [b"/v1/enrol", b"/v1/hello"])
def test_what_is_hidden_in_a_body_is_never_answered_as_a_request(served, name, path):
    """The hidden request is public: were it read as one, its answer would hold the certificate."""
    head = b"POST %b HTTP/1.1\r\nHost: x\r\n%b\r\n"
    for body in (HIDDEN, b"0\r\n\r\n" + HIDDEN):
        fields = AMBIGUOUS[name] % len(body)
        codes, found = ask(served, head % (path, fields) + body)
        assert b"CERTIFICATE" not in found, found
        assert all(400 <= code < 500 for code in codes)
        assert len(codes) <= 1
    assert_well(served)


def test_a_line_feed_alone_ends_no_request_that_was_not_meant_to_end(served):
    """Some proxies end a line at a bare LF: a header that holds one must not begin a request of its own."""
    codes, found = ask(served, b"GET /v1/work HTTP/1.1\nHost: x\nX: y\n\n")
    assert all(400 <= code < 500 for code in codes)
    assert b"CERTIFICATE" not in found
    assert_well(served)


CHUNKED = b"POST /v1/enrol HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
TOO_MUCH = {
    "a long target": b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
    "a long method": b"A" * 100_000 + b" / HTTP/1.1\r\nHost: x\r\n\r\n",
    "a long name": b"GET / HTTP/1.1\r\nHost: x\r\n" + b"a" * 100_000 + b": x\r\n\r\n",
    "many headers": b"GET / HTTP/1.1\r\nHost: x\r\n" + b"a: b\r\n" * 20_000 + b"\r\n",
    "no end of spaces": b"GET / HTTP/1.1\r\nHost: x\r\na:" + b" " * 100_000 + b"b\r\n\r\n",
    "many empty lines": b"\r\n" * 50_000 + PUBLIC,
    "a huge chunk": CHUNKED + b"FFFFFFFFFFFFFFFFFF\r\n" + b"x" * 100_000,
    "a long chunk's size": CHUNKED + b"0" * 100_000 + b"1\r\nx\r\n0\r\n\r\n",
    "a long chunk's extension": CHUNKED + b"1;a=" + b"b" * 100_000 + b"\r\nx\r\n0\r\n\r\n",
    "a chunk's negative size": CHUNKED + b"-1\r\nx\r\n0\r\n\r\n",
    "many trailers": CHUNKED + b"0\r\n" + b"a: b\r\n" * 20_000 + b"\r\n",
    "a huge length": b"POST /v1/enrol HTTP/1.1\r\nHost: x\r\nContent-Length: " + b"9" * 19 + b"\r\n\r\nx",
    "a length of many digits": b"POST /v1/enrol HTTP/1.1\r\nHost: x\r\nContent-Length: " + b"9" * 5000 + b"\r\n\r\nx",
}


@pytest.mark.parametrize("name", TOO_MUCH)
def test_what_is_too_much_is_refused_or_cut(served, name):
    codes, _ = ask(served, TOO_MUCH[name], quiet_s=1.0)
    assert all(400 <= code < 500 for code in codes if code != 200)
    assert codes != [200] or name == "many empty lines"
    assert_well(served)


@settings(max_examples=20, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_bytes_that_are_no_tls_or_a_damaged_one_disturb_nobody(served, data):
    server, _ = served
    hello = data.draw(st.one_of(mutated([client_hello()]), st.binary(max_size=300), st.sampled_from(SEEDS)))
    with closing(socket.create_connection(("127.0.0.1", server.port), timeout=10)) as line:
        assert b"HTTP/1.1" not in said(line, hello, 0.05)
    assert_well(served)


def client_hello() -> bytes:
    """The first bytes of TLS."""
    context, out = identity.unchecked_context(), ssl.MemoryBIO()
    with suppress(ssl.SSLWantReadError):
        context.wrap_bio(ssl.MemoryBIO(), out).do_handshake()
    return out.read()


@settings(max_examples=10, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_damage_below_an_open_line_of_tls_ends_that_line_alone(served, data):
    """Bytes written past TLS, as by somebody on the way."""
    with closing(connect(served)) as line:
        line.sendall(PUBLIC[: data.draw(st.integers(0, len(PUBLIC)))])
        os.write(line.fileno(), data.draw(st.binary(min_size=1, max_size=100)))
        codes = statuses(said(line, b"", 0.1))
        assert all(code == 200 for code in codes)
    assert_well(served)
