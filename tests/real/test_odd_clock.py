"""Fault 41: a wall clock that jumps, races and runs backwards. Timers do not notice; nothing is lost or ended."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import trio

import stp
from bench.fleet import Fleet, Node

pytestmark = [pytest.mark.real, pytest.mark.slow]

DAY = 86_400.0
ODD_CLOCK = """
import os, time

real, since = time.time, time.monotonic()

def odd():
    with open(os.environ["ODD_CLOCK"]) as file:
        offset, rate = map(float, file.read().split())
    return real() + offset + (time.monotonic() - since) * (rate - 1.0)

time.time = odd
time.time_ns = lambda: int(odd() * 1e9)
"""
"""As a sitecustomize it is there before anybody has taken a reference to the clock."""


class OddClock:
    """The wall clock of the nodes that are started with its `env`: real time + `offset`, running at `rate`."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir()
        (directory / "sitecustomize.py").write_text(ODD_CLOCK)
        self._file = directory / "clock"
        self.env = {
            "PYTHONPATH": f"{directory}:{Path(stp.__file__).parent.parent}",
            "ODD_CLOCK": str(self._file),
        }
        self.set()

    def set(self, offset: float = 0.0, rate: float = 1.0) -> None:
        fresh = self._file.with_suffix(".new")
        fresh.write_text(f"{offset} {rate}")
        fresh.replace(self._file)


def session_ids(node: Node) -> list[str]:
    return sorted(one["id"] for one in node.ctl("sessions", "list"))


async def test_fault_41_a_wall_clock_that_jumps_races_and_runs_backwards(tmp_path: Path) -> None:
    """±30 days, ×100 and backwards, on hub and gateway, under traffic: the same sessions, all messages in custody."""
    with Fleet(tmp_path) as fleet:
        clock = OddClock(tmp_path / "odd")
        hub = fleet.hub()
        hub.start(env=clock.env)
        edge = fleet.gateway(upstream=hub)
        edge.start(env=clock.env)
        async with stp.connect(edge.url, identity=fleet.device("sensor-1", edge)) as session:
            await session.publish("sensor-1/temp", b"before", receipt="custody")
            before = session_ids(hub), session_ids(edge)
            assert before[0]
            logs = hub.log.read_text(), edge.log.read_text()
            for offset, rate in ((30 * DAY, 1), (-30 * DAY, 1), (0, 100), (30 * DAY, -1), (0, 1)):
                clock.set(offset, rate)
                told = hub.ctl("status")["now_ms"] / 1000 - time.time()
                assert told == pytest.approx(offset, abs=5.0) or rate != 1, "the daemon lives by this clock"
                with trio.fail_after(10.0):
                    for number in range(8):
                        await session.publish("sensor-1/temp", b"%d" % number, receipt="custody")
                        await trio.sleep(0.1)
            assert (session_ids(hub), session_ids(edge)) == before
            for node, known in zip((hub, edge), logs, strict=True):
                later = node.log.read_text().removeprefix(known)
                assert "uplink_down" not in later
                assert "closed" not in later
                assert node.running
