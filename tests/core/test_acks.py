"""stp.core.acks: promises (1) to (3) of its head."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stp.core.acks import ACK_EVERY, MAX_ACK_DELAY, MAX_RANGES, MAX_SPAN, PRUNE_RANGES, AckTracker
from stp.core.frames import parse_ack
from stp.core.packet import PN_WINDOW


def receive(acks: AckTracker, *numbers: int, now: float = 1.0) -> list[int]:
    """What the receive loop does with single numbers; those that were fresh."""
    fresh = []
    for pn in numbers:
        if not acks.fresh(pn):
            continue
        fresh.append(pn)
        if pn < acks.next:
            acks.on_late(pn)
        else:
            acks.on_run(pn, pn + 1, now)
    return fresh


def ranges(acks: AckTracker, now: float = 1.0) -> list[tuple[int, int]]:
    return parse_ack(acks.frame(now))[1]


@given(st.lists(st.integers(0, 3 * PN_WINDOW), max_size=60))
def test_a_number_is_fresh_once(numbers: list[int]) -> None:
    """Promise (1), against a set and the window as protocol §2 has it (R-2-5)."""
    acks = AckTracker()
    seen: set[int] = set()
    for pn in numbers:
        expected = pn not in seen and (not seen or pn > max(seen) - PN_WINDOW)
        assert acks.fresh(pn) is expected
        receive(acks, pn)
        seen.add(pn)


def test_the_window_is_as_wide_as_promised() -> None:
    """R-2-5."""
    acks = AckTracker()
    receive(acks, 10_000)
    assert acks.fresh(10_000 - (PN_WINDOW - 1))
    assert not acks.fresh(10_000 - PN_WINDOW)


def test_a_huge_number_costs_no_memory() -> None:
    """Promise (3): the window must not be shifted by what a peer chose."""
    acks = AckTracker()
    receive(acks, 0, (1 << 62) - 1)
    assert acks._seen.bit_length() <= PN_WINDOW
    assert not acks.fresh((1 << 62) - 1)
    assert acks.fresh((1 << 62) - 2)


def test_runs_move_the_window_as_single_numbers_do() -> None:
    by_run, one_by_one = AckTracker(), AckTracker()
    for first, stop in ((0, 54), (54, 108), (120, 130), (9000, 9001)):
        by_run.on_run(first, stop, 1.0)
        receive(one_by_one, *range(first, stop))
    assert by_run._seen == one_by_one._seen
    assert ranges(by_run) == ranges(one_by_one)


def test_every_second_packet_is_acknowledged_at_once() -> None:
    """R-6-4."""
    acks = AckTracker()
    receive(acks, 0)
    acks.on_eliciting(1, 1.0)
    assert not acks.due(1.0)
    assert acks.owing
    assert acks.deadline == pytest.approx(1.0 + MAX_ACK_DELAY)
    receive(acks, 1)
    acks.on_eliciting(ACK_EVERY - 1, 1.0)
    assert acks.due(1.0)


def test_a_single_packet_is_acknowledged_after_the_delay() -> None:
    """R-6-4."""
    acks = AckTracker()
    receive(acks, 0)
    acks.on_eliciting(1, 1.0)
    assert not acks.due(1.0 + 0.9 * MAX_ACK_DELAY)
    assert acks.due(1.0 + MAX_ACK_DELAY)


@pytest.mark.parametrize("numbers", [(0, 2), (1,), (0, 1, 5, 3)], ids=["gap", "first missing", "late"])
def test_gaps_and_late_packets_are_acknowledged_at_once(numbers: tuple[int, ...]) -> None:
    """R-6-4."""
    acks = AckTracker()
    for pn in numbers[:-1]:
        receive(acks, pn)
    acks.frame(1.0) if len(numbers) > 1 else None
    receive(acks, numbers[-1])
    acks.on_eliciting(1, 1.0)
    assert acks.due(1.0)


def test_what_asks_for_no_ack_draws_none() -> None:
    acks = AckTracker()
    receive(acks, 0, 5)
    acks.on_eliciting(0, 1.0)
    assert not acks.due(100.0)
    assert not acks.owing
    assert acks.deadline is None


def test_a_ping_is_answered_at_once() -> None:
    """R-6-4."""
    acks = AckTracker()
    receive(acks, 0)
    acks.on_eliciting(1, 1.0, at_once=True)
    assert acks.due(1.0)


def test_the_frame_says_how_long_it_waited_and_settles_the_debt() -> None:
    acks = AckTracker()
    acks.on_run(0, 3, 1.0)
    acks.on_eliciting(3, 1.0)
    delay_us, found, _ = parse_ack(acks.frame(1.020))
    assert delay_us == pytest.approx(20_000, abs=1)
    assert found == [(0, 3)]
    assert not acks.due(9.0)
    assert acks.deadline is None


def test_a_late_packet_does_not_move_the_delay_of_the_largest() -> None:
    """RFC 9000 §13.2.5: the delay is that of the largest number."""
    acks = AckTracker()
    acks.on_run(5, 6, 1.0)
    receive(acks, 2, now=1.5)
    assert parse_ack(acks.frame(1.5))[0] == pytest.approx(500_000, abs=1)


def test_ranges_are_bounded_and_the_newest_stay() -> None:
    acks = AckTracker()
    receive(acks, *range(0, 1000, 2))
    found = ranges(acks)
    assert len(found) == MAX_RANGES
    assert found[0] == (998, 999)


@pytest.mark.parametrize("top", [MAX_SPAN - 1, MAX_SPAN, MAX_SPAN + 3, (1 << 62) - 1])
def test_what_an_ack_cannot_say_is_forgotten(top: int) -> None:
    """Its gaps and lengths are u32; a peer may leave out any number of numbers."""
    acks = AckTracker()
    receive(acks, 0, 1, 2, 5, top)
    acks.on_eliciting(1, 1.0)
    lowest = top + 1 - MAX_SPAN
    told = [(low, high) for low, high in ((0, 3), (5, 6)) if high > lowest]
    expected = [(top, top + 1), *[(max(low, lowest), high) for low, high in reversed(told)]]
    assert ranges(acks) == expected
    long = AckTracker()
    long.on_run(0, top + 1, 1.0)
    assert ranges(long) == [(max(0, lowest), top + 1)]


def test_acknowledged_acks_are_forgotten() -> None:
    """RFC 9000 §13.2.4; the last range stays, so that there is always something to say."""
    acks = AckTracker()
    receive(acks, *range(0, 2 * PRUNE_RANGES, 2))
    assert not acks.wants_pruning()
    receive(acks, 100)
    assert acks.wants_pruning()
    acks.on_acked(10)
    assert ranges(acks) == [(100, 101), (14, 15), (12, 13)]
    acks.on_acked(100)
    assert ranges(acks) == [(100, 101)]
    acks.on_lost(100)
    assert not acks.due(1.0)
