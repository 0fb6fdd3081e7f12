"""The ledger balances, or says what does not (architecture, rule 5; equations of stpd.ledger)."""

from __future__ import annotations

import json
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st
from store_kit import LANE, Desk, kept, new_source, open_store, published, voided

from stpd.ledger import Door, HopLane, Ledger, Node
from stpd.store.base import Hop
from stpd.store.sqlite import SqliteStore


def test_each_equation_is_held_apart() -> None:
    """Two mistakes of opposite sign do not cancel."""
    ledger = Ledger(
        [Door("gw", "event", received=5, accepted=1, repeats=1, refused=1, corrupt=1, pending=9)],
        [Node("event", accepted=2, originated=1, stored=1, live_only=2, no_taker=1)],
        [
            HopLane(
                "up",
                2,
                routed=20,
                custody=1,
                behind=2,
                expired=3,
                dropped=4,
                filtered=5,
                quarantined=1,
                crash=1,
            )
        ],
    )
    assert [ledger.doors[0].unexplained, ledger.nodes[0].unexplained, ledger.hops[0].unexplained] == [
        1,
        -1,
        3,
    ]
    assert ledger.unexplained == 5
    assert ledger.explain() == [
        "door gw/event: received 5 = accepted 1 + repeats 1 + refused 1 + corrupt 1 (+1)",
        "node event: accepted 2 + originated 1 = stored 1 + live only 2 + no taker 1 (-1)",
        "hop up/lane 2: routed 20 = custody 1 + behind 2 + expired 3 + dropped 4 + filtered 5 + quarantined 1"
        " + crash 1 (+3)",
    ]


def test_a_balanced_ledger_has_nothing_to_explain() -> None:
    ledger = Ledger(
        [Door("gw", "event", 4, 1, 1, 1, 1)], [Node("event", 1, 1, 1, 1, 0)], [HopLane("up", 2, 1, 1)]
    )
    assert ledger.unexplained == 0
    assert ledger.explain() == []


def test_it_is_plain_json() -> None:
    ledger = Ledger([Door("gw", "event", 4, 3)], [Node("event")], [HopLane("up", 2)])
    found = json.loads(json.dumps(ledger.to_dict()))
    assert found["unexplained"] == 1
    assert found["doors"][0] == {
        "peer": "gw", "class_name": "event", "received": 4, "accepted": 3, "repeats": 0, "refused": 0,
        "corrupt": 0, "pending": 0, "unexplained": 1,
    }  # fmt: skip
    assert found["hops"][0]["lane"] == 2
    assert found["nodes"][0]["stored"] == 0


async def test_outcomes_are_counted_with_the_data(store: SqliteStore, desk: Desk) -> None:
    source, keeper = new_source(), new_source()
    await desk.ask(published(source, 1, messages=3), kept(keeper, 1, messages=4), peer="gw")
    await desk.ask(
        published(source, 1, messages=3), kept(keeper, 1, messages=5), voided(keeper, 2, 3), peer="gw"
    )
    await desk.ask(published(new_source(), 1, messages=2), peer="")
    ledger = store.ledger()
    assert ledger.doors == [Door("gw", "telemetry", received=15, accepted=7, repeats=3, refused=5)]
    assert ledger.nodes == [Node("telemetry", accepted=7, originated=2, stored=9)]
    assert ledger.unexplained == 0


async def test_counts_outlive_a_restart(tmp_path: Path) -> None:
    async with await open_store(tmp_path) as store:
        store.count("gw", "event", received=10, accepted=4, repeats=1, refused=2, corrupt=3)
        store.count("gw", "event", received=1, accepted=1)
        store.count_node("event", accepted=5, originated=1, live_only=4, no_taker=1, stored=1)
        await Desk(store).ask(published(new_source(), 1))
        before = store.ledger()
        assert before.doors[0] == Door("gw", "event", 0, 0, 0, 0, 0) or before.unexplained == 0
    async with await open_store(tmp_path) as store:
        assert store.ledger() == before
        assert Door("gw", "event", 11, 5, 1, 2, 3) in before.doors


@given(st.lists(st.tuples(*[st.integers(0, 50)] * 5), max_size=5))
def test_unexplained_is_the_sum_of_what_is_left(rows: list[tuple[int, ...]]) -> None:
    ledger = Ledger([Door("p", str(n), *row) for n, row in enumerate(rows)])
    assert ledger.unexplained == sum(abs(row[0] - sum(row[1:])) for row in rows)
    assert len(ledger.explain()) == sum(row[0] != sum(row[1:]) for row in rows)


async def test_hop_counts_follow_the_lane(store: SqliteStore, desk: Desk) -> None:
    await desk.ask(kept(new_source(), 1, messages=5))
    store.add_hop(Hop("up", "uplink", lanes=(LANE,), cursors={LANE: 1}))
    await desk.ask(kept(new_source(), 1, messages=7))
    assert store.ledger().hops == [HopLane("up", LANE, routed=7, behind=7)]
    store.advance("up", LANE, 2, custody=4, filtered=2, dropped=1)
    await store.flush()
    assert store.ledger().hops == [HopLane("up", LANE, routed=7, custody=4, filtered=2, dropped=1)]
    store.advance("up", LANE, 3, custody=1)
    await store.flush()
    assert store.ledger().unexplained == 1, "an advance over nothing is not balanced: it shows"
