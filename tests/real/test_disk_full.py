"""A disk that is full, and then is not (fault 35): nothing acknowledged is lost, and both recover by themselves."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from bench.fleet import Fleet, Node
from tests.real.traffic import Traffic

pytestmark = [pytest.mark.real, pytest.mark.slow]

DISK = "48m"
RECOVERY = 5.0
"""Seconds from free space to the next acknowledgement."""


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "disk"
    path.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", str(path)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        pytest.skip(f"a tmpfs cannot be mounted here: {done.stderr.strip()}")
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)


def fill(disk: Path) -> Path:
    """Take all the room there is."""
    ballast = disk / "ballast"
    with ballast.open("wb", buffering=0) as file:
        for size in (1 << 20, 4096, 1):
            try:
                while True:
                    file.write(os.urandom(size))
            except OSError:
                continue
    return ballast


async def acknowledged(traffic: Traffic) -> int:
    return sum(map(len, traffic.acknowledged.values()))


@pytest.mark.parametrize("victim", ["gateway", "hub"])
async def test_fault_35_disk_full_then_freed(tmp_path: Path, small_disk: Path, victim: str) -> None:
    extra = f'[store]\npath = "{small_disk}/store"\nbudget = "40MiB"\nreserve = "4MiB"\n'
    with Fleet(tmp_path / "fleet") as fleet:
        hub = fleet.hub(extra=extra if victim == "hub" else "")
        gateway = fleet.gateway(upstream=hub, extra=extra if victim == "gateway" else "")
        hub.start()
        gateway.start()
        sufferer = hub if victim == "hub" else gateway
        async with Traffic(fleet, gateway, hub, publishers=2, size=2000) as traffic:
            await trio.sleep(1.0)
            ballast = await trio.to_thread.run_sync(fill, small_disk)
            await wait_until_full(sufferer)
            if victim == "gateway":
                stuck = await acknowledged(traffic)
                await trio.sleep(1.0)
                assert await acknowledged(traffic) - stuck <= 100, "acknowledged without room"
            status = await trio.to_thread.run_sync(sufferer.ctl, "status")
            assert status["buffer"]["full"]
            assert any("store" in reason for reason in status["reasons"])
            ballast.unlink()
            freed, arrived = time.monotonic(), sum(map(len, traffic.arrived.values()))
            with trio.fail_after(30):
                while sum(map(len, traffic.arrived.values())) <= arrived + 10:
                    await trio.sleep(0.02)
            recovered = time.monotonic() - freed
            await traffic.stop()
        traffic.check()
        for node in (gateway, hub):
            assert node.ctl("ledger", "show")["unexplained"] == 0
        print(f"{victim}: recovered {recovered:.2f} s after there was room")
        assert recovered <= RECOVERY


async def wait_until_full(node: Node) -> None:
    with trio.fail_after(30):
        while True:
            status = await trio.to_thread.run_sync(node.ctl, "status")
            if status["buffer"]["full"]:
                return
            await trio.sleep(0.1)
