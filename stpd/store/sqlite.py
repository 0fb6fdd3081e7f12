"""The store on one disk: the trio thread's side of it. See base for its promises.

The trio thread keeps what it needs to answer at once: where every lane and cursor stands as of the last commit
it has heard of, the ledger's sums, the newest records. Everything else is the writer's (writer, commits) or is
read in a worker thread (reader).
"""

from __future__ import annotations

import secrets
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import trio
from attrs import define, evolve

from stp.core.errors import CorruptError
from stp.records import VOID, read_record
from stpd.ledger import Door, HopLane, Ledger, Node
from stpd.store.base import (
    Append,
    Behind,
    Hop,
    LaneUsage,
    Outcome,
    OutcomeKind,
    Quarantined,
    Stored,
    StoreError,
    StoreStatistics,
    Usage,
)
from stpd.store.cache import RecordCache
from stpd.store.changes import Aside, CursorState, LaneState, Move, Result
from stpd.store.commits import Committer, Options
from stpd.store.reader import Reader
from stpd.store.redo import settle
from stpd.store.reserve import Reserve
from stpd.store.schema import DATABASE, DirectoryLock, open_database
from stpd.store.tally import Tally
from stpd.store.writer import GROUP_BYTES, Flush, Writer

MIN_BUDGET: Final = 8 << 20
DEFAULT_BUDGET: Final = 1 << 30
MIN_RESERVE: Final = 2 << 20
MAX_RESERVE: Final = 64 << 20
"""The reserve is an eighth of the budget between these."""
DEFAULT_CACHE: Final = 64 << 20

ROOM_AGAIN: Final = 0.95
"""Share of the limit below which a store that refused for want of room no longer calls itself full."""

QUEUE_BYTES: Final = 64 << 20
QUEUE_RECORDS: Final = 65_536
"""Records that wait for the writer, at most; more are refused as FULL."""


class SqliteStore:
    """A Store (base) in a directory of its own. `await SqliteStore.open(...)`, or `async with` what it returns."""

    def __init__(self, parts: Parts, *, cache_bytes: int, budget: int) -> None:
        """Use `open`."""
        committer, options = parts.committer, parts.options
        self.store_id = options.own_source
        self.on_commit: Callable[[list[Stored]], None] | None = None
        self._lock = parts.lock
        self._reader = parts.reader
        self._read_turn = trio.Lock()
        self._statistics = parts.statistics
        self._reserve = committer.reserve
        self._budget = budget
        self._limit = options.limit
        self._clock = options.clock
        self._cache = RecordCache(cache_bytes)
        self._token = trio.lowlevel.current_trio_token()
        self._queued_bytes = 0
        self._queued_records = 0
        self._refusing = False
        self._in_turn = False
        self._used = committer.used
        self._ended = trio.Event()
        self._closed = False
        self._load(committer)
        self._degraded = "" if self._reserve.held else "no room on the disk for the reserve"
        group_bytes = min(GROUP_BYTES, self._reserve.size // 2)
        self._writer = Writer(committer, parts.statistics, self._deliver, group_bytes, self._degraded)
        self._writer.start()

    @classmethod
    async def open(
        cls,
        path: str | Path,
        *,
        node_id: bytes = b"",
        budget_bytes: int = DEFAULT_BUDGET,
        reserve_bytes: int = 0,
        retention_s: float = 0.0,
        cache_bytes: int = DEFAULT_CACHE,
        new_id: bool = False,
        clock: Callable[[], float] = time.time,
    ) -> Self:
        """Open the store in the directory `path`, or make it.

        `node_id` binds the directory to a node: another node's is refused. `budget_bytes` holds records and
        reserve together; the write-ahead log (≤ 64 MiB as a rule) comes on top. `reserve_bytes` 0 means an
        eighth of the budget.
        `retention_s`: seconds that records stay after every hop has taken them (0: none, as gateways want it).
        `new_id` is for files that came from a backup: numbers given since then must not be given again, so the
        store numbers under a new source from 1 (R-10-26). What is in the log keeps its source and number.
        `clock` is the wall clock. Raises StoreError, StoreInUseError or StoreFormatError.
        """
        reserve = reserve_bytes or min(max(budget_bytes // 8, MIN_RESERVE), MAX_RESERVE)
        if budget_bytes < max(MIN_BUDGET, 2 * reserve):
            raise StoreError(
                f"a budget of {budget_bytes} bytes is too small: at least {max(MIN_BUDGET, 2 * reserve)}"
            )
        parts = await trio.to_thread.run_sync(
            open_parts, Path(path), node_id, budget_bytes - reserve, reserve, retention_s, clock, new_id
        )
        return cls(parts, cache_bytes=cache_bytes, budget=budget_bytes)

    def _load(self, committer: Committer) -> None:
        """What stands in the tables, before the writer starts."""
        log = committer.log
        self._lanes: dict[int, LaneState] = dict(log.lanes)
        self._cursors: dict[tuple[str, int], CursorState] = dict(log.cursors)
        self._next_ms = {key: cursor.next_ms for key, cursor in log.cursors.items()}
        self._level: dict[int, set[tuple[str, int]]] = {lane: set() for lane in self._lanes}
        for key, next_ms in self._next_ms.items():
            if not next_ms:
                self._level[key[1]].add(key)
        self.hops: dict[str, Hop] = log.load_hops()
        self._changing: dict[str, int] = {}
        """Hops changed here and not yet in the tables: how often. What the writer says of them is stale."""
        self._sums = Tally.load(log.conn)
        self._sources: dict[bytes, str] = dict(log.conn.execute("SELECT source, node FROM origin"))
        self._quarantined = list(committer.quarantine.entries)
        for lane in self._lanes.values():
            self._cache.level(lane.lane, lane.last)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    # -- appending ------------------------------------------------------------------------------------------

    def append(self, item: Append) -> None:
        size = item.head.size
        if self._degraded:
            self._statistics.full_disk += 1
        elif self._used + self._queued_bytes + size > self._limit:
            self._statistics.full_budget += 1
            self._refusing = True
        elif self._queued_bytes + size > QUEUE_BYTES or self._queued_records >= QUEUE_RECORDS:
            self._statistics.full_queue += 1
        elif self._ended.is_set() or self._closed:
            self._refuse(item, OutcomeKind.ERROR)
            return
        else:
            self._queued_bytes += size
            self._queued_records += 1
            self._writer.put(item, wake=not self._in_turn)
            return
        self._refuse(item, OutcomeKind.FULL)

    def turn_begins(self) -> None:
        self._in_turn = True

    def turn_ends(self) -> None:
        self._in_turn = False
        if self._queued_records:
            done = self._writer.commit_here(self._queued_bytes)
            if done is not None:
                self._settle(*done)

    def _refuse(self, item: Append, kind: OutcomeKind) -> None:
        self._sums.refuse(item)
        self._writer.change(lambda changes: changes.tally.refuse(item))
        item.done(Outcome(kind, 0))

    async def flush(self) -> None:
        done = trio.Event()
        if not self._ended.is_set():
            self._writer.put(Flush(done.set))
            await done.wait()
        else:
            await trio.lowlevel.checkpoint()

    def _deliver(self, result: Result, flushes: list[Flush]) -> None:
        """In the writer thread: hand the trio thread what became of a commit."""
        result.degraded = self._writer.degraded
        try:
            self._token.run_sync_soon(self._hear, result, flushes)
        except trio.RunFinishedError:
            pass  # nobody is left to tell; what is committed is committed

    def _hear(self, result: Result, flushes: list[Flush]) -> None:
        self._writer.on_heard()
        self._settle(result, flushes)

    def _settle(self, result: Result, flushes: list[Flush]) -> None:
        """In the trio thread: take over the new state, then tell everybody, in that order."""
        self._used = result.used
        self._degraded = result.degraded
        for lane in result.lanes:
            self._lanes[lane.lane] = lane
        self._sums.add(result.tally)
        for name in result.hops:
            self._changing[name] -= 1
            if not self._changing[name]:
                del self._changing[name]
        for cursor in result.cursors:  # they moved before the records were added
            self._take_cursor(cursor)
        if result.stored:
            self._take_stored(result.stored)
        if result.quarantined is not None:
            self._quarantined = result.quarantined
        for source in result.forgotten:
            self._sources.pop(source, None)
        left = self._writer.heard() if result.failed or result.ended else []
        for item, outcome in result.decided:
            self._queued_bytes -= item.head.size
            self._queued_records -= 1
            item.done(outcome)
        if self.on_commit is not None and (result.stored or result.decided):
            self.on_commit(result.stored)
        for queued in left:
            if isinstance(queued, Flush):
                flushes.append(queued)
            else:
                self._queued_bytes -= queued.head.size
                self._queued_records -= 1
                self._refuse(queued, OutcomeKind.ERROR)
        for flush in flushes:
            flush.done()
        if result.ended:
            self._ended.set()

    def _take_stored(self, stored: list[Stored]) -> None:
        if len(stored) > 1:
            stored.sort(key=_by_place)
        now = trio.current_time()
        for one in stored:
            one.at = now
            self._cache.add(one)
            level = self._level[one.lane]
            if level:
                for key in level:
                    self._next_ms[key] = one.at_ms
                level.clear()

    def _take_cursor(self, cursor: CursorState) -> None:
        hop = self.hops.get(cursor.hop)
        if hop is None or cursor.hop in self._changing or cursor.lane not in hop.lanes:
            return  # removed or changed since: the commit that knows of it will tell
        key = (cursor.hop, cursor.lane)
        self._cursors[key] = cursor
        self._next_ms[key] = cursor.next_ms
        if cursor.next_ms:
            self._level[cursor.lane].discard(key)
        else:
            self._level[cursor.lane].add(key)
        if cursor.pos > hop.cursors.get(cursor.lane, -1):
            hop.cursors[cursor.lane] = cursor.pos

    # -- reading --------------------------------------------------------------------------------------------

    def last(self, lane: int) -> int:
        return self._lanes[lane].last

    def first(self, lane: int) -> int:
        return self._lanes[lane].base + 1

    def cached(self, lane: int, pos: int, max_bytes: int) -> list[Stored] | None:
        return self._cache.get(lane, pos, max_bytes)

    async def read(self, lane: int, pos: int, max_bytes: int) -> list[Stored]:
        state = self._lanes[lane]
        last, total = state.last, state.messages
        async with self._read_turn:
            found = await trio.to_thread.run_sync(self._reader.read, lane, pos, last, total, max_bytes)
        self._statistics.reads += 1
        self._statistics.read_records += len(found)
        now, now_ms = trio.current_time(), self._clock() * 1000
        damaged = []
        for stored in found:
            stored.at = now - max(now_ms - stored.at_ms, 0) / 1000 if stored.at_ms else now
            if stored.damaged:
                damaged.append(stored)
        if damaged:
            self._writer.change(lambda changes: changes.damaged.extend(damaged))
        return found

    async def find(self, lane: int, at_ms: int) -> int:
        last = self._lanes[lane].last
        async with self._read_turn:
            return await trio.to_thread.run_sync(self._reader.find, lane, at_ms, last)

    # -- hops -----------------------------------------------------------------------------------------------

    def add_hop(self, hop: Hop) -> None:
        known = self.hops.get(hop.name)
        given = known.cursors if known is not None else hop.cursors
        cursors = {}
        for lane in hop.lanes:
            state = self._lanes[lane]
            cursors[lane] = min(max(given.get(lane, hop.cursors.get(lane, 0)), state.base), state.last)
        created = known.created_ms if known is not None else hop.created_ms or int(self._clock() * 1000)
        mine = evolve(hop, cursors=cursors, created_ms=created)
        self.hops[hop.name] = mine
        for key in [key for key in self._cursors if key[0] == hop.name and key[1] not in hop.lanes]:
            self._forget_cursor(key)
        self._change_hop(hop.name, evolve(mine, cursors=dict(cursors)))

    def remove_hop(self, name: str) -> None:
        if self.hops.pop(name, None) is None:
            return
        for key in [key for key in self._cursors if key[0] == name]:
            self._forget_cursor(key)
        self._change_hop(name, None)

    def _change_hop(self, name: str, hop: Hop | None) -> None:
        self._changing[name] = self._changing.get(name, 0) + 1
        self._writer.change(lambda changes: changes.change_hop(name, hop))

    def _forget_cursor(self, key: tuple[str, int]) -> None:
        del self._cursors[key], self._next_ms[key]
        self._level[key[1]].discard(key)

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
        known = self.hops.get(hop)
        if known is None or pos <= known.cursors.get(lane, pos):
            return
        known.cursors[lane] = pos
        move = Move(pos, custody, filtered, expired, quarantined, dropped)
        self._writer.change(lambda changes: changes.move(hop, lane, move))

    def behind(self, hop: str, lane: int) -> Behind:
        cursor = self._cursors.get((hop, lane))
        if cursor is None:
            return Behind(0, 0, 0.0)
        state = self._lanes[lane]
        next_ms = self._next_ms[hop, lane]
        age = max(self._clock() - next_ms / 1000, 0.0) if next_ms else 0.0
        return Behind(state.messages - cursor.messages, state.bytes - cursor.bytes, age)

    def lagging(self) -> list[str]:
        return [hop.name for hop in self.hops.values() if self._lags(hop)]

    def _lags(self, hop: Hop) -> bool:
        if not hop.max_lag_s and not hop.max_lag_bytes:
            return False
        behind = [self.behind(hop.name, lane) for lane in hop.lanes]
        return bool(
            (hop.max_lag_s and max(one.oldest_age for one in behind) > hop.max_lag_s)
            or (hop.max_lag_bytes and sum(one.bytes for one in behind) > hop.max_lag_bytes)
        )

    # -- ledger, quarantine, sources ------------------------------------------------------------------------

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
        delta = Tally(doors={(peer, class_name): [received, accepted, repeats, refused, corrupt]})
        self._sums.add(delta)
        self._writer.change(lambda changes: changes.tally.add(delta))

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
        delta = Tally(nodes={class_name: [accepted, originated, stored, live_only, no_taker]})
        self._sums.add(delta)
        self._writer.change(lambda changes: changes.tally.add(delta))

    def quarantine(self, record: bytes, reason: str, peer: str, *, lane: int = 0, pos: int = 0) -> None:
        source, number, messages = bytes(16), 0, 0
        try:
            head = read_record(record)
        except CorruptError:
            pass  # then only the bytes are known
        else:
            source, number = head.source, head.number
            messages = 0 if head.kind == VOID else head.messages
            lane = lane or head.lane
        at_ms = int(self._clock() * 1000)
        entry = Quarantined(0, lane, pos, source, number, reason, peer, messages, len(record), at_ms)
        self._statistics.quarantined += 1
        self._writer.change(lambda changes: changes.asides.append(Aside(entry, record)))

    def quarantined(self) -> list[Quarantined]:
        return list(self._quarantined)

    def ledger(self) -> Ledger:
        doors = [Door(peer, name, *counts) for (peer, name), counts in sorted(self._sums.doors.items())]
        nodes = [Node(name, *counts) for name, counts in sorted(self._sums.nodes.items())]
        hops = []
        for (hop, number), cursor in sorted(self._cursors.items()):
            total = self._lanes[number].messages
            hops.append(
                HopLane(
                    hop=hop,
                    lane=number,
                    routed=total - cursor.start,
                    custody=cursor.custody,
                    behind=total - cursor.messages,
                    expired=cursor.expired,
                    dropped=cursor.dropped,
                    filtered=cursor.filtered,
                    quarantined=cursor.quarantined,
                )
            )
        return Ledger(doors, nodes, hops)

    def note_source(self, source: bytes, node: str) -> bool:
        known = self._sources.get(source)
        if known is None:
            self._sources[source] = node
            self._writer.change(lambda changes: changes.sources.__setitem__(source, node))
            return True
        return known == node

    def node_of_source(self, source: bytes) -> str | None:
        return self._sources.get(source)

    # -- how it stands --------------------------------------------------------------------------------------

    def statistics(self) -> StoreStatistics:
        return evolve(
            self._statistics,
            cache_bytes=self._cache.size,
            cache_records=len(self._cache),
            queue_records=self._queued_records,
            queue_bytes=self._queued_bytes,
            degraded=self._degraded,
        )

    def usage(self) -> Usage:
        now = self._clock()
        lanes = {
            number: LaneUsage(
                first=lane.base + 1,
                last=lane.last,
                bytes=lane.bytes - lane.base_bytes,
                messages=lane.messages - lane.base_messages,
                oldest_age=max(now - lane.oldest_ms / 1000, 0.0) if lane.oldest_ms else 0.0,
            )
            for number, lane in self._lanes.items()
        }
        return Usage(self._used, self._queued_bytes, self._limit, self._budget, self._reserve.free(), lanes)

    @property
    def full(self) -> bool:
        if self._refusing and self._used + self._queued_bytes < self._limit * ROOM_AGAIN:
            self._refusing = False
        return bool(self._degraded) or self._refusing

    @property
    def degraded(self) -> str:
        return self._degraded

    async def watch(self) -> None:
        """Run it in the daemon's nursery: raises StoreError if the writer dies; returns after aclose()."""
        await self._ended.wait()
        if self._writer.fault is not None:
            raise StoreError(f"the store's writer has died: {self._writer.fault!r}") from self._writer.fault

    async def aclose(self) -> None:
        self._closed = True
        self._writer.close()
        with trio.CancelScope(shield=True):
            await self._ended.wait()
            await trio.to_thread.run_sync(self._writer.join)
            async with self._read_turn:
                self._reader.close()
        self._lock.release()


def _by_place(stored: Stored) -> tuple[int, int]:
    return stored.lane, stored.pos


@define
class Parts:
    """What a store is made of, before it has threads."""

    lock: DirectoryLock
    committer: Committer
    reader: Reader
    statistics: StoreStatistics
    options: Options


def open_parts(
    path: Path,
    node_id: bytes,
    limit: int,
    reserve_bytes: int,
    retention_s: float,
    clock: Callable[[], float],
    new_id: bool = False,
) -> Parts:
    """All that touches the disk at the start. Raises StoreError and its kinds."""
    lock = DirectoryLock(path)
    try:
        conn = open_database(path / DATABASE)
        try:
            reserve = Reserve(path, reserve_bytes)
            _settle(conn, reserve)
            options = Options(path, _identify(conn, path, node_id, new_id), limit, retention_s, clock)
            reserve.take()
            statistics = StoreStatistics()
            committer = Committer(conn, options, reserve, statistics)
            return Parts(lock, committer, Reader(path / DATABASE), statistics, options)
        except sqlite3.Error as exc:
            conn.close()
            raise StoreError(f"cannot use the store in {path}: {exc}") from exc
        except BaseException:
            conn.close()
            raise
    except BaseException:
        lock.release()
        raise


def _settle(conn: sqlite3.Connection, reserve: Reserve) -> None:
    """Apply what the last run left; on a full disk the reserve has the room for it. Raises sqlite3.Error."""
    try:
        settle(conn)
    except sqlite3.OperationalError as exc:
        if exc.sqlite_errorcode & 0xFF != sqlite3.SQLITE_FULL:
            raise
        reserve.release()
        settle(conn)


def _identify(conn: sqlite3.Connection, path: Path, node_id: bytes, new_id: bool) -> bytes:
    """The store's id, made with the store; StoreError if the store is another node's."""
    meta: dict[str, Any] = dict(conn.execute("SELECT key, value FROM meta"))
    if not meta:
        meta = {"age": 0, "node_id": node_id, "store_id": secrets.token_bytes(16)}
        conn.execute("BEGIN IMMEDIATE")
        conn.executemany("INSERT INTO meta VALUES (?, ?)", list(meta.items()))
        conn.execute("COMMIT")
    if node_id and meta["node_id"] and meta["node_id"] != node_id:
        raise StoreError(
            f"the store in {path} belongs to another node: give this node a directory of its own,"
            " or its former name and domain"
        )
    if new_id:
        meta["store_id"] = secrets.token_bytes(16)
        conn.execute("BEGIN IMMEDIATE")
        conn.execute("UPDATE meta SET value = ? WHERE key = 'store_id'", (meta["store_id"],))
        conn.execute("UPDATE lane SET number = 0")
        conn.execute("COMMIT")
    return bytes(meta["store_id"])
