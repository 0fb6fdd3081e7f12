"""stp.core.sizing: the search for a size and the steps down, by a path that carries what it carries."""

from __future__ import annotations

import pytest

from stp.core.sizing import (
    AGAIN_TIME,
    BASE_DATAGRAM,
    BLACK_HOLE_PACKETS,
    GRAIN,
    MAX_PROBES,
    MIN_DATAGRAM,
    RAISE_TIME,
    STRIKES,
    TINY,
    Sizer,
)

RTT = 0.03


def search(sizer: Sizer, carries: int, now: float, *, probes: int = 200) -> float:
    """Probe whenever it is due, over a path that carries `carries` bytes, until nothing more is due soon."""
    pn = 0
    while sizer.due_at < now + RAISE_TIME / 2:
        now = max(now, sizer.due_at)
        size = sizer.next_probe()
        if not size:
            break
        assert sizer.datagram < size <= sizer.most
        pn += 1
        assert pn <= probes
        sizer.on_probe_sent(pn, now)
        assert sizer.due_at == float("inf")  # one at a time
        now += RTT
        (sizer.on_acked if size <= carries else sizer.on_lost)(size)
    return now


def suffer(sizer: Sizer, at: float, now: float, count: int = BLACK_HOLE_PACKETS) -> None:
    """Full packets of time `at` are lost, and a small one that left two round trips later arrives `now`."""
    sizer.on_missing(count, at)
    sizer.judge(at + 2 * RTT, RTT, now)


@pytest.mark.parametrize(
    ("carries", "most"), [(1472, 1), (1452, 4), (1400, 13), (1252, 20), (1232, 22), (1200, 18)]
)
def test_the_search_finds_what_the_path_carries(carries: int, most: int) -> None:
    """Promise (1): to within GRAIN, with few probes."""
    sizer = Sizer(BASE_DATAGRAM, 1472)
    sizer.begin(1.0)
    search(sizer, carries, 1.0)
    assert carries - GRAIN < sizer.datagram <= carries
    assert sizer.probes <= most
    if carries == 1472:
        assert sizer.due_at == float("inf")  # there is nothing above
    else:
        assert sizer.due_at >= RAISE_TIME


@pytest.mark.parametrize("carries", [8972, 1472, 4000, 1500])
def test_jumbo_frames_where_configured(carries: int) -> None:
    sizer = Sizer(BASE_DATAGRAM, 8972)
    sizer.begin(1.0)
    search(sizer, carries, 1.0)
    assert carries - GRAIN < sizer.datagram <= carries
    assert sizer.probes <= 40


def test_nothing_is_probed_before_the_proof_nor_where_nothing_larger_is_allowed() -> None:
    sizer = Sizer(BASE_DATAGRAM, 1472)
    assert sizer.due_at == float("inf")
    sizer.bound(BASE_DATAGRAM)
    sizer.begin(1.0)
    assert sizer.due_at == float("inf")
    assert sizer.next_probe() == 0


def test_the_peer_bounds_the_size() -> None:
    """Promise (3): its transport parameter, and no acknowledgement raises it above."""
    sizer = Sizer(8972, 8972)
    sizer.bound(1472)
    assert (sizer.datagram, sizer.most) == (1472, 1472)
    sizer.on_acked(8972)
    sizer.on_acked("1472")
    assert sizer.datagram == 1472


def test_a_probe_counts_as_too_large_only_after_three_losses() -> None:
    """Promise (2): a lossy path is not a narrow one."""
    sizer = Sizer(BASE_DATAGRAM, 1472)
    sizer.begin(0.0)
    now = 0.0
    for lost in range(MAX_PROBES - 1):
        assert sizer.next_probe() == 1472
        sizer.on_probe_sent(lost, now)
        sizer.on_lost(1472)
        assert sizer.due_at > now
        now = sizer.due_at
    assert sizer.next_probe() == 1472
    sizer.on_probe_sent(9, now)
    assert sizer.next_probe() == 0  # one is under way
    sizer.on_acked(1472)
    assert sizer.datagram == 1472


def test_the_search_is_begun_anew_after_ten_minutes() -> None:
    sizer = Sizer(BASE_DATAGRAM, 1472)
    sizer.begin(0.0)
    now = search(sizer, 1232, 0.0)
    assert now + RAISE_TIME / 2 < sizer.due_at <= now + RAISE_TIME
    search(sizer, 1472, sizer.due_at)
    assert sizer.datagram == 1472


def test_the_kernel_says_it_once() -> None:
    """A probe that the kernel refuses is not repeated; a full packet that it refuses is a fall."""
    sizer = Sizer(BASE_DATAGRAM, 1472)
    sizer.begin(0.0)
    assert sizer.next_probe() == 1472
    sizer.on_probe_sent(0, 0.0)
    sizer.on_too_large(1472, 0.0)
    sizer.on_lost(1472)
    assert sizer.next_probe() == 1452
    sizer.on_probe_sent(1, 1.0)
    sizer.on_acked(1452)
    sizer.on_too_large(1452, 2.0)
    assert (sizer.datagram, sizer.black_holes) == (BASE_DATAGRAM, 1)
    sizer.on_too_large(1452, 2.0)  # more of the same burst
    assert (sizer.datagram, sizer.black_holes) == (BASE_DATAGRAM, 1)
    assert sizer.next_probe() == 1432


def test_a_black_hole_is_left_step_by_step() -> None:
    """Promise (4)."""
    sizer = Sizer(8972, 8972, 0.0)
    steps = []
    for at in (1.0, 2.0, 5.0):
        for again in range(STRIKES if at == 5.0 else 1):
            assert not sizer.blocked
            suffer(sizer, at + again, at + again + 0.5)
        steps.append((sizer.datagram, sizer.above, sizer.blocked))
    assert steps == [
        (BASE_DATAGRAM, MIN_DATAGRAM, False),
        (MIN_DATAGRAM, TINY, False),
        (MIN_DATAGRAM, TINY, True),
    ]
    assert sizer.black_holes == 3


def test_what_is_no_black_hole() -> None:
    sizer = Sizer(1472, 1472, 0.0)
    suffer(sizer, 1.0, 1.5, count=BLACK_HOLE_PACKETS - 1)  # too few
    sizer.on_passed(1.2)  # a later one arrived
    suffer(sizer, 1.1, 1.5)  # before that one
    sizer.on_missing(50, 2.0)
    sizer.judge(2.0 + RTT / 2, RTT, 2.1)  # within a round trip: an overflowing queue
    sizer.on_passed(2.02)
    sizer.judge(2.3, RTT, 2.4)
    assert (sizer.datagram, sizer.black_holes) == (1472, 0)


def test_what_left_before_a_fall_makes_no_second_one() -> None:
    sizer = Sizer(1472, 1472, 0.0)
    suffer(sizer, 1.0, 1.5)
    suffer(sizer, 1.4, 1.6)
    assert (sizer.datagram, sizer.black_holes) == (BASE_DATAGRAM, 1)


def test_after_a_fall_the_search_waits_ever_longer() -> None:
    """An outage looks like a black hole: the size comes back; a path that changes its mind is not chased."""
    sizer = Sizer(1472, 1472, 0.0)
    now, waits = 1.0, []
    for _ in range(14):
        suffer(sizer, now, now + 0.1)
        waits.append(sizer.due_at - (now + 0.1))
        now = search(sizer, 1472, sizer.due_at) + 1.0
        assert sizer.datagram == 1472
    assert waits[:3] == pytest.approx([AGAIN_TIME, 2 * AGAIN_TIME, 4 * AGAIN_TIME])
    assert waits[-1] == pytest.approx(RAISE_TIME)


def test_a_fall_while_a_probe_is_under_way() -> None:
    sizer = Sizer(1472, 8972, 0.0)
    sizer.begin(0.0)
    size = sizer.next_probe()
    sizer.on_probe_sent(7, 5.0)
    suffer(sizer, 5.0, 5.5)
    assert sizer.next_probe() == 0
    sizer.on_lost(size)
    assert sizer.next_probe() == 8972
    assert sizer.datagram == BASE_DATAGRAM


def test_rescue_packets_become_smaller() -> None:
    """What a timeout sends again is to arrive, whatever became of the path."""
    sizer = Sizer(8972, 8972)
    assert [sizer.rescue_size(n) for n in (1, 2, 3, 4, 5, 9)] == [1200, 1200, 1024, 1024, TINY, TINY]
    assert [Sizer().rescue_size(n) for n in (0, 1, 2, 3, 4)] == [1200, 1200, 1024, 1024, TINY]
    fallen = Sizer(1472)
    for at in (1.0, 2.0):
        suffer(fallen, at, at + 0.5)
    assert [fallen.rescue_size(n) for n in (1, 2, 3)] == [1024, TINY, TINY]


def test_outages_in_a_row_do_not_end_a_session() -> None:
    """Between them something larger than tiny arrives."""
    sizer = Sizer(1200, 1472, 0.0)
    suffer(sizer, 1.0, 1.5)
    assert sizer.datagram == MIN_DATAGRAM
    for at in range(2, 22, 2):
        suffer(sizer, at, at + 0.5)
        sizer.on_passed(at + 0.7)
    assert not sizer.blocked


def test_when_the_base_does_not_pass_either() -> None:
    """Both sizes were tried in one outage of full packets: one fall goes two steps."""
    sizer = Sizer(1472, 1472, 0.0)
    sizer.on_missing(BLACK_HOLE_PACKETS, 1.0)
    sizer.missing_base += MAX_PROBES
    sizer.judge(1.5, RTT, 1.6)
    assert (sizer.datagram, sizer.above, sizer.black_holes) == (MIN_DATAGRAM, TINY, 1)
