"""Structured lines on standard error, and nothing that can hold up the loop.

(1) A log call never blocks: lines go through a bounded queue to a writer thread. When the reader of the pipe
    stands still, lines are dropped, counted, and the gap is told once there is room again.
(2) No secret is written: values under telling names, PEM blocks and join keys are replaced.
(3) A line is one line, of at most MAX_LINE bytes, whatever is in it.
(4) `set_level` takes effect at once, also for loggers that were made before.
"""

import json
import os
import queue
import re
import select
import sys
import threading
import time
from collections.abc import Callable, MutableMapping
from typing import Any, Final

import structlog
from attrs import define

LEVELS: Final = {"debug": 10, "info": 20, "warning": 30, "error": 40}
QUEUE_LINES: Final = 2048
"""Lines that may wait for the writer thread."""
MAX_LINE: Final = 8192
"""Bytes of one line, its end not counted."""
MAX_VALUE: Final = 2000
"""Characters of one value."""
MAX_TRACEBACK: Final = 6000
"""Characters of an exception; its end says most."""
BURST: Final = 64
"""Lines written with one system call at most."""
SHUTDOWN_TIMEOUT: Final = 2.0
"""Seconds the end of the process waits for the last lines."""

SECRET_NAME: Final = re.compile(
    r"(?:^|_)(?:token|secret|password|passwd|authorization|cookie|psk|(?:network|private|join)_?key)s?(?:_(?!id$)|$)",
    re.IGNORECASE,
)
SECRET_VALUE: Final = re.compile(r"-----BEGIN [^-]*(?:KEY|UPSTREAM)-----[\s\S]*|\bstpj\d*[-_.:][^\s\"']+")
HIDDEN: Final = "[hidden]"
PRIORITY: Final = {"debug": 7, "info": 6, "warning": 4, "error": 3, "critical": 2}
"""Of syslog; the journal takes it from a "<n>" before the line (sd-daemon(3))."""

EventDict = MutableMapping[str, Any]


@define(kw_only=True)
class LogStatistics:
    """Counters since `configure`."""

    written: int = 0
    dropped: int = 0
    """Lines that found the queue full."""
    failed: int = 0
    """Lines that could not be written, because nobody reads any more."""
    queue_depth: int = 0
    queue_limit: int = QUEUE_LINES


class Writer:
    """Owns the file descriptor, the queue and the thread."""

    def __init__(self, fd: int, limit: int = QUEUE_LINES) -> None:
        self._fd = fd
        self._queue: queue.Queue[bytes | None] = queue.Queue(limit)
        self._statistics = LogStatistics(queue_limit=limit)
        self._told = 0
        self._gap: Callable[[int], bytes] = lambda n: b"%d log lines were dropped" % n
        self._thread = threading.Thread(target=self._run, name="log-writer", daemon=True)
        self._thread.start()

    def write(self, line: bytes) -> None:
        """Queue one line, without its end. Never blocks (1)."""
        try:
            self._queue.put_nowait(line)
        except queue.Full:
            self._statistics.dropped += 1

    def on_gap(self, make: Callable[[int], bytes]) -> None:
        """Say how the line reads that tells of dropped ones."""
        self._gap = make

    def statistics(self) -> LogStatistics:
        self._statistics.queue_depth = self._queue.qsize()
        return self._statistics

    def close(self, timeout: float = SHUTDOWN_TIMEOUT) -> None:
        """Write what is queued, for at most `timeout` seconds, and end the thread."""
        deadline = time.monotonic() + timeout
        try:
            self._queue.put(None, timeout=timeout)
        except queue.Full:
            return
        self._thread.join(max(0.0, deadline - time.monotonic()))

    def _run(self) -> None:
        while True:
            lines, end = self._take()
            if self._statistics.dropped != self._told:
                dropped = self._statistics.dropped
                lines.append(self._gap(dropped - self._told))
                self._told = dropped
            self._write_all(lines)
            if end:
                return

    def _take(self) -> tuple[list[bytes], bool]:
        """What is queued, one line at least, and whether it was the last."""
        lines: list[bytes] = []
        line = self._queue.get()
        while line is not None:
            lines.append(line)
            if len(lines) >= BURST:
                return lines, False
            try:
                line = self._queue.get_nowait()
            except queue.Empty:
                return lines, False
        return lines, True

    def _write_all(self, lines: list[bytes]) -> None:
        data = memoryview(b"\n".join([*lines, b""]))
        while data:
            try:
                data = data[os.write(self._fd, data) :]
            except BlockingIOError:  # somebody made our standard error non-blocking
                select.select((), (self._fd,), ())
            except OSError:
                self._statistics.failed += len(lines)
                return
        self._statistics.written += len(lines)


_threshold = LEVELS["info"]
_writer: Writer | None = None


class Logger(structlog.BoundLoggerBase):
    """The levels, and nothing else. Below the threshold a call costs one comparison."""

    def debug(self, event: str, **fields: Any) -> None:
        if _threshold <= 10:
            self._proxy_to_logger("debug", event, **fields)

    def info(self, event: str, **fields: Any) -> None:
        if _threshold <= 20:
            self._proxy_to_logger("info", event, **fields)

    def warning(self, event: str, **fields: Any) -> None:
        if _threshold <= 30:
            self._proxy_to_logger("warning", event, **fields)

    def error(self, event: str, **fields: Any) -> None:
        self._proxy_to_logger("error", event, **fields)

    critical = error

    def exception(self, event: str, **fields: Any) -> None:
        """Like error, with the exception that is being handled."""
        self._proxy_to_logger("error", event, **{"exc_info": True, **fields})


class _Sink:
    """What structlog hands finished lines to. Its name is the logger's."""

    def __init__(self, *name: Any) -> None:
        self.name = str(name[0]) if name else "stpd"

    def msg(self, line: bytes) -> None:
        if _writer is not None:
            _writer.write(line)

    debug = info = warning = error = critical = msg


def configure(*, level: str = "info", format: str = "json", fd: int | None = None) -> None:
    """Begin to log to standard error, or to `fd`. `format`: "json" or "text". Replaces an earlier call."""
    global _writer
    shutdown()
    set_level(level)
    journal = "JOURNAL_STREAM" in os.environ and fd is None
    render = _Renderer(as_json=format == "json", journal=journal)
    _writer = Writer(sys.stderr.fileno() if fd is None else fd)
    _writer.on_gap(
        lambda n: render(None, "warning", _stamp(None, "warning", {"event": "log_dropped", "lines": n}))
    )
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            _stamp,
            structlog.processors.format_exc_info,
            _hide,
            render,
        ],
        wrapper_class=Logger,
        logger_factory=_Sink,
        cache_logger_on_first_use=True,
    )


def set_level(level: str) -> None:
    """Change the threshold: "debug", "info", "warning" or "error"; ValueError otherwise (4)."""
    global _threshold
    if level not in LEVELS:
        raise ValueError(f"{level!r} is none of {', '.join(LEVELS)}")
    _threshold = LEVELS[level]


def statistics() -> LogStatistics:
    """The counters; zeros before `configure`."""
    return _writer.statistics() if _writer is not None else LogStatistics()


def shutdown() -> None:
    """Write what is queued, for at most SHUTDOWN_TIMEOUT, and stop. Harmless when repeated."""
    global _writer
    writer, _writer = _writer, None
    if writer is not None:
        writer.close()


def _stamp(logger: Any, method: str, event: EventDict) -> EventDict:
    """Put time, level, logger and event in front."""
    now = time.time()
    whole = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now))
    head: EventDict = {"time": f"{whole}.{int(now * 1000) % 1000:03d}Z", "level": method}
    if logger is not None:
        head["logger"] = getattr(logger, "name", "stpd")
    head["event"] = event.pop("event", "")
    return {**head, **event}


def _hide(_: Any, __: str, event: EventDict) -> EventDict:
    """Replace secrets (2), and cut what is too long."""
    for name, value in event.items():
        if name == "exception":
            event[name] = SECRET_VALUE.sub(HIDDEN, str(value))[-MAX_TRACEBACK:]
        else:
            event[name] = HIDDEN if SECRET_NAME.search(name) else _plain(value)
    return event


def _plain(value: Any) -> Any:
    """A value as JSON can write it, without secrets."""
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, bytes | bytearray | memoryview):  # ids have 16; anything longer may be a key
        return bytes(value).hex() if len(value) <= 16 else f"[{len(value)} bytes]"
    if isinstance(value, dict):
        return {
            str(k): HIDDEN if SECRET_NAME.search(str(k)) else _plain(v) for k, v in list(value.items())[:64]
        }
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(v) for v in list(value)[:64]]
    text = SECRET_VALUE.sub(HIDDEN, str(value))
    return text if len(text) <= MAX_VALUE else text[:MAX_VALUE] + "…"


class _Renderer:
    """The last processor: one line of bytes."""

    def __init__(self, *, as_json: bool, journal: bool) -> None:
        self._render = _json if as_json else _text
        self._journal = journal

    def __call__(self, _: Any, method: str, event: EventDict) -> bytes:
        line = self._render(event).encode("utf-8", "backslashreplace")
        if len(line) > MAX_LINE:
            short = {k: event[k] for k in ("time", "level", "logger", "event") if k in event}
            line = self._render({**short, "cut": len(line)}).encode("utf-8", "backslashreplace")[:MAX_LINE]
        return b"<%d>%s" % (PRIORITY.get(method, 6), line) if self._journal else line


def _json(event: EventDict) -> str:
    return json.dumps(event, default=str)


def _text(event: EventDict) -> str:
    rest = dict(event)
    head = f"{rest.pop('time', '')} {rest.pop('level', ''):7} {rest.pop('event', '')}"
    rest.pop("logger", None)
    fields = "".join(f" {name}={_word(value)}" for name, value in rest.items())
    return _one_line(head + fields)


def _word(value: Any) -> str:
    if isinstance(value, str) and re.fullmatch(r"[^\s\"=\x00-\x1f]+", value):
        return value
    return json.dumps(value, ensure_ascii=False, default=str)


def _one_line(text: str) -> str:
    """Control characters written out: they could forge lines or drive a terminal (3)."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]", lambda m: f"\\x{ord(m[0]):02x}", text)
