"""Crashes and power cuts: what was acknowledged is there, once, under its number (base promises 1 and 2).

A crash is the files as they are on disk at that instant, opened again elsewhere: `Snapshots` takes them at
every statement that the writer's connection runs. What a power cut does to the write-ahead log is done to a copy.
"""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from store_kit import LANE, kept, published

from stp.batch import open_batch
from stp.records import batches_of, read_record
from stpd.store import redo
from stpd.store.base import Append, Hop, Outcome, OutcomeKind, Stored
from stpd.store.changes import Move
from stpd.store.commits import Committer
from stpd.store.rows import SELECT, read_row
from stpd.store.sqlite import MIN_BUDGET, MIN_RESERVE, open_parts
from stpd.store.tally import Tally

DONE = (OutcomeKind.STORED, OutcomeKind.REPEAT)


class Held:
    """A store without its threads: each commit is a call, and a crash is to stop calling."""

    def __init__(self, path: Path) -> None:
        self.path = path
        parts = open_parts(path, b"", MIN_BUDGET, MIN_RESERVE, 0.0, lambda: 1.7e9)
        self.lock, self.committer = parts.lock, parts.committer
        self.own = parts.options.own_source

    def commit(self, records: list[bytes]) -> list[tuple[Append, Outcome]]:
        items = []
        for record in records:
            head = read_record(record)
            items.append(Append(head.lane, record, head, not head.hops, "gw", "telemetry", print))
        return self.committer.commit(items).decided

    def rows(self) -> list[Stored]:
        conn = self.committer.log.conn
        return [read_row(row) for row in conn.execute(f"{SELECT} ORDER BY id").fetchall()]

    def close(self) -> None:
        self.committer.close()
        self.lock.release()


class Snapshots:
    """Copies of the files at every statement, with what had been acknowledged by then."""

    def __init__(self, held: Held, into: Path, pick: Callable[[int], bool] = lambda n: True) -> None:
        self.taken: list[tuple[Path, list[bytes], dict[int, bytes]]] = []
        self._held, self._into, self._pick = held, into, pick
        self._count = 0
        self.acknowledged: list[bytes] = []
        self.exposed: dict[int, bytes] = {}
        """Our own numbers that somebody may have seen, and their batches."""
        held.committer.log.conn.set_trace_callback(self._statement)

    def _statement(self, _: str) -> None:
        self._count += 1
        if self._pick(self._count):
            self.taken.append((self.take(), list(self.acknowledged), dict(self.exposed)))

    def take(self) -> Path:
        path = self._into / f"crash-{self._count}"
        path.mkdir(parents=True)
        for name in ("store.db", "store.db-wal"):
            shutil.copyfile(self._held.path / name, path / name)
        return path


def contents(held: Held) -> list[bytes]:
    """Every batch in the log, in order."""
    return [batch for row in held.rows() for batch in batches_of(row.record, read_record(row.record))]


def own_numbers(held: Held) -> dict[int, bytes]:
    return {
        row.number: b"".join(batches_of(row.record, read_record(row.record)))
        for row in held.rows()
        if row.source == held.own
    }


def scenario(seed: int) -> list[list[bytes]]:
    """Records by commit: some publishers, one keeper; every payload is unique."""
    rng = random.Random(seed)
    publishers = [rng.randbytes(16) for _ in range(3)]
    keeper = rng.randbytes(16)
    commits = []
    for number in range(1, 7):
        records = [
            published(source, number, payload=rng.randbytes(rng.choice((20, 30_000))))
            for source in publishers
        ]
        records.append(kept(keeper, number, payload=rng.randbytes(40)))
        rng.shuffle(records)
        commits.append(records)
    return commits


def play(held: Held, snapshots: Snapshots, commits: list[list[bytes]]) -> None:
    for records in commits:
        decided = held.commit(records)
        snapshots.acknowledged += [item.record for item, outcome in decided if outcome.kind in DONE]
        snapshots.exposed.update(own_numbers(held))


def check_after_crash(held: Held, acknowledged: list[bytes], commits: list[list[bytes]]) -> None:
    """Nothing acknowledged is lost; after everything is sent again, everything is there once."""
    found = contents(held)
    for record in acknowledged:
        assert batches_of(record, read_record(record))[0] in found
    for records in commits:
        assert {outcome.kind for _, outcome in held.commit(records)} <= set(DONE)
    everything = [batches_of(r, read_record(r))[0] for records in commits for r in records]
    assert sorted(contents(held)) == sorted(everything)
    assert sorted(own_numbers(held)) == list(range(1, len(own_numbers(held)) + 1))
    assert [row.pos for row in held.rows()] == list(range(1, len(held.rows()) + 1))
    check_sums(held)


def check_sums(held: Held) -> None:
    """The ledger balances with the log, and every column of sums with the rows."""
    held.committer.closing = True  # the last commit of a run leaves nothing in the table redo
    held.commit([])
    held.committer.closing = False
    assert held.committer.log.conn.execute("SELECT count(*) FROM redo").fetchone() == (0,)
    rows = held.rows()
    state = held.committer.log.lanes[LANE]
    assert [row.cumulative for row in rows] == [
        sum(r.messages for r in rows[: n + 1]) for n in range(len(rows))
    ]
    assert (state.last, state.messages) == (len(rows), sum(row.messages for row in rows))
    tally = Tally.load(held.committer.log.conn)
    for received, accepted, repeats, refused, corrupt in tally.doors.values():
        assert received == accepted + repeats + refused + corrupt
        assert accepted == state.messages


@pytest.mark.slow
@pytest.mark.parametrize(("seed", "rows"), [(0, redo.MOST_ROWS), (1, 2)])
def test_fault_32_killed_at_every_statement(
    tmp_path: Path, seed: int, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Row 32, at every boundary that the writer has; `rows` small commits go before one that carries them on."""
    monkeypatch.setattr(redo, "MOST_ROWS", rows)
    commits = scenario(seed)
    held = Held(tmp_path / "store")
    snapshots = Snapshots(held, tmp_path)
    play(held, snapshots, commits)
    assert len(snapshots.taken) > 50
    for path, acknowledged, exposed in snapshots.taken:
        after = Held(path)
        found = own_numbers(after)
        assert {number: found.get(number) for number in exposed} == exposed
        check_after_crash(after, acknowledged, commits)
        after.close()
        shutil.rmtree(path)
    held.close()


def crash_somewhere(tmp_path: Path, seed: int) -> None:
    """Expose numbers, crash, let other publishers come first: no number may carry other bytes."""
    rng = random.Random(seed)
    held = Held(tmp_path / "store")
    at = rng.randrange(10, 150)
    snapshots = Snapshots(held, tmp_path, lambda n: n == at)
    play(held, snapshots, scenario(seed))
    held.close()
    for path, acknowledged, exposed in snapshots.taken:
        after = Held(path)
        for records in scenario(seed + 1_000_000):
            after.commit(records)
        found = own_numbers(after)
        for number, batches in exposed.items():
            assert found[number] == batches
        everything = contents(after)
        assert all(batches_of(record, read_record(record))[0] in everything for record in acknowledged)
        after.close()
    shutil.rmtree(tmp_path)
    tmp_path.mkdir()


@pytest.mark.parametrize("seed", range(10))
def test_fault_50_no_other_bytes_carry_an_exposed_number(tmp_path: Path, seed: int) -> None:
    """Row 50 (R-10-25)."""
    crash_somewhere(tmp_path, seed)


@pytest.mark.many
def test_fault_50_ten_thousand_times(tmp_path: Path) -> None:
    for seed in range(10_000):
        crash_somewhere(tmp_path, seed)


# -- power cuts -----------------------------------------------------------------------------------------------


def cut(log: bytes, at: int, _: random.Random) -> bytes:
    return log[:at]


def tear(log: bytes, at: int, rng: random.Random) -> bytes:
    """A sector that the disk wrote half of."""
    return log[:at] + rng.randbytes(512) + log[at + 512 :]


def zero(log: bytes, at: int, _: random.Random) -> bytes:
    """The file system knew its length, the data never came."""
    return log[:at] + bytes(len(log) - at)


def lost_in_the_middle(log: bytes, at: int, _: random.Random) -> bytes:
    return log[:at] + bytes(min(4096, len(log) - at)) + log[at + 4096 :]


HARM = (cut, tear, zero, lost_in_the_middle)
STEP = 997


def power_cuts(tmp_path: Path, harm: Callable[[bytes, int, random.Random], bytes], stride: int) -> int:
    """Harm the write-ahead log at every `stride` × 997th byte; how often."""
    commits = scenario(7)
    held = Held(tmp_path / "store")
    whole = Snapshots(held, tmp_path, lambda n: False)
    play(held, whole, commits)
    crash = whole.take()
    rows = [row.record for row in held.rows()]
    held.close()
    log, rng, count = (crash / "store.db-wal").read_bytes(), random.Random(3), 0
    assert len(log) > 500_000
    for at in range(0, len(log), STEP * stride):
        path = tmp_path / "cut"
        path.mkdir()
        shutil.copyfile(crash / "store.db", path / "store.db")
        (path / "store.db-wal").write_bytes(harm(log, at, rng))
        after = Held(path)
        found = [row.record for row in after.rows()]
        own = after.own == held.own
        assert found == rows[: len(found)], "a committed prefix"
        assert own or not found, "a store cut down to nothing is a new store"
        check_sums(after)
        check_after_crash(after, [], commits)
        after.close()
        shutil.rmtree(path)
        count += 1
    return count


@pytest.mark.slow
@pytest.mark.parametrize("harm", HARM)
def test_fault_33_a_harmed_log_opens_to_a_committed_prefix(
    tmp_path: Path, harm: Callable[[bytes, int, random.Random], bytes]
) -> None:
    """Row 33, a sample of the offsets."""
    assert power_cuts(tmp_path, harm, 61) > 10


@pytest.mark.many
@pytest.mark.parametrize("harm", HARM)
def test_fault_33_every_997th_byte(
    tmp_path: Path, harm: Callable[[bytes, int, random.Random], bytes]
) -> None:
    assert power_cuts(tmp_path, harm, 1) > 500


# -- a real kill ----------------------------------------------------------------------------------------------

WRITER = textwrap.dedent(
    """
    import sys, trio
    sys.path.insert(0, sys.argv[2])
    from store_kit import published, kept
    from stp.records import read_record
    from stpd.store.base import Append, Hop
    from stpd.store.sqlite import SqliteStore

    async def main():
        first = int(sys.argv[3])
        async with await SqliteStore.open(sys.argv[1]) as store:
            if "up" not in store.hops:
                store.add_hop(Hop("up", "uplink", lanes=(2,)))
            def put(record, number):
                head = read_record(record)
                def done(outcome):
                    sys.stdout.write(f"{head.source[:1].decode()} {number} {outcome.kind.value}\\n")
                    sys.stdout.flush()
                store.append(Append(3, record, head, not head.hops, "gw", "telemetry", done))
            for number in range(first, first + 100_000):
                put(published(b"P" * 16, number, payload=b"%d" % number), number)
                put(kept(b"K" * 16, number, payload=b"%d" % number), number)
                await trio.sleep(0.0005)
    trio.run(main)
    """
)


def killed_writer(path: Path, first: int, after: float) -> set[tuple[str, int]]:
    """Run the writer, kill -9 it `after` seconds after its first answer; what it had acknowledged."""
    child = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path), str(Path(__file__).parent), str(first)],
        stdout=subprocess.PIPE,
    )
    assert child.stdout is not None
    lines = [child.stdout.readline()]
    time.sleep(after)
    child.send_signal(signal.SIGKILL)
    rest, _ = child.communicate()
    lines += rest.splitlines(keepends=True)
    answers = [line.decode().split() for line in lines if line.endswith(b"\n")]
    assert {kind for _, _, kind in answers} <= {"stored", "repeat"}
    return {(who, int(number)) for who, number, _ in answers}


@pytest.mark.real
@pytest.mark.slow
def test_fault_31_killed_at_random_instants(tmp_path: Path) -> None:
    """Row 31 for one store: acknowledged is there, and what is sent again is there once. No gap, no reuse."""
    rng = random.Random(31)
    first, acknowledged = 1, set()
    for _ in range(6):
        acknowledged |= killed_writer(tmp_path, first, rng.uniform(0.0, 0.15))
        first = max(1, max(number for _, number in acknowledged) - 5)  # the last few are sent again
    held = Held(tmp_path)
    rows = held.rows()
    payloads: dict[str, list[int]] = {"P": [], "K": []}
    for row in rows:
        for batch in batches_of(row.record, read_record(row.record)):
            payloads["P" if row.source == held.own else "K"] += map(int, open_batch(batch).payloads)
    for who, numbers in payloads.items():
        assert sorted(numbers) == list(range(1, max(numbers) + 1)), "each once"
        assert {number for name, number in acknowledged if name == who} <= set(numbers)
    assert payloads["P"] == sorted(payloads["P"]), "in the publisher's order"
    assert sorted(own_numbers(held)) == list(range(1, len(own_numbers(held)) + 1))
    check_sums(held)
    held.close()


# -- cursors --------------------------------------------------------------------------------------------------


def test_a_lost_advance_is_safe(tmp_path: Path) -> None:
    """A cursor that a crash sets back repeats; its counts are set back with it, so the ledger balances."""
    held = Held(tmp_path / "store")
    snapshots = Snapshots(held, tmp_path)
    held.committer.pending.change_hop("up", Hop("up", "uplink", lanes=(LANE,)))
    play(held, snapshots, scenario(1))
    held.committer.pending.move("up", LANE, Move(3, custody=4))
    held.commit([])
    held.close()
    for path, _, _ in snapshots.taken[-8:]:
        after = Held(path)
        cursor = after.committer.log.cursors["up", LANE]
        assert (cursor.pos, cursor.custody) in ((0, 0), (3, 4))
        assert cursor.messages == cursor.start + cursor.custody or cursor.pos == 3
        after.close()


def test_the_harness_would_notice(tmp_path: Path) -> None:
    """A store that forgot its last commit must fail the check."""
    commits = scenario(2)
    held = Held(tmp_path / "store")
    snapshots = Snapshots(held, tmp_path, lambda n: False)
    play(held, snapshots, commits[:3])
    early = snapshots.take()
    play(held, snapshots, commits[3:])
    held.close()
    after = Held(early)
    with pytest.raises(AssertionError):
        check_after_crash(after, snapshots.acknowledged, commits)
    after.close()
    assert isinstance(held.committer, Committer)
