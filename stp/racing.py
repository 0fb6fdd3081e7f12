"""Which carrier to try, and when: UDP first, TLS on TCP where UDP does not answer, and back (protocol §11, R-11-4).

Policy only: bytes are moved elsewhere, time comes in as an argument.

(1) UDP has TLS_AFTER seconds for itself, unless this network is known to let none through: then both start at once.
(2) On TLS, UDP is probed at growing, jittered intervals of at most PROBE_MOST; it is moved to when every probe of
    STABLE seconds, LOOKS or more, was answered. So one lucky packet moves nobody, and a path that comes and goes is
    left alone; from a UDP that works, nobody is away for longer than five minutes.
(3) A UDP that was moved to and did not last is trusted later than the first time: the intervals go on growing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

TLS_AFTER: Final = 3.0
"""Seconds without an answer over UDP before TLS is dialled beside it."""
SILENCE: Final = 1.0
"""Seconds without a datagram from the peer, after another local port was taken, before TLS is dialled beside."""

PROBE_FIRST: Final = 30.0
PROBE_MOST: Final = 220.0
"""Seconds between probes of UDP, the first and the longest: with STABLE, and what probes take, under five minutes."""
STABLE: Final = 60.0
"""Seconds for which UDP must have worked before a session moves back to it."""
LOOKS: Final = 12
"""Probes in that time, at least, besides the first: jittered, or they would always meet the good half of a path that
comes and goes."""
PROBE_TIMEOUT: Final = 5.0
"""Seconds that a probe waits for its handshake."""
LASTING: Final = 600.0
"""Seconds after which a move back is held to have lasted (3)."""

UDP: Final = "udp"
TLS: Final = "tls"


def tls_after(remembered: str) -> float:
    """Seconds after UDP at which TLS is dialled, in a network where the carrier `remembered` worked last (1)."""
    return 0.0 if remembered == TLS else TLS_AFTER


class ProbeBack:
    """When to probe UDP while a session is on TLS, and when to move back (2). Times are seconds."""

    def __init__(
        self,
        jitter: Callable[[], float],
        *,
        first: float | None = None,
        most: float | None = None,
        stable: float | None = None,
    ) -> None:
        """`jitter` gives 0.0 to 1.0. None: PROBE_FIRST, PROBE_MOST, STABLE."""
        self._jitter = jitter
        self._first = self._interval = PROBE_FIRST if first is None else first
        self._most = PROBE_MOST if most is None else most
        self._stable = STABLE if stable is None else stable
        self._well_since: float | None = None
        self._moved_at: float | None = None
        self.due = 0.0
        """When the next probe is to be made. Of no meaning before `begin`."""

    def begin(self, now: float) -> None:
        """A session is on TLS since `now`."""
        lasted = self._moved_at is None or now - self._moved_at >= LASTING
        self._interval = self._first if lasted else min(self._interval * 2, self._most)
        self._well_since = self._moved_at = None
        self.due = now + self._spread(self._interval)

    def _spread(self, seconds: float) -> float:
        """Three quarters to the whole of it: jitter never makes a promise late."""
        return seconds * (0.75 + 0.25 * self._jitter())

    def answered(self, now: float) -> bool:
        """A probe was answered. Whether UDP has been well for long enough to move there."""
        if self._well_since is None:
            self._well_since = now
        left = self._well_since + self._stable - now
        if left <= 0:
            return True
        self.due = now + min(left, self._spread(self._stable / LOOKS))
        return False

    def failed(self, now: float) -> None:
        """A probe, or the move, failed: the next one comes later."""
        self._well_since = None
        self._interval = min(self._interval * 2, self._most)
        self.due = now + self._spread(self._interval)

    def moved(self, now: float) -> None:
        """The session is on UDP."""
        self._moved_at = now
