"""What a configuration may say: every key, its unit, its limit and its default.

The classes mirror the TOML file one to one: a table is a class, a key an attribute (only `[[class]]`,
`[[upstream]]` and `[[access]]` are spelled in the plural here). `stpd.config` reads a file into them.

(1) Whatever a file leaves out has a default that is safe on an open network.
(2) Times are float seconds, sizes are bytes; a file writes both with units ("5s", "512MiB").
(3) No value in here is a secret: secrets stand in files, and here only their paths.
"""

from pathlib import Path
from typing import Annotated, Any, Final, Literal

from attrs import Factory, define, field

from stp.echo import ECHO_RATE
from stp.racing import PROBE_FIRST, STABLE

Role = Literal["gateway", "hub"]
Durability = Literal["sync", "memory"]
LogLevel = Literal["debug", "info", "warning", "error"]
LogFormat = Literal["json", "text"]
Clock = Literal["kernel", "trusted"]
Controller = Literal["tolerant", "cubic", "newreno"]

Seconds = Annotated[float, "duration"]
"""Float seconds; in a file a string with a unit: "20ms", "5s", "10m", "72h", "7d"."""
Size = Annotated[int, "size"]
"""Bytes; in a file a string with a unit: "64KiB", "512MiB", "1GB"."""
Rate = Annotated[int, "rate"]
"""A whole number a second, 0: no limit."""

HOUR: Final = 3600.0
DAY: Final = 24 * HOUR
KIB: Final = 1024
MIB: Final = 1024 * 1024
GB: Final = 1_000_000_000

MAX_CLASSES: Final = 32
"""Classes a node may have. HELLO carries them all in one control record of 16 KiB (protocol §7, §10)."""


@define(kw_only=True)
class LocalName:
    """Which node a local user is (protocol §11). Of several rules the first that fits decides."""

    node: str
    """The node's name. {user} stands for the user's."""
    user: str = "*"
    """A user's name or number; * for all."""
    group: str = "*"
    """A group's name or number, which must be one of the user's; * for any."""


@define(kw_only=True)
class UnixConfig:
    """A Unix socket for programs of this machine: no certificate, the kernel says who they are."""

    path: str = ""
    """Where the socket stands, such as /run/stpd/stp.sock; empty: none. Only this node and root may write to its
    directory."""
    mode: str = "0660"
    """The socket's mode, octal: who may connect at all."""
    group: str = ""
    """The socket's group, by name or number; empty: this process's."""
    map: tuple[LocalName, ...] = Factory(lambda: (LocalName(node="{user}"),))
    """Who is which node. By default every user that may connect is the node of the user's name."""


@define(kw_only=True)
class ListenConfig:
    """Where peers reach this node."""

    udp: tuple[str, ...] = ("0.0.0.0:9000",)
    """UDP addresses, "host:port" or "[v6]:port"; empty: this node only dials."""
    tls: tuple[str, ...] = ()
    """TCP addresses for peers whose networks let no UDP through, "[::]:8443". `enrol.listen` may name the same one:
    then one port serves both."""
    unix: UnixConfig = Factory(UnixConfig)


@define(kw_only=True)
class EnrolConfig:
    """The door by which new nodes and devices get their certificate (protocol §11)."""

    listen: str = ""
    """TCP address of the enrolment service, "host:8443"; empty: off."""
    ca: Path | None = None
    """Directory with ca.pem and ca.key of the authority that signs here; none: this node cannot sign."""
    forward: str = ""
    """"host:port" of the enrolment service that requests are passed on to when there is no `ca` here."""


@define(kw_only=True)
class ManagementConfig:
    """The management API for operators: HTTPS with a client certificate (R-11-9)."""

    listen: str = "127.0.0.1:9443"
    """TCP address; empty: off."""
    anchors: tuple[Path, ...] = ()
    """PEM files of the authorities that sign operators; empty: the anchors of this node's identity."""


@define(kw_only=True)
class HealthConfig:
    """/health, /ready and /metrics: plain HTTP, read-only, nothing secret in it."""

    listen: str = "127.0.0.1:8080"
    """TCP address; empty: off."""


@define(kw_only=True)
class TransportConfig:
    """How this node sends, and how long its sessions last (protocol §6, §9)."""

    congestion: Controller = "tolerant"
    """How much may be under way. cubic and newreno take every loss for a full queue, as their RFCs say."""
    max_datagram: int = 1472
    """Bytes of UDP payload up to which a path is probed, over IPv4; over IPv6 20 less, as its header is longer.
    1472 is what Ethernet carries, 8972 fits its jumbo frames; 1200: nothing is probed."""
    rehandshake: Seconds = 24 * HOUR
    """Seconds, ± 10 %, after which a session to an upstream is replaced by a fresh one, without a gap."""
    probe: Seconds = PROBE_FIRST
    """Seconds after which UDP is tried again where only TLS got through to an upstream; the next times come later, up
    to every 4 minutes."""
    stable: Seconds = STABLE
    """Seconds for which UDP must have worked before a session moves back to it."""
    clock: Clock = "kernel"
    """Whose word it is that this machine's clock is right, so that sessions end with certificates by it: the
    kernel's, or ours (trusted)."""
    qlog: Path | None = None
    """Directory for an event log of every session, which viewers of qlog draw; none: off. It costs CPU time and disk:
    at most 128 files of 64 MiB. For one session, and for a while: `stpctl path trace`."""


@define(kw_only=True)
class StoreConfig:
    """The disk: what is kept until the next hop has it."""

    path: Path | None = None
    """The store's directory; none: `state_dir`/store. `load` always fills it in."""
    budget: Size = 1 * GB
    """Bytes the store may take on disk. When they are used up, publishers are held back."""
    reserve: Size = 32 * MIB
    """Bytes of the budget kept free for clearing up: deleting needs room, too."""
    retention: Seconds = 0.0
    """Seconds that messages stay after everybody has taken them, for readers that start in the past."""
    cache: Size = 64 * MIB
    """Bytes of newest records kept in memory for readers that are level."""


@define(kw_only=True)
class LogConfig:
    """Structured lines on standard error."""

    level: LogLevel = "info"
    format: LogFormat = "json"


@define(kw_only=True)
class LimitsConfig:
    """What one peer, one address and all together may ask of this node. 0: no limit, where it says so."""

    sessions: int = 10_000
    """Sessions at once."""
    handshakes_per_second: int = 200
    """Handshakes begun a second, from all addresses (protocol §4, Limits).

    Half of these, and of `half_open`, are kept for peers that were here before and show a token."""
    handshakes_per_address: int = 20
    """Handshakes begun a second from one IPv4 address or one IPv6 /64."""
    half_open: int = 256
    """Handshakes under way at once."""
    half_open_per_address: int = 8
    """Handshakes under way at once from one IPv4 address or one IPv6 /64."""
    unproven: int = 64
    """TCP connections at once on `listen.tls` that have not shown who they are."""
    unproven_per_address: int = 8
    """The same from one IPv4 address or one IPv6 /64."""
    subscriptions_per_session: int = 64
    peer_messages_per_second: Rate = 0
    """Messages a second taken from one peer; faster ones are held back by credit. 0: no limit."""
    peer_bytes_per_second: Rate = 0
    """Record bytes a second taken from one peer; faster ones are held back by credit. 0: no limit."""
    echo_bytes_per_second: int = ECHO_RATE
    """Bytes a second of echo requests (`stp ping --load`) that one session is answered, and all together four times
    as many. 0: none."""


@define(kw_only=True)
class ClassConfig:
    """A class of messages: which topics, on which lane, how safe, for how long (protocol §10)."""

    name: str
    filters: tuple[str, ...]
    """Topic filters. The first class with a matching filter takes the topic."""
    lane: int
    """1 command, 2 event, 3 telemetry, 4 bulk: lanes share a link by weight, none waits for another."""
    durability: Durability = "sync"
    """sync: on disk before it is acknowledged. memory: never stored, never called kept."""
    ttl: Seconds = 0.0
    """Seconds a message is worth delivering where its publisher names no limit; 0: for ever."""
    linger: Seconds = 0.0
    """Seconds a publisher may wait to fill a batch, at most 1."""


@define(kw_only=True)
class UpstreamConfig:
    """A node this one dials and sends to. The first is primary, the others its backups, in order."""

    url: str
    """stp://[node@]host[:port][?tls=port], port 9000 by default; where UDP does not get through, TLS on port 8443 is
    tried, or on the one named; tls=0: UDP only."""
    node: str = ""
    """The name its certificate must bear; empty: the one in `url`, else the identity's."""
    classes: tuple[str, ...] = ()
    """Classes that go there; empty: all that are stored."""
    subscribe: tuple[str, ...] = ("cmd/{node}/#", "{node}/cmd/#", "$inbox/{node}/#")
    """Filters of what comes down from there. {node}: the name of this node."""


@define(kw_only=True)
class AccessRule:
    """What nodes with these names, and this role, may do. What no rule allows is denied."""

    name: str
    nodes: tuple[str, ...] = ("*",)
    """Node names with the wildcards * and ?."""
    role: str | None = None
    """The role they were enrolled with; none: any."""
    publish: tuple[str, ...] = ()
    """Topic filters. {node}: the name of the peer."""
    subscribe: tuple[str, ...] = ()
    """Topic filters. {node}: the name of the peer."""
    speaks_for: tuple[str, ...] = ()
    """Node names, with wildcards, whose records these nodes may carry as relays (protocol §10)."""


@define(kw_only=True)
class Config:
    """All a daemon is told. `stpd.config.load` makes it; nobody changes it afterwards."""

    role: Role = "gateway"
    """Picks defaults only: gateway and hub run the same code."""
    state_dir: Path = Path("/var/lib/stpd")
    """Where the daemon keeps what must survive a restart. Other paths are relative to the file."""
    identity: tuple[Path, ...] = (Path("identity.pem"),)
    """PEM files with key, certificate, anchors and network key."""
    listen: ListenConfig = Factory(ListenConfig)
    enrol: EnrolConfig = Factory(EnrolConfig)
    management: ManagementConfig = Factory(ManagementConfig)
    health: HealthConfig = Factory(HealthConfig)
    transport: TransportConfig = Factory(TransportConfig)
    store: StoreConfig = Factory(StoreConfig)
    log: LogConfig = Factory(LogConfig)
    limits: LimitsConfig = Factory(LimitsConfig)
    classes: tuple[ClassConfig, ...] = field(factory=lambda: BUILT_IN_CLASSES)
    """In order of matching: the file's own, then the built-in ones (which a file may adjust by name)."""
    upstreams: tuple[UpstreamConfig, ...] = ()
    """Empty: the upstream that enrolment wrote into the identity, if any."""
    access: tuple[AccessRule, ...] = ()


BUILT_IN_CLASSES: Final[tuple[ClassConfig, ...]] = (
    ClassConfig(name="command", filters=("cmd/#", "+/cmd/#", "$inbox/#"), lane=1, ttl=1 * HOUR),
    ClassConfig(name="event", filters=("event/#", "+/event/#", "alarm/#", "+/alarm/#", "$stp/#"), lane=2),
    ClassConfig(name="bulk", filters=("bulk/#", "+/bulk/#"), lane=4, linger=0.02),
    ClassConfig(name="telemetry", filters=("#",), lane=3, linger=0.02),
)
"""Together they take every topic there is; telemetry takes what nobody else wants."""

ROLE_DEFAULTS: Final[dict[str, dict[str, Any]]] = {
    "gateway": {
        "store": {"budget": "1GB", "retention": "0s"},
        "access": [
            {
                "name": "devices",
                "nodes": ["*"],
                "publish": ["#", "$inbox/#"],
                "subscribe": ["#", "$inbox/{node}/#"],
            }
        ],
    },
    "hub": {"store": {"budget": "10GB", "retention": "24h"}, "access": []},
}
"""What differs by role, in the words of a file. A hub that is told nothing lets nobody do anything."""
