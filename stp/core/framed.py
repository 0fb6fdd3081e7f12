"""A session over a reliable stream of bytes: TLS on TCP, or a Unix socket (protocol §11). Beside `session.py`.

The owner has the verbs of any session. The carrier calls, in this order: input (`receive`, `on_lost`,
`handle_timeout`, or a command), then `next_write` until it gives nothing or the kernel takes no more, then
`next_timeout`.

Each side sends `u16 length | hello`. The listener's first unit then begins with HANDSHAKE_DONE, or is the CLOSE of a
refusal; from there on both sides send units.

(1) The dialling side is connected only by HANDSHAKE_DONE; the listener once the peer is authorised and its hello is
    here. Before that no unit is looked into, and none is sent but a CLOSE.
(2) Whatever the peer does ends at worst in CLOSE with a code. Input raises nothing.
(3) What was handed to the carrier counts as acknowledged: the stream delivers it, or the session ends.
(4) A write has at most MAX_WRITE bytes, chosen when it is made: control first, then lanes by weight. So a command
    waits for no more than what the kernel has already taken.
(5) Events are bounded as those of a `Session`; SessionClosed is the last.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, Final

from attrs import Factory, define

from stp.core import frames
from stp.core.channel import RECORD_OVERHEAD, Channel
from stp.core.errors import (
    ErrorCode,
    HandshakeRefused,
    LocalCause,
    PacketError,
    ProtocolError,
)
from stp.core.events import Connected, SessionClosed, SessionStatistics, StreamWritable
from stp.core.flow import WindowBudget
from stp.core.frames import STREAM_HEAD, STREAM_HEAD_SIZE, STREAM_LENGTH_HEAD, STREAM_LENGTH_HEAD_SIZE
from stp.core.handshake import Authorise, PeerIdentity, read_uri, take_hello
from stp.core.packetizer import PacketBuilder
from stp.core.params import TransportHello
from stp.core.path import KEEPALIVE, LISTENER_PATIENCE, Liveness
from stp.core.recovery import RttEstimator
from stp.core.routing import take_stream, take_stream_frame
from stp.core.states import LIVE, TRANSITIONS, Agenda, Input, State
from stp.core.streams import WRITABLE_ROOM
from stp.core.streamset import StreamSet
from stp.core.units import UNIT_HEAD, UnitReader, encode_unit
from stp.core.unreliable import Flight
from stp.core.verbs import AnySession

HANDSHAKE_TIMEOUT: Final = 10.0
"""Seconds from the connection to HANDSHAKE_DONE (R-11-3)."""
CLOSE_TIMEOUT: Final = 3.0
"""Seconds that a CLOSE may wait for the kernel to take it."""
MAX_WRITE: Final = 16 * 1024
"""Bytes of one write, TLS included (R-11-2)."""
UNIT_ROOM: Final = MAX_WRITE - RECORD_OVERHEAD - UNIT_HEAD
MAX_DATAGRAM: Final = UNIT_ROOM // 2
"""Bytes of an unreliable datagram; control frames have the rest of the write."""
MAX_RECORDS: Final = 1 << 24
"""Writes under one TLS key; AES-GCM is good for 2^24.5 full records (RFC 8446 §5.5). Then AEAD_LIMIT, and a new
session."""
MAX_ANSWERS: Final = 8
"""PATH_CHALLENGEs that wait for their answer; older ones are forgotten."""
MAX_PINGS: Final = 8
"""PATH_CHALLENGEs of ours whose answer would still tell us something."""
ID_LENGTH: Final = 8
"""Bytes of the random ids in a hello, and of a ping."""
MAX_REFUSAL: Final = 64
"""Bytes of the reason that a stranger is told (protocol §4)."""

_FOREIGN: Final = frozenset(
    (frames.PADDING, frames.ACK, frames.CRYPTO, frames.NEW_CID, frames.RETIRE_CID, frames.NEW_TOKEN)
)
"""Frames that mean nothing in a stream: PROTOCOL (R-11-1)."""
_NO_TOKEN: Final = bytes(16)
FOR_EVER: Final = datetime.max.replace(tzinfo=UTC)
"""notAfter of a peer that has no certificate."""


def allow(_peer: PeerIdentity) -> str | None:
    """Authorises everybody."""
    return None


@define(kw_only=True)
class FramedContext:
    """What all sessions of one carrier share. Times are seconds."""

    carrier: str
    """What `AnySession.carrier` says: "tls" or "unix"."""
    random_bytes: Callable[[int], bytes]
    budget: WindowBudget
    authorise: Authorise = allow
    """Also asked for dialled sessions, once the peer is who it should be."""
    on_refused: Callable[[Any, PeerIdentity | None, str], None] | None = None
    """(address, peer, reason): a listener's session ended before it was ESTABLISHED; nobody hears of it otherwise."""
    keepalive: float = KEEPALIVE
    handshake_timeout: float = HANDSHAKE_TIMEOUT
    agenda: Agenda[FramedSession] = Factory(Agenda)


class FramedSession(AnySession):
    """One association over one stream. Made by its carrier."""

    __slots__ = (
        "_answers",
        "_channel",
        "_close_frame",
        "_context",
        "_deadline",
        "_done",
        "_early",
        "_estimator",
        "_expected",
        "_hello",
        "_hello_sent",
        "_liveness",
        "_names",
        "_original",
        "_ping",
        "_pings",
        "_reader",
        "address",
        "conn",
        "own",
        "refused",
    )

    def __init__(
        self,
        context: FramedContext,
        channel: Channel,
        address: Any,
        *,
        dialling: bool,
        now: float,
        expected: tuple[str, str] | None = None,
        names: tuple[str, str] | None = None,
    ) -> None:
        """`expected`: (domain, node) that a dialled peer must be; None: whoever listens on this Unix socket.

        `names`: what the listener of a Unix socket calls itself and the peer, as `TransportHello.names`.
        """
        super().__init__(context.agenda, StreamSet(dialling, context.budget), dialling=dialling, now=now)
        self._context = context
        self._channel: Channel = channel
        self.address = address
        self.conn: Any = None
        """The carrier's; never looked into."""
        self.refused = False
        """A listener's: it ended before it was a session, and not for want of a word from the peer."""
        self.own: tuple[str, str] | None = None
        """(domain, node) that the listener of a Unix socket gave us."""
        self._expected = expected
        self._names = names
        self._reader = UnitReader()
        self._early = b""
        self._hello = b""
        self._hello_sent = False
        self._original = b""
        self._done = False
        self._liveness = Liveness(context.keepalive + (0 if dialling else LISTENER_PATIENCE), now)
        self._estimator = RttEstimator(None, 0.0)
        self._ping = False
        self._pings: dict[bytes, float] = {}
        self._answers: list[bytes] = []
        self._close_frame: bytes | None = None
        self._deadline = now + context.handshake_timeout
        if dialling:
            self._original = context.random_bytes(ID_LENGTH)
            self._make_hello()
        self.want_to_send()

    # -- the owner's verbs

    @property
    def addr(self) -> Any:
        return self.address

    @property
    def carrier(self) -> str:
        return self._context.carrier

    @property
    def max_datagram_size(self) -> int:
        return MAX_DATAGRAM

    def expect(self, seconds: float | None) -> None:
        self._liveness.expect(seconds)
        self.want_to_send()  # so that the timer is set anew

    def statistics(self) -> SessionStatistics:
        found, rtt = self._counts, self._estimator
        if rtt.sampled:
            found.rtt, found.rtt_var = rtt.smoothed, rtt.var
            found.rtt_min, found.rtt_latest = rtt.min, rtt.latest
        found.keepalive = self._liveness.keepalive
        found.session_credit = self._streams.session_room
        self._count_datagrams()
        return found

    # -- input from the carrier

    def receive(self, data: bytes, now: float) -> None:
        """The next bytes of the stream, as they came."""
        self._now = now
        if self.state not in LIVE:
            return
        self._counts.bytes_in += len(data)
        try:
            for plain in self._channel.receive(data, self._check_peer):
                self._take(plain, now)
                if self.state not in LIVE:
                    break
        except ProtocolError as exc:
            self._close(exc.code, str(exc), now)
        except HandshakeRefused as exc:
            self._end(Input.SILENCE, exc.code, exc.reason, by_peer=exc.by_peer, now=now)
        except PacketError as exc:
            self._end(Input.SILENCE, LocalCause.CONNECTION_LOST, str(exc), by_peer=False, now=now)
        self.want_to_send()

    def on_lost(self, reason: str, now: float) -> None:
        """The stream broke, or its end came; `reason` for people."""
        if self.state in LIVE:
            self._end(Input.SILENCE, LocalCause.CONNECTION_LOST, reason, by_peer=False, now=now)
        elif self.state is State.CLOSING:
            self._enter(Input.DRAINED)

    def handle_timeout(self, now: float) -> None:
        """The time of `next_timeout` has come, or an earlier one: then nothing happens."""
        self._now = now
        due = self._reader.due
        if self.state is State.CLOSING:
            if now >= self._deadline:
                self._enter(Input.DRAINED)
        elif self.state is not State.ESTABLISHED:
            if self.state in LIVE and now >= self._deadline:
                self._end(Input.SILENCE, LocalCause.HANDSHAKE_TIMEOUT, "", by_peer=False, now=now)
        elif due is not None and now >= due:
            self._close(ErrorCode.LIMIT, "a started unit did not come to its end", now)
        elif now >= self._liveness.next_ping():
            if self._liveness.on_ping_time(now):
                self._ping = True
            else:
                self._end(Input.SILENCE, LocalCause.IDLE_TIMEOUT, "", by_peer=False, now=now)
        self.want_to_send()

    # -- output to the carrier

    def next_write(self, now: float) -> bytes:
        """The bytes to hand to the kernel next, at most MAX_WRITE; b"" when there is nothing to send."""
        self._now = now
        channel = self._channel
        written = channel.take()
        if not written and channel.ready:
            try:
                plain = self._next_plain(now)
            except ProtocolError as exc:  # more events than the owner takes
                self._close(exc.code, str(exc), now)
                plain = self._next_plain(now)
            if plain:
                written = channel.seal(plain)
                self._counts.datagrams_out += 1
        if self.state is State.CLOSING and not written:
            self._enter(Input.DRAINED)
        self._counts.bytes_out += len(written)
        return written

    def next_timeout(self) -> float | None:
        """When to call `handle_timeout`; None once the session is CLOSED. Valid after `next_write`."""
        if self.state is State.CLOSED:
            return None
        if self.state is not State.ESTABLISHED:
            return self._deadline
        due, other = self._liveness.next_ping(), self._reader.due
        return due if other is None or due < other else other

    def _next_plain(self, now: float) -> bytes:
        if not self._hello_sent:
            if not self._hello:
                return b""
            self._hello_sent = True
            return len(self._hello).to_bytes(2, "big") + self._hello
        if self._close_frame is not None:
            close, self._close_frame = self._close_frame, None
            return encode_unit([close])
        if self.state is not State.ESTABLISHED:
            return b""
        if self._counts.datagrams_out >= MAX_RECORDS and self.suite:
            self._close(ErrorCode.AEAD_LIMIT, "keys worn out", now)
            return self._next_plain(now)
        packet = PacketBuilder(UNIT_ROOM)
        self._write_control(packet, now)
        datagrams = self._datagrams
        data = datagrams.next(packet.room - 1) if datagrams is not None else None
        packet.room -= 0 if data is None else 1 + len(data)
        self._write_streams(packet, last=data is None)
        if datagrams is not None and data is not None:
            packet.parts.append(frames.Datagram(data).encode())
            datagrams.on_acked(Flight())  # (3)
        return encode_unit(packet.parts) if packet.parts else b""

    def _write_control(self, packet: PacketBuilder, now: float) -> None:
        parts = packet.parts
        if self._done:
            self._done = False
            parts.append(frames.HandshakeDone(_NO_TOKEN).encode())
        if self._ping:
            self._ping = False
            token = self._context.random_bytes(ID_LENGTH)
            self._pings[token] = now
            if len(self._pings) > MAX_PINGS:
                del self._pings[next(iter(self._pings))]
            parts.append(frames.PathChallenge(token).encode())
        parts += self._answers
        self._answers.clear()
        packet.room -= sum(map(len, parts))
        if self._streams.pending:
            self._streams.write_frames(packet)
            for owner, what in packet.frames:
                owner.on_acked(what)  # (3)

    def _write_streams(self, packet: PacketBuilder, *, last: bool) -> None:
        """Fill up with STREAM frames; the last one needs no length where nothing follows it."""
        streams, room = self._streams, packet.room
        tail: tuple[int, int, bytes, bool] | None = None
        while room > STREAM_LENGTH_HEAD_SIZE + STREAM_HEAD_SIZE:
            sender = streams.pick()
            if sender is None:
                break
            if tail is not None:
                packet.parts.append(_stream_frame(tail, length=True))
            offset, available = sender.due(streams.session_room)
            length = min(available, room - STREAM_LENGTH_HEAD_SIZE)
            data, index, fin = sender.take(offset, length)
            streams.on_taken(sender, length, length)
            sender.on_range_acked(offset, length, fin)  # (3)
            tail = (sender.id, offset, data[index : index + length], fin)
            room -= STREAM_LENGTH_HEAD_SIZE + length
            if sender.full and sender.room() >= WRITABLE_ROOM:
                sender.full = False
                self.on_event(StreamWritable(sender.id))
        if tail is not None:
            packet.parts.append(_stream_frame(tail, length=not last))

    # -- hellos

    def _make_hello(self) -> None:
        made = TransportHello(self._original, self._context.random_bytes(ID_LENGTH), names=self._names)
        self._hello = made.encode()

    def _check_peer(self, peer: PeerIdentity) -> str | None:
        """Before anything of it is believed: is it the node that was dialled?"""
        if self._expected is None:
            return None
        if self._expected == (peer.domain, peer.node):
            return self._context.authorise(peer)
        wanted, found = "/".join(self._expected), f"{peer.domain}/{peer.node}"
        return f"wanted {wanted}, found {found}"

    def _take(self, plain: bytes, now: float) -> None:
        """Plaintext of the peer. Raises ProtocolError, HandshakeRefused."""
        self._liveness.on_heard(now)
        if self.state is State.HANDSHAKE:
            self._early += plain
            found = take_hello(self._early)
            if found is None:
                return
            hello, raw, plain = found
            self._early = b""
            self._on_hello(hello, raw, now)
            if not plain:
                return
        for unit in self._reader.feed(plain, now):
            if self.state not in LIVE:
                return
            self._counts.datagrams_in += 1
            self._route(unit, now)

    def _on_hello(self, hello: TransportHello, raw: bytes, now: float) -> None:
        """The peer's hello: from here on there is a session, which the listener may refuse."""
        channel = self._channel
        if hello.retry_scid or (self.dialling and hello.original_dcid != self._original):
            raise ProtocolError("the hello does not echo this handshake")
        if self.dialling:
            self.peer = channel.peer or self._named_by(hello)
        else:
            self.peer, self._original = channel.peer, hello.original_dcid
            self._make_hello()
        assert self.peer is not None
        hc, hs = (self._hello, raw) if self.dialling else (raw, self._hello)
        self.id, self.suite = channel.session_id(hc, hs), channel.suite
        parameters = hello.parameters
        self._streams.peer_max_streams = [parameters.max_streams_bidi, parameters.max_streams_uni]
        if self.dialling:
            self._enter(Input.KEYS)
            return
        code, reason = ErrorCode.AUTH, None
        try:
            reason = self._context.authorise(self.peer)
        except HandshakeRefused as refused:  # EXPIRED and REVOKED have codes of their own
            code, reason = refused.code, refused.reason
        if reason is not None:
            cut = reason.encode()[:MAX_REFUSAL].decode("utf-8", "ignore")
            self._close_frame = frames.Close(code, cut).encode()
            self._end(Input.LOCAL_CLOSE, code, reason, by_peer=False, now=now)
            return
        self._enter(Input.KEYS)
        self._done = True
        self._prove(now)

    def _named_by(self, hello: TransportHello) -> PeerIdentity:
        """Whom the listener of a Unix socket says it is, and who it says we are (R-11-5)."""
        theirs, ours = (read_uri(name) for name in hello.names or ("", ""))
        if theirs is None or ours is None:
            raise ProtocolError("the listener of a Unix socket names nobody")
        peer = PeerIdentity(theirs[0], theirs[1], 0, FOR_EVER)
        reason = self._check_peer(peer)
        if reason is not None:
            raise HandshakeRefused(reason)
        self.own = ours
        return peer

    def _prove(self, now: float) -> None:
        """Both sides are agreed (1)."""
        assert self.peer is not None
        self._enter(Input.PROOF)
        self._ping = True  # the first round trip is measured at once
        self.on_event(Connected(self.peer))

    # -- frames

    def _route(self, unit: bytes, now: float) -> None:
        """The frames of one unit, in order. Raises ProtocolError."""
        pos, end = 0, len(unit)
        while pos < end and self.state in LIVE:
            kind = unit[pos]
            if self.state is State.KEYED and kind not in (frames.HANDSHAKE_DONE, frames.CLOSE):
                raise ProtocolError("a frame before HANDSHAKE_DONE")
            if frames.STREAM <= kind <= frames.STREAM_LENGTH_FIN:
                pos = take_stream(unit, pos, kind, self._streams, self)
            elif kind == frames.DATAGRAM:
                self.on_datagram(unit[pos + 1 :])
                return
            elif kind in _FOREIGN:
                raise ProtocolError(f"frame {kind:#04x} has no place in a stream")
            else:
                frame, pos = frames.decode_one(unit, pos)
                if not take_stream_frame(frame, self._streams, self, now, self._rtt()):
                    self._on_frame(frame, now)

    def _on_frame(self, frame: frames.Frame, now: float) -> None:
        match frame:
            case frames.PathChallenge():
                self._answers.append(frames.PathResponse(frame.data).encode())
                del self._answers[:-MAX_ANSWERS]
            case frames.PathResponse():
                sent = self._pings.pop(frame.data, None)
                if sent is not None:
                    self._estimator.on_sample(now - sent, 0.0)
            case frames.HandshakeDone():
                if not self.dialling or self.state is not State.KEYED:
                    raise ProtocolError("HANDSHAKE_DONE out of place")
                self._prove(now)
            case frames.Close():
                self._on_close(frame, now)
            case _:
                pass  # PING: it came, that is all

    def _on_close(self, frame: frames.Close, now: float) -> None:
        code = ErrorCode.of(frame.code)
        self._end(Input.PEER_CLOSE, code, frame.reason, by_peer=True, now=now)
        self._enter(Input.DRAINED)  # the stream delivers: nothing has to be said twice

    # -- inside

    def _rtt(self) -> float:
        return self._estimator.smoothed if self._estimator.sampled else 0.0

    def _enter(self, what: Input) -> None:
        self.state = TRANSITIONS[self.state, what]

    def _close(self, code: ErrorCode, reason: str, now: float) -> None:
        self._close_frame = frames.Close(code, reason).encode()
        self._end(Input.LOCAL_CLOSE, code, reason, by_peer=False, now=now)
        self.want_to_send()

    def _end(
        self, what: Input, code: ErrorCode | LocalCause, reason: str, *, by_peer: bool, now: float
    ) -> None:
        """The session is over; CLOSING only lingers until its CLOSE is handed over."""
        known = self.state is State.ESTABLISHED
        if not known:
            self._events.clear()  # never connected: its end is all there is to tell
        self._enter(what)
        self._deadline = now + CLOSE_TIMEOUT
        self._streams.close()
        if self._datagrams is not None:
            self._datagrams.forget()
        self._early = b""
        self._reader = UnitReader()
        self._answers.clear()
        if known or self.dialling:
            self.on_event(SessionClosed(code, reason, by_peer))
        elif isinstance(code, ErrorCode):
            self.refused = True
            if self._context.on_refused is not None:
                self._context.on_refused(self.address, self.peer, reason or str(code))


def _stream_frame(tail: tuple[int, int, bytes, bool], *, length: bool) -> bytes:
    stream, offset, data, fin = tail
    if length:
        return STREAM_LENGTH_HEAD.pack(frames.STREAM_LENGTH | fin, stream, offset, len(data)) + data
    return STREAM_HEAD.pack(frames.STREAM | fin, stream, offset) + data
