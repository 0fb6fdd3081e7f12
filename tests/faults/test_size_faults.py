"""Fault matrix, row 10, and packet size probing on the simulated network (level L1; R-6-7, RFC 8899).

Sizes are bytes of UDP payload, as `Conditions.mtu` counts them: an MTU of 1,280 over IPv4 carries 1,252 of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from stp.core import frames
from stp.core.errors import ErrorCode
from stp.core.path import KEEPALIVE
from stp.core.session import Session
from stp.core.sizing import GRAIN, RAISE_TIME
from stp.core.states import State
from tests.faults.test_transport_faults import payload, seeds
from tests.sim import Host, Network

LARGEST = 1472


class Transfer:
    """A session whose lane never runs dry until `total` bytes are written, and what its receiver saw of it."""

    def __init__(
        self,
        seed: int,
        total: int,
        *,
        dialler: dict[str, Any] | None = None,
        listener: dict[str, Any] | None = None,
        **conditions: Any,
    ) -> None:
        self.net = Network(seed, **conditions)
        self.hub: Host = self.net.listener(**{"largest": LARGEST, **(listener or {})})
        self.edge: Host = self.net.dialler(**{"largest": LARGEST, **(dialler or {})})
        self.session: Session = self.edge.connect(self.hub)
        self.peer = self.net.establish(self.session)
        self.net.run_for(0.2)
        self.up.bandwidth, self.up.queue = 1_250_000, 50
        self.net.log.clear()
        self.lane = self.session.open_stream()
        self.data = payload(total, seed)
        self.fed = self.seen = 0
        self.progress_at = self.net.now
        self.stall = 0.0
        """The longest time in which nothing new arrived."""
        self.smallest_window = self.window()

    def window(self) -> int:
        return self.session.statistics().cwnd

    @property
    def size(self) -> int:
        return self.session.statistics().datagram

    @property
    def up(self) -> Any:
        return self.net.link(self.edge, self.hub)

    def step(self) -> int:
        """Feed; what has arrived."""
        room = self.session.room(self.lane)
        if room and self.fed < len(self.data):
            self.session.write(self.lane, self.data[self.fed : self.fed + room])
            self.fed += min(room, len(self.data) - self.fed)
            self.net.flush()
        arrived = self.hub.received_length(self.peer, self.lane)
        if arrived > self.seen:
            self.stall = max(self.stall, self.net.now - self.progress_at)
            self.seen, self.progress_at = arrived, self.net.now
        self.smallest_window = min(self.smallest_window, self.window())
        return arrived

    def until(self, condition: Callable[[], bool], limit: float = 60.0) -> None:
        self.net.run(lambda: self.step() >= 0 and condition(), limit=limit)

    def arrived(self, share: float = 1.0, limit: float = 60.0) -> None:
        wanted = int(share * len(self.data))
        self.until(lambda: self.seen >= wanted, limit)

    def finish(self, limit: float = 60.0) -> None:
        self.arrived(1.0, limit)
        assert self.hub.received(self.peer, self.lane) == self.data

    def largest_sent(self, host: Host) -> int:
        return max((len(data) for _, source, _, data in self.net.log if source == host.addr), default=0)


@pytest.mark.parametrize("seed", seeds(3, 50))
def test_full_packets_grow_to_what_ethernet_carries(seed: int) -> None:
    """One probe, in the first bulk, and from then on 1,472 bytes; the other direction has nothing to probe for."""
    move = Transfer(seed, 300_000, loss=0.01 * (seed % 3))
    move.finish()
    assert move.size == LARGEST
    assert move.largest_sent(move.edge) == LARGEST
    assert move.session.statistics().size_probes <= 3
    assert move.peer.statistics().size_probes == 0
    assert move.peer.statistics().datagram == 1200


@pytest.mark.parametrize("seed", seeds(3, 50))
@pytest.mark.parametrize(("carries", "probes"), [(1400, 13), (1452, 4), (1252, 20), (1200, 18)])
def test_a_narrower_path_is_found_out(seed: int, carries: int, probes: int) -> None:
    move = Transfer(seed, 9_000_000, mtu=carries, delay=0.02, listener={"largest": 1200})
    move.until(lambda: move.session.statistics().size_probes > 0)
    sizer = move.session._path.sizer
    move.until(lambda: sizer.due_at > move.net.now + RAISE_TIME / 2 and sizer.probe < 0)
    assert carries - GRAIN < move.size <= carries
    assert move.session.statistics().size_probes == probes
    assert move.session.statistics().black_holes == 0


@pytest.mark.parametrize("seed", seeds(3, 50))
def test_lost_probes_are_no_congestion(seed: int) -> None:
    """RFC 8899 §3: on a path that carries 1,200 every probe is lost, and the window only grows."""
    move = Transfer(seed, 1_000_000, mtu=1200)
    move.up.queue = 10_000
    move.finish()
    found = move.session.statistics()
    assert found.size_probes >= 3
    assert found.packets_lost == 0
    assert move.smallest_window >= 12_000
    assert move.session._data is not None
    assert move.session._data.recovery.congestion.recovery_start == -1.0
    assert found.datagram == 1200


@pytest.mark.parametrize("seed", seeds(3, 50))
def test_full_datagrams_are_probed_with_too(seed: int) -> None:
    """Who sends unreliable datagrams alone finds out as much, where they fill packets; behind small ones too."""
    move = Transfer(seed, 0, mtu=1400, delay=0.02)
    for size in (100, 0):
        for _ in range(100):
            move.session.send_datagram(bytes(100))
            move.session.send_datagram(bytes(size or move.session.max_datagram_size))
            move.net.flush()
            move.net.run_for(0.05)
        if size:
            assert move.session.statistics().size_probes == 0
    found = move.session.statistics()
    assert 1400 - GRAIN < found.datagram <= 1400
    assert found.datagrams_lost == 0


def test_an_idle_session_probes_nothing_and_has_no_timer_for_it() -> None:
    move = Transfer(1, 0)
    for n in range(20):
        move.session.write(0, b"small talk %d" % n)
        move.net.run_for(0.5)
    assert move.session.statistics().size_probes == move.peer.statistics().size_probes == 0
    heard = move.net.now
    move.net.log.clear()
    move.net.run_for(KEEPALIVE - 1.0)
    assert not move.net.log
    due = move.edge.endpoint.next_timeout()
    assert due is not None
    assert due > heard + KEEPALIVE - 1.0


@pytest.mark.parametrize("seed", seeds(4, 100))
@pytest.mark.parametrize(
    ("before", "after", "finds"), [(1472, 1252, 1252), (1472, 1100, 1024), (8972, 1472, 1472)]
)
def test_fault_10_the_path_narrows_in_mid_transfer(seed: int, before: int, after: int, finds: int) -> None:
    """All full packets vanish at once. The size falls, lost bytes are cut anew, at most 3 s pass without progress."""
    known = {"datagram": before} if before > LARGEST else {}
    options = {"largest": max(before, LARGEST), "max_datagram": 8972}
    move = Transfer(
        seed,
        4_000_000,
        dialler=options | known,
        listener=options,
        delay=0.005 + 0.01 * (seed % 5),
        mtu=before,
    )
    move.up.bandwidth, move.up.queue = 500_000, 25
    move.arrived(0.1)
    assert move.size == before
    move.up.mtu = after
    move.stall, fell_at = 0.0, move.net.now
    move.until(lambda: move.size < before)
    assert move.net.now - fell_at <= 3.0
    move.net.log.clear()
    move.finish()
    assert move.stall <= 3.0
    assert finds - 2 * GRAIN < move.size <= after
    assert move.session.state is move.peer.state is State.ESTABLISHED
    assert move.edge.endpoint.statistics().black_holes == move.session.statistics().black_holes <= 2


def test_fault_10_the_path_widens_again_and_is_found() -> None:
    """After ten minutes at the latest, by the next bulk."""
    move = Transfer(1, 6_000_000)
    move.arrived(0.2)
    move.up.mtu = 1252
    move.arrived(0.5)
    move.until(lambda: move.session._path.sizer.due_at > move.net.now + RAISE_TIME / 2)
    assert move.size < LARGEST
    move.up.mtu = 65_507
    move.net.run_for(RAISE_TIME)
    move.finish()
    assert move.size == LARGEST


@pytest.mark.parametrize("seed", seeds(3, 50))
def test_an_outage_is_not_taken_for_a_narrow_path_for_long(seed: int) -> None:
    """Everything vanishes for a while: the session lives, and the size is back soon."""
    move = Transfer(seed, 3_000_000)
    move.arrived(0.2)
    assert move.size == LARGEST
    move.up.loss = 1.0
    move.net.run_for(0.5 + seed % 4)
    move.up.loss = 0.0
    move.finish()
    assert move.session.statistics().datagram == LARGEST
    assert move.session.statistics().black_holes <= 1


@pytest.mark.parametrize("seed", seeds(4, 100))
@pytest.mark.parametrize("conditions", [{"loss": 0.1}, {"loss": 0.05, "burst": 6}, {"jitter": 0.02}])
def test_loss_and_overflowing_queues_are_no_black_holes(seed: int, conditions: dict[str, Any]) -> None:
    move = Transfer(seed, 1_000_000, **conditions)
    move.up.queue = 10
    move.finish(limit=200.0)
    assert move.session.statistics().packets_lost > 0 or "jitter" in conditions
    assert move.session.statistics().black_holes <= (
        "burst" in conditions
    )  # six in a row may be all there was
    assert move.size == LARGEST or "burst" in conditions


@pytest.mark.parametrize("seed", seeds(2, 20))
def test_a_path_that_carries_nothing_large_ends_the_session(seed: int) -> None:
    """Small packets pass, so the peer is not dead; both sides learn that another carrier is needed."""
    move = Transfer(seed, 2_000_000)
    move.arrived(0.2)
    move.up.mtu = 600
    move.until(lambda: not move.session.live, limit=30.0)
    closed = move.edge.closed(move.session)
    assert closed is not None
    assert (closed.code, closed.by_peer) == (ErrorCode.PATH, False)
    move.net.run_for(1.0)
    told = move.hub.closed(move.peer)
    assert told is not None
    assert (told.code, told.by_peer) == (ErrorCode.PATH, True)


@pytest.mark.parametrize("allowed", [1200, 1300, 65_535])
def test_fault_30_no_peer_makes_us_send_more_than_we_want(allowed: int) -> None:
    """What the peer says it receives only lowers our size; and it may acknowledge whatever it likes."""
    move = Transfer(1, 600_000, listener={"max_datagram": allowed})
    move.finish()
    assert move.size == move.largest_sent(move.edge) == min(allowed, LARGEST)


def test_fault_30_acknowledging_probes_that_never_came() -> None:
    """A peer that lies gets packets that do not reach it, up to our own limit, and then smaller ones."""
    move = Transfer(1, 3_000_000, mtu=1250)
    space = move.peer._data
    assert space is not None
    lies = 0

    def lie() -> bool:
        nonlocal lies
        sizer, sealer = move.session._path.sizer, space.sealer
        if sizer.probe >= 0 and lies < 2:
            lies += 1
            sealer.run()
            claim = frames.Ack(0, [(sizer.probe, sizer.probe + 1)]).encode()
            move.net.inject(sealer.seal(claim), source=move.hub, to=move.edge)
        return move.seen >= len(move.data)

    move.until(lie)
    assert lies == 2
    assert move.largest_sent(move.edge) <= LARGEST
    assert move.session.statistics().black_holes >= 1
    assert move.size <= 1250


def test_nobody_else_can_acknowledge_a_probe() -> None:
    """What does not open counts for nothing: replayed and altered packets of the peer leave the size as it is."""
    move = Transfer(1, 400_000, mtu=1200)
    answers = [data for _, source, _, data in move.net.log if source == move.hub.addr]
    forged = 0

    def meddle() -> bool:
        nonlocal forged
        sizer = move.session._path.sizer
        if sizer.probe >= 0:
            heard = [d for _, source, _, d in move.net.log[-50:] if source == move.hub.addr][-3:]
            for data in heard or answers[-1:]:
                forged += 1
                wrong = data[:16] + bytes((data[16] ^ 1,)) + data[17:]  # the next number, as it were
                move.net.inject(data, source=move.hub, to=move.edge)
                move.net.inject(wrong, source=move.hub, to=move.edge)
        return move.seen >= len(move.data)

    move.until(meddle)
    assert forged > 10
    assert move.size == 1200
    assert move.session.statistics().failed_opens >= forged


def test_the_kernel_says_that_a_datagram_is_too_large() -> None:
    """EMSGSIZE on the first hop: no three tries, and for the size in use no waiting for losses."""
    move = Transfer(1, 2_000_000)
    endpoint = move.edge.endpoint
    move.up.mtu = 1420
    refused: list[int] = []

    send = move.net._send

    def kernel(source: Any, to: Any, data: bytes) -> None:
        if source == move.edge.addr and len(data) > move.up.mtu:
            refused.append(len(data))
            endpoint.on_too_large(to, len(data), move.net.now)
            return
        send(source, to, data)

    move.net._send = kernel  # type: ignore[method-assign]
    move.arrived(0.4)
    assert refused == [1472, 1452, 1432]
    assert move.size == 1412
    refused.clear()
    move.up.mtu = 1280
    move.finish()
    assert move.stall < 1.0
    assert move.session.statistics().black_holes == 1
    endpoint.on_too_large(("192.0.2.99", 1), 1, move.net.now)  # nobody's
    for size in (1200, 1000):
        endpoint.on_too_large(move.hub.addr, size, move.net.now)
    move.net.run_for(0.5)
    closed = move.edge.closed(move.session)
    assert closed is not None
    assert closed.code is ErrorCode.PATH
