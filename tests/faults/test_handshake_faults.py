"""Faults 19, 22 and 26: tokens used again, forgers on the path, and TLS peers of another mind.

Two handshakes on a simulated link; the forger sees every datagram and knows the network key, as any node does.
"""

from __future__ import annotations

import random

import pytest
from OpenSSL import SSL

from stp.core import frames, packet
from stp.core.errors import PacketError
from stp.core.handshake import TlsSettings, make_context
from stp.core.initspace import HANDSHAKE_DEADLINE, HandshakeState
from stp.core.keys import initial_keys
from tests.core.handshake_kit import ADDRESS, Pair, credentials

KINDS = ("retry", "crypto", "alert", "ack", "close", "scid", "first-bytes")


class Forger:
    """Answers every datagram of the client's, at once, with one of its own making."""

    def __init__(self, pair: Pair, kind: str, seed: int, *, late: bool = False) -> None:
        self.pair, self.kind, self.rng, self.late = pair, kind, random.Random(seed), late
        self.send = pair.send
        self.forged = 0
        pair.send = self.watch  # type: ignore[method-assign]

    def watch(self, direction: str, datagram: bytes) -> None:
        self.send(direction, datagram)
        if datagram[0] != packet.INIT_BYTE:
            return
        seen = packet.parse_init(datagram)
        if direction == "c" and (seen.token or not self.late):
            self.forge(seen.scid, seen.dcid, seen.dcid)

    def forge(self, to: bytes, by: bytes, keys_from: bytes) -> None:
        self.forged += 1
        keys = initial_keys(keys_from)
        if self.kind == "retry":
            made = packet.build_retry(to, self.rng.randbytes(8), b"token", keys.retry_key, keys_from)
        else:
            scid = self.rng.randbytes(8) if self.kind == "scid" else by
            pn = self.rng.getrandbits(31)
            header = packet.init_header(to, scid, b"", pn)
            made = header + keys.server.seal(pn, self.payload(), header)
        self.pair.flying.append((self.pair.now + 0.001, "s", made))
        self.pair.flying.sort(key=lambda f: f[0])

    def payload(self) -> bytes:
        at = self.rng.choice((0, 50, 1500, 3000))
        return {
            "crypto": frames.Crypto(at, self.rng.randbytes(100)).encode(),
            "first-bytes": frames.Crypto(0, b"\x00\x02\x01\x00").encode(),
            "alert": frames.Crypto(at, b"\x15\x03\x03\x00\x02\x02\x31").encode(),
            "ack": frames.encode_ack(0, [(0, 1 << 31)]),
            "close": frames.Close(0x20, "go away").encode(),
            "scid": b"\x01",
        }[self.kind]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kind", KINDS)
def test_fault_22_a_forger_costs_at_most_this_attempt(kind: str, seed: int) -> None:
    pair = Pair(seed=seed)
    forger = Forger(pair, kind, seed)
    pair.run(lambda: pair.client.state is HandshakeState.OVER or pair.states() == {HandshakeState.DONE})
    assert forger.forged
    assert pair.now <= HANDSHAKE_DEADLINE + 0.001
    if pair.client.keys is not None and pair.server is not None and pair.server.keys is not None:
        assert pair.client.keys.session_id == pair.server.keys.session_id
    again = Pair(seed=seed + 100)
    again.run_to_done()
    assert again.states() == {HandshakeState.DONE}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kind", ["ack", "close"])
def test_fault_22_acks_and_closes_do_not_even_cost_that(kind: str, seed: int) -> None:
    """Once the Retry has named the listener's CID, what carries no CRYPTO changes nothing."""
    pair = Pair(seed=seed)
    forger = Forger(pair, kind, seed, late=True)
    pair.run_to_done()
    assert forger.forged
    assert pair.states() == {HandshakeState.DONE}
    assert pair.client.refused is None


@pytest.mark.parametrize("seed", range(8))
def test_fault_19_a_retry_token_is_good_once_here_and_now(seed: int) -> None:
    """Another address, another CID, a flipped bit, later: silence, and nothing kept."""
    rng = random.Random(seed)
    pair = Pair(seed=seed)
    shown: list[packet.InitPacket] = []

    def watch(direction: str, _count: int, datagram: bytes) -> bool:
        if direction == "c":
            shown.append(packet.parse_init(datagram))
        return False

    pair.drop = watch
    pair.run_to_done()
    token, dcid = next((p.token, p.dcid) for p in shown if p.token)
    flipped = bytearray(token)
    flipped[rng.randrange(1, len(token))] ^= 1 << rng.randrange(8)
    read = pair.keeper.read
    for verdict in (
        read(token, ("192.0.2.1", 4001), dcid, 1.0),
        read(token, ("192.0.2.9", 4000), dcid, 1.0),
        read(token, ADDRESS, rng.randbytes(8), 1.0),
        read(bytes(flipped), ADDRESS, dcid, 1.0),
        read(token, ADDRESS, dcid, 11.0),
    ):
        assert verdict is not None
        assert not hasattr(verdict, "original_dcid")


def test_fault_26_a_peer_of_tls_1_2_is_refused() -> None:
    own = credentials("edge-1")
    old = make_context(TlsSettings(own), server=False)
    old.set_min_proto_version(SSL.TLS1_2_VERSION)
    old.set_max_proto_version(SSL.TLS1_2_VERSION)
    pair = Pair(contexts=(old, make_context(TlsSettings(credentials("hub")), server=True)))
    pair.run(lambda: pair.server is not None and HandshakeState.OVER in pair.states())
    assert pair.server is not None
    assert pair.server.keys is None
    assert pair.client.keys is None
    assert pair.server.refused is not None


@pytest.mark.parametrize("suites", [b"TLS_AES_128_CCM_SHA256"])
def test_fault_26_no_suite_in_common_is_refused(suites: bytes) -> None:
    other = make_context(TlsSettings(credentials("edge-1")), server=False)
    other.set_tls13_ciphersuites(suites)
    pair = Pair(contexts=(other, make_context(TlsSettings(credentials("hub")), server=True)))
    pair.run(lambda: pair.server is not None and HandshakeState.OVER in pair.states())
    assert pair.client.keys is None
    assert pair.client.refused is not None
    assert (
        "no shared cipher" in pair.client.refused.reason or "handshake failure" in pair.client.refused.reason
    )


def test_fault_26_nothing_is_ever_resumed() -> None:
    """Two handshakes from one pair of contexts: both are full ones, with certificates in both directions (R-4-11)."""
    own = credentials("edge-1")
    contexts = (
        make_context(TlsSettings(own), server=False),
        make_context(TlsSettings(credentials("hub")), server=True),
    )
    first = Pair(contexts=contexts)
    first.run_to_done()
    second = Pair(seed=1, contexts=contexts)
    second.run_to_done()
    assert second.states() == {HandshakeState.DONE}
    assert second.server is not None
    assert second.server.peer is not None  # a resumed handshake shows no certificate
    assert first.bytes["s"] - 200 < second.bytes["s"]  # and sends none


def test_fault_26_a_client_without_a_certificate_is_refused() -> None:
    bare = SSL.Context(SSL.TLS_CLIENT_METHOD)
    bare.set_min_proto_version(SSL.TLS1_3_VERSION)
    pair = Pair(contexts=(bare, make_context(TlsSettings(credentials("hub")), server=True)))
    pair.run(lambda: pair.server is not None and pair.server.state is HandshakeState.REFUSED)
    assert pair.server is not None
    assert pair.server.keys is None
    assert pair.server.refused is not None
    assert "certificate" in pair.server.refused.reason


def test_a_replayed_init_after_the_end_is_dropped() -> None:
    """Fault 18, its INIT half: a recorded client flight, replayed into the handshake it came from (R-4-21)."""
    pair = Pair()
    recorded: list[bytes] = []

    def watch(direction: str, _count: int, datagram: bytes) -> bool:
        if direction == "c":
            recorded.append(datagram)
        return False

    pair.drop = watch
    pair.run_to_done()
    assert pair.server is not None
    before = pair.server.keys
    for datagram in recorded * 3:
        try:
            pair.server.receive_init(packet.parse_init(datagram), pair.now)
        except PacketError:
            continue
    assert pair.server.keys is before
    assert pair.server.state is HandshakeState.DONE
    assert len(pair.server.datagrams_to_send(pair.now)) <= 3
