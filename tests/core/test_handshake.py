"""stp.core.handshake by itself: ordered bytes in, ordered bytes out, whatever the carrier."""

from __future__ import annotations

import pytest
from attrs import define, field
from OpenSSL import SSL

from stp.core.errors import ErrorCode, HandshakeRefused, LimitError, ProtocolError
from stp.core.handshake import (
    MAX_HANDSHAKE,
    Handshake,
    PeerIdentity,
    TlsSettings,
    identity_of,
    make_context,
)
from stp.core.params import TransportHello
from tests.core.handshake_kit import credentials
from tests.identity_kit import shared

HELLO = TransportHello(original_dcid=bytes(8), cid=bytes(8))


@define
class Lenient:
    """A judge that lets everybody in and remembers whom."""

    hellos: list[TransportHello] = field(factory=list)
    peers: list[PeerIdentity] = field(factory=list)
    verdict: str | None = None

    def check_hello(self, hello: TransportHello) -> None:
        self.hellos.append(hello)

    def check_peer(self, peer: PeerIdentity) -> str | None:
        self.peers.append(peer)
        return self.verdict


def side(node: str, *, dialling: bool) -> Handshake:
    own = credentials(node)
    context = make_context(TlsSettings(own), server=not dialling)
    return Handshake(context, own.chain_der[0], dialling=dialling, hello=HELLO)


def pump(client: Handshake, server: Handshake, *, judge: Lenient, step: int) -> None:
    """Carry both streams in pieces of `step` bytes until both are silent."""
    streams = {
        "up": client.hello_block() + client.take_tls(),
        "down": server.hello_block(),
    }
    while any(streams.values()):
        for way, to, back in (("up", server, "down"), ("down", client, "up")):
            data, streams[way] = streams[way], b""
            for start in range(0, len(data), step):
                to.receive(data[start : start + step], judge)
                streams[back] += to.take_tls()


@pytest.mark.parametrize("step", [1, 7, 1000, 1 << 20])
def test_bytes_may_come_in_any_pieces(step: int) -> None:
    client, server = side("edge-1", dialling=True), side("hub", dialling=False)
    judge = Lenient()
    pump(client, server, judge=judge, step=step)
    assert client.result is not None
    assert server.result is not None
    assert client.result.master == server.result.master
    assert client.result.suite == server.result.suite == "TLS_AES_128_GCM_SHA256"
    assert client.result.hello == server.result.hello == HELLO
    assert [p.node for p in judge.peers] == ["hub", "edge-1"]
    assert judge.hellos == [HELLO, HELLO]


def test_both_hellos_are_bound_into_the_keys() -> None:
    """Protocol §3: a hello changed on the way gives other keys, so no DATA packet opens (R-3-5)."""
    client, server = side("edge-1", dialling=True), side("hub", dialling=False)
    server_view = TransportHello(original_dcid=bytes(8), cid=b"changed!")
    first = len(server_view.encode()).to_bytes(2, "big") + server_view.encode() + client.take_tls()
    judge = Lenient()
    server.receive(first, judge)
    client.receive(server.hello_block() + server.take_tls(), judge)
    server.receive(client.take_tls(), judge)
    assert client.result is not None
    assert server.result is not None
    assert client.result.master != server.result.master


def test_the_listener_ignores_what_comes_after_and_frees_tls() -> None:
    """R-4-21."""
    client, server = side("edge-1", dialling=True), side("hub", dialling=False)
    pump(client, server, judge=Lenient(), step=1 << 20)
    server.receive(b"anything", Lenient())
    assert not hasattr(server, "_tls")
    assert server.take_tls() == b""


@pytest.mark.parametrize(
    ("data", "error", "words"),
    [
        (b"\x04\x01", LimitError, "1025 bytes"),
        (bytes(2 + MAX_HANDSHAKE), LimitError, "more than 16384"),
        (b"\x00\x00", ProtocolError, "hello without type 1"),
    ],
)
def test_a_hello_that_cannot_be_ends_it(data: bytes, error: type[ProtocolError], words: str) -> None:
    """R-4-1."""
    with pytest.raises(error, match=words):
        side("hub", dialling=False).receive(data, Lenient())


def test_another_version_is_refused() -> None:
    """R-2-8."""
    raw = TransportHello(original_dcid=bytes(8), cid=bytes(8), versions=(2,)).encode()
    with pytest.raises(ProtocolError, match="version 0x00000002"):
        side("hub", dialling=False).receive(len(raw).to_bytes(2, "big") + raw, Lenient())


def test_16_kib_is_the_limit_over_all_pieces() -> None:
    """R-4-1."""
    server = side("hub", dialling=False)
    raw = HELLO.encode()
    server.receive(len(raw).to_bytes(2, "big") + raw, Lenient())
    server.receive(b"\x16\x03\x01\x3f\xff", Lenient())  # one long record
    with pytest.raises(LimitError):
        for _ in range(20):
            server.receive(bytes(1000), Lenient())


def test_application_data_has_no_place_here() -> None:
    """A listener that goes on talking TLS after the handshake is no STP listener."""
    client = side("edge-1", dialling=True)
    own = credentials("hub")
    rogue = SSL.Connection(make_context(TlsSettings(own), server=True), None)
    rogue.set_accept_state()
    rogue.bio_write(client.take_tls())
    with pytest.raises(SSL.WantReadError):
        rogue.do_handshake()
    hello = HELLO.encode()
    judge = Lenient()
    client.receive(len(hello).to_bytes(2, "big") + hello + rogue.bio_read(1 << 16), judge)
    rogue.bio_write(client.take_tls())
    rogue.do_handshake()
    rogue.send(b"GET / HTTP/1.1")
    with pytest.raises(ProtocolError, match="application data"):
        client.receive(rogue.bio_read(1 << 16), judge)


def test_an_alert_after_success_is_the_listeners_refusal() -> None:
    client, server = side("edge-1", dialling=True), side("hub", dialling=False)
    judge = Lenient()
    server.receive(client.hello_block() + client.take_tls(), judge)
    client.receive(server.hello_block() + server.take_tls(), judge)
    assert client.result is not None
    with pytest.raises(HandshakeRefused, match="not you"):
        server.receive(client.take_tls(), Lenient(verdict="not you"))
    assert server.result is None
    with pytest.raises(HandshakeRefused, match="refused by the peer") as caught:
        client.receive(server.take_tls(), judge)
    assert caught.value.code is ErrorCode.AUTH


def test_a_forged_record_after_success_refuses_nobody() -> None:
    """Whoever knows the network key can put bytes behind the listener's flight."""
    client, server = side("edge-1", dialling=True), side("hub", dialling=False)
    judge = Lenient()
    server.receive(client.hello_block() + client.take_tls(), judge)
    client.receive(server.hello_block() + server.take_tls(), judge)
    for forged in (b"\x15\x03\x03\x00\x02\x02\x31", b"\x17\x03\x03\x00\x20" + bytes(32)):
        client.receive(forged, judge)
    assert client.result is not None


def test_a_dialling_side_that_refuses_keeps_its_finished_to_itself() -> None:
    client, server = side("edge-1", dialling=True), side("hub", dialling=False)
    server.receive(client.hello_block() + client.take_tls(), Lenient())
    with pytest.raises(HandshakeRefused, match="not you"):
        client.receive(server.hello_block() + server.take_tls(), Lenient(verdict="not you"))
    assert client.take_tls() == b""
    assert client.result is None


@pytest.mark.parametrize("junk", [b"", b"junk", bytes(500)])
def test_what_is_no_certificate_names_nobody(junk: bytes) -> None:
    with pytest.raises(HandshakeRefused, match="cannot be read"):
        identity_of(junk)
    assert identity_of(shared().identity("edge-1").leaf_der) == ("test", "edge-1")
