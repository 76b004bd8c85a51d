"""Signed receipts: the coordinator says by signature what became of a report, and the client keeps it as proof.

One key signs receipts and the head of the audit log. Its certificate is from the federation's authority, made for
nothing else, so that whoever holds ``authority.pem`` can check what was signed, offline and years later.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from hansa.core.errors import ProtocolError
from hansa.network.identity import Authority
from hansa.network.messages import Receipt
from hansa.network.signing import canonical, is_signed, load_private_key, sign

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey


@dataclass(frozen=True)
class Seal:
    """The coordinator's key for receipts and for the audit log, and its certificate (PEM)."""

    certificate: bytes
    _key: EllipticCurvePrivateKey

    @staticmethod
    def open(authority: Authority) -> Seal:
        """The seal in an authority's folder, made on first use."""
        certificate, key = authority.receipts_files()
        return Seal(certificate.read_bytes(), load_private_key(key.read_bytes()))

    def sign(self, what: str, fields: Mapping[str, Any]) -> bytes:
        """64 bytes over a statement; ``what`` keeps statements of one kind from passing for another's."""
        return sign(self._key, statement(what, fields))

    def receipt(self, receipt: Receipt) -> Receipt:
        """The receipt with its signature."""
        return replace(receipt, signature=self.sign("receipt", _signed(receipt)))


def statement(what: str, fields: Mapping[str, Any]) -> bytes:
    r"""The bytes that are signed.

    >>> statement("receipt", {"status": "late"})
    b'hansa receipt 1\n{"status":"late"}'
    """
    return f"hansa {what} 1\n".encode("ascii") + canonical(dict(fields))


def is_sealed(key: bytes, what: str, fields: Mapping[str, Any], signature: bytes) -> bool:
    """Whether a statement is signed by a key (PEM) of ``identity.key_of_receipts``."""
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    public = load_pem_public_key(key)
    return isinstance(public, EllipticCurvePublicKey) and is_signed(public, signature, statement(what, fields))


def check_receipt(receipt: Receipt, key: bytes, *, client: str, run: str, slot: str, sha256: str) -> None:
    """Raise ``ProtocolError`` unless the receipt is signed by ``key`` (PEM) and is for this very report."""
    expected = {"client": client, "run": run, "slot": slot, "sha256": sha256}
    other = [name for name, value in expected.items() if getattr(receipt, name) != value]
    if other or not is_sealed(key, "receipt", _signed(receipt), receipt.signature):
        what = f"of another {other[0]}" if other else "whose signature is wrong"
        raise ProtocolError(f"receipt: expected one for {slot} of {client}, found one {what}; do not trust this server")


def _signed(receipt: Receipt) -> dict[str, Any]:
    """Everything in a receipt but its signature."""
    return {name: value for name, value in asdict(receipt).items() if name != "signature"}
