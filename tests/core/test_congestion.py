"""stp.core.congestion: formulas of RFC 9002 §7 and protocol §6."""

from __future__ import annotations

import pytest

from stp.core.congestion import (
    CATCH_UP,
    MAX_BURST_BYTES,
    MAX_BURST_PACKETS,
    TIMER_GRAIN,
    NewReno,
    Pacer,
    burst_packets,
    pacing_rate,
)


@pytest.mark.parametrize(("packet", "window"), [(1200, 12_000), (1472, 14_720), (9000, 18_000)])
def test_initial_window(packet: int, window: int) -> None:
    """RFC 9002 §7.2: ten packets, but at most 14,720 bytes or two packets."""
    assert NewReno(packet).cwnd == window


def test_slow_start_grows_by_what_was_acknowledged() -> None:
    reno = NewReno(1200)
    reno.on_acked(5000, 0.03, 1.0)
    assert reno.cwnd == 17_000
    assert reno.slow_start


def test_congestion_avoidance_grows_by_a_packet_per_window() -> None:
    reno = NewReno(1200)
    reno.on_congestion(1.0, 2.0)
    assert not reno.slow_start
    assert reno.cwnd == 6000
    for _ in range(5):
        reno.on_acked(1200, 0.03, 3.0)
    assert 6000 + 1200 * 0.85 < reno.cwnd <= 6000 + 1200


def test_one_reduction_per_round_trip() -> None:
    """RFC 9002 §7.3.2: losses of what was sent before the recovery began do not count again."""
    reno = NewReno(1200)
    reno.on_congestion(1.0, 2.0)
    reno.on_congestion(1.9, 2.1)
    reno.on_congestion(2.0, 2.2)
    assert reno.cwnd == 6000
    reno.on_congestion(2.05, 2.3)
    assert reno.cwnd == 3000


def test_a_reduction_ends_slow_start_whatever_the_parity() -> None:
    """The window is whole bytes and ssthresh the same: half a byte between them would be slow start again."""
    reno = NewReno(1200)
    reno.on_acked(1, 0.03, 1.0)
    reno.on_sample(0.03, 0.5, 1.0)  # of no interest to it
    reno.on_congestion(1.0, 2.0)
    assert (reno.cwnd, reno.slow_start) == (6000, False)


def test_the_window_never_falls_below_two_packets() -> None:
    reno = NewReno(1200)
    for n in range(10):
        reno.on_congestion(10.0 * n + 1, 10.0 * n + 2)
    assert reno.cwnd == 2400


def test_persistent_congestion_starts_again() -> None:
    """RFC 9002 §7.6.2: the minimum window, and slow start up to what was known."""
    reno = NewReno(1200)
    reno.on_congestion(1.0, 2.0)
    reno.on_persistent_congestion()
    assert reno.cwnd == 2400
    assert reno.slow_start
    reno.on_acked(1200, 0.03, 0.5)
    assert reno.cwnd == 3600


def test_pacing_rate_is_a_quarter_above_the_window_per_round_trip() -> None:
    assert pacing_rate(100_000, 0.1) == pytest.approx(1_250_000)


@pytest.mark.parametrize(
    ("rate", "cwnd", "packet", "packets"),
    [
        (1e6, 10**9, 1000, 2),  # 2 ms of the rate are 2,000 bytes
        (1e7, 10**9, 1000, 20),
        (1e9, 10**9, 1200, MAX_BURST_PACKETS),
        (1e9, 10**9, 1472, MAX_BURST_BYTES // 1472),  # one GSO send
        (1e9, 48_000, 1200, 10),  # a quarter of the window
        (1e9, 2400, 1200, 2),  # and never less than two
        (1.0, 10**9, 1200, 2),
    ],
)
def test_bursts(rate: float, cwnd: int, packet: int, packets: int) -> None:
    """Protocol §6: clamp(pacing rate × 2 ms, 2, 54 packets), at most cwnd / 4 (R-6-5)."""
    assert burst_packets(rate, cwnd, packet) == packets


def test_the_pacer_spreads_bursts() -> None:
    """R-6-3."""
    pacer = Pacer()
    assert pacer.may_send(5.0)
    pacer.on_sent(10_000, 1e6, 5.0)
    assert pacer.next_at == pytest.approx(5.0 - CATCH_UP + 0.01)
    assert not pacer.may_send(5.0)
    assert pacer.may_send(pacer.next_at - TIMER_GRAIN / 2)


def test_the_pacer_keeps_little_credit() -> None:
    """After an idle hour at most CATCH_UP seconds of the rate leave at once."""
    pacer = Pacer()
    now, sent = 3600.0, 0
    while pacer.may_send(now):
        pacer.on_sent(1000, 1e6, now)
        sent += 1000
    assert sent <= (CATCH_UP + TIMER_GRAIN) * 1e6 + 1000
