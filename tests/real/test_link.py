"""Fault matrix, rows 7, 8 and 9, and commands beside bulk, with real sockets between network namespaces (level L3).

The link is bench.wire's: 10 Mbit/s of IP packets, 15 ms each way, a queue of 25 packets. Needs root and TUN devices;
`python -m bench.link` measures the same for longer. A busy machine can only make these figures smaller, so the best
of a few tries counts.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from bench.link import Setting, commands, goodput, report, send, serve, shares
from bench.transport import make_identities
from bench.wire import Conditions, Wire, unavailable

REASON = unavailable()
MIB = 1 << 20
TRIES = 3
BUSY = 2.0
"""Load per processor above which a figure that is too small proves nothing."""

pytestmark = [
    pytest.mark.real,
    pytest.mark.slow,
    pytest.mark.skipif(REASON is not None, reason=f"no link between namespaces here: {REASON}"),
]


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    directory: Path = tmp_path_factory.mktemp("link")
    make_identities(directory)
    return Setting(Conditions(), directory, congestion="")


def best(measure: Callable[[], float], wanted: float) -> float:
    """Of at most TRIES, as soon as one suffices. Skips where the machine has too much else to do."""
    found = 0.0
    for _ in range(TRIES):
        found = max(found, measure())
        if found >= wanted:
            return found
    load = os.getloadavg()[0] / (os.cpu_count() or 1)
    if load > BUSY:
        pytest.skip(
            f"{found:.2f} instead of {wanted} at a load of {load:.1f} per processor: too busy to tell"
        )
    return found


def test_fault_07_goodput_at_two_percent_loss_between_namespaces(setting: Setting) -> None:
    assert best(lambda: goodput(setting, "stp", 0.02, 2 * MIB), 0.6) >= 0.6


def test_fault_08_goodput_on_a_clean_link_between_namespaces(setting: Setting) -> None:
    assert best(lambda: goodput(setting, "stp", 0.0, 2 * MIB), 0.85) >= 0.85


def black_holes(setting: Setting, size: int, on: float, off: float, *, holes: int = 10) -> float:
    """Seconds from a return of the link to the next bytes, the longest; everything arrives, in one session."""
    with Wire(setting.conditions) as wire:
        server = serve(wire, setting, "stp", size)
        send(wire, setting, "stp", size=size)
        returns = []
        while server.poll() is None and len(returns) < holes:
            time.sleep(on)
            wire.set(up=False)
            time.sleep(off)
            wire.set(up=True)
            returns.append(time.monotonic())
        flow = report(server, ask=False)["flows"][0]
    assert flow[-1][1] == size
    waits = [min(at for at, _ in flow if at > up) - up for up in returns if flow[-1][0] > up]
    assert waits
    return max(waits)


def test_fault_09_a_black_hole_between_namespaces(setting: Setting) -> None:
    """Away for 2 s: bytes move again within 2 s of the return."""
    assert black_holes(setting, MIB, 0.7, 2.0, holes=1) <= 2.0


@pytest.mark.many
def test_fault_09_black_holes_between_namespaces(setting: Setting) -> None:
    """5 s there, 2 s away, again and again, 20 MiB."""
    assert black_holes(setting, 20 * MIB, 5.0, 2.0) <= 2.0


@pytest.mark.many
def test_fault_07_goodput_at_two_percent_loss_10_mib_between_namespaces(setting: Setting) -> None:
    assert best(lambda: goodput(setting, "stp", 0.02), 0.6) >= 0.6


@pytest.mark.many
def test_fault_08_goodput_10_mib_between_namespaces(setting: Setting) -> None:
    assert best(lambda: goodput(setting, "stp", 0.0), 0.85) >= 0.85


@pytest.mark.many
@pytest.mark.parametrize(("first", "second"), [("stp", "stp"), ("stp", "tcp"), ("tcp", "stp")])
def test_fault_08_flows_share_a_link_between_namespaces(setting: Setting, first: str, second: str) -> None:
    """Beside the kernel's CUBIC too, whoever comes first: within a factor of two."""

    def evenness() -> float:
        found = shares(setting, first, second)
        assert sum(found) >= 0.7, json.dumps(found)
        return min(found) / max(found)

    assert best(evenness, 0.5) >= 0.5


@pytest.mark.many
def test_a_command_overtakes_bulk_between_namespaces(setting: Setting) -> None:
    """At 1 Mbit/s a command of 1 KiB leaves at once: it arrives as if it met a full queue, at most 50 ms later."""
    found = commands(setting)
    assert found["commands"] >= 50
    assert found["p50_ms"] <= found["behind_a_full_queue_ms"] + 50
