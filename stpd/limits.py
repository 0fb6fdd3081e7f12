"""How much one peer may send: what comes faster is taken later, so that credit holds the peer back.

(1) Nothing is dropped: a record waits, in order, until its time comes; how much can wait is bounded by credit.
(2) A second's worth may come at once; one record larger than that passes and is paid off before the next.
"""

from __future__ import annotations

from attrs import define


@define
class _Bucket:
    """Tokens refill at `rate` a second, up to one second's worth; debt is allowed (2)."""

    rate: float
    tokens: float
    at: float = 0.0

    def wait(self, now: float) -> float:
        """Seconds until something may be taken; 0.0: now."""
        self.tokens = min(self.rate, self.tokens + (now - self.at) * self.rate)
        self.at = now
        return 0.0 if self.tokens > 0 else (1.0 - self.tokens) / self.rate


class PeerLimit:
    """Token buckets of one peer, for messages and for record bytes. A rate of 0 is no limit."""

    __slots__ = ("_bytes", "_messages", "delayed")

    def __init__(self, messages_per_second: float, bytes_per_second: float) -> None:
        self._messages = _Bucket(messages_per_second, messages_per_second) if messages_per_second else None
        self._bytes = _Bucket(bytes_per_second, bytes_per_second) if bytes_per_second else None
        self.delayed = 0
        """Records that had to wait."""

    def __bool__(self) -> bool:
        return self._messages is not None or self._bytes is not None

    def wait(self, now: float) -> float:
        """Seconds until the next record may be taken; 0.0: now."""
        waits = [bucket.wait(now) for bucket in (self._messages, self._bytes) if bucket is not None]
        return max(waits, default=0.0)

    def take(self, messages: int, size: int) -> None:
        """A record was taken. Call `wait` first, at the same instant."""
        if self._messages is not None:
            self._messages.tokens -= messages
        if self._bytes is not None:
            self._bytes.tokens -= size
