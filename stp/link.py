"""The message layer over one session: what a client library and a daemon both speak (protocol §7, §10).

Sans-IO: the owner calls `process(now)` when the session is ready and `check(now)` about once a second,
answers every `RecordReceived` with exactly one of `settle` or `refuse`, and calls `flush()` after a run of
answers.

(1) Our HELLO is the first record we send; the peer's must be the first it sends, with its certificate's
    domain and node, else AUTH. No lane is parsed before it.
(2) Every record of a lane has a place, counted from 0 per session. A place is answered once.
(3) REFUSED stands on stream 0 before any RECEIPT that counts its place.
(4) Credit returns only for what was taken, plus the one incomplete record.
(5) A record of a source we do not know waits at most `introduce_timeout` for INTRODUCE, without credit. One
    whose node the peer may not speak for is REFUSED(SOURCE), and nothing of it is remembered.
(6) A record that fails its checks is REFUSED(CORRUPT): only its place counts, never its source and number.
(7) After a refusal a source's records are accepted only in sequence until all refused ones have come again.
(8) A record is complete `record_timeout` after its first byte, as long as credit was there, else LIMIT.
(9) What waits for the control stream is bounded: MAX_CONTROL_BACKLOG, then LIMIT.

The owner decides about the records of one (source, lane) in the order of their places.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from attrs import evolve

from stp import control
from stp.core import events as core_events
from stp.core.errors import ErrorCode, LimitError, ProtocolError, UsageError
from stp.core.streams import CONTROL_BUFFER
from stp.lanes import LANES, Outgoing
from stp.link_events import (
    DrainCreditReceived,
    GoawayReceived,
    HelloReceived,
    LinkClosed,
    LinkEvent,
    LinkStatistics,
    MovedReceived,
    ReceiptReceived,
    RecordReceived,
    RecordRejected,
    RefusedReceived,
    RevokedReceived,
    SourceIntroduced,
    StatusReceived,
    SubscribedReceived,
    SubscribeReceived,
    UnsubscribeReceived,
    Writable,
)
from stp.receiving import KIND_LANE, Receiver
from stp.records import RefusedCode
from stp.sources import Sources

if TYPE_CHECKING:
    from stp.core.verbs import AnySession

__all__ = [
    "DrainCreditReceived",
    "GoawayReceived",
    "HelloReceived",
    "Link",
    "LinkClosed",
    "LinkEvent",
    "LinkStatistics",
    "MovedReceived",
    "ReceiptReceived",
    "RecordReceived",
    "RecordRejected",
    "RefusedReceived",
    "RevokedReceived",
    "SourceIntroduced",
    "StatusReceived",
    "SubscribeReceived",
    "SubscribedReceived",
    "UnsubscribeReceived",
    "Writable",
]

LANE_WEIGHTS: Final = {1: 64, 2: 32, 3: 16, 4: 4}
"""Shares of the link when several lanes have something to send (R-10-3)."""

RECORD_TIMEOUT: Final = 30.0
"""Seconds a record may take from its first byte to its last while credit is there (protocol §7, R-7-4)."""
INTRODUCE_TIMEOUT: Final = 3.0
"""Seconds a record of an unknown source waits for INTRODUCE (protocol §10)."""
HELLO_TIMEOUT: Final = 30.0
"""Seconds from the handshake to the peer's HELLO, else LIMIT."""
RECEIPT_PATIENCE: Final = 1.0
"""Seconds of silence after which a peer that owes us receipts is asked whether it is still there."""
FLOW_PATIENCE: Final = 2.0
"""The same for a peer that we dialled and that just sent us a record: where one came, more may follow."""
MAX_CONTROL_BACKLOG: Final = 1024 * 1024
"""Bytes of control records that wait for room on stream 0. Beyond it the peer does not read: LIMIT."""
_RECORD_SOURCE: Final = slice(8, 24)


def _no_name(source: bytes) -> str | None:
    return None


def _speak_for_nobody(node: str) -> bool:
    return False


class Link:
    """One session's messages. All calls come from one thread; after the end each is allowed and void.

    `name_of_source` tells the node that a source belongs to, as far as the owner knows (a keeper's store
    remembers); `may_speak_for` whether this peer may carry that node's records; `wall_ms` the wall clock, in
    milliseconds since 1970, for HELLO alone. `check_batches` also verifies the CRC of every batch of a
    record, which every keeper and reader must.
    """

    def __init__(
        self,
        session: AnySession,
        hello: control.Hello,
        *,
        wall_ms: Callable[[], int],
        name_of_source: Callable[[bytes], str | None] = _no_name,
        may_speak_for: Callable[[str], bool] = _speak_for_nobody,
        record_timeout: float = RECORD_TIMEOUT,
        introduce_timeout: float = INTRODUCE_TIMEOUT,
        check_batches: bool = True,
    ) -> None:
        self.session = session
        self.hello = hello
        self.peer: control.Hello | None = None
        self.app: Any = None
        self.closed: LinkClosed | None = None
        self.connected = False
        """Our HELLO is out: `send` and `send_record` may be used."""
        self.token = b""
        """The newest NEW_TOKEN of the peer, for the next dial; keep it across restarts."""
        self.ends_at: float | None = None
        """When the peer's certificate ends, on the boot clock; `stp.lifetimes` sets it."""
        self._wall_ms = wall_ms
        self._name_of_source = name_of_source
        self._awaiting = False
        self._stats = LinkStatistics()
        self._receiver = Receiver(
            session,
            Sources(name_of_source, may_speak_for),
            self._stats,
            self._send_control,
            record_timeout=record_timeout,
            introduce_timeout=introduce_timeout,
            check_batches=check_batches,
        )
        self._connected_at = 0.0
        self._control = control.ControlCutter()
        self._backlog: deque[bytes] = deque()
        self._backlog_bytes = 0
        self._pending: dict[int, None] = {}
        self._out: dict[int, Outgoing] = {}
        self._lane_of_stream: dict[int, int] = {}
        self._introduced_to_peer: set[bytes] = {hello.store}
        self._failure: ProtocolError | None = None

    # -- input --

    def process(self, now: float) -> list[LinkEvent]:
        """Take what the session has for us, and say what it means. Call it whenever the session is ready."""
        out: list[LinkEvent] = []
        before = self._stats.records_received
        next_event = self.session.next_event
        while (event := next_event()) is not None:
            self._on_session_event(event, now, out)
        if self.closed is None:
            try:
                self._raise_failure()
                self._read(now, out)
                if self.session.dialling and self._stats.records_received != before:
                    self.session.expect(RECEIPT_PATIENCE if self._awaiting else FLOW_PATIENCE)
                self.flush()
                self._raise_failure()
            except ProtocolError as error:
                self._fail(error, now, out)
        return out

    def check(self, now: float) -> list[LinkEvent]:
        """Deadlines (1), (5), (8). Call it about once a second."""
        out: list[LinkEvent] = []
        if self.closed is not None or not self.connected:
            return out
        try:
            self._raise_failure()
            if self.peer is None and now - self._connected_at >= HELLO_TIMEOUT:
                raise LimitError(f"no HELLO within {HELLO_TIMEOUT:g} s")
            self._receiver.check(now, out)
            self.flush()
        except ProtocolError as error:
            self._fail(error, now, out)
        return out

    # -- sending --

    def lane_room(self, lane: int) -> int:
        """Bytes the lane's buffer still takes; 0 before our HELLO is out. While it is > 0 a record may go."""
        return self.session.room(self._outgoing(lane).stream) if self.connected and self._open else 0

    def lane_unsent(self, lane: int) -> int:
        """Bytes queued on the lane that have not left once: they wait for credit or for the network."""
        outgoing = self._out.get(lane)
        return self.session.unsent(outgoing.stream) if outgoing is not None and self._open else 0

    def lane_settled(self, lane: int) -> bool:
        """Has the peer settled everything sent on this lane (kept it, or refused it)? Nothing sent: yes."""
        outgoing = self._out.get(lane)
        return outgoing is None or outgoing.kept == outgoing.sent

    def send_record(self, lane: int, record: bytes) -> int:
        """Queue one record whole and return its place. INTRODUCE goes first for a source not introduced yet.

        UsageError before our HELLO is out, and for a source whose node is unknown. After the end the place
        returned means nothing.
        """
        if not self._open:
            return 0
        if not self.connected:
            raise UsageError("no record can be sent before the session is connected")
        source = record[_RECORD_SOURCE]
        if source not in self._introduced_to_peer:
            self._introduce(source)
        outgoing = self._outgoing(lane)
        self.session.write(outgoing.stream, record)
        place = outgoing.sent
        outgoing.sent = place + 1
        self._stats.records_sent += 1
        if not self._awaiting:
            self._awaiting = True
            self.session.expect(RECEIPT_PATIENCE)
        return place

    def send(self, record: control.Control) -> None:
        """Queue any control record. A HELLO is ours to send: UsageError."""
        if isinstance(record, control.Hello):
            raise UsageError("the link sends HELLO itself")
        if self._open:
            if not self.connected:
                raise UsageError("no control record can be sent before the session is connected")
            self._send_control(record)

    # -- answers --

    def admit(self, event: RecordReceived) -> bool:
        """False when a refusal given since this event was made stands before it (7): it is refused, too.

        Ask before a record is taken: `process` gives several at once, and an earlier one may be refused.
        """
        if self.closed is not None:
            return True
        code = self._receiver.admit(event)
        if code is None:
            return True
        self.refuse(event.lane, event.place, code, reason="an earlier record was refused")
        return False

    def settle(self, lane: int, place: int, *, custody: bool) -> None:
        """The record is kept here and, where `custody`, in custody. UsageError if answered before."""
        if self.closed is None:
            self._receiver.settle(lane, place, custody=custody)

    def in_custody(self, lane: int, place: int) -> None:
        """A record settled without custody is in custody now. UsageError if it was not settled."""
        if self.closed is None:
            self._receiver.in_custody(lane, place)

    def refuse(
        self, lane: int, place: int, code: RefusedCode, retry_after_ms: int = 0, reason: str = ""
    ) -> None:
        """Do not take the record; its source's later ones are refused with this code until it comes again."""
        if self.closed is None:
            self._receiver.refuse(lane, place, code, retry_after_ms, reason)

    def flush(self) -> None:
        """Write the coalesced RECEIPTs and give back the credit of what was answered since the last call."""
        if not self._open or not self.connected:
            return
        self._pump_control()
        # Receipts are cumulative: while others wait, a later one will say more, and the backlog stays small.
        for receipt in self._receiver.give_credit(receipts=not self._backlog):
            self._stats.receipts_sent += 1
            self._send_control(receipt)

    def close(self, code: ErrorCode, reason: str, now: float) -> None:
        """Close the session. LinkClosed follows from the next `process`."""
        if self.closed is None:
            self.session.close(code, reason, now=now)

    # -- what is known --

    def node_of(self, source: bytes) -> str | None:
        """The node that a source of this peer belongs to; None when nobody has said."""
        return self._receiver.sources.node_of(source)

    @property
    def unacknowledged_control(self) -> int:
        """Bytes on stream 0 that the peer's machine has not acknowledged: before a CLOSE, wait for 0."""
        return CONTROL_BUFFER - self.session.room(0) + self._backlog_bytes if self._open else 0

    def statistics(self) -> LinkStatistics:
        """A snapshot; the counters never fall, the gauges (`open`, `held`, `backlog`) do."""
        records_open, records_held = self._receiver.gauges()
        return evolve(
            self._stats,
            records_open=records_open,
            records_held=records_held,
            control_backlog=self._backlog_bytes,
        )

    # -- session events --

    def _on_session_event(self, event: core_events.Event, now: float, out: list[LinkEvent]) -> None:
        if self.closed is not None:
            return
        match event:
            case core_events.StreamReadable(stream=stream) | core_events.StreamOpened(stream=stream):
                self._pending[stream] = None
            case core_events.StreamWritable(stream=stream):
                lane = self._lane_of_stream.get(stream)
                if lane is not None:
                    out.append(Writable(lane))
            case core_events.Connected():
                self.connected = True
                self._connected_at = now
                self._send_control(evolve(self.hello, time_ms=self._wall_ms()))
            case core_events.StreamReset(stream=stream) | core_events.StreamStopped(stream=stream):
                self._on_stream_ended(stream)
            case core_events.SessionClosed(code=code, reason=reason, by_peer=by_peer):
                self._end(LinkClosed(code, reason, by_peer), out)
            case core_events.NewToken(token=token):
                self.token = token
            case core_events.DatagramReceived():
                if self.connected:
                    out.append(event)

    def _on_stream_ended(self, stream: int) -> None:
        """FIN, RESET_STREAM or STOP_SENDING: only streams that carry no messages may end (§10, streams)."""
        if stream == 0 or stream in self._lane_of_stream or self._receiver.is_lane(stream):
            self._failure = ProtocolError(f"stream {stream} ended; a lane and the control stream never do")
        self._pending.pop(stream, None)
        self._receiver.forget(stream)

    def _end(self, closed: LinkClosed, out: list[LinkEvent]) -> None:
        if self.closed is None:
            self.closed = closed
            self._backlog.clear()
            self._backlog_bytes = 0
            out.append(closed)

    def _fail(self, error: ProtocolError, now: float, out: list[LinkEvent]) -> None:
        self.session.close(error.code, str(error), now=now)
        self._end(LinkClosed(error.code, str(error), by_peer=False), out)

    def _raise_failure(self) -> None:
        failure = self._failure or self._receiver.failure
        if failure is not None:
            raise failure

    # -- reading --

    def _read(self, now: float, out: list[LinkEvent]) -> None:
        if not self.connected:
            return
        if 0 in self._pending:
            del self._pending[0]
            ended = self.session.ended(0)
            self._read_control(now, out)
            if ended:
                self._on_stream_ended(0)
        if self.peer is None or not self._pending:
            return
        pending = list(self._pending)
        self._pending.clear()
        for stream in pending:
            ended = self.session.ended(stream)
            self._receiver.read(stream, now, out)
            if ended:
                self._on_stream_ended(stream)

    # -- control stream --

    def _read_control(self, now: float, out: list[LinkEvent]) -> None:
        for kind, body in self._control.feed(self.session.read(0)):
            record = control.decode_control(kind, body)
            if self.peer is None:
                if not isinstance(record, control.Hello):
                    raise ProtocolError("the first control record is not HELLO")
                self._on_hello(record, out)
            elif record is not None:
                self._on_control(record, now, out)

    def _on_hello(self, hello: control.Hello, out: list[LinkEvent]) -> None:
        """R-10-28."""
        certificate = self.session.peer
        if certificate is None or (hello.domain, hello.node) != (certificate.domain, certificate.node):
            reason = f"HELLO names {hello.domain}/{hello.node}, the certificate does not"
            raise ProtocolError(reason, ErrorCode.AUTH)
        self.peer = hello
        out.append(HelloReceived(hello))
        if self._receiver.sources.hello(hello.node, hello.store):
            out.append(SourceIntroduced(hello.store, hello.node))

    def _on_control(self, record: control.Control, now: float, out: list[LinkEvent]) -> None:
        """R-10-33."""
        match record:
            case control.Receipt():
                self._on_receipt(record, out)
            case control.Refused():
                self._on_refused(record, out)
            case control.Introduce():
                self._receiver.introduce(record.names, now, out)
            case control.Subscribe():
                out.append(SubscribeReceived(record))
            case control.Unsubscribe():
                out.append(UnsubscribeReceived(record.id))
            case control.Subscribed():
                out.append(SubscribedReceived(record))
            case control.Goaway():
                out.append(GoawayReceived(record))
            case control.Status():
                out.append(StatusReceived(record))
            case control.DrainCredit():
                out.append(DrainCreditReceived(record.lane, record.bytes_per_second))
            case control.Moved():
                out.append(MovedReceived())
            case control.Revoked():
                out.append(RevokedReceived(record.serials))
            case _:
                raise ProtocolError("a second HELLO")

    def _on_receipt(self, receipt: control.Receipt, out: list[LinkEvent]) -> None:
        outgoing = self._out.get(receipt.lane)
        sent = 0 if outgoing is None else outgoing.sent
        highest = max([receipt.kept, receipt.custody, *(to for _, to in receipt.ranges)])
        if highest > sent:
            raise ProtocolError(f"a receipt for place {highest - 1} of lane {receipt.lane}, sent were {sent}")
        self._stats.receipts_received += 1
        if outgoing is not None and receipt.kept > outgoing.kept:
            outgoing.kept = receipt.kept
            self._awaiting = any(lane.sent > lane.kept for lane in self._out.values())
            self.session.expect(RECEIPT_PATIENCE if self._awaiting else None)
        out.append(ReceiptReceived(receipt.lane, receipt.kept, receipt.custody, receipt.ranges))

    def _on_refused(self, refused: control.Refused, out: list[LinkEvent]) -> None:
        outgoing = self._out.get(refused.lane)
        if outgoing is None or refused.place >= outgoing.sent:
            raise ProtocolError(f"place {refused.place} of lane {refused.lane} was refused and never sent")
        self._stats.refused_by_peer += 1
        out.append(
            RefusedReceived(refused.lane, refused.place, refused.code, refused.retry_after_ms, refused.reason)
        )

    @property
    def _open(self) -> bool:
        """Neither ended nor about to: a session may be over before its last event was taken."""
        return self.closed is None and self.session.live

    def _send_control(self, record: control.Control) -> None:
        if not self._open:
            return
        data = control.encode_control(record)
        if not self._backlog and self.session.room(0) >= len(data):
            self.session.write(0, data)
            return
        self._backlog.append(data)
        self._backlog_bytes += len(data)
        if self._backlog_bytes > MAX_CONTROL_BACKLOG:
            self._failure = LimitError("the peer does not read its control stream")

    def _pump_control(self) -> None:
        while self._backlog and self.session.room(0) >= len(self._backlog[0]):
            data = self._backlog.popleft()
            self._backlog_bytes -= len(data)
            self.session.write(0, data)

    def _outgoing(self, lane: int) -> Outgoing:
        outgoing = self._out.get(lane)
        if outgoing is None:
            if lane not in LANES:
                raise UsageError(f"there is no lane {lane}")
            stream = self.session.open_stream(weight=LANE_WEIGHTS[lane])
            self.session.write(stream, bytes((KIND_LANE, lane)))
            outgoing = self._out[lane] = Outgoing(lane, stream)
            self._lane_of_stream[stream] = lane
        return outgoing

    def _introduce(self, source: bytes) -> None:
        node = self._name_of_source(source)
        if node is None:
            raise UsageError(f"no node is known for source {source.hex()}")
        self._introduced_to_peer.add(source)
        self._send_control(control.Introduce({source: node}))
