"""One log line where a thousand would say the same: what repeats is counted, and told with the next that passes."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Final

INTERVAL: Final = 10.0
"""Seconds between two lines about the same thing."""

MAX_KEYS: Final = 4_096
"""Things remembered; above it all are forgotten, and the next line of each passes."""


class Throttle:
    """`passes(key, now)` is None to keep silent, else how many were kept silent since the last that passed."""

    def __init__(self, interval: float = INTERVAL) -> None:
        self._interval = interval
        self._said: dict[Hashable, tuple[float, int]] = {}

    def passes(self, key: Hashable, now: float) -> int | None:
        """May something about *key* be said at *now* (seconds, monotonic)?"""
        at, silent = self._said.get(key, (float("-inf"), 0))
        if now - at < self._interval:
            self._said[key] = (at, silent + 1)
            return None
        if len(self._said) >= MAX_KEYS:
            self._said.clear()
        self._said[key] = (now, 0)
        return silent
