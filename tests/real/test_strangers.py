"""Strangers at the door of a real hub: silence, refusals with reasons, and nothing for anybody else."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path

import pytest
import trio

import stp
from bench.fleet import Fleet
from stp.core.packet import DATA_BYTE
from stp.identity import network_key_pem
from stpd.network_keys import replace_keys

pytestmark = [pytest.mark.real]


def test_fault_17_random_and_truncated_datagrams_draw_no_answer_and_no_log_line(tmp_path: Path) -> None:
    """R-2-7."""
    with Fleet(tmp_path) as fleet, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as stranger:
        hub = fleet.hub()
        hub.start()
        before = hub.log.read_text()
        stranger.bind(("127.0.0.1", 0))
        for first in (0x00, DATA_BYTE, 0xC0, 0xE0, 0xFF):
            for size in (0, 1, 20, 40, 1199, 1200, 1472):
                stranger.sendto(bytes([first]) + os.urandom(size), ("127.0.0.1", hub.port))
        version = bytes.fromhex("c053545001") + os.urandom(1195)
        stranger.sendto(version, ("127.0.0.1", hub.port))
        stranger.settimeout(0.5)
        with pytest.raises(TimeoutError):
            stranger.recvfrom(2048)
        assert hub.log.read_text() == before
        metrics = hub.get("/metrics")[1]
        dropped = sum(
            float(line.rpartition(" ")[2])
            for line in metrics.splitlines()
            if line.startswith("stpd_packets_dropped_total")
        )
        assert dropped >= 36


@pytest.mark.parametrize("what", ["another fleet", "another name"])
async def test_fault_24_a_wrong_certificate_is_never_connected(tmp_path: Path, what: str) -> None:
    """Refused with its reason in the hub's log and at the client."""
    with Fleet(tmp_path / "ours") as fleet, Fleet(tmp_path / "theirs") as theirs:
        theirs._network_key = fleet._network_key
        hub = fleet.hub()
        hub.start()
        if what == "another fleet":
            url, identity = hub.url, theirs.device("sensor-1", hub)
        else:
            url, identity = hub.url.replace("hub-1@", "hub-2@"), fleet.device("sensor-1", hub)
        with pytest.raises(stp.Rejected) as refused:
            async with stp.connect(url, identity=identity, connect_timeout=8.0):
                pytest.fail("reported as connected")
        assert str(refused.value)
        deadline = time.monotonic() + 5
        while "handshake_refused" not in hub.log.read_text():
            assert time.monotonic() < deadline, hub.tail()
            await trio.sleep(0.02)


async def test_without_the_network_key_there_is_only_silence(tmp_path: Path) -> None:
    with Fleet(tmp_path) as fleet:
        hub = fleet.hub()
        hub.start()
        before = hub.log.read_text()
        with pytest.raises(stp.Unreachable):
            async with stp.connect(
                hub.url,
                identity=fleet.device("sensor-1", hub),
                network_key=os.urandom(32),
                connect_timeout=1.5,
            ):
                pytest.fail("reported as connected")
        assert hub.log.read_text() == before


async def test_two_network_keys_are_accepted_after_a_reload(tmp_path: Path) -> None:
    """R-3-6: a second key is heard from the reload on, sessions that stand go on, and dropping the first ends it."""
    with Fleet(tmp_path) as fleet:
        hub = fleet.hub()
        hub.start()
        old, new = fleet._network_key, os.urandom(32)
        device, bundle = fleet.device("sensor-1", hub), Path(hub.directory) / "identity.pem"

        async def is_heard(key: bytes, wait: float) -> bool:
            try:
                async with stp.connect(hub.url, identity=device, network_key=key, connect_timeout=wait):
                    return True
            except stp.Unreachable:
                return False

        async with stp.connect(hub.url, identity=device) as standing:
            assert not await is_heard(new, 1.0)
            replace_keys(bundle, network_key_pem(old) + network_key_pem(new))
            assert "network keys" in hub.ctl("reload")["changed"]
            assert await is_heard(new, 5.0)
            assert await is_heard(old, 5.0)
            replace_keys(bundle, network_key_pem(new))
            hub.ctl("reload")
            assert await is_heard(new, 5.0)
            assert not await is_heard(old, 1.0)
            await standing.publish("sensor-1/temp", b"1", receipt="kept")
