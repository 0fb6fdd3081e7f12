"""The client library as devices import it, in a simulated world: its own code but for the socket.

device = Library(world, "sensor-1", edge)
await world.run(lambda: device.client.connected, limit=10)
world.nursery.start_soon(device.publish, 100)
world.nursery.start_soon(device.read, "site/#")
await device.overlap()          # a fresh session beside each present one
"""

from __future__ import annotations

import struct
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import trio

from stp.client import Client
from stp.connection import Connection
from stp.core.verbs import AnySession
from stp.outbox import Refused
from stp.ways import Carrier, Dial
from tests.daemon.world import Keeper, World
from tests.identity_kit import shared
from tests.sim import Host

COUNTER = struct.Struct("!Q")


class NoSocket:
    """A carrier where the simulated network moves the bytes."""

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        task_status.started()
        await trio.sleep_forever()

    def send_now(self) -> None:
        """As `wake`."""

    def wake(self) -> None:
        """The network looks at every session by itself."""

    def close(self) -> None:
        """There is no socket."""


class Library:
    """One process of the library: a client, its connections, and what came to it."""

    def __init__(self, world: World, name: str, keeper: Keeper, **options: Any) -> None:
        """*options*: further ones of `stp.connect`."""
        self.world, self.name, self.keeper = world, name, keeper
        self.host = world.net.dialler(name, addr=(f"10.2.{len(world.libraries)}.1", 5000))
        self.host.on_ready = self._on_ready
        self.connections: list[Connection] = []
        self.arrived: dict[str, list[int]] = defaultdict(list)
        """topic -> counters, in order of arrival."""
        self.refused: list[Refused] = []
        self.dials = 0
        self._hear: dict[AnySession, Callable[[AnySession], None]] = {}
        self._counters: dict[str, int] = defaultdict(int)
        self.client = Client(
            f"stp://{keeper.name}@simulated",
            shared().identity(name),
            "",
            None,
            memory=8 << 20,
            compress=False,
            on_refused=self.refused.append,
            kind="client",
            **options,
        )
        dialler = self.client._dialler
        make = dialler.connection
        dialler.connection = lambda *args, **options: self._in_the_world(make(*args, **options))  # type: ignore[method-assign]
        self._in_the_world(self.client._connection)
        world.libraries.append(self)
        self.client.start(world.nursery)

    def _in_the_world(self, connection: Connection) -> Connection:
        connection.dial_udp, connection.dial_tls = self._dial, None
        self.connections.append(connection)
        return connection

    async def _dial(
        self, on_ready: Callable[[AnySession], None], failures: int = 0
    ) -> tuple[AnySession, Carrier]:
        return await self.dial_to(self.keeper.host)(on_ready)

    def dial_to(self, to: Host, *, by: Host | None = None) -> Dial:
        """A way to another listener, or from another address; whoever answers must be our keeper."""

        async def dial(on_ready: Callable[[AnySession], None]) -> tuple[AnySession, Carrier]:
            self.dials += 1
            session = (by or self.host).connect(to, node=self.keeper.name)
            self._hear[session] = on_ready
            return session, NoSocket()

        return dial

    def _on_ready(self, session: Any) -> None:
        self._hear[session](session)

    # -- what an application does

    async def publish(self, topic: str, count: int, *, every: float = 0.0, size: int = 8) -> None:
        """Counters, in order, one message each; `every` so many seconds."""
        for _ in range(count):
            self._counters[topic] += 1
            await self.client.publish(topic, COUNTER.pack(self._counters[topic]).ljust(size, b"."))
            await trio.sleep(every)

    async def read(self, *filters: str, durable: str | None = None) -> None:
        async for message in self.client.subscribe(*filters, durable=durable):
            self.arrived[message.topic].append(COUNTER.unpack_from(message.payload)[0])

    async def overlap(self) -> list[bool]:
        """Dial beside every session of this client at once."""
        found: list[bool] = []

        async def one(connection: Connection) -> None:
            found.append(await connection.dial_beside())

        async with trio.open_nursery() as nursery:
            for connection in self.connections:
                nursery.start_soon(one, connection)
        return found

    # -- what is known

    @property
    def ready(self) -> bool:
        """Every connection is up, every subscription stands."""
        readers = [reader.subscription for reader in self.client._readers.values()]
        standing = [*readers, *self.client._inbox.subscriptions.values()]
        return all(one.link is not None for one in self.connections) and all(
            subscription.confirmed.is_set() for subscription in standing
        )

    @property
    def settling(self) -> int:
        """Sessions that their successors have not relieved yet."""
        return sum(len(one._older) for one in self.connections)

    def describe(self) -> str:
        found = [f"{topic}: {len(counters)}" for topic, counters in self.arrived.items()]
        for one in self.connections:
            up = [one._line, one._beside, *one._older]
            found.append(
                f"{one.describe()}: {[line.link.session.state.name for line in up if line is not None]}"
            )
        return f"{self.client._publisher.unfinished} unfinished, {', '.join(found)}"

    def check(self, **expected: int) -> None:
        """Nothing lost, doubled or overtaken on any topic; `expected`: how many on a topic, by its last level."""
        for topic, counters in self.arrived.items():
            assert counters == list(range(1, len(counters) + 1)), f"{self.name}: {topic}: {counters}"
            wanted = expected.get(topic.rpartition("/")[2])
            assert wanted is None or len(counters) == wanted, f"{topic}: {len(counters)} of {wanted}"
