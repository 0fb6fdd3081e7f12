"""Records kept aside: refused for good above, or damaged on this disk. Bounded, named, never delivered.

(1) At most MAX_ENTRIES and MAX_BYTES; the oldest go first.
(2) A damaged row is copied here and replaced in the log by the void that was handed out for it, in one
    transaction; a row whose number cannot be told stays where it is and is found damaged again.
"""

from __future__ import annotations

import sqlite3
from typing import Final

from stp.records import read_record
from stpd.store.base import Quarantined, Stored
from stpd.store.changes import Aside
from stpd.store.rows import (
    INSERT,
    SELECT,
    DamagedRowError,
    columns_hold,
    from_column,
    make_row,
    read_row,
    row_id,
    to_column,
)

MAX_ENTRIES: Final = 1024
MAX_BYTES: Final = 32 << 20
DAMAGED: Final = "damaged on disk"


class Quarantine:
    """Used by the writer thread, between BEGIN and COMMIT."""

    def __init__(self, conn: sqlite3.Connection) -> None:
        self._conn = conn
        self.entries: list[Quarantined] = [
            Quarantined(*(*row[:4], from_column(row[4]), *row[5:]))
            for row in conn.execute(
                "SELECT id, lane, pos, source, number, reason, peer, messages, coalesce(length(record), 0), at_ms"
                " FROM quarantine ORDER BY id"
            )
        ]
        self._staged: list[Quarantined] | None = None

    def keep(self) -> list[Quarantined] | None:
        """The transaction is committed: all entries if they changed."""
        if self._staged is None:
            return None
        self.entries, self._staged = self._staged, None
        return self.entries

    def drop(self) -> None:
        self._staged = None

    def copy(self, aside: Aside) -> None:
        """Keep a copy of a record, from the log if it was not given; nothing if it has left the log."""
        entry = aside.entry
        if not aside.record and entry.pos:
            row = self._conn.execute(f"{SELECT} WHERE id = ?", (row_id(entry.lane, entry.pos),)).fetchone()
            try:
                stored = None if row is None else read_row(row)
            except DamagedRowError:
                stored = None  # whoever reads it next will set it aside as what it is
            if stored is not None:
                aside.record = stored.record
                entry.source, entry.number = stored.source, stored.number
                entry.messages, entry.size = stored.messages, len(stored.record)
        self.add(aside)

    def add(self, aside: Aside) -> None:
        entries = list(self.entries) if self._staged is None else self._staged
        self._staged = entries
        entry = aside.entry
        entry.id = entries[-1].id + 1 if entries else 1
        entries.append(entry)
        self._conn.execute(
            "INSERT INTO quarantine VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                entry.id,
                entry.lane,
                entry.pos,
                entry.source,
                to_column(entry.number),
                entry.reason,
                entry.peer,
                entry.messages,
                entry.at_ms,
                aside.record,
            ),
        )
        size = sum(one.size for one in entries)
        while len(entries) > MAX_ENTRIES or (size > MAX_BYTES and len(entries) > 1):
            oldest = entries.pop(0)
            size -= oldest.size
            self._conn.execute("DELETE FROM quarantine WHERE id = ?", (oldest.id,))

    def replace(self, void: Stored, own_source: bytes) -> bool:
        """Put `void`, which a reader handed out, in the place of the damaged row. False if that was done before."""
        entries = self.entries if self._staged is None else self._staged
        if any(e.lane == void.lane and e.pos == void.pos and e.reason.startswith(DAMAGED) for e in entries):
            return False
        key = row_id(void.lane, void.pos)
        row = self._conn.execute(f"{SELECT} WHERE id = ?", (key,)).fetchone()
        cause, record = "the row is gone", b""
        if row is not None:
            try:
                read_row(row)
            except DamagedRowError as exc:
                cause = str(exc)
                record = row[15] if isinstance(row[15], bytes) else repr(row[15]).encode()
            else:
                return False
        self.add(
            Aside(
                Quarantined(
                    0, void.lane, void.pos, void.source, void.number, f"{DAMAGED}: {cause}", void.peer,
                    void.messages, len(record), void.at_ms,
                ),
                record,
            )
        )  # fmt: skip
        if row is not None and void.record:
            whole = columns_hold(row)
            adopted = bool(row[1]) if whole else void.source == own_source
            sum_bytes = row[10] if whole else self._sum_bytes(key) + len(record)
            self._conn.execute("DELETE FROM record WHERE id = ?", (key,))
            self._conn.execute(INSERT, make_row(void, adopted, sum_bytes, read_record(void.record).crc))
        return True

    def _sum_bytes(self, key: int) -> int:
        found = self._conn.execute(
            "SELECT CAST(sum_bytes AS INTEGER) FROM record WHERE id < ? ORDER BY id DESC LIMIT 1", (key,)
        ).fetchone()
        return int(found[0]) if found else 0
