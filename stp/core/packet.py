"""Packet headers (protocol §2) and the tokens in them (§4, §8).

(1) Nothing here answers: a datagram is a packet of ours or raises `PacketError`.
(2) Parsing costs a few slices; whether a packet is genuine is for the AEAD or the tag to say.
"""

from __future__ import annotations

import hmac
from hashlib import sha256
from struct import Struct
from typing import Final

from attrs import define

from stp.core.errors import PacketError

VERSION: Final = 0x53545001
VERSION_BYTES: Final = VERSION.to_bytes(4, "big")
CID_LENGTH: Final = 8
TAG_LENGTH: Final = 16
"""Bytes that every AEAD of ours adds; also the length of a Retry tag and of a reset token."""

FORM_MASK: Final = 0xC0
LONG_FORM: Final = 0xC0  # the top two bits; 0b10 is unused
SHORT_FORM: Final = 0x40
INIT_BYTE: Final = 0xC0
RETRY_BYTE: Final = 0xE0
DATA_BYTE: Final = 0x40
"""First byte of a DATA packet; bit 0 is the key phase."""
PHASE_BIT: Final = 0x01

DATA_HEADER: Final = Struct("!B8sQ")  # first byte, CID, wire_pn
DATA_HEADER_LENGTH: Final = DATA_HEADER.size
DATA_OVERHEAD: Final = DATA_HEADER_LENGTH + TAG_LENGTH
"""Bytes around the frames of a DATA packet: 33."""

INIT_DATAGRAM: Final = 1200
"""Bytes: every client INIT is padded to it, shorter ones are dropped (protocol §4, R-4-13)."""
MAX_TOKEN: Final = 256  # R-4-14
MIN_RESET: Final = 21
MAX_PN: Final = (1 << 62) - 1
PN_WINDOW: Final = 8192
"""Packet numbers below the highest that the replay window still tells apart."""
WHITEN_MASK: Final = (1 << 62) - 1
"""`w` has its top two bits clear."""

_INIT_FIXED: Final = Struct("!BI8s8sH")
_INIT_MIN: Final = _INIT_FIXED.size + 4 + TAG_LENGTH
_RETRY_MIN: Final = 1 + 4 + 16 + 1 + TAG_LENGTH


@define
class InitPacket:
    """An INIT as received, not opened yet."""

    dcid: bytes
    scid: bytes
    token: bytes
    pn: int
    aad: bytes
    sealed: bytes


@define
class RetryPacket:
    """A RETRY as received, its tag not checked yet."""

    dcid: bytes
    scid: bytes
    token: bytes
    body: bytes
    tag: bytes


def is_data(data: bytes | memoryview) -> bool:
    """Whether the first byte says DATA (or RESET, which looks the same)."""
    return len(data) > 0 and data[0] & FORM_MASK == SHORT_FORM


def init_header(dcid: bytes, scid: bytes, token: bytes, pn: int) -> bytes:
    """The header of an INIT: also its AAD."""
    return _INIT_FIXED.pack(INIT_BYTE, VERSION, dcid, scid, len(token)) + token + pn.to_bytes(4, "big")


def init_overhead(token: bytes) -> int:
    """Bytes around the frames of an INIT with this token."""
    return _INIT_MIN + len(token)


def parse_init(data: bytes) -> InitPacket:
    """Raises PacketError for anything that is not an INIT of our version (R-2-1)."""
    if len(data) < _INIT_MIN or data[0] != INIT_BYTE:
        raise PacketError("not an INIT")
    _, version, dcid, scid, token_length = _INIT_FIXED.unpack_from(data)
    if version != VERSION:
        raise PacketError("another version")
    start = _INIT_FIXED.size + token_length
    if token_length > MAX_TOKEN or len(data) < start + 4 + TAG_LENGTH:
        raise PacketError("INIT cut short")
    return InitPacket(
        dcid=dcid,
        scid=scid,
        token=data[_INIT_FIXED.size : start],
        pn=int.from_bytes(data[start : start + 4], "big"),
        aad=data[: start + 4],
        sealed=data[start + 4 :],
    )


def retry_tag(retry_key: bytes, original_dcid: bytes, body: bytes) -> bytes:
    """Protocol §4: HMAC over the DCID that provoked the Retry and the packet before the tag (R-4-16)."""
    return hmac.digest(retry_key, original_dcid + body, "sha256")[:TAG_LENGTH]


def build_retry(client_scid: bytes, new_cid: bytes, token: bytes, retry_key: bytes, odcid: bytes) -> bytes:
    """`token` is 1..256 bytes."""
    body = b"\xe0" + VERSION_BYTES + client_scid + new_cid + token
    return body + retry_tag(retry_key, odcid, body)


def parse_retry(data: bytes) -> RetryPacket:
    """Raises PacketError; the tag is still to be verified with `retry_is_genuine`."""
    if len(data) < _RETRY_MIN or data[0] != RETRY_BYTE or data[1:5] != VERSION_BYTES:
        raise PacketError("not a RETRY")
    token = data[21:-TAG_LENGTH]
    if len(token) > MAX_TOKEN:
        raise PacketError("token too long")
    return RetryPacket(
        dcid=data[5:13], scid=data[13:21], token=token, body=data[:-TAG_LENGTH], tag=data[-TAG_LENGTH:]
    )


def retry_is_genuine(packet: RetryPacket, retry_key: bytes, original_dcid: bytes) -> bool:
    return hmac.compare_digest(packet.tag, retry_tag(retry_key, original_dcid, packet.body))


def data_header(phase: int, cid: bytes, wire_pn: int) -> bytes:
    """The header of a DATA packet: also its AAD."""
    return DATA_HEADER.pack(DATA_BYTE | phase, cid, wire_pn)


def parse_data_header(data: bytes) -> tuple[int, bytes, int]:
    """(key phase, CID, wire_pn). Raises PacketError (R-2-1)."""
    if len(data) < DATA_OVERHEAD + 1 or data[0] & FORM_MASK != SHORT_FORM:
        raise PacketError("not a DATA packet")
    first, cid, wire_pn = DATA_HEADER.unpack_from(data)
    return first & 1, cid, wire_pn


def build_reset(token: bytes, provoked_by: int, random: bytes) -> bytes | None:
    """A RESET (protocol §2): at least 21 bytes and shorter than the `provoked_by` bytes that drew it (R-2-9).

    `random` gives the bytes in front of the token, five at least; the datagram takes as many as fit.
    None: what provoked it is too short to be answered.
    """
    room = min(len(random), provoked_by - 1 - TAG_LENGTH)
    if room < MIN_RESET - TAG_LENGTH:
        return None
    return bytes((DATA_BYTE | (random[0] & 0x0F),)) + random[1:room] + token


def reset_token(reset_key: bytes, cid: bytes) -> bytes:
    """Protocol §8 (R-8-4)."""
    return hmac.digest(reset_key, cid, "sha256")[:TAG_LENGTH]


def make_cid(cid_key: bytes, instance: int, random: bytes) -> bytes:
    """A listener's CID (protocol §8): `random` is 4 bytes (R-8-1)."""
    body = bytes((instance,)) + random
    return body + hmac.digest(cid_key, body, "sha256")[:3]


def cid_is_ours(cid_key: bytes, instance: int, cid: bytes) -> bool:
    """Whether this very instance issued it (R-8-3)."""
    return cid[0] == instance and hmac.compare_digest(hmac.digest(cid_key, cid[:5], "sha256")[:3], cid[5:])


def whitener(pn_key: bytes, cid: bytes) -> int:
    """`w` of protocol §2; `pn_key` = Expand(x_0, "pn", 32) of the sender (R-2-3)."""
    return int.from_bytes(hmac.digest(pn_key, cid, sha256)[:8], "big") & WHITEN_MASK
