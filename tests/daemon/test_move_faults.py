"""Fault 52: a device moves to another gateway while a batch of its is not acknowledged (protocol §10.3)."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio
import trio.testing

from stp.batch import Properties, encode_batch, node_id, open_batch
from stp.link import RecordReceived
from stp.records import batches_of, encode_record
from tests.daemon.world import PAYLOAD, Keeper, Publisher, Reader, World
from tests.identity_kit import DOMAIN


class Keyed(Publisher):
    """Every message bears an idempotency key, as those do that mind a repeat."""

    def publish(self, count: int, *, size: int = 20, per_record: int = 1) -> None:
        for _ in range(count):
            self.published += 1
            number = len(self.kept) + len(self.unacked) + 1
            batch = encode_batch(
                [self.topic],
                [PAYLOAD.pack(self.published)],
                time_ms=1,
                publisher=node_id(DOMAIN, self.name),
                run=1,
                sequence=number,
                properties=[Properties(idempotency_key=b"order %d" % self.published)],
            )
            self.unacked[number] = encode_record(self.lane, self.source, number, [batch])
        self.send()

    def move(self, keeper: Keeper) -> None:
        """To another gateway, without a word to the first: as a radio does."""
        assert self.link is not None
        self.keeper = keeper
        self.link.session.abandon()
        self.link = None
        self.on_lost()


class Minding(Reader):
    """An application that drops what it has seen by its key."""

    def __init__(self, *args: object, **options: object) -> None:
        super().__init__(*args, **options)  # type: ignore[arg-type]
        self.by_key: dict[bytes, int] = {}

    def _take_record(self, event: RecordReceived) -> None:
        if event.head.kind != 1:
            for batch in batches_of(event.record, event.head):
                for found in open_batch(batch).properties:
                    assert found is not None
                    assert found.idempotency_key is not None
                    self.by_key[found.idempotency_key] = self.by_key.get(found.idempotency_key, 0) + 1
        super()._take_record(event)


@pytest.mark.parametrize("seed", range(4))
async def test_fault_52_a_device_moves_with_batches_unacknowledged(
    tmp_path: Path, mock_clock: trio.testing.MockClock, seed: int
) -> None:
    """What was not acknowledged may come twice, nothing else does, nothing is lost; the keys tell the repeats."""
    async with World(tmp_path, seed=seed, delay=0.02) as world:
        hub = await world.hub()
        first = await world.gateway("edge-1", hub)
        second = await world.gateway("edge-2", hub)
        sensor = Keyed(world, "sensor-1", first)
        world.clients.append(sensor)
        reader = Minding(world, "reader-1", hub, ["site/#"], durable="r")
        world.clients.append(reader)
        await world.run(
            lambda: reader.subscribed and sensor.link is not None and sensor.link.connected, limit=10
        )
        sensor.publish(30)
        await world.run(lambda: not sensor.unacked, limit=10)
        world.net.link(first.host, sensor.host).loss = 1.0  # its receipts do not come any more
        sensor.publish(5)
        await world.run_for(0.5)
        in_doubt = len(sensor.unacked)
        assert in_doubt == 5
        sensor.move(second)
        sensor.publish(30)
        await world.run(lambda: not sensor.unacked, limit=20)
        await world.run(lambda: len(reader.by_key) == 65, limit=20)
        await world.run_for(1.0)
        assert set(reader.by_key) == {b"order %d" % number for number in range(1, 66)}
        doubled = {key for key, times in reader.by_key.items() if times > 1}
        assert doubled == {b"order %d" % number for number in range(31, 36)}
        assert max(reader.by_key.values()) == 2
        for keeper in (hub, first, second):
            assert keeper.store.ledger().unexplained == 0, keeper.store.ledger().explain()
