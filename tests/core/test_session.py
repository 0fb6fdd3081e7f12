"""stp.core.session: promises (1) to (5) of its head."""

from __future__ import annotations

import itertools

import pytest

from stp.core import frames
from stp.core.errors import ErrorCode, LocalCause, PacketError, UsageError
from stp.core.events import Connected, NewToken, SessionClosed, StreamReadable
from stp.core.packet import parse_init, parse_retry
from stp.core.session import MAX_EARLY, Session
from stp.core.states import LIVE, TRANSITIONS, Input, State
from stp.core.verbs import MAX_EVENTS
from tests.sim import START, Host, Network


def pair(seed: int = 0, **conditions: object) -> tuple[Network, Host, Host]:
    net = Network(seed, **conditions)
    return net, net.listener(), net.dialler()


def established(seed: int = 0) -> tuple[Network, Host, Host, Session, Session]:
    net, hub, edge = pair(seed)
    session = edge.connect(hub)
    peer = net.establish(session)
    net.run_for(0.5)
    net.log.clear()
    return net, hub, edge, session, peer


# -- the table

TABLE = """\
HANDSHAKE + KEYS -> KEYED
HANDSHAKE + LOCAL_CLOSE -> CLOSING
HANDSHAKE + SILENCE -> CLOSED
KEYED + PROOF -> ESTABLISHED
KEYED + LOCAL_CLOSE -> CLOSING
KEYED + PEER_CLOSE -> DRAINING
KEYED + SILENCE -> CLOSED
ESTABLISHED + LOCAL_CLOSE -> CLOSING
ESTABLISHED + PEER_CLOSE -> DRAINING
ESTABLISHED + SILENCE -> CLOSED
CLOSING + PEER_CLOSE -> DRAINING
CLOSING + DRAINED -> CLOSED
DRAINING + DRAINED -> CLOSED"""


def test_the_whole_table() -> None:
    """Promise (2). A change of the machine shows here in full."""
    lines = [f"{s.name} + {i.name} -> {to.name}" for (s, i), to in TRANSITIONS.items()]
    assert sorted(lines) == sorted(TABLE.split("\n"))


@pytest.mark.parametrize(("state", "what"), list(itertools.product(State, Input)))
def test_what_is_not_in_the_table_is_an_error(state: State, what: Input) -> None:
    _, _, _, session, _ = established()
    session.state = state
    if (state, what) in TRANSITIONS:
        session._enter(what)
        assert session.state is TRANSITIONS[state, what]
    else:
        with pytest.raises(KeyError):
            session._enter(what)


def test_nothing_leaves_the_closed_state() -> None:
    assert all(state is not State.CLOSED for state, _ in TRANSITIONS)
    assert all(to not in LIVE for (state, _), to in TRANSITIONS.items() if state not in LIVE)


# -- becoming connected


def test_both_sides_say_connected_once_and_first() -> None:
    _net, hub, edge, session, peer = established()
    events = edge.events(session)
    assert isinstance(events[0], Connected)
    assert events[0].peer.node == "hub-1"
    assert isinstance(events[1], NewToken)
    assert len(events) == 2
    (only,) = hub.events(peer)
    assert isinstance(only, Connected)
    assert only.peer.node == "edge-1"
    assert session.id == peer.id
    assert session.id is not None
    assert len(session.id) == 16
    assert session.handshake is peer.handshake is None


def test_the_dialling_side_is_connected_only_by_handshake_done() -> None:
    """Promise (1): TLS reports success before the listener has judged our certificate (R-4-6)."""
    net, hub, edge = pair()
    edge.auto_read = False
    session = edge.connect(hub)
    net.link(hub, edge).hook = lambda data, number: [] if data[0] & 0xC0 == 0x40 else [data]
    net.run(lambda: session.state is State.KEYED, limit=1.0)
    net.run_for(2.0)
    assert session.state is State.KEYED
    assert not edge.events(session)
    assert session.next_event() is None
    assert not session._context.agenda.ready
    net.link(hub, edge).hook = None
    net.run(lambda: session.state is State.ESTABLISHED, limit=3.0)
    assert isinstance(edge.events(session)[0], Connected)
    assert session.handshake is None, "R-4-21: TLS object, INIT keys and buffers go"


def test_news_before_the_proof_waits_for_it() -> None:
    """A lane's bytes overtake HANDSHAKE_DONE: first Connected, then the rest."""
    net, hub, edge = pair()
    lost: list[int] = []

    def lose_the_first(data: bytes, number: int) -> list[bytes]:
        if data[0] & 0xC0 == 0x40 and len(lost) < 1:
            lost.append(number)
            return []
        return [data]

    net.link(hub, edge).hook = lose_the_first
    session = edge.connect(hub)
    net.run(lambda: bool(lost), limit=5.0)
    (peer,) = hub.connected()
    lane = peer.open_stream()
    peer.write(lane, b"early")
    net.run(lambda: len(session._events) > 0, limit=5.0)
    assert session.state is State.KEYED
    assert session.next_event() is None
    net.run(lambda: session.state is State.ESTABLISHED, limit=5.0)
    assert isinstance(edge.events(session)[0], Connected)
    assert edge.received(session, lane) == b"early"


def test_data_before_the_keys_is_kept_up_to_a_limit() -> None:
    """A listener keeps the first DATA packets until the peer is authorised (protocol §4, R-4-5)."""
    net, hub, edge = pair()
    held: list[bytes] = []

    def overtake(data: bytes, number: int) -> list[bytes]:
        if data[0] & 0xC0 == 0xC0 and session.state is State.KEYED and not held:
            held.append(data)  # the client's last INIT comes after its DATA
            return []
        return [data]

    net.link(edge, hub).hook = overtake
    session = edge.connect(hub)
    net.run(lambda: bool(held), limit=1.0)
    for _ in range(30):
        session.write(0, b"x" * 1000)
        net.flush()
    net.run_for(0.012)
    (peer,) = hub.endpoint.sessions
    assert peer.state is State.HANDSHAKE
    assert 0 < peer.statistics().early_kept <= MAX_EARLY
    assert peer.statistics().early_dropped == 0
    peer.receive_data(bytes(40) * 30, 40, edge.addr, net.now)
    assert peer.statistics().early_kept == MAX_EARLY
    assert peer.statistics().early_dropped > 0
    net.inject(held[0], source=edge, to=hub)
    assert peer.state is State.ESTABLISHED
    assert hub.received_length(peer, 0) > 5000
    net.run(lambda: hub.received_length(peer, 0) == 30_000, limit=5.0)


def test_a_handshake_without_an_answer() -> None:
    net, _, edge = pair()
    session = edge.endpoint.connect(("203.0.113.1", 1), expected_node="hub-1", now=net.now)
    net.run(lambda: not session.live, limit=20.0)
    assert edge.events(session) == [SessionClosed(LocalCause.HANDSHAKE_TIMEOUT, "", False)]
    assert net.now - START == pytest.approx(10.0, abs=0.1)
    assert not edge.endpoint._cids


def test_giving_up_a_handshake() -> None:
    net, hub, edge = pair()
    session = edge.connect(hub)
    net.run(lambda: bool(hub.endpoint.sessions), limit=1.0)
    session.close(ErrorCode.GOING_AWAY, "changed my mind", net.now)
    assert edge.endpoint.take_ready() == [session]
    assert session.next_event() == SessionClosed(ErrorCode.GOING_AWAY, "changed my mind", False)
    net.run_for(11.0)
    assert session.state is State.CLOSED
    assert not hub.endpoint.sessions
    assert not hub.connected()


def test_init_and_retry_out_of_place() -> None:
    net, hub, edge = pair()
    session = edge.connect(hub)
    peer = net.establish(session)
    retry = next(d for _, s, _, d in net.log if s == hub.addr and d[0] == 0xE0)
    init = next(d for _, s, _, d in net.log if s == edge.addr and d[0] == 0xC0)
    with pytest.raises(PacketError):
        session.receive_retry(parse_retry(retry), hub.addr, net.now)
    with pytest.raises(PacketError):
        peer.receive_init(parse_init(init), edge.addr, net.now)


# -- verbs


def test_verbs_after_the_end() -> None:
    net, _, _, session, _ = established()
    lane = session.open_stream()
    session.close(ErrorCode.NO_ERROR, "", net.now)
    session.close(ErrorCode.LIMIT)
    for verb in (
        lambda: session.open_stream(),
        lambda: session.write(lane, b"x"),
        lambda: session.reset_stream(lane, 1),
        lambda: session.stop_stream(0, 1),
    ):
        with pytest.raises(UsageError):
            verb()
    assert session.room(lane) == 0
    assert session.unsent(lane) == 0
    assert session.unsent(999) == 0
    assert session.read(0) == b""


def test_readable_is_said_once_until_it_is_fetched() -> None:
    net, hub, _edge, session, peer = established()
    hub.on_ready = lambda _: None
    for _ in range(5):
        session.write(0, b"abc")
        net.run_for(0.1)
    found = []
    while (event := peer.next_event()) is not None:
        found.append(event)
    assert found == [StreamReadable(0)]
    assert peer.read(0) == b"abc" * 5
    assert peer.read(0) == b""
    session.write(0, b"more")
    net.run_for(0.1)
    assert peer.next_event() == StreamReadable(0)


def test_events_are_bounded() -> None:
    """Promise (5): a peer that opens and resets streams without end, an owner that does not look."""
    net, hub, edge, session, peer = established()
    hub.on_ready = lambda _: None
    space = session._data
    assert space is not None
    for n in range(2 * MAX_EVENTS):
        space.sealer.run()
        stream = 2 + 4 * n
        plain = frames.Stream(stream, 0, b"").encode() + frames.ResetStream(stream, 1, 0).encode()
        net.inject(space.sealer.seal(plain), source=edge, to=hub)
        if not peer.live:
            break
    assert not peer.live
    assert len(peer._events) <= MAX_EVENTS + 2
    assert peer._events[-1].code is ErrorCode.LIMIT  # type: ignore[union-attr]


def test_statistics_are_plain_numbers() -> None:
    net, _, edge, session, _ = established()
    found = session.statistics()
    assert found.rtt == pytest.approx(0.02, abs=0.001)
    assert found.datagrams_in > 0
    assert found.bytes_out > found.datagrams_out * 30
    assert found.in_flight == 0
    assert found.session_credit == 2 * 1024 * 1024
    space = session._data
    assert space is not None
    net.inject(b"\x40" + space.opener.current + bytes(60), source=("203.0.113.7", 7), to=edge)
    assert session.statistics().wrong_address == 1


# -- the end


def test_close_is_told_and_both_sides_are_gone_after_three_ptos() -> None:
    """R-9-6."""
    net, hub, edge, session, peer = established()
    data = session._data
    assert data is not None
    pto = data.recovery.rtt.pto()
    session.close(ErrorCode.RESTARTING, "back soon", net.now)
    assert session.state is State.CLOSING
    net.run_for(0.02)
    assert hub.closed(peer) == SessionClosed(ErrorCode.RESTARTING, "back soon", True)
    assert edge.closed(session) == SessionClosed(ErrorCode.RESTARTING, "back soon", False)
    assert peer.state is State.DRAINING
    net.run_for(3 * pto - 0.03)
    assert session.state is State.CLOSING
    net.run_for(0.02)
    assert session.state is State.CLOSED
    net.run_for(3.0)
    assert peer.state is State.CLOSED
    for host in (hub, edge):
        assert not host.endpoint._by_cid
        assert not host.endpoint._cids
        assert host.endpoint.next_timeout() is None


def test_unacknowledged_bytes_die_with_the_session() -> None:
    """Promise (4): nothing is retransmitted after CLOSE."""
    net, hub, edge, session, _peer = established()
    net.link(edge, hub).loss = 1.0
    session.write(0, bytes(5000))
    net.run_for(0.001)
    before = len(net.log)
    session.close(ErrorCode.NO_ERROR, "", net.now)
    net.run_for(5.0)
    assert len(net.log) == before + 1
    assert session.state is State.CLOSED


def test_a_closing_side_answers_ever_more_rarely_and_a_draining_one_never() -> None:
    """Promise (4): the 1st, 2nd, 4th, 8th … packet (protocol §9, R-9-6)."""
    net, hub, edge, session, peer = established()
    net.link(edge, hub).loss = 1.0  # the peer does not hear the CLOSE
    count = net.link(edge, hub).count
    session.close(ErrorCode.NO_ERROR, "", net.now)
    net.flush()
    assert net.link(edge, hub).count == count + 1
    space = peer._data
    assert space is not None
    answers = []
    for _ in range(20):
        before = net.link(edge, hub).count
        space.sealer.run()
        net.inject(space.sealer.seal(b"\x01"), source=hub, to=edge)
        answers.append(net.link(edge, hub).count - before)
    assert [n + 1 for n, a in enumerate(answers) if a] == [1, 2, 4, 8, 16]
    space.sealer.run()
    net.inject(space.sealer.seal(b"\x18"), source=hub, to=edge)  # no frame at all
    space.sealer.run()
    net.inject(space.sealer.seal(frames.Close(0, "").encode()), source=hub, to=edge)
    assert session.state is State.DRAINING
    before = net.link(edge, hub).count
    for _ in range(20):
        space.sealer.run()
        net.inject(space.sealer.seal(b"\x01"), source=hub, to=edge)
    assert net.link(edge, hub).count == before


def test_both_close_at_once() -> None:
    net, _hub, edge, session, peer = established()
    session.close(ErrorCode.NO_ERROR, "", net.now)
    peer.close(ErrorCode.RESTARTING, "", net.now)
    net.run_for(5.0)
    assert session.state is peer.state is State.CLOSED
    assert [e for e in edge.events(session) if isinstance(e, SessionClosed)] == [
        SessionClosed(ErrorCode.NO_ERROR, "", False)
    ]


def test_an_unknown_code_counts_as_protocol() -> None:
    net, hub, edge, session, peer = established()
    space = session._data
    assert space is not None
    space.sealer.run()
    net.inject(space.sealer.seal(frames.Close(0x7777, "who knows").encode()), source=edge, to=hub)
    assert hub.closed(peer) == SessionClosed(ErrorCode.PROTOCOL, "who knows", True)
