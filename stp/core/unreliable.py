"""Unreliable datagrams of one session: what waits to leave, what waits to be fetched (protocol §5, R-5-5, R-5-6).

Made when a session sends or receives its first one. Owns DATAGRAM: each leaves in a packet of its own, under
congestion control and pacing like any other, and is never said again.

(1) Both queues are bounded. A full one refuses what is to be sent, so that its owner knows at once, and forgets the
    oldest of what nobody fetched, for the newest is worth more. Both are counted; neither ever closes the session.
(2) acked + lost + what is under way = sent. A datagram that was given up and arrives after all is moved from `lost`
    to `acked`: these two say what is known by now.
"""

from __future__ import annotations

from collections import deque
from typing import Final

from attrs import define

MAX_WAITING: Final = 64
"""Datagrams that wait to leave."""
MAX_UNFETCHED: Final = 256
MAX_UNFETCHED_BYTES: Final = 512 * 1024
"""Datagrams, and their bytes, that came and that the session's owner did not fetch."""


@define
class DatagramCounts:
    """DATAGRAM frames since the start of the session."""

    sent: int = 0
    acked: int = 0
    lost: int = 0
    received: int = 0
    refused: int = 0
    """Not taken for sending: MAX_WAITING were waiting."""
    oversized: int = 0
    """Taken for sending, and dropped since packets became smaller meanwhile."""
    unfetched: int = 0
    """Received, and dropped since their owner did not fetch them in time."""


class Flight:
    """One datagram under way: the token of its frame."""

    __slots__ = ("lost",)

    def __init__(self) -> None:
        self.lost = False


class Datagrams:
    """The two queues of a session."""

    __slots__ = ("_unfetched_bytes", "counts", "first", "unfetched", "waiting")

    def __init__(self) -> None:
        self.waiting: deque[bytes] = deque()
        self.unfetched: deque[bytes] = deque()
        self.counts = DatagramCounts()
        self.first = True
        """Whose turn it is where streams have something to send too: ours, or theirs."""
        self._unfetched_bytes = 0

    def put(self, data: bytes) -> bool:
        """Queue one for sending; False: too many wait already (1)."""
        if len(self.waiting) >= MAX_WAITING:
            self.counts.refused += 1
            return False
        self.waiting.append(data)
        return True

    def next(self, room: int) -> bytes | None:
        """The next to send, of at most `room` bytes; None if there is none. It counts as sent."""
        while self.waiting:
            data = self.waiting.popleft()
            if len(data) <= room:
                self.counts.sent += 1
                return data
            self.counts.oversized += 1
        return None

    def on_received(self, data: bytes) -> None:
        """One came."""
        self.counts.received += 1
        self.unfetched.append(data)
        self._unfetched_bytes += len(data)
        while len(self.unfetched) > MAX_UNFETCHED or self._unfetched_bytes > MAX_UNFETCHED_BYTES:
            self._unfetched_bytes -= len(self.unfetched.popleft())
            self.counts.unfetched += 1

    def fetch(self) -> bytes:
        """The oldest that came. IndexError if there is none: look at `unfetched` first."""
        data = self.unfetched.popleft()
        self._unfetched_bytes -= len(data)
        return data

    def forget(self) -> None:
        """The session is over."""
        self.waiting.clear()
        self.unfetched.clear()
        self._unfetched_bytes = 0

    # -- the owner of DATAGRAM

    def on_acked(self, token: object) -> None:
        assert isinstance(token, Flight)
        self.counts.acked += 1
        if token.lost:
            self.counts.lost -= 1

    def on_lost(self, token: object) -> None:
        """Lost, or asked for again by a probe: it is not said again, and may be acknowledged yet (2)."""
        assert isinstance(token, Flight)
        if not token.lost:
            token.lost = True
            self.counts.lost += 1
