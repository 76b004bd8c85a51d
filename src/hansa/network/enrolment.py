"""Enrolment: a client makes its key, shows its token, and keeps the certificate that it gets.

``identity.json`` names the files of the key and certificate that count. It is written last, by one rename, so that a
crash leaves either the identity before or the one after.
"""

from __future__ import annotations

import json
import ssl
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import httpx2 as httpx

from hansa.core.errors import InputError, ProtocolError, RunError
from hansa.network import identity
from hansa.network.blobs import write_file
from hansa.network.calls import Line, Unreachable, not_ours, open_http, peer_of, place_of, reason_of
from hansa.network.client_store import ClientStore
from hansa.network.failpoints import fail_point
from hansa.network.messages import Enrol, Refusal, check_name, read_enrolled, write
from hansa.network.signing import Signer
from hansa.network.token import JoinToken

_LARGEST_CERTIFICATE = 2**16
_FIRST, _SECOND = "client", "renewed"


@dataclass(frozen=True)
class Identity:
    """Where a client's key and certificates lie, who it is, and whom it calls.

    ``stem`` names the files of its key and certificate, which is good from ``begins`` until ``ends`` (seconds since
    1970, the server's time); ``token`` is the id of the join token that it enrolled with.
    """

    folder: Path
    name: str
    url: str
    authority: str
    stem: str = _FIRST
    begins: float = 0.0
    ends: float = 0.0
    token: str = ""

    @staticmethod
    def of(state_dir: Path) -> Identity | None:
        """The identity in a state folder, or None before enrolment."""
        path = state_dir / "identity" / "identity.json"
        if not path.exists():
            return None
        try:
            found = Identity(path.parent, **json.loads(path.read_text()))
            if found.stem not in (_FIRST, _SECOND):
                raise ValueError(f"files called {found.stem[:20]!r}")
            return found if found.ends else found.dated()
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path}: expected a client's identity, found {error}; ask for a new token") from error

    @property
    def authority_pem(self) -> bytes:
        """The federation's authority."""
        return (self.folder / "authority.pem").read_bytes()

    @property
    def key(self) -> Path:
        """The file of the private key."""
        return self.folder / f"{self.stem}.key"

    @property
    def certificate(self) -> Path:
        """The file of the certificate."""
        return self.folder / f"{self.stem}.pem"

    @property
    def other_stem(self) -> str:
        """The name of the files that do not count: those of the identity before, or after."""
        return _SECOND if self.stem == _FIRST else _FIRST

    def context(self) -> ssl.SSLContext:
        """Mutual TLS as this client."""
        return identity.client_context(self.authority_pem, self.certificate, self.key)

    def signer(self) -> Signer:
        """Signs requests with this client's key."""
        return Signer(self.key.read_bytes(), identity.fingerprint(self.certificate.read_bytes()))

    def dated(self) -> Identity:
        """With the dates that its certificate has."""
        begins, ends = identity.life_of(self.certificate.read_bytes())
        return replace(self, begins=begins, ends=ends)

    def save(self) -> None:
        """From now on this is the identity."""
        fields = {name: value for name, value in asdict(self).items() if name != "folder"}
        write_file(self.folder / "identity.json", json.dumps(fields).encode())

    def forget_other(self) -> None:
        """Remove the files of the identity before this one."""
        for kind in ("key", "pem", "csr"):
            (self.folder / f"{self.other_stem}.{kind}").unlink(missing_ok=True)


def enrol(token: JoinToken, state_dir: Path, name: str | None = None) -> Identity:
    """Make a key, have it certified, and keep both in ``state_dir``; a client that has enrolled there stays as it is.

    A new token for the same client's name (``hansa invite NAME --again``) replaces its key. The same call after a crash
    goes on. Raises ``InputError`` for a token that is wrong, used, expired or for another name, ``RunError`` when the
    server cannot be reached or is not the federation's, and ``ProtocolError`` for a certificate that is no good.
    """
    known = Identity.of(state_dir)
    if known is not None:
        if known.authority != token.authority:
            raise InputError(
                f"{state_dir}: expected the state of a client of this federation, found one of another ({known.url}); "
                "use another --state"
            )
        if token.is_pattern or token.name != known.name or token.id == known.token or not known.token:
            return known
    chosen = check_name(name or ("" if token.is_pattern else token.name))
    folder = state_dir / "identity"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    stem = _FIRST if known is None else known.other_stem
    authority, certificate = _ask(token, state_dir, chosen, stem)
    if not identity.certifies(certificate, (folder / f"{stem}.key").read_bytes(), authority):
        raise ProtocolError(
            f"{place_of(token.url)}: expected a certificate of the federation's authority for the key just made, found "
            "another; do not trust this server"
        )
    fail_point("client.certificate.received")
    write_file(folder / "authority.pem", authority)
    write_file(folder / f"{stem}.pem", certificate)
    fail_point("client.certificate.kept")
    made = Identity(folder, chosen, token.url, token.authority, stem, token=token.id).dated()
    made.save()  # last: now the identity is complete
    fail_point("client.identity.kept")
    (folder / f"{stem}.csr").unlink(missing_ok=True)
    return made


def _ask(token: JoinToken, state_dir: Path, name: str, stem: str) -> tuple[bytes, bytes]:
    """The authority and the certificate that the server gives for a token."""
    store = ClientStore(state_dir)
    try:
        authority = _authority(token)
        request = _request(state_dir / "identity", name, stem)
        message = write(Enrol(token=token.id, secret=token.secret, name=name, request=request))
        store.list_body(message, kind="certificate request", protection="none: it holds the public key")
        fail_point("client.enrolment.listed")
        line = Line(token.url, authority, identity.client_context(authority))
        try:
            return authority, read_enrolled(line.ask("POST", "/v1/enrol", content=message)).certificate
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


def _request(folder: Path, name: str, stem: str) -> bytes:
    """The signing request of this client's key; both are made once and kept, for a second try."""
    key, request = folder / f"{stem}.key", folder / f"{stem}.csr"
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
            for piece in answer.iter_raw():
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
