"""What the bytes of a stream carrier are wrapped in: TLS 1.3, or nothing on a Unix socket (protocol §11).

(1) Whatever comes, `receive` gives plaintext or raises HandshakeRefused, LimitError or PacketError.
(2) The dialling side asks `check` about the verified peer before its Finished leaves: not one byte of ours tells a
    wrong peer that we took it for the right one. The listener asks when TLS is done.
(3) No plaintext is given out before the peer was checked.
(4) At most 16 KiB are read before TLS is done.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, Protocol

from OpenSSL import SSL

from stp.core.errors import HandshakeRefused, LimitError, PacketError
from stp.core.handshake import MAX_HANDSHAKE, PeerIdentity, explain, verified_peer, verify_problem
from stp.core.keys import (
    EXPORTER_LABEL,
    MASTER_LENGTH,
    SESSION_ID_LENGTH,
    SUITES,
    context,
    expand,
)

RECORD: Final = 16 * 1024
"""Bytes of plaintext in one TLS record, at most (RFC 8446 §5.1)."""
RECORD_OVERHEAD: Final = 5 + 1 + 16
"""Bytes by which TLS 1.3 makes a record longer: header, content type, tag."""

Check = Callable[[PeerIdentity], str | None]
"""A reason to refuse the peer, or None."""


class Channel(Protocol):
    """One end of it."""

    @property
    def ready(self) -> bool:
        """Plaintext can be sent."""

    @property
    def peer(self) -> PeerIdentity | None: ...

    @property
    def suite(self) -> str: ...

    def receive(self, data: bytes, check: Check) -> list[bytes]:
        """Bytes as they came: the plaintext they bring. Raises what (1) names."""

    def take(self) -> bytes:
        """Bytes that the wrapping itself has to send."""

    def seal(self, plain: bytes) -> bytes:
        """At most RECORD bytes, as they go on the wire."""

    def session_id(self, hc: bytes, hs: bytes) -> bytes:
        """Bound to both hellos as sent; 16 bytes, the same on both sides."""


class TlsChannel:
    """TLS with a certificate on both sides, through memory BIOs."""

    __slots__ = ("_dialling", "_leaf_der", "_out", "_peer_leaf", "_received", "_tls", "peer", "ready")

    def __init__(self, tls_context: SSL.Context, leaf_der: bytes, *, dialling: bool) -> None:
        """`leaf_der` is the certificate of `tls_context`."""
        self._tls = SSL.Connection(tls_context, None)
        self._leaf_der = leaf_der
        self._peer_leaf = b""
        self._dialling = dialling
        self._received = 0
        self._out: list[bytes] = []
        self.peer: PeerIdentity | None = None
        self.ready = False
        if dialling:
            self._tls.set_connect_state()
            self._shake(lambda _: None)
        else:
            self._tls.set_accept_state()

    @property
    def suite(self) -> str:
        return self._tls.get_cipher_name() or "" if self.ready else ""

    def receive(self, data: bytes, check: Check) -> list[bytes]:
        if not self.ready:
            early, data = data[: MAX_HANDSHAKE - self._received], data[MAX_HANDSHAKE - self._received :]
            self._received += len(early)
            self._tls.bio_write(early)
            self._shake(check)
            if not self.ready:
                if self._received >= MAX_HANDSHAKE:
                    raise LimitError(f"handshake of more than {MAX_HANDSHAKE} bytes")
                return []
        if data:
            self._tls.bio_write(data)
        return self._read()

    def _shake(self, check: Check) -> None:
        tls = self._tls
        try:
            tls.do_handshake()
        except SSL.WantReadError:
            self._collect()
            return
        except SSL.Error as exc:
            self._collect()  # the alert, which is all that the peer will hear
            by_peer = bool(tls.get_shutdown() & SSL.RECEIVED_SHUTDOWN)
            raise HandshakeRefused(verify_problem(tls) or explain(exc), by_peer=by_peer) from exc
        self.peer, self._peer_leaf = verified_peer(tls)
        if self._dialling:
            reason = check(self.peer)
            if reason is not None:
                raise HandshakeRefused(reason)
        if tls.get_cipher_name() not in SUITES:  # pragma: no cover - our contexts offer no other
            raise HandshakeRefused(f"suite {tls.get_cipher_name()} is not one of ours")
        self._collect()
        self.ready = True

    def _read(self) -> list[bytes]:
        found, tls = [], self._tls
        try:
            while True:
                found.append(tls.recv(RECORD))
        except SSL.WantReadError:
            return found
        except SSL.ZeroReturnError:
            return found  # the end of the TCP stream follows
        except SSL.Error as exc:
            if tls.get_shutdown() & SSL.RECEIVED_SHUTDOWN:
                raise HandshakeRefused(explain(exc), by_peer=True) from exc
            raise PacketError(explain(exc)) from exc

    def take(self) -> bytes:
        if not self._out:
            return b""
        out, self._out = b"".join(self._out), []
        return out

    def seal(self, plain: bytes) -> bytes:
        self._tls.send(plain)
        return self._tls.bio_read(RECORD + 4096)

    def session_id(self, hc: bytes, hs: bytes) -> bytes:
        mine, theirs = self._leaf_der, self._peer_leaf
        server_der, client_der = (theirs, mine) if self._dialling else (mine, theirs)
        bound = context(hc, hs, server_der, client_der)
        master = self._tls.export_keying_material(EXPORTER_LABEL, MASTER_LENGTH, bound)
        return expand(master, "sid", SESSION_ID_LENGTH)

    def _collect(self) -> None:
        try:
            while True:
                self._out.append(self._tls.bio_read(4 * RECORD))
        except SSL.WantReadError:
            return


class PlainChannel:
    """A Unix socket: the kernel says who the other is, and nobody is between (protocol §11)."""

    __slots__ = ("peer",)

    ready = True
    suite = ""

    def __init__(self, peer: PeerIdentity | None) -> None:
        """`peer`: whom the kernel's credentials name; None on the dialling side, which learns it from the hello."""
        self.peer = peer

    def receive(self, data: bytes, check: Check) -> list[bytes]:
        return [data]

    def take(self) -> bytes:
        return b""

    def seal(self, plain: bytes) -> bytes:
        return plain

    def session_id(self, hc: bytes, hs: bytes) -> bytes:
        return expand(context(hc, hs, b"", b""), "sid", SESSION_ID_LENGTH)
