"""stp.core.streamset: promises (1) to (3) of its head."""

from __future__ import annotations

import pytest

from stp.core import frames
from stp.core.errors import FlowError, LimitError, ProtocolError, UsageError
from stp.core.flow import CONTROL_WINDOW, MAX_WINDOW, SESSION_WINDOW, STREAM_WINDOW, WindowBudget
from stp.core.packetizer import PacketBuilder
from stp.core.streams import SendStream
from stp.core.streamset import MAX_DATA, MAX_STREAM_DATA, MAX_STREAMS, StreamSet


def streams(*, dialling: bool = True, budget: int = 1 << 30) -> StreamSet:
    return StreamSet(dialling, WindowBudget(budget))


def said(found: StreamSet, room: int = 1000) -> list[frames.Frame]:
    packet = PacketBuilder(room)
    found.write_frames(packet)
    return frames.decode(b"".join(packet.parts)) if packet.parts else []


def take(found: StreamSet, sender: SendStream, most: int) -> int:
    """What a packetizer does; how many bytes left."""
    offset, available = sender.due(found.session_room)
    length = min(most, available)
    known = sender.next
    sender.take(offset, length)
    found.on_taken(sender, length, sender.next - known)
    return length


def receive(found: StreamSet, stream: int, offset: int, data: bytes, fin: bool = False) -> None:
    receiver, _ = found.receiver(stream)
    assert receiver is not None
    grown = receiver.insert(offset, data, fin)
    if stream:
        found.on_bytes(grown)


# -- numbers


def test_numbers_of_both_sides() -> None:
    """As in QUIC: bit 0 who opened it, bit 1 direction. Stream 0 is there already (R-5-3)."""
    mine, theirs = streams(), streams(dialling=False)
    assert [mine.open(16), mine.open(16), mine.open(16, bidirectional=True)] == [2, 6, 4]
    assert [theirs.open(16), theirs.open(16, bidirectional=True)] == [3, 1]
    assert 0 in mine.send
    assert 0 in theirs.recv


def test_the_peer_opens_streams_in_order_whatever_comes_first() -> None:
    found = streams()
    receiver, opened = found.receiver(11)
    assert receiver is not None
    assert list(opened) == [3, 7, 11]
    assert found.receiver(7)[1] == ()
    _, opened = found.receiver(1)
    assert list(opened) == [1]
    assert 1 in found.send
    assert 3 not in found.send


def test_a_stream_too_many() -> None:
    """R-7-6."""
    found = streams()
    found.receiver(3 + 4 * (MAX_STREAMS - 1))
    with pytest.raises(LimitError):
        found.receiver(3 + 4 * MAX_STREAMS)


@pytest.mark.parametrize("stream", [2, 4], ids=["our one-way stream", "never opened"])
def test_bytes_on_a_stream_that_is_ours(stream: int) -> None:
    found = streams()
    found.open(16)
    with pytest.raises(ProtocolError):
        found.receiver(stream)


def test_bytes_on_our_stream_that_is_over() -> None:
    found = streams()
    tunnel = found.open(16, bidirectional=True)
    receive(found, tunnel, 0, b"abc", fin=True)
    found.read(tunnel, 1.0, 0.1)
    assert found.receiver(tunnel) == (None, ())
    assert not [f for f in said(found) if isinstance(f, frames.MaxStreams)]  # it was ours


def test_a_finished_stream_makes_room_for_another() -> None:
    """Promise (3): MAX_STREAMS is cumulative."""
    found = streams()
    receive(found, 3, 0, b"abc", fin=True)
    assert found.read(3, 1.0, 0.1) == b"abc"
    assert frames.MaxStreams(frames.UNIDIRECTIONAL, MAX_STREAMS + 1) in said(found)
    assert found.receiver(3) == (None, ())
    assert found.receiver(3 + 4 * MAX_STREAMS)[0] is not None
    with pytest.raises(UsageError):
        found.read(3, 1.0, 0.1)
    found.advance(3, 99, 1.0, 0.1)  # late credit for what is gone is no error


def test_our_own_limit() -> None:
    found = streams()
    found.peer_max_streams[frames.UNIDIRECTIONAL] = 1
    found.open(16)
    with pytest.raises(UsageError):
        found.open(16)
    assert said(found) == [frames.StreamsBlocked(frames.UNIDIRECTIONAL, 1)]
    found.on_max_streams(frames.UNIDIRECTIONAL, 2)
    found.on_max_streams(frames.UNIDIRECTIONAL, 1)
    assert found.open(16) == 6


# -- credit


def test_control_stream_is_credited_when_read_and_outside_session_credit() -> None:
    """R-7-2."""
    found = streams()
    receive(found, 0, 0, bytes(CONTROL_WINDOW))
    with pytest.raises(FlowError):
        receive(found, 0, CONTROL_WINDOW, b"x")
    found.read(0, 1.0, 0.1)
    assert said(found) == [frames.MaxStreamData(0, 2 * CONTROL_WINDOW)]
    assert found.received == 0
    assert found.credit.taken == 0


def test_reading_a_lane_gives_no_credit_taking_does() -> None:
    found = streams()
    receive(found, 3, 0, bytes(STREAM_WINDOW))
    found.read(3, 1.0, 0.1)
    assert said(found) == []
    found.advance(3, STREAM_WINDOW // 2, 1.0, 0.1)
    assert said(found) == [frames.MaxStreamData(3, STREAM_WINDOW * 3 // 2)]
    found.advance(3, 10, 1.0, 0.1)  # monotonic
    assert said(found) == []
    with pytest.raises(UsageError):
        found.advance(3, STREAM_WINDOW + 1, 1.0, 0.1)


def test_session_credit_covers_all_lanes_and_follows_what_is_taken() -> None:
    """R-7-1."""
    found = streams()
    for stream in (3, 7, 11, 15):
        receive(found, stream, 0, bytes(STREAM_WINDOW))
    with pytest.raises(FlowError):
        receive(found, 19, 0, b"x")
    found.advance(3, STREAM_WINDOW, 1.0, 0.1)
    assert frames.MaxData(SESSION_WINDOW + STREAM_WINDOW) in said(found)


def test_session_credit_grows_with_the_lanes() -> None:
    """Protocol §7: never below the sum of the lane windows."""
    found = streams()
    now, offset = 1.0, 0
    for _ in range(60):
        now += 0.05
        limit = found.recv[3].limit if 3 in found.recv else STREAM_WINDOW
        receive(found, 3, offset, bytes(limit - offset))
        offset = limit
        found.read(3, now, 0.1)
        found.advance(3, offset, now, 0.1)
    assert found.recv[3].credit.window == MAX_WINDOW
    assert found.credit.window == SESSION_WINDOW + MAX_WINDOW - STREAM_WINDOW
    budget = found._budget.left
    found.close()
    assert found._budget.left == budget + MAX_WINDOW - STREAM_WINDOW == 1 << 30


def test_a_finished_stream_gives_its_growth_back() -> None:
    found = streams()
    receive(found, 3, 0, b"abc", fin=True)
    found.recv[3].credit.grown = 1000
    found.credit.window += 1000
    found.read(3, 1.0, 0.1)
    assert found.credit.window == SESSION_WINDOW
    assert found._budget.left == (1 << 30) + 1000


def test_a_lost_credit_frame_says_the_newest() -> None:
    """Promise (2, R-6-6)."""
    found = streams()
    receive(found, 3, 0, bytes(STREAM_WINDOW))
    found.advance(3, STREAM_WINDOW // 2, 1.0, 0.1)
    said(found)
    found.advance(3, STREAM_WINDOW, 1.0, 0.1)
    said(found)
    found.on_lost((MAX_STREAM_DATA, 3))
    assert said(found) == [frames.MaxStreamData(3, 2 * STREAM_WINDOW)]
    found.on_acked((MAX_STREAM_DATA, 3))


def test_a_blocked_peer_hears_the_credit_however_little_is_new() -> None:
    """Without it, credit below the threshold of an announcement could stop both sides for ever."""
    found = streams()
    receive(found, 3, 0, bytes(1000))
    found.advance(3, 1000, 1.0, 0.1)
    assert said(found) == []
    found.on_blocked(MAX_STREAM_DATA, 3)
    found.on_blocked(MAX_DATA, 0)
    found.on_blocked(MAX_STREAM_DATA, 99)
    assert said(found) == [
        frames.MaxStreamData(3, STREAM_WINDOW + 1000),
        frames.MaxData(SESSION_WINDOW + 1000),
    ]


def test_a_blocked_writer_says_so_once_per_limit() -> None:
    found = streams()
    lane = found.open(16)
    found.write(lane, bytes(STREAM_WINDOW + 1), False)
    while (sender := found.pick()) is not None:
        take(found, sender, 100_000)
    assert said(found) == [frames.StreamDataBlocked(lane, STREAM_WINDOW)]
    assert found.pick() is None
    assert said(found) == []
    found.on_max_stream_data(lane, STREAM_WINDOW - 5)
    found.on_max_stream_data(lane, STREAM_WINDOW + 1)
    assert found.pick() is not None


def test_a_session_without_credit_says_so_once_per_limit() -> None:
    found = streams()
    lanes = [found.open(16) for _ in range(5)]
    for lane in lanes:
        found.write(lane, bytes(STREAM_WINDOW), False)
    while (sender := found.pick()) is not None:
        take(found, sender, 100_000)
    assert found.session_room == 0
    assert said(found) == [frames.DataBlocked(SESSION_WINDOW)]
    found.pick()
    assert said(found) == []


# -- who sends next


def test_control_goes_first() -> None:
    """Promise (1)."""
    found = streams()
    lane = found.open(16)
    found.write(lane, bytes(1000), False)
    found.write(0, b"x", False)
    first = found.pick()
    assert first is not None
    assert first.id == 0
    take(found, first, 100)
    second = found.pick()
    assert second is not None
    assert second.id == lane
    assert found.sent == 0


def test_lanes_share_by_weight() -> None:
    """Promise (1): over any stretch, within a burst (R-10-3)."""
    found = streams()
    lanes = {weight: found.open(weight) for weight in (64, 32, 16, 4)}
    sent = dict.fromkeys(lanes, 0)
    for lane in lanes.values():
        found.send[lane].limit = found.peer_limit = 1 << 40
        found.write(lane, bytes(10_000_000), False)
    for _ in range(2000):
        sender = found.pick()
        assert sender is not None
        sent[sender.weight] += take(found, sender, 1000)
    for weight, size in sent.items():
        assert size == pytest.approx(2_000_000 * weight / 116, abs=1000 * 4)


def test_a_lane_that_was_quiet_gets_no_arrears() -> None:
    found = streams()
    busy, quiet = found.open(16), found.open(16)
    for lane in (busy, quiet):
        found.send[lane].limit = found.peer_limit = 1 << 40
    found.write(busy, bytes(1_000_000), False)
    for _ in range(500):
        sender = found.pick()
        assert sender is not None
        take(found, sender, 1000)
    found.write(quiet, bytes(100_000), False)
    order = []
    for _ in range(20):
        sender = found.pick()
        assert sender is not None
        order.append(sender.id)
        take(found, sender, 1000)
    assert abs(order.count(quiet) - 10) <= 1


def test_a_lane_stays_until_nothing_can_be_lost() -> None:
    found = streams()
    lane = found.open(16)
    found.write(lane, b"abc", True)
    sender = found.pick()
    assert sender is not None
    take(found, sender, 100)
    assert found.pick() is None
    sender.on_lost((0, 3, True))
    assert found.pick() is sender
    take(found, sender, 100)
    sender.on_acked((0, 3, True))
    assert found.pick() is None
    assert lane not in found.send
    assert not found.writers


# -- giving up


def test_a_reset_is_said_until_it_arrived() -> None:
    found = streams()
    lane = found.open(16)
    found.write(lane, bytes(100), False)
    sender = found.pick()
    assert sender is not None
    take(found, sender, 60)
    found.reset(lane, 9)
    found.reset(lane, 10)
    assert said(found) == [frames.ResetStream(lane, 9, 60)]
    assert found.pick() is None
    found.on_lost(("reset_stream", lane))
    assert said(found) == [frames.ResetStream(lane, 9, 60)]
    found.on_acked(("reset_stream", lane))
    found.on_lost(("reset_stream", lane))
    assert said(found) == []
    with pytest.raises(UsageError):
        found.write(lane, b"x", False)
    with pytest.raises(UsageError):
        found.reset(0, 1)


def test_the_peers_reset_ends_the_stream_and_frees_its_credit() -> None:
    found = streams()
    receive(found, 3, 0, bytes(100))
    heard, opened = found.on_reset(frames.ResetStream(3, 9, 600_000 // 2), 1.0, 0.1)
    assert heard
    assert not opened
    assert found.credit.taken == 300_000
    assert found.on_reset(frames.ResetStream(3, 9, 300_000), 1.0, 0.1) == (False, ())
    assert list(found.on_reset(frames.ResetStream(7, 9, 0), 1.0, 0.1)[1]) == [7]
    with pytest.raises(ProtocolError):
        found.on_reset(frames.ResetStream(0, 9, 0), 1.0, 0.1)


def test_stop_sending_is_answered_with_a_reset() -> None:
    found = streams()
    lane = found.open(16)
    assert found.on_stop(frames.StopSending(lane, 5))
    assert said(found) == [frames.ResetStream(lane, 5, 0)]
    assert not found.on_stop(frames.StopSending(lane, 5))
    found.on_acked(("reset_stream", lane))
    assert not found.on_stop(frames.StopSending(lane, 5))
    for stream in (0, 3, 6, 4):
        with pytest.raises(ProtocolError):
            found.on_stop(frames.StopSending(stream, 5))


def test_asking_the_peer_to_stop() -> None:
    found = streams()
    receive(found, 3, 0, b"abc")
    found.stop(3, 5)
    assert said(found) == [frames.StopSending(3, 5)]
    found.on_lost(("stop_sending", 3))
    found.on_reset(frames.ResetStream(3, 5, 3), 1.0, 0.1)
    assert frames.StopSending(3, 5) not in said(found)
    for stream in (0, 3, 2):
        with pytest.raises(UsageError):
            found.stop(stream, 5)


def test_frames_wait_for_a_packet_with_room() -> None:
    found = streams()
    found.on_blocked(MAX_DATA, 0)
    assert said(found, room=5) == []
    assert found.pending
    assert said(found) == [frames.MaxData(SESSION_WINDOW)]
    assert not found.pending


def test_what_is_over_is_not_said() -> None:
    found = streams()
    receive(found, 3, 0, b"abc", fin=True)
    found.on_blocked(MAX_STREAM_DATA, 3)  # its end is known: no more credit
    found.read(3, 1.0, 0.1)
    found.on_lost((MAX_STREAM_DATA, 3))
    found.on_lost(("stream_data_blocked", 2))
    assert said(found) == [frames.MaxStreams(frames.UNIDIRECTIONAL, MAX_STREAMS + 1)]
