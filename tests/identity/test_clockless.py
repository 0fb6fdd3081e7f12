"""Fault row 61 over the simulated network: a machine that starts in 1970 connects and sends, and still refuses.

Both ends take their TLS contexts from a ContextCache whose clock the test sets.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest

from stp.identity import ContextCache, Identity, TimeFloor
from tests.identity_kit import Flaw, shared
from tests.sim import Host, Network

NOW = shared().now.timestamp()
YEAR = 365.25 * 86400


def clocked(identity: Identity, clock: float, *, synchronised: bool, heard: float = 0.0) -> dict[str, Any]:
    """EndpointConfig fields of a node with this identity and this clock."""
    floor = TimeFloor(build_time=0.0)
    floor.heard(heard)
    cache = ContextCache(
        identity, floor, clock=lambda: clock, monotonic=lambda: 0.0, synchronised=lambda: synchronised
    )
    return {"tls": cache.tls, "leaf_der": identity.leaf_der}


def pair(net: Network, edge: dict[str, Any], hub: dict[str, Any]) -> tuple[Host, Host]:
    return net.dialler("edge-1", **edge), net.listener("hub-1", **hub)


@pytest.mark.parametrize(
    ("edge_clock", "hub_clock"),
    [(0.0, NOW), (NOW, 0.0), (0.0, 0.0), (NOW + 30 * YEAR, NOW), (NOW - YEAR, NOW)],
    ids=["edge in 1970", "hub in 1970", "both in 1970", "edge ahead", "edge before its notBefore"],
)
@pytest.mark.parametrize("seed", range(3))
def test_fault_61_connects_and_sends(seed: int, edge_clock: float, hub_clock: float) -> None:
    net = Network(seed=seed, delay=0.015, loss=0.2)
    kit = shared()
    edge, hub = pair(
        net,
        clocked(kit.identity("edge-1"), edge_clock, synchronised=edge_clock == NOW),
        clocked(kit.identity("hub-1"), hub_clock, synchronised=hub_clock == NOW),
    )
    session = edge.connect(hub)
    peer = net.establish(session)
    lane = session.open_stream()
    session.write(lane, b"21.5")
    net.run(lambda: hub.received(peer, lane) == b"21.5", limit=10.0)


@pytest.mark.parametrize("heard", [NOW, NOW - 1800], ids=["now", "half an hour ago"])
def test_fault_61_an_expired_hub_is_refused_by_what_was_heard(heard: float) -> None:
    """The clock says 1970, a hub said otherwise: expiry is judged by the later one."""
    net = Network(seed=1)
    kit = shared()
    edge, hub = pair(
        net,
        clocked(kit.identity("edge-1"), 0.0, synchronised=False, heard=heard),
        clocked(kit.identity("hub-1", Flaw.EXPIRED), NOW - 86400, synchronised=True),
    )
    session = edge.connect(hub)
    net.run(lambda: edge.closed(session) is not None, limit=10.0)
    assert edge.connected() == []
    assert hub.connected() == []


def test_fault_61_an_expired_edge_is_refused_by_the_hub_whatever_its_own_clock() -> None:
    net = Network(seed=2)
    kit = shared()
    edge, hub = pair(
        net,
        clocked(kit.identity("edge-1", Flaw.EXPIRED), 0.0, synchronised=False),
        clocked(kit.identity("hub-1", not_before=kit.now - timedelta(days=60)), NOW, synchronised=True),
    )
    session = edge.connect(hub)
    net.run(lambda: edge.closed(session) is not None, limit=10.0)
    assert edge.connected() == []
    assert len(hub.refusals) == 1
    assert "expired" in hub.refusals[0][2]
