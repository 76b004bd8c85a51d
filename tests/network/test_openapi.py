"""The coordinator's OpenAPI document is true: schemathesis asks every operation, and each answer must be in it."""

from __future__ import annotations

import hashlib
import string
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, seed, settings
from hypothesis import strategies as st

from hansa.core.protocols import Slot
from hansa.network import front, identity, routes, waiting
from hansa.network.messages import (
    CODES,
    PROTOCOL,
    Enrol,
    Hello,
    Renew,
    read_enrolled,
    read_receipt,
    read_welcome,
    read_work,
    write,
)
from hansa.network.openapi import LATER, document, text
from hansa.network.quotas import Limits, Quotas
from hansa.network.rounds import Arrival
from support_fuzz import foreign
from support_signing import APP, Routes, SigningDesk, length, raw, scope_of
from support_stage import report_of

schemathesis = pytest.importorskip("schemathesis")
requests = pytest.importorskip("requests")

from schemathesis.checks import not_a_server_error  # noqa: E402  # it need not be installed
from schemathesis.core.transport import Response  # noqa: E402
from schemathesis.specs.openapi import checks  # noqa: E402

DOCUMENT = document()
OPERATIONS = [result.ok() for result in schemathesis.openapi.from_dict(DOCUMENT).get_all_operations()]
CHECKS = [
    not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_headers_conformance,
    checks.response_schema_conformance,
]
POSITIVE, NEGATIVE = schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE
ASKED = [  # what takes nothing but bytes cannot be asked wrongly
    (operation, mode)
    for operation in OPERATIONS
    for mode in (POSITIVE, NEGATIVE)
    if mode == POSITIVE or operation.definition.raw["parameters"]
]
READERS = {
    "enrol": read_enrolled,
    "renew": read_enrolled,
    "hello": read_welcome,
    "work": read_work,
    "put_report": read_receipt,
}
# What must have been answered at least once: the fuzz is worth nothing if it stays at the gate.
REACHED = {
    ("authority", 200), ("enrol", 200), ("enrol", 400), ("enrol", 403), ("enrol", 413), ("renew", 200), ("renew", 400),
    ("hello", 200), ("hello", 400), ("hello", 409), ("hello", 426), ("work", 200), ("work", 400), ("goodbye", 204),
    ("blob", 200), ("blob", 206), ("blob", 404), ("blob", 416), ("put_report", 200), ("put_report", 202),
    ("put_report", 400), ("put_report", 404), ("put_report", 409), ("put_report", 422), ("get_report", 200),
    ("get_report", 404), ("get_report", 409),
}  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A run with open, closed and abandoned slots, a client in it, and what it could rightly send."""
    patch = pytest.MonkeyPatch()
    patch.setattr("os.fsync", lambda handle: None)
    patch.setattr(
        routes, "Quotas", lambda: Quotas(Limits(guesses_a_minute=1e9, renewals_a_minute=1e9, strangers_burst=1e9))
    )
    patch.setattr(front, "_LONGEST_PAUSE_S", 0.0)
    patch.setattr(waiting, "hold_s", lambda wait_s, pace_s: 0.01 if wait_s > 0 else 0.0)
    made = World(tmp_path_factory.mktemp("openapi"))
    yield made
    made.desk.close()
    patch.undo()


class World:
    """``asked`` counts answers by operation and status."""

    def __init__(self, folder):
        self.desk, self.asked = SigningDesk(folder), Counter()
        self.routes = Routes(self.desk)
        coordinator = self.desk.coordinator
        assert self.routes.ask("POST", b"/v1/hello", self.routes.hello()).status == 200
        values = [np.full((1, coordinator.sizes.num_params), number, np.float32) for number in range(3)]
        self.reports = [report_of(value, 1.0) for value in values] + [report_of(values[0], -1.0), b"no report"]
        self.vectors = coordinator.publish({"params": np.arange(100, dtype=np.float32).tobytes()})
        self.slots = []
        for number in range(120):
            slot = Slot(number, 0, "update")
            coordinator.rounds.plan(slot, True, "hash")
            coordinator.rounds.collect(slot, {"prague": b"plan"}, self.vectors)
            self.slots.append(str(slot))
        done = Slot(0, 0, "update")
        coordinator.rounds.record(done, Arrival(client="prague", sha256="0" * 64, size=3, form="x"))
        coordinator.rounds.freeze(done, 1)
        coordinator.rounds.settle(done, ["prague"])
        self.token = self.desk.invite("gw-*", uses=10**6)
        self.request = identity.make_request("x")[1]

    def bodies(self, name):
        """What an operation takes, and what it nearly takes."""
        token, secret = self.token, self.token.secret
        tries = [("gw-1", secret), ("gw-2", secret), ("berlin", secret), ("gw-3", b"guess")]
        return {
            "enrol": [
                *(write(Enrol(token=token.id, secret=shown, name=who, request=self.request)) for who, shown in tries),
                bytes(70_000),
            ],
            "renew": [write(Renew(request=self.request)), write(Renew(request=b"none"))],
            "hello": [
                write(Hello(protocol=number, version="1", fingerprints=(app,)))
                for number, app in ((PROTOCOL, APP), (PROTOCOL, "cd" * 32), (PROTOCOL + 1, APP))
            ],
            "put_report": self.reports,
        }.get(name, [])  # fmt: skip


def adjust(case, name, world, data):
    """Give a case what only this coordinator knows, most of the time: a run, a slot, a hash, a message."""
    often = st.sampled_from([True, True, True, False])
    real = {"run": [world.desk.coordinator.run], "slot": world.slots}
    for key in list(case.path_parameters or {}):
        if key in real and data.draw(often):
            case.path_parameters[key] = data.draw(st.sampled_from(real[key]))
    bodies = world.bodies(name)
    if bodies and data.draw(often):
        case.body = data.draw(st.one_of(st.sampled_from(bodies), foreign(*(body[:5000] for body in bodies))))
    if "sha256" in (case.path_parameters or {}) and data.draw(often):
        known = (
            list(world.vectors.values())
            if name == "blob"
            else [hashlib.sha256(body).hexdigest() for body in world.reports]
        )
        case.path_parameters["sha256"] = data.draw(st.sampled_from(known))
    if name == "put_report" and isinstance(case.body, bytes):
        place_part(case, data.draw(st.sampled_from(["whole", "whole", "other", "first", "first", "last", "odd"])), data)
    if name == "blob" and data.draw(often):
        case.headers.pop("If-Range", None)  # one that is made up asks for all of it
        case.headers["Range"] = data.draw(st.sampled_from(["bytes=0-3", "bytes=5-", "bytes=400-", "bytes=-3"]))


def place_part(case, which, data):
    """Make the body of an upload the whole of a report, one of another hash, or a part that fits or does not."""
    body, half = case.body, len(case.body) // 2
    if which != "other":
        case.path_parameters["sha256"] = hashlib.sha256(body).hexdigest()
    if which in ("whole", "other"):
        case.headers.pop("Content-Range", None)
        return
    first, case.body = (half, body[half:]) if which == "last" else (0, body[:half])
    total = len(body) + (data.draw(st.sampled_from([1, -1, 10**9])) if which == "odd" else 0)
    case.headers["Content-Range"] = f"bytes {first}-{first + len(case.body) - 1}/{total}"


def ask(world, case, is_signed):
    """Send a case as a client does: the answer, and the request as schemathesis wants to see it."""
    try:
        prepared = requests.Request(**case.as_transport_kwargs("https://localhost:1")).prepare()
        headers = {
            name: value if isinstance(value, str) else value.decode("latin-1")
            for name, value in prepared.headers.items()
        }
        given_headers = raw({name: value for name, value in headers.items() if name.lower() != "content-digest"})
    except (requests.exceptions.InvalidHeader, UnicodeEncodeError):  # no client would send it
        assume(False)
    body = prepared.body or b""
    body = body.encode() if isinstance(body, str) else body
    target = prepared.path_url.encode("latin-1")
    plain = [pair for pair in given_headers if pair[0] not in (b"content-length", b"signature", b"signature-input")]
    if not is_signed:
        return world.routes.send(scope_of(prepared.method, target, plain + length(body)), body), prepared
    part = headers.get("Content-Range", "") if case.operation.definition.raw["operationId"] == "put_report" else ""
    for _ in range(2):
        digest = hashlib.sha256(body).digest() if body and not part else None
        signed = raw(world.routes.signer.headers(prepared.method, target, digest=digest, part=part))
        rest = [pair for pair in plain if pair[0] != b"content-range" or not part]
        zero = [(b"content-length", b"0")] if not body and prepared.method != "GET" else []
        answer = world.routes.send(scope_of(prepared.method, target, signed + rest + length(body) + zero), body)
        if answer.status != 401 or not world.routes.signer.learn(answer.json):
            break
    return answer, prepared


def assert_documented(case, answer, prepared):
    """The answer is one of those that the document has for the operation."""
    headers = {name.decode(): [value.decode("latin-1")] for name, value in answer.headers.items()}
    shown = Response(
        status_code=answer.status, headers=headers, content=answer.body, request=prepared, elapsed=0.01, verify=False
    )
    case.validate_response(shown, checks=CHECKS)
    name = case.operation.definition.raw["operationId"]
    if answer.status == 200 and answer.headers[b"content-type"] == b"application/octet-stream" and name in READERS:
        READERS[name](answer.body)


def fuzz(world, operation, mode, max_examples, start=0):
    """Ask so many times; another ``start`` draws other cases."""
    name = operation.definition.raw["operationId"]

    @settings(max_examples=max_examples, suppress_health_check=list(HealthCheck))
    @given(
        case=operation.as_strategy(generation_mode=mode),
        is_signed=st.sampled_from([True, True, True, False]),
        data=st.data(),
    )
    def run(case, is_signed, data):
        adjust(case, name, world, data)
        answer, prepared = ask(world, case, is_signed)
        world.asked[name, answer.status] += 1
        assert_documented(case, answer, prepared)

    seed(start)(run)()


def test_every_answer_to_whatever_is_asked_is_in_the_document(world):
    for operation, mode in ASKED:
        fuzz(world, operation, mode, 50)
    for start in range(1, 20):  # what chance has left out
        missing = {name for name, _ in REACHED - set(world.asked)}
        for operation, mode in ASKED:
            if operation.definition.raw["operationId"] in missing:
                fuzz(world, operation, mode, 50, start)
    assert REACHED - set(world.asked) == set()


@pytest.mark.slow
def test_every_answer_is_in_the_document_for_longer(world):
    for operation, mode in ASKED:
        fuzz(world, operation, mode, 1500)


def test_the_document_that_is_printed_is_the_newest():
    printed = (Path(__file__).parents[2] / "docs" / "openapi.json").read_text()
    assert printed == text(), "run python scripts/openapi.py"


def test_the_document_has_every_operation_and_no_other(world):
    there = {
        (method.lower(), route.path) for route in world.routes.app.routes for method in getattr(route, "methods", ())
    }
    assert there == {(method, path) for path, operations in DOCUMENT["paths"].items() for method in operations}


def test_every_code_of_a_refusal_is_in_the_document_beside_its_status():
    found = set()
    for operations in DOCUMENT["paths"].values():
        for operation in operations.values():
            for status, answer in operation["responses"].items():
                schema = answer.get("content", {}).get("application/json", {}).get("schema", {})
                found |= {(code, int(status)) for code in schema.get("properties", {}).get("code", {}).get("enum", ())}
    elsewhere = {("method", 405)}
    assert found | elsewhere == {**CODES, **LATER}.items()


def test_every_parameter_of_a_path_is_described():
    for path, operations in DOCUMENT["paths"].items():
        names = {name for _, name, _, _ in string.Formatter().parse(path) if name}
        for operation in operations.values():
            assert {one["name"] for one in operation["parameters"] if one["in"] == "path"} == names


def test_the_document_is_served_to_nobody(world):
    for path in (b"/openapi.json", b"/docs", b"/redoc", b"/v1/openapi.json"):
        assert world.routes.send(scope_of("GET", path, [])).status == 401
        assert world.routes.ask("GET", path).status == 404
