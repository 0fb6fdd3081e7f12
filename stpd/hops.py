"""A feed: what carries a lane's log to one peer (an uplink, a durable reader, a sleeping edge, a live subscriber).

(1) A durable feed's cursor moves only over records that the peer reported in custody, or that a named rule took out.
(2) Order holds per (source, lane): after a refusal the lane is sent again from the refused record on.
(3) A keeper at the other end never sees a gap it must remember: numbers that a filter or a rule took out are
    covered by a void before the next record of that source.
(4) A live feed that cannot follow skips forward, and says by how many messages.
(5) Moving to a link beside the present one, a lane goes on there when all that was sent on it here is settled. What
    waits for custody is sent again there, where it is a repeat; nothing else is, and nothing is overtaken.

Whatever happens here is synchronous: a commit, a receipt or new room calls :meth:`Feed.pump`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Final

from attrs import define, field

from stp.batch import open_batch, read_batch_head
from stp.link import Link
from stp.records import (
    VOID,
    RecordHead,
    RefusedCode,
    VoidReason,
    batches_of,
    encode_void,
    forward,
    part_of,
    read_record,
)
from stp.topics import Decision, FilterSet
from stpd.excerpts import hide
from stpd.store.base import Store, Stored

PUMP_BYTES: Final = 1 << 20
"""Bytes of log taken up at a time, from memory or from disk."""

HELD_BYTES: Final = 1 << 20
"""Bytes a lane that moves holds of memory classes, for the round trip that settles it."""

RETRY_FLOOR: Final = 0.2
"""Seconds before a refused record is sent again, at least."""

FINAL_CODES: Final = frozenset(
    {RefusedCode.DENIED, RefusedCode.CORRUPT, RefusedCode.TOO_LARGE, RefusedCode.LOOP, RefusedCode.CONFLICT}
)
"""Refusals that waiting does not improve (protocol §10): the record is set aside and a void takes its number."""


@define
class Flight:
    """One place on the wire: its record's position (-1: a void for a gap), the positions it answers for, and what
    they count in the ledger (messages)."""

    place: int
    own: int
    first: int
    last: int
    custody: int = 0
    filtered: int = 0
    expired: int = 0
    quarantined: int = 0


@define
class LaneState:
    """One lane of a feed. ``next`` is the position to read next; ``not_before`` a time (seconds, monotonic).

    ``link``: where its flights are; another than the feed's while it moves (5), when ``held`` has the records of
    memory classes that came meanwhile.
    """

    next: int
    link: Link
    cumulative: int = 0
    flights: deque[Flight] = field(factory=deque)
    backlog: deque[Stored] = field(factory=deque)
    skipped: Flight | None = None
    reading: bool = False
    not_before: float = 0.0
    epoch: int = 0
    covered: dict[bytes, int] = field(factory=dict)
    set_aside: set[int] = field(factory=set)
    held: deque[tuple[bytes, int]] = field(factory=deque)
    held_bytes: int = 0


@define
class FeedStatistics:
    """Counts since the feed was attached; messages unless named otherwise."""

    sent_records: int = 0
    sent_messages: int = 0
    custody: int = 0
    filtered: int = 0
    expired: int = 0
    quarantined: int = 0
    skipped_slow: int = 0
    refused_records: int = 0
    disk_reads: int = 0


class Feed:
    """Sends one peer what it should have. ``name`` is the hop's in the store for durable feeds, else for show."""

    def __init__(
        self,
        name: str,
        link: Link,
        store: Store,
        *,
        node_id: bytes,
        peer_id: bytes,
        lanes: dict[int, int],
        filters: FilterSet | None,
        reads: Callable[[], FilterSet] | None = None,
        durable: bool,
        keeper: bool,
        history: bool = False,
        takes: Callable[[int, str], bool] = lambda lane, prefix: True,
        ttl_of: Callable[[int, str], float] = lambda lane, prefix: 0.0,
        fetch: Callable[[Feed, int, int], object],
        retry: Callable[[Feed, int, float], object],
        on_custody: Callable[[int, int], None] | None = None,
        now: Callable[[], float],
    ) -> None:
        """*lanes*: lane → position to start at. *filters* None: everything that *takes* lets through.

        *reads*: what the peer may see by the access rules of now, which filters lie within; None: all of it.

        *history*: a live feed that starts in the past, and so may read from disk like a durable one.

        *fetch(feed, lane, position)* reads from disk and calls :meth:`give`; *retry(feed, lane, delay)* calls
        :meth:`pump` after *delay* seconds; *on_custody(lane, position)* hears every move of the cursor.
        """
        self.name = name
        self.link = link
        self.durable = durable
        self.keeper = keeper
        self.history = history
        self.filters = filters
        self._reads = reads
        self.closed = False
        self._store = store
        self._node_id = node_id
        self._peer_id = peer_id
        self._takes = takes
        self._ttl_of = ttl_of
        self._fetch = fetch
        self._retry = retry
        self._on_custody = on_custody
        self._now = now
        self._lanes = {lane: LaneState(start, link) for lane, start in lanes.items()}
        self._decisions: dict[str, Decision] = {}
        self.counts = FeedStatistics()

    # -- sending

    def pump_all(self) -> None:
        for lane in self._lanes:
            self.pump(lane)

    def pump(self, lane: int) -> None:
        """Send on *lane* what room and log allow. Cheap when there is nothing to do."""
        state = self._lanes.get(lane)
        if state is None or self.closed or state.reading or self._now() < state.not_before:
            return
        if state.link is not self.link and not self._cross(lane, state):
            return
        while self.link.lane_room(lane) > 0:
            if state.backlog:
                items: list[Stored] | None = [state.backlog.popleft()]
            else:
                items = self._store.cached(lane, state.next, PUMP_BYTES)
            if items is None:
                self._behind_memory(lane, state)
                break
            if not items:
                break
            for item in items:
                if self.link.lane_room(lane) <= 0:
                    break
                self._send(lane, state, item)
                state.next = item.pos + 1
                state.cumulative = item.cumulative
        self._settle_skipped(lane, state)

    def give(self, lane: int, epoch: int, items: list[Stored]) -> None:
        """What a disk read brought, oldest first; dropped when the lane was rewound meanwhile."""
        state = self._lanes[lane]
        state.reading = False
        if epoch == state.epoch:
            state.backlog.extend(item for item in items if item.pos >= state.next)
            if not items:  # the whole stretch was trimmed: memory has what is left, if anything
                state.next = max(state.next, self._store.first(lane))
        self.pump(lane)

    def epoch(self, lane: int) -> int:
        """Grows when a lane is rewound, so that a read under way is known to be stale."""
        return self._lanes[lane].epoch

    def offer(self, lane: int, record: bytes, head: RecordHead) -> bool:
        """A record of a memory class, which is in no log: sent now, or counted as skipped. True when sent."""
        state = self._lanes.get(lane)
        if state is None or self.closed or not self._wanted(lane, record, head):
            return False
        shown = self._hide(record, head, range(head.batches))
        if shown is not None:
            if not shown:
                return False
            record, head = shown, read_record(shown)
        record = forward(record, head, self._node_id, 0)
        if state.link is not self.link and not self._cross(lane, state):
            if state.held_bytes + len(record) > HELD_BYTES:
                self.counts.skipped_slow += head.messages
                return False
            state.held.append((record, head.messages))
            state.held_bytes += len(record)
            return True
        return self._send_live(lane, record, head.messages)

    def _send_live(self, lane: int, record: bytes, messages: int) -> bool:
        if self.link.lane_room(lane) <= 0:
            self.counts.skipped_slow += messages
            return False
        self.link.send_record(lane, record)
        self.counts.sent_records += 1
        self.counts.sent_messages += messages
        return True

    # -- from one link to the next

    def move(self, link: Link) -> None:
        """Promise (5). *link* is connected, and its peer is the present one's."""
        self.link = link
        self.pump_all()

    def cross(self) -> None:
        """Let lanes go on over the new link that may; call it when all receipts that are here were told."""
        for lane, state in self._lanes.items():
            if state.link is not self.link and not self.closed and self._cross(lane, state, all_told=True):
                self.pump(lane)

    @property
    def moving(self) -> bool:
        """Is there a lane that has not left the older link?"""
        return any(state.link is not self.link for state in self._lanes.values())

    def _cross(self, lane: int, state: LaneState, *, all_told: bool = False) -> bool:
        """Promise (5): does the lane go on over the new link? It does when the old one is gone, too.

        *all_told*: flights that are here still wait for custody, not for a receipt that is about to be told.
        """
        old = state.link
        if old.closed is None and (not old.lane_settled(lane) or (state.flights and not all_told)):
            return False
        state.link = self.link
        if state.flights and (self.durable or self.history):
            self._rewind(state, state.flights[0].first)
        elif state.flights:
            self.counts.skipped_slow += sum(flight.custody for flight in state.flights)
            state.flights.clear()
        held, state.held, state.held_bytes = state.held, deque(), 0
        for record, messages in held:
            self._send_live(lane, record, messages)
        return True

    @staticmethod
    def _rewind(state: LaneState, position: int) -> None:
        """All from *position* on is sent again."""
        state.flights.clear()
        state.skipped = None
        state.backlog.clear()
        state.covered.clear()
        state.epoch += 1
        state.reading = False
        state.next = position

    def _behind_memory(self, lane: int, state: LaneState) -> None:
        if self.durable or self.history:
            state.reading = True
            self.counts.disk_reads += 1
            self._fetch(self, lane, state.next)
            return
        newest = self._store.last(lane)  # promise (4)
        tail = self._store.cached(lane, newest, 1)
        if tail:
            self.counts.skipped_slow += max(0, tail[-1].cumulative - state.cumulative)
            state.cumulative = tail[-1].cumulative
        state.next = newest + 1

    def _send(self, lane: int, state: LaneState, item: Stored) -> None:
        """One record on its way, whole or in part; or skipped, and counted by reason."""
        if item.kind == VOID:
            self._send_void(lane, state, item)
            return
        record = item.record
        head = item.head
        if head is None:
            head = item.head = read_record(record)
        if item.pos in state.set_aside:
            self._cover(lane, state, item, head, VoidReason.QUARANTINED)
            return
        if self._peer_id in head.hops or not self._takes(lane, item.prefix):
            self._skip(state, item, filtered=item.messages)
            return
        kept, expired = self._select(lane, record, head, item)
        if kept is None:
            self._skip(state, item, filtered=item.messages - expired, expired=expired)
            return
        shown = self._hide(record, head, kept)
        if shown == b"":
            self._skip(state, item, filtered=item.messages - expired, expired=expired)
            return
        if shown or len(kept) < head.batches:
            whole = item.messages
            record = shown or part_of(record, head, kept)
            head = read_record(record)
            flight = Flight(
                0, item.pos, item.pos, item.pos, head.messages, whole - head.messages - expired, expired
            )
        else:
            flight = Flight(0, item.pos, item.pos, item.pos, item.messages)
        self._close_gap(lane, state, item.source, item.number)
        dwell_ds = max(0, int((self._now() - item.at) * 10))
        flight.place = self.link.send_record(lane, forward(record, head, self._node_id, dwell_ds))
        state.covered[item.source] = item.to
        self._put(state, flight)
        self.counts.sent_records += 1
        self.counts.sent_messages += head.messages

    def _send_void(self, lane: int, state: LaneState, item: Stored) -> None:
        """A void of the log: keepers must hear of it, readers need not."""
        lost = item.messages if item.damaged else 0
        if not item.record:  # a row so damaged that its number is lost
            self._skip(state, item, quarantined=lost)
            return
        head = read_record(item.record)
        if not self.keeper or self.filters is not None or self._peer_id in head.hops:
            self._skip(state, item, quarantined=lost)
            return
        self._close_gap(lane, state, item.source, item.number)
        place = self.link.send_record(lane, forward(item.record, head, self._node_id, 0))
        state.covered[item.source] = item.to
        self._put(state, Flight(place, item.pos, item.pos, item.pos, quarantined=lost))

    def _cover(self, lane: int, state: LaneState, item: Stored, head: RecordHead, reason: VoidReason) -> None:
        """A record set aside after a final refusal: its number goes out as a void (protocol §10)."""
        self._close_gap(lane, state, item.source, item.number)
        void = encode_void(
            lane, item.source, item.number, item.to, reason, item.messages, hops=(*head.hops, self._node_id)
        )
        place = self.link.send_record(lane, void)
        state.covered[item.source] = item.to
        self._put(state, Flight(place, item.pos, item.pos, item.pos, quarantined=item.messages))

    def _close_gap(self, lane: int, state: LaneState, source: bytes, number: int) -> None:
        """Promise (3): before *number* goes out, what lies between it and the last one sent is covered."""
        if not self.keeper:
            return
        last = state.covered.get(source)
        if last is None:
            if self.filters is None:
                return  # whole classes: what came before is in custody already
            last = 0
        if number > last + 1:
            void = encode_void(
                lane, source, last + 1, number - 1, VoidReason.FILTERED, 0, hops=(self._node_id,)
            )
            place = self.link.send_record(lane, void)
            at = state.next
            self._put(state, Flight(place, -1, at, at - 1))

    def _select(
        self, lane: int, record: bytes, head: RecordHead, item: Stored
    ) -> tuple[list[int] | range | None, int]:
        """Indices of the batches to send (None: nothing is), and how many messages were too old (R-10-29)."""
        filters, decision = self.filters, Decision.ALL
        if filters is not None:
            decision = self._decide(head.prefix)
            if decision is Decision.NONE:
                return None, 0
        ttl = self._ttl_of(lane, head.prefix)
        age_ms = (self._now() - item.at) * 1000 + head.age_ds * 100
        if decision is Decision.ALL and not ttl and age_ms < 1000 and head.batches > 1:
            return range(head.batches), 0
        keep, expired = [], 0
        for index, batch in enumerate(batches_of(record, head)):
            top = read_batch_head(batch)
            limit_ms = min((one for one in (top.ttl_ms, ttl * 1000) if one), default=0)
            if limit_ms and age_ms > limit_ms:
                expired += top.count
            elif decision is Decision.ALL or self._batch_wanted(batch, top.prefix):
                keep.append(index)
        return (keep or None), expired

    def _wanted(self, lane: int, record: bytes, head: RecordHead) -> bool:
        if self._peer_id in head.hops or not self._takes(lane, head.prefix):
            return False
        if self.filters is None:
            return True
        decision = self._decide(head.prefix)
        if decision is Decision.OPEN:
            return any(
                self._batch_wanted(batch, read_batch_head(batch).prefix) for batch in batches_of(record, head)
            )
        return decision is Decision.ALL

    def _batch_wanted(self, batch: bytes, prefix: str) -> bool:
        """Does any topic in the batch pass the filter? Opened only where the prefix does not decide (R-10-30)."""
        assert self.filters is not None
        decision = self._decide(prefix)
        if decision is not Decision.OPEN:
            return decision is Decision.ALL
        return any_topic_matches(batch, self.filters)

    def _hide(self, record: bytes, head: RecordHead, keep: Sequence[int]) -> bytes | None:
        """As `excerpts.hide`. What the filters let through as a whole lies within what the peer may see."""
        if self._reads is None or self.filters is None or self._decide(head.prefix) is Decision.ALL:
            return None
        return hide(record, head, keep, self._reads())

    def _decide(self, prefix: str) -> Decision:
        assert self.filters is not None
        known = self._decisions.get(prefix)
        if known is None:
            if len(self._decisions) >= 4096:
                self._decisions.clear()
            known = self._decisions[prefix] = self.filters.decide(prefix)
        return known

    # -- accounts

    def _put(self, state: LaneState, flight: Flight) -> None:
        """*flight* is on the wire; what was skipped before it is answered for by it."""
        if state.skipped is not None:
            _absorb(flight, state.skipped)
            state.skipped = None
        state.flights.append(flight)

    def _skip(
        self, state: LaneState, item: Stored, *, filtered: int = 0, expired: int = 0, quarantined: int = 0
    ) -> None:
        one = Flight(-1, -1, item.pos, item.pos, 0, filtered, expired, quarantined)
        if state.skipped is not None:
            _absorb(one, state.skipped)
        state.skipped = one

    def _settle_skipped(self, lane: int, state: LaneState) -> None:
        """What was skipped joins the last flight, or moves the cursor at once when nothing is on the wire."""
        skipped = state.skipped
        if skipped is None:
            return
        state.skipped = None
        if state.flights:
            tail = state.flights[-1]
            tail.filtered += skipped.filtered
            tail.expired += skipped.expired
            tail.quarantined += skipped.quarantined
            tail.last = max(tail.last, skipped.last)
        else:
            self._advance(lane, skipped)

    def _advance(self, lane: int, done: Flight) -> None:
        counts = self.counts
        counts.custody += done.custody
        counts.filtered += done.filtered
        counts.expired += done.expired
        counts.quarantined += done.quarantined
        if self.durable:
            self._store.advance(
                self.name,
                lane,
                done.last,
                custody=done.custody,
                filtered=done.filtered,
                expired=done.expired,
                quarantined=done.quarantined,
            )
        if self._on_custody is not None:
            self._on_custody(lane, done.last)

    def on_receipt(self, link: Link, lane: int, custody: int) -> None:
        """The peer has everything below place *custody* of this lane, on *link*, in custody (promise 1, R-10-36)."""
        state = self._lanes.get(lane)
        if state is None or state.link is not link:
            return
        flights, done = state.flights, None
        while flights and flights[0].place < custody:
            flight = flights.popleft()
            if done is not None:
                _absorb(flight, done)
            done = flight
        if done is not None:
            self._advance(lane, done)

    def on_refused(
        self, link: Link, lane: int, place: int, code: int, retry_after: float, reason: str
    ) -> None:
        """The peer refused *place*: go back to it (promise 2). *retry_after* in seconds (R-10-39).

        Places after it are forgotten: their records go out again and a receipt for the old places means nothing.
        """
        state = self._lanes.get(lane)
        if state is None or state.link is not link:
            return
        places = [flight.place for flight in state.flights]
        if place not in places:
            return  # forgotten by an earlier refusal, or of a memory class
        index = places.index(place)
        flight = state.flights[index]
        self.counts.refused_records += 1
        before = list(state.flights)[:index]
        self._rewind(state, flight.first)
        state.flights.extend(before)
        if code in FINAL_CODES and flight.own >= 0:
            state.set_aside.add(flight.own)
            self._set_aside(lane, flight.own, reason)
            retry_after = 0.0
        delay = max(RETRY_FLOOR, retry_after)
        state.not_before = self._now() + delay
        self._retry(self, lane, delay)

    def _set_aside(self, lane: int, pos: int, reason: str) -> None:
        """Keep a copy for the operator: `reason` names what the peer said."""
        found = self._store.cached(lane, pos, 1) or []
        record = found[0].record if found and found[0].pos == pos else b""
        self._store.quarantine(
            record, f"refused by {self.link_name}: {reason}", self.link_name, lane=lane, pos=pos
        )

    def refilter(self, filters: FilterSet) -> None:
        """Another set of filters, from the first unsent position on."""
        self.filters = filters
        self._decisions.clear()

    @property
    def link_name(self) -> str:
        return self.link.peer.node if self.link.peer is not None else "?"

    def close(self) -> None:
        """The link is gone: what was on the wire is neither lost nor counted; the cursor stands where it stood."""
        self.closed = True
        for state in self._lanes.values():
            state.flights.clear()
            state.backlog.clear()
            state.held.clear()

    def next_position(self, lane: int) -> int:
        return self._lanes[lane].next

    def in_flight(self) -> int:
        """Messages on the wire whose custody was not reported yet."""
        return sum(flight.custody for state in self._lanes.values() for flight in state.flights)


def any_topic_matches(batch: bytes, filters: FilterSet) -> bool:
    """Open *batch* once and ask for each distinct topic."""
    return any(filters.matches(topic) for topic in dict.fromkeys(open_batch(batch).topics))


def _absorb(later: Flight, earlier: Flight) -> None:
    """*later* answers for *earlier* too."""
    later.first = min(later.first, earlier.first)
    later.last = max(later.last, earlier.last)
    later.custody += earlier.custody
    later.filtered += earlier.filtered
    later.expired += earlier.expired
    later.quarantined += earlier.quarantined
