"""The message layer's rules, numbered at the head of stp.link. Sessions are joined in memory."""

from __future__ import annotations

import random

import pytest

from stp.control import (
    Goaway,
    Hello,
    Introduce,
    Receipt,
    Refused,
    Status,
    Subscribe,
    Subscribed,
    encode_control,
)
from stp.core import events
from stp.core.errors import ErrorCode, UsageError
from stp.link import (
    GoawayReceived,
    HelloReceived,
    LinkClosed,
    ReceiptReceived,
    RecordReceived,
    RefusedReceived,
    SourceIntroduced,
    StatusReceived,
    SubscribedReceived,
    SubscribeReceived,
    Writable,
)
from stp.records import RefusedCode
from tests.client.joined import OTHER, TELEMETRY, WINDOW, Pair, hello, joined, link, numbers, of_type, record

# -- (1) HELLO -------------------------------------------------------------------------------------------


def test_both_sides_learn_who_the_other_is() -> None:
    left, right = joined()
    device, gateway = link(left, hello("device", b"d" * 16)), link(right, hello("gateway", b"g" * 16))
    for _ in range(2):
        found = gateway.process(0.0), device.process(0.0)
        left.deliver(), right.deliver()
    greeting, introduced = found[0]
    assert isinstance(greeting, HelloReceived)
    assert greeting.hello.node == "device"
    assert greeting.hello.time_ms == 1_700_000_000_000
    assert introduced == SourceIntroduced(b"d" * 16, "device")
    assert gateway.peer is greeting.hello


@pytest.mark.parametrize(
    "claimed",
    [hello("another", b"d" * 16), Hello("other.example", "device", b"d" * 16, 1, bytes(16), "test")],
    ids=["node", "domain"],
)
def test_hello_must_agree_with_the_certificate(claimed: Hello) -> None:
    """R-10-28."""
    left, right = joined()
    gateway = link(right, hello("gateway", b"g" * 16))
    gateway.process(0.0)
    left.write(0, encode_control(claimed))
    left.deliver()
    (closed,) = gateway.process(0.0)
    assert isinstance(closed, LinkClosed)
    assert (closed.code, closed.by_peer) == (ErrorCode.AUTH, False)
    assert right.closed is not None
    assert right.closed[0] is ErrorCode.AUTH


def test_anything_before_hello_is_a_protocol_error() -> None:
    """R-10-33."""
    left, right = joined()
    gateway = link(right, hello("gateway", b"g" * 16))
    gateway.process(0.0)
    left.write(0, encode_control(Status({})))
    left.deliver()
    (closed,) = gateway.process(0.0)
    assert isinstance(closed, LinkClosed)
    assert closed.code is ErrorCode.PROTOCOL


def test_a_second_hello_is_a_protocol_error() -> None:
    pair = Pair()
    pair.left.write(0, encode_control(hello("device", pair.source)))
    assert of_type(pair.run(), LinkClosed)[0].code is ErrorCode.PROTOCOL


def test_lanes_are_not_parsed_before_hello() -> None:
    """R-10-28."""
    left, right = joined()
    device, gateway = link(left, hello("device", b"d" * 16)), link(right, hello("gateway", b"g" * 16))
    device.process(0.0), gateway.process(0.0)
    device.send_record(TELEMETRY, record(b"d" * 16, 1))
    lane = next(stream for stream in left.outbox if stream)
    left.deliver(lane)
    assert gateway.process(0.0) == []
    assert right.inbox[lane]
    left.deliver()
    found = gateway.process(0.0)
    assert [type(event) for event in found] == [HelloReceived, SourceIntroduced, RecordReceived]


def test_a_peer_that_never_says_hello_is_closed() -> None:
    _, right = joined()
    gateway = link(right, hello("gateway", b"g" * 16))
    gateway.process(0.0)
    assert gateway.check(29.9) == []
    (closed,) = gateway.check(30.0)
    assert isinstance(closed, LinkClosed)
    assert closed.code is ErrorCode.LIMIT


def test_nothing_is_sent_before_the_session_is_connected() -> None:
    left, _ = joined()
    left.events.clear()
    device = link(left, hello("device", b"d" * 16))
    assert device.lane_room(TELEMETRY) == 0
    with pytest.raises(UsageError):
        device.send_record(TELEMETRY, record(b"d" * 16, 1))
    with pytest.raises(UsageError):
        device.send(Status({}))
    device.flush()
    assert device.process(0.0) == []
    assert not any(left.outbox.values())


# -- control ---------------------------------------------------------------------------------------------


def test_control_records_pass_as_they_are() -> None:
    pair = Pair()
    for one in (Subscribe("1", ("a/#",)), Status({"cause": "none"}), Goaway("drain", 7), Subscribed("1")):
        pair.device.send(one)
    found = pair.run()
    assert found == [
        SubscribeReceived(Subscribe("1", ("a/#",))),
        StatusReceived(Status({"cause": "none"})),
        GoawayReceived(Goaway("drain", 7)),
        SubscribedReceived(Subscribed("1")),
    ]


def test_hello_is_the_links_to_send() -> None:
    with pytest.raises(UsageError):
        Pair().device.send(hello("device", b"d" * 16))


def test_an_unknown_control_record_is_skipped() -> None:
    """R-10-32."""
    pair = Pair()
    pair.left.write(0, b"\0\0\0\x03\xc8ab")
    pair.device.send(Subscribed("1"))
    assert pair.run() == [SubscribedReceived(Subscribed("1"))]


def test_a_control_record_above_16_kib_is_limit() -> None:
    """R-10-32."""
    pair = Pair()
    pair.left.write(0, (16_385).to_bytes(4, "big"))
    assert of_type(pair.run(), LinkClosed)[0].code is ErrorCode.LIMIT


@pytest.mark.parametrize("ended", [events.StreamReset, events.StreamStopped])
@pytest.mark.parametrize("stream", ["control", "lane in", "lane out"])
def test_a_lane_or_control_stream_that_ends_is_a_protocol_error(ended: type, stream: str) -> None:
    """R-10-4."""
    pair = Pair()
    pair.device.send_record(TELEMETRY, record(pair.source, 1))
    pair.gateway.send_record(TELEMETRY, record(pair.store, 1))
    pair.run()
    lanes = (
        [stream for stream in pair.right.inbox if stream],
        [stream for stream in pair.right.outbox if stream],
    )
    number = {"control": 0, "lane in": lanes[0][0], "lane out": lanes[1][0]}[stream]
    pair.right.events.append(ended(number, 0))
    assert of_type(pair.run(), LinkClosed)[0].code is ErrorCode.PROTOCOL


@pytest.mark.parametrize("stream", ["control", "lane"])
def test_a_lane_or_control_stream_with_fin_is_a_protocol_error(stream: str) -> None:
    pair = Pair()
    pair.device.send_record(TELEMETRY, record(pair.source, 1))
    pair.run()
    pair.device.send_record(TELEMETRY, record(pair.source, 2))
    pair.device.send(Status({}))
    pair.right.ends.add(0 if stream == "control" else max(pair.right.inbox))
    assert of_type(pair.run(), LinkClosed)[0].code is ErrorCode.PROTOCOL


def test_streams_of_an_unknown_kind_are_stopped_and_ignored() -> None:
    """R-10-4."""
    pair = Pair()
    stream = pair.left.open_stream()
    pair.left.write(stream, b"\x09what is this")
    assert pair.run() == []
    pair.left.write(stream, b"more")
    assert pair.run() == []
    assert stream not in pair.right.credit
    assert pair.right.stopped == {stream}
    pair.right.events.append(events.StreamReset(stream, 0))
    assert pair.run() == []
    assert pair.gateway.statistics().streams_ignored == 1


@pytest.mark.parametrize(
    ("opening", "stream"), [(b"\x01\x03", 4), (b"\x01\x09", 2), (b"\x01\x00", 2)], ids=["bidi", "9", "0"]
)
def test_a_lane_that_cannot_be(opening: bytes, stream: int) -> None:
    pair = Pair()
    pair.left.outbox[stream] = bytearray(opening)
    assert of_type(pair.run(), LinkClosed)[0].code is ErrorCode.PROTOCOL


def test_a_lane_is_opened_once() -> None:
    """R-10-3."""
    pair = Pair()
    for _ in range(2):
        pair.left.write(pair.left.open_stream(), b"\x01\x03")
    assert of_type(pair.run(), LinkClosed)[0].code is ErrorCode.PROTOCOL


def test_an_opening_may_come_byte_by_byte() -> None:
    pair = Pair()
    stream = pair.left.open_stream()
    for byte in b"\x01\x03" + record(pair.source, 1):
        pair.left.write(stream, bytes((byte,)))
        pair.run()
    assert numbers(pair.at) == [1]


# -- (2), (3), (4) places, receipts, credit ----------------------------------------------------------------


def test_places_count_from_0_on_each_lane() -> None:
    pair = Pair()
    places = [
        pair.device.send_record(lane, record(pair.source, 1 + n, lane=lane))
        for n in range(2)
        for lane in (1, 4)
    ]
    assert places == [0, 0, 1, 1]
    found = of_type(pair.run(), RecordReceived)
    assert sorted((event.lane, event.place) for event in found) == [(1, 0), (1, 1), (4, 0), (4, 1)]


def test_receipts_are_coalesced_and_say_kept_custody_and_ranges() -> None:
    """R-10-35."""
    pair = Pair()
    for number in range(1, 9):
        pair.device.send_record(TELEMETRY, record(pair.source, number))
    pair.run()
    for place in (0, 1, 2, 4):
        pair.gateway.settle(TELEMETRY, place, custody=False)
    for place in (5, 7):
        pair.gateway.settle(TELEMETRY, place, custody=True)
    pair.gateway.in_custody(TELEMETRY, 0)
    pair.gateway.in_custody(TELEMETRY, 2)
    pair.gateway.flush()
    pair.gateway.flush()
    pair.run()
    assert of_type(pair.back, ReceiptReceived) == [ReceiptReceived(TELEMETRY, 3, 1, [(2, 3), (5, 6), (7, 8)])]
    for place in (3, 6):
        pair.gateway.settle(TELEMETRY, place, custody=True)
    pair.gateway.in_custody(TELEMETRY, 1)
    pair.run()
    assert of_type(pair.back, ReceiptReceived)[-1] == ReceiptReceived(TELEMETRY, 8, 4, [(5, 8)])


def test_custody_may_come_long_after_kept() -> None:
    pair = Pair()
    pair.device.send_record(TELEMETRY, record(pair.source, 1))
    pair.run()
    pair.gateway.settle(TELEMETRY, 0, custody=False)
    pair.run()
    pair.gateway.in_custody(TELEMETRY, 0)
    pair.run()
    assert of_type(pair.back, ReceiptReceived) == [
        ReceiptReceived(TELEMETRY, 1, 0, []),
        ReceiptReceived(TELEMETRY, 1, 1, []),
    ]


def test_a_place_is_answered_once() -> None:
    pair = Pair()
    pair.device.send_record(TELEMETRY, record(pair.source, 1))
    pair.run()
    with pytest.raises(UsageError):
        pair.gateway.in_custody(TELEMETRY, 0)
    pair.gateway.settle(TELEMETRY, 0, custody=True)
    for answer in (
        lambda: pair.gateway.settle(TELEMETRY, 0, custody=True),
        lambda: pair.gateway.refuse(TELEMETRY, 0, RefusedCode.FULL),
        lambda: pair.gateway.settle(TELEMETRY, 1, custody=True),
        lambda: pair.gateway.settle(4, 0, custody=True),
    ):
        with pytest.raises(UsageError):
            answer()


def test_refused_stands_before_the_receipt_that_counts_it() -> None:
    """R-10-35."""
    pair = Pair()
    for number in (1, 2):
        pair.device.send_record(TELEMETRY, record(pair.source, number))
    pair.run()
    pair.gateway.settle(TELEMETRY, 0, custody=True)
    pair.gateway.refuse(TELEMETRY, 1, RefusedCode.DENIED, 250, "rule west")
    pair.run()
    assert pair.back == [
        RefusedReceived(TELEMETRY, 1, RefusedCode.DENIED, 250, "rule west"),
        ReceiptReceived(TELEMETRY, 2, 2, []),
    ]


@pytest.mark.parametrize(
    "lie",
    [
        Receipt(TELEMETRY, 2, 0),
        Receipt(TELEMETRY, 1, 0, [(1, 2)]),
        Receipt(4, 1, 0),
        Refused(TELEMETRY, 1, 1),
        Refused(4, 0, 1),
    ],
    ids=lambda lie: f"{type(lie).__name__}-{lie.lane}",
)
def test_answers_for_what_was_never_sent_close_the_session(lie: Receipt | Refused) -> None:
    pair = Pair()
    pair.device.send_record(TELEMETRY, record(pair.source, 1))
    pair.run()
    pair.right.write(0, encode_control(lie))
    pair.run()
    assert of_type(pair.back, LinkClosed)[0].code is ErrorCode.PROTOCOL


def test_credit_is_what_was_taken_plus_the_incomplete_record() -> None:
    """R-7-3."""
    pair = Pair()
    first, second = record(pair.source, 1), record(pair.source, 2, bytes(4000))
    pair.device.send_record(TELEMETRY, first)
    stream = next(stream for stream in pair.left.outbox if stream)
    pair.left.outbox[stream] += second[:1000]
    pair.run()
    assert pair.right.credit[stream] == 2 + 1000
    pair.left.outbox[stream] += second[1000:]
    pair.run()
    assert pair.right.credit[stream] == 2 + 1000
    pair.gateway.settle(TELEMETRY, 0, custody=True)
    pair.gateway.refuse(TELEMETRY, 1, RefusedCode.FULL)
    pair.gateway.flush()
    assert pair.right.credit[stream] == 2 + len(first) + len(second)


def test_a_record_larger_than_the_window_passes() -> None:
    pair = Pair()
    large = record(pair.source, 1, bytes(WINDOW + 200_000))
    pair.device.send_record(TELEMETRY, large)
    pair.run()
    (received,) = of_type(pair.at, RecordReceived)
    assert received.record == large


def test_an_owner_that_answers_nothing_stops_the_sender_at_the_window() -> None:
    pair = Pair()
    one = record(pair.source, 1, bytes(50_000))
    for number in range(1, 31):
        pair.device.send_record(TELEMETRY, record(pair.source, number, bytes(50_000)))
    pair.run()
    held = len(of_type(pair.at, RecordReceived))
    assert WINDOW // len(one) <= held <= WINDOW // len(one) + 2
    for place in range(held):
        pair.gateway.settle(TELEMETRY, place, custody=True)
    pair.run()
    assert len(of_type(pair.at, RecordReceived)) >= 2 * held - 2


def test_room_that_returns_is_told_by_lane() -> None:
    pair = Pair()
    pair.device.send_record(4, record(pair.source, 1, lane=4))
    stream = next(stream for stream in pair.left.outbox if stream)
    pair.left.events.append(events.StreamWritable(stream))
    assert pair.device.process(0.0) == [Writable(4)]
    assert pair.device.lane_room(4) == 1024 * 1024
    assert pair.device.lane_unsent(4) == len(pair.left.outbox[stream])
    assert pair.device.lane_unsent(1) == 0


# -- (9) the control stream ------------------------------------------------------------------------------


def test_a_full_control_stream_holds_receipts_back_and_loses_none() -> None:
    pair = Pair()
    for number in range(1, 4):
        pair.device.send_record(TELEMETRY, record(pair.source, number))
    pair.run()
    pair.right.control_room = 0
    pair.gateway.refuse(TELEMETRY, 0, RefusedCode.FULL)
    pair.gateway.settle(TELEMETRY, 1, custody=True)
    pair.gateway.flush()
    pair.gateway.settle(TELEMETRY, 2, custody=True)
    pair.gateway.flush()
    pair.run()
    assert pair.back == []
    assert pair.gateway.statistics().control_backlog > 0
    pair.right.control_room = 1000
    pair.run()
    assert [type(event) for event in pair.back] == [RefusedReceived, ReceiptReceived]
    assert pair.gateway.statistics().receipts_sent == 1


def test_a_peer_that_does_not_read_its_control_stream_is_closed() -> None:
    pair = Pair()
    pair.right.control_room = 0
    for _ in range(100):
        pair.gateway.send(Status({"cause": "x" * 12_000}))
    assert of_type(pair.run(), LinkClosed)[0].code is ErrorCode.LIMIT


# -- the end ---------------------------------------------------------------------------------------------


def test_after_the_end_every_call_is_allowed() -> None:
    pair = Pair()
    pair.device.send_record(TELEMETRY, record(pair.source, 1))
    (event,) = of_type(pair.run(), RecordReceived)
    pair.device.close(ErrorCode.GOING_AWAY, "1500", 0.0)
    assert pair.run() == [LinkClosed(ErrorCode.GOING_AWAY, "1500", by_peer=True)]
    gateway = pair.gateway
    gateway.settle(TELEMETRY, 0, custody=True)
    gateway.in_custody(TELEMETRY, 0)
    gateway.refuse(TELEMETRY, 0, RefusedCode.FULL)
    gateway.flush()
    gateway.send(Status({}))
    gateway.close(ErrorCode.NO_ERROR, "", 0.0)
    assert gateway.admit(event)
    assert gateway.send_record(TELEMETRY, record(pair.store, 1)) == 0
    assert gateway.lane_room(TELEMETRY) == 0
    assert gateway.check(99.0) == []
    assert pair.run() == []


# -- whatever comes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(40))
def test_any_bytes_are_taken_or_end_the_session(seed: int) -> None:
    """Good records, flipped bits, cut tails and noise, in any order: never another exception, never a hang."""
    rng = random.Random(seed)
    pair = Pair(may_speak_for=lambda node: node != "hub")
    pair.deaf = True
    good = [
        encode_control(one)
        for one in (
            Receipt(TELEMETRY, 0, 0),
            Introduce({OTHER: "sensor"}),
            Introduce({b"x" * 16: "hub"}),
            Status({"a": [1, None]}),
            Subscribe("1", ("a/#",)),
            Goaway(),
            Refused(TELEMETRY, 0, 1, 0, "x"),
        )
    ]
    lanes = [
        record(source, n, rng.randbytes(n * 10)) for source in (pair.source, OTHER, b"x" * 16) for n in (1, 2)
    ]
    streams = {0: good, pair.left.open_stream(): lanes, pair.left.open_stream(): lanes}
    for stream, start in zip(
        list(streams)[1:], (b"\x01\x03", rng.choice([b"\x01\x01", b"\x01\x03", b"\x07"])), strict=True
    ):
        pair.left.write(stream, start)
    for _ in range(60):
        stream = rng.choice(list(streams))
        data = bytearray(rng.choice(streams[stream]))
        if rng.random() < 0.1:
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        elif rng.random() < 0.05:
            data = data[: rng.randrange(len(data))]
        elif rng.random() < 0.03:
            data = bytearray(rng.randbytes(rng.randrange(1, 40)))
        pair.left.write(stream, bytes(data))
        for event in of_type(pair.run(), RecordReceived):
            if rng.random() < 0.8:
                if rng.random() < 0.8:
                    pair.gateway.settle(event.lane, event.place, custody=rng.random() < 0.5)
                else:
                    pair.gateway.refuse(event.lane, event.place, RefusedCode.FULL)
        pair.now += rng.choice((0.0, 0.1, 1.0))
        pair.check()
    closed = of_type(pair.at, LinkClosed)
    assert len(closed) <= 1
    if closed:
        assert closed[0].code in (ErrorCode.PROTOCOL, ErrorCode.LIMIT)
        assert pair.at[-1] is closed[0]
