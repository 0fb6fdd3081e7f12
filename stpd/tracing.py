"""Event logs of sessions: of all, where the configuration names a directory, or of one for a while, on request.

(1) A log on request ends by itself, after at most MAX_SECONDS.
(2) What logs cost on disk is bounded by stp.qlog; a session that is not logged costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Final

from attrs import define

from stp.core.session import Session
from stp.core.trace import Sink
from stp.core.verbs import AnySession
from stp.qlog import QlogDirectory, SessionLog
from stpd.peers import session_id
from stpd.status import TraceStatus

MAX_SECONDS: Final = 3600.0
"""The longest log on request."""


class TracingError(Exception):
    """A session cannot be logged. The text says why."""


@define
class _Running:
    session: Session
    log: SessionLog
    until: float


class Tracing:
    """All event logs of a daemon."""

    def __init__(
        self, configured: Path | None, on_request: Path, node: str, wall_ms: Callable[[], int]
    ) -> None:
        """`configured`: where all sessions are logged, None for nowhere; `on_request`: else where single ones are."""
        self._all = QlogDirectory(configured) if configured is not None else None
        self._directory = self._all or QlogDirectory(on_request)
        self._node = node
        self._wall_ms = wall_ms
        self._running: dict[int, _Running] = {}

    @property
    def observer(self) -> Callable[[Session, bytes], Sink | None] | None:
        """For `EndpointConfig.observer`."""
        return self._observe if self._all is not None else None

    def _observe(self, session: Session, origin: bytes) -> Sink | None:
        return self._directory.sink(origin.hex(), dialling=session.dialling, title=self._node)

    def begin(self, session: AnySession, seconds: float, now: float) -> TraceStatus:
        """Log this session from now on. Raises TracingError."""
        if not isinstance(session, Session):
            raise TracingError(
                f"over {session.carrier} there are no packets to log: ask the kernel (ss -ti, tcpdump)"
            )
        if self._all is not None:
            raise TracingError(f"all sessions are logged already, in {self._all.path}: see transport.qlog")
        if not 0 < seconds <= MAX_SECONDS:
            raise TracingError(f"a log lasts up to {MAX_SECONDS:.0f} s")
        self.end(session)
        name = session_id(session)[:16]
        sink = self._directory.sink(name, dialling=session.dialling, title=self._node)
        if sink is None:
            raise TracingError("too many sessions are logged already: wait until one of them ends")
        session.observe(sink, now)
        self._running[id(session)] = _Running(session, sink, now + seconds)
        until_ms = self._wall_ms() + round(seconds * 1000)
        who = "client" if session.dialling else "server"
        return TraceStatus(
            session=session_id(session),
            path=str(self._directory.path / f"{name}-{who}.sqlog"),
            until_ms=until_ms,
        )

    def end(self, session: Session) -> None:
        """Log it no more."""
        running = self._running.pop(id(session), None)
        if running is not None:
            session.observe(None)
            self._directory.stop(running.log)

    def check(self, now: float) -> None:
        """End what is due (1); call it about once a second."""
        for running in list(self._running.values()):
            if now >= running.until or not running.session.live:
                self.end(running.session)

    def until_ms(self, session: AnySession, now: float) -> int:
        """For PathStatus."""
        running = self._running.get(id(session))
        if running is not None:
            return self._wall_ms() + round((running.until - now) * 1000)
        return -1 if self._all is not None and isinstance(session, Session) else 0

    def counts(self) -> dict[str, int]:
        """For metrics: what was written and dropped."""
        found = self._directory.statistics
        return {
            "written": found.events,
            "dropped": found.dropped,
            "skipped": found.skipped,
            "errors": found.errors,
        }

    def close(self) -> None:
        self._directory.close()
