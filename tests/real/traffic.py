"""Load and oracle for a fleet of real processes: numbered messages in, and every one of them accounted for.

    async with Traffic(fleet, gateway, hub, publishers=3) as traffic:
        ...kill and restart what you like...
        await traffic.stop(timeout=30)
    traffic.check()

Each publisher numbers its messages from 1; those whose receipt came are `acknowledged`. One durable reader at the hub
writes down what arrives, in order.
"""

from __future__ import annotations

import os
import time
from types import TracebackType

import trio

import stp
from bench.fleet import Fleet, Node


class Traffic:
    """Publishers at one node, a durable reader at another."""

    def __init__(
        self, fleet: Fleet, at: Node, to: Node, *, publishers: int = 3, workers: int = 4, size: int = 200
    ) -> None:
        self.fleet, self.at, self.to = fleet, at, to
        self.sensors = [f"sensor-{number}" for number in range(publishers)]
        self.workers = workers
        self.names = [f"{sensor}/{worker}" for sensor in self.sensors for worker in range(workers)]
        """One counter each: the order of two tasks is nobody's promise."""
        self.published = dict.fromkeys(self.names, 0)
        self.acknowledged: dict[str, set[int]] = {name: set() for name in self.names}
        self.arrived: dict[str, list[int]] = {name: [] for name in self.names}
        self.arrived_at = time.monotonic()
        self.corrupt = 0
        self._stopping = False
        self._filler = os.urandom(size)

    async def _publish(self, name: str, client: stp.Client) -> None:
        """Publish, await the receipt, publish the next: as a device that means it."""
        while not self._stopping:
            self.published[name] += 1
            number = self.published[name]
            payload = number.to_bytes(8, "big") + self._filler
            await client.publish(f"site/{name}", payload, receipt="kept")
            self.acknowledged[name].add(number)

    async def _publisher(self, sensor: str) -> None:
        identity = self.fleet.device(sensor, self.at)
        async with (
            stp.connect(self.at.url, identity=identity, close_timeout=30.0) as client,
            trio.open_nursery() as nursery,
        ):
            for worker in range(self.workers):
                nursery.start_soon(self._publish, f"{sensor}/{worker}", client)

    async def _reader(self) -> None:
        identity = self.fleet.device("reader-1", self.to)
        async with stp.connect(self.to.url, identity=identity, close_timeout=0.1) as client:
            async for message in client.subscribe("site/#", durable="oracle", start="earliest"):
                self.arrived_at = time.monotonic()
                name = message.topic.removeprefix("site/")
                self.corrupt += message.payload[8:] != self._filler
                self.arrived[name].append(int.from_bytes(message.payload[:8], "big"))

    async def stop(self, timeout: float = 60.0) -> None:
        """Publish no more; wait until everything that was published has arrived. AssertionError if it does not."""
        self._stopping = True
        with trio.move_on_after(timeout):
            while any(len(self.arrived[name]) < self.published[name] for name in self.names):
                await trio.sleep(0.05)
        self._nursery.cancel_scope.cancel()

    def check(self) -> None:
        """0 lost, 0 doubled, 0 reordered, 0 corrupt, whatever was killed meanwhile."""
        for name in self.names:
            arrived = self.arrived[name]
            lost = self.acknowledged[name] - set(arrived)
            assert not lost, f"{name}: acknowledged and lost: {sorted(lost)[:10]} of {len(lost)}"
            assert len(arrived) == len(set(arrived)), f"{name}: doubled"
            assert arrived == sorted(arrived), f"{name}: reordered"
            assert len(arrived) == self.published[name], f"{name}: {len(arrived)} of {self.published[name]}"
        assert self.corrupt == 0

    async def __aenter__(self) -> Traffic:
        self._manager = trio.open_nursery()
        self._nursery = await self._manager.__aenter__()
        for sensor in self.sensors:
            self._nursery.start_soon(self._publisher, sensor)
        self._nursery.start_soon(self._reader)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._nursery.cancel_scope.cancel()
        await self._manager.__aexit__(kind, value, trace)
