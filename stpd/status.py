"""What the daemon says of itself: the JSON shapes of the management API.

A leaf: standard library and attrs only, because `stpctl` imports this and must start at once.

(1) Fields are added, never renamed or given another meaning.
(2) `from_dict` ignores what it does not know and fills what is missing from the defaults, so that tool and
    daemon of neighbouring versions understand each other.
(3) Names carry units: `_ms` at the end of an instant is milliseconds since 1970 (0: never), of a span
    milliseconds; `_s` seconds; `_bytes` bytes. Counts are messages unless the name says otherwise.
"""

import typing
from typing import Any, TypeVar

import attrs
from attrs import Factory, define

T = TypeVar("T")


@define(kw_only=True)
class LaneLag:
    """How far a hop is behind on one lane."""

    lane: int
    messages: int = 0
    bytes: int = 0
    oldest_age_s: float = 0.0


@define(kw_only=True)
class UpstreamStatus:
    """A node this one dials and sends to."""

    node: str
    url: str = ""
    state: str = "waiting"
    """connected, connecting, waiting (for the next attempt), refused, standby (a backup not needed)."""
    since_ms: int = 0
    """When it entered that state."""
    address: str = ""
    carrier: str = ""
    """udp or tls while it is connected, else empty."""
    rtt_ms: float = 0.0
    attempts: int = 0
    """Failed attempts in a row."""
    last_error: str = ""
    next_attempt_ms: int = 0
    behind_messages: int = 0
    behind_bytes: int = 0
    behind_since_ms: int = 0
    """Since when it has not been level; 0: it is."""
    oldest_age_s: float = 0.0
    custody_messages: int = 0
    """Messages the upstream has in custody, since the store began."""
    lanes: list[LaneLag] = Factory(list)


@define(kw_only=True)
class EdgeStatus:
    """A node below this one: a gateway, whether it is here or not."""

    node: str
    role: str = ""
    connected: bool = False
    address: str = ""
    last_seen_ms: int = 0
    behind_messages: int = 0
    """What waits here to go down to it."""
    behind_bytes: int = 0
    oldest_age_s: float = 0.0
    reported_messages: int = 0
    """What it said was waiting there to come up, at `reported_ms`."""
    reported_bytes: int = 0
    reported_oldest_age_s: float = 0.0
    reported_ms: int = 0
    reported_cause: str = ""


@define(kw_only=True)
class ReaderStatus:
    """A durable subscription: a name with a cursor in every lane it reads."""

    name: str
    node: str = ""
    connected: bool = False
    filters: list[str] = Factory(list)
    created_ms: int = 0
    behind_messages: int = 0
    behind_bytes: int = 0
    oldest_age_s: float = 0.0
    max_lag_s: float = 0.0
    """Seconds it may be behind before it is dropped; 0: as long as the store keeps."""
    lanes: list[LaneLag] = Factory(list)


@define(kw_only=True)
class PathStatus:
    """The way to one peer, and what the transport makes of it. Sizes are bytes; datagrams are UDP's."""

    session: str
    """32 hexadecimal digits."""
    node: str = ""
    carrier: str = ""
    """udp, tls or unix. Over tls and unix the kernel's TCP or socket has the rest of the numbers."""
    local_address: str = ""
    address: str = ""
    dialling: bool = False
    since_ms: int = 0
    now_ms: int = 0
    datagram_bytes: int = 0
    """Of full packets, as UDP payload; 0 where there are no packets."""
    size_probes: int = 0
    black_holes: int = 0
    migrations: int = 0
    rtt_ms: float = 0.0
    """Smoothed; 0: nothing was measured yet."""
    rtt_var_ms: float = 0.0
    rtt_min_ms: float = 0.0
    rtt_latest_ms: float = 0.0
    packets_in: int = 0
    packets_out: int = 0
    bytes_in: int = 0
    bytes_out: int = 0
    packets_lost: int = 0
    packets_spurious: int = 0
    """Of these, those that were only late: they came after all."""
    loss_percent: float = 0.0
    """Of all that left."""
    probe_timeouts: int = 0
    pto_count: int = 0
    """Probes in a row that nobody answered: above 0 the peer is silent."""
    congestion_state: str = ""
    """slow start, congestion avoidance or recovery."""
    congestion_window_bytes: int = 0
    slow_start_threshold_bytes: int = 0
    """0: not known yet."""
    in_flight_bytes: int = 0
    pacing_bytes_per_s: float = 0.0
    credit_bytes: int = 0
    """What the peer would still take on its lanes."""
    limited_by: str = ""
    """application, flow credit, congestion window or pacing: what kept more from leaving when this was asked."""
    datagrams_sent: int = 0
    """Unreliable datagrams, such as echoes of `stp ping --load`; so the next five."""
    datagrams_acked: int = 0
    datagrams_lost: int = 0
    datagrams_received: int = 0
    datagrams_refused: int = 0
    datagrams_dropped: int = 0
    cipher: str = ""
    key_phase: int = 0
    key_updates: int = 0
    certificate_not_after_ms: int = 0
    cids_local: int = 0
    cids_remote: int = 0
    keepalive_s: float = 0.0
    path_validations: int = 0
    """New addresses of the peer that answered; those that did not are the reverts."""
    path_reverts: int = 0
    rebinds: int = 0
    """Changes of our own port or address, by ourselves."""
    failed_opens: int = 0
    """Packets that did not open: somebody's noise, or damage on the way."""
    repeated: int = 0
    trace_until_ms: int = 0
    """Until when its event log is written; 0: it is not, -1: as long as it lives."""


@define(kw_only=True)
class TraceStatus:
    """An event log that is being written, on the daemon's machine."""

    session: str
    path: str = ""
    until_ms: int = 0


@define(kw_only=True)
class SessionStatus:
    """One association with a peer."""

    id: str
    """32 hexadecimal digits."""
    node: str = ""
    domain: str = ""
    role: str = ""
    kind: str = ""
    """What the peer calls itself: gateway, hub, client."""
    software: str = ""
    address: str = ""
    carrier: str = "udp"
    """udp, tls or unix."""
    dialling: bool = False
    """This side dialled."""
    state: str = "open"
    since_ms: int = 0
    cipher: str = ""
    certificate_serial: str = ""
    certificate_not_after_ms: int = 0
    rtt_ms: float = 0.0
    congestion_window_bytes: int = 0
    bytes_in: int = 0
    bytes_out: int = 0
    packets_in: int = 0
    packets_out: int = 0
    packets_lost: int = 0
    packet_bytes: int = 0
    """UDP payload of full packets, as far as probing has come."""
    black_holes: int = 0
    """How often full packets stopped arriving, and became smaller."""
    messages_in: int = 0
    messages_out: int = 0
    subscriptions: int = 0
    live_dropped: int = 0


@define(kw_only=True)
class BufferLane:
    """One log of the store."""

    lane: int
    first: int = 0
    """Position of the oldest record still here."""
    last: int = 0
    messages: int = 0
    bytes: int = 0
    oldest_age_s: float = 0.0


@define(kw_only=True)
class QuarantinedRecord:
    """A record put aside because it does no good where it was going."""

    lane: int
    pos: int = 0
    reason: str = ""
    peer: str = ""
    messages: int = 0
    at_ms: int = 0


@define(kw_only=True)
class BufferStatus:
    """The store on disk."""

    path: str = ""
    used_bytes: int = 0
    budget_bytes: int = 0
    reserve_bytes: int = 0
    disk_free_bytes: int = 0
    full: bool = False
    full_since_ms: int = 0
    full_cause: str = ""
    """What the space waits for, for people: "uplink hub-1 is unreachable since 02:10"."""
    oldest_age_s: float = 0.0
    queue_depth: int = 0
    """Records waiting for the writer thread."""
    queue_limit: int = 0
    commits: int = 0
    commit_mean_ms: float = 0.0
    commit_max_ms: float = 0.0
    lanes: list[BufferLane] = Factory(list)
    quarantined: list[QuarantinedRecord] = Factory(list)
    """The newest 100."""
    quarantined_records: int = 0


@define(kw_only=True)
class DoorCounts:
    """received = accepted + repeats + refused + corrupt, per peer and class."""

    peer: str
    class_name: str = ""
    received: int = 0
    accepted: int = 0
    repeats: int = 0
    refused: int = 0
    corrupt: int = 0
    unexplained: int = 0


@define(kw_only=True)
class NodeCounts:
    """accepted + originated = stored + live_only + no_taker, per class."""

    class_name: str
    accepted: int = 0
    originated: int = 0
    stored: int = 0
    live_only: int = 0
    no_taker: int = 0
    unexplained: int = 0


@define(kw_only=True)
class HopCounts:
    """routed = custody + behind + refused_in_flight + gone by reason, per hop and lane."""

    hop: str
    kind: str = ""
    """uplink, reader, edge."""
    lane: int = 0
    routed: int = 0
    custody: int = 0
    behind: int = 0
    refused_in_flight: int = 0
    expired: int = 0
    dropped: int = 0
    filtered: int = 0
    quarantined: int = 0
    crash: int = 0
    unexplained: int = 0


@define(kw_only=True)
class LedgerStatus:
    """Where every message is. `unexplained` is 0, or it is an incident."""

    unexplained: int = 0
    doors: list[DoorCounts] = Factory(list)
    nodes: list[NodeCounts] = Factory(list)
    hops: list[HopCounts] = Factory(list)
    explain: list[str] = Factory(list)
    """One sentence for each sum that does not hold."""


@define(kw_only=True)
class KeyStatus:
    """An enrolment key. Its secret is shown once, when it is made, and never again."""

    id: str
    role: str = ""
    uses: int = 0
    """How often it may be used in all; 0: without limit."""
    used: int = 0
    created_ms: int = 0
    expires_ms: int = 0
    """0: never."""
    revoked: bool = False
    tags: list[str] = Factory(list)


@define(kw_only=True)
class NodeStatus:
    """A node that enrolled here."""

    node: str
    role: str = ""
    enrolled_ms: int = 0
    renewed_ms: int = 0
    """0: never."""
    not_after_ms: int = 0
    """The end of its newest certificate."""
    connected: bool = False
    revoked: bool = False
    reason: str = ""
    """Why it was revoked."""
    tags: list[str] = Factory(list)


@define(kw_only=True)
class Revocation:
    """What revoking or forgetting a node did."""

    node: str
    serials: list[str] = Factory(list)
    """Its certificates, in hexadecimal, that may come in no longer."""
    sessions: int = 0
    """How many sessions of it ended here."""


@define(kw_only=True)
class NewKey:
    """The answer to "make an enrolment key": the only place its secret ever stands."""

    id: str
    token: str = attrs.field(repr=False)
    expires_ms: int = 0


@define(kw_only=True)
class ReloadReport:
    """What reading the configuration and the certificates again brought."""

    changed: list[str] = Factory(list)
    """Keys now in force with another value."""
    restart_needed: list[str] = Factory(list)
    """Keys that differ and need a restart."""
    problems: list[str] = Factory(list)
    """Why nothing was changed; empty: it was."""


@define(kw_only=True)
class EventRecord:
    """Something happened. One line of GET /v1/events."""

    time_ms: int
    kind: str
    """session.open, session.closed, session.refused, uplink.connected, uplink.lost, store.full, store.free,
    record.quarantined, reader.removed, key.created, key.used, key.revoked,
    session.moved, uplink.moved, node.revoked, node.forgotten, config.reloaded, drain, dropped."""
    text: str = ""
    """A sentence."""
    node: str = ""
    fields: dict[str, Any] = Factory(dict)


@define(kw_only=True)
class DaemonStatus:
    """The daemon in one view; what `stpctl status` puts in words."""

    role: str = ""
    node: str = ""
    domain: str = ""
    version: str = ""
    pid: int = 0
    now_ms: int = 0
    started_ms: int = 0
    ready: bool = False
    draining: bool = False
    reasons: list[str] = Factory(list)
    """Why it is not healthy or not ready, in words; empty: all is well."""
    listen: list[str] = Factory(list)
    clock_synchronised: bool = True
    certificate_not_after_ms: int = 0
    receive_buffer_bytes: int = 0
    """What the kernel granted the UDP sockets, each."""
    sessions: int = 0
    edges: int = 0
    edges_connected: int = 0
    edges_behind: int = 0
    readers: int = 0
    readers_behind: int = 0
    upstreams: list[UpstreamStatus] = Factory(list)
    buffer: BufferStatus = Factory(BufferStatus)
    unexplained: int = 0
    log_drops: int = 0


def to_dict(value: Any) -> Any:
    """Turn a status object, or a list of them, into what `json` writes."""
    if isinstance(value, list | tuple):
        return [to_dict(item) for item in value]
    if attrs.has(type(value)):
        return attrs.asdict(value)
    return value


def from_dict(cls: type[T], data: Any) -> T:
    """Read a status object from decoded JSON; unknown keys are ignored, missing ones take defaults.

    Raises ValueError where `data` is no object or a required key is missing.
    """
    if not isinstance(data, dict):
        raise ValueError(f"expected an object for {cls.__name__}, got {type(data).__name__}")  # noqa: TRY004
    hints = typing.get_type_hints(cls)
    known = {
        f.name: _read(hints[f.name], data[f.name])
        for f in attrs.fields(typing.cast(Any, cls))
        if f.name in data
    }
    try:
        return cls(**known)
    except TypeError as exc:
        raise ValueError(f"{cls.__name__}: {exc}") from exc


def _read(hint: Any, value: Any) -> Any:
    if isinstance(hint, type) and attrs.has(hint):
        return from_dict(hint, value)
    if typing.get_origin(hint) is list and isinstance(value, list):
        item = typing.get_args(hint)[0]
        return [_read(item, v) for v in value]
    return value
