"""Faults 27 and 28: keys that change all the time, and keys and numbers that wear out (protocol §9). Level L1."""

from __future__ import annotations

from collections import defaultdict
from itertools import pairwise

import pytest

from stp.core.errors import ErrorCode
from stp.core.packet import DATA_HEADER_LENGTH, is_data
from stp.core.packetizer import CLOSE_RESERVE, NUMBERS
from stp.core.phases import KEEP_PTOS, KeyLimits
from stp.core.session import Session
from stp.core.states import State
from tests.sim import Network, flip_bit

EVERY = 8
"""Packets of a phase: so few that an update follows as soon as it may."""
CHUNK = 1500


class Talk:
    """Two ends that write to each other all the time, and keep to the same key limits."""

    def __init__(self, seed: int, limits: KeyLimits | None = None, **conditions: object) -> None:
        self.net = Network(seed, **({"delay": 0.002} | conditions))
        self.net.keep_log = False
        limits = KeyLimits(packets=EVERY) if limits is None else limits
        self.hub = self.net.listener(key_limits=limits)
        self.edge = self.net.dialler(key_limits=limits)
        self.session = self.edge.connect(self.hub)
        self.peer = self.net.establish(self.session)
        self.lanes = {end: end.open_stream() for end in (self.session, self.peer)}
        self.written = dict.fromkeys(self.lanes, 0)

    def write(self, end: Session, size: int = CHUNK) -> None:
        """Each byte depends on where it stands."""
        at = self.written[end]
        size = min(size, end.room(self.lanes[end]))
        end.write(self.lanes[end], pattern(at, size))
        self.written[end] = at + size

    def talk(self, updates: int, *, limit: float, both: bool = True) -> None:
        """Until both ends have followed so many updates."""
        stop = self.net.now + limit
        while min(self.updates()) < updates:
            assert self.net.now < stop, f"{self.updates()} of {updates} updates; {self.net.describe()}"
            self.write(self.session)
            if both:
                self.write(self.peer)
            self.net.run_for(0.01)

    def updates(self) -> tuple[int, int]:
        return self.session.statistics().key_updates, self.peer.statistics().key_updates

    def must_be_whole(self) -> None:
        """No gap, nothing twice, both alive."""
        for host, reader, writer in (
            (self.hub, self.peer, self.session),
            (self.edge, self.session, self.peer),
        ):
            lane, size = self.lanes[writer], self.written[writer]
            self.net.run(lambda h=host, r=reader, n=lane, s=size: h.received_length(r, n) >= s, limit=60.0)
            assert host.received(reader, lane) == pattern(0, size)
        assert self.session.state is self.peer.state is State.ESTABLISHED


_PATTERN = b"".join(n.to_bytes(4, "big") for n in range(16_384))


def pattern(at: int, size: int) -> bytes:
    start = at % len(_PATTERN)
    return (_PATTERN * (2 + size // len(_PATTERN)))[start : start + size]


@pytest.mark.parametrize(
    ("conditions", "updates"),
    [
        ({}, 300),
        ({"jitter": 0.02}, 150),
        ({"loss": 0.05, "burst": 3}, 100),
        ({"loss": 0.1, "jitter": 0.02, "duplicate": 0.1, "corrupt": 0.05}, 60),
    ],
    ids=["clean", "reordered", "lossy", "all at once"],
)
def test_fault_27_update_after_update(conditions: dict[str, float], updates: int) -> None:
    talk = Talk(updates, **conditions)
    talk.talk(updates, limit=updates * 2.0)
    talk.must_be_whole()


@pytest.mark.many
@pytest.mark.parametrize("seed", range(100))
def test_fault_27_update_after_update_many(seed: int) -> None:
    """10^4 updates in all."""
    talk = Talk(seed, KeyLimits(packets=1 << seed % 6), loss=0.03 * (seed % 4), jitter=0.01 * (seed % 3))
    talk.talk(100, limit=600.0)
    talk.must_be_whole()


@pytest.mark.parametrize("exponent", range(1, 8))
def test_fault_27_phases_of_two_to_the_n_packets(exponent: int) -> None:
    """A phase has at least so many packets, and where the path allows it hardly more."""
    every = 1 << exponent
    talk = Talk(exponent, KeyLimits(packets=every), loss=0.02, jitter=0.005)
    spaces = [end._data for end in (talk.session, talk.peer)]
    firsts: list[list[int]] = [[0], [0]]
    for _ in range(400):
        talk.write(talk.session)
        talk.write(talk.peer)
        talk.net.run_for(0.01)
        for space, known in zip(spaces, firsts, strict=True):
            assert space is not None
            if space.sealer.first != known[-1]:
                known.append(space.sealer.first)
    near, far = ([b - a for a, b in pairwise(known)] for known in firsts)
    assert min(len(near), len(far)) > 5
    assert all(max(both) >= every for both in zip(near, far, strict=False))  # one of them had its reason
    assert min(max(both) for both in zip(near, far, strict=False)) < every + 200
    talk.must_be_whole()


@pytest.mark.parametrize("from_hub", [True, False])
def test_fault_27_while_only_one_side_talks(from_hub: bool) -> None:
    """The other acknowledges, nothing more, and follows."""
    talk = Talk(1)
    end = talk.peer if from_hub else talk.session
    for _ in range(300):
        talk.write(end)
        talk.net.run_for(0.01)
    assert min(talk.updates()) > 10
    talk.must_be_whole()


def test_fault_27_both_begin_at_once() -> None:
    """A symmetric link: both ends begin the same update before they hear of the other's."""
    talk = Talk(4, delay=0.05)
    near, far = talk.session._data, talk.peer._data
    assert near is not None
    assert far is not None
    together = 0
    for n in range(1, 60):
        talk.net.run_for(0.2)
        for space in (near, far):
            space.phases._move(space.sealer, talk.net.now)
            space.phases.unanswered = True
        talk.write(talk.session)
        talk.write(talk.peer)
        talk.net.flush()
        together += near.phases.unanswered and far.phases.unanswered
        talk.net.run(lambda want=n: talk.updates() == (want, want), limit=1.0)
    assert together == 59
    talk.must_be_whole()


def test_fault_27_an_outage_in_the_middle_of_an_update() -> None:
    """Both begin, nothing arrives for 3 s: then one phase, not two."""
    talk = Talk(5)
    talk.talk(3, limit=10.0)
    up, down = talk.net.both(talk.edge, talk.hub)
    for _ in range(5):
        near, far = talk.session._data, talk.peer._data
        assert near is not None
        assert far is not None
        up.loss = down.loss = 1.0
        before = talk.updates()
        for _ in range(30):
            talk.write(talk.session)
            talk.write(talk.peer)
            talk.net.run_for(0.1)
        assert max(talk.updates()) <= max(before) + 1
        up.loss = down.loss = 0.0
        talk.talk(max(before) + 2, limit=10.0)
    talk.must_be_whole()


def test_fault_27_old_keys_are_gone_after_three_pto() -> None:
    """Somebody holds packets of a phase back and lets them go: soon after the update they open, later never."""
    talk = Talk(6, KeyLimits(packets=1 << 60))
    near, far = talk.session._data, talk.peer._data
    assert near is not None
    assert far is not None
    held: list[bytes] = []
    link = talk.net.link(talk.edge, talk.hub)
    for late in (False, True) * 3:
        talk.net.run_for(1.0)
        link.hook = lambda data, _: (held.append(data), [])[1]
        for _ in range(3):
            near.output.ping()
            near.recovery.sent.clear()
            talk.session.want_to_send()
            talk.net.flush()
        link.hook = None
        assert len(held) == 3
        near.phases._move(near.sealer, talk.net.now)
        near.phases.unanswered = True
        near.output.ping()
        talk.session.want_to_send()
        talk.net.run(lambda: not near.phases.unanswered, limit=1.0)
        assert far.phases.previous is not None
        if late:
            talk.net.run_for(KEEP_PTOS * far.recovery.rtt.pto())
            assert far.phases.previous is None
        before = talk.peer.statistics().failed_opens
        for datagram in held:
            talk.net.inject(datagram, source=talk.edge, to=talk.hub)
        held.clear()
        assert talk.peer.statistics().failed_opens - before == (3 if late else 0)
        assert talk.peer.statistics().repeated == 0
    assert talk.updates() == (6, 6)


def test_fault_27_an_attacker_who_flips_the_phase_bit() -> None:
    """A flipped twin of every packet, before it, in both directions: as many failures, and not one update more."""
    talk = Talk(7, KeyLimits(packets=1 << 60), jitter=0.01)
    twins = 0

    def twin(data: bytes, _: int) -> list[bytes]:
        nonlocal twins
        if not is_data(data):
            return [data]
        twins += 1
        return [flip_bit(data, 0), data]

    for link in talk.net.both(talk.edge, talk.hub):
        link.hook = twin
    for _ in range(100):
        talk.write(talk.session)
        talk.write(talk.peer)
        talk.net.run_for(0.01)
    talk.must_be_whole()
    talk.net.run_for(1.0)
    assert talk.updates() == (0, 0)
    failed = talk.session.statistics().failed_opens + talk.peer.statistics().failed_opens
    assert failed == twins > 200


@pytest.mark.parametrize("share", [2, 5])
def test_fault_27_an_attacker_who_flips_the_phase_bit_during_updates(share: int) -> None:
    """Instead of the packet: it is lost, no more than that."""
    talk = Talk(share, jitter=0.005)

    def flip(data: bytes, number: int) -> list[bytes]:
        return [flip_bit(data, 0)] if is_data(data) and number % share == 0 else [data]

    for link in talk.net.both(talk.edge, talk.hub):
        link.hook = flip
    talk.talk(25, limit=300.0)
    talk.must_be_whole()
    first, second = talk.updates()
    assert abs(first - second) <= 1


# -- 28


@pytest.mark.parametrize("limit", [CLOSE_RESERVE + 50, CLOSE_RESERVE + 200])
def test_fault_28_a_key_that_has_sealed_its_fill(limit: int) -> None:
    """No update in time: AEAD_LIMIT, and no key ever sealed more than its limit, CLOSE included."""
    talk = Talk(8, KeyLimits(seal_limit=limit))
    talk.net.keep_log = True
    while talk.session.live and talk.net.now < 2000.0:
        talk.write(talk.session)
        talk.net.run_for(0.01)
    closed = talk.edge.closed(talk.session)
    assert closed is not None
    assert (closed.code, closed.by_peer) == (ErrorCode.AEAD_LIMIT, False)
    told = talk.hub.closed(talk.peer)
    assert told is not None
    assert (told.code, told.by_peer) == (ErrorCode.AEAD_LIMIT, True)
    sealed: dict[bytes, set[bytes]] = defaultdict(set)
    for _, source, _, data in talk.net.log:
        if source == talk.edge.addr and is_data(data):
            sealed[data[1:9]].add(data[9:DATA_HEADER_LENGTH])
    assert limit - CLOSE_RESERVE <= sum(map(len, sealed.values())) + 5 <= limit


def test_fault_28_updates_keep_a_session_below_the_limit() -> None:
    talk = Talk(9, KeyLimits(packets=50, seal_limit=CLOSE_RESERVE + 300))
    for _ in range(400):
        talk.write(talk.session)
        talk.net.run_for(0.01)
    assert talk.written[talk.session] > 300 * 1200
    assert min(talk.updates()) >= 3
    talk.must_be_whole()


def test_fault_28_failed_opens_are_counted_exactly() -> None:
    """One forgery below the limit nothing happens, at the limit AEAD_LIMIT; updates do not reset the count."""
    talk = Talk(10, KeyLimits(packets=EVERY, fail_limit=40))
    space = talk.peer._data
    assert space is not None
    sent = 0
    for _ in range(13):
        for phase in (0x40, 0x41, 0x40):
            talk.net.inject(bytes((phase,)) + space.opener.current + bytes(50), source=talk.edge, to=talk.hub)
            sent += 1
        talk.talk(min(talk.updates()) + 1, limit=5.0)
    assert talk.peer.statistics().failed_opens == sent == 39
    talk.must_be_whole()
    talk.net.inject(b"\x41" + space.opener.current + bytes(50), source=talk.edge, to=talk.hub)
    closed = talk.hub.closed(talk.peer)
    assert closed is not None
    assert closed.code is ErrorCode.AEAD_LIMIT


@pytest.mark.parametrize("both", [True, False])
def test_fault_28_numbers_near_their_end(both: bool) -> None:
    """2^62 is far away: a session that has come there goes on, updates, and closes when the numbers are used up."""
    talk = Talk(11)
    for end in (talk.session, talk.peer) if both else (talk.session,):
        space = end._data
        assert space is not None
        space.sealer.next = NUMBERS - 1500
        space.sealer.skip_at = NUMBERS - 1400
    talk.talk(5, limit=20.0)
    talk.must_be_whole()
    space = talk.session._data
    assert space is not None
    while talk.session.live and talk.net.now < 2000.0:
        talk.write(talk.session)
        talk.net.run_for(0.01)
    closed = talk.edge.closed(talk.session)
    assert closed is not None
    assert (closed.code, closed.by_peer) == (ErrorCode.AEAD_LIMIT, False)
    assert space.sealer.next <= NUMBERS
    told = talk.hub.closed(talk.peer)
    assert told is not None
    assert (told.code, told.by_peer) == (ErrorCode.AEAD_LIMIT, True)
    assert min(talk.updates()) > 5
