"""The routes behind their gate: nothing anybody sends is a fault of the server, nothing unsigned has an effect."""

import sqlite3
import threading

import pytest
import sqlalchemy as sa
from hypothesis import given, settings
from hypothesis import strategies as st

from hansa.network import gate
from hansa.network.messages import CODES, PROTOCOL
from support_signing import Routes, SigningDesk, scope_of


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    made = SigningDesk(tmp_path_factory.mktemp("server"))
    yield made
    made.close()


@pytest.fixture(scope="module")
def routes(desk):
    made = Routes(desk)
    assert made.ask("POST", b"/v1/hello", made.hello()).status == 200
    return made


WORDS = st.sampled_from(
    [
        "' OR 1=1 --",
        "x'; DROP TABLE clients; --",
        "%00",
        "../../etc/passwd",
        "%2e%2e%2f",
        "train-0-0-update",
        "٣",
        "²",
        "\u202e",
        "-1",
        "1e400",
        "9" * 400,
        "nan",
        "*",
        "a" * 3000,
    ]
)
TARGETS = st.one_of(
    st.builds("/v1/{}/{}".format, st.sampled_from(["blobs", "reports", "work", "hello", "x"]), WORDS),
    st.builds("/v1/reports/{}/{}".format, WORDS, WORDS),
    st.builds("/v1/reports/{}/{}/{}".format, WORDS, WORDS, WORDS),
    st.builds("/v1/work?acknowledged={}&released={}&wait=0".format, WORDS, WORDS),
    st.builds("/{}".format, WORDS),
)
SIGNING = ("signature", "signature-input", "content-digest")
HEADER_NAMES = st.sampled_from(
    [
        *(*SIGNING, "content-range", "content-length", "transfer-encoding", "content-encoding", "upgrade", "te"),
        *("x-http-method-override", "range", "if-none-match", "expect", "host", "cookie", "authorization", "x"),
    ]
)
HEADERS = st.lists(st.tuples(HEADER_NAMES.map(str.encode), st.binary(max_size=60)), max_size=5)
METHODS = st.sampled_from(["GET", "POST", "PUT", "DELETE", "HEAD", "PATCH", "OPTIONS", "TRACE", "get", "ÄH"])


def assert_form(answer):
    """No fault of the server's; a refusal is a sentence and a code that fits its status."""
    assert answer.status < 500
    if answer.status >= 400:
        assert CODES[answer.json["code"]] == answer.status
        assert len(answer.json["error"]) > 20


@settings(max_examples=100, deadline=None)
@given(method=METHODS, target=TARGETS, headers=HEADERS, body=st.binary(max_size=50))
def test_nothing_that_a_stranger_sends_is_a_fault_of_the_server(routes, method, target, headers, body):
    answer = routes.send(scope_of(method, target.encode(), headers), body)
    assert_form(answer)
    assert answer.status in (400, 401)


@settings(max_examples=100, deadline=None)
@given(method=METHODS, target=TARGETS, headers=HEADERS, body=st.binary(max_size=50))
def test_nothing_that_an_enrolled_client_sends_is_a_fault_of_the_server(routes, method, target, headers, body):
    more = [pair for pair in headers if pair[0].decode() not in SIGNING]
    assert_form(routes.ask(method, target.encode(), body, more))


@pytest.mark.parametrize("query", ["acknowledged=-99999999999999999999999", "acknowledged=x", "wait=nan", "wait=-inf"])
def test_a_number_that_cannot_be_is_the_clients_fault(routes, query):
    assert_form(routes.ask("GET", f"/v1/work?{query}".encode()))


def test_another_body_than_the_one_signed_is_refused_and_has_no_effect(tmp_path):
    desk = SigningDesk(tmp_path)
    routes = Routes(desk)
    answer = routes.ask("POST", b"/v1/hello", routes.hello("2"), signed=routes.hello("1"))
    assert (answer.status, answer.json["code"]) == (401, "signature")
    assert desk.registry.present(desk.coordinator.run) == []
    assert [entry.who for entry in desk.log("request refused")] == ["prague"]
    assert routes.ask("POST", b"/v1/hello", routes.hello("1")).status == 200
    assert desk.registry.present(desk.coordinator.run) == ["prague"]
    desk.close()


def test_a_method_cannot_be_overridden_by_a_header(routes):
    for name in (b"x-http-method-override", b"x-http-method", b"x-method-override"):
        answer = routes.ask("GET", b"/v1/goodbye", more=[(name, b"POST")])
        assert (answer.status, answer.json["code"]) == (405, "method")


@pytest.mark.parametrize(
    "more",
    [
        [(b"content-length", b"5"), (b"transfer-encoding", b"chunked")],
        [(b"content-length", b"5"), (b"content-length", b"6")],
        [(b"content-length", "²".encode("latin-1"))],
        [(b"content-length", b"+5")],
        [(b"content-length", b"-5")],
    ],
)
def test_two_lengths_or_one_that_is_none_are_refused(routes, more):
    answer = routes.send(scope_of("POST", b"/v1/hello", more))
    assert (answer.status, answer.json["code"]) == (400, "malformed")


def test_a_client_of_an_older_protocol_is_told_so(routes):
    answer = routes.send(scope_of("POST", b"/v1/hello", [], {"certificate": b"one that TLS let through"}))
    assert (answer.status, answer.json["code"]) == (426, "protocol")
    assert f"protocol {PROTOCOL}" in answer.json["error"]


def test_a_client_revoked_while_its_body_arrives_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(gate, "_LOOK_AGAIN_S", -1.0)
    desk = SigningDesk(tmp_path)
    routes = Routes(desk)
    routes.ask("POST", b"/v1/hello", routes.hello())
    body = routes.hello("2")
    scope = desk.scope(routes.signer, "POST", b"/v1/hello", body)
    answer = routes.send(scope, body[:10], lambda: desk.registry.revoke("prague"), body[10:])
    assert (answer.status, answer.json["code"]) == (403, "revoked")
    assert len(desk.log("hello")) == 1
    desk.close()


def test_a_request_that_waits_ends_when_its_client_is_revoked(tmp_path):
    desk = SigningDesk(tmp_path)
    routes = Routes(desk)
    routes.ask("POST", b"/v1/hello", routes.hello())
    answers, waiting, enter = [], threading.Event(), routes.bell._enter

    def hold(name):
        waiting.set()
        return enter(name)

    routes.bell._enter = hold
    thread = threading.Thread(target=lambda: answers.append(routes.ask("GET", b"/v1/work?wait=20")))
    thread.start()
    assert waiting.wait(10)
    desk.coordinator.revoke("prague")
    routes.bell.ring()
    thread.join(10)
    assert (answers[0].status, answers[0].json["code"]) == (403, "revoked")
    desk.close()


def test_a_held_question_is_told_to_come_back_when_another_process_keeps_the_database(routes, monkeypatch):
    async def hold(question):
        raise sa.exc.OperationalError("SELECT 1", (), sqlite3.OperationalError("database is locked"))

    with monkeypatch.context() as patch:
        patch.setattr(routes.bell, "hold", hold)
        answer = routes.ask("GET", b"/v1/work?wait=5")
    assert (answer.status, answer.json["code"]) == (503, "busy")
    assert int(answer.headers[b"retry-after"]) >= 1
