"""The fault matrix's rows about messages, at the level of a link: real sessions on a seeded network."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest

from stp.batch import encode_batch, node_id, open_batch
from stp.control import Hello
from stp.core.errors import ErrorCode
from stp.core.flow import STREAM_WINDOW
from stp.core.session import Session
from stp.link import (
    Link,
    LinkClosed,
    LinkEvent,
    ReceiptReceived,
    RecordReceived,
    RecordRejected,
    RefusedReceived,
    SourceIntroduced,
    Writable,
)
from stp.outbox import Refused
from stp.publisher import Publisher
from stp.records import MAX_RECORD, VOID, RefusedCode, batches_of, encode_record, read_record
from tests.identity_kit import DOMAIN
from tests.sim import Host, Network

TELEMETRY = 3
DEVICE, GATEWAY, STRANGER = b"d" * 16, b"g" * 16, b"s" * 16
SEEDS = range(4)
ROUGH = {"delay": 0.01, "jitter": 0.02, "loss": 0.05, "duplicate": 0.05}


def record(source: bytes, number: int, payload: bytes = b"21.5") -> bytes:
    batch = encode_batch(
        ["plant/temp"],
        [payload],
        time_ms=1_700_000_000_000,
        publisher=node_id(DOMAIN, "edge-1"),
        run=1,
        sequence=number,
    )
    return encode_record(TELEMETRY, source, number, [batch])


class Side:
    """A host whose session carries a link. `on_event` answers; `events` keeps what came."""

    def __init__(self, host: Host, source: bytes, **options: Any) -> None:
        self.host = host
        self.source = source
        self.options = options
        self.events: list[LinkEvent] = []
        self.on_event: Callable[[LinkEvent], None] = lambda event: None
        self.link: Link | None = None
        host.on_ready = self.ready

    def ready(self, session: Session) -> None:
        if self.link is None or self.link.session is not session:
            hello = Hello(DOMAIN, self.host.node, self.source, 1, bytes(16), "test")
            self.link = Link(session, hello, wall_ms=lambda: 0, **self.options)
        for event in self.link.process(self.host.net.now):
            self.events.append(event)
            self.on_event(event)
        self.link.flush()

    def of(self, kind: type) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]


class Two:
    """A device and a gateway, past HELLO."""

    def __init__(self, seed: int, conditions: dict[str, Any] | None = None, **gateway: Any) -> None:
        self.net = Network(seed, **(conditions or {}))
        self.device = Side(self.net.dialler("edge-1"), DEVICE, name_of_source={STRANGER: "sensor"}.get)
        self.gateway = Side(self.net.listener("hub-1"), GATEWAY, **gateway)
        self.device.ready(self.device.host.connect(self.gateway.host))
        self.net.run(lambda: self.up(self.device) and self.up(self.gateway))

    @staticmethod
    def up(side: Side) -> bool:
        return side.link is not None and side.link.peer is not None

    def send(self, data: bytes) -> int:
        assert self.device.link is not None
        return self.device.link.send_record(TELEMETRY, data)

    def run_with_checks(self, until: Callable[[], bool], *, limit: float) -> None:
        """As `net.run`, and both links look at their deadlines every half second."""
        end = self.net.now + limit
        while not until():
            assert self.net.now < end, f"not within {limit} simulated seconds"
            self.net.run_for(0.5)
            for side in (self.device, self.gateway):
                if side.link is not None:
                    side.events += side.link.check(self.net.now)


class Memory:
    """What a keeper remembers of its sources: the CRC of every number, and the order in which they came."""

    def __init__(self, side: Side) -> None:
        self.side = side
        self.crcs: dict[tuple[bytes, int], int] = {}
        self.order: list[int] = []
        side.on_event = self.on_event

    def on_event(self, event: LinkEvent) -> None:
        link = self.side.link
        if not isinstance(event, RecordReceived) or link is None or not link.admit(event):
            return
        head = event.head
        known = self.crcs.setdefault((head.source, head.number), head.crc)
        if known != head.crc:
            link.refuse(event.lane, event.place, RefusedCode.CONFLICT, 0, "known with other bytes")
            return
        self.order.append(head.number)
        link.settle(event.lane, event.place, custody=True)


@pytest.mark.parametrize("seed", SEEDS)
def test_fault_54_a_repeat_with_other_bytes_is_refused_and_never_receipted(seed: int) -> None:
    two = Two(seed, ROUGH)
    memory = Memory(two.gateway)
    rng = random.Random(seed)
    conflicting = set()
    for number in range(1, 41):
        two.send(record(DEVICE, number))
        if rng.random() < 0.2:
            conflicting.add(two.send(record(DEVICE, number, b"other")))
            two.send(record(DEVICE, number))  # the sender mends it, so that later ones may pass
    sent = 40 + 2 * len(conflicting)
    two.net.run(lambda: any(one.kept == sent for one in two.device.of(ReceiptReceived)))
    refused = two.device.of(RefusedReceived)
    assert {one.place for one in refused} == conflicting
    assert {one.code for one in refused} == {RefusedCode.CONFLICT}
    for event in two.device.of(ReceiptReceived):  # (3) of stp.link: REFUSED stands before what counts it
        before = two.device.events[: two.device.events.index(event)]
        known = {one.place for one in before if isinstance(one, RefusedReceived)}
        assert {place for place in conflicting if place < event.kept} <= known
    assert sorted(set(memory.order)) == list(range(1, 41))


@pytest.mark.parametrize("seed", SEEDS)
def test_fault_55_speaking_for_another_source_is_refused_and_nothing_remembered(seed: int) -> None:
    """R-10-27."""
    two = Two(seed, ROUGH)
    memory = Memory(two.gateway)
    places = [two.send(record(STRANGER, number)) for number in (7, 8, 9)]
    two.send(record(DEVICE, 1))
    two.net.run(lambda: any(one.kept == 4 for one in two.device.of(ReceiptReceived)))
    assert [(one.place, one.code) for one in two.device.of(RefusedReceived)] == [
        (place, RefusedCode.SOURCE) for place in places
    ]
    assert [one.head.number for one in two.gateway.of(RecordRejected)] == [7, 8, 9]  # for audit and ledger
    assert STRANGER not in {one.source for one in two.gateway.of(SourceIntroduced)}
    assert two.gateway.link is not None
    assert two.gateway.link.node_of(STRANGER) is None
    assert memory.order == [1]


def test_fault_55_who_never_says_whose_a_source_is_waits_3_seconds_and_is_refused() -> None:
    two = Two(1, may_speak_for=lambda node: True)
    memory = Memory(two.gateway)
    assert two.device.link is not None
    two.device.link._introduced_to_peer.add(STRANGER)  # a device that leaves INTRODUCE out
    began = two.net.now
    two.send(record(STRANGER, 1))
    two.run_with_checks(lambda: bool(two.gateway.of(RecordRejected)), limit=10.0)
    assert 3.0 <= two.net.now - began <= 4.0
    assert memory.order == []


@pytest.mark.parametrize("seed", SEEDS)
def test_fault_62_the_largest_record_passes_a_smaller_window(seed: int) -> None:
    two = Two(seed, {"delay": 0.01, "loss": 0.02})
    Memory(two.gateway)
    large = record(DEVICE, 1, random.Random(seed).randbytes(1024 * 1024))
    assert STREAM_WINDOW < len(large) <= MAX_RECORD
    two.send(large)
    two.send(record(DEVICE, 2))
    two.net.run(lambda: any(one.kept == 2 for one in two.device.of(ReceiptReceived)), limit=60.0)
    assert two.gateway.of(RecordReceived)[0].record == large


def test_fault_62_a_record_that_is_never_finished_ends_the_session() -> None:
    """R-7-4."""
    two = Two(1)
    memory = Memory(two.gateway)
    two.send(record(DEVICE, 1))
    assert two.device.link is not None
    session = two.device.link.session
    session.write(two.device.link._out[TELEMETRY].stream, record(DEVICE, 2, bytes(5000))[:2000])
    began = two.net.now
    two.net.run(lambda: memory.order == [1])
    two.run_with_checks(lambda: bool(two.gateway.of(LinkClosed)), limit=40.0)
    (closed,) = two.gateway.of(LinkClosed)
    assert closed.code is ErrorCode.LIMIT
    assert 30.0 <= two.net.now - began <= 31.5
    two.net.run(lambda: bool(two.device.of(LinkClosed)))
    assert two.device.of(LinkClosed)[0].code is ErrorCode.LIMIT


def test_fault_62_a_peer_without_credit_is_not_blamed() -> None:
    """The owner takes nothing: the record in the middle cannot be finished, for as long as that lasts."""
    two = Two(1)
    for number in range(1, 20):
        two.send(record(DEVICE, number, bytes(60_000)))
    two.net.run_for(1.0)
    for _ in range(60):
        two.net.run_for(1.0)
        assert two.gateway.link is not None
        assert two.gateway.link.check(two.net.now) == []
    for event in two.gateway.of(RecordReceived):
        two.gateway.link.settle(event.lane, event.place, custody=True)
    Memory(two.gateway)
    two.gateway.link.flush()
    two.net.run(lambda: len(two.gateway.of(RecordReceived)) == 19)


class Moody:
    """A keeper that is full now and then, and takes a while to decide."""

    def __init__(self, side: Side, seed: int) -> None:
        self.side = side
        self.rng = random.Random(f"moody {seed}")
        self.highest = 0
        self.payloads: list[bytes] = []
        self.waiting: list[RecordReceived] = []
        side.on_event = self.on_event

    def on_event(self, event: LinkEvent) -> None:
        if isinstance(event, RecordReceived):
            self.waiting.append(event)

    def decide(self) -> None:
        link = self.side.link
        assert link is not None
        for _ in range(self.rng.randint(0, 8)):
            if not self.waiting:
                break
            event = self.waiting.pop(0)
            if not link.admit(event):
                continue
            head = event.head
            if head.to <= self.highest:
                link.settle(event.lane, event.place, custody=True)
            elif self.rng.random() < 0.15:
                link.refuse(event.lane, event.place, RefusedCode.FULL, 20, "store full")
            else:
                assert head.number == self.highest + 1, "order is lost"
                self.highest = head.to
                link.settle(event.lane, event.place, custody=True)
                self.payloads.append(event.record)
        link.flush()


@pytest.mark.parametrize("seed", range(8))
def test_fault_64_refused_in_the_middle_of_a_stream_then_room(seed: int) -> None:
    """R-10-38."""
    two = Two(seed, ROUGH)
    keeper = Moody(two.gateway, seed)
    refused: list[Refused] = []

    def on_refused(one: Refused, awaited: bool) -> None:
        refused.append(one)

    publisher = Publisher(source=DEVICE, publisher=node_id(DOMAIN, "edge-1"), run=1, on_refused=on_refused)
    net, link = two.net, two.device.link
    assert link is not None
    publisher.attach(link, net.now)

    def on_event(event: LinkEvent) -> None:
        match event:
            case ReceiptReceived(lane, kept, custody, ranges):
                publisher.on_receipt(lane, kept, custody, ranges, net.now)
            case RefusedReceived(lane, place, code, retry_ms, reason):
                publisher.on_refused(lane, place, code, retry_ms / 1000, reason, net.now)
            case Writable(lane):
                publisher.on_writable(lane, net.now)
            case _:
                pass

    two.device.on_event = on_event
    rng = random.Random(seed)
    for number in range(200):
        publisher.add("plant/temp", b"%d" % number, now=net.now, time_ms=number)
        if rng.random() < 0.3:
            net.run_for(0.005)
            keeper.decide()
            publisher.handle_timeout(net.now)
    for _ in range(4000):
        net.run_for(0.01)
        keeper.decide()
        publisher.handle_timeout(net.now)
        if not publisher.unfinished:
            break
    assert publisher.unfinished == 0
    assert refused == []
    assert two.device.of(RefusedReceived), "the keeper was never full: the test shows nothing"
    assert order_of(keeper.payloads) == list(range(200))


def order_of(records: list[bytes]) -> list[int]:

    found = []
    for one in records:
        head = read_record(one)
        assert head.kind != VOID
        found += [int(p) for batch in batches_of(one, head) for p in open_batch(batch).payloads]
    return found
