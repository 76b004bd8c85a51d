"""How an enrolled client signs for its peers, and knows them: by the federation's authority, pinned at enrolment.

In secure aggregation the server relays what clients say to each other, so it must not be able to speak for one. Each
signs with the key of its certificate, and takes no other's word unless the authority of its own state folder issued the
certificate for that very name. Whoever holds the authority's key (usually the coordinator's operator) could still enrol
clients that do not exist: owners who rule that out, too, exchange a line each and join with ``--peers FILE``.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from hansa.core.errors import InputError
from hansa.federation import Federation
from hansa.network import identity
from hansa.network.enrolment import Identity
from hansa.network.messages import NAME, SHA256
from hansa.network.signing import is_signed, load_private_key, sign

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey, EllipticCurvePublicKey

_CLOCKS_DIFFER_S = 2 * 86_400.0
_MOST_KNOWN = 20_000  # certificates that are remembered


class Roster:
    """Who may sign as whom: clients that ``authority`` (PEM) certified, among ``peers`` (name to key) where given.

    Certificates are looked at once, as a parse and a check cost 0.2 ms and a client has up to 96 neighbours a round.
    ``now`` is the time by which they end, give or take two days; None: they do not.
    """

    def __init__(
        self, authority: bytes, peers: Mapping[str, str] | None = None, now: Callable[[], float] | None = time.time
    ) -> None:
        self.authority, self.peers, self._now = authority, peers, now
        self._known: dict[bytes, tuple[str, float, EllipticCurvePublicKey]] = {}

    def fault(self, name: str, certificate: bytes, signature: bytes, message: bytes) -> str:
        """What is wrong with ``name``'s signature (64 bytes) over ``message``, or an empty text."""
        found = self._look(certificate)
        if isinstance(found, str):
            return found
        named, ends, key = found
        if named != name:
            return "its certificate is for another name"
        if self._now is not None and self._now() > ends + _CLOCKS_DIFFER_S:
            return "its certificate has ended, by the clock of this machine"
        if self.peers is not None and self.peers.get(name) != fingerprint_of(key):
            return "it is not in your list of peers" + (" with this key" if name in self.peers else "")
        return "" if is_signed(key, signature, message) else "the signature is not of this certificate's key"

    def _look(self, certificate: bytes) -> tuple[str, float, EllipticCurvePublicKey] | str:
        """Name, end and key of a client's certificate (DER), or what is wrong with it."""
        digest = hashlib.sha256(certificate).digest()
        if digest not in self._known:
            try:
                found = identity.client_of(certificate, self.authority)
            except InputError as error:
                return str(error)
            if len(self._known) >= _MOST_KNOWN:
                self._known.clear()
            self._known[digest] = found
        return self._known[digest]


class Enrolled(Roster):
    """The credentials of the client whose identity lies in ``state``; one that is renewed is read anew."""

    def __init__(self, state: Path, peers: Mapping[str, str] | None = None) -> None:
        self._state, self._who = state, _identity(state)
        self._key, self._certificate = _load(self._who)
        super().__init__(self._who.authority_pem, peers)

    @property
    def certificate(self) -> bytes:
        """The client's certificate (DER)."""
        self._refresh()
        return self._certificate

    def sign(self, message: bytes) -> bytes:
        """The client's signature: 64 bytes."""
        self._refresh()
        return sign(self._key, message)

    def _refresh(self) -> None:
        who = _identity(self._state)
        if who != self._who:
            self._who, (self._key, self._certificate) = who, _load(who)


def _identity(state: Path) -> Identity:
    found = Identity.of(state)
    if found is None:
        raise InputError(f"{state}: expected the state of a client that has enrolled, found no identity; join first")
    return found


def _load(who: Identity) -> tuple[EllipticCurvePrivateKey, bytes]:
    return load_private_key(who.key.read_bytes()), identity.der_of(who.certificate.read_bytes())


def witnessed(federation: Federation, witness: Roster) -> Federation:
    """The federation at a server that knows who is enrolled, if its aggregator's clients sign."""
    if not hasattr(federation.aggregator, "witnessed"):
        return federation
    return replace(federation, aggregator=federation.aggregator.witnessed(witness))


def fingerprint_of(key: EllipticCurvePublicKey) -> str:
    """SHA-256 of a public key, in hex."""
    from cryptography.hazmat.primitives import serialization

    spki = key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(spki).hexdigest()


def own_line(who: Identity) -> str:
    """What an owner hands to others for their lists of peers: name and fingerprint."""
    return f"{who.name} {fingerprint_of(_load(who)[0].public_key())}"


def read_peers(path: Path) -> dict[str, str]:
    """The peers in a text file, a line ``name fingerprint`` each; empty lines and ``#`` comments are skipped."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--peers {path}: expected a text file, found {error}") from error
    found: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        if len(words) != 2 or not NAME.fullmatch(words[0]) or not SHA256.fullmatch(words[1]) or words[0] in found:
            raise InputError(
                f"--peers {path}, line {number}: expected a name, once, and the 64 hex digits that hansa status shows "
                f"at that client, found {line[:80]!r}"
            )
        found[words[0]] = words[1]
    return found


__all__ = ["Enrolled", "Roster", "fingerprint_of", "own_line", "read_peers", "witnessed"]
