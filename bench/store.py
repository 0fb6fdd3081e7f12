"""How fast the store takes records, on the disk that holds the directory given (default: a temporary one).

    python bench/store.py [directory]

Three loads: a lone record at a time (a command on a quiet gateway), large records from another keeper (a gateway
that catches up, with its custody following and so with trimming), and a thousand publishers with one message each.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import quantiles

import trio
from attrs import evolve

from stp.batch import encode_batch
from stp.records import RecordHead, encode_record, read_record
from stpd.store.base import Append, Hop, Outcome, OutcomeKind
from stpd.store.sqlite import SqliteStore

LONE = 300
BULK_BYTES = 200_000_000
WINDOW_BYTES = 8 << 20
PUBLISHERS = 1_000
PUBLISHED = 60_000


def make(
    lane: int, source: bytes, number: int, payload: bytes, topic: str, hops: tuple[bytes, ...] = ()
) -> bytes:
    batch = encode_batch([topic], [payload], time_ms=1, publisher=bytes(16), run=1, sequence=number)
    return encode_record(lane, source, number, [batch], hops=hops)


class Load:
    """Appends with a bound on what is under way."""

    def __init__(
        self, store: SqliteStore, on_stored: Callable[[Outcome], None] = lambda outcome: None
    ) -> None:
        self._store, self._on_stored = store, on_stored
        self._waiting = 0
        self._moved = trio.Event()

    def _done(self, size: int) -> Callable[[Outcome], None]:
        def done(outcome: Outcome) -> None:
            assert outcome.kind is OutcomeKind.STORED, outcome
            self._waiting -= size
            self._moved.set()
            self._on_stored(outcome)

        return done

    async def run(self, records: Iterator[tuple[bytes, RecordHead, str]], window: int) -> float:
        """Append them all; the seconds that took."""
        started = time.perf_counter()
        for record, head, peer in records:
            while self._waiting >= window:
                self._moved = trio.Event()
                await self._moved.wait()
            self._waiting += head.size
            adopt = not head.hops
            self._store.append(Append(head.lane, record, head, adopt, peer, "bench", self._done(head.size)))
        await self._store.flush()
        return time.perf_counter() - started


def _set(event: trio.Event, _: Outcome) -> None:
    event.set()


async def lone(store: SqliteStore) -> None:
    source, times = os.urandom(16), []
    for number in range(1, LONE + 1):
        record = make(1, source, number, bytes(100), "valve/7/set")
        done, started = trio.Event(), time.perf_counter()
        head = read_record(record)
        store.append(Append(1, record, head, True, "device", "bench", partial(_set, done)))
        await done.wait()
        times.append((time.perf_counter() - started) * 1000)
    middle, high = quantiles(times, n=100)[49], quantiles(times, n=100)[98]
    print(f"lone record of 100 B       p50 {middle:.2f} ms   p99 {high:.2f} ms")


async def bulk(store: SqliteStore, size: int) -> None:
    name = f"up-{size}"
    store.add_hop(Hop(name, "uplink", lanes=(4,), cursors={4: store.last(4)}))
    source, hop = os.urandom(16), os.urandom(16)
    record = make(4, source, 1, os.urandom(size), "bulk/a", (hop,))
    head = read_record(record)
    # one record under many numbers: the store trusts the head that it is given, and encoding is not its business
    records = ((record, evolve(head, number=n, to=n), "gateway") for n in range(1, BULK_BYTES // size + 1))
    took = await Load(store, lambda outcome: store.advance(name, 4, outcome.pos, custody=1)).run(
        records, WINDOW_BYTES
    )
    store.remove_hop(name)
    print(f"records of {size >> 10:4d} KiB        {BULK_BYTES / took / 1e6:.0f} MB/s")


async def publishers(store: SqliteStore) -> None:
    sources = [os.urandom(16) for _ in range(PUBLISHERS)]
    made = [
        make(3, sources[n % PUBLISHERS], n // PUBLISHERS + 1, bytes(100), f"m/{n % PUBLISHERS}/t")
        for n in range(PUBLISHED)
    ]
    records = [(record, read_record(record), f"device-{n % PUBLISHERS}") for n, record in enumerate(made)]
    before = store.last(3)
    took = await Load(store).run(iter(records), 1 << 20)
    print(
        f"{PUBLISHERS} publishers, 1 message  {PUBLISHED / took:.0f} records/s in {store.last(3) - before} rows"
    )


async def main() -> None:
    where = sys.argv[1] if len(sys.argv) > 1 else None
    with tempfile.TemporaryDirectory(dir=where) as directory:
        async with await SqliteStore.open(Path(directory) / "store", budget_bytes=2 << 30) as store:
            await lone(store)
            for size in (64 << 10, 256 << 10, 512 << 10):
                await bulk(store, size)
            await publishers(store)
            assert store.ledger().unexplained == 0
            print(f"slowest commit             {store.statistics().commit_seconds_max * 1000:.0f} ms")


if __name__ == "__main__":
    trio.run(main)
