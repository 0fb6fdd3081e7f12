"""What is under way, what arrived and what is lost: RFC 9002, with its constants and names. Above floor 2.

(1) A packet that asks for an ACK is in flight until it is acknowledged or declared lost; nothing else counts.
(2) What was in a packet is told to its owners exactly once: on_acked or on_lost. A probe may ask an owner before
    that to say it again; owners take it as on_lost and must not mind the later word.
(3) One object remembers a whole burst; what one lost packet of it held is arithmetic (protocol §6).
(4) A lost probe of the packet size is no sign of congestion (RFC 8899 §3).
(5) What left on another path than the present one says nothing of its round trip or its room (RFC 9000 §9.4), nor
    of the size that passes there.
(6) What comes within a round trip after it was declared lost had only been overtaken: thresholds grow, and if nothing
    else was lost the window is given back (RFC 9438 §4.9, R-6-2).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final, Protocol

from stp.core.congestion import Congestion
from stp.core.sizing import MIN_DATAGRAM, Sizer

if TYPE_CHECKING:
    from stp.core.trace import Trace

K_PACKET_THRESHOLD: Final = 3
MAX_PACKET_THRESHOLD: Final = 64
MAX_TIME_THRESHOLD: Final = 2.0
"""Where packets overtake one another, the thresholds grow up to these (RFC 9002 §6.1.1, §6.1.2)."""
MAX_DECLARED: Final = 32
"""Losses that are remembered for a round trip, to see whether they come yet."""
K_TIME_THRESHOLD: Final = 9 / 8
K_GRANULARITY: Final = 0.001
K_INITIAL_RTT: Final = 0.333
K_PERSISTENT_CONGESTION_THRESHOLD: Final = 3
MAX_GUESS: Final = 0.1
"""Seconds: the longest RTT that is taken over from a handshake as a guess. There an ACK that was lost and said again
makes a sample of seconds; too short a guess costs a few probes, too long a one costs HANDSHAKE_DONE its time."""
MAX_PROBE_INTERVAL: Final = 1.0
"""Seconds. A departure from RFC 9002 §6.2.1, which doubles without end: a path that comes back after an outage is
to be found within about a second, and the dead-peer rule (protocol §8) ends the probing anyway."""
PROBE_PACKETS: Final = 2  # RFC 9002 §6.2.4
MAX_BACKOFF: Final = 16
"""Doublings after which the interval is capped whatever the PTO is."""


class FrameOwner(Protocol):
    """The part that wrote a frame and decides what is still worth saying (R-6-6)."""

    def on_acked(self, token: object) -> None: ...

    def on_lost(self, token: object) -> None: ...


class BurstOwner(Protocol):
    """A stream, for bursts of its bytes."""

    def on_range_acked(self, offset: int, length: int, fin: bool) -> None: ...

    def on_range_lost(self, offset: int, length: int, fin: bool) -> None: ...


class FrameSink(Protocol):
    """A packet that is being filled."""

    def add(self, frame: bytes, owner: FrameOwner, token: object) -> bool:
        """Whether the frame still fitted."""


class RttEstimator:
    """RFC 9002 §5."""

    __slots__ = ("latest", "max_ack_delay", "min", "sampled", "smoothed", "time_threshold", "var")

    def __init__(
        self, initial: float | None = None, max_ack_delay: float = 0.025, *, guess: float = K_INITIAL_RTT
    ) -> None:
        self.max_ack_delay = max_ack_delay
        """Seconds, the peer's."""
        self.time_threshold: float = K_TIME_THRESHOLD
        """Round trips, see `loss_delay`."""
        self.sampled = initial is not None
        self.latest = self.min = self.smoothed = guess if initial is None else initial
        self.var = self.smoothed / 2  # RFC 9002 §5.3

    def on_sample(self, latest: float, ack_delay: float) -> None:
        """`ack_delay` is what the peer says it waited, seconds."""
        self.latest = latest
        if not self.sampled:
            self.sampled = True
            self.min = self.smoothed = latest
            self.var = latest / 2
            return
        self.min = min(self.min, latest)
        ack_delay = min(ack_delay, self.max_ack_delay)
        adjusted = latest - ack_delay if latest >= self.min + ack_delay else latest
        self.var = 0.75 * self.var + 0.25 * abs(self.smoothed - adjusted)
        self.smoothed = 0.875 * self.smoothed + 0.125 * adjusted

    def pto(self) -> float:
        """Seconds, without backoff (RFC 9002 §6.2.1)."""
        return self.smoothed + max(4 * self.var, K_GRANULARITY) + self.max_ack_delay

    def loss_delay(self) -> float:
        """Seconds after which a packet below an acknowledged one is lost (RFC 9002 §6.1.2)."""
        return max(self.time_threshold * max(self.latest, self.smoothed), K_GRANULARITY)


class Sent:
    """`count` packets first..first+count-1 that left together: a burst of one stream, or one packet of frames."""

    __slots__ = (
        "count",
        "fin",
        "first",
        "frames",
        "last_piece",
        "last_size",
        "left",
        "offset",
        "piece",
        "size",
        "stream",
        "time",
    )

    first: int
    count: int
    time: float
    size: int  # bytes of each datagram but the last
    last_size: int
    left: int  # bit i: packet first + i is in flight
    stream: BurstOwner | None
    offset: int
    piece: int  # stream bytes in each packet but the last
    last_piece: int
    fin: bool
    frames: Sequence[tuple[FrameOwner, object]]

    @classmethod
    def burst(
        cls,
        first: int,
        count: int,
        time: float,
        stream: BurstOwner,
        offset: int,
        length: int,
        piece: int,
        overhead: int,
        fin: bool,
    ) -> Sent:
        """`length` bytes of `stream` in pieces of `piece`; `overhead` bytes around each."""
        sent = cls()
        sent.first, sent.count, sent.time = first, count, time
        sent.stream, sent.offset, sent.piece, sent.fin = stream, offset, piece, fin
        sent.last_piece = length - (count - 1) * piece
        sent.size, sent.last_size = piece + overhead, sent.last_piece + overhead
        sent.left = (1 << count) - 1
        sent.frames = ()
        return sent

    @classmethod
    def packet(cls, pn: int, time: float, size: int, frames: Sequence[tuple[FrameOwner, object]]) -> Sent:
        sent = cls()
        sent.first, sent.count, sent.time, sent.left = pn, 1, time, 1
        sent.size = sent.last_size = size
        sent.stream = None
        sent.offset = sent.piece = sent.last_piece = 0
        sent.fin = False
        sent.frames = frames
        return sent

    def larger(self, bits: int, above: int) -> int:
        """How many of the packets in `bits` have more than `above` bytes."""
        if self.last_size <= above:
            bits &= (1 << (self.count - 1)) - 1
        return bits.bit_count() if self.size > above else 0

    def tell(self, bits: int, *, acked: bool) -> int:
        """Tell the owners of the packets in `bits` and return their bytes. Does not change `left`."""
        if self.stream is None:
            for owner, token in self.frames:
                if acked:
                    owner.on_acked(token)
                else:
                    owner.on_lost(token)
            return self.size
        size = 0
        say = self.stream.on_range_acked if acked else self.stream.on_range_lost
        while bits:
            start = (bits & -bits).bit_length() - 1
            run = bits >> start
            count = ((run + 1) & ~run).bit_length() - 1
            bits &= bits + (1 << start)  # the carry clears the run
            length, wire = count * self.piece, count * self.size
            ends = start + count == self.count
            if ends:
                length += self.last_piece - self.piece
                wire += self.last_size - self.size
            say(self.offset + start * self.piece, length, self.fin and ends)
            size += wire
        return size


class Recovery:
    """Packets of one session under way (RFC 9002, appendix A, R-6-1)."""

    __slots__ = (
        "_acked_until",
        "_declared",
        "_loss_at",
        "_saved",
        "app_limited",
        "congestion",
        "first_here",
        "in_flight",
        "largest_acked",
        "last_sent_at",
        "lost_packets",
        "packet_threshold",
        "probe_timeouts",
        "probes",
        "pto_count",
        "rtt",
        "sent",
        "sizer",
        "spurious",
        "trace",
        "waiting_since",
    )

    def __init__(self, rtt: RttEstimator, congestion: Congestion, sizer: Sizer) -> None:
        self.rtt = rtt
        self.congestion = congestion
        self.sizer = sizer
        """The path's: is told what became of large packets."""
        self.sent: list[Sent] = []
        """Ascending by number; no entry without a bit left."""
        self.in_flight = 0
        """Bytes under way on the present path."""
        self.first_here = 0
        """The first number on the present path (5)."""
        self.largest_acked = -1
        self.last_sent_at = 0.0
        self.pto_count = 0
        self.probes = 0
        """Packets that may leave now whatever the window says."""
        self.app_limited = True
        """The window was not used up when the sender last stopped: it must not grow (RFC 9002 §7.8)."""
        self.waiting_since: float | None = None
        """Since when packets are under way without an ACK of anything new."""
        self.lost_packets = 0
        self.spurious = 0
        """Of `lost_packets`, those that came after all, within a round trip."""
        self.packet_threshold = K_PACKET_THRESHOLD
        # first number, bits, when they were declared lost
        self._declared: Sequence[tuple[int, int, float]] = ()
        self._saved: tuple[float, ...] | None = None  # of the controller, before the oldest of these
        self.trace: Trace | None = None
        """Who is told of losses and timeouts; nobody, as a rule."""
        self.probe_timeouts = 0
        self._loss_at: float | None = None
        self._acked_until = -1.0  # latest send time among the acknowledged

    @property
    def in_recovery(self) -> bool:
        """Whether nothing that left after the last reduction was acknowledged yet (RFC 9002 §7.3.2)."""
        return 0.0 <= self.congestion.recovery_start >= self._acked_until

    def on_sent(self, sent: Sent) -> None:
        """Something that asks for an ACK left."""
        self.sent.append(sent)
        self.in_flight += (sent.count - 1) * sent.size + sent.last_size
        self.last_sent_at = sent.time
        if self.waiting_since is None:
            self.waiting_since = sent.time

    def move(self, first: int, rtt: RttEstimator, congestion: Congestion, sizer: Sizer) -> None:
        """Packets from number `first` on take another path, of which these three tell (5)."""
        self.first_here = first
        self.sizer = sizer
        self.in_flight = 0
        self.rtt, self.congestion = rtt, congestion
        self.packet_threshold, self._declared, self._saved = K_PACKET_THRESHOLD, (), None
        self.pto_count = 0

    def probe(self) -> None:
        """Two packets may leave whatever the window says, with the oldest bytes under way (RFC 9002 §6.2.4)."""
        self.probes = wanted = PROBE_PACKETS
        for sent in self.sent:
            bits = sent.left if sent.first != self.sizer.probe else 0
            while bits and wanted:
                lowest = bits & -bits
                sent.tell(lowest, acked=False)
                bits ^= lowest
                wanted -= 1
            if not wanted:
                break

    def on_ack(self, ranges: list[tuple[int, int]], ack_delay: float, now: float) -> bool:
        """An ACK came: half-open ranges, the highest first. Whether it acknowledged anything new.

        That no number in it was left out or lies ahead of us is the caller's to check.
        """
        largest = ranges[0][1] - 1
        self.largest_acked = max(self.largest_acked, largest)
        acked_before = self._acked_until
        at = len(ranges) - 1
        looked = acked = here = holes = 0
        newest: Sent | None = None
        first_acked_at = float("inf")
        arrived: list[tuple[int, float]] = []
        above, large_at = self.sizer.above, -1.0
        for sent in self.sent:
            if sent.first > largest:
                break
            looked += 1
            while ranges[at][1] <= sent.first:
                at -= 1
            bits = sent.left & _covered(sent, ranges, at)
            sent.left ^= bits
            holes += sent.left != 0
            if not bits:
                continue
            size = sent.tell(bits, acked=True)
            acked += size
            if sent.first >= self.first_here:
                here += size
                arrived.append((size, sent.time))
                if sent.last_size > above or (sent.size > above and bits != 1 << (sent.count - 1)):
                    large_at = sent.time
            self._acked_until = max(self._acked_until, sent.time)
            first_acked_at = min(first_acked_at, sent.time)
            if bits >> (largest - sent.first) & 1 and sent.first >= self.first_here:
                newest = sent
        if self._declared:
            self._look_for_late(ranges, now)
        if not acked:
            return False
        if newest is not None:
            latest = max(now - newest.time, 1e-6)
            self.rtt.on_sample(latest, ack_delay)
            self.congestion.on_sample(latest, newest.time, now)
        self.in_flight -= here
        self.pto_count = 0
        self.probes = 0
        if large_at >= 0.0:
            self.sizer.on_passed(large_at)
        if holes:
            self._detect_lost(now, acked_before, first_acked_at)
        else:
            self._loss_at = None
            del self.sent[:looked]
        if self.sizer.missing:
            self.sizer.judge(self._acked_until, self.rtt.smoothed, now)
        self._grow(arrived, now)  # after the losses, as in RFC 9002 appendix A.7
        self.waiting_since = now if self.sent else None
        return True

    def _declare(self, first: int, bits: int, now: float) -> None:
        """These are lost, it seems."""
        if not self._declared:
            self._saved = self.congestion.save()
        elif len(self._declared) == MAX_DECLARED:
            self._saved = None  # so many are no mistake
        self._declared = [*self._declared[1 - MAX_DECLARED :], (first, bits, now)]

    def _look_for_late(self, ranges: list[tuple[int, int]], now: float) -> None:
        """What was declared lost and came after all had only been overtaken: wait for more packets the next time, or
        longer, up to twice as much at once (6). Owners hear nothing: it was said again (2).
        """
        keep = []
        for first, bits, at in self._declared:
            if now - at > self.rtt.smoothed:
                self._saved = None  # one at least was lost
                continue
            late = bits & _numbers(first, bits.bit_length(), ranges)
            if late:
                self.spurious += late.bit_count()
                overtaken = self.largest_acked - first - ((late & -late).bit_length() - 1)
                wanted = min(overtaken + 1, 2 * self.packet_threshold, MAX_PACKET_THRESHOLD)
                if wanted > self.packet_threshold:
                    self.packet_threshold = wanted
                else:
                    self.rtt.time_threshold = min(2 * self.rtt.time_threshold - 1, MAX_TIME_THRESHOLD)
            if bits != late:
                keep.append((first, bits ^ late, at))
        self._declared = keep
        if self._saved is not None and not keep:
            self.congestion.restore(self._saved)
            self._saved = None

    def _grow(self, arrived: list[tuple[int, float]], now: float) -> None:
        """Tell congestion control of bytes and when they were sent, in one word."""
        start = self.congestion.recovery_start
        size = sum([size for size, sent_at in arrived if sent_at > start])
        if self.app_limited:
            self.congestion.on_acked(0, self.rtt.smoothed, now)
        elif size:
            self.congestion.on_acked(size, self.rtt.smoothed, now)

    def _detect_lost(self, now: float, after: float, before: float) -> None:
        """RFC 9002 §6.1. Losses sent between `after` and `before` may make persistent congestion (§7.6)."""
        self._loss_at = None
        delay = self.rtt.loss_delay()
        largest = self.largest_acked
        keep: list[Sent] = []
        looked = lost = unknown = probed = 0
        start, here, sizer = self.congestion.recovery_start, self.first_here, self.sizer
        oldest = latest = newest = -1.0
        for sent in self.sent:
            if sent.first > largest:
                break
            looked += 1
            below = largest - sent.first  # numbers of this entry below the largest acknowledged
            if sent.time + delay > now:  # not now - delay: the timer must find the same sum
                if sent.left & ((1 << min(below, sent.count)) - 1):
                    self._loss_at = min(self._loss_at or float("inf"), sent.time + delay)
                below -= self.packet_threshold - 1
            bits = sent.left & ((1 << min(max(below, 0), sent.count)) - 1)
            if bits:
                sent.left ^= bits
                if self.trace is not None:
                    self.trace.lost(sent, bits, sent.time + delay <= now, now)
                if sent.first < here:  # (5)
                    sent.tell(bits, acked=False)
                    self.lost_packets += bits.bit_count()
                    keep += [sent] if sent.left else []
                    continue
                if sent.first == sizer.probe:  # (4)
                    probed += sent.tell(bits, acked=False)
                    continue
                if sent.size > sizer.above:
                    sizer.on_missing(sent.larger(bits, sizer.above), sent.time)
                elif sizer.missing and sent.size > MIN_DATAGRAM:
                    sizer.missing_base += 1
                size = sent.tell(bits, acked=False)
                self.lost_packets += bits.bit_count()
                lost += size
                if sent.time > start:
                    unknown += size
                self._declare(sent.first, bits, now)
                newest = sent.time
                if after < sent.time < before:
                    oldest = sent.time if oldest < 0.0 else oldest
                    latest = sent.time
            if sent.left:
                keep.append(sent)
        self.sent[:looked] = keep
        self.in_flight -= probed
        if not lost:
            return
        self.in_flight -= lost
        self.congestion.on_congestion(newest, now, unknown)
        if self.rtt.sampled and latest - oldest > self.rtt.pto() * K_PERSISTENT_CONGESTION_THRESHOLD:
            self.congestion.on_persistent_congestion()
            self._saved = None

    def next_timeout(self) -> float | None:
        """When `on_timeout` is to be called."""
        if self._loss_at is not None:
            return self._loss_at
        if not self.sent:
            return None
        return self.last_sent_at + self.probe_interval()

    def probe_interval(self) -> float:
        """Seconds from the last packet to the next probe."""
        pto = self.rtt.pto()
        if not self.pto_count:
            return pto
        return float(min(pto * 2 ** min(self.pto_count, MAX_BACKOFF), max(pto, MAX_PROBE_INTERVAL)))

    def on_timeout(self, now: float) -> None:
        """The time of `next_timeout` has come."""
        if self._loss_at is not None and self._loss_at <= now:
            self._detect_lost(now, now, now)
            return
        deadline = self.next_timeout()
        if deadline is None or deadline > now:
            return
        self.pto_count += 1
        self.probe_timeouts += 1
        if self.trace is not None:
            self.trace.expired(self, now)
        self.probe()

    def forget(self) -> None:
        """The session is over: owners hear nothing more."""
        self.sent.clear()
        self.in_flight = 0
        self._loss_at = None
        self._declared = ()


def _covered(sent: Sent, ranges: list[tuple[int, int]], at: int) -> int:
    """The bits of `sent` that ranges `at`, `at` - 1, … cover; ranges[at] ends above sent.first."""
    first, stop = sent.first, sent.first + sent.count
    low, high = ranges[at]
    if low <= first and stop <= high:
        return (1 << sent.count) - 1
    bits = 0
    while low < stop:
        low, high = max(low, first), min(high, stop)
        bits |= (1 << (high - low)) - 1 << (low - first)
        at -= 1
        if at < 0:
            break
        low, high = ranges[at]
    return bits


def _numbers(first: int, count: int, ranges: list[tuple[int, int]]) -> int:
    """As `_covered`, of any numbers and from the highest range on."""
    bits, stop = 0, first + count
    for low, high in ranges:
        if high <= first:
            break
        low, high = max(low, first), min(high, stop)
        if low < high:
            bits |= (1 << (high - low)) - 1 << (low - first)
    return bits
