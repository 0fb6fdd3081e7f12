"""What small commits say in one row, and how it gets to the tables (redo.py)."""

from __future__ import annotations

import os
import sqlite3
from pathlib import Path

import pytest
from store_kit import kept, new_source, published
from test_store_crash import Held, check_sums

from stp.records import read_record
from stpd.store import redo
from stpd.store.base import Append, Hop, OutcomeKind, StoreError
from stpd.store.changes import Move
from stpd.store.redo import CURSOR, DOOR, KEEPER, Redo, settle
from stpd.store.schema import DATABASE, FORMAT, PAGE_SIZE, open_database


def wal_pages(held: Held) -> int:
    frame = PAGE_SIZE + 24
    return (os.stat(held.path / f"{DATABASE}-wal").st_size - 32) // frame


def test_a_small_commit_touches_few_pages(tmp_path: Path) -> None:
    """A record and one row: two pages, and a third when one of the two begins a new one."""
    held, source = Held(tmp_path / "store"), new_source()
    held.commit([published(source, 1)])  # the first one carries to the tables
    before = wal_pages(held)
    for number in range(2, 22):
        held.commit([published(source, number)])
    assert wal_pages(held) - before <= 20 * 3
    held.close()


@pytest.mark.parametrize("rows", [1, 3, 256])
def test_a_crash_with_rows_to_carry(tmp_path: Path, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """(3): whoever opens the database has the whole state."""
    monkeypatch.setattr(redo, "MOST_ROWS", rows)
    held, source, other = Held(tmp_path / "store"), new_source(), new_source()
    for number in range(1, 10):
        held.commit([published(source, number), kept(other, number)])
    held.lock.release()  # and nothing is closed
    after = Held(tmp_path / "store")
    lane = after.committer.log.lanes[3]
    assert (lane.last, lane.number, lane.messages) == (18, 9, 18)
    decided = after.commit([published(source, 9), kept(other, 9)])
    assert [outcome.kind for _, outcome in decided] == [OutcomeKind.REPEAT] * 2
    after.committer.log.conn.execute("UPDATE door SET received = received - 2, repeats = repeats - 2")
    check_sums(after)
    after.close()


def test_counts_are_added_and_places_replaced(tmp_path: Path) -> None:
    """(2)"""
    conn = open_database(tmp_path / DATABASE)
    for pos in (5, 7):
        one = Redo(conn)
        conn.execute("BEGIN")
        one.put(DOOR, [("p", "event", pos, pos, 0, 0, 0)])
        one.put(CURSOR, [("up", 3, pos, pos, 0, 0, 0, 0, 0, 0, 0, 0)])
        one.put(KEEPER, [(b"\x00" * 16, 3, bytes([pos]), 9)])
        one.write()
        conn.execute("COMMIT")
        one.keep()
    assert conn.execute("SELECT count(*) FROM redo").fetchone() == (2,)
    for _ in range(2):  # (1): the second time there is nothing left to apply
        settle(conn)
        assert conn.execute("SELECT received, accepted FROM door").fetchall() == [(12, 12)]
        assert conn.execute("SELECT pos FROM cursor").fetchall() == [(7,)]
        assert conn.execute("SELECT ranges FROM keeper").fetchall() == [(b"\x07",)]
        assert conn.execute("SELECT count(*) FROM redo").fetchone() == (0,)
    conn.close()


def test_a_commit_that_fails_leaves_what_waited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held, source = Held(tmp_path / "store"), new_source()
    held.commit([published(source, 1)])
    held.commit([published(source, 2)])
    monkeypatch.setattr(redo, "MOST_ROWS", 1)
    write = Redo.write

    def fails(self: Redo) -> None:
        write(self)
        raise sqlite3.OperationalError("disk I/O error")

    monkeypatch.setattr(Redo, "write", fails)
    with pytest.raises(sqlite3.OperationalError):
        held.commit([published(source, 3)])
    monkeypatch.setattr(Redo, "write", write)
    held.commit([published(source, 3)])
    check_sums(held)
    assert held.committer.log.lanes[3].last == 3
    held.close()


def test_moves_of_cursors_survive(tmp_path: Path) -> None:
    held, source = Held(tmp_path / "store"), new_source()
    held.committer.pending.change_hop("up", Hop(name="up", kind="uplink", cursors={3: 0}, lanes=(3,)))
    held.commit([published(source, number) for number in range(1, 4)])
    held.committer.pending.move("up", 3, Move(1, custody=3))
    held.commit([published(source, 4)])
    held.lock.release()
    after = Held(tmp_path / "store")
    assert after.committer.log.cursors["up", 3].pos == 1
    after.close()


def test_format_1_is_taken_on(tmp_path: Path) -> None:
    held = Held(tmp_path / "store")
    held.commit([published(new_source(), 1)])
    held.close()
    conn = sqlite3.connect(tmp_path / "store" / DATABASE)
    conn.executescript("DROP TABLE redo; PRAGMA user_version = 1")
    conn.close()
    after = Held(tmp_path / "store")
    assert after.committer.log.conn.execute("PRAGMA user_version").fetchone() == (FORMAT,)
    after.commit([published(new_source(), 1)])
    check_sums(after)
    after.close()


@pytest.mark.parametrize(
    "body", ["", "{", '[["lane", [[1]]]]', '[["nowhere", []]]', '[["door", [[{"y": 1}]]]]']
)
def test_a_damaged_row_is_said_and_nothing_is_changed(tmp_path: Path, body: str) -> None:
    held = Held(tmp_path / "store")
    held.commit([published(new_source(), 1)])
    held.close()
    conn = sqlite3.connect(tmp_path / "store" / DATABASE)
    conn.execute("INSERT INTO redo (body) VALUES (?)", (body,))
    conn.commit()
    with pytest.raises(StoreError, match="cannot use the store"):
        Held(tmp_path / "store")
    assert conn.execute("SELECT count(*) FROM redo").fetchone() == (1,)
    conn.close()


def test_an_append_is_what_it_was(tmp_path: Path) -> None:
    """Many records in one commit go to the tables at once, and find what waited there."""
    held, source = Held(tmp_path / "store"), new_source()
    held.commit([published(source, 1)])
    held.commit([published(source, 2)])
    head = read_record(published(source, 3))
    many = [
        Append(3, record, read_record(record), True, "gw", "telemetry", print)
        for record in (published(source, number) for number in range(3, 103))
    ]
    assert head.number == 3
    held.committer.commit(many)
    assert held.committer.log.conn.execute("SELECT count(*) FROM redo").fetchone() == (0,)
    check_sums(held)
    held.close()
