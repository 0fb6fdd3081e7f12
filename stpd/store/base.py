"""What a store promises, whatever database stands behind it.

A lane is a log of records; a hop is a name with one cursor per lane. The relay appends, whoever serves a hop
reads on from its cursor, and trimming follows the slowest cursor (protocol §10).

Promises, cited by the tests:

(1) `done(STORED)` is called only after the transaction that holds the record has been synced to disk.
(2) The position in the log, the number of an adopted record, what is remembered about repeats and the ledger
    move in that same transaction: a repeat is never stored twice, and a crash never reuses a number.
(3) A record leaves the log only behind every cursor and after the retention, or by a rule that the ledger
    names. A lane that nobody reads and that has no retention is kept until the store is full.
(4) A row whose CRC fails is quarantined, named, and replaced by a void for its number; it is never delivered
    as good.
(5) Receipts, cursors, deletes and the ledger commit even while data is refused for want of room.
(6) A failed commit is never taken for a good one: everything in it, and everything queued before the owner
    has heard of it, ends in ERROR (or FULL), so that order survives.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import Enum
from typing import TYPE_CHECKING, NamedTuple, Protocol

from attrs import Factory, define

from stp.core.errors import StpError
from stpd.ledger import Ledger

if TYPE_CHECKING:
    from stp.records import RecordHead

MAX_RANGES = 1024
"""Ranges of numbers remembered per (source, lane) of another keeper; more is RANGES (protocol §10, R-10-24)."""

FORGET_AFTER = 7 * 86400.0
"""Seconds after a publisher's last record until its highest number is forgotten. Counted in the store's own
running time: a wall clock that jumps forgets nothing."""


class StoreError(StpError):
    """The store cannot be opened or used: the text names the path, the cause and what to do."""


class StoreInUseError(StoreError):
    """Another process holds the store's directory."""


class StoreFormatError(StoreError):
    """The store was written by a newer program, or is not a store at all."""


class OutcomeKind(Enum):
    STORED = "stored"
    """On disk here: *kept*. Also a publisher's void, which leaves nothing but its number in the log."""
    REPEAT = "repeat"
    """Was on disk already: acknowledged and dropped."""
    CONFLICT = "conflict"
    """The number is known with other bytes: REFUSED(CONFLICT), an alarm."""
    RANGES = "ranges"
    """More than MAX_RANGES holes from this source: REFUSED(RANGES)."""
    FULL = "full"
    """No room, by budget, by queue or by the disk: REFUSED(FULL), try again later."""
    ERROR = "error"
    """The commit failed (I/O). Nothing is known to be stored; treat as FULL towards the peer."""


@define
class Outcome:
    """What became of one append. Shared between the records of one commit: do not change it."""

    kind: OutcomeKind
    pos: int
    """Position of the record that holds it. REPEAT and publishers' voids: the lane's last position then, so
    what it repeats is at or below. Else 0."""


@define
class Append:
    """One record on its way into the log, from `read_record`: structure and CRC are checked."""

    lane: int
    record: bytes
    """The whole record as received, size field and trailer included."""
    head: RecordHead
    adopt: bool
    """True for a publisher's record (no hops): deduplicated by highest number, grouped and renumbered."""
    peer: str
    """Node name of the door it came through, for the ledger; "" for a record this daemon originated."""
    class_name: str
    done: Callable[[Outcome], None]
    """Called once, in the trio thread, possibly before append() returns (FULL). Must not raise."""


@define
class Stored:
    """A record in the log. Treat it as frozen: readers share it."""

    lane: int
    pos: int
    """Position in this store's lane: from 1, without gaps."""
    source: bytes
    number: int
    to: int
    """== number for data and part; the last number covered for a void."""
    kind: int
    """Record kind as on the wire: 0 data, 1 void, 2 part."""
    prefix: str
    messages: int
    """Messages in it. 0 for a void as it came; for a row damaged here the messages that it held."""
    record: bytes
    """The bytes in the log, with the trailer as received: forward() adds this node's hop and dwell."""
    at_ms: int
    """Wall-clock milliseconds of the commit."""
    at: float
    """The same on trio's clock, seconds. For rows of an earlier run it is worked out from the wall clock."""
    peer: str
    """Node that sent it; "" if several did, or none."""
    cumulative: int
    """Messages in this lane up to and with this record, since the store was made."""
    damaged: bool = False
    """The row was damaged on disk: `record` is a void (reason quarantined) in its place, promise (4). If not
    even its number can be told, `number` is 0 and `record` is b"": nothing can be sent, advance over it."""
    head: RecordHead | None = None
    """Of `record`, where somebody has read it already."""


@define
class Hop:
    """Somebody who reads on from a cursor: an uplink, a durable reader, an edge that sleeps."""

    name: str
    kind: str
    """"uplink" (its cursor is custody), "reader" or "edge"."""
    peer: str = ""
    filters: tuple[str, ...] = ()
    lanes: tuple[int, ...] = (1, 2, 3, 4)
    cursors: dict[int, int] = Factory(dict)
    """Lane → highest position in custody of, or taken by, the hop. Given to add_hop: where to start; a
    missing lane starts before the oldest record kept. Afterwards the store's: only advance() moves it."""
    created_ms: int = 0
    max_lag_s: float = 0.0
    """Seconds its oldest untaken record may have waited before lagging() names it; 0 means without limit."""
    max_lag_bytes: int = 0
    """Bytes it may be behind before lagging() names it; 0 means without limit."""


class Behind(NamedTuple):
    """How far a hop is behind on a lane. Lags the truth by ≤ 50 ms."""

    messages: int
    bytes: int
    oldest_age: float
    """Seconds since the first untaken record was stored; 0.0 if level."""


@define
class Quarantined:
    """A record kept aside, for `stpctl` to list. Its bytes are in the quarantine table."""

    id: int
    lane: int
    pos: int
    """0 if it never was in the log."""
    source: bytes
    number: int
    """0 if even that could not be read."""
    reason: str
    peer: str
    messages: int
    size: int
    at_ms: int


@define
class LaneUsage:
    first: int
    last: int
    bytes: int
    messages: int
    oldest_age: float
    """Seconds; 0.0 if empty."""


@define
class Usage:
    """Room in the store, all in bytes."""

    used: int
    """Pages in use, overhead included."""
    queued: int
    """Accepted into the queue, not committed yet."""
    limit: int
    """Where data is refused: the budget without the reserve."""
    budget: int
    disk_free: int
    """What the file system would still give us."""
    lanes: dict[int, LaneUsage] = Factory(dict)


@define
class StoreStatistics:
    """Plain counters since the store was opened, and gauges of its queues."""

    commits: int = 0
    commits_here: int = 0
    """Of `commits`, those that the trio thread made itself: little data, and a disk that is fast."""
    commit_failures: int = 0
    commit_seconds: float = 0.0
    commit_seconds_max: float = 0.0
    records: int = 0
    bytes: int = 0
    repeats: int = 0
    conflicts: int = 0
    ranges_refused: int = 0
    full_budget: int = 0
    """Appends refused because the budget was used up."""
    full_queue: int = 0
    """Appends refused because the queue to the writer was full."""
    full_disk: int = 0
    errors: int = 0
    """Appends that a failed commit took with it."""
    trimmed_records: int = 0
    trimmed_bytes: int = 0
    dropped_messages: int = 0
    """Taken from readers' reach to make room."""
    damaged_rows: int = 0
    quarantined: int = 0
    sources_forgotten: int = 0
    reads: int = 0
    read_records: int = 0
    cache_bytes: int = 0
    cache_records: int = 0
    queue_records: int = 0
    queue_bytes: int = 0
    wal_bytes: int = 0
    """Size of the write-ahead log when it was last copied into the database. It is used again, not shortened."""
    degraded: str = ""
    """Why data is refused by the disk right now, in words; "" when all is well."""
    damage: str = ""
    """What is broken in the database for good, in words. Data may still come and go."""


class Store(Protocol):
    """Every synchronous method is called in the trio thread, never blocks and, `turn_ends` apart, never touches
    the disk."""

    store_id: bytes
    """16 random bytes, made with the store: this node's own source."""
    on_commit: Callable[[list[Stored]], None] | None
    """Called in the trio thread after the done() calls of a commit: what it added, in (lane, pos) order."""

    @property
    def hops(self) -> Mapping[str, Hop]:
        """All registered hops by name."""

    def append(self, item: Append) -> None:
        """Join the running group commit.

        Counts received, accepted, repeats and refused of the door (item.peer, class) and accepted (originated
        if peer is ""), stored of the node in the transaction of the data. Voids count no messages."""

    def turn_begins(self) -> None:
        """What is appended from now on is for one commit: `turn_ends` follows before anything is awaited."""

    def turn_ends(self) -> None:
        """Commit what the turn brought. It may be done before this returns, done() and on_commit() calls included,
        where it is little and the disk has proved fast: then some milliseconds are gone at most."""

    async def flush(self) -> None:
        """Return when everything appended, advanced and counted so far is decided (committed or failed)."""

    def last(self, lane: int) -> int:
        """Highest committed position, 0 if there never was one."""

    def first(self, lane: int) -> int:
        """Lowest position still in the log; last + 1 if it is empty."""

    def cached(self, lane: int, pos: int, max_bytes: int) -> list[Stored] | None:
        """Records from `pos` on, from memory: about max_bytes of them, at least one. [] if `pos` is beyond
        the last (level). None if they are not in memory: use read()."""

    async def read(self, lane: int, pos: int, max_bytes: int) -> list[Stored]:
        """The same from disk. Starts at the first record at or after `pos` (older ones may be trimmed).
        Damaged rows come as voids, promise (4). Raises StoreError if the database cannot be read at all."""

    async def find(self, lane: int, at_ms: int) -> int:
        """The lowest position stored at or after the wall-clock time; last + 1 if none. For `start: time`."""

    def add_hop(self, hop: Hop) -> None:
        """Register a hop, or give an existing one new peer, filters, lanes and limits: its cursors stay."""

    def remove_hop(self, name: str) -> None:
        """Forget a hop and its cursors; what it had not taken may be trimmed. Unknown names are ignored."""

    def advance(
        self,
        hop: str,
        lane: int,
        pos: int,
        *,
        custody: int = 0,
        filtered: int = 0,
        expired: int = 0,
        quarantined: int = 0,
        dropped: int = 0,
    ) -> None:
        """Move a cursor forward to `pos`; the counts say what became of the messages since the last advance.
        Cursors never move back: a lower `pos` is ignored (its counts too). Committed within 50 ms; a crash in
        between repeats what the next keeper takes for repeats. Unknown hops are ignored."""

    def behind(self, hop: str, lane: int) -> Behind:
        """What the hop has not taken."""

    def lagging(self) -> list[str]:
        """Names of hops beyond their max_lag. The owner says so, then calls remove_hop."""

    def count(
        self,
        peer: str,
        class_name: str,
        *,
        received: int = 0,
        accepted: int = 0,
        repeats: int = 0,
        refused: int = 0,
        corrupt: int = 0,
    ) -> None:
        """Ledger deltas of a door for what append() does not see (refused before, live only)."""

    def count_node(
        self,
        class_name: str,
        *,
        accepted: int = 0,
        originated: int = 0,
        stored: int = 0,
        live_only: int = 0,
        no_taker: int = 0,
    ) -> None:
        """Ledger deltas of the node, for what append() does not see."""

    def quarantine(self, record: bytes, reason: str, peer: str, *, lane: int = 0, pos: int = 0) -> None:
        """Keep a copy of a record aside; an empty one is fetched from the log at `lane`, `pos`.

        At most 1,024 of them and 32 MiB: the oldest go first."""

    def quarantined(self) -> list[Quarantined]:
        """What is kept aside, oldest first."""

    def ledger(self) -> Ledger:
        """The ledger as of now: what is committed and what is on its way with the next commit."""

    def note_source(self, source: bytes, node: str) -> bool:
        """Bind a source to the node that introduced it, for good. False if it belongs to another node."""

    def node_of_source(self, source: bytes) -> str | None:
        """The node a source belongs to, None if nobody introduced it."""

    def statistics(self) -> StoreStatistics: ...

    def usage(self) -> Usage: ...

    @property
    def full(self) -> bool:
        """True while data is refused, by the budget or by the disk. Withhold credit."""

    @property
    def degraded(self) -> str:
        """Why the disk refuses data, in words for people; "" when all is well."""

    async def watch(self) -> None:
        """Run in the daemon's nursery: raises StoreError if the writer thread dies, else never returns."""

    async def aclose(self) -> None:
        """Decide what is queued, write it, let go of the directory. Idempotent."""


__all__ = [
    "FORGET_AFTER",
    "MAX_RANGES",
    "Append",
    "Behind",
    "Hop",
    "LaneUsage",
    "Outcome",
    "OutcomeKind",
    "Quarantined",
    "Store",
    "StoreError",
    "StoreFormatError",
    "StoreInUseError",
    "StoreStatistics",
    "Stored",
    "Usage",
]
