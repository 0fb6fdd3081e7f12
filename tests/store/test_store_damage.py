"""Bits that rot on disk: found, kept aside, never delivered as good (base promise 4, fault row 34)."""

from __future__ import annotations

import random
import re
import sqlite3
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from store_kit import LANE, Desk, everything, kept, new_source, open_store, published, until, voided

from stp.records import VOID, VoidReason, read_record
from stpd.store import commits
from stpd.store import quarantine as quarantine_module
from stpd.store.base import Hop, OutcomeKind, Stored, StoreError
from stpd.store.rows import DamagedRowError, columns_hold, make_row, read_row, void_in_place
from stpd.store.sqlite import SqliteStore

DATABASE = "store.db"
MARK = b"<<payload-of-record-%02d>>"


def sample(adopted: bool = False) -> Stored:
    source = b"S" * 16
    record = published(source, 7, messages=2) if adopted else kept(source, 7, messages=2)
    head = read_record(record)
    return Stored(LANE, 41, source, 7, 7, head.kind, head.prefix, 2, record, 1_700_000_000_000, 0.0, "gw", 99)


def test_a_row_comes_back_as_it_was() -> None:
    stored = sample()
    row = make_row(stored, False, 12345, read_record(stored.record).crc)
    assert read_row(row) == stored


@given(st.data())
def test_any_flipped_bit_of_a_row_is_found(data: st.DataObject) -> None:
    """Rows promise (1): columns, trailer, size field and body are all covered."""
    stored = sample(data.draw(st.booleans()))
    row = list(make_row(stored, False, 12345, read_record(stored.record).crc))
    place = data.draw(st.integers(0, len(row) - 1))
    value = row[place]
    if isinstance(value, int):
        row[place] = value ^ 1 << data.draw(st.integers(0, 31))
    else:
        raw = bytearray(value if isinstance(value, bytes) else value.encode())
        bit = data.draw(st.integers(0, 8 * len(raw) - 1))
        raw[bit // 8] ^= 1 << bit % 8
        row[place] = bytes(raw) if isinstance(value, bytes) else raw.decode("latin-1")
    with pytest.raises(DamagedRowError):
        read_row(tuple(row))
    void = void_in_place(tuple(row), LANE, 41, 2, 99, 5)
    assert (void.source, void.number) == (b"S" * 16, 7), "one witness is whole"
    assert read_record(void.record).reason == VoidReason.QUARANTINED


@given(
    st.lists(
        st.one_of(st.none(), st.integers(), st.binary(), st.text(), st.floats()), min_size=16, max_size=16
    )
)
def test_whatever_a_row_holds_it_is_damaged_and_nothing_else(row: list[object]) -> None:
    """Rows promise (2)."""
    with pytest.raises(DamagedRowError):
        read_row(tuple(row))
    assert not columns_hold(tuple(row))
    void = void_in_place(tuple(row), LANE, 3, 1, 2, 0)
    assert (void.number, void.record, void.damaged) == (0, b"", True)


def test_a_record_of_another_lane_is_no_witness() -> None:
    stored = sample()
    row = list(make_row(stored, False, 1, read_record(stored.record).crc))
    row[0] ^= 1
    assert void_in_place(tuple(row), LANE + 1, 41, 2, 99, 5).record == b""


# -- on a real file -------------------------------------------------------------------------------------------


async def make_store(path: Path, count: int = 12) -> tuple[bytes, list[bytes]]:
    """A store of adopted and others' records; the own source and the records in it."""
    async with await open_store(path) as store:
        desk = Desk(store)
        keeper, publisher = new_source(), new_source()
        for n in range(1, count + 1):
            payload = MARK % n * (1 if n % 3 else 2000)  # every third is longer than a page
            record = kept(keeper, n, payload=payload) if n % 2 else published(publisher, n, payload=payload)
            assert await desk.kinds(record) == [OutcomeKind.STORED]
        return store.store_id, [row.record for row in await everything(store)]


def flip(path: Path, offset: int, bit: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1 << bit]))


def record_at(path: Path, pos: int) -> bytes:
    conn = sqlite3.connect(path / DATABASE)
    found: bytes = conn.execute("SELECT record FROM record WHERE id & 0xffff = ?", (pos,)).fetchone()[0]
    conn.close()
    return found


@pytest.mark.parametrize("seed", range(40))
async def test_fault_34_a_flipped_payload_bit_is_never_delivered(tmp_path: Path, seed: int) -> None:
    """Row 34: any bit within a payload, anywhere in the file: found, named, void for its number, the rest whole."""
    _, records = await make_store(tmp_path)
    rng = random.Random(seed)
    content = (tmp_path / DATABASE).read_bytes()
    victim = rng.randrange(1, 13)
    places = [found.start() for found in re.finditer(re.escape(MARK % victim), content)]
    rng.shuffle(places)
    for place in places:  # some are leavings in pages that were rearranged
        at, bit = place + rng.randrange(len(MARK % victim)), rng.randrange(8)
        flip(tmp_path / DATABASE, at, bit)
        if record_at(tmp_path, victim) != records[victim - 1]:
            break
        flip(tmp_path / DATABASE, at, bit)
    async with await open_store(tmp_path) as store:
        store.add_hop(Hop("r", "reader", lanes=(LANE,)))
        rows = await everything(store)
        assert [row.pos for row in rows] == list(range(1, 13))
        for row, record in zip(rows, records, strict=True):
            if row.pos == victim:
                assert_void(row, read_record(record).source, read_record(record).number)
            else:
                assert row.record == record
        await store.flush()
        named = store.quarantined()
        assert [(one.lane, one.pos, one.messages) for one in named] == [(LANE, victim, 1)]
        assert named[0].reason.startswith("damaged on disk")
        assert store.statistics().damaged_rows == 1
        again = await everything(store)
        assert [row.record for row in again] == [row.record for row in rows], "the void has taken its place"
        await store.flush()
        assert len(store.quarantined()) == 1
        store.advance("r", LANE, victim, custody=victim - 1, quarantined=1)
        await store.flush()
        assert store.behind("r", LANE)[:2] == (12 - victim, sum(map(len, records[victim:])))
        store.advance("r", LANE, 12, custody=12 - victim)
        await store.flush()
        assert store.ledger().unexplained == 0
    async with await open_store(tmp_path) as store:
        assert len(store.quarantined()) == 1


def assert_void(row: Stored, source: bytes, number: int) -> None:
    head = read_record(row.record)
    assert (row.kind, row.damaged, row.messages) == (VOID, True, 1)
    assert (head.kind, head.source, head.number, head.to) == (VOID, source, number, number)
    assert (head.reason, head.messages) == (VoidReason.QUARANTINED, 1)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(60))
async def test_fault_34_any_flipped_bit_of_the_file(tmp_path: Path, seed: int) -> None:
    """Anywhere in the file, SQLite's own structures too: refused at the start, or never delivered as good."""
    _, records = await make_store(tmp_path)
    rng = random.Random(seed)
    size = (tmp_path / DATABASE).stat().st_size
    for _ in range(3):
        flip(tmp_path / DATABASE, rng.randrange(size), rng.randrange(8))
    try:
        store = await open_store(tmp_path)
    except StoreError:
        return
    try:
        rows = await everything(store)
    except StoreError:
        rows = []
    finally:
        await store.aclose()
    for row in rows:
        assert row.damaged or (row.record in records and row.record == records[row.pos - 1])


def edit(path: Path, statement: str, *values: object) -> None:
    conn = sqlite3.connect(path / DATABASE)
    conn.execute(statement, values)
    conn.commit()
    conn.close()


async def test_damaged_columns_leave_the_record_as_witness(tmp_path: Path) -> None:
    own, records = await make_store(tmp_path)
    edit(tmp_path, "UPDATE record SET sum_messages = sum_messages + 1, number = 77 WHERE id & 0xffff = 4")
    async with await open_store(tmp_path) as store:
        store.add_hop(Hop("r", "reader", lanes=(LANE,)))
        rows = await everything(store)
        assert_void(rows[3], own, read_record(records[3]).number)
        assert (rows[3].messages, rows[3].cumulative) == (1, 4), "its neighbours know"
        await store.flush()
        store.advance("r", LANE, 4, custody=3, quarantined=1)
        await store.flush()
        assert store.behind("r", LANE)[:2] == (8, sum(map(len, records[4:])))
        assert store.ledger().unexplained == 0
        assert [row.number for row in (await store.read(LANE, 4, 1))] == [read_record(records[3]).number]


async def test_first_and_last_row_have_the_lane_for_a_neighbour(tmp_path: Path) -> None:
    await make_store(tmp_path)
    edit(tmp_path, "UPDATE record SET messages = 50 WHERE id & 0xffff IN (1, 12)")
    async with await open_store(tmp_path) as store:
        rows = await everything(store)
        assert [(rows[n].damaged, rows[n].messages, rows[n].cumulative) for n in (0, 11)] == [
            (True, 1, 1),
            (True, 1, 12),
        ]


@pytest.mark.parametrize("garbage", [None, 5, b"", "text", b"x" * 100])
async def test_a_row_of_garbage_is_named_and_stepped_over(tmp_path: Path, garbage: object) -> None:
    """Both witnesses gone: there is nothing to send, and the rest goes on."""
    _, records = await make_store(tmp_path)
    edit(tmp_path, "UPDATE record SET record = ?, row_crc = 1 WHERE id & 0xffff = 5", garbage)
    async with await open_store(tmp_path) as store:
        for _ in range(2):
            rows = await everything(store)
            assert [row.record for row in rows if not row.damaged] == records[:4] + records[5:]
            assert (rows[4].number, rows[4].record, rows[4].messages, rows[4].cumulative) == (0, b"", 1, 5)
            await store.flush()
            assert [one.pos for one in store.quarantined()] == [5]


async def test_missing_rows_are_named(tmp_path: Path) -> None:
    _, records = await make_store(tmp_path)
    edit(tmp_path, "DELETE FROM record WHERE id & 0xffff IN (3, 4, 12)")
    async with await open_store(tmp_path) as store:
        rows = await everything(store)
        assert [row.pos for row in rows if row.damaged] == [3, 4, 12]
        assert [row.pos for row in rows] == list(range(1, 13))
        assert [row.record for row in rows if not row.damaged] == records[:2] + records[4:11]
        assert sum(row.messages for row in rows) == 12
        await store.flush()
        assert [one.pos for one in store.quarantined()] == [3, 4, 12]
        store.add_hop(Hop("up", "uplink", lanes=(LANE,)))
        store.advance("up", LANE, 12, custody=9, quarantined=3)
        await until(lambda: store.first(LANE) == 13)
        assert store.ledger().unexplained == 0


async def test_pages_that_sqlite_cannot_read_are_stepped_over(tmp_path: Path) -> None:
    """A leaf page of the table turned to nonsense: its rows are lost and named, the others come."""
    _, records = await make_store(tmp_path, 40)
    content = (tmp_path / DATABASE).read_bytes()
    page = content.index(MARK % 7) // 16_384 * 16_384
    with (tmp_path / DATABASE).open("r+b") as file:
        file.seek(page)
        file.write(b"\xff" * 200)
    async with await open_store(tmp_path) as store:
        rows = await everything(store)
        good = [row for row in rows if not row.damaged]
        assert [row.pos for row in rows] == list(range(1, 41))
        assert 0 < len(good) < 40
        assert all(row.record == records[row.pos - 1] for row in good)
        assert len(await Desk(store).kinds(kept(new_source(), 1, lane=2))) == 1
        store.add_hop(Hop("up", "uplink", lanes=(LANE,)))
        store.advance("up", LANE, 40, custody=len(good), quarantined=40 - len(good))
        await store.flush()
        await until(lambda: bool(store.statistics().damage) or bool(store.degraded))
        assert "malformed" in store.statistics().damage + store.degraded


async def test_trimming_that_fails_does_not_stop_data(
    store: SqliteStore, desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Damage that only trimming meets: it stops, visibly, and records still come and go."""
    monkeypatch.setattr(commits, "TRIM_INTERVAL", 0.0)
    await desk.ask(kept(new_source(), 1))

    def malformed(*_: object) -> None:
        exc = sqlite3.DatabaseError("database disk image is malformed")
        exc.sqlite_errorcode = sqlite3.SQLITE_CORRUPT
        raise exc

    monkeypatch.setattr(store._writer._committer._trimmer, "trim", malformed, raising=False)
    assert await desk.kinds(kept(new_source(), 1), kept(new_source(), 1)) == [OutcomeKind.STORED] * 2
    assert "trimming stopped" in store.statistics().damage
    assert not store.degraded
    assert store.ledger().unexplained == 0
    assert await desk.kinds(kept(new_source(), 1)) == [OutcomeKind.STORED]


async def test_a_database_that_is_gone_is_an_error(store: SqliteStore, desk: Desk, tmp_path: Path) -> None:
    await desk.ask(kept(new_source(), 1))
    store._reader._path = tmp_path / "nowhere" / "store.db"
    with pytest.raises(StoreError, match="cannot read"):
        await store.read(LANE, 1, 1)
    with pytest.raises(StoreError, match="cannot read"):
        await store.find(LANE, 1)


# -- the quarantine itself ------------------------------------------------------------------------------------


async def test_what_is_quarantined_is_listed_and_kept(tmp_path: Path) -> None:
    source = new_source()
    record = kept(source, (1 << 64) - 1, messages=3)
    async with await open_store(tmp_path) as store:
        store.quarantine(record, "refused: DENIED", "hub")
        store.quarantine(b"no record", "CRC", "gw", lane=2, pos=9)
        store.quarantine(voided(source, 5, 6), "refused", "hub", lane=1)
        await store.flush()
        found = store.quarantined()
        assert [(one.id, one.lane, one.pos, one.number, one.reason) for one in found] == [
            (1, LANE, 0, (1 << 64) - 1, "refused: DENIED"),
            (2, 2, 9, 0, "CRC"),
            (3, 1, 0, 5, "refused"),
        ]
        assert (found[0].source, found[0].size, found[0].peer) == (source, len(record), "hub")
        assert [one.messages for one in found] == [3, 0, 0]
        assert store.statistics().quarantined == 3
    async with await open_store(tmp_path) as store:
        assert store.quarantined() == found


async def test_a_record_of_the_log_is_fetched_for_the_quarantine(store: SqliteStore, desk: Desk) -> None:
    """Whoever was refused may no longer have it in memory."""
    record = kept(new_source(), 8, messages=2)
    await desk.ask(kept(new_source(), 1), record)
    edit_live(store, "UPDATE record SET row_crc = 1 WHERE id & 0xffff = 1")
    for pos in (2, 1, 7):
        store.quarantine(b"", "refused", "hub", lane=LANE, pos=pos)
    await store.flush()
    found = [(one.number, one.messages, one.size) for one in store.quarantined()]
    assert found == [(8, 2, len(record)), (0, 0, 0), (0, 0, 0)]
    conn = store._writer._committer._conn
    assert conn.execute("SELECT record FROM quarantine WHERE id = 1").fetchone()[0] == record


def edit_live(store: SqliteStore, statement: str) -> None:
    conn = sqlite3.connect(store._reader._path)
    conn.execute(statement)
    conn.commit()
    conn.close()


async def test_the_quarantine_is_bounded(store: SqliteStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quarantine_module, "MAX_ENTRIES", 4)
    for n in range(7):
        store.quarantine(b"%d" % n, "test", "gw")
    await store.flush()
    assert [one.id for one in store.quarantined()] == [4, 5, 6, 7]
    monkeypatch.setattr(quarantine_module, "MAX_BYTES", 1000)
    store.quarantine(bytes(999), "test", "gw")
    store.quarantine(bytes(5000), "test", "gw")
    await store.flush()
    assert [one.size for one in store.quarantined()] == [5000], "one too large stands alone"
