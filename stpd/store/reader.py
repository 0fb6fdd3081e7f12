"""Reads behind the cache: from disk, in a worker thread, by a connection of its own.

(1) What it hands out was checked to the last byte; a damaged or missing row comes as a void (promise 4 of base).
(2) It never holds a read transaction longer than one call: the write-ahead log could not start over.
"""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Final

from stpd.store.base import Stored, StoreError
from stpd.store.rows import (
    MAX_POS,
    SELECT,
    DamagedRowError,
    Row,
    columns_hold,
    missing,
    read_row,
    row_id,
    void_in_place,
)
from stpd.store.schema import connect

MISSING_AT_ONCE: Final = 1_024
"""Positions without a row that one call reports, at most."""


class Reader:
    """One call at a time, in whatever thread."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._conn: sqlite3.Connection | None = None
        self._total = 0

    def read(self, lane: int, pos: int, last: int, total: int, max_bytes: int) -> list[Stored]:
        """Records from `pos` (or the first kept) to `last`, about max_bytes of them, at least one. `total`: the
        lane's sum of messages at `last`.

        Raises StoreError if the database cannot be read.
        """
        try:
            conn = self._conn = self._conn or connect(self._path, reading=True)
            conn.execute("BEGIN")
            try:
                self._total = total
                return self._read(conn, lane, pos, last, max_bytes)
            finally:
                conn.rollback()
        except sqlite3.Error as exc:
            self.close()
            raise StoreError(f"cannot read {self._path}: {exc}") from exc

    def _read(self, conn: sqlite3.Connection, lane: int, pos: int, last: int, max_bytes: int) -> list[Stored]:
        base = conn.execute("SELECT base FROM lane WHERE lane = ?", (lane,)).fetchone()[0]
        expected = max(pos, base + 1)
        found: list[Stored] = []
        try:
            rows = conn.execute(
                f"{SELECT} WHERE id >= ? AND id <= ? ORDER BY id",
                (row_id(lane, expected), row_id(lane, last)),
            )
            for row in rows:
                here = row[0] & MAX_POS
                self._add_missing(conn, lane, expected, here, found)
                stored = self._stored(conn, row, lane, here)
                max_bytes -= len(stored.record)
                if max_bytes < 0 and found:
                    return found
                found.append(stored)
                expected = here + 1
        except sqlite3.DatabaseError as exc:
            if exc.sqlite_errorcode & 0xFF != sqlite3.SQLITE_CORRUPT:
                raise
            if not found:
                self._step(conn, lane, expected, last, found)
            return found
        self._add_missing(conn, lane, expected, last + 1, found)
        return found

    def _add_missing(
        self, conn: sqlite3.Connection, lane: int, start: int, stop: int, found: list[Stored]
    ) -> None:
        """Say of start..stop-1 that their rows are gone: positions have no gaps of their own."""
        for pos in range(start, min(stop, start + MISSING_AT_ONCE)):
            messages, cumulative = self._sums(conn, lane, pos)
            if found and found[-1].cumulative == cumulative:
                messages = 0  # the first of several has them all: nobody knows how they were spread
            found.append(missing(lane, pos, messages, cumulative))

    def _step(self, conn: sqlite3.Connection, lane: int, start: int, last: int, found: list[Stored]) -> None:
        """Go row by row through a damaged part of the database, up to the first row that can be read."""
        for pos in range(start, min(last + 1, start + MISSING_AT_ONCE)):
            try:
                row = conn.execute(f"{SELECT} WHERE id = ?", (row_id(lane, pos),)).fetchone()
            except sqlite3.DatabaseError:
                row = None
            if row is not None:
                found.append(self._stored(conn, row, lane, pos))
                return
            found.append(missing(lane, pos, 0, 0))

    def _stored(self, conn: sqlite3.Connection, row: Row, lane: int, pos: int) -> Stored:
        try:
            return read_row(row)
        except DamagedRowError:
            pass
        if columns_hold(row):
            return void_in_place(row, lane, pos, row[6], row[9], row[8])
        return void_in_place(row, lane, pos, *self._sums(conn, lane, pos), 0)

    def _sums(self, conn: sqlite3.Connection, lane: int, pos: int) -> tuple[int, int]:
        """Messages of, and the sum up to, a row that cannot say so itself: its neighbours know."""
        base = conn.execute("SELECT base_messages FROM lane WHERE lane = ?", (lane,)).fetchone()[0]
        before = conn.execute(
            "SELECT CAST(sum_messages AS INTEGER) FROM record WHERE id > ? AND id < ? ORDER BY id DESC LIMIT 1",
            (row_id(lane, 0), row_id(lane, pos)),
        ).fetchone()
        after = conn.execute(
            "SELECT CAST(sum_messages AS INTEGER) - CAST(messages AS INTEGER) FROM record"
            " WHERE id > ? AND id < ? ORDER BY id LIMIT 1",
            (row_id(lane, pos), row_id(lane + 1, 0)),
        ).fetchone()
        low = base if before is None else before[0]
        high = self._total if after is None else after[0]
        return (high - low, high) if 0 <= low <= high else (0, max(low, 0))

    def find(self, lane: int, at_ms: int, last: int) -> int:
        """The first position stored at or after `at_ms`; last + 1 if none. Raises StoreError."""
        try:
            conn = self._conn = self._conn or connect(self._path, reading=True)
            low = conn.execute("SELECT base FROM lane WHERE lane = ?", (lane,)).fetchone()[0] + 1
            high = last + 1
            while low < high:
                middle = (low + high) // 2
                at = conn.execute(
                    "SELECT CAST(at_ms AS INTEGER) FROM record WHERE id >= ? AND id <= ? ORDER BY id LIMIT 1",
                    (row_id(lane, middle), row_id(lane, last)),
                ).fetchone()
                if at is None or at[0] >= at_ms:
                    high = middle
                else:
                    low = middle + 1
        except sqlite3.Error as exc:
            self.close()
            raise StoreError(f"cannot read {self._path}: {exc}") from exc
        return int(low)

    def close(self) -> None:
        """Let go of the connection; the next call opens another."""
        if self._conn is not None:
            self._conn.close()
            self._conn = None
