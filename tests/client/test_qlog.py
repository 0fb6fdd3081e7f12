"""Event logs in files: what a viewer of qlog needs, and what they may cost at most."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import stp
from stp.core.errors import ErrorCode
from stp.core.session import Session
from stp.core.trace import Sink
from stp.qlog import CLOSED, MAX_OPEN, RECORD_SEPARATOR, STATE, QlogDirectory
from tests.client.keeper import Keeper
from tests.identity_kit import shared
from tests.sim import Network

CATEGORIES = {"connectivity", "transport", "recovery", "security", "loglevel"}
PACKET_TYPES = {"initial", "retry", "1RTT"}


def records(path: Path) -> list[dict[str, Any]]:
    """RFC 7464: each JSON text begins with a record separator and ends with a line feed."""
    parts = path.read_bytes().split(RECORD_SEPARATOR)
    assert parts[0] == b""
    assert all(part.endswith(b"\n") and part.count(b"\n") == 1 for part in parts[1:])
    return [json.loads(part) for part in parts[1:]]


def check(path: Path, who: str) -> list[dict[str, Any]]:
    """What draft-ietf-quic-qlog-main-schema wants of a streamed log, and what a viewer trips over. Its events."""
    head, *events = records(path)
    assert (head["qlog_version"], head["qlog_format"]) == ("0.3", "JSON-SEQ")
    trace = head["trace"]
    assert trace["vantage_point"]["type"] == who
    common = trace["common_fields"]
    assert common["time_format"] == "relative"
    assert isinstance(common["reference_time"], float)
    assert common["ODCID"] == common["group_id"] == path.name.split("-")[0]
    assert events  # viewers fail on a log without any
    at = 0.0
    for event in events:
        assert event.keys() == {"time", "name", "data"}
        assert event["time"] >= at
        at = event["time"]
        category, _, name = event["name"].partition(":")
        assert category in CATEGORIES
        assert name
        if name.startswith("packet_"):
            assert event["data"]["header"]["packet_type"] in PACKET_TYPES
            assert "packet_size" not in event["data"]["header"]
        if name in ("packet_sent", "packet_received") and event["data"]["header"]["packet_type"] == "1RTT":
            assert isinstance(event["data"]["header"]["packet_number"], int)
            assert event["data"]["raw"]["length"] > 0
            for frame in event["data"]["frames"]:
                assert frame["frame_type"] != "unknown"
                if frame["frame_type"] == "ack":
                    assert all(low <= high for low, high in frame["acked_ranges"])
    return events


def observer(directory: QlogDirectory) -> Callable[[Session, bytes], Sink | None]:
    return directory.observe


def test_a_session_makes_two_logs_that_a_viewer_reads(tmp_path: Path) -> None:
    directory = QlogDirectory(tmp_path / "logs")
    net = Network(1, delay=0.02, loss=0.02)
    hub, edge = net.listener(observer=observer(directory)), net.dialler(observer=observer(directory))
    session = edge.connect(hub)
    peer = net.establish(session)
    lane = session.open_stream()
    session.write(lane, bytes(200_000))
    net.run(lambda: hub.received_length(peer, lane) == 200_000)
    session.close(ErrorCode.NO_ERROR, "done", net.now)
    net.run_for(5.0)
    directory.close()
    found = sorted((tmp_path / "logs").iterdir())
    assert [path.name.split("-")[1] for path in found] == ["client.sqlog", "server.sqlog"]
    client, server = check(found[0], "client"), check(found[1], "server")
    names = {event["name"] for event in client}
    assert names >= {
        "connectivity:connection_started",
        "connectivity:connection_closed",
        "transport:packet_sent",
        "transport:packet_received",
        "recovery:packet_lost",
        "recovery:metrics_updated",
        "recovery:congestion_state_updated",
    }
    assert client[-1]["data"] == server[-1]["data"] == {"new": "closed"}
    assert directory.statistics.events == len(client) + len(server)
    assert directory.statistics.dropped == directory.statistics.errors == 0


def fill(log: Sink, count: int) -> None:
    for number in range(count):
        log(
            float(number),
            "transport:packet_sent",
            {"header": {"packet_type": "1RTT", "packet_number": number}},
        )


def test_files_are_bounded_in_size_and_number(tmp_path: Path) -> None:
    """(2)"""
    directory = QlogDirectory(tmp_path, max_bytes=2000, max_files=4)
    log = directory.sink("ab" * 8, dialling=True)
    assert log is not None
    fill(log, 500)
    log(501.0, STATE, {"new": CLOSED})
    directory.close()
    found = sorted(tmp_path.iterdir())
    assert len(found) == 4
    assert max(path.stat().st_size for path in found) < 2000 + 200
    assert directory.statistics.files > 10
    assert directory.statistics.removed == directory.statistics.files - 4
    for path in found:
        assert records(path)[0]["qlog_version"] == "0.3"  # each of them can be read by itself


def test_a_slow_disk_drops_events_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """(1)"""
    directory = QlogDirectory(tmp_path, max_queue=100)
    monkeypatch.setattr(directory, "_write_all", lambda: None)  # a writer that does not get its turn
    log = directory.sink("cd" * 8, dialling=False)
    assert log is not None
    began = time.monotonic()
    fill(log, 10_000)
    assert time.monotonic() - began < 1.0
    assert directory.statistics.dropped == 9_900
    monkeypatch.undo()
    directory._closing.set()
    directory._write_all()
    events = records(next(tmp_path.iterdir()))[1:]
    assert events[0] == {
        "time": 0.0,
        "name": "loglevel:warning",
        "data": {"message": "9900 events were dropped"},
    }
    assert len(events) == 101


def test_a_disk_that_refuses_ends_the_log_and_nothing_else(tmp_path: Path) -> None:
    """(3)"""
    (tmp_path / "file").write_text("in the way")
    directory = QlogDirectory(tmp_path / "file")
    log = directory.sink("ef" * 8, dialling=True)
    assert log is not None
    fill(log, 10)
    directory.close()
    assert directory.statistics.errors == 1
    fill(log, 10)
    assert directory.statistics.events == 0


def test_sessions_logged_at_a_time_are_bounded(tmp_path: Path) -> None:
    directory = QlogDirectory(tmp_path)
    logs = [directory.sink(f"{n:016x}", dialling=True) for n in range(MAX_OPEN + 1)]
    assert logs[-1] is None
    assert directory.statistics.skipped == 1
    assert logs[0] is not None
    directory.stop(logs[0])
    assert directory.sink("aa" * 8, dialling=True) is not None
    directory.close()


@pytest.mark.real
async def test_the_client_library_logs_where_it_is_told(tmp_path: Path) -> None:
    async with Keeper().running() as keeper:
        identity = shared().identity("device-1")
        async with stp.connect(keeper.url, identity=identity, qlog=tmp_path / "logs") as session:
            await session.publish("event/x", b"secret", receipt="kept")
    (path,) = (tmp_path / "logs").iterdir()
    events = check(path, "client")
    assert any(event["name"] == "transport:packet_sent" for event in events)
    assert b"secret" not in path.read_bytes()


@pytest.mark.real
async def test_the_environment_says_where_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STP_QLOG", str(tmp_path))
    async with Keeper().running() as keeper, stp.connect(keeper.url, identity=shared().identity("device-1")):
        pass
    assert len(os.listdir(tmp_path)) == 1
