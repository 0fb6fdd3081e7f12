"""A hub, gateways, publishers and readers on a simulated network: real links, real relay, real stores.

    async with World(tmp_path, seed=3, loss=0.05) as world:
        hub = await world.hub()
        edge = await world.gateway("edge-1", hub)
        sensor = world.publisher("sensor-1", edge)
        reader = world.reader("reader-1", hub, ["#"], durable="r")
        sensor.publish(100)
        await world.run(lambda: len(reader.messages) == 100, limit=30)
        world.check()

Network and trio share one clock: trio's MockClock is moved by hand (no autojump), the stores' writer threads are
waited for between two steps, so they take no simulated time. `crash` makes a keeper forget all but its store.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import trio
import trio.testing

from stp.batch import encode_batch, node_id, open_batch
from stp.control import Hello, Subscribe
from stp.core.session import Session
from stp.identity import Address
from stp.link import (
    HelloReceived,
    Link,
    LinkClosed,
    ReceiptReceived,
    RecordReceived,
    RefusedReceived,
    SubscribedReceived,
    Writable,
)
from stp.records import RefusedCode, batches_of, encode_record, encode_void
from stpd.access import Access
from stpd.events import EventBus
from stpd.limits import PeerLimit
from stpd.relay import Relay
from stpd.router import Classes
from stpd.schema import BUILT_IN_CLASSES, AccessRule, ClassConfig
from stpd.sessions import Sessions
from stpd.store.sqlite import SqliteStore
from stpd.uplink import Target, Uplink
from tests.identity_kit import DOMAIN
from tests.sim import Host, Network

STEP = 0.005
"""Simulated seconds between two looks at tasks and stores."""

OPEN = (AccessRule(name="all", publish=("#", "$inbox/#"), subscribe=("#", "$inbox/#", "cmd/#")),)

PAYLOAD = struct.Struct("!Q")


class World:
    """One network, its keepers and its clients."""

    def __init__(self, path: Path, *, seed: int, **conditions: Any) -> None:
        self.path = path
        self.net = Network(seed, **conditions)
        self.net.keep_log = False
        self.clock = trio.testing.MockClock()
        self.keepers: list[Keeper] = []
        self.clients: list[Client] = []
        self.libraries: list[Any] = []
        """Clients that are the library's own (tests/daemon/library.py)."""

    async def hub(self, name: str = "hub-1", **options: Any) -> Keeper:
        return await self._keeper(name, "hub", None, options)

    async def gateway(self, name: str, upstream: Keeper, **options: Any) -> Keeper:
        return await self._keeper(name, "gateway", upstream, options)

    async def _keeper(self, name: str, kind: str, upstream: Keeper | None, options: dict[str, Any]) -> Keeper:
        keeper = Keeper(self, name, kind, upstream, **options)
        self.keepers.append(keeper)
        await keeper.start()
        return keeper

    def publisher(self, name: str, keeper: Keeper, **options: Any) -> Publisher:
        client = Publisher(self, name, keeper, **options)
        self.clients.append(client)
        return client

    def reader(self, name: str, keeper: Keeper, filters: list[str], **options: Any) -> Reader:
        client = Reader(self, name, keeper, filters, **options)
        self.clients.append(client)
        return client

    async def run(self, until: Callable[[], bool], *, limit: float) -> float:
        """Simulated seconds until the condition held; AssertionError after `limit` of them."""
        start = self.net.now
        while not until():
            if self.net.now - start > limit:
                raise AssertionError(f"not within {limit} simulated seconds: {self.describe()}")
            await self.step()
        return self.net.now - start

    async def run_for(self, seconds: float) -> None:
        end = self.net.now + seconds
        while self.net.now < end:
            await self.step()

    async def step(self) -> None:
        self.net.run_for(STEP)
        current = trio.lowlevel.current_clock()
        assert isinstance(current, trio.testing.MockClock)
        current.jump(STEP)
        for keeper in self.keepers:
            await keeper.store.flush()
            keeper.tick()
        for client in self.clients:
            client.tick()
        await trio.testing.wait_all_tasks_blocked(0.0)

    def check(self) -> None:
        """The ledger balances everywhere, and every reader has each publisher's messages once and in order."""
        for keeper in self.keepers:
            ledger = keeper.store.ledger()
            assert ledger.unexplained == 0, ledger.explain()
        for client in self.clients:
            if isinstance(client, Reader):
                client.check()

    def describe(self) -> str:
        return "; ".join(
            [f"{one.name}: {[one.store.behind(hop, 3) for hop in one.store.hops]}" for one in self.keepers]
            + [f"{one.name}: {one.describe()}" for one in (*self.clients, *self.libraries)]
        )

    async def __aenter__(self) -> World:
        current = trio.lowlevel.current_clock()
        assert isinstance(current, trio.testing.MockClock)
        current.jump(self.net.now - trio.current_time())
        self._nursery_manager = trio.open_nursery()
        self.nursery = await self._nursery_manager.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.nursery.cancel_scope.cancel()
        await self._nursery_manager.__aexit__(kind, value, trace)
        for keeper in self.keepers:
            await keeper.store.aclose()


class Keeper:
    """Relay, sessions and store of one node, over a simulated host."""

    def __init__(
        self,
        world: World,
        name: str,
        kind: str,
        upstream: Keeper | None,
        *,
        access: tuple[AccessRule, ...] = OPEN,
        classes: tuple[ClassConfig, ...] = BUILT_IN_CLASSES,
        subscribe: tuple[str, ...] = ("cmd/#",),
        budget: int = 64 << 20,
        cache: int = 8 << 20,
        retention: float = 0.0,
        limit: PeerLimit | None = None,
    ) -> None:
        self.limit = limit
        self.world, self.name, self.kind, self.upstream = world, name, kind, upstream
        self.options = {"budget_bytes": budget, "cache_bytes": cache, "retention_s": retention}
        self.access, self.classes, self.subscribe = Access(access), Classes(classes), subscribe
        self.runs = 0
        self.refused: list[tuple[str, RefusedCode, str]] = []
        self.uplink: Uplink | None = None

    async def start(self) -> None:
        self.store = await SqliteStore.open(
            self.world.path / self.name, node_id=node_id(DOMAIN, self.name), **self.options
        )
        self._build()

    def _build(self) -> None:
        self.runs += 1
        net = self.world.net
        self.host: Host = net.host(self.name, accept=True, addr=self._address())
        self.scope = trio.CancelScope()
        self.memory_source = self.world.net.rng.randbytes(16)
        self.relay = Relay(
            self.store,
            self.classes,
            node_id=node_id(DOMAIN, self.name),
            memory_source=self.memory_source,
            on_refused=lambda *what: self.refused.append(what),
        )
        self.sessions = Sessions(
            self.relay,
            self.store,
            domain=DOMAIN,
            access=lambda: self.access,
            hello=self._hello,
            name_of_source=self._name_of,
            events=EventBus(self._wall_ms),
            spawn=self.world.nursery.start_soon,
            later=self._later,
            wall_ms=self._wall_ms,
            now=lambda: net.now,
            max_subscriptions=16,
            ttl_of=lambda lane, prefix: self.classes.of(lane, prefix).ttl,
            limit_of=lambda node: self.limit,
        )
        self.host.on_ready = self.sessions.on_ready
        if self.upstream is not None:
            self._start_uplink(self.upstream)

    def _start_uplink(self, upstream: Keeper) -> None:
        target = Target(Address(upstream.name, *upstream.host.addr), "stp://sim", frozenset(), self.subscribe)
        self.uplink = Uplink(
            [target],
            self.sessions,
            self.store,
            dial=lambda address, node, token: self.host.connect(upstream.host, token=token),
            class_of=lambda lane, prefix: self.classes.of(lane, prefix).name,
            on_custody=self.relay.on_custody,
            on_time_heard=lambda seconds: None,
            events=EventBus(self._wall_ms),
            wall_ms=self._wall_ms,
            jitter=lambda: 0.5,
        )
        self.relay.custody_route = self.uplink.takes_class
        self.world.nursery.start_soon(self._run_uplink, self.uplink, self.scope)

    @staticmethod
    async def _run_uplink(uplink: Uplink, scope: trio.CancelScope) -> None:
        with scope:
            await uplink.run()

    def crash(self) -> None:
        """Forget sessions, feeds and timers, as a killed process does; the store stays as it was committed."""
        self.scope.cancel()
        self.store.on_commit = None
        del self.world.net.hosts[self.host.addr]
        self._build()

    def _address(self) -> tuple[str, int]:
        return f"10.0.0.{self.world.keepers.index(self) + 1}", 9000

    def _later(self, delay: float, function: Callable[[], None]) -> None:
        async def wait() -> None:
            await trio.sleep(delay)
            function()

        self.world.nursery.start_soon(wait)

    def _wall_ms(self) -> int:
        return round(self.world.net.now * 1000) + 1_790_000_000_000

    def _hello(self) -> Hello:
        return Hello(
            domain=DOMAIN,
            node=self.name,
            store=self.store.store_id,
            run=self.runs,
            nonce=bytes(16),
            kind=self.kind,
            classes=self.classes.announced(),
        )

    def _name_of(self, source: bytes) -> str | None:
        if source in (self.store.store_id, self.memory_source):
            return self.name
        return self.store.node_of_source(source)

    def tick(self) -> None:
        self.sessions.check()


class Client:
    """A node with a link to one keeper, dialled again a moment after it was lost."""

    def __init__(self, world: World, name: str, keeper: Keeper) -> None:
        self.world, self.name, self.keeper = world, name, keeper
        self.source = world.net.rng.randbytes(16)
        self.host = world.net.dialler(name, addr=(f"10.1.{len(world.clients)}.1", 5000))
        self.host.on_ready = self._on_ready
        self.link: Link | None = None
        self.dial_at = 0.0
        self.sessions = 0

    def tick(self) -> None:
        now = self.world.net.now
        if self.link is None and now >= self.dial_at:
            session = self.host.connect(self.keeper.host)
            self.link = Link(
                session,
                Hello(DOMAIN, self.name, self.source, 1, bytes(16), "client"),
                wall_ms=lambda: 0,
                may_speak_for=lambda node: True,
            )
            self.sessions += 1
        elif self.link is not None:
            self._take(self.link.check(now))

    def _on_ready(self, session: Session) -> None:
        if self.link is not None and self.link.session is session:
            self._take(self.link.process(self.world.net.now))

    def _take(self, events: list[Any]) -> None:
        for event in events:
            if isinstance(event, LinkClosed):
                self.link = None
                self.dial_at = self.world.net.now + 0.2
                self.on_lost()
            else:
                self.on_event(event)

    def on_event(self, event: Any) -> None:
        raise NotImplementedError

    def on_lost(self) -> None:
        """The session is over."""

    def describe(self) -> str:
        return ""


class Publisher(Client):
    """Publishes numbered messages, one record each, and keeps what is not acknowledged (protocol §10)."""

    def __init__(self, world: World, name: str, keeper: Keeper, *, topic: str = "", lane: int = 3) -> None:
        super().__init__(world, name, keeper)
        self.topic = topic or f"site/{name}/t"
        self.lane = lane
        self.published = 0
        self.unacked: dict[int, bytes] = {}
        """Number -> record, ascending."""
        self.places: dict[int, int] = {}
        self.kept: list[int] = []
        self.custody_upto = 0
        self.refusals: list[RefusedReceived] = []
        self.resume_at = 0.0

    def publish(self, count: int, *, size: int = 20, per_record: int = 1) -> None:
        for _ in range(count):
            payloads = []
            for _ in range(per_record):
                self.published += 1
                payloads.append(PAYLOAD.pack(self.published).ljust(size, b"."))
            number = len(self.kept) + len(self.unacked) + 1
            batch = encode_batch(
                [self.topic] * per_record,
                payloads,
                time_ms=1,
                publisher=node_id(DOMAIN, self.name),
                run=1,
                sequence=number,
            )
            self.unacked[number] = encode_record(self.lane, self.source, number, [batch])
        self.send()

    def send(self) -> None:
        link = self.link
        if link is None or not link.connected or self.world.net.now < self.resume_at:
            return
        on_wire = set(self.places.values())
        for number, record in self.unacked.items():
            if number not in on_wire:
                if link.lane_room(self.lane) <= 0:
                    return
                self.places[link.send_record(self.lane, record)] = number

    def tick(self) -> None:
        super().tick()
        self.send()

    def on_lost(self) -> None:
        self.places.clear()
        self.custody_upto = 0

    def on_event(self, event: Any) -> None:
        match event:
            case HelloReceived() | Writable():
                self.send()
            case ReceiptReceived(kept=kept, custody=custody):
                self.custody_upto = max(self.custody_upto, custody)
                for place in [place for place in self.places if place < kept]:
                    number = self.places.pop(place)
                    if self.unacked.pop(number, None) is not None:
                        self.kept.append(number)
            case RefusedReceived():
                self._on_refused(event)

    def _on_refused(self, event: RefusedReceived) -> None:
        """Go back to the refused number; a void for it where waiting does not help."""
        number = self.places.get(event.place)
        if number is None:
            return
        self.refusals.append(event)
        for place in [place for place, one in self.places.items() if one >= number]:
            del self.places[place]
        if event.code in (RefusedCode.DENIED, RefusedCode.CORRUPT, RefusedCode.TOO_LARGE, RefusedCode.LOOP):
            self.unacked[number] = encode_void(self.lane, self.source, number, number, 4, 1)
        self.resume_at = self.world.net.now + event.retry_after_ms / 1000

    def describe(self) -> str:
        return f"published {self.published}, unacknowledged {len(self.unacked)}"


class Reader(Client):
    """Reads everything its filters match, and settles each record at once unless told to hold."""

    def __init__(
        self,
        world: World,
        name: str,
        keeper: Keeper,
        filters: list[str],
        *,
        durable: str | None = None,
        start: str = "earliest",
    ) -> None:
        super().__init__(world, name, keeper)
        self.filters, self.durable, self.start = tuple(filters), durable, start
        self.messages: list[tuple[bytes, str, int]] = []
        """(publisher, topic, counter) in order of arrival."""
        self.seen: set[tuple[bytes, int, int]] = set()
        self.repeats = 0
        self.hold = False
        self.subscribed = False
        self.error: str | None = None

    def on_lost(self) -> None:
        self.subscribed = False

    def on_event(self, event: Any) -> None:
        assert self.link is not None
        match event:
            case HelloReceived():
                self.link.send(Subscribe("s", self.filters, self.durable, self.start))
            case SubscribedReceived(subscribed=answer):
                self.subscribed, self.error = answer.ok, answer.error
            case RecordReceived():
                self._take_record(event)

    def _take_record(self, event: RecordReceived) -> None:
        assert self.link is not None
        if self.hold:
            return
        key = (event.head.source, event.lane, event.head.number)
        if event.head.kind != 1:
            if key in self.seen:
                self.repeats += 1
            else:
                self.seen.add(key)
                for batch in batches_of(event.record, event.head):
                    opened = open_batch(batch)
                    for topic, payload in zip(opened.topics, opened.payloads, strict=True):
                        self.messages.append((opened.head.publisher, topic, PAYLOAD.unpack_from(payload)[0]))
        self.link.settle(event.lane, event.place, custody=True)
        self.link.flush()

    def check(self) -> None:
        """No counter twice, none missing below the highest, order kept: per (publisher, topic)."""
        last: dict[tuple[bytes, str], int] = {}
        for publisher, topic, counter in self.messages:
            before = last.get((publisher, topic), 0)
            assert counter == before + 1, f"{self.name}: {topic} {counter} after {before}"
            last[(publisher, topic)] = counter

    def describe(self) -> str:
        return f"{len(self.messages)} messages, {self.repeats} repeats"
