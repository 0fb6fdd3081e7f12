"""stp.core.cubic: RFC 9438 and RFC 9406, with numbers worked out by hand; promises (1), (2) of the head.

Packets have 1,000 bytes, so that a window in thousands of bytes is one in packets.
"""

from __future__ import annotations

import pytest

from stp.core.cubic import CSS_ROUNDS, N_RTT_SAMPLE, Cubic, HyStart
from stp.core.endpoint import CONTROLLERS
from stp.core.errors import UsageError
from tests.sim import Network

PACKET = 1000


def reduced(window: int, before: int = 0) -> Cubic:
    """A controller that lost something at `window` packets at 1.0 s, and if given earlier at `before`."""
    cubic = Cubic(PACKET)
    if before:
        cubic.cwnd = before * PACKET
        cubic.on_congestion(0.1, 0.2)
    cubic.cwnd = window * PACKET
    cubic.on_congestion(0.9, 1.0)
    return cubic


def use(cubic: Cubic, start: float, end: float, rtt: float) -> None:
    """A window arrives in each round trip, in ten ACKs."""
    steps = round((end - start) / rtt * 10)
    for n in range(steps + 1):
        cubic.on_acked(cubic.cwnd // 10, rtt, start + n * (end - start) / steps)


# -- the curve


def test_initial_window_and_slow_start() -> None:
    cubic = Cubic(1200)
    assert (cubic.cwnd, cubic.slow_start) == (12_000, True)
    cubic.on_acked(5000, 0.03, 1.0)
    assert cubic.cwnd == 17_000


def test_a_loss_takes_three_tenths() -> None:
    """§4.6, and promise (2): what left before the reduction brings no other one."""
    cubic = reduced(100)
    assert (cubic.cwnd, cubic.slow_start) == (70_000, False)
    cubic.on_congestion(1.0, 1.1)
    assert cubic.cwnd == 70_000
    cubic.on_congestion(1.01, 1.2)
    assert cubic.cwnd == 49_000


def test_the_window_never_falls_below_two_packets() -> None:
    cubic = reduced(3)
    cubic.on_congestion(5.0, 6.0)
    assert cubic.cwnd == 2000
    cubic.on_acked(2000, 0.03, 7.0)
    assert cubic.cwnd == 2529
    assert (cubic._W_max, cubic._K) == (2.0, 0.0)  # not 0.85 × 2.1, below the window: the curve begins flat


def test_an_ack_never_shrinks_the_window() -> None:
    """The target of a long round trip was ahead of the curve; a shorter one or Reno's window must not take it back.

    In the second case W_est becomes 70.4, above W_cubic(0.011) = 70.2 and below the window.
    """
    for size, rtt in ((100, 0.001), (40_000, 3.0)):
        cubic = reduced(100)
        for at in (50.0, 50.01):
            cubic.on_acked(7000, 3.0, at)
        before = cubic.cwnd
        assert before == pytest.approx(72_980, abs=50)
        cubic.on_acked(size, rtt, 50.011)
        assert cubic.cwnd == before


def test_the_curve_one_step() -> None:
    """§4.2, §4.4. From 100: K = ∛(30 / 0.4) = 4.2172 s (R-6-2).

    At t = 0: W_est = 70 + 0.5294 × 0.1 = 70.0529 > W_cubic = 70. At t = 1: the target is the curve a round trip
    ahead, W_cubic(1.2) = 100 - 0.4 × 3.0172³ = 89.013; of the way there the share of the window that arrived,
    7 / 70.0529: 71.9475. Aiming at W_cubic(1) = 86.68 would give 71.714, jumping there 89.
    """
    cubic = reduced(100)
    cubic.on_acked(7000, 0.2, 50.0)
    assert cubic.cwnd == 70_052
    cubic.on_acked(7000, 0.2, 51.0)
    assert cubic.cwnd == pytest.approx(71_947, abs=1)


def test_the_curve_over_time() -> None:
    """Plateau at W_max after K = 4.22 s, 30 packets above it after 2 K (§4.2)."""
    cubic = reduced(100)
    use(cubic, 50.0, 52.11, 0.2)
    assert cubic.cwnd == pytest.approx(96_250, rel=0.015)  # 100 - 30 / 8
    use(cubic, 52.13, 54.22, 0.2)
    assert cubic.cwnd == pytest.approx(100_000, rel=0.01)
    use(cubic, 54.24, 58.43, 0.2)
    assert cubic.cwnd == pytest.approx(130_000, rel=0.03)


def test_the_curve_knows_no_round_trips() -> None:
    """After the same time the window is the same for 100 ms and for 400 ms (RFC 9438 §3.2)."""
    near, far = reduced(400), reduced(400)
    for cubic, rtt in ((near, 0.1), (far, 0.4)):
        use(cubic, 50.0, 60.0, rtt)
    assert near.cwnd == pytest.approx(far.cwnd, rel=0.02)


def test_the_target_is_at_most_half_a_window_away() -> None:
    """§4.2: the curve is at 1,700 packets after 20 s, but a round trip brings half a window."""
    cubic = reduced(100)
    cubic.on_acked(0, 0.2, 49.0)  # in recovery: there is no clock yet to hold
    cubic.on_acked(7000, 0.2, 50.0)
    cubic.on_acked(70_053, 0.2, 70.0)
    assert cubic.cwnd == pytest.approx(105_079, abs=2)


def test_never_slower_than_reno() -> None:
    """§4.3. From 10 to 7 packets; α = 3 × 0.3 / 1.7 = 0.5294 a round trip; once W_est was 10 again, one.

    7 + 6 × 0.5294 = 10.1765, then 11.1765. The curve alone would be at 7.4 by then.
    """
    cubic = reduced(10)
    found = []
    for n in range(7):
        cubic.on_acked(round(cubic._cwnd * PACKET) or cubic.cwnd, 0.01, 50.0 + 0.01 * n)
        found.append(cubic.cwnd)
    assert found[0] == 7529
    assert found[5] == pytest.approx(10_176, abs=3)
    assert found[6] == pytest.approx(11_176, abs=4)


def test_fast_convergence() -> None:
    """§4.7: lost at 80 below the 100 of before: W_max = 80 × 1.7 / 2 = 68, K = ∛(12 / 0.4) = 3.107 s."""
    cubic = reduced(80, before=100)
    use(cubic, 50.0, 51.55, 0.2)
    assert cubic.cwnd == pytest.approx(66_500, rel=0.02)  # 68 - 12 / 8; with W_max = 56, 57.5
    use(cubic, 51.57, 53.11, 0.2)
    assert cubic.cwnd == pytest.approx(68_000, rel=0.015)
    plain = reduced(100, before=80)
    use(plain, 50.0, 54.22, 0.2)
    assert plain.cwnd == pytest.approx(100_000, rel=0.01)


# -- use


def test_the_clock_stands_while_the_window_is_not_in_use() -> None:
    """§5.8, promise (1): 1,000 s of little data at t = 1, then the step of test_the_curve_one_step."""
    cubic = reduced(100)
    cubic.on_acked(7000, 0.2, 50.0)
    for n in range(1001):
        cubic.on_acked(0, 0.2, 51.0 + n)
    assert cubic.cwnd == 70_052
    cubic.on_acked(7000, 0.2, 1051.0)
    assert cubic.cwnd == pytest.approx(71_947, abs=1)
    cubic.on_acked(7000, 0.2, 1052.0)
    assert cubic.cwnd > 73_000  # and runs again


def test_persistent_congestion_starts_again() -> None:
    """RFC 9002 §7.6.2: two packets. RFC 9438 §4.8: slow start up to 0.7 × the window, then K = 0 and W_max = 70."""
    cubic = reduced(100)
    cubic.on_persistent_congestion()
    assert (cubic.cwnd, cubic.slow_start, cubic.recovery_start) == (2000, True, -1.0)
    cubic.on_acked(68_000, 0.2, 40.0)
    assert (cubic.cwnd, cubic.slow_start) == (70_000, False)
    use(cubic, 50.0, 55.0, 0.2)
    assert cubic.cwnd == pytest.approx(70_000 + 50_000, rel=0.05)  # 0.4 × 5³


# -- HyStart++


def feed(hystart: HyStart, now: float, count: int, rtt: float, *, ends: bool = True) -> bool:
    """A round of `count` samples; the last one ends it. Whether slow start was over then."""
    sent = [0.0] * count
    if ends:
        sent[-1] = now
    return [hystart.on_sample(rtt, at, now) for at in sent][-1]


@pytest.mark.parametrize(
    ("last", "thresh"),
    [(0.010, 0.004), (0.030, 0.004), (0.100, 0.0125), (0.200, 0.016)],  # an eighth, between 4 and 16 ms
)
def test_a_longer_round_trip_begins_conservative_slow_start(last: float, thresh: float) -> None:
    """RFC 9406 §4.2."""
    for rise, begins in ((thresh - 1e-5, False), (thresh + 1e-5, True)):
        hystart = HyStart()
        feed(hystart, 1.0, 10, last)
        feed(hystart, 2.0, N_RTT_SAMPLE - 1, last + rise, ends=False)
        assert not hystart.css
        hystart.on_sample(last + rise, 0.0, 2.0)
        assert hystart.css is begins


def test_the_least_of_a_round_counts() -> None:
    """One late ACK, or many, prove nothing while one came in time."""
    hystart = HyStart()
    feed(hystart, 1.0, 10, 0.030)
    hystart.on_sample(0.030, 0.0, 2.0)
    feed(hystart, 2.0, 20, 0.055)
    assert not hystart.css


def test_few_samples_prove_nothing() -> None:
    hystart = HyStart()
    feed(hystart, 1.0, 10, 0.030)
    feed(hystart, 2.0, N_RTT_SAMPLE - 1, 0.090)
    feed(hystart, 3.0, N_RTT_SAMPLE - 1, 0.090)
    assert not hystart.css


def test_five_conservative_rounds_end_slow_start() -> None:
    """The one in which it began is the first (RFC 9406 §4.2)."""
    hystart = HyStart()
    feed(hystart, 1.0, 10, 0.030)
    over = [feed(hystart, 2.0 + n, 10, 0.040) for n in range(CSS_ROUNDS)]
    assert over == [False, False, False, False, True]


def test_jitter_is_forgiven() -> None:
    """RFC 9406 §4.2: the round trip is short again, so slow start goes on, and five new rounds would be needed."""
    hystart = HyStart()
    feed(hystart, 1.0, 10, 0.030)
    feed(hystart, 2.0, 10, 0.040)
    feed(hystart, 3.0, N_RTT_SAMPLE - 1, 0.039)
    assert hystart.css  # too few samples
    feed(hystart, 4.0, 10, 0.039)
    assert not hystart.css
    feed(hystart, 5.0, 10, 0.050)
    assert hystart.css
    assert [feed(hystart, 6.0 + n, 10, 0.050) for n in range(4)] == [False, False, False, True]


def test_conservative_growth_and_its_end() -> None:
    """A quarter of slow start's growth; then K = 0 and W_max = the window (RFC 9438 §4.10)."""
    cubic = Cubic(PACKET)

    def round_of(now: float, rtt: float) -> None:
        for n in range(10):
            cubic.on_sample(rtt, now if n == 9 else 0.0, now)

    round_of(1.0, 0.030)
    cubic.on_acked(10_000, 0.03, 1.0)
    assert cubic.cwnd == 20_000
    round_of(2.0, 0.040)
    cubic.on_acked(20_000, 0.04, 2.0)
    assert cubic.cwnd == 25_000
    for n in range(CSS_ROUNDS - 1):
        assert cubic.slow_start
        round_of(3.0 + n, 0.040)
    assert not cubic.slow_start
    use(cubic, 50.0, 55.0, 0.2)
    assert cubic.cwnd == pytest.approx(
        25_000 + 50_000, rel=0.07
    )  # 0.4 × 5³, and less than a round trip ahead


def test_only_the_first_slow_start_is_watched() -> None:
    """RFC 9406 §4.3: after a loss ssthresh is known, and growth is not divided."""
    cubic = Cubic(PACKET)
    for n in range(30):
        cubic.on_sample(0.03 if n < 10 else 0.05, 1.0 if n in (9, 19) else 0.0, 1.0 + n // 10)
    assert cubic._hystart.css
    cubic.cwnd = 100_000
    cubic.on_congestion(2.0, 3.0)
    cubic.on_persistent_congestion()
    for n in range(100):
        cubic.on_sample(0.05, 4.0 + n, 4.0 + n)
    cubic.on_acked(2000, 0.03, 5.0)
    assert cubic.cwnd == 4000


# -- on a link: 10 Mbit/s, 30 ms, which holds 31 packets


def first_second(congestion: str, queue: int) -> tuple[int | None, int, int]:
    """(Packets lost before conservative slow start began, lost in the first second, the window then in packets)."""
    net = Network(1, delay=0.015)
    net.keep_log = False
    hub, edge = net.listener(), net.dialler(congestion=congestion)
    session = edge.connect(hub)
    net.establish(session)
    link = net.link(edge, hub)
    link.bandwidth, link.queue = 1_250_000, queue
    net.run_for(0.2)
    assert session._data is not None
    controller = session._data.recovery.congestion
    lane = session.open_stream()
    session.write(lane, bytes(session.room(lane)))
    began: list[int] = []

    def watch() -> bool:
        if not began and isinstance(controller, Cubic) and controller._hystart.css:
            began.append(link.lost)
        return net.now >= end

    end = net.now + 0.8
    net._run(watch, end)
    return (began[0] if began else None), link.lost, controller.cwnd // 1200


def test_slow_start_is_left_before_a_deep_queue_overflows() -> None:
    """A queue of 100 packets, three times what the link holds; NewReno fills it and loses as many again."""
    began, lost, _ = first_second("cubic", 100)
    assert began == 0
    _, without, _ = first_second("newreno", 100)
    assert lost < without / 3


def test_slow_start_ends_well_on_a_short_queue() -> None:
    """25 packets overflow within the round in which they fill: RFC 9406 sees it a round later, with the first loss.

    What is lost is about what NewReno loses, though the window falls by less.
    """
    _, lost, window = first_second("cubic", 25)
    _, without, _ = first_second("newreno", 25)
    assert lost < without * 1.1
    assert window >= 31


# -- the choice


def test_the_choice_is_the_endpoints() -> None:
    net = Network(3)
    hub, edge = net.listener(), net.dialler(congestion="newreno")
    session = edge.connect(hub)
    peer = net.establish(session)
    assert session._data is not None
    assert peer._data is not None
    assert type(session._data.recovery.congestion) is CONTROLLERS["newreno"]
    assert type(peer._data.recovery.congestion) is CONTROLLERS["tolerant"]
    with pytest.raises(UsageError, match="tolerant, cubic, newreno"):
        net.dialler("edge-2", congestion="vegas")
