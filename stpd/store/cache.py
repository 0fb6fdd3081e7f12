"""The newest records of every lane in memory, so that who is level never waits for the disk.

(1) Only committed records are in it, without gaps, up to the lane's last.
(2) It holds at most `limit` bytes over all lanes; the lane that holds most gives up its oldest first.
"""

from __future__ import annotations

from typing import Final

from attrs import Factory, define

from stpd.store.base import Stored

OVERHEAD: Final = 400
"""Bytes that a record costs in memory beyond its own."""


@define
class _Lane:
    start: int = 1
    """Position of the oldest record held; end + 1 if none is."""
    end: int = 0
    size: int = 0
    records: dict[int, Stored] = Factory(dict)


class RecordCache:
    """Used by the trio thread only."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._lanes: dict[int, _Lane] = {}
        self.size = 0

    def __len__(self) -> int:
        return sum(len(lane.records) for lane in self._lanes.values())

    def level(self, lane: int, last: int) -> None:
        """Tell where a lane stands before anything is added."""
        self._lanes[lane] = _Lane(last + 1, last)

    def add(self, stored: Stored) -> None:
        """The next record of its lane."""
        lane = self._lanes[stored.lane]
        cost = len(stored.record) + OVERHEAD
        lane.records[stored.pos] = stored
        lane.end = stored.pos
        lane.size += cost
        self.size += cost
        if self.size > self._limit:
            self._shrink()

    def _shrink(self) -> None:
        while self.size > self._limit:
            lane = max(self._lanes.values(), key=_size)
            if not lane.records:
                return
            gone = lane.records.pop(lane.start)
            lane.start += 1
            cost = len(gone.record) + OVERHEAD
            lane.size -= cost
            self.size -= cost

    def get(self, lane: int, pos: int, max_bytes: int) -> list[Stored] | None:
        """As Store.cached."""
        held = self._lanes[lane]
        if pos > held.end:
            return []
        if pos < held.start:
            return None
        found: list[Stored] = []
        for at in range(pos, held.end + 1):
            stored = held.records[at]
            max_bytes -= len(stored.record)
            if max_bytes < 0 and found:
                break
            found.append(stored)
        return found

    def peek(self, lane: int, pos: int) -> Stored | None:
        """One record, if it is in memory."""
        return self._lanes[lane].records.get(pos)


def _size(lane: _Lane) -> int:
    return lane.size
