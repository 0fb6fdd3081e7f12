"""Joining and renewing: how a machine with nothing but a token gets its certificate (protocol §11).

Plain blocking code, for command lines; the service is `stpd.enrol`, the road there `stp.pinned`.

(1) The token leaves this machine only towards a server whose chain ends in the CA that the token pins.
(2) The private key is made here, never leaves, and is on disk before the request is sent: asking again after
    a lost answer uses the same key and costs no further use of the token.
(3) Whatever goes wrong is an EnrolError: one line of cause, one of what to do, an exit code of sysexits.h.
(4) A file that holds an identity is replaced as a whole or not at all.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import json
import os
import re
import secrets
import zlib
from collections.abc import Callable, Sequence
from enum import StrEnum
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Final, TypeAlias

from attrs import define, field
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from stp.identity import (
    ENROL_PORT,
    Identity,
    IdentityError,
    Upstream,
    check_node_name,
    parse_url,
    upstream_pem,
    write_atomically,
)
from stp.pinned import (
    EX_CANTCREAT,
    EX_NOPERM,
    EX_PROTOCOL,
    EX_TEMPFAIL,
    EX_USAGE,
    PIN_SIZE,
    EnrolError,
    by_anchors,
    by_pin,
    exchange,
    pin_of,
)

TOKEN_PREFIX: Final = "stpj1."
TOKEN_ID_SIZE: Final = 5
TOKEN_SECRET_SIZE: Final = 16
"""128 bits: not to be guessed at any rate, so a plain SHA-256 of it is enough at rest."""
RENEW_CONTEXT: Final = b"stp-enrol/1 renew\0"

IdentitySource: TypeAlias = Identity | str | Path | Sequence[str | Path]


class Refusal(StrEnum):
    """Why the service said no; the `error` of its answer."""

    BAD_REQUEST = "bad-request"
    TOKEN_UNKNOWN = "token-unknown"
    TOKEN_EXPIRED = "token-expired"
    TOKEN_USED = "token-used"
    TOKEN_REVOKED = "token-revoked"
    TOKEN_ROLE = "token-role"
    NAME_TAKEN = "name-taken"
    NAME_BAD = "name-bad"
    NODE_UNKNOWN = "node-unknown"
    NODE_REVOKED = "node-revoked"
    LAPSED = "lapsed"
    TOO_MANY = "too-many"
    UNAVAILABLE = "unavailable"


EXIT_CODES: Final[dict[str, int]] = {
    Refusal.BAD_REQUEST: EX_PROTOCOL,
    Refusal.NAME_BAD: EX_USAGE,
    Refusal.TOO_MANY: EX_TEMPFAIL,
    Refusal.UNAVAILABLE: EX_TEMPFAIL,
}
"""All others are EX_NOPERM."""


@define
class JoinToken:
    """What a person pastes: `stpj1.` and 60 characters of base64url (id, secret, pin, CRC-32)."""

    id: str
    """Ten hexadecimal digits; no secret, what lists and logs show."""
    secret: bytes = field(repr=False)
    pin: bytes

    def encode(self) -> str:
        body = bytes.fromhex(self.id) + self.secret + self.pin
        return TOKEN_PREFIX + base64.urlsafe_b64encode(body + zlib.crc32(body).to_bytes(4, "big")).decode()

    @classmethod
    def decode(cls, text: str) -> JoinToken:
        """Raises EnrolError on anything that is not a whole token."""
        advice = "copy all of what `stpctl keys create` printed"
        text = text.strip()
        if not text.startswith(TOKEN_PREFIX):
            raise EnrolError(f"this is no join token: it must begin with {TOKEN_PREFIX}", advice, EX_USAGE)
        try:
            raw = base64.b64decode(text[len(TOKEN_PREFIX) :].encode("ascii"), b"-_", validate=True)
        except (binascii.Error, UnicodeEncodeError) as exc:
            raise EnrolError("the token has characters that no token has", advice, EX_USAGE) from exc
        body, crc = raw[:-4], raw[-4:]
        whole = len(body) == TOKEN_ID_SIZE + TOKEN_SECRET_SIZE + PIN_SIZE
        if not whole or zlib.crc32(body).to_bytes(4, "big") != crc:
            raise EnrolError("the token is incomplete or mistyped", advice, EX_USAGE)
        end = TOKEN_ID_SIZE + TOKEN_SECRET_SIZE
        return cls(body[:TOKEN_ID_SIZE].hex(), body[TOKEN_ID_SIZE:end], body[end:])


def new_token(ca_der: bytes) -> JoinToken:
    """A fresh token that pins this CA."""
    return JoinToken(secrets.token_hex(TOKEN_ID_SIZE), secrets.token_bytes(TOKEN_SECRET_SIZE), pin_of(ca_der))


@define
class Grant:
    """What the service gave: everything a bundle holds but the key. PEM texts."""

    node: str
    role: str
    chain: str
    anchors: str
    network_key: str = field(repr=False)
    upstream: Upstream

    def bundle(self, key_pem: bytes) -> bytes:
        """One identity file, see `stp.identity`."""
        parts = [self.chain, self.anchors, self.network_key, upstream_pem(self.upstream)]
        return (
            key_pem
            + "".join(part if part.endswith("\n") or not part else part + "\n" for part in parts).encode()
        )


def new_key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


def key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def make_csr(key: ec.EllipticCurvePrivateKey, name: str) -> x509.CertificateSigningRequest:
    """Proves that we hold the key. The service takes nothing else from it."""
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    return x509.CertificateSigningRequestBuilder().subject_name(subject).sign(key, hashes.SHA256())


def renewal_digest(leaf_der: bytes, csr_der: bytes) -> bytes:
    """What the old key signs (ECDSA with SHA-256) to ask for a new certificate."""
    return RENEW_CONTEXT + hashlib.sha256(leaf_der).digest() + csr_der


def parse_host(text: str, port: int = ENROL_PORT) -> tuple[str, int]:
    """`host`, `host:port`, `[v6]` or `[v6]:port`. Raises EnrolError."""
    match = re.fullmatch(r"(?:\[([0-9A-Fa-f:.%\w]+)\]|([^\[\]:/@\s]+))(?::(\d{1,5}))?", text)
    if match is None and _is_ipv6(text):
        return text, port
    if match is None or int(match[3] or port) > 65535:
        raise EnrolError(f"{text!r} is not a host", f"write HOST or HOST:{port}", EX_USAGE)
    return match[1] or match[2], int(match[3] or port)


def _ask(
    host: str,
    port: int,
    path: str,
    fields: dict[str, str],
    is_anchor: Callable[[bytes], bool],
    domain: str | None,
) -> Grant:
    status, answer = exchange(host, port, path, json.dumps(fields).encode(), is_anchor, domain=domain)
    try:
        found = json.loads(answer)
        if status != 200:
            raise refused(dict(found))
        upstream = found["upstream"]
        return Grant(
            node=str(found["node"]),
            role=str(found["role"]),
            chain=str(found["chain"]),
            anchors=str(found["anchors"]),
            network_key=str(found["network_key"]),
            upstream=Upstream(str(upstream["node"]), str(upstream["url"]), float(found["time"])),
        )
    except (ValueError, KeyError, TypeError, RecursionError) as exc:
        cause = f"{host}:{port} gave an answer (status {status}) that makes no sense"
        raise EnrolError(cause, "check that both ends run the same version", EX_PROTOCOL) from exc


def refused(answer: dict[str, Any]) -> EnrolError:
    """The service's no as an error of ours. Its texts are shown in one line each, and not for ever long."""
    refusal = str(answer.get("error", ""))
    cause, advice = (" ".join(str(answer.get(part, "")).split())[:300] for part in ("cause", "advice"))
    printable = "".join(c for c in cause if c.isprintable()) or f"refused: {refusal[:40]}"
    return EnrolError(
        printable,
        "".join(c for c in advice if c.isprintable()) or "ask the operator of the hub",
        EXIT_CODES.get(refusal, EX_NOPERM),
        refusal,
    )


def join(token: str, host: str, name: str, key: ec.EllipticCurvePrivateKey, *, kind: str = "device") -> Grant:
    """Ask `host[:port]` for a certificate under `name`. Blocking. Raises EnrolError (R-11-6).

    `kind` "gateway": the certificate must do for a node that others dial; a token of another role is refused.
    """
    found = JoinToken.decode(token)
    _check_name(name)
    address = parse_host(host)
    csr = make_csr(key, name).public_bytes(serialization.Encoding.PEM).decode()
    fields = {"token": token.strip(), "name": name, "csr": csr, "kind": kind}
    grant = _ask(*address, "/v1/enrol", fields, by_pin(found.pin), None)
    identity = _checked(grant, key, name)
    if not any(hmac.compare_digest(pin_of(der), found.pin) for der in identity.credentials.anchors_der):
        raise EnrolError(
            f"{host} gave anchors without the CA that the token pins",
            "ask the operator of the hub",
            EX_PROTOCOL,
        )
    return grant


def renew(identity: Identity, host: str, key: ec.EllipticCurvePrivateKey) -> Grant:
    """Ask for a certificate on a new `key`; the old one signs. Blocking. Raises EnrolError."""
    old = serialization.load_der_private_key(identity.credentials.key_der, None)
    if not isinstance(old, ec.EllipticCurvePrivateKey):
        raise EnrolError("only ECDSA identities are renewed here", "renew with your own CA", EX_USAGE)
    csr = make_csr(key, identity.node)
    csr_der = csr.public_bytes(serialization.Encoding.DER)
    proof = old.sign(renewal_digest(identity.leaf_der, csr_der), ec.ECDSA(hashes.SHA256()))
    chain = [x509.load_der_x509_certificate(der) for der in identity.credentials.chain_der]
    fields = {
        "chain": "".join(c.public_bytes(serialization.Encoding.PEM).decode() for c in chain),
        "csr": csr.public_bytes(serialization.Encoding.PEM).decode(),
        "signature": base64.b64encode(proof).decode(),
    }
    anchors = by_anchors(identity.credentials.anchors_der)
    grant = _ask(*parse_host(host), "/v1/renew", fields, anchors, identity.domain)
    _checked(grant, key, identity.node)
    return grant


def _check_name(name: str) -> None:
    try:
        check_node_name(name)
    except IdentityError as exc:
        raise EnrolError(exc.cause, exc.advice, EX_USAGE) from exc


def _checked(grant: Grant, key: ec.EllipticCurvePrivateKey, name: str) -> Identity:
    """What we were given must load, be for this key and bear this name."""
    try:
        identity = Identity.parse([("the answer", grant.bundle(key_pem(key)))])
    except IdentityError as exc:
        raise EnrolError(
            f"the hub's answer is unusable: {exc.cause}", "ask its operator", EX_PROTOCOL
        ) from exc
    if identity.node != name:
        cause = f"the hub gave a certificate for {identity.node}, not for {name}"
        raise EnrolError(cause, "ask its operator", EX_PROTOCOL)
    return identity


def _is_ipv6(text: str) -> bool:
    try:
        return ip_address(text).version == 6
    except ValueError:
        return False


# -- on disk -----------------------------------------------------------------------------------------------


def pending_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """The key of an attempt: made and saved once, found again by the next attempt; (2). Raises EnrolError."""
    try:
        found = serialization.load_pem_private_key(path.read_bytes(), None)
        if isinstance(found, ec.EllipticCurvePrivateKey):
            return found
    except (FileNotFoundError, ValueError, TypeError):
        pass
    except OSError as exc:
        raise _cannot_write(path, exc) from exc
    key = new_key()
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_atomically(path, key_pem(key))
    except OSError as exc:
        raise _cannot_write(path, exc) from exc
    return key


def save_bundle(path: Path, grant: Grant, key: ec.EllipticCurvePrivateKey, pending: Path) -> None:
    """Write the identity, mode 0600, as a whole; then forget the pending key. Raises EnrolError."""
    try:
        write_atomically(path, grant.bundle(key_pem(key)))
        pending.unlink(missing_ok=True)
    except OSError as exc:
        raise _cannot_write(path, exc) from exc


def _cannot_write(path: Path, exc: OSError) -> EnrolError:
    return EnrolError(
        f"{path} cannot be written: {exc.strerror}", "check its directory and owner", EX_CANTCREAT
    )


def device_path() -> Path:
    """$XDG_CONFIG_HOME/stp/device.pem, else ~/.config/stp/device.pem."""
    base = os.environ.get("XDG_CONFIG_HOME") or os.path.join(os.path.expanduser("~"), ".config")
    return Path(base) / "stp" / "device.pem"


def default_identity() -> Path:
    """What STP_IDENTITY says, else where `stp join` writes: ~/.config/stp/device.pem."""
    return Path(os.environ.get("STP_IDENTITY") or device_path())


def load_identity(identity: IdentitySource | None) -> Identity:
    """From a bundle, or several files; None: the default one. Blocking. Raises IdentityError."""
    if identity is None:
        identity = default_identity()
    if isinstance(identity, Identity):
        return identity
    paths = [identity] if isinstance(identity, str | Path) else list(identity)
    return Identity.load([Path(path).expanduser() for path in paths])


def join_device(token: str, host: str, name: str, out: str | Path | None = None) -> Path:
    """Join as a device and write its bundle to `out` (default `device_path()`). Blocking. Raises EnrolError.

    Asked again after a lost answer it finishes what it began. An identity that is there is never overwritten.
    """
    path = Path(out) if out is not None else device_path()
    if path.exists():
        raise EnrolError(f"{path} is there already", "remove it first, or give another --out", EX_CANTCREAT)
    JoinToken.decode(token)  # before a key is made for nothing
    _check_name(name)
    pending = path.with_name(path.name + ".joining")
    key = pending_key(pending)
    save_bundle(path, join(token, host, name, key), key, pending)
    return path


def renewal_host(upstream: Upstream | None) -> str:
    """Where the node that enrolment named as upstream enrols. Raises EnrolError."""
    if upstream is None:
        raise EnrolError("the identity does not say where it came from", "give --host HOST", EX_USAGE)
    try:
        host = parse_url(upstream.url, upstream).host
    except IdentityError as exc:
        raise EnrolError(exc.cause, "give --host HOST", EX_USAGE) from exc
    return f"[{host}]:{ENROL_PORT}" if ":" in host else f"{host}:{ENROL_PORT}"


def renew_file(path: str | Path, host: str | None = None) -> Identity:
    """Renew the identity in one bundle file, in place; (4). Blocking. Raises EnrolError."""
    path = Path(path)
    try:
        identity = Identity.load(path)
    except IdentityError as exc:
        raise EnrolError(f"{path}: {exc.cause}", exc.advice, EX_USAGE) from exc
    pending = path.with_name(path.name + ".renewing")
    key = pending_key(pending)
    save_bundle(path, renew(identity, host or renewal_host(identity.upstream), key), key, pending)
    return Identity.load(path)
