"""The event log of one session, in the words of qlog (draft-ietf-quic-qlog-quic-events), so that viewers draw it.

Above the packetizer. A session has one only while somebody asks; without, each place that would tell something looks
at one attribute, once per burst, packet of frames or receive buffer.

(1) Nothing secret leaves: no payload, no key, no token, no data of a path challenge.
(2) Events come in the order of time.
(3) What is told is what was on the wire: a burst packet by packet, each with its number, size and frames.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, Final, TypeAlias

from cryptography.exceptions import InvalidTag

from stp.core import frames
from stp.core.errors import PacketError, ProtocolError
from stp.core.packet import DATA_HEADER_LENGTH, DATA_OVERHEAD, InitPacket, parse_init
from stp.core.packetizer import BULK_OVERHEAD, Opener, Sealer
from stp.core.recovery import Recovery, Sent

Sink: TypeAlias = Callable[[float, str, dict[str, Any]], None]
"""(seconds on the clock of the core, "category:event", data). Must neither block nor raise, and keeps `data`."""

ONE_RTT: Final = {"packet_type": "1RTT"}
_LIMITS: Final[dict[type, str]] = {
    frames.MaxData: "max_data",
    frames.MaxStreamData: "max_stream_data",
    frames.DataBlocked: "data_blocked",
    frames.StreamDataBlocked: "stream_data_blocked",
}
_BARE: Final[dict[type, str]] = {
    frames.Ping: "ping",
    frames.PathChallenge: "path_challenge",
    frames.PathResponse: "path_response",
    frames.NewToken: "new_token",
    frames.HandshakeDone: "handshake_done",
}
_KINDS: Final = ("bidirectional", "unidirectional")


class Trace:
    """Tells a sink of one session."""

    __slots__ = (
        "_addr",
        "_datagram",
        "_metrics",
        "_now",
        "_opener",
        "_phases",
        "_sealer",
        "_sink",
        "_state",
        "dialling",
    )

    def __init__(self, sink: Sink, *, dialling: bool) -> None:
        self.dialling = dialling
        self._sink = sink
        self._now = 0.0
        self._metrics: dict[str, Any] = {}
        self._state = ""
        self._addr: Any = None
        self._datagram = 0
        self._sealer: Sealer | None = None
        self._opener: Opener | None = None
        self._phases = (0, 0)

    def tell(self, name: str, data: dict[str, Any]) -> None:
        """An event now."""
        self._sink(self._now, name, data)

    # -- connectivity

    def started(self, addr: Any, dcid: bytes, now: float) -> None:
        """A session begins, or somebody begins to look at it."""
        self.at(now)
        self._addr = addr
        ip, port = _split(addr)
        self.tell("connectivity:connection_started", {"dst_ip": ip, "dst_port": port, "dst_cid": dcid.hex()})

    def keys(self, sealer: Sealer, opener: Opener, recovery: Recovery, now: float) -> None:
        """There are DATA keys: from here on packets are told of."""
        self.at(now)
        self._sealer, self._opener = sealer, opener
        self._phases = (sealer.first, opener.lowest)
        sealer.trace = recovery.trace = self
        self.metrics(now, recovery)

    def leave(self, recovery: Recovery | None) -> None:
        """Tell nothing any more."""
        if self._sealer is not None:
            self._sealer.trace = None
        if recovery is not None:
            recovery.trace = None

    def state(self, new: str, now: float) -> None:
        self.at(now)
        self.tell("connectivity:connection_state_updated", {"new": new})

    def closed(self, owner: str, code: int, cause: str, now: float) -> None:
        self.at(now)
        data: dict[str, Any] = {"owner": owner, "reason": cause}
        if code >= 0:
            data["connection_code"] = code
        self.tell("connectivity:connection_closed", data)

    def at(self, now: float) -> None:
        """The time of what is told next (2)."""
        self._now = max(now, self._now)

    def path(self, addr: Any, datagram: int, now: float) -> None:
        """Where packets go from here, and how large they may be."""
        self.at(now)
        if addr != self._addr:
            ip, port = _split(addr)
            self._addr = addr
            self.tell("connectivity:path_assigned", {"path_remote": {"ip": ip, "port": port}})
        if datagram != self._datagram:
            old, self._datagram = self._datagram, datagram
            self.tell("connectivity:mtu_updated", {"old": old, "new": datagram})

    def cid(self, old: bytes, new: bytes) -> None:
        """The peer is called by another CID."""
        self.tell(
            "connectivity:connection_id_updated", {"owner": "remote", "old": old.hex(), "new": new.hex()}
        )

    # -- packets

    def init_sent(self, datagram: bytes, now: float) -> None:
        """A datagram of the handshake leaves: its header; what is inside is TLS's."""
        with contextlib.suppress(PacketError):
            self._init("sent", parse_init(datagram), len(datagram), now)

    def init_received(self, found: InitPacket, now: float) -> None:
        """One came, and opened."""
        self._init("received", found, len(found.aad) + len(found.sealed), now)

    def retry_received(self, now: float) -> None:
        self.at(now)
        self.tell("transport:packet_received", {"header": {"packet_type": "retry"}})

    def _init(self, way: str, found: InitPacket, size: int, now: float) -> None:
        self.at(now)
        header = {"packet_type": "initial", "packet_number": found.pn}
        header |= {"dcid": found.dcid.hex(), "scid": found.scid.hex()}
        self.tell(f"transport:packet_{way}", {"header": header, "raw": {"length": size}})

    def sealed(self, pn: int, plain: bytes) -> None:
        """A packet of frames leaves."""
        self._look_at_keys()
        self._packet("sent", pn, len(plain) + DATA_OVERHEAD, told(plain))

    def sealed_burst(self, first: int, stream: int, offset: int, length: int, piece: int, fin: bool) -> None:
        """A burst leaves (3)."""
        self._look_at_keys()
        pn, left = first, length
        while left:
            size = min(piece, left)
            left -= size
            frame = {"frame_type": "stream", "stream_id": stream, "offset": offset, "length": size}
            if fin and not left:
                frame["fin"] = True
            self._packet("sent", pn, size + BULK_OVERHEAD, [frame])
            pn += 1
            offset += size

    def peek(self, datagram: bytes) -> bytes | None:
        """What a packet to the current CID and phase says; None: it is to another, or does not open."""
        opener = self._opener
        assert opener is not None
        if (
            datagram[1:9] != opener.current
            or len(datagram) <= DATA_OVERHEAD
            or datagram[0] != opener.first_byte
        ):
            return None
        aead, header = opener.aead, datagram[:DATA_HEADER_LENGTH]
        nonce = (aead.iv_int ^ opener.number(datagram)).to_bytes(12, "big")
        try:
            return bytes(aead.decrypt(nonce, datagram[DATA_HEADER_LENGTH:], header))
        except InvalidTag:
            return None

    def received(self, datagram: bytes, plain: bytes, *, fresh: bool) -> None:
        """A packet opened."""
        assert self._opener is not None
        self._look_at_keys()
        pn = self._opener.number(datagram)
        if fresh:
            self._packet("received", pn, len(datagram), told(plain))
        else:
            header = ONE_RTT | {"packet_number": pn}
            data = {"header": header, "raw": {"length": len(datagram)}, "trigger": "duplicate"}
            self.tell("transport:packet_dropped", data)

    def dropped(self, datagram: bytes) -> None:
        """A packet to us did not open."""
        data = {"header": ONE_RTT, "raw": {"length": len(datagram)}, "trigger": "payload_decrypt_error"}
        self.tell("transport:packet_dropped", data)

    def _packet(self, way: str, pn: int, size: int, inside: list[dict[str, Any]]) -> None:
        header = {"packet_type": "1RTT", "packet_number": pn}
        self.tell(f"transport:packet_{way}", {"header": header, "raw": {"length": size}, "frames": inside})

    # -- recovery

    def lost(self, sent: Sent, bits: int, late: bool, now: float) -> None:
        """Packets of `sent` were given up."""
        self.at(now)
        trigger = "time_threshold" if late else "reordering_threshold"
        while bits:
            lowest = bits & -bits
            bits ^= lowest
            header = ONE_RTT | {"packet_number": sent.first + lowest.bit_length() - 1}
            self.tell("recovery:packet_lost", {"header": header, "trigger": trigger})

    def expired(self, recovery: Recovery, now: float) -> None:
        """A probe timeout."""
        self.at(now)
        self.tell("recovery:loss_timer_updated", {"event_type": "expired", "timer_type": "pto"})
        self.metrics(now, recovery)

    def metrics(self, now: float, recovery: Recovery) -> None:
        """What changed of round trips and windows. Times are milliseconds."""
        self.at(now)
        rtt, congestion = recovery.rtt, recovery.congestion
        found: dict[str, Any] = {
            "congestion_window": congestion.cwnd,
            "bytes_in_flight": recovery.in_flight,
            "pto_count": recovery.pto_count,
        }
        if rtt.sampled:
            found |= {
                "min_rtt": round(rtt.min * 1000, 3),
                "smoothed_rtt": round(rtt.smoothed * 1000, 3),
                "latest_rtt": round(rtt.latest * 1000, 3),
                "rtt_variance": round(rtt.var * 1000, 3),
            }
        if congestion.ssthresh != float("inf"):
            found["ssthresh"] = int(congestion.ssthresh)
        changed = {name: value for name, value in found.items() if self._metrics.get(name) != value}
        if changed:
            self._metrics = found
            self.tell("recovery:metrics_updated", changed)
        state = "slow_start" if congestion.slow_start else "congestion_avoidance"
        state = "recovery" if recovery.in_recovery else state
        if state != self._state:
            old, self._state = self._state, state
            data = {"old": old, "new": state} if old else {"new": state}
            self.tell("recovery:congestion_state_updated", data)

    def _look_at_keys(self) -> None:
        """Have keys changed since the last packet?"""
        assert self._sealer is not None
        assert self._opener is not None
        phases = (self._sealer.first, self._opener.lowest)
        if phases == self._phases:
            return
        ours, theirs = ("client", "server") if self.dialling else ("server", "client")
        for who, old, new in ((ours, self._phases[0], phases[0]), (theirs, self._phases[1], phases[1])):
            if new > old:
                self.tell("security:key_updated", {"key_type": f"{who}_1rtt_secret", "trigger": "tls"})
        self._phases = phases


def told(plain: bytes) -> list[dict[str, Any]]:
    """The frames of a packet as qlog has them (1)."""
    try:
        return [_frame(frame) for frame in frames.decode(plain)]
    except ProtocolError:
        return [{"frame_type": "unknown", "raw": {"length": len(plain)}}]


def _frame(frame: frames.Frame) -> dict[str, Any]:
    kind = type(frame)
    if kind in _BARE:
        return {"frame_type": _BARE[kind]}
    match frame:
        case frames.Stream():
            found: dict[str, Any] = {
                "frame_type": "stream",
                "stream_id": frame.stream,
                "offset": frame.offset,
            }
            found["length"] = len(frame.data)
            return found | {"fin": True} if frame.fin else found
        case frames.Ack():
            ranges = [[start, stop - 1] for start, stop in frame.ranges]
            return {"frame_type": "ack", "ack_delay": frame.delay_us / 1000, "acked_ranges": ranges}
        case frames.Datagram():
            return {"frame_type": "datagram", "length": len(frame.data)}
        case frames.Crypto():
            return {"frame_type": "crypto", "offset": frame.offset, "length": len(frame.data)}
        case frames.Padding():
            return {"frame_type": "padding", "length": frame.length}
        case frames.NewCid():
            numbers = {"sequence_number": frame.seq, "retire_prior_to": frame.retire_prior_to}
            return {"frame_type": "new_connection_id", **numbers, "connection_id": frame.cid.hex()}
        case frames.RetireCid():
            return {"frame_type": "retire_connection_id", "sequence_number": frame.seq}
        case frames.Close():
            code = {"error_space": "transport", "error_code": frame.code, "raw_error_code": frame.code}
            return {"frame_type": "connection_close", **code, "reason": frame.reason}
        case _:
            return _stream_frame(frame)


def _stream_frame(frame: frames.Frame) -> dict[str, Any]:
    """Frames that name a stream or its credit."""
    match frame:
        case frames.ResetStream():
            end = {"error_code": frame.code, "final_size": frame.final_size}
            return {"frame_type": "reset_stream", "stream_id": frame.stream, **end}
        case frames.StopSending():
            return {"frame_type": "stop_sending", "stream_id": frame.stream, "error_code": frame.code}
        case frames.MaxStreams():
            return {"frame_type": "max_streams", "stream_type": _KINDS[frame.kind], "maximum": frame.max}
        case frames.StreamsBlocked():
            return {"frame_type": "streams_blocked", "stream_type": _KINDS[frame.kind], "limit": frame.max}
        case frames.MaxData() | frames.MaxStreamData() | frames.DataBlocked() | frames.StreamDataBlocked():
            name = _LIMITS[type(frame)]
            found: dict[str, Any] = {"frame_type": name}
            if isinstance(frame, frames.MaxStreamData | frames.StreamDataBlocked):
                found["stream_id"] = frame.stream
            found["maximum" if name.startswith("max") else "limit"] = frame.max
            return found
        case _:
            return {"frame_type": "unknown"}


def _split(addr: Any) -> tuple[str, int]:
    """An address as far as it looks like one."""
    if isinstance(addr, tuple) and len(addr) >= 2:
        return str(addr[0]), int(addr[1])
    return str(addr), 0
