"""Make before break in simulated worlds: sessions replaced under traffic, loss and reordering (protocol §9)."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import trio
import trio.testing

from stpd.schema import BUILT_IN_CLASSES, ClassConfig
from tests.daemon.library import Library
from tests.daemon.world import World
from tests.identity_kit import shared

LIVE = ClassConfig(name="live", filters=("live/#",), lane=3, durability="memory")
CLASSES = (LIVE, *BUILT_IN_CLASSES)


def conditions_of(rng: random.Random) -> dict[str, float]:
    return {
        "loss": rng.choice([0.0, 0.02, 0.08]),
        "duplicate": rng.choice([0.0, 0.03]),
        "jitter": rng.choice([0.0, 0.01, 0.04]),
        "delay": rng.choice([0.002, 0.02, 0.08]),
    }


async def all_sessions_overlap(path: Path, seed: int, *, rounds: int, messages: int) -> None:
    """A device publishes on three lanes and in a memory class through a gateway; the hub's reader has a live and a
    durable subscription. Again and again each session is replaced: the device's, the reader's two, the uplink."""
    rng = random.Random(seed)
    async with World(path, seed=seed, **conditions_of(rng)) as world:
        hub = await world.hub(classes=CLASSES)
        edge = await world.gateway("edge-1", hub, classes=CLASSES)
        device = Library(world, "sensor-1", edge)
        reader = Library(world, "reader-1", hub)
        topics = {"t": "site/t", "event": "site/event/event", "file": "bulk/file", "now": "live/now"}
        world.nursery.start_soon(reader.read, "site/#", "bulk/#", "live/#")
        kept = Library(world, "reader-1", hub)
        world.nursery.start_soon(lambda: kept.read("site/#", "bulk/#", durable="r"))
        assert edge.uplink is not None
        uplink = edge.uplink
        await world.run(
            lambda: reader.ready and kept.ready and device.ready and uplink.state == "connected", limit=60
        )
        started = [one.stats.lost for lib in (device, reader, kept) for one in lib.connections]
        for topic in topics.values():
            size = 3000 if topic.startswith("bulk") else 8
            world.nursery.start_soon(lambda t=topic, s=size: device.publish(t, messages, every=0.01, size=s))
        outcomes: list[bool | list[bool]] = []

        async def overlap(verb: object) -> None:
            outcomes.append(await verb())  # type: ignore[operator]

        for _ in range(rounds):
            await world.run_for(rng.random() * 0.3)
            world.nursery.start_soon(overlap, rng.choice([device.overlap, uplink.dial_beside]))
            world.nursery.start_soon(overlap, rng.choice([reader.overlap, kept.overlap]))

        def complete() -> bool:
            return len(outcomes) >= 2 * rounds and all(
                len(lib.arrived[topic]) >= messages
                for lib in (reader, kept)
                for topic in topics.values()
                if not (lib is kept and topic.startswith("live"))
            )

        await world.run(complete, limit=120)
        await world.run(lambda: not device.settling + reader.settling + kept.settling, limit=30)
        await world.run(
            lambda: all(one.told_moved for one in hub.sessions.peers.values() if one.successor), limit=30
        )
        await world.run_for(1.0)
        reader.check(t=messages, event=messages, file=messages, now=messages)
        kept.check(t=messages, event=messages, file=messages)
        assert all(all(one) if isinstance(one, list) else one for one in outcomes)
        lost = [one.stats.lost for lib in (device, reader, kept) for one in lib.connections]
        assert lost == started, "an overlap is no outage"
        assert hub.sessions.stats.replaced == edge.sessions.stats.replaced == 0
        left = [
            one for one in hub.sessions.peers.values() if not one.told_moved
        ]  # a CLOSE may have been lost
        assert len(left) == 4, "the gateway, both clients, and the durable reader's own"
        assert sum(one.repeats for one in kept.client.statistics().readers.values()) == 0
        world.check()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
async def test_overlaps_lose_double_and_reorder_nothing(
    tmp_path: Path, mock_clock: trio.testing.MockClock, seed: int
) -> None:
    """R-9-4, R-9-7; connection (5), moving (1), hops (5), outbox (6)."""
    await all_sessions_overlap(tmp_path, seed, rounds=4, messages=60)


@pytest.mark.many
@pytest.mark.parametrize("seed", range(100, 400))
async def test_many_overlaps_lose_double_and_reorder_nothing(
    tmp_path: Path, mock_clock: trio.testing.MockClock, seed: int
) -> None:
    await all_sessions_overlap(tmp_path, seed, rounds=12, messages=200)


@pytest.mark.slow
async def test_sessions_are_replaced_by_age_and_when_a_certificate_was_renewed(
    tmp_path: Path, mock_clock: trio.testing.MockClock
) -> None:
    """R-9-4: by themselves, in the library and in the uplink; nobody hears of an outage."""
    async with World(tmp_path, seed=21, loss=0.02, jitter=0.01) as world:
        hub = await world.hub()
        edge = await world.gateway("edge-1", hub)
        device = Library(world, "sensor-1", edge, rehandshake=15.0)
        reader = Library(world, "reader-1", hub)
        world.nursery.start_soon(reader.read, "site/#")
        uplink = edge.uplink
        assert uplink is not None
        uplink._rehandshake = lambda: 15.0
        await world.run(
            lambda: device.client.connected and uplink.state == "connected" and reader.ready, limit=30
        )
        world.nursery.start_soon(lambda: device.publish("site/t", 70, every=0.5))
        await world.run(lambda: len(reader.arrived["site/t"]) == 70, limit=50)
        (connection,) = device.connections
        assert connection.stats.moves == 1  # 35 s; after 15 s ± 10 %, seen at the next look, 10 s apart
        assert hub.sessions.stats.moved == 2
        assert reader.connections[0].stats.moves == 0
        connection.ways.contexts.identity = shared().identity("sensor-1")
        uplink.renewed()
        await world.run(lambda: connection.stats.moves == 2 and hub.sessions.stats.moved == 3, limit=25)
        assert connection.stats.lost == 0
        reader.check(t=70)
        world.check()


async def test_a_session_that_cannot_be_replaced_stands(
    tmp_path: Path, mock_clock: trio.testing.MockClock
) -> None:
    """dial_beside says False, and nothing has changed; a caller that gives up leaves nothing behind."""
    async with World(tmp_path, seed=22) as world:
        hub = await world.hub()
        device = Library(world, "sensor-1", hub)
        await world.run(lambda: device.client.connected, limit=10)
        (connection,) = device.connections
        was = connection.link
        stranger = world.net.listener("edge-1", addr=("10.9.9.9", 9000))
        found: list[bool] = []

        async def wrong() -> None:
            found.append(await connection.dial_beside(device.dial_to(stranger)))

        world.nursery.start_soon(wrong)
        await world.run(lambda: bool(found), limit=20)
        assert found == [False]

        async def give_up() -> None:
            with trio.move_on_after(0.015) as scope:
                await connection.dial_beside()
            found.append(scope.cancelled_caught)

        world.nursery.start_soon(give_up)
        await world.run(lambda: len(found) == 2, limit=20)
        assert found[1]
        await world.run_for(2.0)
        assert connection.link is was
        assert connection.stats.moves == connection.stats.lost == 0
        world.nursery.start_soon(device.publish, "site/t", 1)
        await world.run(lambda: hub.store.last(3) == 1, limit=5)


async def test_what_an_old_session_left_unanswered_goes_to_the_new_one(
    tmp_path: Path, mock_clock: trio.testing.MockClock
) -> None:
    """outbox (6), moving (3): the old path dies in the middle of the move; what it swallowed is sent again."""
    async with World(tmp_path, seed=23) as world:
        hub = await world.hub()
        edge = await world.gateway("edge-1", hub)
        device = Library(world, "sensor-1", edge)
        reader = Library(world, "reader-1", edge)
        world.nursery.start_soon(lambda: reader.read("site/#", durable="r"))
        await world.run(lambda: device.ready and reader.ready, limit=10)
        other = world.net.dialler("sensor-1", addr=("10.3.0.1", 5000))
        other.on_ready = device._on_ready
        for link in world.net.both(device.host, edge.host):
            link.loss = 1.0
        world.nursery.start_soon(device.publish, "site/t", 20)
        moved: list[bool] = []

        async def move() -> None:
            (connection,) = device.connections
            moved.append(await connection.dial_beside(device.dial_to(edge.host, by=other)))

        world.nursery.start_soon(move)
        await world.run(lambda: moved == [True], limit=10)
        assert device.connections[0].stats.lost == 0
        await world.run(lambda: len(reader.arrived["site/t"]) == 20, limit=60)
        assert device.settling == 0
        assert device.connections[0].stats.lost == 0
        reader.check(t=20)
        world.check()


async def test_a_session_whose_hello_is_overtaken_by_its_successors_settles(
    tmp_path: Path, mock_clock: trio.testing.MockClock
) -> None:
    """Two moves in a row, and the HELLO of the first is held up on the way: it ends nothing that is newer."""
    async with World(tmp_path, seed=24) as world:
        hub = await world.hub()
        device = Library(world, "sensor-1", hub)
        await world.run(lambda: device.client.connected, limit=10)
        (connection,) = device.connections
        slow = world.net.dialler("sensor-1", addr=("10.3.0.1", 5000))
        slow.on_ready = device._on_ready
        moved: list[bool] = []

        async def move_twice() -> None:
            moved.append(await connection.dial_beside(device.dial_to(hub.host, by=slow)))
            moved.append(await connection.dial_beside())

        proofs: list[bytes] = []

        def hold(data: bytes, number: int) -> list[bytes]:
            """Of its DATA packets only the first, that proves the keys, goes through: no HELLO."""
            if data[0] & 0xC0 == 0x40:
                proofs.append(data)
            return [data] if len(proofs) < 2 else []

        world.net.link(slow, hub.host).hook = hold
        world.nursery.start_soon(move_twice)
        world.nursery.start_soon(device.publish, "site/t", 50)
        await world.run(lambda: len(moved) == 2, limit=20)
        world.net.link(slow, hub.host).hook = None
        await world.run(lambda: device.settling == 0 and hub.store.last(3) > 0, limit=30)
        assert moved == [True, True]
        assert connection.stats.lost == 0
        (left,) = [one for one in hub.sessions.peers.values() if one.successor is None]
        assert connection.link is not None
        assert left.session.id == connection.link.session.id
        await world.run(lambda: not device.client._publisher.unfinished, limit=10)
        assert hub.store.ledger().unexplained == 0
