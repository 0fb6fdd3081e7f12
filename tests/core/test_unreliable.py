"""Unreliable datagrams: how they leave, how they are counted, what they cost (protocol R-5-5, R-5-6)."""

from __future__ import annotations

import pytest

from stp.core.errors import ErrorCode, UsageError
from stp.core.events import DatagramReceived, SessionClosed
from stp.core.output import DATAGRAM_OVERHEAD
from stp.core.session import Session
from stp.core.unreliable import MAX_UNFETCHED, MAX_UNFETCHED_BYTES, MAX_WAITING, Datagrams, Flight
from tests.sim import Host, Network

SIZE = 1200 - DATAGRAM_OVERHEAD


def pair(seed: int, **conditions: float) -> tuple[Network, Host, Host, Session, Session]:
    net = Network(seed, **conditions)
    hub, edge = net.listener(), net.dialler()
    session = edge.connect(hub)
    return net, hub, edge, session, net.establish(session)


def received(host: Host, session: Session) -> list[bytes]:
    return [event.data for event in host.events(session) if isinstance(event, DatagramReceived)]


def test_a_datagram_arrives_both_ways_and_the_size_limit_is_a_packet() -> None:
    net, hub, edge, session, peer = pair(1)
    assert session.max_datagram_size == SIZE
    largest = bytes(range(256)) * 4 + bytes(SIZE - 1024)
    assert session.send_datagram(largest)
    assert session.send_datagram(b"")
    assert peer.send_datagram(b"down")
    with pytest.raises(UsageError, match=f"{SIZE + 1} bytes; {SIZE} fit"):
        session.send_datagram(bytes(SIZE + 1))
    net.run_for(0.5)
    assert received(hub, peer) == [largest, b""]
    assert received(edge, session) == [b"down"]
    assert max(len(data) for *_, data in net.log) == 1200
    counts = session.statistics()
    assert (counts.datagrams_sent, counts.datagrams_acked, counts.datagrams_lost) == (2, 2, 0)
    assert counts.datagrams_received == 1


def test_what_is_queued_before_the_handshake_leaves_after_it() -> None:
    net = Network(2)
    hub, edge = net.listener(), net.dialler()
    session = edge.connect(hub)
    assert session.send_datagram(b"early")
    peer = net.establish(session)
    net.run_for(0.2)
    assert received(hub, peer) == [b"early"]


def test_a_full_queue_refuses_and_counts() -> None:
    """(1)"""
    net, hub, _, session, peer = pair(3)
    taken = [session.send_datagram(n.to_bytes(2, "big")) for n in range(MAX_WAITING + 10)]
    assert taken == [True] * MAX_WAITING + [False] * 10
    net.run_for(1.0)
    assert [int.from_bytes(data, "big") for data in received(hub, peer)] == list(range(MAX_WAITING))
    assert session.statistics().datagrams_refused == 10


def test_an_owner_that_does_not_fetch_loses_the_oldest() -> None:
    """(1)"""
    net, hub, _, session, peer = pair(4)
    hub.on_ready = lambda session: None
    for n in range(MAX_UNFETCHED + 20):
        assert session.send_datagram(n.to_bytes(2, "big"))
        net.run_for(0.05)
    found = []
    while (event := peer.next_event()) is not None:
        assert isinstance(event, DatagramReceived)
        found.append(int.from_bytes(event.data, "big"))
    assert found == list(range(20, MAX_UNFETCHED + 20))
    assert peer.statistics().datagrams_dropped == 20
    assert peer.live


def test_unfetched_ones_are_bounded_in_bytes_too() -> None:
    """(1)"""
    queue = Datagrams()
    for _ in range(200):
        queue.on_received(bytes(8000))
    assert sum(map(len, queue.unfetched)) <= MAX_UNFETCHED_BYTES
    assert queue.counts.unfetched == 200 - len(queue.unfetched)
    while queue.unfetched:
        queue.fetch()
    for _ in range(65):
        queue.on_received(bytes(8000))
    assert len(queue.unfetched) == 65  # what was fetched is not counted any longer


@pytest.mark.parametrize("seed", range(5))
def test_what_is_counted_as_lost_is_what_the_network_lost(seed: int) -> None:
    """(2) The network knows the truth: every datagram arrived or did not."""
    net, hub, edge, session, peer = pair(seed, jitter=0.004)
    net.link(edge, hub).loss = 0.1
    for n in range(500):
        session.send_datagram(n.to_bytes(2, "big"))
        net.run_for(0.01)
    net.link(edge, hub).loss = 0.0
    net.run_for(3.0)
    arrived = len(received(hub, peer))
    counts = session.statistics()
    assert counts.datagrams_sent == 500
    assert counts.datagrams_acked == arrived
    assert counts.datagrams_lost == 500 - arrived > 10


def test_a_datagram_that_comes_late_is_not_lost() -> None:
    """(2)"""
    queue, token = Datagrams(), Flight()
    queue.put(b"x")
    assert queue.next(100) == b"x"
    queue.on_lost(token)
    queue.on_lost(token)
    assert (queue.counts.acked, queue.counts.lost) == (0, 1)
    queue.on_acked(token)
    assert (queue.counts.acked, queue.counts.lost) == (1, 0)


def test_what_no_longer_fits_is_dropped_and_counted() -> None:
    queue = Datagrams()
    for size in (1000, 1100, 900):
        queue.put(bytes(size))
    assert len(queue.next(1000) or b"") == 1000
    assert len(queue.next(1000) or b"") == 900
    assert queue.next(1000) is None
    assert (queue.counts.sent, queue.counts.oversized) == (2, 1)


@pytest.mark.parametrize("seed", range(2))
def test_datagrams_and_a_stream_share_a_slow_link(seed: int) -> None:
    """Neither starves the other, and both are held to the congestion window."""
    net, hub, edge, session, peer = pair(seed, delay=0.02, bandwidth=250_000.0, queue=25)
    lane = session.open_stream()
    sent = 0

    def offer() -> bool:
        nonlocal sent
        while session.send_datagram(bytes(SIZE)):
            sent += 1
        if session.room(lane) > 100_000:
            session.write(lane, bytes(50_000))
        return net.now >= end

    end = net.now + 8.0
    net.run(offer, limit=9.0)
    by_stream, by_datagram = hub.received_length(peer, lane), sum(map(len, received(hub, peer)))
    assert by_stream + by_datagram > 0.75 * 8 * 250_000
    assert 0.33 < by_datagram / by_stream < 3.0
    link = net.link(edge, hub)
    assert link.lost < 0.1 * link.count


def test_a_command_goes_before_a_flood_of_datagrams() -> None:
    net, hub, edge, session, peer = pair(7, delay=0.02, bandwidth=125_000.0)

    def offer() -> bool:
        while session.send_datagram(bytes(SIZE)):
            pass
        return net.now >= end

    end = net.now + 3.0
    net.run(offer, limit=4.0)
    session.write(0, bytes(1024))
    end = net.now + 10.0
    began = net.now
    net.run(lambda: offer() or hub.received_length(peer, 0) == 1024, limit=2.0)
    assert net.now - began < 0.5
    assert edge.closed(session) is None


def test_the_end_of_a_session_ends_its_datagrams() -> None:
    net, hub, edge, session, peer = pair(8)
    hub.on_ready = lambda session: None
    session.send_datagram(b"x")
    net.run_for(0.1)
    session.close(ErrorCode.NO_ERROR)
    net.run_for(0.5)
    event = peer.next_event()
    assert isinstance(event, SessionClosed)
    assert peer.next_event() is None
    with pytest.raises(UsageError, match="over"):
        session.send_datagram(b"y")
    assert edge.closed(session) is not None
