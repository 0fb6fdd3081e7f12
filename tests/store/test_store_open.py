"""Opening a store, and refusing to (schema promises 1 and 2)."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import trio
from store_kit import LANE, Desk, everything, kept, new_source, open_store, published, voided

from stpd.store import commits
from stpd.store.base import FORGET_AFTER, OutcomeKind, StoreError, StoreFormatError, StoreInUseError
from stpd.store.schema import FORMAT
from stpd.store.sqlite import MIN_BUDGET, SqliteStore


def alter(path: Path, statement: str) -> None:
    conn = sqlite3.connect(path / "store.db")
    conn.execute(statement)
    conn.commit()
    conn.close()


async def test_a_new_store_is_empty_and_private(tmp_path: Path) -> None:
    async with await open_store(tmp_path / "a" / "b") as store:
        assert len(store.store_id) == 16
        assert (store.first(LANE), store.last(LANE)) == (1, 0)
        assert store.cached(LANE, 1, 100) == []
        assert await store.read(LANE, 1, 100) == []
        assert (store.hops, store.quarantined(), store.full, store.degraded) == ({}, [], False, "")
        files = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "a" / "b").iterdir()}
    assert set(files) >= {"store.db", "lock", "reserve"}
    assert set(files.values()) == {0o600}
    assert (tmp_path / "a" / "b").stat().st_mode & 0o777 == 0o700


async def test_every_store_has_an_id_of_its_own(tmp_path: Path) -> None:
    async with await open_store(tmp_path / "a") as one, await open_store(tmp_path / "b") as other:
        assert one.store_id != other.store_id


async def test_every_connection_says_what_durability_means(store: SqliteStore) -> None:
    """Schema promise (3): nothing else in the suite would notice a commit that is not synced."""
    await store.read(LANE, 1, 1)
    for conn in (store._writer._committer._conn, store._reader._conn):
        assert conn is not None
        settings = {
            name: conn.execute(f"PRAGMA {name}").fetchone()[0] for name in ("journal_mode", "synchronous")
        }
        assert settings == {"journal_mode": "wal", "synchronous": 2}
    assert conn.execute("PRAGMA auto_vacuum").fetchone()[0] == 2
    assert conn.execute("PRAGMA secure_delete").fetchone()[0] == 0


async def test_a_newer_format_is_refused_and_left_alone(tmp_path: Path) -> None:
    await (await open_store(tmp_path)).aclose()
    alter(tmp_path, f"PRAGMA user_version = {FORMAT + 1}")
    before = (tmp_path / "store.db").read_bytes()
    with pytest.raises(
        StoreFormatError, match=f"newer stpd .format {FORMAT + 1}, this one knows up to {FORMAT}"
    ):
        await open_store(tmp_path)
    assert (tmp_path / "store.db").read_bytes() == before


async def test_another_programs_database_is_refused(tmp_path: Path) -> None:
    alter(tmp_path, "CREATE TABLE theirs (x)")
    with pytest.raises(StoreFormatError, match="another program"):
        await open_store(tmp_path)


async def test_a_file_that_is_no_database_is_refused(tmp_path: Path) -> None:
    (tmp_path / "store.db").write_bytes(b"not a database at all" * 100)
    with pytest.raises(StoreFormatError, match=r"damaged .*move the directory aside"):
        await open_store(tmp_path)
    assert (tmp_path / "store.db").read_bytes().startswith(b"not a database")


async def test_tables_that_are_gone_are_named(tmp_path: Path) -> None:
    await (await open_store(tmp_path)).aclose()
    alter(tmp_path, "DROP TABLE meta")
    with pytest.raises(StoreError, match=r"cannot use the store in .*meta"):
        await open_store(tmp_path)


async def test_a_directory_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="file as a store"):
        await open_store(tmp_path / "file")
    (tmp_path / "dir" / "store.db").mkdir(parents=True)
    with pytest.raises(StoreError, match=r"cannot open .*store\.db"):
        await open_store(tmp_path / "dir")


async def test_a_directory_in_use_is_refused(tmp_path: Path) -> None:
    async with await open_store(tmp_path):
        with pytest.raises(StoreInUseError, match=rf"in use by process {os.getpid()}"):
            await open_store(tmp_path)
    async with await open_store(tmp_path) as again:
        assert again.last(LANE) == 0


@pytest.mark.real
async def test_another_process_is_kept_out(tmp_path: Path) -> None:
    program = textwrap.dedent(
        """
        import sys, trio
        from stpd.store.sqlite import SqliteStore
        async def main():
            async with await SqliteStore.open(sys.argv[1]):
                print("open", flush=True)
                sys.stdin.readline()
        trio.run(main)
        """
    )
    child = subprocess.Popen(  # noqa: ASYNC220 - it is waited for in a thread
        [sys.executable, "-c", program, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert child.stdout is not None
        assert await trio.to_thread.run_sync(child.stdout.readline) == b"open\n"
        with pytest.raises(StoreInUseError, match=rf"process {child.pid}"):
            await open_store(tmp_path)
    finally:
        child.kill()
        child.communicate()
    await (await open_store(tmp_path)).aclose()  # the lock died with its holder


async def test_a_store_belongs_to_a_node(tmp_path: Path) -> None:
    await (await open_store(tmp_path, node_id=b"a" * 16)).aclose()
    await (await open_store(tmp_path, node_id=b"a" * 16)).aclose()
    with pytest.raises(StoreError, match="belongs to another node"):
        await open_store(tmp_path, node_id=b"b" * 16)
    await (await open_store(tmp_path, node_id=b"a" * 16)).aclose()  # the refusal let go of the lock


async def test_a_store_from_a_backup_numbers_under_a_new_id(tmp_path: Path) -> None:
    """R-10-26."""
    async with await open_store(tmp_path) as store:
        former = store.store_id
        await Desk(store).ask(published(new_source(), 1))
    async with await open_store(tmp_path, new_id=True) as store:
        assert store.store_id != former
        await Desk(store).ask(published(new_source(), 1))
        assert [(row.source, row.number) for row in await everything(store)] == [
            (former, 1),
            (store.store_id, 1),
        ]
        own = store.store_id
    async with await open_store(tmp_path) as store:
        assert store.store_id == own


async def test_a_budget_too_small_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="too small"):
        await SqliteStore.open(tmp_path, budget_bytes=MIN_BUDGET - 1)
    with pytest.raises(StoreError, match="too small"):
        await SqliteStore.open(tmp_path, budget_bytes=MIN_BUDGET, reserve_bytes=MIN_BUDGET)


# -- sources --------------------------------------------------------------------------------------------------


async def test_a_source_belongs_to_whom_introduced_it(tmp_path: Path) -> None:
    """R-10-27."""
    source = new_source()
    async with await open_store(tmp_path) as store:
        assert store.node_of_source(source) is None
        assert store.note_source(source, "gw-1")
        assert store.note_source(source, "gw-1")
        assert not store.note_source(source, "gw-2")
        await store.flush()
    async with await open_store(tmp_path) as store:
        assert store.node_of_source(source) == "gw-1"
        assert not store.note_source(source, "gw-2")


async def test_publishers_are_forgotten_by_running_time_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seven days after the last record, counted while we run: the wall clock may say what it likes (R-10-19)."""
    old, fresh, keeper, idle = (new_source() for _ in range(4))
    monkeypatch.setattr(commits, "FORGET_INTERVAL", 0.0)
    monkeypatch.setattr(commits, "AGE_INTERVAL", 0)
    async with await open_store(tmp_path, clock=lambda: 1e9) as store:
        desk = Desk(store)
        for source in (old, keeper, idle, fresh):
            assert store.note_source(source, "gw")
        await desk.ask(published(old, 5), kept(keeper, 1), voided(keeper, 2, 3))
    async with await open_store(tmp_path, clock=lambda: 4e9) as store:
        desk = Desk(store)
        assert await desk.kinds(published(old, 5)) == [OutcomeKind.REPEAT], "the wall clock jumped by decades"
        # the repeat has made it fresh again: its last record is now
        store._writer._committer._age_base += int(FORGET_AFTER) - 10
        assert await desk.kinds(published(fresh, 1)) == [OutcomeKind.STORED]
        store._writer._committer._age_base += 20
        assert await desk.kinds(published(new_source(), 1)) == [OutcomeKind.STORED]
        await store.flush()
        assert await desk.kinds(published(fresh, 1), kept(keeper, 1)) == [OutcomeKind.REPEAT] * 2
        assert await desk.kinds(published(old, 5)) == [OutcomeKind.STORED], "forgotten: taken for new"
        assert store.node_of_source(idle) is None
        assert store.node_of_source(old) is None
        assert (store.node_of_source(fresh), store.node_of_source(keeper)) == ("gw", "gw")
        assert store.statistics().sources_forgotten >= 1
    async with await open_store(tmp_path) as store:
        assert store._writer._committer._age_base > FORGET_AFTER, "running time outlives a restart"


async def test_reading_is_from_memory_while_level(store: SqliteStore, desk: Desk) -> None:
    await desk.ask(*(kept(new_source(), 1) for _ in range(3)))
    assert [one.pos for one in store.cached(LANE, 1, 1 << 20) or []] == [1, 2, 3]
    assert [one.pos for one in store.cached(LANE, 2, 1) or []] == [2]
    assert store.cached(LANE, 4, 1) == []
    assert store.statistics().reads == 0
    assert store.statistics().cache_records == 3
    from_disk = await everything(store)
    for mine, theirs in zip(store.cached(LANE, 1, 1 << 20) or [], from_disk, strict=True):
        assert (mine.record, mine.cumulative, mine.at_ms) == (theirs.record, theirs.cumulative, theirs.at_ms)
        assert abs(mine.at - theirs.at) < 1.0


async def test_memory_is_bounded_and_the_rest_is_on_disk(tmp_path: Path) -> None:
    async with await open_store(tmp_path, cache_bytes=50_000) as store:
        desk = Desk(store)
        source = new_source()
        for number in range(1, 11):
            await desk.ask(kept(source, number, payload=bytes(20_000)))
        assert store.cached(LANE, 1, 1 << 20) is None
        assert [one.pos for one in store.cached(LANE, 9, 1 << 20) or []] == [9, 10]
        assert store.statistics().cache_bytes <= 50_000
        assert len(await everything(store)) == 10
        await desk.ask(kept(new_source(), 1, payload=bytes(60_000)))
        assert store.cached(LANE, 11, 1) is None, "one that alone is too large is not kept"
    async with await open_store(tmp_path) as store:
        assert store.cached(LANE, 1, 1) is None
        assert store.cached(LANE, 12, 1) == []
        assert [one.number for one in await store.read(LANE, 4, 1)] == [4]
        assert [one.number for one in await store.read(LANE, 4, 45_000)] == [4, 5]
