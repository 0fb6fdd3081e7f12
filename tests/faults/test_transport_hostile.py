"""Fault 30: a peer with a good certificate that means harm. Level L1; the message layer's part is tested with links.

Whatever it does ends in LIMIT, FLOW or PROTOCOL or costs us nothing that counts: at most 16 MiB, and other sessions
of the same endpoint go on.
"""

from __future__ import annotations

import random
import tracemalloc
from collections.abc import Iterator

import pytest

from stp.core import frames
from stp.core.errors import ErrorCode
from stp.core.flow import SESSION_WINDOW, STREAM_WINDOW
from stp.core.migration import MAX_CHALLENGES, MAX_REFUSED
from stp.core.output import MAX_PATH_ANSWERS
from stp.core.path import AMPLIFICATION
from stp.core.states import State
from tests.sim import Network

MEMORY = 16 * 1024 * 1024


class Villain:
    """An established session whose owner writes packets by hand, and a bystander on the same listener."""

    def __init__(self) -> None:
        self.net = Network(1)
        self.net.keep_log = False
        self.hub = self.net.listener()
        self.edge, self.honest = self.net.dialler("edge-1"), self.net.dialler("edge-2")
        self.session = self.edge.connect(self.hub)
        self.peer = self.net.establish(self.session)
        self.other = self.honest.connect(self.hub)
        self.bystander = self.net.establish(self.other)
        self.net.run_for(0.2)

    def packet(self, *said: frames.Frame) -> bytes:
        space = self.session._data
        assert space is not None
        space.sealer.run()
        return space.sealer.seal(b"".join(f.encode() for f in said))

    def attack(self, packets: Iterator[bytes], *, limit: int = 200_000) -> int:
        """Straight into the listener, time standing still; the bytes it answered. Stops when the session ends.

        Fails if it takes more than MEMORY at its worst.
        """
        tracemalloc.start()
        try:
            return self._attack(packets, limit)
        finally:
            _, peak = tracemalloc.get_traced_memory()
            tracemalloc.stop()
            assert peak < MEMORY

    def _attack(self, packets: Iterator[bytes], limit: int) -> int:
        answered = 0
        for n, packet in enumerate(packets):
            self.hub.endpoint.receive(packet, self.edge.addr, self.net.now)
            if n % 16 == 15 or not self.peer.live:
                for sent in self.hub.endpoint.datagrams_to_send(self.net.now):
                    answered += len(sent.data)
            if not self.peer.live or n >= limit:
                break
        return answered

    def must_end(self, code: ErrorCode) -> None:
        self.net.flush()
        closed = self.hub.closed(self.peer)
        assert closed is not None
        assert closed.code is code
        self.others_go_on()

    def others_go_on(self) -> None:
        self.hub.auto_read = True
        assert self.other.state is self.bystander.state is State.ESTABLISHED
        start = self.hub.received_length(self.bystander, 0)
        self.other.write(0, bytes(5000))
        took = self.net.run(lambda: self.hub.received_length(self.bystander, 0) == start + 5000, limit=1.0)
        assert took < 0.1


def test_fault_30_a_million_gaps() -> None:
    """Every second byte of a stream, in any order."""
    villain = Villain()
    offsets = list(range(1, 20_000, 2))
    random.Random(1).shuffle(offsets)
    villain.attack(villain.packet(frames.Stream(2, at, b"x")) for at in offsets)
    villain.must_end(ErrorCode.LIMIT)


def test_fault_30_bytes_one_by_one_that_nobody_reads() -> None:
    """All credit of four lanes beyond a gap, in single bytes: they are kept as runs, not as objects."""
    villain = Villain()
    villain.hub.auto_read = False

    def packets() -> Iterator[bytes]:
        for lane in (2, 6):
            for at in range(1, 15_000, 30):
                yield villain.packet(*(frames.Stream(lane, at + n, b"x") for n in range(30)))

    villain.attack(packets())
    assert villain.peer.live
    assert sum(len(s._runs or ()) for s in villain.peer._streams.recv.values()) == 2
    villain.others_go_on()


def test_fault_30_unread_bytes_are_bounded_by_credit() -> None:
    villain = Villain()
    villain.hub.auto_read = False

    def packets() -> Iterator[bytes]:
        for at in range(0, 2 * SESSION_WINDOW, 1000):
            yield villain.packet(
                frames.Stream(2 + 4 * (at // STREAM_WINDOW), at % STREAM_WINDOW, bytes(1000))
            )

    villain.attack(packets())
    villain.must_end(ErrorCode.FLOW)


@pytest.mark.parametrize(
    ("said", "code"),
    [
        (frames.Stream(2, STREAM_WINDOW - 1, b"xx"), ErrorCode.FLOW),
        (frames.ResetStream(2, 0, 1 << 60), ErrorCode.FLOW),
        (frames.Stream(2 + 4 * 100, 0, b"x"), ErrorCode.LIMIT),
        (frames.Ack(0, [(1 << 40, (1 << 40) + 1)]), ErrorCode.PROTOCOL),
    ],
    ids=["window", "window by reset", "streams", "acks ahead of us"],
)
def test_fault_30_lies(said: frames.Frame, code: ErrorCode) -> None:
    """R-7-5."""
    villain = Villain()
    villain.attack(iter([villain.packet(said)]))
    villain.must_end(code)


@pytest.mark.parametrize("said", [frames.Ping(), frames.PathChallenge(b"12345678"), frames.DataBlocked(0)])
def test_fault_30_floods_that_ask_for_answers(said: frames.Frame) -> None:
    """They draw less than they cost, and leave nothing behind."""
    villain = Villain()
    answered = villain.attack((villain.packet(said) for _ in range(3000)), limit=3000)
    assert villain.peer.live
    assert answered < 3000 * len(villain.packet(said))
    space = villain.peer._data
    assert space is not None
    assert len(space.recovery.sent) < 200
    villain.others_go_on()


@pytest.mark.many
def test_fault_30_a_hundred_thousand_challenges() -> None:
    """Each may be answered with what it cost, and eight at most wait for their answer."""
    villain = Villain()
    cost = 0

    def packets() -> Iterator[bytes]:
        nonlocal cost
        for n in range(100_000):
            packet = villain.packet(frames.PathChallenge(n.to_bytes(8, "big")))
            cost += len(packet)
            yield packet

    answered = villain.attack(packets())
    assert villain.peer.live
    assert answered < cost
    assert villain.peer._data is not None
    assert len(villain.peer._data.output._answers) <= MAX_PATH_ANSWERS
    villain.others_go_on()


def test_fault_30_an_address_for_every_packet() -> None:
    """Two paths are remembered and eight refusals, three times what came is answered, and the session lives."""
    villain = Villain()
    hub, now = villain.hub.endpoint, villain.net.now
    home = villain.peer.addr
    count, came, went = 5_000, 0, 0
    for n in range(count):
        packet = villain.packet(frames.Ping())
        came += len(packet)
        hub.receive(packet, (f"198.51.{n >> 8}.{n & 255}", 7), now)
        for sent in hub.datagrams_to_send(now):
            went += len(sent.data) if sent.addr != home else 0
    assert villain.peer.live
    assert went <= AMPLIFICATION * came
    moves = villain.peer._data.migration  # type: ignore[union-attr]
    assert moves is not None
    assert moves.previous is not None
    assert moves.previous.addr == home
    assert len(moves.previous.challenges) <= MAX_CHALLENGES
    assert len(moves._refused) <= MAX_REFUSED
    assert villain.peer.statistics().migrations == count
    villain.net.run_for(5.0)
    assert villain.peer.addr == home
    villain.others_go_on()


def test_fault_30_a_flood_of_cids() -> None:
    villain = Villain()

    def packets() -> Iterator[bytes]:
        for n in range(4, 100_000):
            yield villain.packet(frames.NewCid(n, n, n.to_bytes(8, "big"), bytes(16)))

    villain.attack(packets())
    villain.must_end(ErrorCode.LIMIT)


def test_fault_30_acks_that_shrink_the_window_for_nobody_else() -> None:
    """ACKs with a hole in every second place make us lose; only this session's window shrinks."""
    villain = Villain()
    peer = villain.peer
    lane = peer.open_stream()
    peer.write(lane, bytes(500_000))
    before = villain.bystander.statistics().cwnd
    for _ in range(20):
        villain.net.run_for(0.05)
        space = peer._data
        assert space is not None
        top = space.sealer.next
        if top > 10:
            ranges = [(n, n + 1) for n in range(top - 1, max(top - 100, 0), -2)]
            villain.attack(iter([villain.packet(frames.Ack(0, ranges[:60]))]))
    assert peer.live
    assert villain.bystander.statistics().cwnd >= before
    villain.others_go_on()
