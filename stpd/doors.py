"""The doors for peers that come over streams: TLS on TCP, and the Unix socket (protocol §11).

(1) A TLS address that `enrol.listen` names too serves both: enrolment by its ALPN name, everything else is STP.
(2) Sessions that come in here are sessions like any other, under the same rules and the same limit.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Awaitable, Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import attrs
import structlog
import trio

from stp.carriers.door import Door
from stp.carriers.streams import StreamCarrier
from stp.carriers.tls import TlsListener, listening_sockets
from stp.carriers.unix import UnixListener, listening_socket
from stp.core.flow import WindowBudget
from stp.core.framed import FramedContext
from stp.pinned import ALPN
from stpd.checks import WILDCARD, split_address
from stpd.localnames import group_id, name_of

if TYPE_CHECKING:
    from stpd.daemon import Daemon

log = structlog.get_logger("stpd.doors")

WINDOW_BUDGET: Final = 256 * 1024 * 1024
"""Bytes by which the windows of all sessions over streams may grow, together."""


def same_door(one: str, other: str) -> bool:
    """Whether two TCP addresses name the same socket: the same port, and the same host or every host."""
    if not one or not other:
        return False
    (host, port), (other_host, other_port) = split_address(one), split_address(other)
    alike = host == other_host or host in WILDCARD or other_host in WILDCARD
    return port == other_port != 0 and alike


class StreamDoors:
    """Listeners over streams of one daemon."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon
        self._tls: list[TlsListener] = []
        self._unix: list[UnixListener] = []
        self._enrol: Callable[[trio.SocketStream, bytes, str], Awaitable[None]] | None = None

    @property
    def listeners(self) -> list[TlsListener | UnixListener]:
        return [*self._tls, *self._unix]

    def addresses(self) -> list[str]:
        """As people write them: "tls [::]:8443", "unix /run/stpd/stp.sock"."""
        found = []
        for listener in self._tls:
            for host, port in listener.local_addresses:
                found.append(f"tls [{host}]:{port}" if ":" in host else f"tls {host}:{port}")
        return found + [f"unix {listener.path}" for listener in self._unix]

    def serves_enrolment(self) -> bool:
        """Whether one of the TLS addresses is the enrolment service's too (1)."""
        config = self._daemon.config
        return any(same_door(one, config.enrol.listen) for one in config.listen.tls)

    def enrol_by(self, serve: Callable[[trio.SocketStream, bytes, str], Awaitable[None]]) -> None:
        """Who serves connections that ask for enrolment: (stream, bytes read already, host)."""
        self._enrol = serve

    async def start(self, nursery: trio.Nursery) -> None:
        """Bind what the configuration names. Raises OSError, in words for people."""
        listen = self._daemon.config.listen
        for address in listen.tls:
            await self._start_tls(address, nursery)
        if listen.unix.path:
            await self._start_unix(nursery)

    async def _start_tls(self, address: str, nursery: trio.Nursery) -> None:
        d, limits = self._daemon, self._daemon.config.limits
        elsewhere = {}
        if same_door(address, d.config.enrol.listen):
            elsewhere[ALPN] = self._serve_enrolment
        listener = TlsListener(
            await listening_sockets(*split_address(address)),
            tls=d.contexts.tls,
            leaf_der=d.contexts.leaf_der,
            context=self._context("tls"),
            on_ready=d.sessions.on_ready,
            door=Door(
                most=limits.unproven,
                most_per_address=limits.unproven_per_address,
                address_rate=limits.handshakes_per_address,
                total_rate=limits.handshakes_per_second,
            ),
            elsewhere=elsewhere,
        )
        self._in_turns(listener)
        self._tls.append(listener)
        await nursery.start(listener.run)

    async def _serve_enrolment(self, stream: trio.SocketStream, first: bytes, address: Any) -> None:
        if self._enrol is None:
            await trio.aclose_forcefully(stream)
        else:
            await self._enrol(stream, first, str(address[0]) if address else "")

    async def _start_unix(self, nursery: trio.Nursery) -> None:
        d, unix = self._daemon, self._daemon.config.listen.unix
        own = d.identity.node
        listener = UnixListener(
            listening_socket(unix.path, mode=int(unix.mode, 8), gid=group_id(unix.group)),
            name_of=lambda found: name_of(found, unix.map, own),
            own=(d.identity.domain, own),
            context=self._context("unix"),
            on_ready=d.sessions.on_ready,
        )
        self._in_turns(listener)
        self._unix.append(listener)
        await nursery.start(listener.run)

    def _in_turns(self, listener: StreamCarrier) -> None:
        d = self._daemon
        listener.turn_begins, listener.turn_ends = partial(d.turns.begin, d.store), d.turns.end

    def _context(self, carrier: str) -> FramedContext:
        d = self._daemon
        return FramedContext(
            carrier=carrier,
            random_bytes=os.urandom,
            budget=WindowBudget(WINDOW_BUDGET),
            authorise=d.authorise,
            on_refused=d.on_handshake_refused,
        )

    def stop_accepting(self) -> None:
        for listener in self.listeners:
            listener.stop_accepting()

    def close(self) -> None:
        for listener in self.listeners:
            listener.close()

    def bytes_by_carrier(self) -> Counter[tuple[str, str]]:
        """(carrier, "rx" or "tx") -> bytes since the start."""
        found: Counter[tuple[str, str]] = Counter()
        for carrier, listeners in (("tls", self._tls), ("unix", self._unix)):
            found[carrier, "rx"] = found[carrier, "tx"] = 0
            for listener in listeners:
                found[carrier, "rx"] += listener.statistics().rx_bytes
                found[carrier, "tx"] += listener.statistics().tx_bytes
        return found

    def counts(self) -> Counter[tuple[str, str]]:
        """(carrier, what became of it) -> connections since the start."""
        found: Counter[tuple[str, str]] = Counter()
        for carrier, listeners in (("tls", self._tls), ("unix", self._unix)):
            for listener in listeners:
                for name, value in attrs.asdict(listener.door).items():
                    found[carrier, name] += value
        return found
