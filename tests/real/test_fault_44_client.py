"""Row 44 with real processes: the client library where UDP is blocked, from the start, in mid-session, and no more.

Between the client and a real gateway stands a relay of datagrams that can be shut; TLS has the gateway's own port.
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

import stp
from bench.fleet import Fleet, Node
from stp import connection, networks, racing, ways

pytestmark = [pytest.mark.real, pytest.mark.slow]

BUFFER = 65_536


class Relay:
    """Datagrams between whoever dials and one port of this machine; each who dials has a socket of its own."""

    def __init__(self, to: int) -> None:
        self._to = ("127.0.0.1", to)
        self._inside = trio.socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._outer: dict[Any, trio.socket.SocketType] = {}
        self.open = True

    async def start(self, nursery: trio.Nursery) -> int:
        """The port to dial."""
        await self._inside.bind(("127.0.0.1", 0))
        nursery.start_soon(self._outwards, nursery)
        return int(self._inside.getsockname()[1])

    async def _outwards(self, nursery: trio.Nursery) -> None:
        while True:
            data, within = await self._inside.recvfrom(BUFFER)
            if not self.open:
                continue
            if within not in self._outer:
                self._outer[within] = outer = trio.socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
                await outer.bind(("127.0.0.1", 0))
                nursery.start_soon(self._inwards, outer, within)
            await self._outer[within].sendto(data, self._to)

    async def _inwards(self, outer: trio.socket.SocketType, within: Any) -> None:
        while True:
            data, _ = await outer.recvfrom(BUFFER)
            if self.open:
                await self._inside.sendto(data, within)

    def close(self) -> None:
        for sock in (self._inside, *self._outer.values()):
            sock.close()


class Place:
    """A gateway, the relay before its UDP port, and a device's identity."""

    def __init__(self, fleet: Fleet, gateway: Node, relay: Relay, port: int) -> None:
        self.fleet, self.gateway, self.relay = fleet, gateway, relay
        self.url = f"stp://{gateway.name}@127.0.0.1:{port}?tls={gateway.tls_port}"
        self.identity = fleet.device("sensor-1", gateway)

    async def carriers(self) -> list[str]:
        """Of the device's sessions, as the gateway lists them."""
        found = await trio.to_thread.run_sync(self.gateway.ctl, "sessions", "list")
        return [one["carrier"] for one in found if one["node"] == "sensor-1" and one["state"] == "open"]

    def remembered(self) -> list[str]:
        found = json.loads(Path(f"{self.identity}.networks").read_text())["networks"]
        return [one["carrier"] for one in found.values()]


@asynccontextmanager
async def place(directory: Path) -> AsyncIterator[Place]:
    with Fleet(directory) as fleet:
        gateway = fleet.gateway(upstream=None)
        await trio.to_thread.run_sync(gateway.start)
        async with trio.open_nursery() as nursery:
            relay = Relay(gateway.port)
            yield Place(fleet, gateway, relay, await relay.start(nursery))
            nursery.cancel_scope.cancel()
        relay.close()
        assert gateway.ctl("ledger", "show")["unexplained"] == 0
        assert gateway.stop() == 0


@pytest.fixture(autouse=True)
def network(monkeypatch: pytest.MonkeyPatch) -> None:
    """One network that has a name, whatever machine this runs on."""
    monkeypatch.setattr(networks, "here", lambda: "0123456789abcdef")


async def connected_in(place: Place, count: int = 3) -> float:
    """Seconds from nothing to the first receipt; `count` messages are kept."""
    start = time.monotonic()
    took = 0.0
    async with stp.connect(place.url, identity=place.identity) as client:
        for number in range(count):
            await client.publish("site/first", b"%d" % number, receipt="kept")
            took = took or time.monotonic() - start
        place.seen = await place.carriers()  # type: ignore[attr-defined]
    return took


async def test_fault_44_started_where_udp_is_blocked(tmp_path: Path) -> None:
    """R-11-4: over TLS within about three seconds; the next start in this network goes there at once."""
    async with place(tmp_path) as here:
        here.relay.open = False
        first = await connected_in(here)
        assert racing.TLS_AFTER <= first < racing.TLS_AFTER + 1.5
        assert here.seen == ["tls"]  # type: ignore[attr-defined]
        assert here.remembered() == ["tls"]
        again = await connected_in(here)
        assert again < 1.5
        here.relay.open = True
        await connected_in(here)  # both are tried: whichever is first
        print(f"first {first:.2f} s, again {again:.2f} s")


class Stream:
    """Numbered messages, one after the other, and a reader of them on another session, over UDP without the relay."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.published = 0
        self.kept_at = 0.0
        self.arrived: list[int] = []
        self.stopping = False

    async def publish(self, client: stp.Client) -> None:
        while not self.stopping:
            self.published += 1
            await client.publish("site/numbers", b"%d" % self.published, receipt="kept")
            self.kept_at = time.monotonic()
            await trio.sleep(0.002)

    async def read(self) -> None:
        identity = self.place.fleet.device("reader-1", self.place.gateway)
        async with stp.connect(self.place.gateway.url, identity=identity, close_timeout=0.1) as client:
            async for message in client.subscribe("site/#", durable="oracle", start="earliest"):
                self.arrived.append(int(message.payload))

    async def hear(self, client: stp.Client, heard: list[int]) -> None:
        """The same messages back on the session that moves."""
        async for message in client.subscribe("site/#"):
            heard.append(int(message.payload))  # noqa: PERF401 - one by one, as they come

    async def receipts_again(self, since: float, seconds: float) -> float:
        with trio.fail_after(seconds):
            while self.kept_at < since:
                await trio.sleep(0.005)
        return self.kept_at - since


async def until_over(place: Place, carriers: list[str], seconds: float) -> None:
    with trio.fail_after(seconds):
        while await place.carriers() != carriers:
            await trio.sleep(0.1)


async def test_fault_44_blocked_in_mid_session_and_open_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """R-8-8, R-11-4: over to TLS in under 5 s, back when UDP has stood the test; each message once, in order."""
    for name, value in (("PROBE_FIRST", 1.0), ("PROBE_MOST", 2.0), ("STABLE", 2.0)):
        monkeypatch.setattr(racing, name, value)
    monkeypatch.setattr(connection, "PROBE_CHECK", 0.2)
    monkeypatch.setattr(ways, "PROBE_TIMEOUT", 0.5)
    async with place(tmp_path) as here, trio.open_nursery() as nursery:
        stream = Stream(here)
        heard: list[int] = []
        nursery.start_soon(stream.read)
        async with stp.connect(here.url, identity=here.identity) as client, trio.open_nursery() as within:
            within.start_soon(stream.hear, client, heard)
            within.start_soon(stream.publish, client)
            await stream.receipts_again(time.monotonic() + 0.5, 5.0)
            assert await here.carriers() == ["udp"]
            gaps = []
            for _ in range(2):
                here.relay.open = False
                await trio.sleep(0.05)  # what had passed already
                gaps.append(await stream.receipts_again(time.monotonic(), 5.0))
                await until_over(here, ["tls"], 8.0)
                await trio.sleep(2.0)
                assert client.statistics().connection.connects == 1  # continued, not lost and found
                here.relay.open = True
                await until_over(here, ["udp"], 12.0)
                await stream.receipts_again(time.monotonic(), 1.0)
            stream.stopping = True
            print(f"standstills {[round(gap, 2) for gap in gaps]} s, {stream.published} messages")
            with trio.fail_after(10):
                while len(stream.arrived) < stream.published or heard[-1] < stream.published:
                    await trio.sleep(0.05)
            within.cancel_scope.cancel()
            assert client.statistics().connection.moves == 4
        nursery.cancel_scope.cancel()
        wanted = list(range(1, stream.published + 1))
        assert stream.arrived == wanted
        assert heard == wanted[-len(heard) :]


@pytest.mark.parametrize("open_udp", [True, False])
async def test_fault_44_a_refusal_is_told_over_either_carrier(tmp_path: Path, open_udp: bool) -> None:
    """A certificate of another fleet: Rejected, with the reason, and no waiting for the other carrier to time out."""
    async with place(tmp_path / "one") as here:
        here.relay.open = open_udp
        stranger = Fleet(tmp_path / "other")
        stranger._network_key = here.fleet._network_key
        identity = stranger.device("sensor-1", here.gateway)
        start = time.monotonic()
        with pytest.raises(stp.Rejected) as told:
            async with stp.connect(here.url, identity=identity):
                pass
        took = time.monotonic() - start
        print(f"{told.value} after {took:.2f} s")
        assert took < (1.0 if open_udp else racing.TLS_AFTER + 1.5)
