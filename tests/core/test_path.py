"""stp.core.path: promises (1) to (3) of its head."""

from __future__ import annotations

from itertools import count

import pytest

from stp.core import frames
from stp.core.errors import LimitError, ProtocolError
from stp.core.path import (
    ACTIVE_CIDS,
    DEAD_TIME,
    LINGERING,
    MAX_RETIRING,
    MAX_UNANSWERED,
    PING_REPEAT,
    Liveness,
    LocalCids,
    RemoteCids,
)


def local() -> LocalCids:
    numbers = count(1)

    def source() -> tuple[bytes, bytes]:
        n = next(numbers)
        return n.to_bytes(8, "big"), n.to_bytes(16, "big")

    return LocalCids(bytes(8), source)


def written(cids: LocalCids | RemoteCids) -> list[frames.Frame]:
    out = []
    while (found := cids.next_frame()) is not None:
        out += frames.decode(found[0])
        cids.on_sent()
    assert not cids.pending
    return out


def test_cids_are_issued_up_to_four_and_announced_once() -> None:
    """R-5-4."""
    cids = local()
    made = cids.issue(9)
    assert len(made) == ACTIVE_CIDS - 1
    assert cids.pending
    said = written(cids)
    assert [f.seq for f in said if isinstance(f, frames.NewCid)] == [1, 2, 3]
    assert [f.cid for f in said if isinstance(f, frames.NewCid)] == made
    assert not written(cids)
    assert cids.issue(1) == []


def test_a_lost_announcement_is_said_again_until_it_arrived() -> None:
    """R-6-6."""
    cids = local()
    cids.issue(2)
    written(cids)
    cids.on_lost(1)
    cids.on_lost(1)
    assert len(written(cids)) == 1
    cids.on_acked(1)
    cids.on_lost(1)
    assert not written(cids)
    cids.on_lost(2)
    cids.retire(2, bytes(8))
    assert not written(cids)


def test_a_retired_cid_is_gone_and_replaced() -> None:
    cids = local()
    made = cids.issue(3)
    assert cids.retire(1, bytes(8)) == made[0]
    assert cids.retire(1, bytes(8)) is None
    assert len(cids.issue(3)) == 1
    assert sorted(cids.active) == [0, 2, 3, 4]


def test_retired_cids_open_packets_for_a_while() -> None:
    """Promise (4), R-8-10: for packets under way, and not for many."""
    cids = local()
    made = cids.issue(3)
    assert cids.linger(b"retired!", 5.0) == []
    assert all(cids.linger(n.to_bytes(8, "big"), 6.0) == [] for n in range(100, 99 + LINGERING))
    assert cids.ours(b"retired!")
    assert cids.ours(made[0])
    assert not cids.ours(b"stranger")
    assert cids.linger(b"one more", 7.0) == [b"retired!"]
    assert not cids.ours(b"retired!")
    assert cids.forget(5.5) == []
    assert len(cids.forget(6.5)) == LINGERING - 1
    assert cids.forget(7.0) == [b"one more"]
    assert not cids.lingering


def test_a_fresh_cid_takes_the_place_of_the_present_one() -> None:
    """R-8-10."""
    cids = RemoteCids(bytes(8))
    assert not cids.renew()
    cids.on_new_cid(new(1))
    assert cids.renew()
    assert cids.current[0] == 1
    assert [f.seq for f in written(cids) if isinstance(f, frames.RetireCid)] == [0]
    assert not cids.renew()


def test_retiring_what_cannot_be_is_an_offence() -> None:
    """RFC 9000 §19.16."""
    cids = local()
    with pytest.raises(ProtocolError):
        cids.retire(1, bytes(8))
    with pytest.raises(ProtocolError):
        cids.retire(0, bytes(8))


def new(seq: int, prior: int = 0, cid: int = -1) -> frames.NewCid:
    return frames.NewCid(seq, prior, (seq if cid < 0 else cid).to_bytes(8, "big"), bytes(16))


def test_the_peers_cids_are_kept_and_retired_on_demand() -> None:
    cids = RemoteCids(bytes(8))
    for seq in (1, 2, 3, 3):
        assert not cids.on_new_cid(new(seq))
    assert sorted(cids.spare) == [1, 2, 3]
    assert cids.on_new_cid(new(4, prior=2))
    assert cids.current == (2, (2).to_bytes(8, "big"))
    assert sorted(cids.spare) == [3, 4]
    assert [f.seq for f in written(cids) if isinstance(f, frames.RetireCid)] == [1, 0]
    assert sorted(cids.tokens) == [2, 3, 4]


def test_a_retired_cid_that_comes_again_is_ignored() -> None:
    """Protocol §5 (R-5-4)."""
    cids = RemoteCids(bytes(8))
    cids.on_new_cid(new(5, prior=5))
    written(cids)
    assert not cids.on_new_cid(new(3))
    assert cids.current[0] == 5
    assert not cids.spare


def test_retirement_is_said_until_it_arrived() -> None:
    cids = RemoteCids(bytes(8))
    cids.on_new_cid(new(1, prior=1))
    written(cids)
    cids.on_lost(0)
    assert len(written(cids)) == 1
    cids.on_acked(0)
    cids.on_lost(0)
    assert not written(cids)


def test_offences_with_cids() -> None:
    cids = RemoteCids(bytes(8))
    with pytest.raises(ProtocolError):
        cids.on_new_cid(new(1, prior=2))
    cids.on_new_cid(new(1))
    with pytest.raises(ProtocolError):
        cids.on_new_cid(new(1, cid=77))
    for seq in (2, 3):
        cids.on_new_cid(new(seq))
    with pytest.raises(LimitError):
        cids.on_new_cid(new(4))


def test_a_flood_of_new_cids_is_a_limit() -> None:
    """Fault 30: a peer that makes us retire for ever (R-7-6)."""
    cids = RemoteCids(bytes(8))
    with pytest.raises(LimitError):
        for seq in range(1, 10_000):
            cids.on_new_cid(new(seq, prior=seq))
    assert len(cids._retiring) == MAX_RETIRING + 1


def test_an_idle_session_pings_three_times_and_gives_up() -> None:
    alive = Liveness(25.0, 100.0)
    assert alive.next_ping() == 125.0
    now = 125.0
    for _ in range(MAX_UNANSWERED):
        assert alive.on_ping_time(now)
        assert alive.next_ping() == now + PING_REPEAT
        now += PING_REPEAT
    assert not alive.on_ping_time(now)


def test_any_packet_of_the_peer_is_an_answer() -> None:
    alive = Liveness(25.0, 100.0)
    alive.on_ping_time(125.0)
    alive.on_heard(126.0)
    assert alive.next_ping() == 151.0


@pytest.mark.parametrize(("pto", "patience"), [(0.05, DEAD_TIME), (2.0, 12.0)])
def test_a_peer_is_dead_after_six_ptos_or_five_seconds(pto: float, patience: float) -> None:
    """Protocol §8: max(6 PTO, 5 s), counted from what was heard last or sent first."""
    alive = Liveness(25.0, 100.0)
    assert alive.dead_at(130.0, pto, DEAD_TIME) == pytest.approx(130.0 + patience)
    alive.on_heard(131.0)
    assert alive.dead_at(130.0, pto, DEAD_TIME) == pytest.approx(131.0 + patience)
