"""CUBIC that asks of every loss whether it came with a queue: the controller that sessions have by default.

A window that falls to 0.7 at each loss is √(1.5 / p) packets on average, whatever the link could carry. Of 10 Mbit/s
at 30 ms that is a quarter where p = 2 % are lost by the link itself (radio, long wires). But what a full queue drops,
it drops when round trips are at their longest, and what a bad link loses, it loses at any time.

(1) A loss with a queue is answered as RFC 9438 says (R-6-2). Whenever there is doubt, there was one.
(2) A loss without a queue costs what was lost (the conservation of packets), and never more than (1) would per round
    trip. Growth starts anew from there, so that about one packet a round trip may be lost for ever: 1 / p packets.
(3) The longest round trip of late tells how deep the queue is: half of it is evidence, if that is more than our own
    bursts make, and what RFC 9406 takes for a queue is evidence in any case (R-6-8).
(4) Every round trip here is the shortest of four to eight in a row: a queue delays all that come behind one another,
    a busy processor or a radio some.

Above cubic.py; its cost is per ACK.
"""

from __future__ import annotations

from math import inf
from typing import Final

from stp.core.congestion import BURST_TIME, K_MINIMUM_WINDOW_PACKETS, TIMER_GRAIN
from stp.core.cubic import BETA_CUBIC, N_RTT_SAMPLE, Cubic, rtt_thresh

QUEUE_FLOOR: Final = BURST_TIME + TIMER_GRAIN
"""Seconds of a round trip above the shortest one that our own bursts and the grain of timers make."""
HALF: Final = N_RTT_SAMPLE // 2
SHARE_OF_PEAK: Final = 0.5
PEAK_DECAY: Final = 8
"""The longest round trip of late moves by an eighth towards that of a round, when this one is shorter."""
SHORTEST_FOR: Final = 300.0
"""Seconds: the shortest round trip is that of the last one or two of these periods. Routes change."""


class Tolerant(Cubic):
    """RFC 9438, but for losses without a queue."""

    __slots__ = (
        "_before",
        "_floor",
        "_latest",
        "_peak",
        "_period_end",
        "_recent",
        "_recent_before",
        "_recent_count",
        "_round_peak",
        "_round_start",
        "_sample_round",
        "_shortest",
        "spared",
    )

    def __init__(self, packet: int) -> None:
        super().__init__(packet)
        self.spared = 0
        """Losses (ACKs that told of any) that were taken for those of a bad link."""
        self._latest = inf  # (4)
        # the shortest of up to HALF round trips, and of HALF before them
        self._recent = self._recent_before = inf
        self._recent_count = 0
        self._shortest = self._before = inf  # round trips: of this period, of the one before
        self._period_end = -inf
        self._peak = self._round_peak = 0.0
        self._sample_round = (
            -inf
        )  # a round of samples is over when something arrives that left after its start
        self._round_start = -inf  # the same for losses
        self._floor = 0  # bytes: what (2) leaves of the window in this round

    def on_sample(self, latest: float, sent_at: float, now: float) -> None:
        super().on_sample(latest, sent_at, now)
        self._recent = min(self._recent, latest)
        latest = self._latest = min(self._recent, self._recent_before)
        self._recent_count += 1
        if self._recent_count == HALF:
            self._recent_count = 0
            self._recent_before, self._recent = self._recent, inf
        if latest < self._shortest:
            self._shortest = latest
        if latest > self._round_peak:
            self._round_peak = latest
            self._peak = max(self._peak, latest)
        if sent_at < self._sample_round:
            return
        self._peak -= (self._peak - self._round_peak) / PEAK_DECAY
        self._sample_round = now
        self._round_peak = latest
        if now >= self._period_end:
            self._period_end = now + SHORTEST_FOR
            self._before, self._shortest = self._shortest, latest

    def queue_seen(self) -> bool:
        """Whether the latest round trip bears witness of a queue (3); also when there was none yet."""
        shortest = min(self._shortest, self._before)
        if shortest == inf:
            return True
        evidence = max(QUEUE_FLOOR, SHARE_OF_PEAK * (self._peak - shortest))
        return self._latest - shortest >= min(evidence, rtt_thresh(shortest), shortest / 2)

    def on_congestion(self, sent_at: float, now: float, size: int = 0) -> None:
        """(1), (2)."""
        if sent_at <= self.recovery_start:
            return
        if self.queue_seen():
            super().on_congestion(sent_at, now, size)
            return
        self.spared += 1
        if sent_at > self._round_start:
            self._round_start = now
            self._floor = max(int(self.cwnd * BETA_CUBIC), K_MINIMUM_WINDOW_PACKETS * self._packet)
        self.cwnd = max(self.cwnd - size, min(self._floor, self.cwnd))
        self.ssthresh = self.cwnd
        self._cwnd_prior = self.cwnd / self._packet
        self._epoch_start = -1.0

    def on_persistent_congestion(self) -> None:
        """Also forgets what round trips were like: the path may be another one (RFC 9002 §5.2)."""
        super().on_persistent_congestion()
        self._latest = self._recent = self._recent_before = inf
        self._shortest = self._before = inf
        self._peak = self._round_peak = 0.0
        self._period_end = self._round_start = -inf
