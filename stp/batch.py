"""Batches: many messages encoded once by their publisher, immutable from then on (protocol §10). Sans-IO.

(1) Whatever bytes come, reading raises CorruptError or succeeds; nothing else escapes.
(2) Opening yields exactly what the length vectors say and at most MAX_OPENED bytes; a zstd frame is stopped
    one byte beyond what it may hold, its window at WINDOW_LOG.
(3) The CRC is checked before a batch is opened.
(4) A prefix that does not end with '/' is the topic of every message; bytes that say otherwise are corrupt.
(5) An excerpt keeps every field that says where a message comes from, and its index in the whole batch.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Sequence
from hashlib import sha256
from itertools import accumulate
from operator import lt
from struct import Struct
from typing import TYPE_CHECKING, Final
from zlib import crc32

from attrs import Factory, define

from stp.core.errors import CorruptError, UsageError
from stp.topics import MAX_TOPIC, TopicError, check_topic, common_prefix

if TYPE_CHECKING or sys.version_info < (3, 14):
    from backports import zstd
else:
    from compression import zstd

MAX_MESSAGE: Final = 1_048_576
"""Bytes of payload in one message (R-10-9)."""
MAX_BATCH: Final = 1_113_088
"""Bytes of a batch, its size field included."""
MAX_OPENED: Final = 4_194_304
"""Bytes of suffixes, properties and uncompressed payloads in one batch."""
MAX_COUNT: Final = 65_535
"""Messages in a batch."""
WINDOW_LOG: Final = 23
"""A zstd frame may ask for a window of 8 MiB, no more."""

FORMAT: Final = 1
COMPRESSED: Final = 0x01
TIMES: Final = 0x02
PROPERTIES: Final = 0x04
TOMBSTONES: Final = 0x08
EXCERPT: Final = 0x10
_RESERVED: Final = 0xE0  # R-10-10

_HEAD: Final = Struct("!IBBHQI16sQQH")
HEAD_SIZE: Final = _HEAD.size
CRC_SIZE: Final = 4
_U32: Final = Struct("!I")
_TLV: Final = Struct("!BH")
_DECOMPRESSION: Final[dict[int, int]] = {zstd.DecompressionParameter.window_log_max: WINDOW_LOG}


def node_id(domain: str, node: str) -> bytes:
    """The 16 bytes that name a node on the wire. UsageError if a name does not fit u16 or is not UTF-8 (R-10-13)."""
    try:
        names = domain.encode(), node.encode()
        text = b"".join(len(name).to_bytes(2, "big") + name for name in names)
    except (UnicodeEncodeError, OverflowError) as exc:
        raise UsageError(f"{domain!r} / {node!r} cannot be a node's name: {exc}") from None
    return sha256(b"stp/1 node" + text).digest()[:16]


# -- properties ---------------------------------------------------------------------------------------------

REPLY_TOPIC: Final = 1
CORRELATION_ID: Final = 2
CONTENT_TYPE: Final = 3
TIME_ERROR: Final = 5
FRESHNESS: Final = 6
SUPERSEDE_KEY: Final = 7
TRACE_ID: Final = 8
IDEMPOTENCY_KEY: Final = 9
USER: Final = 127


@define
class Properties:
    """What a message may carry besides topic and payload. None: not given. Unknown types are skipped."""

    reply_topic: str | None = None
    correlation_id: bytes | None = None
    content_type: str | None = None
    time_error_ms: int | None = None
    """Bound of the error of the message's time, ms, u32."""
    freshness_ms: int | None = None
    """The message is of no use when older, ms, u32."""
    supersede_key: bytes | None = None
    trace_id: bytes | None = None
    """16 bytes."""
    idempotency_key: bytes | None = None
    user: list[tuple[bytes, bytes]] = Factory(list)

    def encode(self) -> bytes:
        """TLVs, types ascending. UsageError for a value that does not fit."""
        parts: list[bytes] = []
        try:
            for kind, value in self._values():
                parts.append(_TLV.pack(kind, len(value)) + value)
            for key, value in self.user:
                pair = len(key).to_bytes(2, "big") + key + value
                parts.append(_TLV.pack(USER, len(pair)) + pair)
        except (struct.error, OverflowError, UnicodeEncodeError) as exc:
            raise UsageError(f"a property does not fit: {exc}") from None
        return b"".join(parts)

    def _values(self) -> list[tuple[int, bytes]]:
        if self.trace_id is not None and len(self.trace_id) != 16:
            raise UsageError(f"a trace id has 16 bytes, not {len(self.trace_id)}")
        given = [
            (REPLY_TOPIC, None if self.reply_topic is None else self.reply_topic.encode()),
            (CORRELATION_ID, self.correlation_id),
            (CONTENT_TYPE, None if self.content_type is None else self.content_type.encode()),
            (TIME_ERROR, None if self.time_error_ms is None else _U32.pack(self.time_error_ms)),
            (FRESHNESS, None if self.freshness_ms is None else _U32.pack(self.freshness_ms)),
            (SUPERSEDE_KEY, self.supersede_key),
            (TRACE_ID, self.trace_id),
            (IDEMPOTENCY_KEY, self.idempotency_key),
        ]
        return [(kind, value) for kind, value in given if value is not None]

    @classmethod
    def decode(cls, data: bytes) -> Properties:
        """Raises CorruptError: cut, out of order, doubled, of a wrong size, or no UTF-8 (R-10-12)."""
        found = cls()
        last = pos = 0
        while pos < len(data):
            if pos + 3 > len(data):
                raise CorruptError("properties are cut")
            kind, size = _TLV.unpack_from(data, pos)
            value = data[pos + 3 : pos + 3 + size]
            pos += 3 + size
            if len(value) != size:
                raise CorruptError("properties are cut")
            if kind < last or (kind == last and kind != USER):
                raise CorruptError(f"property {kind} after {last}")
            last = kind
            _SETTERS.get(kind, _skip)(found, value)
        return found


def _skip(found: Properties, value: bytes) -> None:
    """Later versions may know more types."""


def _set_reply_topic(found: Properties, value: bytes) -> None:
    found.reply_topic = _text(value)


def _set_correlation_id(found: Properties, value: bytes) -> None:
    found.correlation_id = value


def _set_content_type(found: Properties, value: bytes) -> None:
    found.content_type = _text(value)


def _set_time_error(found: Properties, value: bytes) -> None:
    found.time_error_ms = _u32(value)


def _set_freshness(found: Properties, value: bytes) -> None:
    found.freshness_ms = _u32(value)


def _set_supersede_key(found: Properties, value: bytes) -> None:
    found.supersede_key = value


def _set_trace_id(found: Properties, value: bytes) -> None:
    if len(value) != 16:
        raise CorruptError(f"a trace id of {len(value)} bytes")
    found.trace_id = value


def _set_idempotency_key(found: Properties, value: bytes) -> None:
    found.idempotency_key = value


def _add_user(found: Properties, value: bytes) -> None:
    size = int.from_bytes(value[:2], "big")
    if len(value) < 2 + size:
        raise CorruptError("a user property is cut")
    found.user.append((value[2 : 2 + size], value[2 + size :]))


_SETTERS: Final = {
    REPLY_TOPIC: _set_reply_topic,
    CORRELATION_ID: _set_correlation_id,
    CONTENT_TYPE: _set_content_type,
    TIME_ERROR: _set_time_error,
    FRESHNESS: _set_freshness,
    SUPERSEDE_KEY: _set_supersede_key,
    TRACE_ID: _set_trace_id,
    IDEMPOTENCY_KEY: _set_idempotency_key,
    USER: _add_user,
}


def _text(value: bytes) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError:
        raise CorruptError("a text is not UTF-8") from None


def _u32(value: bytes) -> int:
    if len(value) != 4:
        raise CorruptError(f"a duration of {len(value)} bytes")
    return int.from_bytes(value, "big")


# -- encoding -----------------------------------------------------------------------------------------------


def encode_batch(
    topics: Sequence[str],
    payloads: Sequence[bytes],
    *,
    time_ms: int,
    ttl_ms: int = 0,
    publisher: bytes,
    run: int,
    sequence: int,
    times: Sequence[int] | None = None,
    properties: Sequence[Properties | None] | None = None,
    compress: bool = False,
    tombstones: bool = False,
) -> bytes:
    """One batch of `len(topics)` messages. Times are ms since 1970, `ttl_ms` 0 means for ever.

    `time_ms` is the first message's; `times`, if given, has one entry per message, the first equal to
    `time_ms`; an earlier one counts as the first's. `properties`, if given, has one entry per message.
    Raises UsageError for what does not fit, TopicError for a bad topic.
    """
    count = len(topics)
    if not 0 < count <= MAX_COUNT or len(payloads) != count:
        raise UsageError(f"{count} topics and {len(payloads)} payloads are no batch")
    prefix, suffix_lengths, suffixes = _encode_topics(topics)
    payload_lengths = list(map(len, payloads))
    if max(payload_lengths) > MAX_MESSAGE:
        raise UsageError(f"a message of {max(payload_lengths)} bytes; at most {MAX_MESSAGE}")
    flags = TOMBSTONES if tombstones else 0
    body = b"".join(payloads)
    if compress:
        flags |= COMPRESSED
        packed = zstd.compress(body)
    else:
        packed = body
    opened = len(body) + len(suffixes)
    try:
        vectors = [Struct(f"!{count}I").pack(*payload_lengths), suffix_lengths]
        if times is not None:
            flags |= TIMES
            vectors.append(_encode_times(times, time_ms, count))
        if properties is not None:
            flags |= PROPERTIES
            sizes, blob = _encode_properties(properties, count)
            vectors.append(sizes)
            opened += len(blob)
            suffixes += blob
        size = HEAD_SIZE + len(prefix) + sum(map(len, vectors)) + len(suffixes) + len(packed)
        if opened > MAX_OPENED or size + CRC_SIZE > MAX_BATCH:
            raise UsageError(f"a batch of {size + CRC_SIZE} bytes, {opened} opened, is too large")
        head = _HEAD.pack(size, FORMAT, flags, count, time_ms, ttl_ms, publisher, run, sequence, len(prefix))
    except struct.error as exc:
        raise UsageError(f"a field of the batch does not fit: {exc}") from None
    if len(publisher) != 16:
        raise UsageError(f"a publisher's id has 16 bytes, not {len(publisher)}")
    return _sealed(b"".join((head, prefix, *vectors, suffixes)), packed)


def _sealed(front: bytes, payloads: bytes) -> bytes:
    """The batch with its CRC, which covers all but the size field."""
    return b"".join((front, payloads, _U32.pack(crc32(payloads, crc32(memoryview(front)[4:])))))


def _encode_topics(topics: Sequence[str]) -> tuple[bytes, bytes, bytes]:
    """Prefix, vector of suffix lengths, suffixes."""
    first = topics[0]
    count = len(topics)
    if topics.count(first) == count:
        check_topic(first)
        return first.encode(), bytes(2 * count), b""
    start = common_prefix(topics)
    skip = len(start)
    suffixes = [topic[skip:] for topic in topics]
    joined = "".join(suffixes)
    if joined.isascii():
        lengths = list(map(len, suffixes))
        encoded = joined.encode()
    else:
        try:
            parts = [suffix.encode() for suffix in suffixes]
        except UnicodeEncodeError as exc:
            raise TopicError(f"a topic is not UTF-8: {exc.reason}") from None
        lengths = list(map(len, parts))
        encoded = b"".join(parts)
    if "#" in joined or "+" in joined or "\0" in joined:
        for topic in topics:
            check_topic(topic)
    if start:
        check_topic(start)
    elif 0 in lengths:
        check_topic("")
    prefix = start.encode()
    if len(prefix) + max(lengths) > MAX_TOPIC:
        raise TopicError(f"a topic of {len(prefix) + max(lengths)} bytes; at most {MAX_TOPIC}")
    return prefix, Struct(f"!{count}H").pack(*lengths), encoded


def _encode_times(times: Sequence[int], time_ms: int, count: int) -> bytes:
    """R-10-6."""
    if len(times) != count or times[0] != time_ms:
        raise UsageError("times: one per message, and the first one's is time_ms")
    return Struct(f"!{count}I").pack(*[max(0, time - time_ms) for time in times])


def _encode_properties(properties: Sequence[Properties | None], count: int) -> tuple[bytes, bytes]:
    if len(properties) != count:
        raise UsageError(f"{len(properties)} properties for {count} messages")
    blobs = [b"" if one is None else one.encode() for one in properties]
    return Struct(f"!{count}H").pack(*map(len, blobs)), b"".join(blobs)


# -- reading ------------------------------------------------------------------------------------------------


@define
class BatchHead:
    """What a relay may know of a batch without opening it."""

    size_total: int
    """Bytes, the size field included."""
    flags: int
    count: int
    time_ms: int
    """Of the first message, ms since 1970 by the publisher's clock."""
    ttl_ms: int
    """0: no limit."""
    publisher: bytes
    run: int
    sequence: int
    prefix: str


def read_batch_head(data: bytes, offset: int = 0) -> BatchHead:
    """The head of the batch at `offset`. Checks shape and promise (4), not the CRC. Raises CorruptError."""
    try:
        size, form, flags, count, time_ms, ttl_ms, publisher, run, sequence, prefix_len = _HEAD.unpack_from(
            data, offset
        )
    except struct.error:
        raise CorruptError("a batch is cut") from None
    start = offset + HEAD_SIZE
    end = offset + 4 + size
    lengths = start + prefix_len + 4 * count
    if form != FORMAT or flags & _RESERVED or not count:
        raise CorruptError(f"a batch of format {form}, flags {flags:#04x}, {count} messages")
    if lengths + 2 * count + CRC_SIZE > end or end > len(data) or end - offset > MAX_BATCH:
        raise CorruptError(f"a batch of {size} bytes does not hold {count} messages")
    if prefix_len > MAX_TOPIC:
        raise CorruptError(f"a prefix of {prefix_len} bytes")
    try:
        prefix = data[start : start + prefix_len].decode()
    except UnicodeDecodeError:
        raise CorruptError("a prefix is not UTF-8") from None
    if prefix and prefix[-1] != "/" and data[lengths : lengths + 2 * count] != bytes(2 * count):
        raise CorruptError("a prefix ends inside a level")
    return BatchHead(size + 4, flags, count, time_ms, ttl_ms, publisher, run, sequence, prefix)


def check_batch(data: bytes) -> None:
    """Raise CorruptError unless `data` is one batch as long as it says, with a good CRC (R-10-7)."""
    if len(data) < HEAD_SIZE + CRC_SIZE or int.from_bytes(data[:4], "big") != len(data) - 4:
        raise CorruptError(f"{len(data)} bytes are not one batch")
    if crc32(memoryview(data)[4:-4]) != int.from_bytes(data[-4:], "big"):
        raise CorruptError("the CRC of a batch is wrong")


@define
class OpenBatch:
    """A batch taken apart: parallel lists with one entry per message."""

    head: BatchHead
    topics: list[str]
    payloads: list[bytes]
    times_ms: list[int]
    """ms since 1970."""
    properties: list[Properties | None]
    indices: Sequence[int]
    """Each message's place in the whole batch, for an excerpt too."""


def open_batch(data: bytes) -> OpenBatch:
    """Take one batch apart, after its CRC. CorruptError for whatever does not add up, and for bad topics."""
    check_batch(data)
    head = read_batch_head(data)
    parts = _split(data, head)
    count = head.count
    return OpenBatch(
        head,
        _open_topics(head.prefix, parts.suffix_lengths, parts.suffixes),
        _cut(parts.payloads, parts.payload_lengths),
        [head.time_ms] * count if parts.delays is None else [head.time_ms + delay for delay in parts.delays],
        [None] * count if parts.properties is None else [_open_properties(one) for one in parts.properties],
        range(count) if parts.indices is None else parts.indices,
    )


@define
class _Parts:
    """The vectors and blobs of a batch, lengths checked, payloads uncompressed."""

    payload_lengths: tuple[int, ...]
    suffix_lengths: tuple[int, ...]
    delays: tuple[int, ...] | None
    properties: list[bytes] | None
    indices: tuple[int, ...] | None
    suffixes: bytes
    payloads: bytes


def _split(data: bytes, head: BatchHead) -> _Parts:
    """Cut a batch of good CRC along its vectors (2)."""
    count = head.count
    flags = head.flags
    pos = HEAD_SIZE + int.from_bytes(data[HEAD_SIZE - 2 : HEAD_SIZE], "big")
    end = len(data) - CRC_SIZE
    longs = Struct(f"!{count}I")
    shorts = Struct(f"!{count}H")
    delays = property_lengths = indices = None
    try:
        payload_lengths = longs.unpack_from(data, pos)
        pos += longs.size
        suffix_lengths = shorts.unpack_from(data, pos)
        pos += shorts.size
        if flags & TIMES:
            delays = longs.unpack_from(data, pos)
            pos += longs.size
        if flags & PROPERTIES:
            property_lengths = shorts.unpack_from(data, pos)
            pos += shorts.size
        if flags & EXCERPT:
            indices = shorts.unpack_from(data, pos)
            pos += shorts.size
    except struct.error:
        raise CorruptError("the vectors of a batch are cut") from None
    if indices is not None and not all(map(lt, indices, indices[1:])):
        raise CorruptError("the indices of an excerpt do not ascend")
    size = sum(payload_lengths)
    suffixes_end = pos + sum(suffix_lengths)
    payloads_at = suffixes_end + (0 if property_lengths is None else sum(property_lengths))
    if payloads_at > end or payloads_at - pos + size > MAX_OPENED:
        raise CorruptError("a batch opens to more than it may hold")
    properties = None if property_lengths is None else _cut(data[suffixes_end:payloads_at], property_lengths)
    payloads = data[payloads_at:end]
    if flags & COMPRESSED:
        payloads = _decompress(payloads, size)
    elif len(payloads) != size:
        raise CorruptError(f"payloads of {len(payloads)} bytes where {size} were announced")
    return _Parts(
        payload_lengths, suffix_lengths, delays, properties, indices, data[pos:suffixes_end], payloads
    )


def _decompress(packed: bytes, size: int) -> bytes:
    """The content of one zstd frame, exactly `size` bytes; never makes more than one byte above (R-10-8)."""
    frame = zstd.ZstdDecompressor(options=_DECOMPRESSION)
    try:
        payloads = frame.decompress(packed, max_length=size + 1)
    except (zstd.ZstdError, EOFError, MemoryError) as exc:
        raise CorruptError(f"a zstd frame does not open: {exc}") from None
    if len(payloads) != size or not frame.eof or frame.unused_data:
        raise CorruptError(f"a zstd frame does not hold the {size} bytes announced")
    return payloads


def _cut(blob: bytes, lengths: Sequence[int]) -> list[bytes]:
    """Slices of `blob`, one per length; their sum is the blob's."""
    ends = list(accumulate(lengths))
    return [blob[end - size : end] for end, size in zip(ends, lengths, strict=True)]


def _chosen(parts: list[bytes], indices: Sequence[int]) -> list[bytes]:
    return [parts[n] for n in indices]


def _open_topics(prefix: str, lengths: Sequence[int], suffixes: bytes) -> list[str]:
    """Every topic, checked: bytes above 512, wildcards, NUL, empty, no UTF-8 are corrupt."""
    longest = max(lengths)
    if len(prefix.encode()) + longest > MAX_TOPIC or (not prefix and 0 in lengths):
        raise CorruptError("a topic is empty or too long")
    for wrong in "+#\0":
        if wrong in prefix or wrong.encode() in suffixes:
            raise CorruptError(f"a topic has {wrong!r} in it")
    if not longest:
        return [prefix] * len(lengths)
    ends = accumulate(lengths)
    if suffixes.isascii():
        text = suffixes.decode("ascii")
        return [prefix + text[end - size : end] for end, size in zip(ends, lengths, strict=True)]
    try:
        return [prefix + suffixes[end - size : end].decode() for end, size in zip(ends, lengths, strict=True)]
    except UnicodeDecodeError:
        raise CorruptError("a topic is not UTF-8") from None


def _open_properties(blob: bytes) -> Properties | None:
    return Properties.decode(blob) if blob else None


# -- excerpts -----------------------------------------------------------------------------------------------


def excerpt(data: bytes, indices: Sequence[int]) -> bytes:
    """A batch with only the messages at `indices` (places in `data`, ascending), and a CRC of its own (R-10-11).

    Not compressed, but where it would then exceed MAX_BATCH. Raises CorruptError for a bad batch, UsageError
    for bad indices or an excerpt that does not fit.
    """
    check_batch(data)
    head = read_batch_head(data)
    if not indices or indices[0] < 0 or indices[-1] >= head.count or not all(map(lt, indices, indices[1:])):
        raise UsageError(f"no excerpt of {head.count} messages: {list(indices)[:8]}")
    parts = _split(data, head)
    count = len(indices)
    longs = Struct(f"!{count}I")
    shorts = Struct(f"!{count}H")
    suffixes = _chosen(_cut(parts.suffixes, parts.suffix_lengths), indices)
    payloads = _chosen(_cut(parts.payloads, parts.payload_lengths), indices)
    vectors = [longs.pack(*map(len, payloads)), shorts.pack(*map(len, suffixes))]
    blobs = suffixes
    if parts.delays is not None:
        vectors.append(longs.pack(*[parts.delays[n] for n in indices]))
    if parts.properties is not None:
        chosen = _chosen(parts.properties, indices)
        vectors.append(shorts.pack(*map(len, chosen)))
        blobs = suffixes + chosen
    places = indices if parts.indices is None else [parts.indices[n] for n in indices]
    vectors.append(shorts.pack(*places))
    prefix = data[HEAD_SIZE : HEAD_SIZE + int.from_bytes(data[HEAD_SIZE - 2 : HEAD_SIZE], "big")]
    flags = (head.flags & ~COMPRESSED) | EXCERPT
    middle = b"".join((prefix, *vectors, *blobs))
    body = b"".join(payloads)
    if HEAD_SIZE + len(middle) + len(body) + CRC_SIZE > MAX_BATCH:
        flags |= COMPRESSED
        body = zstd.compress(body)
    size = HEAD_SIZE + len(middle) + len(body)
    if size + CRC_SIZE > MAX_BATCH:
        raise UsageError(f"an excerpt of {size + CRC_SIZE} bytes is too large")
    start = _U32.pack(size) + bytes((FORMAT, flags)) + count.to_bytes(2, "big") + data[8:HEAD_SIZE]
    return _sealed(start + middle, body)
