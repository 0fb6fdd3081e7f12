"""Row 44 with real processes: UDP between a gateway and its hub is blocked, and opened again (R-11-4, level L2).

The firewall is a relay of datagrams in this process and needs no root; TLS on TCP goes by it.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from bench.fleet import Fleet, Node
from tests.real.test_rebinding import Nat, back_within
from tests.real.traffic import Traffic

pytestmark = [pytest.mark.real, pytest.mark.slow]

QUICK = '[transport]\nprobe = "2s"\nstable = "2s"\n'


class Firewall(Nat):
    """Lets UDP through, or nothing of it: whatever port the inside takes."""

    shut = False

    @property
    def deaf(self) -> bool:
        return self.shut

    @deaf.setter
    def deaf(self, value: bool) -> None:
        """A new port inside changes nothing."""


@asynccontextmanager
async def walled(path: Path, *, shut: bool) -> AsyncIterator[tuple[Fleet, Node, Node, Firewall]]:
    """Fleet, gateway and hub, both running, and what stands between them."""
    with Fleet(path) as fleet:
        hub = fleet.hub()
        gateway = fleet.gateway(upstream=hub, extra=QUICK)
        async with trio.open_nursery() as nursery:
            wall = Firewall(hub.port)
            wall.shut = shut
            port = await wall.start(nursery)
            text = gateway.config.read_text()
            gateway.config.write_text(text.replace(f":{hub.port}", f":{port}?tls={hub.tls_port}"))
            await trio.to_thread.run_sync(hub.start)
            await trio.to_thread.run_sync(gateway.start)
            yield fleet, gateway, hub, wall
            nursery.cancel_scope.cancel()
        wall.close()


async def upstream(gateway: Node) -> dict[str, Any]:
    (found,) = await trio.to_thread.run_sync(gateway.ctl, "upstreams", "list")
    return dict(found)


async def carried_by(gateway: Node, carrier: str, seconds: float) -> float:
    """Wait until the uplink is on it; how long that took."""
    start = time.monotonic()
    with trio.fail_after(seconds):
        while (await upstream(gateway))["carrier"] != carrier:
            await trio.sleep(0.1)
    return time.monotonic() - start


def told(gateway: Node, event: str) -> list[dict[str, Any]]:
    """Lines of its log."""
    lines = gateway.log.read_text().splitlines()
    return [json.loads(line) for line in lines if re.search(rf'"{event}"', line)]


async def test_fault_44_udp_blocked_falls_to_tls_and_back(tmp_path: Path) -> None:
    """Blocked under load: receipts within 5 s, over TLS; opened: back on UDP; three times, and the books balance."""
    async with walled(tmp_path, shut=False) as (fleet, gateway, hub, wall):
        await carried_by(gateway, "udp", 5.0)
        standstills, returns = [], []
        async with Traffic(fleet, gateway, hub, publishers=2, workers=2) as traffic:
            with trio.fail_after(20):
                while not any(traffic.arrived.values()):
                    await trio.sleep(0.02)
            for _ in range(2):
                await trio.sleep(1.0)
                wall.shut = True
                await trio.sleep(0.1)  # for what had passed already
                standstills.append(await back_within(traffic, 5.0))
                assert (await upstream(gateway))["carrier"] == "tls"
                await trio.sleep(0.5)
                wall.shut = False
                returns.append(await carried_by(gateway, "udp", 20.0))
            await traffic.stop()
        traffic.check()
        print(
            f"{sum(traffic.published.values())} messages, standstills {[round(w, 2) for w in standstills]} s, "
        )
        print(f"back on UDP after {[round(w, 2) for w in returns]} s")
        assert [one["carrier"] for one in told(gateway, "uplink_moved")] == ["tls", "udp"] * 2
        assert not told(gateway, "uplink_down"), "that is no outage"
        for node in (gateway, hub):
            assert node.ctl("ledger", "show")["unexplained"] == 0
            assert node.stop() == 0


async def test_fault_44_a_start_where_udp_is_blocked(tmp_path: Path) -> None:
    """Connected over TLS within 5 s, the next time at once, since it is remembered; and on UDP when that is open."""
    async with walled(tmp_path, shut=True) as (fleet, gateway, hub, wall):
        first = await carried_by(gateway, "tls", 5.0)
        async with Traffic(fleet, gateway, hub, publishers=1, workers=2) as traffic:
            with trio.fail_after(20):
                while not any(traffic.arrived.values()):
                    await trio.sleep(0.02)
            wall.shut = False
            back = await carried_by(gateway, "udp", 20.0)
            await traffic.stop()
        traffic.check()
        print(f"over TLS after {first:.2f} s, over UDP {back:.2f} s after it was opened")
        assert gateway.ctl("ledger", "show")["unexplained"] == 0
        assert gateway.stop() == 0
