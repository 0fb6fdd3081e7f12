"""§4: TLS 1.3 with a certificate on both sides, through memory BIOs; and the files that enrolment wrote."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, load_pem_private_key
from OpenSSL import SSL, crypto

BLOCK = re.compile(rb"-----BEGIN ([A-Z ]+)-----\n(.*?)-----END \1-----", re.DOTALL)


class Bundle:
    """Key, leaf, anchor, network key and upstream of a node that joined."""

    def __init__(self, path: Path) -> None:
        blocks = [(m[1].decode(), m[0], base64.b64decode(m[2])) for m in BLOCK.finditer(path.read_bytes())]
        self.key = next(load_pem_private_key(pem, None) for label, pem, _ in blocks if label == "PRIVATE KEY")
        certificates = [
            x509.load_der_x509_certificate(der) for label, _, der in blocks if label == "CERTIFICATE"
        ]
        self.leaf, self.anchor = certificates[0], certificates[-1]
        found = {label: raw for label, _, raw in reversed(blocks)}  # of two, the first one sends (R-3-6)
        self.network_key = found.get("STP NETWORK KEY", b"")
        upstream = json.loads(found["STP UPSTREAM"])
        self.upstream_node: str = upstream["node"]
        host, _, port = upstream["url"].removeprefix("stp://").rpartition(":")
        self.upstream: tuple[str, int] = (host, int(port))
        self.domain, self.node = node_of(self.leaf)


def node_of(certificate: x509.Certificate) -> tuple[str, str]:
    """(domain, node) of a leaf's URI SAN (R-4-7)."""
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    for uri in names.get_values_for_type(x509.UniformResourceIdentifier):
        if uri.startswith("stp://"):
            domain, _, node = uri.removeprefix("stp://").partition("/")
            return domain, node
    raise ValueError("the certificate names no node")


def der(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(Encoding.DER)


class Tls:
    """The client's TLS object: bytes in, bytes out, and the exporter. Raises SSL.Error where TLS refuses."""

    def __init__(self, bundle: Bundle, alpn: bytes = b"") -> None:
        context = SSL.Context(SSL.TLS_CLIENT_METHOD)
        context.set_min_proto_version(SSL.TLS1_3_VERSION)
        context.set_options(SSL.OP_NO_TICKET)
        context.set_session_cache_mode(SSL.SESS_CACHE_OFF)
        context.use_privatekey(bundle.key)  # type: ignore[arg-type]
        context.use_certificate(bundle.leaf)
        store = context.get_cert_store()
        assert store is not None
        store.add_cert(crypto.X509.from_cryptography(bundle.anchor))
        context.set_verify(SSL.VERIFY_PEER)
        if alpn:
            context.set_alpn_protos([alpn])
        self._own = der(bundle.leaf)
        self._connection = SSL.Connection(context, None)
        self._connection.set_connect_state()
        self.done = False
        self.advance()

    def feed(self, data: bytes) -> None:
        self._connection.bio_write(data)
        if not self.done:
            self.advance()

    def advance(self) -> None:
        try:
            self._connection.do_handshake()
            self.done = True
        except SSL.WantReadError:
            pass

    def output(self) -> bytes:
        try:
            return self._connection.bio_read(1 << 20)
        except SSL.WantReadError:
            return b""

    def write(self, data: bytes) -> None:
        """Inside TLS, for carriers that stay there; `output` has the records."""
        self._connection.sendall(data)

    def read(self) -> bytes:
        """What came inside TLS."""
        found = b""
        try:
            while data := self._connection.recv(1 << 16):
                found += data
        except SSL.WantReadError:
            pass
        return found

    @property
    def suite(self) -> str:
        return str(self._connection.get_cipher_name())

    @property
    def group(self) -> str:
        return str(self._connection.get_group_name())

    @property
    def peer(self) -> tuple[str, str]:
        certificate = self._connection.get_peer_certificate(as_cryptography=True)
        assert certificate is not None
        return node_of(certificate)

    def leaves(self) -> tuple[bytes, bytes]:
        """DER of the server's leaf and of ours."""
        certificate = self._connection.get_peer_certificate(as_cryptography=True)
        assert certificate is not None
        return der(certificate), self._own

    def export(self, context: bytes) -> bytes:
        return self._connection.export_keying_material(b"EXPORTER-stp/1 master", 32, context)
