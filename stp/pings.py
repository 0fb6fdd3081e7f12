"""What a client asks its keeper to learn how far it is: pings, a load of echoes, and datagrams of its own.

(1) A ping goes through the keeper's message layer; an echo through its transport alone (protocol §10.5).
(2) Datagrams that nobody takes are bounded: MAX_UNTAKEN, the oldest are dropped and counted.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import AsyncIterator
from typing import Final

import trio

from stp.connection import Connection
from stp.control import Subscribe, Unsubscribe
from stp.core.errors import UsageError
from stp.core.verbs import AnySession
from stp.echo import MIN_SIZE, Load, LoadReport
from stp.lines import Unreachable
from stp.statistics import Ping

LOAD_SIZE: Final = 1000
"""Bytes of each echo request, where nothing else is said and as much fits into a packet."""
LAST_REPLIES: Final = 1.0
"""Seconds that a load waits for the replies that are under way when it has sent its last request, at least."""
MAX_RATE: Final = 125_000_000
"""Bytes a second of a load: what one process can hope to send."""
MAX_UNTAKEN: Final = 256


class Pings:
    """The pings, echoes and datagrams of one client."""

    def __init__(self, connection: Connection, node: str) -> None:
        self._connection = connection
        self._node = node
        self._ids = itertools.count(1)
        self._answers: dict[str, trio.Event] = {}
        self._load: Load | None = None
        self._untaken: deque[bytes] = deque()
        self._came = trio.Event()
        self.dropped = 0
        """Datagrams that nobody took (2)."""

    # -- through the message layer

    async def ask(self, timeout: float) -> Ping:
        """A subscription to nothing, and its answer. Raises Unreachable."""
        connection, ping_id = self._connection, f"ping-{next(self._ids)}"
        answered = self._answers[ping_id] = trio.Event()
        began = trio.current_time()
        try:
            with trio.move_on_after(timeout):
                link = connection.link
                if link is not None:
                    link.send(Subscribe(ping_id, (f"$inbox/{self._node}/ping",)))
                    connection.wake()
                    await answered.wait()
                    link.send(Unsubscribe(ping_id))
        finally:
            del self._answers[ping_id]
        if not answered.is_set():
            raise Unreachable(connection.where, timeout, connection.cause)
        took = trio.current_time() - began
        return Ping(took, min(took, connection.statistics().rtt))  # smoothed, so it may lag behind

    def on_subscribed(self, subscribed_id: str) -> bool:
        """Whether this answers a ping."""
        answered = self._answers.get(subscribed_id)
        if answered is not None:
            answered.set()
        return answered is not None

    # -- through the transport alone

    def send(self, data: bytes) -> bool:
        """Queue an unreliable datagram; False: not now. Raises UsageError when it fits into no packet."""
        link = self._connection.link
        if link is None or not link.session.live:
            return False
        taken = link.session.send_datagram(data)
        self._connection.wake()
        return taken

    async def received(self) -> AsyncIterator[bytes]:
        """Datagrams as they come, but for replies to our echo requests."""
        while True:
            while self._untaken:
                yield self._untaken.popleft()
            self._came = trio.Event()
            await self._came.wait()

    def on_datagram(self, data: bytes, now: float) -> None:
        if self._load is not None and self._load.on_datagram(data, now):
            return
        if len(self._untaken) >= MAX_UNTAKEN:
            self._untaken.popleft()
            self.dropped += 1
        self._untaken.append(data)
        self._came.set()

    async def load(self, rate: float, size: int, seconds: float) -> LoadReport:
        """Send echo requests of `size` bytes (0: LOAD_SIZE) at `rate` bytes a second for that long.

        Raises UsageError for what cannot be sent or while another load runs; Unreachable when the session ends.
        """
        if self._load is not None:
            raise UsageError("one load at a time")
        most = self._session(seconds).max_datagram_size
        size = size or min(LOAD_SIZE, most)
        if not MIN_SIZE <= size <= most:
            raise UsageError(f"{size} bytes; a packet here holds {MIN_SIZE} to {most}")
        if not 0 < rate <= MAX_RATE:
            raise UsageError(f"a load has up to {MAX_RATE * 8 / 1e6:.0f} Mbit/s")
        now = trio.current_time()
        load = self._load = Load(rate, size, now)
        try:
            end = now + seconds
            while now < end:
                session = self._session(seconds)
                while (data := load.request(now)) is not None:
                    load.on_sent(session.send_datagram(data))
                self._connection.wake()
                await trio.sleep_until(min(load.next_at, end))
                now = trio.current_time()
            await trio.sleep(max(LAST_REPLIES, 4 * self._connection.statistics().rtt))
            return load.report(seconds)
        finally:
            self._load = None

    def _session(self, seconds: float) -> AnySession:
        link = self._connection.link
        if link is None or not link.session.live:
            raise Unreachable(self._connection.where, seconds, self._connection.cause)
        return link.session
