"""What the writer thread does with the database: one transaction per group, and the upkeep between them.

(1) A transaction holds everything that belongs together: the records, what is remembered of their numbers, the
    ledger, cursors, hops, a slice of trimming. It commits whole or leaves no trace, in memory neither.
(2) `pending` is emptied by a successful commit only.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from attrs import define

from stpd.store.base import Append, StoreStatistics
from stpd.store.changes import Changes, Result
from stpd.store.group import Group
from stpd.store.log import Log
from stpd.store.quarantine import Quarantine
from stpd.store.redo import settle
from stpd.store.reserve import Reserve
from stpd.store.schema import DATABASE, PAGE_SIZE, connect
from stpd.store.trim import Trimmed, Trimmer

TRIM_INTERVAL: Final = 0.2
"""Seconds between trims while there is room; each commit trims when there is little."""

IDLE_INTERVAL: Final = 5.0
"""Seconds between looks at the retention when nothing else happens."""

FORGET_INTERVAL: Final = 3_600.0
"""Seconds between looks for sources to forget."""

AGE_INTERVAL: Final = 60
"""Seconds of running time that a crash may lose: what is forgotten after days is forgotten that much later."""

SMALL_RECORDS: Final = 64
"""A commit with at most this many leaves the small tables alone, see redo."""

VACUUM_PAGES: Final = 1_024
"""Pages given back to the file system in one turn."""
VACUUM_FREE: Final = 64 << 20
"""Bytes of free pages that stay in the file for reuse."""

WAL_LIMIT: Final = 32 << 20
"""Bytes in the write-ahead log after which it is copied into the database, when nobody waits for a commit."""


@define
class Options:
    directory: Path
    own_source: bytes
    limit: int
    """Bytes in use above which the trio side refuses data."""
    retention_s: float
    clock: Callable[[], float]
    """Wall clock, seconds."""


class Committer:
    """Used by the writer thread, but for what `__init__` loads before that starts."""

    def __init__(
        self, conn: sqlite3.Connection, options: Options, reserve: Reserve, statistics: StoreStatistics
    ) -> None:
        self._options = options
        self._statistics = statistics
        self.reserve = reserve
        self.pending = Changes()
        self.closing = False
        self._use(conn)
        self._age_base = int(conn.execute("SELECT value FROM meta WHERE key = 'age'").fetchone()[0])
        self._opened_at = time.monotonic()
        self._age_written = self._age_base
        self._trim_at = 0.0
        self._forget_at = self._opened_at
        self._trimming = False
        self._more = self._later = False
        self._wal_pages = 0
        self.used = self._measure()

    def _use(self, conn: sqlite3.Connection) -> None:
        options = self._options
        self._conn = conn
        self.log = Log(conn)
        self.quarantine = Quarantine(conn)
        self._trimmer = Trimmer(self.log, limit=options.limit, retention_s=options.retention_s)
        conn.execute(f"PRAGMA max_page_count = {(options.limit + self.reserve.size) // PAGE_SIZE}")
        # checkpoint() comes first; this is for a disk so slow that it never finds the time
        conn.execute(f"PRAGMA wal_autocheckpoint = {4 * self._wal_limit // PAGE_SIZE}")

    @property
    def _wal_limit(self) -> int:
        """On a full disk the reserve must take the whole write-ahead log into the database."""
        return min(WAL_LIMIT, self.reserve.size // 2)

    # -- the transaction ------------------------------------------------------------------------------------

    def commit(self, items: list[Append], *, upkeep: bool = True) -> Result:
        """Commit what is pending and the records, and say what became of them. Raises sqlite3.Error.

        Without `upkeep` nothing is trimmed or forgotten on the way: somebody waits.
        """
        try:
            return self._transaction(items, upkeep)
        except sqlite3.DatabaseError as exc:
            if not self._trimming or exc.sqlite_errorcode & 0xFF != sqlite3.SQLITE_CORRUPT:
                raise
            self._statistics.damage = f"trimming stopped: {exc}"  # data can still come and go
            return self._transaction(items, upkeep)

    def _transaction(self, items: list[Append], upkeep: bool) -> Result:
        log, now_ms, age = self.log, int(self._options.clock() * 1000), self._age()
        result = Result()
        self._trimming = False
        folds = self._folds(items, upkeep)
        log.begin()
        try:
            if folds:
                log.redo.fold()
            self._apply(self.pending, age)
            group = Group(log, self._options.own_source, now_ms)
            result.decided = group.decide(items)
            group.tally.write(log.redo)
            trimmed = self._trim(now_ms) if upkeep else Trimmed()
            if upkeep:
                self._forget(age, result)
            if age - self._age_written >= AGE_INTERVAL or self.closing:
                self._conn.execute("UPDATE meta SET value = ? WHERE key = 'age'", (age,))
                self._age_written = age  # if this fails, it is the next minute's
            result.cursors = log.commit(age, folded=folds)
        except BaseException:
            log.rollback()
            self.quarantine.drop()
            raise
        result.hops = [name for name, _ in self.pending.hops]
        moved = bool(group.stored or self.pending or trimmed.records)
        self.pending = Changes()
        result.quarantined = self.quarantine.keep()
        result.stored, result.tally = group.stored, group.tally
        self.used = self._measure()
        self._count(group, trimmed, folds)
        self._look_on(moved)
        return self.describe(result)

    def _folds(self, items: list[Append], upkeep: bool) -> bool:
        """Does this commit write to the small tables themselves, not to `redo`? Where it is large, or they change."""
        pending = self.pending
        return (
            self.closing
            or self.log.redo.due
            or self.log.seen.crowded
            or len(items) > SMALL_RECORDS
            or bool(pending.hops or pending.asides or pending.damaged)
            or (upkeep and (self._trims() or self._forgets()))
        )

    def _apply(self, changes: Changes, age: int) -> None:
        changes.tally.write(self.log.redo)
        for void in changes.damaged:
            self._statistics.damaged_rows += self.quarantine.replace(void, self._options.own_source)
        for aside in changes.asides:
            self.quarantine.copy(aside)
        for name, hop in changes.hops:
            self.log.change_hop(name, hop)
        for (name, lane), move in changes.moves.items():
            self.log.move(name, lane, move)
        if changes.sources:
            self._conn.executemany(
                "INSERT OR IGNORE INTO origin VALUES (?, ?, ?)",
                [(source, node, age) for source, node in changes.sources.items()],
            )

    def describe(self, result: Result) -> Result:
        """Say where everything stands."""
        result.lanes = list(self.log.lanes.values())
        result.used = self.used
        return result

    def _count(self, group: Group, trimmed: Trimmed, folded: bool) -> None:
        statistics = self._statistics
        size = sum(len(one.record) for one in group.stored)
        statistics.records += len(group.stored)
        statistics.bytes += size
        statistics.repeats += group.repeats
        statistics.conflicts += group.conflicts
        statistics.ranges_refused += group.ranges
        statistics.trimmed_records += trimmed.records
        statistics.trimmed_bytes += trimmed.bytes
        statistics.dropped_messages += trimmed.dropped
        # An estimate: bodies, and about a page for every table and for every few rows touched elsewhere.
        self._wal_pages += (
            size // PAGE_SIZE
            + len(group.stored)
            + group.sources // 16
            + trimmed.records // 4
            + (8 if folded else 2)
        )

    def _age(self) -> int:
        """The store's running time, seconds."""
        return self._age_base + int(time.monotonic() - self._opened_at)

    def _measure(self) -> int:
        """Bytes of pages in use."""
        pages = self._conn.execute("PRAGMA page_count").fetchone()[0]
        return int(pages - self._free_pages()) * PAGE_SIZE

    def _free_pages(self) -> int:
        return int(self._conn.execute("PRAGMA freelist_count").fetchone()[0])

    # -- upkeep ---------------------------------------------------------------------------------------------

    def due(self) -> bool:
        """Is there a reason for a commit without records?"""
        now = time.monotonic()
        if self.pending or self._more or self._forgets() or self.log.redo.due:
            return True
        if self._statistics.damage:
            return False
        # While it is too early to trim again, a commit for that would be an empty one.
        self._later = now < self._trim_at and not self._trimmer.scarce(self.used)
        return not self._later and self._trimmer.due(self.used, int(self._options.clock() * 1000))

    @property
    def has_upkeep(self) -> bool:
        """Is there something to do between commits that should not wait?"""
        return self._more or self._wal_pages * PAGE_SIZE >= self._wal_limit

    @property
    def patience(self) -> float:
        """Seconds that upkeep can wait."""
        if self._more:
            return 0.0
        return TRIM_INTERVAL if self._later else IDLE_INTERVAL

    def _trims(self) -> bool:
        """Is it time to trim, if there is anything?"""
        if self._statistics.damage:
            return False
        return time.monotonic() >= self._trim_at or self._more or self._trimmer.scarce(self.used)

    def _forgets(self) -> bool:
        return time.monotonic() - self._forget_at >= FORGET_INTERVAL

    def _trim(self, now_ms: int) -> Trimmed:
        if not self._trims():
            self._later = not self._statistics.damage
            return Trimmed()
        self._later = False
        self._trim_at = time.monotonic() + TRIM_INTERVAL
        self._trimming = True
        trimmed = self._trimmer.trim(now_ms, self.used)
        self._trimming = False
        self._more = trimmed.more
        return trimmed

    def _look_on(self, moved: bool) -> None:
        """After a commit that changed something: if room has become scarce, do not wait for the next."""
        if moved and self._trimmer.scarce(self.used):
            self._more = self.due()

    def _forget(self, age: int, result: Result) -> None:
        if not self._forgets():
            return
        self._forget_at = time.monotonic()
        self._statistics.sources_forgotten += self.log.seen.forget(age)
        result.forgotten = self.log.seen.forget_origins(age)

    def checkpoint(self, *, now: bool = False) -> None:
        """Copy the write-ahead log into the database if it is long. A failure leaves everything as it was."""
        if not now and self._wal_pages * PAGE_SIZE < self._wal_limit:
            return
        # PASSIVE waits for nobody; a log that readers have kept from starting over is waited for.
        mode = "RESTART" if self._wal_size() > 4 * self._wal_limit else "PASSIVE"
        try:
            _, pages, done = self._conn.execute(f"PRAGMA wal_checkpoint({mode})").fetchone()
            self._wal_pages = max(pages - done, 0)
            self._statistics.wal_bytes = self._wal_size()
        except sqlite3.Error:
            self._wal_pages //= (
                2  # the disk is full or broken, which the next commit will tell; not at once again
            )

    def _wal_size(self) -> int:
        try:
            return (self._options.directory / f"{DATABASE}-wal").stat().st_size
        except OSError:
            return 0

    def tidy(self) -> None:
        """Idle: give free pages beyond VACUUM_FREE, and beyond a quarter of the file, back to the file system."""
        free = self._free_pages() * PAGE_SIZE
        if free > VACUUM_FREE and free > (self.used + free) // 4:
            self._vacuum()

    def _vacuum(self) -> None:
        try:
            # it takes one step per page, and execute() takes only the first
            self._conn.executescript(f"PRAGMA incremental_vacuum({VACUUM_PAGES})")
        except sqlite3.Error:
            pass  # nothing is lost by a larger file

    # -- trouble --------------------------------------------------------------------------------------------

    def recover(self, *, reopen: bool) -> Result:
        """Try to commit what is pending; then whether there is room again stands in `reserve.held`.

        Raises sqlite3.Error if not even that can be written. After an I/O error (`reopen`) nothing that the old
        connection remembers is trusted.
        """
        if reopen:
            conn = connect(self._options.directory / DATABASE)
            try:
                settle(conn)
                old = self._conn
                self._use(conn)
            except BaseException:
                conn.close()
                raise
            old.close()
        result = self.commit([])
        self.checkpoint(now=True)
        if not self.reserve.take(self.reserve.size) and self._free_pages():
            self._vacuum()
            self.checkpoint(now=True)
            self.reserve.take(self.reserve.size)
        return result

    def close(self) -> None:
        """Write the log into the database and close it. Never raises."""
        try:
            self._conn.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        except sqlite3.Error:
            pass  # what is committed is in the write-ahead log, and is read from there
        self._conn.close()
