"""Sessions: what a peer's link says is turned into doors, feeds and log lines.

(1) A session is nothing to the relay before its HELLO, whose names are those of its certificate.
(2) A newer session of the same source, or of the same keeper, replaces the older one (protocol §9), or continues it
    where its HELLO says so: then nothing ends, and no loss is told (stpd/moving.py).
(3) A durable name is served to one session at a time: the newest.
(4) The end of a session costs nobody else anything; what was on its way is sent again to its successor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Final

import structlog
import trio

from stp.batch import node_id
from stp.control import Goaway, Hello, Subscribe, Subscribed
from stp.core.errors import ErrorCode, LocalCause
from stp.core.events import DatagramReceived
from stp.core.verbs import AnySession
from stp.echo import Responder
from stp.link import (
    DrainCreditReceived,
    GoawayReceived,
    HelloReceived,
    Link,
    LinkClosed,
    LinkEvent,
    MovedReceived,
    ReceiptReceived,
    RecordReceived,
    RecordRejected,
    RefusedReceived,
    RevokedReceived,
    SourceIntroduced,
    StatusReceived,
    SubscribedReceived,
    SubscribeReceived,
    UnsubscribeReceived,
    Writable,
)
from stp.topics import FilterSet, TopicError, check_filter
from stpd import moving
from stpd.access import Access
from stpd.events import EventBus
from stpd.hops import PUMP_BYTES, Feed
from stpd.limits import PeerLimit
from stpd.peers import (
    KEEPER_KINDS,
    Peer,
    Report,
    SessionsStatistics,
    UpstreamOwner,
    address_of,
    read_report,
    session_id,
)
from stpd.relay import Door, Relay
from stpd.router import LANES
from stpd.store.base import Hop, Store, StoreError
from stpd.throttle import Throttle

log = structlog.get_logger("stpd.sessions")

CHECK_INTERVAL: Final = 1.0
"""Seconds between two looks at the links' deadlines."""

READ_RETRY: Final = 1.0
"""Seconds before a failed read from disk is tried again."""


class Sessions:
    """All links of the daemon, whoever dialled."""

    def __init__(
        self,
        relay: Relay,
        store: Store,
        *,
        domain: str,
        access: Callable[[], Access],
        hello: Callable[[], Hello],
        name_of_source: Callable[[bytes], str | None],
        events: EventBus,
        spawn: Callable[..., object],
        later: Callable[[float, Callable[[], None]], object],
        wall_ms: Callable[[], int],
        now: Callable[[], float] = trio.current_time,
        max_subscriptions: int,
        ttl_of: Callable[[int, str], float],
        limit_of: Callable[[str], PeerLimit | None] = lambda node: None,
        responder: Callable[[], Responder | None] = lambda: None,
    ) -> None:
        """*spawn(function, *args)* runs an async function beside the rest, *later(seconds, function)* calls one
        once; the daemon gives its nursery, a simulation its own.
        """
        self.peers: dict[int, Peer] = {}
        self.edges_seen_ms: dict[str, int] = {}
        self.reports: dict[str, Report] = {}
        """What each edge last said of its own backlog."""
        self.stats = SessionsStatistics()
        self._newest: dict[object, Peer] = {}
        """By source, and keepers by (node, kind) too."""
        self._relay = relay
        self._store = store
        self._domain = domain
        self._node_id = node_id(domain, hello().node)
        self._access = access
        self._hello = hello
        self._name_of_source = name_of_source
        self._events = events
        self._throttle = Throttle()
        self._spawn = spawn
        self._later = later
        self._now = now
        self._wall_ms = wall_ms
        self._max_subscriptions = max_subscriptions
        self._ttl_of = ttl_of
        self._limit_of = limit_of
        self._responder = responder

    # -- from the carriers

    def on_ready(self, session: AnySession) -> None:
        """A session has something for us: hear it all, answer, tell receipts."""
        link = session.app
        if link is None:
            link = self.adopt(session).link
        self._handle(link.app, link.process(self._now()))
        self._relay.flush()

    def adopt(
        self, session: AnySession, upstream: UpstreamOwner | None = None, continues: Peer | None = None
    ) -> Peer:
        """Make the link of a new session. *upstream* is told what concerns an uplink; *continues*: the session
        of ours that this one was dialled beside, to take over from it.
        """
        hello = self._hello()
        if continues is not None:
            hello.continues = continues.session.id or b""
        link = Link(
            session,
            hello,
            wall_ms=self._wall_ms,
            name_of_source=self._name_of_source,
            may_speak_for=partial(self._may_speak_for, session, upstream is not None),
        )
        peer = Peer(link, self._wall_ms(), upstream, older=continues)
        peer.responder = self._responder() if upstream is None else None
        link.app = peer
        session.app = link
        self.peers[id(session)] = peer
        return peer

    def check(self) -> None:
        """Deadlines of all links; call it every CHECK_INTERVAL."""
        now = self._now()
        for peer in list(self.peers.values()):
            found = peer.link.check(now)
            if found:
                self._handle(peer, found)
            for feed in list(peer.feeds.values()):
                feed.pump_all()  # costs little when level; whatever wake-up was missed, a second is its price
            if peer.successor is not None:
                moving.settle(peer, now)
        for name in self._store.lagging():
            self.remove_reader(name, "it was further behind than its max_lag")
        self._relay.flush()

    def _may_speak_for(self, session: AnySession, upstream: bool, node: str) -> bool:
        if upstream:
            return True  # what comes from above comes from anywhere
        peer = session.peer
        return peer is not None and self._access().grant(peer.node).may_speak_for(node)

    # -- events

    def _handle(self, peer: Peer, found: Iterable[LinkEvent]) -> None:
        for event in found:
            match event:
                case RecordReceived():
                    if peer.door is not None:
                        wait = self._relay.accept(peer.door, event, self._now())
                        if wait:
                            self._later(wait, partial(self._resume, peer.door))
                case ReceiptReceived(lane=lane, custody=custody):
                    for feed in peer.feeds.values():
                        feed.on_receipt(peer.link, lane, custody)
                    if peer.successor is not None:
                        moving.on_receipt(peer, lane, custody)
                case Writable(lane=lane):
                    for feed in peer.feeds.values():
                        feed.pump(lane)
                case RecordRejected():
                    if peer.door is not None:
                        self._relay.rejected(peer.door, event)
                case RefusedReceived():
                    self._on_refused(peer, event)
                case DatagramReceived(data=data):
                    peer.on_datagram(data, self._now())
                case _:
                    self._on_rare(peer, event)
        if peer.successor is not None:
            moving.settle(peer, self._now())

    def _on_rare(self, peer: Peer, event: LinkEvent) -> None:
        match event:
            case HelloReceived(hello=hello):
                self._on_hello(peer, hello)
            case SourceIntroduced(source=source, node=node):
                if not self._store.note_source(source, node):
                    log.warning("source_conflict", peer=peer.node, source=source.hex(), claimed_for=node)
            case SubscribeReceived(subscribe=subscribe):
                self._on_subscribe(peer, subscribe)
            case UnsubscribeReceived(id=sub_id):
                self._on_unsubscribe(peer, sub_id)
            case SubscribedReceived(subscribed=answer):
                if peer.upstream is not None:
                    peer.upstream.on_subscribed(answer)
            case StatusReceived(status=status):
                self.reports[peer.node] = read_report(status.fields, self._wall_ms())
            case GoawayReceived(goaway=goaway):
                if peer.upstream is not None:
                    peer.upstream.on_goaway(peer, goaway)
            case MovedReceived():
                peer.heard_moved = True
            case RevokedReceived(serials=serials):
                if peer.upstream is not None:  # nobody below says who may come in
                    peer.upstream.on_revoked(serials)
            case LinkClosed():
                self._on_closed(peer, event)
            case DrainCreditReceived():
                pass  # backlog leaves as fast as credit allows

    def _on_hello(self, peer: Peer, hello: Hello) -> None:
        pair = moving.pair_of(peer, hello, self._newest.get(hello.store))
        peer.older = pair[0] if pair is not None and pair[1] is peer else None
        if pair is None or pair[1] is peer:
            self._replace_older(peer, hello)
        grant = None if peer.upstream is not None else self._access().grant(hello.node)
        limit = None if peer.upstream is not None else self._limit_of(hello.node)
        peer.door = Door(peer.link, hello.node, grant, peer.upstream is not None, limit)
        if pair is not None:
            self._begin_move(*pair)
            return
        self.stats.opened += 1
        log.info(
            "session_open",
            node=hello.node,
            kind=hello.kind,
            software=hello.software,
            address=address_of(peer.session),
            session=session_id(peer.session),
        )
        text = f"{hello.node} ({hello.kind}) connected from {address_of(peer.session)}"
        self._events.publish("session.open", text, node=hello.node, session=session_id(peer.session))
        if hello.kind in KEEPER_KINDS and peer.upstream is None:
            self.edges_seen_ms[hello.node] = self._wall_ms()
        if peer.upstream is not None:
            peer.upstream.on_hello(peer)

    def _begin_move(self, older: Peer, peer: Peer) -> None:
        """A session beside the one before: the same peer, not a new one."""
        self.stats.moved += 1
        moving.begin(older, peer, self._now())
        log.info(
            "session_moves", node=peer.node, session=session_id(peer.session), was=session_id(older.session)
        )
        text = f"{peer.node} moves to a fresh session from {address_of(peer.session)}"
        self._events.publish("session.moved", text, node=peer.node, session=session_id(peer.session))
        if peer.upstream is not None:
            moving.take_all(peer)
            peer.upstream.on_hello(peer)
        moving.settle(older, self._now())

    def _replace_older(self, peer: Peer, hello: Hello) -> None:
        """Promise (2, R-9-7)."""
        names: list[object] = [hello.store]
        if hello.kind in KEEPER_KINDS:
            names.append((hello.node, hello.kind))
        for name in names:
            other = self._newest.get(name)
            if other is not None and other.node != hello.node:
                continue  # another node's source: the link refuses what comes under it
            self._newest[name] = peer
            if other is None or other is peer or other is peer.older:
                continue
            if other.link.closed is None:
                self.stats.replaced += 1
                other.link.close(ErrorCode.REPLACED, f"a newer session of {hello.node} is here", self._now())

    def _on_refused(self, peer: Peer, event: RefusedReceived) -> None:
        for feed in (*peer.feeds.values(), *peer.leaving):
            feed.on_refused(
                peer.link, event.lane, event.place, event.code, event.retry_after_ms / 1000, event.reason
            )
        silent = self._throttle.passes((peer.node, event.lane, event.code), self._now())
        if silent is not None:
            log.warning(
                "refused_by_peer",
                peer=peer.node,
                lane=event.lane,
                code=event.code,
                reason=event.reason,
                more=silent,
            )

    def _on_closed(self, peer: Peer, closed: LinkClosed) -> None:
        self.peers.pop(id(peer.session), None)
        hello = peer.link.peer
        if hello is not None:
            for name in (hello.store, (hello.node, hello.kind)):
                if self._newest.get(name) is peer:
                    del self._newest[name]
        for feed in peer.feeds.values():
            self._relay.detach(feed)
        peer.feeds.clear()
        if peer.successor is not None:
            moving.over(peer)
            log.info(
                "session_settled", node=peer.node, session=session_id(peer.session), reason=closed.reason
            )
            self._tell_upstream(peer, closed)
            return
        if peer.older is not None and peer.older.successor is peer and peer.older.link.closed is None:
            peer.older.link.close(ErrorCode.REPLACED, "its successor has ended", self._now())
        if peer.link.peer is not None:
            self.stats.closed += 1
            if peer.link.peer.kind in KEEPER_KINDS and peer.upstream is None:
                self.edges_seen_ms[peer.link.peer.node] = self._wall_ms()
        code = closed.code.name if isinstance(closed.code, ErrorCode) else str(closed.code)
        calm = closed.code in (ErrorCode.NO_ERROR, ErrorCode.REPLACED, ErrorCode.RESTARTING)
        say = log.info if calm or isinstance(closed.code, LocalCause) else log.warning
        if hello is None and calm:
            say = log.debug  # a program of this machine that asked for its name
        say("session_closed", node=peer.node, code=code, reason=closed.reason, by_peer=closed.by_peer)
        self._events.publish(
            "session.closed",
            f"{peer.node or 'a peer'} is gone: {code.lower()} {closed.reason}".strip(),
            node=peer.node,
            session=session_id(peer.session),
        )
        self._tell_upstream(peer, closed)

    @staticmethod
    def _tell_upstream(peer: Peer, closed: LinkClosed) -> None:
        if peer.upstream is not None:
            peer.upstream.on_closed(peer, closed)

    # -- subscriptions

    def _on_subscribe(self, peer: Peer, wanted: Subscribe) -> None:
        if peer.successor is not None:
            return  # said again on the session that continues this one, and answered there
        error = self._subscribe(peer, wanted)
        if error is not None:
            self.stats.subscriptions_refused += 1
            log.warning("subscribe_refused", peer=peer.node, filters=list(wanted.filters), reason=error)
            peer.link.send(Subscribed(wanted.id, ok=False, error=error))

    def _subscribe(self, peer: Peer, wanted: Subscribe) -> str | None:
        """Serve it, or say why not."""
        if peer.door is None:
            return "HELLO first"
        if len(peer.feeds) + len(peer.live) >= self._max_subscriptions:
            return f"more than {self._max_subscriptions} subscriptions in one session"
        if not wanted.filters:
            return "a subscription needs at least one filter"
        try:
            for one in wanted.filters:
                check_filter(one)
        except TopicError as error:
            return str(error)
        if peer.door.grant is not None:
            reason = peer.door.grant.refusal_to_subscribe(wanted.filters)
            if reason is not None:
                return reason
        if wanted.group is not None:
            return "groups are not served by this version"
        if isinstance(wanted.start, int):
            self._spawn(self._subscribe_from, peer, wanted, wanted.start)
        elif wanted.name is None:
            self._subscribe_live(peer, wanted)
        else:
            self._subscribe_durable(peer, wanted, self._starts(wanted))
        return None

    async def _subscribe_from(self, peer: Peer, wanted: Subscribe, at_ms: int) -> None:
        """Start at a wall-clock time: the store must be asked first."""
        starts = {lane: await self._store.find(lane, at_ms) for lane in LANES}
        if peer.link.closed is not None:
            return
        if wanted.name is None:
            self._subscribe_live(peer, wanted, starts)
        else:
            self._subscribe_durable(peer, wanted, starts)

    def _starts(self, wanted: Subscribe) -> dict[int, int]:
        if wanted.start == "earliest":
            return {lane: self._store.first(lane) for lane in LANES}
        return {lane: self._store.last(lane) + 1 for lane in LANES}

    def _subscribe_live(self, peer: Peer, wanted: Subscribe, starts: dict[int, int] | None = None) -> None:
        """All live subscriptions of a session are one feed: a message that two of them match goes out once."""
        moving.take_live(peer)
        if starts is None:
            starts = self._starts(wanted)
        peer.live[wanted.id] = wanted
        filters = FilterSet([one for sub in peer.live.values() for one in sub.filters])
        feed = peer.feeds.get("")
        if feed is not None:
            feed.refilter(filters)
            peer.link.send(Subscribed(wanted.id))
            return
        history = wanted.start != "now"
        feed = self._feed(peer, f"live/{peer.node}", starts, filters, durable=False, history=history)
        peer.feeds[""] = feed
        peer.link.send(Subscribed(wanted.id))
        self._relay.attach(feed, LANES)

    def _subscribe_durable(self, peer: Peer, wanted: Subscribe, starts: dict[int, int]) -> None:
        assert peer.link.peer is not None
        name = f"{peer.node}/{wanted.name}"
        if moving.take_durable(peer, wanted.id, name, FilterSet(wanted.filters)):
            peer.link.send(Subscribed(wanted.id))
            return
        self._detach_elsewhere(name, heir=peer)
        keeper = peer.link.peer.kind in KEEPER_KINDS
        self._store.add_hop(
            Hop(
                name=name,
                kind="edge" if keeper else "reader",
                peer=peer.node,
                filters=tuple(wanted.filters),
                lanes=LANES,
                cursors={lane: pos - 1 for lane, pos in starts.items()},
                created_ms=self._wall_ms(),
                max_lag_s=wanted.max_lag or 0.0,
            )
        )
        cursors = self._store.hops[name].cursors
        at = {lane: cursors.get(lane, starts[lane] - 1) + 1 for lane in LANES}
        feed = self._feed(peer, name, at, FilterSet(wanted.filters), durable=True, keeper=keeper)
        peer.feeds[wanted.id] = feed
        peer.link.send(Subscribed(wanted.id))
        self._relay.attach(feed, LANES)

    def _detach_elsewhere(self, name: str, heir: Peer | None = None) -> None:
        """Promise (3, R-10-40)."""
        for other in list(self.peers.values()):
            for sub_id, feed in list(other.feeds.items()):
                if feed.name == name and feed.durable:
                    self._relay.detach(feed)
                    del other.feeds[sub_id]
                    if other.link.closed is None and (heir is None or other not in moving.before(heir)):
                        reason = f"durable name {name} is read by a newer session"
                        other.link.send(Subscribed(sub_id, ok=False, error=reason))

    def _on_unsubscribe(self, peer: Peer, sub_id: str) -> None:
        if peer.successor is not None and sub_id not in peer.live and sub_id not in peer.feeds:
            peer = peer.successor  # said on the session before, of what goes on on this one
        if peer.live.pop(sub_id, None) is not None:
            feed = peer.feeds[""]
            if peer.live:
                feed.refilter(FilterSet([one for sub in peer.live.values() for one in sub.filters]))
            else:
                self._relay.detach(feed)
                del peer.feeds[""]
            return
        durable = peer.feeds.pop(sub_id, None)
        if durable is not None:  # the cursor stays: `stpctl readers remove` forgets it
            self._relay.detach(durable)

    def remove_reader(self, name: str, why: str) -> None:
        """Forget a durable name and what waits for it. KeyError when there is none."""
        hop = self._store.hops[name]
        if hop.kind == "uplink":
            raise KeyError(name)
        self._detach_elsewhere(name)
        self._store.remove_hop(name)
        log.warning("reader_removed", reader=name, why=why)
        self._events.publish("reader.removed", f"reader {name} was removed: {why}", node=hop.peer)

    # -- feeds

    def _feed(
        self,
        peer: Peer,
        name: str,
        starts: dict[int, int],
        filters: FilterSet | None,
        *,
        durable: bool,
        keeper: bool = False,
        history: bool = False,
        takes: Callable[[int, str], bool] | None = None,
        on_custody: Callable[[int, int], None] | None = None,
    ) -> Feed:
        return Feed(
            name,
            peer.link,
            self._store,
            node_id=self._node_id,
            peer_id=node_id(self._domain, peer.node),
            lanes=starts,
            filters=filters,
            reads=None if keeper or takes else lambda: self._access().grant(peer.node).reads,
            durable=durable,
            history=history,
            keeper=keeper,
            takes=takes or (lambda lane, prefix: True),
            ttl_of=self._ttl_of,
            fetch=lambda feed, lane, pos: self._spawn(self._fetch, feed, lane, pos),
            retry=lambda feed, lane, delay: self._later(delay, partial(self._retry, feed, lane)),
            on_custody=on_custody,
            now=self._now,
        )

    def attach_uplink(
        self,
        peer: Peer,
        name: str,
        *,
        takes: Callable[[int, str], bool],
        on_custody: Callable[[int, int], None],
    ) -> Feed:
        """The custody route's feed on *peer*'s link, from its cursors on. The hop must be in the store."""
        cursors = self._store.hops[name].cursors
        starts = {lane: cursors.get(lane, 0) + 1 for lane in LANES}
        feed = self._feed(
            peer, name, starts, None, durable=True, keeper=True, takes=takes, on_custody=on_custody
        )
        peer.feeds[name] = feed
        self._relay.attach(feed, LANES)
        return feed

    async def _fetch(self, feed: Feed, lane: int, pos: int) -> None:
        """Read a stretch of the log from disk for a feed that is behind."""
        epoch = feed.epoch(lane)
        while not feed.closed:
            try:
                items = await self._store.read(lane, pos, PUMP_BYTES)
                break
            except StoreError as error:
                self.stats.read_failures += 1
                log.error("store_read_failed", lane=lane, pos=pos, reason=str(error))
                await trio.sleep(READ_RETRY)
        else:
            return
        feed.give(lane, epoch, items)
        self._relay.flush()

    def _retry(self, feed: Feed, lane: int) -> None:
        feed.pump(lane)
        self._relay.flush()

    def _resume(self, door: Door) -> None:
        """A peer beyond its limit: take what waited long enough."""
        if door.link.closed is not None:
            door.waiting.clear()
            return
        wait = self._relay.resume(door, self._now())
        if wait:
            self._later(wait, partial(self._resume, door))
        self._relay.flush()

    # -- for the daemon

    def refresh_grants(self) -> None:
        """The rules changed: every door asks the new ones from now on; subscriptions no longer allowed end."""
        for peer in list(self.peers.values()):
            door = peer.door
            if door is None or door.upstream:
                continue
            door.grant = self._access().grant(door.node)
            for sub_id, sub in list(peer.live.items()):
                reason = door.grant.refusal_to_subscribe(sub.filters)
                if reason is not None:
                    self._on_unsubscribe(peer, sub_id)
                    peer.link.send(Subscribed(sub_id, ok=False, error=reason))
            for sub_id, feed in list(peer.feeds.items()):
                hop = self._store.hops.get(feed.name) if feed.durable else None
                reason = door.grant.refusal_to_subscribe(hop.filters) if hop is not None else None
                if reason is not None:
                    self._on_unsubscribe(peer, sub_id)
                    peer.link.send(Subscribed(sub_id, ok=False, error=reason))

    def say_goodbye(self, reason: str) -> None:
        """GOAWAY to everybody: the next records go elsewhere, or come back to our successor."""
        for peer in self.peers.values():
            if peer.link.closed is None and peer.link.connected:
                peer.link.send(Goaway(reason=reason))

    def close_all(self, code: ErrorCode, reason: str) -> None:
        for peer in list(self.peers.values()):
            peer.link.close(code, reason, self._now())
