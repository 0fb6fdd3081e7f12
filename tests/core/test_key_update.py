"""stp.core.phases: promises (1) to (4) of its head, and the key limits of the packetizer (protocol §9)."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

import pytest

from stp.core import frames, keys
from stp.core.acks import AckTracker
from stp.core.endpoint import EndpointConfig
from stp.core.errors import ErrorCode, ProtocolError
from stp.core.keys import SUITES, DirectionKeys, SessionKeys
from stp.core.packet import MAX_PN
from stp.core.packetizer import CLOSE_RESERVE, NUMBERS, Opener, Sealer
from stp.core.phases import (
    KEEP_PTOS,
    UPDATE_BYTES,
    UPDATE_PACKETS,
    UPDATE_SECONDS,
    KeyLimits,
    Phases,
    fail_limit,
    seal_limit,
)
from stp.core.states import State
from tests.sim import Network

AES = "TLS_AES_128_GCM_SHA256"
CHACHA = "TLS_CHACHA20_POLY1305_SHA256"
CID = b"\x01\x02\x03\x04\x05\x06\x07\x08"
PTO = 0.1
DATAGRAM = 1200


class End:
    """One end of a session without streams: seals, opens, updates. Time is what the test says."""

    def __init__(self, *, dialling: bool, suite: str = AES, limits: KeyLimits | None = None) -> None:
        made = SessionKeys.derive(bytes(32), suite)
        mine, theirs = (made.client, made.server) if dialling else (made.server, made.client)
        self.sealer = Sealer(mine, bytes(32), CID, Random(1).randbytes)
        self.opener = Opener(theirs, bytes(32), CID)
        self.acks = AckTracker()
        self.phases = Phases(made, mine, theirs, limits or KeyLimits(), DATAGRAM)
        self.phases.confirm(0.0)

    def seal(self, said: bytes = b"\x01") -> bytes:
        self.sealer.run()
        return self.sealer.seal(said)

    def open(self, data: bytes, now: float = 0.0) -> bytes | None:
        _, _, _, plain, strange = self.opener.open_buffer(data, len(data), {}, self.acks, now)
        for datagram in strange:
            assert self.opener.of_other_phase(datagram)
            return self.phases.open(datagram, self.opener, self.sealer, self.acks, PTO, now)
        return plain[0] if plain else None

    def begin(self, now: float = 0.0) -> None:
        """All that an update waits for is here, and it is begun."""
        before = self.sealer.first
        self.seal()
        for at in (now, now + KEEP_PTOS * PTO):
            self.phases.begin(self.sealer, self.sealer.next - 1, PTO, at)
        assert self.sealer.first > before

    @property
    def sends(self) -> int:
        return self.sealer._prefix[0] & 1

    @property
    def receives(self) -> int:
        return self.opener.first_byte & 1


def ends(suite: str = AES) -> tuple[End, End]:
    """Both, after a packet each way."""
    a, b = End(dialling=True, suite=suite), End(dialling=False, suite=suite)
    assert b.open(a.seal()) == a.open(b.seal()) == b"\x01"
    return a, b


def test_the_limits_are_the_protocols() -> None:
    """R-9-1."""
    assert (UPDATE_PACKETS, UPDATE_BYTES, UPDATE_SECONDS) == (1 << 20, 1 << 36, 3600.0)
    aes, chacha = (SessionKeys.derive(bytes(32), suite) for suite in (AES, CHACHA))
    assert (seal_limit(aes, KeyLimits()), fail_limit(aes, KeyLimits())) == (1 << 23, 1 << 52)
    assert (seal_limit(chacha, KeyLimits()), fail_limit(chacha, KeyLimits())) == (1 << 62, 1 << 36)
    lower = KeyLimits(seal_limit=7, fail_limit=8)
    assert (seal_limit(aes, lower), fail_limit(aes, lower)) == (7, 8)
    assert EndpointConfig(tls=lambda _: None, leaf_der=b"", random_bytes=bytes).key_limits == KeyLimits()


# -- the sender (1)


@pytest.mark.parametrize("suite", SUITES)
def test_an_update_and_its_answer(suite: str) -> None:
    """Promise (2): three times, begun by either side; whitening and numbers go on."""
    a, b = ends(suite)
    for n in range(1, 4):
        one, other = (a, b) if n % 2 else (b, a)
        one.begin()
        assert one.phases.unanswered
        assert (one.sends, one.receives) == (n % 2, 1 - n % 2)
        assert other.open(one.seal(b"new")) == b"new"
        assert (other.sends, other.receives) == (n % 2, n % 2)
        assert one.open(other.seal(b"answer")) == b"answer"
        assert (one.sends, one.receives) == (n % 2, n % 2)
        assert not one.phases.unanswered
        assert one.phases.updates == other.phases.updates == n
    assert a.opener.failed == b.opener.failed == 0


def test_never_before_confirmation() -> None:
    """R-9-1."""
    a = End(dialling=True)
    a.phases = Phases(
        SessionKeys.derive(bytes(32), AES),
        DirectionKeys.derive(bytes(32), AES),
        DirectionKeys.derive(bytes(32), AES),
        KeyLimits(packets=1),
        DATAGRAM,
    )
    a.seal()
    assert a.phases.due_at == float("inf")
    for at in (0.0, 10.0, 1e9):
        a.phases.begin(a.sealer, 0, PTO, at)
    assert a.sends == 0
    a.phases.confirm(0.0)
    for at in (0.0, 10.0):
        a.phases.begin(a.sealer, 0, PTO, at)
    assert a.sends == 1


def test_never_before_an_acknowledgement_and_three_pto() -> None:
    """R-9-1."""
    a, _ = ends()
    a.phases.begin(a.sealer, -1, PTO, 0.0)
    a.phases.begin(a.sealer, -1, PTO, 100.0)
    a.phases.begin(a.sealer, 0, PTO, 200.0)
    a.phases.begin(a.sealer, 0, PTO, 200.0 + 2.9 * PTO)
    assert a.sends == 0
    a.phases.begin(a.sealer, 0, PTO, 200.0 + 3.1 * PTO)
    assert a.sends == 1
    for at in (300.0, 400.0):  # not again without an answer
        a.phases.begin(a.sealer, a.sealer.next, PTO, at)
    assert a.sends == 1


def test_the_next_phase_waits_anew() -> None:
    a, b = ends()
    a.begin()
    b.open(a.seal())
    a.open(b.seal())
    old = a.sealer.first - 1
    for at in (1.0, 2.0):
        a.phases.begin(a.sealer, old, PTO, at)
    a.phases.begin(a.sealer, old + 1, PTO, 3.0)
    assert a.sends == 1
    a.phases.begin(a.sealer, old + 1, PTO, 4.0)
    assert a.sends == 0


def test_what_uses_up_a_phase() -> None:
    made = SessionKeys.derive(bytes(32), AES)

    def packets(limits: KeyLimits) -> int:
        return Phases(made, made.client, made.server, limits, DATAGRAM).packets

    assert packets(KeyLimits()) == UPDATE_PACKETS
    assert packets(KeyLimits(packets=9)) == 9
    assert packets(KeyLimits(bytes=DATAGRAM * 5 + 1)) == 5
    a, b = End(dialling=True), End(dialling=False, limits=KeyLimits(seconds=7.0))
    b.phases.confirm(1.0)
    assert (a.phases.due_at, b.phases.due_at) == (3600.0, 8.0)
    b.seal()
    a.begin()
    b.open(a.seal(), 5.0)
    assert b.phases.due_at == 12.0  # the peer's update is ours


# -- the receiver (2), (3)


def test_old_packets_open_for_three_pto() -> None:
    """R-9-2."""
    a, b = ends()
    early, late = a.seal(b"early"), a.seal(b"late")
    a.begin()
    assert b.open(a.seal(), 1.0) == b"\x01"
    assert b.phases.previous is not None
    assert b.phases.previous.until == 1.0 + KEEP_PTOS * PTO
    assert b.open(early, 1.0 + 2.9 * PTO) == b"early"
    assert b.open(early, 1.0 + 2.9 * PTO) is None
    assert b.opener.repeated == 1
    assert b.open(late, 1.0 + 3.1 * PTO) is None
    assert b.opener.failed == 1
    b.phases.drop(1.0 + 2.9 * PTO)
    assert b.phases.previous is not None
    b.phases.drop(1.0 + 3.1 * PTO)
    assert b.phases.previous is None
    assert b.open(late, 1.0) is None  # gone, not only out of use
    assert b.opener.failed == 2


def test_a_phase_may_begin_out_of_order() -> None:
    """What opens by current keys below the first one seen is of this phase too."""
    a, b = ends()
    old = [a.seal(b"old 1"), a.seal(b"old 2")]
    a.begin()
    new = [a.seal(b"new 1"), a.seal(b"new 2"), a.seal(b"new 3")]
    order = [new[1], old[0], new[0], old[1], new[2]]
    assert [b.open(d) for d in order] == [b"new 2", b"old 1", b"new 1", b"old 2", b"new 3"]
    assert b.opener.lowest == a.sealer.first
    assert b.opener.failed == 0


def test_keys_of_the_phase_before_the_previous_are_gone() -> None:
    a, b = ends()
    ancient = a.seal(b"ancient")
    for _ in range(2):
        a.begin()
        b.open(a.seal())
        a.open(b.seal())
    assert b.receives == 0
    assert b.open(ancient) is None
    assert b.opener.failed == 1


def test_an_old_key_with_a_higher_number() -> None:
    """R-9-2."""
    a, b = ends()
    liar = End(dialling=True)
    a.begin()
    b.open(a.seal())
    liar.sealer.next = a.sealer.next + 5
    with pytest.raises(ProtocolError) as refused:
        b.open(liar.seal())
    assert refused.value.code is ErrorCode.KEY_UPDATE
    assert b.opener.failed == 0


def test_a_new_key_with_a_lower_number() -> None:
    """The same offence, seen in the other order."""
    a, b = ends()
    liar = End(dialling=True)
    liar.sealer.next = 100
    b.open(liar.seal())
    a.begin()
    with pytest.raises(ProtocolError) as refused:
        b.open(a.seal())
    assert refused.value.code is ErrorCode.KEY_UPDATE
    assert b.receives == b.sends == 0


def test_an_update_before_the_last_one_was_answered() -> None:
    a, b = ends()
    a.begin()
    b.open(a.seal())
    a.phases.unanswered = False
    a.begin()
    with pytest.raises(ProtocolError) as refused:
        b.open(a.seal())
    assert refused.value.code is ErrorCode.KEY_UPDATE


def test_an_old_key_that_acknowledges_a_newer_one() -> None:
    a, _ = ends()
    a.begin()
    a.phases.on_ack(a.sealer.first, a.sealer)
    with pytest.raises(ProtocolError) as refused:
        a.phases.on_ack(a.sealer.first + 1, a.sealer)
    assert refused.value.code is ErrorCode.KEY_UPDATE


def test_a_flipped_phase_bit_moves_nothing() -> None:
    """The bit is in the clear, and under the tag. Of the first phase, of the next, and with previous keys about."""
    a, b = ends()
    for moves in range(3):
        good = a.seal()
        before = (b.sends, b.receives, b.phases.updates, b.acks.next, b.opener.lowest, b.phases._secrets)
        bad = bytes((good[0] ^ 1,)) + good[1:]
        for _ in range(3):
            assert b.open(bad) is None
        after = (b.sends, b.receives, b.phases.updates, b.acks.next, b.opener.lowest, b.phases._secrets)
        assert after == before
        assert b.opener.failed == 3 * (moves + 1)
        assert b.open(good) == b"\x01"
        a.begin()
        assert b.open(a.seal()) == b"\x01"
        assert a.open(b.seal()) == b"\x01"
    assert b.phases.updates == 3


def test_a_number_beyond_all_numbers_moves_nothing() -> None:
    a, b = ends()
    a.begin()
    a.sealer.next = MAX_PN + 1
    a.sealer.skip_at = MAX_PN + 10
    assert b.open(a.seal()) is None
    assert (b.opener.repeated, b.opener.failed, b.receives) == (1, 0, 0)


def test_both_begin_at_once() -> None:
    a, b = ends()
    a.begin()
    b.begin()
    from_a, from_b = a.seal(b"a"), b.seal(b"b")
    assert (a.open(from_b), b.open(from_a)) == (b"b", b"a")
    for end in (a, b):
        assert (end.sends, end.receives, end.phases.updates, end.phases.unanswered) == (1, 1, 1, False)


# -- the vectors


def vector_packets() -> list[dict[str, Any]]:
    path = Path(__file__).parent.parent / "vectors" / "stp1.json"
    return [
        case
        for case in json.loads(path.read_text())["data_packets"]
        if case["name"].startswith("client, phase")
    ]


def test_the_vectors_of_three_phases() -> None:
    """One connection's packets, by the same code that updates keys: sealed and opened (R-2-3)."""
    cases = vector_packets()
    assert [case["updates"] for case in cases] == [0, 1, 2]
    assert [case["phase"] for case in cases] == [0, 1, 0]
    x_0, cid = bytes.fromhex(cases[0]["x_0"]), bytes.fromhex(cases[0]["cid"])
    pn_key = keys.expand(x_0, "pn", 32)
    direction = DirectionKeys.derive(x_0, AES)
    made = SessionKeys.derive(bytes(32), AES)
    sealer, other = Sealer(direction, pn_key, cid, Random(1).randbytes), End(dialling=True)
    opener, acks = Opener(direction, pn_key, cid), AckTracker()
    sending = Phases(made, direction, made.server, KeyLimits(), DATAGRAM)
    receiving = Phases(made, made.client, direction, KeyLimits(), DATAGRAM)
    for case in cases:
        whole = bytes.fromhex(case["packet"])
        if case["updates"]:
            sending._move(sealer, 0.0)
        sealer.next = int(case["pn"])
        assert sealer.seal(bytes.fromhex(case["frames"])) == whole
        _, _, _, plain, strange = opener.open_buffer(whole, len(whole), {}, acks, 0.0)
        other.seal()
        for datagram in strange:
            found = receiving.open(datagram, opener, other.sealer, acks, PTO, 0.0)
            plain += [found] if found is not None else []
        assert [p.hex() for p in plain] == [case["frames"]]
    assert receiving.updates == 2


# -- what a key may seal (4)


@pytest.mark.parametrize("limit", [CLOSE_RESERVE + 2, 300, 1000])
def test_a_key_seals_to_its_limit_and_not_further(limit: int) -> None:
    """R-9-3."""
    made = SessionKeys.derive(bytes(32), AES)
    sealer = Sealer(made.client, bytes(32), CID, lambda n: bytes(n), limit)
    sealed = 0
    with pytest.raises(ProtocolError) as refused:
        while True:
            run = min(sealer.run(), 54)
            sealer.seal_burst(2, 0, bytes(run), 0, run, 1, False)
            sealed += run
    assert refused.value.code is ErrorCode.AEAD_LIMIT
    assert sealed == limit - CLOSE_RESERVE - len(sealer.skipped)
    with pytest.raises(ProtocolError):
        sealer.run()
    first = sealer.next
    sealer.use_keys(made.client.next().aead)
    assert sealer.run() > 0
    assert sealer.first == first


def test_numbers_end() -> None:
    """Protocol §2: 62 bits. The last ones are for CLOSE."""
    made = SessionKeys.derive(bytes(32), CHACHA)
    sealer = Sealer(made.client, bytes(32), CID, Random(1).randbytes)
    sealer.next = sealer.first = NUMBERS - CLOSE_RESERVE - 1
    sealer.skip_at = NUMBERS
    sealer._plan_skip()
    assert sealer.run() == 1
    sealer.seal(b"\x01")
    with pytest.raises(ProtocolError) as refused:
        sealer.run()
    assert refused.value.code is ErrorCode.AEAD_LIMIT
    assert sealer.next == NUMBERS - CLOSE_RESERVE


# -- in a session


class Pair:
    """An established session, and hands on both ends."""

    def __init__(self, limits: KeyLimits | None = None, **conditions: Any) -> None:
        self.net = Network(2, **conditions)
        options = {} if limits is None else {"key_limits": limits}
        self.hub, self.edge = self.net.listener(**options), self.net.dialler(**options)
        self.session = self.edge.connect(self.hub)
        self.peer = self.net.establish(self.session)
        self.net.run_for(1.0)
        assert self.session._data is not None
        assert self.peer._data is not None
        self.near, self.far = self.session._data, self.peer._data

    def move(self) -> None:
        """The dialling side begins an update, whatever the rules say."""
        self.near.phases._move(self.near.sealer, self.net.now)
        self.near.phases.unanswered = True

    def packet(self, *said: frames.Frame) -> bytes:
        self.near.sealer.run()
        plain = [f.encode_last() if isinstance(f, frames.Stream) else f.encode() for f in said]
        return self.near.sealer.seal(b"".join(plain))

    def updates(self) -> tuple[int, int]:
        return self.session.statistics().key_updates, self.peer.statistics().key_updates


@pytest.mark.parametrize(
    "limits", [KeyLimits(packets=50), KeyLimits(bytes=50 * 1200), KeyLimits(seconds=4.0)], ids=str
)
def test_a_used_up_phase_is_followed_by_the_next(limits: KeyLimits) -> None:
    pair = Pair(limits)
    assert pair.updates() == (0, 0)
    for _ in range(100):
        pair.session.write(0, bytes(1000))
        pair.net.run_for(0.1)
    assert pair.updates()[0] == pair.updates()[1] == 2
    assert pair.hub.received_length(pair.peer, 0) == 100_000
    assert pair.session.statistics().failed_opens == pair.peer.statistics().failed_opens == 0


@pytest.mark.parametrize("end", ["session", "peer"])
def test_a_phase_ends_after_two_to_the_twenty_packets(end: str) -> None:
    """The protocol's own limit; what is near it was not sent, only numbered."""
    pair = Pair()
    chosen = getattr(pair, end)
    chosen._data.sealer.next = UPDATE_PACKETS - 30
    chosen._data.sealer.skip_at = UPDATE_PACKETS * 2
    sent = 0
    while chosen._data.sealer.next < UPDATE_PACKETS:
        assert pair.updates() == (0, 0)
        chosen.write(0, bytes(1000))
        pair.net.run_for(0.1)
        sent += 1
    assert sent >= 10
    for _ in range(10):
        chosen.write(0, bytes(1000))
        pair.net.run_for(0.1)
    assert pair.updates() == (1, 1)
    assert chosen._data.sealer.first >= UPDATE_PACKETS


def test_an_idle_session_updates_with_its_pings() -> None:
    """By age; the previous keys go without any traffic."""
    pair = Pair(KeyLimits(seconds=60.0))
    pair.net.run(lambda: pair.updates() == (1, 1), limit=200.0)
    assert pair.near.phases.previous is not None
    pair.net.run_for(2.0)
    assert pair.near.phases.previous is pair.far.phases.previous is None
    pair.net.run(lambda: pair.updates() == (3, 3), limit=400.0)
    assert pair.session.state is pair.peer.state is State.ESTABLISHED


def test_a_buffer_in_which_the_phase_changes() -> None:
    """One receive buffer, both phases, bytes of a stream in order throughout."""
    pair = Pair()
    parts = [pair.packet(frames.Stream(2, at, b"%d" % at)) for at in range(4)]
    pair.move()
    parts += [pair.packet(frames.Stream(2, at, b"%d" % at)) for at in range(4, 8)]
    assert len({len(p) for p in parts}) == 1
    pair.hub.endpoint.receive(b"".join(parts), pair.edge.addr, pair.net.now, len(parts[0]))
    pair.net.flush()
    assert pair.hub.received(pair.peer, 2) == b"01234567"
    pair.net.run(lambda: pair.updates() == (1, 1), limit=1.0)
    assert pair.peer.statistics().failed_opens == 0


def test_another_cid_and_another_phase_at_once() -> None:
    pair = Pair()
    _, other = pair.near.remote_cids.spare.popitem()
    pair.move()
    pair.near.sealer.use_cid(other)
    pair.session.write(0, b"moved")
    pair.net.run(lambda: pair.hub.received(pair.peer, 0) == b"moved", limit=1.0)
    assert pair.far.opener.current == other
    assert pair.updates()[1] == 1


def test_an_acknowledgement_under_the_old_key_closes() -> None:
    """R-9-2: our packet of the new phase was opened, and the answer came under the old key."""
    pair = Pair()
    pair.far.phases._move(pair.far.sealer, pair.net.now)
    pair.far.phases.unanswered = True
    first = pair.far.sealer.first
    pair.far.sealer.run()
    pair.far.sealer.seal(b"\x01")
    pair.net.inject(pair.packet(frames.Ack(0, [(first, first + 1)])), source=pair.edge, to=pair.hub)
    closed = pair.hub.closed(pair.peer)
    assert closed is not None
    assert closed.code is ErrorCode.KEY_UPDATE


def test_key_update_closes_with_its_code_on_both_sides() -> None:
    pair = Pair()
    pair.move()
    forged = pair.packet(frames.Ping())
    pair.far.sealer.first = pair.far.sealer.next  # as if we had answered nothing in this phase
    pair.net.inject(forged, source=pair.edge, to=pair.hub)
    closed = pair.hub.closed(pair.peer)
    assert closed is not None
    assert closed.code is ErrorCode.KEY_UPDATE
    pair.net.run_for(0.1)
    told = pair.edge.closed(pair.session)
    assert told is not None
    assert (told.code, told.by_peer) == (ErrorCode.KEY_UPDATE, True)


@pytest.mark.parametrize("case", ["heard", "damaged", "offence", "elsewhere"])
def test_a_close_in_the_next_phase_while_closing(case: str) -> None:
    """It is heard; one that does not open, breaks the rules or names another CID is nothing to a closing session."""
    pair = Pair()
    pair.peer.close(ErrorCode.NO_ERROR, "", pair.net.now)
    pair.move()
    said = pair.packet(frames.Close(0, ""))
    if case == "damaged":
        said = said[:-1] + bytes((said[-1] ^ 1,))
    elif case == "offence":
        pair.far.sealer.first = pair.far.sealer.next
    elif case == "elsewhere":
        said = said[:1] + pair.far.local_cids.active[2] + said[9:]
    pair.hub.endpoint.receive(said, pair.edge.addr, pair.net.now)
    assert pair.peer.state is (State.DRAINING if case == "heard" else State.CLOSING)


def test_failed_opens_count_whatever_opens_beside_them() -> None:
    """R-9-3: a flood of forgeries in the buffers of an honest peer, and of either phase."""
    pair = Pair(KeyLimits(fail_limit=6))
    for n in range(3):
        good = pair.packet(frames.Ping())
        bad = good[:-1] + bytes((good[-1] ^ 1,))
        flipped = bytes((bad[0] ^ 1,)) + bad[1:]
        assert pair.peer.state is State.ESTABLISHED
        assert pair.peer.statistics().failed_opens == 2 * n
        pair.hub.endpoint.receive(good + bad + flipped, pair.edge.addr, pair.net.now, len(good))
    pair.net.flush()
    closed = pair.hub.closed(pair.peer)
    assert closed is not None
    assert closed.code is ErrorCode.AEAD_LIMIT


def test_the_first_numbers_of_phases_ascend() -> None:
    """No number is used twice over all keys."""
    a, b = ends()
    firsts = [a.sealer.first]
    for _ in range(5):
        a.begin()
        b.open(a.seal())
        a.open(b.seal())
        firsts.append(a.sealer.first)
    assert all(one < other for one, other in pairwise(firsts))
    assert b.opener.repeated == 0
