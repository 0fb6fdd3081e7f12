"""What a link makes of records: sources, damage, order after a refusal, deadlines; numbered as in stp.link."""

from __future__ import annotations

import pytest

from stp.control import Introduce
from stp.core.errors import ErrorCode, UsageError
from stp.link import (
    LinkClosed,
    ReceiptReceived,
    RecordReceived,
    RecordRejected,
    RefusedReceived,
    SourceIntroduced,
)
from stp.receiving import MAX_REFUSALS
from stp.records import RefusedCode, encode_record
from stp.sources import MAX_FOREIGN
from tests.client.joined import OTHER, TELEMETRY, Pair, batch, hello, link, numbers, of_type, record, void

# -- (5) sources -----------------------------------------------------------------------------------------


def test_an_unknown_source_waits_for_introduce_without_credit() -> None:
    """R-10-28."""
    pair = Pair(may_speak_for=lambda node: node == "sensor")
    stream = pair.left.open_stream()
    data = b"\x01\x03" + record(OTHER, 1) + record(pair.source, 1)
    pair.left.write(stream, data)
    assert pair.run() == []
    assert pair.gateway.statistics().records_held == 2
    assert pair.right.credit.get(stream, 0) <= 2
    pair.now = 2.9
    assert pair.check() == []
    pair.device.send(Introduce({OTHER: "sensor"}))
    found = pair.run()
    assert found[0] == SourceIntroduced(OTHER, "sensor")
    assert [(event.head.source, event.place) for event in of_type(found, RecordReceived)] == [
        (OTHER, 0),
        (pair.source, 1),
    ]
    assert pair.gateway.node_of(OTHER) == "sensor"


def test_a_source_never_introduced_is_refused_after_3_seconds() -> None:
    """R-10-28."""
    pair = Pair(may_speak_for=lambda node: True)
    pair.deaf = True
    stream = pair.left.open_stream()
    pair.left.write(stream, b"\x01\x03" + record(OTHER, 1) + record(pair.source, 1))
    pair.run()
    pair.now = 3.0
    found = pair.check()
    (rejected,) = of_type(found, RecordRejected)
    assert (rejected.place, rejected.code, rejected.messages) == (0, RefusedCode.SOURCE, 1)
    assert numbers(found) == [1]
    # (7) holds over the wait: introduced at last, it starts again with what was refused.
    pair.device.send(Introduce({OTHER: "sensor"}))
    pair.run()
    pair.left.write(stream, record(OTHER, 2) + record(OTHER, 1) + record(OTHER, 2))
    found = pair.run()
    assert [type(event) for event in found] == [RecordRejected, RecordReceived, RecordReceived]


def test_a_foreign_source_is_refused_and_nothing_remembered() -> None:
    """R-10-27."""
    pair = Pair()
    pair.deaf = True
    pair.device.send(Introduce({OTHER: "hub"}))
    stream = pair.left.open_stream()
    pair.left.write(stream, b"\x01\x03" + record(OTHER, 7) + record(OTHER, 3))
    found = pair.run()
    assert [event.code for event in of_type(found, RecordRejected)] == [RefusedCode.SOURCE] * 2
    assert not of_type(found, SourceIntroduced)
    assert pair.gateway.node_of(OTHER) is None


def test_who_introduced_a_source_first_keeps_it() -> None:
    """What the owner's store knows counts, not what the peer says later; not even in HELLO."""
    pair = Pair(name_of_source=lambda source: {b"d" * 16: "hub", OTHER: "hub"}.get(source))
    pair.device.send(Introduce({OTHER: "device"}))
    stream = pair.left.open_stream()
    pair.left.write(stream, b"\x01\x03" + record(OTHER, 1) + record(pair.source, 1))
    assert [event.code for event in of_type(pair.run(), RecordRejected)] == [RefusedCode.SOURCE] * 2


def test_an_earlier_source_of_the_same_node_is_its_own() -> None:
    pair = Pair()
    pair.device.send(Introduce({OTHER: "device"}))
    pair.left.write(pair.left.open_stream(), b"\x01\x03" + record(OTHER, 1))
    assert numbers(pair.run()) == [1]


def test_foreign_sources_are_remembered_within_a_bound() -> None:
    pair = Pair()
    sources = [number.to_bytes(16, "big") for number in range(MAX_FOREIGN + 10)]
    for at in range(0, len(sources), 200):
        pair.device.send(Introduce(dict.fromkeys(sources[at : at + 200], "stranger")))
        assert pair.run() == []
    pair.left.write(pair.left.open_stream(), b"\x01\x03" + record(sources[-1], 1))
    assert pair.run() == []
    pair.now = 3.0
    assert of_type(pair.check(), RecordRejected)[0].code is RefusedCode.SOURCE


def test_a_relay_introduces_a_source_before_its_first_record() -> None:
    pair = Pair(may_speak_for=lambda node: node == "sensor")
    pair.device = link(pair.left, hello("device", pair.source), name_of_source={OTHER: "sensor"}.get)
    pair.device.connected = True
    for number in (1, 2):
        pair.device.send_record(TELEMETRY, record(OTHER, number))
    found = pair.run()
    assert of_type(found, SourceIntroduced) == [SourceIntroduced(OTHER, "sensor")]
    assert numbers(found) == [1, 2]
    with pytest.raises(UsageError):
        pair.device.send_record(TELEMETRY, record(b"?" * 16, 1))


# -- (6) damage ------------------------------------------------------------------------------------------


def test_a_damaged_record_costs_its_place_only() -> None:
    """R-10-23."""
    pair = Pair()
    bad = bytearray(record(pair.source, 1))
    bad[40] ^= 1
    pair.left.write(pair.left.open_stream(), b"\x01\x03" + bytes(bad) + record(pair.source, 2))
    found = pair.run()
    (rejected,) = of_type(found, RecordRejected)
    assert (rejected.place, rejected.head, rejected.code) == (0, None, RefusedCode.CORRUPT)
    assert numbers(found) == [2]


def test_a_batch_damaged_by_its_publisher_is_refused_by_number() -> None:
    pair = Pair()
    damaged = bytearray(batch())
    damaged[-6] ^= 1
    bad = encode_record(TELEMETRY, pair.source, 1, [bytes(damaged)])
    pair.left.write(pair.left.open_stream(), b"\x01\x03" + bad + record(pair.source, 2))
    found = pair.run()
    assert [(event.code, event.head and event.head.number) for event in of_type(found, RecordRejected)] == [
        (RefusedCode.CORRUPT, 1),
        (RefusedCode.CORRUPT, 2),
    ]


def test_a_record_of_another_lane_is_corrupt() -> None:
    pair = Pair()
    pair.left.write(pair.left.open_stream(), b"\x01\x03" + record(pair.source, 1, lane=1))
    assert of_type(pair.run(), RecordRejected)[0].code is RefusedCode.CORRUPT


def test_a_record_above_the_limit_closes() -> None:
    pair = Pair()
    pair.left.write(pair.left.open_stream(), b"\x01\x03" + (2_000_000).to_bytes(4, "big"))
    assert of_type(pair.run(), LinkClosed)[0].code is ErrorCode.LIMIT


# -- (7) order after a refusal ---------------------------------------------------------------------------


def refused_pair() -> Pair:
    """Numbers 1 to 4 were sent; 1 is settled, 2 refused, 3 and 4 wait for their answer."""
    pair = Pair()
    for number in (1, 2, 3, 4):
        pair.device.send_record(TELEMETRY, record(pair.source, number))
    pair.run()
    pair.gateway.settle(TELEMETRY, 0, custody=True)
    pair.gateway.refuse(TELEMETRY, 1, RefusedCode.FULL, 100)
    return pair


def test_what_was_given_out_already_is_not_admitted() -> None:
    pair = refused_pair()
    third, fourth = of_type(pair.at, RecordReceived)[2:]
    assert not pair.gateway.admit(third)
    assert not pair.gateway.admit(fourth)
    pair.run()
    assert [event.place for event in of_type(pair.back, RefusedReceived)] == [1, 2, 3]
    assert of_type(pair.back, ReceiptReceived)[-1].kept == 4


def test_later_numbers_are_refused_with_the_same_code_until_all_came_again() -> None:
    """R-10-38."""
    pair = refused_pair()
    for event in of_type(pair.at, RecordReceived)[2:]:
        pair.gateway.admit(event)
    for number in (5, 2, 4, 3, 4, 6, 5, 6):
        pair.device.send_record(TELEMETRY, record(pair.source, number))
    found = pair.run()
    assert numbers(found) == [2, 3, 4, 5, 6]
    assert [(event.head.number, event.code) for event in of_type(found, RecordRejected) if event.head] == [
        (5, RefusedCode.FULL),
        (4, RefusedCode.FULL),
        (6, RefusedCode.FULL),
    ]
    assert all(pair.gateway.admit(event) for event in of_type(found, RecordReceived))


def test_a_void_counts_for_all_it_covers() -> None:
    """R-10-38."""
    pair = refused_pair()
    for event in of_type(pair.at, RecordReceived)[2:]:
        pair.gateway.admit(event)
    pair.device.send_record(TELEMETRY, void(pair.source, 2, 4))
    pair.device.send_record(TELEMETRY, record(pair.source, 5))
    assert numbers(pair.run()) == [2, 5]


def test_a_refusal_holds_for_its_source_and_lane_only() -> None:
    pair = Pair()
    pair.device.send(Introduce({OTHER: "device"}))
    pair.device.send_record(TELEMETRY, record(pair.source, 1))
    pair.run()
    pair.gateway.refuse(TELEMETRY, 0, RefusedCode.FULL)
    stream = next(stream for stream in pair.left.outbox if stream)
    pair.left.write(stream, record(OTHER, 9))
    pair.device.send_record(1, record(pair.source, 2, lane=1))
    assert sorted(numbers(pair.run())) == [2, 9]


def test_numbers_below_the_refused_one_are_the_owners_to_judge() -> None:
    pair = refused_pair()
    pair.device.send_record(TELEMETRY, record(pair.source, 1))
    assert numbers(pair.run()) == [1]


def test_a_refused_number_that_was_settled_after_all_counts_as_come() -> None:
    """The same number twice in flight: the first is refused after the second has come, the second is kept."""
    pair = Pair()
    for _ in range(2):
        pair.device.send_record(TELEMETRY, record(pair.source, 1))
    pair.run()
    pair.gateway.refuse(TELEMETRY, 0, RefusedCode.FULL)
    pair.gateway.settle(TELEMETRY, 1, custody=True)
    pair.device.send_record(TELEMETRY, record(pair.source, 2))
    assert numbers(pair.run()) == [2]


def test_refusals_are_remembered_within_a_bound() -> None:
    pair = Pair(may_speak_for=lambda node: True)
    pair.deaf = True
    sources = [number.to_bytes(16, "big") for number in range(MAX_REFUSALS + 1)]
    stream = pair.left.open_stream()
    pair.left.write(stream, b"\x01\x03")
    for at in range(0, len(sources), 200):
        pair.device.send(Introduce(dict.fromkeys(sources[at : at + 200], "x")))
        pair.run()
        pair.left.write(stream, b"".join(record(source, 1) for source in sources[at : at + 200]))
        for event in of_type(pair.run(), RecordReceived):
            pair.gateway.refuse(TELEMETRY, event.place, RefusedCode.FULL)
        pair.run()
    assert of_type(pair.at, LinkClosed)[0].code is ErrorCode.LIMIT


# -- (8) deadlines ---------------------------------------------------------------------------------------


def test_an_incomplete_record_is_limit_after_30_seconds() -> None:
    """R-7-4."""
    pair = Pair()
    pair.left.write(pair.left.open_stream(), b"\x01\x03" + record(pair.source, 1)[:50])
    pair.run()
    for pair.now in (1.0, 29.9):
        assert pair.check() == []
    pair.now = 30.0
    (closed,) = of_type(pair.check(), LinkClosed)
    assert closed.code is ErrorCode.LIMIT


def test_the_clock_stands_while_the_peer_has_no_credit() -> None:
    pair = Pair()
    stream = pair.left.open_stream()
    pair.left.write(
        stream, b"\x01\x03" + b"".join(record(pair.source, n, bytes(90_000)) for n in range(1, 9))
    )
    pair.run()
    for pair.now in (10.0, 100.0, 200.0):
        assert pair.check() == []
    received = of_type(pair.at, RecordReceived)
    for event in received:
        pair.gateway.settle(TELEMETRY, event.place, custody=True)
    pair.run()
    assert len(of_type(pair.at, RecordReceived)) == 8
