"""Who may start a handshake with a listener (protocol §4, "Limits"). Floor 2.

(1) Asked only for peers whose address is validated or who showed a good NEW_TOKEN: keys cannot be forged.
(2) An address starts ADDRESS_RATE handshakes a second, ADDRESS_BURST at once, and has ADDRESS_HALF_OPEN unfinished;
    a node with a NEW_TOKEN is counted by itself instead.
(3) The last half of what may start in all is for those with a NEW_TOKEN: a flood of strangers, however many addresses
    it has, keeps nobody out who was here before.
(4) Memory is bounded: MAX_KEYS keys; when it is full, those that have recovered go first, then the oldest.
"""

from __future__ import annotations

import ipaddress
from typing import Any, Final

ADDRESS_RATE: Final = 20.0
"""Handshakes a second of one IPv4 /32, IPv6 /64 or node."""
ADDRESS_BURST: Final = 5.0
ADDRESS_HALF_OPEN: Final = 8
TOTAL_RATE: Final = 200.0
"""Handshakes a second of all."""
TOTAL_BURST: Final = 50.0
HALF_OPEN: Final = 256
"""Unfinished handshakes of all; half of them only for those with a NEW_TOKEN."""
MAX_KEYS: Final = 8192


def address_key(addr: Any) -> bytes:
    """IPv4 /32 or IPv6 /64 of an address as sockets give it; what is none stands for itself."""
    host = str(addr[0]) if isinstance(addr, tuple) and addr else str(addr)
    try:
        found = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return host.encode()
    if isinstance(found, ipaddress.IPv6Address):
        mapped = found.ipv4_mapped
        return mapped.packed if mapped is not None else found.packed[:8]
    return found.packed


class Admission:
    """Token buckets by key, and the unfinished handshakes by key (R-4-25)."""

    __slots__ = ("_address_half_open", "_address_rate", "_buckets", "_half_open", "_total", "_total_rate")

    def __init__(
        self,
        *,
        address_rate: float = ADDRESS_RATE,
        address_half_open: int = ADDRESS_HALF_OPEN,
        total_rate: float = TOTAL_RATE,
    ) -> None:
        """Rates are handshakes a second; bursts are a quarter second of them, at least as by default."""
        self._address_rate = address_rate
        self._address_half_open = address_half_open
        self._total_rate = total_rate
        self._buckets: dict[bytes, tuple[float, float]] = {}  # key -> (tokens, when)
        self._half_open: dict[bytes, int] = {}
        self._total = (TOTAL_BURST, 0.0)

    def admit(self, key: bytes, now: float, *, by_token: bool = False) -> bool:
        """Whether `key` may start a handshake; if so it counts as half open until `on_over`."""
        if self._half_open.get(key, 0) >= self._address_half_open:
            return False
        rate, in_all = self._address_rate, self._total_rate
        mine = _refilled(self._buckets.get(key), rate, max(ADDRESS_BURST, rate / 4), now)
        burst = max(TOTAL_BURST, in_all / 4)
        total = _refilled(self._total, in_all, burst, now)
        if mine < 1.0 or total < (1.0 if by_token else 1.0 + burst / 2):  # (3)
            return False
        self._buckets.pop(key, None)
        self._buckets[key] = (mine - 1.0, now)  # the last used is the last in the dict
        self._total = (total - 1.0, now)
        self._half_open[key] = self._half_open.get(key, 0) + 1
        if len(self._buckets) > MAX_KEYS:
            self._prune(now)
        return True

    def on_over(self, key: bytes) -> None:
        """A handshake that was admitted is confirmed or gone."""
        left = self._half_open[key] - 1
        if left:
            self._half_open[key] = left
        else:
            del self._half_open[key]

    def _prune(self, now: float) -> None:
        """Promise (4): all that are full again, else the oldest."""
        full = [
            k
            for k, (tokens, at) in self._buckets.items()
            if tokens + (now - at) * self._address_rate >= ADDRESS_BURST
        ]
        for key in full or list(self._buckets)[:1]:
            del self._buckets[key]


def _refilled(bucket: tuple[float, float] | None, rate: float, burst: float, now: float) -> float:
    if bucket is None:
        return burst
    tokens, at = bucket
    return min(burst, tokens + (now - at) * rate)
