"""Enrolment requests and their answers: what a hub signs, what a gateway passes on (protocol §11).

Blocking code, called by `stpd.enrol` in a worker thread. Bytes in, (HTTP status, JSON object) out:
nothing that a stranger sends raises.

(1) A certificate is handed out only after the registry that names it is on disk.
(2) The same token, name and key get a certificate again at no further use: the first answer may be lost.
(3) A renewal is signed by the key of a certificate that the registry still counts, lapsed by one lifetime at
    most.
(4) A gateway's word about whom it asks for is not taken: it only moves the charge for a try from its address
    to itself, and is signed.
(5) Tokens, keys and signatures stand in no answer and no log line.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Callable
from typing import Any, Final

import structlog
from attrs import define, field
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID

from stp.core.errors import StpError
from stp.core.handshake import UNREADABLE, fully_parsed, identity_of
from stp.enrol import JoinToken, Refusal, parse_host, renewal_digest
from stp.identity import (
    DEFAULT_PORT,
    Identity,
    IdentityError,
    check_node_name,
    network_key_id,
    network_key_pem,
)
from stp.pinned import EnrolError, by_anchors, exchange
from stpd.keys import RENEWAL_GRACE, JoinTokens, NodeRegistry, RefusedError
from stpd.pki import (
    CertificateAuthority,
    Clock,
    PkiError,
    certificate_pem,
    key_id,
    read_chain,
    read_request,
    wall_clock,
)

log = structlog.get_logger("stpd.enrol")

FORWARD_TIMEOUT: Final = 8.0
"""Seconds a gateway waits for its hub; the machine that asks has 10 for all."""
REPEAT_WINDOW: Final = 3600.0
"""Seconds after an enrolment in which the same token, name and key may ask again; later there is `renew`."""
FORWARD_CONTEXT: Final = b"stp-enrol/1 forward\0"
FORWARDER_HEADER: Final = "stp-forwarder"
SIGNATURE_HEADER: Final = "stp-forwarder-signature"

STATUS: Final[dict[str, int]] = {
    Refusal.BAD_REQUEST: 400,
    Refusal.NAME_BAD: 400,
    Refusal.NAME_TAKEN: 409,
    Refusal.TOO_MANY: 429,
    Refusal.UNAVAILABLE: 503,
}
"""HTTP status of a refusal; all others are 403."""

Answer = tuple[int, dict[str, Any]]


def answer_of(refusal: RefusedError) -> Answer:
    body = {"error": refusal.refusal.value, "cause": refusal.cause, "advice": refusal.advice}
    return STATUS.get(refusal.refusal, 403), body


def _bad(cause: str) -> RefusedError:
    return RefusedError(Refusal.BAD_REQUEST, cause, "check that both ends run the same version")


@define
class IssuingStatistics:
    """Counts since start."""

    enrolled: int = 0
    renewed: int = 0
    refused: int = 0
    forwarded: int = 0
    failed: int = 0
    """Requests that our own disk, CA or hub failed."""


@define
class Forward:
    """The enrolment service of the node above."""

    host: str
    port: int


@define
class Issuer:
    """Answers enrolment requests: signs where there is a CA, forwards where there is a hub to ask."""

    identity: Callable[[], Identity]
    """Asked for every request, so that a reload takes effect."""
    registry: NodeRegistry
    authority: CertificateAuthority | None = None
    tokens: JoinTokens | None = None
    """Needed with `authority`."""
    forward: Forward | None = None
    advertise: str = ""
    """What joiners are told to dial, "host" or "host:port"; empty: the host by which they reached us."""
    port: int = DEFAULT_PORT
    """UDP port that joiners are told to dial."""
    clock: Clock = wall_clock
    statistics: IssuingStatistics = field(factory=IssuingStatistics)
    _lock: threading.Lock = field(factory=threading.Lock, repr=False)

    def answer(self, path: str, body: bytes, *, host: str, address: str) -> Answer:
        """The answer to POST `path`. `host` is what the joiner dialled, `address` whence it comes (R-11-6)."""
        fields: dict[str, str] = {}
        try:
            fields = self._fields(path, body)
            if self.authority is None:
                return self._pass_on(path, body, fields, host, address)
            with self._lock:
                if path == "/v1/enrol":
                    return 200, self._enrol(fields, host, address)
                return 200, self._renew(fields, host, address)
        except RefusedError as exc:
            self.statistics.refused += 1
            name = fields.get("name", "")[:64]
            log.warning(
                "enrol_refused", address=address, name=name, reason=exc.refusal.value, cause=exc.cause
            )
            return answer_of(exc)
        except OSError:
            self.statistics.failed += 1
            log.exception("enrol_failed", address=address)
            unable = RefusedError(
                Refusal.UNAVAILABLE, "the hub cannot write its registry", "look at its log, then try again"
            )
            return answer_of(unable)

    def forwarder(self, body: bytes, leaf: str, signature: str) -> str | None:
        """The node that proves it passes on this body for others; None: nobody we know. (4)"""
        if self.authority is None or not leaf or not signature:
            return None
        try:
            certificate = fully_parsed(x509.load_der_x509_certificate(base64.b64decode(leaf, validate=True)))
            node = self._own(certificate)
            _verify(certificate, base64.b64decode(signature, validate=True), forward_digest(body))
            purposes = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
        except (*UNREADABLE, x509.ExtensionNotFound, RefusedError):
            return None
        lapsed = certificate.not_valid_after_utc.timestamp() < self.clock()
        return None if lapsed or ExtendedKeyUsageOID.SERVER_AUTH not in purposes else node

    # -- with a CA ------------------------------------------------------------------------------------------

    def _enrol(self, fields: dict[str, str], host: str, address: str) -> dict[str, Any]:
        assert self.tokens is not None
        name = fields["name"]
        self._check_name(name)
        key = self._request_key(fields)
        try:
            token = JoinToken.decode(fields["token"])
        except EnrolError as exc:
            raise RefusedError(Refusal.TOKEN_UNKNOWN, exc.cause, exc.advice) from exc
        entry = self.tokens.check(token)
        if (entry.role == "gateway") != (fields["kind"] == "gateway"):
            raise RefusedError(
                Refusal.TOKEN_ROLE,
                f"the token is for the role {entry.role}",
                "gateways join with stpd join, all others with stp join",
            )
        node = self.registry.check_name(name, key_id(key))
        again = node is not None and node.token == entry.id and not entry.revoked
        again = again and node is not None and self.clock() - node.enrolled_at < REPEAT_WINDOW  # (2)
        if not again:
            self.tokens.check_open(entry)
        answer, leaf = self._issue(key, name, entry.role, host)
        self._note(name, entry.role, key, leaf, token=entry.id, tags=list(entry.tags))
        if not again:
            self.tokens.spend(entry.id)
        self.statistics.enrolled += 1
        log.info("enrolled", node=name, role=entry.role, token_id=entry.id, address=address, again=again)
        return answer

    def _renew(self, fields: dict[str, str], host: str, address: str) -> dict[str, Any]:
        key = self._request_key(fields)
        try:
            leaf = read_chain(fields["chain"])[0]
            proof = base64.b64decode(fields["signature"], validate=True)
        except (PkiError, ValueError) as exc:
            raise _bad("the request to renew is damaged") from exc
        node = self._own(leaf)
        request = x509.load_pem_x509_csr(fields["csr"].encode("ascii"))
        digest = renewal_digest(
            leaf.public_bytes(serialization.Encoding.DER), request.public_bytes(serialization.Encoding.DER)
        )
        _verify(leaf, proof, digest)
        entry = self.registry.get(node)
        if entry is None or f"{leaf.serial_number:x}" not in entry.serials:
            raise RefusedError(
                Refusal.NODE_UNKNOWN,
                f"the hub does not know this certificate of {node}",
                "join again, with a token",
            )
        if self.clock() > leaf.not_valid_after_utc.timestamp() + RENEWAL_GRACE:
            raise RefusedError(
                Refusal.LAPSED,
                "the certificate lapsed more than its lifetime ago",
                "join again, with a token",
            )
        answer, fresh = self._issue(key, node, entry.role, host)
        self._note(node, entry.role, key, fresh)
        self.statistics.renewed += 1
        log.info("renewed", node=node, role=entry.role, address=address)
        return answer

    def _check_name(self, name: str) -> None:
        try:
            check_node_name(name)
        except IdentityError as exc:
            raise RefusedError(Refusal.NAME_BAD, exc.cause, exc.advice) from exc
        if name == self.identity().node:
            raise RefusedError(Refusal.NAME_TAKEN, f"{name} is the hub itself", "choose another --name")

    def _request_key(self, fields: dict[str, str]) -> ec.EllipticCurvePublicKey:
        try:
            return read_request(fields["csr"])
        except PkiError as exc:
            raise _bad(str(exc)) from exc

    def _own(self, leaf: x509.Certificate) -> str:
        """The node of a certificate that our CA, or one we trust, issued and nobody revoked. Raises RefusedError."""
        assert self.authority is not None
        stranger = RefusedError(
            Refusal.NODE_UNKNOWN, "the certificate is not of this hub's CA", "join again, with a token"
        )
        try:
            issuer = next((a for a in self._anchors() if a.subject == leaf.issuer and _issued(leaf, a)), None)
            if issuer is None:
                raise stranger
            domain, node = identity_of(leaf.public_bytes(serialization.Encoding.DER))
        except (*UNREADABLE, InvalidSignature, StpError) as exc:
            raise stranger from exc
        if domain != self.identity().domain:
            raise stranger
        if self.registry.is_revoked(leaf.serial_number):
            raise RefusedError(Refusal.NODE_REVOKED, f"{node} is revoked", "ask the operator of the hub")
        return node

    def _anchors(self) -> list[x509.Certificate]:
        """Our CA, and what else the own identity trusts: while a CA is replaced there are two."""
        assert self.authority is not None
        own = self.authority.der
        others = [der for der in self.identity().credentials.anchors_der if der != own]
        return [self.authority.certificate, *map(x509.load_der_x509_certificate, others)]

    def _issue(
        self, key: ec.EllipticCurvePublicKey, node: str, role: str, host: str
    ) -> tuple[dict[str, Any], x509.Certificate]:
        assert self.authority is not None
        identity = self.identity()
        leaf = self.authority.issue(key, identity.domain, node, answers=role == "gateway")
        answer = {
            "node": node,
            "role": role,
            "chain": certificate_pem(leaf),
            "anchors": "".join(certificate_pem(anchor) for anchor in self._anchors()),
            "network_key": "".join(network_key_pem(secret) for secret in identity.network_keys),
            "upstream": self._upstream(host),
            "time": self.clock(),
        }
        return answer, leaf

    def _note(
        self,
        node: str,
        role: str,
        key: ec.EllipticCurvePublicKey,
        leaf: x509.Certificate,
        *,
        token: str = "",
        tags: list[str] | None = None,
    ) -> None:
        """(1)"""
        self.registry.enrol(
            node,
            role,
            key=key_id(key),
            serial=leaf.serial_number,
            not_after=leaf.not_valid_after_utc.timestamp(),
            token=token,
            tags=tags,
            network=[network_key_id(secret) for secret in self.identity().network_keys],
        )

    def _upstream(self, host: str) -> dict[str, str]:
        """What the joiner shall dial: us."""
        try:
            name, port = (
                parse_host(self.advertise, self.port) if self.advertise else (parse_host(host)[0], self.port)
            )
        except EnrolError as exc:
            raise _bad("the request names no host") from exc
        shown = f"[{name}]" if ":" in name else name
        node = self.identity().node
        return {"node": node, "url": f"stp://{node}@{shown}:{port}"}

    # -- without one -----------------------------------------------------------------------------------------

    def _pass_on(self, path: str, body: bytes, fields: dict[str, str], host: str, address: str) -> Answer:
        if self.forward is None:
            raise RefusedError(Refusal.UNAVAILABLE, "this node does not enrol", "ask the hub directly")
        identity = self.identity()
        upstream = self._upstream(host)
        try:
            status, raw = exchange(
                self.forward.host,
                self.forward.port,
                path,
                body,
                by_anchors(identity.credentials.anchors_der),
                domain=identity.domain,
                timeout=FORWARD_TIMEOUT,
                headers=forward_headers(identity, body),
            )
            found = json.loads(raw)
            if status != 200:
                log.warning(
                    "enrol_refused", address=address, by=self.forward.host, reason=str(found["error"])[:40]
                )
                self.statistics.refused += 1
                return status, {part: str(found.get(part, ""))[:300] for part in ("error", "cause", "advice")}
            leaf = read_chain(str(found["chain"]))[0]
            key = read_request(fields["csr"])
            node, role = str(found["node"]), str(found["role"])
        except EnrolError as exc:
            log.warning("enrol_hub_unreachable", hub=self.forward.host, reason=exc.cause)
            raise RefusedError(
                Refusal.UNAVAILABLE,
                "this gateway cannot reach its hub",
                "try again, or join at the hub directly",
            ) from exc
        except (ValueError, KeyError, TypeError, AttributeError, PkiError) as exc:
            raise RefusedError(
                Refusal.UNAVAILABLE,
                "the hub's answer makes no sense to this gateway",
                "upgrade the older of the two",
            ) from exc
        with self._lock:
            self._note(node, role, key, leaf)
        self.statistics.forwarded += 1
        log.info("enrolled_through", node=node, role=role, address=address)
        return 200, found | {"upstream": upstream}

    # -- the door for untrusted bytes ------------------------------------------------------------------------

    @staticmethod
    def _fields(path: str, body: bytes) -> dict[str, str]:
        """The text fields that the path needs, all present. Raises RefusedError."""
        needed = {
            "/v1/enrol": ("token", "name", "csr", "kind"),
            "/v1/renew": ("chain", "csr", "signature"),
        }.get(path)
        if needed is None:
            raise _bad("there is nothing at this path")
        try:
            found = json.loads(body)
        except (ValueError, RecursionError) as exc:
            raise _bad("the request is not JSON") from exc
        if not isinstance(found, dict) or any(not isinstance(found.get(part), str) for part in needed):
            raise _bad(f"the request must be an object with {', '.join(needed)}")
        return {part: found[part] for part in needed}


def _issued(leaf: x509.Certificate, anchor: x509.Certificate) -> bool:
    try:
        leaf.verify_directly_issued_by(anchor)
    except (*UNREADABLE, InvalidSignature):
        return False
    return True


def _verify(leaf: x509.Certificate, signature: bytes, digest: bytes) -> None:
    key = leaf.public_key()
    try:
        if isinstance(key, ec.EllipticCurvePublicKey):
            key.verify(signature, digest, ec.ECDSA(hashes.SHA256()))
            return
    except InvalidSignature:
        pass
    raise RefusedError(
        Refusal.NODE_UNKNOWN, "the request is not signed by the certificate's key", "join again, with a token"
    )


def forward_digest(body: bytes) -> bytes:
    return FORWARD_CONTEXT + hashlib.sha256(body).digest()


def forward_headers(identity: Identity, body: bytes) -> list[tuple[str, str]]:
    """Headers by which a gateway shows its hub who passes this body on; (4)."""
    key = serialization.load_der_private_key(identity.credentials.key_der, None)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        return []
    signature = key.sign(forward_digest(body), ec.ECDSA(hashes.SHA256()))
    return [
        (FORWARDER_HEADER, base64.b64encode(identity.leaf_der).decode()),
        (SIGNATURE_HEADER, base64.b64encode(signature).decode()),
    ]
