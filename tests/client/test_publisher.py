"""Batching by class, memory, refusals and sessions that end: stp.publisher and stp.outbox, without a network."""

from __future__ import annotations

import pytest

from stp.batch import Properties, node_id, open_batch
from stp.control import ClassRule
from stp.core.errors import UsageError
from stp.link import LinkEvent, ReceiptReceived, RecordReceived, RefusedReceived
from stp.outbox import RETRY_CEILING, Refused, Ticket
from stp.publisher import BATCH_BYTES, DEFAULT_CLASSES, LONERS, MessageTooLarge, Publisher
from stp.records import VOID, RefusedCode, VoidReason, batches_of, read_record
from stp.topics import TopicError
from tests.client.joined import DOMAIN, Pair

LINGER = 0.02


class Bench:
    """A publisher on a device's link, and a gateway whose records the test answers."""

    def __init__(self, **options: object) -> None:
        self.refused: list[tuple[Refused, bool]] = []
        self.publisher = Publisher(
            source=b"d" * 16,
            publisher=node_id(DOMAIN, "device"),
            run=1,
            on_refused=lambda refused, awaited: self.refused.append((refused, awaited)),
            **options,  # type: ignore[arg-type]
        )
        self.now = 0.0
        self.connect()

    def connect(self) -> None:
        """A new session; what the gateway had not answered is forgotten there."""
        self.publisher.detach()
        self.pair = Pair()
        self.received: list[RecordReceived] = []
        self.answered: set[int] = set()
        self.publisher.attach(self.pair.device, self.now)
        self.run()

    def add(self, topic: str, payload: bytes | str = b"", **options: object) -> None:
        data = payload.encode() if isinstance(payload, str) else payload
        self.publisher.add(topic, data, now=self.now, time_ms=round(self.now * 1000), **options)  # type: ignore[arg-type]

    def run(self) -> list[RecordReceived]:
        """Move everything; the records that came to the gateway."""
        seen = len(self.pair.back)
        new = [event for event in self.pair.run() if isinstance(event, RecordReceived)]
        self.received += new
        for event in self.pair.back[seen:]:
            self.hear(event)
        if any(isinstance(event, ReceiptReceived | RefusedReceived) for event in self.pair.back[seen:]):
            new += self.run()
        return new

    def hear(self, event: LinkEvent) -> None:
        match event:
            case ReceiptReceived(lane, kept, custody, ranges):
                self.publisher.on_receipt(lane, kept, custody, ranges, self.now)
            case RefusedReceived(lane, place, code, retry_ms, reason):
                self.publisher.on_refused(lane, place, code, retry_ms / 1000, reason, self.now)
            case _:
                pass

    def keep(self, *events: RecordReceived, custody: bool = True) -> None:
        for event in events:
            self.pair.gateway.settle(event.lane, event.place, custody=custody)

    def wait(self, seconds: float) -> list[RecordReceived]:
        self.now += seconds
        due = self.publisher.next_timeout()
        if due is not None and due <= self.now:
            self.publisher.handle_timeout(self.now)
        return self.run()


def payloads(event: RecordReceived) -> list[bytes]:
    return [p for batch in batches_of(event.record, event.head) for p in open_batch(batch).payloads]


def batch_of(event: RecordReceived) -> list[tuple[str, bytes]]:
    (batch,) = batches_of(event.record, read_record(event.record))
    opened = open_batch(batch)
    return list(zip(opened.topics, opened.payloads, strict=True))


class Waiter:
    """A ticket, and whether it was told."""

    def __init__(self, *, custody: bool = False) -> None:
        self.told = 0
        self.ticket = Ticket(custody, self.wake)

    def wake(self) -> None:
        self.told += 1


# -- batches ---------------------------------------------------------------------------------------------


def test_the_first_leaves_alone_and_the_rest_when_it_is_answered() -> None:
    bench = Bench()
    for n in range(5):
        bench.add("a/x", str(n))
    (first,) = bench.run()
    assert payloads(first) == [b"0"]
    bench.keep(first)
    (second,) = bench.run()
    assert payloads(second) == [b"1", b"2", b"3", b"4"]


def test_a_batch_leaves_when_its_linger_is_over() -> None:
    bench = Bench()
    for n in range(3):
        bench.add("a/x", str(n))
    bench.run()
    assert bench.publisher.due == pytest.approx(LINGER)
    assert bench.wait(LINGER - 0.001) == []
    (second,) = bench.wait(0.001)
    assert payloads(second) == [b"1", b"2"]
    assert bench.publisher.next_timeout() is None


def test_a_batch_leaves_when_it_is_full() -> None:
    bench = Bench()
    for _ in range(140):
        bench.add("a/x", bytes(1000))
    sizes = [len(payloads(event)) for event in bench.run()]
    assert sizes[0] == 1
    assert sizes[1:] == [BATCH_BYTES // 1003] * 2


def test_commands_and_events_leave_one_by_one() -> None:
    bench = Bench()
    for topic in ("cmd/x", "event/x") * 2:
        bench.add(topic)
    assert sorted((event.lane, len(payloads(event))) for event in bench.run()) == [
        (1, 1),
        (1, 1),
        (2, 1),
        (2, 1),
    ]


def test_a_run_of_messages_is_one_batch_even_of_commands() -> None:
    bench = Bench()
    for n in range(4):
        bench.add("cmd/x", str(n), more=True)
    bench.publisher.flush(bench.now)
    (one,) = bench.run()
    assert payloads(one) == [b"0", b"1", b"2", b"3"]


def test_classes_and_lanes_do_not_mix_and_do_not_wait_for_one_another() -> None:
    """R-10-2."""
    bench = Bench()
    rules = [ClassRule("fast", ("a/+",), 3), ClassRule("slow", ("#",), 3, linger_ms=500)]
    bench.publisher.sort_by(rules)
    for n in range(3):
        bench.add("a/x", f"fast {n}")
        bench.add("b/x", f"slow {n}")
    found = [payloads(event) for event in bench.run()]
    assert found == [[b"fast 0"], [b"slow 0"], [b"fast 1"], [b"fast 2"]]
    assert bench.wait(0.4) == []
    assert [payloads(event) for event in bench.wait(0.1)] == [[b"slow 1", b"slow 2"]]


def test_what_waits_leaves_by_the_old_classes_when_new_ones_are_announced() -> None:
    bench = Bench()
    for n in range(3):
        bench.add("a/x", str(n))
    bench.publisher.sort_by([ClassRule("all", ("#",), 2)])
    bench.add("a/x", "3")
    bench.publisher.on_writable(3, bench.now)
    found = [(event.lane, payloads(event)) for event in bench.run()]
    assert sorted(found) == [(2, [b"3"]), (3, [b"0"]), (3, [b"1", b"2"])]


def test_bad_classes_are_refused_and_the_old_stand() -> None:
    bench = Bench()
    with pytest.raises(TopicError):
        bench.publisher.sort_by([ClassRule("bad", ("a/#/b",), 1)])
    assert bench.publisher.lane_of("cmd/x") == 1
    bench.publisher.sort_by(DEFAULT_CLASSES)


def test_ttl_and_tombstones_part_batches() -> None:
    bench = Bench()
    bench.add("a/x", "first")
    bench.add("a/x", "1")
    bench.add("a/x", "2", ttl_ms=1000)
    bench.add("a/x", "", tombstone=True)
    bench.keep(*bench.run())
    bench.wait(LINGER)
    heads = [open_batch(batches_of(event.record, event.head)[0]).head for event in bench.received]
    assert [(head.ttl_ms, bool(head.flags & 8)) for head in heads] == [
        (0, False),
        (0, False),
        (1000, False),
        (0, True),
    ]


def test_what_no_batch_can_hold_is_refused_before_it_is_taken() -> None:
    bench = Bench()
    with pytest.raises(MessageTooLarge):
        bench.add("a/x", bytes(1024 * 1024 + 1))
    with pytest.raises(MessageTooLarge):
        wide = Properties(user=[(b"k", bytes(30_000)), (b"l", bytes(34_500))])
        bench.add("a/x", bytes(1024 * 1024), properties=wide)
    with pytest.raises(TopicError):
        bench.add("a/+", b"")
    with pytest.raises(UsageError):
        bench.publisher.add_batch(["a/x", "cmd/x"], [b"", b""], now=0.0, time_ms=0)
    assert bench.publisher.unfinished == 0
    bench.add("a/x", bytes(1024 * 1024))
    assert len(bench.run()) == 1


def test_a_lane_takes_what_its_share_holds_and_an_empty_one_anything() -> None:
    bench = Bench(memory=80_000)
    assert bench.publisher.room(3, 1024 * 1024)
    bench.add("a/x", bytes(30_000))
    assert bench.publisher.room(3, 9_000)
    assert not bench.publisher.room(3, 10_500)
    assert bench.publisher.room(1, 100_000)
    bench.keep(*bench.run())
    bench.run()
    assert bench.publisher.room(3, 1024 * 1024)
    assert bench.publisher.statistics()["telemetry"].used == 0


# -- receipts --------------------------------------------------------------------------------------------


def test_a_ticket_is_told_once_when_all_its_messages_are_kept() -> None:
    """R-10-37."""
    bench = Bench()
    waiter = Waiter()
    for n in range(4):
        bench.add("a/x", str(n), ticket=waiter.ticket)
    (first,) = bench.run()
    bench.keep(first)
    (second,) = bench.run()
    assert waiter.told == 0
    bench.keep(second)
    bench.run()
    assert (waiter.told, waiter.ticket.refused) == (1, None)


def test_custody_is_told_after_kept_and_out_of_order() -> None:
    bench = Bench()
    kept, first, second = Waiter(), Waiter(custody=True), Waiter(custody=True)
    for waiter in (kept, first, second):
        bench.add("cmd/x", ticket=waiter.ticket)
    records = bench.run()
    bench.keep(*records, custody=False)
    bench.run()
    assert (kept.told, first.told, second.told) == (1, 0, 0)
    assert bench.publisher.unfinished == 0
    assert bench.publisher.statistics()["command"].used > 0
    bench.pair.gateway.in_custody(1, 2)
    bench.run()
    assert (first.told, second.told) == (0, 1)
    bench.pair.gateway.in_custody(1, 0)
    bench.pair.gateway.in_custody(1, 1)
    bench.run()
    assert (first.told, second.told) == (1, 1)
    assert bench.publisher.statistics()["command"].used == 0


# -- refusals --------------------------------------------------------------------------------------------


def test_what_is_full_is_sent_again_in_order_after_its_pause() -> None:
    """R-10-39."""
    bench = Bench()
    for n in range(4):
        bench.add("cmd/x", str(n))
    records = bench.run()
    bench.keep(records[0])
    bench.pair.gateway.refuse(1, 1, RefusedCode.FULL, 200, "store full")
    assert not bench.pair.gateway.admit(records[2])
    assert not bench.pair.gateway.admit(records[3])
    bench.add("cmd/x", "4")
    assert bench.run() == []
    assert bench.publisher.due == pytest.approx(0.2)
    assert "FULL: store full" in bench.publisher.waits_for(1)
    assert bench.wait(0.19) == []
    again = bench.wait(0.01)
    assert [(event.head.number, payloads(event)) for event in again] == [
        (2, [b"1"]),
        (3, [b"2"]),
        (4, [b"3"]),
        (5, [b"4"]),
    ]
    bench.keep(*again)
    bench.run()
    assert bench.publisher.unfinished == 0
    assert bench.refused == []


def test_pauses_grow_while_nothing_is_kept() -> None:
    bench = Bench()
    bench.add("cmd/x")
    (one,) = bench.run()
    pauses = []
    for _ in range(9):
        bench.pair.gateway.refuse(1, one.place, RefusedCode.FULL)
        bench.run()
        due = bench.publisher.next_timeout()
        assert due is not None
        pauses.append(round(due - bench.now, 3))
        (one,) = bench.wait(due - bench.now)
    assert pauses[:3] == [0.05, 0.1, 0.2]
    assert pauses[-1] == RETRY_CEILING


def test_a_final_refusal_becomes_a_void_and_its_caller_is_told() -> None:
    """R-10-39."""
    bench = Bench()
    waiters = [Waiter() for _ in range(3)]
    for waiter in waiters:
        bench.add("cmd/x", "payload", ticket=waiter.ticket)
    records = bench.run()
    bench.pair.gateway.refuse(1, 0, RefusedCode.TOO_LARGE, 0, "limit 3 bytes")
    for event in records[1:]:
        assert not bench.pair.gateway.admit(event)
    again = bench.run()
    assert [(event.head.number, event.head.kind) for event in again] == [(1, VOID), (2, 0), (3, 0)]
    assert (again[0].head.reason, again[0].head.messages) == (VoidReason.QUARANTINED, 1)
    bench.keep(*again)
    bench.run()
    assert [waiter.told for waiter in waiters] == [1, 1, 1]
    assert [waiter.ticket.refused is not None for waiter in waiters] == [True, False, False]
    ((refused, awaited),) = bench.refused
    assert awaited
    assert (refused.code, refused.reason, refused.topic) == (4, "limit 3 bytes", "cmd/x")
    assert str(refused) == "cmd/x was refused: TOO_LARGE: limit 3 bytes"
    statistics = bench.publisher.statistics()["command"]
    assert (statistics.kept, statistics.refused, statistics.waiting, statistics.used) == (2, 1, 0, 0)


def answer_all(bench: Bench, denied: str) -> list[tuple[str, bytes]]:
    """A gateway that denies whatever batch has the topic; what it took."""
    taken: list[tuple[str, bytes]] = []
    bench.run()
    records = [event for event in bench.received if event.place not in bench.answered]
    while records:
        for event in records:
            bench.answered.add(event.place)
            if not bench.pair.gateway.admit(event):
                continue
            if event.head.kind == VOID:
                bench.keep(event)
            elif any(topic == denied for topic, _ in batch_of(event)):
                bench.pair.gateway.refuse(event.lane, event.place, RefusedCode.DENIED, 0, "rule west")
            else:
                taken += batch_of(event)
                bench.keep(event)
        records = bench.run()
    return taken


def test_a_denied_batch_of_several_topics_is_halved_until_only_the_denied_falls() -> None:
    bench = Bench()
    waiters = [Waiter() for _ in range(20)]
    everything = Waiter()
    sent = [("b/x" if n in (3, 4, 11) else f"a/{n % 3}", b"%d" % n) for n in range(20)]
    bench.add("a/0", "first")
    for (topic, payload), waiter in zip(sent, waiters, strict=True):
        bench.add(topic, payload, ticket=waiter.ticket)
    for n in range(20, 24):
        bench.add("a/later", b"%d" % n, ticket=everything.ticket)
    taken = answer_all(bench, "b/x")
    assert taken[1:] == [pair for pair in sent if pair[0] != "b/x"] + [
        ("a/later", b"%d" % n) for n in range(20, 24)
    ]
    assert [waiter.told for waiter in waiters] == [1] * 20
    assert [n for n, waiter in enumerate(waiters) if waiter.ticket.refused] == [3, 4, 11]
    assert everything.told == 1
    assert bench.publisher.unfinished == 0
    # From now on the denied topic travels alone: nothing has to be halved for it again.
    bench.add("a/0", "in flight")
    for topic in ("a/1", "b/x", "a/2"):
        bench.add(topic)
    before = len(bench.received)
    answer_all(bench, "b/x")
    data = [batch_of(event) for event in bench.received[before:] if event.head.kind != VOID]
    assert all(len({topic for topic, _ in batch}) == 1 or ("b/x", b"") not in batch for batch in data)


def test_what_may_be_known_from_an_earlier_session_keeps_its_numbers() -> None:
    """Then a mixed batch falls as a whole: new numbers could be taken for repeats."""
    bench = Bench()
    bench.add("a/0", "first")
    for topic in ("a/1", "b/x"):
        bench.add(topic, topic)
    bench.keep(*bench.run())
    bench.run()
    bench.connect()  # the second batch may or may not have been accepted on the session that is gone
    answer_all(bench, "b/x")
    assert [refused.messages for refused, _ in bench.refused] == [2]
    assert bench.publisher.unfinished == 0


def test_loners_are_bounded() -> None:
    bench = Bench()
    for n in range(LONERS + 10):
        bench.publisher._denied(f"a/{n}")
    assert len(bench.publisher._loners) == LONERS


# -- sessions that end -----------------------------------------------------------------------------------


def test_a_new_session_gets_what_is_unanswered_with_the_same_numbers() -> None:
    """R-10-17."""
    bench = Bench()
    custody = Waiter(custody=True)
    bench.add("cmd/x", "0", ticket=custody.ticket)
    for n in range(1, 5):
        bench.add("cmd/x", str(n))
    records = bench.run()
    bench.keep(*records[:2], custody=False)
    bench.run()
    bench.connect()
    assert [(event.head.number, payloads(event)) for event in bench.received] == [
        (1, [b"0"]),  # kept, but its caller waits for custody, and receipts count places of one session
        (3, [b"2"]),
        (4, [b"3"]),
        (5, [b"4"]),
    ]
    bench.keep(*bench.received)
    bench.run()
    assert custody.told == 1
    assert bench.publisher.unfinished == 0


def test_without_a_session_messages_gather_and_no_timer_runs() -> None:
    bench = Bench()
    bench.publisher.detach()
    for n in range(100):
        bench.add("a/x", str(n))
        bench.add("cmd/x", str(n))
    assert bench.publisher.next_timeout() is None
    bench.connect()
    assert [len(payloads(event)) for event in bench.received] == [100, 100]


def test_a_pause_ends_with_its_session() -> None:
    bench = Bench()
    bench.add("cmd/x")
    bench.run()
    bench.pair.gateway.refuse(1, 0, RefusedCode.FULL, 60_000)
    bench.run()
    assert bench.publisher.next_timeout() == pytest.approx(60.0)
    bench.publisher.detach()
    assert bench.publisher.next_timeout() is None
    bench.connect()
    assert len(bench.received) == 1
