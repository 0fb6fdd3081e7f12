"""What a link remembers of one lane: places, receipts, credit, the order after a refusal (protocol §7, §10).

(1) A place is settled once: kept, in custody or refused. `kept` and `custody` count them without a gap.
(2) Credit is what was taken (settled records) plus the one incomplete record. It never falls.
(3) After a refusal of (source, number) later numbers of that source are refused too, and then accepted only
    in sequence, a void counting for all it covers, until every number that was refused has come again.
"""

from __future__ import annotations

from collections import deque
from typing import Final

from attrs import Factory, define

from stp.control import MAX_RANGES, Receipt
from stp.core.errors import UsageError
from stp.core.ranges import RangeSet
from stp.records import RecordCutter, RecordHead, RefusedCode

LANES: Final = range(1, 5)
"""Lane numbers: 1 command, 2 event, 3 telemetry, 4 bulk (protocol §10)."""

LANE_NAMES: Final = {1: "command", 2: "event", 3: "telemetry", 4: "bulk"}

OPENING_BYTES: Final = 2
"""Stream bytes before the first record of a lane: the kind and the lane."""


def all_below(places: RangeSet) -> int:
    """The lowest place that is not in the set: what RECEIPT counts."""
    if not places:
        return 0
    start, stop = places.first()
    return 0 if start else stop


@define
class Outgoing:
    """A lane we send on. `sent` counts records, so it is also the next place."""

    lane: int
    stream: int
    sent: int = 0
    kept: int = 0
    """Places that the peer's receipts have settled."""


@define
class Unsettled:
    """A record that the owner has and has not answered."""

    size: int
    head: RecordHead


@define
class Incoming:
    """A lane the peer sends on (R-7-3)."""

    lane: int
    stream: int
    cutter: RecordCutter
    place: int = 0
    """The next record's place."""
    cut: int = OPENING_BYTES
    """Stream bytes up to the end of the last complete record."""
    taken: int = OPENING_BYTES
    """Stream bytes of settled records: what credit is given for."""
    open: dict[int, Unsettled] = Factory(dict)
    kept: RangeSet = Factory(RangeSet)
    custody: RangeSet = Factory(RangeSet)
    held: deque[bytes] = Factory(deque)
    """Records behind one of an unknown source, in order, without credit."""
    held_since: float = 0.0
    record_since: float | None = None
    """When the incomplete record's first byte came, or when credit for it returned."""
    dirty: bool = False
    receipted: Receipt | None = None

    def settle(self, place: int, *, custody: bool) -> RecordHead:
        """Take a place from the open ones. UsageError: it was answered before or never given out."""
        entry = self.open.pop(place, None)
        if entry is None:
            raise UsageError(f"place {place} of lane {self.lane} is not open: answer a record once")
        self.taken += entry.size
        self.kept.add(place)
        if custody:
            self.custody.add(place)
        self.dirty = True
        return entry.head

    def refused_unseen(self, size: int) -> int:
        """Use up a place for a record that the owner never sees; returns the place."""
        place = self.place
        self.place += 1
        self.taken += size
        self.kept.add(place)
        self.custody.add(place)
        self.dirty = True
        return place

    def receipt(self) -> Receipt | None:
        """The RECEIPT to send, or None when nothing changed since the last (R-10-35)."""
        custody = all_below(self.custody)
        beyond = self.custody.pairs()[1 if custody else 0 :][:MAX_RANGES]
        receipt = Receipt(self.lane, all_below(self.kept), custody, beyond)
        if receipt == self.receipted:
            return None
        if self.receipted is None and not receipt.kept and not beyond:
            return None
        self.receipted = receipt
        return receipt

    @property
    def unsettled_bytes(self) -> int:
        """Bytes of complete records for which no credit has gone back."""
        return self.cut - self.taken


@define
class Refusal:
    """The order kept for one (lane, source) after a refusal; see (3)."""

    next: int
    """The lowest refused number that has not come again."""
    last: int
    """The highest number refused."""
    code: RefusedCode


class Refusals:
    """Rule (3), for all sources of a session (R-10-38)."""

    __slots__ = ("_by_source",)

    def __init__(self) -> None:
        self._by_source: dict[tuple[int, bytes], Refusal] = {}

    def __len__(self) -> int:
        return len(self._by_source)

    def refused(self, lane: int, source: bytes, number: int, to: int, code: RefusedCode) -> None:
        """Remember that numbers number..to were refused."""
        state = self._by_source.get((lane, source))
        if state is None:
            self._by_source[(lane, source)] = Refusal(number, to, code)
        else:
            state.next = min(state.next, number)
            state.last = max(state.last, to)

    def in_the_way(self, lane: int, source: bytes, number: int) -> RefusedCode | None:
        """The code with which this number must be refused because an earlier one was, else None."""
        state = self._by_source.get((lane, source))
        return state.code if state is not None and number > state.next else None

    def came(self, lane: int, source: bytes, number: int, to: int) -> None:
        """Numbers number..to are with the owner (again): the next one may come."""
        state = self._by_source.get((lane, source))
        if state is not None and number <= state.next <= to:
            state.next = to + 1
            if state.next > state.last:
                del self._by_source[(lane, source)]
