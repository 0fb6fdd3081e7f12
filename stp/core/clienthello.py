"""What a TLS ClientHello asks for, read from its bytes: the door on 8443 serves two protocols (protocol §11).

OpenSSL would tell by a Python callback, which needs memory that is writable and executable (R-4-11).

(1) Any bytes give None (more must come), the protocols offered, or FrameEncodingError. Nothing is kept between calls.
(2) At most MAX_CLIENT_HELLO bytes are looked at; a hybrid key share and its friends need a tenth of them.
"""

from __future__ import annotations

from typing import Final

from stp.core.errors import FrameEncodingError
from stp.core.wire import Reader

MAX_CLIENT_HELLO: Final = 16 * 1024
"""Bytes of TLS records."""
MAX_PIECES: Final = 16
"""Records that it may stand in: each call looks at all of them anew."""
_RECORD_HEAD: Final = 5
_HANDSHAKE: Final = 22
_MAX_RECORD: Final = 16 * 1024
_CLIENT_HELLO: Final = 1
_ALPN: Final = 16


def offered_protocols(data: bytes) -> list[bytes] | None:
    """The ALPN names that a ClientHello offers (RFC 8446 §4.1.2, RFC 7301 §3.1), [] without any; None: incomplete.

    Raises FrameEncodingError for what is no ClientHello.
    """
    message = _message(data)
    if message is None:
        return None
    reader = Reader(message)
    reader.take(2 + 32)  # legacy_version, random
    reader.take(reader.u8())  # session id
    reader.take(reader.u16())  # cipher suites
    reader.take(reader.u8())  # compression
    if not reader.remaining():
        return []
    extensions = Reader(reader.take(reader.u16()))
    reader.done()
    while extensions.remaining():
        kind, body = extensions.u16(), extensions.take(extensions.u16())
        if kind == _ALPN:
            return _names(body)
    return []


def _names(body: bytes) -> list[bytes]:
    reader = Reader(body)
    names = Reader(reader.take(reader.u16()))
    reader.done()
    found = []
    while names.remaining():
        found.append(names.take(names.u8()))
    return found


def _message(data: bytes) -> bytes | None:
    """The body of the ClientHello, which may stand in several records; None: incomplete."""
    body = b""
    pos = pieces = 0
    while len(data) - pos >= _RECORD_HEAD or (len(data) > pos and data[pos] != _HANDSHAKE):
        if data[pos] != _HANDSHAKE or data[pos + 1] != 3:
            raise FrameEncodingError("not a TLS handshake")
        length = int.from_bytes(data[pos + 3 : pos + _RECORD_HEAD], "big")
        if not 1 <= length <= _MAX_RECORD:
            raise FrameEncodingError(f"a TLS record of {length} bytes")
        body += data[pos + _RECORD_HEAD : pos + _RECORD_HEAD + length]
        if body and body[0] != _CLIENT_HELLO:
            raise FrameEncodingError("not a ClientHello")
        if len(body) >= 4:
            size = int.from_bytes(body[1:4], "big")
            if size > MAX_CLIENT_HELLO:
                raise FrameEncodingError(f"a ClientHello of {size} bytes")
            if len(body) >= 4 + size:
                return body[4 : 4 + size]
        pos += _RECORD_HEAD + length
        pieces += 1
        if pieces == MAX_PIECES or pos > 2 * MAX_CLIENT_HELLO:
            raise FrameEncodingError("a ClientHello in too many pieces")
    return None
