"""The database file: its tables, its format version, its lock. Opening it, and refusing to.

(1) One process at a time: the directory is locked before anything in it is read.
(2) A format newer than ours, or a file that is no store, is refused with a clear line and left as it is.
(3) Every connection says what durability means: write-ahead log, synced on every commit. A store is made in
    one transaction, so that a crash leaves none or a whole one.
"""

from __future__ import annotations

import fcntl
import os
import sqlite3
from pathlib import Path
from typing import Final

from stpd.store.base import StoreError, StoreFormatError, StoreInUseError

APPLICATION_ID: Final = 0x53545064
"""Marks a database as ours ("STPd")."""

FORMAT: Final = 2
"""Version of the tables below."""

PAGE_SIZE: Final = 16_384
"""Bytes. Measured: as fast for 64 KiB records as 64 KiB pages, and a lone small record writes a quarter as
much (one page per table touched), which is what an SD card wears by."""

CACHE_KIB: Final = 16_384
"""SQLite's page cache of the writing connection."""
READING_CACHE_KIB: Final = 2_048
"""Of the reading one, which reads everything once."""

BUSY_TIMEOUT: Final = 5.0
"""Seconds to wait for SQLite's own locks; only our own two connections ever hold them."""

DATABASE: Final = "store.db"
LOCK: Final = "lock"

TABLES: Final = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value) WITHOUT ROWID;

-- The log. id = lane << 48 | position. `record` stands last: a row's other columns are read without it.
-- messages and bytes are those of this record; sum_* are the lane's up to and with it.
CREATE TABLE record (
    id INTEGER PRIMARY KEY, adopted INTEGER, source BLOB, number INTEGER, number_to INTEGER, kind INTEGER,
    messages INTEGER, size INTEGER, at_ms INTEGER, sum_messages INTEGER, sum_bytes INTEGER, peer TEXT,
    prefix TEXT, crc INTEGER, row_crc INTEGER, record BLOB
);
CREATE INDEX record_number ON record (source, number) WHERE adopted = 0;

-- One row per lane: the last position, the last number given under our own source, the sums up to there;
-- base is the position before the first one kept, with the sums up to it.
CREATE TABLE lane (
    lane INTEGER PRIMARY KEY, last INTEGER, number INTEGER, messages INTEGER, bytes INTEGER,
    base INTEGER, base_messages INTEGER, base_bytes INTEGER
);

-- What is remembered about repeats. seen: seconds of the store's running time.
CREATE TABLE publisher (
    id INTEGER PRIMARY KEY, source BLOB, lane INTEGER, highest INTEGER, crc INTEGER, seen INTEGER,
    UNIQUE (source, lane)
);
CREATE TABLE keeper (
    source BLOB, lane INTEGER, ranges BLOB, seen INTEGER, PRIMARY KEY (source, lane)
) WITHOUT ROWID;
CREATE TABLE origin (source BLOB PRIMARY KEY, node TEXT, seen INTEGER) WITHOUT ROWID;

CREATE TABLE hop (
    name TEXT PRIMARY KEY, kind TEXT, peer TEXT, filters TEXT, lanes TEXT, created_ms INTEGER,
    max_lag_s REAL, max_lag_bytes INTEGER
) WITHOUT ROWID;
-- start: the lane's sum of messages when the hop began. forced: messages taken from its reach to make room.
CREATE TABLE cursor (
    hop TEXT, lane INTEGER, pos INTEGER, messages INTEGER, bytes INTEGER, start INTEGER, custody INTEGER,
    filtered INTEGER, expired INTEGER, quarantined INTEGER, dropped INTEGER, forced INTEGER,
    PRIMARY KEY (hop, lane)
) WITHOUT ROWID;

-- The ledger, in messages.
CREATE TABLE door (
    peer TEXT, class TEXT, received INTEGER, accepted INTEGER, repeats INTEGER, refused INTEGER,
    corrupt INTEGER, PRIMARY KEY (peer, class)
) WITHOUT ROWID;
CREATE TABLE node (
    class TEXT PRIMARY KEY, accepted INTEGER, originated INTEGER, stored INTEGER, live_only INTEGER,
    no_taker INTEGER
) WITHOUT ROWID;

-- What small commits changed in lane, cursor, publisher, keeper, door and node: see redo.py.
CREATE TABLE redo (id INTEGER PRIMARY KEY, body TEXT);

CREATE TABLE quarantine (
    id INTEGER PRIMARY KEY, lane INTEGER, pos INTEGER, source BLOB, number INTEGER, reason TEXT, peer TEXT,
    messages INTEGER, at_ms INTEGER, record BLOB
);
"""


class DirectoryLock:
    """An advisory lock on the store's directory, let go by the kernel when the process dies."""

    def __init__(self, directory: Path) -> None:
        """Take it. StoreInUseError if another process has it, StoreError if the directory cannot be used."""
        path = directory / LOCK
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as exc:
            raise StoreError(
                f"cannot use {directory} as a store: {exc.strerror}; check owner and mode"
            ) from exc
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            holder = os.read(self._fd, 32).decode("ascii", "replace").strip() or "unknown"
            os.close(self._fd)
            raise StoreInUseError(
                f"the store in {directory} is in use by process {holder}: stop it, or use another directory"
            ) from None
        os.ftruncate(self._fd, 0)
        try:
            os.pwrite(self._fd, b"%d\n" % os.getpid(), 0)
        except OSError:
            pass  # a full disk: the lock holds all the same, only the name of its holder is lost

    def release(self) -> None:
        """Let go. Idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def connect(path: Path, *, reading: bool = False) -> sqlite3.Connection:
    """A connection to a store that exists, with everything set that durability and speed need."""
    conn = sqlite3.connect(path, timeout=BUSY_TIMEOUT, isolation_level=None, check_same_thread=False)
    try:
        _tune(conn)
        if reading:
            conn.execute("PRAGMA query_only = 1")
            conn.execute(f"PRAGMA cache_size = -{READING_CACHE_KIB}")
    except BaseException:
        conn.close()
        raise
    return conn


def _tune(conn: sqlite3.Connection) -> None:
    conn.execute("PRAGMA journal_mode = WAL").fetchone()
    conn.execute("PRAGMA synchronous = FULL")
    conn.execute("PRAGMA wal_autocheckpoint = 0")  # the writer does it when nobody waits for a commit
    conn.execute("PRAGMA secure_delete = 0")  # Debian's build overwrites what it deletes
    conn.execute("PRAGMA trusted_schema = 0")
    conn.execute(f"PRAGMA cache_size = -{CACHE_KIB}")


def open_database(path: Path) -> sqlite3.Connection:
    """The writing connection, tables made if there were none. Raises StoreError and its kinds."""
    try:
        os.close(
            os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        )  # SQLite would leave it to umask
        conn = sqlite3.connect(path, timeout=BUSY_TIMEOUT, isolation_level=None, check_same_thread=False)
    except OSError as exc:
        raise StoreError(f"cannot open {path}: {exc.strerror}; check owner, mode and free space") from exc
    try:
        _prepare(conn, path)
    except sqlite3.Error as exc:
        conn.close()
        raise _explain(path, exc) from exc
    except BaseException:
        conn.close()
        raise
    return conn


def _prepare(conn: sqlite3.Connection, path: Path) -> None:
    """Look before anything is changed: promise (2)."""
    application = conn.execute("PRAGMA application_id").fetchone()[0]
    version = conn.execute("PRAGMA user_version").fetchone()[0]
    if application == 0 and conn.execute("SELECT count(*) FROM sqlite_schema").fetchone()[0] == 0:
        _make(conn)
    elif application != APPLICATION_ID:
        raise StoreFormatError(f"{path} is a database of another program: use another directory")
    elif version > FORMAT:
        raise StoreFormatError(
            f"{path} was written by a newer stpd (format {version}, this one knows up to {FORMAT}):"
            " upgrade stpd, or use another directory"
        )
    else:
        _tune(conn)
        if version < FORMAT:
            _upgrade(conn)


def _upgrade(conn: sqlite3.Connection) -> None:
    """Format 1 had no `redo`."""
    conn.execute("BEGIN IMMEDIATE")
    conn.execute("CREATE TABLE redo (id INTEGER PRIMARY KEY, body TEXT)")
    conn.execute(f"PRAGMA user_version = {FORMAT}")
    conn.execute("COMMIT")


def _make(conn: sqlite3.Connection) -> None:
    conn.execute(f"PRAGMA page_size = {PAGE_SIZE}")  # these two only tell before the first table
    conn.execute("PRAGMA auto_vacuum = INCREMENTAL")
    _tune(conn)
    conn.execute("BEGIN IMMEDIATE")
    for statement in TABLES.split(";\n"):
        conn.execute(statement)
    conn.executemany("INSERT INTO lane VALUES (?, 0, 0, 0, 0, 0, 0, 0)", [(n,) for n in range(1, 5)])
    conn.execute(f"PRAGMA application_id = {APPLICATION_ID}")
    conn.execute(f"PRAGMA user_version = {FORMAT}")
    conn.execute("COMMIT")


def _explain(path: Path, exc: sqlite3.Error) -> StoreError:
    if exc.sqlite_errorcode & 0xFF in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
        return StoreFormatError(
            f"{path} is damaged ({exc}): move the directory aside to start anew, and keep it for recovery"
        )
    return StoreError(f"cannot open {path}: {exc}; check owner, mode and free space")
