"""The management API: one table of versioned JSON endpoints over mutual TLS, and a stream of events.

(1) Nobody is served without a certificate of an operator: URI SAN stp-operator://<domain>/<name>?role=<role>.
(2) Every change an operator makes stands in the log with the operator's name.
"""

from collections.abc import Awaitable
from typing import Protocol, TypeAlias, TypeVar

from stpd.events import EventWatcher
from stpd.status import (
    BufferStatus,
    DaemonStatus,
    EdgeStatus,
    KeyStatus,
    LedgerStatus,
    NewKey,
    ReaderStatus,
    ReloadReport,
    SessionStatus,
    UpstreamStatus,
)

T = TypeVar("T")
Answer: TypeAlias = T | Awaitable[T]
"""Sync or async, as suits the daemon."""


class NotFoundError(Exception):
    """There is no such session, reader or key. The text says what was looked for."""


class RefusedError(Exception):
    """The daemon's state forbids it, or a value makes no sense. The text says why; nothing was changed."""


class Managed(Protocol):
    """What the daemon offers to operators. Sync methods must not block; async ones get REQUEST_TIMEOUT."""

    def status(self) -> Answer[DaemonStatus]:
        """The daemon in one view."""

    def sessions(self) -> Answer[list[SessionStatus]]:
        """All live sessions."""

    def session(self, session_id: str) -> Answer[SessionStatus]:
        """One session by its id in hexadecimal, or by a unique beginning of it. Raises NotFoundError."""

    def kick(self, session_id: str) -> Answer[None]:
        """Close a session; its peer may come back at once. Raises NotFoundError."""

    def edges(self) -> Answer[list[EdgeStatus]]:
        """Nodes below this one, connected or not."""

    def upstreams(self) -> Answer[list[UpstreamStatus]]:
        """Nodes above this one, the primary first."""

    def readers(self) -> Answer[list[ReaderStatus]]:
        """Durable subscriptions."""

    def remove_reader(self, name: str) -> Answer[None]:
        """Forget a durable subscription and what waits for it. Raises NotFoundError."""

    def buffer(self) -> Answer[BufferStatus]:
        """The store."""

    def ledger(self) -> Answer[LedgerStatus]:
        """Where every message is."""

    def keys_create(self, role: str, uses: int, ttl_s: float, tags: list[str]) -> Answer[NewKey]:
        """Make an enrolment key: good for `uses` nodes (0: any number) and `ttl_s` seconds (0: for ever).

        Raises RefusedError where this node does not enrol.
        """

    def keys_list(self) -> Answer[list[KeyStatus]]:
        """Enrolment keys, without their secrets."""

    def keys_revoke(self, key_id: str) -> Answer[None]:
        """End an enrolment key; nodes that joined with it stay. Raises NotFoundError."""

    def reload(self) -> Answer[ReloadReport]:
        """Read configuration, certificates and revocations again. What is wrong changes nothing."""

    def drain(self) -> Answer[None]:
        """Take no new sessions, send the present ones elsewhere, then end. Returns at once."""

    def events(self) -> EventWatcher:
        """Begin to watch what happens. Raises TooManyWatchersError."""
