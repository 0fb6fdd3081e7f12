"""The key schedule (protocol §3).

(1) Every secret comes through `expand` with its own label; nothing is used for two purposes.
(2) `Aead` exposes its parts so that a hot loop can inline the nonce: one call per packet, no more.
(3) At most WARM ciphers of the process are kept ready; the other keys are 16 or 32 bytes until their next packet.
"""

from __future__ import annotations

import hmac
from collections import deque
from collections.abc import Callable
from functools import cache, lru_cache
from hashlib import sha256
from typing import Final, TypeAlias
from weakref import ref

from attrs import define
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305

from stp.core import packet
from stp.core.errors import HandshakeRefused, PacketError

EXPORTER_LABEL: Final = b"EXPORTER-stp/1 master"
MASTER_LENGTH: Final = 32
SESSION_ID_LENGTH: Final = 16
SECRET_LENGTH: Final = 32
"""Of a direction in one phase, x_n."""
NETWORK_KEY_LENGTH: Final = 32
AES_GCM_SEAL_LIMIT: Final = 1 << 23
"""Packets sealed with one AES-GCM key (protocol §9)."""
AES_GCM_FAIL_LIMIT: Final = 1 << 52
CHACHA_FAIL_LIMIT: Final = 1 << 36
"""Failed opens per session before AEAD_LIMIT."""

SUITES: Final[dict[str, int]] = {
    "TLS_AES_128_GCM_SHA256": 16,
    "TLS_AES_256_GCM_SHA384": 32,
    "TLS_CHACHA20_POLY1305_SHA256": 32,
}
"""TLS suite -> key length in bytes. Any other suite closes (R-3-3)."""
CHACHA: Final = "TLS_CHACHA20_POLY1305_SHA256"

WARM: Final = 512
"""Ciphers that are kept ready, of all keys of the process; the next one displaces the one that was made first."""

_SALT: Final = sha256(b"STP/1 initial salt").digest()


@cache
def _info(label: str, n: int) -> bytes:
    """There are a dozen."""
    name = b"stp1 " + label.encode("ascii")
    return n.to_bytes(2, "big") + bytes((len(name),)) + name + b"\x00"


def expand(secret: bytes, label: str, n: int) -> bytes:
    """HKDF-Expand-SHA256 (RFC 5869 §2.3) with the label form of protocol §3."""
    info = _info(label, n)
    if n <= 32:
        return hmac.digest(secret, info + b"\x01", "sha256")[:n]
    out = block = b""
    counter = 1
    while len(out) < n:
        block = hmac.digest(secret, block + info + bytes((counter,)), "sha256")
        out += block
        counter += 1
    return out[:n]


def _extract(salt: bytes, ikm: bytes) -> bytes:
    return hmac.digest(salt, ikm, "sha256")


_Cipher: TypeAlias = Callable[[bytes, bytes, bytes], bytes]


class Aead:
    """One key and iv. `encrypt` and `decrypt` are the raw cipher calls: (nonce, data, aad).

    They are there while the cipher is ready; asking for one makes it ready. OpenSSL's object takes 2.5 KiB and less
    than a microsecond to make: of ten thousand sessions that are mostly silent only the last to speak need theirs.
    """

    __slots__ = ("__weakref__", "_chacha", "_key", "decrypt", "encrypt", "iv_int")

    encrypt: _Cipher
    decrypt: _Cipher

    def __init__(self, key: bytes, iv: bytes, *, chacha: bool = False) -> None:
        self._key = key
        self._chacha = chacha
        self.iv_int = int.from_bytes(iv, "big")

    def __getattr__(self, name: str) -> _Cipher:
        """Called only where a slot is empty: `encrypt` and `decrypt` of a cipher that is not ready (3)."""
        if name not in ("encrypt", "decrypt"):
            raise AttributeError(name)
        cipher = ChaCha20Poly1305(self._key) if self._chacha else AESGCM(self._key)
        self.encrypt, self.decrypt = found = cipher.encrypt, cipher.decrypt
        _warm.append(ref(self))
        if len(_warm) > WARM:
            oldest = _warm.popleft()()
            if oldest is not None:
                del oldest.encrypt, oldest.decrypt
        return found[name == "decrypt"]

    def cipher(self) -> object:
        """The cipher itself, made ready: newer versions of `cryptography` have `encrypt_into` and `decrypt_into`."""
        found: object = self.encrypt.__self__  # type: ignore[attr-defined]
        return found

    def opening(self) -> tuple[_Cipher, int]:
        """`decrypt` and `iv_int`, for a loop."""
        return self.decrypt, self.iv_int

    def seal(self, pn: int, plaintext: bytes, aad: bytes) -> bytes:
        """Ciphertext and tag (R-2-2)."""
        return self.encrypt((self.iv_int ^ pn).to_bytes(12, "big"), plaintext, aad)

    def open(self, pn: int, sealed: bytes, aad: bytes) -> bytes:
        """Raises PacketError if it does not open."""
        try:
            return self.decrypt((self.iv_int ^ pn).to_bytes(12, "big"), sealed, aad)
        except InvalidTag:
            raise PacketError("does not open") from None


_warm: Final[deque[ref[Aead]]] = deque()


class InitialKeys:
    """Keys of INIT packets: integrity against chance and blind injection, not secrecy (R-3-1).

    Those of the server are made when they are first asked for: most strangers' packets open under none.
    """

    __slots__ = ("_initial", "_server", "client")

    def __init__(self, initial: bytes) -> None:
        self._initial = initial
        self.client = self._side("client in")
        self._server: Aead | None = None

    def _side(self, label: str) -> Aead:
        secret = expand(self._initial, label, 32)
        return Aead(expand(secret, "key", 16), expand(secret, "iv", 12))

    @property
    def server(self) -> Aead:
        if self._server is None:
            self._server = self._side("server in")
        return self._server

    @property
    def retry_key(self) -> bytes:
        return expand(self._initial, "retry", 16)


@lru_cache(maxsize=8)
def _salt(network_key: bytes) -> bytes:
    return _extract(_SALT, network_key)


def initial_keys(dcid: bytes, network_key: bytes = b"") -> InitialKeys:
    """Keys from the DCID of a client's first INIT, or of its first INIT after a Retry (R-3-1)."""
    return InitialKeys(_extract(_salt(network_key), packet.VERSION_BYTES + dcid))


def context(hc: bytes, hs: bytes, server_der: bytes, client_der: bytes) -> bytes:
    """What binds the exporter to both hellos (as sent) and both leaf certificates (R-3-5)."""
    return sha256(
        b"stp/1 context"
        + packet.VERSION_BYTES
        + len(hc).to_bytes(2, "big")
        + hc
        + len(hs).to_bytes(2, "big")
        + hs
        + sha256(server_der).digest()
        + sha256(client_der).digest()
    ).digest()


def whitener(secret: bytes, cid: bytes) -> int:
    """`w` of protocol §2. `secret` is x_0 of the packet's sender; w does not change with key updates (R-2-3)."""
    return packet.whitener(expand(secret, "pn", 32), cid)


@define
class DirectionKeys:
    """One direction's secret of the current phase, with what is made from it."""

    secret: bytes
    suite: str
    aead: Aead

    @classmethod
    def derive(cls, secret: bytes, suite: str) -> DirectionKeys:
        """Raises HandshakeRefused for a suite that STP does not use (R-3-3)."""
        length = SUITES.get(suite)
        if length is None:
            raise HandshakeRefused(f"cipher suite {suite} is not one of STP's")
        aead = Aead(expand(secret, "key", length), expand(secret, "iv", 12), chacha=suite == CHACHA)
        return cls(secret=secret, suite=suite, aead=aead)

    @classmethod
    def after(cls, secret: bytes, suite: str) -> DirectionKeys:
        """The keys of the phase after the one of `secret`."""
        return cls.derive(expand(secret, "ku", SECRET_LENGTH), suite)

    def next(self) -> DirectionKeys:
        """The keys after one key update."""
        return self.after(self.secret, self.suite)


@define
class SessionKeys:
    """What a handshake leaves behind: both directions at phase 0, their pn keys, the session id."""

    suite: str
    client: DirectionKeys
    server: DirectionKeys
    client_pn_key: bytes
    server_pn_key: bytes
    session_id: bytes

    @classmethod
    def derive(cls, master: bytes, suite: str) -> SessionKeys:
        """`master` is the exporter's output; `suite` the TLS name of the cipher suite."""
        c_ap, s_ap = expand(master, "c ap", SECRET_LENGTH), expand(master, "s ap", SECRET_LENGTH)
        return cls(
            suite=suite,
            client=DirectionKeys.derive(c_ap, suite),
            server=DirectionKeys.derive(s_ap, suite),
            client_pn_key=expand(c_ap, "pn", 32),
            server_pn_key=expand(s_ap, "pn", 32),
            session_id=expand(master, "sid", SESSION_ID_LENGTH),
        )

    @property
    def fail_limit(self) -> int:
        """Failed opens after which the session closes with AEAD_LIMIT."""
        return CHACHA_FAIL_LIMIT if self.suite == CHACHA else AES_GCM_FAIL_LIMIT

    @property
    def seal_limit(self) -> int | None:
        """Packets one key may seal; None where the limit is out of reach."""
        return None if self.suite == CHACHA else AES_GCM_SEAL_LIMIT
