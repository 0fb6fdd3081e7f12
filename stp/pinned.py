"""TLS towards a server of which only the anchor is known: the road on which enrolment travels (protocol §11).

Plain blocking code, for command lines and for worker threads.

(1) Nothing is sent before the server's chain has been found to end in the anchor asked for.
(2) Validity dates are ignored: the clock here may say 1970. Signatures, purposes (EKU) and names count (R-11-7).
(3) Whatever goes wrong is an EnrolError, and one deadline holds for all of an exchange but the name service.
"""

from __future__ import annotations

import hashlib
import hmac
import socket
import time
from collections.abc import Callable, Sequence
from typing import Any, Final

import h11
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.x509.oid import ExtendedKeyUsageOID
from OpenSSL import SSL

from stp.core.errors import StpError
from stp.core.handshake import UNREADABLE, fully_parsed, identity_of

ALPN: Final = b"stp-enrol/1"
PIN_SIZE: Final = 20
"""Bytes of the SHA-256 of the CA's certificate that a token carries: 160 bits against a second preimage."""

CONNECT_TIMEOUT: Final = 10.0
EXCHANGE_TIMEOUT: Final = 30.0
"""Seconds for the whole of it; a gateway in between asks its hub meanwhile."""
MAX_BODY: Final = 64 * 1024
"""Bytes of a request or answer (protocol §11)."""
MAX_CHAIN: Final = 4
"""Certificates between a leaf and its anchor, with both."""

EX_USAGE: Final = 64
EX_UNAVAILABLE: Final = 69
EX_CANTCREAT: Final = 73
EX_TEMPFAIL: Final = 75
EX_PROTOCOL: Final = 76
EX_NOPERM: Final = 77


class EnrolError(StpError):
    """It failed. `cause` and `advice` are one line each, `exit_code` one of sysexits.h."""

    def __init__(self, cause: str, advice: str, exit_code: int, refusal: str = "") -> None:
        super().__init__(f"{cause}\n  {advice}")
        self.cause = cause
        self.advice = advice
        self.exit_code = exit_code
        self.refusal = refusal


def pin_of(ca_der: bytes) -> bytes:
    return hashlib.sha256(ca_der).digest()[:PIN_SIZE]


def check_server(chain: Sequence[x509.Certificate], is_anchor: Callable[[bytes], bool]) -> tuple[str, str]:
    """(domain, node) of a server whose chain ends in an anchor and who may answer as a server; (1), (2).

    Raises EnrolError. A device's certificate is good for clients only: no device can play the hub.
    """
    stranger = "this server is not of the fleet that the token is for"
    advice = "check the host; if it is right, somebody stands in between"
    try:
        chain = [fully_parsed(certificate) for certificate in chain]
    except UNREADABLE as exc:
        raise EnrolError(f"{stranger}: its certificate cannot be read", advice, EX_PROTOCOL) from exc
    if not chain or not _anchored(chain, is_anchor):
        raise EnrolError(stranger, advice, EX_PROTOCOL)
    leaf = chain[0]
    try:
        purposes = leaf.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
        domain, node = identity_of(_der(leaf))
    except (x509.ExtensionNotFound, ValueError, StpError) as exc:
        raise EnrolError(f"{stranger}: its certificate names no node", advice, EX_PROTOCOL) from exc
    if ExtendedKeyUsageOID.SERVER_AUTH not in purposes:
        raise EnrolError(f"{node} is a device and answers as if it were a hub", advice, EX_PROTOCOL)
    return domain, node


def _anchored(chain: Sequence[x509.Certificate], is_anchor: Callable[[bytes], bool]) -> bool:
    current = chain[0]
    for _ in range(MAX_CHAIN):
        issuer = next((c for c in chain[1:] if _is_authority(c) and _issued(current, c)), None)
        if issuer is None:
            return False
        if is_anchor(_der(issuer)):
            return True
        current = issuer
    return False


def _issued(certificate: x509.Certificate, issuer: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(issuer)
    except (*UNREADABLE, InvalidSignature):
        return False
    return True


def _is_authority(certificate: x509.Certificate) -> bool:
    try:
        return certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except (x509.ExtensionNotFound, ValueError):
        return False


def _der(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.DER)


def by_pin(pin: bytes) -> Callable[[bytes], bool]:
    return lambda der: hmac.compare_digest(pin_of(der), pin)


def by_anchors(anchors_der: Sequence[bytes]) -> Callable[[bytes], bool]:
    return lambda der: der in anchors_der


# -- the exchange ------------------------------------------------------------------------------------------


class _Wire:
    """TLS 1.3 over one TCP connection with one deadline. Raises EnrolError."""

    def __init__(self, host: str, port: int, deadline: float) -> None:
        self.where = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        self._deadline = deadline
        context = SSL.Context(SSL.TLS_CLIENT_METHOD)
        context.set_min_proto_version(SSL.TLS1_3_VERSION)
        context.set_verify(SSL.VERIFY_NONE, None)  # check_server() looks, before a byte of ours is sent
        context.set_alpn_protos([ALPN])
        self._tls = SSL.Connection(context, None)
        self._tls.set_connect_state()
        self._socket = self._connect(host, port)

    def _connect(self, host: str, port: int) -> socket.socket:
        try:
            return socket.create_connection((host, port), timeout=min(CONNECT_TIMEOUT, self._left()))
        except socket.gaierror as exc:
            raise EnrolError(
                f"no address is known for {host}", "check the spelling and the name server", EX_UNAVAILABLE
            ) from exc
        except ConnectionRefusedError as exc:
            raise EnrolError(
                f"nothing listens at {self.where}",
                "check that stpd runs there with [enrol] listen set to this port",
                EX_UNAVAILABLE,
            ) from exc
        except OSError as exc:
            raise EnrolError(
                f"{self.where} cannot be reached: {exc.strerror or exc}",
                "check the network, and that TCP to this port is open",
                EX_UNAVAILABLE,
            ) from exc

    def _left(self) -> float:
        return max(0.001, self._deadline - time.monotonic())

    def handshake(self) -> list[x509.Certificate]:
        """Do it, and return the server's chain as it sent it, the leaf first."""
        self._drive(self._tls.do_handshake)
        try:
            return list(self._tls.get_peer_cert_chain(as_cryptography=True) or [])
        except UNREADABLE as exc:  # OpenSSL is less strict, and nobody has verified this chain
            raise EnrolError(
                "this server's certificate cannot be read", "check the host and the port", EX_PROTOCOL
            ) from exc

    def send(self, data: bytes) -> None:
        if data:
            self._drive(lambda: self._tls.sendall(data))

    def receive(self) -> bytes:
        """Some bytes, b"" at the end."""
        try:
            got = self._drive(lambda: self._tls.recv(16384))
        except SSL.ZeroReturnError:
            return b""
        return bytes(got)

    def _drive(self, step: Callable[[], Any]) -> Any:
        """Repeat one OpenSSL call, moving bytes for it, until it is through."""
        try:
            while True:
                try:
                    done = step()
                except SSL.WantReadError:
                    self._flush()
                    self._feed()
                else:
                    self._flush()
                    return done
        except SSL.ZeroReturnError:
            raise
        except (SSL.Error, SSL.SysCallError) as exc:
            raise EnrolError(
                f"{self.where} does not speak TLS 1.3 as an enrolment service does",
                "check the port; enrolment is on 8443 unless told otherwise",
                EX_PROTOCOL,
            ) from exc
        except OSError as exc:
            raise EnrolError(
                f"{self.where} went away: {exc.strerror or exc}", "try again in a moment", EX_TEMPFAIL
            ) from exc

    def _flush(self) -> None:
        while True:
            try:
                data = self._tls.bio_read(65536)
            except SSL.WantReadError:
                return
            self._socket.settimeout(self._left())
            self._socket.sendall(data)

    def _feed(self) -> None:
        if time.monotonic() >= self._deadline:
            raise TimeoutError(None, "no answer in time")
        self._socket.settimeout(self._left())
        data = self._socket.recv(65536)
        if data:
            self._tls.bio_write(data)
        else:
            raise ConnectionResetError(None, "it hung up")

    def close(self) -> None:
        self._socket.close()


def exchange(
    host: str,
    port: int,
    path: str,
    body: bytes,
    is_anchor: Callable[[bytes], bool],
    *,
    domain: str | None = None,
    timeout: float = EXCHANGE_TIMEOUT,
    headers: Sequence[tuple[str, str]] = (),
) -> tuple[int, bytes]:
    """POST `body` to an enrolment service and return (status, answer). Blocking, `timeout` seconds in all.

    The body is sent only after the server has proved to be anchored, and of `domain` if that is given; (1).
    Raises EnrolError.
    """
    wire = _Wire(host, port, time.monotonic() + timeout)
    try:
        found, _ = check_server(wire.handshake(), is_anchor)
        if domain is not None and found != domain:
            raise EnrolError(
                f"{wire.where} belongs to {found}, not to {domain}", "check the host", EX_PROTOCOL
            )
        return _post(wire, path, body, headers)
    finally:
        wire.close()


def _post(wire: _Wire, path: str, body: bytes, extra: Sequence[tuple[str, str]]) -> tuple[int, bytes]:
    http = h11.Connection(h11.CLIENT)
    headers = [
        ("host", wire.where),
        ("content-type", "application/json"),
        ("content-length", str(len(body))),
        ("connection", "close"),
        *extra,
    ]
    request = h11.Request(method="POST", target=path, headers=headers)
    wire.send((http.send(request) or b"") + (http.send(h11.Data(data=body)) or b""))
    wire.send(http.send(h11.EndOfMessage()) or b"")
    status, answer, ended = 0, bytearray(), False
    try:
        while True:
            event = http.next_event()
            if event is h11.NEED_DATA:
                chunk = wire.receive()
                ended = not chunk
                http.receive_data(chunk)
            elif isinstance(event, h11.Response):
                status = event.status_code
            elif isinstance(event, h11.Data):
                answer += event.data
                if len(answer) > MAX_BODY:
                    raise EnrolError(f"{wire.where} answers without end", "check the host", EX_PROTOCOL)
            elif isinstance(event, h11.EndOfMessage):
                return status, bytes(answer)
            elif isinstance(event, h11.ConnectionClosed):
                raise EnrolError(f"{wire.where} hung up", "try again in a moment", EX_TEMPFAIL)
    except h11.RemoteProtocolError as exc:
        if ended:
            raise EnrolError(f"{wire.where} hung up", "try again in a moment", EX_TEMPFAIL) from exc
        raise EnrolError(
            f"{wire.where} does not answer in HTTP", "check the host and port", EX_PROTOCOL
        ) from exc
