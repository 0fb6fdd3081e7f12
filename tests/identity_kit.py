"""Identities for tests: one CA, any number of nodes, and every flaw a certificate can have.

    kit = shared()                              # cached: one CA for the whole test session
    hub, edge = kit.identity("hub-1"), kit.identity("edge-1")
    late = kit.identity("edge-1", flaw=Flaw.EXPIRED)
    path = kit.write(tmp_path, "edge-1")        # the same as one PEM bundle on disk

Made with `cryptography` alone, not with the project's own CA: what is under test must not make its own proof.
"""

from __future__ import annotations

import functools
from datetime import UTC, datetime, timedelta
from enum import Enum, auto
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from OpenSSL import SSL

from stp.identity import Identity, Upstream, network_key_pem, upstream_pem

DOMAIN = "test"
NETWORK_KEY = bytes(range(32))
PURPOSES = {
    "server": ExtendedKeyUsageOID.SERVER_AUTH,
    "client": ExtendedKeyUsageOID.CLIENT_AUTH,
    "code": ExtendedKeyUsageOID.CODE_SIGNING,
}


class Flaw(Enum):
    """What is wrong with a certificate; everything else about it is right."""

    NONE = auto()
    EXPIRED = auto()
    NOT_YET_VALID = auto()
    WRONG_EKU = auto()
    """Good for code signing, neither for servers nor for clients."""
    CLIENT_ONLY = auto()
    """What a device has: it may dial, and must not be believed when it answers."""
    SERVER_ONLY = auto()
    WRONG_URI = auto()
    """https://… where stp://… belongs."""
    NO_URI = auto()
    OTHER_CA = auto()
    """Issued, and anchored, by a stranger with the same names."""


class Kit:
    """A CA and what it issued. The same question gets the same identity."""

    def __init__(self, domain: str = DOMAIN, network_keys: tuple[bytes, ...] = (NETWORK_KEY,)) -> None:
        self.domain = domain
        self.network_keys = network_keys
        self.now = datetime.now(UTC)
        """The same for all its certificates: which was made first must not matter to a test."""
        self.ca_key = ec.generate_private_key(ec.SECP256R1())
        self.ca = _certificate(self.ca_key, None, f"{domain} CA", lifetime=timedelta(days=3650))

    @functools.cached_property
    def stranger(self) -> Kit:
        return Kit(self.domain, self.network_keys)

    @functools.cache  # noqa: B019 - a kit lives as long as the tests
    def bundle(
        self,
        node: str,
        flaw: Flaw = Flaw.NONE,
        *,
        not_before: datetime | None = None,
        not_after: datetime | None = None,
        upstream: tuple[str, str, float] | None = None,
    ) -> bytes:
        """Key, leaf, anchor, network keys and, if asked for, upstream (node, url, time) as one PEM."""
        if flaw is Flaw.OTHER_CA:
            return self.stranger.bundle(node, not_before=not_before, not_after=not_after, upstream=upstream)
        key = ec.generate_private_key(ec.SECP256R1())
        leaf = self.certificate(node, key, flaw, not_before=not_before, not_after=not_after)
        parts = [key_pem(key), pem(leaf), pem(self.ca)]
        parts += [network_key_pem(secret).encode() for secret in self.network_keys]
        if upstream is not None:
            parts.append(upstream_pem(Upstream(*upstream)).encode())
        return b"".join(parts)

    def certificate(
        self,
        node: str,
        key: ec.EllipticCurvePrivateKey,
        flaw: Flaw = Flaw.NONE,
        *,
        not_before: datetime | None = None,
        not_after: datetime | None = None,
    ) -> x509.Certificate:
        """A leaf for `key`. From an hour ago for a year, unless flaw or caller say otherwise."""
        now = self.now
        start, end = now - timedelta(hours=1), now + timedelta(days=365)
        if flaw is Flaw.EXPIRED:
            start, end = now - timedelta(days=30), now - timedelta(hours=1)
        elif flaw is Flaw.NOT_YET_VALID:
            start = now + timedelta(days=1)
        purposes = {
            Flaw.WRONG_EKU: ("code",),
            Flaw.CLIENT_ONLY: ("client",),
            Flaw.SERVER_ONLY: ("server",),
        }.get(flaw, ("server", "client"))
        uri: str | None = f"stp://{self.domain}/{node}"
        if flaw is Flaw.WRONG_URI:
            uri = f"https://{self.domain}/{node}"
        elif flaw is Flaw.NO_URI:
            uri = None
        return _certificate(
            key,
            (self.ca, self.ca_key),
            node,
            purposes=purposes,
            uri=uri,
            not_before=not_before or start,
            not_after=not_after or end,
        )

    @functools.cache  # noqa: B019 - as above
    def identity(
        self,
        node: str,
        flaw: Flaw = Flaw.NONE,
        *,
        not_before: datetime | None = None,
        not_after: datetime | None = None,
        upstream: tuple[str, str, float] | None = None,
    ) -> Identity:
        """A loaded identity. One without a usable URI cannot be loaded: see `parts_of` for those."""
        data = self.bundle(node, flaw, not_before=not_before, not_after=not_after, upstream=upstream)
        return Identity.parse([(f"{node}.pem", data)])

    def write(self, directory: Path, node: str, flaw: Flaw = Flaw.NONE, **options: datetime) -> Path:
        """The bundle as a file of mode 0600."""
        path = directory / f"{node}.pem"
        path.touch(0o600)
        path.write_bytes(self.bundle(node, flaw, **options))
        return path

    def der(self) -> bytes:
        return self.ca.public_bytes(serialization.Encoding.DER)


@functools.cache
def shared(domain: str = DOMAIN) -> Kit:
    """One kit per domain for the whole test session."""
    return Kit(domain)


def shake(client: SSL.Context, server: SSL.Context) -> tuple[str, str]:
    """A whole handshake between two contexts over memory. ("", "") or what went wrong on (client, server)."""
    ends = [SSL.Connection(client, None), SSL.Connection(server, None)]
    ends[0].set_connect_state()
    ends[1].set_accept_state()
    wrong = ["", ""]
    for _ in range(10):
        for n, end in enumerate(ends):
            if not wrong[n]:
                try:
                    end.do_handshake()
                except SSL.WantReadError:
                    pass
                except SSL.Error as exc:
                    wrong[n] = str(exc)
            try:
                ends[1 - n].bio_write(end.bio_read(65536))
            except SSL.WantReadError:
                pass
    if not any(wrong):  # the client learns of a refusal only when it reads on
        try:
            ends[0].recv(1)
        except SSL.WantReadError:
            pass
        except SSL.Error as exc:
            wrong[0] = str(exc)
    return wrong[0], wrong[1]


def parts_of(bundle: bytes) -> tuple[tuple[bytes, ...], bytes, tuple[bytes, ...]]:
    """(chain, key, anchors) in DER, of any bundle of a kit, also of those that name no node."""
    leaf, ca = x509.load_pem_x509_certificates(bundle)
    key = serialization.load_pem_private_key(bundle[: bundle.index(b"-----BEGIN CERT")], None)
    key_der = key.private_bytes(
        serialization.Encoding.DER, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    der = serialization.Encoding.DER
    return (leaf.public_bytes(der),), key_der, (ca.public_bytes(der),)


def pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _certificate(
    key: ec.EllipticCurvePrivateKey,
    issuer: tuple[x509.Certificate, ec.EllipticCurvePrivateKey] | None,
    name: str,
    *,
    purposes: tuple[str, ...] = (),
    uri: str | None = None,
    lifetime: timedelta = timedelta(days=365),
    not_before: datetime | None = None,
    not_after: datetime | None = None,
) -> x509.Certificate:
    start = not_before or datetime.now(UTC) - timedelta(days=400)
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer[0].subject if issuer else subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(start)
        .not_valid_after(not_after or start + lifetime)
        .add_extension(x509.BasicConstraints(ca=issuer is None, path_length=None), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )
    signer = issuer[1] if issuer else key
    builder = builder.add_extension(
        x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False
    )
    if issuer is None:
        builder = builder.add_extension(_key_usage(signs=True), critical=True)
    if purposes:
        usage = x509.ExtendedKeyUsage([PURPOSES[purpose] for purpose in purposes])
        builder = builder.add_extension(usage, critical=False)
    if uri is not None:
        names = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(uri)])
        builder = builder.add_extension(names, critical=False)
    return builder.sign(signer, hashes.SHA256())


def _key_usage(*, signs: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs,
        crl_sign=signs,
        encipher_only=False,
        decipher_only=False,
    )
