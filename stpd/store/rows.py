"""Rows of the log: how a record stands in the table, and how damage in it is found (promise 4 of base).

(1) Every byte of a row is covered: the record's body by the record's own CRC, made by whoever numbered it, and
    the columns, the size field and the trailer by `row_crc`. So what is handed out is what was received.
(2) Whatever a row holds, reading it gives a Stored or DamagedRowError, nothing else.
"""

from __future__ import annotations

import struct
from typing import Any, Final
from zlib import crc32

from stp.records import MAX_HOPS, VOID, VoidReason, encode_void
from stpd.store.base import Stored

LANE_SHIFT: Final = 48
MAX_POS: Final = (1 << LANE_SHIFT) - 1

INSERT: Final = (
    "INSERT INTO record (id, adopted, source, number, number_to, kind, messages, size, at_ms, sum_messages,"
    " sum_bytes, peer, prefix, crc, row_crc, record) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
)
SELECT: Final = (
    "SELECT id, adopted, source, number, number_to, kind, messages, size, at_ms, sum_messages, sum_bytes, peer,"
    " prefix, crc, row_crc, record FROM record"
)

Row = tuple[Any, ...]
"""The columns of SELECT, in that order: SQLite checks no types, so neither do we claim any."""

_COLUMNS: Final = struct.Struct("!qB16sqqBIIqqqI")
_U32: Final = struct.Struct("!I")
_VOID_TO: Final = struct.Struct("!IBBH16sQQ")
"""A record's head as far as a void's `to`; data and part records are longer too."""
_SIGN: Final = 1 << 63
_WRAP: Final = 1 << 64


class DamagedRowError(Exception):
    """A row is not what was written. Its text says what does not fit."""


def row_id(lane: int, pos: int) -> int:
    return lane << LANE_SHIFT | pos


def to_column(number: int) -> int:
    """A u64 as SQLite's signed 64 bits."""
    return number - _WRAP if number >= _SIGN else number


def from_column(number: int) -> int:
    return number + _WRAP if number < 0 else number


def make_row(stored: Stored, adopted: bool, sum_bytes: int, crc: int) -> Row:
    """The row of a record; `crc` is the record's own."""
    record = stored.record
    columns = (
        stored.lane << LANE_SHIFT | stored.pos,
        int(adopted),
        stored.source,
        to_column(stored.number),
        to_column(stored.to),
        int(stored.kind),
        stored.messages,
        len(record),
        stored.at_ms,
        stored.cumulative,
        sum_bytes,
        crc,
    )
    row_crc = _row_crc(columns, stored.peer, stored.prefix, record)
    return (*columns[:11], stored.peer, stored.prefix, crc, row_crc, record)


def _row_crc(columns: Row, peer: str, prefix: str, record: bytes) -> int:
    """Over all but the record's body. Raises struct.error and AttributeError on columns of strange types."""
    edge = _body_end(record) - 4
    crc = crc32(_COLUMNS.pack(*columns))
    crc = crc32(peer.encode(), crc)
    crc = crc32(prefix.encode(), crc)
    crc = crc32(record[:4], crc)
    return crc32(record[edge:], crc)


def _body_end(record: bytes) -> int:
    """Where the record's CRC ends and its trailer begins; at least 8 whatever the bytes."""
    return max(8, len(record) - 5 - 16 * record[-5])


def read_row(row: Row) -> Stored:
    """The record of a row, every byte checked. DamagedRowError says what does not fit. `at` is 0.0."""
    try:
        return _read_row(row)
    except (struct.error, AttributeError, TypeError, IndexError, ValueError) as exc:
        raise DamagedRowError(f"columns of strange types ({exc})") from None


def _read_row(row: Row) -> Stored:
    (
        key,
        _,
        source,
        number,
        to,
        kind,
        messages,
        size,
        at_ms,
        cumulative,
        _,
        peer,
        prefix,
        crc,
        row_crc,
        record,
    ) = row
    if len(record) != size or _row_crc((*row[:11], crc), peer, prefix, record) != row_crc:
        raise DamagedRowError("CRC of the row")
    end = _body_end(record)
    if crc32(memoryview(record)[4 : end - 4]) != crc or _U32.unpack_from(record, end - 4)[0] != crc:
        raise DamagedRowError("CRC of the record")
    return Stored(
        key >> LANE_SHIFT, key & MAX_POS, source, from_column(number), from_column(to), kind, prefix, messages,
        record, at_ms, 0.0, peer, cumulative,
    )  # fmt: skip


def columns_hold(row: Row) -> bool:
    """Are the columns and the trailer whole, whatever the record's body is like?"""
    try:
        return bool(_row_crc((*row[:11], row[13]), row[11], row[12], row[15]) == row[14])
    except (struct.error, AttributeError, TypeError, IndexError):
        return False


def void_in_place(row: Row, lane: int, pos: int, messages: int, cumulative: int, at_ms: int) -> Stored:
    """What is handed out instead of a damaged row: a void for its number, or nothing if that is lost too.

    One of two witnesses must be whole: the columns (a flip in the body leaves them good) or the record (its CRC
    covers source and number).
    """
    source, number, to, hops = _identity(row, lane)
    record = b""
    if number:
        lost = min(messages, 0xFFFF_FFFF)
        record = encode_void(lane, source, number, to, VoidReason.QUARANTINED, lost, hops)
    return Stored(
        lane, pos, source, number, to, VOID, "", messages, record, at_ms, 0.0, "", cumulative, damaged=True
    )


def missing(lane: int, pos: int, messages: int, cumulative: int) -> Stored:
    """What is handed out for a row that damage has made unreadable."""
    return Stored(lane, pos, bytes(16), 0, 0, VOID, "", messages, b"", 0, 0.0, "", cumulative, damaged=True)


def _identity(row: Row, lane: int) -> tuple[bytes, int, int, tuple[bytes, ...]]:
    """Source, number, to and hops, by whichever witness is whole; zeros if none is."""
    record = row[15]
    if columns_hold(row):
        return row[2], from_column(row[3]), from_column(row[4]), _hops(record, _body_end(record))
    if isinstance(record, bytes):
        for hops in range(MAX_HOPS + 1):  # the trailer may be what is damaged, so it is not asked
            end = len(record) - 5 - 16 * hops
            if end < _VOID_TO.size + 4:
                break
            if crc32(memoryview(record)[4 : end - 4]) in (_U32.unpack_from(record, end - 4)[0], row[13]):
                _, kind, its_lane, _, source, number, to = _VOID_TO.unpack_from(record)
                if its_lane != lane:
                    break
                return source, number, to if kind == VOID else number, _hops(record, end)
    return bytes(16), 0, 0, ()


def _hops(record: bytes, end: int) -> tuple[bytes, ...]:
    return tuple(record[at : at + 16] for at in range(end, len(record) - 5, 16))
