"""Records: batches numbered by a keeper; what is stored, sent and acknowledged (protocol §10). Sans-IO.

(1) Whatever bytes come, reading raises CorruptError or succeeds; the cutter raises LimitError for a size
    above its limit and nothing else.
(2) The record's CRC covers what a keeper may trust without opening a batch: source, number, kind, batches.
(3) `forward` and `part_of` rebuild no batch: their bytes stay those of the publisher.
(4) A record's prefix stands for every topic in it: it ends with '/', or is empty, or is the one topic of all.
(5) The cutter copies each byte at most twice and holds less than one record.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from enum import IntEnum
from struct import Struct
from typing import Final
from zlib import crc32

from attrs import define

from stp.batch import HEAD_SIZE as _BATCH_HEAD_SIZE
from stp.batch import MAX_BATCH
from stp.core.errors import CorruptError, LimitError, UsageError
from stp.topics import MAX_TOPIC, shared

MAX_RECORD: Final = 1_114_112
"""Bytes of a record, its size field included, its trailer not (R-10-9)."""
MAX_HOPS: Final = 8
MAX_TRAILER: Final = 16 * MAX_HOPS + 5
MAX_BATCHES: Final = 65_535
MAX_AGE_DS: Final = 0xFFFF_FFFF
"""Tenths of a second; an age stops there."""

_HEAD: Final = Struct("!IBBH16sQ")
_DATA_HEAD: Final = Struct("!IBBH16sQH")
_VOID: Final = Struct("!IBBH16sQQBI")
_TRAILER: Final = Struct("!BI")
_U32: Final = Struct("!I")
# Of a batch: size, format and flags, count, prefix_len. The rest of its head is not a record's business.
_BATCH: Final = Struct("!IHH44xH")
_BATCHES_AT: Final = _DATA_HEAD.size
_BATCH_FLAGS: Final = range(0x0100, 0x0120)
_SLASH: Final = ord("/")


class RecordKind(IntEnum):
    DATA = 0
    VOID = 1
    PART = 2


DATA: Final = RecordKind.DATA
VOID: Final = RecordKind.VOID
PART: Final = RecordKind.PART


class Lane(IntEnum):
    """Streams of records that never wait for one another."""

    COMMAND = 1
    EVENT = 2
    TELEMETRY = 3
    BULK = 4


class VoidReason(IntEnum):
    """Why numbers carry nothing for you."""

    EXPIRED = 1
    DROPPED = 2
    FILTERED = 3
    QUARANTINED = 4
    CRASH = 5


class RefusedCode(IntEnum):
    """Why a record was not taken. `FINAL_CODES` do not improve by waiting: the sender quarantines."""

    FULL = 1
    DENIED = 2
    CORRUPT = 3
    TOO_LARGE = 4
    LOOP = 5
    LATE = 6
    CONFLICT = 7
    SOURCE = 8
    RANGES = 9


FINAL_CODES: Final = frozenset(
    (RefusedCode.DENIED, RefusedCode.CORRUPT, RefusedCode.TOO_LARGE, RefusedCode.LOOP)
)  # R-10-39


@define
class RecordHead:
    """What a keeper knows of a record without opening a batch."""

    kind: int
    lane: int
    source: bytes
    number: int
    to: int
    """The last number covered; `number` itself but for a void."""
    reason: int
    """VoidReason; 0 for data and part."""
    batches: int
    messages: int
    """In all batches; for a void what it says."""
    prefix: str
    crc: int
    body_end: int
    """Offset of the trailer, the end of the CRC."""
    hops: tuple[bytes, ...]
    age_ds: int
    size: int
    """Bytes of the whole record, size field and trailer included."""


# -- reading ------------------------------------------------------------------------------------------------


def read_record(data: bytes) -> RecordHead:
    """The head of the one record that `data` is: shape and record CRC checked, batch CRCs not (R-10-14).

    Raises CorruptError. Costs the CRC and one short step per batch.
    """
    size = len(data)
    try:
        announced, kind, lane, batches, source, number = _HEAD.unpack_from(data)
        hops_count, age_ds = _TRAILER.unpack_from(data, size - 5)
    except struct.error:
        raise CorruptError(f"a record of {size} bytes is cut") from None
    body_end = size - 5 - 16 * hops_count
    if announced != size - 4 or hops_count > MAX_HOPS or body_end <= _BATCHES_AT:
        raise CorruptError(f"a record of {size} bytes does not hold what it says")
    if body_end > MAX_RECORD:
        raise CorruptError(f"a record of {body_end} bytes; at most {MAX_RECORD}")
    crc = int.from_bytes(data[body_end - 4 : body_end], "big")
    if crc32(memoryview(data)[4 : body_end - 4]) != crc:
        raise CorruptError("the CRC of a record is wrong")
    if not 1 <= lane <= 4 or not number:
        raise CorruptError(f"a record on lane {lane}, number {number}")
    if kind == VOID:
        to, reason, messages = _read_void(data, batches, number, body_end)
        prefix = ""
    elif kind in (DATA, PART):
        to, reason = number, 0
        prefix, messages = _step_over(data, batches, body_end - 4)
    else:
        raise CorruptError(f"a record of kind {kind}")
    hops = (
        tuple(data[at : at + 16] for at in range(body_end, size - 5, 16)) if hops_count else ()
    )  # the many records of publishers have none
    return RecordHead(
        kind, lane, source, number, to, reason, batches, messages, prefix, crc, body_end, hops, age_ds, size
    )


def _read_void(data: bytes, batches: int, number: int, body_end: int) -> tuple[int, int, int]:
    if body_end != _VOID.size + 4 or batches:
        raise CorruptError("a void of a wrong size")
    *_, to, reason, messages = _VOID.unpack_from(data)
    if to < number or not VoidReason.EXPIRED <= reason <= VoidReason.CRASH:
        raise CorruptError(f"a void of {number}..{to}, reason {reason}")
    return to, reason, messages


def _step_over(data: bytes, batches: int, end: int) -> tuple[str, int]:
    """Common prefix and number of messages; checks that the batches fill the record, and promise (4)."""
    pos, prefix = _common_prefix(data)
    common = len(prefix)
    bare = common and prefix[-1] != _SLASH  # then every batch has exactly this topic
    messages = 0
    try:
        for _ in range(batches):
            size, flags, count, prefix_len = _BATCH.unpack_from(data, pos)
            start = pos + _BATCH_HEAD_SIZE
            vectors = start + prefix_len + 4 * count
            stop = pos + 4 + size
            if (
                prefix_len < common
                or not count
                or flags not in _BATCH_FLAGS
                or not data.startswith(prefix, start)
                or vectors + 2 * count + 4 > stop
                or stop > end
                or stop - pos > MAX_BATCH
                or prefix_len > MAX_TOPIC
                or (bare and prefix_len != common)
            ):
                raise CorruptError("a batch does not fit its record")
            if prefix_len and data[start + prefix_len - 1] != _SLASH:
                lengths = data[vectors : vectors + 2 * count]
                if lengths != bytes(2 * count):
                    raise CorruptError("a batch's prefix ends inside a level")
            messages += count
            pos = stop
    except struct.error:
        raise CorruptError("a batch is cut") from None
    if pos != end or not batches:
        raise CorruptError(f"{batches} batches do not fill the record")
    try:
        return prefix.decode(), messages
    except UnicodeDecodeError:
        raise CorruptError("a prefix is not UTF-8") from None


def _common_prefix(record: bytes) -> tuple[int, bytes]:
    """Where the first batch begins, and the common prefix before it."""
    first = _BATCHES_AT + int.from_bytes(record[_BATCHES_AT - 2 : _BATCHES_AT], "big")
    return first, record[_BATCHES_AT:first]


def batch_spans(data: bytes, head: RecordHead) -> Iterator[tuple[int, int]]:
    """Start and end offset of every batch in a record that `read_record` has passed."""
    if head.kind == VOID:
        return
    pos, _ = _common_prefix(data)
    for _ in range(head.batches):
        end = pos + 4 + int.from_bytes(data[pos : pos + 4], "big")
        yield pos, end
        pos = end


def batches_of(data: bytes, head: RecordHead) -> list[bytes]:
    """The bytes of every batch in a record that `read_record` has passed; none in a void."""
    return [data[start:end] for start, end in batch_spans(data, head)]


def check_batches(data: bytes, head: RecordHead) -> None:
    """Raise CorruptError unless the publisher's CRC of every batch is right."""
    if head.kind == VOID:
        return
    view = memoryview(data)
    end, _ = _common_prefix(data)
    for _ in range(head.batches):  # batch_spans, inlined: this runs for every record of every publisher
        start = end + 4
        end = start + int.from_bytes(data[end:start], "big")
        if crc32(view[start : end - 4]) != int.from_bytes(data[end - 4 : end], "big"):
            raise CorruptError("the CRC of a batch is wrong")


# -- writing ------------------------------------------------------------------------------------------------


def encode_record(
    lane: int,
    source: bytes,
    number: int,
    batches: Sequence[bytes],
    *,
    kind: int = DATA,
    hops: Sequence[bytes] = (),
    age_ds: int = 0,
) -> bytes:
    """A data or part record of whole batches. UsageError where it does not fit (R-10-15)."""
    if not 0 < len(batches) <= MAX_BATCHES:
        raise UsageError(f"a record of {len(batches)} batches")
    prefixes = [_prefix_of(batch) for batch in batches]
    return _record(kind, lane, source, number, len(batches), prefixes, batches, (tuple(hops), age_ds))


def _prefix_of(batch: bytes) -> bytes:
    return batch[_BATCH_HEAD_SIZE : _BATCH_HEAD_SIZE + int.from_bytes(batch[52:54], "big")]


def _record(
    kind: int,
    lane: int,
    source: bytes,
    number: int,
    count: int,
    prefixes: Sequence[bytes],
    chunks: Sequence[bytes | memoryview],
    trailer: tuple[tuple[bytes, ...], int],
) -> bytes:
    """One record around `chunks`, which hold `count` batches; one join, the CRC taken chunk by chunk."""
    hops, age_ds = trailer
    prefix = prefixes[0] if len(prefixes) == 1 else shared(min(prefixes), max(prefixes), b"/")
    body_end = _BATCHES_AT + len(prefix) + sum(map(len, chunks)) + 4
    if body_end > MAX_RECORD:
        raise UsageError(f"a record of {body_end} bytes; at most {MAX_RECORD}")
    _check_fields(kind, lane, source, number, hops)
    size = body_end + 16 * len(hops) + 5 - 4
    try:
        head = _DATA_HEAD.pack(size, kind, lane, count, source, number, len(prefix)) + prefix
    except struct.error as exc:
        raise UsageError(f"a field of the record does not fit: {exc}") from None
    crc = crc32(memoryview(head)[4:])
    for chunk in chunks:
        crc = crc32(chunk, crc)
    return b"".join((head, *chunks, _U32.pack(crc), _trailer(hops, age_ds)))


def _check_fields(kind: int, lane: int, source: bytes, number: int, hops: Sequence[bytes]) -> None:
    if kind not in (DATA, VOID, PART) or not 1 <= lane <= 4 or number < 1:
        raise UsageError(f"no record of kind {kind} on lane {lane} with number {number}")
    if len(source) != 16 or len(hops) > MAX_HOPS or any(len(hop) != 16 for hop in hops):
        raise UsageError("a source and each of up to 8 hops have 16 bytes")


def _trailer(hops: Sequence[bytes], age_ds: int) -> bytes:
    return b"".join((*hops, _TRAILER.pack(len(hops), min(age_ds, MAX_AGE_DS))))


def encode_void(
    lane: int,
    source: bytes,
    number: int,
    to: int,
    reason: int,
    messages: int,
    hops: Sequence[bytes] = (),
    age_ds: int = 0,
) -> bytes:
    """`number`..`to` carry nothing for you, for this VoidReason. UsageError where it does not fit."""
    _check_fields(VOID, lane, source, number, hops)
    if to < number:
        raise UsageError(f"a void of {number}..{to}")
    size = _VOID.size + 4 + 16 * len(hops) + 5 - 4
    try:
        body = _VOID.pack(size, VOID, lane, 0, source, number, to, VoidReason(reason), messages)
    except (struct.error, ValueError) as exc:
        raise UsageError(f"a field of the void does not fit: {exc}") from None
    return b"".join((body, _U32.pack(crc32(body[4:])), _trailer(hops, age_ds)))


def regroup(lane: int, source: bytes, number: int, records: Sequence[bytes]) -> bytes:
    """Several good data records into one under a new source and number, without hops, the greatest age in it.

    The first keeper's adoption. The records come from `read_record`; no batch is touched. UsageError if
    together they exceed MAX_RECORD or MAX_BATCHES.
    """
    count = age_ds = 0
    chunks: list[bytes | memoryview] = []
    prefixes: set[bytes] = set()
    for record in records:
        hops_count, age = _TRAILER.unpack_from(record, len(record) - 5)
        first, prefix = _common_prefix(record)
        count += int.from_bytes(record[6:8], "big")
        age_ds = max(age_ds, age)
        prefixes.add(prefix)
        chunks.append(memoryview(record)[first : len(record) - 9 - 16 * hops_count])
    if not 0 < count <= MAX_BATCHES:
        raise UsageError(f"a record of {count} batches")
    return _record(DATA, lane, source, number, count, list(prefixes), chunks, ((), age_ds))


def forward(record: bytes, head: RecordHead, node_id: bytes, dwell_ds: int) -> bytes:
    """The record as this keeper sends it on: its id and its dwell (tenths of a second) added, one copy (R-10-16).

    UsageError if the record has 8 hops or was here before: refuse such a record as LOOP (`loops`).
    """
    if len(node_id) != 16 or loops(head, node_id):
        raise UsageError("a record cannot take this hop")
    age_ds = min(head.age_ds + dwell_ds, MAX_AGE_DS)
    trailer = _TRAILER.pack(len(head.hops) + 1, age_ds)
    return b"".join((_U32.pack(head.size + 12), memoryview(record)[4:-5], node_id, trailer))


def loops(head: RecordHead, node_id: bytes) -> bool:
    """Was the record here before, or is its list of hops full?"""
    return node_id in head.hops or len(head.hops) >= MAX_HOPS


def part_of(record: bytes, head: RecordHead, keep: Sequence[int]) -> bytes:
    """The record with only the batches at the places `keep`: same source, number, hops and age (R-10-15)."""
    batches = batches_of(record, head)
    try:
        kept = [batches[n] for n in keep]
    except IndexError:
        raise UsageError(f"a record of {len(batches)} batches has none at {max(keep)}") from None
    return encode_record(
        head.lane, head.source, head.number, kept, kind=PART, hops=head.hops, age_ds=head.age_ds
    )


# -- cutting ------------------------------------------------------------------------------------------------


class RecordCutter:
    """Cuts the bytes of one lane into records. Useless once it has raised."""

    __slots__ = ("_limit", "_need", "_part")

    def __init__(self, max_record: int = MAX_RECORD) -> None:
        """`max_record`: bytes of a record without its trailer."""
        self._limit = max_record + MAX_TRAILER - 4
        self._part = bytearray()  # the one incomplete record
        self._need = 4  # bytes of it that must be there before we can go on

    @property
    def incomplete(self) -> int:
        """Bytes held of a record that is not complete."""
        return len(self._part)

    def feed(self, data: bytes) -> list[bytes]:
        """The records that are complete with `data`, unread. LimitError for a size above the limit."""
        records: list[bytes] = []
        pos = self._fill(data, records) if self._part else 0
        end = len(data)
        size_at = _U32.unpack_from
        while pos + 4 <= end:
            size = size_at(data, pos)[0]
            if size > self._limit:
                self._too_large(size)
            stop = pos + 4 + size
            if stop > end:
                self._need = 4 + size
                break
            records.append(data[pos:stop])
            pos = stop
        if pos < end:
            self._part += memoryview(data)[pos:]
        return records

    def _fill(self, data: bytes, records: list[bytes]) -> int:
        """Complete the record that is held; how many bytes of `data` that took."""
        part = self._part
        taken = 0
        if len(part) < 4:
            taken = 4 - len(part)
            part += data[:taken]
            if len(part) < 4:
                return len(data)
            size = int.from_bytes(part, "big")
            if size > self._limit:
                self._too_large(size)
            self._need = 4 + size
        missing = self._need - len(part)
        part += memoryview(data)[taken : taken + missing]
        if len(part) < self._need:
            return len(data)
        records.append(bytes(part))
        self._part = bytearray()
        return taken + missing

    def _too_large(self, size: int) -> None:
        raise LimitError(f"a record of {size + 4} bytes on a lane; at most {self._limit + 4}")
