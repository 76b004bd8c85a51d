"""The form of a signed request, and for what a signature holds."""

import base64
import hashlib

import pytest
from cryptography.hazmat.primitives.serialization import load_pem_public_key
from hypothesis import given
from hypothesis import strategies as st

from hansa.network import identity
from hansa.network.messages import CODES, Refusal
from hansa.network.signing import Signer, is_signed, load_private_key, read_claim, sign
from support_signing import raw

KEY, _ = identity.make_request("berlin")
PUBLIC = load_private_key(KEY).public_key()
KEYID = "ab" * 32
PATHS = st.text(st.characters(codec="ascii", min_codepoint=33, max_codepoint=126, exclude_characters="?#"), max_size=30)


def claim_of(method, target, headers):
    path, _, query = target.partition(b"?")
    return read_claim(method, path, query, raw(headers))


def holds(method, target, headers):
    """Whether the headers sign the request; no other error than a refusal comes of them."""
    try:
        claim = claim_of(method, target, headers)
    except Refusal as refused:
        return CODES[refused.code] != 401
    return is_signed(PUBLIC, claim.signature, claim.base)


def test_the_signature_of_rfc_9421_appendix_b_2_4_holds():
    key = load_pem_public_key(
        b"-----BEGIN PUBLIC KEY-----\n"
        b"MFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAEqIVYZVLCrPZHGHjP17CTW0/+D9Lf\n"
        b"w0EkjqF7xB4FivAxzic30tMM4GF+hR6Dxh71Z50VGGdldkkDXZCnTNnoXQ==\n"
        b"-----END PUBLIC KEY-----\n"
    )
    digest = "mEWXIS7MaLRuGgxOBdODa3xqM1XdEvxoYhvlCFJ41QJgJc4GTsPp29l5oGX69wWdXymyU0rjJuahq4l5aGgfLQ=="
    base = (
        f'"@status": 200\n"content-type": application/json\n"content-digest": sha-512=:{digest}:\n'
        '"content-length": 23\n'
        '"@signature-params": ("@status" "content-type" "content-digest" "content-length")'
        ';created=1618884473;keyid="test-key-ecc-p256"'
    )
    signature = "wNmSUAhwb5LxtOtOpNa6W5xj067m5hFrj0XQ4fvpaCLx0NKocgPquLgyahnzDnDAUy5eCdlYUEkLIj+32oiasw=="
    assert is_signed(key, base64.b64decode(signature), base.encode())
    assert not is_signed(key, base64.b64decode(signature), base.encode() + b" ")


def test_what_is_signed_is_the_signature_base_of_the_rfc():
    signer = Signer(KEY, KEYID, monotonic=lambda: 7.0)
    signer.learn({"code": "clock", "now": 1000.0, "epoch": "e0", "last": 41})
    claim = claim_of("PUT", b"/v1/a%20b?x=1&y=", signer.headers("PUT", b"/v1/a%20b?x=1&y=", digest=bytes(32)))
    assert claim.base.decode() == (
        '"@method": PUT\n"@path": /v1/a%20b\n"@query": ?x=1&y=\n'
        '"content-digest": sha-256=:AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=:\n'
        '"@signature-params": ("@method" "@path" "@query" "content-digest");created=1000;nonce="42"'
        f';keyid="{KEYID}";tag="e0"'
    )


def test_a_part_of_an_upload_is_signed_by_its_range():
    target = b"/v1/reports/r/train-0-0-update/" + KEYID.encode()
    claim = claim_of("PUT", target, Signer(KEY, KEYID).headers("PUT", target, part="bytes 0-9/20"))
    assert (claim.digest, b'"content-range": bytes 0-9/20\n' in claim.base) == (None, True)


def test_nothing_but_an_upload_is_signed_by_a_range():
    for method, path in (("POST", b"/v1/hello"), ("POST", b"/v1/reports/r"), ("PUT", b"/v1/x")):
        with pytest.raises(Refusal, match="not an upload"):
            claim_of(method, path, Signer(KEY, KEYID).headers(method, path, part="bytes 0-9/20"))


@given(method=st.sampled_from(["GET", "POST", "PUT"]), path=PATHS, query=PATHS, body=st.binary(max_size=20))
def test_what_was_signed_is_read_again_and_holds(method, path, query, body):
    target = f"/{path}?{query}".encode()
    digest = hashlib.sha256(body).digest() if body else None
    claim = claim_of(method, target, Signer(KEY, KEYID).headers(method, target, digest=digest))
    assert (claim.keyid, claim.nonce, claim.digest) == (KEYID, 1, digest)
    assert is_signed(PUBLIC, claim.signature, claim.base)


@pytest.mark.parametrize(
    ("method", "target", "old", "new"),
    [
        ("POST", b"/v1/work?wait=1", "", ""),
        ("GET", b"/v1/work?wait=2", "", ""),
        ("GET", b"/v1/other?wait=1", "", ""),
        ("GET", b"/v1/work", "", ""),
        ("GET", b"/v1/work?wait=1", 'nonce="1"', 'nonce="2"'),
        ("GET", b"/v1/work?wait=1", "created=0", "created=1"),
        ("GET", b"/v1/work?wait=1", 'tag=""', 'tag="e0"'),
        ("GET", b"/v1/work?wait=1", KEYID, "cd" * 32),
    ],
)
def test_a_signature_holds_for_one_request_alone(method, target, old, new):
    headers = Signer(KEY, KEYID).headers("GET", b"/v1/work?wait=1")
    headers["Signature-Input"] = headers["Signature-Input"].replace(old, new) if old else headers["Signature-Input"]
    claim = claim_of(method, target, headers)
    assert not is_signed(PUBLIC, claim.signature, claim.base)


@given(data=st.data())
def test_a_change_of_a_signing_header_is_refused_or_does_not_hold(data):
    headers = Signer(KEY, KEYID).headers("PUT", b"/x", digest=bytes(32))
    name = data.draw(st.sampled_from(sorted(headers)))
    place = data.draw(st.integers(0, len(headers[name]) - 1))
    put = data.draw(st.text(st.characters(codec="latin-1", exclude_characters="\r\n"), max_size=2))
    changed = headers[name][:place] + put + headers[name][place + 1 :]
    assert holds("PUT", b"/x", {**headers, name: changed}) == (changed.strip(" \t") == headers[name])


@pytest.mark.parametrize(
    "more", [{"content-length": "5"}, {"transfer-encoding": "chunked"}, {"content-range": "bytes 0-4/5"}]
)
def test_a_body_or_a_range_that_is_not_signed_is_refused(more):
    with pytest.raises(Refusal, match="expected the body's digest or range to be signed"):
        claim_of("PUT", b"/x", {**Signer(KEY, KEYID).headers("PUT", b"/x"), **more})


def test_a_header_that_comes_twice_is_refused():
    headers = raw(Signer(KEY, KEYID).headers("GET", b"/x"))
    with pytest.raises(Refusal, match="once, found it again"):
        read_claim("GET", b"/x", b"", [*headers, headers[-1]])


def test_a_signature_is_64_bytes_of_r_and_s():
    key = load_private_key(KEY)
    assert len(sign(key, b"message")) == 64
    assert is_signed(key.public_key(), sign(key, b"message"), b"message")
    assert not is_signed(key.public_key(), bytes(64), b"message")
    assert not is_signed(key.public_key(), sign(key, b"message") + b"\0", b"message")


JSON = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.lists(st.integers()))


@given(answer=st.dictionaries(st.sampled_from(["now", "epoch", "last"]), JSON), code=st.sampled_from(["clock", "x"]))
def test_no_answer_of_a_server_makes_a_signer_fail(answer, code):
    signer = Signer(KEY, KEYID)
    signer.learn({**answer, "code": code})
    signer.learn(answer.get("now"))
    claim_of("GET", b"/x", signer.headers("GET", b"/x"))
