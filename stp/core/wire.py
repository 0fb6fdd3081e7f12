"""The one door for untrusted bytes.

Every read is checked against what is left; whatever comes, the only exception is `FrameEncodingError`.
"""

from __future__ import annotations

from stp.core.errors import FrameEncodingError


class Reader:
    """Reads big-endian fixed-width fields (protocol §1) from the front of `data`."""

    __slots__ = ("_data", "_pos")

    def __init__(self, data: bytes, pos: int = 0) -> None:
        self._data = data
        self._pos = pos

    @property
    def pos(self) -> int:
        """Offset of the next byte."""
        return self._pos

    def take(self, size: int) -> bytes:
        """The next `size` bytes."""
        chunk = self._data[self._pos : self._pos + size]
        if len(chunk) != size:
            raise FrameEncodingError(f"wanted {size} bytes, found {len(chunk)}")
        self._pos += size
        return chunk

    def u8(self) -> int:
        return self.take(1)[0]

    def u16(self) -> int:
        return int.from_bytes(self.take(2), "big")

    def u32(self) -> int:
        return int.from_bytes(self.take(4), "big")

    def u64(self) -> int:
        return int.from_bytes(self.take(8), "big")

    def rest(self) -> bytes:
        """Everything that is left; possibly nothing."""
        chunk = self._data[self._pos :]
        self._pos = len(self._data)
        return chunk

    def remaining(self) -> int:
        """Bytes not read yet."""
        return len(self._data) - self._pos

    def done(self) -> None:
        """Raise FrameEncodingError if bytes are left over."""
        if self._pos != len(self._data):
            raise FrameEncodingError(f"{self.remaining()} bytes too many")
