"""What becomes of a record: adopted, taken verbatim, known already, refused (protocol §10, base promises 1, 2)."""

from __future__ import annotations

from pathlib import Path

import pytest
from store_kit import GATEWAY, LANE, Desk, batch, everything, kept, new_source, open_store, published, voided

from stp.records import (
    MAX_RECORD,
    PART,
    VOID,
    RecordHead,
    batches_of,
    check_batches,
    encode_record,
    read_record,
)
from stpd.store import seen as seen_module
from stpd.store import writer as writer_module
from stpd.store.base import MAX_RANGES, Append, OutcomeKind, Stored
from stpd.store.group import Group
from stpd.store.sqlite import SqliteStore

STORED, REPEAT, CONFLICT, RANGES = (
    OutcomeKind.STORED,
    OutcomeKind.REPEAT,
    OutcomeKind.CONFLICT,
    OutcomeKind.RANGES,
)


def head_of(stored: Stored) -> RecordHead:
    return read_record(stored.record)


# -- the first keeper adopts ----------------------------------------------------------------------------------


async def test_an_adopted_record_gets_our_source_and_the_next_number(store: SqliteStore, desk: Desk) -> None:
    """R-10-18."""
    for n in (1, 2, 3):
        assert await desk.kinds(published(new_source(), n)) == [STORED]
    rows = await everything(store)
    assert [(r.source, r.number, r.pos, r.cumulative) for r in rows] == [
        (store.store_id, 1, 1, 1),
        (store.store_id, 2, 2, 2),
        (store.store_id, 3, 3, 3),
    ]
    assert all(head_of(r).source == store.store_id and head_of(r).number == r.number for r in rows)


async def test_one_commit_groups_what_publishers_sent(store: SqliteStore, desk: Desk) -> None:
    """Also: their batches stay byte for byte, in the order they came (R-10-18)."""
    sources = [new_source() for _ in range(20)]
    records = [published(source, 1, payload=b"%d" % n) for n, source in enumerate(sources)]
    store.turn_begins()  # so that no commit takes a part of them
    tickets = [desk.put(record) for record in records]
    store.turn_ends()
    await store.flush()
    answers = dict(desk.answers)
    outcomes = [answers[ticket] for ticket in tickets]
    assert {outcome.kind for outcome in outcomes} == {STORED}
    rows = await everything(store)
    assert len(rows) == 1
    found = [one for row in rows for one in batches_of(row.record, head_of(row))]
    assert found == [batch(payload=b"%d" % n) for n in range(20)]
    for row in rows:
        check_batches(row.record, head_of(row))
        assert head_of(row).hops == ()
    assert outcomes[0].pos == 1
    assert outcomes[-1].pos == rows[-1].pos


def group_commit(store: SqliteStore, records: list[bytes], peers: list[str] | None = None) -> Group:
    """Decide records as one commit would, without the writer's thread."""
    log = store._writer._committer.log
    group = Group(log, store.store_id, 1)
    peers = peers or ["device"] * len(records)
    items = [
        Append(LANE, record, read_record(record), True, peer, "telemetry", print)
        for record, peer in zip(records, peers, strict=True)
    ]
    log.begin()
    group.decide(items)
    log.rollback()
    return group


async def test_the_greatest_age_goes_with_the_group(store: SqliteStore) -> None:
    """R-10-18."""
    group = group_commit(store, [published(new_source(), 1, age_ds=age) for age in (3, 70, 5)])
    assert [head_of(one).age_ds for one in group.stored] == [70]


async def test_a_group_is_cut_where_a_record_is_full(store: SqliteStore) -> None:
    """As few records as hold them: three of 0.4 of the limit make two."""
    payload = bytes(MAX_RECORD * 2 // 5)
    group = group_commit(store, [published(new_source(), 1, payload=payload) for _ in range(3)])
    assert [head_of(one).batches for one in group.stored] == [2, 1]
    assert all(head_of(one).body_end <= MAX_RECORD for one in group.stored)


async def test_the_largest_record_can_be_adopted(store: SqliteStore, desk: Desk) -> None:
    topic = "p/" * 250
    overhead = len(published(new_source(), 1, topic=topic, payload=b"")) - 5
    record = published(new_source(), 1, topic=topic, payload=bytes(1_048_576))
    assert len(record) - 5 == overhead + 1_048_576 <= MAX_RECORD
    assert await desk.kinds(record) == [STORED]
    assert batches_of((await everything(store))[0].record, head_of((await everything(store))[0]))


async def test_a_group_names_its_peer_only_if_there_is_one(store: SqliteStore) -> None:
    records = [published(new_source(), 1) for _ in range(2)]
    assert group_commit(store, records, ["a", "a"]).stored[0].peer == "a"
    assert group_commit(store, records, ["a", "b"]).stored[0].peer == ""


async def test_a_publishers_repeat_is_stored_once(store: SqliteStore, desk: Desk) -> None:
    """R-10-21."""
    source = new_source()
    first, second = published(source, 1), published(source, 2)
    assert await desk.kinds(first, second) == [STORED, STORED]
    last = store.last(LANE)
    repeats = await desk.ask(first, second)
    assert [(one.kind, one.pos) for one in repeats] == [(REPEAT, last)] * 2
    assert store.last(LANE) == last


async def test_a_repeat_within_one_commit_points_at_what_it_repeats(store: SqliteStore, desk: Desk) -> None:
    """The record it repeats gets its position only when the group is closed."""
    record = published(new_source(), 1)
    first, again = await desk.ask(record, record)
    assert (first.kind, again.kind) == (STORED, REPEAT)
    assert again.pos >= first.pos == 1


async def test_highest_is_per_source_and_lane(desk: Desk) -> None:
    """R-10-18."""
    source, other = new_source(), new_source()
    records = [published(source, 5), published(source, 5, lane=2), published(other, 5), published(source, 4)]
    assert await desk.kinds(*records) == [STORED, STORED, STORED, REPEAT]


async def test_a_publishers_void_only_moves_the_highest(store: SqliteStore, desk: Desk) -> None:
    """R-10-18."""
    source = new_source()
    void = voided(source, 1, 7, hops=())
    answers = await desk.ask(void, void, published(source, 7), published(source, 8))
    assert [one.kind for one in answers] == [STORED, REPEAT, REPEAT, STORED]
    assert len(await everything(store)) == 1
    assert store.ledger().doors[0].received == 2, "a void holds no messages"


async def test_numbers_of_64_bits_are_remembered(desk: Desk) -> None:
    """SQLite's integers are signed."""
    source, keeper = new_source(), new_source()
    top = (1 << 64) - 1
    assert await desk.kinds(published(source, top), published(source, top - 1)) == [STORED, REPEAT]
    assert await desk.kinds(kept(keeper, top), kept(keeper, top)) == [STORED, REPEAT]
    assert await desk.kinds(kept(keeper, top, payload=b"other")) == [CONFLICT]


async def test_what_is_remembered_outlives_a_restart(tmp_path: Path) -> None:
    """R-10-20."""
    source, keeper = new_source(), new_source()
    top = (1 << 64) - 1
    async with await open_store(tmp_path) as store:
        own = store.store_id
        assert (
            await Desk(store).kinds(published(source, 3), kept(keeper, 9), kept(keeper, top)) == [STORED] * 3
        )
    async with await open_store(tmp_path) as store:
        assert store.store_id == own
        desk = Desk(store)
        assert await desk.kinds(published(source, 3), kept(keeper, 9), kept(keeper, top)) == [REPEAT] * 3
        assert await desk.kinds(published(source, 3, payload=b"!")) == [CONFLICT]
        assert await desk.kinds(published(source, 4)) == [STORED]
        assert (await everything(store))[-1].number == 2, "numbering goes on"


async def test_memory_of_publishers_may_be_smaller_than_their_number(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(seen_module, "CACHED_PUBLISHERS", 4)
    sources = [new_source() for _ in range(12)]
    for source in sources:
        assert await desk.kinds(published(source, 1)) == [STORED]
    assert len(desk.store._writer._committer.log.seen._publishers) <= 4
    for source in sources:
        assert await desk.kinds(published(source, 1), published(source, 2)) == [REPEAT, STORED]


async def test_crcs_of_a_publishers_last_records_are_remembered(desk: Desk) -> None:
    source = new_source()
    count = seen_module.RECENT_CRCS + 5
    await desk.ask(*(published(source, n) for n in range(1, count + 1)))
    forgotten, known = published(source, 1, payload=b"x"), published(source, count - 3, payload=b"x")
    assert await desk.kinds(forgotten, known) == [REPEAT, CONFLICT]


# -- later keepers --------------------------------------------------------------------------------------------


async def test_another_keepers_record_goes_in_verbatim(store: SqliteStore, desk: Desk) -> None:
    """R-10-20."""
    source = new_source()
    records = [kept(source, 1, messages=3), kept(source, 2, kind=PART), voided(source, 3, 9)]
    answers = await desk.ask(*records)
    assert [one.kind for one in answers] == [STORED] * 3
    rows = await everything(store)
    assert [row.record for row in rows] == records
    assert [row.kind for row in rows] == [0, PART, VOID]
    assert [(row.source, row.number, row.to) for row in rows] == [
        (source, 1, 1),
        (source, 2, 2),
        (source, 3, 9),
    ]
    assert [(row.messages, row.cumulative) for row in rows] == [(3, 3), (1, 4), (0, 4)]
    assert rows[0].prefix == "plant/a/temperature"
    assert rows[0].peer == "device-1"


async def test_numbers_of_a_keeper_may_come_in_any_order_once(desk: Desk) -> None:
    """R-10-21."""
    source = new_source()
    for number in (5, 1, 3, 2, 4):
        assert await desk.kinds(kept(source, number)) == [STORED]
    for number in range(1, 6):
        assert await desk.kinds(kept(source, number)) == [REPEAT]


async def test_a_void_is_a_repeat_only_where_all_of_it_is_known(desk: Desk) -> None:
    source = new_source()
    assert await desk.kinds(kept(source, 3), voided(source, 2, 4), voided(source, 2, 4)) == [
        STORED,
        STORED,
        REPEAT,
    ]
    assert await desk.kinds(kept(source, 4), kept(source, 5)) == [REPEAT, STORED]
    assert await desk.kinds(voided(source, 10, 11), voided(source, 9, 10)) == [STORED, STORED]


@pytest.mark.parametrize("reopened", [False, True])
async def test_fault_54_same_number_other_bytes_is_a_conflict(tmp_path: Path, reopened: bool) -> None:
    """Row 54: never a receipt, never stored, whatever lane's number it is; and it is counted for the alarm.

    R-10-22.
    """
    publisher, keeper = new_source(), new_source()
    good = [published(publisher, 1), *(kept(keeper, n) for n in range(1, 40))]
    async with await open_store(tmp_path) as store:
        desk = Desk(store)
        assert set(await desk.kinds(*good)) == {STORED}
        if not reopened:
            await refuse_all(desk, publisher, keeper)
    if reopened:
        async with await open_store(tmp_path) as store:
            await refuse_all(Desk(store), publisher, keeper)


async def refuse_all(desk: Desk, publisher: bytes, keeper: bytes) -> None:
    last = desk.store.last(LANE)
    bad = [published(publisher, 1, payload=b"forged")]
    bad += [kept(keeper, n, payload=b"forged") for n in range(1, 40)]
    assert set(await desk.kinds(*bad)) == {CONFLICT}
    assert await desk.kinds(kept(keeper, 1, lane=2, payload=b"another lane")) == [STORED]
    assert desk.store.last(LANE) == last
    assert desk.store.statistics().conflicts == 40
    ledger = desk.store.ledger()
    assert sum(door.refused for door in ledger.doors) == 40
    assert ledger.unexplained == 0


async def test_a_conflict_within_one_commit_is_seen(desk: Desk) -> None:
    source = new_source()
    assert await desk.kinds(kept(source, 1), kept(source, 1, payload=b"other")) == [STORED, CONFLICT]


async def test_data_for_a_number_that_was_void_is_a_repeat(desk: Desk) -> None:
    """R-10-22."""
    source = new_source()
    assert await desk.kinds(voided(source, 1, 3), kept(source, 2), kept(source, 1)) == [
        STORED,
        REPEAT,
        REPEAT,
    ]


async def test_a_trimmed_number_is_still_a_repeat_and_no_conflict(store: SqliteStore, desk: Desk) -> None:
    from stpd.store.base import Hop

    source = new_source()
    store.add_hop(Hop("up", "uplink", lanes=(LANE,)))
    await desk.ask(kept(source, 1), kept(source, 2))
    store.advance("up", LANE, 2, custody=2)
    await store.flush()
    while store.first(LANE) <= 2:
        await store.flush()
    assert await desk.kinds(kept(source, 1, payload=b"other")) == [REPEAT]


async def test_more_holes_than_max_ranges_are_refused_not_merged(desk: Desk) -> None:
    """R-10-24."""
    source = new_source()
    odd = [kept(source, 2 * n + 1) for n in range(MAX_RANGES)]
    assert set(await desk.kinds(*odd)) == {STORED}
    assert await desk.kinds(kept(source, 2 * MAX_RANGES + 1)) == [RANGES]
    assert await desk.kinds(kept(source, 2), kept(source, 2 * MAX_RANGES + 1)) == [STORED, STORED]
    assert await desk.kinds(kept(source, 1)) == [REPEAT]
    assert desk.store.statistics().ranges_refused == 1
    assert desk.store.ledger().unexplained == 0


# -- commits --------------------------------------------------------------------------------------------------


async def test_done_comes_in_order_and_before_on_commit(store: SqliteStore, desk: Desk) -> None:
    told: list[str] = []
    store.on_commit = lambda stored: told.extend(f"{one.lane}/{one.pos}" for one in stored)
    tickets = [desk.put(kept(new_source(), 1, lane=lane)) for lane in (3, 1, 2, 3)]
    await store.flush()
    assert [ticket for ticket, _ in desk.answers] == tickets
    assert sorted(told) == ["1/1", "2/1", "3/1", "3/2"]
    assert told.index("3/1") < told.index("3/2")


async def test_many_groups_decide_everything(
    store: SqliteStore, desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More than one commit takes: a flush waits for all of them."""
    monkeypatch.setattr(writer_module, "GROUP_RECORDS", 7)
    source = new_source()
    assert await desk.kinds(*(kept(source, n) for n in range(1, 101))) == [STORED] * 100
    assert [row.number for row in await everything(store)] == list(range(1, 101))


async def test_lanes_are_apart(store: SqliteStore, desk: Desk) -> None:
    await desk.ask(*(published(new_source(), 1, lane=lane) for lane in (1, 2, 3, 4)))
    assert [store.last(lane) for lane in (1, 2, 3, 4)] == [1, 1, 1, 1]
    assert [(await everything(store, lane))[0].number for lane in (1, 2, 3, 4)] == [1, 1, 1, 1]


async def test_after_the_end_everything_is_an_error(tmp_path: Path) -> None:
    store = await open_store(tmp_path)
    desk = Desk(store)
    await desk.ask(published(new_source(), 1))
    await store.aclose()
    await store.aclose()
    assert await desk.kinds(published(new_source(), 1)) == [OutcomeKind.ERROR]


async def test_encode_record_of_the_kit_is_a_keepers() -> None:
    """The kit's own promise: with hops it is another keeper's record."""
    assert read_record(kept(new_source(), 1)).hops == (GATEWAY,)
    assert read_record(encode_record(LANE, new_source(), 1, [batch()])).hops == ()
