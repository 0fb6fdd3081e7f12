"""What small commits change in the small tables, said in one row instead of one page per table.

A commit that brings a record also moves a lane, a cursor, a publisher's highest number and the ledger: a page each,
for a few bytes. Small commits write all that as one row of `redo`; a later, larger one carries it to the tables.

(1) A row of `redo` belongs to the transaction that wrote it. It is applied, and gone, in one transaction.
(2) What it says of lanes, cursors and numbers is where they stand, so the last row wins; ledger counts are added.
(3) The tables with `redo` applied are the truth: whoever opens a database applies it before anything else.
"""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Iterable
from typing import Any, Final

MOST_ROWS: Final = 256
"""Rows of `redo` after which the next commit carries them to the tables."""

MOST_SECONDS: Final = 1.0
"""Age of the oldest row after which the next commit does."""

LANE: Final = "lane"
CURSOR: Final = "cursor"
PUBLISHER: Final = "publisher"
KEEPER: Final = "keeper"
DOOR: Final = "door"
NODE: Final = "node"

STATEMENTS: Final = {
    LANE: "UPDATE lane SET last = ?2, number = ?3, messages = ?4, bytes = ?5, base = ?6, base_messages = ?7,"
    " base_bytes = ?8 WHERE lane = ?1",
    CURSOR: "INSERT OR REPLACE INTO cursor VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
    PUBLISHER: "INSERT INTO publisher (id, source, lane, highest, crc, seen) VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT"
    " (id) DO UPDATE SET highest = excluded.highest, crc = excluded.crc, seen = excluded.seen",
    KEEPER: "INSERT OR REPLACE INTO keeper (source, lane, ranges, seen) VALUES (?, ?, ?, ?)",
    DOOR: "INSERT INTO door VALUES (?, ?, ?, ?, ?, ?, ?) ON CONFLICT (peer, class) DO UPDATE SET"
    " received = received + excluded.received, accepted = accepted + excluded.accepted,"
    " repeats = repeats + excluded.repeats,"
    " refused = refused + excluded.refused, corrupt = corrupt + excluded.corrupt",
    NODE: "INSERT INTO node VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT (class) DO UPDATE SET accepted = accepted +"
    " excluded.accepted, originated = originated + excluded.originated, stored = stored + excluded.stored,"
    " live_only = live_only + excluded.live_only, no_taker = no_taker + excluded.no_taker",
}
KEY_COLUMNS: Final = {LANE: 1, CURSOR: 2, PUBLISHER: 1, KEEPER: 2, DOOR: 2, NODE: 1}
"""How many of a row's first columns name it."""
ADDED: Final = frozenset({DOOR, NODE})
"""Tables whose other columns are counts to add (2)."""

Row = tuple[Any, ...]


class Redo:
    """Used by the writer, between BEGIN and COMMIT but for `keep` and `drop`."""

    def __init__(self, conn: sqlite3.Connection) -> None:
        """`settle` first if the database is not new."""
        self._conn = conn
        self._waiting: dict[str, dict[Row, Row]] = {}
        self._staged: list[tuple[str, list[Row]]] = []
        self._rows = 0
        self._oldest = 0.0
        self._folded = self._written = False

    def put(self, table: str, rows: list[Row]) -> None:
        """Part of this transaction: rows for one of STATEMENTS."""
        self._staged.append((table, rows))

    @property
    def due(self) -> bool:
        """Is it time to carry the rows to the tables?"""
        return self._rows >= MOST_ROWS or (self._rows > 0 and time.monotonic() - self._oldest >= MOST_SECONDS)

    def fold(self) -> None:
        """Carry what earlier transactions said to the tables."""
        if self._rows:
            for table, rows in self._waiting.items():
                self._conn.executemany(STATEMENTS[table], rows.values())
            self._conn.execute("DELETE FROM redo")
        self._folded = True

    def write(self) -> None:
        """Say what this transaction changes: to the tables after `fold`, else in a row."""
        if self._folded:
            for table, rows in self._staged:
                self._conn.executemany(STATEMENTS[table], rows)
        elif self._staged:
            self._conn.execute("INSERT INTO redo (body) VALUES (?)", (_encode(self._staged),))
            self._written = True

    def keep(self) -> None:
        """The transaction is committed."""
        if self._folded:
            self._waiting = {}
            self._rows = 0
        elif self._written:
            for table, rows in self._staged:
                _merge(self._waiting.setdefault(table, {}), table, rows)
            if not self._rows:
                self._oldest = time.monotonic()
            self._rows += 1
        self.drop()

    def drop(self) -> None:
        """Nothing is staged (any more)."""
        self._staged = []
        self._folded = self._written = False


def settle(conn: sqlite3.Connection) -> None:
    """Apply what an earlier run left in `redo` (3). Raises sqlite3.Error, with nothing changed."""
    bodies = conn.execute("SELECT body FROM redo ORDER BY id").fetchall()
    if not bodies:
        return
    waiting: dict[str, dict[Row, Row]] = {}
    for (body,) in bodies:
        for table, rows in _decode(body):
            _merge(waiting.setdefault(table, {}), table, rows)
    conn.execute("BEGIN IMMEDIATE")
    try:
        for table, merged in waiting.items():
            conn.executemany(STATEMENTS[table], merged.values())
        conn.execute("DELETE FROM redo")
        conn.execute("COMMIT")
    except sqlite3.Error:
        conn.rollback()
        raise


def _merge(known: dict[Row, Row], table: str, rows: Iterable[Row]) -> None:
    columns = KEY_COLUMNS[table]
    for row in rows:
        key = row[:columns]
        before = known.get(key) if table in ADDED else None
        if before is not None:
            row = (*key, *(one + more for one, more in zip(before[columns:], row[columns:], strict=True)))
        known[key] = row


def _encode(staged: list[tuple[str, list[Row]]]) -> str:
    return json.dumps(staged, separators=(",", ":"), default=_hex)


def _hex(value: object) -> dict[str, str]:
    assert isinstance(value, bytes)
    return {"x": value.hex()}


def _decode(body: str) -> list[tuple[str, list[Row]]]:
    """Raises sqlite3.DatabaseError for what we did not write: the page's own checks have failed, then."""
    try:
        said = json.loads(body, object_hook=lambda found: bytes.fromhex(found["x"]))
        return [(table, [tuple(row) for row in rows]) for table, rows in said if STATEMENTS[table]]
    except (ValueError, KeyError, TypeError) as exc:
        raise sqlite3.DatabaseError(f"a row of the table redo is damaged: {exc}") from exc
