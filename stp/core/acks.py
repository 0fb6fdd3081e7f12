"""Which DATA packets came: the replay window and the ACKs we owe (protocol §2, §6; RFC 9000 §13.2). Floor 2.

(1) A number is fresh once. What lies WINDOW or more below the highest is never fresh.
(2) Every ack-eliciting packet is acknowledged within MAX_ACK_DELAY: at once for the second one and after a gap,
    a late packet or a frame that asks for it.
(3) Memory is bounded: WINDOW bits and MAX_RANGES ranges, whatever the peer skips.

Numbers in order come as runs, one call per receive buffer; nothing here is done per packet in that case.
"""

from __future__ import annotations

from typing import Final

from stp.core.frames import MAX_ACK_RANGES, encode_ack
from stp.core.packet import PN_WINDOW
from stp.core.ranges import RangeSet

MAX_ACK_DELAY: Final = 0.025
"""Seconds; our transport parameter 2."""
ACK_EVERY: Final = 2
"""Ack-eliciting packets that make an ACK due at once (RFC 9000 §13.2.2)."""
MAX_RANGES: Final = MAX_ACK_RANGES + 1
MAX_SPAN: Final = 0xFFFFFFFF
"""Numbers from the lowest to the highest of one ACK, whose gaps and lengths are u32. A peer may leave out more."""
PRUNE_RANGES: Final = 8
"""Ranges above which an ACK-only packet asks to be acknowledged itself, so that old ranges can be forgotten."""

_MASK: Final = (1 << PN_WINDOW) - 1


class AckTracker:
    """Received packet numbers of one session."""

    __slots__ = ("_largest_at", "_ranges", "_seen", "_urgent", "deadline", "next", "owing")

    def __init__(self) -> None:
        self.next = 0
        """One above the highest number received."""
        self._seen = 0  # bit i: number next - 1 - i
        self._ranges = RangeSet(max_ranges=MAX_RANGES)
        self.owing = 0
        """Ack-eliciting packets that no ACK of ours covers: a packet that leaves anyway should carry one."""
        self.deadline: float | None = None
        """When an ACK must leave at the latest."""
        self._urgent = False
        self._largest_at = 0.0

    def fresh(self, pn: int) -> bool:
        """Whether this number has not been seen and lies in the window (1, R-2-5)."""
        below = self.next - 1 - pn
        return below < 0 or (below < PN_WINDOW and not self._seen >> below & 1)

    def on_run(self, first: int, stop: int, now: float) -> None:
        """Numbers first..stop-1 came, all fresh, none of them below `next`."""
        if first != self.next:
            self._urgent = True  # a gap, RFC 9000 §13.2.1
        shift, count = stop - self.next, stop - first
        if shift < PN_WINDOW:
            self._seen = (self._seen << shift | (1 << count) - 1) & _MASK
        else:  # never shift by what a peer chose
            self._seen = (1 << min(count, PN_WINDOW)) - 1
        self.next = stop
        self._largest_at = now
        self._ranges.add(first, stop)

    def on_late(self, pn: int) -> None:
        """A fresh number below `next` came."""
        self._seen |= 1 << (self.next - 1 - pn)
        self._ranges.add(pn)
        self._urgent = True

    def on_eliciting(self, count: int, now: float, *, at_once: bool = False) -> None:
        """`count` of the packets that came since the last call ask for an ACK."""
        if not count:
            return
        self.owing += count
        if at_once:
            self._urgent = True
        if self.deadline is None:
            self.deadline = now + MAX_ACK_DELAY

    def due(self, now: float) -> bool:
        """Whether an ACK must leave now, if need be alone (2, R-6-4)."""
        if not self.owing:
            return False
        return self._urgent or self.owing >= ACK_EVERY or (self.deadline or 0.0) <= now

    def wants_pruning(self) -> bool:
        return len(self._ranges) > PRUNE_RANGES

    def frame(self, now: float) -> bytes:
        """An ACK of everything still remembered, at least one packet; what was owed is settled."""
        self.owing = 0
        self._urgent = False
        self.deadline = None
        delay_us = int((now - self._largest_at) * 1e6)
        pairs = self._ranges.pairs()
        if self.next - pairs[0][0] > MAX_SPAN:
            self._ranges.discard_below(self.next - MAX_SPAN)
            pairs = self._ranges.pairs()
        return encode_ack(max(delay_us, 0), pairs[::-1])

    def on_acked(self, largest: object) -> None:
        """The peer has our ACK up to `largest`: older ranges need not be told again (RFC 9000 §13.2.4)."""
        if isinstance(largest, int) and self._ranges:
            self._ranges.discard_below(min(largest + 1, self._ranges.last()[0]))

    def on_lost(self, largest: object) -> None:
        """The next ACK says it again anyhow."""
