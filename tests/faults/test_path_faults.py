"""Faults 11 to 13 and their like: sessions whose path changes (protocol §8). Level L1.

Every test moves numbered bytes both ways meanwhile and compares them: nothing lost, doubled or out of order.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from stp.core import frames
from stp.core.congestion import initial_window
from stp.core.errors import LocalCause, UsageError
from stp.core.keepalive import KeepaliveLearner
from stp.core.path import AMPLIFICATION, DEAD_TIME, KEEPALIVE_LEAST, KEEPALIVE_MOST, SUSPECT_TIME
from stp.core.phases import KeyLimits
from stp.core.sizing import BASE_DATAGRAM
from stp.core.states import State
from tests.sim import Host, Network


def seeds(few: int, many: int = 300) -> list[object]:
    """A few in every run, many by `-m many`."""
    return [*range(few), *(pytest.param(seed, marks=pytest.mark.many) for seed in range(few, many))]


class Flow:
    """A session with a lane each way, on which `rate` bytes a second are written as room allows."""

    def __init__(self, net: Network, hub: Host, edge: Host, *, rate: float) -> None:
        self.net, self.hub, self.edge, self.rate = net, hub, edge, rate
        self.session = edge.connect(hub)
        self.peer = net.establish(self.session)
        self.lanes = {self.session: self.session.open_stream(), self.peer: self.peer.open_stream()}
        self.written = {self.session: 0, self.peer: 0}
        self.arrived: list[tuple[float, int]] = []
        self.stalls = {self.session: 0.0, self.peer: 0.0}
        self._progress = {self.session: (net.now, 0), self.peer: (net.now, 0)}

    @staticmethod
    def content(start: int, stop: int) -> bytes:
        """Bytes that say where they stand."""
        first = start // 8
        whole = b"".join(n.to_bytes(8, "big") for n in range(first, stop // 8 + 1))
        return whole[start - 8 * first : stop - 8 * first]

    def got(self, sender: object) -> int:
        if sender is self.session:
            return self.hub.received_length(self.peer, self.lanes[self.session])
        return self.edge.received_length(self.session, self.lanes[self.peer])

    def run(self, seconds: float, *, step: float = 0.01) -> None:
        """Write, run, and note for how long each side heard nothing while something was on its way."""
        end = self.net.now + seconds
        while self.net.now < end:
            for sender, lane in self.lanes.items():
                size = min(int(self.rate * step), sender.room(lane))
                if size and sender.live:
                    start = self.written[sender]
                    sender.write(lane, self.content(start, start + size))
                    self.written[sender] = start + size
            self.net.run_for(step)
            for sender in self.lanes:
                at, known = self._progress[sender]
                got = self.got(sender)
                if got != known or got == self.written[sender]:
                    self._progress[sender] = self.net.now, got
                else:
                    self.stalls[sender] = max(self.stalls[sender], self.net.now - at)

    def finish(self, limit: float = 30.0) -> None:
        """All that was written arrives, once and in order; both ends are what they were."""
        self.net.run(lambda: all(self.got(s) == self.written[s] for s in self.lanes), limit=limit)
        for sender, lane in self.lanes.items():
            host, end = (self.hub, self.peer) if sender is self.session else (self.edge, self.session)
            got = host.received(end, lane)
            assert got == self.content(0, len(got))
        assert self.session.state is self.peer.state is State.ESTABLISHED
        assert len(self.hub.connected()) == len(self.edge.connected()) == 1

    def pto(self) -> float:
        assert self.peer._data is not None
        return self.peer._data.recovery.rtt.pto()


def flow(seed: int, *, rate: float = 100_000.0, **conditions: object) -> Flow:
    net = Network(seed, **({"delay": 0.015} | conditions))
    return Flow(net, net.listener(), net.dialler(), rate=rate)


def validated(talk: Flow) -> bool:
    return not talk.peer._path.limited and talk.peer.addr == talk.edge.seen_as


@pytest.mark.parametrize("seed", seeds(2, 30))
def test_fault_11_nat_gives_another_port(seed: int) -> None:
    """At 1 s, then every 5 s: the same session, no stall above 2 PTO (R-8-6, R-8-7)."""
    talk = flow(seed)
    talk.run(1.0)
    window = 0
    for n in range(3):
        pto, window = talk.pto(), talk.peer.statistics().cwnd
        talk.stalls = dict.fromkeys(talk.stalls, 0.0)
        talk.net.rebind(talk.edge)
        talk.run(5.0 if n else 1.0)
        assert validated(talk)
        assert max(talk.stalls.values()) <= 2 * pto
        assert talk.peer.statistics().migrations == n + 1
        assert talk.peer.statistics().path_validations == n + 1
        assert talk.peer.statistics().cwnd >= window / 2  # congestion state outlives a change of port
    talk.finish()
    assert talk.session.statistics().rebinds == 0
    assert talk.hub.endpoint.totals().path_validations == 3


def to_address(net: Network, addr: object, since: int) -> list[tuple[float, int]]:
    return [(at, len(data)) for at, _, to, data in net.log[since:] if to == addr]


@pytest.mark.parametrize("seed", seeds(2, 30))
def test_fault_12_nat_gives_another_address(seed: int) -> None:
    """Congestion control starts anew, and before the address is validated it gets three times what it sent."""
    talk = flow(seed, rate=2_000_000.0)
    talk.run(0.6)
    grown = talk.peer.statistics().cwnd
    assert grown > 2 * initial_window(BASE_DATAGRAM)
    before = len(talk.net.log)
    new = talk.net.rebind(talk.edge, ip="203.0.113.7")
    sent = received = 0
    net, endpoint = talk.net, talk.hub.endpoint
    take = endpoint.receive

    def counted(data: bytes, addr: object, now: float, size: int = 0) -> None:
        nonlocal received
        received += len(data) if addr == new else 0
        take(data, addr, now, size)

    endpoint.receive = counted  # type: ignore[method-assign, assignment]
    while not validated(talk):
        net.run_for(0.001)
        talk.run(0.001, step=0.001)
        sent = sum(size for _, size in to_address(net, new, before))
        if talk.peer._path.limited:
            assert sent <= AMPLIFICATION * received
    assert sent
    assert talk.peer.statistics().cwnd <= 2 * initial_window(BASE_DATAGRAM)
    talk.run(3.0)
    talk.finish()
    assert talk.peer.statistics().path_reverts == 0


def test_fault_12_a_validated_address_is_asked_in_full() -> None:
    """The first question may be as large as three small packets: then a full one follows (R-8-6)."""
    talk = flow(1, rate=0.0)
    talk.net.run_for(1.0)
    new = talk.net.rebind(talk.edge, ip="203.0.113.7")
    before = len(talk.net.log)
    talk.session.write(0, b"x")
    talk.net.run_for(1.0)
    sizes = [size for _, size in to_address(talk.net, new, before)]
    assert sizes[0] < BASE_DATAGRAM
    assert BASE_DATAGRAM in sizes
    assert validated(talk)


class Copier:
    """Sees all that the edge sends; delivers copies from an address of its own, a little earlier."""

    def __init__(self, talk: Flow, *, addr: tuple[str, int] = ("198.51.100.66", 666)) -> None:
        self.talk, self.addr = talk, addr
        self.copied = 0
        self.wanted: Callable[[int], bool] = lambda n: True
        talk.net.link(talk.edge, talk.hub).hook = self.copy

    def copy(self, data: bytes, number: int) -> list[bytes]:
        if self.wanted(number):
            self.copied += 1
            self.talk.net.forge(data, source=self.addr, to=self.talk.hub, after=0.010)
        return [data]

    def got(self) -> int:
        return sum(len(data) for _, _, to, data in self.talk.net.log if to == self.addr)


@pytest.mark.parametrize("seed", seeds(2, 30))
def test_fault_13_one_copy_from_elsewhere(seed: int) -> None:
    """The next packet from the old address, or at the latest 3 PTO, bring the session back (R-8-6, R-8-7)."""
    talk = flow(seed)
    talk.run(1.0)
    copier = Copier(talk)
    copier.wanted = lambda n: copier.copied == 0
    home, pto = talk.edge.addr, talk.pto()
    start = talk.net.now
    talk.net.run(lambda: talk.peer.addr == copier.addr, limit=1.0)
    talk.net.run(lambda: talk.peer.addr == home, limit=3 * pto + 0.001)
    assert talk.net.now - start <= 3 * pto + 0.1
    talk.run(2.0)
    talk.finish()
    assert talk.peer.statistics().path_reverts == 1
    assert talk.peer.statistics().path_validations == 0
    assert talk.peer.statistics().cwnd > 0


@pytest.mark.parametrize("seed", seeds(2, 30))
@pytest.mark.parametrize("share", [1.0, 0.3])
def test_fault_13_copies_that_always_come_first(seed: int, share: float) -> None:
    """Ever more rarely that address is tried; it gets little, the session goes on."""
    talk = flow(seed)
    talk.run(1.0)
    copier = Copier(talk)
    rng = random.Random(seed)
    copier.wanted = lambda n: rng.random() < share
    talk.run(8.0)
    talk.finish()
    counts = talk.peer.statistics()
    assert 1 <= counts.path_reverts <= 5  # 1 + 2 + 4 s apart
    assert counts.path_validations == 0
    assert copier.got() < 0.05 * talk.got(talk.peer)
    assert talk.peer.addr in (talk.edge.addr, copier.addr)


@pytest.mark.parametrize("seed", seeds(2, 30))
def test_fault_13_copies_while_only_the_listener_talks(seed: int) -> None:
    """Nothing but ACKs comes from the peer: the question at the old address is what brings the session back."""
    talk = flow(seed)
    talk.lanes.pop(talk.session)
    talk.written.pop(talk.session)
    talk.run(1.0)
    copier = Copier(talk)
    talk.run(10.0)
    talk.finish()
    assert copier.copied
    assert talk.peer.statistics().path_validations == 0


def test_fault_13_a_dialling_side_ignores_strangers() -> None:
    """Only the dialling side migrates (R-8-6)."""
    talk = flow(1)
    talk.run(0.5)
    space = talk.peer._data
    assert space is not None
    space.sealer.run()
    sealed = space.sealer.seal(frames.Close(0, "").encode())
    talk.net.inject(sealed, source=("198.51.100.66", 666), to=talk.edge)
    assert talk.session.addr == talk.hub.addr
    assert talk.session.state is State.ESTABLISHED
    assert talk.session.statistics().wrong_address == 1
    with pytest.raises(UsageError):
        talk.peer.migrate()


@pytest.mark.parametrize("seed", seeds(2, 30))
@pytest.mark.parametrize("same_host", [True, False])
def test_deliberate_migration_takes_fresh_cids_both_ways(seed: int, same_host: bool) -> None:
    """Who watches both paths sees no CID twice (R-8-10; RFC 9000 §9.5)."""
    talk = flow(seed)
    talk.run(1.0)
    before = len(talk.net.log)
    new = talk.net.rebind(talk.edge, ip=None if same_host else "203.0.113.7")
    talk.session.migrate(same_host=same_host, now=talk.net.now)
    talk.run(2.0)
    old_cids = {data[1:9] for _, _, _, data in talk.net.log[:before]}
    here = [data[1:9] for _, source, to, data in talk.net.log[before:] if new in (source, to)]
    assert here
    assert not old_cids & set(here)
    assert validated(talk)
    talk.finish()
    for end in (talk.session, talk.peer):
        assert end._data is not None
        assert len(end._data.local_cids.active) == 4
        assert not end._data.local_cids.lingering
        assert len(end._data.remote_cids.tokens) >= 3
    assert talk.session.statistics().rebinds == 1


@pytest.mark.parametrize("seed", seeds(1, 30))
def test_migration_again_and_again(seed: int) -> None:
    """CIDs are replaced as fast as they are used up; what stays routed is bounded."""
    talk = flow(seed)
    for n in range(20):
        talk.net.rebind(talk.edge, ip=f"203.0.113.{n + 1}")
        talk.session.migrate(now=talk.net.now)
        talk.run(0.3)
    talk.finish()
    talk.net.run_for(5.0)
    assert len(talk.hub.endpoint._by_cid) <= 4
    assert len(talk.edge.endpoint._by_cid) <= 4
    assert talk.peer.statistics().path_validations == 20


@pytest.mark.parametrize("seed", seeds(1, 30))
@pytest.mark.parametrize("loss", [0.1, 0.3])
def test_migration_during_loss_and_reordering(seed: int, loss: float) -> None:
    talk = flow(seed, rate=50_000.0, loss=loss, jitter=0.02)
    for n in range(5):
        talk.net.rebind(talk.edge, ip=f"203.0.113.{n % 2 + 1}")
        if n % 2:
            talk.session.migrate(now=talk.net.now)
        talk.run(2.0)
    talk.finish(60.0)


@pytest.mark.parametrize("seed", seeds(1, 30))
def test_migration_during_key_updates(seed: int) -> None:
    """Neither minds the other."""
    net = Network(seed, delay=0.015)
    limits = KeyLimits(packets=16)
    talk = Flow(net, net.listener(key_limits=limits), net.dialler(key_limits=limits), rate=100_000.0)
    for n in range(8):
        net.rebind(talk.edge, ip=f"203.0.113.{n + 1}")
        if n % 2:
            talk.session.migrate(now=net.now)
        talk.run(0.7)
    talk.finish()
    assert talk.session.statistics().key_updates > 10


def test_migration_under_bursts() -> None:
    """Megabytes a second each way, hundreds of packets under way: what was under way is sent again at once."""
    talk = flow(1, rate=5_000_000.0)
    talk.run(0.7)
    talk.stalls = dict.fromkeys(talk.stalls, 0.0)
    pto = talk.pto()
    talk.net.rebind(talk.edge)
    talk.run(0.5)
    talk.finish()
    assert max(talk.stalls.values()) <= 2 * pto


def test_a_path_that_was_left_is_open_until_the_new_one_is_validated() -> None:
    """What comes late to old addresses and old CIDs is taken."""
    talk = flow(3, jitter=0.03)
    talk.run(1.0)
    talk.net.rebind(talk.edge, keep=True)
    talk.session.migrate(same_host=True, now=talk.net.now)
    talk.run(2.0)
    talk.finish()
    assert talk.hub.endpoint.statistics().dropped_unknown_cid == 0
    assert talk.hub.endpoint.statistics().resets_sent == 0


def test_a_silent_nat_is_outlived_by_another_port() -> None:
    """Under traffic a path is suspect after 3 PTO; the dialling side takes another port (R-8-8)."""
    talk = flow(1)
    talk.edge.moves = True
    talk.run(1.0)
    block(talk, talk.edge.seen_as)
    talk.stalls = dict.fromkeys(talk.stalls, 0.0)
    talk.run(4.0)
    talk.finish()
    assert talk.session.statistics().rebinds == 1
    assert max(talk.stalls.values()) < SUSPECT_TIME + 0.5


def block(talk: Flow, addr: object) -> None:
    """What this address sends, or is sent, is lost for ever."""
    net = talk.net
    out, back = net.link(talk.edge, talk.hub), net.link(talk.hub, talk.edge)
    out.hook = lambda data, n: [] if talk.edge.seen_as == addr else [data]
    back.hook = lambda data, n: [] if talk.peer.addr == addr else [data]


def test_an_idle_session_tries_another_port_before_it_gives_up() -> None:
    talk = flow(1, rate=0.0)
    talk.edge.moves = True
    talk.net.run_for(1.0)
    block(talk, talk.edge.seen_as)
    talk.net.run_for(60.0)
    talk.finish()
    assert talk.session.statistics().rebinds == 1


def test_all_paths_dead_is_the_end_in_five_seconds() -> None:
    """New ports are tried ever more rarely; then it is for the owner to take another carrier (R-8-8)."""
    talk = flow(1)
    talk.edge.moves = True
    talk.run(1.0)
    for link in talk.net.both(talk.edge, talk.hub):
        link.loss = 1.0
    start = talk.net.now
    talk.net.run(lambda: talk.edge.closed(talk.session) is not None, limit=10.0)
    assert DEAD_TIME <= talk.net.now - start <= DEAD_TIME + 0.5
    closed = talk.edge.closed(talk.session)
    assert closed is not None
    assert closed.code is LocalCause.DEAD_PEER
    assert 3 <= talk.session.statistics().rebinds <= 4
    assert talk.edge.endpoint.take_suspects() == []


def test_who_waits_for_an_answer_suspects_as_under_traffic() -> None:
    """R-8-8: the question was acknowledged, the answer is lost, nothing is under way: a PING is, and is tracked."""
    talk = flow(1)
    talk.run(1.0)
    talk.finish()
    talk.net.run_for(1.0)
    talk.session.expect(1.0)
    for link in talk.net.both(talk.edge, talk.hub):
        link.loss = 1.0
    took = talk.net.run(lambda: bool(talk.edge.endpoint.take_suspects()), limit=20.0)
    assert took <= 2.5


def test_both_paths_dead_for_the_listener() -> None:
    """The trial fails, the old path is silent too: dead as ever, nothing left behind."""
    talk = flow(1)
    talk.run(1.0)
    talk.net.rebind(talk.edge, ip="203.0.113.9")
    talk.net.run(lambda: talk.peer.addr == talk.edge.seen_as, limit=1.0)
    for link in talk.net.both(talk.edge, talk.hub):
        link.loss = 1.0
    talk.net.run(lambda: talk.hub.closed(talk.peer) is not None, limit=10.0)
    assert talk.peer.statistics().path_reverts == 1
    talk.net.run_for(1.0)
    assert not talk.hub.endpoint._by_cid


def test_an_address_that_fails_is_tried_again_at_once_if_the_old_one_is_silent() -> None:
    """R-8-7: only a peer that is heard at its old address casts doubt on the new one."""
    talk = flow(1)
    talk.run(1.0)
    new = talk.net.rebind(talk.edge)
    back = talk.net.link(talk.hub, talk.edge)
    back.loss = 1.0
    talk.net.run(lambda: talk.peer.statistics().path_reverts == 1, limit=2.0)
    back.loss = 0.0
    talk.run(0.5)
    assert validated(talk)
    assert talk.peer.addr == new
    talk.finish()


def test_suspicion_is_for_those_who_can_move() -> None:
    """A listener never suspects; nobody has to heed the signal."""
    talk = flow(1)
    talk.run(1.0)
    for link in talk.net.both(talk.edge, talk.hub):
        link.loss = 1.0
    talk.run(2.0)
    assert talk.hub.endpoint.take_suspects() == []
    assert talk.edge.endpoint.take_suspects() == [talk.session]
    assert talk.edge.endpoint.take_suspects() == []
    for link in talk.net.both(talk.edge, talk.hub):
        link.loss = 0.0
    talk.run(1.0)
    talk.finish()


def idle(net: Network, learner: KeepaliveLearner | None, **options: float) -> tuple[Host, Host]:
    hub, edge = net.listener(), net.dialler(**options)
    net.establish(edge.connect(hub, keepalive=learner))
    net.run_for(1.0)
    return hub, edge


def test_an_idle_session_costs_less_than_a_megabyte_a_day() -> None:
    """With what IP and UDP add: 112 KB at the longest interval, 0.8 MB at the shortest (R-8-9)."""
    cost = {}
    for interval in (KEEPALIVE_LEAST, KEEPALIVE_MOST):
        net = Network(1, delay=0.02)
        idle(net, None, keepalive=interval)
        net.log.clear()
        net.run_for(86_400.0)
        cost[interval] = sum(len(data) + 28 for _, _, _, data in net.log)
    assert cost[KEEPALIVE_LEAST] < 1_000_000
    assert cost[KEEPALIVE_MOST] < 150_000


@pytest.mark.parametrize("patience", [18.0, 30.0, 60.0, 115.0])
def test_the_interval_settles_below_what_the_nat_bears(patience: float) -> None:
    """A NAT that forgets after so many silent seconds: soon nothing is forgotten, one session all along (R-8-9)."""
    net = Network(1, delay=0.02)
    learner = KeepaliveLearner()
    hub, edge = idle(net, learner)
    spoke = net.now

    def forgets(data: bytes, number: int) -> list[bytes]:
        nonlocal spoke
        spoke = net.now
        return [data]

    net.link(edge, hub).hook = forgets
    forgotten = []
    while net.now < 1000.0 + 3 * 3600:
        net.run_for(1.0)
        if net.now - spoke > patience and (not forgotten or forgotten[-1] < spoke):
            forgotten.append(net.now)
            net.rebind(edge)
    assert learner.interval <= patience
    assert learner.interval == KEEPALIVE_MOST or learner.interval >= 0.6 * patience
    assert len(forgotten) <= 3
    assert len(hub.connected()) == len(edge.connected()) == 1
    assert hub.endpoint.totals().path_validations == len(forgotten)


@pytest.mark.parametrize("seed", seeds(10, 400))
def test_any_schedule_of_changes(seed: int) -> None:
    """Ports, addresses, moves on purpose, copies from elsewhere, loss and reordering, at random: all arrives once.

    Not both at once, copies that always come first and a change of address: that peer is never heard first. And each
    change is followed by something that the dialling side says, or the listener could not know.
    """
    rng = random.Random(seed)
    loss, jitter = rng.choice([0.0, 0.02, 0.15]), rng.choice([0.0, 0.01, 0.04])
    delay = rng.choice([0.001, 0.015, 0.1])
    talk = flow(seed, rate=rng.choice([5_000.0, 30_000.0]), delay=delay, loss=loss, jitter=jitter)
    talk.edge.moves = rng.random() < 0.5
    for n in range(rng.randrange(3, 12)):
        what = rng.randrange(5)
        talk.net.link(talk.edge, talk.hub).hook = None
        if what == 0:
            talk.net.rebind(talk.edge, keep=rng.random() < 0.3)
        elif what == 1:
            talk.net.rebind(talk.edge, ip=f"203.0.113.{rng.randrange(1, 9)}")
        elif what == 2:
            same = rng.random() < 0.5
            talk.net.rebind(talk.edge, ip=None if same else f"203.0.113.{n + 10}")
            talk.session.migrate(same_host=same, now=talk.net.now)
        elif what == 3:
            copier = Copier(talk, addr=("198.51.100.66", 1000 + n))
            share = rng.random()
            copier.wanted = lambda n, share=share: rng.random() < share  # type: ignore[misc]
        talk.run(rng.choice([0.02, 0.2, 1.5]))
    talk.net.link(talk.edge, talk.hub).hook = None
    talk.run(3.0)
    talk.finish(120.0)
