"""Fault matrix, transport rows, on the simulated network (level L1). A few seeds here, hundreds with `-m many`."""

from __future__ import annotations

import random

import pytest

from stp.core.errors import ErrorCode
from stp.core.events import Connected, NewToken, SessionClosed
from stp.core.initspace import AMPLIFICATION
from stp.core.session import Session
from stp.core.states import State
from tests.identity_kit import Flaw
from tests.sim import START, Host, Network


def seeds(few: int, many: int = 300) -> list[object]:
    """A few in every run, many by `-m many`."""
    return [*range(few), *(pytest.param(seed, marks=pytest.mark.many) for seed in range(few, many))]


def pair(seed: int, **conditions: object) -> tuple[Network, Host, Host]:
    net = Network(seed, **conditions)
    return net, net.listener(), net.dialler()


def payload(size: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(size)


def transfer(
    net: Network, sender: Session, receiver: tuple[Host, Session], data: bytes, *, limit: float
) -> int:
    """Move `data` on a fresh stream, fed as room allows, and compare it. Returns the stream."""
    host, session = receiver
    stream = sender.open_stream()
    fed = 0

    def done() -> bool:
        nonlocal fed
        room = sender.room(stream)
        if room and fed < len(data):
            sender.write(stream, data[fed : fed + room])
            fed += min(room, len(data) - fed)
            net.flush()
        return host.received_length(session, stream) >= len(data)

    net.run(done, limit=limit)
    assert host.received(session, stream) == data
    return stream


@pytest.mark.parametrize("seed", seeds(8))
def test_fault_01_handshake_survives_loss(seed: int) -> None:
    """30 % loss each way in bursts of up to 3, 30 ms RTT: complete within the 10 s of a handshake."""
    net, hub, edge = pair(seed, delay=0.015, loss=0.3, burst=3)
    session = edge.connect(hub)
    net.establish(session, limit=10.0)
    assert len(hub.connected()) == 1


@pytest.mark.parametrize("seed", seeds(8))
def test_fault_02_handshake_survives_corruption(seed: int) -> None:
    """30 % of the datagrams with a flipped bit: complete, and TLS never sees damage, or it would refuse (R-3-2)."""
    net, hub, edge = pair(seed, delay=0.015, corrupt=0.3)
    session = edge.connect(hub)
    net.establish(session, limit=10.0)
    assert not hub.refusals


def test_fault_03_handshake_at_half_the_datagrams_lost() -> None:
    """50 % loss: an attempt or, as uplinks do, the next one completes within 15 s."""
    late = [seed for seed in range(20) if not _connects_within(seed, 15.0)]
    assert len(late) <= 1


@pytest.mark.many
def test_fault_03_handshake_at_half_the_datagrams_lost_many() -> None:
    late = [seed for seed in range(300) if not _connects_within(seed, 15.0)]
    assert len(late) <= 3


def _connects_within(seed: int, limit: float) -> bool:
    net, hub, edge = pair(seed, delay=0.015, loss=0.5)
    session = edge.connect(hub)
    while net.now < START + limit:
        if session.state is State.ESTABLISHED:
            return True
        if not session.live:
            session = edge.connect(hub)
        net.run_for(0.05)
    return False


def test_fault_04_long_round_trip() -> None:
    """RTT 1.5 s: three round trips with Retry, and what was sent twice meanwhile closes nothing."""
    net, hub, edge = pair(0, delay=0.75)
    session = edge.connect(hub)
    assert net.run(lambda: session.state is State.ESTABLISHED, limit=10.0) <= 3 * 1.5 + 0.1
    net.establish(session)
    net.run_for(20.0)
    assert session.state is State.ESTABLISHED
    assert len(hub.connected()) == 1


@pytest.mark.parametrize("seed", seeds(6))
def test_fault_05_duplicates_and_reordering(seed: int) -> None:
    """30 % doubled, up to 40 ms out of order: one connection, each byte once."""
    net, hub, edge = pair(seed, duplicate=0.3, jitter=0.04)
    session = edge.connect(hub)
    peer = net.establish(session)
    transfer(net, session, (hub, peer), payload(100_000, seed), limit=30.0)
    transfer(net, peer, (edge, session), payload(50_000, seed), limit=30.0)
    assert hub.connected() == [peer]
    assert [type(e) for e in hub.events(peer)].count(Connected) == 1


@pytest.mark.parametrize("towards_hub", [True, False])
def test_fault_06_any_one_datagram_lost(towards_hub: bool) -> None:
    """The n-th datagram of either direction is lost, for every n of a handshake and a short talk."""
    n = 0
    while True:
        net, hub, edge = pair(n)
        lossy = net.link(edge, hub) if towards_hub else net.link(hub, edge)
        lossy.drop.add(n)
        session = edge.connect(hub)
        peer = net.establish(session, limit=10.0)
        transfer(net, session, (hub, peer), payload(3000), limit=10.0)
        transfer(net, peer, (edge, session), payload(3000), limit=10.0)
        assert session.state is peer.state is State.ESTABLISHED
        if lossy.count <= n:
            break
        n += 1
    assert n > 8


@pytest.mark.parametrize("seed", seeds(3, 100))
def test_fault_15_amplification_before_validation(seed: int) -> None:
    """Whatever the client loses after its first datagram, it is sent at most 3 × what it sent until validated.

    The NEW_TOKEN of a former session is the only way to get state without a Retry (R-4-20).
    """
    net, hub, edge = pair(seed)
    first = edge.connect(hub)
    net.establish(first)
    net.run_for(0.2)
    token = next(e.token for e in edge.events(first) if isinstance(e, NewToken))
    first.close(ErrorCode.NO_ERROR, "", net.now)
    net.run_for(1.0)
    net.log.clear()
    sent = net.link(edge, hub).count
    net.link(edge, hub).drop.update(range(sent + 1 + seed % 2, sent + 7))
    session = edge.connect(hub, token=token)
    bytes_in = bytes_out = 0
    passed = 0
    net.run(lambda: session.state is State.ESTABLISHED, limit=12.0)
    for _, source, _, data in net.log:
        if source == edge.addr:
            number = sent + passed
            passed += 1
            bytes_in += 0 if number in net.link(edge, hub).drop else len(data)
            if number > sent + 7:
                break  # from here on the client has answered: validated
        else:
            bytes_out += len(data)
            assert bytes_out <= AMPLIFICATION * bytes_in
    assert bytes_out


@pytest.mark.parametrize("seed", seeds(3, 100))
def test_fault_18_replay_of_everything(seed: int) -> None:
    """Every datagram again, three times, in order and shuffled, from the same and from another address."""
    net, hub, edge = pair(seed)
    session = edge.connect(hub)
    peer = net.establish(session)
    up = transfer(net, session, (hub, peer), payload(20_000, seed), limit=10.0)
    down = transfer(net, peer, (edge, session), payload(20_000, seed), limit=10.0)
    net.run_for(1.0)
    captured = list(net.log)
    net.keep_log = False
    for again in range(3):
        if again:
            net.rng.shuffle(captured)
        for _, source, to, data in captured:
            elsewhere = ("203.0.113.9", 4444) if again == 2 else source
            net.inject(data, source=elsewhere, to=net.hosts[to])
    net.run_for(15.0)
    assert hub.connected() == [peer]
    assert hub.received_length(peer, up) == 20_000
    assert edge.received_length(session, down) == 20_000
    assert session.state is peer.state is State.ESTABLISHED
    assert hub.endpoint.statistics().half_open == 0


def test_fault_18_replay_into_a_restarted_listener() -> None:
    """The same at a listener that lost its memory: no session, no answer to DATA."""
    net, hub, edge = pair(1)
    session = edge.connect(hub)
    peer = net.establish(session)
    transfer(net, session, (hub, peer), payload(5000), limit=10.0)
    captured = [data for _, _, to, data in net.log if to == hub.addr]
    other = Network(2)
    again = other.listener()
    for data in captured:
        other.inject(data, source=edge.addr, to=again)
    other.run_for(15.0)
    assert not again.sessions
    assert all(len(data) < 200 for _, source, _, data in other.log if source == again.addr)  # Retries


HELLO_SEEDS = seeds(10, 200)
"""The few take a byte at random, the many one after the other: a hello has fewer than 150."""


@pytest.mark.parametrize("towards_hub", [True, False])
@pytest.mark.parametrize("seed", HELLO_SEEDS)
def test_fault_23_edited_hello_never_confirms(towards_hub: bool, seed: int) -> None:
    """A man in the middle with the network key edits a byte of a hello and seals the INIT again (R-3-5)."""
    from tests.faults.middle import HelloEditor

    net, hub, edge = pair(seed)
    position = random.Random(seed).random() if seed < 10 else (seed - 10) / 190
    editor = HelloEditor(towards_hub=towards_hub, position=position)
    net.link(edge, hub).hook = editor.from_client
    net.link(hub, edge).hook = editor.from_server
    session = edge.connect(hub)
    net.run_for(12.0)
    assert editor.edited
    assert not session.live
    assert not edge.connected()
    assert not hub.connected()


@pytest.mark.parametrize("flaw", [f for f in Flaw if f not in (Flaw.NONE, Flaw.SERVER_ONLY)])
def test_fault_24_flawed_listener(flaw: Flaw) -> None:
    """A listener with a certificate that is not good for it: refused, nobody says "connected" (R-4-7)."""
    net = Network(1)
    hub, edge = net.listener(flaw=flaw), net.dialler()
    _must_be_refused(net, hub, edge)


@pytest.mark.parametrize("flaw", [f for f in Flaw if f not in (Flaw.NONE, Flaw.CLIENT_ONLY)])
def test_fault_24_flawed_dialler(flaw: Flaw) -> None:
    """The same on the dialling side; the listener says why to its owner (R-4-7)."""
    net = Network(1)
    hub, edge = net.listener(), net.dialler(flaw=flaw)
    _must_be_refused(net, hub, edge)
    assert len(hub.refusals) == 1
    assert hub.refusals[0][2]


def test_fault_24_other_node_than_expected() -> None:
    """Any gateway has a good certificate; only the one that was meant may answer (R-4-8)."""
    net = Network(1)
    other, edge = net.listener("gateway-7"), net.dialler()
    assert not _must_be_refused(net, other, edge, node="hub-1").by_peer


def test_fault_24_revoked() -> None:
    """The listener's owner refuses by name or serial number."""
    net = Network(1)
    hub, edge = net.listener(authorise=lambda peer: f"{peer.node} is revoked"), net.dialler()
    closed = _must_be_refused(net, hub, edge)
    assert "edge-1 is revoked" in closed.reason
    assert closed.by_peer
    assert hub.refusals[0][1].node == "edge-1"
    assert "revoked" in hub.refusals[0][2]


def _must_be_refused(net: Network, hub: Host, edge: Host, node: str = "hub-1") -> SessionClosed:
    session = edge.connect(hub, node=node)
    net.run(lambda: not session.live, limit=5.0)
    closed = edge.closed(session)
    assert closed is not None
    assert closed.code is ErrorCode.AUTH
    assert closed.reason
    # one round trip for Retry, one until the certificates have met; then at most 2 RTT
    assert net.now - START <= (2 + 2) * 0.02 + 0.001
    net.run_for(10.0)
    assert not edge.connected()
    assert not hub.connected()
    assert edge.events(session) == [closed]
    assert not hub.endpoint.sessions
    assert not edge.endpoint.sessions
    return closed


@pytest.mark.parametrize("seed", seeds(3, 50))
def test_fault_58_token_from_another_address(seed: int) -> None:
    """NEW_TOKEN from a new address: connected. A used one draws a Retry, then connected."""
    net, hub, edge = pair(seed)
    first = edge.connect(hub)
    net.establish(first)
    net.run_for(0.2)
    token = next(e.token for e in edge.events(first) if isinstance(e, NewToken))
    moved = net.host("edge-1", addr=("198.51.100.77", 1234))
    for used in (False, True):
        retries = hub.endpoint.statistics().retries_sent
        start = net.now
        session = moved.connect(hub, token=token)
        net.run(lambda session=session: session.state is State.ESTABLISHED, limit=5.0)  # type: ignore[misc]
        assert (hub.endpoint.statistics().retries_sent > retries) is used
        assert net.now - start <= (0.02 * 4 if used else 0.02 * 3) + 0.001


@pytest.mark.parametrize("seed", seeds(4, 400))
def test_fault_63_stalled_lanes_do_not_stop_receipts(seed: int) -> None:
    """Two lanes each way stand still for want of credit; stream 0 flows both ways; then all moves on (R-7-2)."""
    net, hub, edge = pair(seed, loss=0.05)
    session = edge.connect(hub)
    peer = net.establish(session)
    hub.auto_credit = edge.auto_credit = False
    lanes = {s: [s.open_stream(weight=w) for w in (32, 16)] for s in (session, peer)}
    data = payload(900_000, seed)
    for end, mine in lanes.items():
        for lane in mine:
            end.write(lane, data)
    net.run_for(5.0)
    for end, host, other in ((session, hub, peer), (peer, edge, session)):
        for lane in lanes[end]:
            assert end.unsent(lane) > 0
            assert host.received_length(other, lane) <= 512 * 1024
    for number in range(40):
        receipt = number.to_bytes(4, "big") * 500
        session.write(0, receipt)
        peer.write(0, receipt)
        done = 2000 * (number + 1)
        net.run(
            lambda done=done: (  # type: ignore[misc]
                hub.received_length(peer, 0) == done and edge.received_length(session, 0) == done
            ),
            limit=5.0,
        )
    for host, end in ((hub, peer), (edge, session)):
        host.auto_credit = True
        for lane in lanes[session if end is peer else peer]:
            end.advance_credit(lane, host.received_length(end, lane))
    net.run(
        lambda: all(
            host.received_length(other, lane) == len(data)
            for end, host, other in ((session, hub, peer), (peer, edge, session))
            for lane in lanes[end]
        ),
        limit=30.0,
    )
    assert hub.received(peer, lanes[session][0]) == data
