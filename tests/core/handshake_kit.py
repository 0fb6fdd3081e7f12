"""Two handshakes on one simulated link, for the tests of stp.core.initspace."""

from __future__ import annotations

import random
from collections.abc import Callable

from OpenSSL import SSL

from stp.core import packet
from stp.core.errors import PacketError
from stp.core.handshake import Authorise, TlsCredentials, TlsSettings, make_context
from stp.core.initspace import ClientHandshake, HandshakeState, ServerHandshake, open_first
from stp.core.params import TransportParameters
from stp.core.tokens import NodeToken, RetryToken, TokenKeeper
from tests.identity_kit import shared

ADDRESS = ("192.0.2.1", 4000)
Drop = Callable[[str, int, bytes], bool]
"""(direction "c" or "s", how many went that way before, datagram): whether the link loses it."""


def never(_direction: str, _count: int, _datagram: bytes) -> bool:
    return False


def credentials(node: str) -> TlsCredentials:
    return shared().identity(node).credentials


class Pair:
    """A client, a listener that may answer with Retry, and a link of 10 ms each way; time is simulated."""

    DELAY = 0.01

    def __init__(
        self,
        *,
        seed: int = 0,
        client: TlsCredentials | None = None,
        server: TlsCredentials | None = None,
        expected_node: str = "hub",
        expected_domain: str | None = None,
        authorise: Authorise = lambda peer: None,
        retry: bool = True,
        token: bytes = b"",
        network_key: bytes = b"",
        network_keys: tuple[bytes, ...] = (),
        drop: Drop = never,
        contexts: tuple[SSL.Context, SSL.Context] | None = None,
        keeper: TokenKeeper | None = None,
    ) -> None:
        self.rng = random.Random(seed)
        self.now = 0.0
        self.drop = drop
        self.retry = retry
        self.network_keys = network_keys
        self.authorise = authorise
        client = client or credentials("edge-1")
        self.server_credentials = server or credentials("hub")
        made = contexts or (
            make_context(TlsSettings(client), server=False),
            make_context(TlsSettings(self.server_credentials), server=True),
        )
        self.server_context = made[1]
        self.keeper = keeper or TokenKeeper(self.rng.randbytes)
        self.client = ClientHandshake(
            made[0],
            client.chain_der[0],
            expected_node=expected_node,
            expected_domain=expected_domain,
            cid=self.rng.randbytes(8),
            parameters=TransportParameters(max_datagram=1400),
            network_key=network_key,
            token=token,
            random_bytes=self.rng.randbytes,
            now=0.0,
        )
        self.server: ServerHandshake | None = None
        self.counts = {"c": 0, "s": 0}
        self.bytes = {"c": 0, "s": 0}
        self.flying: list[tuple[float, str, bytes]] = []
        self.ignored = 0
        self.retries = 0

    def send(self, direction: str, datagram: bytes) -> None:
        count = self.counts[direction]
        self.counts[direction] += 1
        self.bytes[direction] += len(datagram)
        if not self.drop(direction, count, datagram):
            self.flying.append((self.now + self.DELAY, direction, datagram))

    def flush(self) -> None:
        for datagram in self.client.datagrams_to_send(self.now):
            assert len(datagram) == packet.INIT_DATAGRAM
            self.send("c", datagram)
        if self.server is not None:
            for datagram in self.server.datagrams_to_send(self.now):
                assert len(datagram) <= packet.INIT_DATAGRAM
                self.send("s", datagram)

    def step(self) -> bool:
        """One arrival or one timeout. False when nothing will ever happen again."""
        self.flush()
        due = [t for h in (self.client, self.server) if h is not None and (t := h.next_timeout()) is not None]
        due += [at for at, _, _ in self.flying]
        if not due:
            return False
        self.now = max(self.now, min(due))
        arrived = [f for f in self.flying if f[0] <= self.now]
        self.flying = [f for f in self.flying if f[0] > self.now]
        for _, direction, datagram in arrived:
            try:
                self.arrive(direction, datagram)
            except PacketError:
                self.ignored += 1
        for handshake in (self.client, self.server):
            if handshake is not None and (t := handshake.next_timeout()) is not None and t <= self.now:
                handshake.handle_timeout(self.now)
        return True

    def run(self, until: Callable[[], bool], limit: float = 30.0) -> None:
        while not until() and self.now < limit and self.step():
            pass

    def run_to_done(self) -> None:
        self.run(lambda: self.server is not None and self.states() == {HandshakeState.DONE})

    def states(self) -> set[HandshakeState]:
        return {h.state for h in (self.client, self.server) if h is not None}

    def arrive(self, direction: str, datagram: bytes) -> None:
        if direction == "s":
            if datagram[0] == packet.RETRY_BYTE:
                self.client.receive_retry(packet.parse_retry(datagram), self.now)
            else:
                self.client.receive_init(packet.parse_init(datagram), self.now)
            return
        received = packet.parse_init(datagram)
        if self.server is None:
            self.first(received)
        if self.server is not None:
            self.server.receive_init(received, self.now)

    def first(self, received: packet.InitPacket) -> None:
        opened = open_first(received, self.network_keys)
        verdict = self.keeper.read(received.token, ADDRESS, received.dcid, self.now)
        if verdict is None and self.retry:
            cid = self.rng.randbytes(8)
            token = self.keeper.seal_retry(ADDRESS, received.dcid, cid, self.now)
            self.retries += 1
            self.send(
                "s", packet.build_retry(received.scid, cid, token, opened.keys.retry_key, received.dcid)
            )
            return
        if isinstance(verdict, NodeToken):
            self.keeper.spend(verdict, self.now)
        retried = isinstance(verdict, RetryToken)
        self.server = ServerHandshake(
            self.server_context,
            self.server_credentials.chain_der[0],
            first=opened,
            received=received,
            original_dcid=verdict.original_dcid if isinstance(verdict, RetryToken) else received.dcid,
            cid=received.dcid if retried else self.rng.randbytes(8),
            retried=retried,
            validated=retried,
            token_node=verdict.node if isinstance(verdict, NodeToken) else b"",
            authorise=self.authorise,
            parameters=TransportParameters(max_datagram=1300),
            random_bytes=self.rng.randbytes,
            now=self.now,
        )
