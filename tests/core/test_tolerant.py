"""stp.core.tolerant: promises (1) to (4) of its head, with numbers worked out by hand.

Packets have 1,000 bytes, so that a window in thousands of bytes is one in packets. Times are seconds.
"""

from __future__ import annotations

import pytest

from stp.core.cubic import N_RTT_SAMPLE, Cubic
from stp.core.tolerant import HALF, PEAK_DECAY, QUEUE_FLOOR, SHORTEST_FOR, Tolerant

PACKET = 1000


def controller(*round_trips: float, window: int = 100) -> Tolerant:
    """Had these round trips, each a round of its own, and has a window of `window` packets."""
    found = Tolerant(PACKET)
    for n, latest in enumerate(round_trips):
        meet(found, latest, float(n))
    found.cwnd = window * PACKET
    return found


def meet(tolerant: Tolerant, latest: float, now: float, *, ends: bool = True) -> None:
    """Eight round trips in a row, the last of which ends a round."""
    for n in range(N_RTT_SAMPLE):
        tolerant.on_sample(latest, now if ends and n == N_RTT_SAMPLE - 1 else -1.0, now)


def test_a_loss_without_a_queue_costs_what_was_lost() -> None:
    """Promise (2), R-6-8. Cubic would be at 70."""
    tolerant = controller(0.030, 0.031)
    tolerant.on_congestion(9.9, 10.0, 3 * PACKET)
    assert (tolerant.cwnd, tolerant.slow_start, tolerant.spared) == (97_000, False, 1)


def test_a_loss_with_a_queue_is_cubics() -> None:
    """Promise (1), R-6-2: the same window, the same curve."""
    tolerant, cubic = controller(0.030, 0.060), Cubic(PACKET)
    cubic.cwnd = tolerant.cwnd
    for one in (tolerant, cubic):
        one.on_congestion(9.9, 10.0, 3 * PACKET)
        one.on_acked(7000, 0.06, 10.1)
        one.on_acked(7000, 0.06, 14.0)
        one.on_congestion(10.0, 14.1, PACKET)  # left before the reduction
    assert tolerant.cwnd == cubic.cwnd > 70_000
    assert tolerant.spared == 0


def test_before_any_round_trip_there_is_doubt() -> None:
    tolerant = controller()
    tolerant.on_congestion(0.9, 1.0, PACKET)
    assert tolerant.cwnd == 70_000


def test_a_round_costs_at_most_what_cubic_takes() -> None:
    """Half the window is lost in two steps, then more of what left later."""
    tolerant = controller(0.030)
    tolerant.on_congestion(9.8, 10.0, 25 * PACKET)
    assert tolerant.cwnd == 75_000
    tolerant.on_congestion(9.9, 10.01, 25 * PACKET)
    assert tolerant.cwnd == 70_000
    tolerant.on_congestion(10.01, 10.04, 50 * PACKET)
    assert tolerant.cwnd == 49_000


def test_the_window_never_falls_below_two_packets() -> None:
    tolerant = controller(0.030, window=3)
    for n in range(5):
        tolerant.on_congestion(10.0 + n, 10.5 + n, 2 * PACKET)
    assert tolerant.cwnd == 2000


def test_what_was_reduced_for_a_queue_is_not_reduced_again() -> None:
    tolerant = controller(0.030, 0.060)
    tolerant.on_congestion(9.9, 10.0, PACKET)
    meet(tolerant, 0.030, 10.01)
    tolerant.on_congestion(9.95, 10.01, PACKET)
    assert tolerant.cwnd == 70_000


def test_growth_starts_anew_towards_what_was_known() -> None:
    """Congestion at 100 packets, 70 since; a loss without a queue then leaves 69, and the curve leads to 100 again:
    K = ∛(31 / 0.4) = 4.263 s, 21 round trips. A curve that began flat at 69 would be at 90 by then, as Reno.
    """
    tolerant = controller(0.030, 0.060)
    tolerant.on_congestion(9.9, 10.0, PACKET)
    meet(tolerant, 0.030, 10.2)
    tolerant.on_congestion(10.2, 10.3, PACKET)
    assert tolerant.cwnd == 69_000
    for n in range(214):
        tolerant.on_acked(tolerant.cwnd // 10, 0.2, 20.0 + 4.263 * n / 213)
    assert tolerant.cwnd == pytest.approx(100_000, rel=0.01)


def test_a_packet_a_round_trip_is_regained() -> None:
    """Promise (2): growth of one packet for each window that arrived, not CUBIC's 0.53 below its last window."""
    tolerant = controller(0.030, window=20)
    for n in range(10):
        before = tolerant.cwnd
        tolerant.on_congestion(10.0 + n, 10.1 + n, PACKET)
        assert tolerant.cwnd == before - PACKET
        tolerant.on_acked(tolerant.cwnd, 0.03, 10.2 + n)
        assert tolerant.cwnd == pytest.approx(before, abs=20)


# -- what is evidence


@pytest.mark.parametrize(
    ("shortest", "peak", "evidence"),
    [
        (0.030, 0.030, QUEUE_FLOOR),  # nothing but our own bursts so far
        (0.030, 0.037, 0.0035),  # half of a queue of 7 ms
        (0.030, 0.060, 0.004),  # RFC 9406's least
        (0.100, 0.106, QUEUE_FLOOR),
        (0.100, 0.116, 0.008),
        (0.100, 0.200, 0.0125),  # an eighth
        (0.200, 0.400, 0.016),  # RFC 9406's most
        (0.004, 0.004, 0.002),  # half of a round trip: on short paths Cubic does as well
    ],
)
def test_evidence_of_a_queue(shortest: float, peak: float, evidence: float) -> None:
    """Promise (3), R-6-8."""
    for excess, seen in ((evidence - 1e-4, False), (evidence + 1e-4, True)):
        tolerant = controller(shortest, peak)
        tolerant._peak = peak  # that of this very round
        meet(tolerant, shortest + excess, 2.0, ends=False)
        assert tolerant.queue_seen() is seen


def test_late_acks_are_no_queue() -> None:
    """Promise (4): a busy processor delays some, a queue delays all."""
    tolerant = controller(0.030)
    for _ in range(HALF):
        tolerant.on_sample(0.080, -1.0, 1.0)
        assert not tolerant.queue_seen()
    assert tolerant._peak == pytest.approx(0.030)
    tolerant.on_sample(0.080, -1.0, 1.0)
    assert tolerant.queue_seen()


def test_the_peak_is_forgotten_by_rounds() -> None:
    """An eighth of the way to each round's longest; within a round nothing is forgotten."""
    tolerant = controller(0.030, 0.070)
    for n in range(20):
        meet(tolerant, 0.030, 1.5 + 0.01 * n, ends=False)
    assert tolerant._peak == pytest.approx(0.070)
    meet(tolerant, 0.030, 3.0)  # ends the round of 70 ms
    meet(tolerant, 0.030, 4.0)
    assert tolerant._peak == pytest.approx(0.030 + 0.040 * (1 - 1 / PEAK_DECAY))
    for n in range(5, 60):
        meet(tolerant, 0.030, float(n))
    assert tolerant._peak < 0.031


def test_the_shortest_round_trip_is_forgotten() -> None:
    """Another route is longer for good: after two periods that is no queue any more."""
    tolerant = controller(0.030)
    seen = []
    for period in (0.5, 1.5, 2.5):
        for n in range(60):
            meet(tolerant, 0.045, period * SHORTEST_FOR + n)
        seen.append(tolerant.queue_seen())
    assert seen == [True, True, False]


def test_persistent_congestion_forgets_the_path() -> None:
    """RFC 9002 §5.2."""
    tolerant = controller(0.030, 0.090)
    tolerant.on_congestion(9.9, 10.0, PACKET)
    tolerant.on_persistent_congestion()
    assert (tolerant.cwnd, tolerant.slow_start, tolerant.queue_seen()) == (2000, True, True)
    meet(tolerant, 0.090, 20.0)
    assert not tolerant.queue_seen()
