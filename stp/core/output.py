"""What leaves: fills, paces and seals the DATA packets of a session (protocol §5, §6); dataspace.py is the rest.

(1) What asks for an ACK leaves only within the congestion window and the pacing, probes apart; ACKs always leave.
(2) Bulk leaves in bursts of one stream, and only while nothing else is to be said.
(3) `wake_at` is set whenever pacing or a full turn keeps something back.
(4) To an address that is not validated leaves no more than the path's allowance; `starved` says that it is used up.
"""

from __future__ import annotations

from typing import Any, Final

from attrs import define

from stp.core import frames
from stp.core.acks import AckTracker
from stp.core.congestion import Pacer, burst_packets, pacing_rate
from stp.core.frames import (
    MAX_ACK_SIZE,
    STREAM_HEAD,
    STREAM_HEAD_SIZE,
    STREAM_LENGTH_HEAD,
    STREAM_LENGTH_HEAD_SIZE,
)
from stp.core.packet import DATA_OVERHEAD
from stp.core.packetizer import BULK_OVERHEAD, PacketBuilder, Sealer
from stp.core.path import LocalCids, Path, RemoteCids
from stp.core.phases import Phases
from stp.core.recovery import Recovery, Sent
from stp.core.streams import SendStream
from stp.core.streamset import StreamSet
from stp.core.unreliable import Datagrams, Flight

BURSTS_PER_TURN: Final = 4
"""Bursts that one session sends before others, and what has arrived meanwhile, get their turn."""
MAX_PATH_ANSWERS: Final = 8
"""PATH_CHALLENGEs that wait for their answer; older ones are forgotten."""
MIN_ALLOWANCE: Final = 100
"""Bytes: with less, nothing is sent to an address that is not validated. Three times the smallest packet is more."""
MAX_FRAME: Final = 300
"""Bytes: every frame of ours but STREAM fits. A packet that was left with more room holds all there was to say."""

DATAGRAM_OVERHEAD: Final = DATA_OVERHEAD + 1
"""Bytes of a packet around the one DATAGRAM in it."""

_PING: Final = b"\x01"
_DATAGRAM: Final = bytes((frames.DATAGRAM,))


@define
class Transmit:
    """Bytes for the network: one datagram, or with `segment_size` several of that size, the last maybe shorter."""

    addr: Any
    data: bytes
    segment_size: int = 0


class Output:
    """Made with its DataSpace, whose parts it shares."""

    __slots__ = (
        "_acks",
        "_answers",
        "_challenge",
        "_elsewhere",
        "_local_cids",
        "_path",
        "_phases",
        "_ping",
        "_pruning",
        "_recovery",
        "_remote_cids",
        "_sealer",
        "_size",
        "_streams",
        "_to_say",
        "datagrams",
        "pacer",
        "starved",
        "wake_at",
    )

    def __init__(
        self,
        *,
        sealer: Sealer,
        phases: Phases,
        acks: AckTracker,
        recovery: Recovery,
        path: Path,
        streams: StreamSet,
        local_cids: LocalCids,
        remote_cids: RemoteCids,
    ) -> None:
        self.pacer = Pacer()
        self.datagrams: Datagrams | None = None
        """Unreliable ones; None until there was one."""
        self.wake_at: float | None = None
        """When there is more to send, if nothing else happens; None: when something does."""
        self._sealer = sealer
        self._phases = phases
        self._acks = acks
        self._recovery = recovery
        self._path = path
        self._size = path.datagram
        self._streams = streams
        self._local_cids = local_cids
        self._remote_cids = remote_cids
        self._to_say: dict[bytes, None] = {}
        self.starved = False
        """(4): until the peer sends from there, or its trial is over, no timer of recovery is of use."""
        self._answers: list[tuple[bytes, int]] = []
        self._elsewhere: list[tuple[Any, bytes, int]] = []
        self._challenge: tuple[bytes, int] | None = None
        self._ping = False
        self._pruning = False

    def say(self, frame: bytes) -> None:
        """A frame of the session's own: said until it is acknowledged."""
        self._to_say[frame] = None

    def answer(self, frame: bytes, addr: Any, size: int) -> None:
        """A PATH_RESPONSE, or a PATH_CHALLENGE for another path: said once to `addr`, in `size` bytes at least."""
        if addr == self._path.addr:
            self._answers.append((frame, size))
            del self._answers[:-MAX_PATH_ANSWERS]
        else:
            self._elsewhere.append((addr, frame, size))
            del self._elsewhere[:-MAX_PATH_ANSWERS]

    def challenge(self, frame: bytes, size: int) -> None:
        """A PATH_CHALLENGE for the present path: said once, in `size` bytes or as many as may leave."""
        self._challenge = (frame, size)

    def use_path(self, path: Path) -> None:
        """All leaves by another way from now on; answers still go where they were asked for."""
        self._elsewhere += [(self._path.addr, frame, size) for frame, size in self._answers]
        del self._elsewhere[:-MAX_PATH_ANSWERS]
        self._answers.clear()
        self._challenge = None
        self._path = path
        self.starved = False

    def ping(self) -> None:
        """Ask for an ACK, once, unless one of our packets is under way anyhow."""
        self._ping = True

    def send(self, now: float, out: list[Transmit]) -> None:
        """Append what may leave now."""
        sealer, phases = self._sealer, self._phases
        if sealer.trace is not None:
            sealer.trace.path(self._path.addr, self._path.datagram, now)
        if sealer.next - sealer.first >= phases.packets or now >= phases.due_at:
            phases.begin(sealer, self._recovery.largest_acked, self._recovery.rtt.pto(), now)
        self.wake_at = None
        if self._size != self._path.datagram:
            self._resize(self._path.datagram)
        if self._elsewhere:
            self._send_elsewhere(out)
        if self._ping:
            self._ping = False
            if (
                not self._recovery.sent
            ):  # not tracked: an idle session's silence has rules of its own (path.py)
                sealer.run()
                self._emit(sealer.seal(_PING), 0, out)
        for _ in range(BURSTS_PER_TURN):
            if not self._send_next(now, out):
                return
        self.wake_at = now  # there may be more

    def _send_next(self, now: float, out: list[Transmit]) -> bool:
        """One burst or one packet of mixed frames; False when there is nothing more to send now."""
        recovery, path = self._recovery, self._path
        if path.limited and path.allowance() < MIN_ALLOWANCE:
            self.starved = True
            return False
        self.starved = False
        if recovery.probes:
            self._sealer.run()
            self._send_mixed(now, out, streams=True)
            return True
        sender = self._streams.pick()
        control = self._has_control()
        due = self._acks.owing and self._acks.due(now)
        room = recovery.congestion.cwnd - recovery.in_flight
        datagrams = self.datagrams if self.datagrams is not None and self.datagrams.waiting else None
        if path.limited and path.allowance() < path.datagram:
            datagrams = None
        if sender is None and datagrams is None:
            recovery.app_limited = room > 0
            if not due and not control:
                return False
        elif room < path.datagram:
            recovery.app_limited = False
            sender = datagrams = None
        elif (sender is None or sender.id) and not self.pacer.may_send(now):
            recovery.app_limited = False
            self.wake_at = self.pacer.next_at
            sender = datagrams = None
        run = self._sealer.run()
        if datagrams is not None and (sender is None or (sender.id and datagrams.first)):
            if control:
                self._send_mixed(now, out, streams=False)
            if now >= path.sizer.due_at and not path.limited:
                full = path.datagram - DATAGRAM_OVERHEAD
                if any(len(data) >= full for data in datagrams.waiting) and self._probe_size(now, out):
                    return True
            self._send_datagrams(datagrams, now, out)
            return True
        if datagrams is not None:
            datagrams.first = True
        if sender is not None and not control and not due:
            offset, available = sender.due(self._streams.session_room)
            if available >= path.datagram - BULK_OVERHEAD:
                allowed = min(room, path.allowance()) if path.limited else room
                if allowed >= path.datagram:
                    if now < path.sizer.due_at or path.limited or not self._probe_size(now, out):
                        most = min(run, allowed // path.datagram)
                        self._send_burst(sender, offset, available, most, now, out)
                    return True
        if sender is not None or due or (control and room >= path.datagram):
            return self._send_mixed(now, out, streams=sender is not None)
        return False

    def _resize(self, size: int) -> None:
        """Full packets have `size` bytes from now on."""
        self._size = size
        self._recovery.congestion.on_packet_size(size)
        self._phases.use_size(size)

    def _probe_size(self, now: float, out: list[Transmit]) -> bool:
        """Ask whether larger packets pass (RFC 8899): a PING and padding. Whether a probe left.

        There is room for a packet of the present size; the rest may exceed the window, for bulk leaves none.
        """
        sizer = self._path.sizer
        size = sizer.next_probe()
        if not 0 < size <= self._recovery.congestion.cwnd:
            return False
        pn = self._sealer.next
        sealed = self._sealer.seal(_PING.ljust(size - DATA_OVERHEAD, b"\0"))
        self._recovery.on_sent(Sent.packet(pn, now, size, ((sizer, size),)))
        sizer.on_probe_sent(pn, now)
        self.pacer.on_sent(size, self._rate(), now)
        self._emit(sealed, 0, out)
        return True

    def _rate(self) -> float:
        return pacing_rate(self._recovery.congestion.cwnd, self._recovery.rtt.smoothed)

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
        size = self._path.datagram
        piece = size - BULK_OVERHEAD
        rate = self._rate()
        most = min(most, burst_packets(rate, self._recovery.congestion.cwnd, size))
        length = min(available, most * piece)
        first = self._sealer.next
        known = sender.next
        data, index, fin = sender.take(offset, length)
        sealed = self._sealer.seal_burst(sender.id, offset, data, index, length, piece, fin)
        self._streams.on_taken(sender, length, sender.next - known)
        self._recovery.on_sent(
            Sent.burst(
                first,
                self._sealer.next - first,
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

    def _send_datagrams(self, datagrams: Datagrams, now: float, out: list[Transmit]) -> None:
        """One burst of unreliable datagrams, each in a packet of its own; then it is the streams' turn.

        An ACK that is owed rides along where it fits.
        """
        size, rate, recovery, acks = self._path.datagram, self._rate(), self._recovery, self._acks
        datagrams.first = False
        for _ in range(burst_packets(rate, recovery.congestion.cwnd, size)):
            if recovery.congestion.cwnd - recovery.in_flight < size:
                return
            if self._path.limited and self._path.allowance() < size:
                return
            data = datagrams.next(size - DATAGRAM_OVERHEAD)
            if data is None:
                return
            packet = PacketBuilder(size - DATA_OVERHEAD)
            acking = acks.owing and MAX_ACK_SIZE + len(data) < packet.room
            if acking:
                packet.parts.append(acks.frame(now))
            packet.parts += (_DATAGRAM, data)
            packet.frames.append((datagrams, Flight()))
            self._sealer.run()
            self._seal_tracked(packet, now, out, acking=bool(acking))

    def _seal_tracked(self, packet: PacketBuilder, now: float, out: list[Transmit], *, acking: bool) -> None:
        """Send a packet that asks to be acknowledged."""
        if acking:
            packet.frames.append((self._acks, self._acks.next - 1))
            self._pruning = True
            packet.frames.append((self, None))
        pn = self._sealer.next
        sealed = self._sealer.seal(b"".join(packet.parts))
        self._recovery.on_sent(Sent.packet(pn, now, len(sealed), packet.frames))
        self._recovery.probes = max(0, self._recovery.probes - 1)
        self.pacer.on_sent(len(sealed), self._rate(), now)
        self._emit(sealed, 0, out)

    def _has_control(self) -> bool:
        cids = self._local_cids.pending or self._remote_cids.pending
        return bool(self._streams.pending or self._to_say or self._answers or cids or self._challenge)

    def _send_mixed(self, now: float, out: list[Transmit], *, streams: bool) -> bool:
        """One packet of whatever is to be said, filled up with stream bytes. Whether there may be more."""
        path = self._path
        probing = self._recovery.probes > 0
        size = path.datagram
        if probing:
            size = path.sizer.rescue_size(self._recovery.pto_count)
        if path.limited:
            size = min(size, path.allowance())
        packet = PacketBuilder(size - DATA_OVERHEAD)
        acking = bool(self._acks.owing)
        if acking:
            ack = self._acks.frame(now)
            acking = len(ack) <= packet.room  # but for (4) it always fits; the next one says it again
            if acking:
                packet.room -= len(ack)
                packet.parts.append(ack)
        full = 0
        if probing or self._recovery.congestion.cwnd - self._recovery.in_flight >= path.datagram:
            full = self._write_control(packet)
            if streams and not full:
                self._write_streams(packet, now)
        eliciting = bool(packet.frames)
        if not eliciting and (probing or (acking and self._acks.wants_pruning() and not self._pruning)):
            packet.parts.append(_PING)
            eliciting = True
        if not packet.parts:
            return False
        packet.pad(full)
        if eliciting:
            self._seal_tracked(packet, now, out, acking=acking)
        else:
            self._emit(self._sealer.seal(b"".join(packet.parts)), 0, out)
        return packet.room <= MAX_FRAME or probing or full > 0

    def _write_control(self, packet: PacketBuilder) -> int:
        """All but STREAM frames. How large the datagram must be at least, which then takes none of these."""
        if not self._has_control():
            return 0
        full = 0
        if self._challenge is not None and packet.add(self._challenge[0], self, None):
            full, self._challenge = self._challenge[1], None
            self._path.asked_full |= packet.whole >= full
        while self._answers:
            frame, size = self._answers[0]
            if not packet.add(frame, self, None):
                return full
            full = max(full, size)
            del self._answers[0]
        if self._to_say:
            for frame in list(self._to_say):
                if not packet.add(frame, self, frame):
                    return full
                del self._to_say[frame]
            self._to_say = {}  # an emptied one keeps its room
        for cids in (self._local_cids, self._remote_cids):
            while (found := cids.next_frame()) is not None:
                if not packet.add(found[0], cids, found[1]):
                    return full
                cids.on_sent()
        self._streams.write_frames(packet)
        return full

    def _send_elsewhere(self, out: list[Transmit]) -> None:
        """Questions to, and answers to questions from, other addresses than the peer's: of no size to speak of, or of
        that of the question. They are not tracked."""
        for addr, frame, size in self._elsewhere:
            self._sealer.run()
            sealed = self._sealer.seal(frame.ljust(size - DATA_OVERHEAD, b"\0"))
            out.append(Transmit(addr, sealed))
        self._elsewhere.clear()

    def _write_streams(self, packet: PacketBuilder, now: float) -> None:
        """Fill up with STREAM frames; the last one needs no length."""
        streams = self._streams
        paced = not self._recovery.probes and not self.pacer.may_send(now)
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
        path = self._path
        if path.limited:
            path.sent += len(sealed)
        out.append(Transmit(path.addr, sealed, size if size and len(sealed) > size else 0))

    def send_close(self, code: int, reason: str, out: list[Transmit]) -> None:
        """One datagram with CLOSE."""
        said = frames.Close(code, reason).encode()
        if not self._path.limited or self._path.allowance() >= len(said) + DATA_OVERHEAD:
            self._emit(self._sealer.seal(said), 0, out)

    # -- the owner of what the session says, of PATH_RESPONSE, and of PINGs that prune

    def on_acked(self, token: object) -> None:
        if token is None:
            self._pruning = False

    def on_lost(self, token: object) -> None:
        if isinstance(token, bytes):
            self._to_say[token] = None
        else:
            self._pruning = False


def _add_stream(packet: PacketBuilder, tail: tuple[int, int, bytes, bool], *, length: bool) -> None:
    stream, offset, data, fin = tail
    if length:
        head = STREAM_LENGTH_HEAD.pack(frames.STREAM_LENGTH | fin, stream, offset, len(data))
    else:
        head = STREAM_HEAD.pack(frames.STREAM | fin, stream, offset)
    packet.parts.append(head + data)
