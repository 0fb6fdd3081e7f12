"""Event logs in files: qlog as a sequence of JSON texts (application/qlog+json-seq, RFC 7464), one file per session.

A sink of `core.trace` puts events into a bounded queue; a thread of its own makes JSON of them and writes. Viewers
that read qlog 0.3 draw the files as they are.

(1) Whoever logs never waits: what the queue does not hold is dropped, counted, and named in the file.
(2) The directory holds at most `max_files` files of at most about `max_bytes` each. A full file is followed by the
    next, with a head of its own; the oldest files that nobody writes go first.
(3) What the disk refuses ends that session's log, counted, and nothing else.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections import deque
from pathlib import Path
from typing import Any, BinaryIO, Final

from attrs import define

from stp.core.session import Session

QLOG_VERSION: Final = "0.3"
"""The one that viewers know; its events are those of draft-ietf-quic-qlog-quic-events-02 to -07."""
QLOG_FORMAT: Final = "JSON-SEQ"
SUFFIX: Final = ".sqlog"
RECORD_SEPARATOR: Final = b"\x1e"

MAX_QUEUE: Final = 20_000
"""Events that wait for the writer."""
MAX_OPEN: Final = 64
"""Sessions logged at a time."""
MAX_BYTES: Final = 64 * 1024 * 1024
MAX_FILES: Final = 128
CLOSE_TIMEOUT: Final = 2.0
"""Seconds that `close` waits for what is queued."""
WAIT: Final = 0.2
"""Seconds between two looks of the writer at its queue: it is woken for nothing."""
STATE: Final = "connectivity:connection_state_updated"
CLOSED: Final = "closed"
"""The last thing that is told of a session."""


@define
class QlogStatistics:
    """Counts since the start."""

    sessions: int = 0
    events: int = 0
    dropped: int = 0
    """Events that the queue did not hold."""
    skipped: int = 0
    """Sessions that were not logged: MAX_OPEN were."""
    files: int = 0
    removed: int = 0
    bytes: int = 0
    errors: int = 0
    """Files that the disk refused."""


class SessionLog:
    """The files of one session: a sink for its trace."""

    def __init__(self, directory: QlogDirectory, stem: str, head: dict[str, Any]) -> None:
        self._directory = directory
        self.stem = stem
        self.head = head
        self.began: float | None = None
        self.stream: BinaryIO | None = None
        self.path: Path | None = None
        self.size = 0
        self.number = 0
        self.dropped = 0
        self.over = False
        """Nothing more is taken; what is queued is written yet."""
        self.failed = False

    def __call__(self, now: float, event: str, data: dict[str, Any]) -> None:
        self._directory.take(self, now, event, data)


class QlogDirectory:
    """All event logs of one process. `sink` and `close` belong to one thread; the writer has its own."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        max_bytes: int = MAX_BYTES,
        max_files: int = MAX_FILES,
        max_queue: int = MAX_QUEUE,
    ) -> None:
        self.path = Path(path)
        self.statistics = QlogStatistics()
        self._max_bytes = max_bytes
        self._max_files = max_files
        self._max_queue = max_queue
        self._queue: deque[tuple[SessionLog, float, str, dict[str, Any]]] = deque()
        self._logs: set[SessionLog] = set()
        self._opened: set[SessionLog] = set()
        """The writer's own."""
        self._thread: threading.Thread | None = None
        self._closing = threading.Event()

    def sink(self, name: str, *, dialling: bool, title: str = "") -> SessionLog | None:
        """A log for one session; None when MAX_OPEN are open. `name` becomes the file's: hexadecimal digits."""
        self._logs = {log for log in self._logs if not log.over}
        if len(self._logs) >= MAX_OPEN or self._closing.is_set():
            self.statistics.skipped += 1
            return None
        who = "client" if dialling else "server"
        head = {
            "qlog_version": QLOG_VERSION,
            "qlog_format": QLOG_FORMAT,
            "title": title or "STP/1",
            "trace": {
                "vantage_point": {"name": title or "stp", "type": who},
                "common_fields": {
                    "ODCID": name,
                    "group_id": name,
                    "protocol_type": ["STP"],
                    "time_format": "relative",
                    "reference_time": round(time.time() * 1000, 3),
                },
            },
        }
        log = SessionLog(self, f"{name}-{who}", head)
        self._logs.add(log)
        self.statistics.sessions += 1
        if self._thread is None:
            self._thread = threading.Thread(target=self._write_all, name="qlog", daemon=True)
            self._thread.start()

        return log

    def take(self, log: SessionLog, now: float, event: str, data: dict[str, Any]) -> None:
        """For SessionLog."""
        if log.over:
            return
        last = event == STATE and data.get("new") == CLOSED
        if len(self._queue) >= self._max_queue and not last:  # (1)
            self.statistics.dropped += 1
            log.dropped += 1
            return
        self._queue.append((log, now, event, data))
        log.over = last

    def observe(self, session: Session, origin: bytes) -> SessionLog | None:
        """For `EndpointConfig.observer`: every session has its log, called by its first DCID."""
        return self.sink(origin.hex(), dialling=session.dialling)

    def stop(self, log: SessionLog) -> None:
        """This session is logged no more."""
        if not log.over:
            log.over = True
            self._queue.append((log, 0.0, "", {}))

    def close(self) -> None:
        """Write what is queued, for at most CLOSE_TIMEOUT, and close the files."""
        self._closing.set()
        if self._thread is not None:
            self._thread.join(CLOSE_TIMEOUT)

    # -- the writer's thread

    def _write_all(self) -> None:
        opened = self._opened
        while True:
            ending = self._closing.is_set()
            while self._queue:
                log, now, event, data = self._queue.popleft()
                opened.add(log)
                self._write(log, now, event, data)
            for log in list(opened):
                self._flush(log)
                if log.over and log.stream is None:
                    opened.discard(log)
            if ending:
                break
            self._closing.wait(WAIT)
        for log in opened:
            self._shut(log)

    def _write(self, log: SessionLog, now: float, event: str, data: dict[str, Any]) -> None:
        if not event:
            self._shut(log)
            return
        if log.began is None:
            log.began = now
        elapsed = max(0.0, round((now - log.began) * 1000, 3))
        dropped, log.dropped = log.dropped, 0
        if dropped:
            self._record(log, elapsed, "loglevel:warning", {"message": f"{dropped} events were dropped"})
        self._record(log, elapsed, event, data)
        if log.over and event == STATE and data.get("new") == CLOSED:
            self._shut(log)

    def _record(self, log: SessionLog, elapsed: float, event: str, data: dict[str, Any]) -> None:
        if log.failed:
            return
        try:
            if log.stream is None:
                self._open(log)
            assert log.stream is not None
            written = log.stream.write(_text({"time": elapsed, "name": event, "data": data}))
        except OSError:
            self._fail(log)
            return
        log.size += written
        self.statistics.events += 1
        self.statistics.bytes += written
        if log.size >= self._max_bytes:  # (2)
            self._shut(log)

    def _open(self, log: SessionLog) -> None:
        """The session's next file, and room for it (2)."""
        self.path.mkdir(parents=True, exist_ok=True, mode=0o750)
        self._make_room()
        part = f".{log.number}" if log.number else ""
        log.number += 1
        log.path = self.path / f"{log.stem}{part}{SUFFIX}"
        handle = os.open(log.path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o640)
        log.stream = os.fdopen(handle, "wb")
        log.size = log.stream.write(_text(log.head))
        self.statistics.bytes += log.size
        self.statistics.files += 1

    def _make_room(self) -> None:
        busy = {log.path for log in self._opened if log.stream is not None}
        found = sorted(self.path.glob(f"*{SUFFIX}"), key=lambda path: path.stat().st_mtime)
        excess = len(found) + 1 - self._max_files
        for path in [one for one in found if one not in busy][: max(0, excess)]:
            path.unlink(missing_ok=True)
            self.statistics.removed += 1

    def _flush(self, log: SessionLog) -> None:
        try:
            if log.stream is not None:
                log.stream.flush()
        except OSError:
            self._fail(log)

    def _shut(self, log: SessionLog) -> None:
        stream, log.stream = log.stream, None
        try:
            if stream is not None:
                stream.close()
        except OSError:
            self.statistics.errors += 1

    def _fail(self, log: SessionLog) -> None:
        """(3)"""
        log.over = log.failed = True
        self.statistics.errors += 1
        self._shut(log)


def _text(value: dict[str, Any]) -> bytes:
    return RECORD_SEPARATOR + json.dumps(value, separators=(",", ":")).encode() + b"\n"
