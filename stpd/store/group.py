"""What one commit makes of the records that came: adopted, taken verbatim, or known already (protocol §10).

(1) Items are decided in the order they came. What one commit brings from publishers becomes as few records per
    lane as hold them, under the store's own source; another keeper's record goes in verbatim.
(2) A number is remembered, counted and stored by the same transaction, or not at all.
(3) An outcome says REPEAT only if what it repeats is in the log at or below its `pos`, or was before trimming.
"""

from __future__ import annotations

from typing import Final

from attrs import Factory, define

from stp.records import DATA, MAX_BATCHES, MAX_RECORD, VOID, regroup
from stp.topics import MAX_TOPIC
from stpd.store.base import Append, Outcome, OutcomeKind, Stored
from stpd.store.log import Log
from stpd.store.rows import INSERT, LANE_SHIFT, Row, make_row, to_column
from stpd.store.seen import Key, covers, room_for
from stpd.store.tally import (
    ACCEPTED,
    NODE_ACCEPTED,
    NODE_STORED,
    ORIGINATED,
    RECEIVED,
    REFUSED,
    REPEATS,
    Tally,
)

GROUPED_HEAD: Final = 34 + MAX_TOPIC + 4
"""Bytes of a grouped record beside its batches, at most."""

STORED: Final = OutcomeKind.STORED
REPEAT: Final = OutcomeKind.REPEAT  # R-10-21
CONFLICT: Final = OutcomeKind.CONFLICT
RANGES: Final = OutcomeKind.RANGES


@define
class _Adopting:
    """Publishers' records of one lane on their way into one record."""

    outcome: Outcome
    records: list[bytes] = Factory(list)
    size: int = GROUPED_HEAD
    batches: int = 0
    messages: int = 0
    peer: str = ""


class Group:
    """The records of one commit. Made for it, used once, by the writer thread."""

    def __init__(self, log: Log, own_source: bytes, at_ms: int) -> None:
        self._log = log
        self._own = own_source
        self._at_ms = at_ms
        self._adopting: dict[int, _Adopting] = {}
        self._at_last: dict[tuple[int, OutcomeKind], Outcome] = {}
        self._rows: list[Row] = []
        self._crcs: dict[tuple[Key, int], int] = {}
        self.stored: list[Stored] = []
        self.tally = Tally()
        self.repeats = 0
        self.conflicts = 0
        self.ranges = 0
        self.sources = 0
        """Records from publishers: each may touch another row of what is remembered."""

    def decide(self, items: list[Append]) -> list[tuple[Append, Outcome]]:
        """Decide all items and insert their rows. Outcomes are final when this returns."""
        decided = []
        for item in items:
            outcome = self._adopt(item) if item.adopt else self._take(item)
            self._count(item, outcome.kind)
            decided.append((item, outcome))
        for lane in list(self._adopting):
            self._close(lane)
        for (lane, _), outcome in self._at_last.items():
            outcome.pos = self._log.peek(lane).last
        if self._rows:
            self._log.conn.executemany(INSERT, self._rows)
            self._rows = []  # the records themselves live on in `stored`
        return decided

    # -- publishers -----------------------------------------------------------------------------------------

    def _adopt(self, item: Append) -> Outcome:
        """R-10-18."""
        head = item.head
        entry = self._log.seen.publisher((head.source, item.lane))
        if head.to <= entry.highest:
            if head.kind != VOID and entry.differs(head.number, head.crc):
                return self._refused(CONFLICT)
            return self._at_end(item.lane, REPEAT)
        if head.kind == VOID:
            entry.highest = head.to
            return self._at_end(item.lane, STORED)
        entry.took(head.number, head.crc)
        self.sources += 1
        adopting = self._adopting.get(item.lane)
        if adopting is not None and (
            adopting.size + head.body_end > MAX_RECORD or adopting.batches + head.batches > MAX_BATCHES
        ):
            self._close(item.lane)
            adopting = None
        if adopting is None:
            adopting = self._adopting[item.lane] = _Adopting(Outcome(STORED, 0), peer=item.peer)
        adopting.records.append(item.record)
        adopting.size += head.body_end
        adopting.batches += head.batches
        adopting.messages += head.messages
        if adopting.peer != item.peer:
            adopting.peer = ""
        return adopting.outcome

    def _close(self, lane: int) -> None:
        """Number what is gathered and add it to the log."""
        adopting = self._adopting.pop(lane)
        state = self._log.lane(lane)
        state.number += 1
        record = regroup(lane, self._own, state.number, adopting.records)
        crc, prefix = _crc_and_prefix(record)
        adopting.outcome.pos = self._insert(
            lane, self._own, state.number, state.number, DATA, prefix, adopting.messages, record, adopting.peer,
            crc, True,
        )  # fmt: skip

    # -- other keepers --------------------------------------------------------------------------------------

    def _take(self, item: Append) -> Outcome:
        """R-10-20."""
        head = item.head
        key = (head.source, item.lane)
        ranges = self._log.seen.keeper(key)
        if head.kind == VOID:
            if covers(ranges, head.number, head.to + 1):
                return self._at_end(item.lane, REPEAT)
        elif head.number in ranges:
            if self._known_crc(key, head.number) not in (None, head.crc):
                return self._refused(CONFLICT)
            return self._at_end(item.lane, REPEAT)
        if not room_for(ranges, head.number, head.to + 1):
            return self._refused(RANGES)
        ranges.add(head.number, head.to + 1)
        messages = 0 if head.kind == VOID else head.messages
        if head.kind != VOID:
            self._crcs[key, head.number] = head.crc
        pos = self._insert(
            item.lane, head.source, head.number, head.to, head.kind, head.prefix, messages, item.record, item.peer,
            head.crc, False,
        )  # fmt: skip
        return Outcome(STORED, pos)

    def _known_crc(self, key: Key, number: int) -> int | None:
        """CRC of the record with that number, if it is in the log (or on its way) and no void (R-10-22)."""
        known = self._crcs.get((key, number))
        if known is not None:
            return known
        for row_id, kind, crc in self._log.conn.execute(
            "SELECT id, kind, crc FROM record WHERE adopted = 0 AND source = ? AND number = ?",
            (key[0], to_column(number)),
        ):
            if row_id >> LANE_SHIFT == key[1] and kind != VOID:
                return int(crc)
        return None

    # -- both -----------------------------------------------------------------------------------------------

    def _insert(
        self,
        lane: int,
        source: bytes,
        number: int,
        to: int,
        kind: int,
        prefix: str,
        messages: int,
        record: bytes,
        peer: str,
        crc: int,
        adopted: bool,
    ) -> int:
        state = self._log.lane(lane)
        state.last += 1
        state.messages += messages
        state.bytes += len(record)
        if not state.oldest_ms:
            state.oldest_ms = self._at_ms
        stored = Stored(
            lane, state.last, source, number, to, kind, prefix, messages, record, self._at_ms, 0.0, peer,
            state.messages,
        )  # fmt: skip
        self.stored.append(stored)
        self._rows.append(make_row(stored, adopted, state.bytes, crc))
        return state.last

    def _at_end(self, lane: int, kind: OutcomeKind) -> Outcome:
        """One outcome for all that need only know where the lane stands after this commit."""
        outcome = self._at_last.get((lane, kind))
        if outcome is None:
            outcome = self._at_last[lane, kind] = Outcome(kind, 0)
        return outcome

    def _refused(self, kind: OutcomeKind) -> Outcome:
        return Outcome(kind, 0)

    def _count(self, item: Append, kind: OutcomeKind) -> None:
        head = item.head
        if kind is REPEAT:
            self.repeats += 1
        elif kind is CONFLICT:
            self.conflicts += 1
        elif kind is RANGES:
            self.ranges += 1
        if head.kind == VOID:
            return
        messages = head.messages
        if item.peer:
            door = self.tally.door(item.peer, item.class_name)
            door[RECEIVED] += messages
            door[_DOOR_PLACE[kind]] += messages
        if kind is STORED:
            node = self.tally.node(item.class_name)
            node[NODE_ACCEPTED if item.peer else ORIGINATED] += messages
            node[NODE_STORED] += messages


_DOOR_PLACE: Final = {STORED: ACCEPTED, REPEAT: REPEATS, CONFLICT: REFUSED, RANGES: REFUSED}


def _crc_and_prefix(record: bytes) -> tuple[int, str]:
    """Of a record without hops that regroup() has just made."""
    prefix_len = int.from_bytes(record[32:34], "big")
    crc = int.from_bytes(record[len(record) - 9 : len(record) - 5], "big")
    return crc, record[34 : 34 + prefix_len].decode()
