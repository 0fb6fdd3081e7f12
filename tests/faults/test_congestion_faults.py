"""Fault matrix, rows 7, 8 and 9: goodput and fairness on a slow link, simulated (level L1). Long ones with `-m many`.

The link passes 10 Mbit/s through a queue of 25 packets.

What loss alone allows a controller that takes every loss for a full queue is known: a window that falls to β at each
loss and grows by a packet per round trip as Reno's does, or as CUBIC's in its Reno-friendly region, is √(1.5 / p)
packets on average (RFC 9438 §4.3), so 8.7 packets a round trip at p = 2 %, whatever the link could carry: 25 % of
this one at 30 ms. Of CUBIC these tests ask for nearly all that the law gives, of the default for the link.
"""

from __future__ import annotations

from collections import Counter
from math import sqrt

import pytest

from stp.core.packetizer import BULK_OVERHEAD
from stp.core.session import Session
from stp.core.sizing import BASE_DATAGRAM
from tests.sim import Host, Network

BANDWIDTH = 1_250_000
"""Bytes a second."""
PIECE = BASE_DATAGRAM - BULK_OVERHEAD
MIB = 1 << 20


class Flow:
    """A session with a lane that never runs dry until `total` bytes are written."""

    def __init__(self, net: Network, hub: Host, edge: Host, total: int) -> None:
        self.net, self.hub = net, hub
        self.session: Session = edge.connect(hub)
        self.peer = net.establish(self.session)
        self.lane = self.session.open_stream()
        self.left = total
        self.total = total

    def feed(self) -> None:
        more = min(self.session.room(self.lane), self.left)
        if more:
            self.session.write(self.lane, bytes(more))
            self.left -= more
            self.net.flush()

    def received(self) -> int:
        return self.hub.received_length(self.peer, self.lane)


def goodput(
    seed: int, rtt: float, loss: float, size: int, *, congestion: str = "tolerant", **conditions: float
) -> float:
    """The share of the link that the bytes of a transfer took."""
    net = Network(seed, delay=rtt / 2)
    net.keep_log = False
    hub, edge = net.listener(), net.dialler(congestion=congestion)
    flow = Flow(net, hub, edge, size)
    for link in net.both(edge, hub):
        link.bandwidth, link.loss = BANDWIDTH, loss
        for name, value in conditions.items():
            setattr(link, name, value)

    def done() -> bool:
        flow.feed()
        return flow.received() == size

    return size / net.run(done, limit=300.0) / BANDWIDTH


def by_the_law(rtt: float, loss: float) -> float:
    """The share of the link that √(1.5 / p) packets a round trip are.

    On the wire a round trip is longer by the packet's own time and by that of the second one, which its ACK awaits.
    """
    rtt += 2 * BASE_DATAGRAM / BANDWIDTH
    return min(1.0, sqrt(1.5 / loss) * PIECE / rtt / BANDWIDTH)


def mean_goodput(seeds: range, rtt: float, loss: float, size: int, congestion: str) -> float:
    return sum(goodput(seed, rtt, loss, size, congestion=congestion) for seed in seeds) / len(seeds)


@pytest.mark.parametrize("rtt", [0.005, 0.03])
def test_fault_07_goodput_at_two_percent_loss(rtt: float) -> None:
    assert goodput(7, rtt, 0.02, 2 * MIB) >= 0.6


@pytest.mark.parametrize("rtt", [0.01, 0.03])
def test_fault_07_goodput_at_two_percent_corruption(rtt: float) -> None:
    """A packet that does not open is a lost one."""
    assert goodput(7, rtt, 0.0, 2 * MIB, corrupt=0.02) >= 0.6


def test_fault_07_goodput_at_ten_percent_loss() -> None:
    """The response is in proportion: twice what CUBIC has, and far from ignoring it."""
    found = goodput(7, 0.03, 0.1, MIB)
    assert 2 * goodput(7, 0.03, 0.1, MIB, congestion="cubic") <= found <= 0.4


@pytest.mark.parametrize("congestion", ["tolerant", "cubic"])
def test_fault_05_reordering_costs_no_goodput(congestion: str) -> None:
    """Up to 20 ms out of order at 30 ms, nothing lost: what is only overtaken is soon not taken for lost, and
    the window that it cost is given back (R-6-1, R-6-2).
    """
    assert goodput(5, 0.03, 0.0, 3 * MIB, congestion=congestion, jitter=0.02) >= 0.75


@pytest.mark.parametrize(("rtt", "loss"), [(0.03, 0.02), (0.06, 0.005)])
def test_fault_07_cubic_has_what_the_law_gives(rtt: float, loss: float) -> None:
    """No stall, no reduction too many: at least five sixths of what the law gives."""
    assert goodput(7, rtt, loss, 2 * MIB, congestion="cubic") >= by_the_law(rtt, loss) * 5 / 6


@pytest.mark.many
@pytest.mark.parametrize("loss", [0.001, 0.005, 0.01, 0.02])
@pytest.mark.parametrize("rtt", [0.005, 0.01, 0.03, 0.06, 0.1])
def test_fault_07_goodput_over_many_seeds(rtt: float, loss: float) -> None:
    wanted = min(by_the_law(rtt, loss) * 5 / 6, 0.7)
    assert mean_goodput(range(10), rtt, loss, 4 * MIB, "cubic") >= wanted
    if rtt <= 0.03:
        assert mean_goodput(range(10), rtt, loss, 4 * MIB, "tolerant") >= 0.7


@pytest.mark.slow
def test_fault_09_black_holes() -> None:
    """The link is there for 5 s and away for 2 s, again and again: everything arrives in one session, and bytes move
    again within 2 s of each return.
    """
    net = Network(9, delay=0.015)
    net.keep_log = False
    hub, edge = net.listener(), net.dialler()
    flow = Flow(net, hub, edge, 10 * MIB)
    links = net.both(edge, hub)
    began, stalls = net.now, []
    seen, moved, returned = 0, net.now, 0.0

    def done() -> bool:
        nonlocal seen, moved, returned
        flow.feed()
        into = (net.now - began) % 7.0
        away = into >= 5.0
        if links[0].loss and not away:
            returned = net.now
        for link in links:
            link.bandwidth, link.loss = BANDWIDTH, float(away)
        if flow.received() > seen:
            if returned > moved:
                stalls.append(net.now - returned)
            seen, moved = flow.received(), net.now
        return seen == flow.total

    net.run(done, limit=40.0)
    assert stalls
    assert max(stalls) <= 2.0
    assert hub.connected() == [flow.peer]
    assert flow.session.live


@pytest.mark.parametrize("rtt", [0.005, 0.03])
def test_fault_08_goodput_on_a_clean_link(rtt: float) -> None:
    assert goodput(8, rtt, 0.0, 4 * MIB) >= 0.85


@pytest.mark.many
def test_fault_08_goodput_on_a_clean_link_10_mib() -> None:
    assert goodput(8, 0.03, 0.0, 10 * MIB) >= 0.85


# -- what bulk leaves room for


@pytest.mark.parametrize("bandwidth", [125_000, 1_250_000])
def test_a_command_overtakes_bulk_that_fills_the_link(bandwidth: int) -> None:
    """1 KiB, also at 1 Mbit/s with half a MiB queued before it: it leaves within a round trip of the loaded link, and
    mostly within one of the empty link, whose ACK awaits a second packet (R-6-4). What is queued on the way, it does
    not overtake: it arrives a full queue later.
    """
    net = Network(3, delay=0.015)
    net.keep_log = False
    hub, edge = net.listener(), net.dialler()
    flow = Flow(net, hub, edge, 1 << 40)
    link = net.link(edge, hub)
    link.bandwidth = bandwidth
    assert flow.session._data is not None
    commands = flow.session.open_stream(weight=64)
    sender, rtt = flow.session._data.streams.send[commands], flow.session._data.recovery.rtt
    written, waits = 0, []

    def left() -> bool:
        flow.feed()
        return sender.next == written

    def pause() -> bool:
        flow.feed()
        return net.now >= until

    for _ in range(20):
        until = net.now + 60_000 / bandwidth
        net._run(pause, until)
        flow.session.write(commands, bytes(1024))
        written += 1024
        assert flow.session._data.streams.send[flow.lane].written - flow.received() > 400_000
        wait = net.run(left, limit=10.0)
        assert wait <= rtt.latest
        waits.append(wait)
    net.run(lambda: hub.received_length(flow.peer, commands) == written, limit=2.0)
    assert sorted(waits)[10] <= 0.03 + 2 * BASE_DATAGRAM / bandwidth


def test_bursts_are_short_on_a_slow_link() -> None:
    """R-6-5: at 1 Mbit/s, where a packet takes 9.6 ms, two leave at a time, never four within 10 ms."""
    net = Network(3, delay=0.015)
    hub, edge = net.listener(), net.dialler()
    flow = Flow(net, hub, edge, 1 << 40)
    net.link(edge, hub).bandwidth = 125_000
    until = net.now + 2.0
    net._run(lambda: bool(flow.feed()) or net.now >= until, until)  # slow start is over
    net.log.clear()
    until += 3.0
    net._run(lambda: bool(flow.feed()) or net.now >= until, until)
    times = [at for at, source, _, data in net.log if source == edge.addr and len(data) > 1000]
    assert len(times) > 200
    assert max(Counter(times).values()) == 2
    assert all(fourth - first > 0.01 for first, fourth in zip(times, times[3:], strict=False))


def shares(
    seed: int,
    controllers: tuple[str, ...],
    seconds: float,
    *,
    stagger: float = 1.0,
    queue: int = 25,
    rtt: float = 0.03,
) -> list[float]:
    """What each of several flows got of the link in the last `seconds`; they start `stagger` seconds apart."""
    net = Network(seed, delay=rtt / 2, jitter=0.0005, queue=queue)
    net.keep_log = False
    hub = net.listener()
    edges = [net.dialler(f"edge-{n + 1}", congestion=name) for n, name in enumerate(controllers)]
    flows: list[Flow] = []
    link = net.share(hub, *edges)

    def feed() -> bool:
        for flow in flows:
            flow.feed()
        return net.now >= until

    for edge in edges:
        link.bandwidth = 0.0
        flows.append(Flow(net, hub, edge, 1 << 40))
        link.bandwidth = BANDWIDTH
        until = net.now + stagger
        net._run(feed, until)
    until += 2.0
    net._run(feed, until)
    before = [flow.received() for flow in flows]
    until += seconds
    net._run(feed, until)
    return [(flow.received() - old) / seconds / BANDWIDTH for flow, old in zip(flows, before, strict=True)]


@pytest.mark.parametrize("controllers", [("tolerant",) * 2, ("tolerant", "cubic"), ("cubic", "tolerant")])
def test_fault_08_two_flows_share_a_link(controllers: tuple[str, ...]) -> None:
    """The later one gets its half, within a factor of two; together they fill the link. CUBIC stands for TCP."""
    found = shares(8, controllers, 3.0)
    assert max(found) <= 2 * min(found)
    assert sum(found) >= 0.85


@pytest.mark.slow
def test_fault_08_a_short_queue_is_known_by_its_peaks() -> None:
    """Five packets: 5 ms, less than RFC 9406 takes for a queue at 100 ms."""
    found = shares(8, ("cubic", "tolerant"), 8.0, queue=5, rtt=0.1)
    assert max(found) <= 2 * min(found)


@pytest.mark.parametrize("controllers", [("tolerant", "newreno"), ("newreno", "cubic")])
def test_fault_08_cubic_and_newreno_share_a_link(controllers: tuple[str, str]) -> None:
    found = shares(8, controllers, 3.0)
    assert max(found) <= 2.5 * min(found)
    assert sum(found) >= 0.85


MIXES = (
    ("tolerant",) * 2,
    ("tolerant",) * 4,
    ("tolerant", "cubic") * 2,
    ("cubic", "tolerant"),
    ("tolerant", "newreno"),
)


@pytest.mark.many
@pytest.mark.parametrize("controllers", MIXES)
def test_fault_08_flows_share_a_link_for_long(controllers: tuple[str, ...]) -> None:
    for seed in range(5):
        found = shares(seed, controllers, 30.0)
        assert max(found) <= (2.5 if "newreno" in controllers else 2) * min(found)
        assert sum(found) >= 0.85
