"""stp.core.initspace and handshake: two sides on a simulated link, every fault of the handshake (protocol §4)."""

from __future__ import annotations

import random
from datetime import UTC, datetime, timedelta
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from OpenSSL import SSL

from stp.core import frames, packet
from stp.core.errors import ErrorCode, HandshakeRefused, PacketError, UsageError
from stp.core.handshake import (
    PeerIdentity,
    TlsCredentials,
    TlsSettings,
    explain,
    identity_of,
    make_context,
)
from stp.core.initspace import HANDSHAKE_DEADLINE, HandshakeState, open_first
from stp.core.keys import SessionKeys, initial_keys
from tests.core.handshake_kit import ADDRESS, Pair, credentials
from tests.identity_kit import Flaw, parts_of, shared

NETWORK_KEY, OLD_KEY = b"k" * 32, b"o" * 32


def over(pair: Pair) -> bool:
    return pair.server is not None and pair.states() == {HandshakeState.OVER}


def assert_agreed(pair: Pair) -> None:
    assert pair.server is not None
    ours, theirs = pair.client.keys, pair.server.keys
    assert ours is not None
    assert theirs is not None
    assert ours.session_id == theirs.session_id
    assert ours.client.secret == theirs.client.secret
    assert ours.server.secret == theirs.server.secret


def flawed(node: str, flaw: Flaw) -> TlsCredentials:
    chain, key, anchors = parts_of(shared().bundle(node, flaw))
    return TlsCredentials(chain, key, anchors)


def test_both_sides_agree_in_two_round_trips_after_a_retry() -> None:
    """R-4-15."""
    pair = Pair()
    pair.run_to_done()
    assert_agreed(pair)
    assert pair.now == pytest.approx(0.05)  # Retry 20 ms, flights 20 ms, Finished 10 ms
    assert pair.server is not None
    assert pair.client.peer is not None
    assert pair.server.peer is not None
    assert (pair.client.peer.domain, pair.client.peer.node) == ("test", "hub")
    assert (pair.server.peer.domain, pair.server.peer.node) == ("test", "edge-1")
    assert pair.client.peer_cid == pair.server.cid
    assert pair.server.peer_cid == pair.client.cid
    assert pair.client.peer_hello is not None
    assert pair.client.peer_hello.parameters.max_datagram == 1300
    assert pair.server.peer_hello is not None
    assert pair.server.peer_hello.parameters.max_datagram == 1400
    assert pair.client.rtt == pytest.approx(0.02)
    assert pair.server.rtt == pytest.approx(0.02)


def test_a_hybrid_hello_fills_two_datagrams_and_draws_two_retries() -> None:
    """Protocol §4: X25519MLKEM768 is on; the first Retry that verifies wins (R-4-12, R-4-16)."""
    pair = Pair()
    pair.run_to_done()
    assert pair.client._tls._tls.get_group_name() == "X25519MLKEM768"
    assert pair.retries == 2
    assert pair.ignored == 1
    assert_agreed(pair)


def test_packet_numbers_go_on_after_a_retry_and_keys_change() -> None:
    """R-2-4, R-3-1."""
    seen: list[packet.InitPacket] = []

    def watch(direction: str, _count: int, datagram: bytes) -> bool:
        if direction == "c":
            seen.append(packet.parse_init(datagram))
        return False

    pair = Pair(drop=watch)
    pair.run_to_done()
    assert [p.pn for p in seen] == list(range(seen[0].pn, seen[0].pn + len(seen)))
    before, after = seen[0], seen[2]
    assert before.dcid != after.dcid
    assert after.token
    keys = initial_keys(after.dcid)
    plain = [keys.client.open(p.pn, p.sealed, p.aad) for p in seen[2:4]]
    with pytest.raises(PacketError):
        keys.client.open(before.pn, before.sealed, before.aad)
    first = initial_keys(before.dcid).client.open(before.pn, before.sealed, before.aad)
    old, new = (
        next(f for f in frames.decode(p) if isinstance(f, frames.Crypto)).data for p in (first, plain[0])
    )
    old_hello, new_hello = (int.from_bytes(d[:2], "big") for d in (old, new))
    assert new_hello == old_hello + 8  # the Retry's CID stands in it now
    assert new[2 + new_hello :][:1000] == old[2 + old_hello :][:1000]  # the same TLS bytes


@pytest.mark.parametrize("seed", range(20))
def test_loss_only_costs_time(seed: int) -> None:
    rng = random.Random(seed)
    pair = Pair(seed=seed, drop=lambda _d, _c, _b: rng.random() < 0.25)
    pair.run_to_done()
    if pair.states() == {HandshakeState.DONE}:
        assert_agreed(pair)
    assert pair.states() == {HandshakeState.DONE}


@pytest.mark.parametrize("count", range(6))
@pytest.mark.parametrize("direction", ["c", "s"])
def test_any_one_datagram_may_be_lost(direction: str, count: int) -> None:
    pair = Pair(drop=lambda d, c, _: (d, c) == (direction, count))
    pair.run_to_done()
    assert_agreed(pair)
    assert pair.now < 1.0


@pytest.mark.parametrize("seed", range(10))
def test_damage_duplication_and_disorder_change_nothing(seed: int) -> None:
    """Promise (1) of initspace: TLS never sees a damaged byte (R-3-2)."""
    rng = random.Random(seed)
    pair = Pair(seed=seed)
    send = pair.send

    def hostile(direction: str, datagram: bytes) -> None:
        place = rng.randrange(len(datagram))
        flipped = bytearray(datagram)
        flipped[place] ^= 1 << rng.randrange(8)
        for variant in rng.sample([bytes(flipped), datagram, datagram], 3):
            send(direction, variant)
            pair.flying[-1] = (pair.now + rng.uniform(0.005, 0.03), *pair.flying[-1][1:])
        pair.flying.sort(key=lambda f: f[0])

    pair.send = hostile  # type: ignore[method-assign]
    pair.run_to_done()
    assert_agreed(pair)


def test_a_network_key_is_needed_to_be_heard_at_all() -> None:
    pair = Pair(network_key=b"wrong" + bytes(27), network_keys=(NETWORK_KEY,))
    pair.run(lambda: False, limit=20)
    assert pair.server is None
    assert pair.counts["s"] == 0
    assert pair.client.state is HandshakeState.OVER
    assert pair.client.timed_out
    assert pair.now == pytest.approx(HANDSHAKE_DEADLINE)


@pytest.mark.parametrize("shown", [NETWORK_KEY, OLD_KEY])
def test_two_network_keys_are_accepted_during_rotation(shown: bytes) -> None:
    pair = Pair(network_key=shown, network_keys=(NETWORK_KEY, OLD_KEY))
    pair.run_to_done()
    assert_agreed(pair)
    assert pair.server is not None
    assert pair.server.network_key == shown


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"expected_node": "hub-2"}, "wanted hub-2, found test/hub"),
        ({"expected_domain": "elsewhere"}, "wanted elsewhere/hub, found test/hub"),
        ({"server": flawed("hub", Flaw.EXPIRED)}, "certificate has expired"),
        ({"server": flawed("hub", Flaw.NOT_YET_VALID)}, "not yet valid"),
        ({"server": flawed("hub", Flaw.OTHER_CA)}, "untrusted certificate"),
        ({"server": flawed("hub", Flaw.CLIENT_ONLY)}, "unsuitable certificate purpose"),
        ({"server": flawed("hub", Flaw.WRONG_EKU)}, "unsuitable certificate purpose"),
        ({"server": flawed("hub", Flaw.NO_URI)}, "no subject alternative name"),
        ({"server": flawed("hub", Flaw.WRONG_URI)}, "names 0 nodes"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_the_dialling_side_refuses(options: dict[str, object], words: str) -> None:
    """Before it has keys, and before its Finished: the listener never believes in it (R-4-8)."""
    pair = Pair(**options)  # type: ignore[arg-type]
    pair.run(lambda: over(pair))
    assert pair.client.keys is None
    assert pair.client.refused is not None
    assert words in pair.client.refused.reason
    assert pair.client.refused.code is ErrorCode.AUTH
    assert pair.server is not None
    assert pair.server.keys is None
    assert pair.server.refused is not None
    assert pair.server.refused.reason.startswith("refused by the peer")
    assert pair.now < 1.5


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"authorise": lambda _: "not in the access rules"}, "not in the access rules"),
        ({"client": flawed("edge-1", Flaw.EXPIRED)}, "certificate has expired"),
        ({"client": flawed("edge-1", Flaw.SERVER_ONLY)}, "unsuitable certificate purpose"),
        ({"client": flawed("edge-1", Flaw.NO_URI)}, "no subject alternative name"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_the_listening_side_refuses(options: dict[str, object], words: str) -> None:
    """No keys on the listener; the client, whose TLS had succeeded, hears of it and why (promise 5, R-4-5)."""
    pair = Pair(**options)  # type: ignore[arg-type]
    pair.run(lambda: pair.client.state is HandshakeState.REFUSED)
    assert pair.server is not None
    assert pair.server.state is HandshakeState.REFUSED
    assert pair.server.keys is None
    assert pair.server.refused is not None
    assert words in pair.server.refused.reason
    assert pair.client.refused is not None
    assert words in pair.client.refused.reason
    assert pair.client.refused.code is ErrorCode.AUTH
    assert pair.now < 0.1
    pair.run(lambda: over(pair))
    assert pair.now < 1.5


def test_a_client_with_the_anchors_of_a_stranger_is_told() -> None:
    stranger = shared().stranger.identity("edge-1").credentials
    mixed = TlsCredentials(stranger.chain_der, stranger.key_der, credentials("hub").anchors_der)
    pair = Pair(client=mixed)
    pair.run(lambda: over(pair))
    assert pair.server is not None
    assert pair.server.refused is not None
    assert "untrusted certificate" in pair.server.refused.reason
    assert pair.client.refused is not None
    assert "refused by the peer" in pair.client.refused.reason


@pytest.mark.parametrize("seed", range(5))
def test_a_refusal_survives_loss(seed: int) -> None:
    rng = random.Random(seed)
    pair = Pair(seed=seed, authorise=lambda _: "no", drop=lambda _d, _c, _b: rng.random() < 0.2)
    pair.run(lambda: over(pair))
    assert pair.server is not None
    assert pair.server.refused is not None
    assert pair.server.refused.reason == "no"
    assert pair.client.state is HandshakeState.OVER
    assert pair.client.refused is not None or pair.client.timed_out


def test_a_close_alone_is_only_a_hint() -> None:
    """Promise (5): whoever knows the network key can write one; an honest handshake outruns it (R-4-17)."""
    pair = Pair(retry=False)
    pair.run(lambda: pair.server is not None)
    forged_keys = initial_keys(pair.client.original_dcid)
    assert pair.server is not None
    header = packet.init_header(pair.client.cid, pair.server.cid, b"", 12345)
    forged = header + forged_keys.server.seal(12345, frames.Close(0x20, "liar").encode(), header)
    pair.flying.insert(0, (pair.now, "s", forged))
    pair.run_to_done()
    assert_agreed(pair)
    assert pair.client.refused is None


def test_a_close_that_nothing_contradicts_is_believed_after_three_ptos() -> None:
    """R-4-17."""
    pair = Pair(retry=False, drop=lambda d, _c, _b: d == "s")
    pair.run(lambda: pair.server is not None)
    assert pair.server is not None
    header = packet.init_header(pair.client.cid, pair.server.cid, b"", 5)
    sealed = initial_keys(pair.client.original_dcid).server.seal(
        5, frames.Close(0x22, "revoked").encode(), header
    )
    pair.client.receive_init(packet.parse_init(header + sealed), pair.now)
    pair.run(lambda: pair.client.state is HandshakeState.OVER)
    assert pair.client.refused is not None
    assert pair.client.refused.code is ErrorCode.REVOKED
    assert pair.now == pytest.approx(0.01 + 3 * 0.3, abs=0.1)


def test_a_node_token_spares_the_retry_and_holds_to_three_times() -> None:
    """Promise (2): without a Retry the address is not proven, so at most 3 × what came (R-4-15, R-4-23)."""
    first = Pair()
    token = first.keeper.seal_node("test", "edge-1", 0.0)
    pair = Pair(token=token, keeper=first.keeper)
    sent = {"c": 0, "s": 0}

    def count(direction: str, _count: int, datagram: bytes) -> bool:
        sent[direction] += len(datagram)
        if pair.server is not None and not pair.server.validated:
            assert sent["s"] <= 3 * sent["c"]
        return False

    pair.drop = count
    pair.run_to_done()
    assert pair.retries == 0
    assert pair.now == pytest.approx(0.03)
    assert_agreed(pair)
    again = Pair(token=token, keeper=first.keeper)  # single use: a Retry, not a failure
    again.run_to_done()
    assert again.retries == 2
    assert_agreed(again)


def test_amplification_stops_at_three_times() -> None:
    """Promise (2), where the client never answers (R-4-20)."""
    first = Pair()
    token = first.keeper.seal_node("test", "edge-1", 0.0)
    pair = Pair(token=token, keeper=first.keeper, drop=lambda d, c, _: d == "s" or c >= 2)
    pair.run(lambda: False, limit=12)
    assert pair.server is not None
    assert pair.server.state is HandshakeState.OVER
    assert pair.bytes["s"] <= 3 * 2400


def test_the_token_of_another_node_is_refused() -> None:
    first = Pair()
    token = first.keeper.seal_node("test", "edge-2", 0.0)
    pair = Pair(token=token, keeper=first.keeper)
    pair.run(lambda: over(pair))
    assert pair.server is not None
    assert pair.server.refused is not None
    assert pair.server.refused.reason == "the token belongs to another node"


def test_long_chains_fit() -> None:
    """Nine more certificates in each direction: several datagrams each way, under the 16 KiB."""
    own = credentials("hub")
    extra = tuple(shared().identity(f"n{i}").credentials.chain_der[0] for i in range(9))
    client = credentials("edge-1")
    pair = Pair(
        server=TlsCredentials(own.chain_der + extra, own.key_der, own.anchors_der),
        client=TlsCredentials(client.chain_der + extra, client.key_der, client.anchors_der),
    )
    pair.run_to_done()
    assert_agreed(pair)
    assert pair.bytes["s"] > 5_000


def test_more_than_16_kib_of_own_certificates_is_our_own_fault() -> None:
    own = credentials("edge-1")
    extra = tuple(shared().identity("n0").credentials.chain_der) * 40
    pair = Pair(client=TlsCredentials(own.chain_der + extra, own.key_der, own.anchors_der))
    with pytest.raises(UsageError, match="too many or too large certificates"):
        pair.run_to_done()


@pytest.mark.parametrize("suite", ["aes", "chacha"])
def test_the_client_chooses_the_cipher(suite: str) -> None:
    """R-3-4."""
    client = credentials("edge-1")
    pair = Pair(
        contexts=(
            make_context(TlsSettings(client, aes_preferred=suite == "aes"), server=False),
            make_context(TlsSettings(credentials("hub")), server=True),
        )
    )
    pair.run_to_done()
    assert_agreed(pair)
    assert pair.client.keys is not None
    expected = {"aes": "TLS_AES_128_GCM_SHA256", "chacha": "TLS_CHACHA20_POLY1305_SHA256"}[suite]
    assert pair.client.keys.suite == expected


def test_certificates_are_judged_at_the_time_we_say() -> None:
    """Protocol §4: a machine without a clock connects, one whose floor is past notAfter does not."""
    far = datetime.now(UTC) + timedelta(days=800)
    pair = Pair(
        contexts=(
            make_context(TlsSettings(credentials("edge-1"), verify_time=far), server=False),
            make_context(TlsSettings(credentials("hub")), server=True),
        )
    )
    pair.run(lambda: over(pair))
    assert pair.client.refused is not None
    assert "expired" in pair.client.refused.reason
    recent = datetime.now(UTC) - timedelta(minutes=1)
    late = flawed("hub", Flaw.EXPIRED)
    pair = Pair(
        server=late,
        contexts=(
            make_context(
                TlsSettings(credentials("edge-1"), verify_time=recent - timedelta(hours=2)), server=False
            ),
            make_context(TlsSettings(late, verify_time=recent), server=True),
        ),
        client=credentials("edge-1"),
    )
    pair.run(lambda: over(pair) or pair.client.state is HandshakeState.DONE)
    assert pair.client.state is HandshakeState.DONE


def test_wrong_echoes_are_a_protocol_error() -> None:
    """Both hellos are bound to the CIDs of the packets they came in (R-4-4)."""
    for victim in ("client", "server"):
        pair = Pair(retry=False)
        pair.run(lambda p=pair: p.server is not None)  # type: ignore[misc]
        assert pair.server is not None
        pair = Pair(retry=False)
        if victim == "server":
            pair.client._tls.replace_hello(pair.client._hello())
            original = pair.client.original_dcid
            pair.client.original_dcid = bytes(8)
            pair.client._outgoing = type(pair.client._outgoing)()
            pair.client._tls.replace_hello(pair.client._hello())
            pair.client._outgoing.write(pair.client._tls.hello_block() + pair.client._client_hello)
            assert original != bytes(8)
        else:
            pair.client._retry_scid = bytes(8)  # it believes in a Retry that the server does not know of
        pair.run(lambda p=pair: over(p))  # type: ignore[misc]
        refused = getattr(pair, victim).refused
        assert refused is not None
        assert refused.code is ErrorCode.PROTOCOL
        assert "does not echo" in refused.reason


@pytest.mark.parametrize(
    ("payload", "code"),
    [
        (frames.MaxData(1).encode(), ErrorCode.PROTOCOL),
        (b"\x1f", ErrorCode.PROTOCOL),
        (frames.Crypto(0, b"\xff\xff").encode(), ErrorCode.LIMIT),
        (frames.Crypto(16_380, b"12345").encode(), ErrorCode.LIMIT),
        (frames.Crypto(0, b"\x00\x02\x01\x00").encode(), ErrorCode.PROTOCOL),
    ],
)
def test_what_does_not_belong_into_an_init_closes(payload: bytes, code: ErrorCode) -> None:
    """R-4-14."""
    pair = Pair(retry=False)
    header = packet.init_header(b"12345678", b"abcdefgh", b"", 7)
    plain = payload.ljust(1200 - len(header) - 16, b"\x00")
    sealed = header + initial_keys(b"12345678").client.seal(7, plain, header)
    pair.first(packet.parse_init(sealed))
    assert pair.server is not None
    pair.server.receive_init(packet.parse_init(sealed), 0.0)
    assert pair.server.state is HandshakeState.REFUSED
    assert pair.server.refused is not None
    assert pair.server.refused.code is code
    (answer,) = pair.server.datagrams_to_send(0.0)
    found = packet.parse_init(answer)
    said = frames.decode(initial_keys(b"12345678").server.open(found.pn, found.sealed, found.aad))
    assert [f.code for f in said if isinstance(f, frames.Close)] == [code]


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=1100))
def test_any_plaintext_ends_at_worst_in_a_refusal(plain: bytes) -> None:
    pair = Pair(retry=False)
    header = packet.init_header(b"12345678", b"abcdefgh", b"", 7)
    sealed = packet.parse_init(header + initial_keys(b"12345678").client.seal(7, plain, header))
    pair.first(sealed)
    assert pair.server is not None
    pair.server.receive_init(sealed, 0.0)
    pair.server.datagrams_to_send(0.0)
    assert pair.server.state in (HandshakeState.RUNNING, HandshakeState.REFUSED)


@settings(max_examples=40, deadline=None)
@given(st.binary(min_size=1, max_size=600))
def test_any_tls_bytes_end_at_worst_in_a_refusal(tls: bytes) -> None:
    """A good hello, then anything."""
    pair = Pair(retry=False)
    hello = pair.client._hello()
    hello.original_dcid, hello.cid = b"12345678", b"abcdefgh"
    raw = hello.encode()
    header = packet.init_header(b"12345678", b"abcdefgh", b"", 7)
    plain = frames.Crypto(0, len(raw).to_bytes(2, "big") + raw + tls).encode()
    sealed = packet.parse_init(header + initial_keys(b"12345678").client.seal(7, plain, header))
    pair.first(sealed)
    assert pair.server is not None
    pair.server.receive_init(sealed, 0.0)
    assert pair.server.state in (HandshakeState.RUNNING, HandshakeState.REFUSED)
    assert pair.server.keys is None


def test_duplicates_draw_at_most_one_answer_per_half_pto() -> None:
    """Promise (3, R-4-19)."""
    pair = Pair(retry=False)
    pair.run(lambda: pair.server is not None)
    assert pair.server is not None
    first = [d for _, s, d in pair.flying if s == "c"]
    pair.run(lambda: pair.counts["s"] >= 3)
    now = pair.now + 0.2
    pair.server.datagrams_to_send(now)
    crypto = []
    for i in range(10):
        for datagram in first:
            pair.server.receive_init(packet.parse_init(datagram), now + i * 0.001)
        crypto.append(sum(len(d) > 200 for d in pair.server.datagrams_to_send(now + i * 0.001)))
    assert sum(1 for c in crypto if c) <= 1


def test_give_up_on_our_side() -> None:
    pair = Pair(retry=False)
    pair.run(lambda: pair.client.state is HandshakeState.DONE)
    pair.client.close(ErrorCode.GOING_AWAY, "changed our mind", pair.now)
    assert pair.client.state is HandshakeState.REFUSED
    pair.run(lambda: pair.client.state is HandshakeState.OVER)
    assert pair.client.refused is not None
    assert pair.client.refused.code is ErrorCode.GOING_AWAY
    assert pair.client.next_timeout() is None
    assert pair.client.datagrams_to_send(pair.now) == []
    pair.client.handle_timeout(pair.now)
    pair.client.close(ErrorCode.NO_ERROR, "again", pair.now)
    with pytest.raises(PacketError, match="over"):
        pair.client.receive_init(
            packet.parse_init(packet.init_header(bytes(8), bytes(8), b"", 0) + bytes(20)), 0
        )


def test_probes_back_off_and_stop_at_the_deadline() -> None:
    """PTO 300 ms, doubling, at most 1 s, each pause but the first a quarter more or less; 10 s in all (R-4-18)."""
    sent: list[float] = []
    pair = Pair(drop=lambda d, c, _: bool(sent.append(pair.now)) or True)  # type: ignore[func-returns-value]
    pair.run(lambda: False, limit=20)
    moments = sorted({round(t, 3) for t in sent})
    pauses = [after - before for before, after in pairwise(moments)]
    assert pauses[0] == pytest.approx(0.3)
    for pause, usual in zip(pauses[1:6], (0.6, 1.0, 1.0, 1.0, 1.0), strict=True):
        assert 0.75 * usual - 0.002 <= pause <= 1.25 * usual + 0.002
    assert len({round(pause, 2) for pause in pauses[2:6]}) > 1
    assert pair.client.timed_out
    assert pair.now == pytest.approx(10.0)


def test_a_retry_out_of_place_is_ignored() -> None:
    pair = Pair()
    pair.flush()
    odcid, cid = pair.client.original_dcid, pair.client.cid
    key = initial_keys(odcid).retry_key
    for bad in (
        packet.build_retry(b"not mine", b"new  cid", b"t", key, odcid),
        packet.build_retry(cid, b"new  cid", b"t", bytes(16), odcid),
        packet.build_retry(cid, b"new  cid", b"t", key, b"another!"),
    ):
        with pytest.raises(PacketError):
            pair.client.receive_retry(packet.parse_retry(bad), 0.0)
    pair.run_to_done()
    assert_agreed(pair)


def test_identity_and_context_errors_name_the_cause() -> None:
    good = credentials("hub")
    assert identity_of(good.chain_der[0]) == ("test", "hub")
    other = credentials("edge-1")
    for bad in (
        TlsCredentials(good.chain_der, other.key_der, good.anchors_der),
        TlsCredentials((), good.key_der, good.anchors_der),
        TlsCredentials((b"junk",), good.key_der, good.anchors_der),
        TlsCredentials(good.chain_der, b"junk", good.anchors_der),
    ):
        with pytest.raises(HandshakeRefused, match="own credentials cannot be used"):
            make_context(TlsSettings(bad), server=True)
    assert explain(SSL.Error([("", "", "tlsv1 alert unknown ca")])) == "refused by the peer: unknown ca"
    assert explain(SSL.Error()) == "TLS failed"


def test_authorise_sees_the_whole_identity() -> None:
    seen: list[PeerIdentity] = []
    pair = Pair(authorise=lambda peer: seen.append(peer))  # type: ignore[func-returns-value]
    pair.run_to_done()
    (peer,) = seen
    assert (peer.domain, peer.node) == ("test", "edge-1")
    assert peer.not_after > datetime.now(UTC)
    assert peer.serial > 0


def test_open_first_needs_one_of_the_keys() -> None:
    header = packet.init_header(b"12345678", b"abcdefgh", b"", 7)
    sealed = header + initial_keys(b"12345678", NETWORK_KEY).client.seal(7, bytes(1100), header)
    assert open_first(packet.parse_init(sealed), (OLD_KEY, NETWORK_KEY)).network_key == NETWORK_KEY
    for keys in ((), (OLD_KEY,)):
        with pytest.raises(PacketError):
            open_first(packet.parse_init(sealed), keys)


def test_limits_of_keys_by_suite() -> None:
    aes = SessionKeys.derive(bytes(32), "TLS_AES_256_GCM_SHA384")
    chacha = SessionKeys.derive(bytes(32), "TLS_CHACHA20_POLY1305_SHA256")
    assert (aes.seal_limit, aes.fail_limit) == (1 << 23, 1 << 52)
    assert (chacha.seal_limit, chacha.fail_limit) == (None, 1 << 36)
    with pytest.raises(HandshakeRefused, match="not one of STP's"):
        SessionKeys.derive(bytes(32), "TLS_AES_128_CCM_SHA256")
    assert ADDRESS
