"""What the daemon tells operators, and what they may tell it: the `Managed` side of the management API."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Final, TypeVar, cast

import attrs
import trio

from stp.core.errors import ErrorCode
from stpd.api import NotFoundError, RefusedError
from stpd.events import EventWatcher
from stpd.keys import JoinTokens
from stpd.paths import path_status
from stpd.peers import KEEPER_KINDS, Peer, address_of, session_id
from stpd.router import LANES
from stpd.status import (
    BufferLane,
    BufferStatus,
    DaemonStatus,
    DoorCounts,
    EdgeStatus,
    HopCounts,
    KeyStatus,
    LaneLag,
    LedgerStatus,
    NewKey,
    NodeCounts,
    NodeStatus,
    PathStatus,
    QuarantinedRecord,
    ReaderStatus,
    ReloadReport,
    Revocation,
    SessionStatus,
    TraceStatus,
    UpstreamStatus,
)
from stpd.store.base import Hop
from stpd.store.sqlite import QUEUE_RECORDS
from stpd.tracing import TracingError

if TYPE_CHECKING:
    from stpd.daemon import Daemon

T = TypeVar("T")

QUARANTINE_SHOWN: Final = 100
"""Newest quarantined records that one answer lists."""


class Managed:
    """One daemon, seen from outside. Every method is cheap; none touches the disk but `buffer` (statvfs)."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon

    # -- views

    def status(self) -> DaemonStatus:
        d = self._daemon
        edges, readers = self.edges(), self.readers()
        return DaemonStatus(
            role=d.config.role,
            node=d.identity.node,
            domain=d.identity.domain,
            version=d.version,
            pid=os.getpid(),
            now_ms=d.wall_ms(),
            started_ms=d.started_ms,
            ready=d.ready,
            draining=d.draining,
            reasons=self.reasons(),
            listen=d.addresses(),
            clock_synchronised=d.clock_synchronised(),
            certificate_not_after_ms=round(d.identity.not_after.timestamp() * 1000),
            receive_buffer_bytes=d.receive_buffer(),
            sessions=len(d.sessions.peers),
            edges=len(edges),
            edges_connected=sum(one.connected for one in edges),
            edges_behind=sum(one.behind_messages > 0 for one in edges),
            readers=len(readers),
            readers_behind=sum(one.behind_messages > 0 for one in readers),
            upstreams=self.upstreams(),
            buffer=self.buffer(),
            unexplained=d.store.ledger().unexplained,
            log_drops=d.log_drops(),
        )

    def reasons(self) -> list[str]:
        """Why this node is not well, in words; empty when it is."""
        d = self._daemon
        found = []
        if d.draining:
            found.append("draining: it takes no new sessions")
        if d.store.degraded:
            found.append(f"the store cannot write: {d.store.degraded}")
        elif d.store.full:
            found.append(f"the store is full: {self._full_cause()}")
        if d.store_stalled_for() > d.STALLED_AFTER:
            found.append(f"no commit for {d.store_stalled_for():.0f} s while records wait")
        unexplained = d.store.ledger().unexplained
        if unexplained:
            found.append(f"{unexplained} messages are unexplained: see `stpctl ledger show`")
        return found

    def _full_cause(self) -> str:
        d = self._daemon
        for one in self.upstreams():
            if one.state not in ("connected", "standby") and one.behind_messages:
                return f"uplink {one.node} is {one.state}: {one.last_error or 'no answer yet'}"
        behind = max(self.readers(), key=lambda one: one.behind_bytes, default=None)
        if behind is not None and behind.behind_bytes:
            return f"reader {behind.name} is behind by {behind.behind_messages} messages"
        return "the budget is used up" if not d.store.degraded else d.store.degraded

    def sessions(self) -> list[SessionStatus]:
        return [self._session(one) for one in self._daemon.sessions.peers.values()]

    def session(self, session_id: str) -> SessionStatus:
        return self._session(self._find(session_id))

    def path(self, session_id: str) -> PathStatus:
        peer = self._find(session_id)
        d = self._daemon
        return path_status(
            peer,
            now_ms=d.wall_ms(),
            local_address=d.local_address(peer.session),
            trace_until_ms=d.tracing.until_ms(peer.session, trio.current_time()),
        )

    def trace(self, session_id: str, seconds: float) -> TraceStatus:
        peer = self._find(session_id)
        try:
            return self._daemon.tracing.begin(peer.session, seconds, trio.current_time())
        except TracingError as error:
            raise RefusedError(str(error)) from error

    def _find(self, wanted: str) -> Peer:
        found = [
            peer
            for peer in self._daemon.sessions.peers.values()
            if wanted and session_id(peer.session).startswith(wanted.lower())
        ]
        if len(found) != 1:
            why = "no session" if not found else f"{len(found)} sessions"
            raise NotFoundError(f"{why} with an id that begins with {wanted!r}")
        return found[0]

    def _session(self, peer: Peer) -> SessionStatus:
        session, hello, identity = peer.session, peer.link.peer, peer.session.peer
        numbers = session.statistics()
        return SessionStatus(
            id=session_id(session),
            node=peer.node,
            domain=identity.domain if identity is not None else "",
            role=self._daemon.role_of(peer.node) or "",
            kind=hello.kind if hello is not None else "",
            software=hello.software if hello is not None else "",
            address=address_of(session),
            carrier=session.carrier,
            dialling=session.dialling,
            state="handshake" if hello is None else "open" if peer.successor is None else "settling",
            since_ms=peer.opened_ms,
            cipher=session.suite,
            certificate_serial=f"{identity.serial:x}" if identity is not None else "",
            certificate_not_after_ms=round(identity.not_after.timestamp() * 1000) if identity else 0,
            rtt_ms=round(numbers.rtt * 1000, 3),
            congestion_window_bytes=numbers.cwnd,
            bytes_in=numbers.bytes_in,
            bytes_out=numbers.bytes_out,
            packets_in=numbers.datagrams_in,
            packets_out=numbers.datagrams_out,
            packets_lost=numbers.packets_lost,
            packet_bytes=numbers.datagram,
            black_holes=numbers.black_holes,
            messages_in=peer.door.messages_in if peer.door is not None else 0,
            messages_out=sum(feed.counts.sent_messages for feed in peer.feeds.values()),
            subscriptions=len(peer.live) + sum(feed.durable for feed in peer.feeds.values()),
            live_dropped=sum(feed.counts.skipped_slow for feed in peer.feeds.values()),
        )

    def edges(self) -> list[EdgeStatus]:
        d = self._daemon
        here = {
            peer.node: peer
            for peer in d.sessions.peers.values()
            if peer.upstream is None and peer.link.peer is not None and peer.link.peer.kind in KEEPER_KINDS
        }
        hops = {hop.peer: hop for hop in d.store.hops.values() if hop.kind == "edge"}
        names = sorted({*here, *hops, *d.sessions.edges_seen_ms, *d.known_gateways()})
        return [self._edge(name, here.get(name), hops.get(name)) for name in names]

    def _edge(self, name: str, peer: Peer | None, hop: Hop | None) -> EdgeStatus:
        d = self._daemon
        edge = EdgeStatus(node=name, role=d.role_of(name) or "", connected=peer is not None)
        edge.last_seen_ms = d.wall_ms() if peer is not None else d.sessions.edges_seen_ms.get(name, 0)
        if hop is not None:
            lanes = self.lags(hop.name)
            edge.behind_messages = sum(one.messages for one in lanes)
            edge.behind_bytes = sum(one.bytes for one in lanes)
            edge.oldest_age_s = max((one.oldest_age_s for one in lanes), default=0.0)
        if peer is not None:
            edge.address = address_of(peer.session)
        told = d.sessions.reports.get(name)
        if told is not None:
            edge.reported_ms = told.at_ms
            edge.reported_messages = told.messages
            edge.reported_bytes = told.bytes
            edge.reported_oldest_age_s = told.oldest_age_s
            edge.reported_cause = told.cause
        return edge

    def lags(self, hop: str) -> list[LaneLag]:
        lags = []
        for lane in LANES:
            behind = self._daemon.store.behind(hop, lane)
            lags.append(
                LaneLag(
                    lane=lane,
                    messages=behind.messages,
                    bytes=behind.bytes,
                    oldest_age_s=round(behind.oldest_age, 1),
                )
            )
        return lags

    def upstreams(self) -> list[UpstreamStatus]:
        uplink = self._daemon.uplink
        return uplink.statuses() if uplink is not None else []

    def readers(self) -> list[ReaderStatus]:
        d = self._daemon
        served = {
            feed.name for peer in d.sessions.peers.values() for feed in peer.feeds.values() if feed.durable
        }
        found = []
        for hop in d.store.hops.values():
            if hop.kind != "reader":
                continue
            lanes = self.lags(hop.name)
            found.append(
                ReaderStatus(
                    name=hop.name,
                    node=hop.peer,
                    connected=hop.name in served,
                    filters=list(hop.filters),
                    created_ms=hop.created_ms,
                    behind_messages=sum(one.messages for one in lanes),
                    behind_bytes=sum(one.bytes for one in lanes),
                    oldest_age_s=max((one.oldest_age_s for one in lanes), default=0.0),
                    max_lag_s=hop.max_lag_s,
                    lanes=lanes,
                )
            )
        return sorted(found, key=lambda one: one.name)

    def buffer(self) -> BufferStatus:
        d = self._daemon
        usage, numbers = d.store.usage(), d.store.statistics()
        aside = d.store.quarantined()
        mean_ms = 1000 * numbers.commit_seconds / max(1, numbers.commits)
        return BufferStatus(
            path=str(d.config.store.path),
            used_bytes=usage.used,
            budget_bytes=usage.budget,
            reserve_bytes=max(0, usage.budget - usage.limit),
            disk_free_bytes=shutil.disk_usage(os.path.dirname(str(d.config.store.path)) or ".").free,
            full=d.store.full,
            full_since_ms=d.full_since_ms,
            full_cause=self._full_cause() if d.store.full else "",
            oldest_age_s=round(max((one.oldest_age for one in usage.lanes.values()), default=0.0), 1),
            queue_depth=numbers.queue_records,
            queue_limit=QUEUE_RECORDS,
            commits=numbers.commits,
            commit_mean_ms=round(mean_ms, 3),
            commit_max_ms=round(1000 * numbers.commit_seconds_max, 3),
            lanes=[
                BufferLane(
                    lane=lane,
                    first=one.first,
                    last=one.last,
                    messages=one.messages,
                    bytes=one.bytes,
                    oldest_age_s=round(one.oldest_age, 1),
                )
                for lane, one in sorted(usage.lanes.items())
            ],
            quarantined=[
                QuarantinedRecord(
                    lane=one.lane,
                    pos=one.pos,
                    reason=one.reason,
                    peer=one.peer,
                    messages=one.messages,
                    at_ms=one.at_ms,
                )
                for one in aside[-QUARANTINE_SHOWN:]
            ],
            quarantined_records=len(aside),
        )

    def ledger(self) -> LedgerStatus:
        found = self._daemon.store.ledger()
        kinds = {hop.name: hop.kind for hop in self._daemon.store.hops.values()}
        return LedgerStatus(
            unexplained=found.unexplained,
            doors=[_as(DoorCounts, one) for one in found.doors],
            nodes=[_as(NodeCounts, one) for one in found.nodes],
            hops=[_as(HopCounts, one, kind=kinds.get(one.hop, "")) for one in found.hops],
            explain=found.explain(),
        )

    # -- changes

    def kick(self, session_id: str) -> None:
        peer = self._find(session_id)
        peer.link.close(ErrorCode.NO_ERROR, "closed by an operator", trio.current_time())
        self._daemon.turns.wake()

    def remove_reader(self, name: str) -> None:
        try:
            self._daemon.sessions.remove_reader(name, "an operator removed it")
        except KeyError as error:
            raise NotFoundError(f"no reader is called {name!r}; `stpctl readers list` names them") from error

    async def keys_create(self, role: str, uses: int, ttl_s: float, tags: list[str]) -> NewKey:
        tokens = self._tokens()
        try:
            key = await trio.to_thread.run_sync(tokens.create, role, uses, ttl_s, tags)
        except ValueError as error:
            raise RefusedError(str(error)) from error
        self._daemon.events.publish("key.created", f"enrolment key {key.id} for a {role}", key=key.id)
        return key

    def keys_list(self) -> list[KeyStatus]:
        tokens = self._daemon.tokens
        return tokens.list() if tokens is not None else []

    async def keys_revoke(self, key_id: str) -> None:
        if not await trio.to_thread.run_sync(self._tokens().revoke, key_id):
            raise NotFoundError(f"no enrolment key is called {key_id!r}; `stpctl keys list` names them")
        self._daemon.events.publish("key.revoked", f"enrolment key {key_id} was revoked", key=key_id)

    def nodes(self) -> list[NodeStatus]:
        d = self._daemon
        here = {peer.node for peer in d.sessions.peers.values() if peer.link.peer is not None}
        return [
            NodeStatus(
                node=one.node,
                role=one.role,
                enrolled_ms=round(one.enrolled_at * 1000),
                renewed_ms=round(one.renewed_at * 1000),
                not_after_ms=round(max(one.serials.values(), default=0) * 1000),
                connected=one.node in here,
                revoked=one.revoked,
                reason=one.reason,
                tags=list(one.tags),
            )
            for one in sorted(d.registry.nodes(), key=lambda one: one.node)
        ]

    async def node_revoke(self, node: str, reason: str) -> Revocation:
        self._tokens()  # a gateway learns from the hub whom to keep out
        found = await self._end_certificates(node, partial(self._daemon.registry.revoke, node, reason))
        text = f"{node} was revoked{f': {reason}' if reason else ''}"
        self._daemon.events.publish("node.revoked", text, node=node)
        return found

    async def node_forget(self, node: str) -> Revocation:
        self._tokens()
        found = await self._end_certificates(node, partial(self._daemon.registry.forget, node))
        self._daemon.events.publish("node.forgotten", f"{node} was forgotten: its name is free", node=node)
        return found

    async def _end_certificates(self, node: str, end: Callable[[], list[int]]) -> Revocation:
        d = self._daemon
        if d.registry.get(node) is None:
            raise NotFoundError(f"no node is called {node!r}; `stpctl nodes list` names them")
        serials = await trio.to_thread.run_sync(end)
        before = d.lifetimes.revoked
        d.end_sessions()
        return Revocation(
            node=node, serials=[f"{one:x}" for one in serials], sessions=d.lifetimes.revoked - before
        )

    def _tokens(self) -> JoinTokens:
        tokens = self._daemon.tokens
        if tokens is None:
            raise RefusedError("this node has no CA: do this at the hub that has it")
        return tokens

    async def reload(self) -> ReloadReport:
        return await self._daemon.reload()

    def drain(self) -> None:
        self._daemon.begin_drain()

    def events(self) -> EventWatcher:
        return self._daemon.events.watch()


def _as(shape: type[T], counted: object, **more: Any) -> T:
    """A row of the ledger in the shape of the API: the fields that both have, and what else is given."""
    names = {one.name for one in attrs.fields(cast(Any, shape))} - more.keys()
    return shape(**{name: getattr(counted, name) for name in names if hasattr(counted, name)}, **more)
