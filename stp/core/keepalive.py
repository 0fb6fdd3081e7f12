"""How long an idle session may be silent before a NAT forgets it: learned (protocol §8).

A dialling session says after each silence whether the peer answered and whether it had to find us anew.

(1) `interval` stays within KEEPALIVE_LEAST and KEEPALIVE_MOST, whatever is said.
(2) It grows by GROWTH after STEADY answers in a row, and never to what has been seen to be too long.
(3) A silence that was too long is believed at once, and forgotten only after RETRY_AFTER answers: routers restart.
"""

from __future__ import annotations

from typing import Final

from stp.core.path import KEEPALIVE, KEEPALIVE_LEAST, KEEPALIVE_MOST

GROWTH: Final = 1.25
STEADY: Final = 3
"""Answers to PINGs at one interval, before a longer one is tried."""
MARGIN: Final = 0.75
"""The part of a silence that was too long that is thought to be safe."""
RETRY_AFTER: Final = 1000
"""Answers after which a silence that was too long is tried again."""


class KeepaliveLearner:
    """One per network; the sessions dialled in it may share it."""

    __slots__ = ("_answers", "_steady", "changed", "interval", "too_long")

    def __init__(self, interval: float = KEEPALIVE, too_long: float = 0.0) -> None:
        """As remembered: seconds, `too_long` 0.0 when no silence has done harm."""
        self.interval = _within(interval)
        """Seconds of silence after which to PING."""
        self.too_long = too_long
        """The shortest silence after which a NAT had forgotten us; 0.0: none."""
        self.changed = False
        """There is something to remember. Whoever does sets it back."""
        self._steady = 0
        self._answers = 0

    def on_answer(self, silence: float) -> None:
        """A PING after so many seconds of silence came through, and its answer too."""
        if silence < 0.9 * self.interval:
            return  # an impatient owner's; it proves less than what we do anyway
        self._answers += 1
        if self.too_long and self._answers >= RETRY_AFTER:
            self.too_long = 0.0
            self._answers = 0
            self.changed = True
        self._steady += 1
        if self._steady < STEADY:
            return
        self._steady = 0
        wanted = self.interval * GROWTH
        if self.too_long:
            wanted = min(wanted, self.too_long * MARGIN)
        wanted = _within(wanted)
        if wanted > self.interval:
            self.interval = wanted
            self.changed = True

    def on_forgotten(self, silence: float) -> None:
        """After so many seconds of silence the peer saw us at another address, or did not hear us at all."""
        if silence < KEEPALIVE_LEAST:
            return  # whatever that was, it was no NAT that had grown tired of waiting
        self.too_long = min(silence, self.too_long) if self.too_long else silence
        self.interval = _within(min(self.interval, self.too_long * MARGIN))
        self._steady = self._answers = 0
        self.changed = True


def _within(seconds: float) -> float:
    return min(max(seconds, KEEPALIVE_LEAST), KEEPALIVE_MOST)
