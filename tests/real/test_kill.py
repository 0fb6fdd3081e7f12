"""Real processes, killed without warning under load (fault 31)."""

from __future__ import annotations

import os
import random
import statistics
import time
from pathlib import Path

import pytest
import trio

from bench.fleet import Fleet, Node
from tests.real.traffic import Traffic

KILLS = int(os.environ.get("STPD_KILLS", "20"))
"""The suite kills 20 times, `make soak` 200 times."""

RECONNECT_P95 = 2.0
"""Seconds from the moment a killed daemon is ready again until something arrives at the reader."""


async def kill_and_restart(node: Node, pause: float, traffic: Traffic) -> float:
    """SIGKILL, wait, start; the seconds from ready to the next arrival."""
    node.kill()
    await trio.sleep(pause)
    await trio.to_thread.run_sync(node.start)
    ready = time.monotonic()
    with trio.fail_after(30):
        while traffic.arrived_at < ready:
            await trio.sleep(0.01)
    return traffic.arrived_at - ready


@pytest.mark.real
@pytest.mark.slow
async def test_fault_31_kill_9_of_gateway_and_hub(tmp_path: Path) -> None:
    """Acknowledged never lost, delivered once and in order, no gap; p95 of the reconnect within 2 s."""
    rng = random.Random(31)
    back: list[float] = []
    with Fleet(tmp_path) as fleet:
        hub = fleet.hub()
        gateway = fleet.gateway(upstream=hub)
        hub.start()
        gateway.start()
        async with Traffic(fleet, gateway, hub) as traffic:
            await trio.sleep(0.5)
            for kill in range(KILLS):
                await trio.sleep(rng.random() * 0.4)
                victim = rng.choice([hub, gateway])
                back.append(await kill_and_restart(victim, rng.random() * 0.2, traffic))
                print(f"kill {kill + 1}: {victim.name}, back after {back[-1]:.2f} s")
            await traffic.stop()
        traffic.check()
        assert sum(traffic.published.values()) > 20 * KILLS
        for node in (gateway, hub):
            assert node.ctl("ledger", "show")["unexplained"] == 0
            assert node.stop() == 0
    p95 = statistics.quantiles(back, n=20, method="inclusive")[-1]
    print(f"{sum(traffic.published.values())} messages, reconnect p95 {p95:.2f} s")
    assert p95 <= RECONNECT_P95
