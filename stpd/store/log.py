"""The writer's view of the log: where lanes and cursors stand, staged per transaction.

(1) `lanes` and `cursors` are what the database holds once `commit` has returned; `rollback` leaves them as they
    were. What is staged is visible only between `begin` and either of them.
(2) Everything that a transaction changes is in the tables when it commits: nothing is worked out again later.
"""

from __future__ import annotations

import json
import sqlite3

from stpd.store.base import Hop
from stpd.store.changes import CursorState, LaneState, Move
from stpd.store.redo import CURSOR, LANE, Redo, Row
from stpd.store.rows import row_id
from stpd.store.seen import SeenNumbers

CursorKey = tuple[str, int]
"""(hop, lane)"""


class Log:
    """Used by the writer thread only, but for what `__init__` loads before it starts."""

    def __init__(self, conn: sqlite3.Connection) -> None:
        self.conn = conn
        self.redo = Redo(conn)
        self.seen = SeenNumbers(conn)
        self.lanes: dict[int, LaneState] = {}
        for row in conn.execute(
            "SELECT lane, last, number, messages, bytes, base, base_messages, base_bytes FROM lane"
        ).fetchall():
            lane = LaneState(*row)
            lane.oldest_ms = self.time_after(lane.lane, lane.base)
            self.lanes[lane.lane] = lane
        self.kinds: dict[str, str] = dict(conn.execute("SELECT name, kind FROM hop"))
        self.cursors: dict[CursorKey, CursorState] = {}
        for row in conn.execute("SELECT * FROM cursor").fetchall():
            cursor = CursorState(*row)
            cursor.next_ms = self.time_after(cursor.lane, cursor.pos)
            self.cursors[cursor.hop, cursor.lane] = cursor
        self._staged_lanes: dict[int, LaneState] = {}
        self._staged_cursors: dict[CursorKey, CursorState | None] = {}

    # -- transactions ---------------------------------------------------------------------------------------

    def begin(self) -> None:
        self.conn.execute("BEGIN IMMEDIATE")

    def commit(self, age: int, *, folded: bool) -> list[CursorState]:
        """Write what is staged and sync it; the cursors that changed. `age`: running time, seconds.

        `folded`: `redo.fold` was called in this transaction, as it must be where a base moves or a cursor goes.
        """
        self.seen.write(self.redo, age)
        if self._staged_lanes:
            self.redo.put(LANE, [_lane_row(lane) for lane in self._staged_lanes.values()])
        changed = [cursor for cursor in self._staged_cursors.values() if cursor is not None]
        if changed:
            self.redo.put(CURSOR, [_cursor_row(cursor) for cursor in changed])
        if len(changed) < len(self._staged_cursors):
            assert folded
            gone = [key for key, cursor in self._staged_cursors.items() if cursor is None]
            self.conn.executemany("DELETE FROM cursor WHERE hop = ? AND lane = ?", gone)
        self.redo.write()
        self.conn.execute("COMMIT")
        self._keep(folded=folded)
        return changed

    def _keep(self, *, folded: bool) -> None:
        self.seen.keep(folded=folded)
        self.redo.keep()
        self.lanes.update(self._staged_lanes)
        for key, cursor in self._staged_cursors.items():
            if cursor is None:
                self.cursors.pop(key, None)
            else:
                self.cursors[key] = cursor
        self._staged_lanes = {}
        self._staged_cursors = {}

    def rollback(self) -> None:
        """Forget what is staged. Never raises: a transaction that SQLite has ended itself is as good."""
        self.seen.drop()
        self.redo.drop()
        self._staged_lanes = {}
        self._staged_cursors = {}
        try:
            self.conn.rollback()
        except sqlite3.Error:
            pass

    # -- what stands where ----------------------------------------------------------------------------------

    def lane(self, lane: int) -> LaneState:
        """The lane's state, to change in this transaction."""
        staged = self._staged_lanes.get(lane)
        if staged is None:
            staged = self._staged_lanes[lane] = self.lanes[lane].copy()
        return staged

    def peek(self, lane: int) -> LaneState:
        """The lane's state in this transaction, to look at."""
        return self._staged_lanes.get(lane) or self.lanes[lane]

    def cursor(self, hop: str, lane: int) -> CursorState | None:
        """The cursor, to change in this transaction; None if there is no such."""
        key = (hop, lane)
        if key in self._staged_cursors:
            return self._staged_cursors[key]
        known = self.cursors.get(key)
        if known is None:
            return None
        staged = self._staged_cursors[key] = known.copy()
        return staged

    def all_cursors(self) -> list[CursorState]:
        """As they stand in this transaction; not to be changed."""
        merged: dict[CursorKey, CursorState | None] = {**self.cursors, **self._staged_cursors}
        return [cursor for cursor in merged.values() if cursor is not None]

    def time_after(self, lane: int, pos: int) -> int:
        """at_ms of the first record behind `pos`, 0 if there is none."""
        found = self.conn.execute(
            "SELECT CAST(at_ms AS INTEGER) FROM record WHERE id > ? AND id < ? ORDER BY id LIMIT 1",
            (row_id(lane, pos), row_id(lane + 1, 0)),
        ).fetchone()
        return 0 if found is None else int(found[0])

    def sums_at(self, lane: int, pos: int) -> tuple[int, int]:
        """The lane's sums of messages and bytes up to `pos`, which is in the log or just before it."""
        state = self.peek(lane)
        if pos >= state.last:
            return state.messages, state.bytes
        found = self.conn.execute(
            "SELECT CAST(sum_messages AS INTEGER), CAST(sum_bytes AS INTEGER) FROM record"
            " WHERE id > ? AND id <= ? ORDER BY id DESC LIMIT 1",
            (row_id(lane, state.base), row_id(lane, pos)),
        ).fetchone()
        return (state.base_messages, state.base_bytes) if found is None else (found[0], found[1])

    # -- hops -----------------------------------------------------------------------------------------------

    def change_hop(self, name: str, hop: Hop | None) -> None:
        """Add, change or (None) remove a hop. Cursors that are there stay; those of lanes it left go."""
        lanes: tuple[int, ...] = ()
        if hop is None:
            self.conn.execute("DELETE FROM hop WHERE name = ?", (name,))
        else:
            lanes = hop.lanes
            self.kinds[name] = hop.kind  # after a rollback the change comes again, so nothing is to be undone
            self.conn.execute(
                "INSERT OR REPLACE INTO hop VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    name,
                    hop.kind,
                    hop.peer,
                    json.dumps(hop.filters),
                    json.dumps(hop.lanes),
                    hop.created_ms,
                    hop.max_lag_s,
                    hop.max_lag_bytes,
                ),
            )
            for lane in lanes:
                if self.cursor(name, lane) is None:
                    self._start_cursor(name, lane, hop.cursors.get(lane, 0))
        for cursor in self.all_cursors():
            if cursor.hop == name and cursor.lane not in lanes:
                self._staged_cursors[name, cursor.lane] = None

    def _start_cursor(self, name: str, lane: int, pos: int) -> None:
        state = self.peek(lane)
        pos = min(max(pos, state.base), state.last)
        messages, size = self.sums_at(lane, pos)
        cursor = CursorState(name, lane, pos, messages, size, start=messages)
        cursor.next_ms = self.time_after(lane, pos)
        self._staged_cursors[name, lane] = cursor

    def load_hops(self) -> dict[str, Hop]:
        """All hops as the tables have them."""
        hops = {}
        for name, kind, peer, filters, lanes, created, lag_s, lag_bytes in self.conn.execute(
            "SELECT * FROM hop"
        ):
            cursors = {c.lane: c.pos for c in self.cursors.values() if c.hop == name}
            hops[name] = Hop(
                name, kind, peer, tuple(json.loads(filters)), tuple(json.loads(lanes)), cursors, created, lag_s,
                lag_bytes,
            )  # fmt: skip
        return hops

    def move(self, hop: str, lane: int, move: Move) -> None:
        """Advance a cursor. What was taken from its reach while it was being read counts as it went."""
        cursor = self.cursor(hop, lane)
        if cursor is None:
            return
        before = cursor.messages
        pos = min(move.pos, self.peek(lane).last)
        if pos > cursor.pos:
            cursor.pos = pos
            cursor.messages, cursor.bytes = self.sums_at(lane, pos)
            cursor.next_ms = self.time_after(lane, pos)
        cursor.custody += move.custody
        cursor.filtered += move.filtered
        cursor.expired += move.expired
        cursor.quarantined += move.quarantined
        cursor.dropped += move.dropped
        back = min(max(move.messages - (cursor.messages - before), 0), cursor.forced)
        cursor.dropped -= back
        cursor.forced -= back


def _lane_row(lane: LaneState) -> Row:
    return (
        lane.lane, lane.last, lane.number, lane.messages, lane.bytes, lane.base, lane.base_messages, lane.base_bytes,
    )  # fmt: skip


def _cursor_row(cursor: CursorState) -> Row:
    return (
        cursor.hop, cursor.lane, cursor.pos, cursor.messages, cursor.bytes, cursor.start, cursor.custody,
        cursor.filtered, cursor.expired, cursor.quarantined, cursor.dropped, cursor.forced,
    )  # fmt: skip
