"""A peer: one session and what hangs on it; what it reports of itself; how it is named to people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, Protocol

from attrs import define, field

from stp.control import Goaway, Subscribe, Subscribed
from stp.core.verbs import AnySession
from stp.echo import Responder
from stp.link import Link, LinkClosed
from stpd.hops import Feed
from stpd.relay import Door

KEEPER_KINDS: Final = frozenset({"gateway", "hub"})
"""Client kinds that keep a store: their durable subscriptions are edges."""


class UpstreamOwner(Protocol):
    """What an uplink wants to hear of its link."""

    def on_hello(self, peer: Peer) -> None: ...
    def on_subscribed(self, answer: Subscribed) -> None: ...
    def on_goaway(self, peer: Peer, goaway: Goaway) -> None: ...
    def on_revoked(self, serials: dict[int, int]) -> None: ...
    def on_closed(self, peer: Peer, closed: LinkClosed) -> None: ...


@define(eq=False)
class Peer:
    """One session and what hangs on it."""

    link: Link
    opened_ms: int
    upstream: UpstreamOwner | None = None
    door: Door | None = None
    feeds: dict[str, Feed] = field(factory=dict)
    live: dict[str, Subscribe] = field(factory=dict)
    # make before break: two sessions of the same two nodes, the older one settling beside its successor
    older: Peer | None = None
    successor: Peer | None = None
    leaving: list[Feed] = field(factory=list)
    """Feeds that go on over the successor, and may have flights here."""
    moving_since: float = 0.0
    told_moved: bool = False
    told_revoked: int = -1
    """The generation of the list of revoked certificates that a keeper below knows (stpd/lifetimes.py)."""
    heard_moved: bool = False

    responder: Responder | None = None
    """Answers echo requests; none where we dialled."""

    def on_datagram(self, data: bytes, now: float) -> None:
        """An unreliable datagram: an echo request, or nothing to us (protocol §10.5)."""
        if self.responder is None:
            return
        reply = self.responder.answer(data, now)
        if reply is None:
            return
        if len(reply) > self.session.max_datagram_size or not self.session.send_datagram(reply):
            self.responder.unanswered += 1

    @property
    def session(self) -> AnySession:
        return self.link.session

    @property
    def node(self) -> str:
        identity = self.session.peer
        return identity.node if identity is not None else ""


@define
class SessionsStatistics:
    """Plain counters since the start."""

    opened: int = 0
    closed: int = 0
    replaced: int = 0
    moved: int = 0
    """Sessions that another of the same two nodes took over from while they still carried."""
    subscriptions_refused: int = 0
    read_failures: int = 0


@define
class Report:
    """A peer's STATUS, as far as we understand it. Ages in seconds."""

    at_ms: int
    messages: int = 0
    bytes: int = 0
    oldest_age_s: float = 0.0
    cause: str = ""
    unexplained: int = 0


def read_report(fields: Mapping[str, Any], at_ms: int) -> Report:
    """Numbers where numbers should be, else 0: the inside of STATUS is free (protocol §10)."""

    def number(key: str) -> float:
        value = fields.get(key, 0)
        return value if isinstance(value, int | float) and 0 <= value < 2**63 else 0

    cause = fields.get("cause", "")
    return Report(
        at_ms,
        int(number("messages")),
        int(number("bytes")),
        float(number("oldest_age_s")),
        cause[:200] if isinstance(cause, str) else "",
        int(number("unexplained")),
    )


def address_of(session: AnySession) -> str:
    address = session.addr
    if isinstance(address, tuple):
        host, port = address[0], address[1]
        return f"[{host}]:{port}" if ":" in str(host) else f"{host}:{port}"
    return str(address)


def session_id(session: AnySession) -> str:
    return session.id.hex() if session.id is not None else ""
