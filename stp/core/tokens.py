"""Address tokens of Retry and node tokens of NEW_TOKEN (protocol §4).

(1) A token is AEAD under a key of this keeper, and begins with a kind byte that the AEAD covers. A keeper that is
    given its secret again opens what it sealed before: gateways that come back after a restart, maybe a thousand
    from one address, are known by theirs.
(2) A Retry token opens for one IP, port, original DCID and new CID, for 10 s.
(3) A node token opens once in a keeper's life, within 24 h, and names a node. Used ones are remembered, at most
    65,536; when that memory is full the keys change, so that nothing used can be used again.
(4) No bytes raise anything: what cannot be read is `BAD_RETRY` (silence) or None (as good as no token).
"""

from __future__ import annotations

import hmac
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
"""Seconds; also the time for which a key seals. The one before still opens."""
MAX_USED: Final = 65_536
"""Hashes of used node tokens, 8 bytes each."""

_NO_DAY: Final = -2  # none that could be followed by one
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
    """Good; `TokenKeeper.spend` uses it up. The certificate must name `node`, else AUTH."""

    node: bytes
    mark: bytes
    """Under which it is remembered once it is used."""


Verdict: TypeAlias = RetryToken | NodeToken | Literal[_Bad.RETRY] | None


def token_node(domain: str, node: str) -> bytes:
    """What a node token holds instead of the name: 16 bytes, whatever the names' lengths."""
    return sha256(f"stp/1 token {domain}/{node}".encode()).digest()[:16]


def _address(addr: Address) -> bytes:
    return f"{addr[0]} {addr[1]}".encode()


class TokenKeeper:
    """Seals and opens tokens. `now` is the owner's monotonic clock.

    `secret`: 32 bytes, kept across restarts; b"": the keys die with the keeper. `epoch`: what makes of `now` a time
    that goes on over a restart, seconds; where it is wrong, tokens from before count as none.
    """

    def __init__(self, random_bytes: Callable[[int], bytes], secret: bytes = b"", epoch: float = 0.0) -> None:
        self._random = random_bytes
        self._secret = secret or random_bytes(32)
        self._epoch = epoch
        self._day = _NO_DAY
        self._keys: dict[int, AESGCM] = {}
        self._used: set[bytes] = set()
        self._used_before: set[bytes] = set()
        self.exhausted = 0  # times that promise (3) cost us the keys

    @property
    def used(self) -> int:
        """Used node tokens in memory."""
        return len(self._used) + len(self._used_before)

    def seal_retry(self, addr: Address, original_dcid: bytes, new_cid: bytes, now: float) -> bytes:
        now += self._epoch
        body = _RETRY_BODY.pack(now + RETRY_LIFETIME, original_dcid, new_cid)
        return self._seal(_RETRY, body, _address(addr), now)

    def seal_node(self, domain: str, node: str, now: float) -> bytes:
        """For a NEW_TOKEN frame."""
        now += self._epoch
        return self._seal(_NODE, _NODE_BODY.pack(now + NODE_LIFETIME, token_node(domain, node)), b"", now)

    def read(self, token: bytes, addr: Address, dcid: bytes, now: float) -> Verdict:
        """What the token of an INIT with that DCID from `addr` is worth (R-4-22).

        A node token stays good until it is spent: who is not admitted right now may try again with it.
        """
        now += self._epoch
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
            mark = sha256(token).digest()[:8]
            used = mark in self._used or mark in self._used_before
            return NodeToken(node, mark) if now <= expiry and not used else None
        return None

    def spend(self, token: NodeToken, now: float) -> None:
        """It opened a handshake: never again (3)."""
        self._used.add(token.mark)
        if self.used >= MAX_USED:
            self.exhausted += 1
            self._secret, self._day = self._random(32), _NO_DAY  # no token from before opens any more
            self._rotate(now + self._epoch)

    def _seal(self, kind: int, body: bytes, bound_to: bytes, now: float) -> bytes:
        self._rotate(now)
        nonce = self._random(12)
        head = _HEAD.pack(kind, self._day & 0xFF, nonce)
        return head + self._keys[self._day & 0xFF].encrypt(nonce, body, head + bound_to)

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

    def _rotate(self, now: float) -> None:
        """A key for each day: that of the day before still opens, an older one is gone with its used tokens."""
        day = int(now // NODE_LIFETIME)
        if day == self._day:
            return
        self._used_before = self._used if day == self._day + 1 else set()
        self._used = set()
        self._day = day
        self._keys = {one & 0xFF: AESGCM(self._key(one)) for one in (day - 1, day)}

    def _key(self, day: int) -> bytes:
        return hmac.digest(self._secret, f"stp/1 token key {day}".encode(), "sha256")[:16]
