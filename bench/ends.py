"""The two ends of the relay benches: publisher, devices and subscriber, each a process of its own.

    python -m bench.ends subscribe|publish|devices|ping '{"url": …, "identity": …, "size": …, …}'

They use the `stp` library as any program would. A message carries who sent it, its number and bytes that follow
from the number, so that the subscriber sees loss, doubling, disorder and damage of every single one. They say
`READY` on stdout, begin when a line comes on stdin, and say what they found as one JSON object.
"""

from __future__ import annotations

import json
import os
import random
import struct
import sys
import time
from collections.abc import Callable
from typing import Any, Final

import trio
from attrs import asdict, define

import stp
from stp.batch import node_id
from stp.carriers.udp import UdpCarrier
from stp.control import Hello
from stp.core.endpoint import Endpoint, EndpointConfig
from stp.core.errors import ErrorCode
from stp.core.session import Session
from stp.identity import ContextCache, Identity, TimeFloor, parse_url
from stp.link import HelloReceived, Link, LinkClosed, ReceiptReceived, RefusedReceived, Writable
from stp.publisher import Publisher
from stp.records import Lane

HEAD: Final = struct.Struct("!IIQ")
"""Sender, number, nanoseconds of the monotonic clock at which it was published (0: nobody asks)."""
MIN_SIZE: Final = HEAD.size
SILENCE: Final = 30.0
"""Seconds without any message after which the subscriber stops waiting for the rest."""
CONNECTS_AT_ONCE: Final = 32


@define
class Plan:
    """What one run is to do; the same for both ends."""

    url: str
    identity: str
    size: int
    """Bytes of payload."""
    count: int
    """Messages in all."""
    batch: int = 512
    """Messages that the publisher hands over at once; 0: one by one, and the library batches."""
    topics: int = 1
    devices: int = 1
    in_flight: int = 16
    """Batches of a device that may be unanswered."""
    rate: int = 0
    """Messages a second; 0: as fast as they go."""

    @property
    def each(self) -> int:
        """Messages of each sender."""
        return self.count // self.devices


class Fillings:
    """The bytes after the head: 256 different ones, by the message's number."""

    def __init__(self, size: int) -> None:
        noise = random.Random(size)
        self._fillings = [noise.randbytes(size - HEAD.size) for _ in range(256)]

    def payload(self, sender: int, number: int, at_ns: int = 0) -> bytes:
        return HEAD.pack(sender, number, at_ns) + self._fillings[number & 255]

    def good(self, payload: bytes, number: int) -> bool:
        return payload[HEAD.size :] == self._fillings[number & 255]


@define
class Found:
    """What the subscriber saw."""

    received: int = 0
    lost: int = 0
    duplicated: int = 0
    reordered: int = 0
    corrupt: int = 0
    last: float = 0.0
    """Monotonic seconds of the last message."""
    cpu: float = 0.0


class Checker:
    """Counts what arrives. Promise: each number of each sender once, in order, as it was sent."""

    def __init__(self, plan: Plan) -> None:
        self.found = Found()
        self._fillings = Fillings(plan.size)
        self._each = plan.each
        self._next = [0] * plan.devices
        self._late: list[set[int]] = [set() for _ in range(plan.devices)]

    def take(self, payload: bytes) -> int:
        """One message; the time in it."""
        found = self.found
        found.received += 1
        if len(payload) < HEAD.size:
            found.corrupt += 1
            return 0
        sender, number, at_ns = HEAD.unpack_from(payload)
        if sender >= len(self._next) or not self._fillings.good(payload, number):
            found.corrupt += 1
        elif number == self._next[sender]:
            self._next[sender] = number + 1
        elif number > self._next[sender]:
            self._late[sender].update(range(self._next[sender], number))  # lost, unless they come yet
            self._next[sender] = number + 1
        elif number in self._late[sender]:
            self._late[sender].remove(number)
            found.reordered += 1
        else:
            found.duplicated += 1
        return int(at_ns)

    def finish(self) -> Found:
        behind = sum(self._each - number for number in self._next)
        self.found.lost = behind + sum(map(len, self._late))
        return self.found

    @property
    def complete(self) -> bool:
        return self.found.received >= self._each * len(self._next)


def say(**fields: Any) -> None:
    print(json.dumps(fields), flush=True)


async def go() -> None:
    """Tell the bench that we are ready, and wait for its word."""
    print("READY", flush=True)
    await trio.to_thread.run_sync(sys.stdin.readline)


def topic_of(sender: int, number: int, topics: int) -> str:
    return f"plant/line{sender}/sensor{number % topics}/temperature"


async def subscribe(plan: Plan) -> None:
    """A durable subscriber at the hub, which takes whatever comes."""
    checker, delays, clock = Checker(plan), [], time.monotonic_ns
    async with stp.connect(plan.url, identity=plan.identity) as session:
        subscription = session.subscribe("plant/#", durable="bench", start="earliest")
        await subscription.confirmed.wait()
        await go()
        with trio.move_on_after(SILENCE) as silence:
            async for message in subscription:
                at_ns = checker.take(message.payload)
                if at_ns:
                    delays.append(clock() - at_ns)
                if checker.found.received & 255 == 0 or checker.complete:
                    silence.deadline = trio.current_time() + SILENCE
                    if checker.complete:
                        break
        checker.found.last = time.monotonic()
        with trio.move_on_after(0.3):  # whatever is doubled comes now
            async for message in subscription:
                checker.take(message.payload)
        await subscription.aclose()
    found = checker.finish()
    found.cpu = sum(os.times()[:2])
    delays.sort()
    say(**asdict(found), p50_ms=percentile(delays, 0.5), p99_ms=percentile(delays, 0.99))


def percentile(ascending: list[int], part: float) -> float | None:
    """Of nanoseconds, in ms."""
    return round(ascending[int(part * (len(ascending) - 1))] / 1e6, 3) if ascending else None


async def publish(plan: Plan) -> None:
    """One publisher; ends when everything is kept at the gateway."""
    fillings = Fillings(plan.size)
    names = [topic_of(0, n, plan.topics) for n in range(plan.topics)]
    async with stp.connect(plan.url, identity=plan.identity, close_timeout=60.0) as session:
        await go()
        began, before = time.monotonic(), sum(os.times()[:2])
        if plan.rate:
            await publish_steadily(session, plan, fillings)
        for start in range(0, 0 if plan.rate else plan.count, plan.batch or 1):
            numbers = range(start, min(start + (plan.batch or 1), plan.count))
            payloads = [fillings.payload(0, number) for number in numbers]
            topics = [names[number % plan.topics] for number in numbers]
            if plan.batch:
                await session.publish_batch(topics, payloads)
            else:
                await session.publish(topics[0], payloads[0])
        published = time.monotonic()
        await session.drain(60.0)
        say(began=began, published=published, kept=time.monotonic(), cpu=sum(os.times()[:2]) - before)


async def publish_steadily(session: stp.Client, plan: Plan, fillings: Fillings) -> None:
    """`rate` messages a second, one by one, each with the time at which it was due to be published."""
    topic, began = topic_of(0, 0, 1), trio.current_time()
    for number in range(plan.count):
        await trio.sleep_until(began + number / plan.rate)
        await session.publish(topic, fillings.payload(0, number, time.monotonic_ns()))


class Device:
    """One of many devices: a session, a source and a publisher of its own."""

    def __init__(self, sender: int, plan: Plan, fillings: Fillings, identity: Identity, link: Link) -> None:
        memory = plan.in_flight * (plan.batch * (plan.size + 64) + 512)
        self.link = link
        self.publisher = Publisher(
            source=link.hello.store,
            publisher=node_id(identity.domain, identity.node),
            run=link.hello.run,
            on_refused=_fail,
            memory=2 * memory,  # telemetry has half of it
        )
        self.begun = False
        self._plan, self._fillings, self._sender, self._next = plan, fillings, sender, 0
        self._topic = topic_of(sender, 0, 1)
        self._size = plan.batch * plan.size

    @property
    def done(self) -> bool:
        return self._next == self._plan.each and not self.publisher.unfinished

    def on_ready(self, now: float) -> None:
        for event in self.link.process(now):
            match event:
                case HelloReceived():
                    self.publisher.attach(self.link, now)
                case ReceiptReceived():
                    self.publisher.on_receipt(event.lane, event.kept, event.custody, event.ranges, now)
                case RefusedReceived():
                    retry = event.retry_after_ms / 1000
                    self.publisher.on_refused(event.lane, event.place, event.code, retry, event.reason, now)
                case Writable():
                    self.publisher.on_writable(event.lane, now)
                case LinkClosed() if not self.done:
                    raise RuntimeError(f"device {self._sender} lost its session: {event}")
        self.publish(now)

    def publish(self, now: float) -> None:
        """As much as may be unanswered."""
        plan, lane = self._plan, Lane.TELEMETRY
        while self.begun and self._next < plan.each and self.publisher.room(lane, self._size):
            numbers = range(self._next, min(self._next + plan.batch, plan.each))
            payloads = [self._fillings.payload(self._sender, number) for number in numbers]
            topics = [self._topic] * len(payloads)
            self.publisher.add_batch(topics, payloads, now=now, time_ms=time.time_ns() // 1_000_000)
            self._next = numbers.stop


def _fail(refused: Exception, awaited: bool) -> None:
    raise RuntimeError(f"the gateway refused: {refused}")


def _dialling_endpoint(identity: Identity) -> Endpoint:
    contexts = ContextCache(identity, TimeFloor())
    config = EndpointConfig(
        tls=contexts.tls,
        leaf_der=contexts.leaf_der,
        network_keys=identity.network_keys,
        random_bytes=os.urandom,
    )
    return Endpoint(config)


async def devices(plan: Plan) -> None:
    """Many devices with a session each; every batch holds `batch` messages, most often one.

    They share a socket, as behind one NAT: a thousand event loops in one process would measure themselves.
    """
    fillings, identity = Fillings(plan.size), Identity.load(plan.identity)
    target = parse_url(plan.url, None)
    fleet: list[Device] = []
    changed = trio.Event()

    def on_ready(session: Session) -> None:
        session.app.on_ready(trio.current_time())
        changed.set()

    endpoint = _dialling_endpoint(identity)
    carrier = await UdpCarrier.bind(endpoint, "127.0.0.1", 0, on_ready=on_ready)

    async def wait_for(condition: Callable[[], bool]) -> None:
        nonlocal changed
        while not condition():
            changed = trio.Event()
            with trio.move_on_after(0.05):  # time for lingering batches and pauses after refusals
                await changed.wait()
            for device in fleet:
                device.publisher.handle_timeout(trio.current_time())
            carrier.wake()
            await trio.sleep(0.02)

    async with trio.open_nursery() as nursery:
        await nursery.start(carrier.run)
        for sender in range(plan.devices):
            now = trio.current_time()
            session = endpoint.connect((target.host, target.port), expected_node=target.node, now=now)
            hello = Hello(
                identity.domain, identity.node, os.urandom(16), sender, os.urandom(16), f"device-{sender}"
            )
            device = Device(sender, plan, fillings, identity, Link(session, hello, wall_ms=lambda: 0))
            session.app = device
            fleet.append(device)
            carrier.wake()
            if sender % CONNECTS_AT_ONCE == 0:
                await wait_for(lambda: all(one.link.peer is not None for one in fleet))
        await wait_for(lambda: all(one.link.peer is not None for one in fleet))
        await go()
        began, before = time.monotonic(), sum(os.times()[:2])
        for device in fleet:
            device.begun = True
            device.publish(trio.current_time())
            carrier.wake()
        await wait_for(lambda: all(one.done for one in fleet))
        kept = time.monotonic()
        say(began=began, published=kept, kept=kept, cpu=sum(os.times()[:2]) - before)
        for device in fleet:
            device.link.close(ErrorCode.NO_ERROR, "", trio.current_time())
        await carrier.aclose()
        nursery.cancel_scope.cancel()


ROLES: Final = {"subscribe": subscribe, "publish": publish, "devices": devices}


def main() -> None:
    role, plan = sys.argv[1], Plan(**json.loads(sys.argv[2]))
    trio.run(ROLES[role], plan)


if __name__ == "__main__":
    main()
