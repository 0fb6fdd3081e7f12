"""Units, `u32 length | frames`: how frames stand in a stream (protocol §11).

(1) A length is judged when its four bytes are there: 1 to MAX_UNIT, else PROTOCOL. At most that much is held.
(2) A started unit grows by MIN_PROGRESS bytes, or is complete, in every UNIT_TIMEOUT: `due` says by when.
"""

from __future__ import annotations

from typing import Final

from stp.core.errors import FrameEncodingError

MAX_UNIT: Final = 65_536
"""Bytes of frames in one unit (R-11-1)."""
UNIT_HEAD: Final = 4
UNIT_TIMEOUT: Final = 5.0
"""Seconds (R-11-3)."""
MIN_PROGRESS: Final = 4096
"""Bytes: what a link of 6.5 kbit/s carries in UNIT_TIMEOUT."""


def encode_unit(frames: list[bytes]) -> bytes:
    body = b"".join(frames)
    return len(body).to_bytes(UNIT_HEAD, "big") + body


class UnitReader:
    """Cuts a stream of bytes into the frames of its units."""

    __slots__ = ("_mark", "_partial", "due")

    def __init__(self) -> None:
        self._partial = bytearray()
        self._mark = 0
        self.due: float | None = None
        """When the started unit must have grown; None: none is started."""

    def feed(self, data: bytes, now: float) -> list[bytes]:
        """The units that `data` completes. Raises FrameEncodingError (1)."""
        partial = self._partial
        if partial:
            partial += data
            if len(partial) < UNIT_HEAD or len(partial) < UNIT_HEAD + _length(partial, 0):
                self._note(now)
                return []
            data = bytes(partial)
            partial.clear()
        found = []
        pos, end = 0, len(data)
        while end - pos >= UNIT_HEAD:
            stop = pos + UNIT_HEAD + _length(data, pos)
            if stop > end:
                break
            found.append(data[pos + UNIT_HEAD : stop])
            pos = stop
        self.due = None
        if pos < end:
            partial += data[pos:]
            self._mark = 0
            self._note(now)
        return found

    def _note(self, now: float) -> None:
        """Something of a unit came (2)."""
        if self.due is None:
            self.due, self._mark = now + UNIT_TIMEOUT, 0
        elif len(self._partial) - self._mark >= MIN_PROGRESS:
            self.due, self._mark = now + UNIT_TIMEOUT, len(self._partial)


def _length(data: bytes | bytearray, pos: int) -> int:
    length = int.from_bytes(data[pos : pos + UNIT_HEAD], "big")
    if not 1 <= length <= MAX_UNIT:
        raise FrameEncodingError(f"a unit of {length} bytes, 1 to {MAX_UNIT} are allowed")
    return length
