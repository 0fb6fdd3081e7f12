"""The store and a model of it in a few dictionaries, through commits, crashes and restarts (hypothesis).

A crash is the files as they are on disk, opened elsewhere; whatever was not committed is gone, in both.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from store_kit import LANE, batch, kept, published, voided
from test_store_crash import Held, Snapshots

from stp.records import batches_of, read_record
from stpd.ledger import Door, HopLane, Ledger, Node
from stpd.store import commits
from stpd.store.base import Hop, OutcomeKind
from stpd.store.changes import Move
from stpd.store.tally import Tally

PUBLISHERS = [bytes([n]) * 16 for n in (1, 2)]
KEEPERS = [bytes([n]) * 16 for n in (11, 12)]
HOPS = ("a", "b")
STORED, REPEAT, CONFLICT = OutcomeKind.STORED, OutcomeKind.REPEAT, OutcomeKind.CONFLICT


def payload(number: int, variant: int) -> bytes:
    return b"%d/%d" % (number, variant)


class StoreMachine(RuleBasedStateMachine):
    """`queue` is what the next commit takes; everything else of the model is what must be on disk."""

    @initialize()
    def start(self) -> None:
        self.monkeypatch = pytest.MonkeyPatch()
        self.monkeypatch.setattr(commits, "TRIM_INTERVAL", 0.0)
        self.root = Path(tempfile.mkdtemp(prefix="stpd-model-"))
        self.generation = 0
        self.held = Held(self.root / "0")
        self.queue: list[tuple[bytes, str, tuple[int, ...]]] = []
        self.moves: list[tuple[str, Hop | None, Move | None]] = []
        self.log: list[tuple[list[bytes], int]] = []
        self.highest: dict[bytes, tuple[int, int]] = {}
        self.known: dict[bytes, dict[int, int | None]] = {source: {} for source in KEEPERS}
        self.where: dict[tuple[bytes, int], int] = {}
        self.cursors: dict[str, HopLane] = {}
        self.positions: dict[str, int] = {}
        self.base = 0
        self.door = Door("gw", "telemetry")

    def teardown(self) -> None:
        self.held.close()
        shutil.rmtree(self.root)
        self.monkeypatch.undo()

    # -- what may happen ------------------------------------------------------------------------------------

    @rule(source=st.sampled_from(PUBLISHERS), step=st.integers(-1, 2), variant=st.integers(0, 1))
    def publish(self, source: bytes, step: int, variant: int) -> None:
        pending = [fields[1] for _, what, fields in self.queue if what == "p" and fields[0] == source[0]]
        number = max([self.highest.get(source, (0, 0))[0], *pending, 0]) + step
        if number > 0:
            record = published(source, number, payload=payload(number, variant))
            self.queue.append((record, "p", (source[0], number, variant)))

    @rule(source=st.sampled_from(KEEPERS), number=st.integers(1, 12), variant=st.integers(0, 1))
    def keep(self, source: bytes, number: int, variant: int) -> None:
        record = kept(source, number, payload=payload(number, variant))
        self.queue.append((record, "k", (source[0], number, variant)))

    @rule(source=st.sampled_from(KEEPERS), number=st.integers(1, 12), more=st.integers(0, 3))
    def void(self, source: bytes, number: int, more: int) -> None:
        self.queue.append((voided(source, number, number + more), "v", (source[0], number, number + more)))

    @rule(name=st.sampled_from(HOPS), start=st.integers(0, 20))
    def add_hop(self, name: str, start: int) -> None:
        hop = Hop(name, "edge", lanes=(LANE,), cursors={LANE: start})
        self.moves.append((name, hop, None))

    @rule(name=st.sampled_from(HOPS))
    def remove_hop(self, name: str) -> None:
        self.moves.append((name, None, None))

    @precondition(lambda self: self.cursors)
    @rule(data=st.data())
    def advance(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.cursors)))
        if any(moved == name for moved, _, _ in self.moves):
            return
        here = self.positions[name]
        pos = data.draw(st.integers(here, len(self.log)))
        messages = sum(count for _, count in self.log[here:pos])
        filtered = data.draw(st.integers(0, messages))
        self.moves.append((name, None, Move(pos, custody=messages - filtered, filtered=filtered)))

    @rule()
    def commit(self) -> None:
        pending = self.held.committer.pending
        for name, hop, move in self.moves:
            if move is not None:
                pending.move(name, LANE, move)
            else:
                pending.change_hop(name, hop)
        decided = self.held.commit([record for record, _, _ in self.queue])
        self._model_moves()
        expected = self._model_records()
        assert [outcome.kind for _, outcome in decided] == expected
        self._model_trim()
        self.queue, self.moves = [], []

    @rule(clean=st.booleans())
    def crash(self, clean: bool) -> None:
        self.generation += 1
        if clean:
            path = self.held.path
            self.held.close()
        else:
            path = Snapshots(self.held, self.root / str(self.generation)).take()
            self.held.close()
        self.held = Held(path)
        self.queue, self.moves = [], []

    # -- the model ------------------------------------------------------------------------------------------

    def _model_moves(self) -> None:
        total = sum(count for _, count in self.log)
        for name, hop, move in self.moves:
            if move is not None:
                entry = self.cursors[name]
                entry.custody += move.custody
                entry.filtered += move.filtered
                self.positions[name] = move.pos
            elif hop is None:
                self.cursors.pop(name, None)
            elif name not in self.cursors:
                pos = min(max(hop.cursors[LANE], self.base), len(self.log))
                self.cursors[name] = HopLane(
                    name, LANE, routed=sum(count for _, count in self.log[pos:]) - total
                )
                self.positions[name] = pos

    def _model_records(self) -> list[OutcomeKind]:
        kinds, adopted = [], []
        for _, what, (source, number, other) in self.queue:
            if what == "p":
                kind = self._model_publisher(bytes([source]) * 16, number, other)
                if kind is STORED:
                    adopted.append(batch(payload=payload(number, other)))
            elif what == "k":
                kind = self._model_keeper(bytes([source]) * 16, number, other)
            else:
                kind = self._model_void(bytes([source]) * 16, number, other)
            kinds.append(kind)
            if what != "v":
                self.door.received += 1
                self.door.accepted += kind is STORED
                self.door.repeats += kind is REPEAT
                self.door.refused += kind is CONFLICT
        if adopted:
            self.log.append((adopted, len(adopted)))
        return kinds

    def _model_publisher(self, source: bytes, number: int, variant: int) -> OutcomeKind:
        highest, its_variant = self.highest.get(source, (0, 0))
        if number > highest:
            self.highest[source] = (number, variant)
            return STORED
        if number == highest and variant != its_variant:
            return CONFLICT
        if number < highest:
            known = self.held.committer.log.seen._publishers[source, LANE].crcs.get(number)
            crc = read_record(published(source, number, payload=payload(number, variant))).crc
            return REPEAT if known in (None, crc) else CONFLICT
        return REPEAT

    def _model_keeper(self, source: bytes, number: int, variant: int) -> OutcomeKind:
        known = self.known[source]
        if number not in known:
            known[number] = variant
            self.log.append(([batch(payload=payload(number, variant))], 1))
            self.where[source, number] = len(self.log)
            return STORED
        theirs = known[number]
        if theirs is None or theirs == variant or self.where.get((source, number), 0) <= self.base:
            return REPEAT
        return CONFLICT

    def _model_void(self, source: bytes, number: int, to: int) -> OutcomeKind:
        known = self.known[source]
        numbers = range(number, to + 1)
        if all(one in known for one in numbers):
            return REPEAT
        for one in numbers:
            known.setdefault(one, None)
        self.log.append(([], 0))
        return STORED

    def _model_trim(self) -> None:
        if self.cursors:
            self.base = max(self.base, min(self.positions[name] for name in self.cursors))

    # -- what must hold -------------------------------------------------------------------------------------

    @invariant()
    def the_log_is_the_models(self) -> None:
        rows = self.held.rows()
        assert [row.pos for row in rows] == list(range(self.base + 1, len(self.log) + 1))
        for row, (batches, messages) in zip(rows, self.log[self.base :], strict=True):
            assert batches_of(row.record, read_record(row.record)) == batches
            assert row.messages == messages
        numbers = [row.number for row in rows if row.source == self.held.own]
        assert numbers == list(range(numbers[0], numbers[0] + len(numbers))) if numbers else True

    @invariant()
    def the_ledger_balances(self) -> None:
        log = self.held.committer.log
        tally = Tally.load(log.conn)
        doors = [Door(*key, *counts) for key, counts in tally.doors.items()]
        nodes = [Node(name, *counts) for name, counts in tally.nodes.items()]
        lane = log.lanes[LANE]
        hops = [
            HopLane(
                c.hop,
                LANE,
                lane.messages - c.start,
                c.custody,
                lane.messages - c.messages,
                0,
                c.dropped,
                c.filtered,
            )
            for c in log.cursors.values()
        ]
        assert Ledger(doors, nodes, hops).unexplained == 0
        assert doors == ([self.door] if self.door.received else [])
        assert {hop.hop: (hop.custody, hop.filtered) for hop in hops} == {
            name: (entry.custody, entry.filtered) for name, entry in self.cursors.items()
        }
        assert {c.hop: c.pos for c in log.cursors.values()} == self.positions_of_hops()

    def positions_of_hops(self) -> dict[str, int]:
        return {name: self.positions[name] for name in self.cursors}


TestStoreMachine = StoreMachine.TestCase
TestStoreMachine.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)
TestStoreMachine.pytestmark = [pytest.mark.slow]


class ManyStores(StoreMachine):
    """The same, at length."""


TestManyStores = ManyStores.TestCase
TestManyStores.settings = settings(max_examples=3_000, stateful_step_count=50, deadline=None)
TestManyStores.pytestmark = [pytest.mark.many]
