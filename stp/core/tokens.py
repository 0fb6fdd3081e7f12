"""Address tokens of Retry and node tokens of NEW_TOKEN (protocol §4).

(1) A token is AEAD under a key of this keeper, and begins with a kind byte that the AEAD covers.
(2) A Retry token opens for one IP, port, original DCID and new CID, for 10 s.
(3) A node token opens once, within 24 h, and names a node. Used ones are remembered, at most 65,536; when
    that memory is full the keys change, so that nothing used can ever be used again.
(4) No bytes raise anything: what cannot be read is `BAD_RETRY` (silence) or None (as good as no token).
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum, auto
from hashlib import sha256
from struct import Struct
from typing import Final, Literal, TypeAlias

from attrs import define
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from stp.core.packet import CID_LENGTH

RETRY_LIFETIME: Final = 10.0
"""Seconds."""
NODE_LIFETIME: Final = 24 * 3600.0
"""Seconds; also the time after which the key changes. The one before still opens."""
MAX_USED: Final = 65_536
"""Hashes of used node tokens, 8 bytes each."""

_RETRY: Final = 1
_NODE: Final = 2
_HEAD: Final = Struct("!BB12s")  # kind, key generation, nonce
_RETRY_BODY: Final = Struct("!d8s8s")  # expiry, original DCID, new CID
_NODE_BODY: Final = Struct("!d16s")  # expiry, node

Address: TypeAlias = tuple[str, int] | tuple[str, int, int, int]


class _Bad(Enum):
    RETRY = auto()


BAD_RETRY: Final = _Bad.RETRY
"""A Retry token that does not hold: silence."""


@define
class RetryToken:
    """The address is the peer's own; the INIT's DCID is the CID the Retry gave."""

    original_dcid: bytes


@define
class NodeToken:
    """Good and from now on used. The certificate must name `node`, else AUTH."""

    node: bytes


Verdict: TypeAlias = RetryToken | NodeToken | Literal[_Bad.RETRY] | None


def token_node(domain: str, node: str) -> bytes:
    """What a node token holds instead of the name: 16 bytes, whatever the names' lengths."""
    return sha256(f"stp/1 token {domain}/{node}".encode()).digest()[:16]


def _address(addr: Address) -> bytes:
    return f"{addr[0]} {addr[1]}".encode()


class TokenKeeper:
    """Seals and opens tokens. `now` is the owner's monotonic clock; keys die with the keeper."""

    def __init__(self, random_bytes: Callable[[int], bytes]) -> None:
        self._random = random_bytes
        self._generation = 0
        self._keys: dict[int, AESGCM] = {}
        self._made = 0.0
        self._used: set[bytes] = set()
        self._used_before: set[bytes] = set()
        self.exhausted = 0  # times that promise (3) cost us the keys

    @property
    def used(self) -> int:
        """Used node tokens in memory."""
        return len(self._used) + len(self._used_before)

    def seal_retry(self, addr: Address, original_dcid: bytes, new_cid: bytes, now: float) -> bytes:
        body = _RETRY_BODY.pack(now + RETRY_LIFETIME, original_dcid, new_cid)
        return self._seal(_RETRY, body, _address(addr), now)

    def seal_node(self, domain: str, node: str, now: float) -> bytes:
        """For a NEW_TOKEN frame."""
        return self._seal(_NODE, _NODE_BODY.pack(now + NODE_LIFETIME, token_node(domain, node)), b"", now)

    def read(self, token: bytes, addr: Address, dcid: bytes, now: float) -> Verdict:
        """What the token of an INIT with that DCID from `addr` is worth. A good node token is used up (R-4-22)."""
        self._rotate(now)
        kind = token[0] if token else 0
        if kind == _RETRY:
            body = self._open(token, _address(addr), _RETRY_BODY.size)
            if body is None:
                return BAD_RETRY
            expiry, original_dcid, new_cid = _RETRY_BODY.unpack(body)
            good = now <= expiry and new_cid == dcid and len(dcid) == CID_LENGTH
            return RetryToken(original_dcid) if good else BAD_RETRY
        if kind == _NODE:
            body = self._open(token, b"", _NODE_BODY.size)
            if body is None:
                return None
            expiry, node = _NODE_BODY.unpack(body)
            return NodeToken(node) if now <= expiry and self._use(token, now) else None
        return None

    def _seal(self, kind: int, body: bytes, bound_to: bytes, now: float) -> bytes:
        self._rotate(now)
        nonce = self._random(12)
        head = _HEAD.pack(kind, self._generation, nonce)
        return head + self._keys[self._generation].encrypt(nonce, body, head + bound_to)

    def _open(self, token: bytes, bound_to: bytes, size: int) -> bytes | None:
        if len(token) != _HEAD.size + size + 16:
            return None
        head = token[: _HEAD.size]
        _, generation, nonce = _HEAD.unpack(head)
        key = self._keys.get(generation)
        if key is None:
            return None
        try:
            return key.decrypt(nonce, token[_HEAD.size :], head + bound_to)
        except InvalidTag:
            return None

    def _use(self, token: bytes, now: float) -> bool:
        mark = sha256(token).digest()[:8]
        if mark in self._used or mark in self._used_before:
            return False
        self._used.add(mark)
        if self.used >= MAX_USED:
            self.exhausted += 1
            self._keys.clear()
            self._new_key(now)
            self._used_before = set()  # no token from before opens any more
        return True

    def _rotate(self, now: float) -> None:
        if not self._keys or now - self._made >= NODE_LIFETIME:
            self._new_key(now)

    def _new_key(self, now: float) -> None:
        """A new key; the one before it still opens, the one before that is gone with its used tokens."""
        self._keys.pop((self._generation - 1) % 256, None)
        self._generation = (self._generation + 1) % 256
        self._keys[self._generation] = AESGCM(self._random(16))
        self._made = now
        self._used_before, self._used = self._used, set()
