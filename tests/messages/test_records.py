"""Records: round trips, damage, hops, parts, cutting (promises of stp/records.py)."""

from __future__ import annotations

import struct
from typing import Any
from zlib import crc32

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stp.batch import encode_batch, open_batch, read_batch_head
from stp.core.errors import CorruptError, LimitError, UsageError
from stp.records import (
    DATA,
    MAX_AGE_DS,
    MAX_HOPS,
    MAX_RECORD,
    MAX_TRAILER,
    PART,
    VOID,
    RecordCutter,
    RecordHead,
    VoidReason,
    batches_of,
    check_batches,
    encode_record,
    encode_void,
    forward,
    loops,
    part_of,
    read_record,
    regroup,
)
from stp.topics import common_prefix

quick = settings(deadline=None, max_examples=60)

SOURCE = bytes(range(16))
HOP = b"h" * 16


def batch(*topics: str, payload: bytes = b"x", sequence: int = 1) -> bytes:
    return encode_batch(
        topics, [payload] * len(topics), time_ms=5, publisher=SOURCE, run=1, sequence=sequence
    )


words = st.sampled_from(["", "a", "b", "é"])
topics = st.lists(words, min_size=1, max_size=4).map("/".join).filter(bool)
batches = st.lists(topics, min_size=1, max_size=4).map(lambda chosen: batch(*chosen))
sources = st.binary(min_size=16, max_size=16)
numbers = st.integers(1, (1 << 64) - 1)
ages = st.integers(0, MAX_AGE_DS)
data_records = st.builds(
    encode_record,
    st.integers(1, 4),
    sources,
    numbers,
    st.lists(batches, min_size=1, max_size=4),
    kind=st.sampled_from([DATA, PART]),
    hops=st.lists(sources, max_size=MAX_HOPS),
    age_ds=ages,
)
void_records = st.builds(
    lambda lane, source, ends, reason, messages, hops, age_ds: encode_void(
        lane, source, min(ends), max(ends), reason, messages, hops, age_ds
    ),
    st.integers(1, 4),
    sources,
    st.tuples(numbers, numbers),
    st.sampled_from(VoidReason),
    st.integers(0, 0xFFFF_FFFF),
    st.lists(sources, max_size=MAX_HOPS),
    ages,
)
records = data_records | void_records


def resealed(record: bytes, head: RecordHead) -> bytes:
    """With the CRC made right again, so that only the inside is wrong."""
    body = record[4 : head.body_end - 4]
    return record[:4] + body + struct.pack("!I", crc32(body)) + record[head.body_end :]


def header(**changed: Any) -> bytes:
    """A record whose head lies, its CRC right."""
    inner = batch("a/b")
    fields = {"kind": 0, "lane": 3, "batches": 1, "number": 1, "prefix": b"a/b", "body": inner} | changed
    head = (fields["kind"], fields["lane"], fields["batches"], SOURCE, fields["number"])
    body = struct.pack("!BBH16sQH", *head, len(fields["prefix"])) + fields["prefix"] + fields["body"]
    return struct.pack("!I", len(body) + 9) + body + struct.pack("!I", crc32(body)) + bytes(5)


@given(st.lists(batches, min_size=1, max_size=5), numbers, st.lists(sources, max_size=8), ages)
@quick
def test_round_trip(inside: list[bytes], number: int, hops: list[bytes], age_ds: int) -> None:
    record = encode_record(2, SOURCE, number, inside, hops=hops, age_ds=age_ds)
    head = read_record(record)
    check_batches(record, head)
    assert batches_of(record, head) == inside
    assert (head.kind, head.lane, head.source, head.number, head.to) == (DATA, 2, SOURCE, number, number)
    assert (head.hops, head.age_ds, head.size) == (tuple(hops), age_ds, len(record))
    assert head.body_end == len(record) - 5 - 16 * len(hops)
    assert (head.batches, head.messages) == (len(inside), sum(open_batch(one).head.count for one in inside))
    assert head.prefix == common_prefix([read_batch_head(one).prefix for one in inside])
    for one in inside:  # (4)
        opened = open_batch(one).topics
        assert all(topic.startswith(head.prefix) for topic in opened)
        if head.prefix and not head.prefix.endswith("/"):
            assert set(opened) == {head.prefix}


@given(void_records)
@quick
def test_void_round_trip(record: bytes) -> None:
    head = read_record(record)
    assert head.kind == VOID
    assert (head.batches, head.prefix, batches_of(record, head)) == (0, "", [])
    check_batches(record, head)
    assert record == encode_void(
        head.lane, head.source, head.number, head.to, head.reason, head.messages, head.hops, head.age_ds
    )


@given(st.binary(max_size=200))
@quick
def test_any_bytes_read_or_are_corrupt(data: bytes) -> None:
    """(1)"""
    for record in (data, struct.pack("!I", len(data)) + data):
        try:
            read_record(record)
        except CorruptError:
            continue


@given(records, st.data())
@quick
def test_one_flipped_bit_before_the_trailer_is_found(record: bytes, data: st.DataObject) -> None:
    """(2, R-10-14)"""
    bad = bytearray(record)
    bit = data.draw(st.integers(0, 8 * read_record(record).body_end - 1))
    bad[bit // 8] ^= 1 << bit % 8
    with pytest.raises(CorruptError):
        read_record(bytes(bad))


@given(records, st.data())
@quick
def test_damage_under_a_good_crc_reads_or_is_corrupt(record: bytes, data: st.DataObject) -> None:
    """(1), (4): whoever passes may be stepped through, and its prefix is true."""
    head = read_record(record)
    bad = bytearray(record)
    for _ in range(data.draw(st.integers(1, 3))):
        bad[data.draw(st.integers(4, head.body_end - 5))] = data.draw(st.integers(0, 255))
    damaged = resealed(bytes(bad), head)
    try:
        head = read_record(damaged)
        check_batches(damaged, head)
    except CorruptError:
        return
    found = batches_of(damaged, head)
    assert len(found) == head.batches
    for one in found:
        try:
            opened = open_batch(one)
        except CorruptError:
            continue
        assert all(topic.startswith(head.prefix) for topic in opened.topics)


@pytest.mark.parametrize(
    "changed",
    [
        {"kind": 3},
        {"lane": 0},
        {"lane": 5},
        {"number": 0},
        {"batches": 0},
        {"batches": 2},
        {"batches": 0xFFFF},
        {"prefix": b"a"},
        {"prefix": b"x/"},
        {"prefix": b"a/b\0"},
        {"prefix": b"", "body": b""},
        {"prefix": b"", "body": bytes(53)},
        {"prefix": b"", "body": b"\xff" * 60},
        {"prefix": b"", "body": batch("a/b")[:-1]},
        {"prefix": b"", "body": batch("a/b") + b"\0"},
    ],
)
def test_a_head_that_lies_is_corrupt(changed: dict[str, Any]) -> None:
    """(1), (4)"""
    read_record(header())
    read_record(header(prefix=b""))
    read_record(header(prefix=b"a/"))
    with pytest.raises(CorruptError):
        read_record(header(**changed))


def test_a_prefix_inside_a_level_is_corrupt() -> None:
    """(4): a rule for the topic 'a' must not let 'a/b' through (R-10-15)."""
    body = bytearray(batch("a/b", "a/c"))
    assert body[52:56] == b"\x00\x02a/"
    body[52:56] = b"\x00\x01a"
    body[:4] = struct.pack("!I", len(body) - 4)
    body[-4:] = struct.pack("!I", crc32(body[4:-4]))
    with pytest.raises(CorruptError):
        read_record(header(prefix=b"", body=bytes(body)))
    with pytest.raises(CorruptError):
        read_record(header(prefix=b"a", body=bytes(body)))


def test_a_prefix_that_is_no_text_is_corrupt() -> None:
    body = bytearray(batch("ab/c", "ab/d"))
    body[54] = 0xFF
    with pytest.raises(CorruptError):
        read_record(header(prefix=b"\xffb/", body=bytes(body)))


def test_limits_of_a_record() -> None:
    """R-10-9."""
    large = batch("a", payload=bytes(1_048_576))
    record = encode_record(4, SOURCE, 1, [large], hops=[bytes([n]) * 16 for n in range(8)])
    assert read_record(record).size <= MAX_RECORD + MAX_TRAILER
    with pytest.raises(UsageError):
        encode_record(4, SOURCE, 1, [large, batch("a", payload=bytes(65_536))])
    with pytest.raises(UsageError):
        encode_record(4, SOURCE, 1, [])
    with pytest.raises(UsageError):
        encode_record(4, SOURCE, 1, [batch("a")] * 65_536)
    for lane, source, number, hops in [
        (0, SOURCE, 1, []),
        (5, SOURCE, 1, []),
        (1, SOURCE[:15], 1, []),
        (1, SOURCE, 0, []),
        (1, SOURCE, 1 << 64, []),
        (1, SOURCE, 1, [HOP] * 9),
        (1, SOURCE, 1, [b"short"]),
    ]:
        with pytest.raises(UsageError):
            encode_record(lane, source, number, [batch("a")], hops=hops)
    for to, reason, messages in [(4, 1, 0), (5, 0, 0), (5, 6, 0), (5, 1, 1 << 32)]:
        with pytest.raises(UsageError):
            encode_void(1, SOURCE, 5, to, reason, messages)


@given(records, sources, st.integers(0, MAX_AGE_DS))
@quick
def test_forward_adds_one_hop_and_touches_nothing_else(record: bytes, node: bytes, dwell_ds: int) -> None:
    """(3, R-10-16)"""
    head = read_record(record)
    if loops(head, node):
        with pytest.raises(UsageError):
            forward(record, head, node, dwell_ds)
        return
    after = forward(record, head, node, dwell_ds)
    next_head = read_record(after)
    assert after[4 : head.body_end] == record[4 : head.body_end]
    assert next_head.hops == (*head.hops, node)
    assert next_head.age_ds == min(MAX_AGE_DS, head.age_ds + dwell_ds)
    assert loops(next_head, node)


def test_a_full_list_of_hops_is_a_loop() -> None:
    record = encode_record(1, SOURCE, 1, [batch("a")], hops=[bytes([n]) * 16 for n in range(MAX_HOPS)])
    assert loops(read_record(record), HOP)
    assert not loops(read_record(encode_record(1, SOURCE, 1, [batch("a")])), HOP)


@given(st.lists(batches, min_size=1, max_size=5), st.data())
@quick
def test_a_part_holds_whole_batches(inside: list[bytes], data: st.DataObject) -> None:
    """(3, R-10-29)"""
    record = encode_record(3, SOURCE, 8, inside, hops=[HOP], age_ds=70)
    keep = data.draw(st.sets(st.integers(0, len(inside) - 1), min_size=1).map(sorted))
    part = part_of(record, read_record(record), keep)
    head = read_record(part)
    assert (head.kind, head.number, head.source, head.hops, head.age_ds) == (PART, 8, SOURCE, (HOP,), 70)
    assert batches_of(part, head) == [inside[n] for n in keep]


def test_a_part_of_what_is_not_there() -> None:
    record = encode_record(3, SOURCE, 8, [batch("a")])
    for keep in ([], [1]):
        with pytest.raises(UsageError):
            part_of(record, read_record(record), keep)


@given(st.lists(st.tuples(st.lists(batches, min_size=1, max_size=3), ages), min_size=1, max_size=5))
@quick
def test_regrouping_keeps_every_batch_in_order(published: list[tuple[list[bytes], int]]) -> None:
    """(3): as if the keeper had made the record of the batches themselves, with the greatest age."""
    each = [
        encode_record(3, bytes([n]) * 16, n + 1, inside, age_ds=age)
        for n, (inside, age) in enumerate(published)
    ]
    every = [one for inside, _ in published for one in inside]
    oldest = max(age for _, age in published)
    assert regroup(3, SOURCE, 44, each) == encode_record(3, SOURCE, 44, every, age_ds=oldest)


def test_regrouping_beyond_the_limits() -> None:
    record = encode_record(4, SOURCE, 1, [batch("a", payload=bytes(600_000))])
    many = encode_record(3, SOURCE, 1, [batch("a", payload=b"")] * 10_000)
    for chosen in ([record, record], [many] * 7, []):
        with pytest.raises(UsageError):
            regroup(4, SOURCE, 1, chosen)


@given(st.lists(records, max_size=6), st.data())
@quick
def test_the_cutter_gives_back_what_was_joined(sent: list[bytes], data: st.DataObject) -> None:
    """(5): whatever the pieces."""
    stream = b"".join(sent)
    cutter = RecordCutter()
    found: list[bytes] = []
    pos = 0
    while pos < len(stream):
        step = data.draw(st.integers(1, 200))
        found += cutter.feed(stream[pos : pos + step])
        pos = min(len(stream), pos + step)
        assert cutter.incomplete == pos - sum(map(len, found))
    assert found == sent


def test_the_cutter_byte_by_byte() -> None:
    sent = [encode_record(1, SOURCE, n, [batch("a")]) for n in (1, 2)]
    cutter = RecordCutter()
    found = [record for byte in b"".join(sent) for record in cutter.feed(bytes((byte,)))]
    assert found == sent
    assert cutter.incomplete == 0
    assert cutter.feed(b"") == []


def test_the_cutter_takes_the_largest_record_and_nothing_larger() -> None:
    """(1)"""
    largest = struct.pack("!I", MAX_RECORD + MAX_TRAILER - 4) + bytes(MAX_RECORD + MAX_TRAILER - 4)
    assert RecordCutter().feed(largest) == [largest]
    larger = struct.pack("!I", MAX_RECORD + MAX_TRAILER - 3)
    with pytest.raises(LimitError):
        RecordCutter().feed(larger)
    cutter = RecordCutter()
    cutter.feed(larger[:2])
    with pytest.raises(LimitError):
        cutter.feed(larger[2:])
    with pytest.raises(LimitError):
        RecordCutter(100).feed(struct.pack("!I", 100 + MAX_TRAILER))
