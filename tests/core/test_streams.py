"""stp.core.streams: promises (1) to (3) of its head."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stp.core.errors import FlowError, LimitError, ProtocolError
from stp.core.streams import (
    CONTROL_BUFFER,
    MAX_CHUNKS,
    MAX_GAPS,
    MAX_SEND_BUFFER,
    SEND_BUFFER,
    RecvStream,
    SendStream,
)

DATA = bytes(random.Random(1).randbytes(4000))
pieces = st.lists(st.tuples(st.integers(0, 399), st.integers(1, 60)), max_size=60)


# -- receiving


@given(pieces)
def test_any_pieces_in_any_order_give_the_bytes_once(found: list[tuple[int, int]]) -> None:
    """Promise (1), against the set of offsets seen; `highest` grows by what is new at the top."""
    stream = RecvStream(2, 1000)
    seen: set[int] = set()
    out, grown = b"", 0
    for start, size in found:
        grown += stream.insert(start, DATA[start : start + size], False)
        seen |= set(range(start, start + size))
        out += stream.read()
        prefix = next(n for n in range(1001) if n not in seen)
        assert stream.next == prefix
        assert out == DATA[:prefix]
    assert grown == stream.highest == max(seen, default=-1) + 1
    rest = min((n for n in range(400) if n not in seen), default=400)
    stream.insert(rest, DATA[rest:459], False)
    assert out + stream.read() == DATA[:459]
    assert not stream._runs


def test_the_loops_appends_are_followed_by_what_waited() -> None:
    """The receive loop moves `next` and `chunks` itself, then calls `merge`."""
    stream = RecvStream(2, 1000)
    stream.insert(20, DATA[20:30], False)
    stream.insert(40, DATA[40:50], False)
    stream.chunks.append(DATA[:25])
    stream.next = 25
    stream.merge()
    assert stream.read() == DATA[:30]
    assert stream.next == 30


def test_end_of_stream() -> None:
    stream = RecvStream(2, 1000)
    stream.insert(10, DATA[10:20], True)
    assert not stream.complete
    stream.insert(0, DATA[:10], False)
    assert stream.complete
    assert stream.read() == DATA[:20]


def test_an_empty_end() -> None:
    stream = RecvStream(2, 1000)
    assert stream.insert(0, b"", True) == 0
    assert stream.complete


@pytest.mark.parametrize(
    ("offset", "size", "fin"),
    [(15, 10, False), (0, 10, True), (0, 21, True)],
    ids=["beyond", "before", "longer"],
)
def test_the_end_does_not_move(offset: int, size: int, fin: bool) -> None:
    stream = RecvStream(2, 1000)
    stream.insert(10, DATA[10:20], True)
    with pytest.raises(ProtocolError):
        stream.insert(offset, DATA[offset : offset + size], fin)


def test_an_end_below_what_was_received() -> None:
    stream = RecvStream(2, 1000)
    stream.insert(10, DATA[10:20], False)
    with pytest.raises(ProtocolError):
        stream.insert(0, DATA[:15], True)


def test_more_than_the_credit() -> None:
    """R-7-5."""
    stream = RecvStream(2, 100)
    stream.insert(90, DATA[:10], False)
    with pytest.raises(FlowError):
        stream.insert(91, DATA[:10], False)


def test_gaps_are_limited() -> None:
    """Promise (2) and fault 30: one byte here, one byte there (R-7-6)."""
    stream = RecvStream(2, 1 << 20)
    for n in range(1, MAX_GAPS + 1):
        stream.insert(2 * n, b"x", False)
    with pytest.raises(LimitError):
        stream.insert(2 * MAX_GAPS + 2, b"x", False)


def test_small_pieces_beyond_a_gap_are_one_run() -> None:
    """Promise (2): an object per byte would cost a hundred times the credit."""
    stream = RecvStream(2, 1 << 20)
    for n in range(5000):
        stream.insert(10 + n, b"x", False)
    assert len(stream._runs) == 1


def test_unread_pieces_are_joined() -> None:
    stream = RecvStream(2, 1 << 20)
    for n in range(3 * MAX_CHUNKS):
        stream.insert(2 * n, b"xy", False)
    assert len(stream.chunks) <= MAX_CHUNKS
    assert stream.read() == b"xy" * 3 * MAX_CHUNKS


def test_a_reset_stream_drops_what_it_holds() -> None:
    stream = RecvStream(2, 1000)
    stream.insert(0, DATA[:10], False)
    stream.insert(20, DATA[20:30], False)
    assert stream.drop(50) == 20
    assert stream.read() == b""
    assert stream.insert(30, DATA[30:50], False) == 0
    assert stream.read() == b""


def test_offences_of_a_reset() -> None:
    stream = RecvStream(2, 1000)
    stream.insert(0, DATA[:10], False)
    with pytest.raises(ProtocolError):
        stream.drop(9)
    with pytest.raises(FlowError):
        stream.drop(1001)
    stream.insert(10, b"", True)
    with pytest.raises(ProtocolError):
        stream.drop(11)


# -- sending


def sender(*chunks: bytes, limit: int = 1 << 20, fin: bool = False) -> SendStream:
    stream = SendStream(2, limit)
    for chunk in chunks:
        stream.write(chunk, False)
    stream.write(b"", fin)
    return stream


def take(stream: SendStream, most: int) -> tuple[int, bytes, bool]:
    offset, available = stream.due(1 << 30)
    length = min(most, available)
    data, index, fin = stream.take(offset, length)
    return offset, data[index : index + length], fin


def test_bytes_leave_in_order_across_chunks() -> None:
    stream = sender(DATA[:7], DATA[7:8], DATA[8:100], fin=True)
    out = b""
    while stream.wants_to_send(1 << 30):
        offset, data, fin = take(stream, 11)
        assert offset == len(out)
        out += data
        assert fin is (len(out) == 100)
    assert out == DATA[:100]


def test_credit_of_stream_and_session_hold_bytes_back() -> None:
    stream = sender(DATA[:100], limit=60)
    assert stream.due(1 << 30) == (0, 60)
    assert stream.due(40) == (0, 40)
    take(stream, 60)
    assert not stream.wants_to_send(1 << 30)
    stream.limit = 80
    assert stream.wants_to_send(1)
    assert not stream.wants_to_send(0)


def test_the_control_stream_needs_no_session_credit() -> None:
    stream = SendStream(0, 1000)
    stream.write(DATA[:10], False)
    assert stream.wants_to_send(0)
    assert stream.due(0) == (0, 10)


def test_a_lone_end_is_sent_once() -> None:
    stream = sender(fin=True)
    assert stream.wants_to_send(0)
    assert take(stream, 10) == (0, b"", True)
    assert not stream.wants_to_send(0)
    stream.on_range_lost(0, 0, True)
    assert stream.wants_to_send(0)
    take(stream, 10)
    stream.on_range_acked(0, 0, True)
    stream.on_range_lost(0, 0, True)
    assert not stream.wants_to_send(0)
    assert stream.settled


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(1, 50)), max_size=80), st.integers(1, 40))
def test_a_byte_is_kept_until_acknowledged_and_not_longer(steps: list[tuple[int, int]], size: int) -> None:
    """Promise (3): a lossy wire, against a receiver that only counts."""
    stream = sender(*[DATA[n : n + 13] for n in range(0, 520, 13)], fin=True)
    wire: list[tuple[int, bytes, bool]] = []
    arrived: set[int] = set()
    ended = False
    for what, number in [*steps, *[(0, 0), (2, 0)] * 700]:
        if what == 0 and stream.wants_to_send(1 << 30):
            wire.append(take(stream, size))
            assert wire[-1][1] == DATA[wire[-1][0] :][: len(wire[-1][1])]
        elif wire:
            offset, data, fin = wire.pop(number % len(wire))
            if what == 1:
                stream.on_lost((offset, len(data), fin))
            else:
                stream.on_acked((offset, len(data), fin))
                arrived |= set(range(offset, offset + len(data)))
                ended = ended or fin
        assert stream.base == next(n for n in range(521) if n not in arrived)
        held = sum(map(len, stream._chunks))
        assert held - 12 <= stream.written - stream.base <= held
    assert arrived == set(range(520))
    assert ended
    assert stream.settled
    assert not stream._chunks


def test_what_arrived_after_all_is_not_sent_again() -> None:
    stream = sender(DATA[:30])
    take(stream, 30)
    stream.on_range_acked(10, 10, False)
    stream.on_range_lost(0, 30, False)
    assert stream.lost is not None
    assert stream.lost.pairs() == [(0, 10), (20, 30)]
    stream.on_range_acked(0, 10, False)
    assert stream.lost.pairs() == [(20, 30)]
    assert stream.base == 20
    stream.on_range_lost(0, 15, False)
    assert stream.lost.pairs() == [(20, 30)]


def test_room() -> None:
    stream = sender(bytes(1000))
    assert stream.room() == SEND_BUFFER - 1000
    take(stream, 1000)
    assert stream.room() == SEND_BUFFER - 1000
    stream.on_range_acked(0, 400, False)
    assert stream.room() == SEND_BUFFER - 600
    stream.write(bytes(SEND_BUFFER), False)
    assert stream.room() == 0
    assert SendStream(0, 1).room() == CONTROL_BUFFER


def test_as_much_again_as_is_under_way_has_room_up_to_a_limit() -> None:
    stream = sender(bytes(SEND_BUFFER), limit=1 << 30)
    take(stream, SEND_BUFFER)
    assert stream.room() == SEND_BUFFER
    stream.write(bytes(3 * SEND_BUFFER), False)
    take(stream, 3 * SEND_BUFFER)
    assert stream.room() == MAX_SEND_BUFFER - 4 * SEND_BUFFER
    stream.on_range_acked(0, 4 * SEND_BUFFER, False)
    assert stream.room() == MAX_SEND_BUFFER


def test_a_reset_sender_forgets_everything() -> None:
    stream = sender(DATA[:100])
    take(stream, 50)
    stream.reset(7)
    assert not stream.wants_to_send(1 << 30)
    stream.on_range_lost(0, 50, False)
    assert not stream.wants_to_send(1 << 30)
    assert not stream._chunks
    assert stream.next == 50  # the final size that the peer hears of
