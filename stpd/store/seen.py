"""What is remembered about numbers, so that a repeat is never stored twice (promise 2 of base, protocol §10).

A publisher's numbers are remembered as the highest per (source, lane), with the CRCs of the last ones; another
keeper's as ranges. The tables hold the truth; the dictionaries hold what was used lately. A commit stages its
changes and either all of them are kept (`keep`) or none (`drop`).
"""

from __future__ import annotations

import sqlite3
import struct
from typing import Final, TypeVar

from attrs import Factory, define

from stp.core.ranges import RangeSet
from stpd.store.base import FORGET_AFTER, MAX_RANGES
from stpd.store.redo import KEEPER, PUBLISHER, Redo
from stpd.store.rows import from_column, to_column

CACHED_PUBLISHERS: Final = 65_536
"""Entries held in memory; the oldest half goes when there are more. A miss costs one SELECT."""
CACHED_KEEPERS: Final = 4_096
RECENT_CRCS: Final = 64
"""CRCs of a publisher's last records held in memory, against the same number with other bytes. Only the last
one's is on disk: a repeat of an older one after a restart is taken for what its number says."""

Key = tuple[bytes, int]
"""(source, lane)"""

Entry = TypeVar("Entry")


@define
class Publisher:
    id: int
    highest: int
    crcs: dict[int, int] = Factory(dict)
    """Number → CRC of its last records, RECENT_CRCS at most."""

    def copy(self) -> Publisher:
        return Publisher(self.id, self.highest, dict(self.crcs))

    def took(self, number: int, crc: int) -> None:
        """The record is on its way into the log."""
        self.highest = number
        crcs = self.crcs
        crcs[number] = crc
        if len(crcs) > RECENT_CRCS:
            del crcs[next(iter(crcs))]

    def differs(self, number: int, crc: int) -> bool:
        """Is the number known with other bytes?"""
        return self.crcs.get(number, crc) != crc


class SeenNumbers:
    """Used by the writer thread, between BEGIN and COMMIT."""

    def __init__(self, conn: sqlite3.Connection) -> None:
        self._conn = conn
        self._publishers: dict[Key, Publisher] = {}
        self._keepers: dict[Key, RangeSet] = {}
        self._staged_publishers: dict[Key, Publisher] = {}
        self._staged_keepers: dict[Key, RangeSet] = {}
        self._next_id = self._first_free_id()

    def _first_free_id(self) -> int:
        return int(self._conn.execute("SELECT coalesce(max(id), 0) + 1 FROM publisher").fetchone()[0])

    def publisher(self, key: Key) -> Publisher:
        """The entry to change in this commit; a new one (highest 0) for a source never seen."""
        staged = self._staged_publishers.get(key)
        if staged is not None:
            return staged
        known = self._publishers.get(key)
        if known is not None:
            staged = known.copy()
        else:
            found = self._conn.execute(
                "SELECT id, highest, crc FROM publisher WHERE source = ? AND lane = ?", key
            ).fetchone()
            if found is None:
                staged = Publisher(self._next_id, 0)
                self._next_id += 1
            else:
                highest = from_column(found[1])
                staged = Publisher(found[0], highest, {} if found[2] is None else {highest: found[2]})
        self._staged_publishers[key] = staged
        return staged

    def keeper(self, key: Key) -> RangeSet:
        """The ranges to change in this commit."""
        staged = self._staged_keepers.get(key)
        if staged is not None:
            return staged
        known = self._keepers.get(key)
        if known is None:
            found = self._conn.execute(
                "SELECT ranges FROM keeper WHERE source = ? AND lane = ?", key
            ).fetchone()
            known = RangeSet() if found is None else unpack_ranges(found[0])
        staged = RangeSet(known.pairs())
        self._staged_keepers[key] = staged
        return staged

    def write(self, redo: Redo, seen: int) -> None:
        """Write what is staged; `seen` is the store's running time in seconds."""
        if self._staged_publishers:
            redo.put(
                PUBLISHER,
                [
                    (entry.id, source, lane, to_column(entry.highest), entry.crcs.get(entry.highest), seen)
                    for (source, lane), entry in self._staged_publishers.items()
                ],
            )
        if self._staged_keepers:
            redo.put(
                KEEPER,
                [
                    (source, lane, pack_ranges(ranges), seen)
                    for (source, lane), ranges in self._staged_keepers.items()
                ],
            )

    @property
    def crowded(self) -> bool:
        """Are the caches full, so that the next commit should be one that `keep` is told of as `folded`?"""
        return len(self._publishers) >= CACHED_PUBLISHERS or len(self._keepers) >= CACHED_KEEPERS

    def keep(self, *, folded: bool) -> None:
        """The transaction is committed. What the tables do not have yet, not `folded`, must not leave the caches."""
        self._publishers.update(self._staged_publishers)
        self._keepers.update(self._staged_keepers)
        if folded:
            _shrink(self._publishers, CACHED_PUBLISHERS)
            _shrink(self._keepers, CACHED_KEEPERS)
        self._staged_publishers = {}
        self._staged_keepers = {}

    def drop(self) -> None:
        """The transaction was rolled back."""
        self._staged_publishers = {}
        self._staged_keepers = {}
        # the ids given to new sources stay unused: an id is given once, whatever became of it

    def forget(self, seen: int) -> int:
        """Forget publishers whose last record is FORGET_AFTER ago; how many. Inside a transaction of its own.

        R-10-19.
        """
        limit = seen - int(FORGET_AFTER)
        if limit <= 0:
            return 0
        gone = self._conn.execute("DELETE FROM publisher WHERE seen < ?", (limit,)).rowcount
        self._publishers = {}  # the tables know better now
        return gone

    def forget_origins(self, seen: int) -> list[bytes]:
        """Forget whose the sources were that are remembered nowhere else; which they are."""
        limit = seen - int(FORGET_AFTER)
        if limit <= 0:
            return []
        found = self._conn.execute(
            "DELETE FROM origin WHERE seen < ? AND source NOT IN (SELECT source FROM publisher)"
            " AND source NOT IN (SELECT source FROM keeper) RETURNING source",
            (limit,),
        ).fetchall()
        return [row[0] for row in found]


def _shrink(cache: dict[Key, Entry], limit: int) -> None:
    if len(cache) > limit:
        for key in list(cache)[: limit // 2]:
            del cache[key]


def pack_ranges(ranges: RangeSet) -> bytes:
    """Inclusive pairs of u64: the last number of all has no successor in 64 bits."""
    pairs = [(start, stop - 1) for start, stop in ranges.pairs()]
    return struct.pack(f"!{2 * len(pairs)}Q", *(number for pair in pairs for number in pair))


def unpack_ranges(data: bytes) -> RangeSet:
    numbers = struct.unpack(f"!{len(data) // 8}Q", data)
    return RangeSet((numbers[n], numbers[n + 1] + 1) for n in range(0, len(numbers), 2))


def room_for(ranges: RangeSet, start: int, stop: int) -> bool:
    """May start..stop-1 be added without exceeding MAX_RANGES? Only a full set is looked at closely."""
    if len(ranges) < MAX_RANGES:
        return True
    grown = RangeSet(ranges.pairs())
    grown.add(start, stop)
    return len(grown) <= MAX_RANGES


def covers(ranges: RangeSet, start: int, stop: int) -> bool:
    """Are all of start..stop-1 in it?"""
    return any(low <= start and stop <= high for low, high in ranges.pairs()) if start in ranges else False
