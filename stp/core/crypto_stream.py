"""The two ends of a handshake's CRYPTO stream (protocol §4, §5): they own the CRYPTO frames.

(1) A receiver holds at most 16 KiB and 64 ranges; bytes come out in order, each once.
(2) A sender forgets nothing that was not acknowledged; what was acknowledged is not sent again.
"""

from __future__ import annotations

from typing import Final

from stp.core.errors import LimitError, UsageError
from stp.core.ranges import RangeSet

MAX_CRYPTO: Final = 16 * 1024
"""Bytes of one side's stream."""
MAX_GAPS: Final = 64
"""Ranges beyond the first; an honest peer needs a handful."""


class CryptoReceiver:
    """Puts CRYPTO frames in order."""

    __slots__ = ("_buffer", "_have", "_taken")

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._have = RangeSet()
        self._taken = 0

    def add(self, offset: int, data: bytes) -> bool:
        """Whether the frame brought a byte that was not there. Raises LimitError. First come, first kept."""
        stop = offset + len(data)
        if stop > MAX_CRYPTO:
            raise LimitError(f"handshake of more than {MAX_CRYPTO} bytes")
        missing = RangeSet(((offset, stop),))
        for start, end in self._have:
            missing.remove(start, end)
        if not missing:
            return False
        if len(self._have) > MAX_GAPS:
            raise LimitError(f"handshake in more than {MAX_GAPS} pieces")
        self._buffer.extend(bytes(max(0, stop - len(self._buffer))))
        for start, end in missing:
            self._buffer[start:end] = data[start - offset : end - offset]
        self._have.add(offset, stop)
        return True

    def take(self) -> bytes:
        """The bytes that are in order now and were not taken before."""
        if not self._have:
            return b""
        start, stop = self._have.first()
        if start or stop <= self._taken:
            return b""
        chunk = bytes(self._buffer[self._taken : stop])
        self._taken = stop
        return chunk


class CryptoSender:
    """What is to be sent, in flight, and acknowledged."""

    __slots__ = ("_acked", "_buffer", "_pending")

    def __init__(self) -> None:
        self._buffer = b""
        self._pending = RangeSet()
        self._acked = RangeSet()

    @property
    def length(self) -> int:
        """Bytes written so far."""
        return len(self._buffer)

    def write(self, data: bytes) -> None:
        """Raises UsageError beyond 16 KiB: our own certificates are too many."""
        start = len(self._buffer)
        if start + len(data) > MAX_CRYPTO:
            raise UsageError(
                f"own handshake of more than {MAX_CRYPTO} bytes: too many or too large certificates"
            )
        self._buffer += data
        self._pending.add(start, len(self._buffer))

    def has_pending(self) -> bool:
        return bool(self._pending)

    def next_chunk(self, room: int) -> tuple[int, bytes]:
        """(offset, at most `room` bytes), now in flight. IndexError when nothing is pending."""
        start, stop = self._pending.first()
        stop = min(stop, start + room)
        self._pending.remove(start, stop)
        return start, self._buffer[start:stop]

    def on_acked(self, start: int, stop: int) -> None:
        self._acked.add(start, stop)
        self._pending.remove(start, stop)

    def on_lost(self, start: int, stop: int) -> None:
        """Send it again, unless it arrived otherwise."""
        self._pending.add(start, stop)
        for low, high in self._acked:
            self._pending.remove(low, high)

    def requeue(self) -> None:
        """Send everything again that was not acknowledged."""
        self.on_lost(0, len(self._buffer))
