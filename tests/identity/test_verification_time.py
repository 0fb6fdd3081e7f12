"""The time certificates are judged by (protocol §4), and fault row 61: a machine that wakes up in 1970."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from stp.identity import (
    BUILD_TIME,
    FLOOR_WRITE_STEP,
    SERVER_CONTEXT_LIFE,
    ContextCache,
    Identity,
    TimeFloor,
    cpu_has_aes,
    kernel_synchronised,
    verification_time,
)
from tests.identity_kit import Flaw, Kit, shake, shared

DAY = 86400.0
NOW = datetime.now(UTC)


@pytest.fixture
def kit() -> Kit:
    return shared()


def cache(
    identity: Identity, clock: float, *, synchronised: bool, floor: TimeFloor | None = None
) -> ContextCache:
    return ContextCache(
        identity,
        floor or TimeFloor(build_time=0.0),
        clock=lambda: clock,
        monotonic=lambda: 0.0,
        synchronised=lambda: synchronised,
    )


@pytest.mark.parametrize(
    ("clock", "floor", "synchronised", "expected"),
    [
        (500.0, 100.0, True, 500.0),  # a right clock is believed
        (500.0, 100.0, False, 500.0),
        (0.0, 100.0, False, 100.0),  # 1970: the floor
        (0.0, 100.0, True, 100.0),  # even if the kernel calls that synchronised
        (5000.0, 100.0, False, 999.0),  # a clock too far ahead that nobody vouches for
        (5000.0, 100.0, True, 5000.0),  # a vouched-for clock: the certificate has expired
        (0.0, 5000.0, True, 999.0),  # the floor never locks this node out
        (0.0, 5000.0, False, 999.0),
    ],
)
def test_verification_time(clock: float, floor: float, synchronised: bool, expected: float) -> None:
    """(2), (3, R-4-10)"""
    found = verification_time(clock=clock, floor=floor, synchronised=synchronised, not_after=1000.0)
    assert found.timestamp() == expected


def test_floor_only_rises_and_is_kept(tmp_path: Path) -> None:
    """(3)"""
    path = tmp_path / "floor"
    floor = TimeFloor(path, build_time=1000.0)
    assert floor.seconds == 1000.0
    floor.heard(BUILD_TIME)
    floor.heard(5.0)
    floor.heard(float("nan"))
    floor.heard(float("inf"))
    assert floor.seconds == BUILD_TIME
    assert TimeFloor(path, build_time=1000.0).seconds == BUILD_TIME


def test_floor_is_written_once_an_hour(tmp_path: Path) -> None:
    path = tmp_path / "floor"
    floor = TimeFloor(path)
    start = BUILD_TIME + DAY
    floor.heard(start)
    floor.heard(start + FLOOR_WRITE_STEP - 1)
    assert float(path.read_text()) == start
    assert floor.seconds == start + FLOOR_WRITE_STEP - 1
    floor.heard(start + FLOOR_WRITE_STEP)
    assert float(path.read_text()) == start + FLOOR_WRITE_STEP


@pytest.mark.parametrize("content", ["", "x", "nan", "inf", "\xff"])
def test_floor_with_a_damaged_file_begins_at_the_build(tmp_path: Path, content: str) -> None:
    path = tmp_path / "floor"
    path.write_text(content, encoding="latin-1")
    assert TimeFloor(path).seconds == BUILD_TIME


def test_floor_that_cannot_be_written_holds_in_memory_and_counts(tmp_path: Path) -> None:
    floor = TimeFloor(tmp_path / "none" / "floor")
    floor.heard(BUILD_TIME + DAY)
    assert floor.seconds == BUILD_TIME + DAY
    assert floor.write_errors == 1


def test_fault_61_both_ends_in_1970_connect(kit: Kit) -> None:
    """R-4-10."""
    gateway, hub = (cache(kit.identity(n), 0.0, synchronised=False) for n in ("edge-1", "hub-1"))
    assert shake(gateway.tls(False), hub.tls(True)) == ("", "")


def test_fault_61_without_the_floor_1970_fails(kit: Kit) -> None:
    """What the floor is for: the same contexts judged by the clock alone refuse each other."""
    identity = kit.identity("edge-1")
    gateway = cache(identity, 0.0, synchronised=False)
    gateway.verification_time = lambda: datetime.fromtimestamp(0, UTC)  # type: ignore[method-assign]
    hub = cache(kit.identity("hub-1"), NOW.timestamp(), synchronised=True)
    assert "certificate verify failed" in shake(gateway.tls(False), hub.tls(True))[0]


def test_fault_61_certificate_from_the_future_of_a_stopped_clock(kit: Kit) -> None:
    """The clock stood still a year ago, the certificate is of today: the own notBefore is a floor."""
    clock = (NOW - timedelta(days=365)).timestamp()
    gateway = cache(kit.identity("edge-1"), clock, synchronised=False)
    hub = cache(kit.identity("hub-1"), NOW.timestamp(), synchronised=True)
    assert shake(gateway.tls(False), hub.tls(True)) == ("", "")


def test_fault_61_peer_renewed_after_our_enrolment(kit: Kit) -> None:
    """Our certificate is older than the hub's; what we heard from hubs since, or at enrolment, is the floor."""
    old = NOW - timedelta(days=100)
    hub = cache(kit.identity("hub-1", not_before=NOW - timedelta(days=2)), NOW.timestamp(), synchronised=True)
    stale = cache(kit.identity("edge-2", not_before=old), 0.0, synchronised=False)
    assert "certificate verify failed" in shake(stale.tls(False), hub.tls(True))[0]
    floor = TimeFloor(build_time=0.0)
    floor.heard((NOW - timedelta(days=1)).timestamp())
    heard = cache(kit.identity("edge-2", not_before=old), 0.0, synchronised=False, floor=floor)
    assert shake(heard.tls(False), hub.tls(True)) == ("", "")
    told = kit.identity("edge-2", not_before=old, upstream=("hub-1", "stp://h", NOW.timestamp() - DAY))
    assert shake(cache(told, 0.0, synchronised=False).tls(False), hub.tls(True)) == ("", "")


def test_fault_61_clock_far_ahead_and_unsynchronised(kit: Kit) -> None:
    ahead = NOW.timestamp() + 20 * 365 * DAY
    hub = cache(
        kit.identity("hub-1", not_after=NOW + timedelta(days=500)), NOW.timestamp(), synchronised=True
    )
    assert shake(cache(kit.identity("edge-1"), ahead, synchronised=False).tls(False), hub.tls(True)) == (
        "",
        "",
    )
    wrong, _ = shake(cache(kit.identity("edge-1"), ahead, synchronised=True).tls(False), hub.tls(True))
    assert "certificate verify failed" in wrong


def test_fault_61_expiry_is_still_judged_right(kit: Kit) -> None:
    """An expired peer is refused by a right clock, and by a stopped one that has heard a hub since."""
    hub = kit.identity("hub-1", Flaw.EXPIRED)
    edge = kit.identity("edge-1")
    right = cache(edge, NOW.timestamp(), synchronised=True)
    server = cache(hub, NOW.timestamp() - 2 * DAY, synchronised=True)
    assert "certificate verify failed" in shake(right.tls(False), server.tls(True))[0]
    floor = TimeFloor(build_time=0.0)
    floor.heard(NOW.timestamp())
    stopped = cache(edge, 0.0, synchronised=False, floor=floor)
    assert "certificate verify failed" in shake(stopped.tls(False), server.tls(True))[0]


def test_a_dial_gets_a_fresh_context_and_a_listener_keeps_its_for_a_minute(kit: Kit) -> None:
    clock = [0.0]
    contexts = ContextCache(kit.identity("hub-1"), TimeFloor(), monotonic=lambda: clock[0])
    assert contexts.tls(False) is not contexts.tls(False)
    first = contexts.tls(True)
    clock[0] = SERVER_CONTEXT_LIFE - 0.1
    assert contexts.tls(True) is first
    clock[0] = SERVER_CONTEXT_LIFE
    assert contexts.tls(True) is not first


def test_replace_takes_effect_at_once(kit: Kit) -> None:
    contexts = ContextCache(kit.identity("hub-1"), TimeFloor())
    before = contexts.tls(True)
    fresh = kit.identity("hub-1", not_after=NOW + timedelta(days=90))
    contexts.replace(fresh)
    assert contexts.tls(True) is not before
    assert contexts.leaf_der() == fresh.leaf_der


def test_the_machine_is_asked_without_harm() -> None:
    assert kernel_synchronised() in (True, False)
    assert cpu_has_aes() in (True, False)
