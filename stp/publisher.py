"""The publishing half of a client: messages into batches, by class; batches into lanes (protocol §10). Sans-IO.

(1) Messages of one class and order of calls leave in that order, whatever is refused or sent again.
(2) A batch leaves at once while nothing of its class is in flight; else when its linger is over, when it holds
    BATCH_BYTES, or when what was in flight is answered.
(3) Memory is bounded per lane: `room` says whether a caller must wait. A lane that stands still stops no other.
(4) A message above MAX_MESSAGE is refused before anything is sent.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Final

from attrs import Factory, define, evolve

from stp.batch import MAX_BATCH, MAX_MESSAGE, Properties, encode_batch
from stp.control import ClassRule
from stp.core.errors import StpError, UsageError
from stp.lanes import LANE_NAMES, LANES
from stp.link import Link
from stp.outbox import Claim, Group, Outbox, OutboxStatistics, Refused, Ticket
from stp.topics import FilterSet, check_topic

BATCH_BYTES: Final = 64 * 1024
"""Payload and topic bytes at which a batch leaves."""
BATCH_MESSAGES: Final = 4_096
LINGER: Final = 0.02
"""Seconds that telemetry and bulk may wait for company, where the keeper's HELLO names no classes."""
MEMORY: Final = 8 * 1024 * 1024
"""Bytes of messages that are not kept yet, in all lanes."""
LANE_SHARES: Final = {1: 1 / 8, 2: 1 / 8, 3: 1 / 2, 4: 1 / 4}
"""Of the memory. A lane that is empty takes one message of any size."""
MAX_ALONE: Final = MAX_BATCH - 1024
"""Bytes of payload, properties and topic that one message may have: the rest is the batch's own."""
MESSAGE_OVERHEAD: Final = 64
"""Bytes counted for each waiting message beside topic and payload."""
TOPIC_MEMO: Final = 16_384
"""Topics whose class is remembered; then the memory is emptied and fills again."""
LONERS: Final = 1_024
"""Topics that were denied and are batched alone from then on."""


class MessageTooLarge(StpError, ValueError):  # noqa: N818 - named for what it says of the message
    """The payload exceeds MAX_MESSAGE bytes. Nothing was sent."""


@define(eq=False)
class Waiting:
    """A class, and the messages of it that are not in a batch yet."""

    name: str
    lane: int
    linger: float
    filters: FilterSet
    group: Group = Factory(Group)
    topics: list[str] = Factory(list)
    payloads: list[bytes] = Factory(list)
    times: list[int] = Factory(list)
    properties: list[Properties | None] = Factory(list)
    claims: list[Claim] = Factory(list)
    size: int = 0
    ttl_ms: int = 0
    tombstones: bool = False
    any_properties: bool = False
    deadline: float | None = None


DEFAULT_CLASSES: Final = (
    ClassRule("command", ("$inbox/#", "cmd/#", "+/cmd/#"), 1),
    ClassRule("event", ("event/#", "+/event/#"), 2),
    ClassRule("bulk", ("bulk/#", "+/bulk/#"), 4, linger_ms=20),
    ClassRule("telemetry", ("#",), 3, linger_ms=20),
)
"""How messages are sorted where the keeper's HELLO names no classes."""


class Publisher:
    """Everything one process publishes to one keeper. Calls come from one thread; `now` is monotonic seconds."""

    def __init__(
        self,
        *,
        source: bytes,
        publisher: bytes,
        run: int,
        on_refused: Callable[[Refused, bool], None],
        memory: int = MEMORY,
        compress: bool = False,
    ) -> None:
        """`source`: 16 random bytes; `publisher`: the node's id; `run`: grows from one start to the next.

        `on_refused` hears of what was refused for good, and whether somebody awaits it.
        """
        self._publisher = publisher
        self._run = run
        self._sequence = 0
        self._compress = compress
        self._limits = {lane: int(memory * share) for lane, share in LANE_SHARES.items()}
        self._outboxes = {lane: Outbox(lane, source, on_refused, self._denied) for lane in LANES}
        self._held = dict.fromkeys(LANES, 0)
        """Bytes that wait in no batch yet, by lane."""
        self._rules: list[ClassRule] = []
        self._classes: list[Waiting] = []
        self._fallback = Waiting("telemetry", 3, LINGER, FilterSet(("#",)))
        self._by_topic: dict[str, Waiting] = {}
        self._loners: set[str] = set()
        self._linked = False
        self.due = math.inf
        """Not later than the next `handle_timeout` is due; cheap to look at, unlike `next_timeout`."""
        self.sort_by(DEFAULT_CLASSES)

    # -- the session -------------------------------------------------------------------------------------

    def sort_by(self, rules: Sequence[ClassRule]) -> None:
        """The classes of the keeper's HELLO, first match first. What waits goes by the old ones.

        Raises TopicError for a filter that is none; then the old rules stand.
        """
        if list(rules) == self._rules:
            return
        classes = [Waiting(one.name, one.lane, one.linger_ms / 1000, FilterSet(one.filters)) for one in rules]
        for waiting in self._all():
            self._close_batch(waiting)
        self._rules, self._classes = list(rules), classes
        self._by_topic.clear()

    def attach(self, link: Link, now: float) -> None:
        """A session is up: send what is unanswered again, then what has waited."""
        self._linked = True
        for outbox in self._outboxes.values():
            outbox.attach(link)
        for waiting in self._all():
            self._close_batch(waiting)
        self._pump(now)
        self.next_timeout()

    def move(self, link: Link, now: float) -> None:
        """A session beside the present one is up: each lane goes on there when what it sent here is answered."""
        self._linked = True
        for outbox in self._outboxes.values():
            outbox.move(link)
        self._pump(now)

    def on(self, link: Link) -> bool:
        """Is there a lane that still waits for answers on this session?"""
        return any(outbox.link is link for outbox in self._outboxes.values())

    def lost(self, link: Link, now: float) -> None:
        """The session that another continues is gone: what is unanswered goes to that one."""
        for outbox in self._outboxes.values():
            outbox.lost(link)
        self._pump(now)

    def detach(self) -> None:
        """The session is gone."""
        self._linked = False
        for outbox in self._outboxes.values():
            outbox.detach()

    # -- messages in -------------------------------------------------------------------------------------

    def lane_of(self, topic: str) -> int:
        """The lane that this topic's class travels on (R-10-2)."""
        return self._class_of(topic).lane

    def room(self, lane: int, size: int) -> bool:
        """May `size` more bytes wait on this lane? An empty lane takes any message."""
        used = self._held[lane] + self._outboxes[lane].stats.used
        return not used or used + size + MESSAGE_OVERHEAD <= self._limits[lane]

    def add(
        self,
        topic: str,
        payload: bytes,
        *,
        now: float,
        time_ms: int,
        ttl_ms: int = 0,
        properties: Properties | None = None,
        tombstone: bool = False,
        ticket: Ticket | None = None,
        more: bool = False,
    ) -> int:
        """Take one message; the lane it is on. `more`: others follow at once, so let it wait for them.

        Raises MessageTooLarge, TopicError.
        """
        waiting = self._by_topic.get(topic) or self._class_of(topic)
        size = len(topic) + len(payload)
        if properties is not None:
            size += len(properties.encode())
        if len(payload) > MAX_MESSAGE or size > MAX_ALONE:
            raise MessageTooLarge(f"a message of {len(payload)} bytes on {topic}; at most {MAX_MESSAGE}")
        if waiting.topics and not self._fits(waiting, topic, size, ttl_ms, tombstone):
            self._close_batch(waiting)
            self._outboxes[waiting.lane].pump(now)
        if not waiting.topics:
            waiting.ttl_ms, waiting.tombstones = ttl_ms, tombstone
            waiting.deadline = now + waiting.linger
        if ticket is not None:
            self._claim(waiting, ticket)
        waiting.topics.append(topic)
        waiting.payloads.append(payload)
        waiting.times.append(time_ms)
        waiting.properties.append(properties)
        if properties is not None:
            waiting.any_properties = True
        waiting.size += size
        self._held[waiting.lane] += size + MESSAGE_OVERHEAD
        if not more:
            self._leave_if_due(waiting, now)
        return waiting.lane

    def add_batch(
        self,
        topics: Sequence[str],
        payloads: Sequence[bytes],
        *,
        now: float,
        time_ms: int,
        ttl_ms: int = 0,
        ticket: Ticket | None = None,
    ) -> int:
        """Take one batch as it is; the lane it is on. What waits of its class leaves first.

        Raises MessageTooLarge, TopicError, and UsageError for what makes no batch of one class.
        """
        classes = {self._class_of(topic) for topic in set(topics)}
        if len(classes) != 1:
            raise UsageError(f"a batch is of one class, not of {len(classes)}")
        waiting = classes.pop()
        if max(map(len, payloads), default=0) > MAX_MESSAGE:
            raise MessageTooLarge(f"a message is above {MAX_MESSAGE} bytes")
        batch = self._encode(topics, payloads, time_ms, ttl_ms)
        self._close_batch(waiting)
        claims = []
        if ticket is not None:
            ticket.add()
            claims.append(Claim(0, len(topics), ticket))
        outbox = self._outboxes[waiting.lane]
        outbox.add(batch, len(topics), topics[0], claims, waiting.group)
        outbox.pump(now)
        return waiting.lane

    def _encode(self, topics: Sequence[str], payloads: Sequence[bytes], time_ms: int, ttl_ms: int) -> bytes:
        batch = encode_batch(
            topics,
            payloads,
            time_ms=time_ms,
            ttl_ms=ttl_ms,
            publisher=self._publisher,
            run=self._run,
            sequence=self._sequence + 1,
            compress=self._compress,
        )
        self._sequence += 1
        return batch

    def flush(self, now: float) -> None:
        """Let everything leave that may: after a run of `add(more=True)`."""
        for waiting in self._all():
            if waiting.topics:
                self._leave_if_due(waiting, now)

    def _class_of(self, topic: str) -> Waiting:
        known = self._by_topic.get(topic)
        if known is None:
            check_topic(topic)
            matching = (one for one in self._classes if one.filters.matches(topic))
            known = next(matching, self._fallback)
            if len(self._by_topic) >= TOPIC_MEMO:
                self._by_topic.clear()
            self._by_topic[topic] = known
        return known

    def _fits(self, waiting: Waiting, topic: str, size: int, ttl_ms: int, tombstone: bool) -> bool:
        """May this message join the batch that waits?"""
        if waiting.size + size > BATCH_BYTES or len(waiting.topics) >= BATCH_MESSAGES:
            return False
        if waiting.ttl_ms != ttl_ms or waiting.tombstones != tombstone:
            return False
        first = waiting.topics[0]
        return first == topic or not (topic in self._loners or first in self._loners)

    @staticmethod
    def _claim(waiting: Waiting, ticket: Ticket) -> None:
        """The ticket answers for the message that is added next."""
        at = len(waiting.topics)
        if waiting.claims and waiting.claims[-1].ticket is ticket and waiting.claims[-1].stop == at:
            waiting.claims[-1].stop = at + 1
            return
        waiting.claims.append(Claim(at, at + 1, ticket))
        ticket.add()

    # -- batches out -------------------------------------------------------------------------------------

    def _leave_if_due(self, waiting: Waiting, now: float) -> None:
        """(2). Without a session messages gather: a batch of one per message would fill the memory."""
        full = waiting.size >= BATCH_BYTES or len(waiting.topics) >= BATCH_MESSAGES
        idle = not waiting.group.in_flight or not waiting.linger
        late = waiting.deadline is not None and now >= waiting.deadline
        if full or (self._linked and (idle or late)):
            self._close_batch(waiting)
            self._outboxes[waiting.lane].pump(now)
        elif self._linked and waiting.deadline is not None and waiting.deadline < self.due:
            self.due = waiting.deadline

    def _close_batch(self, waiting: Waiting) -> None:
        """Make a batch of what waits, and a record of the batch."""
        if not waiting.topics:
            return
        self._sequence += 1
        times = waiting.times
        batch = encode_batch(
            waiting.topics,
            waiting.payloads,
            time_ms=times[0],
            ttl_ms=waiting.ttl_ms,
            publisher=self._publisher,
            run=self._run,
            sequence=self._sequence,
            times=times if times.count(times[0]) != len(times) else None,
            properties=waiting.properties if waiting.any_properties else None,
            compress=self._compress and waiting.size >= 1024,
            tombstones=waiting.tombstones,
        )
        outbox = self._outboxes[waiting.lane]
        outbox.add(batch, len(waiting.topics), waiting.topics[0], waiting.claims, waiting.group)
        self._held[waiting.lane] -= waiting.size + MESSAGE_OVERHEAD * len(waiting.topics)
        waiting.topics, waiting.payloads, waiting.times = [], [], []
        waiting.properties, waiting.claims = [], []
        waiting.size = 0
        waiting.any_properties = False
        waiting.deadline = None

    def _all(self) -> list[Waiting]:
        return [*self._classes, self._fallback]

    def _pump(self, now: float) -> None:
        for outbox in self._outboxes.values():
            outbox.pump(now)

    def _denied(self, topic: str) -> None:
        if len(self._loners) < LONERS:
            self._loners.add(topic)

    # -- answers and time --------------------------------------------------------------------------------

    def on_receipt(
        self,
        lane: int,
        kept: int,
        custody: int,
        ranges: list[tuple[int, int]],
        now: float,
        link: Link | None = None,
    ) -> None:
        """Places of this lane are settled at the keeper. `link`: on which session, where there may be two."""
        if link is not None and link is not self._outboxes[lane].link:
            return  # of a session that this lane has left
        self._outboxes[lane].on_receipt(kept, custody, ranges)
        self._after_answers(lane, now)

    def on_refused(
        self,
        lane: int,
        place: int,
        code: int,
        retry_after: float,
        reason: str,
        now: float,
        link: Link | None = None,
    ) -> None:
        """The record at this place was not taken; `retry_after` in seconds. `link` as in `on_receipt`."""
        outbox = self._outboxes[lane]
        if link is not None and link is not outbox.link:
            return
        outbox.on_refusal(place, code, retry_after, reason, now)
        self._after_answers(lane, now)
        if outbox.not_before:
            self.due = min(self.due, outbox.not_before)

    def on_writable(self, lane: int, now: float) -> None:
        """There is room on the lane again."""
        self._outboxes[lane].pump(now)

    def _after_answers(self, lane: int, now: float) -> None:
        for waiting in self._all():
            if waiting.lane == lane and waiting.topics and not waiting.group.in_flight:
                self._close_batch(waiting)
        self._outboxes[lane].pump(now)

    def next_timeout(self) -> float | None:
        """When `handle_timeout` is due: a linger or a pause after a refusal ends."""
        times = [outbox.next_timeout() for outbox in self._outboxes.values()]
        if self._linked:
            times += [waiting.deadline for waiting in self._all()]
        self.due = min((time for time in times if time is not None), default=math.inf)
        return self.due if self.due < math.inf else None

    def handle_timeout(self, now: float) -> None:
        if not self._linked:
            return
        for waiting in self._all():
            if waiting.deadline is not None and now >= waiting.deadline:
                self._close_batch(waiting)
        self._pump(now)

    # -- what is known -----------------------------------------------------------------------------------

    @property
    def unfinished(self) -> int:
        """Messages that are neither kept nor refused for good."""
        return sum(len(one.topics) for one in self._all()) + sum(
            outbox.stats.waiting for outbox in self._outboxes.values()
        )

    def waits_for(self, lane: int) -> str:
        """What a message on this lane waits for, for people. The session is up."""
        outbox = self._outboxes[lane]
        if outbox.not_before:
            return f"for room at the keeper, which refused ({outbox.refusal})"
        if outbox.unsent:
            return f"for credit on lane {LANE_NAMES[lane]}"
        return "for the keeper's receipt"

    def statistics(self) -> dict[str, OutboxStatistics]:
        """Counters by lane name. `waiting` and `used` include what is in no batch yet."""
        found = {}
        for lane, outbox in self._outboxes.items():
            gathering = sum(len(one.topics) for one in self._all() if one.lane == lane)
            found[LANE_NAMES[lane]] = evolve(
                outbox.stats,
                waiting=outbox.stats.waiting + gathering,
                used=outbox.stats.used + self._held[lane],
            )
        return found
