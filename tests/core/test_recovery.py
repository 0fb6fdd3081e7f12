"""stp.core.recovery: RFC 9002 with its numbers, and promises (1) to (3) of the head."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stp.core.congestion import NewReno
from stp.core.recovery import (
    K_GRANULARITY,
    K_INITIAL_RTT,
    MAX_DECLARED,
    MAX_PROBE_INTERVAL,
    PROBE_PACKETS,
    Recovery,
    RttEstimator,
    Sent,
)
from stp.core.sizing import Sizer

PIECE, OVERHEAD = 1000, 46


class Owner:
    """A stream or another owner: writes down what it is told."""

    def __init__(self) -> None:
        self.acked: list[object] = []
        self.lost: list[object] = []

    def on_range_acked(self, offset: int, length: int, fin: bool) -> None:
        self.acked.append((offset, length, fin))

    def on_range_lost(self, offset: int, length: int, fin: bool) -> None:
        self.lost.append((offset, length, fin))

    def on_acked(self, token: object) -> None:
        self.acked.append(token)

    def on_lost(self, token: object) -> None:
        self.lost.append(token)


def recovery(rtt: float | None = None) -> Recovery:
    found = Recovery(RttEstimator(rtt), NewReno(1200), Sizer())
    found.app_limited = False
    return found


def burst(owner: Owner, first: int, count: int, at: float, *, last: int = PIECE, fin: bool = False) -> Sent:
    length = (count - 1) * PIECE + last
    return Sent.burst(first, count, at, owner, first * PIECE, length, PIECE, OVERHEAD, fin)


def send(rec: Recovery, owner: Owner, pn: int, at: float, size: int = 100) -> None:
    rec.on_sent(Sent.packet(pn, at, size, [(owner, pn)]))


# -- the estimator


def test_rttvar_uses_smoothed_not_minimum() -> None:
    """RFC 9002 §5.3. Three samples: up to two, smoothed == minimum and the slip hides."""
    rtt = RttEstimator()
    for latest, ack_delay in [(0.100, 0.0), (0.200, 0.010), (0.150, 0.0)]:
        rtt.on_sample(latest, ack_delay)
    assert rtt.var == pytest.approx(0.0546875)
    assert rtt.smoothed == pytest.approx(0.875 * 0.11125 + 0.125 * 0.15)


def test_the_first_sample_replaces_the_guess() -> None:
    rtt = RttEstimator()
    assert (rtt.smoothed, rtt.var) == (K_INITIAL_RTT, K_INITIAL_RTT / 2)
    rtt.on_sample(0.040, 0.020)  # RFC 9002 §5.2: no ack delay in the first one
    assert (rtt.smoothed, rtt.var, rtt.min) == (0.040, 0.020, 0.040)


def test_a_guess_is_replaced_by_the_first_sample() -> None:
    rtt = RttEstimator(guess=0.08)
    assert rtt.pto() == pytest.approx(0.08 + 4 * 0.04 + 0.025)
    rtt.on_sample(1.5, 0.0)
    assert (rtt.smoothed, rtt.min) == (1.5, 1.5)


def test_ack_delay_is_capped_and_never_undercuts_the_minimum() -> None:
    """RFC 9002 §5.3: at most max_ack_delay; not at all if latest would fall below min_rtt."""
    capped, plain = RttEstimator(0.1), RttEstimator(0.1)
    capped.on_sample(0.2, 5.0)
    plain.on_sample(0.2, 0.025)
    assert capped.smoothed == plain.smoothed == pytest.approx(0.875 * 0.1 + 0.125 * 0.175)
    low = RttEstimator(0.1)
    low.on_sample(0.110, 0.020)
    assert low.smoothed == pytest.approx(0.875 * 0.1 + 0.125 * 0.110)


def test_pto_and_loss_delay() -> None:
    """RFC 9002 §6.2.1 and §6.1.2 (R-6-1)."""
    rtt = RttEstimator(0.1, 0.025)
    assert rtt.pto() == pytest.approx(0.1 + 4 * 0.05 + 0.025)
    rtt.var = 0.0
    assert rtt.pto() == pytest.approx(0.1 + K_GRANULARITY + 0.025)
    rtt.latest = 0.2
    assert rtt.loss_delay() == pytest.approx(0.2 * 9 / 8)
    assert RttEstimator(1e-6).loss_delay() == K_GRANULARITY


# -- acknowledgement


def test_a_whole_burst_is_told_in_one_word() -> None:
    """Promise (3)."""
    rec, owner = recovery(), Owner()
    rec.on_sent(burst(owner, 0, 10, 1.0, last=500, fin=True))
    assert rec.in_flight == 9 * 1046 + 546
    assert rec.on_ack([(0, 10)], 0.0, 1.1)
    assert owner.acked == [(0, 9500, True)]
    assert rec.in_flight == 0
    assert rec.sent == []
    assert rec.rtt.smoothed == pytest.approx(0.1)


def test_an_ack_of_nothing_new_changes_nothing() -> None:
    rec, owner = recovery(), Owner()
    rec.on_sent(burst(owner, 0, 4, 1.0))
    rec.on_ack([(0, 4)], 0.0, 1.1)
    before = rec.rtt.smoothed
    assert not rec.on_ack([(0, 4)], 0.0, 9.0)
    assert rec.rtt.smoothed == before


@given(st.lists(st.tuples(st.integers(1, 12), st.booleans()), min_size=1, max_size=8), st.data())
def test_ranges_find_exactly_what_they_cover(parts: list[tuple[int, bool]], data: st.DataObject) -> None:
    """Promises (1) to (3), against a plain list of packets; acknowledged in two steps, nothing is told twice."""
    rec, owner = recovery(10.0), Owner()  # an RTT so long that nothing is lost by time
    first = 0
    for count, single in parts:
        if single:
            send(rec, owner, first, 1.0)
            first += 1
        else:
            rec.on_sent(burst(owner, first, count, 1.0))
            first += count
    total = rec.in_flight
    acked: set[int] = set()
    for _ in range(2):
        chosen = sorted(data.draw(st.sets(st.integers(0, first - 1), min_size=1)))
        spans: list[tuple[int, int]] = []
        for pn in chosen:
            if spans and spans[-1][1] == pn:
                spans[-1] = (spans[-1][0], pn + 1)
            else:
                spans.append((pn, pn + 1))
        rec.on_ack(spans[::-1], 0.0, 1.5)
        acked |= set(chosen)
    told: list[int] = []
    lost: list[int] = []
    for found, words in ((told, owner.acked), (lost, owner.lost)):
        for word in words:
            if isinstance(word, tuple):
                found += range(word[0] // PIECE, (word[0] + word[1]) // PIECE)
            else:
                assert isinstance(word, int)
                found.append(word)
    assert len(told) == len(set(told))
    assert len(lost) == len(set(lost))
    assert not set(told) & set(lost)
    assert set(told) == acked - set(
        lost
    )  # what was lost in step one may be acknowledged too late in step two
    in_flight = sum((sent.size if sent.left >> i & 1 else 0) for sent in rec.sent for i in range(sent.count))
    assert rec.in_flight == in_flight <= total
    assert rec.lost_packets == len(lost)


def test_no_sample_from_an_old_packet() -> None:
    """RFC 9002 §5.1: only if the largest acknowledged is newly so."""
    rec, owner = recovery(), Owner()
    for pn in (0, 1):
        send(rec, owner, pn, 1.0)
    rec.on_ack([(1, 2)], 0.0, 1.1)
    rec.on_ack([(0, 2)], 0.0, 5.0)
    assert rec.rtt.latest == pytest.approx(0.1)
    assert owner.acked == [1, 0]


# -- loss


def test_three_later_packets_make_a_loss() -> None:
    """RFC 9002 §6.1.1 (R-6-1)."""
    rec, owner = recovery(), Owner()
    rec.on_sent(burst(owner, 0, 10, 1.0, fin=True))
    rec.on_ack([(2, 4)], 0.0, 1.1)
    assert owner.lost == [(0, 1000, False)]
    rec.on_ack([(9, 10), (2, 4)], 0.0, 1.1)
    assert owner.lost == [(0, 1000, False), (1000, 1000, False), (4000, 3000, False)]
    assert rec.lost_packets == 5
    assert rec.in_flight == 2 * 1046


def test_time_makes_a_loss_too() -> None:
    """RFC 9002 §6.1.2: nine eighths of the larger of latest and smoothed, with a timer (R-6-1)."""
    rec, owner = recovery(0.1), Owner()
    for pn in range(2):
        send(rec, owner, pn, 1.0)
    rec.on_ack([(1, 2)], 0.0, 1.08)
    assert not owner.lost
    due = rec.next_timeout()
    assert due == pytest.approx(1.0 + 0.1 * 9 / 8 * 0.975, rel=1e-3)
    assert due is not None
    rec.on_timeout(due)
    assert owner.lost == [0]
    assert rec.pto_count == 0
    assert rec.next_timeout() is None


def test_losses_count_before_arrivals() -> None:
    """RFC 9002 appendix A.7: what arrived with the bad news adds nothing."""
    rec, owner = recovery(), Owner()
    rec.on_sent(burst(owner, 0, 10, 1.0))
    rec.on_ack([(9, 10)], 0.0, 1.1)
    assert rec.congestion.cwnd == 6000


def test_an_unused_window_does_not_grow() -> None:
    """RFC 9002 §7.8."""
    rec, owner = recovery(), Owner()
    rec.app_limited = True
    rec.on_sent(burst(owner, 0, 5, 1.0))
    rec.on_ack([(0, 5)], 0.0, 1.1)
    assert rec.congestion.cwnd == 12_000


def test_only_what_left_after_the_reduction_grows_the_window() -> None:
    """RFC 9002 §7.3.2: of an ACK for both, only the later part."""
    rec, owner = recovery(), Owner()
    for n in range(6):
        send(rec, owner, n, 1.0 + 0.01 * n)
    rec.on_ack([(3, 4)], 0.0, 1.06)  # packet 0 is lost
    assert (rec.congestion.cwnd, rec.congestion.recovery_start) == (6000, 1.06)
    rec.on_ack([(1, 6)], 0.0, 1.065)
    assert rec.congestion.cwnd == 6000
    send(rec, owner, 6, 1.07)
    send(rec, owner, 7, 1.08, size=6000)
    rec.on_ack([(1, 8)], 0.0, 1.2)
    assert rec.congestion.cwnd == 6000 + 1200 * 6100 // 6000


class Listener(NewReno):
    """Writes down what it hears of losses."""

    def __init__(self) -> None:
        super().__init__(1200)
        self.heard: list[tuple[float, int]] = []

    def on_congestion(self, sent_at: float, now: float, size: int = 0) -> None:
        self.heard.append((sent_at, size))
        super().on_congestion(sent_at, now, size)


def test_a_controller_hears_how_much_of_what_left_since_the_reduction_was_lost() -> None:
    rec, owner = Recovery(RttEstimator(0.05), listener := Listener(), Sizer()), Owner()
    for n in range(4):
        send(rec, owner, n, 1.0 + 0.01 * n)
    rec.on_ack([(3, 4)], 0.0, 1.05)  # packet 0 is lost; reduced at 1.05
    send(rec, owner, 4, 1.06, size=300)
    for n in range(5, 9):
        send(rec, owner, n, 1.06)
    rec.on_ack([(7, 8), (3, 4)], 0.0, 1.11)  # 1 and 2 of before, 4 and, by time, none else
    assert listener.heard == [(1.0, 100), (1.06, 300)]


@pytest.mark.parametrize(("seconds", "collapses"), [(1.0, True), (0.3, False)])
def test_persistent_congestion(seconds: float, collapses: bool) -> None:
    """RFC 9002 §7.6: everything lost over three PTOs."""
    rec, owner = recovery(0.05), Owner()
    send(rec, owner, 0, 1.0)
    rec.on_ack([(0, 1)], 0.0, 1.05)
    for n in range(1, 11):
        send(rec, owner, n, 1.1 + seconds * n / 10)
    assert 0.3 < 3 * rec.rtt.pto() < 0.9
    send(rec, owner, 11, 1.2 + seconds)
    rec.on_ack([(11, 12), (0, 1)], 0.0, 1.3 + seconds)
    assert len(owner.lost) == 10
    assert (rec.congestion.cwnd == 2400 + 100) is collapses  # and the packet that arrived


def test_a_packet_that_arrived_between_rules_persistent_congestion_out() -> None:
    rec, owner = recovery(0.05), Owner()
    for n in range(12):
        send(rec, owner, n, 1.0 + 0.1 * n)
    rec.on_ack([(6, 7)], 0.0, 2.2)
    rec.on_ack([(11, 12), (6, 7)], 0.0, 2.2)
    assert rec.congestion.cwnd > 2400


# -- what was only overtaken


def test_the_packet_threshold_grows_by_what_was_overtaken() -> None:
    """RFC 9002 §6.1.1, R-6-1: five packets overtook 0, so the next time five do no harm; the sixth would."""
    rec, owner = recovery(0.1), Owner()
    for n in range(20):
        send(rec, owner, n, 1.0)
    rec.on_ack([(1, 6)], 0.0, 1.05)
    assert (owner.lost, rec.spurious) == ([0], 0)
    rec.on_ack([(0, 6)], 0.0, 1.06)  # nothing new but the late one
    assert (rec.spurious, rec.packet_threshold) == (1, 6)
    rec.on_ack([(7, 12), (0, 6)], 0.0, 1.07)
    assert owner.lost == [0]
    rec.on_ack([(7, 13), (0, 6)], 0.0, 1.08)
    assert owner.lost == [0, 6]
    rec.on_ack([(0, 13)], 0.0, 1.09)
    assert rec.packet_threshold == 7


@pytest.mark.parametrize(("overtaken", "threshold"), [(4, 5), (5, 6), (12, 6)])
def test_the_packet_threshold_at_most_doubles(overtaken: int, threshold: int) -> None:
    rec, owner = recovery(0.1), Owner()
    rec.on_sent(burst(owner, 0, 54, 1.0))
    rec.on_ack([(1, overtaken + 1)], 0.0, 1.05)
    rec.on_ack([(0, overtaken + 1)], 0.0, 1.06)
    assert rec.packet_threshold == threshold


def test_the_packet_threshold_ends_at_64() -> None:
    rec, owner = recovery(0.1), Owner()
    rec.rtt.on_sample(10.0, 0.0)  # time is no matter
    for n in range(8):
        rec.on_sent(burst(owner, 100 * n, 100, 1.0 + n))
        rec.on_ack([(100 * n + 1, 100 * n + 100), (0, 100 * n)], 0.0, 1.05 + n)
        rec.on_ack([(0, 100 * n + 100)], 0.0, 1.06 + n)
    assert rec.packet_threshold == 64


def test_the_time_threshold_grows_where_time_was_too_short() -> None:
    """RFC 9002 §6.1.2: 9/8, 10/8, 12/8 round trips, then two."""
    rec, owner = recovery(0.1), Owner()
    found = []
    for n in range(5):
        for pn in (2 * n, 2 * n + 1):
            send(rec, owner, pn, 1.0 + n)
        rec.on_ack([(2 * n + 1, 2 * n + 2), (0, 2 * n)] if n else [(1, 2)], 0.0, 1.1 + n)
        rec.on_timeout(1.5 + n)
        rec.on_ack([(0, 2 * n + 2)], 0.0, 1.501 + n)
        found.append(rec.rtt.time_threshold)
    assert found == [10 / 8, 12 / 8, 2.0, 2.0, 2.0]
    assert rec.packet_threshold == 3


def overtaken_and_lost(*late: tuple[int, int]) -> tuple[int, int, bool]:
    """Packets 0 and 1 are declared lost at 1.05; then these ranges are acknowledged, too. (Reduced window, window
    then, slow start then).
    """
    rec, owner = recovery(0.1), Owner()
    for n in range(8):
        send(rec, owner, n, 1.0)
    rec.on_ack([(2, 8)], 0.0, 1.05)
    reduced = rec.congestion.cwnd
    for n, ranges in enumerate(late):
        rec.on_ack([(2, 8), ranges] if ranges[1] < 2 else [(ranges[0], 8)], 0.0, 1.06 + 0.2 * n)
    return reduced, rec.congestion.cwnd, rec.congestion.slow_start


def test_a_window_that_was_reduced_for_nothing_is_given_back() -> None:
    """RFC 9438 §4.9, R-6-2: when all came after all, at once or one by one, not when one of them did."""
    assert overtaken_and_lost((0, 2)) == (6000, 12_000, True)
    assert overtaken_and_lost((0, 1)) == (6000, 6000, False)
    assert overtaken_and_lost((0, 1), (0, 2)) == (6000, 6000, False)  # more than a round trip later


def test_many_losses_are_no_mistake() -> None:
    """Memory is bounded: of 39 in pieces the first 7 are forgotten, so nobody knows whether all came."""
    rec, owner = recovery(0.1), Owner()
    for n in range(81):
        send(rec, owner, n, 1.0)
    rec.on_ack([(n, n + 1) for n in range(80, -1, -2)], 0.0, 1.04)
    assert (rec.lost_packets, len(rec._declared)) == (39, MAX_DECLARED)
    rec.on_ack([(0, 81)], 0.0, 1.05)
    assert (rec.congestion.cwnd, rec._declared, rec.spurious) == (6000, [], MAX_DECLARED)


def test_another_path_knows_nothing_of_what_was_overtaken_here() -> None:
    rec, owner = recovery(0.1), Owner()
    rec.on_sent(burst(owner, 0, 20, 1.0))
    rec.on_ack([(1, 6)], 0.0, 1.05)
    rec.on_ack([(0, 6)], 0.0, 1.06)
    rec.on_ack([(7, 20), (0, 6)], 0.0, 1.07)
    rec.move(20, RttEstimator(0.1), NewReno(1200), rec.sizer)
    assert rec.packet_threshold == 3
    rec.congestion.cwnd = 5000
    rec.on_ack([(0, 20)], 0.0, 1.08)
    assert rec.congestion.cwnd == 5000


# -- probes


def test_probes_double_up_to_a_second() -> None:
    """RFC 9002 §6.2.1 with the cap that this file's head states."""
    rec, owner = recovery(0.02), Owner()
    send(rec, owner, 0, 1.0)
    pto = rec.rtt.pto()
    waits, now = [], 1.0
    for n in range(1, 8):
        due = rec.next_timeout()
        assert due is not None
        waits.append(due - now)
        now = due
        rec.on_timeout(now)
        assert rec.probes == PROBE_PACKETS
        send(rec, owner, n, now)
    assert waits[:4] == pytest.approx([pto, 2 * pto, 4 * pto, 8 * pto])
    assert waits[-1] == MAX_PROBE_INTERVAL
    rec.on_ack([(0, 1)], 0.0, now)
    assert (rec.pto_count, rec.probes) == (0, 0)


def test_a_probe_says_the_oldest_again_and_loses_nothing() -> None:
    """RFC 9002 §6.2.4, promise (2): in flight as before, the window untouched."""
    rec, owner = recovery(0.02), Owner()
    send(rec, owner, 0, 1.0)
    rec.on_sent(burst(owner, 1, 10, 1.0))
    before = rec.in_flight
    rec.on_timeout(1.0 + rec.rtt.pto() / 2)
    assert not owner.lost
    rec.on_timeout(1.0 + rec.rtt.pto())
    assert owner.lost == [0, (1000, 1000, False)]
    assert rec.in_flight == before
    assert rec.congestion.cwnd == 12_000
    rec.on_ack([(0, 11)], 0.0, 1.5)
    assert owner.acked == [0, (1000, 10_000, False)]


def test_waiting_starts_anew_with_every_ack() -> None:
    rec, owner = recovery(0.02), Owner()
    assert rec.waiting_since is None
    for pn in range(2):
        send(rec, owner, pn, 1.0 + pn)
    assert rec.waiting_since == 1.0
    rec.on_ack([(0, 1)], 0.0, 2.5)
    assert rec.waiting_since == 2.5
    rec.on_ack([(0, 2)], 0.0, 2.6)
    assert rec.waiting_since is None
    assert rec.next_timeout() is None


def test_forgotten_means_silent() -> None:
    rec, owner = recovery(0.02), Owner()
    send(rec, owner, 0, 1.0)
    rec.forget()
    rec.on_timeout(99.0)
    assert rec.next_timeout() is None
    assert not owner.lost
    assert rec.in_flight == 0


def test_what_left_on_another_path_says_nothing_of_this_one() -> None:
    """Promise (5); RFC 9000 §9.4: no room is taken, no round trip measured, no window reduced, yet all is told."""
    rec, owner = recovery(0.1), Owner()
    for pn in range(10):
        send(rec, owner, pn, 1.0, 1000)
    fresh, window = RttEstimator(guess=0.3), NewReno(1200)
    rec.move(10, fresh, window, Sizer())
    assert rec.in_flight == 0
    rec.on_ack([(2, 4)], 0.0, 1.5)
    assert not fresh.sampled
    assert window.cwnd == NewReno(1200).cwnd
    for pn in range(10, 14):
        send(rec, owner, pn, 2.0, 1000)
    assert rec.in_flight == 4000
    rec.on_ack([(13, 14)], 0.0, 2.05)
    assert fresh.latest == pytest.approx(0.05)
    assert set(owner.lost) >= {0, 1, *range(4, 10)}  # lost on the way, or with the path
    assert window.cwnd < NewReno(1200).cwnd  # for 10, which left here
    assert rec.in_flight == 2000
    rec.on_ack([(10, 14)], 0.0, 2.06)
    assert rec.in_flight == 0
