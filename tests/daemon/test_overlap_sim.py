"""Make before break in simulated worlds: sessions replaced under traffic, loss and reordering (protocol §9)."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import trio.testing

from stpd.schema import BUILT_IN_CLASSES, ClassConfig
from tests.daemon.library import Library
from tests.daemon.world import World

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
        outcomes: list[bool] = []

        async def overlap(verb: object) -> None:
            found = await verb()  # type: ignore[operator]
            outcomes.extend(found if isinstance(found, list) else [found])

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
        await world.run_for(1.0)
        reader.check(t=messages, event=messages, file=messages, now=messages)
        kept.check(t=messages, event=messages, file=messages)
        assert all(outcomes)
        lost = [one.stats.lost for lib in (device, reader, kept) for one in lib.connections]
        assert lost == started, "an overlap is no outage"
        assert hub.sessions.stats.replaced == edge.sessions.stats.replaced == 0
        left = [
            one for one in hub.sessions.peers.values() if not one.told_moved
        ]  # a CLOSE may have been lost
        assert len(left) == 4, "the gateway, both clients, and the durable reader's own"
        assert sum(one.repeats for one in kept.client.statistics().readers.values()) == 0
        world.check()


@pytest.mark.parametrize("seed", range(3))
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
