"""What the owner of a session may ask of it, whatever carries it (protocol §5, §7, §11).

`session.Session` carries its streams in datagrams, `framed.FramedSession` in a stream of bytes. Links, relays and
whoever else works with messages name AnySession and no other.
"""

from __future__ import annotations

from typing import Any, Final

from stp.core.errors import ErrorCode, ProtocolError, UsageError
from stp.core.events import DatagramReceived, Event, SessionStatistics, StreamReadable
from stp.core.handshake import PeerIdentity
from stp.core.states import LIVE, Agenda, State
from stp.core.streams import DEFAULT_WEIGHT
from stp.core.streamset import StreamSet
from stp.core.unreliable import Datagrams

MAX_EVENTS: Final = 1024
"""Unfetched events above which a session closes with LIMIT: its owner has gone or the peer floods."""


class AnySession:
    """One association of two nodes: its streams, its events, its end."""

    __slots__ = (
        "_agenda",
        "_announced",
        "_counts",
        "_datagrams",
        "_events",
        "_now",
        "_streams",
        "app",
        "dialling",
        "id",
        "in_ready",
        "in_to_send",
        "peer",
        "state",
        "suite",
    )

    def __init__(self, agenda: Agenda[Any], streams: StreamSet, *, dialling: bool, now: float) -> None:
        self._agenda = agenda
        self.dialling = dialling
        self.state = State.HANDSHAKE
        self.id: bytes | None = None
        """16 bytes, the same on both sides; None before the keys."""
        self.suite = ""
        """The TLS suite whose AEAD protects the session; "" before the keys, and on a Unix socket."""
        self.peer: PeerIdentity | None = None
        self.app: Any = None
        """The owner's; never looked into."""
        self.in_ready = False
        self.in_to_send = False
        self._streams = streams
        self._datagrams: Datagrams | None = None
        self._events: list[Event] = []
        self._announced: dict[int, None] = {}  # empty ones take a third of an empty set
        self._counts = SessionStatistics()
        self._now = now

    # -- what carriers differ in

    @property
    def carrier(self) -> str:
        """ "udp", "tls" or "unix"."""
        raise NotImplementedError

    @property
    def addr(self) -> Any:
        """Where the peer is, in the carrier's words."""
        raise NotImplementedError

    @property
    def max_datagram_size(self) -> int:
        """Bytes that `send_datagram` takes: what one packet holds. It may change while the session lives."""
        raise NotImplementedError

    def expect(self, seconds: float | None) -> None:
        """The owner waits for the peer: ping after that much silence, then ever later; None: as when idle."""
        raise NotImplementedError

    def statistics(self) -> SessionStatistics:
        """A snapshot."""
        raise NotImplementedError

    def _rtt(self) -> float:
        """Seconds, smoothed; 0.0 while nothing is known."""
        raise NotImplementedError

    def _close(self, code: ErrorCode, reason: str, now: float) -> None:
        raise NotImplementedError

    # -- the owner's verbs

    @property
    def live(self) -> bool:
        return self.state in LIVE

    def open_stream(self, *, weight: int = DEFAULT_WEIGHT, bidirectional: bool = False) -> int:
        """A new stream of ours. Raises UsageError: the session is over, or the peer allows no more."""
        self._must_live()
        return self._streams.open(weight, bidirectional=bidirectional)

    def write(self, stream: int, data: bytes, fin: bool = False) -> None:
        """Queue bytes; `data` is kept, not copied. Keep to `room`. Raises UsageError if it is not open."""
        self._must_live()
        self._streams.write(stream, data, fin)
        self.want_to_send()

    def room(self, stream: int) -> int:
        """Bytes that the send buffer still takes; 0 for a stream that is not open."""
        sender = self._streams.send.get(stream)
        return sender.room() if sender is not None and self.state in LIVE else 0

    def unsent(self, stream: int) -> int:
        """Bytes queued and not yet sent once."""
        sender = self._streams.send.get(stream)
        return sender.written - sender.next if sender is not None else 0

    def read(self, stream: int) -> bytes:
        """All bytes that are here in order, b"" if none. Gives no credit, but on stream 0.

        Raises UsageError for a stream that cannot be read. At its end the stream is gone after this call.
        """
        data = self._streams.read(stream, self._now, self._rtt())
        if self._streams.pending:
            self.want_to_send()
        return data

    def ended(self, stream: int) -> bool:
        """Whether the next `read` returns the last bytes of the stream, or it is gone."""
        receiver = self._streams.recv.get(stream)
        return receiver is None or receiver.complete

    def advance_credit(self, stream: int, taken: int) -> None:
        """The application has taken everything below offset `taken`, or holds it as its one incomplete record.

        Monotonic; less than before is ignored. Raises UsageError for more than was received.
        """
        self._streams.advance(stream, taken, self._now, self._rtt())
        if self._streams.pending:
            self.want_to_send()

    def reset_stream(self, stream: int, code: int) -> None:
        """Give up sending on it. Raises UsageError."""
        self._must_live()
        self._streams.reset(stream, code)
        self.want_to_send()

    def stop_stream(self, stream: int, code: int) -> None:
        """Ask the peer to give up sending on it. Raises UsageError."""
        self._must_live()
        self._streams.stop(stream, code)
        self.want_to_send()

    def send_datagram(self, data: bytes) -> bool:
        """Queue an unreliable datagram: it leaves when congestion control lets it, once, and may be lost.

        False: MAX_WAITING of them wait already, and this one was not taken. Raises UsageError: the session is over,
        or `data` is longer than `max_datagram_size`.
        """
        self._must_live()
        if len(data) > self.max_datagram_size:
            raise UsageError(f"a datagram of {len(data)} bytes; {self.max_datagram_size} fit into a packet")
        taken = self._unreliable().put(data)
        self.want_to_send()
        return taken

    def next_event(self) -> Event | None:
        if self.state in (State.HANDSHAKE, State.KEYED):
            return None  # what comes before the proof is news only after it
        datagrams = self._datagrams
        if datagrams is not None and datagrams.unfetched and not self._events:
            return DatagramReceived(datagrams.fetch())
        if not self._events:
            return None
        event = self._events.pop(0)
        if isinstance(event, StreamReadable):
            self._announced.pop(event.stream, None)
            if not self._announced:
                self._announced = {}  # lest it keeps its room
        return event

    def close(self, code: ErrorCode, reason: str = "", now: float | None = None) -> None:
        """Say CLOSE and stop. Nothing happens if the session is over already. `now` None: as last heard."""
        if self.state in LIVE:
            self._close(code, reason, self._now if now is None else now)

    # -- what the session's parts tell

    def on_event(self, event: Event) -> None:
        """Raises ProtocolError(LIMIT) beyond MAX_EVENTS."""
        self._events.append(event)
        self._announce()
        if len(self._events) > MAX_EVENTS and self.state in LIVE:
            raise ProtocolError("more events than the owner takes", ErrorCode.LIMIT)

    def on_readable(self, stream: int) -> None:
        if stream not in self._announced:
            self._announced[stream] = None
            self.on_event(StreamReadable(stream))

    def on_datagram(self, data: bytes) -> None:
        self._unreliable().on_received(data)
        self._announce()

    def want_to_send(self) -> None:
        """The carrier is to look at it: something to send, or another deadline."""
        if not self.in_to_send:
            self.in_to_send = True
            self._agenda.to_send.append(self)

    # -- inside

    def _announce(self) -> None:
        """There is news for the owner."""
        if not self.in_ready and self.state not in (State.HANDSHAKE, State.KEYED):
            self.in_ready = True
            self._agenda.ready.append(self)

    def _unreliable(self) -> Datagrams:
        if self._datagrams is None:
            self._datagrams = Datagrams()
        return self._datagrams

    def _count_datagrams(self) -> None:
        """For `statistics`."""
        if self._datagrams is None:
            return
        found, counts = self._counts, self._datagrams.counts
        found.datagrams_sent, found.datagrams_acked = counts.sent, counts.acked
        found.datagrams_lost, found.datagrams_received = counts.lost, counts.received
        found.datagrams_refused = counts.refused
        found.datagrams_dropped = counts.oversized + counts.unfetched

    def _must_live(self) -> None:
        if self.state not in LIVE:
            raise UsageError("the session is over")
