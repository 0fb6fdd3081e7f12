"""What Prometheus reads: one collector over plain integers, asked at scrape time.

(1) Every metric begins with stpd_, has a HELP and a TYPE, and ends as its kind asks: counters in _total.
(2) No metric has a label whose values strangers choose: peers are named only where they are hops, which an
    operator or an enrolment made; at most MAX_HOPS of them, the rest summed up under "other".
(3) Counting costs `+= 1` where it happens; the work is done here, when somebody asks, and not in the loop.
"""

from collections.abc import Iterator, Mapping
from typing import Any, Final

from attrs import Factory, define
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric, SummaryMetricFamily
from prometheus_client.registry import Collector

from stpd.status import DaemonStatus, LaneLag, LedgerStatus

MAX_HOPS: Final = 500
"""Hops with series of their own (2)."""
OTHER: Final = "other"
TOTALS: Final = {
    "packets_lost": "Packets that left and did not arrive, as far as their senders found out.",
    "probe_timeouts": "Times that an answer was overdue and a probe was sent.",
    "key_updates": "Updates of the keys of a session.",
    "migrations": "Changes of path of sessions, those that were taken back included.",
    "path_validations": "New addresses of peers that answered.",
    "path_reverts": "New addresses of peers that did not answer, or while the peer was heard at the old one.",
    "rebinds": "Sessions that went on from a new local port or address, by themselves.",
    "datagrams_sent": "Unreliable datagrams of sessions that left, such as echoes.",
    "datagrams_received": "Unreliable datagrams of sessions that came.",
    "datagrams_dropped": "Unreliable datagrams of sessions that nobody fetched, or that became too large.",
}
"""Sums over all sessions: key of `Snapshot.traffic` and name of the metric -> help."""
LANES: Final = {1: "command", 2: "event", 3: "telemetry", 4: "bulk"}


@define(kw_only=True)
class HopLag:
    """One hop and how far it is behind."""

    name: str
    kind: str
    """uplink, reader, edge."""
    connected: bool = False
    lanes: list[LaneLag] = Factory(list)


@define(kw_only=True)
class Snapshot:
    """All numbers of one scrape. Counters only grow while the process lives."""

    status: DaemonStatus
    ledger: LedgerStatus
    hops: list[HopLag] = Factory(list)
    sessions_by_role: Mapping[str, int] = Factory(dict)
    handshakes: Mapping[str, int] = Factory(dict)
    """Counts by result: completed, refused, timed_out, …"""
    drops: Mapping[str, int] = Factory(dict)
    """Packets thrown away, by reason."""
    traffic: Mapping[str, int] = Factory(dict)
    """rx_bytes, tx_bytes, rx_datagrams, tx_datagrams of all sockets; black_holes of all sessions."""
    socket_errors: Mapping[str, int] = Factory(dict)
    sessions_by_carrier: Mapping[str, int] = Factory(dict)
    sessions_ended: Mapping[str, int] = Factory(dict)
    """By us, by reason."""
    stream_bytes: Mapping[tuple[str, str], int] = Factory(dict)
    """(carrier, "rx" or "tx") -> bytes over stream sockets."""
    doors: Mapping[tuple[str, str], int] = Factory(dict)
    """(carrier, what became of it) -> connections at the doors for streams."""
    """By errno name."""
    store: Mapping[str, int] = Factory(dict)
    """Counters of the store, by what happened."""
    commit_seconds: float = 0.0
    """Spent in all commits since the start."""
    commit_seconds_max: float = 0.0
    queues: Mapping[str, tuple[int, int]] = Factory(dict)
    """Name -> (depth, limit)."""
    api: Mapping[str, int] = Factory(dict)
    """Connections and requests at the management API, by what became of them."""
    events: Mapping[str, int] = Factory(dict)
    """published, dropped."""
    qlog: Mapping[str, int] = Factory(dict)
    """Events for event logs of sessions, by what became of them."""
    log_written: int = 0
    log_dropped: int = 0


class DaemonCollector(Collector):
    """The one collector, of one scrape."""

    def __init__(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot

    def collect(self) -> Iterator[Metric]:
        """All families."""
        for part in (_node, _sessions, _transport, _ledger, _hops, _store, _process):
            yield from part(self._snapshot)


def render(snapshot: Snapshot) -> bytes:
    """A snapshot in Prometheus' text format. Takes 0.2 s for a thousand hops: call it in a thread."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(DaemonCollector(snapshot))
    return generate_latest(registry)


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(f"stpd_{name}", text, value=value)


def _counter(name: str, text: str, value: float) -> Metric:
    return CounterMetricFamily(f"stpd_{name}", text, value=value)


def _by(kind: Any, name: str, text: str, label: str, values: Mapping[str, float]) -> Metric:
    """A family with one label."""
    family: Metric = kind(f"stpd_{name}", text, labels=[label])
    for key, value in values.items():
        family.add_metric([key], value)  # type: ignore[attr-defined]
    return family


def _node(s: Snapshot) -> Iterator[Metric]:
    status = s.status
    info = GaugeMetricFamily(
        "stpd_info", "Which node this is; always 1.", labels=["node", "domain", "role", "version"]
    )
    info.add_metric([status.node, status.domain, status.role, status.version], 1)
    yield info
    yield _gauge("start_time_seconds", "When the daemon started, in Unix time.", status.started_ms / 1000)
    yield _gauge("ready", "1 when the node takes traffic.", status.ready)
    yield _gauge("draining", "1 when the node sends its sessions elsewhere and ends.", status.draining)
    yield _gauge("healthy", "1 when nothing stands in the way of progress.", not status.reasons)
    yield _gauge(
        "unexplained_messages",
        "Messages that the ledger cannot account for; anything but 0 is an incident.",
        status.unexplained,
    )
    yield _gauge(
        "certificate_not_after_seconds",
        "When the node's certificate ends, in Unix time.",
        status.certificate_not_after_ms / 1000,
    )
    yield _gauge(
        "clock_synchronised", "1 when the kernel calls its clock synchronised.", status.clock_synchronised
    )


def _sessions(s: Snapshot) -> Iterator[Metric]:
    yield _gauge("sessions", "Live sessions.", s.status.sessions)
    yield _by(
        GaugeMetricFamily,
        "sessions_by_role",
        "Live sessions by the peer's role; 'none' without one.",
        "role",
        {role or "none": n for role, n in s.sessions_by_role.items()},
    )
    yield _by(
        GaugeMetricFamily,
        "sessions_by_carrier",
        "Live sessions by what carries them: udp, tls or unix.",
        "carrier",
        s.sessions_by_carrier,
    )
    yield _by(
        CounterMetricFamily,
        "sessions_ended",
        "Sessions that we ended: replaced, moved to a fresh one, expired or revoked.",
        "reason",
        s.sessions_ended,
    )
    yield _gauge("edges", "Gateways known below this node.", s.status.edges)
    yield _gauge("edges_connected", "Gateways below this node that have a session.", s.status.edges_connected)
    yield _gauge("readers", "Durable subscriptions.", s.status.readers)
    yield _by(CounterMetricFamily, "handshakes", "Handshakes by result.", "result", s.handshakes)


def _transport(s: Snapshot) -> Iterator[Metric]:
    names = {
        "rx_bytes": ("received_bytes", "Bytes received from UDP."),
        "tx_bytes": ("sent_bytes", "Bytes sent to UDP."),
        "rx_datagrams": ("received_datagrams", "Datagrams received."),
        "tx_datagrams": ("sent_datagrams", "Datagrams sent."),
    }
    for key, (name, text) in names.items():
        yield _counter(name, text, s.traffic.get(key, 0))
    yield _counter(
        "path_black_holes",
        "How often full packets of a session stopped arriving, and became smaller.",
        s.traffic.get("black_holes", 0),
    )
    for key, text in TOTALS.items():
        yield _counter(key, text, s.traffic.get(key, 0))
    yield _by(CounterMetricFamily, "packets_dropped", "Packets thrown away unanswered.", "reason", s.drops)
    yield _by(CounterMetricFamily, "socket_errors", "Failed socket calls.", "errno", s.socket_errors)
    streams = CounterMetricFamily(
        "stpd_stream_bytes", "Bytes over TCP and Unix sockets, TLS included.", labels=["carrier", "direction"]
    )
    for (carrier, direction), value in s.stream_bytes.items():
        streams.add_metric([carrier, direction], value)
    yield streams
    doors = CounterMetricFamily(
        "stpd_door_connections",
        "Connections to the doors for streams, by what became of them.",
        labels=["carrier", "result"],
    )
    waiting = GaugeMetricFamily(
        "stpd_door_waiting", "Connections that have not shown yet who they are.", labels=["carrier"]
    )
    for (carrier, what), value in s.doors.items():
        if what == "waiting":
            waiting.add_metric([carrier], value)
        else:
            doors.add_metric([carrier, what], value)
    yield doors
    yield waiting
    yield _gauge(
        "receive_buffer_bytes", "What the kernel granted the UDP sockets.", s.status.receive_buffer_bytes
    )


def _ledger(s: Snapshot) -> Iterator[Metric]:
    door = CounterMetricFamily(
        "stpd_door_messages",
        "Messages at the door: received, and what became of them.",
        labels=["class", "outcome"],
    )
    sums: dict[tuple[str, str], int] = {}
    for row in s.ledger.doors:
        for outcome in ("received", "accepted", "repeats", "refused", "corrupt"):
            key = (row.class_name, outcome)
            sums[key] = sums.get(key, 0) + getattr(row, outcome)
    for (class_name, outcome), count in sums.items():
        door.add_metric([class_name, outcome], count)
    yield door
    node = CounterMetricFamily(
        "stpd_node_messages", "Messages taken by the node, and where they went.", labels=["class", "outcome"]
    )
    for n in s.ledger.nodes:
        for outcome in ("accepted", "originated", "stored", "live_only", "no_taker"):
            node.add_metric([n.class_name, outcome], getattr(n, outcome))
    yield node
    hop = CounterMetricFamily(
        "stpd_hop_messages",
        "Messages routed to a hop, and what became of them.",
        labels=["hop", "kind", "lane", "outcome"],
    )
    shown = {h.name for h in s.hops[:MAX_HOPS]}
    totals: dict[tuple[str, str, int, str], int] = {}
    for h in s.ledger.hops:
        if not h.routed:
            continue  # most edges use one lane of four, and a hub has many edges
        for outcome in ("routed", "custody", "expired", "dropped", "filtered", "quarantined", "crash"):
            name = h.hop if h.hop in shown else OTHER
            where = (name, h.kind, h.lane, outcome)
            totals[where] = totals.get(where, 0) + getattr(h, outcome)
    for (name, kind, lane, outcome), count in totals.items():
        hop.add_metric([name, kind, LANES.get(lane, str(lane)), outcome], count)
    yield hop


def _hops(s: Snapshot) -> Iterator[Metric]:
    connected = GaugeMetricFamily(
        "stpd_hop_connected", "1 when the hop has a session.", labels=["hop", "kind"]
    )
    labels = ["hop", "kind", "lane"]
    messages = GaugeMetricFamily("stpd_hop_lag_messages", "Messages that wait for a hop.", labels=labels)
    size = GaugeMetricFamily("stpd_hop_lag_bytes", "Bytes that wait for a hop.", labels=labels)
    age = GaugeMetricFamily(
        "stpd_hop_lag_seconds", "Age of the oldest message that waits for a hop.", labels=labels
    )
    rest: dict[tuple[str, int], LaneLag] = {}
    rows = [(h.name, h.kind, lag) for h in s.hops[:MAX_HOPS] for lag in h.lanes]
    for h in s.hops[MAX_HOPS:]:
        for lag in h.lanes:
            total = rest.setdefault((h.kind, lag.lane), LaneLag(lane=lag.lane))
            total.messages += lag.messages
            total.bytes += lag.bytes
            total.oldest_age_s = max(total.oldest_age_s, lag.oldest_age_s)
    rows += [(OTHER, kind, lag) for (kind, _), lag in rest.items()]
    for h in s.hops[:MAX_HOPS]:
        connected.add_metric([h.name, h.kind], h.connected)
    for name, kind, lag in rows:
        where = [name, kind, LANES.get(lag.lane, str(lag.lane))]
        messages.add_metric(where, lag.messages)
        size.add_metric(where, lag.bytes)
        age.add_metric(where, lag.oldest_age_s)
    yield from (connected, messages, size, age)


def _store(s: Snapshot) -> Iterator[Metric]:
    buffer = s.status.buffer
    yield _gauge("store_used_bytes", "Bytes of the budget in use.", buffer.used_bytes)
    yield _gauge("store_budget_bytes", "Bytes the store may take on disk.", buffer.budget_bytes)
    yield _gauge("store_disk_free_bytes", "Bytes free on the store's disk.", buffer.disk_free_bytes)
    yield _gauge("store_full", "1 when publishers are held back for want of room.", buffer.full)
    yield _gauge("store_oldest_seconds", "Age of the oldest message kept.", buffer.oldest_age_s)
    yield _gauge(
        "store_quarantined_records", "Records put aside, waiting for an operator.", buffer.quarantined_records
    )
    lanes = {LANES.get(lane.lane, str(lane.lane)): lane for lane in buffer.lanes}
    yield _by(
        GaugeMetricFamily,
        "store_messages",
        "Messages kept, by lane.",
        "lane",
        {name: lane.messages for name, lane in lanes.items()},
    )
    yield _by(
        GaugeMetricFamily,
        "store_lane_bytes",
        "Bytes kept, by lane.",
        "lane",
        {name: lane.bytes for name, lane in lanes.items()},
    )
    commits = SummaryMetricFamily("stpd_store_commit_seconds", "Time spent in commits, sync included.")
    commits.add_metric([], count_value=buffer.commits, sum_value=s.commit_seconds)
    yield commits
    yield _gauge("store_commit_max_seconds", "The longest commit since the start.", s.commit_seconds_max)
    yield _by(CounterMetricFamily, "store_operations", "What the store did, by kind.", "kind", s.store)


def _process(s: Snapshot) -> Iterator[Metric]:
    yield _by(
        GaugeMetricFamily,
        "queue_depth",
        "What waits in a bounded queue.",
        "queue",
        {name: depth for name, (depth, _) in s.queues.items()},
    )
    yield _by(
        GaugeMetricFamily,
        "queue_limit",
        "What a bounded queue holds at most.",
        "queue",
        {name: limit for name, (_, limit) in s.queues.items()},
    )
    told = {name: count for name, count in s.api.items() if name != "open"}
    yield _by(CounterMetricFamily, "api", "Connections and requests at the management API.", "what", told)
    yield _gauge("api_connections", "Operators connected now.", s.api.get("open", 0))
    yield _by(CounterMetricFamily, "events", "Events told to watchers.", "what", s.events)
    yield _by(CounterMetricFamily, "qlog_events", "Events for event logs of sessions.", "what", s.qlog)
    yield _counter("log_lines", "Log lines written.", s.log_written)
    yield _counter("log_lines_dropped", "Log lines dropped, because nobody took them.", s.log_dropped)
