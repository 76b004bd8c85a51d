"""The cryptography that secure aggregation stands on, each by one call of the library ``cryptography``.

X25519 (RFC 7748), HKDF with SHA-256 (RFC 5869), AES-GCM (NIST SP 800-38D) and AES in counter mode (NIST SP 800-38A).
Seals and streams use a fixed nonce: a key made by ``derive`` is used for one message or one stream, never twice.
"""

from __future__ import annotations

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from hansa.core.errors import InputError
from hansa.secagg.errors import BadKey, BadSeal

_LABEL = b"hansa secure aggregation 1"
_SECRET_SIZE = 32  # bytes of an X25519 key, secret or public


class KeyPair:
    """An X25519 key pair of 32 secret bytes; printed, it does not show them.

    Raises ``InputError`` where ``secret`` has another length.

    >>> ours, theirs = KeyPair(bytes(32)), KeyPair(bytes([1] * 32))
    >>> ours.agree(theirs.public) == theirs.agree(ours.public)
    True
    """

    __slots__ = ("_private", "public", "secret")

    def __init__(self, secret: bytes) -> None:
        if len(secret) != _SECRET_SIZE:
            raise InputError(f"X25519: expected a secret of {_SECRET_SIZE} bytes, found {len(secret)}")
        self.secret = secret
        self._private = X25519PrivateKey.from_private_bytes(secret)
        self.public = self._private.public_key().public_bytes_raw()

    def agree(self, public: bytes) -> bytes:
        """The 32 bytes that only the holders of both secrets know; give them to ``derive``, use them for nothing else.

        Raises ``BadKey`` where ``public`` is not 32 bytes, or is a point of low order, with which everybody agrees on
        zeros.
        """
        if len(public) != _SECRET_SIZE:
            raise BadKey(f"X25519: expected a public key of {_SECRET_SIZE} bytes, found {len(public)}")
        try:
            return self._private.exchange(X25519PublicKey.from_public_bytes(public))
        except ValueError as error:
            raise BadKey("X25519: expected a public key, found a point of low order: no secret comes of it") from error


def derive(shared: bytes, purpose: str, context: bytes, length: int) -> bytes:
    """A key of ``length`` bytes for one ``purpose`` in one ``context``; another of either gives an independent key.

    >>> len(derive(bytes(32), "mask", b"round 3", 16))
    16
    """
    return hkdf(shared, b"", joined(_LABEL, purpose.encode(), context), length)


def hkdf(material: bytes, salt: bytes, info: bytes, length: int) -> bytes:
    """HKDF-SHA256 as it is in RFC 5869: extract, then expand.

    >>> hkdf(bytes([11] * 22), b"", b"", 42).hex()[:16]
    '8da4e775a563c18f'
    """
    return HKDF(hashes.SHA256(), length, salt, info).derive(material)


def joined(*parts: bytes) -> bytes:
    """``parts`` as one, each after its length in eight bytes, so that no other parts give the same bytes.

    >>> joined(b"ab", b"c") == joined(b"a", b"bc")
    False
    """
    return b"".join(len(part).to_bytes(8, "big") + part for part in parts)


def seal(key: bytes, message: bytes, associated: bytes) -> bytes:
    """``message`` encrypted and, together with ``associated``, authenticated under a key that seals nothing else.

    AES-GCM with a nonce of zeros: 16 bytes longer than the message. ``key`` is 16 or 32 bytes.

    >>> unseal(bytes(32), seal(bytes(32), b"a share", b"a to b"), b"a to b")
    b'a share'
    """
    return AESGCM(key).encrypt(bytes(12), message, associated)


def unseal(key: bytes, sealed: bytes, associated: bytes) -> bytes:
    """The message of ``seal``. Raises ``BadSeal`` where anything differs from what was sealed."""
    try:
        return AESGCM(key).decrypt(bytes(12), sealed, associated)
    except (InvalidTag, ValueError) as error:  # ValueError: shorter than its tag, in some versions
        raise BadSeal(
            f"expected {len(sealed)} bytes that were sealed for this receiver in this attempt, found others: changed "
            "on the way, or sealed under other keys"
        ) from error


def stream(key: bytes, first_block: int = 0) -> CipherContext:
    """The key's stream from block ``first_block`` (of 16 bytes) on: what zeros are encrypted to in counter mode.

    ``key`` is 16 bytes (AES-128) or 32 (AES-256), used for nothing else.

    >>> stream(bytes(16)).update(bytes(32))[16:] == stream(bytes(16), first_block=1).update(bytes(16))
    True
    """
    return Cipher(algorithms.AES(key), modes.CTR(first_block.to_bytes(16, "big"))).encryptor()


__all__ = ["KeyPair", "derive", "hkdf", "joined", "seal", "stream", "unseal"]
