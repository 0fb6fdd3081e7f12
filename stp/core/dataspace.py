"""The DATA packets of one session: routes frames to their owners (protocol §5, §6).

Above the packetizer, below the session; `output.py` is its sending half, `initspace.py` its counterpart during the
handshake.

(1) Every frame has one owner: this file decodes, asks and tells, and keeps nothing of what a frame says.
(2) ProtocolError is the only exception that input can raise; its code closes the session.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from stp.core import frames
from stp.core.acks import AckTracker
from stp.core.congestion import Congestion
from stp.core.errors import ErrorCode, LocalCause, ProtocolError
from stp.core.events import Event, StreamWritable
from stp.core.keys import SessionKeys
from stp.core.migration import Migration
from stp.core.output import Output
from stp.core.packet import DATA_OVERHEAD
from stp.core.packetizer import Opener, Sealer
from stp.core.path import (
    EXTRA_CIDS,
    LINGER_PTOS,
    CidSource,
    Liveness,
    LocalCids,
    Path,
    RemoteCids,
)
from stp.core.phases import KeyLimits, Phases, fail_limit, seal_limit
from stp.core.recovery import Recovery, RttEstimator
from stp.core.routing import take_stream, take_stream_frame
from stp.core.scratch import Scratch
from stp.core.sizing import BASE_DATAGRAM
from stp.core.streams import WRITABLE_ROOM
from stp.core.streamset import StreamSet
from stp.core.trace import Trace


class Inbox(Protocol):
    """The session, as its DATA packets see it."""

    def on_event(self, event: Event) -> None: ...

    def on_readable(self, stream: int) -> None: ...

    def on_datagram(self, data: bytes) -> None: ...

    def on_session_frame(
        self, frame: frames.HandshakeDone | frames.NewToken | frames.Close, now: float
    ) -> None: ...

    def on_cids(self, wanted: int, gone: list[bytes]) -> None:
        """So many CIDs of ours were retired, and to these nothing will come any more."""

    def on_suspect(self) -> None:
        """A dialling side hears nothing: another port may help (protocol §8)."""


class DataSpace:
    """Made when the DATA keys are there; lives until the session closes."""

    __slots__ = (
        "_at_once",
        "_dialling",
        "_inbox",
        "acks",
        "fail_limit",
        "liveness",
        "local_cids",
        "migration",
        "opener",
        "output",
        "path",
        "phases",
        "recovery",
        "remote_cids",
        "sealer",
        "source",
        "streams",
        "trace",
    )

    def __init__(
        self,
        *,
        dialling: bool,
        keys: SessionKeys,
        cid: bytes,
        peer_cid: bytes,
        path: Path,
        rtt: RttEstimator,
        streams: StreamSet,
        liveness: Liveness,
        cid_source: CidSource,
        congestion: Callable[[int], Congestion],
        random_bytes: Callable[[int], bytes],
        key_limits: KeyLimits,
        scratch: Scratch,
        inbox: Inbox,
    ) -> None:
        mine, theirs = (keys.client, keys.server) if dialling else (keys.server, keys.client)
        my_pn, their_pn = keys.client_pn_key, keys.server_pn_key
        if not dialling:
            my_pn, their_pn = their_pn, my_pn
        self.sealer = Sealer(mine, my_pn, peer_cid, random_bytes, seal_limit(keys, key_limits), scratch)
        self.opener = Opener(theirs, their_pn, cid, scratch)
        self.phases = Phases(keys, mine, theirs, key_limits, path.datagram)
        self.fail_limit = fail_limit(keys, key_limits)
        self.acks = AckTracker()
        self.recovery = Recovery(rtt, congestion(path.datagram), path.sizer)
        self.path = path
        self.migration: Migration | None = None
        """There once the session has moved."""
        self.source = path.addr
        """Where what is being received came from."""
        self._dialling = dialling
        self.streams = streams
        self.liveness = liveness
        self.local_cids = LocalCids(cid, cid_source)
        self.remote_cids = RemoteCids(peer_cid)
        self.trace: Trace | None = None
        """Who is told of every packet; nobody, as a rule."""
        self._inbox = inbox
        self._at_once = False
        self.output = Output(
            sealer=self.sealer,
            phases=self.phases,
            acks=self.acks,
            recovery=self.recovery,
            path=path,
            streams=streams,
            local_cids=self.local_cids,
            remote_cids=self.remote_cids,
        )

    def issue_cids(self) -> list[bytes]:
        """Announce the CIDs that the peer may use later (protocol §4)."""
        return self.local_cids.issue(EXTRA_CIDS)

    # -- input

    def receive(self, data: bytes, size: int, now: float) -> list[bytes]:
        """A buffer of datagrams of `size` bytes, the last maybe shorter. Returns those that are not for us.

        Raises ProtocolError; what came before the offence has been taken.
        """
        if self.trace is not None:
            return self._receive_traced(self.trace, data, size, now)
        streams = self.streams
        opened, eliciting, touched, rest, strange = self.opener.open_buffer(
            data, size, streams.recv, self.acks, now
        )
        if opened:
            self.liveness.on_heard(now)
        for stream, grown in touched:
            stream.merge()
            if grown and stream.id:
                streams.on_bytes(grown)
            if stream.chunks:
                self._inbox.on_readable(stream.id)
        for plain in rest:
            eliciting += self._route(plain, now)
        self.acks.on_eliciting(eliciting, now, at_once=self._at_once)
        self._at_once = False
        if strange:
            strange = self._receive_strange(strange, now)
        if self.opener.failed >= self.fail_limit:
            raise ProtocolError("too many packets that do not open", ErrorCode.AEAD_LIMIT)
        return strange

    def _receive_traced(self, trace: Trace, data: bytes, size: int, now: float) -> list[bytes]:
        """As `receive`, a datagram at a time, so that each is told of before what it brings about."""
        left: list[bytes] = []
        trace.at(now)
        self.trace = None
        try:
            for start in range(0, len(data), size):
                datagram = data[start : start + size]
                plain = trace.peek(datagram)
                if plain is not None:
                    trace.received(datagram, plain, fresh=self.acks.fresh(self.opener.number(datagram)))
                failed = self.opener.failed
                left += self.receive(datagram, len(datagram), now)
                if self.opener.failed != failed:
                    trace.dropped(datagram)
                elif plain is None and (plain := trace.peek(datagram)) is not None:
                    trace.received(datagram, plain, fresh=True)  # it moved the phase, or the CID
        finally:
            if self.recovery.trace is trace:  # nobody has stopped looking meanwhile
                self.trace = trace
        return left

    def observe(self, trace: Trace | None, now: float) -> None:
        """Tell `trace` of every packet from now on; None: nobody."""
        if self.trace is not None:
            self.trace.leave(self.recovery)
        self.trace = trace
        if trace is not None:
            trace.keys(self.sealer, self.opener, self.recovery, now)

    def _receive_strange(self, strange: list[bytes], now: float) -> list[bytes]:
        """Packets to another CID of ours or of another phase, one by one; what is neither is returned."""
        left = []
        opener = self.opener
        for datagram in strange:
            cid = datagram[1:9]
            if cid != opener.current:
                if self.local_cids.ours(cid):
                    self._receive_elsewhere(datagram, cid, now)
                else:
                    left.append(datagram)
            elif opener.of_other_phase(datagram):
                self._receive_other_phase(datagram, now)
            elif datagram[0] == opener.first_byte and len(datagram) > DATA_OVERHEAD:
                self.receive(datagram, len(datagram), now)  # the one before it moved the phase
            else:
                left.append(datagram)
        return left

    def _receive_elsewhere(self, datagram: bytes, cid: bytes, now: float) -> None:
        """The peer may move to any CID that we issued; the highest number so far decides which is current."""
        before, known = self.opener.current, self.acks.next
        self.opener.use_cid(cid)
        self.receive(datagram, len(datagram), now)
        if self.acks.next == known:
            self.opener.use_cid(before)

    def _receive_other_phase(self, datagram: bytes, now: float) -> None:
        plain = self._open_other_phase(datagram, now)
        if plain is not None:
            self.liveness.on_heard(now)
            eliciting = self._route(plain, now)
            self.acks.on_eliciting(eliciting, now, at_once=self._at_once)
            self._at_once = False

    def _open_other_phase(self, datagram: bytes, now: float) -> bytes | None:
        pto = self.recovery.rtt.pto()
        return self.phases.open(datagram, self.opener, self.sealer, self.acks, pto, now)

    def overhear(self, data: bytes, size: int, now: float) -> tuple[int, list[bytes]]:
        """As `receive`, while closing: how many packets opened, and what they say but for stream bytes in order."""
        opened, _, _, plain, strange = self.opener.open_buffer(data, size, {}, self.acks, now)
        for datagram in strange:
            if datagram[1:9] == self.opener.current and self.opener.of_other_phase(datagram):
                try:
                    found = self._open_other_phase(datagram, now)
                except ProtocolError:
                    continue  # we are closing anyhow
                if found is not None:
                    opened += 1
                    plain.append(found)
        return opened, plain

    def _route(self, plain: bytes, now: float) -> bool:
        """The frames of one packet, in order. Whether it asks for an ACK."""
        pos, end = 0, len(plain)
        eliciting = False
        while pos < end:
            kind = plain[pos]
            if kind == frames.ACK:
                delay_us, ranges, pos = frames.parse_ack(plain, pos)
                self._on_ack(delay_us, ranges, now)
            elif kind == frames.PADDING:
                break  # the rest of the packet
            elif frames.STREAM <= kind <= frames.STREAM_LENGTH_FIN:
                pos = take_stream(plain, pos, kind, self.streams, self._inbox)
                eliciting = True
            elif kind == frames.DATAGRAM:  # to the end of the packet
                self._inbox.on_datagram(plain[pos + 1 :])
                return True
            else:
                frame, pos = frames.decode_one(plain, pos)
                self._on_frame(frame, now, end)
                eliciting = eliciting or kind != frames.CLOSE
        return eliciting

    def _on_ack(self, delay_us: int, ranges: list[tuple[int, int]], now: float) -> None:
        sealer = self.sealer
        if ranges[0][1] > sealer.next:
            raise ProtocolError("ACK of a packet that was never sent")
        if self.phases.unanswered:
            self.phases.on_ack(ranges[0][1], sealer)
        lowest = ranges[-1][0]
        for pn in sealer.skipped:
            if pn >= lowest and any(start <= pn < stop for start, stop in ranges):
                raise ProtocolError("ACK of a packet that was left out")
        new = self.recovery.on_ack(ranges, delay_us / 1e6, now)
        if self.recovery.trace is not None:
            self.recovery.trace.metrics(now, self.recovery)
        if new:
            for sender in self.streams.send.values():
                if sender.full and sender.room() >= WRITABLE_ROOM:
                    sender.full = False
                    self._inbox.on_event(StreamWritable(sender.id))
        if self.recovery.sizer.blocked:
            raise ProtocolError("the path carries no full packets", ErrorCode.PATH)

    def _on_frame(self, frame: frames.Frame, now: float, size: int) -> None:
        """A frame of a packet that held `size` bytes of them."""
        if take_stream_frame(frame, self.streams, self._inbox, now, self.recovery.rtt.smoothed):
            return
        match frame:
            case frames.Ping():
                self._at_once = True
            case frames.NewCid():
                if self.remote_cids.on_new_cid(frame):
                    self.sealer.use_cid(self.remote_cids.current[1])
            case frames.RetireCid():
                self._on_retire(frame, now)
            case frames.PathChallenge():
                self._on_challenge(frame, now, size)
            case frames.PathResponse():
                self._at_once = True
                if self.migration is not None:
                    self.migration.on_response(frame.data, now)
            case frames.HandshakeDone() | frames.NewToken() | frames.Close():
                self._at_once = True
                self._inbox.on_session_frame(frame, now)
            case frames.Crypto():
                raise ProtocolError("CRYPTO in a DATA packet")
            case _:
                pass

    def _on_challenge(self, frame: frames.PathChallenge, now: float, size: int) -> None:
        """A dialling side answers in a full packet, so that its listener is freed of its limit; a listener, to
        whatever address, with no more than what it got (RFC 9000 §8.2.2)."""
        self._at_once = True
        full = BASE_DATAGRAM if self._dialling else size + DATA_OVERHEAD
        self.output.answer(frames.PathResponse(frame.data).encode(), self.source, full)
        if self._dialling:
            self.liveness.on_found_anew(now)

    def _on_retire(self, frame: frames.RetireCid, now: float) -> None:
        cid = self.local_cids.retire(frame.seq, self.opener.current)
        if cid is not None:
            gone = self.local_cids.linger(cid, now + LINGER_PTOS * self.recovery.rtt.pto())
            self._inbox.on_cids(1, gone)

    # -- time

    def next_timeout(self, dead_time: float) -> float:
        """When `handle_timeout` is to be called; a session that is alive always waits for something."""
        recovery = self.recovery
        found = recovery.next_timeout()
        due = self.liveness.next_ping() if found is None else found
        others: list[float | None] = []
        if not self.output.starved:
            others += [self.acks.deadline, self.output.wake_at]
        elif found is not None:
            due = float("inf")  # nothing may leave: the peer speaks, or the trial ends
        if recovery.pto_count and recovery.waiting_since is not None:  # before the first probe nobody is dead
            pto = recovery.rtt.pto()
            due = min(due, self.liveness.dead_at(recovery.waiting_since, pto, dead_time))
            if self._dialling:
                due = min(due, self.liveness.suspect_at(recovery.waiting_since, pto))
        if self.phases.previous is not None:
            others.append(self.phases.previous.until)
        if self.local_cids.lingering:
            others.append(self.local_cids.lingering[0][0])
        if self.migration is not None:
            others.append(self.migration.next_timeout())
        for other in others:
            if other is not None and other < due:
                due = other
        return due

    def handle_timeout(self, now: float, dead_time: float) -> LocalCause | None:
        """Why the session is over, if it is. Sending is the caller's next step anyhow."""
        recovery, liveness = self.recovery, self.liveness
        self.phases.drop(now)
        if recovery.sent and recovery.waiting_since is not None:
            pto = recovery.rtt.pto()
            if now >= liveness.dead_at(recovery.waiting_since, pto, dead_time):
                return LocalCause.DEAD_PEER
            suspect = recovery.pto_count and now >= liveness.suspect_at(recovery.waiting_since, pto)
            if self._dialling and suspect:
                liveness.on_suspicion()
                self._inbox.on_suspect()
        elif now >= liveness.next_ping():
            awaited = self._dialling and liveness.impatient
            if not liveness.on_ping_time(now):
                return LocalCause.IDLE_TIMEOUT
            if awaited:
                recovery.probe()  # tracked, as traffic is: soon suspect where it is not acknowledged (R-8-8)
            else:
                self.output.ping()
            if self._dialling and liveness.doubtful:
                self._inbox.on_suspect()
        if not self.output.starved:
            recovery.on_timeout(now)
        if self.migration is not None:
            self.migration.handle_timeout(now)
        gone = self.local_cids.forget(now) if self.local_cids.lingering else []
        if gone:
            self._inbox.on_cids(0, gone)
        return None
