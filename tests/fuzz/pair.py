"""Two endpoints and a perfect link, for targets that sit behind a handshake. Time is simulated."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import cache

from OpenSSL import SSL

from stp.core import packet
from stp.core.endpoint import Endpoint, EndpointConfig
from stp.core.handshake import TlsSettings, make_context
from stp.core.keys import SessionKeys
from stp.core.output import Transmit
from stp.core.session import Session
from stp.core.states import State
from tests.identity_kit import DOMAIN, shared

HUB, EDGE = ("192.0.2.1", 9000), ("198.51.100.7", 40000)


@cache
def _contexts(node: str) -> Callable[[bool], SSL.Context]:
    settings = TlsSettings(shared().identity(node).credentials)
    made = {server: make_context(settings, server=server) for server in (False, True)}
    return made.__getitem__


def endpoint(node: str, *, accept: bool, seed: int) -> Endpoint:
    identity = shared().identity(node)
    return Endpoint(
        EndpointConfig(
            tls=_contexts(node),
            leaf_der=identity.leaf_der,
            network_keys=identity.network_keys,
            accept=accept,
            random_bytes=random.Random(seed).randbytes,
            address_rate=1e9,
            total_rate=1e9,
        )
    )


class Pair:
    """`hub` listens, `edge` dials. `sessions` has one session each once `connect` is done."""

    def __init__(self, seed: int = 1) -> None:
        self.now = 0.0
        self._seed = seed
        self.renew()
        self.keys: SessionKeys
        self.sessions: tuple[Session, Session]
        """The hub's and the edge's."""
        self._pn = 1 << 20

    def renew(self) -> None:
        """New endpoints, the clock goes on."""
        self.hub = endpoint("hub", accept=True, seed=self._seed)
        self.edge = endpoint("edge-1", accept=False, seed=self._seed + 1)
        self.sent: list[bytes] = []
        """Every datagram that was on the link."""
        self.cids: dict[bool, bytes] = {}
        """dialling -> the last CID that side put into a DATA header."""

    def carry(self) -> int:
        """Everything that is to be sent arrives. Returns how many datagrams that was."""
        carried = 0
        for source, target, address in ((self.edge, self.hub, EDGE), (self.hub, self.edge, HUB)):
            for one in source.datagrams_to_send(self.now):
                for datagram in split(one):
                    carried += 1
                    self.sent.append(datagram)
                    if packet.is_data(datagram):
                        self.cids[source is self.edge] = datagram[1:9]
                    target.receive(datagram, address, self.now)
        return carried

    def advance(self, seconds: float) -> None:
        self.now += seconds
        for one in (self.hub, self.edge):
            due = one.next_timeout()
            if due is not None and due <= self.now:
                one.handle_timeout(self.now)

    def connect(self) -> None:
        """Shake hands. The keys are taken from the dialling side's handshake, before it is dropped."""
        dialled = self.edge.connect(HUB, expected_node="hub", expected_domain=DOMAIN, now=self.now)
        handshake = dialled.handshake
        assert handshake is not None
        for _ in range(200):
            if handshake.keys is not None:
                self.keys = handshake.keys
            established = [s for s in self.hub.sessions if s.state is State.ESTABLISHED]
            if dialled.state is State.ESTABLISHED and established and len(self.cids) == 2:
                self.sessions = (established[-1], dialled)
                return
            if not self.carry():
                self.advance(0.05)
        raise AssertionError("no handshake in ten seconds")

    def seal(self, frames: bytes, *, dialling: bool) -> bytes:
        """A DATA packet as that side would seal it, beyond all numbers it has used."""
        self._pn += 1
        keys = self.keys.client if dialling else self.keys.server
        pn_key = self.keys.client_pn_key if dialling else self.keys.server_pn_key
        cid = self.cids[dialling]
        header = packet.data_header(0, cid, self._pn ^ packet.whitener(pn_key, cid))
        return header + keys.aead.seal(self._pn, frames, header)


def split(one: Transmit) -> list[bytes]:
    size = one.segment_size or len(one.data)
    return [one.data[at : at + size] for at in range(0, len(one.data), size)]
