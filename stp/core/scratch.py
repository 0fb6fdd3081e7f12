"""Where an endpoint seals and opens whole bursts: two buffers, and loops that run in C. Below the packetizer.

What a packet costs in Python is objects and bytecode. Here a burst is laid out by one call of `struct`, sealed or
opened in place packet by packet by `map`, and read by one call of `struct`: no slice, no joining, no bytecode per
packet.

(1) A scratch belongs to one endpoint and thus to one thread. What it holds is valid until its next call.
(2) It decides nothing: numbers, streams and offsets are the packetizer's, which goes packet by packet where something
    is out of the ordinary.
(3) Layouts are bounded: MAX_LAYOUTS, however many sizes a peer thinks up.
"""

from __future__ import annotations

from collections import deque
from itertools import repeat
from struct import Struct
from typing import Any, Final

from cryptography.exceptions import InvalidTag

from stp.core.frames import STREAM, STREAM_HEAD_SIZE
from stp.core.keys import Aead
from stp.core.packet import DATA_HEADER_LENGTH, DATA_OVERHEAD

MIN_BURST: Final = 4
"""Packets from which on a burst is worth its layout."""
MIN_SIZE: Final = 1000
"""Bytes of the smallest packets that are worth it."""
MAX_LAYOUTS: Final = 64
ROOM: Final = 65_536
"""Bytes of each buffer: no burst, and no receive buffer, is larger."""

_HEADER: Final = Struct("!BQQ").pack
_NONCE: Final = Struct("!IQ").pack
_LOW: Final = (1 << 64) - 1


class Layout:
    """How `count` packets of `size` bytes lie in a burst, and what is inside them if that is one stream's bytes."""

    __slots__ = ("chunks", "count", "fields", "headers", "piece", "plain", "plains", "size")

    def __init__(self, size: int, count: int) -> None:
        self.size, self.count = size, count
        self.plain = plain = size - DATA_OVERHEAD
        self.piece = piece = plain - STREAM_HEAD_SIZE
        self.headers = Struct("!" + f"BQQ{size - DATA_HEADER_LENGTH}x" * count)
        self.fields = Struct(f"{DATA_HEADER_LENGTH}s{size - DATA_HEADER_LENGTH}s" * count)
        self.plains = Struct("!" + f"BIQ{piece}s" * count)
        self.chunks = Struct(f"{piece}s" * count)


class Scratch:
    """Made with an endpoint."""

    __slots__ = ("_layouts", "_plain", "_views", "_wire")

    def __init__(self) -> None:
        self._wire = bytearray(ROOM)
        self._plain = bytearray(ROOM)
        self._layouts: dict[tuple[int, int], Layout] = {}
        self._views: dict[int, tuple[list[memoryview], list[memoryview], list[memoryview]]] = {}

    def layout(self, size: int, count: int) -> Layout:
        """`size` is at least MIN_SIZE, `size * count` at most ROOM."""
        found = self._layouts.get((size, count))
        if found is None:
            if len(self._layouts) >= MAX_LAYOUTS:
                self._layouts.clear()
                self._views.clear()
            found = self._layouts[size, count] = Layout(size, count)
        return found

    def _slices(self, size: int) -> tuple[list[memoryview], list[memoryview], list[memoryview]]:
        """Of each packet of `size` bytes: its header, its ciphertext, its plaintext."""
        found = self._views.get(size)
        if found is None:
            wire, plain, inner = memoryview(self._wire), memoryview(self._plain), size - DATA_OVERHEAD
            starts = range(0, ROOM - size + 1, size)
            found = self._views[size] = (
                [wire[at : at + DATA_HEADER_LENGTH] for at in starts],
                [wire[at + DATA_HEADER_LENGTH : at + size] for at in starts],
                [plain[n * inner : (n + 1) * inner] for n in range(len(starts))],
            )
        return found

    def seal(
        self,
        layout: Layout,
        aead: Aead,
        first_byte: int,
        cid: int,
        w: int,
        pn: int,
        stream: int,
        offset: int,
        data: bytes,
        index: int,
    ) -> memoryview | None:
        """`data` from `index` on in full packets that hold nothing else, the first with number `pn` (1).

        None where the installed `cryptography` cannot seal in place.
        """
        encrypt = getattr(aead.cipher(), "encrypt_into", None)
        if encrypt is None:
            return None
        count, numbers = layout.count, range(pn, pn + layout.count)
        fields: list[Any] = [first_byte, cid, 0] * count
        fields[2::3] = map(w.__xor__, numbers)
        layout.headers.pack_into(self._wire, 0, *fields)
        piece = layout.piece
        fields = [STREAM, stream, 0, 0] * count
        fields[2::4] = range(offset, offset + count * piece, piece)
        fields[3::4] = layout.chunks.unpack_from(data, index)
        layout.plains.pack_into(self._plain, 0, *fields)
        headers, sealed, plains = self._slices(layout.size)
        deque(map(encrypt, _nonces(aead, numbers), plains, headers, sealed), maxlen=0)
        return memoryview(self._wire)[: count * layout.size]

    def open(
        self, layout: Layout, aead: Aead, first_byte: int, cid: int, w: int, pn: int, data: bytes
    ) -> bool:
        """Open the full packets of `data` if they are `pn`, `pn` + 1, … to `cid`; `said` and `plaintext` read them.

        False if they are others, or one of them does not open: nothing is known of any of them then.
        """
        decrypt = getattr(aead.cipher(), "decrypt_into", None)
        if decrypt is None:
            return False
        numbers = range(pn, pn + layout.count)
        fields = layout.fields.unpack_from(data)
        headers = fields[::2]
        if headers != tuple(map(_HEADER, repeat(first_byte), repeat(cid), map(w.__xor__, numbers))):
            return False
        plains = self._slices(layout.size)[2]
        try:
            deque(map(decrypt, _nonces(aead, numbers), fields[1::2], headers, plains), maxlen=0)
        except InvalidTag:
            return False
        return True

    def said(self, layout: Layout) -> tuple[Any, ...]:
        """Of each packet that was opened, as if it held a STREAM frame: type, stream, offset, bytes; all in a row."""
        return layout.plains.unpack_from(self._plain)

    def one_stream(self, layout: Layout, said: tuple[Any, ...]) -> tuple[int, int, bytes] | None:
        """(stream, offset, bytes) if all of that is one stream's bytes in order; else None."""
        count, piece = layout.count, layout.piece
        stream, offset = said[1], said[2]
        if (
            said[::4] != (STREAM,) * count
            or said[1::4] != (stream,) * count
            or said[2::4] != tuple(range(offset, offset + count * piece, piece))
        ):
            return None
        return stream, offset, b"".join(said[3::4])

    def plaintext(self, layout: Layout, n: int) -> bytes:
        """Of the n-th packet that was opened."""
        return bytes(self._slices(layout.size)[2][n])


def _nonces(aead: Aead, numbers: range) -> map[bytes]:
    """`iv XOR pn` (R-2-2): a number has 64 bits, so that the first 4 of 12 bytes stay the same."""
    iv = aead.iv_int
    return map(_NONCE, repeat(iv >> 64), map((iv & _LOW).__xor__, numbers))
