"""Doors of the message layer: topics and filters, batches, records, lanes, control records."""

from __future__ import annotations

from zlib import crc32

from stp.batch import excerpt, open_batch
from stp.control import ControlCutter, decode_control, encode_control
from stp.core.errors import MessageError, ProtocolError
from stp.echo import ECHO_REPLY, ECHO_REQUEST, HEAD, Allowance, Load, Responder
from stp.records import (
    MAX_HOPS,
    RecordCutter,
    RecordKind,
    batches_of,
    check_batches,
    forward,
    loops,
    part_of,
    read_record,
)
from stp.topics import Decision, FilterSet, TopicError, check_filter, check_topic, matches, prefix_decides
from tests.fuzz.engine import Target
from tests.fuzz.vectors import seeds, words

NODE = bytes(range(16))


def topics() -> Target:
    """A filter, a NUL, a topic. What a prefix decides must be so for every topic behind it."""

    def feed(data: bytes) -> None:
        wanted, topic = ((data + b"\n").split(b"\n")[n].decode("utf-8", "surrogateescape") for n in (0, 1))
        check_filter(wanted)
        check_topic(topic)
        answer = matches(wanted, topic)
        several = FilterSet((wanted, "never/this"))
        assert several.matches(topic) is answer
        for end in range(len(topic) + 1):
            if end == 0 or end == len(topic) or topic[end - 1] == "/":
                prefix = topic[:end]
                for decision in (prefix_decides(wanted, prefix), several.decide(prefix)):
                    assert decision is not (Decision.NONE if answer else Decision.ALL), prefix

    valid = [
        b"\n".join(pair)
        for pair in zip(words("topic_match", "filter"), words("topic_match", "topic"), strict=True)
    ]
    return Target(
        name="topics",
        feed=feed,
        seeds=[*valid, b"a/+/c/#\na/b/c/d/e", b"$stp/+\n$stp/x", b"+/+\n/"],
        promised=(TopicError,),
        words=[b"/", b"#", b"+", b"$", b"\n", b"/#", b"/+/", b"//", b"\0", "é".encode(), b"a"],
    )


def seal_batch(data: bytes) -> bytes:
    """Size and CRC of a batch made right."""
    if len(data) < 8:
        return data
    body = data[4:-4]
    return (len(data) - 4).to_bytes(4, "big") + body + crc32(body).to_bytes(4, "big")


def batches() -> Target:
    def feed(data: bytes) -> None:
        opened = open_batch(data)
        count = opened.head.count
        assert (
            count
            == len(opened.topics)
            == len(opened.payloads)
            == len(opened.times_ms)
            == len(opened.properties)
        )
        for properties in opened.properties:
            if properties is not None:
                properties.encode()
        cut = open_batch(excerpt(data, [count - 1]))
        assert cut.topics == opened.topics[-1:]
        assert cut.payloads == opened.payloads[-1:]
        assert list(cut.indices) == [opened.indices[-1]]

    return Target(
        name="batches",
        feed=feed,
        seeds=seeds("batches", "excerpts", "batches_invalid"),
        promised=(MessageError,),
        repair=seal_batch,
    )


def seal_record(data: bytes) -> bytes:
    """Size, number of hops and CRC of a record made right."""
    if len(data) < 45:
        return data
    hops = min(data[-5] % (MAX_HOPS + 1), (len(data) - 45) // 16)
    end = len(data) - 5 - 16 * hops
    body = data[4 : end - 4]
    trailer = data[end:-5] + bytes([hops]) + data[-4:]
    return (len(data) - 4).to_bytes(4, "big") + body + crc32(body).to_bytes(4, "big") + trailer


def records() -> Target:
    def feed(data: bytes) -> None:
        head = read_record(data)
        if not loops(head, NODE):
            onward = forward(data, head, NODE, 3)
            later = read_record(onward)
            assert (later.source, later.number, later.crc) == (head.source, head.number, head.crc)
            assert later.hops == (*head.hops, NODE)
        if head.kind == RecordKind.VOID:
            return
        assert len(batches_of(data, head)) == head.batches
        check_batches(data, head)
        part = part_of(data, head, [head.batches - 1])
        assert read_record(part).kind == RecordKind.PART

    return Target(
        name="records",
        feed=feed,
        seeds=[*seeds("records", "records_invalid"), *seeds("record_next_hop", field="after")],
        promised=(MessageError,),
        repair=seal_record,
    )


def lane() -> Target:
    """However a lane is cut into pieces, the same records come out."""

    def feed(data: bytes) -> None:
        whole, pieces = RecordCutter(), RecordCutter()
        expected = whole.feed(data)
        step = 1 + (data[-1] if data else 0)
        found = [record for at in range(0, len(data), step) for record in pieces.feed(data[at : at + step])]
        assert found == expected
        assert pieces.incomplete == whole.incomplete == len(data) - sum(map(len, expected))

    valid = seeds("records")
    return Target(
        name="lane",
        feed=feed,
        seeds=[b"".join(valid[:3]), b"".join(valid), valid[0] * 5],
        promised=(ProtocolError,),
    )


def control() -> Target:
    def feed(data: bytes) -> None:
        for kind, body in ControlCutter().feed(data):
            one = decode_control(kind, body)
            if one is not None:
                sent = encode_control(one)  # may cut a long reason
                (again,) = ControlCutter().feed(sent)
                decoded = decode_control(*again)
                assert decoded is not None
                assert encode_control(decoded) == sent

    return Target(
        name="control",
        feed=feed,
        seeds=seeds("control_records", "control_records_invalid"),
        promised=(ProtocolError,),
        words=[
            b"{",
            b"}",
            b"[",
            b"]",
            b'"',
            b",",
            b":",
            b"null",
            b"true",
            b"-1",
            b"1e999",
            b"NaN",
            b"\\ud800",
            b"[" * 5000,
        ],
        repair=lambda data: (max(len(data) - 4, 0)).to_bytes(4, "big") + data[4:],
    )


def echo() -> Target:
    """An unreliable datagram at a keeper, and the same at somebody who measures: an answer, or nothing."""

    def feed(data: bytes) -> None:
        responder, load = Responder(1e9, Allowance(1e9)), Load(1e6, 100, 0.0)
        reply = responder.answer(data, 1.0)
        assert responder.arrived + responder.strange == 1
        assert reply is None or len(reply) == len(data)
        asked = load.request(0.0)
        assert asked is not None
        load.on_sent(taken=True)
        if load.on_datagram(data, 1.0):
            assert not load.on_datagram(data, 1.0)
        found = load.report(1.0)
        assert found.sent == 1 == found.answered + found.unanswered + found.lost_up + found.lost_down
        assert 0.0 <= found.lost <= 1.0

    asked = HEAD.pack(ECHO_REQUEST, 0, 1, 0, 0) + bytes(79)
    answered = HEAD.pack(ECHO_REPLY, 0, 1, 1, 0) + bytes(79)
    words = [b"\xff\xff\xff\xff", b"\x80", bytes(4)]
    return Target(name="echo", feed=feed, seeds=[asked, answered, b"\x80mine"], promised=(), words=words)
