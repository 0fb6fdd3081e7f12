"""Commits that the trio thread makes itself, at the end of a turn (writer promise 4)."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Callable

import pytest
from store_kit import Desk, kept, let_the_writer_rest, new_source, published

import stpd.store.writer as writer_module
from stpd.store.base import Append, OutcomeKind
from stpd.store.changes import Result
from stpd.store.sqlite import SqliteStore

STORED, ERROR = OutcomeKind.STORED, OutcomeKind.ERROR


@pytest.fixture
def fast(store: SqliteStore) -> SqliteStore:
    """A store whose disk has proved fast."""
    store._writer._commit_time = 0.0
    return store


def turn(store: SqliteStore, desk: Desk, *records: bytes) -> None:
    store.turn_begins()
    for record in records:
        desk.put(record)
    store.turn_ends()


def rested(store: SqliteStore) -> None:
    """Its thread has nothing to do, and everything that it has done is heard."""
    let_the_writer_rest(store)
    assert store._writer._told == store._writer._heard


async def test_a_turn_is_committed_before_it_ends(fast: SqliteStore, desk: Desk) -> None:
    brought: list[int] = []
    fast.on_commit = lambda stored: brought.extend(one.pos for one in stored)
    source = new_source()
    rested(fast)
    turn(fast, desk, kept(source, 1), kept(source, 2), kept(source, 2))
    assert [outcome.kind for _, outcome in desk.answers] == [STORED, STORED, OutcomeKind.REPEAT]
    assert brought == [1, 2]
    assert fast.statistics().commits_here == 1
    assert fast.usage().queued == 0
    assert fast.ledger().unexplained == 0


async def test_a_turn_without_records_commits_nothing(fast: SqliteStore) -> None:
    await fast.flush()
    before = fast.statistics().commits
    fast.turn_begins()
    fast.turn_ends()
    assert fast.statistics().commits == before


async def test_a_slow_disk_is_the_threads(store: SqliteStore, desk: Desk) -> None:
    """Nobody knows yet how fast the disk is; later, an average or a single commit may have been slow."""
    writer, source = store._writer, new_source()
    await store.flush()
    for number, (average, until) in enumerate(((writer_module.FAST_COMMIT * 2, 0.0), (0.0, float("inf"))), 1):
        writer._commit_time, writer._slow_until = average, until
        turn(store, desk, kept(source, number))
        assert desk.answers == []
        await store.flush()
        assert [outcome.kind for _, outcome in desk.answers] == [STORED]
        desk.answers.clear()
    assert store.statistics().commits_here == 0


@pytest.mark.parametrize("limit", ["HERE_BYTES", "HERE_RECORDS"])
async def test_much_is_the_threads(
    fast: SqliteStore, desk: Desk, limit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    await fast.flush()
    record = kept(new_source(), 1)
    monkeypatch.setattr(writer_module, limit, {"HERE_BYTES": len(record) - 1, "HERE_RECORDS": 0}[limit])
    turn(fast, desk, record)
    assert desk.answers == []
    await fast.flush()
    assert [outcome.kind for _, outcome in desk.answers] == [STORED]
    assert fast.statistics().commits_here == 0


async def test_results_are_heard_in_the_order_of_their_commits(fast: SqliteStore, desk: Desk) -> None:
    """What the thread has committed and this thread not yet heard of comes first, so a turn does not overtake it."""
    told = threading.Event()
    tell = fast._writer._tell

    def tell_and_say_so(result: Result, flushes: list[writer_module.Flush]) -> None:
        tell(result, flushes)
        told.set()

    await fast.flush()
    fast._writer._tell = tell_and_say_so  # type: ignore[method-assign]
    brought: list[int] = []
    fast.on_commit = lambda stored: brought.extend(one.pos for one in stored)
    source = new_source()
    desk.put(kept(source, 1))  # outside of a turn: the thread's
    assert told.wait(10.0)
    turn(fast, desk, kept(source, 2))
    assert brought == []
    await fast.flush()
    assert brought == [1, 2]


async def test_a_turn_that_fails_is_refused_like_any_other(
    fast: SqliteStore, desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    await fast.flush()
    committer = fast._writer._committer
    commit: Callable[..., Result] = committer.commit
    failures = 0

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
    turn(fast, desk, published(source, 1))
    await fast.flush()
    assert [outcome.kind for _, outcome in desk.answers] == [ERROR]
    assert fast.ledger().unexplained == 0
    desk.answers.clear()
    while fast.full:
        await fast.flush()
    turn(fast, desk, published(source, 1))
    await fast.flush()
    assert [outcome.kind for _, outcome in desk.answers] == [STORED]
