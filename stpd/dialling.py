"""How this node dials its upstreams: over UDP, over TLS on TCP, and UDP just to see (protocol §11).

(1) All sessions over UDP share a socket for IPv4 and one for IPv6; a session over TLS has a connection of its own.
(2) A probe has a socket of its own, never gets as far as HELLO, and disturbs no session.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import structlog
import trio

from stp.carriers.tls import TlsCarrier
from stp.carriers.udp import UdpCarrier
from stp.core.endpoint import Endpoint
from stp.core.errors import ErrorCode, HandshakeRefused
from stp.core.session import Session
from stp.core.verbs import AnySession
from stp.identity import Address
from stp.networks import Here
from stp.proxy import connect_through, proxy_for
from stp.racing import PROBE_TIMEOUT

if TYPE_CHECKING:
    from stpd.daemon import Daemon

log = structlog.get_logger("stpd.dialling")


class UpstreamDialler:
    """The dialling sockets of one daemon. `start` it before the first dial."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon
        self.place = Here()
        """What is remembered of the networks that this node was in."""
        self._udp: dict[bool, tuple[UdpCarrier, Endpoint]] = {}
        """By "is it IPv6"."""
        self.carriers: list[UdpCarrier] = []
        self._tls: list[TlsCarrier] = []
        self._nursery: trio.Nursery | None = None
        self.on_rebind: Callable[[], None] = _nothing
        """See stpd/fallback.py."""

    @property
    def movers(self) -> list[UdpCarrier | TlsCarrier]:
        return [*self.carriers, *self._tls]

    async def start(self, nursery: trio.Nursery) -> None:
        """Bind. Raises OSError without IPv4; IPv6 may be missing."""
        self._nursery = nursery
        self._udp[False] = await self._daemon.open_udp("0.0.0.0", 0, accept=False)
        try:
            self._udp[True] = await self._daemon.open_udp("::", 0, accept=False)
        except OSError:
            log.info("no_ipv6", reason="this machine has no IPv6: upstreams are dialled over IPv4")
        self.carriers = [carrier for carrier, _ in self._udp.values()]
        for carrier in self.carriers:
            carrier.on_rebind = self._rebound
            await nursery.start(carrier.run)

    def _rebound(self) -> None:
        self.on_rebind()

    def udp(self, address: tuple[str, int], node: str, token: bytes) -> Session:
        """Start a session. Raises OSError."""
        six = ":" in address[0]
        if six not in self._udp:
            raise OSError(f"no socket for {address[0]}: this machine has no IPv6")
        carrier, endpoint = self._udp[six]
        session = endpoint.connect(
            address,
            expected_node=node,
            expected_domain=self._daemon.identity.domain,
            now=trio.current_time(),
            token=token,
            keepalive=self.place.learner(),
        )
        carrier.wake()
        return session

    async def tls(self, target: Address) -> AnySession:
        """Start a session, through the proxy that the environment names, if any. Raises OSError.

        Whoever asked owns it before anything else runs.
        """
        d = self._daemon
        proxy = proxy_for(target.host, os.environ)
        try:
            carrier = await TlsCarrier.dial(
                target.host,
                target.tls,
                tls=d.contexts.tls,
                leaf_der=d.contexts.leaf_der,
                expected_node=target.node,
                expected_domain=d.identity.domain,
                on_ready=d.sessions.on_ready,
                stream=await connect_through(proxy, target.host, target.tls) if proxy is not None else None,
                authorise=d.authorise,
            )
        except HandshakeRefused as refused:
            raise OSError(f"our own certificate cannot be used: {refused.reason}") from refused
        carrier.turn_begins, carrier.turn_ends = partial(d.turns.begin, d.store), d.turns.end
        assert self._nursery is not None
        self._nursery.start_soon(self._carry, carrier)
        return carrier.session

    async def _carry(self, carrier: TlsCarrier) -> None:
        """To the end of its session."""
        self._tls.append(carrier)
        try:
            await carrier.run()
        finally:
            self._tls.remove(carrier)
            carrier.close()

    async def probe(self, address: tuple[str, int], node: str) -> bool:
        """(2): is a handshake answered there within PROBE_TIMEOUT seconds? Raises OSError when it cannot begin."""
        answered = trio.Event()

        def on_ready(session: Session) -> None:
            if not session.live or session.id is not None:
                answered.set()

        endpoint = Endpoint(self._daemon.endpoint_config(accept=False))
        carrier = await UdpCarrier.bind(endpoint, "::" if ":" in address[0] else "0.0.0.0", on_ready=on_ready)
        try:
            session = endpoint.connect(
                address,
                expected_node=node,
                expected_domain=self._daemon.identity.domain,
                now=trio.current_time(),
            )
            async with trio.open_nursery() as nursery:
                nursery.start_soon(carrier.run)
                carrier.wake()
                with trio.move_on_after(PROBE_TIMEOUT):
                    await answered.wait()
                well = session.live and answered.is_set()
                session.close(ErrorCode.NO_ERROR, "", now=trio.current_time())
                nursery.cancel_scope.cancel()
        finally:
            carrier.close()
        return well

    def remembered(self) -> str:
        return self.place.carrier()

    def worked(self, carrier: str) -> None:
        self.place.worked(carrier)

    def wake(self) -> None:
        self._daemon.turns.wake()

    def close(self) -> None:
        for carrier in self.movers:
            carrier.close()


def _nothing() -> None:
    pass
