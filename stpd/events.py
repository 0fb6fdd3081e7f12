"""What happens, told to whoever watches.

(1) `publish` never blocks and costs a few microseconds when nobody watches.
(2) Every watcher has a queue of its own, bounded; what a slow one misses is counted and told to it as one
    `dropped` record where the gap is. One slow watcher costs the others nothing.
"""

from collections import deque
from collections.abc import Callable
from typing import Any, Final

import trio
from attrs import Factory, define

from stpd.status import EventRecord

WATCHER_QUEUE: Final = 256
"""Events that may wait for one watcher."""
MAX_WATCHERS: Final = 32
"""Watchers at once; further ones are refused."""


class TooManyWatchersError(Exception):
    """MAX_WATCHERS are watching already."""


@define(kw_only=True)
class EventStatistics:
    """Counters since the start."""

    published: int = 0
    dropped: int = 0
    watchers: int = 0


@define(eq=False)
class EventWatcher:
    """One watcher's view: await `receive()` again and again, `close()` when done."""

    _bus: "EventBus"
    _limit: int
    _queue: deque[EventRecord] = Factory(deque)
    _dropped: int = 0
    _wake: trio.Event = Factory(trio.Event)

    def offer(self, event: EventRecord) -> bool:
        """Queue one event; False if it had to be dropped."""
        if self._dropped or len(self._queue) >= self._limit:
            self._dropped += 1
            return False
        self._queue.append(event)
        self._wake.set()
        return True

    async def receive(self) -> EventRecord:
        """Return the next event, in order. Where events are missing, a `dropped` record says how many."""
        while not self._queue and not self._dropped:
            self._wake = trio.Event()
            await self._wake.wait()
        if self._queue:
            return self._queue.popleft()
        missed, self._dropped = self._dropped, 0
        return EventRecord(
            time_ms=self._bus.wall_ms(),
            kind="dropped",
            text=f"dropped {missed} events: this watcher was too slow",
            fields={"count": missed},
        )

    def close(self) -> None:
        """Stop watching. Harmless when repeated."""
        self._bus.forget(self)


@define(eq=False)
class EventBus:
    """The daemon's one place to say that something happened."""

    wall_ms: Callable[[], int]
    """Milliseconds since 1970."""
    queue_limit: int = WATCHER_QUEUE
    _watchers: list[EventWatcher] = Factory(list)
    _statistics: EventStatistics = Factory(EventStatistics)

    def publish(self, kind: str, text: str, *, node: str = "", **fields: Any) -> None:
        """Tell all watchers. `kind` as listed at EventRecord; `fields` must be what JSON can write."""
        self._statistics.published += 1
        if not self._watchers:
            return
        event = EventRecord(time_ms=self.wall_ms(), kind=kind, text=text, node=node, fields=fields)
        for watcher in self._watchers:
            if not watcher.offer(event):
                self._statistics.dropped += 1

    def watch(self) -> EventWatcher:
        """Begin to watch. Raises TooManyWatchersError beyond MAX_WATCHERS."""
        if len(self._watchers) >= MAX_WATCHERS:
            raise TooManyWatchersError(f"{MAX_WATCHERS} watchers already")
        watcher = EventWatcher(self, self.queue_limit)
        self._watchers.append(watcher)
        return watcher

    def forget(self, watcher: EventWatcher) -> None:
        """Drop a watcher; see EventWatcher.close."""
        if watcher in self._watchers:
            self._watchers.remove(watcher)

    def statistics(self) -> EventStatistics:
        """Return the counters."""
        self._statistics.watchers = len(self._watchers)
        return self._statistics
