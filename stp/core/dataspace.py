"""The DATA packets of one session: routes frames to their owners, fills and paces packets (protocol §5, §6).

Above the packetizer, below the session; `initspace.py` is its counterpart during the handshake.

(1) Every frame has one owner: this file decodes, asks and tells, and keeps nothing of what a frame says.
(2) What asks for an ACK leaves only within the congestion window and the pacing, probes apart; ACKs always leave.
(3) ProtocolError is the only exception that input can raise; its code closes the session.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from struct import error as struct_error
from typing import Any, Final, Protocol

from attrs import define

from stp.core import frames
from stp.core.acks import AckTracker
from stp.core.congestion import Congestion, Pacer, burst_packets, pacing_rate
from stp.core.errors import ErrorCode, FrameEncodingError, LocalCause, ProtocolError
from stp.core.events import Event, StreamOpened, StreamReset, StreamStopped, StreamWritable
from stp.core.frames import STREAM_HEAD, STREAM_HEAD_SIZE, STREAM_LENGTH_HEAD, STREAM_LENGTH_HEAD_SIZE
from stp.core.keys import SessionKeys
from stp.core.packet import DATA_OVERHEAD
from stp.core.packetizer import BULK_OVERHEAD, Opener, PacketBuilder, Sealer
from stp.core.path import EXTRA_CIDS, CidSource, Liveness, LocalCids, Path, RemoteCids
from stp.core.phases import KeyLimits, Phases, fail_limit, seal_limit
from stp.core.recovery import Recovery, RttEstimator, Sent
from stp.core.streams import WRITABLE_ROOM, SendStream
from stp.core.streamset import MAX_DATA, MAX_STREAM_DATA, StreamSet

BURSTS_PER_TURN: Final = 4
"""Bursts that one session sends before others, and what has arrived meanwhile, get their turn."""
MAX_PATH_ANSWERS: Final = 8
"""PATH_CHALLENGEs that wait for their answer; older ones are forgotten."""

MAX_FRAME: Final = 300
"""Bytes: every frame of ours but STREAM fits. A packet that was left with more room holds all there was to say."""

_PING: Final = b"\x01"


@define
class Transmit:
    """Bytes for the network: one datagram, or with `segment_size` several of that size, the last maybe shorter."""

    addr: Any
    data: bytes
    segment_size: int = 0


class Inbox(Protocol):
    """The session, as its DATA packets see it."""

    def on_event(self, event: Event) -> None: ...

    def on_readable(self, stream: int) -> None: ...

    def on_session_frame(
        self, frame: frames.HandshakeDone | frames.NewToken | frames.Close, now: float
    ) -> None: ...

    def on_cid_retired(self, cid: bytes) -> None: ...


class DataSpace:
    """Made when the DATA keys are there; lives until the session closes."""

    __slots__ = (
        "_answers",
        "_at_once",
        "_inbox",
        "_ping",
        "_pruning",
        "_to_say",
        "_wake_at",
        "acks",
        "fail_limit",
        "liveness",
        "local_cids",
        "opener",
        "pacer",
        "path",
        "phases",
        "recovery",
        "remote_cids",
        "sealer",
        "streams",
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
        inbox: Inbox,
    ) -> None:
        mine, theirs = (keys.client, keys.server) if dialling else (keys.server, keys.client)
        my_pn, their_pn = keys.client_pn_key, keys.server_pn_key
        if not dialling:
            my_pn, their_pn = their_pn, my_pn
        self.sealer = Sealer(mine, my_pn, peer_cid, random_bytes, seal_limit(keys, key_limits))
        self.opener = Opener(theirs, their_pn, cid)
        self.phases = Phases(keys, mine, theirs, key_limits, path.datagram)
        self.fail_limit = fail_limit(keys, key_limits)
        self.acks = AckTracker()
        self.recovery = Recovery(rtt, congestion(path.datagram))
        self.pacer = Pacer()
        self.path = path
        self.streams = streams
        self.liveness = liveness
        self.local_cids = LocalCids(cid, cid_source)
        self.remote_cids = RemoteCids(peer_cid)
        self._inbox = inbox
        self._to_say: dict[bytes, None] = {}
        self._answers: list[bytes] = []
        self._at_once = False
        self._ping = False
        self._pruning = False
        self._wake_at: float | None = None

    def say(self, frame: bytes) -> None:
        """A frame of the session's own: said until it is acknowledged."""
        self._to_say[frame] = None

    def issue_cids(self) -> list[bytes]:
        """Announce the CIDs that the peer may use later (protocol §4)."""
        return self.local_cids.issue(EXTRA_CIDS)

    def ping(self) -> None:
        """Ask for an ACK, once, unless one of our packets is under way anyhow."""
        self._ping = True

    # -- input

    def receive(self, data: bytes, size: int, now: float) -> list[bytes]:
        """A buffer of datagrams of `size` bytes, the last maybe shorter. Returns those that are not for us.

        Raises ProtocolError; what came before the offence has been taken.
        """
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

    def _receive_strange(self, strange: list[bytes], now: float) -> list[bytes]:
        """Packets to another CID of ours or of another phase, one by one; what is neither is returned."""
        left = []
        opener = self.opener
        for datagram in strange:
            cid = datagram[1:9]
            if cid != opener.current:
                if cid in self.local_cids.active.values():
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
                pos = self._on_stream(plain, pos, kind)
                eliciting = True
            else:
                frame, pos = frames.decode_one(plain, pos)
                self._on_frame(frame, now)
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
        if self.recovery.on_ack(ranges, delay_us / 1e6, now):
            for sender in self.streams.send.values():
                if sender.full and sender.room() >= WRITABLE_ROOM:
                    sender.full = False
                    self._inbox.on_event(StreamWritable(sender.id))

    def _on_stream(self, plain: bytes, pos: int, kind: int) -> int:
        """The STREAM frame at `pos`, without an object: there is one in every small packet. Its end."""
        number: int
        offset: int
        length: int
        try:
            if kind >= frames.STREAM_LENGTH:
                _, number, offset, length = STREAM_LENGTH_HEAD.unpack_from(plain, pos)
                pos += STREAM_LENGTH_HEAD_SIZE
            else:
                _, number, offset = STREAM_HEAD.unpack_from(plain, pos)
                pos += STREAM_HEAD_SIZE
                length = len(plain) - pos
        except struct_error:
            raise FrameEncodingError("STREAM cut short") from None
        end = pos + length
        if end > len(plain):
            raise FrameEncodingError("STREAM longer than its packet")
        fin = kind & frames.FIN_BIT == 1
        if fin and not number:
            raise ProtocolError("FIN of the control stream")
        stream = self.streams.recv.get(number)
        if stream is None:
            stream, opened = self.streams.receiver(number)
            self._announce(opened)
            if stream is None:
                return end
        grown = stream.insert(offset, plain[pos:end], fin)
        if grown and number:
            self.streams.on_bytes(grown)
        if stream.chunks or stream.complete:
            self._inbox.on_readable(number)
        return end

    def _announce(self, opened: Iterable[int]) -> None:
        for number in opened:
            self._inbox.on_event(StreamOpened(number))

    def _on_frame(self, frame: frames.Frame, now: float) -> None:
        streams, rtt = self.streams, self.recovery.rtt.smoothed
        match frame:
            case frames.Ping():
                self._at_once = True
            case frames.MaxData():
                streams.peer_limit = max(streams.peer_limit, frame.max)
            case frames.MaxStreamData():
                streams.on_max_stream_data(frame.stream, frame.max)
            case frames.MaxStreams():
                streams.on_max_streams(frame.kind, frame.max)
            case frames.DataBlocked():
                streams.on_blocked(MAX_DATA, 0)
            case frames.StreamDataBlocked():
                streams.on_blocked(MAX_STREAM_DATA, frame.stream)
            case frames.ResetStream():
                heard, opened = streams.on_reset(frame, now, rtt)
                self._announce(opened)
                if heard:
                    self._inbox.on_event(StreamReset(frame.stream, frame.code))
            case frames.StopSending():
                if streams.on_stop(frame):
                    self._inbox.on_event(StreamStopped(frame.stream, frame.code))
            case frames.NewCid():
                if self.remote_cids.on_new_cid(frame):
                    self.sealer.use_cid(self.remote_cids.current[1])
            case frames.RetireCid():
                self._on_retire(frame)
            case frames.PathChallenge():
                self._at_once = True
                self._answers.append(frames.PathResponse(frame.data).encode())
                del self._answers[:-MAX_PATH_ANSWERS]
            case frames.HandshakeDone() | frames.NewToken() | frames.Close():
                self._at_once = True
                self._inbox.on_session_frame(frame, now)
            case frames.Crypto():
                raise ProtocolError("CRYPTO in a DATA packet")
            case _:
                pass  # STREAMS_BLOCKED, PATH_RESPONSE, DATAGRAM: nothing here waits for them

    def _on_retire(self, frame: frames.RetireCid) -> None:
        cid = self.local_cids.retire(frame.seq, self.opener.current)
        if cid is not None:
            self._inbox.on_cid_retired(cid)

    # -- output

    def send(self, now: float, out: list[Transmit]) -> None:
        """Append what may leave now."""
        sealer, phases = self.sealer, self.phases
        if sealer.next - sealer.first >= phases.packets or now >= phases.due_at:
            phases.begin(sealer, self.recovery.largest_acked, self.recovery.rtt.pto(), now)
        self._wake_at = None
        if self._ping:
            self._ping = False
            if (
                not self.recovery.sent
            ):  # not tracked: an idle session's silence has rules of its own (path.py)
                sealer.run()
                self._emit(sealer.seal(_PING), 0, out)
        for _ in range(BURSTS_PER_TURN):
            if not self._send_next(now, out):
                return
        self._wake_at = now  # there may be more

    def _send_next(self, now: float, out: list[Transmit]) -> bool:
        """One burst or one packet of mixed frames; False when there is nothing more to send now."""
        recovery, path = self.recovery, self.path
        if recovery.probes:
            self.sealer.run()
            self._send_mixed(now, out, streams=True)
            return True
        sender = self.streams.pick()
        control = self._has_control()
        due = self.acks.owing and self.acks.due(now)
        room = recovery.congestion.cwnd - recovery.in_flight
        if sender is None:
            recovery.app_limited = room > 0
            if not due and not control:
                return False
        elif room < path.datagram:
            recovery.app_limited = False
            sender = None
        elif sender.id and not self.pacer.may_send(now):
            recovery.app_limited = False
            self._wake_at = self.pacer.next_at
            sender = None
        run = self.sealer.run()
        if sender is not None and not control and not due:
            offset, available = sender.due(self.streams.session_room)
            if available >= path.datagram - BULK_OVERHEAD:
                self._send_burst(sender, offset, available, min(run, room // path.datagram), now, out)
                return True
        if sender is not None or due or (control and room >= path.datagram):
            return self._send_mixed(now, out, streams=sender is not None)
        return False

    def _rate(self) -> float:
        return pacing_rate(self.recovery.congestion.cwnd, self.recovery.rtt.smoothed)

    def _send_burst(
        self,
        sender: SendStream,
        offset: int,
        available: int,
        most: int,
        now: float,
        out: list[Transmit],
    ) -> None:
        """Packets that hold nothing but bytes of one stream, at most `most` of them."""
        size = self.path.datagram
        piece = size - BULK_OVERHEAD
        rate = self._rate()
        most = min(most, burst_packets(rate, self.recovery.congestion.cwnd, size))
        length = min(available, most * piece)
        first = self.sealer.next
        known = sender.next
        data, index, fin = sender.take(offset, length)
        sealed = self.sealer.seal_burst(sender.id, offset, data, index, length, piece, fin)
        self.streams.on_taken(sender, length, sender.next - known)
        self.recovery.on_sent(
            Sent.burst(
                first,
                self.sealer.next - first,
                now,
                sender,
                offset,
                length,
                piece,
                BULK_OVERHEAD,
                fin,
            )
        )
        self.pacer.on_sent(len(sealed), rate, now)
        self._emit(sealed, size, out)

    def _has_control(self) -> bool:
        cids = self.local_cids.pending or self.remote_cids.pending
        return bool(self.streams.pending or self._to_say or self._answers or cids)

    def _send_mixed(self, now: float, out: list[Transmit], *, streams: bool) -> bool:
        """One packet of whatever is to be said, filled up with stream bytes. Whether there may be more."""
        packet = PacketBuilder(self.path.datagram - DATA_OVERHEAD)
        acking = self.acks.owing
        if acking:
            ack = self.acks.frame(now)
            packet.room -= len(ack)
            packet.parts.append(ack)
        probing = self.recovery.probes > 0
        if probing or self.recovery.congestion.cwnd - self.recovery.in_flight >= self.path.datagram:
            self._write_control(packet)
            if streams:
                self._write_streams(packet, now)
        eliciting = bool(packet.frames)
        if not eliciting and (probing or (acking and self.acks.wants_pruning() and not self._pruning)):
            packet.parts.append(_PING)
            eliciting = True
        if not packet.parts:
            return False
        if acking and eliciting:
            packet.frames.append((self.acks, self.acks.next - 1))
            self._pruning = True
            packet.frames.append((self, None))
        pn = self.sealer.next
        sealed = self.sealer.seal(b"".join(packet.parts))
        if eliciting:
            self.recovery.on_sent(Sent.packet(pn, now, len(sealed), packet.frames))
            self.recovery.probes = max(0, self.recovery.probes - 1)
            self.pacer.on_sent(len(sealed), self._rate(), now)
        self._emit(sealed, 0, out)
        return packet.room <= MAX_FRAME or probing

    def _write_control(self, packet: PacketBuilder) -> None:
        if not self._has_control():
            return
        for frame in list(self._to_say):
            if not packet.add(frame, self, frame):
                return
            del self._to_say[frame]
        while self._answers:
            if not packet.add(self._answers[0], self, None):
                return
            del self._answers[0]
        for cids in (self.local_cids, self.remote_cids):
            while (found := cids.next_frame()) is not None:
                if not packet.add(found[0], cids, found[1]):
                    return
                cids.on_sent()
        self.streams.write_frames(packet)

    def _write_streams(self, packet: PacketBuilder, now: float) -> None:
        """Fill up with STREAM frames; the last one needs no length."""
        streams = self.streams
        paced = not self.recovery.probes and not self.pacer.may_send(now)
        tail: tuple[int, int, bytes, bool] | None = None
        while packet.room > STREAM_LENGTH_HEAD_SIZE + STREAM_HEAD_SIZE:
            sender = streams.pick()
            if sender is None or (paced and sender.id):
                break
            if tail is not None:
                _add_stream(packet, tail, length=True)
            offset, available = sender.due(streams.session_room)
            fills = available >= packet.room - STREAM_HEAD_SIZE
            head = STREAM_HEAD_SIZE if fills else STREAM_LENGTH_HEAD_SIZE
            length = min(available, packet.room - head)
            known = sender.next
            data, index, fin = sender.take(offset, length)
            streams.on_taken(sender, length, sender.next - known)
            tail = (sender.id, offset, data[index : index + length], fin)
            packet.room -= head + length
            packet.frames.append((sender, (offset, length, fin)))
        if tail is not None:
            _add_stream(packet, tail, length=False)

    def _emit(self, sealed: bytes, size: int, out: list[Transmit]) -> None:
        out.append(Transmit(self.path.addr, sealed, size if size and len(sealed) > size else 0))

    def close_packet(self, code: int, reason: str) -> bytes:
        """One datagram with CLOSE."""
        return self.sealer.seal(frames.Close(code, reason).encode())

    # -- the owner of what the session says, of PATH_RESPONSE, and of PINGs that prune

    def on_acked(self, token: object) -> None:
        if token is None:
            self._pruning = False

    def on_lost(self, token: object) -> None:
        if isinstance(token, bytes):
            self._to_say[token] = None
        else:
            self._pruning = False

    # -- time

    def next_timeout(self, dead_time: float) -> float:
        """When `handle_timeout` is to be called; a session that is alive always waits for something."""
        recovery = self.recovery
        due = recovery.next_timeout()
        if due is None:
            due = self.liveness.next_ping()
        elif (
            recovery.pto_count and recovery.waiting_since is not None
        ):  # before the first probe nobody is dead
            due = min(due, self.liveness.dead_at(recovery.waiting_since, recovery.rtt.pto(), dead_time))
        other = self.acks.deadline
        if other is not None and other < due:
            due = other
        previous = self.phases.previous
        if previous is not None and previous.until < due:
            due = previous.until
        other = self._wake_at
        return due if other is None or due < other else other

    def handle_timeout(self, now: float, dead_time: float) -> LocalCause | None:
        """Why the session is over, if it is. Sending is the caller's next step anyhow."""
        recovery = self.recovery
        self.phases.drop(now)
        if recovery.sent and recovery.waiting_since is not None:
            if now >= self.liveness.dead_at(recovery.waiting_since, recovery.rtt.pto(), dead_time):
                return LocalCause.DEAD_PEER
        elif now >= self.liveness.next_ping():
            if not self.liveness.on_ping_time(now):
                return LocalCause.IDLE_TIMEOUT
            self.ping()
        recovery.on_timeout(now)
        return None


def _add_stream(packet: PacketBuilder, tail: tuple[int, int, bytes, bool], *, length: bool) -> None:
    stream, offset, data, fin = tail
    if length:
        head = STREAM_LENGTH_HEAD.pack(frames.STREAM_LENGTH | fin, stream, offset, len(data))
    else:
        head = STREAM_HEAD.pack(frames.STREAM | fin, stream, offset)
    packet.parts.append(head + data)
