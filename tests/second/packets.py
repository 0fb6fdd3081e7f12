"""§2: the forms of a packet."""

from __future__ import annotations

import hmac
import struct
from collections.abc import Iterable
from typing import NamedTuple

from tests.second.keys import VERSION, Aead, Direction

INIT, RETRY = 0xC0, 0xE0
MINIMUM = 1200
"""Bytes of a client's INIT datagram (R-4-13)."""
TAG = 16


class Init(NamedTuple):
    dcid: bytes
    scid: bytes
    token: bytes
    number: int
    header: bytes
    sealed: bytes


class Retry(NamedTuple):
    dcid: bytes
    scid: bytes
    token: bytes
    covered: bytes
    tag: bytes


def seal_init(keys: Aead, dcid: bytes, scid: bytes, token: bytes, number: int, frames: bytes) -> bytes:
    header = (
        struct.pack(">BI8s8sH", INIT, VERSION, dcid, scid, len(token)) + token + number.to_bytes(4, "big")
    )
    return header + keys.seal(number, header, frames)


def padding(token: bytes, frames: bytes) -> bytes:
    """Zeros that bring an INIT of these frames to 1,200 bytes."""
    return bytes(max(0, MINIMUM - (1 + 4 + 8 + 8 + 2 + len(token) + 4) - len(frames) - TAG))


def read_long(datagram: bytes) -> Init | Retry | None:
    """None for what is too short or of another version (R-2-7)."""
    if len(datagram) < 21 + TAG or int.from_bytes(datagram[1:5], "big") != VERSION:
        return None
    dcid, scid = datagram[5:13], datagram[13:21]
    if datagram[0] == RETRY:
        return Retry(dcid, scid, datagram[21:-TAG], datagram[:-TAG], datagram[-TAG:])
    if datagram[0] != INIT:
        return None
    start = 23 + int.from_bytes(datagram[21:23], "big")
    if len(datagram) < start + 4 + TAG:
        return None
    number = int.from_bytes(datagram[start : start + 4], "big")
    return Init(dcid, scid, datagram[23:start], number, datagram[: start + 4], datagram[start + 4 :])


def seal_data(keys: Direction, cid: bytes, number: int, frames: bytes) -> bytes:
    header = struct.pack(">B8sQ", 0x40 | keys.phase, cid, number ^ keys.whitening(cid))
    return header + keys.current.seal(number, header, frames)


class Data(NamedTuple):
    phase: int
    cid: bytes
    number: int
    header: bytes
    sealed: bytes


def read_data(keys: Direction, datagram: bytes) -> Data | None:
    """The header of a DATA packet, its number un-whitened; None where it is not one."""
    if len(datagram) < 17 + TAG or datagram[0] & 0xFE != 0x40:
        return None
    cid, wire = datagram[1:9], int.from_bytes(datagram[9:17], "big")
    return Data(datagram[0] & 1, cid, wire ^ keys.whitening(cid), datagram[:17], datagram[17:])


def listener_cid(key: bytes, instance: int, random: bytes) -> bytes:
    """R-8-1. A client has no use for it; it shows that the text says how."""
    head = bytes([instance]) + random
    return head + hmac.digest(key, head, "sha256")[:3]


def reset_token(key: bytes, cid: bytes) -> bytes:
    """R-8-4."""
    return hmac.digest(key, cid, "sha256")[:16]


def may_be_reset(datagram: bytes, tokens: Iterable[bytes]) -> bool:
    """R-8-5, once the AEAD failed: the last 16 bytes are one of the peer's tokens."""
    return len(datagram) >= 21 and any(hmac.compare_digest(datagram[-16:], token) for token in tokens)
