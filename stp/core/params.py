"""Hello blobs and transport parameters (protocol §4).

TLVs `u8 type | u16 length | value` in strictly ascending order. Unknown types are ignored.
"""

from __future__ import annotations

from typing import Final

from attrs import define, field

from stp.core.errors import FrameEncodingError
from stp.core.packet import CID_LENGTH, VERSION
from stp.core.wire import Reader

MAX_HELLO: Final = 1024
"""Bytes of a hello blob (R-4-1)."""
MIN_MAX_DATAGRAM: Final = 1200
"""A peer that cannot take this much is no peer of ours (protocol §6)."""
MAX_ACK_DELAY_LIMIT: Final = 1 << 14
"""Milliseconds (RFC 9000 §18.2)."""

_VERSIONS, _ORIGINAL_DCID, _CID, _RETRY_SCID, _PARAMETERS = 1, 2, 3, 4, 5
_LISTENER_NAME, _DIALLER_NAME = 6, 7
_REQUIRED: Final = frozenset((_VERSIONS, _ORIGINAL_DCID, _CID, _RETRY_SCID, _PARAMETERS))


def parse_tlvs(data: bytes) -> dict[int, bytes]:
    """Raises FrameEncodingError for what is cut, repeated or out of order (R-4-2)."""
    reader = Reader(data)
    found: dict[int, bytes] = {}
    last = -1
    while reader.remaining():
        kind = reader.u8()
        if kind <= last:
            raise FrameEncodingError(f"type {kind} after type {last}")
        found[kind] = reader.take(reader.u16())
        last = kind
    return found


def encode_tlvs(values: dict[int, bytes]) -> bytes:
    return b"".join(bytes((k,)) + len(v).to_bytes(2, "big") + v for k, v in sorted(values.items()))


def _number(values: dict[int, bytes], kind: int, size: int, default: int) -> int:
    raw = values.get(kind)
    if raw is None:
        return default
    if len(raw) != size:
        raise FrameEncodingError(f"transport parameter {kind} has {len(raw)} bytes, not {size}")
    return int.from_bytes(raw, "big")


@define
class TransportParameters:
    """What a side is ready to receive."""

    max_datagram: int = 1472
    """Bytes of UDP payload."""
    max_ack_delay_ms: int = 25
    max_streams_bidi: int = 100
    max_streams_uni: int = 100

    def encode(self) -> bytes:
        return encode_tlvs(
            {
                1: self.max_datagram.to_bytes(2, "big"),
                2: self.max_ack_delay_ms.to_bytes(2, "big"),
                3: self.max_streams_bidi.to_bytes(4, "big"),
                4: self.max_streams_uni.to_bytes(4, "big"),
            }
        )

    @classmethod
    def decode(cls, data: bytes) -> TransportParameters:
        """Raises FrameEncodingError, also for values that no peer may ask for."""
        values = parse_tlvs(data)
        found = cls(
            max_datagram=_number(values, 1, 2, 1472),
            max_ack_delay_ms=_number(values, 2, 2, 25),
            max_streams_bidi=_number(values, 3, 4, 100),
            max_streams_uni=_number(values, 4, 4, 100),
        )
        if found.max_datagram < MIN_MAX_DATAGRAM:
            raise FrameEncodingError(f"max_datagram {found.max_datagram} is below {MIN_MAX_DATAGRAM}")
        if found.max_ack_delay_ms >= MAX_ACK_DELAY_LIMIT:
            raise FrameEncodingError(f"max_ack_delay {found.max_ack_delay_ms} ms is too long")
        return found


@define
class TransportHello:
    """The hello of the handshake, before any TLS byte. Not the HELLO record of protocol §10 (R-2-8)."""

    original_dcid: bytes
    cid: bytes
    retry_scid: bytes = b""
    parameters: TransportParameters = field(factory=TransportParameters)
    versions: tuple[int, ...] = (VERSION,)
    """Chosen one first."""
    names: tuple[str, str] | None = None
    """From the listener of a Unix socket: what it is called and what it calls the other, `stp://domain/node` each."""

    def encode(self) -> bytes:
        values = {
            _VERSIONS: b"".join(v.to_bytes(4, "big") for v in self.versions),
            _ORIGINAL_DCID: self.original_dcid,
            _CID: self.cid,
            _RETRY_SCID: self.retry_scid,
            _PARAMETERS: self.parameters.encode(),
        }
        if self.names is not None:
            values[_LISTENER_NAME], values[_DIALLER_NAME] = (name.encode() for name in self.names)
        return encode_tlvs(values)

    @classmethod
    def decode(cls, data: bytes) -> TransportHello:
        """Raises FrameEncodingError. Whether the echoes are right is the handshake's to judge (R-4-3)."""
        if len(data) > MAX_HELLO:
            raise FrameEncodingError(f"hello of {len(data)} bytes, at most {MAX_HELLO}")
        values = parse_tlvs(data)
        missing = _REQUIRED - values.keys()
        if missing:
            raise FrameEncodingError(f"hello without type {min(missing)}")
        versions = values[_VERSIONS]
        if not versions or len(versions) % 4:
            raise FrameEncodingError("version list is not a list of u32")
        if len(values[_ORIGINAL_DCID]) != CID_LENGTH or len(values[_CID]) != CID_LENGTH:
            raise FrameEncodingError("connection id is not 8 bytes")
        if len(values[_RETRY_SCID]) not in (0, CID_LENGTH):
            raise FrameEncodingError("retry connection id is not 0 or 8 bytes")
        return cls(
            original_dcid=values[_ORIGINAL_DCID],
            cid=values[_CID],
            retry_scid=values[_RETRY_SCID],
            parameters=TransportParameters.decode(values[_PARAMETERS]),
            versions=tuple(int.from_bytes(versions[i : i + 4], "big") for i in range(0, len(versions), 4)),
            names=_names(values),
        )


def _names(values: dict[int, bytes]) -> tuple[str, str] | None:
    if _LISTENER_NAME not in values or _DIALLER_NAME not in values:
        return None
    try:
        return values[_LISTENER_NAME].decode(), values[_DIALLER_NAME].decode()
    except UnicodeDecodeError:
        raise FrameEncodingError("a name that is not UTF-8") from None
