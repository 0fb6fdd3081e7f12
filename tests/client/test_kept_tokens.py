"""NEW_TOKENs across restarts (R-4-24): promises of stp/kept_tokens.py."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import trio

import stp
from stp.core.packet import parse_init
from stp.kept_tokens import MAX_PEERS, MAX_TOKEN, KeptTokens, parse
from tests.client.keeper import Keeper
from tests.identity_kit import shared
from tests.sim import Host, Network


def test_a_token_is_given_out_once_and_outlives_the_process(tmp_path: Path) -> None:
    """(1), (2)"""
    path = tmp_path / "device.pem.tokens"
    first = KeptTokens(path)
    assert first.take("gw-1") == b""
    first.put("gw-1", b"one")
    first.put("gw-2", b"two")
    assert (path.stat().st_mode & 0o777) == 0o600
    assert [path.name] == [one.name for one in tmp_path.iterdir()]
    second = KeptTokens(path)
    assert [second.take("gw-1"), second.take("gw-1"), second.take("gw-2")] == [b"one", b"", b"two"]
    second.put("gw-1", b"new")
    assert second.take("gw-1") == b"new"
    assert KeptTokens(path).take("gw-2") == b"two"


def test_the_newest_are_kept(tmp_path: Path) -> None:
    """(2)"""
    kept = KeptTokens(tmp_path / "tokens")
    for n in range(MAX_PEERS + 3):
        kept.put(f"gw-{n}", bytes([n]))
    kept.put("gw-5", b"again")
    kept.put("late", b"x")
    again = KeptTokens(tmp_path / "tokens")
    assert again.take("gw-5") == b"again"
    assert again.take("gw-2") == again.take("gw-3") == b""
    assert again.take("gw-4") == b"\x04"
    assert again.take(f"gw-{MAX_PEERS + 2}") == bytes([MAX_PEERS + 2])


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b"\xff\x00",
        b'{"format": 2, "tokens": {}}',
        b'{"format": 1, "tokens": {"a": 3}}',
        b'{"format": 1, "tokens": {"a": "xy"}}',
        b"[" * 100_000,
        b" " * 70_000,
    ],
)
def test_a_damaged_file_is_no_token(tmp_path: Path, data: bytes) -> None:
    """(3)"""
    path = tmp_path / "tokens"
    path.write_bytes(data)
    with pytest.raises(ValueError):
        parse(data)
    kept = KeptTokens(path)
    assert kept.take("a") == b""
    assert kept.read_errors == 1
    kept.put("a", b"good")
    assert KeptTokens(path).take("a") == b"good"


def test_what_cannot_be_written_is_counted(tmp_path: Path) -> None:
    """(3); and what is no token is not kept."""
    kept = KeptTokens(tmp_path / "nowhere" / "tokens")
    kept.put("a", b"good")
    assert kept.write_errors == 1
    assert kept.take("a") == b"good"
    kept.put("b", bytes(MAX_TOKEN + 1))
    kept.put("c", b"")
    assert kept.take("b") == kept.take("c") == b""
    long = json.dumps({"format": 1, "tokens": {"a": "00" * (MAX_TOKEN + 1)}}).encode()
    assert parse(long) == {}


async def test_a_client_that_starts_anew_is_known_by_name(tmp_path: Path) -> None:
    """R-4-24: no Retry the second time, with the token that the first process left beside the identity."""
    identity = shared().write(tmp_path, "sensor-1")
    async with Keeper().running() as keeper:
        retries = []
        for _ in range(3):
            async with stp.connect(keeper.url, identity=identity):
                await trio.sleep(0.05)
            assert keeper._endpoint is not None
            retries.append(keeper._endpoint.statistics().retries_sent)
            assert (tmp_path / f"{identity.name}.tokens").stat().st_mode & 0o777 == 0o600
    assert retries[0] > 0
    assert retries == [retries[0]] * 3


def token_of(net: Network, edge: Host, hub: Host) -> bytes:
    """The NEW_TOKEN of a session that is closed again."""
    session = edge.connect(hub)
    net.establish(session)
    net.run(lambda: any(hasattr(event, "token") for event in edge.events(session)), limit=5)
    return next(event.token for event in edge.events(session) if hasattr(event, "token"))


@pytest.mark.parametrize("used", ["fresh", "used", "damaged"])
def test_fault_58_a_token_from_a_new_address(used: str) -> None:
    """Validated by the ACK of our INIT, or by Retry where the token is no good: connected within 2 RTT more."""
    net = Network(3, delay=0.05)
    hub = net.listener()
    edge = net.dialler()
    start = net.now
    first = edge.connect(hub)
    net.establish(first)
    without = net.now - start
    token = token_of(net, edge, hub)
    moved = net.dialler("edge-1", addr=("198.51.100.7", 4000))
    if used == "used":
        net.establish(edge.connect(hub, token=token))
    elif used == "damaged":
        token = token[:-1] + bytes([token[-1] ^ 1])
    retries, start = hub.endpoint.statistics().retries_sent, net.now
    net.establish(moved.connect(hub, token=token))
    took = net.now - start
    assert took <= without + 2 * 0.1 + 0.001, "at most two round trips more than any handshake"
    needed = hub.endpoint.statistics().retries_sent - retries
    assert (needed == 0) == (used == "fresh")
    if used == "fresh":
        assert took < without, "and a good one saves the Retry"
    shown = [d for _, source, _, d in net.log if source == moved.addr and d[0] == 0xC0]
    assert parse_init(shown[0]).token == token
