"""stp.core.endpoint: promises (1) to (4) of its head."""

from __future__ import annotations

import gc
import random
import sys

import pytest

from stp.core import admission, packet
from stp.core.endpoint import MAX_ANSWERS, EndpointConfig
from stp.core.errors import ErrorCode, UsageError
from stp.core.events import NewToken
from stp.core.keys import initial_keys
from stp.core.output import Transmit
from stp.core.session import Session
from stp.core.states import State
from tests.identity_kit import NETWORK_KEY
from tests.sim import START, Host, Network


def pair(seed: int = 0, **conditions: object) -> tuple[Network, Host, Host]:
    net = Network(seed, **conditions)
    return net, net.listener(), net.dialler()


def first_init(net: Network, edge: Host, hub: Host) -> bytes:
    """A tokenless INIT as a client sends it; the client is forgotten."""
    session = edge.connect(hub)
    (first, *_) = edge.endpoint.datagrams_to_send(net.now)
    session.abandon()
    return first.data


def token_of(net: Network, hub: Host, edge: Host) -> bytes:
    session = edge.connect(hub)
    net.establish(session)
    net.run_for(0.2)
    session.close(ErrorCode.NO_ERROR, "", net.now)
    net.run_for(1.0)
    return next(e.token for e in edge.events(session) if isinstance(e, NewToken))


# -- strangers


def test_a_stranger_costs_no_state() -> None:
    """Promise (1), fault 14 in small: tokenless INITs from any number of addresses (R-4-26)."""
    net, hub, edge = pair()
    init = first_init(net, edge, hub)
    gc.collect()
    before = sum(len(table) for table in _tables(hub))
    for n in range(2000):
        hub.endpoint.receive(init, (f"198.51.{n >> 8}.{n & 255}", 9), net.now)
        (answer,) = hub.endpoint.datagrams_to_send(net.now)
        assert len(answer.data) <= len(init) // 8
        assert answer.data[0] == packet.RETRY_BYTE
    assert sum(len(table) for table in _tables(hub)) == before
    assert hub.endpoint.next_timeout() is None
    assert hub.endpoint.statistics().retries_sent == 2000


def _tables(host: Host) -> list[object]:
    endpoint = host.endpoint
    found = [endpoint._by_cid, endpoint._by_init, endpoint._cids, endpoint._unfinished, endpoint._heap]
    found += [endpoint._admission._buckets, endpoint._admission._half_open, endpoint._agenda.to_send]
    return found  # type: ignore[return-value]


def test_answers_to_strangers_are_bounded() -> None:
    net, hub, edge = pair()
    init = first_init(net, edge, hub)
    for n in range(MAX_ANSWERS + 10):
        hub.endpoint.receive(init, ("198.51.100.1", n), net.now)
    assert len(hub.endpoint.datagrams_to_send(net.now)) == MAX_ANSWERS
    assert hub.endpoint.statistics().dropped_answers == 10


def test_garbage_gets_silence() -> None:
    """Promise (2) and fault 16: random, cut, of another version, with a bad tag, to nobody (R-2-1, R-2-7)."""
    net, hub, edge = pair()
    session = edge.connect(hub)
    net.establish(session)
    net.run_for(0.5)
    net.flush()
    rng = random.Random(1)
    init = first_init(net, edge, hub)
    samples = [b"", b"\x40", b"\xc0", b"\xe0", b"\x00" * 1200, b"\xff" * 1200, init[:1199], init[:40]]
    samples += [rng.randbytes(rng.randrange(1500)) for _ in range(3000)]
    samples += [
        bytes((first,)) + rng.randbytes(1300) for first in (0x40, 0x41, 0xC0, 0xE0) for _ in range(200)
    ]
    samples += [init[:1] + b"\x00\x00\x00\x01" + init[5:], init[:-1] + bytes((init[-1] ^ 1,)), init + b"\x00"]
    samples += [packet.build_retry(init[13:21], bytes(8), b"token", bytes(16), bytes(8))]
    samples.append(b"\x40" + next(iter(hub.endpoint._by_cid)) + rng.randbytes(100))
    for host in (hub, edge):
        for data in samples:
            host.endpoint.receive(data, ("203.0.113.5", 5), net.now)
            host.endpoint.receive(memoryview(data), edge.addr, net.now, 100)
        assert [t for t in host.endpoint.datagrams_to_send(net.now) if len(t.data) != 0] == []
    counts = hub.endpoint.statistics()
    assert min(counts.dropped_garbage, counts.dropped_unknown_cid, counts.dropped_bad_init) > 100
    assert counts.dropped_bad_retry > 100
    assert session.state is State.ESTABLISHED


def test_a_short_init_and_one_from_elsewhere_get_silence() -> None:
    """R-4-13. All are well sealed, so that only size and address speak against them."""
    net, hub, edge = pair()
    stranger = ("203.0.113.5", 5)
    init = packet.parse_init(first_init(net, edge, hub))
    keys = initial_keys(init.dcid, NETWORK_KEY).client
    plain = keys.open(init.pn, init.sealed, init.aad)
    for size, answers in ((len(plain) - 1, 0), (len(plain), 1)):
        hub.endpoint.receive(init.aad + keys.seal(init.pn, plain[:size], init.aad), stranger, net.now)
        assert len(hub.endpoint.datagrams_to_send(net.now)) == answers

    edge.connect(hub)
    for sent in edge.endpoint.datagrams_to_send(net.now):
        hub.endpoint.receive(sent.data, edge.addr, net.now)
    edge.endpoint.receive(hub.endpoint.datagrams_to_send(net.now)[0].data, hub.addr, net.now)
    one, two = edge.endpoint.datagrams_to_send(net.now)
    hub.endpoint.receive(one.data, edge.addr, net.now)
    before = hub.endpoint.statistics().dropped_bad_init
    hub.endpoint.receive(two.data, stranger, net.now)
    assert hub.endpoint.statistics().dropped_bad_init == before + 1
    hub.endpoint.receive(two.data, edge.addr, net.now)
    assert hub.endpoint.statistics().dropped_bad_init == before + 1


def test_who_does_not_listen_does_not_answer() -> None:
    net, hub, edge = pair()
    init = first_init(net, edge, hub)
    other = net.dialler("edge-2")
    net.inject(init, source=edge, to=other)
    assert other.endpoint.statistics().dropped_not_accepting == 1
    assert other.endpoint.datagrams_to_send(net.now) == []


def test_fault_17_without_the_network_key_a_listener_is_silent() -> None:
    """Fault 17: 0 bytes for a scanner (R-3-6)."""
    net, hub, _ = pair()
    scanner = net.dialler("edge-9", network_keys=(bytes(32),))
    session = scanner.connect(hub)
    net.run_for(12.0)
    assert session.state is State.CLOSED
    assert not [1 for _, source, _, _ in net.log if source == hub.addr]
    assert hub.endpoint.statistics().dropped_bad_init > 0


@pytest.mark.parametrize("keys", [(bytes(32), NETWORK_KEY), (NETWORK_KEY, bytes(32))])
def test_two_network_keys_are_accepted_during_rotation(keys: tuple[bytes, ...]) -> None:
    """R-3-6."""
    net = Network()
    hub = net.listener(network_keys=keys)
    net.establish(net.dialler().connect(hub))


def test_no_network_key_at_all() -> None:
    net = Network()
    hub, edge = net.listener(network_keys=()), net.dialler(network_keys=())
    net.establish(edge.connect(hub))


# -- tokens


def test_a_retry_token_works_once_per_address_and_not_for_long() -> None:
    """Fault 19, the part that needs an endpoint."""
    net, hub, edge = pair()
    session = edge.connect(hub)
    net.establish(session)
    with_token = next(
        d for _, s, _, d in net.log if s == edge.addr and d[0] == 0xC0 and packet.parse_init(d).token
    )
    session.close(ErrorCode.NO_ERROR, "", net.now)
    net.run_for(5.0)
    counts = hub.endpoint.statistics()
    bad = counts.dropped_bad_token
    net.inject(with_token, source=("203.0.113.1", 1), to=hub)
    assert hub.endpoint.statistics().dropped_bad_token == bad + 1
    net.run_for(10.0)
    net.inject(with_token, source=edge, to=hub)
    assert hub.endpoint.statistics().dropped_bad_token == bad + 2
    assert hub.endpoint.statistics().half_open == 0


def test_a_node_token_saves_a_round_trip_once() -> None:
    net, hub, edge = pair()
    token = token_of(net, hub, edge)
    start, retries = net.now, hub.endpoint.statistics().retries_sent
    session = edge.connect(hub, token=token)
    net.run(lambda: session.state is State.ESTABLISHED, limit=1.0)
    assert net.now - start == pytest.approx(0.04, abs=0.001)
    assert hub.endpoint.statistics().retries_sent == retries
    again = edge.connect(hub, token=token)
    net.run(lambda: again.state is State.ESTABLISHED, limit=1.0)
    assert hub.endpoint.statistics().retries_sent > retries


def test_a_node_token_of_another_node_is_refused() -> None:
    """Protocol §4: the certificate must name it, else AUTH."""
    net, hub, edge = pair()
    token = token_of(net, hub, edge)
    thief = net.dialler("edge-2")
    session = thief.connect(hub, token=token)
    net.run(lambda: not session.live, limit=5.0)
    closed = thief.closed(session)
    assert closed is not None
    assert closed.code is ErrorCode.AUTH


# -- limits


def test_handshakes_of_one_address_are_limited_others_pass() -> None:
    """Fault 20 in small: a flood from one address, one honest client elsewhere (R-4-25)."""
    net, hub, _ = pair()
    flood = net.dialler("edge-9")
    sessions = [flood.connect(hub) for _ in range(30)]
    net.run_for(0.5)
    connected = sum(s.state is State.ESTABLISHED for s in sessions)
    assert connected <= admission.ADDRESS_BURST + 0.5 * admission.ADDRESS_RATE + 1
    assert hub.endpoint.statistics().dropped_admission > 0
    honest = net.dialler("edge-2")
    start = net.now
    net.establish(honest.connect(hub), limit=1.0)
    assert net.now - start < 0.1


def half_open(net: Network, hub: Host, count: int, *, token: bytes = b"") -> list[Session]:
    """Clients, each at an address of its own, that get as far as state on the listener and fall silent."""
    sessions = []
    for n in range(count):
        silent = net.host("edge-1", addr=(f"10.{len(net.hosts) >> 8}.{len(net.hosts) & 255}.1", n))
        net.link(silent, hub).hook = lambda data, number: (
            [data] if (len(packet.parse_init(data).token) and number < 3) or number < 2 else []
        )
        sessions.append(silent.connect(hub))
        net.run_for(0.05)
    return sessions


def test_fault_21_unfinished_handshakes_are_bounded_and_gone_in_ten_seconds() -> None:
    """Promise (3), fault 21 in small: the stalest goes first; one who means it gets in."""
    net = Network()
    hub, edge = net.listener(max_half_open=8), net.dialler()
    token = token_of(net, hub, edge)
    silent = half_open(net, hub, 7)
    assert hub.endpoint.statistics().half_open == 4  # half of them are for those with a token
    assert hub.endpoint.statistics().handshakes_evicted == 3
    net.establish(edge.connect(hub, token=token), limit=1.0)
    net.establish(net.dialler("edge-3").connect(hub), limit=1.0)
    net.run_for(11.0)
    assert hub.endpoint.statistics().half_open == 0
    assert not any(s.live for s in silent)
    assert not hub.endpoint._by_init
    assert not hub.endpoint._admission._half_open


def test_a_token_may_take_the_place_of_a_stranger() -> None:
    net = Network()
    hub, edge = net.listener(max_half_open=2), net.dialler()
    tokens = [token_of(net, hub, edge) for _ in range(3)]
    half_open(net, hub, 1)
    counts = hub.endpoint.statistics
    for n, token in enumerate(tokens):
        mute = net.host("edge-1", addr=("10.9.9.9", n))
        net.link(hub, mute).loss = 1.0
        mute.connect(hub, token=token)
        net.run_for(0.05)
    assert counts().half_open == 2
    assert counts().handshakes_evicted == 2


# -- sessions


def test_many_sessions_of_one_endpoint() -> None:
    net = Network()
    hubs = [net.listener(f"hub-{n}") for n in range(3)]
    gateway = net.listener("gateway-1")
    sessions = [gateway.connect(hub) for hub in hubs]
    device = net.dialler("edge-1")
    own = device.connect(gateway)
    for session in (*sessions, own):
        net.establish(session)
    for n, session in enumerate(sessions):
        session.write(0, f"to hub {n}".encode())
    net.run_for(0.1)
    for n, hub in enumerate(hubs):
        (peer,) = hub.connected()
        assert hub.received(peer, 0) == f"to hub {n}".encode()
    assert len(gateway.endpoint.sessions) == 4
    assert gateway.endpoint.statistics().sessions == 4
    gateway.endpoint.close_all(ErrorCode.RESTARTING, "upgrade", net.now)
    net.run_for(5.0)
    assert gateway.endpoint.sessions == []
    assert gateway.endpoint.next_timeout() is None
    for hub in hubs:
        closed = hub.closed(hub.connected()[0])
        assert closed is not None
        assert closed.code is ErrorCode.RESTARTING


def test_a_closed_session_leaves_nothing_behind() -> None:
    """Promise (4)."""
    net, hub, edge = pair()
    net.keep_log = False
    for _ in range(5):
        session = edge.connect(hub)
        peer = net.establish(session)
        session.write(0, b"x" * 5000)
        peer.write(0, b"x" * 5000)
        net.run_for(0.2)
        session.close(ErrorCode.NO_ERROR, "", net.now)
        net.run_for(3.0)
    for host in (hub, edge):
        net.flush()
        assert host.endpoint.next_timeout() is None
        assert sum(len(table) for table in _tables(host)) == len(host.endpoint._admission._buckets)  # type: ignore[arg-type]
    host_sessions, hub.sessions, hub._events, hub._received = hub.sessions, [], {}, {}
    last = host_sessions.pop()
    host_sessions.clear()
    gc.collect()
    assert sys.getrefcount(last) <= 3


def test_ready_sessions_are_handed_out_once() -> None:
    net, hub, edge = pair()
    session = edge.connect(hub)
    peer = net.establish(session)
    net.run_for(0.2)
    seen: list[Session] = []
    hub.on_ready = seen.append
    for lane in (session.open_stream(), session.open_stream()):
        session.write(lane, b"x" * 3000)
    session.write(0, b"y")
    net.run_for(0.2)
    assert set(seen) == {peer}
    assert len(seen) < 9
    assert hub.endpoint.take_ready() == []


def test_the_heap_of_timers_moves_lazily() -> None:
    """A busy session does not push a timer per packet."""
    net, hub, edge = pair()
    session = edge.connect(hub)
    net.establish(session)
    lane = session.open_stream()
    pushes = hub.endpoint._pushes
    for _ in range(200):
        session.write(lane, bytes(2400))
        net.run_for(0.01)
    assert hub.endpoint.statistics().datagrams_in > 400
    assert hub.endpoint._pushes - pushes < 600
    assert len(hub.endpoint._heap) < 10
    hub.endpoint.handle_timeout(net.now)  # too early: no harm
    assert session.state is State.ESTABLISHED


def test_a_timer_of_a_session_that_is_over() -> None:
    net, hub, edge = pair()
    session = edge.connect(hub)
    net.flush()
    due = edge.endpoint.next_timeout()
    assert due is not None
    session.abandon()  # by its owner, while the heap still knows it
    edge.endpoint.handle_timeout(due)
    assert session.next_timeout() is None
    net.flush()
    assert edge.endpoint.next_timeout() is None
    assert not edge.endpoint._cids


def test_a_buffer_may_hold_datagrams_of_several_sessions_and_kinds() -> None:
    """One source may dial twice; the kernel joins what comes from it."""
    net, hub, edge = pair()
    one, two = edge.connect(hub), edge.connect(hub)
    peers = net.establish(one), net.establish(two)
    net.run_for(0.3)
    init = first_init(net, edge, hub)
    for session in (one, two):
        session.write(session.open_stream(), b"z" * 1154)
    packets = [t.data for t in edge.endpoint.datagrams_to_send(net.now)]
    assert [len(p) for p in packets] == [1200, 1200]
    retries = hub.endpoint.statistics().retries_sent
    hub.endpoint.receive(packets[0] + init + packets[1] + b"\x00" * 1200, edge.addr, net.now, 1200)
    net.flush()
    assert [hub.received_length(peer, 2) for peer in peers] == [1154, 1154]
    assert hub.endpoint.statistics().retries_sent == retries + 1
    hub.endpoint.receive(init + packets[0], edge.addr, net.now, 1200)
    assert peers[0].statistics().repeated == 1


def test_the_leaf_may_change_between_handshakes() -> None:
    net = Network()
    calls: list[int] = []
    hub, edge = net.listener(), net.dialler()
    leaf = hub.endpoint._config.leaf_der

    def current() -> bytes:
        calls.append(1)
        assert isinstance(leaf, bytes)
        return leaf

    hub.endpoint._config.leaf_der = current
    net.establish(edge.connect(hub))
    assert calls


def test_keys_that_outlive_a_restart() -> None:
    """With the same keys and instance a CID stays ours (protocol §8), with other ones it does not."""
    net = Network()
    one = net.listener(cid_key=b"c" * 32, reset_key=b"r" * 32, instance=7)
    cid = one.endpoint._new_cid()
    assert packet.cid_is_ours(b"c" * 32, 7, cid)
    assert not packet.cid_is_ours(b"c" * 32, 8, cid)
    assert one.endpoint._reset_token(cid) == packet.reset_token(b"r" * 32, cid)


def test_a_cid_is_never_given_twice() -> None:
    net = Network()
    hub = net.listener()
    draws = iter([b"aaaa", b"aaaa", b"aaaa", b"bbbb"])
    hub.endpoint._config.random_bytes = lambda n: next(draws)
    first = hub.endpoint._new_cid()
    session = Session.__new__(Session)
    session.in_to_send = True
    hub.endpoint._adopt(session, first)
    assert hub.endpoint._new_cid() != first
    with pytest.raises(UsageError):
        hub.endpoint._adopt(session, first)


def test_transmits_keep_their_order_and_their_address() -> None:
    net, hub, edge = pair()
    session = edge.connect(hub)
    for sent in edge.endpoint.datagrams_to_send(net.now):
        assert isinstance(sent, Transmit)
        assert sent.addr == hub.addr
        assert len(sent.data) == packet.INIT_DATAGRAM
    assert edge.endpoint.datagrams_to_send(net.now) == []
    assert edge.endpoint.next_timeout() == pytest.approx(START + 0.3)
    assert session.state is State.HANDSHAKE


def test_config_names_its_defaults() -> None:
    config = EndpointConfig(tls=lambda server: None, leaf_der=b"", random_bytes=bytes)
    assert (config.datagram, config.max_datagram, config.max_half_open) == (1200, 1472, 256)
    assert config.accept is False
