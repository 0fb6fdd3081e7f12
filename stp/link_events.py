"""What a link tells its owner: a closed union, and its counters (protocol §10). Treat values as frozen."""

from __future__ import annotations

from typing import TypeAlias

from attrs import define

from stp.control import Goaway, Hello, Status, Subscribe, Subscribed
from stp.core.errors import ErrorCode, LocalCause
from stp.core.events import DatagramReceived
from stp.records import RecordHead, RefusedCode


@define
class HelloReceived:
    """The peer said who it is, and its certificate agrees. The first event of a link that works."""

    hello: Hello


@define
class SourceIntroduced:
    """The peer may send records of this source, which is `node`'s: HELLO's own, or one INTRODUCE named."""

    source: bytes
    node: str


@define
class RecordReceived:
    """A record, checked, that needs an answer: `settle` or `refuse`, once."""

    lane: int
    place: int
    record: bytes
    head: RecordHead


@define
class RecordRejected:
    """The link refused a record itself; needs no answer. `head` is None if its bytes cannot be trusted."""

    lane: int
    place: int
    head: RecordHead | None
    code: RefusedCode
    messages: int


@define
class ReceiptReceived:
    """All places below `kept` are settled by the peer, all below `custody` and in `ranges` (from ≤ p < to)
    in custody. A place that was REFUSED before is counted too and must not be taken as received."""

    lane: int
    kept: int
    custody: int
    ranges: list[tuple[int, int]]


@define
class RefusedReceived:
    """The peer did not take the record at this place. Codes 2 to 5 do not improve by waiting."""

    lane: int
    place: int
    code: int
    retry_after_ms: int
    reason: str


@define
class SubscribeReceived:
    """The peer wants messages; answer with `send(Subscribed(...))`."""

    subscribe: Subscribe


@define
class UnsubscribeReceived:
    """The peer ends the subscription with this id."""

    id: str


@define
class SubscribedReceived:
    """The peer's answer to a SUBSCRIBE: `error` is None when it stands."""

    subscribed: Subscribed


@define
class GoawayReceived:
    """The peer will close; reconnect in the slot it names."""

    goaway: Goaway


@define
class StatusReceived:
    """The peer's backlog and ledger, as JSON."""

    status: Status


@define
class DrainCreditReceived:
    """How many bytes per second of backlog the peer takes on this lane."""

    lane: int
    rate: int


@define
class MovedReceived:
    """The peer sends no more on this session: what follows comes on the one that continues it."""


@define
class RevokedReceived:
    """Certificates, by serial, that may come in no longer, and until when (Unix seconds) to remember them."""

    serials: dict[int, int]


@define
class Writable:
    """There is room on this lane again (`lane_room`)."""

    lane: int


@define
class LinkClosed:
    """The end, always the last event, given once. `code` is a wire code or what this side saw."""

    code: ErrorCode | LocalCause
    reason: str
    by_peer: bool


LinkEvent: TypeAlias = (
    HelloReceived
    | SourceIntroduced
    | RecordReceived
    | RecordRejected
    | ReceiptReceived
    | RefusedReceived
    | SubscribeReceived
    | UnsubscribeReceived
    | SubscribedReceived
    | GoawayReceived
    | StatusReceived
    | DrainCreditReceived
    | MovedReceived
    | RevokedReceived
    | Writable
    | DatagramReceived
    | LinkClosed
)


@define
class LinkStatistics:
    """Plain counters of one link; sizes in bytes."""

    records_sent: int = 0
    records_received: int = 0
    records_open: int = 0
    records_held: int = 0
    rejected: int = 0
    """By the link itself: corrupt, of a foreign source, or behind a refused one."""
    refused_by_owner: int = 0
    refused_by_peer: int = 0
    receipts_sent: int = 0
    receipts_received: int = 0
    control_backlog: int = 0
    streams_ignored: int = 0
