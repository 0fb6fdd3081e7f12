"""What a session says of itself is what the simulated network knows."""

from __future__ import annotations

import pytest

from stp.core.errors import ErrorCode
from stp.core.phases import KeyLimits
from stp.core.session import Session
from tests.sim import Host, Network


def pair(seed: int, **conditions: float) -> tuple[Network, Host, Host, Session, Session]:
    net = Network(seed, **conditions)
    limits = KeyLimits(packets=500)
    hub, edge = net.listener(key_limits=limits), net.dialler(key_limits=limits)
    session = edge.connect(hub)
    return net, hub, edge, session, net.establish(session)


def push(net: Network, hub: Host, session: Session, peer: Session, size: int) -> None:
    lane, wanted = session.open_stream(), size
    while wanted:
        piece = min(wanted, session.room(lane), 65_536)
        session.write(lane, bytes(piece))
        wanted -= piece
        net.run_for(0.02)
    net.run(lambda: hub.received_length(peer, lane) == size, limit=60.0)
    net.run_for(1.0)


@pytest.mark.parametrize("seed", range(4))
def test_statistics_agree_with_the_network(seed: int) -> None:
    net, hub, edge, session, peer = pair(seed, delay=0.03)
    up, down = net.both(edge, hub)
    net.run_for(1.0)
    before, lost_before = session.statistics().packets_lost, up.lost
    came = net.delivered[hub.addr] - peer.statistics().datagrams_in  # INITs: counted elsewhere
    up.loss = 0.02
    push(net, hub, session, peer, 1_500_000)
    found, theirs = session.statistics(), peer.statistics()
    assert up.lost - lost_before > 5
    lost = up.lost - lost_before
    # what asked for no ACK is lost unseen; what was probed for may be given up and arrive
    assert lost * 0.9 - 3 <= found.packets_lost - before <= lost * 1.1 + 3
    assert theirs.packets_lost == down.lost == 0
    assert found.datagrams_out == up.count
    assert theirs.datagrams_in + came == up.count - up.lost == net.delivered[hub.addr]
    assert found.rtt_min == pytest.approx(0.06, abs=0.001)
    assert found.rtt_min <= found.rtt <= found.rtt_latest + 8 * found.rtt_var
    assert found.in_flight == 0
    assert found.key_updates >= 1
    assert abs(found.key_updates - theirs.key_updates) <= 1  # the last one may not be answered yet
    assert (found.cids_local, found.cids_remote) == (4, 4)
    assert found.pacing_rate == pytest.approx(1.25 * found.cwnd / found.rtt)
    assert 0 < found.ssthresh < 1 << 40
    assert found.congestion_state == "congestion avoidance"


def test_what_was_only_overtaken_is_named() -> None:
    """Up to 15 ms out of order, nothing lost on the way."""
    net, hub, edge, session, peer = pair(5, delay=0.015)
    up, _ = net.both(edge, hub)
    up.jitter = 0.015
    push(net, hub, session, peer, 300_000)
    found = session.statistics()
    assert up.lost == 0
    assert 0 < found.packets_spurious <= found.packets_lost


def test_what_limits_a_sender_is_named() -> None:
    net, hub, _, session, peer = pair(1, delay=0.05, bandwidth=125_000.0)
    assert session.statistics().limited_by == "application"
    lane = session.open_stream()
    session.write(lane, bytes(1_000_000))
    seen = set()

    def look() -> bool:
        found = session.statistics()
        seen.add((found.limited_by, found.congestion_state))
        return hub.received_length(peer, lane) >= 300_000

    net.run(look, limit=20.0)
    assert {limit for limit, _ in seen} >= {"congestion window", "pacing"}
    assert "slow start" in {state for _, state in seen}
    hub.auto_credit = False
    net.run(lambda: session.statistics().limited_by == "flow credit", limit=60.0)
    assert session.live


def test_recovery_is_named_until_something_sent_after_the_loss_arrives() -> None:
    net = Network(2, delay=0.05)
    hub, edge = net.listener(), net.dialler(congestion="newreno")
    session = edge.connect(hub)
    peer = net.establish(session)
    link = net.link(edge, hub)
    lane = session.open_stream()
    session.write(lane, bytes(200_000))
    link.drop = {link.count + 12}
    seen: list[str] = []

    def look() -> bool:
        state = session.statistics().congestion_state
        if not seen or seen[-1] != state:
            seen.append(state)
        return hub.received_length(peer, lane) == 200_000 and not session.statistics().in_flight

    net.run(look, limit=20.0)
    assert seen == ["slow start", "recovery", "congestion avoidance"]


def test_totals_outlive_their_sessions() -> None:
    net, hub, edge, session, peer = pair(3, delay=0.02)
    net.link(edge, hub).loss = 0.05
    session.send_datagram(b"x")
    push(net, hub, session, peer, 300_000)
    live = edge.endpoint.totals()
    assert live.packets_lost == session.statistics().packets_lost > 0
    assert (live.datagrams_sent, hub.endpoint.totals().datagrams_received) in ((1, 1), (1, 0))
    edge.endpoint.close_all(ErrorCode.NO_ERROR, "", net.now)
    net.run_for(5.0)
    assert not edge.endpoint.sessions
    assert edge.endpoint.totals() == live
