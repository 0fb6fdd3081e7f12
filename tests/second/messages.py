"""§10: topics, batches, records, control records."""

from __future__ import annotations

import hashlib
import json
import struct
import zlib
from typing import Any, NamedTuple

from tests.second.hello import Malformed

HELLO, RECEIPT, REFUSED, SUBSCRIBE, SUBSCRIBED = 1, 2, 3, 4, 10
DATA, VOID, PART = 0, 1, 2
COMPRESSED, TIMES, PROPERTIES, TOMBSTONES, EXCERPT = 1, 2, 4, 8, 16
TRAILER = 5
"""Bytes of a trailer without hops."""


class Message(NamedTuple):
    topic: str
    payload: bytes
    time_ms: int
    at: int
    """Its place in the first whole batch."""
    properties: bytes = b""


class Batch(NamedTuple):
    flags: int
    publisher: bytes
    run: int
    sequence: int
    ttl_ms: int
    prefix: bytes
    messages: list[Message]


class Record(NamedTuple):
    kind: int
    lane: int
    source: bytes
    number: int
    batches: list[bytes]
    to: int
    """The last number that this one covers: its own, or a void's."""
    prefix: bytes
    hops: list[bytes]
    age_ds: int
    crc: int


def node_id(domain: str, node: str) -> bytes:
    """R-10-13."""
    parts = b"".join(len(part.encode()).to_bytes(2, "big") + part.encode() for part in (domain, node))
    return hashlib.sha256(b"stp/1 node" + parts).digest()[:16]


def matches(pattern: str, topic: str) -> bool:
    """R-10-1, MQTT's grammar."""
    want, have = pattern.split("/"), topic.split("/")
    if topic.startswith("$") and want[0] in ("+", "#"):
        return False
    if want[-1] == "#":
        want, have = want[:-1], have[: len(want) - 1]
    return len(want) == len(have) and all(w in ("+", h) for w, h in zip(want, have, strict=True))


def common_prefix(topics: list[bytes]) -> bytes:
    """R-10-5."""
    first, last = min(topics), max(topics)
    if first == last:
        return first
    same = next(
        (i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last))
    )
    return first[: first.rfind(b"/", 0, same) + 1]


def _crc(data: bytes) -> bytes:
    return zlib.crc32(data).to_bytes(4, "big")


def _sized(body: bytes) -> bytes:
    return len(body).to_bytes(4, "big") + body


def write_batch(
    messages: list[tuple[str, bytes]], *, time_ms: int, publisher: bytes, run: int, sequence: int
) -> bytes:
    """A batch of messages of one time, uncompressed."""
    topics = [topic.encode() for topic, _ in messages]
    prefix = common_prefix(topics)
    suffixes = [topic[len(prefix) :] for topic in topics]
    count = len(messages)
    body = (
        struct.pack(">BBHQI16sQQH", 1, 0, count, time_ms, 0, publisher, run, sequence, len(prefix)) + prefix
    )
    body += struct.pack(f">{count}I", *(len(payload) for _, payload in messages))
    body += struct.pack(f">{count}H", *map(len, suffixes))
    body += b"".join(suffixes) + b"".join(payload for _, payload in messages)
    return _sized(body + _crc(body))


def _unpack(form: str, data: bytes, at: int) -> tuple[tuple[Any, ...], int]:
    try:
        return struct.unpack_from(form, data, at), at + struct.calcsize(form)
    except struct.error as error:
        raise Malformed(str(error)) from error


def _cut(data: bytes, at: int, sizes: tuple[int, ...]) -> tuple[list[bytes], int]:
    pieces = []
    for size in sizes:
        pieces.append(data[at : at + size])
        at += size
    if at > len(data):
        raise Malformed("batch cut")
    return pieces, at


def _decompress(data: bytes, limit: int) -> bytes:
    """R-10-8: at most *limit* bytes, whatever the frame says."""
    try:
        from compression import zstd  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        from backports import zstd  # type: ignore[no-redef, unused-ignore]
    found: bytes = zstd.ZstdDecompressor().decompress(data, max_length=limit + 1)
    return found


def read_batch(batch: bytes) -> Batch:
    """Raises Malformed, also where the CRC is wrong (R-10-7)."""
    body = batch[4:-4]
    if len(batch) < 8 or int.from_bytes(batch[:4], "big") != len(batch) - 4 or _crc(body) != batch[-4:]:
        raise Malformed("batch: size or CRC")
    head, at = _unpack(">BBHQI16sQQH", body, 0)
    form, flags, count, time_ms, ttl_ms, publisher, run, sequence, prefix_size = head
    if form != 1 or flags & 0xE0 or not count:
        raise Malformed("batch: format or flags")
    (prefix,), at = _cut(body, at, (prefix_size,))
    payload_sizes, at = _unpack(f">{count}I", body, at)
    suffix_sizes, at = _unpack(f">{count}H", body, at)
    times, at = _unpack(f">{count}I", body, at) if flags & TIMES else ((0,) * count, at)
    property_sizes, at = _unpack(f">{count}H", body, at) if flags & PROPERTIES else ((0,) * count, at)
    indices, at = _unpack(f">{count}H", body, at) if flags & EXCERPT else (tuple(range(count)), at)
    suffixes, at = _cut(body, at, suffix_sizes)
    properties, at = _cut(body, at, property_sizes)
    packed = body[at:]
    if flags & COMPRESSED:
        packed = _decompress(packed, min(sum(payload_sizes), 4 << 20))
    payloads, end = _cut(packed, 0, payload_sizes)
    if end != len(packed):
        raise Malformed("batch: more than its lengths say")
    messages = [
        Message((prefix + suffix).decode(), payload, time_ms + later, index, props)
        for suffix, payload, later, index, props in zip(
            suffixes, payloads, times, indices, properties, strict=True
        )
    ]
    return Batch(flags, publisher, run, sequence, ttl_ms, prefix, messages)


def write_record(lane: int, source: bytes, number: int, batch: bytes, prefix: bytes) -> bytes:
    """As its publisher sends it: one batch, no hops (R-10-16, R-10-17)."""
    body = struct.pack(">BBH16sQH", DATA, lane, 1, source, number, len(prefix)) + prefix + batch
    return _sized(body + _crc(body) + bytes(TRAILER))


def read_record(record: bytes) -> Record:
    """Raises Malformed, also where the CRC is wrong."""
    body = record[4:]
    if len(body) < 28 + 4 + TRAILER or int.from_bytes(record[:4], "big") != len(body):
        raise Malformed("record: size")
    hop_count, age_ds = body[-5], int.from_bytes(body[-4:], "big")
    trailer = TRAILER + 16 * hop_count
    covered, crc = body[: -trailer - 4], body[-trailer - 4 : -trailer]
    if hop_count > 8 or _crc(covered) != crc:
        raise Malformed("record: CRC")
    (kind, lane, count, source, number), at = _unpack(">BBH16sQ", covered, 0)
    hops, _ = _cut(body, len(covered) + 4, (16,) * hop_count)
    checked = int.from_bytes(crc, "big")
    if kind == VOID:
        (to, _reason, _messages), _ = _unpack(">QBI", covered, at)
        return Record(kind, lane, source, number, [], to, b"", hops, age_ds, checked)
    if kind not in (DATA, PART) or not 1 <= lane <= 4:
        raise Malformed("record: kind or lane")
    (prefix_size,), at = _unpack(">H", covered, at)
    (prefix,), at = _cut(covered, at, (prefix_size,))
    batches = []
    for _ in range(count):
        (size,), _ = _unpack(">I", covered, at)
        (batch,), at = _cut(covered, at, (4 + size,))
        if _crc(batch[4:-4]) != batch[-4:]:
            raise Malformed("record: CRC of a batch")
        batches.append(batch)
    return Record(kind, lane, source, number, batches, number, prefix, hops, age_ds, checked)


def write_control(kind: int, body: bytes | dict[str, Any]) -> bytes:
    """§10.4."""
    if not isinstance(body, bytes):
        body = json.dumps(body).encode()
    return _sized(bytes([kind]) + body)


def write_receipt(lane: int, kept: int, custody: int) -> bytes:
    return write_control(RECEIPT, struct.pack(">BQQB", lane, kept, custody, 0))


def read_receipt(body: bytes) -> tuple[int, int, int, list[tuple[int, int]]]:
    """(lane, kept, custody, ranges in custody above)."""
    (lane, kept, custody, count), at = _unpack(">BQQB", body, 0)
    flat, at = _unpack(f">{2 * count}Q", body, at)
    if at != len(body) or custody > kept:
        raise Malformed("RECEIPT")
    return lane, kept, custody, list(zip(flat[::2], flat[1::2], strict=True))


def read_refused(body: bytes) -> tuple[int, int, int, int, str]:
    """(lane, place, code, retry_after_ms, reason)."""
    (lane, place, code, retry_after_ms), at = _unpack(">BQHI", body, 0)
    return lane, place, code, retry_after_ms, body[at:].decode()


def read_drain_credit(body: bytes) -> tuple[int, int]:
    """(lane, bytes per second)."""
    (lane, rate), _ = _unpack(">BI", body, 0)
    return lane, rate
