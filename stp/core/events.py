"""What a Session tells its owner: events, a closed union, and statistics. Treat the values as frozen.

Bytes of a stream are not events: `Session.read` hands them out, `StreamReadable` only says that there are some.
"""

from __future__ import annotations

from typing import TypeAlias

from attrs import define

from stp.core.errors import ErrorCode, LocalCause
from stp.core.handshake import PeerIdentity


@define
class Connected:
    """The peer has proven itself to us and we to it: HANDSHAKE_DONE seen, or the client's first DATA opened."""

    peer: PeerIdentity


@define
class StreamOpened:
    """The peer opened this stream."""

    stream: int


@define
class StreamReadable:
    """There are bytes to `read`, or the stream came to its end."""

    stream: int


@define
class StreamWritable:
    """`room` of this stream has come back to WRITABLE_ROOM bytes or more."""

    stream: int


@define
class StreamReset:
    """The peer gave up sending on this stream; what was not read yet is gone."""

    stream: int
    code: int


@define
class StreamStopped:
    """The peer does not want this stream any longer; we have answered with RESET_STREAM."""

    stream: int
    code: int


@define
class DatagramReceived:
    """An unreliable datagram of the peer's came. What is not fetched in time is dropped and counted."""

    data: bytes


@define
class NewToken:
    """Keep it across restarts: the next handshake with this peer may skip the Retry (protocol §4)."""

    token: bytes


@define
class SessionClosed:
    """The last event of a session."""

    code: ErrorCode | LocalCause
    reason: str
    by_peer: bool


Event: TypeAlias = (
    Connected
    | StreamOpened
    | StreamReadable
    | StreamWritable
    | StreamReset
    | StreamStopped
    | DatagramReceived
    | NewToken
    | SessionClosed
)


@define
class SessionStatistics:
    """Bytes are of UDP payload, times are seconds, counts are since the start of the session."""

    datagrams_in: int = 0
    bytes_in: int = 0
    datagrams_out: int = 0
    bytes_out: int = 0
    wrong_address: int = 0
    """Buffers from elsewhere than the peer's address that moved nothing; a dialling side drops them."""
    migrations: int = 0
    """Changes of path, those that were taken back included (protocol §8)."""
    path_validations: int = 0
    """New addresses of the peer that answered."""
    path_reverts: int = 0
    """New addresses of the peer that did not, or while it was heard at the old one."""
    rebinds: int = 0
    """Changes of our own address, by ourselves."""
    early_kept: int = 0
    early_dropped: int = 0
    packets_lost: int = 0
    packets_spurious: int = 0
    """Of `packets_lost`, those that were only late."""
    datagram: int = 0
    """Bytes of UDP payload that our full packets have; 0 before the keys."""
    size_probes: int = 0
    """Packets sent to find out whether larger ones pass (protocol §6)."""
    black_holes: int = 0
    """How often our full packets stopped arriving, and became smaller."""
    datagrams_sent: int = 0
    """DATAGRAM frames, unlike `datagrams_in` and `datagrams_out`, which are UDP's; so the next five."""
    datagrams_acked: int = 0
    datagrams_lost: int = 0
    """By what is known now: one that was given up and arrives after all goes over to `datagrams_acked`."""
    datagrams_received: int = 0
    datagrams_refused: int = 0
    """Not taken by `send_datagram`: too many were waiting."""
    datagrams_dropped: int = 0
    """Too large since packets became smaller, or received and not fetched in time."""
    probe_timeouts: int = 0
    pto_count: int = 0
    """Probe timeouts in a row since the last ACK of anything new."""
    key_updates: int = 0
    key_phase: int = 0
    """The phase bit of what we send, 0 or 1."""
    failed_opens: int = 0
    repeated: int = 0
    rtt: float = 0.0
    """Smoothed."""
    rtt_var: float = 0.0
    rtt_min: float = 0.0
    """This and `rtt_latest`: 0 before the first round trip was measured."""
    rtt_latest: float = 0.0
    cwnd: int = 0
    """Bytes that may be in flight."""
    ssthresh: int = 0
    """Bytes below which the window grows by all that arrives; 0: not known yet."""
    in_flight: int = 0
    """Bytes that left and are neither acknowledged nor lost."""
    pacing_rate: float = 0.0
    """Bytes a second at which packets leave at most."""
    congestion_state: str = ""
    """slow start, congestion avoidance or recovery."""
    limited_by: str = ""
    """What keeps more from leaving: application, flow credit, congestion window or pacing."""
    cids_local: int = 0
    """CIDs that the peer may use for us, the present one included."""
    cids_remote: int = 0
    """CIDs that we may use for the peer, the present one included."""
    keepalive: float = 0.0
    """Seconds of silence after which we ask whether the peer lives."""
    session_credit: int = 0
    """Bytes the peer would still take on all streams but 0."""


@define
class EndpointTotals:
    """Sums over all sessions that an endpoint had, those that are over included."""

    packets_lost: int = 0
    probe_timeouts: int = 0
    key_updates: int = 0
    migrations: int = 0
    path_validations: int = 0
    path_reverts: int = 0
    rebinds: int = 0
    datagrams_sent: int = 0
    """DATAGRAM frames; so the next two."""
    datagrams_received: int = 0
    datagrams_dropped: int = 0
