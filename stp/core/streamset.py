"""All streams of a session: numbers, limits, credit of the session, who sends next (protocol §5, §7). Above streams.

(1) Stream 0 goes before all others and needs no session credit; the others share the link by weight, one of them
    per burst.
(2) A credit frame that is said again says the newest value, never an older one.
(3) The peer opens at most MAX_STREAMS of a kind at a time, and sends at most what session credit allows.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from stp.core import frames
from stp.core.errors import FlowError, LimitError, ProtocolError, UsageError
from stp.core.flow import CONTROL_WINDOW, SESSION_WINDOW, STREAM_WINDOW, ReceiveCredit, WindowBudget
from stp.core.recovery import FrameSink
from stp.core.streams import WRITABLE_ROOM, RecvStream, SendStream

MAX_STREAMS: Final = 100
"""Streams of each kind that either side may have open at a time; our transport parameters 3 and 4 (R-7-6)."""
LISTENER_BIT: Final = 1
UNIDIRECTIONAL_BIT: Final = 2
MAX_INDEX: Final = 1 << 30
"""Streams of a kind in a session: their numbers are u32."""

MAX_DATA, MAX_STREAM_DATA, MAX_STREAMS_FRAME = "max_data", "max_stream_data", "max_streams"
DATA_BLOCKED, STREAM_DATA_BLOCKED, STREAMS_BLOCKED = "data_blocked", "stream_data_blocked", "streams_blocked"
RESET_STREAM, STOP_SENDING = "reset_stream", "stop_sending"
"""Kinds of what a StreamSet has to say; with a stream (or a stream kind) they are the tokens of its frames."""


class StreamSet:
    """All streams of a session. Owns every frame that names a stream or its credit, STREAM itself apart."""

    __slots__ = (
        "_blocked_at",
        "_budget",
        "_dialling",
        "_opened",
        "_peer_opened",
        "_stopped",
        "_virtual",
        "credit",
        "peer_limit",
        "peer_max_streams",
        "pending",
        "received",
        "recv",
        "send",
        "sent",
        "streams_credit",
        "writers",
    )

    def __init__(self, dialling: bool, budget: WindowBudget) -> None:
        self._dialling = dialling
        self._budget = budget
        self.send: dict[int, SendStream] = {0: SendStream(0, CONTROL_WINDOW)}
        self.recv: dict[int, RecvStream] = {0: RecvStream(0, CONTROL_WINDOW)}
        self.writers: dict[int, SendStream] = {}
        """Streams other than 0 that have or may get back something to send."""
        self.credit = ReceiveCredit(SESSION_WINDOW)
        self.received = 0
        """Bytes received on all streams but 0, by highest offset."""
        self.peer_limit = SESSION_WINDOW
        self.sent = 0
        """New bytes sent on all streams but 0."""
        self.peer_max_streams = [MAX_STREAMS, MAX_STREAMS]
        self.streams_credit = [MAX_STREAMS, MAX_STREAMS]
        """Indexed by stream kind: frames.BIDIRECTIONAL, frames.UNIDIRECTIONAL. Cumulative."""
        self._opened = [1 if dialling else 0, 0]  # stream 0 is the dialling side's first
        self._peer_opened = [0 if dialling else 1, 0]
        self.pending: dict[tuple[str, int], None] = {}
        self._stopped: dict[int, int] = {}
        self._blocked_at = -1
        self._virtual = 0.0

    # -- the owner's side

    def open(self, weight: int, *, bidirectional: bool = False) -> int:
        """The number of a new stream of ours. Raises UsageError when the peer allows no more (R-5-3)."""
        kind = frames.BIDIRECTIONAL if bidirectional else frames.UNIDIRECTIONAL
        index = self._opened[kind]
        if index >= self.peer_max_streams[kind]:
            self.pending[STREAMS_BLOCKED, kind] = None
            raise UsageError(f"the peer allows {index} streams of this kind so far")
        self._opened[kind] = index + 1
        stream = (
            index << 2
            | (0 if bidirectional else UNIDIRECTIONAL_BIT)
            | (0 if self._dialling else LISTENER_BIT)
        )
        self.send[stream] = SendStream(stream, STREAM_WINDOW, weight)
        if bidirectional:
            self.recv[stream] = RecvStream(stream, STREAM_WINDOW)
        return stream

    def write(self, stream: int, data: bytes, fin: bool) -> None:
        sender = self.send.get(stream)
        if sender is None or sender.fin or sender.reset_code is not None:
            raise UsageError(f"stream {stream} is not open for writing")
        sender.write(data, fin)
        sender.full = sender.room() < WRITABLE_ROOM
        if stream and stream not in self.writers:
            sender.share = max(sender.share, self._virtual)
            self.writers[stream] = sender

    def reset(self, stream: int, code: int) -> None:
        """Give up sending. Raises UsageError for a stream that is not ours to reset."""
        sender = self.send.get(stream)
        if sender is None or not stream:
            raise UsageError(f"stream {stream} cannot be reset")
        if sender.reset_code is None:
            sender.reset(code)
            self.writers.pop(stream, None)
            self.pending[RESET_STREAM, stream] = None

    def stop(self, stream: int, code: int) -> None:
        """Ask the peer to give up sending. Raises UsageError."""
        if stream not in self.recv or not stream:
            raise UsageError(f"stream {stream} is not one to stop")
        self._stopped[stream] = code
        self.pending[STOP_SENDING, stream] = None

    def read(self, stream: int, now: float, rtt: float) -> bytes:
        receiver = self.recv.get(stream)
        if receiver is None:
            raise UsageError(f"stream {stream} is not one to read from")
        data = receiver.read()
        if not stream:
            self.advance(0, receiver.next, now, rtt)
        elif receiver.complete and not receiver.ended:
            receiver.ended = True
            self.advance(stream, receiver.next, now, rtt)
            self._forget(receiver)
        return data

    def advance(self, stream: int, taken: int, now: float, rtt: float) -> None:
        """The reader has taken everything below `taken`. Raises UsageError for more than was received."""
        receiver = self.recv.get(stream)
        if receiver is None:
            return  # ended meanwhile: its credit went back as a whole
        credit = receiver.credit
        if taken > receiver.next:
            raise UsageError(f"stream {stream}: {taken} bytes taken of {receiver.next}")
        if taken <= credit.taken:
            return
        if stream:
            self._advance_session(taken - credit.taken, now, rtt)
        credit.taken = taken
        if receiver.final_size is None and credit.due():
            more = credit.grow(now, rtt, self._budget) if stream else 0
            if more:  # the session's grows with it, at once: it is never below the sum of the lanes
                self.credit.window += more
                self.credit.announce()
                self.pending[MAX_DATA, 0] = None
            receiver.limit = credit.announce()
            self.pending[MAX_STREAM_DATA, stream] = None

    def _advance_session(self, more: int, now: float, rtt: float) -> None:
        self.credit.taken += more
        if self.credit.due():
            self.credit.announce()
            self.pending[MAX_DATA, 0] = None

    def _forget(self, receiver: RecvStream) -> None:
        """Nothing more will come on it; the peer may open another."""
        del self.recv[receiver.id]
        self._stopped.pop(receiver.id, None)
        grown = receiver.credit.grown
        if grown:
            self.credit.window -= grown
            self._budget.give_back(grown)
        if receiver.id & LISTENER_BIT == (1 if self._dialling else 0):
            kind = frames.UNIDIRECTIONAL if receiver.id & UNIDIRECTIONAL_BIT else frames.BIDIRECTIONAL
            self.streams_credit[kind] += 1
            self.pending[MAX_STREAMS_FRAME, kind] = None

    def close(self) -> None:
        """The session is over: what it grew goes back to the budget."""
        for receiver in self.recv.values():
            self._budget.give_back(receiver.credit.grown)
            receiver.credit.grown = 0

    # -- the peer's side

    def receiver(self, stream: int) -> tuple[RecvStream | None, Iterable[int]]:
        """The receiving end of `stream` (None: over already) and the streams that this opens.

        Raises ProtocolError for a stream that is not the peer's to send on, LimitError for one too many.
        """
        found = self.recv.get(stream)
        if found is not None:
            return found, ()
        kind = frames.UNIDIRECTIONAL if stream & UNIDIRECTIONAL_BIT else frames.BIDIRECTIONAL
        index = stream >> 2
        if stream & LISTENER_BIT == (0 if self._dialling else 1):  # ours
            if kind == frames.UNIDIRECTIONAL or index >= self._opened[kind]:
                raise ProtocolError(f"stream {stream} is not the peer's to send on")
            return None, ()
        if index < self._peer_opened[kind]:
            return None, ()
        if index >= self.streams_credit[kind]:
            raise LimitError(f"stream {stream}: {self.streams_credit[kind]} of its kind allowed")
        opened = []
        for at in range(self._peer_opened[kind], index + 1):
            number = at << 2 | stream & 3
            self.recv[number] = RecvStream(number, STREAM_WINDOW)
            if kind == frames.BIDIRECTIONAL:
                self.send[number] = SendStream(number, STREAM_WINDOW)
            opened.append(number)
        self._peer_opened[kind] = index + 1
        return self.recv[stream], opened

    def on_bytes(self, grown: int) -> None:
        """The highest offsets of streams other than 0 grew by so much. Raises FlowError."""
        self.received += grown
        if self.received > self.credit.limit:
            raise FlowError(f"{self.received} bytes, credit for {self.credit.limit}")

    def on_reset(self, frame: frames.ResetStream, now: float, rtt: float) -> tuple[bool, Iterable[int]]:
        """RESET_STREAM came: (whether the reader is to hear of it, streams that this opens)."""
        if not frame.stream:
            raise ProtocolError("RESET_STREAM of the control stream")
        receiver, opened = self.receiver(frame.stream)
        if receiver is None:
            return False, opened
        self.on_bytes(receiver.drop(frame.final_size))
        self.advance(frame.stream, frame.final_size, now, rtt)
        self._forget(receiver)
        return True, opened

    def on_stop(self, frame: frames.StopSending) -> bool:
        """STOP_SENDING came: whether the writer is to hear of it."""
        if not frame.stream:
            raise ProtocolError("STOP_SENDING of the control stream")
        sender = self._sender(frame.stream)
        if sender is None or sender.reset_code is not None:
            return False
        self.reset(frame.stream, frame.code)
        return True

    def _sender(self, stream: int) -> SendStream | None:
        """Our end of `stream`, None if it is over. Raises ProtocolError for one that cannot be."""
        sender = self.send.get(stream)
        if sender is None:
            kind = frames.UNIDIRECTIONAL if stream & UNIDIRECTIONAL_BIT else frames.BIDIRECTIONAL
            ours = stream & LISTENER_BIT == (0 if self._dialling else 1)
            if (kind == frames.UNIDIRECTIONAL and not ours) or (ours and stream >> 2 >= self._opened[kind]):
                raise ProtocolError(f"stream {stream} is not one that we send on")
        return sender

    def on_max_stream_data(self, stream: int, limit: int) -> None:
        sender = self._sender(stream)
        if sender is not None and limit > sender.limit:
            sender.limit = limit

    def on_max_streams(self, kind: int, limit: int) -> None:
        self.peer_max_streams[kind] = max(self.peer_max_streams[kind], min(limit, MAX_INDEX))

    def on_blocked(self, kind: str, stream: int) -> None:
        """The peer waits for credit: say what it has by now, however little is new (2)."""
        if kind == MAX_DATA:
            self.credit.announce()
        else:
            receiver = self.recv.get(stream)
            if receiver is None or receiver.final_size is not None:
                return
            receiver.limit = receiver.credit.announce()
        self.pending[kind, stream] = None

    # -- sending

    @property
    def session_room(self) -> int:
        return self.peer_limit - self.sent

    def pick(self) -> SendStream | None:
        """The stream whose bytes leave next (1), or None."""
        control = self.send[0]
        if control.wants_to_send(1):
            return control
        room = self.session_room
        best: SendStream | None = None
        settled = []
        for sender in self.writers.values():
            if sender.wants_to_send(room):
                if best is None or sender.share < best.share:
                    best = sender
            elif sender.next < sender.written:
                self._note_blocked(sender)
            elif sender.settled:
                settled.append(sender)
        for sender in settled:
            del self.writers[sender.id]
            if sender.fin:
                del self.send[sender.id]
        if best is not None:
            self._virtual = best.share
        return best

    def on_taken(self, sender: SendStream, length: int, new: int) -> None:
        """`length` bytes leave on `sender`, `new` of them for the first time."""
        if sender.id:
            self.sent += new
            sender.share += length / sender.weight

    def _note_blocked(self, sender: SendStream) -> None:
        """Once for each limit: the peer should know that we wait (RFC 9000 §4.1)."""
        if sender.next >= sender.limit:
            if sender.blocked_at != sender.limit:
                sender.blocked_at = sender.limit
                self.pending[STREAM_DATA_BLOCKED, sender.id] = None
        elif self._blocked_at != self.peer_limit:
            self._blocked_at = self.peer_limit
            self.pending[DATA_BLOCKED, 0] = None

    def write_frames(self, packet: FrameSink) -> None:
        for token in list(self.pending):
            frame = self._frame(*token)
            if frame is not None and not packet.add(frame, self, token):
                return
            del self.pending[token]

    def _frame(self, kind: str, stream: int) -> bytes | None:
        """What there is to say now; None if nothing any longer."""
        if kind == MAX_DATA:
            return frames.MaxData(self.credit.limit).encode()
        if kind == MAX_STREAM_DATA:
            receiver = self.recv.get(stream)
            return None if receiver is None else frames.MaxStreamData(stream, receiver.limit).encode()
        if kind == MAX_STREAMS_FRAME:
            return frames.MaxStreams(stream, self.streams_credit[stream]).encode()
        if kind == DATA_BLOCKED:
            return frames.DataBlocked(self.peer_limit).encode()
        if kind == STREAMS_BLOCKED:
            return frames.StreamsBlocked(stream, self.peer_max_streams[stream]).encode()
        if kind == STOP_SENDING:
            code = self._stopped.get(stream)
            return None if code is None else frames.StopSending(stream, code).encode()
        sender = self.send.get(stream)
        if sender is None:
            return None
        if kind == STREAM_DATA_BLOCKED:
            return frames.StreamDataBlocked(stream, sender.limit).encode()
        return frames.ResetStream(stream, sender.reset_code or 0, sender.next).encode()

    def on_acked(self, token: object) -> None:
        if isinstance(token, tuple) and token[0] == RESET_STREAM:
            self.send.pop(token[1], None)

    def on_lost(self, token: object) -> None:
        if isinstance(token, tuple):
            self.pending[token] = None
