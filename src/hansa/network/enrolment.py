"""Enrolment: a client makes its key, shows its token, and keeps the certificate that it gets."""

from __future__ import annotations

import json
import ssl
from dataclasses import dataclass
from pathlib import Path

import httpx2 as httpx

from hansa.core.errors import InputError, ProtocolError, RunError
from hansa.network import identity
from hansa.network.blobs import write_file
from hansa.network.calls import Line, Unreachable, not_ours, open_http, peer_of, place_of, reason_of
from hansa.network.client_store import ClientStore
from hansa.network.failpoints import fail_point
from hansa.network.messages import Enrol, Refusal, check_name, read_enrolled, write
from hansa.network.token import JoinToken

_LARGEST_CERTIFICATE = 2**16


@dataclass(frozen=True)
class Identity:
    """Where a client's key and certificates lie, who it is, and whom it calls."""

    folder: Path
    name: str
    url: str
    authority: str

    @staticmethod
    def of(state_dir: Path) -> Identity | None:
        """The identity in a state folder, or None before enrolment."""
        path = state_dir / "identity" / "identity.json"
        if not path.exists():
            return None
        try:
            fields = json.loads(path.read_text())
            return Identity(path.parent, fields["name"], fields["url"], fields["authority"])
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path}: expected a client's identity, found {error}; ask for a new token") from error

    @property
    def authority_pem(self) -> bytes:
        """The federation's authority."""
        return (self.folder / "authority.pem").read_bytes()

    def context(self) -> ssl.SSLContext:
        """Mutual TLS as this client."""
        return identity.client_context(self.authority_pem, self.folder / "client.pem", self.folder / "client.key")


def enrol(token: JoinToken, state_dir: Path, name: str | None = None) -> Identity:
    """Make a key, have it certified, and keep both in ``state_dir``; a client that has enrolled there stays as it is.

    The same call after a crash goes on. Raises ``InputError`` for a token that is wrong, used, expired or for another
    name, and ``RunError`` when the server cannot be reached or is not the federation's.
    """
    known = Identity.of(state_dir)
    if known is not None:
        if known.authority != token.authority:
            raise InputError(
                f"{state_dir}: expected the state of a client of this federation, found one of another ({known.url}); "
                "use another --state"
            )
        return known
    chosen = check_name(name or ("" if token.is_pattern else token.name))
    folder = state_dir / "identity"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    store = ClientStore(state_dir)
    try:
        authority = _authority(token)
        request = _request(folder, chosen)
        message = write(Enrol(token=token.id, secret=token.secret, name=chosen, request=request))
        store.list_body(message, kind="certificate request", protection="none: it holds the public key")
        fail_point("client.enrolment.listed")
        line = Line(token.url, authority, identity.client_context(authority))
        try:
            certificate = read_enrolled(line.ask("POST", "/v1/enrol", content=message)).certificate
        finally:
            line.close()
    except Refusal as error:
        raise InputError(str(error)) from error
    except Unreachable as error:
        raise RunError(
            f"{place_of(token.url)}: expected an answer, found {error}; try the same command again"
        ) from error
    finally:
        store.close()
    fail_point("client.certificate.received")
    write_file(folder / "authority.pem", authority)
    write_file(folder / "client.pem", certificate)
    fail_point("client.certificate.kept")
    fields = {"name": chosen, "url": token.url, "authority": token.authority}
    write_file(folder / "identity.json", json.dumps(fields).encode())  # last: now the identity is complete
    fail_point("client.identity.kept")
    return Identity(folder, chosen, token.url, token.authority)


def _request(folder: Path, name: str) -> bytes:
    """The signing request of this client's key; both are made once and kept, for a second try."""
    key, request = folder / "client.key", folder / "client.csr"
    if not (key.exists() and request.exists()):
        made_key, made = identity.make_request(name)
        write_file(key, made_key, private=True)
        fail_point("client.key.kept")
        write_file(request, made)
        fail_point("client.request.kept")
    return request.read_bytes()


def _authority(token: JoinToken) -> bytes:
    """The federation's authority (PEM), fetched over a line that is not trusted and checked against the token."""
    try:
        with (
            open_http(token.url, identity.unchecked_context()) as http,
            http.stream("GET", "/v1/authority") as answer,
        ):
            peer = peer_of(answer)
            found = b""
            for piece in answer.iter_bytes():
                found += piece
                if len(found) > _LARGEST_CERTIFICATE:
                    break
    except httpx.HTTPError as error:
        raise RunError(
            f"{place_of(token.url)}: expected the coordinator to answer, found {reason_of(error)}; "
            "is it running, and may this machine call it? HTTPS_PROXY is honoured; then try the same command again"
        ) from error
    if not _is_certificate(found, token.authority):
        raise InputError(not_ours(token.url, peer, token.authority))
    return found


def _is_certificate(pem: bytes, fingerprint: str) -> bool:
    try:
        return identity.fingerprint(pem) == fingerprint
    except (ProtocolError, UnicodeDecodeError):
        return False
