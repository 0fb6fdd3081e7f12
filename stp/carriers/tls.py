"""The TLS carrier: sessions over TLS on TCP, where UDP does not get through (protocol §11). R-11-1 to R-11-3."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final, TypeAlias

import trio

from stp.carriers.door import Door, DoorStatistics, Place
from stp.carriers.streams import (
    READ_SIZE,
    DialledCarrier,
    Stream,
    StreamCarrier,
    accepted,
    address_of,
    plain_socket,
    prepare_tcp,
)
from stp.core.channel import TlsChannel
from stp.core.clienthello import offered_protocols
from stp.core.errors import FrameEncodingError, HandshakeRefused
from stp.core.flow import WindowBudget
from stp.core.framed import FramedContext, FramedSession, allow
from stp.core.handshake import Authorise
from stp.core.path import KEEPALIVE
from stp.core.verbs import AnySession

CONNECT_TIMEOUT: Final = 5.0
"""Seconds that resolving a name and connecting TCP may take."""
DIAL_BUDGET: Final = 64 * 1024 * 1024
"""Bytes by which the windows of a dialled session may grow, all together."""

BACKLOG: Final = 128
"""Connections that the kernel holds for a listener."""

Elsewhere: TypeAlias = Callable[[trio.SocketStream, bytes, Any], Awaitable[None]]


class TlsCarrier(DialledCarrier):
    """A dialled session and its TCP stream. Make it with `dial`, then keep `run` running.

    `on_ready(session)` is called, in the trio thread, whenever the session has something new, SessionClosed included:
    a connection that breaks ends the session with a LocalCause.
    """

    @classmethod
    async def dial(
        cls,
        host: str,
        port: int,
        *,
        tls: Callable[[bool], Any],
        leaf_der: bytes | Callable[[], bytes],
        expected_node: str,
        expected_domain: str,
        on_ready: Callable[[AnySession], None],
        stream: trio.SocketStream | None = None,
        keepalive: float = KEEPALIVE,
        random_bytes: Callable[[int], bytes] = os.urandom,
        authorise: Authorise = allow,
    ) -> TlsCarrier:
        """Connect TCP to host:port, or take `stream`, which is connected already (through a proxy, say) and is then
        the carrier's to close.

        `tls` and `leaf_der` are those of EndpointConfig. Raises OSError, with the address in its text, also after
        CONNECT_TIMEOUT seconds; HandshakeRefused when our own credentials cannot be used.
        """
        if stream is None:
            stream = await connect_tcp(host, port)
        sock = plain_socket(stream)
        try:
            prepare_tcp(sock)
            context = FramedContext(
                carrier="tls",
                random_bytes=random_bytes,
                budget=WindowBudget(DIAL_BUDGET),
                keepalive=keepalive,
                authorise=authorise,
            )
            leaf = leaf_der if isinstance(leaf_der, bytes) else leaf_der()
            session = FramedSession(
                context,
                TlsChannel(tls(False), leaf, dialling=True),
                address_of(sock) or (host, port),
                dialling=True,
                now=trio.current_time(),
                expected=(expected_domain, expected_node),
            )
            return cls(Stream(sock, session), context, on_ready)
        except BaseException:
            sock.close()
            raise


class TlsListener(StreamCarrier):
    """TLS sessions that others dial. `bind` it, then keep `run` running.

    `elsewhere`: by ALPN name, who serves connections that offer it: an async function of (stream, first bytes read,
    address), which closes the stream. All others, and those that offer nothing, are STP (R-11-1).
    """

    def __init__(
        self,
        sockets: list[socket.socket],
        *,
        tls: Callable[[bool], Any],
        leaf_der: bytes | Callable[[], bytes],
        context: FramedContext,
        on_ready: Callable[[AnySession], None],
        door: Door | None = None,
        elsewhere: Mapping[bytes, Elsewhere] | None = None,
    ) -> None:
        super().__init__(context, on_ready)
        self._sockets = sockets
        self._tls = tls
        self._leaf_der = leaf_der
        self._elsewhere = elsewhere or {}
        self._door = door or Door()

    @property
    def door(self) -> DoorStatistics:
        """Live counters: read, do not keep."""
        return self._door.statistics

    @property
    def local_addresses(self) -> list[Any]:
        """Where it listens; empty once it is closed."""
        return [sock.getsockname()[:2] for sock in self._sockets if sock.fileno() >= 0]

    async def _start(self, nursery: trio.Nursery) -> None:
        for sock in self._sockets:
            nursery.start_soon(self._accept_loop, sock, nursery)

    def _release(self) -> None:
        super()._release()
        for sock in self._sockets:
            trio.lowlevel.notify_closing(sock)
            sock.close()

    def stop_accepting(self) -> None:
        """New connections are turned away; those that stand go on."""
        self.accepting = False

    accepting = True

    async def _accept_loop(self, listener: socket.socket, nursery: trio.Nursery) -> None:
        async for sock in accepted(listener, self._count_error):
            prepare_tcp(sock)
            address = address_of(sock)
            scope = trio.CancelScope()
            place = None
            if self.accepting:
                place = self._door.enter(address, trio.current_time(), scope.cancel)
            if place is None:
                sock.close()
            else:
                nursery.start_soon(self._admit, sock, address, place, scope)

    async def _admit(self, sock: socket.socket, address: Any, place: Place, scope: trio.CancelScope) -> None:
        """One connection, from its first byte to its last."""
        counts = self._door.statistics
        scope.deadline = trio.current_time() + self._context.handshake_timeout
        try:
            with scope:
                first = await self._first_flight(sock)
                if first is None:
                    counts.broken += 1
                    return
                data, names = first
                serve = next((self._elsewhere[name] for name in names if name in self._elsewhere), None)
                if serve is not None:
                    place.make_way, scope.deadline = None, float("inf")  # it has limits of its own
                    await serve(trio.SocketStream(trio.socket.from_stdlib_socket(sock)), data, address)
                    return
                await self._serve_new(sock, data, address, place, scope)
            if scope.cancelled_caught and trio.current_time() >= scope.deadline:
                counts.late += 1
        finally:
            self._door.leave(place)
            if sock.fileno() >= 0:
                trio.lowlevel.notify_closing(sock)
                sock.close()

    async def _first_flight(self, sock: socket.socket) -> tuple[bytes, list[bytes]] | None:
        """(bytes read, protocols offered); None: it went, or it is no TLS."""
        data = b""
        while True:
            await trio.lowlevel.wait_readable(sock)
            try:
                more = sock.recv(READ_SIZE)
            except BlockingIOError:
                continue
            except OSError as exc:
                self._count_error(exc)
                return None
            if not more:
                return None
            data += more
            self._statistics.rx_bytes += len(more)
            try:
                names = offered_protocols(data)
            except FrameEncodingError:
                return None
            if names is not None:
                return data, names

    async def _serve_new(
        self, sock: socket.socket, data: bytes, address: Any, place: Place, scope: trio.CancelScope
    ) -> None:
        now = trio.current_time()
        leaf = self._leaf_der if isinstance(self._leaf_der, bytes) else self._leaf_der()
        try:
            channel = TlsChannel(self._tls(True), leaf, dialling=False)
        except HandshakeRefused as exc:  # it is our own certificate that cannot be used
            if self._context.on_refused is not None:
                self._context.on_refused(address, None, exc.reason)
            return
        session = FramedSession(self._context, channel, address, dialling=False, now=place.since)
        stream = Stream(sock, session)

        def proven() -> None:
            scope.deadline = float("inf")
            place.make_way = None
            self._door.leave(place)

        stream.on_proven = proven
        session.receive(data, now)
        await self._serve(stream)
        if session.refused:
            self._door.statistics.refused += 1


async def connect_tcp(host: str, port: int, seconds: float = CONNECT_TIMEOUT) -> trio.SocketStream:
    """Raises OSError, with the address in its text."""
    where = f"TCP {host} port {port}"
    with trio.move_on_after(seconds):
        try:
            return await trio.open_tcp_stream(host, port)
        except OSError as exc:
            reason = exc.strerror or str(exc)
            raise OSError(exc.errno or errno.EHOSTUNREACH, f"cannot connect to {where}: {reason}") from exc
        except UnicodeError as exc:  # a label of over 63 characters, for one
            raise OSError(errno.EINVAL, f"{host!r} is no host name: {exc}") from exc
    raise OSError(errno.ETIMEDOUT, f"cannot connect to {where}: no answer in {seconds:g} s")


async def listening_sockets(host: str, port: int) -> list[socket.socket]:
    """Listen on host:port; "::" takes IPv4 too, port 0 a free one. Raises OSError, with the address in its text."""
    try:
        found = await trio.socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE | socket.AI_NUMERICSERV
        )
        family, _, _, _, address = found[0]
        sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0 if host == "::" else 1)
            sock.bind(address)
            sock.listen(BACKLOG)
        except BaseException:
            sock.close()
            raise
    except OSError as exc:
        raise OSError(exc.errno, f"cannot listen on TCP {host} port {port}: {exc.strerror}") from exc
    return [sock]
