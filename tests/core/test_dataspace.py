"""stp.core.dataspace: promises (1) to (3) of its head, by two sessions and by a peer that misbehaves."""

from __future__ import annotations

import pytest

from stp.core import frames
from stp.core.acks import PRUNE_RANGES
from stp.core.congestion import MAX_BURST_PACKETS
from stp.core.errors import ErrorCode, LocalCause
from stp.core.events import StreamOpened, StreamReset, StreamStopped, StreamWritable
from stp.core.flow import STREAM_WINDOW
from stp.core.output import MAX_PATH_ANSWERS, Transmit
from stp.core.packetizer import CLOSE_RESERVE
from stp.core.path import DEAD_TIME, KEEPALIVE, MAX_UNANSWERED, PING_REPEAT
from stp.core.states import State
from stp.core.streams import SEND_BUFFER, WRITABLE_ROOM
from tests.sim import Host, Network


class Talk:
    """An established pair with hands on the wire."""

    def __init__(self, seed: int = 0, **conditions: object) -> None:
        self.net = Network(seed, **conditions)
        self.hub, self.edge = self.net.listener(), self.net.dialler()
        self.session = self.edge.connect(self.hub)
        self.peer = self.net.establish(self.session)
        self.net.run_for(0.5)
        self.net.log.clear()

    def forge(self, *said: bytes | frames.Frame) -> None:
        """A packet of the dialling side with these frames, whatever they are."""
        space = self.session._data
        assert space is not None
        space.sealer.run()
        plain = b"".join(f if isinstance(f, bytes) else f.encode() for f in said)
        self.net.inject(space.sealer.seal(plain), source=self.edge, to=self.hub)

    def opened(self, source: Host) -> list[list[frames.Frame]]:
        """Frames of every DATA packet that `source` sent since the start of the log."""
        reader = self.peer if source is self.edge else self.session
        assert reader._data is not None
        opener = reader._data.opener
        out = []
        for _, origin, _, data in self.net.log:
            if origin != source.addr or data[1:9] != opener.current:
                continue
            pn = int.from_bytes(data[9:17], "big") ^ opener._w
            plain = opener.aead.decrypt((opener.aead.iv_int ^ pn).to_bytes(12, "big"), data[17:], data[:17])
            out.append(frames.decode(plain))
        return out


@pytest.mark.parametrize(
    ("said", "code"),
    [
        (b"\x18", ErrorCode.PROTOCOL),
        (b"\x0a\x00", ErrorCode.PROTOCOL),
        (b"\x04\x00", ErrorCode.PROTOCOL),
        (b"\x06\x00", ErrorCode.PROTOCOL),
        (frames.Stream(0, 0, b"abc").encode()[:-1], ErrorCode.PROTOCOL),
        (frames.Crypto(0, b"x"), ErrorCode.PROTOCOL),
        (frames.HandshakeDone(bytes(16)), ErrorCode.PROTOCOL),
        (frames.NewToken(b"x"), ErrorCode.PROTOCOL),
        (frames.Stream(0, 0, b"", True), ErrorCode.PROTOCOL),
        (frames.Stream(3, 0, b"x"), ErrorCode.PROTOCOL),
        (frames.Stream(2 + 4 * 100, 0, b"x"), ErrorCode.LIMIT),
        (frames.Stream(2, STREAM_WINDOW, b"x"), ErrorCode.FLOW),
        (frames.ResetStream(0, 1, 0), ErrorCode.PROTOCOL),
        (frames.StopSending(0, 1), ErrorCode.PROTOCOL),
        (frames.MaxStreamData(2, 1), ErrorCode.PROTOCOL),
        (frames.RetireCid(99), ErrorCode.PROTOCOL),
        (frames.RetireCid(0), ErrorCode.PROTOCOL),
        (frames.NewCid(5, 6, bytes(8), bytes(16)), ErrorCode.PROTOCOL),
        (frames.NewCid(4, 0, b"12345678", bytes(16)), ErrorCode.LIMIT),
        (frames.Ack(0, [(1_000_000, 1_000_001)]), ErrorCode.PROTOCOL),
    ],
)
def test_an_offence_closes_with_its_code(said: bytes | frames.Frame, code: ErrorCode) -> None:
    """Promise (3), and the listener tells the offender (R-5-2)."""
    talk = Talk()
    talk.forge(said)
    closed = talk.hub.closed(talk.peer)
    assert closed is not None
    assert (closed.code, closed.by_peer) == (code, False)
    talk.net.run_for(0.1)
    told = talk.edge.closed(talk.session)
    assert told is not None
    assert (told.code, told.by_peer) == (code, True)


def test_an_ack_of_a_number_that_was_left_out() -> None:
    """Protocol §2: optimistic ACKs (R-2-6)."""
    talk = Talk()
    space = talk.peer._data
    assert space is not None
    space.sealer.skip_at = space.sealer.next
    talk.peer.write(0, b"x")
    talk.net.run_for(0.1)
    (skipped,) = space.sealer.skipped
    assert talk.peer.state is State.ESTABLISHED
    talk.forge(frames.Ack(0, [(skipped, skipped + 1)]))
    closed = talk.hub.closed(talk.peer)
    assert closed is not None
    assert closed.code is ErrorCode.PROTOCOL


@pytest.mark.parametrize(
    "said",
    [
        frames.Padding(100),
        frames.DataBlocked(5),
        frames.StreamDataBlocked(0, 5),
        frames.StreamsBlocked(0, 5),
        frames.MaxData(1),
        frames.MaxStreams(1, 7),
        frames.PathResponse(bytes(8)),
        frames.Datagram(b"x"),
        frames.Ping(),
    ],
)
def test_frames_that_close_nothing(said: frames.Frame) -> None:
    talk = Talk()
    talk.forge(said)
    talk.net.run_for(1.0)
    assert talk.peer.state is State.ESTABLISHED
    assert not talk.hub.closed(talk.peer)


def test_padding_asks_for_no_ack_ping_for_one_at_once() -> None:
    talk = Talk()
    talk.forge(frames.Padding(50))
    talk.net.run_for(1.0)
    assert not talk.opened(talk.hub)
    talk.forge(frames.Ping())
    assert len(talk.opened(talk.hub)) == 1


def test_path_challenges_are_answered_a_few_at_a_time() -> None:
    """Fault 30: a flood of them is not a lever."""
    talk = Talk()
    challenges = [frames.PathChallenge(n.to_bytes(8, "big")) for n in range(60)]
    talk.forge(*challenges)
    talk.net.run_for(1.0)
    answers = [f for packet in talk.opened(talk.hub) for f in packet if isinstance(f, frames.PathResponse)]
    assert [a.data for a in answers] == [c.data for c in challenges[-MAX_PATH_ANSWERS:]]


def test_one_ack_for_a_receive_burst() -> None:
    """Protocol §6."""
    talk = Talk()
    lane = talk.session.open_stream()
    talk.session.write(lane, bytes(9_000))
    talk.net.run_for(0.5)
    acks = [p for p in talk.opened(talk.hub) if any(isinstance(f, frames.Ack) for f in p)]
    data = [p for p in talk.opened(talk.edge) if any(isinstance(f, frames.Stream) for f in p)]
    assert len(acks) <= len(data) / 2 + 1
    assert talk.hub.received_length(talk.peer, lane) == 9_000


def test_small_writes_share_a_packet() -> None:
    """ACK, credit and bytes of several streams leave together; the last frame spends no length."""
    talk = Talk()
    lanes = [talk.session.open_stream() for _ in range(3)]
    for lane in lanes:
        talk.session.write(lane, b"a" * 50)
    talk.session.write(0, b"b" * 50)
    talk.net.run_for(0.2)
    packets = [p for p in talk.opened(talk.edge) if any(isinstance(f, frames.Stream) for f in p)]
    assert len(packets) == 1
    assert [f.stream for f in packets[0] if isinstance(f, frames.Stream)] == [0, *lanes]


def test_a_burst_leaves_as_one_transmit_of_equal_datagrams() -> None:
    """R-2-1."""
    talk = Talk()
    net, edge = talk.net, talk.edge
    lane = talk.session.open_stream()
    biggest = 0
    for _ in range(300):
        talk.session.write(lane, bytes(min(talk.session.room(lane), 300_000)))
        for sent in edge.endpoint.datagrams_to_send(net.now):
            assert isinstance(sent, Transmit)
            size = sent.segment_size or len(sent.data)
            assert size <= 1200
            if sent.segment_size:
                assert len(sent.data) > size
                biggest = max(biggest, -(-len(sent.data) // size))
            for start in range(0, len(sent.data), size):
                net._send(edge.addr, sent.addr, sent.data[start : start + size])
        net.run_for(0.01)
    assert biggest == MAX_BURST_PACKETS
    assert talk.hub.received_length(talk.peer, lane) > 10_000_000


def test_no_more_in_flight_than_the_window() -> None:
    """Promise (2)."""
    talk = Talk()
    talk.net.link(talk.hub, talk.edge).loss = 1.0
    lane = talk.session.open_stream()
    talk.session.write(lane, bytes(SEND_BUFFER))
    talk.net.run_for(0.03)
    data = talk.session._data
    assert data is not None
    assert data.recovery.in_flight <= data.recovery.congestion.cwnd == 12_000
    sent = sum(len(d) for _, source, _, d in talk.net.log if source == talk.edge.addr)
    assert 12_000 - 1200 < sent <= 12_000


def test_bytes_are_paced_over_the_round_trip() -> None:
    """A window leaves over most of a round trip, not at once (R-6-3)."""
    talk = Talk(delay=0.1)
    lane = talk.session.open_stream()
    start = talk.net.now
    talk.session.write(lane, bytes(200_000))
    talk.net.run_for(0.19)
    times = [t - start for t, source, _, d in talk.net.log if source == talk.edge.addr and len(d) > 1000]
    assert len(times) == 10
    assert times[-1] > 0.2 * (1 - 4 / 10) / 1.25
    assert times[1] == 0.0


def test_control_stream_does_not_wait_for_the_pacer() -> None:
    talk = Talk(delay=0.1)
    lane = talk.session.open_stream()
    talk.session.write(lane, bytes(200_000))
    talk.net.run_for(0.01)
    talk.session.write(0, b"urgent")
    start = talk.net.now
    talk.net.run(lambda: talk.hub.received(talk.peer, 0) == b"urgent", limit=1.0)
    assert talk.net.now - start == pytest.approx(0.1)


def test_writable_is_told_when_room_comes_back() -> None:
    talk = Talk()
    lane = talk.session.open_stream()
    talk.session.write(lane, bytes(SEND_BUFFER - 10))
    assert talk.session.room(lane) == 10
    talk.net.run(lambda: StreamWritable(lane) in talk.edge.events(talk.session), limit=5.0)
    assert talk.session.room(lane) >= WRITABLE_ROOM
    talk.net.run_for(3.0)
    assert talk.edge.events(talk.session).count(StreamWritable(lane)) == 1


def test_streams_end_are_reset_and_stopped() -> None:
    talk = Talk()
    ending, dropped, unwanted = (talk.session.open_stream() for _ in range(3))
    talk.session.write(ending, b"abc", fin=True)
    talk.session.write(dropped, b"abc")
    talk.session.write(unwanted, b"abc")
    talk.net.run_for(0.1)
    assert talk.hub.received(talk.peer, ending) == b"abc"
    assert talk.peer.ended(ending)
    assert not talk.peer.ended(dropped)
    talk.session.reset_stream(dropped, 5)
    talk.peer.stop_stream(unwanted, 6)
    talk.net.run_for(0.2)
    assert StreamReset(dropped, 5) in talk.hub.events(talk.peer)
    assert StreamStopped(unwanted, 6) in talk.edge.events(talk.session)
    assert StreamReset(unwanted, 6) in talk.hub.events(talk.peer)
    opened = [e.stream for e in talk.hub.events(talk.peer) if isinstance(e, StreamOpened)]
    assert opened == [ending, dropped, unwanted]
    assert set(talk.peer._streams.recv) == {0}
    talk.net.run_for(0.2)
    assert set(talk.session._streams.send) == {0}


def test_a_reset_may_open_the_stream_it_resets() -> None:
    talk = Talk()
    talk.forge(frames.ResetStream(6, 9, 0))
    events = talk.hub.events(talk.peer)
    assert [e for e in events if isinstance(e, StreamOpened)] == [StreamOpened(2), StreamOpened(6)]
    assert StreamReset(6, 9) in events
    talk.forge(frames.Stream(6, 0, b"late"))
    talk.forge(frames.ResetStream(6, 9, 0))
    assert talk.peer.state is State.ESTABLISHED


def test_both_ways_of_a_bidirectional_stream() -> None:
    talk = Talk()
    tunnel = talk.session.open_stream(bidirectional=True)
    talk.session.write(tunnel, b"there")
    talk.net.run_for(0.1)
    talk.peer.write(tunnel, b"and back")
    talk.net.run_for(0.1)
    assert talk.hub.received(talk.peer, tunnel) == b"there"
    assert talk.edge.received(talk.session, tunnel) == b"and back"


def test_retired_cids_are_replaced() -> None:
    """Both sides issue CIDs, at most four active (protocol §5, R-5-4)."""
    talk = Talk()
    space = talk.peer._data
    assert space is not None
    assert sorted(space.local_cids.active) == [0, 1, 2, 3]
    gone = space.local_cids.active[2]
    talk.forge(frames.RetireCid(2))
    talk.forge(frames.RetireCid(2))
    assert sorted(space.local_cids.active) == [0, 1, 3, 4]
    assert talk.hub.endpoint._by_cid.get(gone) is talk.peer  # for packets under way
    assert talk.hub.endpoint._by_cid[space.local_cids.active[4]] is talk.peer
    talk.net.run_for(0.2)
    mine = talk.session._data
    assert mine is not None
    assert mine.remote_cids.spare[4] == space.local_cids.active[4]


def test_a_peer_that_retires_our_target_moves_us() -> None:
    talk = Talk()
    mine, theirs = talk.session._data, talk.peer._data
    assert mine is not None
    assert theirs is not None
    new = theirs.local_cids.active[1]
    for seq, cid in list(theirs.local_cids.active.items())[1:]:
        theirs.output.say(frames.NewCid(seq, 1, cid, theirs._inbox._context.reset_token(cid)).encode())  # type: ignore[attr-defined]
    talk.peer.want_to_send()
    talk.net.run_for(0.5)
    assert mine.remote_cids.current == (1, new)
    assert 0 not in theirs.local_cids.active
    talk.session.write(0, b"still there")
    talk.net.run_for(0.5)
    assert talk.hub.received(talk.peer, 0) == b"still there"
    assert theirs.opener.current == new


def test_garbage_to_another_cid_of_ours_moves_nothing() -> None:
    talk = Talk()
    space = talk.peer._data
    assert space is not None
    before = space.opener.current
    forged = b"\x40" + space.local_cids.active[2] + bytes(60)
    talk.net.inject(forged, source=talk.edge, to=talk.hub)
    assert space.opener.current == before
    assert talk.peer.statistics().failed_opens == 1
    other_phase = b"\x41" + before + bytes(60)
    talk.net.inject(other_phase, source=talk.edge, to=talk.hub)
    assert talk.peer.statistics().failed_opens == 2
    neither_phase = b"\x42" + before + bytes(60)
    talk.net.inject(neither_phase, source=talk.edge, to=talk.hub)
    assert talk.hub.endpoint.statistics().dropped_unknown_cid == 1


@pytest.mark.parametrize("owner", ["session", "answers", "cids", "streams"])
def test_more_to_say_than_a_packet_holds(owner: str) -> None:
    """What does not fit leaves with the next packet, whoever owns it."""
    talk = Talk()
    space = talk.session._data
    assert space is not None
    if owner == "answers":
        space.output._answers += [(frames.PathResponse(n.to_bytes(8, "big")).encode(), 0) for n in range(200)]
    elif owner == "cids":
        space.remote_cids._retiring.update(dict.fromkeys(range(1000, 1300)))
        space.remote_cids.pending += range(1000, 1300)
        talk.peer._data.local_cids.next_seq = 5000  # type: ignore[union-attr]
    elif owner == "streams":
        for number in range(100):
            talk.session.write(lane := talk.session.open_stream(), b"x")
            talk.session.reset_stream(lane, number)
    else:
        for number in range(200):
            space.output.say(frames.StreamsBlocked(0, number).encode())
    talk.session.want_to_send()
    talk.net.run_for(0.5)
    assert not space.output._has_control()
    assert talk.session.state is talk.peer.state is State.ESTABLISHED
    assert len(talk.opened(talk.edge)) >= 2


def test_too_many_failed_opens() -> None:
    """Protocol §9, with a limit that a test can reach."""
    talk = Talk()
    space = talk.peer._data
    assert space is not None
    space.fail_limit = 3
    for n in range(3):
        forged = b"\x40" + space.opener.current + bytes(60 + n)
        talk.net.inject(forged, source=talk.edge, to=talk.hub)
    closed = talk.hub.closed(talk.peer)
    assert closed is not None
    assert closed.code is ErrorCode.AEAD_LIMIT


def test_a_key_that_has_sealed_its_fill() -> None:
    talk = Talk()
    space = talk.peer._data
    assert space is not None
    space.sealer.limit = space.sealer.next + CLOSE_RESERVE
    space.sealer.skip_at = space.sealer.next
    talk.peer.write(0, b"x")
    talk.net.run_for(0.5)
    closed = talk.hub.closed(talk.peer)
    assert closed is not None
    assert closed.code is ErrorCode.AEAD_LIMIT
    told = talk.edge.closed(talk.session)
    assert told is not None
    assert told.code is ErrorCode.AEAD_LIMIT


def test_old_ranges_are_pruned_while_only_one_side_talks() -> None:
    """RFC 9000 §13.2.4: an ACK-only packet asks for an ACK now and then, or gaps would be told for ever."""
    talk = Talk(seed=3, loss=0.1)
    talk.net.link(talk.hub, talk.edge).loss = 0.0
    lane = talk.session.open_stream()
    for _ in range(60):
        talk.session.write(lane, bytes(20_000))
        talk.net.run_for(0.1)
    space = talk.peer._data
    assert space is not None
    assert talk.session.statistics().packets_lost > 50
    assert len(space.acks._ranges) <= 2 * PRUNE_RANGES


# -- silence


def test_an_idle_session_stays_alive_with_a_ping_per_interval() -> None:
    talk = Talk()
    talk.net.run_for(10 * KEEPALIVE + 1)
    assert talk.session.state is talk.peer.state is State.ESTABLISHED
    sent = [source for _, source, _, _ in talk.net.log]
    assert sent.count(talk.edge.addr) == 10
    assert sent.count(talk.hub.addr) == 10  # the listener only answers


def test_an_idle_peer_that_is_gone_is_noticed() -> None:
    talk = Talk()
    talk.net.link(talk.edge, talk.hub).loss = talk.net.link(talk.hub, talk.edge).loss = 1.0
    start = talk.net.now
    talk.net.run(lambda: not talk.session.live, limit=200.0)
    closed = talk.edge.closed(talk.session)
    assert closed is not None
    assert closed.code is LocalCause.IDLE_TIMEOUT
    assert talk.net.now - start == pytest.approx(KEEPALIVE + MAX_UNANSWERED * PING_REPEAT, abs=1.0)
    assert talk.session.state is State.CLOSED
    assert talk.edge.endpoint.sessions == []


def test_a_peer_that_is_gone_under_traffic_is_noticed_in_five_seconds() -> None:
    talk = Talk()
    lane = talk.session.open_stream()
    talk.net.link(talk.edge, talk.hub).loss = 1.0
    talk.session.write(lane, bytes(100_000))
    start = talk.net.now
    talk.net.run(lambda: not talk.session.live, limit=20.0)
    closed = talk.edge.closed(talk.session)
    assert closed is not None
    assert closed.code is LocalCause.DEAD_PEER
    assert talk.net.now - start == pytest.approx(DEAD_TIME, abs=0.1)


def test_a_peer_that_answers_slowly_is_not_dead() -> None:
    """Six PTOs where they are longer than five seconds."""
    talk = Talk(delay=2.0)
    lane = talk.session.open_stream()
    talk.session.write(lane, bytes(50_000))
    talk.net.run(lambda: talk.hub.received_length(talk.peer, lane) == 50_000, limit=60.0)
    assert talk.session.state is State.ESTABLISHED


def test_an_outage_shorter_than_the_patience_loses_nothing() -> None:
    """4 s of black hole under traffic: found again within about a second of its return."""
    talk = Talk()
    lane = talk.session.open_stream()
    up, down = talk.net.both(talk.edge, talk.hub)
    talk.session.write(lane, bytes(500_000))
    talk.net.run_for(0.02)
    up.loss = down.loss = 1.0
    talk.net.run_for(4.0)
    up.loss = down.loss = 0.0
    took = talk.net.run(lambda: talk.hub.received_length(talk.peer, lane) == 500_000, limit=10.0)
    assert took < 2.0
    assert talk.session.state is talk.peer.state is State.ESTABLISHED


def test_weights_hold_on_a_slow_link() -> None:
    """Four lanes full of data on 1 MB/s: shares by weight, and a command passes in a fraction of a second.

    R-10-3.
    """
    talk = Talk(bandwidth=1_000_000)
    lanes = {weight: talk.session.open_stream(weight=weight) for weight in (64, 32, 16, 4)}
    for lane in lanes.values():
        talk.session.write(lane, bytes(SEND_BUFFER))
    talk.net.run_for(0.8)
    got = {w: talk.hub.received_length(talk.peer, lane) for w, lane in lanes.items()}
    total = sum(got.values())
    assert total > 400_000
    for weight, size in got.items():
        assert size / total == pytest.approx(weight / 116, abs=0.06)
    command = talk.session.open_stream(weight=64)
    talk.session.write(command, b"now")
    took = talk.net.run(lambda: talk.hub.received_length(talk.peer, command) == 3, limit=1.0)
    assert took < 0.2


@pytest.mark.parametrize(("delay", "loss", "share"), [(0.015, 0.0, 0.85), (0.005, 0.02, 0.5)])
def test_goodput_on_a_slow_link(delay: float, loss: float, share: float) -> None:
    """Faults 7 and 8 in small, 10 Mbit/s. NewReno's own law bounds the lossy one: packet / RTT × 1.2 / √loss."""
    talk = Talk(seed=5, delay=delay, bandwidth=1_250_000, loss=loss)
    lane = talk.session.open_stream()
    data = bytes(2_000_000)
    fed = 0

    def done() -> bool:
        nonlocal fed
        more = min(talk.session.room(lane), len(data) - fed)
        if more:
            talk.session.write(lane, data[fed : fed + more])
            fed += more
            talk.net.flush()
        return talk.hub.received_length(talk.peer, lane) == len(data)

    took = talk.net.run(done, limit=20.0)
    assert len(data) / took >= 1_250_000 * share
