"""Cursors, what is behind them, trimming and the ledger's third equation (base promises 3 and 5)."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio.testing
from store_kit import LANE, Desk, everything, kept, let_the_writer_rest, new_source, open_store, until

from stp.records import read_record
from stpd.store import commits, trim
from stpd.store.base import Hop, OutcomeKind
from stpd.store.sqlite import MIN_BUDGET, MIN_RESERVE, SqliteStore

UPLINK = Hop("up", "uplink", lanes=(LANE,))


class Clock:
    """A wall clock that tests move."""

    def __init__(self) -> None:
        self.now = 1_700_000_000.0

    def __call__(self) -> float:
        return self.now


async def fill(desk: Desk, count: int, size: int = 100, lane: int = LANE) -> None:
    source = new_source()
    for number in range(1, count + 1):  # one commit each, so that each is a record
        assert await desk.kinds(kept(source, number, payload=bytes(size), lane=lane)) == [OutcomeKind.STORED]


# -- cursors --------------------------------------------------------------------------------------------------


async def test_a_hop_starts_where_it_says(store: SqliteStore, desk: Desk) -> None:
    await fill(desk, 5)
    store.add_hop(Hop("earliest", "reader", lanes=(LANE,)))
    store.add_hop(Hop("now", "reader", lanes=(LANE,), cursors={LANE: store.last(LANE)}))
    store.add_hop(Hop("future", "reader", lanes=(LANE,), cursors={LANE: 999}))
    assert {name: hop.cursors for name, hop in store.hops.items()} == {
        "earliest": {LANE: 0},
        "now": {LANE: 5},
        "future": {LANE: 5},
    }
    await store.flush()
    assert store.behind("earliest", LANE)[0] == 5
    assert store.behind("now", LANE)[:2] == (0, 0)
    assert store.ledger().unexplained == 0


async def test_cursors_move_forward_only_and_outlive_a_restart(tmp_path: Path) -> None:
    async with await open_store(tmp_path) as store:
        desk = Desk(store)
        store.add_hop(
            Hop("r", "reader", peer="hub", filters=("a/#",), lanes=(2, LANE), max_lag_s=60.0, max_lag_bytes=7)
        )
        await fill(desk, 6)
        store.advance("r", LANE, 2, custody=1, filtered=1)
        store.advance("r", LANE, 1, custody=1)
        store.advance("r", LANE, 4, expired=1, quarantined=1)
        store.advance("nobody", LANE, 4, custody=1)
        assert store.hops["r"].cursors == {2: 0, LANE: 4}
        await store.flush()
        before = store.ledger()
    async with await open_store(tmp_path) as store:
        hop = store.hops["r"]
        assert (hop.peer, hop.filters, hop.lanes, hop.cursors) == (
            "hub",
            ("a/#",),
            (2, LANE),
            {2: 0, LANE: 4},
        )
        assert (hop.kind, hop.max_lag_s, hop.max_lag_bytes) == ("reader", 60.0, 7)
        assert store.ledger() == before
        entry = next(one for one in before.hops if one.lane == LANE)
        assert (entry.routed, entry.custody, entry.filtered, entry.expired, entry.quarantined) == (
            6,
            1,
            1,
            1,
            1,
        )
        assert (entry.behind, before.unexplained) == (2, 0)
        assert store.behind("r", LANE).messages == 2


async def test_changing_a_hop_keeps_its_cursors(store: SqliteStore, desk: Desk) -> None:
    await fill(desk, 4)
    store.add_hop(Hop("r", "reader", lanes=(LANE, 2)))
    store.advance("r", LANE, 3, custody=3)
    await store.flush()
    store.add_hop(Hop("r", "reader", peer="new", filters=("b",), lanes=(LANE, 1), cursors={LANE: 1}))
    await store.flush()
    assert store.hops["r"].cursors == {LANE: 3, 1: 0}
    assert {(one.hop, one.lane) for one in store.ledger().hops} == {("r", LANE), ("r", 1)}
    assert store.behind("r", LANE).messages == 1
    assert store.behind("r", 2) == (0, 0, 0.0)


async def test_a_hop_made_anew_at_once_does_not_inherit(store: SqliteStore, desk: Desk) -> None:
    """What the writer still says of the old one is not taken for the new one."""
    await fill(desk, 4)
    store.add_hop(UPLINK)
    await store.flush()
    store.advance("up", LANE, 4, custody=4)
    done = desk.put(kept(new_source(), 1))
    store.remove_hop("up")
    store.remove_hop("up")
    store.add_hop(UPLINK)
    await store.flush()
    assert done == desk.answers[-1][0]
    await store.flush()
    assert store.hops["up"].cursors == {LANE: 0}
    assert store.behind("up", LANE).messages == 5
    store.advance("up", LANE, 1, custody=1)
    await store.flush()
    assert store.ledger().unexplained == 0
    assert [one.behind for one in store.ledger().hops] == [4]


async def test_stale_news_of_a_former_hop_is_not_taken_for_the_new_one(
    store: SqliteStore, desk: Desk
) -> None:
    await fill(desk, 4)
    store.add_hop(UPLINK)
    await store.flush()
    store.advance("up", LANE, 4, custody=4)
    let_the_writer_rest(store)  # it has committed that, and we have not heard of it
    store.remove_hop("up")
    store.add_hop(UPLINK)
    await trio.testing.wait_all_tasks_blocked()
    assert store.hops["up"].cursors == {LANE: 0}
    assert [one for one in store.ledger().hops if one.custody] == []
    await store.flush()
    assert store.hops["up"].cursors == {LANE: 0}
    assert store.behind("up", LANE).messages == 4


async def test_behind_knows_the_age_of_what_waits(tmp_path: Path) -> None:
    clock = Clock()
    async with await open_store(tmp_path, clock=clock) as store:
        desk = Desk(store)
        store.add_hop(Hop("r", "reader", lanes=(LANE,), max_lag_s=10.0))
        store.add_hop(Hop("fat", "reader", lanes=(LANE,), max_lag_bytes=700))
        store.add_hop(Hop("free", "reader", lanes=(LANE,)))
        await fill(desk, 1)
        clock.now += 5
        await fill(desk, 1)
        assert store.behind("r", LANE).oldest_age == pytest.approx(5.0)
        assert store.lagging() == []
        clock.now += 6
        assert store.lagging() == ["r"]
        store.advance("r", LANE, 1, custody=1)
        await store.flush()
        assert store.behind("r", LANE).oldest_age == pytest.approx(6.0)
        assert store.lagging() == []
        store.advance("r", LANE, 2, custody=1)
        await store.flush()
        assert store.behind("r", LANE) == (0, 0, 0.0)
        await fill(desk, 1)
        clock.now += 1
        assert store.behind("r", LANE).oldest_age == pytest.approx(1.0)
        assert store.lagging() == ["fat"]
    async with await open_store(tmp_path, clock=clock) as store:
        assert store.behind("r", LANE).oldest_age == pytest.approx(1.0)
        assert store.behind("fat", LANE).oldest_age == pytest.approx(12.0)


async def test_find_is_by_time(tmp_path: Path) -> None:
    clock = Clock()
    async with await open_store(tmp_path, clock=clock) as store:
        desk = Desk(store)
        for _ in range(9):
            await fill(desk, 1)
            clock.now += 10
        start = 1_700_000_000_000
        assert await store.find(LANE, start - 5) == 1
        assert [await store.find(LANE, start + 10_000 * n) for n in range(9)] == list(range(1, 10))
        assert await store.find(LANE, start + 15_000) == 3
        assert await store.find(LANE, start + 90_000) == 10
        assert await store.find(1, start) == 1


# -- trimming -------------------------------------------------------------------------------------------------


async def test_nothing_leaves_before_every_cursor_has_passed(
    store: SqliteStore, desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """R-10-37."""
    monkeypatch.setattr(commits, "TRIM_INTERVAL", 0.0)
    store.add_hop(UPLINK)
    store.add_hop(Hop("r", "reader", lanes=(LANE,)))
    await fill(desk, 5)
    store.advance("up", LANE, 4, custody=4)
    await store.flush()
    assert store.first(LANE) == 1
    store.advance("r", LANE, 2, custody=2)
    await store.flush()
    assert store.first(LANE) == 3
    store.remove_hop("r")
    await store.flush()
    assert store.first(LANE) == 5
    assert [row.pos for row in await everything(store)] == [5]
    assert [row.pos for row in await store.read(LANE, 1, 1)] == [5], "reading starts at what is left"
    assert store.usage().lanes[LANE].messages == 1
    assert store.ledger().unexplained == 0
    assert store.statistics().trimmed_records == 4


async def test_a_lane_that_nobody_reads_is_kept(
    store: SqliteStore, desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Promise (3): nobody has said that it may go."""
    monkeypatch.setattr(commits, "TRIM_INTERVAL", 0.0)
    store.add_hop(UPLINK)
    await fill(desk, 3, lane=2)
    await fill(desk, 3)
    assert store.first(2) == store.first(LANE) == 1


async def test_retention_keeps_what_everybody_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commits, "TRIM_INTERVAL", 0.0)
    clock = Clock()
    async with await open_store(tmp_path, clock=clock, retention_s=60.0) as store:
        desk = Desk(store)
        store.add_hop(Hop("r", "reader", lanes=(LANE,)))
        for _ in range(4):
            await fill(desk, 1)
            clock.now += 19
        await fill(desk, 1, lane=2)
        assert store.first(LANE) == 1, "the reader has not taken it, though it is old"
        store.advance("r", LANE, 4, custody=4)
        await store.flush()
        assert store.first(LANE) == 2, "only the first is 60 s old"
        clock.now += 5
        await fill(desk, 1, lane=1)
        assert store.first(LANE) == 3
        clock.now += 100
        await fill(desk, 1, lane=1)
        assert store.first(LANE) == 5
        assert store.first(1) == 2, "a lane without hops follows the retention"
        assert store.usage().lanes[LANE].oldest_age == 0.0


async def test_retention_is_looked_at_without_traffic(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commits, "IDLE_INTERVAL", 0.01)
    monkeypatch.setattr(commits, "TRIM_INTERVAL", 0.0)
    clock = Clock()
    async with await open_store(tmp_path, clock=clock, retention_s=60.0) as store:
        await fill(Desk(store), 3)
        clock.now += 61
        await until(lambda: store.first(LANE) == 4)


async def test_trimming_goes_on_in_slices(
    store: SqliteStore, desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trim, "SLICE_RECORDS", 3)
    store.add_hop(UPLINK)
    await fill(desk, 20)
    store.advance("up", LANE, 19, custody=19)
    await until(lambda: store.first(LANE) == 20)


async def test_the_file_does_not_grow_while_it_is_trimmed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pages are reused: 30 MiB pass through a store that never holds more than a few."""
    monkeypatch.setattr(commits, "TRIM_INTERVAL", 0.0)
    async with await open_store(tmp_path) as store:
        desk = Desk(store)
        store.add_hop(UPLINK)
        source = new_source()
        for number in range(1, 61):
            assert await desk.kinds(kept(source, number, payload=bytes(500_000))) == [OutcomeKind.STORED]
            store.advance("up", LANE, number, custody=1)
        await store.flush()
        assert store.usage().used < 4 << 20
    assert (tmp_path / "store.db").stat().st_size < 8 << 20


async def test_free_pages_go_back_to_the_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commits, "VACUUM_FREE", 0)
    monkeypatch.setattr(commits, "TRIM_INTERVAL", 0.0)
    async with await open_store(tmp_path) as store:
        await fill(Desk(store), 20, size=500_000)
        store.add_hop(Hop("up", "uplink", lanes=(LANE,), cursors={LANE: 20}))
        await store.flush()
        monkeypatch.setattr(commits, "IDLE_INTERVAL", 0.01)
        store.count("x", "y")
        await until(lambda: store.first(LANE) == 21)
        free = store._writer._committer._conn.execute
        await until(
            lambda: free("PRAGMA freelist_count").fetchone()[0] * 4 < free("PRAGMA page_count").fetchone()[0]
        )
    assert (tmp_path / "store.db").stat().st_size < 2 << 20


# -- when room is scarce --------------------------------------------------------------------------------------


async def test_retention_gives_way_when_room_is_scarce(tmp_path: Path) -> None:
    """Retention is by bytes as much as by seconds: a hub's steady state. The lane with the oldest goes first."""
    async with await open_store(tmp_path, budget_bytes=2 * MIN_BUDGET, retention_s=1e6) as store:
        desk = Desk(store)
        await fill(desk, 2, size=100_000, lane=2)
        await fill(desk, 40, size=500_000)
        await store.flush()
        assert store.last(LANE) == 40
        assert store.first(2) == 3
        assert 40 - store.first(LANE) >= 6, "what there is room for stays"
        assert not store.full


async def test_room_is_made_before_the_next_record_asks_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last commit of a burst leaves little room: trimming follows at once, not with the next commit."""
    monkeypatch.setattr(commits, "TRIM_INTERVAL", 60.0)
    monkeypatch.setattr(commits, "IDLE_INTERVAL", 60.0)
    async with await open_store(tmp_path, budget_bytes=2 * MIN_BUDGET, retention_s=1e6) as store:
        desk, source = Desk(store), new_source()
        for number in range(1, 26):  # and no flush, which would look too
            desk.put(kept(source, number, payload=bytes(500_000)))
        await until(lambda: len(desk.answers) == 25)
        trimmer = store._writer._committer._trimmer
        await until(lambda: not trimmer.scarce(store.usage().used))
        assert store.first(LANE) > 1


async def test_readers_lose_before_the_plant_stands_still(tmp_path: Path) -> None:
    """What is in custody above goes first when full; the ledger names what the reader lost (R-10-36, R-10-37)."""
    async with await open_store(tmp_path, budget_bytes=MIN_BUDGET) as store:
        desk = Desk(store)
        store.add_hop(UPLINK)
        store.add_hop(Hop("r", "reader", lanes=(LANE,)))
        source = new_source()
        for number in range(1, 41):
            assert await desk.kinds(kept(source, number, payload=bytes(500_000))) == [OutcomeKind.STORED]
            store.advance("up", LANE, number, custody=1)
            await store.flush()
        assert store.hops["r"].cursors[LANE] > 20
        ledger = store.ledger()
        lost = next(one for one in ledger.hops if one.hop == "r")
        assert lost.dropped > 20
        assert ledger.unexplained == 0
        assert store.statistics().dropped_messages == lost.dropped


async def test_a_reader_that_was_overtaken_while_reading_takes_back_what_it_took(tmp_path: Path) -> None:
    """Its advance over records that were dropped under it: they are in custody, not dropped."""
    async with await open_store(tmp_path, budget_bytes=MIN_BUDGET) as store:
        desk = Desk(store)
        store.add_hop(UPLINK)
        store.add_hop(Hop("r", "reader", lanes=(LANE,)))
        source = new_source()
        for number in range(1, 21):
            assert await desk.kinds(kept(source, number, payload=bytes(500_000))) == [OutcomeKind.STORED]
            store.advance("up", LANE, number, custody=1)
            await store.flush()
        dropped = store.hops["r"].cursors[LANE]
        assert 0 < dropped < 20
        store.advance("r", LANE, 20, custody=20)
        await store.flush()
        ledger = store.ledger()
        entry = next(one for one in ledger.hops if one.hop == "r")
        assert (entry.custody, entry.dropped, ledger.unexplained) == (20, 0, 0)


async def test_an_edge_keeps_what_a_reader_would_lose(tmp_path: Path) -> None:
    """A sleeping edge's commands are not given up for room: the store is full instead."""
    async with await open_store(tmp_path, budget_bytes=MIN_BUDGET) as store:
        desk = Desk(store)
        store.add_hop(UPLINK)
        store.add_hop(Hop("edge", "edge", lanes=(LANE,)))
        source = new_source()
        kinds = []
        for number in range(1, 21):
            kinds += await desk.kinds(kept(source, number, payload=bytes(500_000)))
            if kinds[-1] is OutcomeKind.STORED:
                store.advance("up", LANE, number, custody=1)
        await store.flush()
        assert kinds[-1] is OutcomeKind.FULL
        assert store.full or store.usage().used + 500_000 > store.usage().limit
        assert store.first(LANE) == 1
        assert store.hops["edge"].cursors == {LANE: 0}
        assert store.ledger().unexplained == 0


async def test_limits_of_budget_and_reserve_hold(tmp_path: Path) -> None:
    async with await open_store(tmp_path, budget_bytes=MIN_BUDGET) as store:
        usage = store.usage()
        assert usage.budget == MIN_BUDGET
        assert usage.limit == MIN_BUDGET - MIN_RESERVE
        assert usage.disk_free > 0
        desk = Desk(store)
        source = new_source()
        kinds = await desk.kinds(*(kept(source, n, payload=bytes(500_000)) for n in range(1, 31)))
        full = kinds.index(OutcomeKind.FULL)
        assert 8 <= full <= 12
        assert set(kinds[:full]) == {OutcomeKind.STORED}
        assert (tmp_path / "store.db").stat().st_size <= MIN_BUDGET
        assert store.statistics().full_budget == 30 - full
        assert store.ledger().unexplained == 0
        sent = read_record(kept(source, 1, payload=bytes(500_000)))
        assert sum(door.refused for door in store.ledger().doors) == (30 - full) * sent.messages
