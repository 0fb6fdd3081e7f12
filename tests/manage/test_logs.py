"""Promises of stpd.logs, with real pipes."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
import structlog

from stpd import logs


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    """A pipe that holds one page, and structlog as it was afterwards."""
    reader, writer = os.pipe()
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
    before = structlog.get_config()
    yield reader, writer
    os.set_blocking(reader, False)
    try:
        os.read(reader, 1 << 20)  # let a writer that is stuck go
    except BlockingIOError:
        pass
    os.close(reader)
    logs.shutdown()
    os.close(writer)
    structlog.configure(**before)


def said(reader: int) -> list[str]:
    """All lines so far; ends the log."""
    logs.shutdown()
    return os.read(reader, 1 << 20).decode().splitlines()


def test_json_lines(pipe: tuple[int, int]) -> None:
    logs.configure(fd=pipe[1])
    structlog.get_logger("stpd.x").info("session_open", node="edge-1", id=b"\x01" * 16, n=3, lanes=(1, 2))
    (line,) = said(pipe[0])
    found = json.loads(line)
    assert found.pop("time").endswith("Z")
    assert found == {
        "level": "info",
        "logger": "stpd.x",
        "event": "session_open",
        "node": "edge-1",
        "id": "01" * 16,
        "n": 3,
        "lanes": [1, 2],
    }


def test_text_lines(pipe: tuple[int, int]) -> None:
    logs.configure(format="text", fd=pipe[1])
    structlog.get_logger().warning("refused", node="edge-1", reason="not now", n=1)
    (line,) = said(pipe[0])
    assert line.endswith('warning refused node=edge-1 reason="not now" n=1')


def test_the_level_changes_at_once_for_loggers_that_exist(pipe: tuple[int, int]) -> None:
    """logs (4)."""
    logs.configure(level="warning", fd=pipe[1])
    log = structlog.get_logger()
    log.info("one")
    log.warning("two")
    logs.set_level("debug")
    log.debug("three")
    logs.set_level("error")
    log.warning("four")
    log.error("five")
    assert [json.loads(line)["event"] for line in said(pipe[0])] == ["two", "three", "five"]
    with pytest.raises(ValueError, match="loud"):
        logs.set_level("loud")


def test_a_blocked_pipe_holds_nobody_up(pipe: tuple[int, int]) -> None:
    """logs (1): no call waits, what is dropped is counted, and the gap is told."""
    logs.configure(fd=pipe[1])
    log = structlog.get_logger()
    total = 3 * logs.QUEUE_LINES
    started = time.monotonic()
    slowest = 0.0
    for n in range(total):
        before = time.monotonic()
        log.info("line", n=n, pad="x" * 60)
        slowest = max(slowest, time.monotonic() - before)
    assert slowest < 0.5
    assert time.monotonic() - started < 10
    dropped = logs.statistics().dropped
    assert dropped >= total - logs.QUEUE_LINES - 4096 // 60 - logs.BURST
    assert logs.statistics().queue_depth <= logs.QUEUE_LINES
    os.set_blocking(pipe[0], False)
    data = b""
    while b"log_dropped" not in data or not data.endswith(b"\n"):
        try:
            data += os.read(pipe[0], 65536)
        except BlockingIOError:
            time.sleep(0.001)
    events = [json.loads(line) for line in data.splitlines()]
    assert sum(e["lines"] for e in events if e["event"] == "log_dropped") == dropped
    numbers = [e["n"] for e in events if e["event"] == "line"]
    assert numbers == sorted(numbers)


def test_a_reader_that_left_is_counted_and_harmless(pipe: tuple[int, int]) -> None:
    reader, writer = os.pipe()
    logs.configure(fd=writer)
    os.close(reader)
    structlog.get_logger().info("into the void")
    held = logs._writer
    logs.shutdown()
    os.close(writer)
    assert held is not None
    assert held.statistics().failed == 1


def test_a_pipe_that_somebody_made_non_blocking(pipe: tuple[int, int]) -> None:
    os.set_blocking(pipe[1], False)
    logs.configure(fd=pipe[1])
    for n in range(100):
        structlog.get_logger().info("line", n=n, pad="x" * 200)
    data = b""
    while data.count(b"\n") < 100:
        data += os.read(pipe[0], 65536)
    assert [json.loads(line)["n"] for line in data.splitlines()] == list(range(100))


@pytest.mark.parametrize(
    ("fields", "hidden"),
    [
        ({"token": "hunter2"}, True),
        ({"join_key": "hunter2"}, True),
        ({"network_keys": ["hunter2"]}, True),
        ({"db_password": "hunter2"}, True),
        ({"reason": "bad token stpj1.hunter2_-abc in request"}, True),
        ({"pem": "-----BEGIN PRIVATE KEY-----\nhunter2\n-----END PRIVATE KEY-----"}, True),
        ({"pem": "-----BEGIN STP NETWORK KEY-----\nhunter2"}, True),
        ({"more": {"secret": "hunter2"}}, True),
        ({"key": b"hunter2hunter2hunter2hunter2"}, True),
        ({"token_id": "hunter2"}, False),
        ({"key_phase": "hunter2"}, False),
        ({"tokens_used": 3, "monkey": "hunter2"}, False),
    ],
)
@pytest.mark.parametrize("format", ["json", "text"])
def test_secrets_are_not_written(
    pipe: tuple[int, int], fields: dict[str, object], hidden: bool, format: str
) -> None:
    """logs (2)."""
    logs.configure(format=format, fd=pipe[1])
    structlog.get_logger().error("event", **fields)
    (line,) = said(pipe[0])
    assert ("hunter2" not in line) is hidden
    assert b"hunter2".hex() not in line


def test_secrets_in_exceptions_are_not_written(pipe: tuple[int, int]) -> None:
    """logs (2)."""
    logs.configure(fd=pipe[1])
    try:
        raise ValueError("cannot use stpj1.hunter2")
    except ValueError:
        structlog.get_logger().exception("failed")
    (line,) = said(pipe[0])
    assert "ValueError: cannot use" in line
    assert "hunter2" not in line


@pytest.mark.parametrize("format", ["json", "text"])
@pytest.mark.parametrize(
    "bad", ["two\nlines", "\x1b[31m", "\x9b31m", "\u2028", "\ud800", "x" * 100_000, {"a" * 9000: 1}]
)
def test_a_line_is_one_line(pipe: tuple[int, int], format: str, bad: object) -> None:
    """logs (3)."""
    logs.configure(format=format, fd=pipe[1])
    structlog.get_logger().info("event", a=bad, b=bad, c=bad, d=bad, e=bad, f=bad)
    logs.shutdown()
    data = os.read(pipe[0], 1 << 20)
    assert data.count(b"\n") == 1
    assert data.endswith(b"\n")
    assert len(data) <= logs.MAX_LINE + 1
    assert not any(byte < 32 or byte == 127 for byte in data[:-1])
    assert b"\xc2\x9b" not in data
    if format == "json":
        json.loads(data)


def test_the_journal_gets_priorities(pipe: tuple[int, int]) -> None:
    code = "from stpd import logs\nimport structlog\nlogs.configure()\n"
    code += "structlog.get_logger().error('x')\nlogs.shutdown()"
    environment = {**os.environ, "JOURNAL_STREAM": "8:1"}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment, check=True)
    assert run.stderr.startswith(b"<3>{")
