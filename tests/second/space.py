"""§4, §6: one numbered space of packets (INIT or DATA): what was sent, what was lost, what came."""

from __future__ import annotations

from collections import deque

from tests.second.hello import Malformed

PACKET_THRESHOLD = 3
INITIAL_PTO = 0.3


class Ranges:
    """Received numbers as inclusive ranges, descending: what an ACK tells and what opens at most once."""

    def __init__(self) -> None:
        self.ranges: list[tuple[int, int]] = []

    def __contains__(self, number: int) -> bool:
        return any(low <= number <= high for low, high in self.ranges)

    def add(self, number: int) -> None:
        merged = (number, number)
        rest = []
        for low, high in self.ranges:
            if low - 1 <= merged[1] and merged[0] <= high + 1:
                merged = (min(low, merged[0]), max(high, merged[1]))
            else:
                rest.append((low, high))
        self.ranges = sorted([*rest, merged], reverse=True)[:65]


class Space:
    """Frames wait in `queue`, travel in `sent`, and come back to `queue` when their packet is lost."""

    def __init__(self, first_number: int) -> None:
        self.next_number = first_number
        self.skipped: set[int] = set()
        self.queue: deque[bytes] = deque()
        self.sent: dict[int, tuple[float, list[bytes]]] = {}
        self.received = Ranges()
        self.ack_due = False
        self.largest_acked = -1
        self.rtt: float | None = None
        self.backoff = 0
        self.last_sent = 0.0
        self.probing = False
        """A timer runs with nothing under way, too (R-4-18)."""

    @property
    def pto(self) -> float:
        """R-4-18, R-6-1, simply: 300 ms until there is a measured time."""
        base = INITIAL_PTO if self.rtt is None else 3 * self.rtt + 0.03
        return min(base * (1 << self.backoff), max(1.0, 2 * base))

    def deadline(self) -> float | None:
        return self.last_sent + self.pto if self.sent or self.probing else None

    def note_sent(self, now: float, frames: list[bytes]) -> None:
        if frames:
            self.sent[self.next_number] = (now, frames)
            self.last_sent = now
        self.next_number += 1

    def on_ack(self, ranges: list[tuple[int, int]], delay_us: int, now: float) -> None:
        """What arrived is forgotten, what it overtook by three is queued again. Raises Malformed (R-2-6)."""
        largest = ranges[0][1]
        if largest >= self.next_number or any(s in range(a, b + 1) for s in self.skipped for a, b in ranges):
            raise Malformed("ACK of a number never sent")
        if largest in self.sent:
            sample = max(0.0, now - self.sent[largest][0] - delay_us / 1e6)
            self.rtt = sample if self.rtt is None else 0.875 * self.rtt + 0.125 * sample
        for number in [n for n in self.sent if any(low <= n <= high for low, high in ranges)]:
            del self.sent[number]
            self.backoff = 0
        self.largest_acked = max(self.largest_acked, largest)
        for number in [n for n in self.sent if n <= self.largest_acked - PACKET_THRESHOLD]:
            self.queue.extendleft(reversed(self.sent.pop(number)[1]))

    def on_timeout(self, now: float) -> None:
        """A probe timeout: everything that is under way is said again."""
        deadline = self.deadline()
        if deadline is not None and now >= deadline:
            self.backoff += 1
            if not self.sent:
                self.queue.append(b"\x01")  # PING
            for number in sorted(self.sent, reverse=True):
                self.queue.extendleft(reversed(self.sent.pop(number)[1]))
