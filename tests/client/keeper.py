"""The least of a keeper: a log in memory behind real sessions on loopback. Enough to test a client against.

It deduplicates publishers, numbers what it adopts, serves live and durable subscriptions, and misbehaves on request.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import trio
from attrs import Factory, define

from stp.batch import node_id, open_batch
from stp.carriers.udp import UdpCarrier
from stp.control import ClassRule, Hello, Subscribe, Subscribed
from stp.core.endpoint import Endpoint, EndpointConfig
from stp.core.errors import ErrorCode
from stp.core.events import DatagramReceived
from stp.core.session import Session
from stp.echo import Allowance, Responder
from stp.identity import ContextCache, TimeFloor
from stp.link import (
    Link,
    LinkClosed,
    ReceiptReceived,
    RecordReceived,
    SubscribeReceived,
    UnsubscribeReceived,
)
from stp.records import VOID, RefusedCode, batches_of, forward, read_record, regroup
from stp.topics import FilterSet
from tests.identity_kit import shared

CLASSES = [
    ClassRule("command", ("$inbox/#", "cmd/#"), 1),
    ClassRule("event", ("event/#",), 2),
    ClassRule("bulk", ("bulk/#",), 4, linger_ms=20),
    ClassRule("telemetry", ("#",), 3, linger_ms=20),
]


@define
class Entry:
    """One adopted record."""

    lane: int
    record: bytes
    prefix: str


@define(eq=False)
class Peer:
    link: Link
    live: dict[str, FilterSet] = Factory(dict)
    durable: dict[str, tuple[str, FilterSet]] = Factory(dict)
    """SUBSCRIBE id → (durable name, filters)."""
    sent: dict[int, dict[int, int]] = Factory(dict)
    """lane → place → position in the log."""
    responder: Responder = Factory(lambda: Responder(1_000_000, Allowance(1_000_000)))


class Keeper:
    """A gateway of few words. `messages` is what it keeps, in the order of adoption: (topic, payload)."""

    def __init__(self, node: str = "gw-1") -> None:
        self.node = node
        self.identity = shared().identity(node)
        self.store = os.urandom(16)
        self.log: list[Entry] = []
        self.messages: list[tuple[str, bytes]] = []
        self.batches: list[int] = []
        """Messages per batch that was adopted."""
        self.peers: dict[int, Peer] = {}
        self.cursors: dict[str, int] = {}
        self.sessions = 0
        self.repeats = 0
        self.port = 0
        # what it does on request
        self.judge: Callable[[str], tuple[RefusedCode, int, str] | None] = lambda topic: None
        """Topic → why its batch is refused, or None."""
        self.silent = False
        """Answer no record."""
        self.custody = True
        """Report custody together with kept."""
        self.subscribe_error: str | None = None
        self._highest: dict[tuple[bytes, int], int] = {}
        self._numbers = {lane: itertools.count(1) for lane in (1, 2, 3, 4)}
        self._held: list[tuple[Peer, RecordReceived]] = []
        self._carrier: UdpCarrier | None = None
        self._endpoint: Endpoint | None = None
        self._contexts = ContextCache(self.identity, TimeFloor())

    @property
    def url(self) -> str:
        return f"stp://{self.node}@127.0.0.1:{self.port}"

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Keeper]:
        """Listen; again on the same port when it has run before, with its log."""
        self._endpoint = Endpoint(
            EndpointConfig(
                tls=self._contexts.tls,
                leaf_der=self.identity.leaf_der,
                network_keys=self.identity.network_keys,
                accept=True,
                random_bytes=os.urandom,
                address_rate=1000.0,
            )
        )
        self._carrier = carrier = await UdpCarrier.bind(
            self._endpoint, "127.0.0.1", self.port, on_ready=self._on_ready
        )
        self.port = carrier.local_address[1]
        async with trio.open_nursery() as nursery:
            await nursery.start(carrier.run)
            try:
                yield self
            finally:
                carrier.close()
                self.peers.clear()
                self._held.clear()
                nursery.cancel_scope.cancel()

    def close_all(self, code: ErrorCode, reason: str = "") -> None:
        for peer in list(self.peers.values()):
            peer.link.close(code, reason, trio.current_time())
        self.wake()

    def wake(self) -> None:
        assert self._carrier is not None
        self._carrier.wake()

    def answer_held(self) -> None:
        """Speak again after `silent`."""
        self.silent = False
        held, self._held = self._held, []
        for peer, event in held:
            self._on_record(peer, event)
        for peer in self.peers.values():
            peer.link.flush()
        self.wake()

    # -- the sessions

    def _on_ready(self, session: Session) -> None:
        peer = self.peers.get(id(session))
        if peer is None:
            hello = Hello(
                self.identity.domain, self.node, self.store, 1, bytes(16), "gateway", classes=CLASSES
            )
            link = Link(session, hello, wall_ms=lambda: time.time_ns() // 1_000_000)
            peer = self.peers[id(session)] = Peer(link)
            self.sessions += 1
        for event in peer.link.process(trio.current_time()):
            match event:
                case RecordReceived():
                    if self.silent:
                        self._held.append((peer, event))
                    else:
                        self._on_record(peer, event)
                case ReceiptReceived(lane=lane, custody=custody):
                    self._on_receipt(peer, lane, custody)
                case SubscribeReceived(subscribe=wanted):
                    self._on_subscribe(peer, wanted)
                case UnsubscribeReceived(id=sub_id):
                    peer.live.pop(sub_id, None)
                case DatagramReceived(data=data):
                    reply = peer.responder.answer(data, trio.current_time())
                    if reply is not None:
                        session.send_datagram(reply)
                case LinkClosed():
                    self.peers.pop(id(session), None)
                case _:
                    pass
        peer.link.flush()

    def _on_record(self, peer: Peer, event: RecordReceived) -> None:
        if not peer.link.admit(event):
            return
        head = event.head
        key = (head.source, head.lane)
        if head.to <= self._highest.get(key, 0):
            self.repeats += 1
            peer.link.settle(event.lane, event.place, custody=self.custody)
            return
        opened = [open_batch(batch) for batch in batches_of(event.record, head)]
        for topic in dict.fromkeys(topic for batch in opened for topic in batch.topics):
            refusal = self.judge(topic)
            if refusal is not None:
                code, retry_ms, reason = refusal
                peer.link.refuse(event.lane, event.place, code, retry_ms, reason)
                return
        assert head.number == self._highest.get(key, 0) + 1, "a publisher numbers without gaps"
        self._highest[key] = head.to
        peer.link.settle(event.lane, event.place, custody=self.custody)
        if head.kind == VOID:
            return
        self.batches += [len(batch.topics) for batch in opened]
        self.messages += [pair for batch in opened for pair in zip(batch.topics, batch.payloads, strict=True)]
        adopted = regroup(event.lane, self.store, next(self._numbers[event.lane]), [event.record])
        me = node_id(self.identity.domain, self.node)
        adopted = forward(adopted, read_record(adopted), me, 0)
        self.log.append(Entry(event.lane, adopted, head.prefix))
        self._distribute(len(self.log) - 1)

    def _distribute(self, position: int) -> None:
        for peer in self.peers.values():
            if any(filters.decide(self.log[position].prefix) for filters in peer.live.values()):
                self._send(peer, position)
            for name, filters in peer.durable.values():
                if self.cursors.get(name) == position:
                    self._pump(peer, name, filters)
        self.wake()

    def _send(self, peer: Peer, position: int) -> None:
        entry = self.log[position]
        place = peer.link.send_record(entry.lane, entry.record)
        peer.sent.setdefault(entry.lane, {})[place] = position

    def _pump(self, peer: Peer, name: str, filters: FilterSet) -> None:
        """Send a durable reader the next record of its log; the receipt brings the one after."""
        while self.cursors[name] < len(self.log):
            if filters.decide(self.log[self.cursors[name]].prefix):
                self._send(peer, self.cursors[name])
                return
            self.cursors[name] += 1

    def _on_receipt(self, peer: Peer, lane: int, custody: int) -> None:
        sent = peer.sent.get(lane, {})
        for place in [place for place in sent if place < custody]:
            position = sent.pop(place)
            for name, filters in peer.durable.values():
                if self.cursors[name] == position:
                    self.cursors[name] = position + 1
                    self._pump(peer, name, filters)

    def _on_subscribe(self, peer: Peer, wanted: Subscribe) -> None:
        if self.subscribe_error is not None:
            peer.link.send(Subscribed(wanted.id, ok=False, error=self.subscribe_error))
            return
        filters = FilterSet(wanted.filters)
        peer.link.send(Subscribed(wanted.id))
        name = wanted.name or (f"history-{wanted.id}" if wanted.start != "now" else None)
        if name is None:
            peer.live[wanted.id] = filters
            return
        if wanted.name is None or name not in self.cursors:
            self.cursors[name] = 0 if wanted.start == "earliest" else len(self.log)
        peer.durable[wanted.id] = (name, filters)
        self._pump(peer, name, filters)
