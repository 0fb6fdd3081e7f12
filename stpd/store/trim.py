"""What may leave the log, and when (promise 3 of base).

Three levels, by how much room is left:

* plenty: what lies behind every cursor and is older than the retention;
* scarce (an eighth is left): what lies behind every cursor, oldest first, whatever the retention;
* full (a sixteenth is left): what is in custody above, though a reader has not taken it: counted as dropped.

A lane that has neither cursors nor a retention is never trimmed: nobody has said that it may go.
"""

from __future__ import annotations

from typing import Final

from attrs import define

from stp.records import MAX_RECORD
from stpd.store.changes import CursorState, LaneState
from stpd.store.log import Log
from stpd.store.rows import MAX_POS, row_id

LARGE_RECORDS: Final = 3
"""A small store counts as scarce while it has no room for this many of the largest records."""

SLICE_RECORDS: Final = 512
SLICE_BYTES: Final = 32 << 20
"""At most this much leaves in one transaction, so that nobody waits long behind it."""


@define
class Trimmed:
    records: int = 0
    bytes: int = 0
    dropped: int = 0
    """Messages taken from readers' reach."""
    more: bool = False
    """There is more to trim at once."""


class Trimmer:
    """Used by the writer thread, between BEGIN and COMMIT."""

    def __init__(self, log: Log, *, limit: int, retention_s: float) -> None:
        self._log = log
        room = LARGE_RECORDS * MAX_RECORD
        self._scarce = limit - max(limit // 8, room)
        self._full = limit - max(limit // 16, room * 2 // 3)
        self._retention_ms = int(retention_s * 1000)

    def trim(self, now_ms: int, used: int) -> Trimmed:
        """Trim one slice; `used` bytes are in use before it."""
        trimmed = Trimmed()
        cursors: dict[int, list[CursorState]] = {}
        for cursor in self._log.all_cursors():
            cursors.setdefault(cursor.lane, []).append(cursor)
        for lane in self._log.lanes:
            bound = self._bound(lane, cursors.get(lane, []))
            self._delete(lane, bound, now_ms - self._retention_ms if self._retention_ms else None, trimmed)
        if used - trimmed.bytes > self._scarce:
            self._make_room(cursors, used, trimmed)
        return trimmed

    def scarce(self, used: int) -> bool:
        """Is little room left?"""
        return used > self._scarce

    def due(self, used: int, now_ms: int) -> bool:
        """Might trim() find something? Cheap, and may be wrong in saying yes."""
        log = self._log
        bounds: dict[int, int] = {}
        for cursor in log.cursors.values():
            bounds[cursor.lane] = min(cursor.pos, bounds.get(cursor.lane, cursor.pos))
        scarce = used > self._scarce
        cutoff_ms = now_ms - self._retention_ms
        for lane in log.lanes.values():
            bound = bounds.get(lane.lane, lane.last if self._retention_ms else lane.base)
            if bound > lane.base and (scarce or not self._retention_ms or lane.oldest_ms <= cutoff_ms):
                return True
        return used > self._full and bool(log.cursors)

    def _bound(self, lane: int, cursors: list[CursorState]) -> int:
        """The last position that may go."""
        if cursors:
            return min(cursor.pos for cursor in cursors)
        state = self._log.peek(lane)
        return state.last if self._retention_ms else state.base

    def _make_room(self, cursors: dict[int, list[CursorState]], used: int, trimmed: Trimmed) -> None:
        """Trim until room is plenty again, the lane with the oldest records first; readers lose last."""
        log = self._log
        goal = min(used - self._scarce, SLICE_BYTES)
        for force in (False, True):
            if force and used - trimmed.bytes <= self._full:
                return
            bounds = {lane: self._forced_bound(lane, cursors, force) for lane in log.lanes}
            lanes = sorted((log.peek(lane).oldest_ms, lane) for lane in bounds)
            for _, lane in lanes:
                if trimmed.bytes >= goal or trimmed.records >= SLICE_RECORDS:
                    return
                self._delete(lane, bounds[lane], None, trimmed, goal)
                if force:
                    self._pass_readers(cursors.get(lane, []), trimmed)

    def _forced_bound(self, lane: int, cursors: dict[int, list[CursorState]], force: bool) -> int:
        """R-10-37."""
        here = cursors.get(lane, [])
        kinds = self._log.kinds
        if force and any(kinds.get(cursor.hop) == "uplink" for cursor in here):
            here = [cursor for cursor in here if kinds.get(cursor.hop) != "reader"]
        return self._bound(lane, here)

    def _delete(
        self, lane: int, bound: int, cutoff_ms: int | None, trimmed: Trimmed, goal: int = SLICE_BYTES
    ) -> None:
        """Delete from the lane's oldest record up to `bound`, as far as it is old enough and the slice allows."""
        log = self._log
        base = log.peek(lane).base
        if bound <= base or (cutoff_ms is not None and log.peek(lane).oldest_ms > cutoff_ms):
            return
        limit = SLICE_RECORDS - trimmed.records
        rows = log.conn.execute(
            "SELECT id, CAST(size AS INTEGER), CAST(at_ms AS INTEGER) FROM record"
            " WHERE id > ? AND id <= ? ORDER BY id LIMIT ?",
            (row_id(lane, base), row_id(lane, bound), limit),
        ).fetchall()
        taken = 0
        for key, size, at_ms in rows:
            if (cutoff_ms is not None and at_ms > cutoff_ms) or trimmed.bytes >= goal:
                break
            taken += 1
            trimmed.records += 1
            trimmed.bytes += size
            base = key & MAX_POS
        else:
            if len(rows) < limit:
                base = bound  # all of them, and rows that damage has swallowed
        trimmed.more |= taken == limit or (taken < len(rows) and trimmed.bytes >= SLICE_BYTES)
        if base > log.peek(lane).base:
            self._move_base(lane, base)

    def _move_base(self, lane: int, base: int) -> None:
        log = self._log
        messages, size = log.sums_at(lane, base)
        log.conn.execute(
            "DELETE FROM record WHERE id > ? AND id <= ?",
            (row_id(lane, log.peek(lane).base), row_id(lane, base)),
        )
        state: LaneState = log.lane(lane)
        state.base, state.base_messages, state.base_bytes = base, messages, size
        state.oldest_ms = log.time_after(lane, base)

    def _pass_readers(self, cursors: list[CursorState], trimmed: Trimmed) -> None:
        """Move cursors that the base has passed, and count what they lost."""
        log = self._log
        for known in cursors:
            state = log.peek(known.lane)
            if known.pos >= state.base:
                continue
            cursor = log.cursor(known.hop, known.lane)
            assert cursor is not None
            lost = state.base_messages - cursor.messages
            cursor.pos, cursor.messages, cursor.bytes = state.base, state.base_messages, state.base_bytes
            cursor.dropped += lost
            cursor.forced += lost
            cursor.next_ms = state.oldest_ms
            trimmed.dropped += lost
