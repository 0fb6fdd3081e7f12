"""What a publisher has sent on one lane and may have to send again (protocol §10). Sans-IO.

(1) Records leave in the order of their numbers, without gaps; on a new session again from the first that is not
    answered, with the same source and numbers.
(2) After REFUSED everything from that number on is taken back and sent again, in order: nothing overtakes.
(3) A record that is refused for good is replaced by a void of its number; what it carried is named to its caller.
    A batch of several topics that is denied is halved first, until only what is denied is left.
(4) A record is deleted when it is kept; where its caller waits for custody, when it is in custody.
(5) Memory is what `used` says: bytes of records that are not deleted.
(6) Moving to a session beside the present one overtakes nothing and sends nothing twice: this lane goes on there
    when all that was sent here is answered. Only what waits for custody is sent again, and is known there.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Final

from attrs import Factory, define, field

from stp.batch import TOMBSTONES, OpenBatch, encode_batch, open_batch
from stp.core.errors import StpError
from stp.link import Link
from stp.records import RefusedCode, VoidReason, batches_of, encode_record, encode_void, read_record

FINAL_CODES: Final = frozenset(
    {
        RefusedCode.DENIED,
        RefusedCode.CORRUPT,
        RefusedCode.TOO_LARGE,
        RefusedCode.LOOP,
        RefusedCode.LATE,
        RefusedCode.CONFLICT,
    }
)
"""Refusals that waiting does not improve for a publisher."""

RETRY_FLOOR: Final = 0.05
RETRY_CEILING: Final = 5.0
"""Seconds before a refused record is sent again, where the keeper names none; doubled while nothing is kept."""

RECORD_OVERHEAD: Final = 256
"""Bytes counted for each record beside its own."""


class Refused(StpError):  # noqa: N818 - it is the keeper's answer, not a fault of this side
    """A keeper did not take what was published, or a subscription; waiting does not help.

    `code` is the RefusedCode (0 where the wire gives none), `reason` the keeper's words: where an access rule
    refused, its name. `topic` is the first topic concerned, `messages` how many messages were not taken.
    """

    def __init__(self, code: int, reason: str, topic: str = "", messages: int = 1) -> None:
        words = [word for word in (name_of_code(code) if code else "", reason) if word]
        super().__init__(": ".join([f"{topic} was refused" if topic else "refused", *words]))
        self.code = code
        self.reason = reason
        self.topic = topic
        self.messages = messages


def name_of_code(code: int) -> str:
    """DENIED and so on; the number for a code that a later version knows."""
    try:
        return RefusedCode(code).name
    except ValueError:
        return f"code {code}"


@define(eq=False)
class Ticket:
    """What one caller waits for: `pending` pieces to be kept or, with `custody`, in custody."""

    custody: bool
    wake: Callable[[], None]
    """Called once, when nothing is pending any longer."""
    pending: int = 0
    refused: Refused | None = None

    def add(self) -> None:
        self.pending += 1

    def done(self, refused: Refused | None = None) -> None:
        """One piece is answered."""
        if refused is not None:
            self.refused = refused
        self.pending -= 1
        if not self.pending:
            self.wake()


@define(eq=False)
class Claim:
    """A ticket's part of a batch: messages start ≤ index < stop."""

    start: int
    stop: int
    ticket: Ticket


@define(eq=False)
class Group:
    """What is batched together: a class. `in_flight` counts its records that are neither kept nor refused."""

    in_flight: int = 0


@define(eq=False)
class Flight:
    """One record: a batch with its number. `place` is -1 while it is not on the wire of this session."""

    number: int
    record: bytes
    messages: int
    topic: str
    claims: list[Claim]
    group: Group
    place: int = -1
    void: bool = False
    kept: bool = False
    """It was counted as kept; here still because its caller waits for custody."""
    uncertain: bool = False
    """It was sent on an earlier session, and may have been accepted there."""

    @property
    def size(self) -> int:
        return len(self.record) + RECORD_OVERHEAD

    @property
    def wants_custody(self) -> bool:
        return any(claim.ticket.custody for claim in self.claims)


@define
class OutboxStatistics:
    """Counts since the start; messages unless named otherwise. `waiting` and `used` (bytes) are gauges."""

    published: int = 0
    kept: int = 0
    refused: int = 0
    records: int = 0
    resent_records: int = 0
    refusals: int = 0
    waiting: int = 0
    used: int = 0


@define(eq=False)
class Outbox:
    """One lane of one publisher."""

    lane: int
    source: bytes
    on_refused: Callable[[Refused, bool], None]
    """Something was refused for good; True: somebody awaits its receipt, and is told."""
    on_denied_topic: Callable[[str], None]
    """Batches with this topic should carry nothing else from now on."""
    link: Link | None = None
    not_before: float = 0.0
    """Seconds (the caller's clock) before which nothing is sent, after a refusal."""
    refusal: str = ""
    """Why `not_before` was set, in words."""
    stats: OutboxStatistics = Factory(OutboxStatistics)
    _successor: Link | None = None
    """Where this lane goes on when all that was sent is answered (6)."""
    _next: int = 1
    _unsent: deque[Flight] = field(factory=deque)
    _sent: deque[Flight] = field(factory=deque)
    _awaiting: deque[Flight] = field(factory=deque)
    _backoff: float = 0.0

    # -- the owner's verbs

    def add(self, batch: bytes, messages: int, topic: str, claims: list[Claim], group: Group) -> None:
        """Number a batch and queue it. `pump` sends it. The claims' tickets count it already (R-10-17)."""
        record = encode_record(self.lane, self.source, self._next, [batch])
        flight = Flight(self._next, record, messages, topic, claims, group)
        group.in_flight += 1
        self._next += 1
        self._unsent.append(flight)
        self.stats.published += messages
        self.stats.records += 1
        self.stats.waiting += messages
        self.stats.used += flight.size

    def attach(self, link: Link) -> None:
        """A new session: everything unanswered is sent again, from its first number on."""
        self.detach()
        self.link = link

    def move(self, link: Link) -> None:
        """A session beside the present one is up: (6). Without a present one, as `attach`."""
        if self.link is None:
            self.attach(link)
            return
        self._successor = link
        self._cross()

    def lost(self, link: Link) -> None:
        """This session is gone, and there is another: what is unanswered goes there."""
        if link is self.link and self._successor is not None:
            self.attach(self._successor)

    def _cross(self) -> bool:
        """May this lane send? Moves it to the session that continues the present one, if it is time (6)."""
        if self._successor is None:
            return True
        if self._sent:
            return False
        pause, refusal = self.not_before, self.refusal
        self.attach(self._successor)
        self.not_before, self.refusal = pause, refusal
        return True

    def detach(self) -> None:
        """The session is gone, and what it refused for a while with it."""
        self.link = self._successor = None
        self.not_before = 0.0
        self.refusal = ""
        again = [*self._awaiting, *self._sent]
        self.stats.resent_records += len(again)
        for flight in again:
            flight.place = -1
            flight.uncertain = True
        self._unsent.extendleft(reversed(again))
        self._awaiting.clear()
        self._sent.clear()

    def pump(self, now: float) -> None:
        """Send what may be sent."""
        if self.link is None or now < self.not_before or not self._cross():
            return
        link = self.link
        self.not_before = 0.0
        self.refusal = ""
        while self._unsent and link.lane_room(self.lane) > 0:
            flight = self._unsent.popleft()
            flight.place = link.send_record(self.lane, flight.record)
            self._sent.append(flight)

    def next_timeout(self) -> float | None:
        """When `pump` should be called, because a refusal's pause is over."""
        return self.not_before or None

    @property
    def unfinished(self) -> bool:
        """Something is neither kept nor refused for good."""
        return bool(self._unsent or self._sent)

    @property
    def unsent(self) -> int:
        """Records that wait for room, or for a pause to be over."""
        return len(self._unsent)

    @property
    def on_the_way(self) -> bool:
        """Something was sent and is not answered."""
        return bool(self._sent)

    # -- answers

    def on_receipt(self, kept: int, custody: int, ranges: list[tuple[int, int]]) -> None:
        """Promise (4). Places that were refused are not here any longer when their receipt comes (R-10-37)."""
        sent, awaiting = self._sent, self._awaiting
        while sent and sent[0].place < kept:
            flight = sent.popleft()
            self._kept(flight)
            if flight.claims:
                awaiting.append(flight)
        while awaiting and awaiting[0].place < custody:
            self._in_custody(awaiting.popleft())
        if not awaiting or not ranges:
            return
        still: deque[Flight] = deque()
        for flight in awaiting:
            if any(start <= flight.place < stop for start, stop in ranges):
                self._in_custody(flight)
            else:
                still.append(flight)
        self._awaiting = still

    def _in_custody(self, flight: Flight) -> None:
        self._delete(flight)
        self._answer(flight, custody=True)

    def _kept(self, flight: Flight) -> None:
        self._backoff = 0.0
        if not flight.void and not flight.kept:
            flight.kept = True
            self.stats.waiting -= flight.messages
            self.stats.kept += flight.messages
            flight.group.in_flight -= 1
        if not flight.wants_custody:
            self._delete(flight)
        self._answer(flight, custody=False)

    def _delete(self, flight: Flight) -> None:
        self.stats.used -= flight.size

    @staticmethod
    def _answer(flight: Flight, *, custody: bool) -> None:
        """Tell those who wait for this; the others go on waiting."""
        if not flight.claims:
            return
        left = []
        for claim in flight.claims:
            if claim.ticket.custody and not custody:
                left.append(claim)
            else:
                claim.ticket.done()
        flight.claims = left

    def on_refusal(self, place: int, code: int, retry_after: float, reason: str, now: float) -> None:
        """Promises (2) and (3). `retry_after` in seconds."""
        sent = self._sent
        index = next((at for at, flight in enumerate(sent) if flight.place == place), None)
        if index is None:
            return  # it was taken back already, with an earlier one
        flight = sent[index]
        again = [sent.pop() for _ in range(len(sent) - index)]
        for one in again:
            one.place = -1
            self._unsent.appendleft(one)
        self.stats.refusals += 1
        self.stats.resent_records += len(again)
        if code in FINAL_CODES and not flight.void:
            self._give_up(flight, code, reason)
            return
        self.refusal = f"{name_of_code(code)}: {reason}" if reason else name_of_code(code)
        pause = max(retry_after or RETRY_FLOOR, self._backoff)
        self.not_before = now + pause
        self._backoff = min(pause * 2, RETRY_CEILING)

    def _give_up(self, flight: Flight, code: int, reason: str) -> None:
        """The first of `_unsent` is refused for good."""
        assert self._unsent[0] is flight
        if code == RefusedCode.DENIED and self._halve(flight):
            return
        if code == RefusedCode.DENIED:
            self.on_denied_topic(flight.topic)
        refused = Refused(code, reason, flight.topic, flight.messages)
        self.stats.waiting -= flight.messages
        self.stats.refused += flight.messages
        self.stats.used -= flight.size
        flight.record = encode_void(
            self.lane, self.source, flight.number, flight.number, VoidReason.QUARANTINED, flight.messages
        )
        flight.void = True
        self.stats.used += flight.size
        claims, flight.claims = flight.claims, []
        flight.group.in_flight -= 1
        self.on_refused(refused, bool(claims))
        for claim in claims:
            claim.ticket.done(refused)

    def _halve(self, flight: Flight) -> bool:
        """Two records for one, where several topics share a batch; what follows is numbered anew.

        Nothing after a refused number was accepted in this session, so no keeper knows the old numbers. What
        was sent on an earlier one might be known: then numbers must stand, and the batch falls as a whole.
        """
        opened = open_batch(batches_of(flight.record, read_record(flight.record))[0])
        count = len(opened.topics)
        one_topic = opened.topics.count(opened.topics[0]) == count
        if one_topic or any(other.uncertain for other in self._unsent):
            return False
        self._unsent.popleft()
        for other in self._unsent:
            self._renumber(other, other.number + 1)
        self._next += 1
        self.stats.used -= flight.size
        flight.group.in_flight += 1
        pieces = [
            self._piece(flight, opened, 0, count // 2, flight.number),
            self._piece(flight, opened, count // 2, count, flight.number + 1),
        ]
        for claim in flight.claims:
            if claim.start < count // 2 < claim.stop:
                claim.ticket.add()
        self._unsent.extendleft(reversed(pieces))
        return True

    def _piece(self, whole: Flight, opened: OpenBatch, start: int, stop: int, number: int) -> Flight:
        head = opened.head
        times, properties = opened.times_ms[start:stop], opened.properties[start:stop]
        batch = encode_batch(
            opened.topics[start:stop],
            opened.payloads[start:stop],
            time_ms=times[0],
            ttl_ms=head.ttl_ms,
            publisher=head.publisher,
            run=head.run,
            sequence=head.sequence,
            times=times if any(time != times[0] for time in times) else None,
            properties=properties if any(properties) else None,
            tombstones=bool(head.flags & TOMBSTONES),
        )
        claims = [
            Claim(max(claim.start, start) - start, min(claim.stop, stop) - start, claim.ticket)
            for claim in whole.claims
            if claim.start < stop and claim.stop > start
        ]
        record = encode_record(self.lane, self.source, number, [batch])
        piece = Flight(number, record, stop - start, opened.topics[start], claims, whole.group)
        self.stats.used += piece.size
        return piece

    def _renumber(self, flight: Flight, number: int) -> None:
        flight.number = number
        if flight.void:
            flight.record = encode_void(
                self.lane, self.source, number, number, VoidReason.QUARANTINED, flight.messages
            )
        else:
            batches = batches_of(flight.record, read_record(flight.record))
            flight.record = encode_record(self.lane, self.source, number, batches)
