"""CUBIC (RFC 9438) with HyStart++ (RFC 9406): how fast a window grows by the clock, not by the round trip.

The names are those of the RFCs: windows are floats in packets, times seconds, `K` and `t` count from the start of the
present congestion avoidance. Above congestion.py, behind the same methods as NewReno; its cost is per ACK.

(1) The window grows only by what arrived while it was in use, and the curve stands still in between (§5.8).
(2) One reduction for all that was lost of what left before it, as in RFC 9002 §7.3.2.
"""

from __future__ import annotations

from math import cbrt, inf
from typing import Final

from stp.core.congestion import K_MINIMUM_WINDOW_PACKETS, initial_window

C: Final = 0.4
"""Packets per second³ (RFC 9438 §5)."""
BETA_CUBIC: Final = 0.7  # RFC 9438 §4.6
ALPHA_CUBIC: Final = 3 * (1 - BETA_CUBIC) / (1 + BETA_CUBIC)
"""Packets per round trip that make additive growth with BETA_CUBIC as strong as Reno (RFC 9438 §4.3)."""
MAX_TARGET: Final = 1.5
"""How far above the window the curve may point (RFC 9438 §4.2)."""

MIN_RTT_THRESH: Final = 0.004
MAX_RTT_THRESH: Final = 0.016
MIN_RTT_DIVISOR: Final = 8
N_RTT_SAMPLE: Final = 8
CSS_GROWTH_DIVISOR: Final = 4
CSS_ROUNDS: Final = 5
"""RFC 9406 §4.3; L, the limit for unpaced senders, is infinite here."""


def rtt_thresh(rtt: float) -> float:
    """Seconds above `rtt` that are a queue (RFC 9406 §4.2)."""
    return max(MIN_RTT_THRESH, min(rtt / MIN_RTT_DIVISOR, MAX_RTT_THRESH))


class HyStart:
    """HyStart++ (RFC 9406 §4.2): a round trip that grows tells that the queue does, before it overflows.

    A round is known by time instead of windowEnd: it is over when something arrives that was sent after its start.
    """

    __slots__ = (
        "_css_baseline_min_rtt",
        "_css_rounds",
        "_current_round_min_rtt",
        "_last_round_min_rtt",
        "_round_start",
        "_rtt_sample_count",
        "css",
    )

    def __init__(self) -> None:
        self.css = False
        """Conservative Slow Start: growth is divided while it is not sure yet that the queue grows."""
        self._round_start = -inf
        self._last_round_min_rtt = inf
        self._current_round_min_rtt = inf
        self._rtt_sample_count = 0
        self._css_baseline_min_rtt = inf
        self._css_rounds = 0

    def on_sample(self, latest: float, sent_at: float, now: float) -> bool:
        """A round trip of `latest` for what left at `sent_at`. Whether slow start is over."""
        current = self._current_round_min_rtt = min(self._current_round_min_rtt, latest)
        self._rtt_sample_count += 1
        if self._rtt_sample_count >= N_RTT_SAMPLE:
            if self.css:
                if current < self._css_baseline_min_rtt:  # it was jitter
                    self.css = False
            else:
                last = self._last_round_min_rtt
                if current >= last + rtt_thresh(last):
                    self.css = True
                    self._css_baseline_min_rtt = current
                    self._css_rounds = 0
        if sent_at < self._round_start:
            return False
        self._round_start = now
        self._last_round_min_rtt = current
        self._current_round_min_rtt = inf
        self._rtt_sample_count = 0
        self._css_rounds += 1  # the round in which it began counts too
        return self.css and self._css_rounds >= CSS_ROUNDS


class Cubic:
    """RFC 9438 §4 (R-6-2)."""

    __slots__ = (
        "_K",
        "_W_est",
        "_W_max",
        "_cwnd",
        "_cwnd_prior",
        "_epoch_start",
        "_hystart",
        "_packet",
        "_unused_since",
        "cwnd",
        "recovery_start",
        "ssthresh",
    )

    def __init__(self, packet: int) -> None:
        self._packet = packet
        self.cwnd = initial_window(packet)
        self.ssthresh: float = inf
        self.recovery_start = -1.0
        self._hystart = HyStart()
        self._W_max = 0.0  # 0: not known, as after slow start without a loss (§4.10) or a timeout (§4.8)
        self._cwnd_prior = 0.0
        self._epoch_start = -1.0  # start of the present congestion avoidance; negative: there is none
        self._unused_since = -1.0  # negative: in use
        self._cwnd = 0.0  # the window in packets; the three below belong to the epoch
        self._W_est = 0.0
        self._K = 0.0

    @property
    def slow_start(self) -> bool:
        return self.cwnd < self.ssthresh

    def on_sample(self, latest: float, sent_at: float, now: float) -> None:
        """HyStart++ ends the first slow start only (RFC 9406 §4.3)."""
        if self.ssthresh == inf and self._hystart.on_sample(latest, sent_at, now):
            self.ssthresh = self.cwnd

    def on_acked(self, size: int, smoothed: float, now: float) -> None:
        """§4.2 to §4.5."""
        if not size:
            if self._unused_since < 0.0:
                self._unused_since = now
            return
        if self.cwnd < self.ssthresh:
            css = self._hystart.css and self.ssthresh == inf
            self.cwnd += size // CSS_GROWTH_DIVISOR if css else size
            return
        if self._epoch_start < 0.0:
            self._begin(now)
        elif self._unused_since >= 0.0:
            self._epoch_start += now - self._unused_since  # §5.8
        self._unused_since = -1.0
        cwnd, t = self._cwnd, now - self._epoch_start
        arrived = size / self._packet / cwnd  # in windows
        self._W_est += arrived * (ALPHA_CUBIC if self._W_est < self._cwnd_prior else 1.0)
        if self._W_cubic(t) < self._W_est:  # §4.3: Reno would be faster
            self._cwnd = max(cwnd, self._W_est)
        else:  # §4.4, §4.5
            target = min(max(self._W_cubic(t + smoothed), cwnd), MAX_TARGET * cwnd)
            self._cwnd = cwnd + arrived * (target - cwnd)
        self.cwnd = int(self._cwnd * self._packet)

    def _begin(self, now: float) -> None:
        """Congestion avoidance starts with the first arrival after a reduction or after slow start (§4.2)."""
        cwnd = self._cwnd = self._W_est = self.cwnd / self._packet
        self._epoch_start = now
        if self._W_max <= cwnd:  # not known, or smaller windows are not allowed
            self._W_max = cwnd
        self._K = cbrt((self._W_max - cwnd) / C)

    def _W_cubic(self, t: float) -> float:  # noqa: N802
        return C * (t - self._K) ** 3 + self._W_max

    def on_congestion(self, sent_at: float, now: float, size: int = 0) -> None:
        """§4.6, §4.7."""
        if sent_at <= self.recovery_start:
            return
        self.recovery_start = now
        cwnd = self._cwnd_prior = self.cwnd / self._packet
        self._W_max = cwnd * (1 + BETA_CUBIC) / 2 if cwnd < self._W_max else cwnd  # fast convergence
        self.cwnd = max(int(self.cwnd * BETA_CUBIC), K_MINIMUM_WINDOW_PACKETS * self._packet)
        self.ssthresh = self.cwnd
        self._epoch_start = -1.0

    def save(self) -> tuple[float, ...]:
        return self.cwnd, self.ssthresh, self._W_max, self._cwnd_prior

    def restore(self, saved: tuple[float, ...]) -> None:
        """§4.9.2; the curve begins anew."""
        cwnd, self.ssthresh, self._W_max, self._cwnd_prior = saved
        self.cwnd = max(self.cwnd, int(cwnd))
        self._epoch_start = -1.0

    def on_persistent_congestion(self) -> None:
        """RFC 9002 §7.6.2; RFC 9438 §4.8."""
        self.cwnd = K_MINIMUM_WINDOW_PACKETS * self._packet
        self.recovery_start = -1.0
        self._W_max = 0.0
        self._epoch_start = -1.0

    def on_packet_size(self, packet: int) -> None:
        """RFC 9002 §7.2. The curve is in packets: it begins anew, towards the same bytes."""
        scale = self._packet / packet
        self._W_max *= scale
        self._cwnd_prior *= scale
        self._epoch_start = -1.0
        self._packet = packet
        self.cwnd = max(self.cwnd, K_MINIMUM_WINDOW_PACKETS * packet)
