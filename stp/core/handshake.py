"""TLS contexts, peer identities, and the handshake as two streams of ordered bytes (protocol §4).

(1) TLS sees only bytes in order that the carrier has authenticated; both hellos are checked before any of it.
(2) The dialling side compares the node name, the listening side asks `authorise`, both before keys exist.
(3) What TLS produces after its handshake is never sent, except the alert of a refusal.
(4) At most 16 KiB are read; a hello is at most 1,024 bytes.
(5) No Python callback is given to OpenSSL: those need writable-executable memory.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import datetime
from sys import intern
from typing import Final, Protocol, TypeAlias

from attrs import define
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import Encoding, load_der_private_key
from OpenSSL import SSL, _util, crypto

from stp.core.errors import HandshakeRefused, LimitError, ProtocolError
from stp.core.keys import EXPORTER_LABEL, MASTER_LENGTH, SessionKeys, context
from stp.core.packet import VERSION
from stp.core.params import MAX_HELLO, TransportHello

MAX_HANDSHAKE: Final = 16 * 1024
"""Bytes of one side's handshake stream, hello included (R-4-1)."""
ALPN: Final = b"stp/1"
"""Offered by who dials, and relied on by nobody (protocol §11)."""
MAX_CHAIN_DEPTH: Final = 10
"""Certificates between a leaf and its anchor."""

_AES_FIRST: Final = b"TLS_AES_128_GCM_SHA256:TLS_CHACHA20_POLY1305_SHA256:TLS_AES_256_GCM_SHA384"
_CHACHA_FIRST: Final = b"TLS_CHACHA20_POLY1305_SHA256:TLS_AES_128_GCM_SHA256:TLS_AES_256_GCM_SHA384"
_BIO_READ: Final = 64 * 1024
_IDENTITY: Final = re.compile(r"stp://([^/?#@%+\s\x00-\x1f]{1,253})/([^/?#@%+\s\x00-\x1f]{1,128})")


@define
class TlsCredentials:
    """Who we are and whom we trust, in DER. `chain_der` has the leaf first; `key_der` is PKCS8."""

    chain_der: tuple[bytes, ...]
    key_der: bytes
    anchors_der: tuple[bytes, ...]


@define
class TlsSettings:
    """What a context is made from.

    `verify_time`: the moment certificates are judged at (aware); None: the system clock's.
    `aes_preferred`: False where the CPU has no AES instructions: ChaCha20 is offered first.
    """

    credentials: TlsCredentials
    verify_time: datetime | None = None
    aes_preferred: bool = True


@define
class PeerIdentity:
    """Whom the verified leaf certificate names, and what may end a session early. Kept while the session lasts."""

    domain: str
    node: str
    serial: int
    not_after: datetime


Authorise: TypeAlias = Callable[[PeerIdentity], str | None]
"""None: welcome. Else the reason for the refusal, ≤ 64 bytes of which reach the peer, with the code AUTH; for another
code, raise HandshakeRefused."""


@define
class HandshakeResult:
    """What a finished handshake leaves behind; TLS itself can go."""

    peer: PeerIdentity
    suite: str
    master: bytes
    keys: SessionKeys
    hello: TransportHello


UNREADABLE: Final = (
    ValueError,
    TypeError,
    UnsupportedAlgorithm,
    x509.InvalidVersion,
    x509.DuplicateExtension,
    x509.UnsupportedGeneralNameType,
)
"""What `cryptography` raises for a certificate or a key that it cannot make sense of."""


def fully_parsed(certificate: x509.Certificate) -> x509.Certificate:
    """The same certificate, known to be readable to the end. Raises one of UNREADABLE.

    `cryptography` parses names, key and extensions when they are first asked for, and raises only then.
    """
    _ = (certificate.public_key(), certificate.issuer, certificate.subject, certificate.extensions)
    _ = (certificate.not_valid_before_utc, certificate.not_valid_after_utc)
    return certificate


def identity_of(leaf_der: bytes) -> tuple[str, str]:
    """(domain, node) from the URI SAN `stp://<domain>/<node>`. HandshakeRefused unless there is just one (R-4-7)."""
    try:
        leaf = fully_parsed(x509.load_der_x509_certificate(leaf_der))
    except UNREADABLE:
        raise HandshakeRefused("certificate cannot be read") from None
    return _identity(leaf)


def read_uri(uri: str) -> tuple[str, str] | None:
    """(domain, node) of `stp://<domain>/<node>`; None where it is no such name."""
    found = _IDENTITY.fullmatch(uri)
    return (found.group(1), found.group(2)) if found else None


def _identity(leaf: x509.Certificate) -> tuple[str, str]:
    try:
        names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        raise HandshakeRefused("certificate names no node: no subject alternative name") from None
    except ValueError:
        raise HandshakeRefused("certificate cannot be read") from None
    uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    found = [name for name in map(read_uri, uris) if name]
    if len(found) != 1:
        raise HandshakeRefused(f"certificate names {len(found)} nodes as stp://<domain>/<node>, not one")
    return found[0]


def make_context(settings: TlsSettings, server: bool) -> SSL.Context:
    """A context by the rules of protocol §4 (R-4-11, R-4-12).

    Raises HandshakeRefused with a reason for people if the credentials cannot be used.
    """
    made = SSL.Context(SSL.TLS_SERVER_METHOD if server else SSL.TLS_CLIENT_METHOD)
    made.set_min_proto_version(SSL.TLS1_3_VERSION)
    made.set_max_proto_version(SSL.TLS1_3_VERSION)
    made.set_tls13_ciphersuites(_AES_FIRST if settings.aes_preferred else _CHACHA_FIRST)
    made.set_options(SSL.OP_NO_TICKET)
    if not server:
        made.set_alpn_protos([ALPN])
    made.set_session_cache_mode(SSL.SESS_CACHE_OFF)
    made.set_mode(SSL.MODE_RELEASE_BUFFERS)  # strangers may have a few hundred handshakes half open
    made.set_verify(SSL.VERIFY_PEER | SSL.VERIFY_FAIL_IF_NO_PEER_CERT)
    made.set_verify_depth(MAX_CHAIN_DEPTH)
    credentials = settings.credentials
    try:
        chain = [x509.load_der_x509_certificate(der) for der in credentials.chain_der]
        made.use_certificate(chain[0])
        made.use_privatekey(load_der_private_key(credentials.key_der, None))  # type: ignore[arg-type]
        for link in chain[1:]:
            made.add_extra_chain_cert(link)
        made.check_privatekey()
        store = made.get_cert_store()
        assert store is not None
        for der in credentials.anchors_der:
            store.add_cert(crypto.X509.from_cryptography(x509.load_der_x509_certificate(der)))
    except (SSL.Error, crypto.Error, ValueError, TypeError, IndexError) as exc:
        raise HandshakeRefused(f"own credentials cannot be used: {exc}") from exc
    if settings.verify_time is not None:
        store.set_time(settings.verify_time)
    return made


class Judge(Protocol):
    """Who decides for one side; asked before keys are derived, hello first."""

    def check_hello(self, hello: TransportHello) -> None:
        """Raises ProtocolError if the peer's hello does not fit what it came in (echoes)."""

    def check_peer(self, peer: PeerIdentity) -> str | None:
        """A reason to refuse the verified peer, or None. May raise HandshakeRefused, with a code of its own."""


class Handshake:
    """One side of the handshake: ordered bytes in, ordered bytes out. Carriers differ, this does not.

    The judge is handed in with the bytes, not kept: TLS objects are large, and no cycle shall delay their end.
    """

    def __init__(
        self,
        tls_context: SSL.Context,
        leaf_der: bytes,
        *,
        dialling: bool,
        hello: TransportHello,
    ) -> None:
        self._tls = SSL.Connection(tls_context, None)
        self._dialling = dialling
        self._leaf_der = leaf_der
        self._hello = hello.encode()
        self._buffer = b""
        self._received = 0
        self._peer_hello_raw: bytes | None = None
        self._out: list[bytes] = []
        self._shaken = False
        self._tickets = b""
        self.peer_hello: TransportHello | None = None
        self.peer: PeerIdentity | None = None
        self.result: HandshakeResult | None = None
        if dialling:
            self._tls.set_connect_state()
            self._start()
        else:
            self._tls.set_accept_state()

    def hello_block(self) -> bytes:
        """The first bytes of our stream: the hello behind its length."""
        return len(self._hello).to_bytes(2, "big") + self._hello

    def replace_hello(self, hello: TransportHello) -> None:
        """After a Retry: the hello that counts is the new one (protocol §4)."""
        self._hello = hello.encode()

    def take_tls(self) -> bytes:
        """TLS bytes to be sent after what was taken before; the hello block goes in front of the first."""
        out, self._out = b"".join(self._out), []
        return out

    def receive(self, data: bytes, judge: Judge) -> None:
        """The next bytes of the peer's stream.

        Raises ProtocolError for a hello that is wrong, LimitError beyond 16 KiB, HandshakeRefused when one
        side refuses the other: then `take_tls` may hold an alert for the peer.
        """
        self._received += len(data)
        if self._received > MAX_HANDSHAKE:
            raise LimitError(f"handshake of more than {MAX_HANDSHAKE} bytes")
        if self.peer_hello is None:
            self._buffer += data
            data = self._read_hello(judge)
        if data and (self._dialling or not self._shaken):  # a listener has heard all it needs
            self._tls.bio_write(data)
            self._drive(judge)

    def _read_hello(self, judge: Judge) -> bytes:
        """Reads the hello once it is complete; gives the TLS bytes behind it."""
        found = take_hello(self._buffer)
        if found is None:
            return b""
        hello, raw, rest = found
        judge.check_hello(hello)
        self.peer_hello, self._peer_hello_raw, self._buffer = hello, raw, b""
        return rest

    def _start(self) -> None:
        try:
            self._tls.do_handshake()
        except SSL.WantReadError:
            self._collect()

    def _drive(self, judge: Judge) -> None:
        if self._shaken:
            self._read_verdict()
            return
        try:
            self._tls.do_handshake()
        except SSL.WantReadError:
            self._collect()
            return
        except SSL.Error as exc:
            self._collect()
            raise HandshakeRefused(verify_problem(self._tls) or explain(exc)) from exc
        self._shaken = True
        if self._dialling:
            # Our Finished would make us a peer in the listener's eyes: judge it before it leaves.
            flight = self._bio()
            self._finish(judge)
            self._out.append(flight)
            self._read_verdict()
        else:
            self._tickets = self._bio()  # never sent, but before an alert
            try:
                self._finish(judge)
            finally:
                del self._tls  # some 70 KiB that a listener's half-open sessions need not hold

    def _read_verdict(self) -> None:
        """After the handshake TLS can only tell us of an alert: the listener's refusal.

        A record that TLS does not accept is a forger's: the keys stand, and DATA will show who was right.
        """
        try:
            self._tls.recv(1)
        except SSL.WantReadError:
            return
        except SSL.ZeroReturnError:
            raise HandshakeRefused("refused by the peer", by_peer=True) from None
        except SSL.Error as exc:
            if self._tls.get_shutdown() & SSL.RECEIVED_SHUTDOWN:
                raise HandshakeRefused(explain(exc), by_peer=True) from exc
            return
        raise ProtocolError("application data inside the handshake")

    def _finish(self, judge: Judge) -> None:
        """TLS is content; we judge and derive (protocol §3, §4, R-4-5)."""
        try:
            self.peer, leaf_der = verified_peer(self._tls)
        except HandshakeRefused:
            self._say_goodbye()
            raise
        try:
            reason = judge.check_peer(self.peer)
        except HandshakeRefused:
            self._say_goodbye()
            raise
        if reason is not None:
            self._say_goodbye()
            raise HandshakeRefused(reason)
        self._derive(leaf_der, self.peer)

    def _say_goodbye(self) -> None:
        """A close_notify under TLS keys: the refusal that a dialling peer can trust. A dialler sends none."""
        if self._dialling:
            return
        self._out.append(self._tickets)  # TLS numbers its records: without these the alert would not open
        try:
            self._tls.shutdown()
        except SSL.Error:  # pragma: no cover - the alert is a courtesy
            return
        self._collect()

    def _derive(self, peer_leaf: bytes, peer: PeerIdentity) -> None:
        suite = self._tls.get_cipher_name() or ""
        assert self._peer_hello_raw is not None
        assert self.peer_hello is not None
        mine, theirs = (self._hello, self._leaf_der), (self._peer_hello_raw, peer_leaf)
        (hc, client_der), (hs, server_der) = (mine, theirs) if self._dialling else (theirs, mine)
        bound = context(hc, hs, server_der, client_der)
        master = self._tls.export_keying_material(EXPORTER_LABEL, MASTER_LENGTH, bound)
        self.result = HandshakeResult(
            peer=peer,
            suite=suite,
            master=master,
            keys=SessionKeys.derive(master, suite),
            hello=self.peer_hello,
        )

    def _bio(self) -> bytes:
        try:
            return self._tls.bio_read(_BIO_READ)
        except SSL.WantReadError:
            return b""

    def _collect(self) -> None:
        data = self._bio()
        if data:
            self._out.append(data)


def take_hello(data: bytes) -> tuple[TransportHello, bytes, bytes] | None:
    """The hello that `data` begins with, as read and as sent, and what follows it; None: more must come.

    Raises LimitError, FrameEncodingError, ProtocolError for a version that is not ours.
    """
    if len(data) < 2:
        return None
    end = 2 + int.from_bytes(data[:2], "big")
    if end > 2 + MAX_HELLO:
        raise LimitError(f"hello of {end - 2} bytes, at most {MAX_HELLO}")
    if len(data) < end:
        return None
    hello = TransportHello.decode(data[2:end])
    if hello.versions[0] != VERSION:
        raise ProtocolError(f"peer chose version {hello.versions[0]:#010x}")
    return hello, data[2:end], data[end:]


def verified_peer(tls: SSL.Connection) -> tuple[PeerIdentity, bytes]:
    """Whom the leaf names that TLS has verified, and that leaf in DER.

    Raises HandshakeRefused where it names nobody we can tell.
    """
    leaf = tls.get_peer_certificate(as_cryptography=True)
    if leaf is None:
        raise HandshakeRefused("peer shows no certificate")
    try:
        domain, node = _identity(fully_parsed(leaf))
    except UNREADABLE:
        raise HandshakeRefused("certificate cannot be read") from None
    peer = PeerIdentity(
        domain=intern(domain),
        node=node,
        serial=leaf.serial_number,
        not_after=leaf.not_valid_after_utc,
    )
    return peer, leaf.public_bytes(Encoding.DER)


def verify_problem(tls: SSL.Connection) -> str:
    """Why OpenSSL does not accept the peer's chain; "" where it did or cannot say."""
    try:
        lib, ffi = _util.lib, _util.ffi
        verdict = lib.SSL_get_verify_result(tls._ssl)
        if verdict == lib.X509_V_OK:
            return ""
        words = ffi.string(lib.X509_verify_cert_error_string(verdict)).decode()
        return f"untrusted certificate: {words}"
    except AttributeError:  # pragma: no cover - pyOpenSSL promises none of these names
        return ""


def explain(exc: SSL.Error) -> str:
    """OpenSSL's words for people; who reads them must not branch on them."""
    reasons = [str(entry[-1]) for entry in (exc.args[0] if exc.args and exc.args[0] else ())]
    text = reasons[0] if reasons else "TLS failed"
    if "alert" in text:
        return f"refused by the peer: {text.split('alert', 1)[1].strip() or text}"
    return text
