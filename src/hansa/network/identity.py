"""Who is who: the federation's certificate authority, certificates for the server and each client, and TLS contexts.

Everything is ECDSA on P-256. A client makes its own key and sends only a signing request. ``cryptography`` is imported
where it is used, because a client that has enrolled needs but its smallest part.
"""

from __future__ import annotations

import datetime
import hashlib
import ipaddress
import ssl
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hansa.core.errors import InputError, ProtocolError
from hansa.network.blobs import write_file
from hansa.network.failpoints import fail_point

if TYPE_CHECKING:
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey, EllipticCurvePublicKey

AUTHORITY_NAME = "hansa federation"
RECEIPTS_NAME = "hansa receipts"  # no client can have this name
_EARLY = datetime.timedelta(days=2)  # clocks differ
_AUTHORITY_DAYS, _SERVER_DAYS, _CLIENT_DAYS = 3650, 397, 1096
_DAY_S = 86_400.0


@dataclass(frozen=True)
class Authority:
    """The federation's certificate authority, kept in ``folder``; its key never leaves it.

    ``client_life_s`` is for how long a client's certificate is good.
    """

    folder: Path
    certificate: bytes  # PEM
    _key: bytes
    client_life_s: float = _CLIENT_DAYS * _DAY_S

    @staticmethod
    def open(folder: Path) -> Authority:
        """The authority in ``folder``, created on first use (its key file can be read by the owner alone)."""
        certificate, key = folder / "authority.pem", folder / "authority.key"
        if not certificate.exists():
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            made_key, made = _self_signed()
            write_file(key, made_key, private=True)
            fail_point("coordinator.authority.keyed")
            write_file(certificate, made)
            fail_point("coordinator.authority.made")
        return Authority(folder, certificate.read_bytes(), key.read_bytes())

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the authority's certificate (DER), in hex."""
        return fingerprint(self.certificate)

    def sign_client(self, request: bytes, name: str) -> bytes:
        """A certificate (PEM) for the key in a signing request; its common name is ``name``, whatever was asked for.

        Raises ``ProtocolError`` for a request that is malformed, not signed by its own key, or of another kind of key.
        """
        from cryptography import x509
        from cryptography.hazmat.primitives.asymmetric import ec

        try:
            csr = x509.load_pem_x509_csr(request)
            valid, key = csr.is_signature_valid, csr.public_key()
        except Exception as error:  # cryptography raises many kinds for malformed input
            raise ProtocolError(f"certificate request: expected PEM, found {type(error).__name__}") from error
        if not valid or not isinstance(key, ec.EllipticCurvePublicKey) or key.curve.name != "secp256r1":
            raise ProtocolError("certificate request: expected an ECDSA P-256 key and its own signature")
        return self._sign(key, name, self.client_life_s, "client", hosts=())

    def server_files(self, hosts: Sequence[str]) -> tuple[Path, Path]:
        """Certificate and key files for a server reached under ``hosts`` (names or IP addresses), made anew."""
        from cryptography.hazmat.primitives.asymmetric import ec

        key = ec.generate_private_key(ec.SECP256R1())
        certificate = self._sign(key.public_key(), hosts[0], _SERVER_DAYS * _DAY_S, "server", hosts=hosts)
        paths = self.folder / "server.pem", self.folder / "server.key"
        write_file(paths[1], _private_pem(key), private=True)
        fail_point("coordinator.server.keyed")
        write_file(paths[0], certificate)
        return paths

    def receipts_files(self) -> tuple[Path, Path]:
        """Certificate and key files of the key that signs receipts and the audit log, made once."""
        from cryptography.hazmat.primitives.asymmetric import ec

        paths = self.folder / "receipts.pem", self.folder / "receipts.key"
        if not paths[0].exists():
            key = ec.generate_private_key(ec.SECP256R1())
            write_file(paths[1], _private_pem(key), private=True)
            life_s = _AUTHORITY_DAYS * _DAY_S
            write_file(paths[0], self._sign(key.public_key(), RECEIPTS_NAME, life_s, "receipts", hosts=()))
        return paths

    def _sign(self, key: Any, name: str, life_s: float, purpose: str, *, hosts: Sequence[str]) -> bytes:
        from cryptography import x509
        from cryptography.hazmat.primitives import hashes, serialization
        from cryptography.x509.oid import ExtendedKeyUsageOID

        own = x509.load_pem_x509_certificate(self.certificate)
        own_key = serialization.load_pem_private_key(self._key, password=None)
        usages = {
            "client": ExtendedKeyUsageOID.CLIENT_AUTH,
            "server": ExtendedKeyUsageOID.SERVER_AUTH,
            "receipts": ExtendedKeyUsageOID.TIME_STAMPING,
        }
        builder = _builder(name, own.subject, key, life_s, is_authority=False)
        builder = builder.add_extension(x509.ExtendedKeyUsage([usages[purpose]]), critical=False)
        above = x509.AuthorityKeyIdentifier.from_issuer_public_key(own.public_key())  # type: ignore[arg-type]  # P-256
        builder = builder.add_extension(above, critical=False)
        if hosts:
            builder = builder.add_extension(x509.SubjectAlternativeName([_general(h) for h in hosts]), critical=False)
        signed = builder.sign(own_key, hashes.SHA256())  # type: ignore[arg-type]  # our own key is P-256
        return signed.public_bytes(serialization.Encoding.PEM)


def make_request(name: str) -> tuple[bytes, bytes]:
    """A new private key and a signing request for it, both in PEM; made on the client, where the key stays."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    request = x509.CertificateSigningRequestBuilder().subject_name(subject).sign(key, hashes.SHA256())
    return _private_pem(key), request.public_bytes(serialization.Encoding.PEM)


def request_key_hash(request: bytes) -> str:
    """SHA-256 of the public key in a signing request: says whether two requests are of one key."""
    from cryptography import x509
    from cryptography.hazmat.primitives import serialization

    try:
        key = x509.load_pem_x509_csr(request).public_key()
    except Exception as error:  # cryptography raises many kinds for malformed input
        raise ProtocolError(f"certificate request: expected PEM, found {type(error).__name__}") from error
    spki = key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(spki).hexdigest()


def fingerprint(pem: bytes) -> str:
    """SHA-256 of a certificate's DER, in hex; ``ProtocolError`` when ``pem`` is not a certificate."""
    try:
        return hashlib.sha256(ssl.PEM_cert_to_DER_cert(pem.decode("ascii").strip())).hexdigest()
    except ValueError as error:
        raise ProtocolError(f"certificate: expected PEM, found {error}") from error


def life_of(pem: bytes) -> tuple[float, float]:
    """From when until when a certificate of the federation is good, in seconds since 1970."""
    from cryptography import x509

    found = x509.load_pem_x509_certificate(pem)
    return (found.not_valid_before_utc + _EARLY).timestamp(), found.not_valid_after_utc.timestamp()


def key_of_receipts(pem: bytes, authority: bytes) -> bytes:
    """The public key (PEM) of a certificate that the authority made to sign receipts; ``ProtocolError`` otherwise."""
    from cryptography import x509
    from cryptography.hazmat.primitives import serialization
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

    try:
        found = x509.load_pem_x509_certificate(pem)
        usage = found.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
        names = [str(one.value) for one in found.subject.get_attributes_for_oid(NameOID.COMMON_NAME)]
    except Exception as error:  # cryptography raises many kinds for malformed input
        raise ProtocolError(f"receipts: expected a certificate, found {type(error).__name__}") from error
    ours = is_issued_by(found.public_bytes(serialization.Encoding.DER), authority)
    if not ours or list(usage) != [ExtendedKeyUsageOID.TIME_STAMPING] or names != [RECEIPTS_NAME]:
        raise ProtocolError(
            "receipts: expected a certificate that the federation's authority made for receipts, found another; "
            "do not trust this server"
        )
    return found.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


def client_of(der: bytes, authority: bytes) -> tuple[str, float, EllipticCurvePublicKey]:
    """Name, end (seconds since 1970) and key of a certificate (DER) that the authority made for a client.

    Raises ``InputError`` for any other: a stranger's, a server's, one for receipts.
    """
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

    if not is_issued_by(der, authority):
        raise InputError("it shows no certificate of this federation's authority")
    try:
        found = x509.load_der_x509_certificate(der)
        usage = found.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
        (name,) = [str(one.value) for one in found.subject.get_attributes_for_oid(NameOID.COMMON_NAME)]
        key = found.public_key()
    except Exception as error:  # cryptography raises many kinds for malformed input
        raise InputError("its certificate cannot be read") from error
    if list(usage) != [ExtendedKeyUsageOID.CLIENT_AUTH] or not isinstance(key, EllipticCurvePublicKey):
        raise InputError("its certificate is not one of a client")
    return name, found.not_valid_after_utc.timestamp(), key


def der_of(pem: bytes) -> bytes:
    """A certificate in DER."""
    return ssl.PEM_cert_to_DER_cert(pem.decode("ascii").strip())


def issuer_of(der: bytes) -> str:
    """The name of who issued a certificate, as a person would say it and a terminal may show it."""
    from cryptography import x509
    from cryptography.x509.oid import NameOID

    try:
        issuer = x509.load_der_x509_certificate(der).issuer
        names = [issuer.get_attributes_for_oid(kind) for kind in (NameOID.COMMON_NAME, NameOID.ORGANIZATION_NAME)]
        said = next((str(found[0].value) for found in names if found), issuer.rfc4514_string())
    except Exception:  # cryptography raises many kinds for what OpenSSL takes
        return "somebody whose name cannot be read"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in said)[:200]


def certifies(pem: bytes, private_key: bytes, authority: bytes) -> bool:
    """Whether a certificate (PEM) is of the authority and for this key, so that TLS can be spoken with both."""
    from cryptography import x509
    from cryptography.hazmat.primitives import serialization

    own = serialization.load_pem_private_key(private_key, password=None).public_key()
    try:
        found = x509.load_pem_x509_certificate(pem)
        same = found.public_key() == own
    except Exception:  # cryptography raises many kinds for malformed input
        return False
    return same and is_issued_by(found.public_bytes(serialization.Encoding.DER), authority)


def is_issued_by(der: bytes, authority: bytes) -> bool:
    """Whether the authority (PEM) signed a certificate (DER)."""
    from cryptography import x509

    try:
        x509.load_der_x509_certificate(der).verify_directly_issued_by(x509.load_pem_x509_certificate(authority))
    except Exception:  # InvalidSignature, or ValueError and TypeError for another name or kind of key
        return False
    return True


def client_context(authority: bytes, certificate: Path | None = None, key: Path | None = None) -> ssl.SSLContext:
    """TLS 1.2 or newer that trusts the federation's authority alone; with the client's own certificate, mutual TLS."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # checks the certificate and the host's name
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.load_verify_locations(cadata=authority.decode("ascii"))
    if certificate is not None and key is not None:
        try:
            context.load_cert_chain(certificate, key)
        except (OSError, ssl.SSLError) as error:
            raise InputError(
                f"{certificate}: expected a certificate and its key, found {error}; enrol again"
            ) from error
    return context


def unchecked_context() -> ssl.SSLContext:
    """TLS that checks nothing: only to look at a certificate, and to fetch the authority that a token names."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


def server_context(certificate: Path, key: Path, authority: bytes) -> ssl.SSLContext:
    """TLS 1.2 or newer; a client's certificate may be absent (enrolment), but if shown it must be the federation's."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION
    context.load_cert_chain(certificate, key)
    context.load_verify_locations(cadata=authority.decode("ascii"))
    context.verify_mode = ssl.CERT_OPTIONAL
    return context


def _self_signed() -> tuple[bytes, bytes]:
    """A new authority: private key and certificate in PEM."""
    import secrets

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    key = ec.generate_private_key(ec.SECP256R1())
    name = f"{AUTHORITY_NAME} {secrets.token_hex(4)}"
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    builder = _builder(name, subject, key.public_key(), _AUTHORITY_DAYS * _DAY_S, is_authority=True)
    certificate = builder.sign(key, hashes.SHA256())
    return _private_pem(key), certificate.public_bytes(serialization.Encoding.PEM)


def _builder(name: str, issuer: Any, key: Any, life_s: float, *, is_authority: bool) -> x509.CertificateBuilder:
    """What every certificate of the federation has in common."""
    from cryptography import x509
    from cryptography.x509.oid import NameOID

    now = datetime.datetime.now(datetime.UTC)
    usage = x509.KeyUsage(
        digital_signature=True,
        key_cert_sign=is_authority,
        crl_sign=is_authority,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )
    return (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _EARLY)
        .not_valid_after(now + datetime.timedelta(seconds=life_s))
        .add_extension(x509.BasicConstraints(ca=is_authority, path_length=0 if is_authority else None), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _general(host: str) -> x509.GeneralName:
    """A host as a certificate names it."""
    from cryptography import x509

    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _private_pem(key: EllipticCurvePrivateKey) -> bytes:
    from cryptography.hazmat.primitives import serialization

    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
