"""Event logs of sessions on request: they begin, they end by themselves, and they cost nothing before and after."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from stp.core.session import Session
from stp.core.verbs import AnySession
from stpd.tracing import MAX_SECONDS, Tracing, TracingError
from tests.sim import Network


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(part) for part in path.read_bytes().split(b"\x1e")[1:]]


def established() -> tuple[Network, Session]:
    net = Network(1, delay=0.01)
    hub, edge = net.listener(), net.dialler()
    session = edge.connect(hub)
    return net, net.establish(session)


def test_a_log_on_request_ends_by_itself(tmp_path: Path) -> None:
    """(1)"""
    net, session = established()
    tracing = Tracing(None, tmp_path / "qlog", "hub-1", lambda: 1000)
    assert tracing.observer is None
    assert tracing.until_ms(session, net.now) == 0
    begun = tracing.begin(session, 60.0, net.now)
    assert begun.until_ms == 61_000
    assert tracing.until_ms(session, net.now) == 61_000
    session.write(0, b"x")
    net.run_for(59.0)
    tracing.check(net.now)
    assert tracing.until_ms(session, net.now) == 2000
    net.run_for(1.0)
    tracing.check(net.now)
    assert tracing.until_ms(session, net.now) == 0
    assert session._data is not None
    assert session._data.trace is session._data.sealer.trace is session._data.recovery.trace is None
    tracing.close()
    head, *events = lines(Path(begun.path))
    assert head["qlog_format"] == "JSON-SEQ"
    assert any(event["name"] == "transport:packet_sent" for event in events)
    assert tracing.counts()["written"] == len(events)


def test_what_cannot_be_logged_is_refused_in_words(tmp_path: Path) -> None:
    net, session = established()
    tracing = Tracing(None, tmp_path, "hub-1", lambda: 0)
    for seconds in (0.0, MAX_SECONDS + 1):
        with pytest.raises(TracingError, match="up to 3600 s"):
            tracing.begin(session, seconds, net.now)

    class Framed(AnySession):
        carrier = "tls"

        def __init__(self) -> None:
            """Nothing is asked of it."""

    with pytest.raises(TracingError, match="over tls"):
        tracing.begin(Framed(), 60.0, net.now)
    everything = Tracing(tmp_path, tmp_path, "hub-1", lambda: 0)
    assert everything.until_ms(session, net.now) == -1
    with pytest.raises(TracingError, match="logged already"):
        everything.begin(session, 60.0, net.now)
    everything.close()


def test_asking_again_begins_anew(tmp_path: Path) -> None:
    net, session = established()
    tracing = Tracing(None, tmp_path, "hub-1", lambda: 0)
    for _ in range(3):
        tracing.begin(session, 60.0, net.now)
    tracing.close()
    assert len(list(tmp_path.iterdir())) <= 1
    assert tracing.counts()["errors"] == 0
