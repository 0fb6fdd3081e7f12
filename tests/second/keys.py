"""§2 and §3: every key of a session and what is made with it."""

from __future__ import annotations

import hashlib
import hmac

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

VERSION = 0x53545001
SUITES: dict[str, tuple[int, type[AESGCM] | type[ChaCha20Poly1305]]] = {
    "TLS_AES_128_GCM_SHA256": (16, AESGCM),
    "TLS_AES_256_GCM_SHA384": (32, AESGCM),
    "TLS_CHACHA20_POLY1305_SHA256": (32, ChaCha20Poly1305),
}
"""R-3-3: a suite's key length and AEAD."""


def extract(salt: bytes, ikm: bytes) -> bytes:
    return hmac.digest(salt, ikm, "sha256")


def expand(secret: bytes, label: str, size: int) -> bytes:
    name = b"stp1 " + label.encode()
    info = size.to_bytes(2, "big") + bytes([len(name)]) + name + b"\0"
    return HKDFExpand(hashes.SHA256(), size, info).derive(secret)


class Aead:
    """Key, nonce base and cipher of one secret."""

    def __init__(self, secret: bytes, suite: str = "TLS_AES_128_GCM_SHA256") -> None:
        size, cipher = SUITES[suite]
        self.key, self.iv = expand(secret, "key", size), expand(secret, "iv", 12)
        self._cipher = cipher(self.key)

    def _nonce(self, number: int) -> bytes:
        return (int.from_bytes(self.iv, "big") ^ number).to_bytes(12, "big")

    def seal(self, number: int, header: bytes, frames: bytes) -> bytes:
        return self._cipher.encrypt(self._nonce(number), frames, header)

    def open(self, number: int, header: bytes, sealed: bytes) -> bytes | None:
        """The frames, or None where it does not open."""
        try:
            return self._cipher.decrypt(self._nonce(number), sealed, header)
        except InvalidTag:
            return None


class InitialKeys:
    """R-3-1: both directions of INIT and the Retry key, from the DCID of a first INIT."""

    def __init__(self, dcid: bytes, network_key: bytes = b"") -> None:
        salt = extract(hashlib.sha256(b"STP/1 initial salt").digest(), network_key)
        initial = extract(salt, VERSION.to_bytes(4, "big") + dcid)
        self.client_secret, self.server_secret = (
            expand(initial, "client in", 32),
            expand(initial, "server in", 32),
        )
        self.client, self.server = Aead(self.client_secret), Aead(self.server_secret)
        self.retry_key = expand(initial, "retry", 16)

    def retry_tag(self, original_dcid: bytes, packet: bytes) -> bytes:
        """R-4-16: *packet* without its tag."""
        return hmac.digest(self.retry_key, original_dcid + packet, "sha256")[:16]


def context_hash(client_hello: bytes, server_hello: bytes, server_leaf: bytes, client_leaf: bytes) -> bytes:
    """What the exporter is asked with (R-3-5); the leaves are DER."""
    parts = [b"stp/1 context", VERSION.to_bytes(4, "big")]
    for hello in (client_hello, server_hello):
        parts += [len(hello).to_bytes(2, "big"), hello]
    parts += [hashlib.sha256(leaf).digest() for leaf in (server_leaf, client_leaf)]
    return hashlib.sha256(b"".join(parts)).digest()


class Direction:
    """The DATA keys of one direction: whitening, and an AEAD per phase."""

    def __init__(self, first_secret: bytes, suite: str) -> None:
        self.suite = suite
        self.secret = first_secret
        self.phase = 0
        self._whitening = expand(first_secret, "pn", 32)
        self.current = Aead(first_secret, suite)
        self.next = Aead(expand(first_secret, "ku", 32), suite)
        self.previous: Aead | None = None

    def whitening(self, cid: bytes) -> int:
        """R-2-3: w of a CID; key updates leave it alone."""
        return int.from_bytes(hmac.digest(self._whitening, cid, "sha256")[:8], "big") & (2**62 - 1)

    def update(self) -> None:
        self.secret = expand(self.secret, "ku", 32)
        self.previous, self.current = self.current, self.next
        self.next = Aead(expand(self.secret, "ku", 32), self.suite)
        self.phase ^= 1


class ApplicationKeys:
    """What both sides hold once TLS is done."""

    def __init__(self, master: bytes, suite: str) -> None:
        self.client = Direction(expand(master, "c ap", 32), suite)
        self.server = Direction(expand(master, "s ap", 32), suite)
        self.session_id = expand(master, "sid", 16)
