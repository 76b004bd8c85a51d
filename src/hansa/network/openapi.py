"""What a coordinator answers over HTTP, as an OpenAPI 3.1 document.

It is made from this file and ``messages.CODES``, printed to ``docs/openapi.json`` and served to nobody: whoever
enrolled has the protocol in writing, and a stranger need not be told what there is to try. ``docs/protocol.md`` says
the rest.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from hansa.network.messages import CODES, PROTOCOL

BINARY, JSON, PEM = "application/octet-stream", "application/json", "application/x-pem-file"
LATER: Mapping[str, int] = {"stopping": 503}  # said where no route is to blame

_ANYBODY = ("malformed", "too-many", "stopping")
_SIGNED = (
    *("malformed", "unauthenticated", "signature", "clock", "replay", "revoked", "expired", "protocol", "too-many"),
    *("busy", "stopping", "superseded", "no-space"),
)
_WITH_BODY = ("length-required", "too-large")
_ELSEWHERE = ("not-found", "method")  # of a path or a method that is not here: signed, 404 or 405; not signed, 401
_SECURITY: Sequence[Mapping[str, Any]] = [{"certificate": [], "signature-input": [], "signature": []}]
_HEX = {"type": "string", "pattern": "^[0-9a-f]{64}$"}
_DIGEST = "^sha-256=:[A-Za-z0-9+/]{43}=:$"
_CARRIED = r"^bytes ([0-9]{1,15}-[0-9]{1,15}|\*)/[0-9]{1,15}$"


def document() -> dict[str, Any]:
    """The document, as plain dictionaries and lists.

    >>> sorted(document()["paths"])[:3]
    ['/v1/authority', '/v1/blobs/{sha256}', '/v1/enrol']
    """
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "hansa coordinator",
            "version": str(PROTOCOL),
            "description": "Bodies of application/octet-stream are safetensors files that hold the message named "
            "beside them; every one of a request has a Content-Length. A path that is not here is answered 404 "
            "(not-found), a method 405 (method), and 401 where the request is not signed by a client. Requests are "
            "signed as docs/protocol.md says.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "paths": {
            "/v1/authority": {"get": _authority()},
            "/v1/enrol": {"post": _enrol()},
            "/v1/renew": {"post": _renew()},
            "/v1/hello": {"post": _hello()},
            "/v1/work": {"get": _work()},
            "/v1/goodbye": {"post": _goodbye()},
            "/v1/blobs/{sha256}": {"get": _blob()},
            "/v1/reports/{run}/{slot}/{sha256}": {"put": _put_report(), "get": _get_report()},
        },
        "components": {
            "securitySchemes": {
                "certificate": {"type": "mutualTLS", "description": "A certificate of the federation's authority."},
                "signature-input": {"type": "apiKey", "in": "header", "name": "Signature-Input"},
                "signature": {"type": "apiKey", "in": "header", "name": "Signature", "description": "RFC 9421."},
            }
        },
    }


def text() -> str:
    """The document as ``docs/openapi.json`` holds it."""
    return json.dumps(document(), indent=1) + "\n"


def _authority() -> dict[str, Any]:
    return _operation(
        "authority",
        "The certificate of the federation's authority.",
        {"200": _holds("The certificate.", PEM)},
        _ANYBODY,
    )


def _enrol() -> dict[str, Any]:
    codes = (*_ANYBODY, *_WITH_BODY, "token", "revoked", "busy", "superseded", "no-space")
    good = {"200": _holds("Enrolled: the client's certificate.", BINARY)}
    return _operation("enrol", "A join token for a certificate.", good, codes, body="Enrol")


def _renew() -> dict[str, Any]:
    good = {"200": _holds("Enrolled: the next certificate.", BINARY)}
    return _signed("renew", "The next certificate of a client.", good, _WITH_BODY, body="Renew")


def _hello() -> dict[str, Any]:
    good = {"200": _holds("Welcome: the run, and its app.", BINARY)}
    codes = (*_WITH_BODY, "another-app", "another-model")
    return _signed("hello", "A client takes part in the run.", good, codes, body="Hello")


def _work() -> dict[str, Any]:
    parameters = [
        _query("acknowledged", {"type": "integer", "default": 0}, "The last settlement that the client applied."),
        _query("released", {"type": "string", "default": ""}, "The mark of the release that the client keeps."),
        _query("wait", {"type": "number", "default": 0}, "Seconds that the answer may wait for something to say."),
    ]
    good = {"200": _holds("Work: settlements, the released model, a plan, and the pace.", BINARY)}
    return _signed("work", "What a client is to do next.", good, ("hello-first",), parameters)


def _goodbye() -> dict[str, Any]:
    return _signed("goodbye", "The client knows that the run is over.", {"204": {"description": "Noted."}})


def _blob() -> dict[str, Any]:
    parameters = [
        _path("sha256", {"type": "string"}, "The vector's SHA-256 in hex; what is none is not found."),
        _header("Range", {"type": "string"}, "One range; anything else asks for all."),
        _header("If-Range", {"type": "string"}, "The ETag; with another one Range counts for nothing."),
    ]
    headers = {
        "ETag": _said({"type": "string", "pattern": '^"[0-9a-f]{64}"$'}, "The quoted SHA-256."),
        "Accept-Ranges": _said({"const": "bytes"}, "Always."),
    }
    carried = {"Content-Range": _said({"type": "string", "pattern": _CARRIED}, "Which bytes these are.")}
    good = {
        "200": _holds("All of the vector.", BINARY, headers),
        "206": _holds("The part that was asked for.", BINARY, {**headers, **carried}),
    }
    return _signed("blob", "A vector of a plan or of the released model.", good, ("not-found", "range"), parameters)


def _put_report() -> dict[str, Any]:
    part = _header("Content-Range", {"type": "string", "pattern": _CARRIED}, "Which part of the report the body is.")
    good = {
        "200": _holds("Receipt: all of it is there, and this became of it.", BINARY),
        "202": _how_far("This much is there; go on from here."),
    }
    codes = (*_WITH_BODY, "not-asked", "conflict", "offset", "digest")
    found = _signed("put_report", "A report, or a part of one.", good, codes, [*_report(), part], body="a report")
    found["responses"]["409"]["headers"] = {
        "Upload-Offset": _said({"type": "string", "pattern": "^[0-9]+$"}, "Where to go on, with code offset.", False)
    }
    return found


def _get_report() -> dict[str, Any]:
    found = _how_far("Receipt, or how many bytes of the report are there.", needed=False)
    found["content"] = {**_holds("", BINARY)["content"], **found["content"]}
    return _signed("get_report", "How far an upload is.", {"200": found}, ("not-asked", "conflict"), _report())


def _report() -> list[dict[str, Any]]:
    """The path of a report."""
    return [
        _path("run", {"type": "string"}, "The run that is on."),
        _path(
            "slot",
            {"type": "string", "pattern": "^[a-z]{1,32}-[0-9]{1,9}-[0-9]{1,9}-[A-Za-z0-9_.-]{1,64}$"},
            "Task, round, attempt and exchange, as in the plan.",
        ),
        _path("sha256", _HEX, "The SHA-256 of the whole report."),
    ]


# ------------------------------------------------------------------------------------------------------------- pieces


def _signed(
    name: str,
    summary: str,
    good: Mapping[str, Any],
    codes: Sequence[str] = (),
    parameters: Sequence[Any] = (),
    *,
    body: str = "",
) -> dict[str, Any]:
    """An operation for clients; a body that is sent whole has its digest signed."""
    digest = _header("Content-Digest", {"type": "string", "pattern": _DIGEST}, "RFC 9530, of a body sent whole.")
    more = [*parameters, digest] if body else list(parameters)
    return {
        **_operation(name, summary, good, (*_SIGNED, *codes), more, body=body),
        "security": [dict(one) for one in _SECURITY],
    }


def _operation(
    name: str,
    summary: str,
    good: Mapping[str, Any],
    codes: Sequence[str],
    parameters: Sequence[Any] = (),
    *,
    body: str = "",
) -> dict[str, Any]:
    """One method of one path: ``codes`` are those of the refusals that may come."""
    made: dict[str, Any] = {"operationId": name, "summary": summary, "parameters": list(parameters)}
    if body:
        made["requestBody"] = {"required": True, **_holds(f"{body[0].upper()}{body[1:]}.", BINARY)}
    every = {**CODES, **LATER}
    statuses = sorted({every[code] for code in codes})
    refusals = {str(status): _refusal([code for code in codes if every[code] == status]) for status in statuses}
    return {**made, "responses": {**good, **refusals}}


def _refusal(codes: Sequence[str]) -> dict[str, Any]:
    """A refusal: a sentence for a person, a code for a program, and what the client needs to do better."""
    fields: dict[str, Any] = {"error": {"type": "string"}, "code": {"enum": list(codes)}}
    if {"clock", "replay"} & set(codes):
        fields |= {"now": {"type": "number"}, "epoch": {"type": "string"}, "last": {"type": "integer"}}
    found: dict[str, Any] = {"description": ", ".join(codes)}
    if {"too-many", "busy", "superseded"} & set(codes):
        fields["retry_after_s"] = {"type": "integer", "minimum": 1}
    if {"too-many", "busy", "stopping", "superseded"} & set(codes):
        seconds = {"type": "string", "pattern": "^[0-9]+$"}
        found["headers"] = {"Retry-After": _said(seconds, "Seconds.")}
    schema = {"type": "object", "properties": fields, "required": ["error", "code"], "additionalProperties": False}
    return {**found, "content": {JSON: {"schema": schema}}}


def _how_far(description: str, *, needed: bool = True) -> dict[str, Any]:
    """How many bytes of an upload are there."""
    fields = {"offset": {"type": "integer", "minimum": 0}}
    schema = {"type": "object", "properties": fields, "required": ["offset"], "additionalProperties": False}
    offset = _said({"type": "string", "pattern": "^[0-9]+$"}, "The same number.", needed)
    return {"description": description, "headers": {"Upload-Offset": offset}, "content": {JSON: {"schema": schema}}}


def _holds(description: str, kind: str, headers: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """A body of bytes."""
    found = {"description": description, "content": {kind: {"schema": {"type": "string", "format": "binary"}}}}
    return {**found, "headers": dict(headers)} if headers else found


def _said(schema: Mapping[str, Any], description: str, required: bool = True) -> dict[str, Any]:
    """A header of an answer."""
    return {"description": description, "required": required, "schema": dict(schema)}


def _path(name: str, schema: Mapping[str, Any], description: str) -> dict[str, Any]:
    return {"name": name, "in": "path", "required": True, "schema": dict(schema), "description": description}


def _query(name: str, schema: Mapping[str, Any], description: str) -> dict[str, Any]:
    return {"name": name, "in": "query", "schema": dict(schema), "description": description}


def _header(name: str, schema: Mapping[str, Any], description: str) -> dict[str, Any]:
    return {"name": name, "in": "header", "schema": dict(schema), "description": description}
