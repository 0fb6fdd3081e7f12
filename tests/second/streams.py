"""§5, §7: streams and their credit, the same on every carrier."""

from __future__ import annotations

from collections import deque

from tests.second import frames as f
from tests.second.hello import Malformed

CONTROL_WINDOW, STREAM_WINDOW, SESSION_WINDOW = 64 * 1024, 512 * 1024, 2 * 1024 * 1024
"""§7."""


class Closed(Exception):
    """The session is over: code and reason of the peer, or of the text."""

    def __init__(self, code: int, reason: str = "") -> None:
        super().__init__(f"{code:#x} {reason}")
        self.code, self.reason = code, reason


class Incoming:
    """Ordered bytes of one stream."""

    def __init__(self, window: int = 0) -> None:
        self.offset = 0
        self.granted = self.window = window
        self._ahead: dict[int, bytes] = {}
        self.buffer = bytearray()

    def add(self, offset: int, data: bytes) -> None:
        if self.window and offset + len(data) > self.granted:
            raise Malformed("FLOW")
        if len(data) >= len(self._ahead.get(offset, b"")):
            self._ahead[offset] = data
        for at in sorted(self._ahead):
            if at > self.offset:
                break
            fresh = self._ahead.pop(at)[self.offset - at :]
            self.buffer += fresh
            self.offset += len(fresh)


class Outgoing:
    """Bytes of one stream that wait for room and credit."""

    def __init__(self, limit: int) -> None:
        self.offset = 0
        self.limit = limit
        self.buffer = bytearray()


class Streams:
    """All streams of a session, on the dialling side. Frames to be sent go to `queue`."""

    def __init__(self, queue: deque[bytes]) -> None:
        self._queue = queue
        self._outgoing = {0: Outgoing(CONTROL_WINDOW)}
        self.incoming = {0: Incoming(CONTROL_WINDOW)}
        self._session_limit, self._session_sent = SESSION_WINDOW, 0
        self._session_granted = SESSION_WINDOW
        self._next_stream = 2

    def open_stream(self) -> int:
        """A unidirectional one (R-5-3)."""
        stream = self._next_stream
        self._next_stream += 4
        self._outgoing[stream] = Outgoing(STREAM_WINDOW)
        return stream

    def write(self, stream: int, data: bytes) -> None:
        self._outgoing[stream].buffer += data

    def take(self, stream: int, size: int) -> bytes:
        """Bytes that the message layer is done with; credit follows (R-7-3)."""
        incoming = self.incoming[stream]
        taken = bytes(incoming.buffer[:size])
        del incoming.buffer[:size]
        if incoming.offset + incoming.window > incoming.granted + incoming.window // 2:
            incoming.granted = incoming.offset + incoming.window
            self._queue.append(f.write(f.MAX_STREAM_DATA, stream, incoming.granted))
        total = sum(other.offset for number, other in self.incoming.items() if number)
        if total + SESSION_WINDOW > self._session_granted + SESSION_WINDOW // 2:
            self._session_granted = total + SESSION_WINDOW
            self._queue.append(f.write(f.MAX_DATA, self._session_granted))
        return taken

    @property
    def waiting(self) -> bool:
        return any(stream.buffer for stream in self._outgoing.values())

    def fill(self, room: int) -> bool:
        """Move at most *room* stream bytes that have credit into a frame; whether a frame waits."""
        for number, stream in self._outgoing.items():
            if self._queue:
                break
            size = min(len(stream.buffer), stream.limit - stream.offset, room)
            if number:
                size = min(size, self._session_limit - self._session_sent)
                self._session_sent += max(0, size)
            if size > 0:
                self._queue.append(f.write(f.STREAM, number, stream.offset, bytes(stream.buffer[:size])))
                stream.offset += size
                del stream.buffer[:size]
        return bool(self._queue)

    def on_frame(self, frame: f.Frame) -> None:
        """What concerns streams and is the same everywhere; other frames are passed over. Raises Closed."""
        kind, *fields = frame
        if kind in (f.STREAM, f.STREAM_REST):
            number, offset, data = fields
            if number not in self.incoming:
                if number & 3 != 3:
                    raise Malformed("a stream that a server does not open for us")
                self.incoming[number] = Incoming(STREAM_WINDOW)
            self.incoming[number].add(offset, data)
        elif kind == f.MAX_DATA:
            self._session_limit = max(self._session_limit, fields[0])
        elif kind == f.MAX_STREAM_DATA:
            stream = self._outgoing[fields[0]]
            stream.limit = max(stream.limit, fields[1])
        elif kind == f.PATH_CHALLENGE:
            self._queue.append(f.write(f.PATH_RESPONSE, fields[0]))
        elif kind == f.CLOSE:
            raise Closed(fields[0], fields[1].decode())
