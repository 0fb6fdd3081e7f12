"""Two sessions joined in memory: what a link needs of a session, without packets, loss or keys.

Only for rules of the message layer alone; whatever depends on the network is tested on the simulator.
"""

from __future__ import annotations

from collections import deque
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, TypeVar, cast

from stp.batch import encode_batch, node_id
from stp.control import Hello
from stp.core import events
from stp.core.errors import ErrorCode
from stp.core.handshake import PeerIdentity
from stp.link import Link, LinkEvent, RecordReceived
from stp.records import VoidReason, encode_record, encode_void

if TYPE_CHECKING:
    from stp.core.session import Session

DOMAIN = "test.example"
TELEMETRY = 3
OTHER = b"o" * 16
E = TypeVar("E")
WINDOW = 512 * 1024


class JoinedSession:
    """One end. What is written can be read at the other end when `deliver` has moved it."""

    def __init__(self, node: str, *, dialling: bool) -> None:
        self.peer = PeerIdentity(DOMAIN, node, 1, datetime(2100, 1, 1, tzinfo=UTC))
        self.other: JoinedSession
        self.events: deque[events.Event] = deque([events.Connected(self.peer)])
        self.inbox: dict[int, bytearray] = {0: bytearray()}
        self.outbox: dict[int, bytearray] = {0: bytearray()}
        self.credit: dict[int, int] = {}
        self.sent: dict[int, int] = {}
        self.closed: tuple[ErrorCode, str] | None = None
        self.dialling = dialling
        self.patience: float | None = None
        self.ends: set[int] = set()
        self.stopped: set[int] = set()
        self.control_room = 256 * 1024
        self._next_stream = 2 if dialling else 3

    def next_event(self) -> events.Event | None:
        return self.events.popleft() if self.events else None

    def open_stream(self, *, weight: int = 16) -> int:
        stream = self._next_stream
        self._next_stream += 4
        self.outbox[stream] = bytearray()
        return stream

    def write(self, stream: int, data: bytes, fin: bool = False) -> None:
        self.outbox[stream] += data

    def room(self, stream: int) -> int:
        return self.control_room if stream == 0 else 1024 * 1024

    def unsent(self, stream: int) -> int:
        return len(self.outbox[stream])

    def read(self, stream: int) -> bytes:
        data = bytes(self.inbox[stream])
        self.inbox[stream].clear()
        return data

    def ended(self, stream: int) -> bool:
        return stream in self.ends

    def stop_stream(self, stream: int, code: int) -> None:
        self.stopped.add(stream)

    @property
    def live(self) -> bool:
        return self.closed is None

    def expect(self, within: float | None) -> None:
        self.patience = within

    def advance_credit(self, stream: int, taken: int) -> None:
        self.credit[stream] = max(taken, self.credit.get(stream, 0))

    def close(self, code: ErrorCode, reason: str = "", now: float = 0.0) -> None:
        if self.closed is None:
            self.closed = (code, reason)
            self.other.events.append(events.SessionClosed(code, reason, by_peer=True))

    def deliver(self, *streams: int) -> None:
        """Move what was written (on these streams, else on all) to the other end, within its credit."""
        for stream in streams or tuple(self.outbox):
            data = self.outbox[stream]
            if stream:
                limit = self.other.credit.get(stream, 0) + WINDOW - self.sent.get(stream, 0)
                data = data[:limit]
            if not data:
                continue
            self.sent[stream] = self.sent.get(stream, 0) + len(data)
            if stream not in self.other.inbox:
                self.other.inbox[stream] = bytearray()
                self.other.events.append(events.StreamOpened(stream))
            self.other.inbox[stream] += data
            del self.outbox[stream][: len(data)]
            self.other.events.append(events.StreamReadable(stream))


def joined(a: str = "device", b: str = "gateway") -> tuple[JoinedSession, JoinedSession]:
    """The sessions of nodes `a` and `b`; each one's peer is the other."""
    left, right = JoinedSession(b, dialling=True), JoinedSession(a, dialling=False)
    left.other, right.other = right, left
    return left, right


def hello(node: str, source: bytes, **fields: Any) -> Hello:
    return Hello(DOMAIN, node, source, 1, bytes(16), "test", **fields)


def link(session: JoinedSession, own: Hello, **options: Any) -> Link:
    return Link(cast("Session", session), own, wall_ms=lambda: 1_700_000_000_000, **options)


class Pair:
    """A device's link and a gateway's, both past HELLO.

    `at` collects the gateway's events, `back` the device's.
    """

    def __init__(self, **gateway_options: Any) -> None:
        self.source, self.store = b"d" * 16, b"g" * 16
        self.left, self.right = joined()
        self.device = link(self.left, hello("device", self.source))
        self.gateway = link(self.right, hello("gateway", self.store), **gateway_options)
        self.now = 0.0
        self.deaf = False
        """The device's link hears nothing more: for bytes that it never sent itself."""
        self.at: list[LinkEvent] = []
        self.back: list[LinkEvent] = []
        self.run()
        self.at.clear()
        self.back.clear()

    def run(self) -> list[LinkEvent]:
        """Move bytes until nothing moves; the gateway's new events."""
        before = len(self.at)
        for _ in range(6):
            self.at += self.gateway.process(self.now)
            if not self.deaf:
                self.back += self.device.process(self.now)
                self.right.deliver()
            self.left.deliver()
        return self.at[before:]

    def check(self) -> list[LinkEvent]:
        before = len(self.at)
        self.at += self.gateway.check(self.now)
        self.back += self.device.check(self.now)
        return self.at[before:] + self.run()


def batch(payload: bytes = b"21.5") -> bytes:
    publisher = node_id("test.example", "device")
    return encode_batch(
        ["plant/temp"], [payload], time_ms=1_700_000_000_000, publisher=publisher, run=1, sequence=1
    )


def record(source: bytes, number: int, payload: bytes = b"21.5", lane: int = TELEMETRY) -> bytes:
    return encode_record(lane, source, number, [batch(payload)])


def void(source: bytes, number: int, to: int) -> bytes:
    return encode_void(TELEMETRY, source, number, to, VoidReason.QUARANTINED, 1)


def of_type(found: list[LinkEvent], kind: type[E]) -> list[E]:
    return [event for event in found if isinstance(event, kind)]


def numbers(found: list[LinkEvent]) -> list[int]:
    return [event.head.number for event in of_type(found, RecordReceived)]
