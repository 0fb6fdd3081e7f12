"""stp.core.framed: two sessions over a stream that is cut anywhere, in simulated time (R-11-1, R-11-2, R-11-3)."""

from __future__ import annotations

import pytest

from stp.core import frames
from stp.core.errors import ErrorCode, LocalCause, UsageError
from stp.core.events import (
    Connected,
    DatagramReceived,
    SessionClosed,
    StreamOpened,
    StreamReset,
    StreamStopped,
    StreamWritable,
)
from stp.core.framed import CLOSE_TIMEOUT, HANDSHAKE_TIMEOUT, MAX_RECORDS, MAX_WRITE
from stp.core.path import KEEPALIVE, LISTENER_PATIENCE, MAX_UNANSWERED, PING_REPEAT
from stp.core.states import State
from stp.core.streams import SEND_BUFFER
from stp.core.units import MAX_UNIT, MIN_PROGRESS, UNIT_TIMEOUT
from stp.core.verbs import MAX_EVENTS
from tests.core.framed_kit import ADDRESS, EDGE, HUB, Pair, fill
from tests.identity_kit import DOMAIN

CARRIERS = ("tls", "unix")


def padded(size: int) -> bytes:
    """A PING and stream bytes that make a unit of `size` bytes of frames."""
    return frames.Stream(2, 0, bytes(size - frames.STREAM_LENGTH_HEAD_SIZE)).encode()


@pytest.mark.parametrize("carrier", CARRIERS)
def test_both_sides_know_each_other_and_agree_on_an_id(carrier: str) -> None:
    """R-11-1: the same hellos; the exporter is bound to both of them."""
    pair = Pair(1, carrier=carrier).establish()
    edge, hub = pair.edge.session, pair.hub.session
    pair.settle()
    assert edge.peer is not None
    assert hub.peer is not None
    assert (edge.peer.domain, edge.peer.node) == (DOMAIN, HUB)
    assert (hub.peer.domain, hub.peer.node) == (DOMAIN, EDGE)
    assert edge.id == hub.id
    assert len(edge.id or b"") == 16
    assert edge.suite == hub.suite == ("TLS_AES_128_GCM_SHA256" if carrier == "tls" else "")
    assert edge.carrier == hub.carrier == carrier
    assert hub.addr == ADDRESS
    assert [len(end.of(Connected)) for end in (pair.edge, pair.hub)] == [1, 1]
    assert edge.own == (None if carrier == "tls" else (DOMAIN, EDGE))
    other = Pair(2, carrier=carrier).establish()
    assert other.edge.session.id != edge.id


@pytest.mark.parametrize("carrier", CARRIERS)
@pytest.mark.parametrize("seed", range(3))
def test_streams_survive_any_chunking(carrier: str, seed: int) -> None:
    """R-11-1: what is cut anywhere comes out whole and in order, on every stream, both ways."""
    pair = Pair(seed, carrier=carrier, chunks=True).establish()
    edge, hub = pair.edge.session, pair.hub.session
    up, down = edge.open_stream(), hub.open_stream(weight=64)
    data = {edge: pair.rng.randbytes(700_000), hub: pair.rng.randbytes(90_000)}
    done = {edge: 0, hub: 0}
    edge.write(0, b"control")

    def more() -> bool:
        for session, stream in ((edge, up), (hub, down)):
            done[session] += fill(session, stream, data[session][done[session] :])
        return len(pair.hub.got(up)) == 700_000 and len(pair.edge.got(down)) == 90_000

    pair.run(more)
    assert (pair.hub.got(up), pair.edge.got(down)) == (data[edge], data[hub])
    assert pair.hub.got(0) == b"control"
    assert all(len(write) <= MAX_WRITE for end in (pair.edge, pair.hub) for write in end.written)


def test_a_dialler_is_not_connected_before_handshake_done() -> None:
    """(1), R-11-1: its own TLS object is content long before."""
    pair = Pair(3)
    while pair.hub.session.state is not State.ESTABLISHED:
        pair.step()
        assert not pair.edge.of(Connected)
        assert pair.edge.session.state in (State.HANDSHAKE, State.KEYED)
    assert pair.edge.session._channel.ready
    pair.establish()


@pytest.mark.parametrize("names", [None, ("hub-1", f"stp://{DOMAIN}/x"), (f"stp://{DOMAIN}/x", "")])
def test_a_unix_listener_must_name_both(names: tuple[str, str] | None) -> None:
    pair = Pair(8, carrier="unix", expected=None, names=names)
    pair.settle()
    assert pair.edge.closed is not None
    assert pair.edge.closed.code is ErrorCode.PROTOCOL


def test_a_handshake_that_stops_ends_after_its_time() -> None:
    """R-11-3."""
    pair = Pair(9)
    pair.cut = True
    pair.wait(HANDSHAKE_TIMEOUT - 1.0)
    assert pair.edge.session.live
    pair.wait(2.0)
    assert pair.edge.closed == SessionClosed(LocalCause.HANDSHAKE_TIMEOUT, "", by_peer=False)
    assert pair.hub.session.state is State.CLOSED
    assert pair.refusals == []


def test_a_connection_that_breaks_ends_the_session() -> None:
    pair = Pair(10).establish()
    pair.edge.session.on_lost("Connection reset by peer", pair.now)
    pair.edge.serve()
    assert pair.edge.closed == SessionClosed(
        LocalCause.CONNECTION_LOST, "Connection reset by peer", by_peer=False
    )
    pair.edge.session.on_lost("again", pair.now)
    assert pair.edge.session.next_timeout() is None


def test_close_is_heard_with_its_reason_behind_what_was_said_before() -> None:
    pair = Pair(11).establish()
    pair.edge.session.write(0, b"last words")
    pair.step()
    pair.edge.session.send_datagram(b"too late")
    pair.edge.session.close(ErrorCode.GOING_AWAY, "250")
    pair.settle()
    assert pair.hub.of(DatagramReceived) == []
    assert pair.hub.got(0) == b"last words"
    assert pair.hub.closed == SessionClosed(ErrorCode.GOING_AWAY, "250", by_peer=True)
    assert pair.edge.closed == SessionClosed(ErrorCode.GOING_AWAY, "250", by_peer=False)
    assert {pair.edge.session.state, pair.hub.session.state} == {State.CLOSED}
    with pytest.raises(UsageError):
        pair.edge.session.write(0, b"more")
    assert pair.edge.session.room(0) == 0


def test_close_waits_for_the_kernel_no_longer_than_its_time() -> None:
    pair = Pair(12).establish()
    session = pair.edge.session
    session.close(ErrorCode.NO_ERROR, "", pair.now)
    assert session.state is State.CLOSING
    due = session.next_timeout()
    assert due == pair.now + CLOSE_TIMEOUT
    session.handle_timeout(due - 0.1)
    assert session.state is State.CLOSING
    session.handle_timeout(due)
    assert session.state is State.CLOSED


def test_close_before_there_is_anything_to_say_it_with() -> None:
    pair = Pair(13)
    pair.edge.session.close(ErrorCode.NO_ERROR, "", pair.now)
    pair.hub.session.close(ErrorCode.NO_ERROR, "", pair.now)
    pair.settle()
    assert {pair.edge.session.state, pair.hub.session.state} == {State.CLOSED}
    pair.edge.session.on_lost("late", pair.now)


def test_a_connection_lost_while_closing_is_the_end() -> None:
    pair = Pair(14).establish()
    pair.edge.session.close(ErrorCode.NO_ERROR, "", pair.now)
    pair.edge.session.on_lost("gone", pair.now)
    assert pair.edge.session.state is State.CLOSED


def test_an_idle_session_asks_and_is_answered() -> None:
    """PATH_CHALLENGE and PATH_RESPONSE serve as ping (R-11-1); the round trip is measured from the start."""
    pair = Pair(15, delay=0.05).establish()
    pair.settle()
    assert pair.edge.session.statistics().rtt == pytest.approx(0.1, abs=0.06)
    before = pair.edge.session.statistics().datagrams_out
    pair.wait(KEEPALIVE + 1.0)
    assert pair.edge.session.statistics().datagrams_out == before + 1
    assert pair.hub.session.live


def test_a_silent_peer_is_dead_after_its_pings() -> None:
    """As on UDP (R-8-9): three unanswered ones."""
    pair = Pair(16).establish()
    pair.settle()
    pair.cut = True
    pair.wait(KEEPALIVE + MAX_UNANSWERED * PING_REPEAT - 1.0)
    assert pair.edge.session.live
    pair.wait(2.0)
    assert pair.edge.closed == SessionClosed(LocalCause.IDLE_TIMEOUT, "", by_peer=False)
    assert pair.hub.session.live
    pair.wait(LISTENER_PATIENCE)
    assert not pair.hub.session.live


def test_an_owner_that_waits_learns_sooner() -> None:
    pair = Pair(17).establish()
    pair.settle()
    pair.cut = True
    pair.edge.session.expect(1.0)
    pair.wait(1.0 + MAX_UNANSWERED * PING_REPEAT + 1.0)
    assert pair.edge.closed is not None


def test_a_command_overtakes_bulk_that_is_queued() -> None:
    """R-11-2: it is in the very next write, behind a megabyte of bulk."""
    pair = Pair(18).establish()
    edge = pair.edge.session
    bulk, command = edge.open_stream(weight=4), edge.open_stream(weight=64)
    edge.write(bulk, bytes(SEND_BUFFER))
    for _ in range(3):
        pair.hub.session.receive(edge.next_write(pair.now), pair.now)
    edge.write(command, b"stop!")
    pair.hub.session.receive(edge.next_write(pair.now), pair.now)
    pair.hub.serve()
    assert pair.hub.got(command) == b"stop!"
    assert len(pair.hub.got(bulk)) < 5 * MAX_WRITE


def test_lanes_share_by_weight() -> None:
    """As on UDP: none waits for another."""
    pair = Pair(19).establish()
    edge = pair.edge.session
    light, heavy = edge.open_stream(weight=16), edge.open_stream(weight=32)
    for stream in (light, heavy):
        edge.write(stream, bytes(SEND_BUFFER))
    for _ in range(24):
        pair.hub.session.receive(edge.next_write(pair.now), pair.now)
        pair.hub.serve()
    ratio = len(pair.hub.got(heavy)) / len(pair.hub.got(light))
    assert ratio == pytest.approx(2.0, rel=0.2)


def test_what_was_handed_over_makes_room_and_is_told() -> None:
    """(3): the stream delivers it."""
    pair = Pair(20).establish()
    edge = pair.edge.session
    stream = edge.open_stream()
    edge.write(stream, bytes(SEND_BUFFER))
    assert edge.room(stream) == 0
    assert edge.unsent(stream) == SEND_BUFFER
    pair.settle()
    assert edge.room(stream) == SEND_BUFFER
    assert edge.unsent(stream) == 0
    assert edge._streams.send[stream].base == SEND_BUFFER  # and nothing of it is kept
    assert pair.edge.of(StreamWritable) == [StreamWritable(stream)]


def test_credit_holds_back_and_comes_back() -> None:
    """R-7-1: a reader that takes nothing gets its window and no more."""
    pair = Pair(21).establish()
    pair.hub.auto = False
    edge = pair.edge.session
    stream = edge.open_stream()
    edge.write(stream, bytes(SEND_BUFFER))
    pair.settle()
    assert edge.unsent(stream) == SEND_BUFFER - 512 * 1024
    pair.hub.auto = True
    pair.hub.read_all()
    pair.settle()
    assert edge.unsent(stream) == 0
    assert len(pair.hub.got(stream)) == SEND_BUFFER


def test_streams_end_are_reset_and_stopped() -> None:
    pair = Pair(22).establish()
    edge, hub = pair.edge.session, pair.hub.session
    finished, reset, stopped = (edge.open_stream() for _ in range(3))
    talk = edge.open_stream(bidirectional=True)
    for stream in (reset, stopped):
        edge.write(stream, b"x")
    edge.write(finished, b"all of it", fin=True)
    edge.write(talk, b"?")
    pair.settle()
    assert pair.hub.got(finished) == b"all of it"
    assert hub.ended(finished)
    edge.reset_stream(reset, 7)
    hub.stop_stream(stopped, 9)
    hub.write(talk, b"!", fin=True)
    pair.settle()
    assert pair.hub.of(StreamReset) == [StreamReset(reset, 7), StreamReset(stopped, 9)]
    assert pair.edge.of(StreamStopped) == [StreamStopped(stopped, 9)]
    assert pair.edge.got(talk) == b"!"
    assert {event.stream for event in pair.hub.of(StreamOpened)} == {finished, reset, stopped, talk}


@pytest.mark.parametrize(
    ("unit", "code"),
    [
        (bytes(1), ErrorCode.PROTOCOL),
        (frames.Ack(0, [(0, 1)]).encode(), ErrorCode.PROTOCOL),
        (frames.Crypto(0, b"x").encode(), ErrorCode.PROTOCOL),
        (frames.NewCid(1, 0, bytes(8), bytes(16)).encode(), ErrorCode.PROTOCOL),
        (frames.RetireCid(0).encode(), ErrorCode.PROTOCOL),
        (frames.NewToken(b"t").encode(), ErrorCode.PROTOCOL),
        (frames.HandshakeDone(bytes(16)).encode(), ErrorCode.PROTOCOL),
        (b"\x7f", ErrorCode.PROTOCOL),
        (frames.Stream(0, 0, b"", fin=True).encode(), ErrorCode.PROTOCOL),
        (b"\x06\x00", ErrorCode.PROTOCOL),
        (frames.Stream(0, 1 << 40, b"x").encode(), ErrorCode.FLOW),
        (frames.Stream(4 * 200 + 2, 0, b"x").encode(), ErrorCode.LIMIT),
    ],
)
def test_what_has_no_place_in_a_stream_closes(unit: bytes, code: ErrorCode) -> None:
    """R-11-1, R-5-2."""
    pair = Pair(23).establish()
    pair.inject(pair.hub, unit)
    pair.settle()
    assert pair.hub.closed is not None
    assert (pair.hub.closed.code, pair.hub.closed.by_peer) == (code, False)
    assert pair.edge.closed is not None
    assert (pair.edge.closed.code, pair.edge.closed.by_peer) == (code, True)


def test_frames_that_ask_for_nothing_are_life() -> None:
    pair = Pair(24).establish()
    pair.inject(pair.hub, frames.Ping().encode() + frames.PathResponse(bytes(8)).encode())
    pair.inject(pair.hub, frames.StreamsBlocked(0, 3).encode())
    pair.settle()
    assert pair.hub.session.live


@pytest.mark.parametrize("length", [0, MAX_UNIT + 1, 0xFFFFFFFF])
def test_a_length_is_judged_before_anything_is_kept(length: int) -> None:
    """R-11-1: 1 to 65,536 bytes."""
    pair = Pair(25).establish()
    pair.hub.session.receive(pair.edge.session._channel.seal(length.to_bytes(4, "big")), pair.now)
    pair.hub.serve()
    assert pair.hub.closed is not None
    assert pair.hub.closed.code is ErrorCode.PROTOCOL


def test_the_largest_unit_is_read() -> None:
    pair = Pair(26, carrier="unix", expected=None).establish()
    pair.settle()
    pair.inject(pair.hub, padded(MAX_UNIT))
    assert len(pair.hub.got(2)) == MAX_UNIT - frames.STREAM_LENGTH_HEAD_SIZE


def test_fault_29_a_started_unit_that_crawls_is_cut_off() -> None:
    """R-11-3: a byte now and then is not enough; a slow link is."""
    pair = Pair(27, carrier="unix", expected=None).establish()
    pair.settle()
    hub = pair.hub.session
    unit = MAX_UNIT.to_bytes(4, "big") + padded(MAX_UNIT)
    at = 0
    for _ in range(4):  # slow, but it moves
        pair.now += UNIT_TIMEOUT - 1.0
        hub.handle_timeout(pair.now)
        hub.receive(unit[at : at + MIN_PROGRESS], pair.now)
        at += MIN_PROGRESS
    assert hub.live
    for _ in range(4):
        pair.now += UNIT_TIMEOUT / 3
        hub.receive(unit[at : at + 1], pair.now)
        at += 1
        due = hub.next_timeout()
        assert due is not None
        if due <= pair.now:
            hub.handle_timeout(pair.now)
    pair.hub.serve()
    assert pair.hub.closed is not None
    assert pair.hub.closed.code is ErrorCode.LIMIT


def test_bytes_that_do_not_open_end_the_session() -> None:
    """One flipped bit inside TLS is fatal for good: the stream is not to be trusted any longer."""
    pair = Pair(28).establish()
    pair.settle()
    pair.edge.session.write(0, b"x")
    data = bytearray(pair.edge.session.next_write(pair.now))
    data[-1] ^= 1
    pair.hub.session.receive(bytes(data), pair.now)
    pair.hub.serve()
    assert pair.hub.closed is not None
    assert pair.hub.closed.code is LocalCause.CONNECTION_LOST
    pair.hub.session.receive(b"more", pair.now)


def test_more_than_a_handshake_can_be_is_refused() -> None:
    """R-4-1: 16 KiB at most before TLS is done."""
    pair = Pair(29)
    hello = pair.edge.session.next_write(pair.now)
    record = b"\x16\x03\x01\x40\x00" + b"\x0b\x00\x80\x00" + bytes(0x4000 - 4)
    pair.hub.session.receive(hello[:-10] + record + record, pair.now)
    assert pair.hub.session.state is State.CLOSED or pair.refusals
    slow = Pair(29)
    for _ in range(4):
        slow.hub.session.receive(b"\x16\x03\x01\x3f\xff" + b"\x01\x00\xff\xff" + bytes(0x3FFF - 4), slow.now)
    assert not slow.hub.session.live


@pytest.mark.parametrize(
    "hello",
    [
        b"\xff\xff",
        b"\x00\x03\x01\x00\x00",
        b"\x00\x00",
    ],
)
def test_a_hello_that_is_none_closes(hello: bytes) -> None:
    pair = Pair(30, carrier="unix", expected=None)
    pair.hub.session.receive(hello, pair.now)
    assert not pair.hub.session.live
    assert len(pair.refusals) == 1


def test_the_hello_must_echo_ours() -> None:
    """R-4-4: an old answer fits no new question."""
    old, new = Pair(31, carrier="unix", expected=None), Pair(32, carrier="unix", expected=None)
    old.hub.session.receive(old.edge.session.next_write(old.now), old.now)
    new.edge.session.receive(old.hub.session.next_write(old.now), new.now)
    new.edge.serve()
    assert new.edge.closed is not None
    assert new.edge.closed.code is ErrorCode.PROTOCOL


def test_a_frame_before_handshake_done_closes() -> None:
    """(1): nothing of a listener is believed before it says that we are in."""
    pair = Pair(33, carrier="unix", expected=None)
    pair.hub.session.receive(pair.edge.session.next_write(pair.now), pair.now)
    hello = pair.hub.session.next_write(pair.now)
    unit = frames.Stream(0, 0, b"x").encode()
    pair.edge.session.receive(hello + len(unit).to_bytes(4, "big") + unit, pair.now)
    pair.edge.serve()
    assert pair.edge.closed is not None
    assert pair.edge.closed.code is ErrorCode.PROTOCOL


def test_events_are_bounded() -> None:
    """(5): an owner that takes nothing costs no more than so much."""
    pair = Pair(34, carrier="unix", expected=None).establish()
    pair.settle()
    hub = pair.hub.session
    for n in range(MAX_EVENTS + 2):
        number = 4 * n + 2
        unit = frames.ResetStream(number, 1, 0).encode()
        hub.receive(len(unit).to_bytes(4, "big") + unit, pair.now)
        hub.next_write(pair.now)
    pair.hub.serve()
    assert pair.hub.closed is not None
    assert pair.hub.closed.code is ErrorCode.LIMIT


def test_worn_out_keys_make_way() -> None:
    """R-9-3: after 2^24 records of one side the session ends, and a new one has new keys."""
    pair = Pair(35).establish()
    pair.settle()
    edge = pair.edge.session
    edge.statistics().datagrams_out = MAX_RECORDS
    edge.write(0, b"x")
    pair.settle()
    assert pair.edge.closed is not None
    assert pair.edge.closed.code is ErrorCode.AEAD_LIMIT
    assert pair.hub.closed is not None
    assert pair.hub.closed.code is ErrorCode.AEAD_LIMIT


def test_pings_that_nobody_answers_are_forgotten_one_by_one() -> None:
    pair = Pair(36).establish()
    pair.settle()
    edge = pair.edge.session
    for _ in range(20):
        edge._ping = True
        edge.next_write(pair.now)
    assert len(edge._pings) == 8


@pytest.mark.parametrize("carrier", ["tls", "unix"])
def test_unreliable_datagrams_go_through_a_stream_too(carrier: str) -> None:
    """R-5-5: they take turns with lanes, keep to their bound, and count as acknowledged once they are written."""
    pair = Pair(carrier=carrier).establish()
    edge, hub = pair.edge.session, pair.hub.session
    lane = edge.open_stream()
    edge.write(lane, bytes(200_000))
    sent = [bytes([n]) * size for n, size in enumerate((0, 1, 500, edge.max_datagram_size))]
    assert all(edge.send_datagram(data) for data in sent)
    with pytest.raises(UsageError, match="fit into a packet"):
        edge.send_datagram(bytes(edge.max_datagram_size + 1))
    pair.run(lambda: len(pair.hub.got(lane)) == 200_000)
    assert [event.data for event in pair.hub.of(DatagramReceived)] == sent
    assert max(map(len, pair.edge.written)) <= MAX_WRITE
    counts = edge.statistics()
    assert (counts.datagrams_sent, counts.datagrams_acked, counts.datagrams_lost) == (4, 4, 0)
    assert hub.send_datagram(b"down")
    pair.run(lambda: bool(pair.edge.of(DatagramReceived)))


def test_statistics_say_what_the_stream_knows() -> None:
    pair = Pair(38, delay=0.05).establish()
    assert pair.edge.session.statistics().rtt == 0.0
    pair.settle()
    found = pair.edge.session.statistics()
    assert found.rtt_min == found.rtt_latest == pytest.approx(found.rtt)
    assert found.keepalive == KEEPALIVE
    assert found.session_credit == 2 << 20


def test_a_timer_that_rings_too_early_does_nothing() -> None:
    pair = Pair(39).establish()
    pair.settle()
    due = pair.edge.session.next_timeout()
    pair.edge.session.handle_timeout(pair.now)
    assert pair.edge.session.next_write(pair.now) == b""
    assert pair.edge.session.next_timeout() == due


def test_writing_may_bring_one_event_too_many() -> None:
    """(5): room that comes back is an event, too."""
    pair = Pair(40).establish()
    pair.settle()
    edge = pair.edge.session
    stream = edge.open_stream()
    edge.write(stream, bytes(SEND_BUFFER))
    edge._events.extend(StreamWritable(0) for _ in range(MAX_EVENTS))
    while edge.live:
        assert edge.next_write(pair.now)
    pair.settle()
    assert pair.edge.closed is not None
    assert pair.edge.closed.code is ErrorCode.LIMIT


def test_nothing_is_heard_behind_a_close() -> None:
    pair = Pair(41, carrier="unix", expected=None).establish()
    pair.settle()
    close, more = frames.Close(ErrorCode.NO_ERROR, "").encode(), frames.Stream(0, 0, b"x").encode()
    wire = b"".join(len(unit).to_bytes(4, "big") + unit for unit in (close, more))
    pair.hub.session.receive(wire, pair.now)
    pair.hub.serve()
    assert pair.hub.got(0) == b""
    assert pair.hub.closed == SessionClosed(ErrorCode.NO_ERROR, "", by_peer=True)
    pair.hub.session.handle_timeout(pair.now + 1000.0)
    assert pair.hub.session.state is State.CLOSED


def test_a_stream_is_stopped_once() -> None:
    pair = Pair(43).establish()
    edge = pair.edge.session
    stream = edge.open_stream()
    edge.write(stream, b"x")
    pair.settle()
    edge._streams.send[stream].reset_code = 7
    pair.inject(pair.edge, frames.StopSending(stream, 9).encode())
    assert pair.edge.of(StreamStopped) == []


def test_the_end_of_tls_waits_for_the_end_of_the_stream() -> None:
    """close_notify says nothing that CLOSE or the end of TCP do not say."""
    pair = Pair(44).establish()
    pair.settle()
    pair.edge.session._channel._tls.shutdown()  # type: ignore[attr-defined]
    pair.hub.session.receive(pair.edge.session._channel._tls.bio_read(1000), pair.now)  # type: ignore[attr-defined]
    assert pair.hub.session.live
