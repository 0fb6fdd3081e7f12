"""How a session to one keeper is dialled: over UDP, over TLS on TCP, over a Unix socket (protocol §8, §11)."""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
from collections.abc import Awaitable, Callable
from typing import Final, Protocol, TypeAlias

import trio

from stp.carriers.tls import TlsCarrier
from stp.carriers.udp import LOOPBACK_DATAGRAM, UdpCarrier, sizes_for
from stp.carriers.unix import UnixCarrier
from stp.core.endpoint import Endpoint, EndpointConfig
from stp.core.errors import ErrorCode
from stp.core.path import KEEPALIVE
from stp.core.states import State
from stp.core.verbs import AnySession
from stp.identity import Address, ContextCache, Identity
from stp.kept_tokens import KeptTokens
from stp.networks import Here
from stp.proxy import connect_through, proxy_for
from stp.qlog import QlogDirectory
from stp.racing import PROBE_TIMEOUT

RESOLVE_TIMEOUT: Final = 5.0
"""Seconds for a name server to answer."""


class Carrier(Protocol):
    """What moves the bytes of one session: UdpCarrier, TlsCarrier."""

    def wake(self) -> None: ...
    def send_now(self) -> None: ...
    def close(self) -> None: ...
    async def run(self, *, task_status: trio.TaskStatus[None] = ...) -> None: ...


Ready: TypeAlias = Callable[[AnySession], None]
"""Called when a session has something new."""
Dial: TypeAlias = Callable[[Ready], Awaitable[tuple[AnySession, Carrier]]]
"""`await dial(on_ready)` begins one session, with a carrier of its own that nobody runs yet. Raises OSError."""


class Ways:
    """All ways to one target. Every dial has a socket of its own: a new source port outlives a confused NAT."""

    def __init__(
        self,
        target: Address,
        identity: Identity,
        contexts: ContextCache,
        *,
        network_keys: Callable[[], tuple[bytes, ...]],
        keepalive: float = KEEPALIVE,
        tokens: KeptTokens | None = None,
        qlog: QlogDirectory | None = None,
        place: Here | None = None,
    ) -> None:
        self.target = target
        self.contexts = contexts
        self.tokens = tokens or KeptTokens()
        self.place = place or Here()
        self._identity = identity
        self._network_keys = network_keys
        self._keepalive = keepalive
        self._qlog = qlog

    async def udp(self, on_ready: Ready, failures: int = 0) -> tuple[AnySession, Carrier]:
        """A `Dial` over UDP; `failures` picks another of the name's addresses."""
        host, port = await self._resolve(failures)
        endpoint = Endpoint(
            EndpointConfig(
                tls=self.contexts.tls,
                leaf_der=self.contexts.leaf_der,
                network_keys=self._network_keys(),
                random_bytes=os.urandom,
                max_datagram=LOOPBACK_DATAGRAM,
                sizes_for=sizes_for,
                keepalive=self._keepalive,
                observer=self._qlog.observe if self._qlog is not None else None,
            )
        )
        local = "::" if ipaddress.ip_address(host.partition("%")[0]).version == 6 else "0.0.0.0"
        carrier = await UdpCarrier.bind(endpoint, local, on_ready=on_ready, movable=True)
        try:
            address = await carrier.resolve(host, port)
        except BaseException:
            carrier.close()
            raise
        session = endpoint.connect(
            address,
            expected_node=self.target.node,
            expected_domain=self._identity.domain,
            now=trio.current_time(),
            token=self.tokens.take(f"{self.target.node} at {self.target.where}"),
            keepalive=self.place.learner() if self._keepalive == KEEPALIVE else None,
        )
        return session, carrier

    async def _resolve(self, failures: int) -> tuple[str, int]:
        """One of the name's addresses; another after each failure. Raises OSError."""
        with trio.move_on_after(RESOLVE_TIMEOUT):
            try:
                found = await trio.socket.getaddrinfo(
                    self.target.host, self.target.port, type=socket.SOCK_DGRAM
                )
            except OSError as error:
                raise OSError(error.errno, f"cannot resolve {self.target.host}: {error.strerror}") from error
            except UnicodeError as error:  # a label of over 63 characters, for one
                raise OSError(errno.EINVAL, f"{self.target.host!r} is no host name: {error}") from error
            host, port = found[failures % len(found)][4][:2]
            return str(host), int(port)
        raise OSError(f"cannot resolve {self.target.host}: no answer in {RESOLVE_TIMEOUT:g} s")

    async def tls(self, on_ready: Ready) -> tuple[AnySession, Carrier]:
        """A `Dial` over TLS on TCP, through the proxy that the environment names, if any."""
        host, port = self.target.host, self.target.tls
        proxy = proxy_for(host, os.environ)
        carrier = await TlsCarrier.dial(
            host,
            port,
            tls=self.contexts.tls,
            leaf_der=self.contexts.leaf_der,
            expected_node=self.target.node,
            expected_domain=self._identity.domain,
            on_ready=on_ready,
            stream=await connect_through(proxy, host, port) if proxy is not None else None,
            keepalive=self._keepalive,
        )
        return carrier.session, carrier

    async def unix(self, on_ready: Ready) -> tuple[AnySession, Carrier]:
        """A `Dial` over a Unix socket."""
        expected = self._identity.domain, self.target.node
        carrier = await UnixCarrier.dial(
            self.target.path, on_ready=on_ready, expected=expected, keepalive=self._keepalive
        )
        return carrier.session, carrier


async def answers(dial: Dial) -> bool:
    """Is a handshake answered that way, within PROBE_TIMEOUT? It is given up as soon as that is known."""
    answered = trio.Event()

    def on_ready(session: AnySession) -> None:
        if not session.live or session.state is State.ESTABLISHED:
            answered.set()

    try:
        session, carrier = await dial(on_ready)
    except OSError:
        return False
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(carrier.run)
            carrier.wake()
            with trio.move_on_after(PROBE_TIMEOUT):
                await answered.wait()
            well = session.state is State.ESTABLISHED
            session.close(ErrorCode.NO_ERROR, "", now=trio.current_time())
            carrier.close()
            nursery.cancel_scope.cancel()
    finally:
        carrier.close()
    return well
