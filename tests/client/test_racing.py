"""Which carrier when: races, probes, moves, with simulated time (R-11-4)."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable

import pytest

from stp.racing import (
    LASTING,
    LOOKS,
    PROBE_FIRST,
    PROBE_MOST,
    PROBE_TIMEOUT,
    STABLE,
    TLS,
    TLS_AFTER,
    UDP,
    ProbeBack,
    tls_after,
)

FIVE_MINUTES = 300.0


def drive(
    back: ProbeBack, works: Callable[[float], bool], *, start: float, until: float
) -> tuple[float | None, list[float]]:
    """Probe as often as `back` says. When it moves, None if it does not before `until`; and when it probed."""
    now, probes = start, []
    while (now := max(now, back.due)) < until:
        probes.append(now)
        if not works(now):
            now += PROBE_TIMEOUT
            back.failed(now)
        elif back.answered(now):
            return now, probes
    return None, probes


def begun(seed: int, now: float = 0.0) -> ProbeBack:
    back = ProbeBack(random.Random(seed).random)
    back.begin(now)
    return back


def test_who_goes_first() -> None:
    """(1)"""
    assert tls_after("") == tls_after(UDP) == TLS_AFTER
    assert tls_after(TLS) == 0.0


@pytest.mark.parametrize("seed", range(20))
def test_back_within_five_minutes(seed: int) -> None:
    """(2): at whatever moment UDP begins to work, and never before it has worked for STABLE seconds."""
    rng = random.Random(seed)
    for opened in (0.0, rng.uniform(0, 60), rng.uniform(0, 600), rng.uniform(3600, 7200)):
        back = begun(seed)
        moved, probes = drive(
            back,
            lambda now, since=opened: now >= since,  # type: ignore[misc]
            start=0.0,
            until=20_000.0,
        )
        assert moved is not None
        assert STABLE <= moved - opened < FIVE_MINUTES
        well = [at for at in probes if at >= opened]
        assert LOOKS + 1 <= len(well) <= 2 * LOOKS
        assert max(b - a for a, b in itertools.pairwise(well)) <= STABLE / LOOKS + 0.001


@pytest.mark.parametrize("seed", range(20))
def test_intervals_grow_to_a_bound_and_are_jittered(seed: int) -> None:
    """(2)"""
    _, probes = drive(begun(seed), lambda now: False, start=0.0, until=7200.0)
    gaps = [b - a - PROBE_TIMEOUT for a, b in itertools.pairwise(probes)]
    assert 0.75 * PROBE_FIRST <= probes[0] <= PROBE_FIRST
    assert all(0.75 * PROBE_MOST <= gap <= PROBE_MOST for gap in gaps[3:])
    assert len({round(gap, 3) for gap in gaps[3:]}) > 10
    assert len(probes) < 7200 / (0.75 * PROBE_MOST) + 5


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("period", [8.0, 20.0, 33.0, 50.0])
def test_a_udp_that_comes_and_goes_moves_nobody(seed: int, period: float) -> None:
    """(2): up for `period` seconds, then down as long, for two hours."""
    phase = random.Random(seed).uniform(0, 2 * period)
    moved, probes = drive(
        begun(seed), lambda now: (now + phase) % (2 * period) < period, start=0.0, until=7200.0
    )
    assert moved is None
    assert len(probes) > 20


@pytest.mark.parametrize("seed", range(10))
def test_one_lucky_packet_moves_nobody(seed: int) -> None:
    rng = random.Random(seed)
    moved, _ = drive(begun(seed), lambda now: rng.random() < 0.1, start=0.0, until=36_000.0)
    assert moved is None


@pytest.mark.parametrize("seed", range(10))
def test_what_did_not_last_is_trusted_later(seed: int) -> None:
    """(3): from UDP to TLS and back over and over: ever more rarely, and still within five minutes."""
    back, now, waits = ProbeBack(random.Random(seed).random), 1000.0, []
    for _ in range(6):
        back.begin(now)
        moved, _ = drive(back, lambda now: True, start=now, until=now + 1000.0)
        assert moved is not None
        waits.append(moved - now)
        back.moved(moved)
        now = moved + LASTING / 2
    assert waits[0] <= PROBE_FIRST + STABLE
    assert waits[-1] >= 0.75 * PROBE_MOST + STABLE
    assert max(waits) < FIVE_MINUTES
    back.begin(now + LASTING)
    assert back.due - (now + LASTING) <= PROBE_FIRST  # this one has lasted
