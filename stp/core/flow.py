"""Credit: how many stream bytes the other side may send (protocol §7; RFC 9000 §4). Floor 2.

(1) Credit is counted in stream bytes on both sides, as absolute offsets, and is never lowered.
(2) A window grows only while its reader takes all of it within two round trips, and only under the process's budget.
"""

from __future__ import annotations

from typing import Final

CONTROL_WINDOW: Final = 64 * 1024
"""Bytes of stream 0, outside session credit (R-7-2)."""
STREAM_WINDOW: Final = 512 * 1024
"""Bytes a fresh stream may hold, stream 0 apart (R-7-7)."""
SESSION_WINDOW: Final = 2 * 1024 * 1024
"""Bytes all fresh streams of a session may hold together, stream 0 apart."""
MAX_WINDOW: Final = 6 * 1024 * 1024
"""Bytes a stream's window may grow to."""
UPDATE_SHARE: Final = 4
"""New credit is announced when this part of the window has been taken."""
GROWTH_ROUND_TRIPS: Final = 2


class WindowBudget:
    """Bytes of window beyond the initial ones that all sessions of a process may hold together."""

    __slots__ = ("left",)

    def __init__(self, total: int) -> None:
        self.left = total

    def take(self, size: int) -> bool:
        if size > self.left:
            return False
        self.left -= size
        return True

    def give_back(self, size: int) -> None:
        self.left += size


class ReceiveCredit:
    """What we let the peer send on one stream, or on all of a session (R-7-1)."""

    __slots__ = ("_epoch_at", "_epoch_taken", "grown", "limit", "taken", "window")

    def __init__(self, window: int) -> None:
        self.window = window
        self.limit = window
        """The offset last announced to the peer."""
        self.taken = 0
        self.grown = 0
        self._epoch_at = -1.0
        self._epoch_taken = 0

    def due(self) -> bool:
        """Whether there is enough new credit to be worth a frame."""
        return (self.taken + self.window - self.limit) * UPDATE_SHARE >= self.window

    def announce(self) -> int:
        """The offset to announce now (1)."""
        self.limit = max(self.limit, self.taken + self.window)
        return self.limit

    def grow(self, now: float, rtt: float, budget: WindowBudget) -> int:
        """Call when credit is due: doubles a window that is taken within GROWTH_ROUND_TRIPS (2).

        Returns by how many bytes it grew.
        """
        if self._epoch_at < 0.0:
            self._epoch_at, self._epoch_taken = now, self.taken
            return 0
        moved = self.taken - self._epoch_taken
        if moved < self.window:
            return 0
        quick = (now - self._epoch_at) * self.window < GROWTH_ROUND_TRIPS * rtt * moved
        self._epoch_at, self._epoch_taken = now, self.taken
        more = min(self.window, MAX_WINDOW - self.window)
        if not quick or more <= 0 or not budget.take(more):
            return 0
        self.window += more
        self.grown += more
        return more
