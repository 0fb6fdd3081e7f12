"""The writer: a thread with the queue to it. It takes whatever is queued into one transaction (group commit),
tells the trio thread with one call per commit, and only then does what nobody waits for.

(1) A commit that fails fails everything in it and everything queued until the trio thread has heard of it
    (promise 6 of base): the writer takes no record in between (`_deaf`).
(2) Changes (cursors, counts, hops) are never failed: they wait for a commit that succeeds. While the disk refuses
    data they are tried on their own, once a second, with the reserve released (promise 5).
(3) An error that is not the disk's ends the thread, and `fault` says so: a defect must not look like weather.
(4) Turns never overlap (`_busy`), and what they decided is heard in their order, also where the trio thread takes
    a turn itself (`commit_here`): it does so for little data on a disk that has proved fast, for then two changes
    of thread cost more than the commit.
"""

from __future__ import annotations

import sqlite3
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Final

from stpd.store.base import Append, Outcome, OutcomeKind, StoreStatistics
from stpd.store.changes import Changes, Result
from stpd.store.commits import Committer

GROUP_BYTES: Final = 8 << 20
GROUP_RECORDS: Final = 4_096
"""At most this much in one commit, so that nobody waits long for a commit that is not their own."""

CHANGES_DELAY: Final = 0.05
"""Seconds that cursors and counts wait for a record to share a commit with."""

PROBE_INTERVAL: Final = 1.0
"""Seconds between tries while the disk refuses."""

HERE_BYTES: Final = 64 << 10
HERE_RECORDS: Final = 64
"""At most this much is committed in the trio thread; a thread of its own is the better place for more."""

FAST_COMMIT: Final = 0.002
"""Seconds that small commits may take on average for the trio thread to wait for them."""

SLOW_COMMIT: Final = 0.02
SLOW_FOR: Final = 1.0
"""Seconds: after a commit of SLOW_COMMIT, the trio thread waits for none for SLOW_FOR."""

DISK_ERRORS: Final = frozenset(
    (
        sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_CANTOPEN,
        sqlite3.SQLITE_READONLY, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_NOMEM, sqlite3.SQLITE_BUSY,
        sqlite3.SQLITE_PROTOCOL,
    )
)  # fmt: skip
"""Primary result codes that the world is to blame for; any other is a defect of ours."""


class Flush:
    """A marker in the queue: `done` is called in the trio thread when everything before it is decided."""

    __slots__ = ("done",)

    def __init__(self, done: Callable[[], None]) -> None:
        self.done = done


class Writer:
    """Methods up to `join` are the trio thread's, the rest the thread's own."""

    def __init__(
        self,
        committer: Committer,
        statistics: StoreStatistics,
        deliver: Callable[[Result, list[Flush]], None],
        group_bytes: int = GROUP_BYTES,
        degraded: str = "",
    ) -> None:
        """`deliver` is called in the writer thread, once per commit and once at the end."""
        self._group_bytes = group_bytes
        self._committer = committer
        self._statistics = statistics
        self._deliver = deliver
        self._mutex = threading.Lock()
        self._busy = threading.Lock()
        self._signal = threading.Lock()
        self._signal.acquire()
        self._queue: deque[Append | Flush] = deque()
        self._changes = Changes()
        self._changed_at = 0.0
        self._sleeping = False
        self._sleeps_until = 0.0
        self._commit_time = FAST_COMMIT
        self._slow_until = 0.0
        self._told = self._heard = 0
        self._deaf = False
        self._closing = False
        self._over = False
        self._reopen = False
        self.degraded = degraded
        self.fault: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="stpd-store", daemon=True)

    # -- the trio thread's side -----------------------------------------------------------------------------

    def start(self) -> None:
        self._thread.start()

    def put(self, item: Append | Flush, *, wake: bool = True) -> None:
        """Queue it. Without `wake`, `commit_here` is to follow in the same turn."""
        with self._mutex:
            self._queue.append(item)
            if wake and self._sleeping:
                self._wake()

    def commit_here(self, size: int) -> tuple[Result, list[Flush]] | None:
        """Commit what is queued, `size` bytes of it, and say what became: promise (4). None: the thread will."""
        if size <= HERE_BYTES and self._may_commit_here() and self._busy.acquire(blocking=False):
            try:
                if self._told == self._heard and not self._over:
                    items, flushes = self._take()
                    result = self._commit_group(items, flushes, upkeep=False)
                    if self._committer.has_upkeep:
                        self._rouse()
                    return None if result is None else (result, flushes)
            finally:
                self._busy.release()
        self._rouse()
        return None

    def _may_commit_here(self) -> bool:
        """Little, nothing wrong, and a disk that has been fast."""
        if not 0 < len(self._queue) <= HERE_RECORDS or self._deaf or self._closing or self.degraded:
            return False
        if self._commit_time > FAST_COMMIT or self._committer.has_upkeep:
            return False
        return time.monotonic() >= self._slow_until

    def _rouse(self) -> None:
        with self._mutex:
            if self._sleeping:
                self._wake()

    def on_heard(self) -> None:
        """The trio thread has taken over one result that `deliver` was called with."""
        self._heard += 1

    def change(self, apply: Callable[[Changes], object]) -> None:
        """Add to the changes. `apply` must be short: the thread may wait for it."""
        with self._mutex:
            if not self._changes:
                self._changed_at = time.monotonic()
                if self._sleeping and self._sleeps_until > self._changed_at + CHANGES_DELAY:
                    self._wake()
            apply(self._changes)

    def heard(self) -> list[Append | Flush]:
        """The trio thread has heard of a failure: what was queued meanwhile is its to fail; then we go on."""
        with self._mutex:
            left = list(self._queue)
            self._queue.clear()
            self._deaf = False
            if self._sleeping:
                self._wake()
        return left

    def close(self) -> None:
        """Ask the thread to decide what is queued and end."""
        with self._mutex:
            self._closing = True
            if self._sleeping:
                self._wake()

    def join(self) -> None:
        """Wait for its end. Blocks: call it in a worker thread."""
        self._thread.join()

    def _wake(self) -> None:
        self._sleeping = False
        self._signal.release()

    # -- the thread: waiting --------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while self._turn():
                pass
        except BaseException as exc:  # promise (3): whatever it is, it is raised where watch() runs
            self.fault = exc
        finally:
            with self._busy:
                self._over = True
                self._committer.close()
            with self._mutex:
                left = list(self._queue)
                self._queue.clear()
            result = self._refusal([item for item in left if isinstance(item, Append)], OutcomeKind.ERROR)
            result.ended = True
            self._tell(result, [item for item in left if isinstance(item, Flush)])

    def _turn(self) -> bool:
        """Wait for something to do and do it. False at the end."""
        self._wait()
        with self._busy:
            return self._work()

    def _work(self) -> bool:
        items, flushes = self._take()
        closing = self._committer.closing = self._closing
        if self.degraded and not items:
            self._probe(flushes)
        elif items or closing or self._committer.due():
            self._commit(items, flushes)
        elif flushes:
            self._tell(self._committer.describe(Result()), flushes)
        else:
            self._committer.tidy()
        self._committer.checkpoint()
        if not closing:
            return True
        with self._mutex:
            return bool(self._queue) and not self._deaf

    def _wait(self) -> None:
        with self._mutex:
            timeout = self._patience()
            if timeout <= 0:
                return
            self._sleeping = True
            self._sleeps_until = time.monotonic() + timeout
        woken = self._signal.acquire(timeout=timeout)
        with self._mutex:
            if not woken and not self._sleeping:
                self._signal.acquire()  # woken just as patience ended: the signal is ours to take
            self._sleeping = False

    def _patience(self) -> float:
        """Seconds to wait for a record; 0 if there is something to do."""
        if self._closing or (self._queue and not self._deaf):
            return 0.0
        if self.degraded:
            return PROBE_INTERVAL
        patience = self._committer.patience
        if self._changes:
            patience = min(patience, max(self._changed_at + CHANGES_DELAY - time.monotonic(), 0.0))
        return patience

    def _take(self) -> tuple[list[Append], list[Flush]]:
        """What is queued, as far as one commit takes it, and the changes if they go with it."""
        items: list[Append] = []
        flushes: list[Flush] = []
        with self._mutex:
            if not self._deaf:
                self._fill(items, flushes)
            late = time.monotonic() >= self._changed_at + CHANGES_DELAY
            if not (items or flushes or self._closing or late):
                return items, flushes
            changes, self._changes = self._changes, Changes()
        self._committer.pending.add(changes)
        return items, flushes

    def _fill(self, items: list[Append], flushes: list[Flush]) -> None:
        queue, room = self._queue, self._group_bytes
        while queue and room > 0 and len(items) < GROUP_RECORDS:
            item = queue.popleft()
            if isinstance(item, Flush):
                flushes.append(item)
            else:
                items.append(item)
                room -= item.head.size

    # -- the thread: committing -----------------------------------------------------------------------------

    def _commit(self, items: list[Append], flushes: list[Flush]) -> None:
        result = self._commit_group(items, flushes, upkeep=True)
        if result is not None:
            self._tell(result, flushes)

    def _commit_group(self, items: list[Append], flushes: list[Flush], *, upkeep: bool) -> Result | None:
        """What became of them; None if the commit failed, which is told by the way. R-10-25."""
        started = time.monotonic()
        try:
            result = self._committer.commit(items, upkeep=upkeep)
        except sqlite3.Error as exc:
            self._failed(exc, items, flushes)
            return None
        ended = time.monotonic()
        took = ended - started
        if took >= SLOW_COMMIT:
            self._slow_until = ended + SLOW_FOR
        if len(items) <= HERE_RECORDS:
            self._commit_time += (took - self._commit_time) / 8
        statistics = self._statistics
        statistics.commits += 1
        statistics.commits_here += not upkeep
        statistics.commit_seconds += took
        statistics.commit_seconds_max = max(statistics.commit_seconds_max, took)
        return result

    def _tell(self, result: Result, flushes: list[Flush]) -> None:
        self._told += 1
        self._deliver(result, flushes)

    def _failed(self, exc: sqlite3.Error, items: list[Append], flushes: list[Flush]) -> None:
        """Say so, stop listening until that is heard, and save what must always commit."""
        self._blame(exc)
        full = exc.sqlite_errorcode == sqlite3.SQLITE_FULL
        with self._mutex:
            self._deaf = True
        result = self._refusal(items, OutcomeKind.FULL if full else OutcomeKind.ERROR)
        result.failed = True
        if full:
            self._statistics.full_disk += len(items)
        else:
            self._statistics.errors += len(items)
        self._committer.pending.tally.add(result.tally)
        self._committer.reserve.release()
        self._tell(result, flushes)
        self._probe([])

    def _blame(self, exc: sqlite3.Error) -> None:
        """Note what the disk said; raise what it cannot have said."""
        code = getattr(exc, "sqlite_errorcode", 0)
        if code & 0xFF not in DISK_ERRORS:
            raise exc
        self._reopen = self._reopen or code != sqlite3.SQLITE_FULL
        self._statistics.commit_failures += 1
        name = getattr(exc, "sqlite_errorname", "")
        self.degraded = f"the disk refuses data: {exc} ({name})"

    def _probe(self, flushes: list[Flush]) -> None:
        """Commit what must always commit; data again when the reserve could be taken back."""
        try:
            result = self._committer.recover(reopen=self._reopen)
        except sqlite3.Error as exc:
            self._blame(exc)
            result = self._committer.describe(Result())
        else:
            self._reopen = False
            self._statistics.commits += 1
            if self._committer.reserve.held:
                self.degraded = ""
        self._tell(result, flushes)

    def _refusal(self, items: list[Append], kind: OutcomeKind) -> Result:
        outcome = Outcome(kind, 0)
        result = self._committer.describe(Result())
        for item in items:
            result.decided.append((item, outcome))
            result.tally.refuse(item)
        return result
