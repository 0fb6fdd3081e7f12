"""The client library over real sockets on loopback, against the least of a keeper. Promises as in stp.client."""

from __future__ import annotations

import math
import os
from datetime import timedelta
from pathlib import Path

import pytest
import trio
import trio.testing

import stp
import stp.batch
from stp.core.errors import ErrorCode
from stp.outbox import RECORD_OVERHEAD
from stp.records import RefusedCode
from tests.client.keeper import Keeper
from tests.identity_kit import Flaw, shared

pytestmark = pytest.mark.real


def device(node: str = "device-1", flaw: Flaw = Flaw.NONE) -> stp.Identity:
    return shared().identity(node, flaw)


@pytest.fixture
async def keeper():  # type: ignore[no-untyped-def]
    async with Keeper().running() as one:
        yield one


async def test_publish_queues_and_leaving_waits_until_it_is_kept(keeper: Keeper) -> None:
    async with stp.connect(keeper.url, identity=device()) as session:
        for n in range(100):
            await session.publish("site-a/temp", b"%d" % n)
    assert keeper.messages == [("site-a/temp", b"%d" % n) for n in range(100)]


async def test_receipts_can_be_awaited(keeper: Keeper) -> None:
    keeper.custody = False
    async with stp.connect(keeper.url, identity=device()) as session:
        await session.publish("site-a/temp", b"1", receipt="kept")
        assert keeper.messages == [("site-a/temp", b"1")]
        with trio.move_on_after(0.05) as scope:
            await session.publish("site-a/temp", b"2", receipt="custody")
        assert scope.cancelled_caught
        assert len(keeper.messages) == 2
        keeper.custody = True
        await session.publish("site-a/temp", b"3", receipt="custody")


async def test_subscribers_get_what_matches(keeper: Keeper) -> None:
    async with (
        stp.connect(keeper.url, identity=device("reader")) as reader,
        stp.connect(keeper.url, identity=device()) as session,
    ):
        subscription = reader.subscribe("site-a/+/temp", "site-b/#")
        await subscription.confirmed.wait()
        for topic in ("site-a/x/temp", "site-a/x/other", "site-b/y", "site-a/z/temp"):
            await session.publish(topic, topic.encode())
        got = []
        async for message in subscription:
            got.append((message.topic, message.payload))
            if len(got) == 3:
                break
        await subscription.aclose()
    assert got == [(topic, topic.encode()) for topic in ("site-a/x/temp", "site-b/y", "site-a/z/temp")]


# -- publishing ------------------------------------------------------------------------------------------


async def test_a_batch_leaves_at_once_when_nothing_is_in_flight_and_gathers_behind_it(keeper: Keeper) -> None:
    keeper.silent = True
    async with stp.connect(keeper.url, identity=device()) as session:
        for n in range(200):
            await session.publish("site-a/temp", b"%d" % n)
        await trio.sleep(0.01)
        keeper.answer_held()
    assert keeper.batches[0] == 1
    assert len(keeper.batches) <= 4
    assert keeper.messages == [("site-a/temp", b"%d" % n) for n in range(200)]


async def test_commands_do_not_linger(keeper: Keeper) -> None:
    keeper.silent = True
    async with stp.connect(keeper.url, identity=device()) as session:
        for n in range(5):
            await session.publish("cmd/valve", b"%d" % n)
        await trio.sleep(0.01)
        keeper.answer_held()
    assert keeper.batches == [1] * 5


async def test_many_messages_at_once(keeper: Keeper) -> None:
    pairs = [(f"site-a/{n % 7}", b"%d" % n) for n in range(20_000)]
    async with stp.connect(keeper.url, identity=device()) as session:
        assert await session.publish_many(pairs, receipt="kept") == 20_000
        assert keeper.messages == pairs
        await session.publish_batch(["site-a/0"] * 3, [b"a", b"b", b"c"], receipt="custody")
        assert keeper.messages[-3:] == [("site-a/0", b"a"), ("site-a/0", b"b"), ("site-a/0", b"c")]
        with pytest.raises(stp.UsageError):
            await session.publish_batch(["site-a/0", "cmd/0"], [b"a", b"b"])
        assert session.statistics().unfinished == 0


async def test_nothing_to_publish(keeper: Keeper) -> None:
    async with stp.connect(keeper.url, identity=device()) as session:
        assert await session.publish_many([], receipt="kept") == 0
        with pytest.raises(stp.TopicError):
            await session.publish_batch([], [])


async def test_what_cannot_be_sent_is_said_at_once(keeper: Keeper) -> None:
    async with stp.connect(keeper.url, identity=device()) as session:
        with pytest.raises(stp.MessageTooLarge) as caught:
            await session.publish("site-a/x", bytes(1024 * 1024 + 1))
        assert isinstance(caught.value, ValueError)
        with pytest.raises(stp.TopicError):
            await session.publish("site-a/#", b"")
        with pytest.raises(stp.UsageError):
            await session.publish("site-a/x", b"", receipt="stored")  # type: ignore[arg-type]
        await session.publish("site-a/x", bytes(1024 * 1024), receipt="kept")
    assert [len(payload) for _, payload in keeper.messages] == [1024 * 1024]


async def test_a_denied_message_is_told_and_stops_nobody(keeper: Keeper) -> None:
    keeper.judge = lambda topic: (RefusedCode.DENIED, 0, "rule west") if topic == "site-b/x" else None
    told: list[stp.Refused] = []
    async with stp.connect(keeper.url, identity=device(), on_refused=told.append) as session:
        with pytest.raises(stp.Refused) as caught:
            await session.publish("site-b/x", b"1", receipt="kept")
        assert (caught.value.code, caught.value.reason) == (RefusedCode.DENIED, "rule west")
        assert caught.value.topic == "site-b/x"
        await session.publish("site-b/x", b"2")
        await session.publish("site-a/x", b"3", receipt="kept")
        await session.publish("site-b/x", b"4")
        await session.drain(5.0)
        statistics = session.statistics()
    assert keeper.messages == [("site-a/x", b"3")]
    assert statistics.refused_messages == 3
    assert [refused.messages for refused in told] == [1, 1, 1]


async def test_of_a_mixed_batch_only_the_denied_falls(keeper: Keeper) -> None:
    keeper.judge = lambda topic: (RefusedCode.DENIED, 0, "rule west") if topic == "site-b/x" else None
    pairs = [("site-b/x" if n % 10 == 4 else f"site-a/{n % 3}", b"%d" % n) for n in range(100)]
    outcomes: dict[int, str] = {}

    async def publish_one(n: int) -> None:
        try:
            await session.publish(*pairs[n], receipt="kept")
            outcomes[n] = "kept"
        except stp.Refused as refused:
            outcomes[n] = refused.reason

    keeper.silent = True
    async with stp.connect(keeper.url, identity=device()) as session, trio.open_nursery() as nursery:
        await session.publish("site-a/0", b"first")
        for n in range(100):
            nursery.start_soon(publish_one, n)
            await trio.testing.wait_all_tasks_blocked()
        keeper.answer_held()
    assert outcomes == {n: "rule west" if n % 10 == 4 else "kept" for n in range(100)}
    assert keeper.messages[1:] == [pair for pair in pairs if pair[0] != "site-b/x"]


async def test_a_full_keeper_is_tried_again_in_order(keeper: Keeper) -> None:
    refusals = 0

    def full_for_a_while(topic: str) -> tuple[RefusedCode, int, str] | None:
        nonlocal refusals
        refusals += 1
        return (RefusedCode.FULL, 10, "store full") if refusals % 20 == 2 else None

    keeper.judge = full_for_a_while
    async with stp.connect(keeper.url, identity=device()) as session:
        for n in range(300):
            await session.publish("cmd/x" if n % 2 else "site-a/x", b"%d" % n)
        assert await session.drain(10.0)
        resent = sum(lane.resent_records for lane in session.statistics().lanes.values())
    for topic, parity in (("cmd/x", 1), ("site-a/x", 0)):
        assert [int(p) for t, p in keeper.messages if t == topic] == list(range(parity, 300, 2))
    assert resent > 5


async def test_memory_is_bounded_by_lane(keeper: Keeper) -> None:
    keeper.silent = True
    async with stp.connect(keeper.url, identity=device(), memory=1024 * 1024) as session:
        published = 0
        with trio.move_on_after(0.2):
            while True:
                await session.publish("site-a/x", bytes(10_000))
                published += 1
        assert published <= 55
        with trio.fail_after(1.0):
            await session.publish("cmd/x", b"a lane that stands still stops no other")
        used = session.statistics().lanes["telemetry"].used
        assert used <= 512 * 1024 + 60 * RECORD_OVERHEAD
        keeper.answer_held()
        with trio.fail_after(5.0):
            await session.publish("site-a/x", b"last", receipt="kept")
    assert len(keeper.messages) == published + 2


async def test_a_long_wait_says_what_for(
    keeper: Keeper, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("stp.client.WARN_AFTER", 0.02)
    keeper.judge = lambda topic: (RefusedCode.FULL, 30, "store full")
    async with stp.connect(keeper.url, identity=device(), close_timeout=0.0) as session:
        with trio.move_on_after(0.1):
            await session.publish("site-a/x", b"1", receipt="kept")
    assert "FULL: store full" in caplog.text
    assert "closed with 1 messages not kept" in caplog.text


async def test_properties_times_and_tombstones_arrive(keeper: Keeper) -> None:
    async with (
        stp.connect(keeper.url, identity=device("reader")) as reader,
        stp.connect(keeper.url, identity=device()) as session,
    ):
        subscription = reader.subscribe("#")
        await subscription.confirmed.wait()
        properties = stp.Properties(content_type="text/plain", user=[(b"k", b"v")])
        await session.publish("site-a/x", b"1", properties=properties, ttl=60.0)
        await session.publish("site-a/x", b"", tombstone=True)
        first, second = await anext(subscription), await anext(subscription)
    assert first.properties == properties
    assert first.publisher == stp.batch.node_id("test", "device-1")
    assert (first.tombstone, second.tombstone) == (False, True)
    assert second.time_ms >= first.time_ms > 1_700_000_000_000
    with pytest.raises(stp.UsageError):
        await first.reply(b"")


# -- connecting ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flaw", [Flaw.EXPIRED, Flaw.OTHER_CA, Flaw.WRONG_EKU])
async def test_a_refused_certificate_is_said_at_once(keeper: Keeper, flaw: Flaw) -> None:
    with trio.fail_after(3.0), pytest.raises(stp.Rejected):
        async with stp.connect(keeper.url, identity=device(flaw=flaw), connect_timeout=math.inf):
            pytest.fail("it must never report connected")


async def test_another_node_than_expected_is_refused(keeper: Keeper) -> None:
    url = keeper.url.replace("gw-1", "gw-2")
    with trio.fail_after(3.0), pytest.raises(stp.Rejected) as caught:
        async with stp.connect(url, identity=device()):
            pytest.fail("it must never report connected")
    assert not caught.value.by_peer


async def test_nobody_answers() -> None:
    with pytest.raises(stp.Unreachable) as caught:
        async with stp.connect("stp://gw-1@127.0.0.1:9", identity=device(), connect_timeout=0.1):
            pytest.fail("it must never report connected")
    assert "127.0.0.1:9" in str(caught.value)


async def test_an_identity_may_name_the_keeper(keeper: Keeper) -> None:
    upstream = (keeper.node, f"stp://127.0.0.1:{keeper.port}", 0.0)
    identity = shared().identity("device-9", upstream=upstream)
    async with stp.connect(identity=identity) as session:
        assert session.connected
        assert session.peer is not None
        assert session.peer.node == keeper.node
        assert "connected to gw-1" in session.state


async def test_a_renewed_identity_is_taken_at_the_next_dial(
    keeper: Keeper, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = shared().write(tmp_path, "device-1")
    path.write_bytes(shared().bundle("device-1", not_after=shared().now + timedelta(days=2)))
    async with stp.connect(keeper.url, identity=path) as session:
        for content, words in (
            (shared().bundle("device-1", not_after=shared().now + timedelta(days=9)), ""),
            (b"half written", "cannot be used"),
            (shared().bundle("device-2"), "restart to use it"),
        ):
            connects = session.statistics().connection.connects
            path.write_bytes(content)
            os.utime(path, ns=(1, len(content)))
            keeper.close_all(ErrorCode.RESTARTING)
            with trio.fail_after(5):
                while session.statistics().connection.connects == connects or not session.connected:
                    await trio.sleep(0.01)
            assert words in caplog.text
            (peer,) = keeper.peers.values()
            certificate = peer.link.session.peer
            assert certificate is not None
            assert certificate.node == "device-1"
            assert certificate.not_after > shared().now + timedelta(days=8)


async def test_every_start_has_a_source_of_its_own(keeper: Keeper) -> None:
    """R-10-34."""
    sources = set()
    for _ in range(2):
        async with stp.connect(keeper.url, identity=device()) as session:
            await session.publish("event/a", b"", receipt="kept")
            said = [peer.link.peer for peer in keeper.peers.values()]
            sources.update(hello.store for hello in said if hello is not None)
    assert len(sources) == 2


async def test_what_the_block_raises_comes_out_as_it_is(keeper: Keeper) -> None:
    with pytest.raises(ZeroDivisionError):
        async with stp.connect(keeper.url, identity=device()):
            raise ZeroDivisionError


async def test_a_cancelled_client_says_goodbye(keeper: Keeper) -> None:
    with trio.move_on_after(0.2) as scope:
        async with stp.connect(keeper.url, identity=device()) as session:
            await anext(session.subscribe("event/#", durable="r"))
    assert scope.cancelled_caught
    with trio.fail_after(1.0):
        while keeper.peers:
            await trio.sleep(0.01)


async def test_a_restarted_keeper_misses_and_doubles_nothing() -> None:
    keeper = Keeper()
    sent = 0
    async with keeper.running():
        ready = trio.Event()
        async with trio.open_nursery() as nursery:

            async def publish() -> None:
                nonlocal sent
                async with stp.connect(keeper.url, identity=device(), close_timeout=20.0) as session:
                    while sent < 400:
                        await session.publish("site-a/x", b"%d" % sent)
                        sent += 1
                        await trio.sleep(0.001)
                        if sent == 100:
                            ready.set()

            nursery.start_soon(publish)
            await ready.wait()
            keeper.close_all(ErrorCode.RESTARTING)
            await trio.sleep(0.05)
            keeper.silent = True
            await trio.sleep(0.05)
            keeper._held.clear()
            keeper.silent = False
            keeper.close_all(ErrorCode.GOING_AWAY, "20")
    assert [int(payload) for _, payload in keeper.messages] == list(range(400))
    assert keeper.sessions == 3


async def test_a_session_that_is_lost_is_dialled_again_and_subscribed_again(keeper: Keeper) -> None:
    async with (
        stp.connect(keeper.url, identity=device("reader")) as reader,
        stp.connect(keeper.url, identity=device()) as session,
    ):
        subscription = reader.subscribe("site-a/#")
        await subscription.confirmed.wait()
        before = keeper.sessions
        keeper.close_all(ErrorCode.RESTARTING)
        with trio.fail_after(5.0):
            while keeper.sessions < before + 2 or not any(peer.live for peer in keeper.peers.values()):
                await trio.sleep(0.01)
            await session.publish("site-a/x", b"after")
            message = await anext(subscription)
        assert message.payload == b"after"
        assert session.statistics().connection.connects == 2


# -- subscribing -----------------------------------------------------------------------------------------


async def test_a_durable_subscription_goes_on_where_it_stopped(keeper: Keeper) -> None:
    async with stp.connect(keeper.url, identity=device()) as session:
        for n in range(30):
            await session.publish("event/x", b"%d" % n, receipt="kept")
    got: list[int] = []
    for _ in range(3):
        async with (
            stp.connect(keeper.url, identity=device("reader")) as reader,
            reader.subscribe("event/#", durable="r", start="earliest") as subscription,
        ):
            got += [int((await anext(subscription)).payload) for _ in range(10)]
    assert got == list(range(30))


async def test_a_durable_reader_sees_each_message_once_whatever_happens_to_its_session(
    keeper: Keeper,
) -> None:
    """(3). The receipts of what it has in hand are lost with the session, and the keeper sends it again."""
    async with stp.connect(keeper.url, identity=device()) as session:
        for n in range(20):
            await session.publish("event/x", b"%d" % n, receipt="kept")
    async with stp.connect(keeper.url, identity=device("reader")) as reader:
        subscription = reader.subscribe("event/#", durable="r", start="earliest")
        got = []
        with trio.fail_after(10.0):
            for n in range(20):
                got.append(int((await anext(subscription)).payload))
                if n % 6 == 3:
                    keeper.close_all(ErrorCode.RESTARTING)
                    await trio.sleep(0.1)
        await subscription.aclose()
        repeats = reader.statistics().readers
    assert got == list(range(20))
    assert repeats == {} or repeats["r"].repeats > 0
    assert keeper.cursors["r"] == 20


async def test_manual_acknowledgement(keeper: Keeper) -> None:
    async with stp.connect(keeper.url, identity=device()) as session:
        await session.publish_many([("event/x", b"%d" % n) for n in range(6)], receipt="kept")
        await session.publish("event/x", b"6", receipt="kept")
    async with stp.connect(keeper.url, identity=device("reader")) as reader:
        subscription = reader.subscribe("event/#", durable="r", start="earliest", ack="manual")
        messages = [await anext(subscription) for _ in range(6)]
        for message in messages[:-1]:
            message.ack()
        with trio.move_on_after(0.1) as scope:
            await anext(subscription)
        assert scope.cancelled_caught
        assert keeper.cursors["r"] == 0
        messages[-1].ack()
        with trio.fail_after(2.0):
            assert (await anext(subscription)).payload == b"6"
        assert keeper.cursors["r"] == 1


async def test_history_without_a_name(keeper: Keeper) -> None:
    async with stp.connect(keeper.url, identity=device()) as session:
        await session.publish("event/x", b"old", receipt="kept")
        subscription = session.subscribe("event/#", start="earliest")
        assert (await anext(subscription)).payload == b"old"
        await session.publish("event/x", b"new")
        assert (await anext(subscription)).payload == b"new"


async def test_a_refused_subscription_raises(keeper: Keeper) -> None:
    keeper.subscribe_error = "rule west"
    async with stp.connect(keeper.url, identity=device()) as session:
        for options in ({}, {"durable": "r"}):
            with pytest.raises(stp.Refused) as caught:
                await anext(session.subscribe("event/#", **options))  # type: ignore[arg-type]
            assert caught.value.reason == "rule west"
        with pytest.raises(stp.UsageError):
            session.subscribe()
        with pytest.raises(stp.TopicError):
            session.subscribe("a/#/b")


async def test_an_application_that_takes_nothing_stops_the_keeper(keeper: Keeper) -> None:
    async with (
        stp.connect(keeper.url, identity=device("reader")) as reader,
        stp.connect(keeper.url, identity=device()) as session,
    ):
        subscription = reader.subscribe("site-a/#")
        await subscription.confirmed.wait()
        for _ in range(40):
            await session.publish("site-a/x", bytes(50_000), receipt="kept")
        (peer,) = [peer for peer in keeper.peers.values() if peer.live]
        assert peer.link.lane_unsent(3) > 500_000
        with trio.fail_after(5.0):
            got = [len((await anext(subscription)).payload) for _ in range(40)]
        assert got == [50_000] * 40


async def test_two_subscriptions_of_a_session_get_their_own(keeper: Keeper) -> None:
    async with stp.connect(keeper.url, identity=device()) as session:
        every, some = session.subscribe("#"), session.subscribe("site-a/#")
        await every.confirmed.wait()
        await some.confirmed.wait()
        for n, topic in enumerate(("site-a/1", "site-b/2", "site-a/3")):
            await session.publish(topic, b"%d" % n)
        assert [(await anext(every)).payload for _ in range(3)] == [b"0", b"1", b"2"]
        assert [(await anext(some)).payload for _ in range(2)] == [b"0", b"2"]
        await every.aclose()
        with pytest.raises(StopAsyncIteration):
            await anext(every)


# -- request and reply -----------------------------------------------------------------------------------


async def answer(session: stp.Client, *, delay: float = 0.0) -> None:
    async for message in session.subscribe("cmd/#"):
        await trio.sleep(delay)
        await message.reply(b"done " + message.payload)


async def test_request_and_reply(keeper: Keeper) -> None:
    """R-10-42."""
    async with (
        stp.connect(keeper.url, identity=device("valve-1")) as valve,
        stp.connect(keeper.url, identity=device()) as session,
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(answer, valve)
        await trio.testing.wait_all_tasks_blocked()
        await valve.ping()
        for n in range(3):
            reply = await session.request("cmd/valve-1", b"%d" % n, timeout=2.0)
            assert reply.payload == b"done %d" % n
        nursery.cancel_scope.cancel()


async def test_a_late_reply_is_counted_and_given_to_nobody(keeper: Keeper) -> None:
    """R-10-42."""
    async with (
        stp.connect(keeper.url, identity=device("valve-1")) as valve,
        stp.connect(keeper.url, identity=device()) as session,
        trio.open_nursery() as nursery,
    ):
        valve.run_in_background(lambda: answer(valve, delay=0.1))
        await valve.ping()
        with pytest.raises(stp.RequestTimeout) as caught:
            await session.request("cmd/valve-1", b"1", timeout=0.05)
        assert isinstance(caught.value, TimeoutError)
        with trio.fail_after(2.0):
            while not session.statistics().late_replies:
                await trio.sleep(0.01)
        nursery.cancel_scope.cancel()


async def test_ping_measures_the_round_trip(keeper: Keeper) -> None:
    async with stp.connect(keeper.url, identity=device()) as session:
        ping = await session.ping()
        assert 0 < ping.round_trip < 1
        assert 0 < ping.network < 1
    with pytest.raises(stp.Unreachable):
        await session.ping(timeout=0.01)
