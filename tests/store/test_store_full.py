"""Disks that are full or broken: nothing acknowledged is lost, what must commit does, and it mends itself
(base promises 5 and 6; writer promises 1 to 3; fault rows 35, 36, 53)."""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio
from store_kit import (
    LANE,
    Desk,
    everything,
    kept,
    let_the_writer_rest,
    new_source,
    open_store,
    published,
    until,
)

from stpd.store import reserve as reserve_module
from stpd.store import sqlite as sqlite_module
from stpd.store import writer as writer_module
from stpd.store.base import Append, Hop, OutcomeKind, StoreError
from stpd.store.changes import Result
from stpd.store.reserve import Reserve
from stpd.store.sqlite import MIN_RESERVE, SqliteStore

STORED, FULL, ERROR = OutcomeKind.STORED, OutcomeKind.FULL, OutcomeKind.ERROR
TMPFS_BYTES = 24 << 20
UPLINK = Hop("up", "uplink", lanes=(LANE,))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of TMPFS_BYTES."""
    path = tmp_path / "disk"
    path.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={TMPFS_BYTES}", "tmpfs", str(path)],
        capture_output=True,
        check=False,
    )
    if made.returncode:
        pytest.skip(f"cannot mount a small disk here: {made.stderr.decode().strip()}")
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)


async def fill_up(desk: Desk, source: bytes, first: int = 1) -> int:
    """Append records of 300 kB until one is refused; the number of the last one taken."""
    for number in range(first, first + 500):
        outcome = (await desk.ask(kept(source, number, payload=os.urandom(300_000))))[0]
        if outcome.kind is not STORED:
            return number - 1
    raise AssertionError("it never became full")


def cursor_on_disk(path: Path) -> int:
    conn = sqlite3.connect(path / "store.db")
    found = conn.execute("SELECT pos FROM cursor WHERE hop = 'up'").fetchone()
    conn.close()
    return int(found[0])


@pytest.mark.slow
@pytest.mark.real
async def test_fault_35_disk_full_then_freed(small_disk: Path) -> None:
    """Row 35: another program fills the disk, later it makes room. Recovery ≤ 5 s, nobody does anything."""
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(10 << 20))
    async with await open_store(small_disk / "s", budget_bytes=64 << 20) as store:
        desk = Desk(store)
        store.add_hop(UPLINK)
        source = new_source()
        last = await fill_up(desk, source)
        assert 10 < last < 45
        assert "disk" in store.degraded
        assert store.full
        before = [row.record for row in await everything(store)]
        assert len(before) == last
        assert await desk.kinds(kept(source, last + 1)) == [FULL]

        store.advance("up", LANE, 2, custody=2)  # promise (5)
        store.count("other", "event", received=7, refused=7)
        await until(lambda: cursor_on_disk(small_disk / "s") == 2, 3.0)
        assert store.ledger().unexplained == 0

        ballast.unlink()
        started = time.monotonic()
        await until(lambda: not store.full, 5.0)
        assert time.monotonic() - started < 5.0
        assert await desk.kinds(kept(source, last + 1)) == [STORED], (
            "the number that was refused is none that is known"
        )
        rows = [row.record for row in await everything(store)]
        assert rows[:-1] == before[-len(rows) + 1 :]
        assert store.ledger().unexplained == 0
        assert store.statistics().commit_failures >= 1
        ledger = store.ledger()
    async with await open_store(small_disk / "s", budget_bytes=64 << 20) as store:
        assert (await everything(store))[-1].number == last + 1
        assert store.ledger() == ledger, "what was refused was counted on disk too"


@pytest.mark.slow
@pytest.mark.real
async def test_fault_53_full_and_freed_from_the_top_only(small_disk: Path) -> None:
    """Row 53: no room on the disk ever comes back by itself; custody above makes it."""
    async with await open_store(small_disk / "s", budget_bytes=64 << 20) as store:
        desk = Desk(store)
        store.add_hop(UPLINK)
        source = new_source()
        sent = 0
        for _ in range(3):
            sent = await fill_up(desk, source, sent + 1)
            assert store.full
            await store.flush()
            store.advance("up", LANE, store.last(LANE), custody=store.behind("up", LANE).messages)
            await until(lambda: not store.full, 5.0)
            assert await desk.kinds(kept(source, sent + 1, payload=b"small")) == [STORED]
            sent += 1
        assert store.last(LANE) == sent
        await store.flush()
        assert store.ledger().unexplained == 0


async def test_fault_53_full_by_budget_and_freed_from_the_top(tmp_path: Path) -> None:
    async with await open_store(tmp_path, budget_bytes=8 << 20) as store:
        desk = Desk(store)
        store.add_hop(UPLINK)
        source = new_source()
        sent = 0
        for _ in range(3):
            sent = await fill_up(desk, source, sent + 1)
            assert not store.degraded, "a budget is no fault"
            await store.flush()
            store.advance("up", LANE, store.last(LANE), custody=store.behind("up", LANE).messages)
            await until(lambda: store.usage().used < 2 << 20, 5.0)
            assert not store.full
        await store.flush()
        assert store.ledger().unexplained == 0


async def test_a_disk_too_full_for_the_reserve_refuses_data_until_it_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer_module, "PROBE_INTERVAL", 0.02)
    free = 1000
    monkeypatch.setattr(reserve_module.Reserve, "free", lambda self: free)
    async with await open_store(tmp_path) as store:
        assert store.full
        assert "reserve" in store.degraded
        assert await Desk(store).kinds(published(new_source(), 1)) == [FULL]
        free = 1 << 40
        await until(lambda: not store.full)
        assert await Desk(store).kinds(published(new_source(), 1)) == [STORED]
        assert (tmp_path / "reserve").stat().st_size == MIN_RESERVE


async def test_a_failed_commit_fails_all_that_was_queued(store: SqliteStore, desk: Desk) -> None:
    """Promise (6): order survives. Nothing of a failed group may be followed by a success of what came after."""
    source = new_source()
    await desk.ask(kept(source, 1))
    conn = store._writer._committer._conn
    pages = conn.execute("PRAGMA page_count").fetchone()[0]
    conn.execute(f"PRAGMA max_page_count = {pages + 2}")
    tickets = [desk.put(kept(source, number, payload=bytes(200_000))) for number in range(2, 40)]
    await store.flush()
    answers = dict(desk.answers)
    kinds = [answers[ticket].kind for ticket in tickets]
    failed = next(n for n, kind in enumerate(kinds) if kind is not STORED)
    assert set(kinds[failed:]) <= {FULL, ERROR}
    assert [ticket for ticket, _ in desk.answers] == list(range(len(desk.answers))), "answers in order"
    assert store.ledger().unexplained == 0
    conn.execute("PRAGMA max_page_count = 100000")
    await until(lambda: not store.full)
    again = await desk.kinds(
        *(kept(source, number, payload=bytes(200_000)) for number in range(2 + failed, 40))
    )
    assert set(again) == {STORED}
    assert [row.number for row in await everything(store)] == list(range(1, 40))
    await store.flush()
    assert store.ledger().unexplained == 0
    assert sum(door.refused for door in store.ledger().doors) == 38 - failed


async def test_nothing_queued_before_the_news_is_heard_succeeds(
    store: SqliteStore, desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Writer promise (1): only the first group fails on the disk; what was queued behind it must not overtake."""
    monkeypatch.setattr(writer_module, "GROUP_RECORDS", 5)
    committer = store._writer._committer
    commit, failures = committer.commit, 0

    def failing_once(items: list[Append], *, upkeep: bool = True) -> Result:
        nonlocal failures
        if items and not failures:
            failures += 1
            exc = sqlite3.OperationalError("disk I/O error")
            exc.sqlite_errorcode = sqlite3.SQLITE_IOERR_FSYNC
            raise exc
        return commit(items, upkeep=upkeep)

    monkeypatch.setattr(committer, "commit", failing_once)
    source = new_source()
    tickets = [desk.put(kept(source, number)) for number in range(1, 31)]
    let_the_writer_rest(store)
    desk.put(kept(source, 31))
    await store.flush()
    assert [ticket for ticket, _ in desk.answers] == [*tickets, 30]
    assert {outcome.kind for _, outcome in desk.answers} == {ERROR}
    await until(lambda: not store.full)
    assert set(await desk.kinds(*(kept(source, number) for number in range(1, 32)))) == {STORED}
    assert store.statistics().errors == 5
    assert sum(door.refused for door in store.ledger().doors) == 31


async def test_a_full_queue_is_refused_and_counted(
    store: SqliteStore, desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite_module, "QUEUE_RECORDS", 3)
    source = new_source()
    kinds = await desk.kinds(*(kept(source, number) for number in range(1, 7)))
    assert sorted(kinds, key=lambda kind: kind.value) == [FULL] * 3 + [STORED] * 3
    assert store.statistics().full_queue == 3
    monkeypatch.setattr(sqlite_module, "QUEUE_BYTES", 100)
    assert await desk.kinds(kept(source, 9)) == [FULL]
    assert (store.statistics().queue_records, store.statistics().queue_bytes) == (0, 0)


async def test_a_defect_ends_the_writer_loudly(tmp_path: Path) -> None:
    """Writer promise (3)."""
    store = await open_store(tmp_path)
    desk = Desk(store)
    store._writer._committer._conn.close()
    ticket = desk.put(published(new_source(), 1))
    with trio.fail_after(5), pytest.raises(StoreError, match="writer has died"):
        await store.watch()
    await store.flush()
    assert dict(desk.answers).get(ticket) is None or dict(desk.answers)[ticket].kind is ERROR
    assert await desk.kinds(published(new_source(), 1)) == [ERROR]
    await store.aclose()


async def test_watch_ends_in_peace_when_the_store_is_closed(tmp_path: Path) -> None:
    store = await open_store(tmp_path)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(store.watch)
        await store.aclose()


# -- the reserve ----------------------------------------------------------------------------------------------


def test_the_reserve_is_real_blocks(tmp_path: Path) -> None:
    reserve = Reserve(tmp_path, 1 << 20)
    assert reserve.take()
    assert reserve.take()
    assert (tmp_path / "reserve").stat().st_blocks * 512 >= 1 << 20
    reserve.release()
    reserve.release()
    assert (tmp_path / "reserve").stat().st_blocks == 0
    assert not reserve.held
    assert Reserve(tmp_path, 1 << 20).take()
    assert Reserve(tmp_path, 1 << 20).take(), "one that is there is taken as it is"


def test_no_reserve_where_there_is_no_room_or_no_directory(tmp_path: Path) -> None:
    reserve = Reserve(tmp_path, 1 << 60)
    assert not reserve.take()
    assert (tmp_path / "reserve").stat().st_size == 0
    gone = Reserve(tmp_path / "gone", 1000)
    assert not gone.take()
    assert gone.free() == 0
    gone.release()


# -- a disk that fails ----------------------------------------------------------------------------------------

SHIM = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <unistd.h>

static int ours(int fd, const char *call) {
    char link[64], path[4096];
    const char *flag = getenv("FAIL_FLAG"), *which = getenv("FAIL_CALL");
    if (!flag || strcmp(which, call) || access(flag, F_OK)) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, path, sizeof path - 1);
    if (n < 0) return 0;
    path[n] = 0;
    return strstr(path, "store.db") != NULL;
}
int fsync(int fd) {
    if (ours(fd, "fsync")) { errno = EIO; return -1; }
    return ((int (*)(int))dlsym(RTLD_NEXT, "fsync"))(fd);
}
int fdatasync(int fd) {
    if (ours(fd, "fsync")) { errno = EIO; return -1; }
    return ((int (*)(int))dlsym(RTLD_NEXT, "fdatasync"))(fd);
}
ssize_t pwrite64(int fd, const void *data, size_t size, off64_t at) {
    if (ours(fd, "pwrite")) { errno = EIO; return -1; }
    return ((ssize_t (*)(int, const void *, size_t, off64_t))dlsym(RTLD_NEXT, "pwrite64"))(fd, data, size, at);
}
ssize_t pwrite(int fd, const void *data, size_t size, off_t at) { return pwrite64(fd, data, size, at); }
"""

APPENDER = textwrap.dedent(
    """
    import sys, trio
    sys.path.insert(0, sys.argv[2])
    from store_kit import kept
    from stp.records import read_record
    from stpd.store.base import Append
    from stpd.store.sqlite import SqliteStore

    async def main():
        async with await SqliteStore.open(sys.argv[1]) as store:
            def put(number):
                record = kept(b"K" * 16, number)
                def done(outcome):
                    print(number, outcome.kind.value, store.ledger().unexplained, flush=True)
                store.append(Append(3, record, read_record(record), False, "gw", "telemetry", done))
            for number in range(1, 1_000_000):
                put(number)
                await trio.sleep(0.005)
    trio.run(main)
    """
)


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library that makes calls on the database's files fail with EIO while a flag file exists."""
    path = tmp_path_factory.mktemp("shim")
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler to build the failing disk with")
    (path / "shim.c").write_text(SHIM)
    subprocess.run([compiler, "-shared", "-fPIC", "-o", "shim.so", "shim.c", "-ldl"], cwd=path, check=True)
    return path / "shim.so"


@pytest.mark.slow
@pytest.mark.real
@pytest.mark.parametrize("call", ["fsync", "pwrite"])
def test_fault_36_eio_is_never_taken_for_success(tmp_path: Path, shim: Path, call: str) -> None:
    """Row 36, EIO on the store's files: refused while it lasts, mended by itself, acknowledged means there."""
    flag, store = tmp_path / "fail", tmp_path / "store"
    child = subprocess.Popen(
        [sys.executable, "-c", APPENDER, str(store), str(Path(__file__).parent)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "LD_PRELOAD": str(shim), "FAIL_FLAG": str(flag), "FAIL_CALL": call},
    )
    answers: dict[int, str] = {}

    def hear(wanted: str, limit: float) -> None:
        """Read answers until there are ten of the wanted kind in a row."""
        assert child.stdout is not None
        started, row = time.monotonic(), 0
        while row < 10:
            number, kind, unexplained = child.stdout.readline().split()
            assert unexplained == "0"
            answers[int(number)] = kind
            row = row + 1 if kind in wanted.split("|") else 0
            assert time.monotonic() - started < limit, f"no {wanted} in {limit} s, but {kind}"

    try:
        hear("stored", 10.0)
        for _ in range(2):
            flag.touch()
            hear("error|full", 5.0)
            flag.unlink()
            hear("stored", 5.0)
    finally:
        child.kill()
        child.communicate()
    conn = sqlite3.connect(store / "store.db")
    there = {number for (number,) in conn.execute("SELECT number FROM record")}
    conn.close()
    assert {number for number, kind in answers.items() if kind == "stored"} <= there
    assert "error" in answers.values()
