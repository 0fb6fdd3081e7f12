"""Records to put into a store, and a way to hear what became of them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import trio
from attrs import Factory, define

from stp.batch import encode_batch
from stp.records import DATA, VoidReason, encode_record, encode_void, read_record
from stpd.store.base import Append, Outcome, OutcomeKind, Stored
from stpd.store.sqlite import MIN_BUDGET, MIN_RESERVE, SqliteStore

GATEWAY = b"G" * 16
"""A node id to stand in a record's hops."""

LANE = 3


def batch(topic: str = "plant/a/temperature", payload: bytes = b"21.5", messages: int = 1) -> bytes:
    return encode_batch(
        [topic] * messages,
        [payload] * messages,
        time_ms=1_700_000_000_000,
        publisher=bytes(16),
        run=1,
        sequence=1,
    )


def published(source: bytes, number: int, *, lane: int = LANE, age_ds: int = 0, **content: object) -> bytes:
    """A publisher's record: no hops."""
    return encode_record(lane, source, number, [batch(**content)], age_ds=age_ds)  # type: ignore[arg-type]


def kept(source: bytes, number: int, *, lane: int = LANE, kind: int = DATA, **content: object) -> bytes:
    """Another keeper's record."""
    return encode_record(lane, source, number, [batch(**content)], kind=kind, hops=(GATEWAY,))  # type: ignore[arg-type]


def voided(
    source: bytes, number: int, to: int, *, lane: int = LANE, hops: tuple[bytes, ...] = (GATEWAY,)
) -> bytes:
    return encode_void(lane, source, number, to, VoidReason.EXPIRED, 1, hops)


@define
class Desk:
    """Puts records into a store and collects the answers, in the order they came."""

    store: SqliteStore
    answers: list[tuple[int, Outcome]] = Factory(list)
    """(ticket, outcome)"""
    tickets: int = 0

    def put(self, record: bytes, *, peer: str = "device-1", class_name: str = "telemetry") -> int:
        head = read_record(record)
        ticket = self.tickets
        self.tickets += 1
        self.store.append(
            Append(
                head.lane,
                record,
                head,
                not head.hops,
                peer,
                class_name,
                lambda outcome: self.answers.append((ticket, outcome)),
            )
        )
        return ticket

    async def ask(self, *records: bytes, peer: str = "device-1") -> list[Outcome]:
        """Put records and wait for what became of them."""
        tickets = [self.put(record, peer=peer) for record in records]
        await self.store.flush()
        found = dict(self.answers)
        return [found[ticket] for ticket in tickets]

    async def kinds(self, *records: bytes) -> list[OutcomeKind]:
        return [outcome.kind for outcome in await self.ask(*records)]


async def open_store(path: Path, **options: object) -> SqliteStore:
    """A small store: the least budget that is allowed, unless said otherwise."""
    settings: dict[str, object] = {"budget_bytes": 4 * MIN_BUDGET, "reserve_bytes": MIN_RESERVE, **options}
    return await SqliteStore.open(path, **settings)  # type: ignore[arg-type]


async def everything(store: SqliteStore, lane: int = LANE, pos: int = 1) -> list[Stored]:
    """All of a lane, from disk."""
    found: list[Stored] = []
    while pos <= store.last(lane):
        got = await store.read(lane, pos, 1 << 20)
        if not got:
            break
        found += got
        pos = got[-1].pos + 1
    return found


async def until(condition: Callable[[], bool], limit: float = 5.0) -> None:
    """Wait for what another thread brings about."""
    with trio.fail_after(limit):
        while not condition():
            await trio.sleep(0.002)


def let_the_writer_rest(store: SqliteStore, limit: float = 5.0) -> None:
    """Block the trio thread until the writer has done all it can: what it says of that is not heard yet."""
    deadline = time.monotonic() + limit
    while not store._writer._sleeping or store._writer._changes:
        assert time.monotonic() < deadline
        time.sleep(0.001)


def new_source() -> bytes:
    return os.urandom(16)
