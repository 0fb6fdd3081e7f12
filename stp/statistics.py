"""What a client says of itself: snapshots, in plain numbers."""

from __future__ import annotations

from attrs import define

from stp.lines import ConnectionStatistics
from stp.outbox import OutboxStatistics
from stp.subscriber import InboxStatistics


@define
class Ping:
    """One round trip to the keeper's message layer, and the network's share of it. Seconds."""

    round_trip: float
    network: float


@define
class ClientStatistics:
    """A snapshot. `lanes` by name; `readers` one entry per session of a subscription's own."""

    connection: ConnectionStatistics
    lanes: dict[str, OutboxStatistics]
    inbox: InboxStatistics
    readers: dict[str, InboxStatistics]
    refused_messages: int
    late_replies: int
    unfinished: int
    """Messages that are neither kept nor refused for good."""
