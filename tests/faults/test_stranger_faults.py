"""Faults 14, 16, 19, 20, 26, 56, 57 and 59 on the simulated network: what strangers cost, who gets in all the same.

Real sockets, times and memory are in tests/real/test_stranger_load.py.
"""

from __future__ import annotations

import gc
import random
from collections.abc import Iterator
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from OpenSSL import SSL

from stp.core import packet
from stp.core.admission import ADDRESS_BURST, ADDRESS_RATE
from stp.core.errors import ErrorCode, PacketError
from stp.core.events import NewToken
from stp.core.handshake import TlsCredentials, TlsSettings, make_context
from stp.core.initspace import HandshakeState
from stp.core.keys import initial_keys
from stp.core.packet import INIT_DATAGRAM, RETRY_BYTE
from stp.core.session import Session
from stp.core.states import State
from stp.core.tokens import NODE_LIFETIME, RETRY_LIFETIME
from tests.core.handshake_kit import Pair
from tests.core.handshake_kit import credentials as kit_credentials
from tests.identity_kit import NETWORK_KEY, shared
from tests.sim import START, Host, Network

SECRETS = {"cid_key": b"c" * 32, "reset_key": b"r" * 32, "token_key": b"t" * 32}
"""What a listener keeps across a restart."""


def tokens_of(host: Host, session: Session) -> list[bytes]:
    return [event.token for event in host.events(session) if isinstance(event, NewToken)]


def spoofed(seed: int = 0) -> Iterator[tuple[bytes, tuple[str, int]]]:
    """Tokenless INITs that open, each from an address of its own."""
    rng = random.Random(seed)
    ready = []
    for _ in range(64):
        dcid = rng.randbytes(8)
        header = packet.init_header(dcid, rng.randbytes(8), b"", 7)
        room = INIT_DATAGRAM - len(header) - packet.TAG_LENGTH
        ready.append(
            header + initial_keys(dcid, NETWORK_KEY).client.seal(7, b"\x01" + bytes(room - 1), header)
        )
    number = 0
    while True:
        number += 1
        yield ready[number % 64], (f"10.{number >> 16 & 255}.{number >> 8 & 255}.{number & 255}", 9000)


def test_fault_14_spoofed_inits_cost_no_state() -> None:
    """One Retry each, of at most a tenth of the bytes; no table, timer or TLS object grows."""
    net = Network(1)
    hub = net.listener()
    source = spoofed()
    endpoint = hub.endpoint

    def flood(count: int) -> int:
        answered = 0
        for _ in range(count):
            endpoint.receive(*next(source), net.now)
            for answer in endpoint.datagrams_to_send(net.now):
                assert answer.data[0] == RETRY_BYTE
                answered += len(answer.data)
        return answered

    def held() -> int:
        gc.collect()
        return sum(1 for one in gc.get_objects() if isinstance(one, SSL.Connection | Session))

    flood(300)
    before = held()
    assert flood(3000) <= 0.1 * 3000 * INIT_DATAGRAM
    assert held() == before
    assert endpoint.next_timeout() is None
    assert endpoint.statistics().half_open == endpoint.statistics().sessions == 0


@pytest.mark.parametrize("heard", [1, 2])  # of the two datagrams of its ClientHello
def test_fault_15_nine_certificates_for_a_client_that_is_not_heard(heard: int) -> None:
    """By a NEW_TOKEN there is no Retry: until the client is validated it is sent at most 3 × what came from it."""
    former = Pair()
    former.run_to_done()
    token = former.keeper.seal_node("test", "edge-1", 0.0)
    extra = tuple(shared().identity(f"n{n}").credentials.chain_der[0] for n in range(9))
    own, client = kit_credentials("hub"), kit_credentials("edge-1")
    pair = Pair(
        server=TlsCredentials(own.chain_der + extra, own.key_der, own.anchors_der),
        client=TlsCredentials(client.chain_der + extra, client.key_der, client.anchors_der),
        token=token,
        keeper=former.keeper,
        drop=lambda direction, number, _: direction == "c" and number >= heard and pair.now < 3.0,
    )
    came = went = unvalidated = 0
    arrive, send = pair.arrive, pair.send

    def count_in(direction: str, datagram: bytes) -> None:
        nonlocal came
        came += len(datagram) if direction == "c" else 0
        arrive(direction, datagram)

    def count_out(direction: str, datagram: bytes) -> None:
        nonlocal went, unvalidated
        if direction == "s" and pair.server is not None and not pair.server.validated:
            went += len(datagram)
            unvalidated += 1
            assert went <= 3 * came
        send(direction, datagram)

    pair.arrive, pair.send = count_in, count_out  # type: ignore[method-assign]
    pair.run_to_done()
    assert pair.states() == {HandshakeState.DONE}
    assert pair.retries == 0
    assert unvalidated >= heard
    assert pair.bytes["s"] > 3 * INIT_DATAGRAM  # so that the limit had something to hold back


def garbage(net: Network, hub: Host, edge: Host, count: int, seed: int) -> Iterator[bytes]:
    """Random, cut, of another version, and with a bad tag, all of what an outsider can know of a live session."""
    rng = random.Random(seed)
    seen = [data for _, _, to, data in net.log if to == hub.addr]
    source = spoofed(seed)
    for number in range(count):
        data = bytearray(rng.choice(seen))
        match number % 6:
            case 0:
                yield rng.randbytes(rng.randrange(1473))
            case 1:
                yield bytes(data[: rng.randrange(len(data))])
            case 2:
                yield bytes((0xC0,)) + rng.randbytes(4) + bytes(data[5:])
            case 3:
                data[-1 - rng.randrange(16)] ^= 1 << rng.randrange(8)
                yield bytes(data)
            case 4:
                init, _ = next(source)
                yield init[:-1] + bytes((init[-1] ^ 1,))
            case 5:
                yield bytes(data[:1]) + rng.randbytes(8) + bytes(data[9:])


@pytest.mark.parametrize("seed", [1, pytest.param(2, marks=pytest.mark.many)])
def test_fault_16_bad_datagrams_draw_nothing(seed: int, request: pytest.FixtureRequest) -> None:
    """0 packets sent, no exception, from the peer's own address and from others; the session goes on."""
    net = Network(seed)
    hub, edge = net.listener(**SECRETS), net.dialler()
    session = edge.connect(hub)
    peer = net.establish(session)
    session.write(0, bytes(5000))
    net.run_for(1.0)
    count = 6000 if seed == 1 else 100_000
    net.flush()
    silent = True
    for number, data in enumerate(garbage(net, hub, edge, count, seed)):
        # INITs of the handshake, whole, are replays and not bad: row 18 has them
        source = edge.addr if number % 2 else ("203.0.113.7", number & 0xFFFF)
        hub.endpoint.receive(data, source, net.now)
        silent = silent and not hub.endpoint.datagrams_to_send(net.now)
    assert silent
    assert session.state is peer.state is State.ESTABLISHED
    session.write(0, bytes(5000))
    net.run(lambda: hub.received_length(peer, 0) == 10_000, limit=1.0)


@pytest.mark.parametrize("seed", range(3))
def test_fault_19_node_tokens_are_good_once_and_for_a_day(seed: int) -> None:
    """A second use, a flipped bit, after a day: each counts as none and draws a Retry; nobody is stuck by it."""
    rng = random.Random(seed)
    net = Network(seed)
    hub, edge = net.listener(), net.dialler()
    for case in ("second use", "flipped", "late"):
        first = edge.connect(hub)
        net.establish(first)
        net.run_for(0.2)
        token = bytearray(tokens_of(edge, first)[0])
        if case == "flipped":
            token[rng.randrange(1, len(token))] ^= 1 << rng.randrange(8)
        if case == "second use":
            second = edge.connect(hub, token=bytes(token))
            net.establish(second)
            second.close(ErrorCode.NO_ERROR, "", net.now)
        first.close(ErrorCode.NO_ERROR, "", net.now)
        net.run_for(2 * NODE_LIFETIME if case == "late" else 2.0)
        retries = hub.endpoint.statistics().retries_sent
        again = edge.connect(hub, token=bytes(token))
        net.establish(again)
        assert hub.endpoint.statistics().retries_sent > retries, case
        again.close(ErrorCode.NO_ERROR, "", net.now)
        net.run_for(2.0)


def test_fault_19_retry_tokens_shown_again_start_nothing() -> None:
    """The INIT that showed it, from another address, to another CID, with a flipped bit, late, and twice."""
    net = Network(4)
    hub, edge = net.listener(), net.dialler()
    session = edge.connect(hub)
    net.establish(session)
    net.run_for(0.5)
    shown = next(
        data
        for _, source, _, data in net.log
        if source == edge.addr and data[0] == packet.INIT_BYTE and packet.parse_init(data).token
    )
    token_at = shown.index(packet.parse_init(shown).token)
    session.close(ErrorCode.NO_ERROR, "", net.now)
    net.run_for(5.0)
    assert hub.endpoint.statistics().sessions == 0
    net.log.clear()
    started = hub.endpoint.statistics().handshakes_started
    flipped = bytearray(shown)
    flipped[token_at + 20] ^= 4
    net.inject(shown, source=("203.0.113.9", edge.addr[1]), to=hub)
    net.inject(shown, source=(edge.addr[0], 1), to=hub)
    net.inject(shown[:5] + bytes(8) + shown[13:], source=edge, to=hub)
    net.inject(bytes(flipped), source=edge, to=hub)
    net.run_for(RETRY_LIFETIME)
    net.inject(shown, source=edge, to=hub)
    net.inject(shown, source=edge, to=hub)
    net.run_for(1.0)
    assert hub.endpoint.statistics().handshakes_started == started
    assert not [data for _, source, _, data in net.log if source == hub.addr]


@pytest.mark.parametrize("seed", range(2))
def test_fault_20_a_flood_of_validated_handshakes_from_one_address(seed: int) -> None:
    """It gets its burst and its 20 a second; others do not notice."""
    net = Network(seed)
    hub = net.listener()
    alone = connect_time(net, hub, "edge-1")
    flood = net.dialler("edge-9")
    start = hub.endpoint.statistics().handshakes_started
    times = []
    for number in range(200):
        flood.connect(hub)
        net.run_for(0.01)
        if number % 20 == 10:
            times.append(connect_time(net, hub, f"edge-{10 + number // 20}"))
    lasted = net.now - START
    started = hub.endpoint.statistics().handshakes_started - start - len(times)
    assert started <= ADDRESS_BURST + ADDRESS_RATE * lasted + 1
    assert hub.endpoint.statistics().dropped_admission > 0
    assert max(times) <= 2 * alone


def connect_time(net: Network, hub: Host, node: str) -> float:
    start = net.now
    net.establish(net.dialler(node).connect(hub), limit=5.0)
    return net.now - start


def test_fault_26_no_group_in_common_is_refused() -> None:
    dialling = make_context(TlsSettings(kit_credentials("edge-1")), server=False)
    dialling.set_tmp_ecdh(ec.SECP521R1())  # nothing else is offered then
    listening = make_context(TlsSettings(kit_credentials("hub")), server=True)
    listening.set_tmp_ecdh(ec.SECP256R1())
    pair = Pair(contexts=(dialling, listening))
    pair.run(lambda: pair.client.refused is not None, limit=5.0)
    assert pair.client.refused is not None
    assert pair.client.keys is None
    assert pair.server is not None
    assert pair.server.keys is None


class Gateway:
    """Comes back by itself: with the token of its last session, and after pauses that grow."""

    def __init__(self, net: Network, number: int, hub: Host) -> None:
        self.rng = random.Random(number)
        self.host = net.host(f"edge-{number}", addr=("198.51.100.1", 10_000 + number))
        self.net, self.hub = net, hub
        self.attempts = 0
        self.token = b""
        self.next_at = 0.0
        self.session: Session | None = None

    @property
    def up(self) -> bool:
        """Since the attempts were last counted anew."""
        return bool(self.attempts) and self.session is not None and self.session.state is State.ESTABLISHED

    def tick(self) -> None:
        session = self.session
        if session is not None and session.live:
            self.token = next(iter(tokens_of(self.host, session)), self.token)
        elif self.net.now >= self.next_at:
            self.attempts += 1
            self.next_at = self.net.now + min(5.0, 0.1 * 2**self.attempts) * self.rng.uniform(0.5, 1.5)
            self.session = self.host.connect(self.hub, token=self.token)
            self.token = b""


@pytest.mark.parametrize(
    ("count", "rate"), [(60, 12.0), pytest.param(1000, 200.0, marks=pytest.mark.many)], ids=["60", "1000"]
)
def test_fault_59_a_thousand_gateways_behind_one_address(count: int, rate: float) -> None:
    """The hub restarts: all are back within 15 s, each in at most 3 attempts, for their tokens say who they are.

    Their address alone would be let in at 20 a second. The small run has the total rate scaled with the count.
    """
    net = Network(5, delay=0.02)
    net.keep_log = False
    open_door: dict[str, Any] = dict.fromkeys(("address_rate", "address_half_open", "total_rate"), 1e6)
    first = net.listener(**SECRETS, **open_door)
    fleet = [Gateway(net, number, first) for number in range(count)]
    for gateway in fleet:
        gateway.tick()
    net.run(lambda: all(gateway.up for gateway in fleet), limit=5.0)
    net.run_for(0.2)
    for gateway in fleet:
        gateway.tick()
        gateway.attempts = 0
        assert gateway.token
        assert gateway.session is not None
    del net.hosts[first.addr]
    hub = net.listener(addr=first.addr, total_rate=rate, address_rate=ADDRESS_RATE * rate / 200, **SECRETS)
    start = net.now
    for gateway in fleet:
        gateway.hub = hub
        assert gateway.session is not None
        gateway.session.write(0, b"still there?")  # which draws a RESET
    while not all(gateway.up for gateway in fleet):
        net.run_for(0.05)
        for gateway in fleet:
            gateway.tick()
        assert net.now - start <= 15.0, f"{sum(g.up for g in fleet)} of {count} are back"
    assert max(gateway.attempts for gateway in fleet) <= 3
    assert hub.endpoint.statistics().retries_sent <= count // 10


def test_fault_56_a_recorded_handshake_holds_no_reset_token() -> None:
    """Whoever recorded it, and has the network key, finds no 16 bytes in it that end the session later (R-8-5)."""
    net = Network(6)
    hub, edge = net.listener(**SECRETS), net.dialler()
    session = edge.connect(hub)
    peer = net.establish(session)
    net.run_for(0.5)
    seen = [data for _, _, _, data in net.log]
    keys_by_dcid: dict[bytes, Any] = {}
    for _, source, _, data in net.log:
        if data[0] == packet.INIT_BYTE:
            parsed = packet.parse_init(data)
            if source == edge.addr:
                keys = keys_by_dcid[parsed.scid] = initial_keys(parsed.dcid, NETWORK_KEY)
                aead = keys.client
            else:
                aead = keys_by_dcid[parsed.dcid].server
            try:
                seen.append(aead.open(parsed.pn, parsed.sealed, parsed.aad).rstrip(b"\0"))
            except PacketError:
                continue  # of the listener's own CID: its keys stay those of the client's
    tokens = {data[at : at + 16] for data in seen for at in range(len(data) - 15)}
    assert len(tokens) > 5000
    head = b"\x4a" + bytes(8) + net.rng.randbytes(10)
    for token in tokens:
        net.inject(head + token, source=hub, to=edge)
    assert session.state is peer.state is State.ESTABLISHED
    session.write(0, b"still here")
    net.run(lambda: hub.received(peer, 0) == b"still here", limit=1.0)


@pytest.mark.parametrize("returns", [True, False])
def test_fault_57_a_detour_by_a_sibling(returns: bool) -> None:
    """Packets that land on a sibling draw nothing; the session goes on when they find back, or is made anew there."""
    net = Network(7)
    hub, edge = net.listener(**SECRETS), net.dialler()
    session = edge.connect(hub)
    peer = net.establish(session)
    net.run_for(0.5)
    del net.hosts[hub.addr]
    sibling = net.listener(addr=hub.addr, instance=1, **SECRETS)
    lane = session.open_stream()
    session.write(lane, b"which way?")
    net.run_for(1.0)
    assert session.state is State.ESTABLISHED
    assert sibling.endpoint.statistics().resets_sent == sibling.endpoint.statistics().datagrams_out == 0
    if returns:
        net.hosts[hub.addr] = hub
        net.run(lambda: hub.received(peer, lane) == b"which way?", limit=3.0)
        return
    net.run(lambda: not session.live, limit=10.0)
    net.establish(edge.connect(sibling))
