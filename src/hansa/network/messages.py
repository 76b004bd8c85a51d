"""The closed list of messages between a coordinator and its clients: what each holds, packed and checked by hand.

Bodies are those of ``hansa.wire``: arrays, numbers, names. A field that is missing, extra or of another type is a
``ProtocolError``; nothing in a message names a class, a module or a path.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np

from hansa.core.errors import InputError, ProtocolError
from hansa.core.key import Key
from hansa.core.protocols import Plan, Slot
from hansa.wire import pack, unpack

PROTOCOL = 2
SHA256 = re.compile(r"[0-9a-f]{64}")
NO_FROZEN = "none"
LASTING = "privacy budget: "  # a refusal that begins so will be the next answer, too: the owner's budget is spent
_MOST = 2**62
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")

# Why a request is refused, and the HTTP status that says so.
CODES: Mapping[str, int] = {
    "malformed": 400,
    "unauthenticated": 401,
    "signature": 401,  # not of the exact form, or the body is not the one that was signed
    "clock": 401,  # made at another time or for another start of the server: sign again with ``now`` and ``epoch``
    "replay": 401,  # its nonce was used: sign again with one above ``last``
    "revoked": 403,
    "expired": 403,  # the certificate's life is over: renew it, or ask for a new token
    "token": 403,
    "not-asked": 404,
    "not-found": 404,
    "method": 405,
    "another-app": 409,
    "another-model": 409,  # the app is the same, the frozen parameters are not
    "hello-first": 409,
    "conflict": 409,
    "offset": 409,
    "length-required": 411,
    "too-large": 413,
    "range": 416,
    "digest": 422,
    "protocol": 426,
    "too-many": 429,  # over a quota: come back after ``retry_after_s``
    "busy": 503,  # another process keeps the database to itself: come back after ``retry_after_s``
    "no-space": 507,
    "superseded": 503,  # another coordinator has taken over: come again, to that one
}


class Refusal(ProtocolError):
    """A request that the coordinator refuses: a code of ``CODES``, a sentence for a person, and what a client needs."""

    def __init__(self, code: str, sentence: str, **more: Any) -> None:
        assert code in CODES
        self.code, self.more = code, more
        super().__init__(sentence)


@dataclass(frozen=True, kw_only=True)
class Enrol:
    """A client asks for its certificate: the token's id and one-time secret, the name it wants, and a CSR in PEM."""

    token: str
    secret: bytes
    name: str
    request: bytes


@dataclass(frozen=True, kw_only=True)
class Enrolled:
    """The client's certificate, in PEM."""

    name: str
    certificate: bytes


@dataclass(frozen=True, kw_only=True)
class Renew:
    """A client asks for its next certificate, by a CSR in PEM, of the same key or of a new one."""

    request: bytes


@dataclass(frozen=True, kw_only=True)
class Hello:
    """A client says which apps its owner agreed to, by fingerprint, and which version of hansa it runs.

    ``frozen`` is the hash of its model's frozen parameters (``NO_FROZEN``: it has none); empty before it looked.
    """

    protocol: int
    version: str
    fingerprints: tuple[str, ...]
    frozen: str = ""


@dataclass(frozen=True, kw_only=True)
class Welcome:
    """The run that is on, which of the client's apps it asks for, and the certificate (PEM) of the receipts' key.

    Where ``frozen`` is not empty and the hello named no hash, the client takes part only after a hello that does.
    """

    run: str
    fingerprint: str
    version: str
    receipts: bytes = b""
    frozen: str = ""


@dataclass(frozen=True, kw_only=True)
class Settlement:
    """Whether a client's update counted in an attempt; ``number`` grows, so that a client can say what it has seen."""

    number: int
    run: str
    task: str
    round: int
    attempt: int
    counted: bool


@dataclass(frozen=True, kw_only=True)
class Released:
    """The newest model that the server released: the SHA-256 of each vector's blob."""

    run: str
    round: int
    vectors: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a client is to do next: first settle, then perhaps keep the released model, then perhaps answer a plan."""

    run: str
    settlements: tuple[Settlement, ...] = ()
    plan: bytes | None = None
    released: Released | None = None
    finished: bool = False
    retry_after_s: float = 0.0

    @property
    def says_something(self) -> bool:
        """Whether there is anything for the client to do now."""
        return bool(self.settlements or self.plan is not None or self.released is not None or self.finished)


@dataclass(frozen=True, kw_only=True)
class Receipt:
    """What became of a report: ``accepted``, ``refused`` (with a reason) or ``late``.

    ``received_at`` is the server's time, in seconds since 1970; ``signature`` that of the receipts' key over the rest.
    """

    slot: str
    sha256: str
    status: str
    reason: str = ""
    client: str = ""
    run: str = ""
    received_at: float = 0.0
    signature: bytes = b""


@dataclass(frozen=True, kw_only=True)
class ClientPlan:
    """One client's part of a plan, before its broadcast vectors were fetched: ``vectors`` holds their SHA-256."""

    slot: Slot
    learn: bool
    settings: tuple[Any, ...]
    key: Key
    variant: Any
    mail: Any
    vectors: Mapping[str, str]

    def plan(self, client: str, broadcast: Mapping[str, Any]) -> Plan:
        """The plan as the client's half of the core wants it."""
        variants = {} if self.variant is None else {client: self.variant}
        mail = {} if self.mail is None else {client: self.mail}
        return Plan(self.slot, self.learn, broadcast, self.settings, self.key, variants, mail)


def write(message: Enrol | Enrolled | Renew | Hello | Welcome | Work | Receipt) -> bytes:
    """The body of a message.

    >>> read_receipt(write(Receipt(slot="train-0-0-update", sha256="0" * 64, status="late"))).status
    'late'
    """
    tree = _tree(message)
    if isinstance(message, Work) and message.plan is not None:
        tree["plan"] = np.frombuffer(message.plan, np.uint8)  # an array travels as it is, bytes as base64
    return pack(tree)


def read_enrol(body: bytes) -> Enrol:
    """The message in a body; ``ProtocolError`` when it is not one. The other readers likewise."""
    return Enrol(**_fields(unpack(body), "enrol", token=str, secret=bytes, name=str, request=bytes))


def read_enrolled(body: bytes) -> Enrolled:
    """A client's certificate."""
    return Enrolled(**_fields(unpack(body), "enrolled", name=str, certificate=bytes))


def read_renew(body: bytes) -> Renew:
    """A client's request for its next certificate."""
    return Renew(**_fields(unpack(body), "renew", request=bytes))


def read_hello(body: bytes) -> Hello:
    """A client's hello."""
    tree = _fields(unpack(body), "hello", protocol=int, version=str, fingerprints=list, frozen=str)
    if not all(isinstance(text, str) and len(text) <= 128 and _is_text(text) for text in tree["fingerprints"]):
        _fail("hello", "fingerprints that are texts")
    return Hello(**{**tree, "fingerprints": tuple(tree["fingerprints"])})


def read_welcome(body: bytes) -> Welcome:
    """The coordinator's answer to a hello."""
    names = {"run": str, "fingerprint": str, "version": str, "receipts": bytes, "frozen": str}
    tree = _fields(unpack(body), "welcome", **names)
    _check_run(tree["run"])
    return Welcome(**tree)


def read_work(body: bytes) -> Work:
    """What a client is to do next."""
    wanted: dict[str, Any] = {"run": str, "settlements": list, "plan": (np.ndarray, type(None)), "finished": bool}
    tree = _fields(unpack(body), "work", **wanted, released=(dict, type(None)), retry_after_s=(float, int))
    numbers = {"number": int, "run": str, "task": str, "round": int, "attempt": int, "counted": bool}
    settled = tuple(Settlement(**_fields(item, "settlement", **numbers)) for item in tree["settlements"])
    _check_counts("settlement", *(n for one in settled for n in (one.number, one.round, one.attempt)))
    released = None
    if tree["released"] is not None:
        fields = _fields(tree["released"], "released", run=str, round=int, vectors=dict)
        _check_run(fields["run"])  # it will name a folder, with the round
        _check_counts("released", fields["round"])
        released = Released(**{**fields, "vectors": _hashes(fields["vectors"])})
    _check_run(tree["run"])
    plan = None if tree["plan"] is None else tree["plan"].tobytes()
    return Work(**{**tree, "plan": plan, "settlements": settled, "released": released})


def read_receipt(body: bytes) -> Receipt:
    """What became of a report."""
    names = {"slot": str, "sha256": str, "status": str, "reason": str, "client": str, "run": str}
    tree = _fields(unpack(body), "receipt", **names, received_at=(float, int), signature=bytes)
    if tree["status"] not in ("accepted", "refused", "late"):
        _fail("receipt", "a status among accepted, refused and late")
    _check_counts("receipt", tree["received_at"])
    return Receipt(**tree)


def write_plan(small: Mapping[str, Any], vectors: Mapping[str, str]) -> bytes:
    """The body of one client's plan: ``small`` is from ``wire.plan_parts``, ``vectors`` the SHA-256 of each blob."""
    return pack({**small, "broadcast": dict(vectors)})


def read_plan(body: bytes) -> ClientPlan:
    """One client's plan."""
    anything = object
    tree = _fields(
        unpack(body),
        "plan",
        slot=list,
        learn=bool,
        settings=list,
        key=bytes,
        variant=anything,
        mail=anything,
        broadcast=dict,
    )
    if [type(part) for part in tree["slot"]] != [int, int, str, str] or len(tree["key"]) != 32:
        _fail("plan", "a slot of two numbers and two names, and a key of 32 bytes")
    slot = Slot(*tree["slot"])
    if slot_of(str(slot)) != slot:
        _fail("plan", "a slot that its own text names")
    return ClientPlan(
        slot=slot,
        learn=tree["learn"],
        settings=tuple(tree["settings"]),
        key=Key(tree["key"]),
        variant=tree["variant"],
        mail=tree["mail"],
        vectors=_hashes(tree["broadcast"]),
    )


def slot_of(text: str) -> Slot:
    """The slot whose text this is.

    >>> slot_of("train-3-0-update")
    Slot(round=3, attempt=0, exchange='update', task='train')
    """
    match = re.fullmatch(r"([a-z]{1,32})-(\d{1,9})-(\d{1,9})-([A-Za-z0-9_.-]{1,64})", text)
    if match is None:
        raise ProtocolError(f"slot: expected task-round-attempt-exchange, found {text[:100]!r}")
    return Slot(int(match[2]), int(match[3]), match[4], match[1])


def is_lasting(reason: str) -> bool:
    """Whether a client that refused for this reason would refuse again.

    >>> is_lasting(LASTING + "this round would overspend it"), is_lasting("no training examples")
    (True, False)
    """
    return reason.startswith(LASTING)


def release_mark(released: Released) -> str:
    """A short text that changes with every release."""
    fields = [released.run, released.round, dict(released.vectors)]
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:16]


def check_name(name: str) -> str:
    """``name`` if it can name a client; ``InputError`` otherwise."""
    if not NAME.fullmatch(name):
        raise InputError(
            f"client name: expected 1 to 64 letters, digits, dots, dashes or underscores, found {name[:80]!r}"
        )
    return name


def _check_run(run: str) -> None:
    """A run's id is a plain name, whatever a server says."""
    if not NAME.fullmatch(run):
        _fail("run", "an id of letters, digits, dots, dashes or underscores")


def _check_counts(what: str, *numbers: float) -> None:
    """Counts and times are such as a database takes."""
    if not all(0 <= number < _MOST for number in numbers):
        _fail(what, f"numbers from 0 to {_MOST}")


def _tree(message: Any) -> Any:
    """A message as a tree that can be packed."""
    if isinstance(message, tuple):
        return [_tree(item) for item in message]
    if hasattr(message, "__dataclass_fields__"):
        return {name: _tree(getattr(message, name)) for name in message.__dataclass_fields__}
    return message


def _fields(tree: Any, what: str, **types: Any) -> dict[str, Any]:
    """A message's fields, exactly those and of those types (a bool is not an int)."""
    if not isinstance(tree, dict) or set(tree) != set(types):
        _fail(what, f"the fields {sorted(types)}")
    for name, wanted in types.items():
        value = tree[name]
        if not isinstance(value, wanted) or (wanted is int and isinstance(value, bool)):
            _fail(what, f"another type in field {name!r}")
        if isinstance(value, str) and not _is_text(value):
            _fail(what, f"text in field {name!r}")
    return tree


def _is_text(value: str) -> bool:
    """JSON can hold halves of characters, which nothing else takes."""
    return not any("\ud800" <= letter <= "\udfff" for letter in value)


def _hashes(tree: Mapping[str, Any]) -> dict[str, str]:
    """Names to SHA-256 in hex."""
    if not all(isinstance(value, str) and SHA256.fullmatch(value) for value in tree.values()):
        _fail("vectors", "a SHA-256 in hex for each name")
    return dict(tree)


def _fail(what: str, expected: str) -> NoReturn:
    raise ProtocolError(f"{what}: expected {expected}; found something else; do both sides run the same hansa?")
