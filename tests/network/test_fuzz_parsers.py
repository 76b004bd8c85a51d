"""Every parser of foreign bytes, on bytes that are nearly right: the promised errors only, and little memory.

| of | parsers |
|---|---|
| what clients send | messages, reports by codec, signing requests, signing headers, ranges, lengths, names of slots |
| what a server sends | messages, plans, vectors, certificates, statuses, ranges, offsets, times of the signer |
| what people hand on | join tokens, logs |
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gzip
import json
import re
import tempfile
from pathlib import Path
from types import SimpleNamespace

import httpx2 as httpx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hansa.core.chain import Raw
from hansa.core.errors import InputError, ProtocolError, RunError
from hansa.core.key import Key
from hansa.core.protocols import Plan, Report, Slot, Updates
from hansa.network import audit, calls, gate, identity, messages, ranges, signing, transfers
from hansa.network.calls import Line, Signed, Unreachable
from hansa.network.identity import Authority
from hansa.network.journal import lines
from hansa.network.messages import Receipt, Refusal, write
from hansa.network.pace import Patient
from hansa.network.receipts import Seal, check_receipt
from hansa.network.rounds import Arrival
from hansa.network.signing import Signer, read_claim
from hansa.network.store import Store
from hansa.network.token import JoinToken
from hansa.transforms.quantize import Quantize
from hansa.transforms.sparsify import TopK
from hansa.wire import Nonzeros, pack, plan_parts, unpack, unpack_report
from support_fuzz import foreign, mutated, peak_of
from support_signing import SigningDesk

SHA, SLOT, LENGTH = "0" * 64, Slot(3, 1, "update"), 6
# A parsed tree takes some bytes for each of its body's: ``[[],[],...]`` is the worst there is.
CONSTANT, MULTIPLE = 2**18, 100


def row(codec):
    values = np.array([[0.5, 0.0, -2.0, 0.0, 0.5, 0.0]], np.float32)
    side = {"quantize.step": np.array([0.5], np.float32)}
    return Updates(("a",), values, np.array([2.0]), {"loss": np.array([0.25])}, side)


@functools.cache
def authority():
    return Authority.open(Path(tempfile.mkdtemp(prefix="hansa-fuzz-")))


@functools.cache
def own_key():
    return identity.make_request("berlin")


@functools.cache
def seal():
    return Seal.open(authority())


@functools.cache
def seeds(name):
    """Bodies that a parser takes."""
    csr, pem = own_key()[1], authority().certificate
    settled = messages.Settlement(number=4, run="r", task="train", round=1, attempt=0, counted=True)
    released = messages.Released(run="r", round=1, vectors={"params": SHA})
    plan = messages.write_plan(
        plan_parts(Plan(SLOT, True, {}, ({"a": 1},), Key.of(1), {"a": 2}, {"a": {"b": np.ones(2)}}), "a")[0],
        {"params": SHA},
    )
    work = messages.Work(
        run="r", settlements=(settled,) * 2, plan=plan, released=released, finished=True, retry_after_s=1.5
    )
    receipt = seal().receipt(
        Receipt(slot=str(SLOT), sha256=SHA, status="late", client="berlin", run="r", received_at=1.5)
    )
    return {
        "enrol": (write(messages.Enrol(token="t", secret=b"s" * 32, name="berlin", request=csr)),),
        "enrolled": (write(messages.Enrolled(name="berlin", certificate=pem)),),
        "renew": (write(messages.Renew(request=csr)),),
        "hello": (write(messages.Hello(protocol=2, version="1", fingerprints=("ab" * 32,) * 2, frozen="none")),),
        "welcome": (write(messages.Welcome(run="r", fingerprint="f", version="1", receipts=pem, frozen="x")),),
        "work": (write(work), write(messages.Work(run="r"))),
        "plan": (plan,),
        "receipt": (write(receipt),),
        "vector": (pack(np.arange(20, dtype=np.float32)), pack({"a": np.ones(3), "b": [1, "x", b"y", None, 0.5]})),
        "request": (csr,),
        "certificate": (pem, seal().certificate, authority().sign_client(csr, "berlin")),
        "token": (
            JoinToken(url="https://fl.example.org:8443", authority=SHA, id="t1", secret=bytes(32), name="gw-*")
            .encode()
            .encode(),
        ),
    }[name]  # fmt: skip


def codec_seed(name, codec):
    if name == "levels":
        arrays = {"levels": np.zeros((1, 4), np.uint8), "step": np.ones(1, np.float32)}
    elif name == "sparse":
        arrays = {"positions": np.array([[0, 2, 4]], np.uint32), "values": np.ones((1, 3), np.float32)}
    else:
        arrays = dict(codec.pack(row(codec)._replace(side={})))
    return pack({"updates": {"arrays": arrays, "weights": np.ones(1), "tail": {"loss": np.ones(1)}}, "refused": None})


CODECS = {
    "raw": Raw(),
    "levels": Quantize(bits=5).codec(Raw()),
    "sparse": TopK(fraction=0.5).codec(Raw()),
    "sums": Nonzeros(),
}

# name -> (seeds, what reads them, errors that may come)
BODIES = {
    **{
        name: (name, getattr(messages, f"read_{name}"), ProtocolError)
        for name in ("enrol", "enrolled", "renew", "hello", "welcome", "work", "plan", "receipt")
    },
    "vector": ("vector", unpack, ProtocolError),
    "signing request": ("request", identity.request_key_hash, ProtocolError),
    "request to be signed": ("request", lambda body: authority().sign_client(body, "berlin"), ProtocolError),
    "certificate of receipts": (
        "certificate", lambda body: identity.key_of_receipts(body, authority().certificate), ProtocolError,
    ),
    "certificate": ("certificate", identity.fingerprint, ProtocolError),
    "certificate for a key": (
        "certificate", lambda body: identity.certifies(body, own_key()[0], authority().certificate), (),
    ),
    "join token": ("token", lambda body: JoinToken.decode(body.decode("latin-1")), InputError),
    "receipt that is checked": ("receipt", lambda body: checked_receipt(body), ProtocolError),
}  # fmt: skip


def checked_receipt(body):
    found = messages.read_receipt(body)
    key = identity.key_of_receipts(seal().certificate, authority().certificate)
    check_receipt(found, key, client="berlin", run="r", slot=str(SLOT), sha256=SHA)
    return found


def outcome(what, errors):
    """What a call gives, and the error of one of these kinds that it raised instead."""
    try:
        return what(), None
    except errors as error:
        return None, error


def assert_harmless(read, body, errors):
    """Data or a promised error, in little memory."""
    found, peak = peak_of(lambda: read(body))
    if isinstance(found, Exception):
        assert isinstance(found, errors), repr(found)
        assert len(str(found)) < 1500
    assert peak <= CONSTANT + MULTIPLE * len(body), (peak, len(body))
    return found


@pytest.mark.parametrize("name", BODIES)
def test_a_parser_takes_its_own(name):
    which, read, _ = BODIES[name]
    for body in seeds(which):
        with contextlib.suppress(ProtocolError if "certificate" in name else ()):  # one of three is the one looked for
            read(body)


@pytest.mark.parametrize("name", BODIES)
@settings(max_examples=150)
@given(data=st.data())
def test_foreign_bytes_give_the_promised_error_or_data_in_little_memory(name, data):
    which, read, errors = BODIES[name]
    assert_harmless(read, data.draw(foreign(*seeds(which))), errors)


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("length", [LENGTH, None])
@settings(max_examples=100)
@given(data=st.data())
def test_a_report_from_anybody_is_a_row_mail_or_a_protocol_error(name, length, data):
    if length is None and name in ("levels", "sparse"):
        return  # only sums and mail have a length that nobody knows before
    codec = CODECS[name]
    others = (pack({"mail": {"a": [1]}, "refused": None}), pack({"mail": None, "refused": "no"}))
    body = data.draw(foreign(codec_seed(name, codec), *others))

    def read(body):
        with np.errstate(all="ignore"):
            return unpack_report(body, SLOT, "a", codec, length)

    if length is None and b"places" in body:
        with contextlib.suppress(ProtocolError):  # a sum that is mostly zero may be as long as _LONGEST_SUM
            read(body)
        return
    found = assert_harmless(read, body, ProtocolError)
    if isinstance(found, Report) and isinstance(found.payload, Updates) and length is not None:
        assert found.payload.values.shape == (1, length)


WORST = [
    b"[" + b"[]," * 20_000 + b"0]",
    b"[" + b"{}," * 20_000 + b"0]",
    b"[" + b'{"#m":{}},' * 6_000 + b"0]",
    b"[" + b'"",' * 20_000 + b"0]",
    b"[" + b"0.5," * 20_000 + b"0]",
    b"[" + b'{"#b":""},' * 6_000 + b"0]",
    b'{"#m":{' + b",".join(b'"%x":1' % i for i in range(8_000)) + b"}}",
]


@pytest.mark.parametrize("tree", WORST, ids=range(len(WORST)))
def test_the_tree_that_takes_most_memory_takes_a_hundred_times_its_body(tree):
    text = json.dumps({"__metadata__": {"tree": tree.decode()}}).encode()
    body = len(text).to_bytes(8, "little") + text
    assert_harmless(unpack, body, ProtocolError)


# ------------------------------------------------------------------------------------------------- headers and names


def texts(*good):
    """Header values: mostly like good ones."""
    return foreign(*(text.encode("latin-1") for text in good)).map(lambda body: body.decode("latin-1"))


@settings(max_examples=300)
@given(text=texts("bytes 0-9/20", "bytes */9", "bytes 5-8/9"), length=st.integers(0, 2**50))
def test_a_content_range_from_anybody_is_a_part_or_a_refusal(text, length):
    with contextlib.suppress(Refusal):
        part = ranges.read_content_range(text)
        assert 0 <= part.first <= part.stop <= part.total
        assert part.total > 0
    with contextlib.suppress(Refusal):
        part = ranges.uploaded_part(length, text)
        assert part.stop - part.first == length


@settings(max_examples=300)
@given(text=texts("bytes=0-9", "bytes=5-", "bytes=-5", "bytes=0-1,3-4"), total=st.integers(0, 2**50))
def test_a_range_from_anybody_lies_within_the_body_or_is_refused(text, total):
    with contextlib.suppress(Refusal):
        part = ranges.asked_part(text, total)
        assert 0 <= part.first <= part.stop <= part.total == total


@settings(max_examples=300)
@given(length=texts("0", "17", "+5", "1_0", "5, 5"), encoding=st.one_of(st.none(), texts("chunked", "gzip")))
def test_a_length_from_anybody_is_plain_digits_or_refused(length, encoding):
    try:
        found = ranges.read_length(length, encoding)
    except Refusal:
        return
    assert length.isascii() and length.isdigit() and found == int(length) < 10**15  # noqa: PT018  # one claim


@settings(max_examples=300)
@given(text=texts("train-0-0-update", "prepare-12-3-sums.2"))
def test_a_slots_name_from_anybody_is_the_slots_own_or_refused(text):
    with contextlib.suppress(ProtocolError):
        slot = messages.slot_of(text)
        assert re.fullmatch(r"[a-zA-Z0-9_.-]+", str(slot))
        assert messages.slot_of(str(slot)) == slot


def signed_headers():
    signer = Signer(own_key()[0], "ab" * 32)
    return {
        **signer.headers("PUT", b"/v1/reports/r/s/x", digest=bytes(32)),
        "Content-Range": "bytes 0-9/20",
        "Content-Length": "10",
    }


@settings(max_examples=400)
@given(data=st.data())
def test_signing_headers_from_anybody_are_a_claim_or_a_refusal(data):
    good = signed_headers()
    names = data.draw(st.lists(st.sampled_from([*good, "Transfer-Encoding", "X"]), max_size=6))
    values = {name: good.get(name, "chunked").encode() for name in names}
    given_headers = [
        (name.lower().encode(), data.draw(st.one_of(st.just(values[name]), foreign(values[name])))) for name in names
    ]
    target, query = data.draw(foreign(b"/v1/reports/r/s/x")), data.draw(st.binary(max_size=20))
    size = sum(len(value) for _, value in given_headers) + len(target)
    found, peak = peak_of(lambda: read_claim("PUT", target, query, given_headers))
    if isinstance(found, Exception):
        assert isinstance(found, Refusal), repr(found)
        assert found.code in ("unauthenticated", "signature")
    else:
        assert len(found.signature) == 64
        assert signing.is_signed(signing.load_private_key(own_key()[0]).public_key(), found.signature, b"x") is False
    assert peak <= CONSTANT + 20 * size


@settings(max_examples=300)
@given(lengths=st.lists(foreign(b"17", b"0", b"-1", b"1, 2"), max_size=3), chunked=st.booleans())
def test_the_framing_of_a_body_is_one_length_or_refused(lengths, chunked):
    headers = [(b"Content-Length", value) for value in lengths] + [(b"Transfer-encoding", b"chunked")] * chunked
    scope = {"headers": headers}
    size, refusal = outcome(lambda: gate._framing(scope), Refusal)
    if refusal is not None:
        assert gate.answer(refusal, scope).status_code == 400
        return
    assert len(lengths) + chunked <= 1
    assert size == (int(lengths[0]) if lengths else 0)


# ------------------------------------------------------------------------------------------- what a server may answer


class Pieces(httpx.SyncByteStream):
    """A body as it comes; it counts how much of it was taken."""

    def __init__(self, pieces):
        self.pieces, self.taken = pieces, 0

    def __iter__(self):
        for piece in self.pieces:
            self.taken += len(piece)
            yield piece


def line_to(answer):
    """A client's line to a server that answers as ``answer(request)`` says."""
    line = Line.__new__(Line)
    line.url, line._authority = "https://localhost:1", authority().certificate
    auth = Signed(Signer(own_key()[0], "ab" * 32))
    line._http = httpx.Client(base_url=line.url, transport=httpx.MockTransport(answer), auth=auth)
    return line


REFUSALS = [
    json.dumps({"error": "a sentence", "code": code, "now": 1.0, "epoch": "ab", "last": 3}).encode()
    for code in ("unauthenticated", "clock", "replay", "revoked", "offset", "busy", "nonsense")
]


@settings(max_examples=300)
@given(
    status=st.sampled_from([200, 202, 206, 301, 400, 401, 403, 404, 409, 429, 500, 503, 507]),
    body=foreign(*REFUSALS),
    after=st.one_of(st.none(), texts("5", "-1", "1e9", "²")),
)
def test_whatever_a_server_answers_a_client_knows_what_to_do(status, body, after):
    headers = {} if after is None else {"Retry-After": after.encode("latin-1")}
    line = line_to(lambda request: httpx.Response(status, headers=headers, stream=Pieces([body])))
    found, error = outcome(lambda: line.call("GET", "/v1/work"), (Refusal, RunError, Unreachable))
    if isinstance(error, Refusal):
        assert error.code in messages.CODES
        assert str(error).isprintable()
    elif isinstance(error, Unreachable):
        assert error.after_s is None or 0 <= error.after_s < 10**10
    elif error is None:
        assert found.body == body


@pytest.mark.parametrize("status", [401, 403, 503])
def test_a_refusal_without_end_is_not_read_to_its_end(status):
    endless = Pieces(b"[" * 65536 for _ in range(10_000))
    with pytest.raises(RunError, match="expected an answer of at most"):
        line_to(lambda request: httpx.Response(status, stream=endless)).call("GET", "/v1/work")
    assert endless.taken < 10 * 65536


@pytest.mark.parametrize("code", ["clock", "replay"])
def test_a_server_that_tells_the_time_is_asked_once_more_and_no_oftener(code):
    said = next(body for body in REFUSALS if code.encode() in body)
    answers = [httpx.Response(401, stream=Pieces([said])), httpx.Response(200, stream=Pieces([b"good"]))]
    assert line_to(lambda request: answers.pop(0)).call("GET", "/v1/work").body == b"good"
    asked = []
    with pytest.raises(Unreachable, match="another signature"):
        line_to(lambda request: asked.append(request) or httpx.Response(401, stream=Pieces([said]))).call("GET", "/")
    assert len(asked) == 2


def test_a_refusal_that_is_packed_is_not_unpacked():
    packed = Pieces([gzip.compress(bytes(2**26))])
    headers = {"Content-Encoding": "gzip"}
    line = line_to(lambda request: httpx.Response(401, headers=headers, stream=packed))
    found, peak = peak_of(lambda: line.call("GET", "/v1/work"))
    assert isinstance(found, RunError)
    assert peak < 2**21


def test_a_client_whose_certificate_was_replaced_is_told_so():
    line = line_to(lambda request: httpx.Response(401, stream=Pieces([REFUSALS[0]])))
    with pytest.raises(Refusal, match="a sentence") as caught:
        line.call("GET", "/v1/work")
    assert caught.value.code == "unauthenticated"


@settings(max_examples=200)
@given(
    told=texts("12", "0", "²", "99999999999999999999"),
    where=texts("bytes 5-8/9", "bytes 0-8/9"),
    length=texts("9", "0", "-1"),
    partial=st.booleans(),
    have=st.integers(0, 9),
)
def test_whatever_place_a_server_names_it_lies_in_the_transfer_or_is_refused(told, where, length, partial, have):
    headers = httpx.Headers(
        [(b"Content-Range", where.encode("latin-1")), (b"Content-Length", length.encode("latin-1"))]
    )
    with contextlib.suppress(RunError):
        part = transfers._place(SimpleNamespace(status_code=206 if partial else 200, headers=headers), have)
        assert part.first in (0, have)
        assert part.stop == part.total
    parcel = transfers.Parcel.of(bytes(20))
    upload = transfers.Upload(None, "/", parcel)
    with contextlib.suppress(Unreachable):
        upload._advance(calls.Answer(202, {"Upload-Offset": told}, b""))
        assert 0 < upload._offset <= 20


@settings(max_examples=200)
@given(body=foreign(*(identity.ssl.PEM_cert_to_DER_cert(pem.decode()) for pem in seeds("certificate"))))
def test_a_certificate_of_anybody_is_named_in_a_sentence(body):
    assert identity.is_issued_by(body, authority().certificate) in (True, False)
    assert "certificate" in calls.not_ours("https://localhost:1", body, SHA)


def work_tree(**changes):
    settled = {"number": 1, "run": "r", "task": "train", "round": 0, "attempt": 0, "counted": True}
    released = {"run": "r", "round": 0, "vectors": {}}
    for tree in (settled, released):
        tree.update({name: value for name, value in changes.items() if name in tree})
    return {
        **{"run": "r", "settlements": [settled], "plan": None, "released": released},
        **{"finished": False, "retry_after_s": changes.get("retry_after_s", 1.0)},
    }


def plan_tree(*slot):
    fields = {"slot": list(slot), "learn": True, "settings": [], "key": bytes(32), "variant": None, "mail": None}
    return {**fields, "broadcast": {}}


@pytest.mark.parametrize("value", [2**62, -1, 10**400])
@pytest.mark.parametrize("name", ["number", "round", "attempt"])
def test_a_count_that_no_database_takes_is_a_protocol_error(name, value):
    assert messages.read_work(pack(work_tree())).released.round == 0
    with pytest.raises(ProtocolError, match="expected numbers from 0 to"):
        messages.read_work(pack(work_tree(**{name: value})))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0, 10**400])
def test_a_pace_that_cannot_be_is_kept_within_reason_and_a_time_that_cannot_be_is_refused(value):
    patient = Patient()
    patient.hear(messages.read_work(pack(work_tree(retry_after_s=value))).retry_after_s)
    assert 0 <= patient.until_next(0.0) < 3600 * 24
    fields = {**dataclasses.asdict(messages.read_receipt(*seeds("receipt"))), "received_at": value}
    with pytest.raises(ProtocolError):
        checked_receipt(pack(fields))


@pytest.mark.parametrize(
    "slot", [(-1, 0, "update", "train"), (0, 10**400, "u", "train"), (0, 0, "../x", "train"), (0, 0, "u", "")]
)
def test_a_plan_for_a_slot_that_no_text_names_is_a_protocol_error(slot):
    assert messages.read_plan(pack(plan_tree(0, 0, "update", "train"))).slot == Slot(0, 0, "update")
    with pytest.raises(ProtocolError, match="slot"):
        messages.read_plan(pack(plan_tree(*slot)))


# ----------------------------------------------------------------------------------------------------------- the log


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    """The lines of a log, and the authority that signed it."""
    desk = SigningDesk(tmp_path_factory.mktemp("log"))
    desk.enrol("berlin")
    rounds, slot = desk.coordinator.rounds, Slot(0, 0, "update")
    rounds.plan(slot, True, "hash")
    rounds.collect(slot, {"berlin": b"plan"}, {})
    rounds.record(slot, Arrival(client="berlin", sha256=SHA, size=3, form="x"))
    rounds.freeze(slot, 1)
    rounds.settle(slot, ["berlin"])
    authority_pem, store = desk.coordinator.authority.certificate, desk.store
    desk.close()
    store = Store(store.folder)
    found = list(lines(store))
    store.close()
    assert audit.check(found, authority_pem).problems == ()
    return found, authority_pem


VALUES = st.one_of(st.none(), st.booleans(), st.integers(-3, 3), st.just("é"), st.just([]), st.just({}), st.just(["a"]))


@settings(max_examples=300)
@given(data=st.data())
def test_a_log_from_anybody_is_whole_or_has_problems(log, data):
    """Lines of other bytes, and canonical lines of other values."""
    found, authority_pem = log
    changed = list(found)
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(changed) - 1))
        if data.draw(st.booleans()):
            changed[place] = data.draw(mutated([changed[place]]))
            continue
        with contextlib.suppress(ValueError):
            tree = audit.read_line(changed[place])
            inner = (
                tree["what"]
                if data.draw(st.booleans()) and isinstance(tree.get("what"), dict) and tree["what"]
                else tree
            )
            inner[data.draw(st.sampled_from(sorted(inner)))] = data.draw(VALUES)
            changed[place] = signing.canonical(tree)
    checked = audit.check(changed, authority_pem)
    assert (checked.problems == ()) == (changed == found)
    assert all(len(problem) < 1000 for problem in checked.problems)
