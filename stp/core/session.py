"""A session: two nodes, their keys, their streams (protocol §4-§9). Above the data space.

The owner calls, in this order: input (`receive_*`, `handle_timeout`, or a command), then `datagrams_to_send`, then
`next_timeout`; events and stream bytes whenever it likes. An Endpoint does the first three for all its sessions.

(1) The dialling side is connected only by HANDSHAKE_DONE in a DATA packet that opened; the listener by the first
    DATA packet that opens, after it authorised the peer.
(2) What is not in TRANSITIONS does not happen: it is an error of ours, never a silent no-op.
(3) Whatever the peer does ends at worst in CLOSE with a code. Input raises nothing.
(4) After CLOSE nothing is retransmitted; a closing side answers the 1st, 2nd, 4th, … packet, a draining one none.
(5) Events are bounded by what the peer may open and by what the owner did not fetch; SessionClosed is the last.
"""

from __future__ import annotations

from hmac import compare_digest
from typing import Any, Final

from stp.core import frames, snapshot
from stp.core.dataspace import DataSpace
from stp.core.errors import ErrorCode, LocalCause, PacketError, ProtocolError, UsageError
from stp.core.events import Connected, EndpointTotals, NewToken, SessionClosed, SessionStatistics
from stp.core.initspace import ClientHandshake, HandshakeState, InitHandshake
from stp.core.keepalive import KeepaliveLearner
from stp.core.migration import Migration, add_moves
from stp.core.output import DATAGRAM_OVERHEAD, Transmit
from stp.core.packet import InitPacket, RetryPacket
from stp.core.path import KEEPALIVE_MOST, LISTENER_PATIENCE, Liveness, Path
from stp.core.recovery import MAX_GUESS, RttEstimator
from stp.core.sizing import Sizer
from stp.core.states import LIVE, TRANSITIONS, Input, SessionContext, State
from stp.core.streamset import StreamSet
from stp.core.trace import Sink, Trace
from stp.core.unreliable import Datagrams
from stp.core.verbs import AnySession

MAX_EARLY: Final = 16
"""DATA packets that are kept until the peer is authorised (R-4-5)."""
CLOSE_PTOS: Final = 3
"""PTOs that CLOSING and DRAINING last (protocol §9, R-9-6)."""


class Session(AnySession):
    """Made by `Endpoint.connect` or by a listening endpoint."""

    __slots__ = (
        "_close_answers",
        "_close_frame",
        "_close_until",
        "_closed_packets",
        "_context",
        "_data",
        "_early",
        "_keepalive",
        "_path",
        "_peer_datagram",
        "_trace",
        "armed",
        "handshake",
    )

    def __init__(
        self,
        context: SessionContext,
        handshake: InitHandshake,
        addr: Any,
        *,
        dialling: bool,
        now: float,
        keepalive: KeepaliveLearner | None = None,
    ) -> None:
        super().__init__(context.agenda, StreamSet(dialling, context.budget), dialling=dialling, now=now)
        self._context = context
        self.handshake: InitHandshake | None = handshake
        """There until confirmed."""
        self.armed: float | None = None
        """The endpoint's: when its heap of timers will look at this session."""
        self._keepalive = keepalive
        self._peer_datagram = 0
        self._path = self._make_path(addr, now)
        self._data: DataSpace | None = None
        self._early: list[bytes] | None = None
        self._close_frame: tuple[int, str] | None = None
        self._close_until = 0.0
        self._close_answers = 0
        self._closed_packets = 0
        self._trace: Trace | None = None
        if dialling:
            self._offer_trace(handshake.original_dcid, now)

    # -- the owner's verbs

    @property
    def addr(self) -> Any:
        return self._path.addr

    @property
    def carrier(self) -> str:
        return "udp"

    @property
    def max_datagram_size(self) -> int:
        return self._path.datagram - DATAGRAM_OVERHEAD

    @property
    def black_holes(self) -> int:
        """How often the packet size fell (R-6-7)."""
        return self._path.sizer.black_holes

    def abandon(self) -> None:
        """Forget an unfinished handshake without a word to the peer."""
        if self.state in LIVE:
            self._die(LocalCause.HANDSHAKE_TIMEOUT)

    def migrate(self, addr: Any = None, *, same_host: bool = False, now: float | None = None) -> None:
        """Our own address has changed, or does with what leaves from now on: go on there, under a fresh CID.

        `addr`: the peer, as the driver names it from there; None: as before. `same_host`: only the port changes, so
        that round trip and window are kept. `now` None: as last heard. Raises UsageError on a session that is not
        established, or that was accepted: only the dialling side migrates (R-8-6).
        """
        if not self.dialling or self.state is not State.ESTABLISHED or self._data is None:
            raise UsageError("only an established session that was dialled can migrate")
        self._now = self._now if now is None else now
        to = self._path.addr if addr is None else addr
        self._moves(self._data).move(to, same_host=same_host, now=self._now)
        self._data.liveness.on_moved()
        self._path = self._data.path
        self.want_to_send()

    def expect(self, seconds: float | None) -> None:
        """The owner waits for the peer: PING after that much silence, then ever later; None: as when idle."""
        if self._data is not None:
            self._data.liveness.expect(seconds)
            self.want_to_send()  # so that the timer is set anew

    def observe(self, sink: Sink | None, now: float | None = None) -> None:
        """Tell `sink` of all that happens from now on, in the words of qlog; None: nobody. `now` None: as last heard.

        A session tells one sink at a time: the newest.
        """
        now = self._now if now is None else now
        trace = None
        if sink is not None:
            trace = Trace(sink, dialling=self.dialling)
            handshake = self.handshake.original_dcid if self.handshake is not None else b""
            cid = self._data.remote_cids.current[1] if self._data is not None else handshake
            trace.started(self._path.addr, cid, now)
        self._trace = trace
        if self._data is not None:
            self._data.observe(trace, now)

    def statistics(self) -> SessionStatistics:
        """A snapshot."""
        if self._data is not None:
            snapshot.take(self._counts, self._data, self._now)
        self._count_datagrams()
        return self._counts

    def add_totals(self, totals: EndpointTotals) -> None:
        """Add what is counted over all sessions: cheap, for an endpoint with thousands of them."""
        data, datagrams = self._data, self._datagrams
        add_moves(totals, self._counts)
        if data is None:  # over: what `statistics` last found
            totals.packets_lost += self._counts.packets_lost
            totals.probe_timeouts += self._counts.probe_timeouts
            totals.key_updates += self._counts.key_updates
        else:
            totals.packets_lost += data.recovery.lost_packets
            totals.probe_timeouts += data.recovery.probe_timeouts
            totals.key_updates += data.phases.updates
        if datagrams is not None:
            totals.datagrams_sent += datagrams.counts.sent
            totals.datagrams_received += datagrams.counts.received
            totals.datagrams_dropped += datagrams.counts.oversized + datagrams.counts.unfetched

    # -- input from the endpoint

    def receive_init(self, received: InitPacket, addr: Any, now: float) -> None:
        """Raises PacketError for an INIT that is none of ours; nothing has changed then."""
        handshake = self.handshake
        if handshake is None or addr != self._path.addr:
            raise PacketError("INIT out of place")
        self._now = now
        handshake.receive_init(received, now)
        if self._trace is not None:
            self._trace.init_received(received, now)
        self._follow_handshake(now)
        self.want_to_send()

    def receive_retry(self, received: RetryPacket, addr: Any, now: float) -> None:
        """Raises PacketError, as `receive_init`."""
        handshake = self.handshake
        if not isinstance(handshake, ClientHandshake) or addr != self._path.addr:
            raise PacketError("Retry out of place")
        self._now = now
        handshake.receive_retry(received, now)
        if self._trace is not None:
            self._trace.retry_received(now)
        self.want_to_send()

    def receive_data(self, data: bytes, size: int, addr: Any, now: float) -> list[bytes]:
        """A buffer of DATA datagrams of `size` bytes each. Returns those that are not for this session."""
        self._now = now
        counts = self._counts
        counts.datagrams_in += -(-len(data) // size)
        counts.bytes_in += len(data)
        space, path = self._data, self._path
        if addr != path.addr:
            return self._receive_from_elsewhere(data, size, addr, now)
        if path.limited:
            path.received += len(data)
        if self.state is State.CLOSING and space is not None:
            self._answer_with_close(space, data, size, now)
        elif self.state is State.HANDSHAKE:
            self._keep_early(data, size)
        elif space is not None and self.state in LIVE:
            return self._receive(space, data, size, addr, now)
        return []

    def _receive(self, space: DataSpace, data: bytes, size: int, addr: Any, now: float) -> list[bytes]:
        known = space.acks.next
        space.source = addr
        try:
            strange = space.receive(data, size, now)
        except ProtocolError as exc:
            self.close(exc.code, str(exc), now)
            return []
        if self.state is State.KEYED and not self.dialling and space.acks.next != known:
            self._prove(now)
        self.want_to_send()
        return strange

    def _receive_from_elsewhere(self, data: bytes, size: int, addr: Any, now: float) -> list[bytes]:
        """Another address than the peer's: the peer has moved, if it is the dialling side and says something new."""
        space = self._data
        if self.dialling or self.state is not State.ESTABLISHED or space is None:
            self._counts.wrong_address += 1
            return []
        known, cid = space.acks.next, space.opener.current
        strange = self._receive(space, data, size, addr, now)
        if space.acks.next != known and self.live:
            fresh = space.opener.current != cid
            self._moves(space).follow(addr, len(data), now, fresh_cid=fresh)
            self._path = space.path
        else:
            self._counts.wrong_address += 1
        return strange

    def receive_reset(self, token: bytes, now: float) -> bool:
        """Whether this is our peer's reset token: it was started anew, the session is over (protocol §8, R-8-5)."""
        if self.state is not State.ESTABLISHED or self._data is None:
            return False
        if not sum(compare_digest(token, known) for known in self._data.remote_cids.tokens.values()):
            return False
        self._end(Input.SILENCE, LocalCause.RESET_BY_PEER, "", by_peer=True, now=now)
        return True

    def on_too_large(self, size: int, now: float) -> None:
        """The kernel will not send datagrams of `size` bytes to the peer."""
        self._path.sizer.on_too_large(size, now)
        if self._path.sizer.blocked and self.state in LIVE:
            self.close(ErrorCode.PATH, "the first hop carries no full packets", now)

    def handle_timeout(self, now: float) -> None:
        """The time of `next_timeout` has come, or an earlier one: then nothing happens."""
        self._now = now
        self.want_to_send()
        if self.state in (State.CLOSING, State.DRAINING):
            if self.handshake is not None:
                self.handshake.handle_timeout(now)
            if now >= self._close_until:
                self._enter(Input.DRAINED)
                if self._trace is not None:
                    self._trace.state("closed", now)
                self.handshake = self._data = None
            return
        if self.handshake is not None:
            self.handshake.handle_timeout(now)
            self._follow_handshake(now)
        if self._data is not None and self.state in LIVE:
            cause = self._data.handle_timeout(now, self._context.dead_time)
            self._path = self._data.path
            if cause is not None:
                self._die(cause)

    # -- output to the endpoint

    def datagrams_to_send(self, now: float, out: list[Transmit]) -> None:
        """Append what may leave now."""
        self._now = now
        before = len(out)
        handshake, space = self.handshake, self._data
        if handshake is not None:
            out += [Transmit(self._path.addr, d) for d in handshake.datagrams_to_send(now)]
            if self._trace is not None:
                for sent in out[before:]:
                    self._trace.init_sent(sent.data, now)
        if space is not None:
            if self.state in LIVE:
                try:
                    space.output.send(now, out)
                except ProtocolError as exc:
                    self.close(exc.code, str(exc), now)
            if self._close_frame is not None and self._close_answers:
                self._close_answers = 0
                space.output.send_close(*self._close_frame, out)
        counts = self._counts
        for sent in out[before:]:
            counts.datagrams_out += -(-len(sent.data) // (sent.segment_size or len(sent.data)))
            counts.bytes_out += len(sent.data)

    def next_timeout(self) -> float | None:
        """When to call `handle_timeout`; None once the session is CLOSED. Valid after `datagrams_to_send`."""
        if self.state is State.CLOSED:
            return None
        if self.state in (State.CLOSING, State.DRAINING):
            due = self._close_until
        elif self._data is not None:
            due = self._data.next_timeout(self._context.dead_time)
        else:
            due = float("inf")
        other = self.handshake.next_timeout() if self.handshake is not None else None
        return due if other is None or due < other else other

    # -- what the data space tells (dataspace.Inbox)

    def on_session_frame(
        self, frame: frames.HandshakeDone | frames.NewToken | frames.Close, now: float
    ) -> None:
        match frame:
            case frames.HandshakeDone():
                if not self.dialling:
                    raise ProtocolError("HANDSHAKE_DONE from the dialling side")
                if self.state is State.KEYED:
                    assert self._data is not None
                    self._data.remote_cids.tokens[0] = frame.token
                    self._prove(now)
            case frames.NewToken():
                if not self.dialling:
                    raise ProtocolError("NEW_TOKEN from the dialling side")
                self.on_event(NewToken(frame.token))
            case frames.Close():
                if self.state in LIVE:
                    self._end(Input.PEER_CLOSE, ErrorCode.of(frame.code), frame.reason, by_peer=True, now=now)

    def on_cids(self, wanted: int, gone: list[bytes]) -> None:
        assert self._data is not None
        self._context.on_cids(self, self._data.local_cids.issue(wanted), gone)

    def on_suspect(self) -> None:
        if self.state is State.ESTABLISHED:
            self._context.agenda.suspects[self] = None

    # -- inside

    def _unreliable(self) -> Datagrams:
        found = super()._unreliable()
        if self._data is not None:
            self._data.output.datagrams = found
        return found

    def _make_path(self, addr: Any, now: float) -> Path:
        """A way to the peer of which nothing is known yet."""
        sizer = Sizer(*self._context.sizes_for(addr), now)
        if self._peer_datagram:
            sizer.bound(self._peer_datagram)
        if self.state is State.ESTABLISHED:
            sizer.begin(now)
        return Path(addr, sizer)

    def _moves(self, space: DataSpace) -> Migration:
        if space.migration is None:
            context = self._context
            space.migration = Migration(
                space,
                make_path=self._make_path,
                make_congestion=context.congestion,
                random_bytes=context.random_bytes,
                counts=self._counts,
            )
        return space.migration

    def _offer_trace(self, origin: bytes, now: float) -> None:
        """Does anybody want the event log of this session?"""
        observer = self._context.observer
        sink = observer(self, origin) if observer is not None else None
        if sink is not None:
            self.observe(sink, now)

    def _rtt(self) -> float:
        return self._data.recovery.rtt.smoothed if self._data is not None else 0.0

    def _enter(self, what: Input) -> None:
        self.state = TRANSITIONS[self.state, what]

    def _follow_handshake(self, now: float) -> None:
        """The handshake may have moved: so must we."""
        handshake = self.handshake
        assert handshake is not None
        self.peer = handshake.peer
        if handshake.state is HandshakeState.DONE and self.state is State.HANDSHAKE:
            self._use_keys(handshake, now)
        elif handshake.state in (HandshakeState.REFUSED, HandshakeState.OVER) and self.state in LIVE:
            refused = handshake.refused
            if refused is None:
                self._die(LocalCause.HANDSHAKE_TIMEOUT)
            elif handshake.state is HandshakeState.OVER:
                self._end(Input.SILENCE, refused.code, refused.reason, by_peer=True, now=now)
            else:
                self._end(Input.LOCAL_CLOSE, refused.code, refused.reason, by_peer=refused.by_peer, now=now)
                self._close_until = now + CLOSE_PTOS * handshake.pto

    def _use_keys(self, handshake: InitHandshake, now: float) -> None:
        """Both certificates are verified: DATA can flow. The listener says so; the client shows that it is there."""
        context, keys, hello = self._context, handshake.keys, handshake.peer_hello
        assert keys is not None
        assert hello is not None
        assert handshake.peer_cid is not None
        self._enter(Input.KEYS)
        self.id = keys.session_id
        self.suite = keys.suite
        parameters, guess = hello.parameters, min(handshake.rtt or MAX_GUESS, MAX_GUESS)
        self._peer_datagram = parameters.max_datagram
        self._path.sizer.bound(parameters.max_datagram)
        self._streams.peer_max_streams = [parameters.max_streams_bidi, parameters.max_streams_uni]
        space = self._data = DataSpace(
            dialling=self.dialling,
            keys=keys,
            cid=handshake.cid,
            peer_cid=handshake.peer_cid,
            path=self._path,
            rtt=RttEstimator(None, parameters.max_ack_delay_ms / 1000, guess=guess),
            streams=self._streams,
            liveness=Liveness(self._patience(), now, self._keepalive),
            cid_source=context.cid_source,
            congestion=context.congestion,
            random_bytes=context.random_bytes,
            key_limits=context.key_limits,
            scratch=context.scratch,
            inbox=self,
        )
        space.output.datagrams = self._datagrams
        if self._trace is not None:
            space.observe(self._trace, now)
            self._trace.state("handshake_complete", now)
        elif not self.dialling:
            self._offer_trace(handshake.original_dcid, now)
        if self.dialling:
            space.output.say(frames.Ping().encode())
        else:
            space.output.say(frames.HandshakeDone(context.reset_token(handshake.cid)).encode())
            context.on_cids(self, space.issue_cids(), [])
            if context.node_token is not None and self.peer is not None:
                space.output.say(frames.NewToken(context.node_token(self.peer, now)).encode())
        early, self._early = self._early or (), None
        for datagram in early:
            self.receive_data(datagram, len(datagram), self._path.addr, now)

    def _patience(self) -> float:
        """Seconds of silence before a PING of ours (R-8-9)."""
        if self.dialling:
            return self._context.keepalive
        return max(self._context.keepalive, KEEPALIVE_MOST) + LISTENER_PATIENCE

    def _prove(self, now: float) -> None:
        """The peer has shown that it has our keys and, to a client, that it let us in (1, R-4-6)."""
        assert self.peer is not None
        assert self._data is not None
        self._enter(Input.PROOF)
        self._data.phases.confirm(now)
        if self._trace is not None:
            self._trace.state("handshake_confirmed", now)
        self._path.sizer.begin(now)
        self.handshake = None
        before = list(self._events)
        self._events.clear()
        for event in (Connected(self.peer), *before):
            self.on_event(event)
        if self.dialling:
            self._context.on_cids(self, self._data.issue_cids(), [])

    def _keep_early(self, data: bytes, size: int) -> None:
        """DATA before we have keys, or before the peer is authorised."""
        self._early = self._early if self._early is not None else []
        for start in range(0, len(data), size):
            if len(self._early) >= MAX_EARLY:
                self._counts.early_dropped += 1
            else:
                self._counts.early_kept += 1
                self._early.append(data[start : start + size])

    def _close(self, code: ErrorCode, reason: str, now: float) -> None:
        if self._data is not None:
            self._close_frame = (code, reason)
            self._close_answers = 1
        if self.handshake is not None:
            self.handshake.close(code, reason, now)
        self._end(Input.LOCAL_CLOSE, code, reason, by_peer=False, now=now)

    def _die(self, cause: LocalCause) -> None:
        self._end(Input.SILENCE, cause, "", by_peer=False, now=self._now)

    def _end(
        self, what: Input, code: ErrorCode | LocalCause, reason: str, *, by_peer: bool, now: float
    ) -> None:
        """The session is over; CLOSING and DRAINING only linger."""
        if self.state is not State.ESTABLISHED:
            self._events.clear()  # never connected: its end is all there is to tell
        unheard = not self.dialling and self.state is not State.ESTABLISHED
        self._enter(what)
        pto = self._data.recovery.rtt.pto() if self._data is not None else 0.0
        if self.handshake is not None:
            pto = max(pto, self.handshake.pto)
        self._close_until = now + CLOSE_PTOS * pto
        if self._trace is not None:
            number = int(code) if isinstance(code, ErrorCode) else -1
            self._trace.closed("remote" if by_peer else "local", number, reason or str(code), now)
        if self._data is not None:
            self.statistics()  # the last one
            self._data.recovery.forget()
        self._streams.close()
        if self._datagrams is not None:
            self._datagrams.forget()
        self._early = None
        if self.state is State.CLOSED:
            if self._trace is not None:
                self._trace.state("closed", now)
            self.handshake = self._data = None
        elif what is Input.PEER_CLOSE:
            self.handshake = None
        self.want_to_send()
        if not unheard:
            self.on_event(SessionClosed(code, reason, by_peer))
        elif self._context.on_refused is not None and (self.peer is not None or isinstance(code, ErrorCode)):
            self._context.on_refused(self._path.addr, self.peer, reason or str(code))

    def _answer_with_close(self, space: DataSpace, data: bytes, size: int, now: float) -> None:
        """Packets while CLOSING: look only for the peer's CLOSE, and repeat ours ever more rarely (4)."""
        opened, plain = space.overhear(data, size, now)
        for packet in plain:
            try:
                said = frames.decode(packet)
            except ProtocolError:
                continue
            if any(isinstance(frame, frames.Close) for frame in said) and self.state is State.CLOSING:
                self._enter(Input.PEER_CLOSE)
                return
        for _ in range(opened):
            self._closed_packets += 1
            if self._closed_packets & (self._closed_packets - 1) == 0:
                self._close_answers = 1
                self.want_to_send()
