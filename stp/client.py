"""The front door for devices and programs: publish, subscribe, request (docs/client.md).

    async with stp.connect("stp://gw.local:9000", identity="~/.config/stp/device.pem") as session:
        await session.publish("site-a/kitchen/temp", b"21.5", receipt="custody")
        async for message in session.subscribe("site-a/#"):
            ...

(1) What `publish` took leaves in order, survives reconnects, and is told to whoever asked for a receipt: *kept*, in
    *custody*, or `Refused` with the code and the keeper's reason.
(2) Memory is bounded: a caller waits when what is not kept yet fills its lane's share.
(3) A durable subscription, or one that starts in the past, has a session of its own, and its application sees each
    message once within the process.
(4) Whoever waits longer than WARN_AFTER can read in the log what for; `state` says it at any time.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from datetime import datetime
from typing import Final, Literal

import trio
from attrs import evolve

from stp.batch import Properties, node_id
from stp.control import Hello, Subscribe, Unsubscribe
from stp.core.errors import MessageError, UsageError
from stp.core.events import DatagramReceived
from stp.dialler import Dialler
from stp.echo import LoadReport
from stp.enrol import IdentitySource
from stp.identity import Identity, parse_url
from stp.lifetimes import REHANDSHAKE
from stp.lines import Owner
from stp.link import (
    Link,
    LinkEvent,
    ReceiptReceived,
    RecordReceived,
    RefusedReceived,
    SubscribedReceived,
    Writable,
)
from stp.local import identity_for
from stp.outbox import Refused, Ticket
from stp.pings import Pings
from stp.publisher import MEMORY, Publisher
from stp.reader import Reader
from stp.requests import REQUEST_TIMEOUT, Requests
from stp.statistics import ClientStatistics, Ping
from stp.subscriber import Inbox, Message, ReceiptLevel, Subscription, start_of

log: Final = logging.getLogger("stp.client")

CONNECT_TIMEOUT: Final = 10.0
"""Seconds until `connect` gives up its first attempts."""
CLOSE_TIMEOUT: Final = 5.0
"""Seconds that leaving `async with` waits until what was published is kept."""
PING_TIMEOUT: Final = 5.0
WARN_AFTER: Final = 5.0
"""Seconds of waiting before the log says what for; then every WARN_EVERY."""
WARN_EVERY: Final = 60.0
CHECKPOINT_EVERY: Final = 32
"""Messages published without letting other tasks run."""
REFUSED_LOG_INTERVAL: Final = 1.0
"""Seconds between log lines about refused messages that nobody awaits; the count says how many there were."""


@contextlib.asynccontextmanager
async def connect(
    url: str = "",
    *,
    identity: IdentitySource | None = None,
    node: str = "",
    network_key: bytes | None = None,
    connect_timeout: float = CONNECT_TIMEOUT,
    close_timeout: float = CLOSE_TIMEOUT,
    memory: int = MEMORY,
    compress: bool = False,
    on_refused: Callable[[Refused], None] | None = None,
    kind: str = "client",
    rehandshake: float = REHANDSHAKE,
    qlog: str | os.PathLike[str] | None = None,
) -> AsyncIterator[Client]:
    """A session to the keeper at `stp://[node@]host[:port]`, kept up until the block is left.

    `url` "" means the upstream that enrolment wrote into the identity, "stp+unix:///run/stpd/stp.sock" this machine's
    daemon, which needs no identity to know us. `identity` is a bundle's path, or several files, or a loaded Identity;
    by default STP_IDENTITY or `~/.config/stp/device.pem`. `node` is the name that the peer's certificate must carry,
    where neither the URL nor the identity says it. `network_key` (32 bytes) replaces the identity's. `memory`: bytes
    of messages that may wait to be kept. `on_refused` hears of every message that was refused for good, awaited or
    not. `rehandshake`: seconds, ± 10 %, after which a fresh session takes over from the present one. `qlog`: a
    directory for event logs that qlog viewers draw; by default STP_QLOG, else none.

    Raises IdentityError, Unreachable after `connect_timeout` seconds (math.inf: never), Rejected at once when
    either side refuses the other's certificate. Leaving the block waits up to `close_timeout` until everything is
    kept, and says in the log if it was not.
    """
    loaded, node = await identity_for(url, identity, node, connect_timeout)
    client = Client(
        url,
        loaded,
        node,
        network_key,
        memory=memory,
        compress=compress,
        on_refused=on_refused,
        kind=kind,
        rehandshake=rehandshake,
        qlog=qlog,
    )
    failure: Exception | KeyboardInterrupt | None = None
    async with trio.open_nursery() as nursery:
        client.start(nursery)
        try:
            await client.wait_connected(connect_timeout)
            yield client
            await client.drain(close_timeout)
        except (
            Exception,
            KeyboardInterrupt,
        ) as error:  # raised as it is below, not as a member of the nursery's group
            failure = error
        with trio.CancelScope(shield=True):
            await client.aclose()
        nursery.cancel_scope.cancel()
    if failure is not None:
        raise failure


class Client:
    """What `connect` gives. All methods belong to the trio thread that made it."""

    def __init__(
        self,
        url: str,
        identity: Identity,
        node: str,
        network_key: bytes | None,
        *,
        memory: int,
        compress: bool,
        on_refused: Callable[[Refused], None] | None,
        kind: str,
        rehandshake: float = REHANDSHAKE,
        qlog: str | os.PathLike[str] | None = None,
    ) -> None:
        upstream = identity.upstream
        target = parse_url(url or (upstream.url if upstream is not None else ""), upstream)
        self.identity, self._hook = identity, on_refused
        self._target = evolve(target, node=node) if node else target
        self._dialler = Dialler(
            self._target,
            identity,
            network_key,
            kind=kind,
            run=time.time_ns() // 1_000_000,
            rehandshake=rehandshake,
            qlog=qlog,
        )
        source = os.urandom(16)  # R-10-34
        self._publisher = Publisher(
            source=source,
            publisher=node_id(identity.domain, identity.node),
            run=self._dialler.run,
            on_refused=self._on_refused,
            memory=memory,
            compress=compress,
        )
        self._inbox = Inbox(self, lambda: self._connection.wake())
        self._connection = self._dialler.connection(
            source,
            Owner(
                up=self._on_up,
                event=self._on_event,
                down=self._on_down,
                idle=self._on_idle,
                move=self._on_move,
                settled=lambda link: not self._publisher.on(link),
                left=self._on_left,
            ),
        )
        self._nursery: trio.Nursery | None = None
        self._timer = trio.CancelScope()
        self._room = {lane: trio.lowlevel.ParkingLot() for lane in (1, 2, 3, 4)}
        self._settled = trio.lowlevel.ParkingLot()
        self._published = 0
        self._ids = itertools.count(1)
        self._readers: dict[str, Reader] = {}
        self._requests = Requests(self, identity.node)
        self._pings = Pings(self._connection, identity.node)
        self._refused_messages, self._refused_logged = 0, -REFUSED_LOG_INTERVAL

    # -- starting and ending -----------------------------------------------------------------------------

    def start(self, nursery: trio.Nursery) -> None:
        """For `connect`: run in this nursery until it is cancelled."""
        self._nursery = nursery
        nursery.start_soon(self._connection.run)
        nursery.start_soon(self._timer_loop)

    async def wait_connected(self, seconds: float) -> None:
        """Until the first session is up. Raises Unreachable, Rejected."""
        await self._connection.wait_first(seconds)

    async def drain(self, seconds: float) -> bool:
        """Wait until everything published is kept or refused; False, and a warning, if it takes longer."""
        self._publisher.flush(trio.current_time())
        self._queued()
        with trio.move_on_after(seconds):
            while self._publisher.unfinished:
                await self._settled.park()
        unfinished = self._publisher.unfinished
        if unfinished:
            log.warning("closed with %d messages not kept: %s", unfinished, self.state)
        return not unfinished

    async def aclose(self) -> None:
        """Say goodbye. For `connect`; leaving its block calls it."""
        for subscription in [*self._inbox.subscriptions.values()]:
            await subscription.aclose()
        for reader in [*self._readers.values()]:
            await reader.aclose()
        await self._connection.aclose()
        self._dialler.close()

    # -- publishing --------------------------------------------------------------------------------------

    async def publish(
        self,
        topic: str,
        payload: bytes,
        *,
        receipt: ReceiptLevel = None,
        ttl: float = 0.0,
        properties: Properties | None = None,
        tombstone: bool = False,
    ) -> None:
        """Send one message.

        `receipt` None returns when it is queued, "kept" when the keeper has it on disk, "custody" when the keeper
        at the top has it. `ttl`: seconds after which nobody wants it any longer, 0 for none.

        Raises MessageTooLarge and TopicError before anything is sent; Refused when the keeper will not take it, to
        a caller that awaits a receipt. A caller that is cancelled leaves the message queued.
        """
        lane = self._publisher.lane_of(topic)
        if self._crowded(lane, len(topic) + len(payload)):
            await self._make_room(lane, len(topic) + len(payload))
        ticket, done = self._ticket(receipt)
        self._publisher.add(
            topic,
            payload,
            now=trio.current_time(),
            time_ms=time.time_ns() // 1_000_000,
            ttl_ms=round(ttl * 1000),
            properties=properties,
            tombstone=tombstone,
            ticket=ticket,
        )
        self._queued()
        if ticket is not None:
            await self._settle(ticket, done, lane)

    async def publish_many(
        self, messages: Iterable[tuple[str, bytes]], *, receipt: ReceiptLevel = None, ttl: float = 0.0
    ) -> int:
        """Send (topic, payload) pairs in order, batched; returns how many.

        With a receipt: when all of them have it. Raises as `publish`; after Refused the others have theirs.
        """
        ticket, done = self._ticket(receipt)
        if ticket is not None:
            ticket.add()  # so that it is not done before the last message is in
        add, lane_of, ttl_ms = self._publisher.add, self._publisher.lane_of, round(ttl * 1000)
        lane = count = 0
        try:
            for topic, payload in messages:
                lane = lane_of(topic)
                if self._crowded(lane, len(topic) + len(payload)):
                    await self._make_room(lane, len(topic) + len(payload))
                add(
                    topic,
                    payload,
                    now=trio.current_time(),
                    time_ms=time.time_ns() // 1_000_000,
                    ttl_ms=ttl_ms,
                    ticket=ticket,
                    more=True,
                )
                count += 1
        finally:
            self._publisher.flush(trio.current_time())
            self._queued()
        if ticket is not None:
            ticket.done()
            await self._settle(ticket, done, lane)
        return count

    async def publish_batch(
        self,
        topics: Sequence[str],
        payloads: Sequence[bytes],
        *,
        receipt: ReceiptLevel = None,
        ttl: float = 0.0,
    ) -> None:
        """Send parallel lists, all of one class, as one batch made at once: the fastest way for bulk callers.

        Raises as `publish`, and UsageError when the topics belong to several classes or make no batch.
        """
        size = sum(map(len, payloads)) + sum(map(len, topics))
        lane = self._publisher.lane_of(topics[0] if topics else "")
        await self._make_room(lane, size)
        ticket, done = self._ticket(receipt)
        now_ms = time.time_ns() // 1_000_000
        self._publisher.add_batch(
            topics, payloads, now=trio.current_time(), time_ms=now_ms, ttl_ms=round(ttl * 1000), ticket=ticket
        )
        self._queued()
        if ticket is not None:
            await self._settle(ticket, done, lane)

    @staticmethod
    def _ticket(receipt: ReceiptLevel) -> tuple[Ticket | None, trio.Event]:
        done = trio.Event()
        if receipt is None:
            return None, done
        if receipt not in ("kept", "custody"):
            raise UsageError(f'receipt={receipt!r}; it is None, "kept" or "custody"')
        return Ticket(receipt == "custody", done.set), done

    async def _settle(self, ticket: Ticket, done: trio.Event, lane: int) -> None:
        await self._await(done, lambda: self._why(lane))
        if ticket.refused is not None:
            refused = ticket.refused
            raise Refused(refused.code, refused.reason, refused.topic, refused.messages)

    async def _make_room(self, lane: int, size: int) -> None:
        """(2), and let other tasks run."""
        lot = self._room[lane]
        if lot or not self._publisher.room(lane, size):
            await self._wait_for_room(lane, size, lot)
        else:
            await trio.lowlevel.checkpoint()

    def _crowded(self, lane: int, size: int) -> bool:
        """Must the caller wait for room, or is it other tasks' turn? Spares most calls an await."""
        self._published += 1
        return (
            not self._published % CHECKPOINT_EVERY
            or bool(self._room[lane])
            or not self._publisher.room(lane, size)
        )

    async def _wait_for_room(self, lane: int, size: int, lot: trio.lowlevel.ParkingLot) -> None:
        self._publisher.flush(trio.current_time())
        self._queued()
        seconds = WARN_AFTER
        while True:
            with trio.move_on_after(seconds) as scope:
                await lot.park()
            if scope.cancelled_caught:
                log.warning("publish waits for room: %s", self._why(lane))
                seconds = WARN_EVERY
            if self._publisher.room(lane, size):
                lot.unpark()  # the next in line may fit, too
                return

    def _queued(self) -> None:
        """Something may leave, now or at a time."""
        due = self._publisher.due
        if due < self._timer.deadline:
            self._timer.deadline = due
        self._connection.send_now()

    def _on_refused(self, refused: Refused, awaited: bool) -> None:
        self._refused_messages += refused.messages
        now = trio.current_time()
        if not awaited and now - self._refused_logged >= REFUSED_LOG_INTERVAL:
            self._refused_logged = now
            log.warning("%s (%d messages refused so far)", refused, self._refused_messages)
        if self._hook is not None:
            self._hook(refused)

    # -- subscribing -------------------------------------------------------------------------------------

    def subscribe(
        self,
        *filters: str,
        durable: str | None = None,
        start: Literal["now", "earliest"] | datetime | float = "now",
        max_lag: float | None = None,
        group: str | None = None,
        ack: Literal["auto", "manual"] = "auto",
    ) -> Subscription:
        """Messages that match any of the filters, as an async iterator; it begins at once.

        `durable` names a cursor at the keeper: the next subscription of that name, by this node, goes on where this
        one stopped. `start` (for a new name, or a live one): "now", "earliest", or a time, as an aware datetime or
        unix seconds. `max_lag`: seconds that a durable name may be behind before the keeper drops it.

        A record is acknowledged when the application asks for the message after its last one; with `ack="manual"`
        when `Message.ack` was called for each of its messages.

        Raises TopicError for a bad filter, UsageError without one. The iterator raises Refused when the keeper
        refuses or ends the subscription.
        """
        if not filters:
            raise UsageError("a subscription needs at least one filter")
        wanted = Subscribe(str(next(self._ids)), filters, durable, start_of(start), max_lag, group)
        if durable is None and start == "now":
            subscription = Subscription(wanted, self._inbox, ack == "manual", self._unsubscribe)
            self._inbox.add(subscription)
            return subscription
        reader = Reader(self._dialler, self, wanted, manual=ack == "manual")
        self._readers[wanted.id] = reader
        self.run_in_background(self._run_reader, reader)
        return reader.subscription

    def run_in_background(self, function: Callable[..., Awaitable[None]], *args: object) -> None:
        """Run it until the client ends. What it raises ends the client."""
        assert self._nursery is not None
        self._nursery.start_soon(function, *args)

    async def _run_reader(self, reader: Reader) -> None:
        await reader.run()
        del self._readers[reader.wanted.id]

    def _unsubscribe(self, subscription: Subscription) -> None:
        self._inbox.remove(subscription)
        link = self._connection.link
        if link is not None:
            link.send(Unsubscribe(subscription.wanted.id))
            self._connection.wake()

    # -- request and reply -------------------------------------------------------------------------------

    async def request(self, topic: str, payload: bytes, *, timeout: float = REQUEST_TIMEOUT) -> Message:
        """Publish a request and wait for the one reply. Nobody acts on it after `timeout` seconds.

        Raises RequestTimeout; Refused when the keeper does not take the request; else as `publish`.
        """
        return await self._requests.ask(topic, payload, timeout)

    async def reply_to(self, message: Message, payload: bytes, receipt: ReceiptLevel) -> None:
        """For `Message.reply`."""
        asked = message.properties
        if asked is None or asked.reply_topic is None:
            raise UsageError(f"the message on {message.topic} wants no reply")
        answer = Properties(correlation_id=asked.correlation_id)
        await self.publish(asked.reply_topic, payload, receipt=receipt, properties=answer)

    async def ping(self, *, timeout: float = PING_TIMEOUT) -> Ping:
        """One round trip through the keeper's message layer: a subscription to nothing, and its answer.

        Raises Unreachable.
        """
        return await self._pings.ask(timeout)

    def send_datagram(self, data: bytes) -> bool:
        """Send bytes that may be lost and are never sent again. False: not now, the link takes no more.

        Raises UsageError for more than one packet holds. The keeper hands none on: docs/client.md says what for.
        """
        return self._pings.send(data)

    def datagrams(self) -> AsyncIterator[bytes]:
        """Unreliable datagrams of the keeper, as they come. The oldest are dropped while nobody takes them."""
        return self._pings.received()

    async def load(self, rate: float, *, size: int = 0, seconds: float = 10.0) -> LoadReport:
        """Send echo requests at `rate` bytes a second and measure what becomes of them (protocol §10.5).

        `size`: bytes of each, 0 for 1,000. Raises UsageError, Unreachable.
        """
        return await self._pings.load(rate, size, seconds)

    # -- what is known -----------------------------------------------------------------------------------

    @property
    def state(self) -> str:
        """What the session is doing, in words: connected to whom, or what it waits for."""
        unfinished = self._publisher.unfinished
        if self._connection.link is None or not unfinished:
            return self._connection.describe()
        return f"{self._connection.describe()}, {unfinished} messages not kept yet"

    @property
    def connected(self) -> bool:
        return self._connection.link is not None

    @property
    def peer(self) -> Hello | None:
        """The keeper's HELLO, while connected."""
        return self._connection.link.peer if self._connection.link is not None else None

    def statistics(self) -> ClientStatistics:
        return ClientStatistics(
            connection=self._connection.statistics(),
            lanes=self._publisher.statistics(),
            inbox=self._inbox.statistics(),
            readers={r.wanted.name or r.wanted.id: r.inbox.statistics() for r in self._readers.values()},
            refused_messages=self._refused_messages,
            late_replies=self._requests.late,
            unfinished=self._publisher.unfinished,
        )

    def _why(self, lane: int) -> str:
        if self._connection.link is None:
            return self._connection.describe()
        return f"waiting {self._publisher.waits_for(lane)}, connected to {self._connection.where}"

    async def _await(self, done: trio.Event, why: Callable[[], str]) -> None:
        """Wait, and say what for when it takes long. (4)"""
        seconds = WARN_AFTER
        while not done.is_set():
            with trio.move_on_after(seconds):
                await done.wait()
            if not done.is_set():
                log.warning("%s", why())
                seconds = WARN_EVERY

    # -- the connection ----------------------------------------------------------------------------------

    def _on_up(self, link: Link) -> None:
        """HELLO came: sort by the keeper's classes, send again what is unanswered, subscribe again."""
        self._sort(link)
        self._publisher.attach(link, trio.current_time())
        self._inbox.attach(link)
        self._queued()

    def _on_move(self, link: Link) -> None:
        self._sort(link)
        self._publisher.move(link, trio.current_time())
        self._inbox.move(link)
        self._queued()

    def _on_left(self, link: Link) -> None:
        self._publisher.lost(link, trio.current_time())
        self._queued()

    def _sort(self, link: Link) -> None:
        assert link.peer is not None
        if link.peer.classes:
            try:
                self._publisher.sort_by(link.peer.classes)
            except MessageError as error:
                log.warning("%s announces classes that cannot be used: %s", self._connection.where, error)

    def _on_down(self) -> None:
        self._publisher.detach()
        self._inbox.detach()

    def _on_event(self, link: Link, event: LinkEvent) -> None:
        now = trio.current_time()
        match event:
            case RecordReceived():
                self._inbox.on_record(event, link)
            case ReceiptReceived(lane=lane, kept=kept, custody=custody, ranges=ranges):
                self._publisher.on_receipt(lane, kept, custody, ranges, now, link)
                self._answered(lane)
            case RefusedReceived(lane=lane, place=place, code=code, reason=reason):
                self._publisher.on_refused(lane, place, code, event.retry_after_ms / 1000, reason, now, link)
                self._answered(lane)
            case Writable(lane=lane):
                self._publisher.on_writable(lane, now)
            case SubscribedReceived(subscribed=subscribed):
                if not self._pings.on_subscribed(subscribed.id):
                    self._inbox.on_subscribed(subscribed)
            case DatagramReceived(data=data):
                self._pings.on_datagram(data, now)
            case _:
                pass

    def _answered(self, lane: int) -> None:
        self._room[lane].unpark()
        if not self._publisher.unfinished:
            self._settled.unpark_all()

    def _on_idle(self) -> None:
        """The events of one wake-up are done."""
        self._inbox.flush(trio.current_time())
        self._queued()

    async def _timer_loop(self) -> None:
        """Lingers, and pauses after refusals."""
        while True:
            due = self._publisher.next_timeout()
            with trio.CancelScope(deadline=math.inf if due is None else due) as self._timer:
                await trio.sleep_forever()
            self._publisher.handle_timeout(trio.current_time())
            self._connection.wake()
