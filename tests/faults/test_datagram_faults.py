"""Fault 30: a peer with a good certificate that floods with unreliable datagrams (R-5-6). Level L1.

It costs bounded memory, its own session nothing, and nobody else anything.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from stp.core import frames
from stp.core.errors import ErrorCode
from stp.core.unreliable import MAX_UNFETCHED, MAX_UNFETCHED_BYTES, MAX_WAITING
from stp.echo import ECHO_REQUEST, HEAD, Allowance, Responder
from tests.faults.test_transport_hostile import Villain


def flood(villain: Villain, count: int, size: int) -> Iterator[bytes]:
    return (villain.packet(frames.Datagram(bytes(size))) for _ in range(count))


@pytest.mark.parametrize(("count", "size"), [(3000, 0), (3000, 10), (2000, 1150)])
def test_fault_30_datagrams_that_nobody_fetches_are_bounded(count: int, size: int) -> None:
    villain = Villain()
    villain.hub.on_ready = lambda session: None
    villain.attack(flood(villain, count, size))
    assert villain.peer.live
    found = villain.peer.statistics()
    assert found.datagrams_received == count
    kept = villain.peer._datagrams
    assert kept is not None
    assert len(kept.unfetched) == min(count, MAX_UNFETCHED)
    assert sum(map(len, kept.unfetched)) <= MAX_UNFETCHED_BYTES
    assert found.datagrams_dropped == count - len(kept.unfetched)
    villain.hub.on_ready = None
    villain.others_go_on()


def test_fault_30_a_flood_of_echo_requests_is_answered_within_its_allowance() -> None:
    """The asker never acknowledges, so nothing more leaves than one window; what waits is bounded."""
    villain = Villain()
    responder = Responder(50_000, Allowance(200_000))
    answered = 0

    def requests() -> Iterator[bytes]:
        nonlocal answered
        for seq in range(5000):
            request = HEAD.pack(ECHO_REQUEST, seq, 0, 0, 0) + bytes(979)
            reply = responder.answer(request, villain.net.now)
            if reply is not None:
                answered += villain.peer.send_datagram(reply)
            yield villain.packet(frames.Datagram(request))

    villain.attack(requests())
    assert responder.arrived == 5000
    assert answered <= 50_000 * 0.25 / 1000 + 1
    waiting = villain.peer._datagrams
    assert waiting is not None
    assert len(waiting.waiting) <= MAX_WAITING
    villain.others_go_on()


@pytest.mark.parametrize("seed", range(5))
def test_fault_30_any_frames_around_a_datagram(seed: int) -> None:
    """A DATAGRAM ends its packet: what stands before it counts, what looks like a frame in it does not."""
    villain = Villain()
    rng = random.Random(seed)

    def packets() -> Iterator[bytes]:
        for _ in range(300):
            inside = rng.randbytes(rng.randrange(60)) + frames.Close(ErrorCode.PROTOCOL, "no").encode()
            yield villain.packet(frames.Ping(), frames.Datagram(inside))

    villain.attack(packets())
    assert villain.peer.live
    assert villain.peer.statistics().datagrams_received == 300
    villain.others_go_on()
