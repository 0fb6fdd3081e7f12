"""Rows 11 and 12 with real processes: a gateway and a hub, and between them a NAT that changes its mind (level L2).

The NAT is a relay of datagrams in this process and needs no root: the hub sees its sockets, not the gateway's.
"""

from __future__ import annotations

import itertools
import re
import socket
import time
from pathlib import Path

import pytest
import trio

from bench.fleet import Fleet, Node
from tests.real.traffic import Traffic

pytestmark = [pytest.mark.real, pytest.mark.slow]

HOSTS = itertools.cycle(["127.0.0.2", "127.0.0.3", "127.0.0.4"])
BUFFER = 65_536


class Nat:
    """Whatever comes to `inside` goes on to `to` from the present outer socket, and what comes there goes back."""

    def __init__(self, to: int) -> None:
        self._to = ("127.0.0.1", to)
        self._inside = trio.socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._within: tuple[str, int] | None = None
        self._outer: trio.socket.SocketType | None = None
        self._scope = trio.CancelScope()
        self.deaf = False
        """What comes from the present mapping is lost, either way: until the inside takes another port."""

    async def start(self, nursery: trio.Nursery) -> int:
        """The port inside."""
        await self._inside.bind(("127.0.0.1", 0))
        self._nursery = nursery
        await self.rebind()
        nursery.start_soon(self._outwards)
        return int(self._inside.getsockname()[1])

    async def rebind(self, host: str = "127.0.0.1") -> None:
        """Another port, or another address; what is sent to the old one is lost."""
        outer = trio.socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        await outer.bind((host, 0))
        self._scope.cancel()
        self._outer, self._scope = outer, trio.CancelScope()
        self._nursery.start_soon(self._inwards, outer, self._scope)

    async def _outwards(self) -> None:
        while True:
            data, within = await self._inside.recvfrom(BUFFER)
            if within != self._within:
                self._within, self.deaf = within, False
            if self._outer is not None and not self.deaf:
                await self._outer.sendto(data, self._to)

    async def _inwards(self, outer: trio.socket.SocketType, scope: trio.CancelScope) -> None:
        with scope, outer:
            while True:
                data, _ = await outer.recvfrom(BUFFER)
                if self._within is not None and not self.deaf:
                    await self._inside.sendto(data, self._within)

    def close(self) -> None:
        self._inside.close()


def count(node: Node, name: str) -> int:
    """A counter of the daemon's metrics, all its labels together."""
    _, text = node.get("/metrics")
    found = re.findall(rf"^\w*{name}_total(?:\{{[^}}]*\}})? (\S+)$", text, re.MULTILINE)
    assert found, f"{name} is not in the metrics"
    return int(sum(map(float, found)))


async def until(node: Node, name: str, wanted: int) -> None:
    with trio.fail_after(5.0):
        while await trio.to_thread.run_sync(count, node, name) < wanted:
            await trio.sleep(0.05)


async def back_within(traffic: Traffic, seconds: float) -> float:
    """From now until something more arrives at the reader."""
    start = time.monotonic()
    with trio.fail_after(seconds):
        while traffic.arrived_at < start:
            await trio.sleep(0.005)
    return traffic.arrived_at - start


async def test_fault_11_a_nat_between_gateway_and_hub(tmp_path: Path) -> None:
    """Ports, addresses and a mapping that goes dumb, under load: one session all along, and the books balance."""
    with Fleet(tmp_path) as fleet:
        hub = fleet.hub()
        gateway = fleet.gateway(upstream=hub)
        async with trio.open_nursery() as nursery:
            nat = Nat(hub.port)
            port = await nat.start(nursery)
            gateway.config.write_text(gateway.config.read_text().replace(f":{hub.port}", f":{port}"))
            await trio.to_thread.run_sync(hub.start)
            await trio.to_thread.run_sync(gateway.start)
            async with Traffic(fleet, gateway, hub, publishers=2, workers=2) as traffic:
                with trio.fail_after(20):
                    while not traffic.arrived_at or not any(traffic.arrived.values()):
                        await trio.sleep(0.02)
                handshakes = await trio.to_thread.run_sync(count, hub, "handshakes")
                validated = await trio.to_thread.run_sync(count, hub, "path_validations")
                waits = []
                for n in range(6):
                    await trio.sleep(0.5)
                    await nat.rebind("127.0.0.1" if n % 2 else next(HOSTS))
                    waits.append(await back_within(traffic, 3.0))
                    await until(hub, "path_validations", validated + n + 1)
                nat.deaf = True
                await trio.sleep(0.1)  # for what had passed already
                waits.append(await back_within(traffic, 5.0))
                await traffic.stop()
            traffic.check()
            print(f"{sum(traffic.published.values())} messages, standstills {[round(w, 3) for w in waits]} s")
            assert count(hub, "handshakes") == handshakes
            assert count(hub, "path_validations") == validated + 6
            assert count(gateway, "rebinds") >= 1
            assert gateway.log.read_text().count('"uplink_connected"') <= 1
            for node in (gateway, hub):
                assert node.ctl("ledger", "show")["unexplained"] == 0
                assert node.stop() == 0
            nursery.cancel_scope.cancel()
        nat.close()
