"""The relay on simulated networks: real links and stores, seeded loss, crashes of keepers."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio
import trio.testing

from stp.batch import encode_batch, node_id
from stp.core.errors import ErrorCode
from stp.records import RefusedCode, encode_record
from stpd.limits import PeerLimit
from stpd.schema import BUILT_IN_CLASSES, AccessRule, ClassConfig
from tests.daemon.world import PAYLOAD, World
from tests.identity_kit import DOMAIN


@pytest.mark.parametrize("seed", range(3))
async def test_two_hops_deliver_once_and_in_order(
    tmp_path: Path, mock_clock: trio.testing.MockClock, seed: int
) -> None:
    """R-10-41."""
    async with World(tmp_path, seed=seed, loss=0.03, duplicate=0.02, jitter=0.01) as world:
        hub = await world.hub()
        edge = await world.gateway("edge-1", hub)
        sensors = [world.publisher(f"sensor-{n}", edge) for n in range(3)]
        reader = world.reader("reader-1", hub, ["site/#"], durable="r")
        await world.run(lambda: reader.subscribed, limit=10)
        for sensor in sensors:
            sensor.publish(40)
        await world.run(lambda: len(reader.messages) == 120, limit=60)
        await world.run(lambda: not any(sensor.unacked for sensor in sensors), limit=10)
        await world.run_for(1.0)
        assert edge.store.statistics().reads == hub.store.statistics().reads == 0, (
            "level readers are fed from memory"
        )
        world.check()


@pytest.mark.parametrize("seed", range(3))
async def test_crashes_of_both_keepers_lose_and_double_nothing(
    tmp_path: Path, mock_clock: trio.testing.MockClock, seed: int
) -> None:
    """A crash forgets sessions and what was on the wire; both stores hold what they acknowledged."""
    async with World(tmp_path, seed=seed, loss=0.02, delay=0.02) as world:
        hub = await world.hub()
        edge = await world.gateway("edge-1", hub)
        sensor = world.publisher("sensor-1", edge)
        reader = world.reader("reader-1", hub, ["site/#"], durable="r")
        await world.run(lambda: reader.subscribed, limit=10)
        for round_ in range(4):
            sensor.publish(50)
            await world.run_for(world.net.rng.random() * 0.2)
            (hub if round_ % 2 else edge).crash()
        await world.run(lambda: len(reader.messages) == 200, limit=90)
        await world.run_for(2.0)
        assert not sensor.unacked
        world.check()


async def test_backlog_beyond_memory_comes_from_disk(
    tmp_path: Path, mock_clock: trio.testing.MockClock
) -> None:
    async with World(tmp_path, seed=1) as world:
        hub = await world.hub()
        edge = await world.gateway("edge-1", hub, cache=64 << 10)
        world.net.link(edge.host, hub.host).loss = 1.0
        sensor = world.publisher("sensor-1", edge)
        for _ in range(10):
            sensor.publish(20, size=4000)
            await world.run(lambda: not sensor.unacked, limit=10)
        assert edge.store.behind("uplink", 3).messages == 200
        world.net.link(edge.host, hub.host).loss = 0.0
        reader = world.reader("reader-1", hub, ["#"], durable="r")
        await world.run(lambda: len(reader.messages) == 200, limit=60)
        assert edge.store.statistics().reads > 0
        await world.run(lambda: edge.store.behind("uplink", 3).messages == 0, limit=5)
        world.check()


async def test_custody_is_told_only_when_the_hub_has_it(
    tmp_path: Path, mock_clock: trio.testing.MockClock
) -> None:
    """Relay promise (2, R-10-36)."""
    async with World(tmp_path, seed=2) as world:
        hub = await world.hub()
        edge = await world.gateway("edge-1", hub)
        sensor = world.publisher("sensor-1", edge)
        await world.run(lambda: sensor.link is not None and sensor.link.connected, limit=5)
        await world.run(lambda: edge.uplink is not None and edge.uplink.state == "connected", limit=5)
        world.net.link(edge.host, hub.host).loss = 1.0
        sensor.publish(5)
        await world.run(lambda: not sensor.unacked, limit=5)
        await world.run_for(1.0)
        assert sensor.custody_upto == 0
        assert edge.relay.waiting_for_custody() == 5
        world.net.link(edge.host, hub.host).loss = 0.0
        await world.run(lambda: sensor.custody_upto == 5, limit=30)
        assert edge.relay.waiting_for_custody() == 0
        world.check()


@pytest.mark.parametrize("seed", range(2))
async def test_commands_reach_an_edge_that_slept(
    tmp_path: Path, mock_clock: trio.testing.MockClock, seed: int
) -> None:
    """Only its own commands go down; voids cover the numbers between, so its ranges stay few (R-10-29)."""
    async with World(tmp_path, seed=seed, loss=0.02) as world:
        hub = await world.hub()
        edge = await world.gateway("edge-1", hub, subscribe=("cmd/edge-1/#",))
        await world.run(lambda: "edge-1/down" in hub.store.hops, limit=10)
        operator = world.publisher("operator", hub, topic="cmd/edge-1/light", lane=1)
        other = world.publisher("other", hub, topic="cmd/edge-2/light", lane=1)
        world.net.link(hub.host, edge.host).loss = 1.0
        for _ in range(10):
            operator.publish(1)
            await world.run(lambda: not operator.unacked, limit=5)
            other.publish(1)
            await world.run(lambda: not other.unacked, limit=5)
        lamp = world.reader("lamp", edge, ["cmd/edge-1/#"])
        await world.run_for(20.0)
        world.net.link(hub.host, edge.host).loss = 0.0
        await world.run(lambda: len(lamp.messages) == 10, limit=60)
        await world.run_for(2.0)
        assert {topic for _, topic, _ in lamp.messages} == {"cmd/edge-1/light"}
        assert hub.store.behind("edge-1/down", 1).messages == 0
        world.check()


async def test_a_denied_record_is_voided_and_the_rest_comes_in_order(
    tmp_path: Path, mock_clock: trio.testing.MockClock
) -> None:
    """The refusal names the rule; the publisher's next ones are accepted after the void (R-10-39)."""
    rules = (
        AccessRule(name="readers", nodes=("reader-*",), subscribe=("#",)),
        AccessRule(name="sensors", nodes=("sensor-*",), publish=("site/#",)),
    )
    async with World(tmp_path, seed=4) as world:
        hub = await world.hub(access=rules)
        sensor = world.publisher("sensor-1", hub)
        reader = world.reader("reader-1", hub, ["#"])
        await world.run(lambda: reader.subscribed, limit=5)
        sensor.publish(2)
        sensor.topic = "secret/x"
        sensor.publish(1)
        sensor.topic = "site/sensor-1/t"
        sensor.publish(2)
        await world.run(lambda: not sensor.unacked, limit=10)
        assert [counter for *_, counter in reader.messages] == [1, 2, 4, 5]
        assert sensor.refusals[0].reason == "rule sensors: sensor-1 may not publish secret/x"
        ledger = hub.store.ledger()
        assert ledger.unexplained == 0, ledger.explain()
        assert sum(door.refused for door in ledger.doors) >= 1


async def test_a_subscription_outside_the_rules_is_refused(
    tmp_path: Path, mock_clock: trio.testing.MockClock
) -> None:
    rules = (AccessRule(name="own", subscribe=("site/{node}/#",)),)
    async with World(tmp_path, seed=5) as world:
        hub = await world.hub(access=rules)
        reader = world.reader("reader-1", hub, ["site/#"])
        await world.run(lambda: reader.error is not None, limit=5)
        assert reader.error == "rule own: reader-1 may not subscribe site/#"
        assert not reader.subscribed


async def test_a_memory_class_reaches_readers_and_no_disk(
    tmp_path: Path, mock_clock: trio.testing.MockClock
) -> None:
    """R-10-25."""
    live = ClassConfig(name="live", filters=("live/#",), lane=3, durability="memory")
    async with World(tmp_path, seed=6) as world:
        hub = await world.hub(classes=(live, *BUILT_IN_CLASSES))
        edge = await world.gateway("edge-1", hub, classes=(live, *BUILT_IN_CLASSES))
        sensor = world.publisher("sensor-1", edge, topic="live/sensor-1")
        reader = world.reader("reader-1", hub, ["live/#"])
        await world.run(lambda: reader.subscribed, limit=5)
        await world.run(lambda: edge.uplink is not None and edge.uplink.state == "connected", limit=5)
        sensor.publish(30)
        await world.run(lambda: len(reader.messages) == 30, limit=5)
        assert (edge.store.last(3), hub.store.last(3)) == (0, 0)
        node = {one.class_name: one for one in edge.store.ledger().nodes}["live"]
        assert (node.accepted, node.live_only, node.stored) == (30, 30, 0)
        world.check()


async def test_a_record_that_was_here_before_is_refused_as_a_loop(
    tmp_path: Path, mock_clock: trio.testing.MockClock
) -> None:
    """Two keepers that are each other's upstream: nothing circles, and every message is stored once at each.

    R-10-16.
    """
    async with World(tmp_path, seed=7) as world:
        hub = await world.hub()
        edge = await world.gateway("edge-1", hub, subscribe=("site/#",))
        sensor = world.publisher("sensor-1", edge)
        sensor.publish(20)
        await world.run(
            lambda: hub.store.behind("edge-1/down", 3).messages == 0 and not sensor.unacked, limit=20
        )
        await world.run_for(3.0)
        assert edge.relay.stats.loops == 0, "what came from a peer is not offered to it again"
        assert hub.store.ledger().unexplained == edge.store.ledger().unexplained == 0
        assert sum(node.stored for node in edge.store.ledger().nodes) == 20


@pytest.mark.parametrize("seed", range(2))
async def test_fault_64_a_full_store_refuses_and_keeps_the_order(
    tmp_path: Path, mock_clock: trio.testing.MockClock, seed: int
) -> None:
    """The hub's store fills up under a reader that holds; then there is room, and all come once and in order."""
    async with World(tmp_path, seed=seed, loss=0.01) as world:
        hub = await world.hub(budget=8 << 20)
        edge = await world.gateway("edge-1", hub)
        reader = world.reader("reader-1", hub, ["site/#"], durable="r")
        reader.hold = True
        await world.run(lambda: reader.subscribed, limit=5)
        sensor = world.publisher("sensor-1", edge)
        for _ in range(12):
            sensor.publish(10, size=80_000)
            await world.run_for(0.3)
        await world.run(lambda: hub.relay.stats.full > 0, limit=60)
        assert hub.store.full
        reader.hold = False
        assert reader.link is not None
        reader.link.close(ErrorCode.NO_ERROR, "take it again", world.net.now)
        await world.run(lambda: len(reader.messages) == 120, limit=120)
        await world.run(lambda: edge.store.behind("uplink", 3).messages == 0, limit=20)
        assert not hub.store.full
        world.check()


async def test_a_peer_beyond_its_limit_is_held_back_and_loses_nothing(
    tmp_path: Path, mock_clock: trio.testing.MockClock
) -> None:
    """Limits (1): 10 messages a second, however fast they are published."""
    async with World(tmp_path, seed=8) as world:
        hub = await world.hub(limit=PeerLimit(10, 0))
        reader = world.reader("reader-1", hub, ["#"])
        sensor = world.publisher("sensor-1", hub)
        await world.run(lambda: reader.subscribed, limit=5)
        sensor.publish(50)
        await world.run_for(2.0)
        assert 20 <= len(reader.messages) <= 32
        await world.run(lambda: len(reader.messages) == 50, limit=6)
        world.check()


async def test_a_newer_session_of_a_source_replaces_the_older(
    tmp_path: Path, mock_clock: trio.testing.MockClock
) -> None:
    """Sessions promise (2): the same source dials again; another node's never ends it (R-9-7)."""
    async with World(tmp_path, seed=9) as world:
        hub = await world.hub()
        first = world.publisher("sensor-1", hub)
        await world.run(lambda: first.link is not None and first.link.peer is not None, limit=5)
        twin = world.publisher("sensor-1", hub)
        twin.source = first.source
        stranger = world.publisher("sensor-2", hub)
        stranger.source = first.source
        await world.run(lambda: hub.sessions.stats.opened >= 3, limit=5)
        await world.run(lambda: hub.sessions.stats.replaced >= 1, limit=5)
        stranger.publish(1)
        await world.run(lambda: bool(stranger.refusals), limit=10)
        assert stranger.refusals[0].code == RefusedCode.SOURCE


async def test_a_durable_name_is_read_by_its_newest_session(
    tmp_path: Path, mock_clock: trio.testing.MockClock
) -> None:
    """Sessions promise (3), R-10-40."""
    async with World(tmp_path, seed=10) as world:
        hub = await world.hub()
        first = world.reader("reader-1", hub, ["#"], durable="desk")
        await world.run(lambda: first.subscribed, limit=5)
        second = world.reader("reader-1", hub, ["#"], durable="desk")
        await world.run(lambda: second.subscribed and first.error is not None, limit=5)
        assert first.error == "durable name reader-1/desk is read by a newer session"
        sensor = world.publisher("sensor-1", hub)
        sensor.publish(5)
        await world.run(lambda: len(second.messages) == 5, limit=5)
        assert not first.messages


@pytest.mark.parametrize("durable", [None, "desk"])
@pytest.mark.parametrize("durability", ["sync", "memory"])
async def test_a_reader_sees_of_a_batch_what_its_rules_let_it_see(
    tmp_path: Path, mock_clock: trio.testing.MockClock, durable: str | None, durability: str
) -> None:
    """R-10-11, R-10-30: its filter meets one topic of a batch; the others of it are nothing to it."""
    rules = (
        AccessRule(name="all", nodes=("sensor-*", "boss"), publish=("#",), subscribe=("#",)),
        AccessRule(name="own", nodes=("guest",), subscribe=("site/a/#",)),
    )
    async with World(tmp_path, seed=11) as world:
        classes = (ClassConfig(name="telemetry", filters=("#",), lane=3, durability=durability),)
        hub = await world.hub(access=rules, classes=classes)
        guest = world.reader("guest", hub, ["site/a/+"], durable=durable)
        boss = world.reader("boss", hub, ["site/a/+"])
        await world.run(lambda: guest.subscribed and boss.subscribed, limit=5)
        sensor = world.publisher("sensor-1", hub)
        topics = ["site/a/x", "site/b/secret", "site/a/y", "site/b/secret"]
        payloads = [PAYLOAD.pack(number) for number in range(4)]
        publisher = node_id(DOMAIN, "sensor-1")
        for number, part in enumerate((slice(0, 4), slice(1, 2), slice(2, 3)), 1):
            batch = encode_batch(
                topics[part], payloads[part], time_ms=1, publisher=publisher, run=1, sequence=number
            )
            sensor.unacked[number] = encode_record(3, sensor.source, number, [batch])
        sensor.send()
        await world.run(lambda: len(guest.messages) == 3, limit=5)
        assert [topic for _, topic, _ in guest.messages] == ["site/a/x", "site/a/y", "site/a/y"]
        await world.run(lambda: len(boss.messages) >= 5, limit=5)
        assert [topic for _, topic, _ in boss.messages] == [*topics, "site/a/y"]
        assert hub.store.ledger().unexplained == 0, hub.store.ledger().explain()
