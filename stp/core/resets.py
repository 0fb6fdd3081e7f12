"""RESET: how a dialling side learns within one round trip that its listener was started anew (protocol §8).

(1) Only this very instance answers for a CID, and only one that carries our MAC; a stranger's guess draws silence.
(2) At most one RESET in RESET_INTERVAL for an address and port; the table of addresses is bounded.
(3) A RESET is always shorter than what provoked it, so two restarted nodes cannot keep each other busy.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from stp.core.packet import build_reset, cid_is_ours, reset_token

RESET_INTERVAL: Final = 0.1
"""Seconds between two RESETs to one address and port."""
MAX_ADDRESSES: Final = 4_096
"""Addresses remembered; when there are more, all are forgotten at once."""
PADDING: Final = 26
"""Random bytes in front of the token, where what provoked it is long enough."""


class Resetter:
    """Makes RESETs for CIDs that this instance issued in a former life."""

    __slots__ = ("_cid_key", "_instance", "_random_bytes", "_reset_key", "_said")

    def __init__(
        self, cid_key: bytes, reset_key: bytes, instance: int, random_bytes: Callable[[int], bytes]
    ) -> None:
        self._cid_key = cid_key
        self._reset_key = reset_key
        self._instance = instance
        self._random_bytes = random_bytes
        self._said: dict[Any, float] = {}

    def answer(self, datagram: bytes, addr: Any, now: float) -> bytes | None:
        """The RESET for a DATA packet that no session of ours wants; None: silence (R-8-2)."""
        cid = datagram[1:9]
        if len(cid) < 8 or not cid_is_ours(self._cid_key, self._instance, cid):
            return None
        if now - self._said.get(addr, -RESET_INTERVAL) < RESET_INTERVAL:
            return None
        if len(self._said) >= MAX_ADDRESSES:
            self._said.clear()
        self._said[addr] = now
        return build_reset(reset_token(self._reset_key, cid), len(datagram), self._random_bytes(PADDING))
