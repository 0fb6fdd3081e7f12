"""Batches: round trips, refusal of whatever does not add up, bounded opening (promises of stp/batch.py)."""

from __future__ import annotations

import struct
import tracemalloc
from collections.abc import Callable
from typing import Any
from zlib import crc32

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stp.batch import (
    COMPRESSED,
    EXCERPT,
    HEAD_SIZE,
    MAX_BATCH,
    MAX_COUNT,
    MAX_MESSAGE,
    MAX_OPENED,
    WINDOW_LOG,
    Properties,
    check_batch,
    encode_batch,
    excerpt,
    node_id,
    open_batch,
    read_batch_head,
    zstd,
)
from stp.core.errors import CorruptError, UsageError
from stp.topics import MAX_TOPIC, TopicError, common_prefix

quick = settings(deadline=None, max_examples=200)

FIELDS: dict[str, Any] = {
    "time_ms": 1_700_000_000_000,
    "publisher": bytes(range(16)),
    "run": 3,
    "sequence": 9,
}

words = st.sampled_from(["", "a", "b", "é", "plant", "$sys"])
topics = st.lists(words, min_size=1, max_size=5).map("/".join).filter(bool)
u32 = st.integers(0, 0xFFFF_FFFF)
small = st.binary(max_size=20)
properties = st.builds(
    Properties,
    reply_topic=st.none() | topics,
    correlation_id=st.none() | small,
    content_type=st.none() | st.text(max_size=10),
    time_error_ms=st.none() | u32,
    freshness_ms=st.none() | u32,
    supersede_key=st.none() | small,
    trace_id=st.none() | st.binary(min_size=16, max_size=16),
    idempotency_key=st.none() | small,
    user=st.lists(st.tuples(small, small), max_size=3),
)


@st.composite
def messages(draw: Callable[..., Any]) -> dict[str, Any]:
    """The arguments of one encode_batch."""
    chosen = draw(
        st.lists(topics, min_size=1, max_size=6) | st.builds(lambda t, n: [t] * n, topics, st.just(4))
    )
    count = len(chosen)
    exactly = {"min_size": count, "max_size": count}
    delays = draw(st.none() | st.lists(st.integers(-1000, 0xFFFF_FFFF), **exactly))
    return {
        "topics": chosen,
        "payloads": draw(st.lists(st.binary(max_size=40), **exactly)),
        "times": None if delays is None else [FIELDS["time_ms"] + n for n in [0, *delays[1:]]],
        "properties": draw(st.none() | st.lists(st.none() | properties, **exactly)),
        "compress": draw(st.booleans()),
        "tombstones": draw(st.booleans()),
        "ttl_ms": draw(u32),
    }


def one(topic: str = "a/b", payload: bytes = b"x", **fields: Any) -> bytes:
    return encode_batch([topic], [payload], **(FIELDS | fields))


def resealed(batch: bytes) -> bytes:
    """With size and CRC made right again, so that only the inside is wrong."""
    body = struct.pack("!I", len(batch) - 4) + batch[4:-4]
    return body + struct.pack("!I", crc32(body[4:]))


@given(messages())
@quick
def test_round_trip(given_: dict[str, Any]) -> None:
    data = encode_batch(**given_, **FIELDS)
    check_batch(data)
    opened = open_batch(data)
    assert opened.topics == given_["topics"]
    assert opened.payloads == given_["payloads"]
    assert opened.head == read_batch_head(b"!!" + data, 2)
    assert opened.head.prefix == common_prefix(given_["topics"])
    assert (opened.head.run, opened.head.sequence, opened.head.ttl_ms) == (3, 9, given_["ttl_ms"])
    start = FIELDS["time_ms"]
    assert opened.times_ms == [max(start, time) for time in given_["times"] or [start] * len(opened.topics)]
    sent = given_["properties"] or [None] * len(opened.topics)
    assert opened.properties == [None if p in (None, Properties()) else p for p in sent]
    assert list(opened.indices) == list(range(opened.head.count))


def test_a_time_before_the_first_counts_as_the_first() -> None:
    """R-10-6."""
    start = FIELDS["time_ms"]
    data = encode_batch(["a", "b"], [b"", b""], times=[start, start - 1], **FIELDS)
    assert open_batch(data).times_ms == [start, start]


@given(messages(), st.data())
@quick
def test_an_excerpt_keeps_its_messages(given_: dict[str, Any], data: st.DataObject) -> None:
    """(5), twice over (R-10-11)."""
    whole = encode_batch(**given_, **FIELDS)
    chosen = list(range(len(given_["topics"])))
    for _ in range(2):
        places = data.draw(st.sets(st.integers(0, len(chosen) - 1), min_size=1).map(sorted))
        chosen = [chosen[n] for n in places]
        whole = excerpt(whole, places)
        opened = open_batch(whole)
        assert list(opened.indices) == chosen
        assert opened.head.flags & EXCERPT
        assert not opened.head.flags & COMPRESSED
        assert opened.topics == [given_["topics"][n] for n in chosen]
        assert opened.payloads == [given_["payloads"][n] for n in chosen]
        assert (opened.head.publisher, opened.head.sequence) == (FIELDS["publisher"], 9)
        start = FIELDS["time_ms"]
        assert opened.times_ms == [max(start, (given_["times"] or [start] * 6)[n]) for n in chosen]


@given(st.binary(max_size=200))
@quick
def test_any_bytes_open_or_are_corrupt(data: bytes) -> None:
    """(1)"""
    for read in (open_batch, check_batch, read_batch_head, Properties.decode):
        try:
            read(data)
        except CorruptError:
            continue


@given(messages(), st.data())
@quick
def test_damage_under_a_good_crc_opens_or_is_corrupt(given_: dict[str, Any], data: st.DataObject) -> None:
    """(1): as from a publisher that errs, or lies."""
    whole = bytearray(encode_batch(**given_, **FIELDS))
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(4, len(whole) - 5))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, 12))
    try:
        opened = open_batch(resealed(bytes(whole[: len(whole) - cut])))
    except CorruptError:
        return
    head = opened.head
    assert head.count == len(opened.topics) == len(opened.payloads) == len(opened.times_ms)
    assert all(topic.startswith(head.prefix) for topic in opened.topics)
    if head.prefix and not head.prefix.endswith("/"):
        assert set(opened.topics) == {head.prefix}  # (4)


@given(messages(), st.data())
@quick
def test_one_flipped_bit_is_always_found(given_: dict[str, Any], data: st.DataObject) -> None:
    """(3, R-10-7)"""
    whole = bytearray(encode_batch(**given_, **FIELDS))
    bit = data.draw(st.integers(0, 8 * len(whole) - 1))
    whole[bit // 8] ^= 1 << bit % 8
    with pytest.raises(CorruptError):
        open_batch(bytes(whole))


def with_frame(frame: bytes, announced: int) -> bytes:
    """A batch of one message whose payload is `frame`, said to open to `announced` bytes."""
    head = bytearray(one(payload=b"")[:-4])
    head[5] |= COMPRESSED
    at = HEAD_SIZE + 3
    head[at : at + 4] = struct.pack("!I", announced)
    return resealed(bytes(head) + frame + bytes(4))


def test_a_bomb_is_stopped_at_what_it_announced() -> None:
    """(2): 8 kB that hold 256 MB, announced as 8,000 bytes or as all that may be (R-10-8)."""
    bomb = zstd.compress(bytes(256_000_000))
    assert len(bomb) < 10_000
    for announced in (8_000, 1_048_576):
        batch = with_frame(bomb, announced)
        tracemalloc.start()
        with pytest.raises(CorruptError):
            open_batch(batch)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 2 * announced + 100_000


def test_a_frame_may_not_ask_for_a_large_window() -> None:
    """(2)"""
    content = bytes(range(256)) * 8
    for window_log in (WINDOW_LOG, WINDOW_LOG + 1):
        packer = zstd.ZstdCompressor(options={int(zstd.CompressionParameter.window_log): window_log})
        batch = with_frame(packer.compress(content) + packer.flush(), len(content))
        if window_log == WINDOW_LOG:
            assert open_batch(batch).payloads == [content]
            continue
        with pytest.raises(CorruptError):
            open_batch(batch)


def test_no_more_is_opened_than_may_be() -> None:
    """(2): the sum counts, not only each length (R-10-8)."""
    payload = bytes(MAX_MESSAGE)
    assert len(encode_batch(["a"] * 3, [payload] * 3, compress=True, **FIELDS)) < 1000
    with pytest.raises(UsageError):
        encode_batch(["a"] * 5, [payload] * 5, compress=True, **FIELDS)
    frame = zstd.compress(bytes(MAX_OPENED + 1))
    with pytest.raises(CorruptError):
        open_batch(with_frame(frame, MAX_OPENED + 1))
    assert len(open_batch(with_frame(zstd.compress(bytes(MAX_OPENED)), MAX_OPENED)).payloads[0]) == MAX_OPENED


def test_limits_of_a_batch() -> None:
    """R-10-9."""
    assert len(one(payload=bytes(MAX_MESSAGE))) < MAX_BATCH
    wrong: list[dict[str, Any]] = [
        {"topics": [], "payloads": []},
        {"topics": ["a"], "payloads": []},
        {"topics": ["a"] * (MAX_COUNT + 1), "payloads": [b""] * (MAX_COUNT + 1)},
        {"topics": ["a"], "payloads": [bytes(MAX_MESSAGE + 1)]},
        {"topics": ["a"] * 2, "payloads": [bytes(MAX_BATCH // 2)] * 2},
        {"topics": ["a"], "payloads": [b""], "publisher": b"short"},
        {"topics": ["a"], "payloads": [b""], "publisher": bytes(17)},
        {"topics": ["a"], "payloads": [b""], "ttl_ms": 1 << 32},
        {"topics": ["a"], "payloads": [b""], "sequence": -1},
        {"topics": ["a"], "payloads": [b""], "times": [5]},
        {
            "topics": ["a"] * 2,
            "payloads": [b""] * 2,
            "times": [FIELDS["time_ms"], FIELDS["time_ms"] + (1 << 32)],
        },
        {"topics": ["a"], "payloads": [b""], "properties": []},
        {"topics": ["a"], "payloads": [b""], "properties": [Properties(trace_id=b"short")]},
        {"topics": ["a"], "payloads": [b""], "properties": [Properties(freshness_ms=-1)]},
        {"topics": ["a"], "payloads": [b""], "properties": [Properties(supersede_key=bytes(65536))]},
    ]
    for arguments in wrong:
        with pytest.raises(UsageError):
            encode_batch(**(FIELDS | arguments))


@pytest.mark.parametrize(
    "topics",
    [
        [""],
        ["a/b", ""],
        ["a/+"],
        ["a/b", "a/#"],
        ["a#/b", "a#/c"],
        ["a", "b\0"],
        ["x" * (MAX_TOPIC + 1)],
        ["p/" + "x" * MAX_TOPIC, "p/y"],
        ["\ud800"],
        ["p/\ud800", "p/x"],
        ["\ud800/x", "\ud800/y"],
    ],
)
def test_bad_topics_are_the_publishers_error(topics: list[str]) -> None:
    with pytest.raises(TopicError):
        encode_batch(topics, [b""] * len(topics), **FIELDS)


def test_a_prefix_cannot_end_inside_a_level() -> None:
    """(4): else 'a/b' could be let through by a rule for 'a/b' and open to 'a/bc/secret'."""
    good = encode_batch(["a/b", "a/c"], [b"", b""], **FIELDS)
    at = HEAD_SIZE
    bad = bytearray(good)
    bad[at - 2 : at] = struct.pack("!H", 1)
    bad[at : at + 2] = b"a"  # prefix 'a', the suffixes keep their lengths
    wrong = resealed(bytes(bad))
    for read in (read_batch_head, open_batch):
        with pytest.raises(CorruptError, match="level"):
            read(wrong)


@pytest.mark.parametrize("flag", [0x20, 0x40, 0x80])
def test_reserved_flags_are_corrupt(flag: int) -> None:
    """R-10-10."""
    batch = bytearray(one())
    batch[5] |= flag
    for read in (read_batch_head, open_batch):
        with pytest.raises(CorruptError):
            read(resealed(bytes(batch)))


@pytest.mark.parametrize(
    "blob",
    [
        b"\x01",
        b"\x01\x00\x02a",
        b"\x02\x00\x00\x01\x00\x00",
        b"\x02\x00\x00\x02\x00\x00",
        b"\x01\x00\x01\xff",
        b"\x05\x00\x03abc",
        b"\x06\x00\x05abcde",
        b"\x08\x00\x0fabcdefghijklmno",
        b"\x7f\x00\x01a",
        b"\x7f\x00\x03\x00\x02a",
    ],
)
def test_bad_properties(blob: bytes) -> None:
    """R-10-12."""
    with pytest.raises(CorruptError):
        Properties.decode(blob)


def test_unknown_properties_are_skipped_and_survive_an_excerpt() -> None:
    blob = b"\x02\x00\x01k" + b"\x0a\x00\x03new" + b"\x7f\x00\x04\x00\x01ab"
    assert Properties.decode(blob) == Properties(correlation_id=b"k", user=[(b"a", b"b")])
    batch = bytearray(one("t", b"p", properties=[Properties()])[:-4])
    at = HEAD_SIZE + 1 + 4 + 2
    batch[at : at + 2] = struct.pack("!H", len(blob))
    batch[at + 2 : at + 2] = blob
    assert blob in excerpt(resealed(bytes(batch) + bytes(4)), [0])


@pytest.mark.parametrize("indices", [[], [-1], [3], [1, 1], [2, 0]])
def test_an_excerpt_of_nothing_or_of_what_is_not_there(indices: list[int]) -> None:
    with pytest.raises(UsageError):
        excerpt(encode_batch(["a"] * 3, [b""] * 3, **FIELDS), indices)


def test_indices_that_do_not_ascend_are_corrupt() -> None:
    batch = bytearray(excerpt(encode_batch(["a"] * 3, [b""] * 3, **FIELDS), [0, 2]))
    at = len(batch) - 8
    assert batch[at : at + 4] == struct.pack("!HH", 0, 2)
    batch[at : at + 4] = struct.pack("!HH", 2, 2)
    with pytest.raises(CorruptError):
        open_batch(resealed(bytes(batch)))


def test_an_excerpt_too_large_to_stay_open_is_compressed() -> None:
    whole = encode_batch(["a"] * 4, [bytes(MAX_MESSAGE)] * 3 + [b"x"], compress=True, **FIELDS)
    most = open_batch(excerpt(whole, [0, 1, 2]))
    assert most.head.flags == COMPRESSED | EXCERPT
    assert most.payloads == [bytes(MAX_MESSAGE)] * 3
    assert open_batch(excerpt(whole, [3])).head.flags == EXCERPT


def test_a_name_that_is_no_node_is_a_usage_error() -> None:
    for domain, node in [("\ud800", "a"), ("a", "x" * 65_536)]:
        with pytest.raises(UsageError):
            node_id(domain, node)
