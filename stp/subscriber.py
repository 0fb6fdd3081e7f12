"""The receiving half of a client: records into messages, for one or more subscriptions of a session (protocol §10).

(1) A record is taken (credit, receipt) when every subscription that has messages of it is done with all of them.
(2) What waits is bounded by the credit that a session gives: an application that takes nothing stops the keeper.
(3) With `once`, a record that comes again, on this session or a later one, is not handed out again; it is taken as
    soon as its first coming is.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from datetime import datetime
from typing import TYPE_CHECKING, Any, Final, Literal, Protocol, TypeAlias

import trio
from attrs import Factory, define, evolve, field

from stp.batch import TOMBSTONES, OpenBatch, Properties, open_batch
from stp.control import Subscribe, Subscribed
from stp.core.errors import MessageError, UsageError
from stp.core.ranges import RangeSet
from stp.link import Link, RecordReceived
from stp.outbox import Refused
from stp.records import VOID, RecordHead, batches_of
from stp.topics import FilterSet

if TYPE_CHECKING:
    from types import TracebackType

log: Final = logging.getLogger("stp.client")

SEEN_RANGES: Final = 1_024
"""Ranges of record numbers remembered per source and lane; the oldest are forgotten first."""
SEEN_SOURCES: Final = 4_096
"""(source, lane) pairs remembered; the one unheard of for longest is forgotten first."""
FLUSH_BYTES: Final = 64 * 1024
"""Bytes of records taken after which receipts and credit go out, at the latest."""
FLUSH_INTERVAL: Final = 0.05
"""Seconds after which they do, when the application takes messages slowly."""
CHECKPOINT_EVERY: Final = 64
"""Messages handed out without letting other tasks run."""


ReceiptLevel: TypeAlias = Literal["kept", "custody"] | None
"""What a publisher waits for; None: for nothing."""


class Replier(Protocol):
    """Who sends a reply: the client."""

    async def reply_to(self, message: Message, payload: bytes, receipt: ReceiptLevel) -> None: ...


@define(eq=False)
class Message:
    """One message as its publisher made it. Times are ms since 1970, by the publisher's clock."""

    topic: str
    payload: bytes
    time_ms: int
    properties: Properties | None
    lane: int
    source: bytes
    """Who numbered its record: a keeper, as a rule. 16 bytes."""
    number: int
    """Of the record, per source and lane."""
    publisher: bytes
    """The node id of who published it."""
    age: float
    """Seconds that keepers held it, measured without clocks."""
    tombstone: bool
    _delivery: Delivery = field(repr=False)
    _replier: Replier = field(repr=False)

    @property
    def reply_topic(self) -> str | None:
        """Where an answer is wanted."""
        return self.properties.reply_topic if self.properties is not None else None

    async def reply(self, payload: bytes, *, receipt: ReceiptLevel = None) -> None:
        """Answer a request. UsageError when the message wants no answer; else as `Client.publish`."""
        await self._replier.reply_to(self, payload, receipt)

    def ack(self) -> None:
        """With `ack="manual"`: the application is done with this message. Once for each."""
        self._delivery.done_one()


@define(eq=False)
class Delivery:
    """A record on its way to the application. `place` is where an answer goes, on `link`."""

    head: RecordHead
    record: bytes
    link: Link
    place: int
    inbox: Inbox
    holders: int = 0
    """Subscriptions, or with manual acknowledgement messages, that are not done with it."""
    _opened: list[OpenBatch] | None = None

    def open(self) -> list[OpenBatch]:
        """Its batches, opened once for all subscriptions. MessageError for what cannot be opened."""
        if self._opened is None:
            self._opened = [open_batch(batch) for batch in batches_of(self.record, self.head)]
        return self._opened

    def done_one(self) -> None:
        self.holders -= 1
        if not self.holders:
            self._opened = None
            self.inbox.take(self)


@define
class InboxStatistics:
    """Counts since the start: records, and messages handed out. `waiting` is a gauge, in records."""

    records: int = 0
    repeats: int = 0
    voids: int = 0
    damaged: int = 0
    unwanted: int = 0
    messages: int = 0
    waiting: int = 0


class Inbox:
    """What one connection receives. `wake` is called when there is something to send because of it."""

    def __init__(self, replier: Replier, wake: Callable[[], None], *, once: bool = False) -> None:
        self.replier = replier
        self.subscriptions: dict[str, Subscription] = {}
        self.stats = InboxStatistics()
        self._wake = wake
        self._once = once
        self._link: Link | None = None
        self._older: list[Link] = []
        """Sessions that the present one continues, while they are there."""
        self._unflushed = 0
        self._flushed_at = 0.0
        self._seen: dict[tuple[bytes, int], RangeSet] = {}
        self._open: dict[tuple[bytes, int, int], Delivery] = {}

    def attach(self, link: Link) -> None:
        """A session is up: subscribe to everything again."""
        self._link = link
        for subscription in self.subscriptions.values():
            link.send(subscription.wanted)
        self._wake()

    def move(self, link: Link) -> None:
        """A session beside the present one is up: the keeper moves its lanes there, one by one."""
        if self._link is not None:
            self._older = [one for one in (*self._older, self._link) if one.closed is None]
        self.attach(link)

    def add(self, subscription: Subscription) -> None:
        """From now on, and on every later session."""
        self.subscriptions[subscription.wanted.id] = subscription
        if self._link is not None:
            self._link.send(subscription.wanted)
            self._wake()

    def remove(self, subscription: Subscription) -> None:
        self.subscriptions.pop(subscription.wanted.id, None)

    def on_subscribed(self, answer: Subscribed) -> None:
        """The keeper's answer, or its end of a subscription that stood."""
        subscription = self.subscriptions.get(answer.id)
        if subscription is None:
            return
        if answer.ok:
            subscription.confirmed.set()
        else:
            subscription.fail(Refused(0, answer.error or "", " ".join(subscription.wanted.filters)))

    def detach(self) -> None:
        self._link = None
        self._older.clear()

    def on_record(self, event: RecordReceived, link: Link | None = None) -> None:
        """A record came, on the present session unless another is named.

        It is answered when the application has taken it.
        """
        if self._once and not self.subscriptions:
            return  # closed: what is not answered comes again to the next reader of that name
        self.stats.records += 1
        link = link or self._link
        assert link is not None
        head = event.head
        delivery = Delivery(head, event.record, link, event.place, self)
        if head.kind == VOID:
            self.stats.voids += 1
            self.take(delivery)
            return
        if self._once and self._is_repeat(delivery):
            return
        for subscription in self.subscriptions.values():
            if subscription.wants(head.prefix):
                delivery.holders += 1
                subscription.give(delivery)
        if not delivery.holders:
            self.stats.unwanted += 1
            self.take(delivery)

    def _is_repeat(self, delivery: Delivery) -> bool:
        """(3). Remembers the record."""
        head = delivery.head
        key = (head.source, head.lane, head.number)
        first = self._open.get(key)
        if first is not None:
            self.stats.repeats += 1
            first.link, first.place = delivery.link, delivery.place
            return True
        seen = self._seen.pop((head.source, head.lane), None)
        if seen is None:
            seen = RangeSet(max_ranges=SEEN_RANGES)
            if len(self._seen) >= SEEN_SOURCES:
                del self._seen[next(iter(self._seen))]
        self._seen[head.source, head.lane] = seen  # the newest last
        if head.number in seen:
            self.stats.repeats += 1
            self.take(delivery)
            return True
        seen.add(head.number)
        self._open[key] = delivery
        return False

    def take(self, delivery: Delivery) -> None:
        """(1): the application has it."""
        head = delivery.head
        if self._once:
            self._open.pop((head.source, head.lane, head.number), None)
        link = delivery.link
        if link is not self._link and link not in self._older:
            return  # its session is over; if the keeper does not know, it will send the record again
        link.settle(head.lane, delivery.place, custody=True)
        self._unflushed += head.size
        now = trio.current_time()
        if self._unflushed >= FLUSH_BYTES or now - self._flushed_at >= FLUSH_INTERVAL:
            self.flush(now)

    def statistics(self) -> InboxStatistics:
        """A snapshot."""
        return evolve(self.stats, waiting=sum(one.waiting for one in self.subscriptions.values()))

    def flush(self, now: float) -> None:
        """Let receipts and credit go out for what was taken."""
        if self._unflushed and self._link is not None:
            self._unflushed = 0
            self._flushed_at = now
            for older in self._older:
                older.flush()
            self._link.flush()
            self._wake()


@define(eq=False)
class Subscription:
    """Messages that match some filters, as an async iterator. Made by `Client.subscribe`.

    Leaving the loop early keeps what was handed out taken when the subscription is closed, by `aclose` or by
    leaving `async with`; a record of which messages are left comes again to a durable subscription.
    """

    wanted: Subscribe
    inbox: Inbox
    manual: bool
    _close: Callable[[Subscription], Any]
    filters: FilterSet = field(init=False)
    confirmed: trio.Event = Factory(trio.Event)
    """The keeper has said that it stands, once at least."""
    handed_out: int = 0
    """Messages given to the application."""
    _queue: deque[Delivery] = field(factory=deque)
    _current: Delivery | None = None
    _messages: deque[Message] = field(factory=deque)
    _news: trio.Event = Factory(trio.Event)
    _ended: bool = False
    error: Refused | None = None
    """Why the keeper refused it, or ended it."""

    def __attrs_post_init__(self) -> None:
        self.filters = FilterSet(self.wanted.filters)

    def __aiter__(self) -> Subscription:
        return self

    async def __anext__(self) -> Message:
        """The next message. Raises Refused when the keeper ended the subscription."""
        if self.handed_out % CHECKPOINT_EVERY:
            await trio.lowlevel.checkpoint_if_cancelled()
        else:
            await trio.lowlevel.checkpoint()
        while not self._messages:
            self._finish()
            if self.error is not None and (self.wanted.name or not self._queue):
                raise self.error  # what waits for a durable name is its next reader's
            if self._ended:
                raise StopAsyncIteration
            if self._queue:
                self._next_record()
                continue
            self.inbox.flush(trio.current_time())
            self._news = trio.Event()
            await self._news.wait()
        self.handed_out += 1
        self.inbox.stats.messages += 1
        return self._messages.popleft()

    async def __aenter__(self) -> Subscription:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        if kind is None:
            await self.aclose()
        else:
            self._end()

    async def aclose(self) -> None:
        """End it. What was handed out as a whole record is taken; the name of a durable one stands."""
        if not self._messages:
            self._finish()
        self._end()
        await trio.lowlevel.checkpoint()

    @property
    def waiting(self) -> int:
        """Records that came and are not opened yet."""
        return len(self._queue)

    # -- the connection's side ---------------------------------------------------------------------------

    def wants(self, prefix: str) -> bool:
        """May a record with this common prefix hold messages for it?"""
        return not self._ended and bool(self.filters.decide(prefix))

    def give(self, delivery: Delivery) -> None:
        self._queue.append(delivery)
        self._news.set()

    def fail(self, error: Refused) -> None:
        """The keeper refused it, or ended it."""
        self.error = error
        self.confirmed.set()
        self._news.set()

    # -- taking records apart ----------------------------------------------------------------------------

    def _next_record(self) -> None:
        delivery = self._current = self._queue.popleft()
        try:
            opened = delivery.open()
        except MessageError as error:
            self.inbox.stats.damaged += 1
            log.warning("a record of %s cannot be opened: %s", delivery.head.source.hex(), error)
            opened = []
        for batch in opened:
            self._add_messages(delivery, batch)
        if self.manual:
            delivery.holders += len(self._messages)

    def _add_messages(self, delivery: Delivery, batch: OpenBatch) -> None:
        head, matches, add = delivery.head, self.filters.matches, self._messages.append
        age = head.age_ds / 10
        publisher, tombstone = batch.head.publisher, bool(batch.head.flags & TOMBSTONES)
        for topic, payload, time_ms, properties in zip(
            batch.topics, batch.payloads, batch.times_ms, batch.properties, strict=True
        ):
            if matches(topic):
                add(
                    Message(
                        topic,
                        payload,
                        time_ms,
                        properties,
                        head.lane,
                        head.source,
                        head.number,
                        publisher,
                        age,
                        tombstone,
                        delivery,
                        self.inbox.replier,
                    )
                )

    def _finish(self) -> None:
        """The application came back for more: it is done with the current record."""
        current, self._current = self._current, None
        if current is not None:
            current.done_one()

    def _end(self) -> None:
        if self._ended:
            return
        self._ended = True
        self._news.set()
        current, self._current = self._current, None
        left, self._messages = len(self._messages), deque()
        dropped, self._queue = self._queue, deque()
        self._close(self)
        if self.wanted.name:
            return  # a durable one is given them again
        for delivery in dropped:
            delivery.done_one()
        if current is not None:
            for _ in range(1 + left if self.manual else 1):
                current.done_one()


def start_of(start: str | datetime | float) -> str | int:
    """As SUBSCRIBE says it: a word, or ms since 1970. Raises UsageError."""
    if isinstance(start, str):
        if start not in ("now", "earliest"):
            raise UsageError(f'start={start!r}; it is "now", "earliest" or a time')
        return start
    if isinstance(start, datetime):
        if start.tzinfo is None:
            raise UsageError("start is a time without a time zone")
        start = start.timestamp()
    return round(start * 1000)
