"""The relay: every record that comes through a door is decided here, once, and counted.

(1) A record is answered once: kept (after its commit), refused with a code and a reason, or, in a memory class,
    passed on and settled without ever being called kept by a store.
(2) *kept* is told only after the commit; *custody* only when this node has no custody route for the record, or when
    that route reported it (protocol §10).
(3) What a commit brought goes to every feed of its lane from memory, in log order.
(4) Whoever waits for custody is remembered in bounded memory: beyond the bound custody is told later, never earlier.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from functools import partial
from typing import Final

from attrs import define, evolve, field

from stp.core.errors import MessageError
from stp.link import Link, RecordReceived, RecordRejected
from stp.records import VOID, RecordHead, RefusedCode, regroup
from stpd.access import Grant
from stpd.hops import Feed
from stpd.limits import PeerLimit
from stpd.router import LANES, Classes, MessageClass
from stpd.store.base import Append, Outcome, OutcomeKind, Store, Stored

RETRY_FULL_MS: Final = 500
"""Milliseconds after which a publisher refused for want of room may try again."""

WAITERS_LIMIT: Final = 50_000
"""Entries per lane that wait for custody; beyond it those of one link are merged into one."""


@define
class Door:
    """Where records come in: one peer's link, and what it may do."""

    link: Link
    node: str
    grant: Grant | None
    """None for an upstream: it was chosen by configuration, its records are not judged by access rules."""
    upstream: bool = False
    limit: PeerLimit | None = None
    waiting: deque[RecordReceived] = field(factory=deque)
    """Records beyond the peer's rate: taken later, in order."""
    messages_in: int = 0
    records_in: int = 0
    refused: int = 0
    undecided: int = 0
    """Records that the store has not decided yet."""


@define
class RelayStatistics:
    """Plain counters since the start; records unless named otherwise."""

    accepted: int = 0
    repeats: int = 0
    denied: int = 0
    loops: int = 0
    full: int = 0
    conflicts: int = 0
    corrupt: int = 0
    other_refusals: int = 0
    memory_messages: int = 0
    waiters_merged: int = 0


@define
class _Waiter:
    """Places first..last of a door's lane are in custody once *pos* is."""

    pos: int
    door: Door
    first: int
    last: int


class Relay:
    """Decides, stores, routes. All calls come from the protocol's thread."""

    def __init__(
        self,
        store: Store,
        classes: Classes,
        *,
        node_id: bytes,
        memory_source: bytes,
        on_refused: Callable[[str, RefusedCode, str], None] = lambda node, code, reason: None,
        wake: Callable[[], None] = lambda: None,
        send: Callable[[], None] = lambda: None,
    ) -> None:
        """*memory_source*: 16 random bytes per process; it numbers the records of memory classes.

        *on_refused(node, code, reason)* hears of refusals worth a log line; *wake* makes the carriers send
        soon, *send* at once.
        """
        self.store = store
        self.classes = classes
        self.stats = RelayStatistics()
        self.feeds: dict[int, list[Feed]] = {lane: [] for lane in LANES}
        self.custody_route: Callable[[str], bool] = lambda class_name: False
        """Does a record of this class, not come from above, go to an upstream?"""
        self._node_id = node_id
        self._memory_source = memory_source
        self._memory_numbers = dict.fromkeys(LANES, 0)
        self._on_refused = on_refused
        self._wake = wake
        self._send = send
        self._waiters: dict[int, deque[_Waiter]] = {lane: deque() for lane in LANES}
        self._dirty: dict[int, Link] = {}
        store.on_commit = self._committed

    # -- doors

    def accept(self, door: Door, event: RecordReceived, now: float = 0.0) -> float:
        """Take one record from a link, which has checked it. It is answered now or after its commit (1).

        Where the peer is faster than its limit the record waits: call `resume` after the seconds returned, if any.
        """
        if door.limit is None:
            self._accept(door, event)
            return 0.0
        door.waiting.append(event)
        return self.resume(door, now) if len(door.waiting) == 1 else 0.0

    def resume(self, door: Door, now: float) -> float:
        """Take what the peer's limit allows by now; seconds until more may be taken, 0.0 when nothing waits."""
        limit = door.limit
        assert limit is not None
        while door.waiting:
            wait = limit.wait(now)
            if wait > 0:
                limit.delayed += 1
                return wait
            event = door.waiting.popleft()
            limit.take(event.head.messages, len(event.record))
            self._accept(door, event)
        return 0.0

    def _accept(self, door: Door, event: RecordReceived) -> None:
        if not door.link.admit(event):
            door.refused += 1
            self._count_refused(door, event.lane, event.head, event.head.messages)
            return
        head = event.head
        door.records_in += 1
        door.messages_in += head.messages
        self._dirty[id(door.link)] = door.link
        klass = self.classes.of(event.lane, head.prefix)
        refusal = self._judge(door, event)
        if refusal is not None:
            self._refuse(door, event, klass, *refusal)
            return
        if klass.memory and head.kind != VOID:
            self._pass_on(door, event, klass)
            return
        door.undecided += 1
        self.store.append(
            Append(
                lane=event.lane,
                record=event.record,
                head=head,
                adopt=not head.hops,
                peer=door.node,
                class_name=klass.name,
                done=partial(self._decided, door, event, klass),
            )
        )

    def rejected(self, door: Door, event: RecordRejected) -> None:
        """The link refused a record itself; it is only counted here."""
        door.refused += 1
        head = event.head
        name = self.classes.of(event.lane, head.prefix).name if head is not None else "unknown"
        if event.code == RefusedCode.CORRUPT:
            self.stats.corrupt += 1
            self.store.count(door.node, name, received=event.messages, corrupt=event.messages)
        else:
            self.stats.other_refusals += 1
            self.store.count(door.node, name, received=event.messages, refused=event.messages)
        if event.code in (RefusedCode.SOURCE, RefusedCode.CORRUPT):
            self._on_refused(door.node, event.code, f"lane {event.lane} place {event.place}")

    def _judge(self, door: Door, event: RecordReceived) -> tuple[RefusedCode, int, str] | None:
        """Why this record may not pass, if so: (code, retry after ms, reason)."""
        head = event.head
        if self._node_id in head.hops:
            self.stats.loops += 1
            return RefusedCode.LOOP, 0, f"this record has been at {door.link.hello.node} before"
        if door.grant is None:
            return None
        try:
            reason = door.grant.refusal_to_publish(event.record, head)
        except MessageError as error:
            self.stats.corrupt += 1
            return RefusedCode.CORRUPT, 0, str(error)
        if reason is not None:
            self.stats.denied += 1
            return RefusedCode.DENIED, 0, reason
        return None

    def _refuse(
        self,
        door: Door,
        event: RecordReceived,
        klass: MessageClass,
        code: RefusedCode,
        retry_ms: int,
        reason: str,
    ) -> None:
        door.refused += 1
        messages = event.head.messages
        self.store.count(door.node, klass.name, received=messages, refused=messages)
        door.link.refuse(event.lane, event.place, code, retry_ms, reason)
        self._on_refused(door.node, code, reason)

    def _count_refused(self, door: Door, lane: int, head: RecordHead, messages: int) -> None:
        name = self.classes.of(lane, head.prefix).name
        self.store.count(door.node, name, received=messages, refused=messages)

    def _decided(self, door: Door, event: RecordReceived, klass: MessageClass, outcome: Outcome) -> None:
        """The store's word on one record; the door hears it."""
        link, lane, place = door.link, event.lane, event.place
        door.undecided -= 1
        self._dirty[id(link)] = link
        kind = outcome.kind
        if kind is OutcomeKind.STORED or kind is OutcomeKind.REPEAT:
            if kind is OutcomeKind.STORED:
                self.stats.accepted += 1
            else:
                self.stats.repeats += 1
            routed = not door.upstream and self.custody_route(klass.name)
            link.settle(lane, place, custody=not routed)
            if routed and link.closed is None:
                self._wait(lane, outcome.pos, door, place)
            return
        door.refused += 1
        code, retry_ms, reason = _refusal(outcome)
        if kind is OutcomeKind.FULL or kind is OutcomeKind.ERROR:
            self.stats.full += 1
        else:
            self.stats.conflicts += kind is OutcomeKind.CONFLICT
            self._on_refused(door.node, code, reason)
        link.refuse(lane, place, code, retry_ms, reason)

    # -- memory classes

    def _pass_on(self, door: Door, event: RecordReceived, klass: MessageClass) -> None:
        """A record that no disk sees: to whoever can take it now, and settled (1)."""
        record, head, lane = event.record, event.head, event.lane
        if not head.hops:
            number = self._memory_numbers[lane] + 1
            self._memory_numbers[lane] = number
            record = regroup(lane, self._memory_source, number, [record])
            head = _renumbered(head, self._memory_source, number, record)
        taken = False
        for feed in self.feeds[lane]:
            taken = feed.offer(lane, record, head) or taken
        messages = head.messages
        self.stats.memory_messages += messages
        self.store.count(door.node, klass.name, received=messages, accepted=messages)
        if taken:
            self.store.count_node(klass.name, accepted=messages, live_only=messages)
        else:
            self.store.count_node(klass.name, accepted=messages, no_taker=messages)
        door.link.settle(lane, event.place, custody=True)

    # -- what a commit brought

    def _committed(self, stored: list[Stored]) -> None:
        for lane in {one.lane for one in stored}:
            for feed in self.feeds[lane]:
                feed.pump(lane)
        self._tell()
        self._send()

    def attach(self, feed: Feed, lanes: Iterable[int]) -> None:
        """From now on *feed* hears of commits on *lanes*; what waits is sent at once."""
        for lane in lanes:
            self.feeds[lane].append(feed)
        feed.pump_all()
        self._wake()

    def detach(self, feed: Feed) -> None:
        feed.close()
        for feeds in self.feeds.values():
            if feed in feeds:
                feeds.remove(feed)

    def flush(self) -> None:
        """Tell receipts that were gathered, and let the carriers send."""
        self._tell()
        self._wake()

    def _tell(self) -> None:
        dirty, self._dirty = self._dirty, {}
        for link in dirty.values():
            link.flush()

    # -- custody

    def _wait(self, lane: int, pos: int, door: Door, place: int) -> None:
        waiters = self._waiters[lane]
        if len(waiters) >= WAITERS_LIMIT:
            self._waiters[lane] = waiters = self._merged(waiters)
        waiters.append(_Waiter(pos, door, place, place))

    def _merged(self, waiters: deque[_Waiter]) -> deque[_Waiter]:
        """Promise (4): one entry per link that still lives, at its highest position."""
        by_door: dict[int, _Waiter] = {}
        for one in waiters:
            if one.door.link.closed is not None:
                continue
            known = by_door.get(id(one.door))
            if known is None:
                by_door[id(one.door)] = one
            else:
                known.pos, known.last = max(known.pos, one.pos), max(known.last, one.last)
        self.stats.waiters_merged += len(waiters) - len(by_door)
        return deque(sorted(by_door.values(), key=lambda one: one.pos))

    def on_custody(self, lane: int, pos: int) -> None:
        """The custody route has everything up to *pos* of *lane*: whoever waited is told (2, R-10-36).

        Who has records at the store hears of it with what becomes of those, in one receipt: soon enough.
        """
        waiters = self._waiters[lane]
        while waiters and waiters[0].pos <= pos:
            one = waiters.popleft()
            link = one.door.link
            if link.closed is None:
                for place in range(one.first, one.last + 1):
                    link.in_custody(lane, place)
                if not one.door.undecided:
                    self._dirty[id(link)] = link

    def waiting_for_custody(self) -> int:
        """Entries that wait for the custody route."""
        return sum(map(len, self._waiters.values()))


def _refusal(outcome: Outcome) -> tuple[RefusedCode, int, str]:
    """Wire code, retry after in ms, and reason for an outcome that is not STORED or REPEAT."""
    kind = outcome.kind
    if kind is OutcomeKind.CONFLICT:
        return RefusedCode.CONFLICT, 0, "this number was stored with other bytes"
    if kind is OutcomeKind.RANGES:
        return RefusedCode.RANGES, 10_000, "too many gaps in this source's numbers"
    if kind is OutcomeKind.ERROR:
        return RefusedCode.FULL, RETRY_FULL_MS, "the store cannot write"
    return RefusedCode.FULL, RETRY_FULL_MS, "the store is full"


def _renumbered(head: RecordHead, source: bytes, number: int, record: bytes) -> RecordHead:
    return evolve(head, source=source, number=number, to=number, size=len(record))
