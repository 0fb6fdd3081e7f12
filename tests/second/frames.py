"""§5: frames. One is a tuple, its type first; the layouts are the table's own."""

from __future__ import annotations

import struct
from itertools import pairwise
from typing import Any

from tests.second.hello import Malformed

PADDING, PING, ACK, CRYPTO = 0x00, 0x01, 0x02, 0x03
STREAM_REST, STREAM = 0x04, 0x06
RESET_STREAM, STOP_SENDING = 0x08, 0x09
MAX_DATA, MAX_STREAM_DATA, MAX_STREAMS = 0x0A, 0x0B, 0x0C
DATA_BLOCKED, STREAM_DATA_BLOCKED, STREAMS_BLOCKED = 0x0D, 0x0E, 0x0F
DATAGRAM, NEW_CID, RETIRE_CID = 0x10, 0x11, 0x12
PATH_CHALLENGE, PATH_RESPONSE = 0x13, 0x14
NEW_TOKEN, HANDSHAKE_DONE, CLOSE = 0x15, 0x16, 0x17

FIXED = {
    PING: ">",
    RESET_STREAM: ">IHQ",
    STOP_SENDING: ">IH",
    MAX_DATA: ">Q",
    MAX_STREAM_DATA: ">IQ",
    MAX_STREAMS: ">BI",
    DATA_BLOCKED: ">Q",
    STREAM_DATA_BLOCKED: ">IQ",
    STREAMS_BLOCKED: ">BI",
    NEW_CID: ">II8s16s",
    RETIRE_CID: ">I",
    PATH_CHALLENGE: ">8s",
    PATH_RESPONSE: ">8s",
    HANDSHAKE_DONE: ">16s",
}
"""Frames whose fields have one width."""
COUNTED = {CRYPTO: ">IH", STREAM: ">IQH", STREAM | 1: ">IQH", NEW_TOKEN: ">H", CLOSE: ">HB"}
"""Frames that end in bytes; the last field counts those."""
REST = {STREAM_REST: ">IQ", STREAM_REST | 1: ">IQ", DATAGRAM: ">"}
"""Frames that end with the packet."""

Frame = tuple[Any, ...]


def write(kind: int, *fields: Any) -> bytes:
    """One frame. A frame that ends in bytes takes them last, without their count."""
    head = bytes([kind])
    if kind in FIXED:
        return head + struct.pack(FIXED[kind], *fields)
    data: bytes = fields[-1]
    if kind in REST:
        return head + struct.pack(REST[kind], *fields[:-1]) + data
    return head + struct.pack(COUNTED[kind], *fields[:-1], len(data)) + data


def write_ack(received: list[tuple[int, int]], delay_us: int = 0) -> bytes:
    """R-5-1. *received*: inclusive ranges of numbers, descending and apart; the first 65 are told."""
    told = received[:65]
    pairs = b""
    for (below, _), (low, high) in pairwise(told):
        pairs += struct.pack(">II", below - high - 1, high - low + 1)
    low, high = told[0]
    return struct.pack(">BQIIH", ACK, high, delay_us, high - low + 1, len(told) - 1) + pairs


def read_ack(data: bytes, at: int) -> tuple[Frame, int]:
    """(ACK, delay_us, inclusive ranges) and where it ends; *at* is behind the type."""
    largest, delay_us, length, count = struct.unpack_from(">QIIH", data, at)
    at += 18
    ranges = [(largest - length + 1, largest)]
    if count > 64 or length < 1:
        raise Malformed("ACK")
    for _ in range(count):
        gap, length = struct.unpack_from(">II", data, at)
        at += 8
        if gap < 1 or length < 1:
            raise Malformed("ACK")
        high = ranges[-1][0] - gap - 1
        ranges.append((high - length + 1, high))
    if ranges[-1][0] < 0:
        raise Malformed("ACK")
    return (ACK, delay_us, ranges), at


def read(data: bytes) -> list[Frame]:
    """The frames of a packet, without PADDING. Raises Malformed (R-5-2)."""
    found: list[Frame] = []
    at = 0
    if not data:
        raise Malformed("no frames")
    try:
        while at < len(data) and data[at] != PADDING:
            kind = data[at]
            at += 1
            if kind == ACK:
                frame, at = read_ack(data, at)
            elif kind in FIXED:
                frame = (kind, *struct.unpack_from(FIXED[kind], data, at))
                at += struct.calcsize(FIXED[kind])
            elif kind in REST:
                start = at + struct.calcsize(REST[kind])
                frame = (kind, *struct.unpack_from(REST[kind], data, at), data[start:])
                at = len(data)
            elif kind in COUNTED:
                *fields, size = struct.unpack_from(COUNTED[kind], data, at)
                at += struct.calcsize(COUNTED[kind])
                frame = (kind, *fields, data[at : at + size])
                at += size
            else:
                raise Malformed(f"frame {kind:#x}")
            if at > len(data):
                raise Malformed(f"frame {kind:#x} cut")
            found.append(frame)
    except struct.error as error:
        raise Malformed(str(error)) from error
    return found
