"""How much may be under way, and how fast it leaves: NewReno and pacing (RFC 9002 §7, appendix B). Floor 2.

A controller (`Congestion`) is asked for its window and told of round trips, of acknowledged bytes and of losses;
recovery counts what is in flight. CUBIC, the default, fills the same methods in cubic.py.
"""

from __future__ import annotations

from typing import Final, Protocol

K_INITIAL_WINDOW_PACKETS: Final = 10
K_INITIAL_WINDOW_BYTES: Final = 14_720
K_MINIMUM_WINDOW_PACKETS: Final = 2
K_LOSS_REDUCTION_FACTOR: Final = 0.5

PACING_GAIN: Final = 1.25  # RFC 9002 §7.7
BURST_TIME: Final = 0.002
"""Seconds of the pacing rate that one burst may hold (protocol §6)."""
MIN_BURST_PACKETS: Final = 2
MAX_BURST_PACKETS: Final = 54
MAX_BURST_BYTES: Final = 65_000
"""One GSO send is one IP datagram to the kernel: at most 65,507 bytes."""
BURST_SHARE: Final = 4
"""A burst is at most this part of the window."""
TIMER_GRAIN: Final = 0.001
"""Seconds: timers of the drivers are no finer, so what is due within one leaves now."""
CATCH_UP: Final = 0.002
"""Seconds of pacing credit kept when the timer was late or the application slow."""


class Congestion(Protocol):
    """What recovery and pacing know of a controller. Times are seconds. Called per ACK, never per packet."""

    cwnd: int
    """Bytes that may be in flight."""
    ssthresh: float
    """Bytes below which the window grows by all that arrives; infinite while it is not known."""
    recovery_start: float
    """When the window was last reduced: what left at that time or before neither grows nor reduces it again."""

    @property
    def slow_start(self) -> bool: ...

    def on_sample(self, latest: float, sent_at: float, now: float) -> None:
        """A round trip took `latest`, the peer's delay included, for what left at `sent_at`."""

    def on_acked(self, size: int, smoothed: float, now: float) -> None:
        """`size` bytes that left after `recovery_start` arrived; 0 if the window was not in use (RFC 9002 §7.8)."""

    def on_congestion(self, sent_at: float, now: float, size: int = 0) -> None:
        """`size` bytes that left after `recovery_start` were lost; the newest of what was lost left at `sent_at`."""

    def on_persistent_congestion(self) -> None:
        """Nothing arrived for so long that all is to be found out again (RFC 9002 §7.6)."""

    def save(self) -> tuple[float, ...]:
        """What a loss changes, before it does."""

    def restore(self, saved: tuple[float, ...]) -> None:
        """All that was lost since `save` came after all: the window is at least what it was (RFC 9438 §4.9)."""

    def on_packet_size(self, packet: int) -> None:
        """Full packets have `packet` bytes from now on."""


def initial_window(packet: int) -> int:
    """RFC 9002 §7.2, for packets of `packet` bytes."""
    return min(
        K_INITIAL_WINDOW_PACKETS * packet,
        max(K_INITIAL_WINDOW_BYTES, K_MINIMUM_WINDOW_PACKETS * packet),
    )


class NewReno:
    """RFC 9002 appendix B."""

    __slots__ = ("_packet", "cwnd", "recovery_start", "ssthresh")

    def __init__(self, packet: int) -> None:
        self._packet = packet
        self.cwnd = initial_window(packet)
        self.ssthresh: float = float("inf")
        self.recovery_start = -1.0

    @property
    def slow_start(self) -> bool:
        return self.cwnd < self.ssthresh

    def on_sample(self, latest: float, sent_at: float, now: float) -> None:
        """Of no interest here."""

    def on_acked(self, size: int, smoothed: float, now: float) -> None:
        """RFC 9002 §7.3."""
        if self.cwnd < self.ssthresh:
            self.cwnd += size
        else:
            self.cwnd += self._packet * size // self.cwnd

    def on_congestion(self, sent_at: float, now: float, size: int = 0) -> None:
        """One reduction per round trip (RFC 9002 §7.3.2)."""
        if sent_at <= self.recovery_start:
            return
        self.recovery_start = now
        self.cwnd = max(int(self.cwnd * K_LOSS_REDUCTION_FACTOR), K_MINIMUM_WINDOW_PACKETS * self._packet)
        self.ssthresh = self.cwnd

    def on_persistent_congestion(self) -> None:
        """RFC 9002 §7.6.2."""
        self.cwnd = K_MINIMUM_WINDOW_PACKETS * self._packet
        self.recovery_start = -1.0

    def save(self) -> tuple[float, ...]:
        return self.cwnd, self.ssthresh

    def restore(self, saved: tuple[float, ...]) -> None:
        cwnd, self.ssthresh = saved
        self.cwnd = max(self.cwnd, int(cwnd))

    def on_packet_size(self, packet: int) -> None:
        """RFC 9002 §7.2: the least window is two packets."""
        self._packet = packet
        self.cwnd = max(self.cwnd, K_MINIMUM_WINDOW_PACKETS * packet)


class Pacer:
    """Spreads a window over a round trip, in bursts (protocol §6, R-6-3)."""

    __slots__ = ("next_at",)

    def __init__(self) -> None:
        self.next_at = 0.0
        """When the next burst may leave; in the past: at once."""

    def may_send(self, now: float) -> bool:
        return self.next_at <= now + TIMER_GRAIN

    def on_sent(self, size: int, rate: float, now: float) -> None:
        """A burst of `size` bytes left; `rate` in bytes per second."""
        self.next_at = max(self.next_at, now - CATCH_UP) + size / rate


def pacing_rate(cwnd: int, smoothed_rtt: float) -> float:
    """Bytes per second (RFC 9002 §7.7)."""
    return PACING_GAIN * cwnd / max(smoothed_rtt, 1e-6)


def burst_packets(rate: float, cwnd: int, packet: int) -> int:
    """Packets of one burst (protocol §6): two always may go, or the smallest window could not be used (R-6-5)."""
    size = min(int(rate * BURST_TIME), cwnd // BURST_SHARE, MAX_BURST_BYTES)
    most = max(MAX_BURST_BYTES // packet, 1)
    return min(max(size // packet, MIN_BURST_PACKETS), MAX_BURST_PACKETS, most)
