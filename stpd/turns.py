"""When what was queued leaves: soon, or with the turn of the socket that brought it.

(1) What one wake-up of a socket brings is committed once, and what came of it leaves by all sockets, when the turn
    ends: no other turn of the event loop is needed for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol

from stpd.store.base import Store


class Mover(Protocol):
    """A socket with sessions: the carriers and their listeners."""

    def wake(self) -> None: ...
    def send_now(self) -> None: ...


class Turns:
    """Of one daemon, over all its sockets."""

    def __init__(self, movers: Callable[[], Iterable[Mover]]) -> None:
        self._movers = movers
        self._store: Store | None = None

    def wake(self) -> None:
        """Something was queued: let it leave soon."""
        if self._store is None:
            for mover in self._movers():
                mover.wake()

    def send(self) -> None:
        """Something was queued, and nothing more follows: let it leave now."""
        if self._store is None:
            for mover in self._movers():
                mover.send_now()

    def begin(self, store: Store) -> None:
        """A socket has something: `end` follows before anything is awaited."""
        self._store = store
        store.turn_begins()

    def end(self) -> None:
        """That was all for now (1)."""
        assert self._store is not None
        self._store.turn_ends()
        self._store = None
        self.send()
