"""Signed requests: what a client signs of a request, in the forms of RFC 9421 and RFC 9530, and how it is read again.

ECDSA on P-256 with SHA-256 (``ecdsa-p256-sha256``: r and s, 32 bytes each), by the key of the client's certificate. A
signature covers method, path, query, and the digest of a body that is sent whole or the range of a part of one (the
hash of an upload is in its path). It names the server's epoch and time and a nonce that grows, so that it is good once.
"""

from __future__ import annotations

import base64
import json
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from hansa.network.messages import Refusal

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import ECDSA, EllipticCurvePrivateKey, EllipticCurvePublicKey

TOLERANCE_S = 300  # how far ``created`` may be from the server's time
LARGEST_NONCE = 10**18 - 1
_COVERED = ("@method", "@path", "@query")
_BODY = ("content-digest", "content-range")
_INPUT = re.compile(
    r'hansa=(?P<params>\("@method" "@path" "@query"(?: "(?P<body>content-digest|content-range)")?\)'
    r';created=(?P<created>0|[1-9][0-9]{0,11});nonce="(?P<nonce>[1-9][0-9]{0,17})"'
    r';keyid="(?P<keyid>[0-9a-f]{64})";tag="(?P<epoch>[0-9a-f]{0,32})")'
)
_SIGNATURE = re.compile(r"hansa=:([A-Za-z0-9+/]{86}==):")
_DIGEST = re.compile(r"sha-256=:([A-Za-z0-9+/]{43}=):")
_HALF = 32  # bytes of r, and of s
UNKNOWN = (
    "expected a request signed with the key of an enrolled client's certificate, found none, or one that was replaced "
    "or is not known here; ask the coordinator for a new token and join again"
)


@dataclass(frozen=True, kw_only=True)
class Claim:
    """What a request says of its signature, before anything of it was checked.

    ``digest`` is the SHA-256 that its body must have, None for a part of an upload; ``base`` is what was signed.
    """

    created: int
    nonce: int
    keyid: str
    epoch: str
    digest: bytes | None
    has_body: bool
    signature: bytes
    base: bytes


class Signer:
    """Signs the requests of one client. Its time is the server's, learned from an answer.

    The client's clock counts for nothing. ``monotonic`` may stand still while the machine sleeps: the server's next
    answer puts it right.
    """

    def __init__(self, key: bytes, keyid: str, monotonic: Callable[[], float] = time.monotonic) -> None:
        self.keyid, self._key, self._monotonic = keyid, load_private_key(key), monotonic
        self._lock = threading.Lock()
        self._nonce, self._epoch = 0, ""
        self._ahead: float | None = None  # the server's time less ours

    @property
    def now(self) -> float | None:
        """The server's time, or None before its first answer."""
        return None if self._ahead is None else self._monotonic() + self._ahead

    def headers(self, method: str, target: bytes, *, digest: bytes | None = None, part: str = "") -> dict[str, str]:
        """The headers that sign a request: ``target`` is path and query as they are sent.

        ``digest`` is the SHA-256 of a body that is sent whole, ``part`` the Content-Range of a part of an upload.
        """
        with self._lock:
            self._nonce += 1
            nonce, epoch, now = self._nonce, self._epoch, self.now
        body = {"content-digest": f"sha-256=:{_base64(digest)}:"} if digest is not None else {}
        body = {"content-range": part} if part else body
        covered = " ".join(f'"{name}"' for name in (*_COVERED, *body))
        created = 0 if now is None else int(now)
        params = f'({covered});created={created};nonce="{nonce}";keyid="{self.keyid}";tag="{epoch}"'
        path, _, query = target.partition(b"?")
        signature = sign(self._key, _base(method, path, query, body, params))
        return {
            **{name.title(): value for name, value in body.items()},
            "Signature-Input": f"hansa={params}",
            "Signature": f"hansa=:{_base64(signature)}:",
        }

    def learn(self, answer: Any) -> bool:
        """Take time, epoch and nonce from the server's ``clock`` or ``replay``; False for any other answer."""
        if not isinstance(answer, Mapping) or answer.get("code") not in ("clock", "replay"):
            return False
        now, epoch, last = answer.get("now"), answer.get("epoch"), answer.get("last")
        if not (isinstance(now, float | int) and isinstance(epoch, str) and isinstance(last, int)):
            return False
        if not (0 <= now < 10**11 and re.fullmatch("[0-9a-f]{1,32}", epoch) and 0 <= last < LARGEST_NONCE - 10**6):
            return False
        with self._lock:
            self._ahead, self._epoch = now - self._monotonic(), epoch
            self._nonce = max(self._nonce, last)
        return True


def read_claim(method: str, path: bytes, query: bytes, headers: Sequence[tuple[bytes, bytes]]) -> Claim:
    """A request's signature as its headers state it; names are in lower case, as ASGI has them.

    Raises ``Refusal``: ``unauthenticated`` without a signature, ``signature`` for any but the exact forms.
    """
    given = _single(headers)
    if "signature-input" not in given and "signature" not in given:
        raise Refusal("unauthenticated", UNKNOWN)
    match = _INPUT.fullmatch(given.get("signature-input", ""))
    signed = _SIGNATURE.fullmatch(given.get("signature", ""))
    if match is None or signed is None:
        raise Refusal(
            "signature",
            'signature: expected hansa=("@method" "@path" "@query" ...);created;nonce;keyid;tag and hansa=:BASE64:, '
            "found another form; docs/protocol.md has it",
        )
    named = match["body"]
    has_body = given.get("content-length", "0") != "0" or "transfer-encoding" in given
    if ("content-range" in given) != (named == "content-range") or (has_body and named is None):
        raise Refusal("signature", "signature: expected the body's digest or range to be signed, found that it is not")
    if named == "content-range" and not (method == "PUT" and path.startswith(b"/v1/reports/")):
        raise Refusal("signature", "signature: expected the body's digest to be signed, found a range; not an upload")
    if named is not None and named not in given:
        raise Refusal("signature", f"signature: expected the header {named} that is signed, found none")
    body = {named: given[named]} if named else {}
    return Claim(
        created=int(match["created"]),
        nonce=int(match["nonce"]),
        keyid=match["keyid"],
        epoch=match["epoch"],
        digest=_digest(given["content-digest"]) if named == "content-digest" else None,
        has_body=has_body,
        signature=_exact(signed[1]),
        base=_base(method, path, query, body, match["params"]),
    )


def sign(key: EllipticCurvePrivateKey, message: bytes) -> bytes:
    """A signature of 64 bytes; of the same message the same one again, where the library can (RFC 6979)."""
    from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature

    r, s = decode_dss_signature(key.sign(message, _algorithm()))
    return r.to_bytes(_HALF, "big") + s.to_bytes(_HALF, "big")


def is_signed(key: EllipticCurvePublicKey, signature: bytes, message: bytes) -> bool:
    """Whether ``signature`` (64 bytes) is the key's over the message."""
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric import ec, utils
    from cryptography.hazmat.primitives.hashes import SHA256

    r, s = int.from_bytes(signature[:_HALF], "big"), int.from_bytes(signature[_HALF:], "big")
    try:
        key.verify(utils.encode_dss_signature(r, s), message, ec.ECDSA(SHA256()))
    except InvalidSignature:
        return False
    return len(signature) == 2 * _HALF


def load_private_key(pem: bytes) -> EllipticCurvePrivateKey:
    """A private key, which must be of P-256."""
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    key = load_pem_private_key(pem, password=None)
    assert isinstance(key, ec.EllipticCurvePrivateKey), "we made it ourselves"
    return key


@cache
def _algorithm() -> ECDSA:
    """ECDSA without random numbers where OpenSSL is 3.2 or newer."""
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ec import ECDSA
    from cryptography.hazmat.primitives.hashes import SHA256

    try:
        return ECDSA(SHA256(), deterministic_signing=True)
    except (TypeError, UnsupportedAlgorithm):  # before cryptography 43
        return ECDSA(SHA256())


def canonical(tree: Any) -> bytes:
    r"""The one JSON text of a tree of numbers, texts, lists and dictionaries: sorted names, no spaces, ASCII.

    >>> canonical({"b": 1, "a": "ä"})
    b'{"a":"\\u00e4","b":1}'
    """
    return json.dumps(tree, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")


def _base(method: str, path: bytes, query: bytes, body: Mapping[str, str], params: str) -> bytes:
    """The signature base of RFC 9421, section 2.5."""
    lines = [
        f'"@method": {method}',
        f'"@path": {path.decode("latin-1")}',
        f'"@query": ?{query.decode("latin-1")}',
        *(f'"{name}": {value}' for name, value in body.items()),
        f'"@signature-params": {params}',
    ]
    return "\n".join(lines).encode("utf-8")


def _single(headers: Sequence[tuple[bytes, bytes]]) -> dict[str, str]:
    """The headers that matter here, each at most once."""
    wanted = {"signature-input", "signature", *_BODY, "content-length", "transfer-encoding"}
    found: dict[str, str] = {}
    for raw, value in headers:
        name = raw.decode("latin-1").lower()
        if name not in wanted:
            continue
        if name in found:
            raise Refusal("signature", f"signature: expected the header {name} once, found it again")
        found[name] = value.decode("latin-1").strip(" \t")
    return found


def _digest(header: str) -> bytes:
    """The SHA-256 in a Content-Digest."""
    match = _DIGEST.fullmatch(header)
    if match is None:
        raise Refusal("signature", "content-digest: expected sha-256=:BASE64:, found another form")
    return _exact(match[1])


def _exact(text: str) -> bytes:
    """Bytes in base64 of which there is but one spelling."""
    found = base64.b64decode(text)
    if _base64(found) != text:
        raise Refusal("signature", "signature: expected base64 whose last bits are zero, found others")
    return found


def _base64(body: bytes) -> str:
    return base64.b64encode(body).decode("ascii")
