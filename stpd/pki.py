"""The fleet's own certificate authority: ECDSA P-256, one key, no intermediates.

(1) What may be in a certificate is decided here. Of a request only its public key is taken, after it has
    proved that it holds the private one.
(2) Devices and applications only dial: their certificates are for clients. Gateways and hubs also answer.
(3) Certificates begin when their CA began. A machine whose clock stood still judges its peers by a time that
    is early, perhaps by months; a late notBefore would shut it out and protects nobody.
(4) Operators' certificates bear stp-operator://… and pass for no node, nodes' bear stp://… and pass for
    no operator.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final
from urllib.parse import quote

from attrs import define, field
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from stp.core.errors import StpError
from stp.core.handshake import UNREADABLE, fully_parsed
from stp.identity import BUILD_TIME, write_atomically

CA_LIFETIME: Final = timedelta(days=3652)
NODE_LIFETIME: Final = timedelta(days=365)
OPERATOR_LIFETIME: Final = timedelta(days=365)
MAX_PEM: Final = 16 * 1024
"""Bytes of a request for a certificate, or of a chain that asks to be renewed."""

CA_CERTIFICATE: Final = "ca.pem"
CA_KEY: Final = "ca.key"

Clock = Callable[[], float]


class PkiError(StpError):
    """A request, a certificate or the authority's own files cannot be used. The text is one line of cause."""


def wall_clock() -> float:
    """Unix seconds, never before the package was built: an authority must not issue in 1970."""
    return max(time.time(), BUILD_TIME)


@define
class CertificateAuthority:
    """Signs. Make one with `create`, or `load` it from its directory."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey = field(repr=False)
    clock: Clock = wall_clock

    @classmethod
    def create(cls, domain: str, clock: Clock = wall_clock) -> CertificateAuthority:
        key = ec.generate_private_key(ec.SECP256R1())
        now = _date(clock())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"{domain} stp CA"[:64])])
        builder = (
            _builder(name, name, key.public_key(), now, now + CA_LIFETIME)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_key_usage(signs=True), critical=True)
        )
        return cls(builder.sign(key, hashes.SHA256()), key, clock)

    @classmethod
    def load(cls, directory: Path, clock: Clock = wall_clock) -> CertificateAuthority:
        """Read ca.pem and ca.key. Blocking. Raises PkiError."""
        try:
            certificate = x509.load_pem_x509_certificate((directory / CA_CERTIFICATE).read_bytes())
            key = serialization.load_pem_private_key((directory / CA_KEY).read_bytes(), None)
        except OSError as exc:
            raise PkiError(f"{exc.filename}: {exc.strerror}") from exc
        except (ValueError, TypeError) as exc:
            raise PkiError(f"{directory}: {CA_CERTIFICATE} or {CA_KEY} is damaged") from exc
        if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != certificate.public_key():
            raise PkiError(f"{directory}: {CA_KEY} is not the key of {CA_CERTIFICATE}")
        return cls(certificate, key, clock)

    def save(self, directory: Path) -> None:
        """Write ca.pem and ca.key (0600). Blocking. Raises OSError."""
        write_atomically(directory / CA_KEY, private_pem(self.key))
        write_atomically(directory / CA_CERTIFICATE, self.pem.encode(), 0o644)

    @property
    def der(self) -> bytes:
        return self.certificate.public_bytes(serialization.Encoding.DER)

    @property
    def pem(self) -> str:
        return certificate_pem(self.certificate)

    def issue(
        self,
        key: ec.EllipticCurvePublicKey,
        domain: str,
        node: str,
        *,
        answers: bool,
        lifetime: timedelta = NODE_LIFETIME,
    ) -> x509.Certificate:
        """A leaf with the URI SAN stp://<domain>/<node>; (2), (3). `answers`: good for servers, too."""
        purposes = [ExtendedKeyUsageOID.CLIENT_AUTH]
        if answers:
            purposes.append(ExtendedKeyUsageOID.SERVER_AUTH)
        return self._leaf(key, node, f"stp://{domain}/{node}", purposes, lifetime)

    def issue_operator(
        self, key: ec.EllipticCurvePublicKey, domain: str, name: str, role: str
    ) -> x509.Certificate:
        """A certificate for a person with stpctl; (4)."""
        uri = f"stp-operator://{domain}/{quote(name, safe='')}?role={quote(role, safe='')}"
        return self._leaf(key, name, uri, [ExtendedKeyUsageOID.CLIENT_AUTH], OPERATOR_LIFETIME)

    def _leaf(
        self,
        key: ec.EllipticCurvePublicKey,
        name: str,
        uri: str,
        purposes: list[x509.ObjectIdentifier],
        lifetime: timedelta,
    ) -> x509.Certificate:
        start = self.certificate.not_valid_before_utc
        end = min(_date(self.clock()) + lifetime, self.certificate.not_valid_after_utc)
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name[:64])])
        authority = x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key())
        builder = (
            _builder(subject, self.certificate.subject, key, start, end)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(signs=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage(purposes), critical=False)
            .add_extension(authority, critical=False)
            .add_extension(x509.SubjectAlternativeName([x509.UniformResourceIdentifier(uri)]), critical=False)
        )
        return builder.sign(self.key, hashes.SHA256())


def read_request(pem: str) -> ec.EllipticCurvePublicKey:
    """The public key of a certificate request, once its signature is found right; (1). Raises PkiError."""
    if len(pem) > MAX_PEM:
        raise PkiError("the certificate request is too long")
    try:
        request = x509.load_pem_x509_csr(pem.encode("ascii", "strict"))
        key = request.public_key()
        valid = request.is_signature_valid
    except (ValueError, TypeError, InvalidSignature) as exc:
        raise PkiError("the certificate request is damaged") from exc
    except Exception as exc:  # an algorithm that cryptography does not know, by whichever exception
        raise PkiError("the certificate request uses an unknown algorithm") from exc
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(
        key.curve, ec.SECP256R1 | ec.SECP384R1
    ):
        raise PkiError("the certificate request's key must be ECDSA P-256 or P-384")
    if not valid:
        raise PkiError("the certificate request is not signed by its own key")
    return key


def read_chain(pem: str) -> list[x509.Certificate]:
    """Certificates of a PEM text, in order. Raises PkiError where there is none, or a damaged one."""
    if len(pem) > MAX_PEM:
        raise PkiError("the certificate chain is too long")
    try:
        return [fully_parsed(one) for one in x509.load_pem_x509_certificates(pem.encode("ascii", "strict"))]
    except UNREADABLE as exc:
        raise PkiError("the certificate chain is damaged") from exc


def key_id(key: ec.EllipticCurvePublicKey) -> str:
    """SHA-256 of the public key, hexadecimal: what says "the same key as before"."""
    digest = hashes.Hash(hashes.SHA256())
    digest.update(
        key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    )
    return digest.finalize().hex()


def certificate_pem(certificate: x509.Certificate) -> str:
    return certificate.public_bytes(serialization.Encoding.PEM).decode("ascii")


def private_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _date(unix_s: float) -> datetime:
    return datetime.fromtimestamp(int(unix_s), UTC)


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, start: datetime, end: datetime
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(start)
        .not_valid_after(end)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _key_usage(*, signs: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs,
        crl_sign=signs,
        encipher_only=False,
        decipher_only=False,
    )
