"""Ledger counts on their way to the tables: additions, merged per key, written in the transaction of the data."""

from __future__ import annotations

import sqlite3

from attrs import Factory, define

from stp.records import VOID
from stpd.store.base import Append
from stpd.store.redo import DOOR, NODE, Redo

RECEIVED, ACCEPTED, REPEATS, REFUSED, CORRUPT = range(5)
"""Places in a door's counts."""

NODE_ACCEPTED, ORIGINATED, NODE_STORED, LIVE_ONLY, NO_TAKER = range(5)
"""Places in a node's counts."""

DoorKey = tuple[str, str]
"""(peer, class)"""


@define
class Tally:
    """Additions to the ledger, or, on the trio side, its sums."""

    doors: dict[DoorKey, list[int]] = Factory(dict)
    nodes: dict[str, list[int]] = Factory(dict)

    def __bool__(self) -> bool:
        return bool(self.doors or self.nodes)

    def door(self, peer: str, class_name: str) -> list[int]:
        """The counts of one door, to add to."""
        counts = self.doors.get((peer, class_name))
        if counts is None:
            counts = self.doors[peer, class_name] = [0, 0, 0, 0, 0]
        return counts

    def node(self, class_name: str) -> list[int]:
        """The counts of this node for one class, to add to."""
        counts = self.nodes.get(class_name)
        if counts is None:
            counts = self.nodes[class_name] = [0, 0, 0, 0, 0]
        return counts

    def refuse(self, item: Append) -> None:
        """A record that came and was not taken. One of our own never came; a void holds no messages."""
        if item.peer and item.head.kind != VOID:
            counts = self.door(item.peer, item.class_name)
            counts[RECEIVED] += item.head.messages
            counts[REFUSED] += item.head.messages

    def add(self, other: Tally) -> None:
        for (peer, class_name), counts in other.doors.items():
            _add(self.door(peer, class_name), counts)
        for class_name, counts in other.nodes.items():
            _add(self.node(class_name), counts)

    def write(self, redo: Redo) -> None:
        if self.doors:
            redo.put(DOOR, [(*key, *counts) for key, counts in self.doors.items()])
        if self.nodes:
            redo.put(NODE, [(name, *counts) for name, counts in self.nodes.items()])

    @classmethod
    def load(cls, conn: sqlite3.Connection) -> Tally:
        """The sums as the tables have them."""
        tally = cls()
        for peer, class_name, *counts in conn.execute("SELECT * FROM door"):
            tally.doors[peer, class_name] = counts
        for class_name, *counts in conn.execute("SELECT * FROM node"):
            tally.nodes[class_name] = counts
        return tally


def _add(counts: list[int], more: list[int]) -> None:
    for place, number in enumerate(more):
        counts[place] += number
