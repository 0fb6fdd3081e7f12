"""The conformance vectors of protocol §10: decoded to the fields given, made again, or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from stp.batch import (
    COMPRESSED,
    EXCERPT,
    PROPERTIES,
    TIMES,
    TOMBSTONES,
    Properties,
    encode_batch,
    excerpt,
    node_id,
    open_batch,
)
from stp.control import (
    ControlCutter,
    DrainCredit,
    Goaway,
    Hello,
    Introduce,
    Receipt,
    Refused,
    Status,
    Subscribe,
    Subscribed,
    Unsubscribe,
    decode_control,
    encode_control,
)
from stp.core.errors import CorruptError, ProtocolError
from stp.records import (
    RecordCutter,
    RecordKind,
    batches_of,
    check_batches,
    encode_record,
    encode_void,
    forward,
    part_of,
    read_record,
    regroup,
)
from stp.topics import Decision, FilterSet, matches, prefix_decides

VECTORS: dict[str, Any] = json.loads(
    (Path(__file__).parent.parent / "vectors" / "stp1.json").read_text(encoding="utf-8")
)
unhex = bytes.fromhex


def cases(key: str) -> Any:
    """One test per vector, named as the vector is."""
    found = VECTORS[key]
    return pytest.mark.parametrize(
        "vector", found, ids=[one.get("name", str(n)) for n, one in enumerate(found)]
    )


def tlvs(properties: Properties | None) -> list[list[Any]]:
    """As the vectors write them: type and value of each."""
    data = b"" if properties is None else properties.encode()
    found: list[list[Any]] = []
    while data:
        size = int.from_bytes(data[1:3], "big")
        found.append([data[0], data[3 : 3 + size].hex()])
        data = data[3 + size :]
    return found


def assert_opens_to(data: bytes, vector: dict[str, Any], *, flags: int | None = None) -> None:
    opened = open_batch(data)
    head = opened.head
    assert head.flags == (vector["flags"] if flags is None else flags)
    assert head.size_total == len(data)
    assert (head.count, head.time_ms, head.ttl_ms) == (vector["count"], vector["time_ms"], vector["ttl_ms"])
    assert head.publisher.hex() == vector["publisher"]
    assert (head.run, head.sequence) == (int(vector["run"]), int(vector["sequence"]))
    assert head.prefix == vector["prefix"]
    messages = [
        {"index": index, "topic": topic, "payload": payload.hex(), "time_ms": time, "properties": tlvs(props)}
        for index, topic, payload, time, props in zip(
            opened.indices, opened.topics, opened.payloads, opened.times_ms, opened.properties, strict=True
        )
    ]
    assert messages == vector["messages"]


@cases("batches")
def test_batch_opens_and_is_made_again(vector: dict[str, Any]) -> None:
    data = unhex(vector["bytes"])
    assert_opens_to(data, vector)
    assert data[-4:].hex() == vector["crc"]
    opened, flags = open_batch(data), vector["flags"]
    again = encode_batch(
        opened.topics,
        opened.payloads,
        time_ms=vector["time_ms"],
        ttl_ms=vector["ttl_ms"],
        publisher=unhex(vector["publisher"]),
        run=int(vector["run"]),
        sequence=int(vector["sequence"]),
        times=opened.times_ms if flags & TIMES else None,
        properties=opened.properties if flags & PROPERTIES else None,
        compress=bool(flags & COMPRESSED),
        tombstones=bool(flags & TOMBSTONES),
    )
    assert_opens_to(again, vector)
    if not vector["encoder_may_differ"]:
        assert again.hex() == vector["bytes"]


@cases("excerpts")
def test_excerpt(vector: dict[str, Any]) -> None:
    """R-10-11."""
    assert_opens_to(unhex(vector["bytes"]), vector)
    ours = excerpt(unhex(vector["of"]), vector["keep"])
    assert_opens_to(ours, vector, flags=vector["flags"] & ~COMPRESSED | EXCERPT)
    if not vector["encoder_may_differ"]:
        assert ours.hex() == vector["bytes"]


@cases("batches_invalid")
def test_invalid_batch(vector: dict[str, Any]) -> None:
    """R-10-7."""
    with pytest.raises(CorruptError):
        open_batch(unhex(vector["bytes"]))


@cases("records")
def test_record(vector: dict[str, Any]) -> None:
    data = unhex(vector["bytes"])
    head = read_record(data)
    check_batches(data, head)
    hops = [unhex(hop) for hop in vector["hops"]]
    assert RecordKind(head.kind).name.lower() == vector["kind"]
    assert (head.lane, head.batches, head.number) == (vector["lane"], vector["batches"], vector["number"])
    assert (head.source.hex(), f"{head.crc:08x}") == (vector["source"], vector["crc"])
    assert (list(head.hops), head.age_ds, head.size) == (hops, vector["age_ds"], len(data))
    if head.kind == RecordKind.VOID:
        assert (head.to, head.reason, head.messages) == (vector["to"], vector["reason"], vector["messages"])
        assert batches_of(data, head) == []
        again = encode_void(
            head.lane, head.source, head.number, head.to, head.reason, head.messages, head.hops, head.age_ds
        )
    else:
        assert (head.to, head.reason, head.prefix) == (head.number, 0, vector["prefix"])
        batches = batches_of(data, head)
        assert [batch.hex() for batch in batches] == vector["batch_bytes"]
        assert head.messages == sum(open_batch(batch).head.count for batch in batches)
        again = encode_record(
            head.lane, head.source, head.number, batches, kind=head.kind, hops=hops, age_ds=head.age_ds
        )
    assert again == data


def test_part_of_the_record_it_came_from() -> None:
    """R-10-15."""
    named = {vector["name"]: unhex(vector["bytes"]) for vector in VECTORS["records"]}
    whole = named["data, from its first keeper: three batches, one hop"]
    part = named["part: the first and third of three batches"]
    assert part_of(whole, read_record(whole), [0, 2]) == part
    mixed = named["data, batches without a common prefix"]
    part = named["part, batches of one topic left of the mixed record"]
    assert part_of(mixed, read_record(mixed), [1, 2]) == part


def test_regrouping_publishers_records_makes_the_keepers_record() -> None:
    for vector in VECTORS["records"]:
        if vector["kind"] != "data" or vector["batches"] < 2:
            continue
        whole = unhex(vector["bytes"])
        head = read_record(whole)
        published = [
            encode_record(head.lane, bytes([n]) * 16, 7, [batch], age_ds=n)
            for n, batch in enumerate(batches_of(whole, head))
        ]
        grouped = regroup(head.lane, head.source, head.number, published)
        assert read_record(grouped).age_ds == head.batches - 1
        assert grouped[4 : head.body_end] == whole[4 : head.body_end]


@cases("record_next_hop")
def test_next_hop(vector: dict[str, Any]) -> None:
    """R-10-16."""
    before = unhex(vector["before"])
    after = forward(before, read_record(before), unhex(vector["node_id"]), vector["dwell_ds"])
    assert after.hex() == vector["after"]


@cases("records_invalid")
def test_invalid_record(vector: dict[str, Any]) -> None:
    """R-10-14."""
    data = unhex(vector["bytes"])
    with pytest.raises(CorruptError):
        check_batches(data, read_record(data))


def test_lane_stream() -> None:
    vector = VECTORS["lane_stream"]
    data = unhex(vector["first_bytes"])
    assert data[:2] == bytes((1, vector["lane"]))
    (record,) = RecordCutter().feed(data[2:])
    assert read_record(record).lane == vector["lane"]


def fields_of(control: Any) -> dict[str, Any]:
    """The record's own fields as the vectors write them."""
    match control:
        case Hello() | Subscribe() | Unsubscribe() | Subscribed() | Status() | Goaway() | Introduce():
            body = encode_control(control)[5:]
            found: dict[str, Any] = json.loads(body)
            return found
        case Receipt(lane, kept, custody, ranges):
            return {"lane": lane, "kept": kept, "custody": custody, "ranges": [list(pair) for pair in ranges]}
        case Refused(lane, place, code, retry, reason):
            return {"lane": lane, "place": place, "code": code, "retry_after_ms": retry, "reason": reason}
        case DrainCredit(lane, rate):
            return {"lane": lane, "bytes_per_second": rate}
        case _:
            raise AssertionError(control)


@cases("control_records")
def test_control_record(vector: dict[str, Any]) -> None:
    data = unhex(vector["bytes"])
    ((kind, body),) = ControlCutter().feed(data)
    assert kind == vector["type"]
    control = decode_control(kind, body)
    assert fields_of(control) == vector["fields"]
    if isinstance(control, Receipt | Refused | DrainCredit):
        assert encode_control(control) == data


def test_hello_decodes_to_fields() -> None:
    """`fields_of` goes through our encoder; this one does not."""
    ((kind, body),) = ControlCutter().feed(unhex(VECTORS["control_records"][0]["bytes"]))
    assert decode_control(kind, body) == Hello(
        domain="fleet.example",
        node="gw-1",
        store=unhex("d0d1d2d3d4d5d6d7d8d9dadbdcdddedf"),
        run=12,
        nonce=unhex("00112233445566778899aabbccddeeff"),
        kind="gateway",
        software="example/1.0",
        features=(),
        time_ms=1700000000000,
        time_error_ms=20,
        classes=None,
    )


@cases("control_records_invalid")
def test_invalid_control_record(vector: dict[str, Any]) -> None:
    with pytest.raises(ProtocolError):
        for kind, body in ControlCutter().feed(unhex(vector["bytes"])):
            decode_control(kind, body)


@cases("node_id")
def test_node_id(vector: dict[str, Any]) -> None:
    """R-10-13."""
    assert node_id(vector["domain"], vector["name"]).hex() == vector["id"]


@pytest.mark.parametrize("vector", VECTORS["topic_match"], ids=lambda v: f"{v['filter']} {v['topic']}")
def test_topic_match(vector: dict[str, Any]) -> None:
    assert matches(vector["filter"], vector["topic"]) is vector["match"]
    assert FilterSet([vector["filter"]]).matches(vector["topic"]) is vector["match"]


@pytest.mark.parametrize("vector", VECTORS["prefix_decides"], ids=lambda v: f"{v['filter']} {v['prefix']}")
def test_prefix_decides(vector: dict[str, Any]) -> None:
    wanted = Decision[vector["answer"].upper()]
    assert prefix_decides(vector["filter"], vector["prefix"]) is wanted
    assert FilterSet([vector["filter"]]).decide(vector["prefix"]) is wanted
