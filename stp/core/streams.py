"""One stream: ordered bytes with credit, its two ends (protocol §7; RFC 9000 §2, §3). Below the packetizer.

(1) `RecvStream.read` yields each byte once and in order, whatever was lost, doubled, cut or swapped on the way.
(2) What the peer can make us hold is bounded: by credit, and by MAX_GAPS runs of bytes beyond gaps.
(3) `SendStream` keeps a byte until it is acknowledged, and not longer.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from typing import Final

from stp.core.errors import FlowError, LimitError, ProtocolError
from stp.core.flow import ReceiveCredit
from stp.core.ranges import RangeSet

MAX_GAPS: Final = 1000
"""Runs of bytes that one stream keeps beyond gaps (R-7-6)."""
MAX_CHUNKS: Final = 1024
"""Pieces of unread bytes before they are joined into one: small pieces cost more than they hold."""
CONTROL_BUFFER: Final = 256 * 1024
SEND_BUFFER: Final = 1024 * 1024
"""Bytes that a stream takes from its owner ahead of acknowledgement; stream 0 the former."""
MAX_SEND_BUFFER: Final = 4 * 1024 * 1024
"""Where more than half of SEND_BUFFER is under way, as much again is taken, up to this."""
WRITABLE_ROOM: Final = 64 * 1024
"""Room below which a stream counts as full, and is announced when it comes back."""
DEFAULT_WEIGHT: Final = 16


class SendStream:
    """Bytes on their way out. Owns its STREAM frames, RESET_STREAM and STREAM_DATA_BLOCKED."""

    __slots__ = (
        "_acked",
        "_chunks",
        "_starts",
        "base",
        "blocked_at",
        "buffer",
        "fin",
        "fin_acked",
        "fin_sent",
        "full",
        "id",
        "limit",
        "lost",
        "next",
        "reset_code",
        "share",
        "weight",
        "written",
    )

    def __init__(self, stream: int, limit: int, weight: int = DEFAULT_WEIGHT) -> None:
        self.id = stream
        self.weight = weight
        self.limit = limit
        """The peer's MAX_STREAM_DATA."""
        self.buffer = SEND_BUFFER if stream else CONTROL_BUFFER
        """Bytes that may lie here unacknowledged; grows with what is under way."""
        self.base = 0
        """Everything below is acknowledged."""
        self.next = 0
        """Everything below was sent once."""
        self.written = 0
        self.fin = False
        self.fin_sent = False
        self.fin_acked = False
        self.full = False
        self.reset_code: int | None = None
        self.share = 0.0
        """Bytes sent divided by weight, as the scheduler counts them."""
        self.blocked_at = -1
        self.lost: RangeSet | None = None
        self._acked: RangeSet | None = None
        self._chunks: list[bytes] = []
        self._starts: list[int] = []

    def write(self, data: bytes, fin: bool) -> None:
        if data:
            self._chunks.append(data)
            self._starts.append(self.written)
            self.written += len(data)
        self.fin = self.fin or fin

    def room(self) -> int:
        """Bytes that `write` may still bring: only writing makes it less."""
        return max(0, self.buffer - (self.written - self.base))

    def due(self, session_room: int) -> tuple[int, int]:
        """(offset, bytes) that should leave next, lost ones first; (offset, 0) if only FIN or nothing."""
        if self.lost:
            start, stop = self.lost.first()
            return start, stop - start
        limit = self.limit
        if self.id and limit - self.next > session_room:
            limit = self.next + session_room
        return self.next, max(0, min(self.written, limit) - self.next)

    def wants_to_send(self, session_room: int) -> bool:
        """Whether there are bytes that credit allows, or a FIN."""
        if self.reset_code is not None:
            return False
        if self.lost:
            return True
        if self.next < self.written:
            return self.next < self.limit and (session_room > 0 or not self.id)
        return self.fin and not self.fin_sent

    def take(self, offset: int, length: int) -> tuple[bytes, int, bool]:
        """(data, index, fin): data[index:index + length] are the bytes of `offset`, now counted as sent."""
        stop = offset + length
        if offset == self.next:
            self.next = stop
            if 2 * (stop - self.base) > self.buffer and self.id:
                self.buffer = min(2 * (stop - self.base), MAX_SEND_BUFFER)
        if self.lost:
            self.lost.remove(offset, stop)
        fin = self.fin and stop == self.written
        self.fin_sent = self.fin_sent or fin
        if not length:
            return b"", 0, fin
        at = bisect_right(self._starts, offset) - 1
        index = offset - self._starts[at]
        chunk = self._chunks[at]
        if index + length <= len(chunk):
            return chunk, index, fin
        last = bisect_left(self._starts, stop)
        pieces = self._chunks[at:last]
        pieces[0] = chunk[index:]
        pieces[-1] = pieces[-1][: stop - self._starts[last - 1]]
        return b"".join(pieces), 0, fin

    def on_range_acked(self, offset: int, length: int, fin: bool) -> None:
        stop = offset + length
        self.fin_acked = self.fin_acked or fin
        if self.lost:
            self.lost.remove(offset, stop)
        if offset > self.base:
            if self._acked is None:
                self._acked = RangeSet()
            self._acked.add(offset, stop)
            return
        if stop > self.base:
            self.base = stop
        if self._acked:
            while self._acked and self._acked.first()[0] <= self.base:
                self.base = max(self.base, self._acked.pop_first()[1])
        gone = bisect_right(self._starts, self.base)
        if gone and self.base < self._starts[gone - 1] + len(self._chunks[gone - 1]):
            gone -= 1
        del self._starts[:gone], self._chunks[:gone]

    def on_range_lost(self, offset: int, length: int, fin: bool) -> None:
        if self.reset_code is not None:
            return
        if fin and not self.fin_acked:
            self.fin_sent = False
        stop = offset + length
        offset = max(offset, self.base)
        if stop <= offset:
            return
        if self.lost is None:
            self.lost = RangeSet()
        self.lost.add(offset, stop)
        for start, end in self._acked or ():
            self.lost.remove(start, end)

    def on_acked(self, token: object) -> None:
        """A STREAM frame in a mixed packet arrived: (offset, length, fin)."""
        if isinstance(token, tuple):
            self.on_range_acked(*token)

    def on_lost(self, token: object) -> None:
        if isinstance(token, tuple):
            self.on_range_lost(*token)

    def reset(self, code: int) -> None:
        """Nothing more is sent but RESET_STREAM, which the owner writes."""
        self.reset_code = code
        self.written = self.base = self.next
        self.lost = self._acked = None
        self._chunks.clear()
        self._starts.clear()

    @property
    def settled(self) -> bool:
        """Nothing is to be sent, and nothing could be lost any more."""
        return self.base == self.written and (self.fin_acked or not self.fin)


class RecvStream:
    """Bytes on their way in. The receive loop appends to `chunks` and moves `next` itself while all is in order."""

    __slots__ = (
        "_runs",
        "_starts",
        "chunks",
        "credit",
        "ended",
        "final_size",
        "highest",
        "id",
        "limit",
        "next",
    )

    def __init__(self, stream: int, window: int) -> None:
        self.id = stream
        self.next = 0
        """The offset up to which all bytes are here."""
        self.highest = 0
        """One above the highest offset seen."""
        self.credit = ReceiveCredit(window)
        self.limit = window
        """credit.limit, where the receive loop finds it."""
        self.chunks: list[bytes] = []
        self.final_size: int | None = None
        self.ended = False
        """The reader was told of the end, or the peer reset the stream."""
        self._starts: list[int] | None = None  # None while there is no gap: most streams never have one
        self._runs: list[bytearray] | None = None

    def insert(self, offset: int, data: bytes, fin: bool) -> int:
        """Bytes at `offset` came, in order or not: by how much `highest` grew.

        Raises FlowError, LimitError, ProtocolError (a final size that changes).
        """
        stop = offset + len(data)
        if stop > self.limit:
            raise FlowError(f"stream {self.id}: {stop} bytes, credit for {self.limit}")
        final = self.final_size
        if (final is not None and (stop > final or (fin and stop != final))) or (fin and stop < self.highest):
            raise ProtocolError(f"stream {self.id}: its end moves")
        if fin:
            self.final_size = stop
        grown = max(0, stop - self.highest)
        self.highest += grown
        if self.ended or stop <= self.next:
            return grown
        if offset <= self.next:
            self.chunks.append(data[self.next - offset :] if offset < self.next else data)
            self.next = stop
            self.merge()
        else:
            self._keep(offset, data)
        return grown

    def _keep(self, offset: int, data: bytes) -> None:
        """Bytes beyond a gap. Runs stay ascending, apart from one another and at most MAX_GAPS."""
        starts, runs = self._starts, self._runs
        if starts is None or runs is None:
            starts, runs = self._starts, self._runs = [], []
        at = bisect_right(starts, offset) - 1
        if at >= 0 and starts[at] + len(runs[at]) >= offset:
            known = starts[at] + len(runs[at]) - offset
            if known >= len(data):
                return
            runs[at] += data[known:]
        else:
            at += 1
            starts.insert(at, offset)
            runs.insert(at, bytearray(data))
        stop = starts[at] + len(runs[at])
        above = at + 1
        while above < len(starts) and starts[above] <= stop:
            runs[at] += runs[above][stop - starts[above] :]
            stop = starts[at] + len(runs[at])
            above += 1
        del starts[at + 1 : above], runs[at + 1 : above]
        if len(starts) > MAX_GAPS:
            raise LimitError(f"stream {self.id}: more than {MAX_GAPS} gaps")

    def merge(self) -> None:
        """`next` moved: take the runs that it has reached, and keep `chunks` short."""
        starts, runs = self._starts, self._runs
        if starts is not None and runs is not None:
            taken = 0
            for start, run in zip(starts, runs, strict=True):
                if start > self.next:
                    break
                taken += 1
                if start + len(run) > self.next:
                    self.chunks.append(bytes(run[self.next - start :]))
                    self.next = start + len(run)
            if taken == len(starts):
                self._starts = self._runs = None
            else:
                del starts[:taken], runs[:taken]
        if len(self.chunks) > MAX_CHUNKS:
            self.chunks[:] = [b"".join(self.chunks)]

    def read(self) -> bytes:
        chunks = self.chunks
        data = chunks[0] if len(chunks) == 1 else b"".join(chunks)
        chunks.clear()
        return data

    @property
    def complete(self) -> bool:
        """Every byte up to the end is here."""
        return self.next == self.final_size

    def drop(self, final_size: int) -> int:
        """The peer reset it: by how much `highest` grew. Raises ProtocolError, FlowError."""
        if (self.final_size is not None and self.final_size != final_size) or final_size < self.highest:
            raise ProtocolError(f"stream {self.id}: its end moves")
        if final_size > self.limit:
            raise FlowError(f"stream {self.id}: {final_size} bytes, credit for {self.limit}")
        grown = final_size - self.highest
        self.highest = self.next = self.final_size = final_size
        self.ended = True
        self.chunks.clear()
        self._starts = self._runs = None
        return grown
