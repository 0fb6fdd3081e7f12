"""The event log of a session: it tells what was on the wire, in the words of qlog, and nothing secret."""

from __future__ import annotations

import json
from typing import Any

import pytest

from stp.core import frames
from stp.core.errors import ErrorCode
from stp.core.phases import KeyLimits
from stp.core.session import Session
from stp.core.trace import Sink, told
from tests.sim import Host, Network

Events = list[tuple[float, str, dict[str, Any]]]


def watched(seed: int, **conditions: float) -> tuple[Network, Host, Host, dict[bool, Events]]:
    """Two hosts whose sessions are all watched; what was told, by whether the session was dialled."""
    logs: dict[bool, Events] = {True: [], False: []}

    def observer(session: Session, origin: bytes) -> Sink:
        assert len(origin) == 8
        log = logs[session.dialling]
        return lambda now, name, data: log.append((now, name, data))

    net = Network(seed, **conditions)
    options: dict[str, Any] = {"observer": observer, "key_limits": KeyLimits(packets=100)}
    return net, net.listener(**options), net.dialler(**options), logs


def numbers(log: Events, name: str) -> list[int]:
    return [
        data["header"]["packet_number"]
        for _, found, data in log
        if found == name and data["header"]["packet_type"] == "1RTT"
    ]


@pytest.mark.parametrize("seed", range(3))
def test_what_is_told_is_what_was_on_the_wire(seed: int) -> None:
    net, hub, edge, logs = watched(seed, delay=0.02, loss=0.02, jitter=0.003, duplicate=0.01)
    session = edge.connect(hub)
    peer = net.establish(session)
    lane = session.open_stream()
    session.write(lane, bytes(400_000), fin=True)
    session.send_datagram(b"unsaid")
    net.run(lambda: hub.received_length(peer, lane) == 400_000, limit=30.0)
    net.run_for(2.0)
    session.close(ErrorCode.NO_ERROR, "done", net.now)
    net.run_for(2.0)
    for dialled, host in ((True, edge), (False, hub)):
        log = logs[dialled]
        wire = [data for _, source, _, data in net.log if source == host.addr and data[0] & 0xC0 == 0x40]
        sent = [data for _, name, data in log if name == "transport:packet_sent"]
        one_rtt = [data for data in sent if data["header"]["packet_type"] == "1RTT"]
        assert len(one_rtt) == len(wire)
        assert [data["raw"]["length"] for data in one_rtt] == [len(data) for data in wire]
        ours = numbers(log, "transport:packet_sent")
        assert ours == sorted(set(ours))
        theirs = numbers(logs[not dialled], "transport:packet_received")
        assert len(theirs) == len(set(theirs))
        assert set(theirs) <= set(ours)
        assert len(set(ours) - set(theirs)) < 0.1 * len(ours) + 5
        lost = numbers(log, "recovery:packet_lost")
        assert len(lost) == len(set(lost)) == host.sessions[0].statistics().packets_lost
        times = [now for now, _, _ in log]
        assert times == sorted(times)
    names = [name for _, name, _ in logs[True]]
    assert names[0] == "connectivity:connection_started"
    assert names.count("connectivity:connection_closed") == 1
    assert logs[True][-1][2] == logs[False][-1][2] == {"new": "closed"}
    assert names.count("security:key_updated") >= 2
    assert "transport:packet_dropped" in {name for log in logs.values() for _, name, _ in log}
    states = [data["new"] for _, name, data in logs[True] if name == "connectivity:connection_state_updated"]
    assert states == ["handshake_complete", "handshake_confirmed", "closed"]


def test_bytes_of_a_stream_are_told_packet_by_packet() -> None:
    net, hub, edge, logs = watched(1, delay=0.01)
    session = edge.connect(hub)
    peer = net.establish(session)
    lane = session.open_stream()
    session.write(lane, bytes(100_000), fin=True)
    net.run(lambda: hub.received_length(peer, lane) == 100_000, limit=30.0)
    net.run_for(1.0)
    for log, name in ((logs[True], "sent"), (logs[False], "received")):
        pieces = [
            (frame["offset"], frame["length"])
            for _, found, data in log
            if found == f"transport:packet_{name}"
            for frame in data.get("frames", ())
            if frame["frame_type"] == "stream" and frame["stream_id"] == lane
        ]
        assert sum(length for _, length in pieces) == 100_000
        assert sorted(pieces)[-1][0] + sorted(pieces)[-1][1] == 100_000


def test_round_trips_and_windows_are_told_as_they_are() -> None:
    net, hub, edge, logs = watched(2, delay=0.05)
    session = edge.connect(hub)
    net.establish(session)
    session.write(session.open_stream(), bytes(200_000))
    net.run_for(3.0)
    state: dict[str, Any] = {}
    for _, name, data in logs[True]:
        if name == "recovery:metrics_updated":
            assert data.items() - state.items()  # only what is new
            state |= data
    found = session.statistics()
    assert state["congestion_window"] == found.cwnd
    assert state["smoothed_rtt"] == pytest.approx(found.rtt * 1000, abs=0.01)
    assert state["min_rtt"] == pytest.approx(100.0, abs=1.0)
    assert state["bytes_in_flight"] == 0


def test_nothing_secret_is_told() -> None:
    """(1)"""
    net, hub, edge, logs = watched(3)
    session = edge.connect(hub)
    peer = net.establish(session)
    secret = b"the payload that nobody may read"
    session.write(0, secret)
    session.send_datagram(secret)
    net.run_for(1.0)
    text = json.dumps(logs[True]) + json.dumps(logs[False])
    assert secret.decode() not in text
    assert secret.hex() not in text
    assert session._data is not None
    assert peer._data is not None
    for token in (*session._data.remote_cids.tokens.values(), *peer._data.remote_cids.tokens.values()):
        assert token.hex() not in text
    frame = frames.NewToken(b"tokentokentoken")
    assert told(frame.encode()) == [{"frame_type": "new_token"}]


def test_every_frame_has_a_name() -> None:
    every: list[frames.Frame] = [
        frames.Ping(), frames.Ack(8000, [(5, 9), (1, 2)]), frames.Crypto(0, b"x"),
        frames.Stream(4, 7, b"xy", fin=True), frames.ResetStream(4, 1, 9), frames.StopSending(4, 1),
        frames.MaxData(9), frames.MaxStreamData(4, 9), frames.MaxStreams(1, 9), frames.DataBlocked(9),
        frames.StreamDataBlocked(4, 9), frames.StreamsBlocked(0, 9), frames.NewCid(1, 0, bytes(8), bytes(16)),
        frames.RetireCid(1), frames.PathChallenge(bytes(8)), frames.PathResponse(bytes(8)),
        frames.NewToken(b"t"), frames.HandshakeDone(bytes(16)), frames.Close(10, "why"), frames.Datagram(b"d"),
    ]  # fmt: skip
    for frame in every:
        (found,) = told(frame.encode())
        assert found["frame_type"] != "unknown", frame
    assert told(every[1].encode())[0]["acked_ranges"] == [[5, 8], [1, 1]]
    assert told(b"\xff")[0]["frame_type"] == "unknown"


def test_it_can_be_switched_on_and_off_in_mid_session() -> None:
    net = Network(4)
    hub, edge = net.listener(), net.dialler()
    session = edge.connect(hub)
    net.establish(session)
    log: list[str] = []
    lane = session.open_stream()

    def send() -> int:
        before = len(log)
        session.write(lane, bytes(20_000))
        net.run_for(1.0)
        return len(log) - before

    assert send() == 0
    session.observe(lambda now, name, data: log.append(name), net.now)
    assert send() > 20
    assert log[0] == "connectivity:connection_started"
    session.observe(None)
    assert send() == 0


def test_a_change_of_path_is_told_on_both_sides() -> None:
    net, hub, edge, logs = watched(5, delay=0.02)
    session = edge.connect(hub)
    peer = net.establish(session)
    net.run_for(0.5)
    new = net.rebind(edge, ip="203.0.113.7")
    session.migrate(now=net.now)
    lane = session.open_stream()
    session.write(lane, bytes(50_000))
    net.run(lambda: hub.received_length(peer, lane) == 50_000)
    net.run_for(1.0)
    paths = [data for _, name, data in logs[False] if name == "connectivity:path_assigned"]
    assert paths == [{"path_remote": {"ip": new[0], "port": new[1]}}]
    for log in logs.values():  # either side calls the other by a fresh CID
        assert "connectivity:connection_id_updated" in [name for _, name, _ in log]
    ours, theirs = (
        numbers(logs[True], "transport:packet_sent"),
        numbers(logs[False], "transport:packet_received"),
    )
    assert set(theirs) <= set(ours)
    assert len(theirs) > 0.9 * len(ours)
    challenges = {
        frame["frame_type"]
        for log in logs.values()
        for _, name, data in log
        if name == "transport:packet_sent"
        for frame in data.get("frames", ())
    }
    assert {"path_challenge", "path_response"} <= challenges
