"""§10 on the client's side: HELLO, records on lanes, receipts, live subscriptions."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from tests.second import messages as m
from tests.second.hello import Malformed
from tests.second.session import Session
from tests.second.stream_session import StreamSession


class Refused(Exception):
    """REFUSED: (code, reason)."""


Carried = TypeVar("Carried", Session, StreamSession)


class Client(Generic[Carried]):
    """One session of one process: publish, subscribe, receive."""

    def __init__(self, session: Carried) -> None:
        self.session: Carried = session
        self.source = os.urandom(16)
        self.run = time.time_ns() // 1_000_000
        self.hello: dict[str, Any] = {}
        self.control: list[tuple[int, bytes]] = []
        self.kept: dict[int, int] = {}
        self.custody: dict[int, int] = {}
        self.received: list[m.Message] = []
        self.sources: set[bytes] = set()
        """Of the records that came."""
        self._lanes_out: dict[int, tuple[int, int]] = {}
        """By lane: its stream, and how many records were sent."""
        self._lanes_in: dict[int, tuple[int, int]] = {}
        """By stream: its lane, and how many records came."""
        self._batches = 0
        self._filters: list[str] = []

    def start(self) -> None:
        """HELLO is the first record on stream 0 (R-10-33)."""
        bundle = self.session.bundle
        hello = {
            "domain": bundle.domain,
            "node": bundle.node,
            "store": self.source.hex(),
            "run": self.run,
            "nonce": os.urandom(16).hex(),
            "kind": "second",
            "software": "second/1",
            "features": [],
            "time_ms": time.time_ns() // 1_000_000,
            "time_error_ms": 1000,
        }
        self.session.streams.write(0, m.write_control(m.HELLO, hello))
        self.session.connect()
        self.until(lambda: bool(self.hello))

    def until(self, done: Callable[[], bool], timeout: float = 10.0) -> None:
        """Keep the session going until then. Raises TimeoutError, Closed, Refused, Malformed."""
        deadline = time.monotonic() + timeout
        while True:
            self._parse_control()
            for stream in [number for number in self.session.streams.incoming if number]:
                self._parse_lane(stream)
            if done():
                return
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError
            self.session.step(left)

    def lane_of(self, topic: str) -> int:
        """By the classes of the keeper's HELLO: the first of them that matches (R-10-2)."""
        for rule in self.hello["classes"]:
            if any(m.matches(pattern, topic) for pattern in rule["filters"]):
                return int(rule["lane"])
        raise Refused(f"no class for {topic}")

    def publish(self, pairs: list[tuple[str, bytes]]) -> tuple[int, int]:
        """One batch, one record. (lane, place): kept when `kept[lane]` is above the place."""
        lane = self.lane_of(pairs[0][0])
        if lane not in self._lanes_out:
            self._lanes_out[lane] = (self.session.streams.open_stream(), 0)
            self.session.streams.write(self._lanes_out[lane][0], bytes([1, lane]))
        stream, place = self._lanes_out[lane]
        publisher = m.node_id(self.session.bundle.domain, self.session.bundle.node)
        self._batches += 1
        batch = m.write_batch(
            pairs,
            time_ms=time.time_ns() // 1_000_000,
            publisher=publisher,
            run=self.run,
            sequence=self._batches,
        )
        prefix = m.common_prefix([topic.encode() for topic, _ in pairs])
        self.session.streams.write(stream, m.write_record(lane, self.source, place + 1, batch, prefix))
        self._lanes_out[lane] = (stream, place + 1)
        return lane, place

    def wait_kept(self, lane: int, place: int, timeout: float = 10.0) -> None:
        self.until(lambda: self.kept.get(lane, 0) > place, timeout)

    def subscribe(self, filters: list[str]) -> None:
        """Live: from now on."""
        self._filters += filters
        body = {"id": "1", "filters": filters, "start": "now"}
        self.session.streams.write(0, m.write_control(m.SUBSCRIBE, body))
        self.until(lambda: any(kind == m.SUBSCRIBED for kind, _ in self.control))
        answer = json.loads(next(body for kind, body in self.control if kind == m.SUBSCRIBED))
        if not answer.get("ok"):
            raise Refused(answer.get("error"))

    def close(self) -> None:
        self.session.close()

    def _parse_control(self) -> None:
        buffer = self.session.streams.incoming[0].buffer
        while len(buffer) >= 4 and len(buffer) >= (size := 4 + int.from_bytes(buffer[:4], "big")):
            record = self.session.streams.take(0, size)
            kind, body = record[4], record[5:]
            if not self.hello and kind != m.HELLO:
                raise Malformed("HELLO comes first")
            self.control.append((kind, body))
            if kind == m.HELLO:
                self.hello = json.loads(body)
            elif kind == m.RECEIPT:
                lane, kept, custody, _ = m.read_receipt(body)
                self.kept[lane] = max(kept, self.kept.get(lane, 0))
                self.custody[lane] = max(custody, self.custody.get(lane, 0))
            elif kind == m.REFUSED:
                raise Refused(m.read_refused(body))

    def _parse_lane(self, stream: int) -> None:
        buffer = self.session.streams.incoming[stream].buffer
        if stream not in self._lanes_in:
            if len(buffer) < 2 or not self.hello:
                return
            what, lane = self.session.streams.take(stream, 2)
            if what != 1:
                raise Malformed("no lane")
            self._lanes_in[stream] = (lane, 0)
        lane, places = self._lanes_in[stream]
        before = places
        while len(buffer) >= 4 and len(buffer) >= (size := 4 + int.from_bytes(buffer[:4], "big")):
            record = m.read_record(self.session.streams.take(stream, size))
            places += 1
            self.sources.add(record.source)
            for batch in record.batches:
                self.received += [
                    message
                    for message in m.read_batch(batch).messages
                    if any(m.matches(pattern, message.topic) for pattern in self._filters)
                ]
        if places > before:
            self._lanes_in[stream] = (lane, places)
            self.session.streams.write(0, m.write_receipt(lane, places, places))
