"""What a subscription makes of records: stp.subscriber's promises, on sessions joined in memory."""

from __future__ import annotations

from datetime import UTC, datetime
from zlib import crc32

import pytest
import trio

from stp.batch import encode_batch, node_id
from stp.control import Subscribe, Subscribed
from stp.core.errors import UsageError
from stp.link import ReceiptReceived, RecordReceived
from stp.outbox import Refused
from stp.records import encode_record
from stp.subscriber import SEEN_SOURCES, Inbox, Message, ReceiptLevel, Subscription, start_of
from tests.client.joined import DOMAIN, Pair, void

TELEMETRY = 3


class Mute:
    async def reply_to(self, message: Message, payload: bytes, receipt: ReceiptLevel) -> None:
        raise UsageError("nobody asked")


class Desk:
    """A keeper's link that sends, and an inbox that receives."""

    def __init__(self, *, once: bool = False) -> None:
        self.inbox = Inbox(Mute(), lambda: None, once=once)
        self.number = 0
        self.connect()

    def connect(self) -> None:
        self.inbox.detach()
        self.pair = Pair()
        self.inbox.attach(self.pair.gateway)

    def subscribe(self, *filters: str, name: str | None = None, manual: bool = False) -> Subscription:
        wanted = Subscribe(str(len(self.inbox.subscriptions)), filters, name)
        subscription = Subscription(wanted, self.inbox, manual, self.inbox.remove)
        self.inbox.add(subscription)
        return subscription

    def send(self, *topics: str, number: int = 0) -> None:
        """One record with a message for each topic."""
        if not number:
            self.number = number = self.number + 1
        payloads = [b"%d.%d" % (number, n) for n in range(len(topics))]
        batch = encode_batch(
            topics, payloads, time_ms=1, publisher=node_id(DOMAIN, "x"), run=1, sequence=number
        )
        self.raw(encode_record(TELEMETRY, self.pair.source, number, [batch]))

    def raw(self, record: bytes) -> None:
        self.pair.device.send_record(TELEMETRY, record)
        self.deliver()

    def deliver(self) -> None:
        for event in self.pair.run():
            if isinstance(event, RecordReceived):
                self.inbox.on_record(event)

    def kept(self) -> int:
        """Places that the keeper was told are taken."""
        self.inbox.flush(trio.current_time())
        self.deliver()
        return max([one.kept for one in self.pair.back if isinstance(one, ReceiptReceived)], default=0)


async def take(subscription: Subscription, count: int) -> list[bytes]:
    with trio.fail_after(1):
        return [(await anext(subscription)).payload for _ in range(count)]


async def test_a_record_is_taken_when_the_application_comes_back_for_more() -> None:
    desk = Desk()
    subscription = desk.subscribe("a/#")
    desk.send("a/1", "b/1", "a/2")
    desk.send("a/3")
    assert desk.kept() == 0
    assert await take(subscription, 2) == [b"1.0", b"1.2"]
    assert desk.kept() == 0
    assert await take(subscription, 1) == [b"2.0"]
    assert desk.kept() == 1


async def test_a_record_of_two_subscriptions_is_taken_when_both_are_done() -> None:
    desk = Desk()
    first, second = desk.subscribe("a/#"), desk.subscribe("#")
    desk.send("a/1")
    desk.send("a/2")
    await take(first, 2)
    assert desk.kept() == 0
    await take(second, 2)
    assert desk.kept() == 1
    desk.send("a/3")
    await take(first, 1)
    await second.aclose()  # what it had in hand and what waited for it keep nobody any longer
    await first.aclose()
    assert desk.kept() == 3


async def test_what_is_for_nobody_is_taken_at_once() -> None:
    desk = Desk()
    desk.subscribe("a/#")
    desk.send("b/1")
    desk.raw(void(desk.pair.source, 2, 5))
    assert desk.kept() == 2
    statistics = desk.inbox.statistics()
    assert (statistics.unwanted, statistics.voids) == (1, 1)


async def test_a_batch_that_cannot_be_opened_is_counted_and_passed(caplog: pytest.LogCaptureFixture) -> None:
    desk = Desk()
    subscription = desk.subscribe("#")
    good = encode_batch(["a/x"], [b"1"], time_ms=1, publisher=bytes(16), run=1, sequence=1, compress=True)
    body = bytearray(good)
    body[-10:-4] = bytes(6)  # no zstd any longer, under a CRC that is right

    body[-4:] = crc32(body[4:-4]).to_bytes(4, "big")
    desk.raw(encode_record(TELEMETRY, desk.pair.source, 1, [bytes(body)]))
    desk.number = 1
    desk.send("a/x")
    assert await take(subscription, 1) == [b"2.0"]
    assert desk.inbox.statistics().damaged == 1
    assert "cannot be opened" in caplog.text


async def test_a_record_that_comes_again_is_handed_out_once() -> None:
    """On the same session, on a later one, in hand and taken."""
    desk = Desk(once=True)
    subscription = desk.subscribe("a/#", name="r")
    desk.send("a/1")
    desk.send("a/2")
    assert await take(subscription, 2) == [b"1.0", b"2.0"]
    assert desk.kept() == 1
    desk.connect()
    desk.send("a/1", number=1)
    desk.send("a/2", number=2)
    desk.send("a/3")
    assert desk.kept() == 1  # the first was done with; the second is in hand yet, now at its new place
    assert await take(subscription, 1) == [b"3.0"]
    assert desk.kept() == 2
    await subscription.aclose()
    assert desk.inbox.statistics().repeats == 2
    assert desk.kept() == 3
    desk.send("a/4")
    assert desk.kept() == 3  # for the next reader of that name


async def test_sources_are_remembered_within_a_bound() -> None:
    desk = Desk(once=True)
    desk.inbox._seen = {(b"%16d" % n, TELEMETRY): None for n in range(SEEN_SOURCES)}  # type: ignore[misc]
    desk.subscribe("a/#", name="r")
    desk.send("a/1")
    assert len(desk.inbox._seen) == SEEN_SOURCES


async def test_manual_acknowledgement_of_a_closed_live_subscription() -> None:
    desk = Desk()
    subscription = desk.subscribe("a/#", manual=True)
    desk.send("a/1", "a/2", "a/3")
    first = await anext(subscription)
    await subscription.aclose()
    assert desk.kept() == 0
    first.ack()
    assert desk.kept() == 1


async def test_an_end_by_the_keeper_is_raised_after_what_came_before() -> None:
    desk = Desk()
    subscription = desk.subscribe("a/#")
    desk.inbox.on_subscribed(Subscribed("0"))
    assert subscription.confirmed.is_set()
    desk.send("a/1")
    desk.inbox.on_subscribed(Subscribed("0", ok=False, error="a newer session reads it"))
    desk.inbox.on_subscribed(Subscribed("99"))
    assert await take(subscription, 1) == [b"1.0"]
    with pytest.raises(Refused, match="a newer session reads it"):
        await anext(subscription)


def test_start() -> None:
    assert start_of("earliest") == "earliest"
    assert start_of(datetime(2026, 1, 1, tzinfo=UTC)) == 1_767_225_600_000
    assert start_of(1.5) == 1500
    for bad in ("then", datetime(2026, 1, 1)):
        with pytest.raises(UsageError):
            start_of(bad)
