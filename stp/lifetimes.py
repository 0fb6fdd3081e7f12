"""When sessions end with the certificate they were made with (R-9-5).

(1) A session ends at the peer's notAfter. The deadline is reckoned once, while the system clock is known to be right,
    and counted on the boot clock from then on: later steps of the wall clock neither end a session nor keep it.
(2) Where nobody vouches for the clock nothing ends; the other side, whose clock is right, sees to it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import datetime
from typing import Final

from stp.identity import kernel_synchronised
from stp.link import Link

REHANDSHAKE: Final = 24 * 3600.0
SPREAD: Final = 0.1
"""Seconds until a session is replaced by a fresh one, and by what share of it that varies (R-9-4)."""
NEARLY_OVER: Final = 10.0
"""Seconds before its end in which the peer's certificate is no reason for another handshake: it was tried."""
CLOCK_CHECK: Final = 10.0
"""Seconds between two looks at whether the clock is synchronised."""


def boot_clock() -> float:
    """Seconds since boot, time asleep included (CLOCK_BOOTTIME)."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def renew_in(interval: float, left: float | None, chance: float) -> float:
    """Seconds until a session is replaced by a fresh one (R-9-4); `chance` is random, from 0 to 1.

    `interval` ± SPREAD or, where the peer's certificate ends sooner, four fifths of what is `left` of it and a
    bit: by then the peer may have another.
    """
    wait = interval * (1 - SPREAD + 2 * SPREAD * chance)
    if left is not None and left > NEARLY_OVER:
        wait = min(wait, left * (0.8 + 0.1 * chance))
    return wait


class Expiry:
    """The deadlines of one process's sessions."""

    def __init__(
        self,
        *,
        synchronised: Callable[[], bool] = kernel_synchronised,
        clock: Callable[[], float] = time.time,
        boot: Callable[[], float] = boot_clock,
    ) -> None:
        self._synchronised = synchronised
        self._clock = clock
        self._boot = boot
        self._trusted = False
        self._looked = -CLOCK_CHECK

    def left(self, link: Link) -> float | None:
        """Seconds until the peer's certificate ends, negative afterwards; None while nobody can say (2)."""
        now = self._boot()
        if link.ends_at is None:
            peer = link.session.peer
            if peer is None or not self._trust(now):
                return None
            link.ends_at = now + peer.not_after.timestamp() - self._clock()
        return link.ends_at - now

    def over(self, link: Link) -> bool:
        """Has the peer's certificate ended?"""
        left = self.left(link)
        return left is not None and left <= 0

    def passed(self, not_after: datetime) -> bool:
        """Is it known that this moment has passed? For a certificate that is shown now."""
        return self._trust(self._boot()) and self._clock() >= not_after.timestamp()

    def _trust(self, now: float) -> bool:
        if now - self._looked >= CLOCK_CHECK:
            self._looked = now
            self._trusted = self._synchronised()
        return self._trusted
