"""Which carrier to try, and when: UDP first, TLS on TCP where UDP does not answer, and back (protocol §11, R-11-4).

Policy only: bytes are moved elsewhere, time comes in as an argument.

(1) UDP has TLS_AFTER seconds for itself, unless this network is known to let none through: then both start at once.
(2) On TLS, UDP is probed at growing, jittered intervals of at most PROBE_MOST; it is moved to when two probes STABLE
    seconds apart were answered and none between them failed. So one lucky packet moves nobody, and a path that comes
    and goes is left alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

TLS_AFTER: Final = 3.0
"""Seconds without an answer over UDP before TLS is dialled beside it."""
SILENCE: Final = 1.0
"""Seconds without a datagram from the peer, after another local port was taken, before TLS is dialled beside."""

PROBE_FIRST: Final = 30.0
PROBE_MOST: Final = 230.0
"""Seconds between probes of UDP, the first and the longest: with STABLE less than five minutes."""
STABLE: Final = 60.0
"""Seconds for which UDP must have worked before a session moves back to it."""
PROBE_TIMEOUT: Final = 5.0
"""Seconds that a probe waits for its handshake."""

UDP: Final = "udp"
TLS: Final = "tls"


def tls_after(remembered: str) -> float:
    """Seconds after UDP at which TLS is dialled, in a network where the carrier `remembered` worked last (1)."""
    return 0.0 if remembered == TLS else TLS_AFTER


class ProbeBack:
    """When to probe UDP while a session is on TLS, and when to move back (2)."""

    def __init__(
        self,
        now: float,
        jitter: Callable[[], float],
        *,
        first: float = PROBE_FIRST,
        most: float = PROBE_MOST,
        stable: float = STABLE,
    ) -> None:
        """`jitter` gives 0.0 to 1.0. Times are seconds."""
        self._jitter = jitter
        self._interval = first
        self._most = most
        self._stable = stable
        self._well_since: float | None = None
        self.due = now + self._spread(first)
        """When the next probe is to be made."""

    def _spread(self, seconds: float) -> float:
        """Three quarters to the whole of it: jitter never makes a promise late."""
        return seconds * (0.75 + 0.25 * self._jitter())

    def answered(self, now: float) -> bool:
        """A probe was answered. Whether UDP has been well for long enough to move there."""
        if self._well_since is None:
            self._well_since = now
            self.due = now + self._stable
            return False
        if now - self._well_since < self._stable:
            self.due = self._well_since + self._stable
            return False
        return True

    def failed(self, now: float) -> None:
        """A probe, or the move, failed: the next one comes later."""
        self._well_since = None
        self._interval = min(self._interval * 2, self._most)
        self.due = now + self._spread(self._interval)
