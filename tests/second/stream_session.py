"""§11: a session over TLS on TCP, on the client's side. Frames and streams are those of every session."""

from __future__ import annotations

import os
import select
import socket
import time
from collections import deque

from tests.second import frames as f
from tests.second.hello import Malformed, make_hello, read_hello
from tests.second.keys import context_hash, expand
from tests.second.streams import Closed, Streams
from tests.second.tls import Bundle, Tls

MAX_UNIT = 65_536
WRITE = 16 * 1024
"""Bytes of one write (R-11-2)."""
NEVER = {f.ACK, f.CRYPTO, f.NEW_CID, f.RETIRE_CID, f.NEW_TOKEN}
"""Frames that are PROTOCOL here, beside PADDING (R-11-1)."""


class StreamSession:
    """The verbs are those of `session.Session`."""

    def __init__(self, bundle: Bundle, address: tuple[str, int]) -> None:
        self.bundle = bundle
        self._socket = socket.create_connection(address, timeout=10.0)
        self._tls = Tls(bundle, alpn=b"stp/1")
        self._queue: deque[bytes] = deque()
        self._out = bytearray()
        self._plain = bytearray()
        self.streams = Streams(self._queue)
        self._hello = make_hello(os.urandom(8), os.urandom(8))
        self._their_hello = b""
        self.id = b""
        self.connected = False

    def connect(self, timeout: float = 10.0) -> None:
        """Until HANDSHAKE_DONE. Raises Closed, SSL.Error or TimeoutError."""
        deadline = time.monotonic() + timeout
        while not self.connected:
            if time.monotonic() > deadline:
                raise TimeoutError("handshake")
            self.step(deadline - time.monotonic())

    def step(self, timeout: float) -> None:
        """Send what may be sent, wait for bytes or time, take them in. Raises Closed."""
        while self.connected and self.streams.fill(WRITE - 64):
            frame = self._queue.popleft()
            self._tls.write(len(frame).to_bytes(4, "big") + frame)
        self._out += self._tls.output()
        readable, writable, _ = select.select(
            [self._socket], [self._socket] if self._out else [], [], max(0.0, timeout)
        )
        if writable:
            del self._out[: self._socket.send(self._out[:WRITE])]
        if readable:
            data = self._socket.recv(65536)
            if not data:
                raise Closed(-1, "the connection ended")
            self._receive(data)

    def _receive(self, data: bytes) -> None:
        was_done = self._tls.done
        self._tls.feed(data)
        if not self._tls.done:
            return
        if not was_done:  # our Finished is made and has not left: now or never (R-4-8)
            if self._tls.peer != (self.bundle.domain, self.bundle.upstream_node):
                raise Closed(0x20, f"this is {self._tls.peer}, not {self.bundle.upstream_node}")
            self._tls.write(len(self._hello).to_bytes(2, "big") + self._hello)
        self._plain += self._tls.read()
        if not self._their_hello and not self._take_hello():
            return
        while len(self._plain) >= 4:
            size = int.from_bytes(self._plain[:4], "big")
            if not 1 <= size <= MAX_UNIT:
                raise Malformed("unit")
            if len(self._plain) < 4 + size:
                break
            unit = bytes(self._plain[4 : 4 + size])
            del self._plain[: 4 + size]
            for frame in f.read(unit):
                self._on_frame(frame)

    def _take_hello(self) -> bool:
        size = int.from_bytes(self._plain[:2], "big")
        if len(self._plain) < 2 or len(self._plain) < 2 + size:
            return False
        self._their_hello = bytes(self._plain[2 : 2 + size])
        del self._plain[: 2 + size]
        ours, theirs = read_hello(self._hello), read_hello(self._their_hello)
        if theirs[2] != ours[2] or theirs[4]:
            raise Malformed("the echoes differ")
        context = context_hash(self._hello, self._their_hello, *self._tls.leaves())
        self.id = expand(self._tls.export(context), "sid", 16)
        return True

    def _on_frame(self, frame: f.Frame) -> None:
        if frame[0] in NEVER:
            raise Malformed("a frame that has no place on TLS")
        if not self.connected and frame[0] not in (f.HANDSHAKE_DONE, f.CLOSE):
            raise Malformed("HANDSHAKE_DONE comes first")
        self.connected |= frame[0] == f.HANDSHAKE_DONE
        self.streams.on_frame(frame)

    def close(self, code: int = 0, reason: str = "") -> None:
        """Say CLOSE, and end."""
        frame = f.write(f.CLOSE, code, reason.encode())
        self._tls.write(len(frame).to_bytes(4, "big") + frame)
        self._socket.settimeout(1.0)
        self._socket.sendall(bytes(self._out) + self._tls.output())
        self.abandon()

    def abandon(self) -> None:
        self._socket.close()
