"""The frame codec (protocol §5).

(1) `decode` of any bytes gives frames or raises FrameEncodingError.
(2) `encode` of a decoded frame gives the bytes it came from, padding apart.

The hot types need no objects: a session reads STREAM heads with `STREAM_HEAD` / `STREAM_LENGTH_HEAD` and ACKs
with `parse_ack` at an offset of the plaintext, and leaves every other type to `decode_one`.
"""

from __future__ import annotations

from collections.abc import Sequence
from struct import Struct
from struct import error as struct_error
from typing import Final, TypeAlias

from attrs import define

from stp.core.errors import FrameEncodingError

PADDING: Final = 0x00
PING: Final = 0x01
ACK: Final = 0x02
CRYPTO: Final = 0x03
STREAM: Final = 0x04
STREAM_FIN: Final = 0x05
STREAM_LENGTH: Final = 0x06
STREAM_LENGTH_FIN: Final = 0x07
RESET_STREAM: Final = 0x08
STOP_SENDING: Final = 0x09
MAX_DATA: Final = 0x0A
MAX_STREAM_DATA: Final = 0x0B
MAX_STREAMS: Final = 0x0C
DATA_BLOCKED: Final = 0x0D
STREAM_DATA_BLOCKED: Final = 0x0E
STREAMS_BLOCKED: Final = 0x0F
DATAGRAM: Final = 0x10
NEW_CID: Final = 0x11
RETIRE_CID: Final = 0x12
PATH_CHALLENGE: Final = 0x13
PATH_RESPONSE: Final = 0x14
NEW_TOKEN: Final = 0x15
HANDSHAKE_DONE: Final = 0x16
CLOSE: Final = 0x17

MAX_ACK_RANGES: Final = 64
"""Ranges after the first in one ACK."""
MAX_REASON: Final = 255
"""Bytes of a CLOSE reason."""
FIN_BIT: Final = 0x01
BIDIRECTIONAL: Final = 0
UNIDIRECTIONAL: Final = 1

STREAM_HEAD: Final = Struct("!BIQ")  # type 0x04/0x05, stream, offset; data to the end
STREAM_HEAD_SIZE: Final = STREAM_HEAD.size
STREAM_LENGTH_HEAD: Final = Struct("!BIQH")  # type 0x06/0x07, stream, offset, length
STREAM_LENGTH_HEAD_SIZE: Final = STREAM_LENGTH_HEAD.size
ACK_HEAD: Final = Struct("!BQIIH")  # type, largest, delay_us, first_length, n
ACK_HEAD_SIZE: Final = ACK_HEAD.size
ACK_RANGE_SIZE: Final = 8
MAX_ACK_SIZE: Final = ACK_HEAD_SIZE + MAX_ACK_RANGES * ACK_RANGE_SIZE

CRYPTO_HEAD: Final = Struct("!BIH")  # type, offset, length
CRYPTO_HEAD_SIZE: Final = CRYPTO_HEAD.size

_RESET_STREAM: Final = Struct("!BIHQ")
_STOP_SENDING: Final = Struct("!BIH")
_U64: Final = Struct("!BQ")
_STREAM_U64: Final = Struct("!BIQ")
_KIND_U32: Final = Struct("!BBI")
_NEW_CID: Final = Struct("!BII8s16s")
_U32: Final = Struct("!BI")
_PATH: Final = Struct("!B8s")
_U16: Final = Struct("!BH")
_DONE: Final = Struct("!B16s")
_CLOSE: Final = Struct("!BHB")
_PAIRS: Final = [Struct(f"!{2 * n}I") for n in range(MAX_ACK_RANGES + 1)]


@define
class Padding:
    """Zeros to the end of the packet; `length` bytes of them, this one included."""

    length: int = 1

    def encode(self) -> bytes:
        return bytes(self.length)


@define
class Ping:
    def encode(self) -> bytes:
        return b"\x01"


@define
class Ack:
    """`ranges`: half-open (start, stop), the highest first."""

    delay_us: int
    ranges: list[tuple[int, int]]

    def encode(self) -> bytes:
        return encode_ack(self.delay_us, self.ranges)


@define
class Crypto:
    offset: int
    data: bytes

    def encode(self) -> bytes:
        return CRYPTO_HEAD.pack(CRYPTO, self.offset, len(self.data)) + self.data


@define
class Stream:
    """Encoded with its length; a sender that fills a packet writes 0x04 / 0x05 itself."""

    stream: int
    offset: int
    data: bytes
    fin: bool = False

    def encode(self) -> bytes:
        head = STREAM_LENGTH_HEAD.pack(STREAM_LENGTH | self.fin, self.stream, self.offset, len(self.data))
        return head + self.data

    def encode_last(self) -> bytes:
        """The form without a length, for the end of a packet."""
        return STREAM_HEAD.pack(STREAM | self.fin, self.stream, self.offset) + self.data


@define
class ResetStream:
    stream: int
    code: int
    final_size: int

    def encode(self) -> bytes:
        return _RESET_STREAM.pack(RESET_STREAM, self.stream, self.code, self.final_size)


@define
class StopSending:
    stream: int
    code: int

    def encode(self) -> bytes:
        return _STOP_SENDING.pack(STOP_SENDING, self.stream, self.code)


@define
class MaxData:
    max: int

    def encode(self) -> bytes:
        return _U64.pack(MAX_DATA, self.max)


@define
class MaxStreamData:
    stream: int
    max: int

    def encode(self) -> bytes:
        return _STREAM_U64.pack(MAX_STREAM_DATA, self.stream, self.max)


@define
class MaxStreams:
    """`kind`: BIDIRECTIONAL or UNIDIRECTIONAL; `max` is cumulative."""

    kind: int
    max: int

    def encode(self) -> bytes:
        return _KIND_U32.pack(MAX_STREAMS, self.kind, self.max)


@define
class DataBlocked:
    max: int

    def encode(self) -> bytes:
        return _U64.pack(DATA_BLOCKED, self.max)


@define
class StreamDataBlocked:
    stream: int
    max: int

    def encode(self) -> bytes:
        return _STREAM_U64.pack(STREAM_DATA_BLOCKED, self.stream, self.max)


@define
class StreamsBlocked:
    kind: int
    max: int

    def encode(self) -> bytes:
        return _KIND_U32.pack(STREAMS_BLOCKED, self.kind, self.max)


@define
class Datagram:
    """Takes the packet to its end."""

    data: bytes

    def encode(self) -> bytes:
        return b"\x10" + self.data


@define
class NewCid:
    seq: int
    retire_prior_to: int
    cid: bytes
    token: bytes

    def encode(self) -> bytes:
        return _NEW_CID.pack(NEW_CID, self.seq, self.retire_prior_to, self.cid, self.token)


@define
class RetireCid:
    seq: int

    def encode(self) -> bytes:
        return _U32.pack(RETIRE_CID, self.seq)


@define
class PathChallenge:
    data: bytes

    def encode(self) -> bytes:
        return _PATH.pack(PATH_CHALLENGE, self.data)


@define
class PathResponse:
    data: bytes

    def encode(self) -> bytes:
        return _PATH.pack(PATH_RESPONSE, self.data)


@define
class NewToken:
    token: bytes

    def encode(self) -> bytes:
        return _U16.pack(NEW_TOKEN, len(self.token)) + self.token


@define
class HandshakeDone:
    token: bytes

    def encode(self) -> bytes:
        return _DONE.pack(HANDSHAKE_DONE, self.token)


@define
class Close:
    """`reason` is for people; what does not fit into 255 bytes of UTF-8 is cut."""

    code: int
    reason: str = ""

    def encode(self, limit: int = MAX_REASON) -> bytes:
        reason = self.reason.encode("utf-8", "replace")[: min(limit, MAX_REASON)]
        reason = reason.decode("utf-8", "ignore").encode()  # never half a character
        return _CLOSE.pack(CLOSE, self.code, len(reason)) + reason


Frame: TypeAlias = (
    Padding
    | Ping
    | Ack
    | Crypto
    | Stream
    | ResetStream
    | StopSending
    | MaxData
    | MaxStreamData
    | MaxStreams
    | DataBlocked
    | StreamDataBlocked
    | StreamsBlocked
    | Datagram
    | NewCid
    | RetireCid
    | PathChallenge
    | PathResponse
    | NewToken
    | HandshakeDone
    | Close
)


def encode_ack(delay_us: int, ranges: Sequence[tuple[int, int]]) -> bytes:
    """An ACK of `ranges`: half-open, the highest first, at most 65 of them, none touching the next."""
    start, stop = ranges[0]
    more = len(ranges) - 1
    head = ACK_HEAD.pack(ACK, stop - 1, min(delay_us, 0xFFFFFFFF), stop - start, more)
    if not more:
        return head
    numbers: list[int] = []
    for low, high in ranges[1:]:
        numbers += (start - high, high - low)
        start = low
    return head + _PAIRS[more].pack(*numbers)


def parse_ack(data: bytes, pos: int = 0) -> tuple[int, list[tuple[int, int]], int]:
    """Reads the ACK whose type byte is at `pos`: (delay_us, ranges, end). Raises FrameEncodingError (R-5-1).

    Ranges are half-open, the highest first, as in the frame.
    """
    try:
        _, largest, delay_us, length, more = ACK_HEAD.unpack_from(data, pos)
        pos += ACK_HEAD_SIZE
        stop = largest + 1
        start = stop - length
        ranges = [(start, stop)]
        if more:
            if more > MAX_ACK_RANGES:
                raise FrameEncodingError(f"ACK with {more} ranges")
            numbers = _PAIRS[more].unpack_from(data, pos)
            pos += ACK_RANGE_SIZE * more
            for i in range(0, 2 * more, 2):
                gap, count = numbers[i], numbers[i + 1]
                if not gap or not count:
                    raise FrameEncodingError("ACK with an empty gap or range")
                stop = start - gap
                start = stop - count
                ranges.append((start, stop))
    except struct_error:
        raise FrameEncodingError("ACK cut short") from None
    if not length or start < 0:
        raise FrameEncodingError("ACK of packets that cannot be")
    return delay_us, ranges, pos


def _sized(data: bytes, pos: int, size: int) -> tuple[bytes, int]:
    end = pos + size
    if end > len(data):
        raise FrameEncodingError(f"wanted {size} bytes, found {len(data) - pos}")
    return data[pos:end], end


def _stream(data: bytes, pos: int, kind: int) -> tuple[Frame, int]:
    if kind < STREAM_LENGTH:
        _, stream, offset = STREAM_HEAD.unpack_from(data, pos)
        return Stream(stream, offset, data[pos + STREAM_HEAD_SIZE :], kind == STREAM_FIN), len(data)
    _, stream, offset, length = STREAM_LENGTH_HEAD.unpack_from(data, pos)
    chunk, end = _sized(data, pos + STREAM_LENGTH_HEAD_SIZE, length)
    return Stream(stream, offset, chunk, kind == STREAM_LENGTH_FIN), end


def _variable(data: bytes, pos: int, kind: int) -> tuple[Frame, int]:
    """The frames of variable length that are not STREAM."""
    if kind == ACK:
        delay_us, ranges, end = parse_ack(data, pos)
        return Ack(delay_us, ranges), end
    if kind == CRYPTO:
        _, offset, length = CRYPTO_HEAD.unpack_from(data, pos)
        chunk, end = _sized(data, pos + CRYPTO_HEAD.size, length)
        return Crypto(offset, chunk), end
    if kind == NEW_TOKEN:
        _, length = _U16.unpack_from(data, pos)
        if not length:
            raise FrameEncodingError("empty token")
        chunk, end = _sized(data, pos + _U16.size, length)
        return NewToken(chunk), end
    if kind == CLOSE:
        _, code, length = _CLOSE.unpack_from(data, pos)
        chunk, end = _sized(data, pos + _CLOSE.size, length)
        return Close(code, chunk.decode("utf-8", "replace")), end
    if kind == DATAGRAM:
        return Datagram(data[pos + 1 :]), len(data)
    return Padding(len(data) - pos), len(data)


_FIXED: Final[dict[int, tuple[Struct, type[Frame]]]] = {
    RESET_STREAM: (_RESET_STREAM, ResetStream),
    STOP_SENDING: (_STOP_SENDING, StopSending),
    MAX_DATA: (_U64, MaxData),
    MAX_STREAM_DATA: (_STREAM_U64, MaxStreamData),
    MAX_STREAMS: (_KIND_U32, MaxStreams),
    DATA_BLOCKED: (_U64, DataBlocked),
    STREAM_DATA_BLOCKED: (_STREAM_U64, StreamDataBlocked),
    STREAMS_BLOCKED: (_KIND_U32, StreamsBlocked),
    NEW_CID: (_NEW_CID, NewCid),
    RETIRE_CID: (_U32, RetireCid),
    PATH_CHALLENGE: (_PATH, PathChallenge),
    PATH_RESPONSE: (_PATH, PathResponse),
    HANDSHAKE_DONE: (_DONE, HandshakeDone),
    PING: (Struct("!B"), Ping),
}
_VARIABLE: Final = frozenset((PADDING, ACK, CRYPTO, DATAGRAM, NEW_TOKEN, CLOSE))


def decode_one(data: bytes, pos: int = 0) -> tuple[Frame, int]:
    """The frame whose type byte is at `pos` and the offset after it. Raises FrameEncodingError."""
    if pos >= len(data):
        raise FrameEncodingError("no frame")
    kind = data[pos]
    try:
        fixed = _FIXED.get(kind)
        if fixed is not None:
            layout, cls = fixed
            frame = cls(*layout.unpack_from(data, pos)[1:])
            if kind in (MAX_STREAMS, STREAMS_BLOCKED) and data[pos + 1] > UNIDIRECTIONAL:
                raise FrameEncodingError(f"stream kind {data[pos + 1]}")
            return frame, pos + layout.size
        if STREAM <= kind <= STREAM_LENGTH_FIN:
            return _stream(data, pos, kind)
        if kind in _VARIABLE:
            return _variable(data, pos, kind)
    except struct_error:
        raise FrameEncodingError(f"frame {kind:#04x} cut short") from None
    raise FrameEncodingError(f"unknown frame {kind:#04x}")


def decode(data: bytes) -> list[Frame]:
    """All frames of a packet; PADDING ends it. Raises FrameEncodingError, also for an empty packet (R-5-2)."""
    frame, pos = decode_one(data)
    found = [frame]
    while pos < len(data):
        frame, pos = decode_one(data, pos)
        found.append(frame)
    return found
