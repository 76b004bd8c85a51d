"""One HTTPS request of a client, and what its failure means: try again, a refusal, or someone else's certificate."""

from __future__ import annotations

import hashlib
import json
import ssl
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import httpx2 as httpx

from hansa.core.errors import RunError
from hansa.network import identity
from hansa.network.messages import Refusal
from hansa.network.signing import Signer
from hansa.version import __version__

IDLE_S = 60.0  # without a byte in either direction
_KEEP_OPEN_S = 70.0  # between two requests; the coordinator closes a little later
_SERVER_ERROR = 500
_LONGEST_ANSWER, _LONGEST_REFUSAL = 2**28, 2**16


class Unreachable(Exception):
    """No answer, or one that says to try again: after ``after_s`` seconds, or soon, if a transfer has ``moved`` on."""

    def __init__(self, reason: str, *, moved: bool = False, after_s: float | None = None) -> None:
        self.moved, self.after_s = moved, after_s
        super().__init__(reason)


class Answer(NamedTuple):
    """An answer that is not a refusal, all of it read."""

    status: int
    headers: Mapping[str, str]
    body: bytes


class Signed(httpx.Auth):
    """Signs each request. Refused for its time or nonce, it is signed again once, if its body is still at hand."""

    def __init__(self, signer: Signer) -> None:
        self.signer = signer

    def sync_auth_flow(self, request: httpx.Request) -> Generator[httpx.Request, httpx.Response, None]:
        """One request, or two."""
        whole = isinstance(request.stream, httpx.ByteStream)
        for _ in range(2):
            request.headers.update(self._headers(request, whole))
            answer = yield request
            if answer.status_code != httpx.codes.UNAUTHORIZED:
                return
            answer.stream = _Short(answer.stream)
            answer.headers.pop("Content-Encoding", None)  # it was not asked for, and is not to be unpacked
            if not self.signer.learn(_json(answer.read())) or not whole:
                return

    def _headers(self, request: httpx.Request, whole: bool) -> dict[str, str]:
        """The headers that sign it; a body that is streamed is named by its Content-Range."""
        target, part = request.url.raw_path, request.headers.get("Content-Range", "")
        body = request.content if whole and not part else b""
        return self.signer.headers(
            request.method, target, digest=hashlib.sha256(body).digest() if body else None, part=part
        )


class Line:
    """A client's line to the coordinator: each request is over TLS that trusts the federation's authority alone.

    With a ``signer`` each is signed too.
    """

    def __init__(self, url: str, authority: bytes, context: ssl.SSLContext, signer: Signer | None = None) -> None:
        self.url, self._authority = url, authority
        self._http = open_http(url, context, None if signer is None else Signed(signer))

    def close(self) -> None:
        """Close its connections."""
        self._http.close()

    def ask(self, method: str, path: str, **request: Any) -> bytes:
        """The body of the answer to one request, asked once; raises what ``call`` does."""
        return self.call(method, path, **request).body

    def call(self, method: str, path: str, **request: Any) -> Answer:
        """One request, once.

        Raises ``Refusal`` when the answer is no, ``RunError`` for a certificate that is not the federation's, and
        ``Unreachable`` when it is worth trying again.
        """
        with self.open(method, path, **request) as answer:
            return Answer(answer.status_code, answer.headers, _read(answer, _LONGEST_ANSWER))

    @contextmanager
    def open(self, method: str, path: str, **request: Any) -> Iterator[httpx.Response]:
        """The same for an answer whose body is to be read piece by piece; errors on the way are those of ``call``."""
        try:
            with self._http.stream(method, path, **request) as answer:
                if answer.status_code >= _SERVER_ERROR or answer.status_code == httpx.codes.TOO_MANY_REQUESTS:
                    excuse = _excuse(answer.status_code, _read(answer, _LONGEST_REFUSAL))
                    raise Unreachable(excuse, after_s=_seconds(answer.headers.get("Retry-After", "")))
                if not answer.is_success:
                    refusal = _refusal(self.url, answer.status_code, _read(answer, _LONGEST_REFUSAL))
                    if isinstance(refusal, Refusal) and refusal.code in ("clock", "replay"):
                        raise Unreachable("the server asked for another signature")
                    raise refusal
                yield answer
        except httpx.HTTPError as error:
            if _is_certificate_error(error):
                raise RunError(_name_certificate(self.url, self._authority)) from error
            if "ALERT_CERTIFICATE_EXPIRED" in str(error):
                raise Refusal("expired", f"{place_of(self.url)}: expected a certificate in date, found ours") from error
            raise Unreachable(reason_of(error)) from error


def open_http(url: str, context: ssl.SSLContext, auth: httpx.Auth | None = None) -> httpx.Client:
    """Connections to a server; ``HTTPS_PROXY`` is honoured. They last for as long as bytes move now and then.

    No answer is unpacked on the way: what a client takes into memory is as long as what it was sent. One that comes
    packed, which nobody asked for, is a ``RunError``.
    """
    timeout = httpx.Timeout(IDLE_S, connect=15.0)
    headers = {"User-Agent": f"hansa/{__version__}", "Accept-Encoding": "identity"}
    limits = httpx.Limits(keepalive_expiry=_KEEP_OPEN_S)
    hooks = {"response": [_refuse_packed]}
    return httpx.Client(
        base_url=url, verify=context, timeout=timeout, limits=limits, headers=headers, auth=auth, event_hooks=hooks
    )


def _refuse_packed(answer: httpx.Response) -> None:
    """Look at an answer's headers before anything reads its body: a few packed bytes may become gigabytes."""
    encoding = answer.headers.get("Content-Encoding", "identity")
    if encoding.strip().lower() != "identity":
        raise RunError(
            f"{place_of(str(answer.request.url))}: expected an answer that is not packed, found Content-Encoding "
            f"{_printable(encoding[:40])}; let no proxy pack answers on the way"
        )


def _read(answer: httpx.Response, longest: int) -> bytes:
    """A body that must not be longer; ``RunError`` if it is."""
    if answer.is_stream_consumed:  # by ``Signed``, which read it to the end
        return answer.content
    body = bytearray()
    for piece in answer.iter_raw():
        body += piece
        if len(body) > longest:
            raise _too_long(longest)
    return bytes(body)


class _Short(httpx.SyncByteStream):
    """The body of a refusal, read from ``stream`` as far as one may go."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __iter__(self) -> Iterator[bytes]:
        size = 0
        for piece in self._stream:
            size += len(piece)
            if size > _LONGEST_REFUSAL:
                raise _too_long(_LONGEST_REFUSAL)
            yield piece

    def close(self) -> None:
        """Let go of the connection."""
        self._stream.close()


def _too_long(longest: int) -> RunError:
    return RunError(f"expected an answer of at most {longest} bytes, found a longer one; is that a coordinator?")


def _seconds(after: str) -> float | None:
    """The header ``Retry-After``, where it is a number."""
    return float(after) if after.isascii() and after.isdigit() and len(after) < 10 else None


def _excuse(status: int, body: bytes) -> str:
    """What an answer that says to try again says."""
    try:
        return f"the server answered {status}: {_printable(str(json.loads(body)['error'])[:300])}"
    except (ValueError, KeyError, TypeError, RecursionError):
        return f"the server answered {status}"


def _refusal(url: str, status: int, body: bytes) -> Refusal | RunError:
    """What an answer that is not a success says."""
    try:
        found = json.loads(body)
        return Refusal(str(found["code"]), _printable(str(found["error"])[:2000]))
    except (ValueError, KeyError, TypeError, AssertionError, RecursionError):
        return RunError(
            f"{place_of(url)}: expected an answer of a hansa coordinator, found HTTP {status}; "
            "is something else listening there, or a proxy answering?"
        )


def _printable(text: str) -> str:
    """A sentence of the server's, or of whoever answers for it, as a terminal may show it."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def _json(body: bytes) -> Any:
    """What an answer's body says, or None."""
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        return None


def _is_certificate_error(error: BaseException | None) -> bool:
    """Whether a request failed because the server's certificate is not the federation's."""
    while error is not None:
        if isinstance(error, ssl.SSLCertVerificationError) or "CERTIFICATE_VERIFY_FAILED" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def _name_certificate(url: str, authority: bytes) -> str:
    """Who shows a certificate in the coordinator's place, found by looking at it without trusting it."""
    try:
        with open_http(url, identity.unchecked_context()) as http, http.stream("GET", "/v1/authority") as answer:
            peer = peer_of(answer)
    except httpx.HTTPError:
        peer = None
    if peer is not None and identity.is_issued_by(peer, authority):
        return (
            f"{place_of(url)} shows a certificate of the federation, but for another host name or out of date. "
            f"Start the coordinator again with hansa serve --url {url}, and look at this machine's clock."
        )
    return not_ours(url, peer, identity.fingerprint(authority))


def not_ours(url: str, peer: bytes | None, expected: str) -> str:
    """A sentence that names who issued the certificate shown."""
    place = place_of(url)
    if peer is None:
        return f"{place} shows a certificate that is not the federation's (fingerprint {expected[:8]}...)."
    issuer = _printable(identity.issuer_of(peer))
    if issuer.startswith(identity.AUTHORITY_NAME):
        return (
            f'{place} shows a certificate of "{issuer}", another hansa federation than the one joined (fingerprint '
            f"{expected[:8]}...). Was the coordinator's --state folder made anew? Ask for a new token."
        )
    return (
        f'{place} shows a certificate of "{issuer}", not the federation\'s (fingerprint {expected[:8]}...). '
        "A proxy on the way opens TLS. Ask for a bypass for this host; HTTPS_PROXY is honoured."
    )


def peer_of(answer: httpx.Response) -> bytes | None:
    """The certificate (DER) on the other end of an answer's connection."""
    stream = answer.extensions.get("network_stream")
    tls = stream.get_extra_info("ssl_object") if stream is not None else None
    return None if tls is None else tls.getpeercert(True)


def place_of(url: str) -> str:
    """Host and port."""
    return urlsplit(url).netloc


def reason_of(error: BaseException) -> str:
    """An error in half a sentence."""
    text = str(error)
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
