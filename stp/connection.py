"""A session to one keeper, kept up: resolve, dial, watch, dial again (protocol §8, §9).

(1) `up` means: handshake confirmed by the peer, and its HELLO here. Before that nothing is reported.
(2) Attempts are spaced by a jittered backoff, BACKOFF_FLOOR to BACKOFF_CEILING; at once, one time, after RESTARTING;
    in the slot that the peer names after GOING_AWAY.
(3) Each attempt has a socket of its own: a new source port outlives a confused NAT.
(4) A first attempt that the peer refuses by certificate is final: Rejected. Later ones are tried on, and told.
"""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import os
import random
import socket
import time
from collections.abc import Awaitable, Callable
from typing import Any, Final

import trio
from attrs import define, evolve

from stp.carriers.udp import LOOPBACK_DATAGRAM, UdpCarrier, datagram_for
from stp.control import Goaway, Hello
from stp.core.endpoint import Endpoint, EndpointConfig
from stp.core.errors import ErrorCode, StpError
from stp.core.path import KEEPALIVE
from stp.core.verbs import AnySession
from stp.identity import Address, ContextCache, Identity, TimeFloor
from stp.link import GoawayReceived, HelloReceived, Link, LinkClosed, LinkEvent

log: Final = logging.getLogger("stp.client")

BACKOFF_FLOOR: Final = 0.05
BACKOFF_CEILING: Final = 5.0
"""Seconds between attempts, before jitter (half to whole of it)."""
MAX_SLOT: Final = 60.0
"""Seconds: the longest reconnect slot of a peer that we heed."""
RESOLVE_TIMEOUT: Final = 5.0
"""Seconds for a name server to answer."""
CHECK_INTERVAL: Final = 1.0
"""Seconds between looks at the link's deadlines."""
CLOSE_TIMEOUT: Final = 1.0
"""Seconds that a closing session waits for its last receipts to arrive."""
CLOSE_POLL: Final = 0.005

SOFTWARE_VERSION: Final = "0.1.0"
"""What HELLO says of this library."""

REFUSALS: Final = frozenset({ErrorCode.AUTH, ErrorCode.EXPIRED, ErrorCode.REVOKED})
"""Codes that say: not with this certificate."""


class Unreachable(StpError):  # noqa: N818 - read as a sentence
    """Nobody answered in time. `cause` is the last thing that was seen, in words."""

    def __init__(self, where: str, seconds: float, cause: str) -> None:
        super().__init__(f"{where} did not answer within {seconds:g} s{': ' + cause if cause else ''}")
        self.cause = cause


class Rejected(StpError):  # noqa: N818 - read as a sentence
    """One of the two sides does not accept the other's certificate. `by_peer` says which."""

    def __init__(self, where: str, code: ErrorCode, reason: str, by_peer: bool) -> None:
        who = f"{where} refused us" if by_peer else f"we refuse {where}"
        super().__init__(f"{who}: {reason.removeprefix('refused by the peer: ') or code.name}")
        self.code = code
        self.reason = reason
        self.by_peer = by_peer


@define
class ConnectionStatistics:
    """Counts since the start. `rtt` is the smoothed round trip in seconds, 0 before it is known."""

    attempts: int = 0
    connects: int = 0
    lost: int = 0
    rtt: float = 0.0


class Connection:
    """One session at a time to one address. `on_up(link)`, `on_event(link, event)` and `on_down()` are the owner's.

    `on_idle()` is called after the events of one wake-up were given.
    """

    def __init__(
        self,
        target: Address,
        identity: Identity,
        contexts: ContextCache,
        hello: Hello,
        *,
        network_keys: Callable[[], tuple[bytes, ...]],
        prepare: Callable[[], Awaitable[None]],
        on_up: Callable[[Link], None],
        on_event: Callable[[Link, LinkEvent], None],
        on_down: Callable[[], None],
        on_idle: Callable[[], None],
        keepalive: float = KEEPALIVE,
    ) -> None:
        self.target = target
        self.where = f"{target.host}:{target.port}"
        self.link: Link | None = None
        """The link while it is up."""
        self.cause = ""
        """Why the last attempt or session ended, in words."""
        self.stats = ConnectionStatistics()
        self._identity = identity
        self._contexts = contexts
        self._hello = hello
        self._network_keys = network_keys
        self._prepare = prepare
        self._keepalive = keepalive
        self._on_up, self._on_event = on_up, on_event
        self._on_down, self._on_idle = on_down, on_idle
        self._dialled: Link | None = None
        self._carrier: UdpCarrier | None = None
        self._ended = trio.Event()
        self._closed: LinkClosed | None = None
        self._slot: float | None = None
        self._token = b""
        self._first = trio.Event()
        self.rejected: Rejected | None = None
        self._closing = False

    async def run(self) -> None:
        """Keep the session up until cancelled, or until a first attempt was rejected."""
        failures, at_once = 0, True
        while not self._closing:
            was_up = self.stats.connects
            self.stats.attempts += 1
            try:
                closed = await self._attempt(failures)
            except OSError as error:
                closed, self.cause = None, str(error)
            if self.stats.connects > was_up:
                failures, at_once = 0, True
                if not self._closing:
                    log.warning("lost %s: %s", self.where, self.cause)
            elif closed is not None and closed.code in REFUSALS and not was_up:
                self._reject(closed)
                return
            failures += 1
            if closed is not None and closed.code is ErrorCode.RESTARTING and at_once:
                at_once = False
                continue
            await trio.sleep(self._pause(failures))

    def _reject(self, closed: LinkClosed) -> None:
        assert isinstance(closed.code, ErrorCode)
        self.rejected = Rejected(self._peer_name(), closed.code, closed.reason, closed.by_peer)
        self._first.set()

    def _pause(self, failures: int) -> float:
        """(2), in seconds."""
        slot, self._slot = self._slot, None
        if slot is not None:
            return min(slot, MAX_SLOT)
        backoff = min(BACKOFF_FLOOR * 2 ** min(failures - 1, 16), BACKOFF_CEILING)
        return float(backoff) * random.uniform(0.5, 1.0)

    async def wait_first(self, seconds: float) -> None:
        """Until the session is up for the first time. Raises Unreachable, Rejected."""
        with trio.move_on_after(seconds):
            await self._first.wait()
        if self.rejected is not None:
            raise self.rejected
        if not self._first.is_set():
            raise Unreachable(self._peer_name(), seconds, self.cause)

    def wake(self) -> None:
        """Something was queued on the link."""
        if self._carrier is not None:
            self._carrier.wake()

    def statistics(self) -> ConnectionStatistics:
        """A snapshot."""
        rtt = self.link.session.statistics().rtt if self.link is not None else 0.0
        return evolve(self.stats, rtt=rtt or 0.0)

    def _peer_name(self) -> str:
        return f"{self.target.node} at {self.where}"

    def describe(self) -> str:
        """What it is doing, for people."""
        if self.link is not None:
            return f"connected to {self._peer_name()}"
        return f"waiting for {self.where} to answer{f' ({self.cause})' if self.cause else ''}"

    # -- one session -------------------------------------------------------------------------------------

    async def _attempt(self, failures: int) -> LinkClosed:
        """Dial once, and serve the session until it ends. Raises OSError."""
        await self._prepare()
        host, port = await self._resolve(failures)
        endpoint = Endpoint(
            EndpointConfig(
                tls=self._contexts.tls,
                leaf_der=self._contexts.leaf_der,
                network_keys=self._network_keys(),
                random_bytes=os.urandom,
                max_datagram=LOOPBACK_DATAGRAM,
                datagram_for=datagram_for,
                keepalive=self._keepalive,
            )
        )
        local = "::" if ipaddress.ip_address(host.partition("%")[0]).version == 6 else "0.0.0.0"
        carrier = await UdpCarrier.bind(endpoint, local, on_ready=self._on_ready)
        self._ended, self._closed = trio.Event(), None
        try:
            address = await carrier.resolve(host, port)
            async with trio.open_nursery() as nursery:
                await nursery.start(carrier.run)
                self._dial(endpoint, carrier, address)
                closed = await self._watch()
                nursery.cancel_scope.cancel()
        finally:
            if self._dialled is not None:  # cancelled: the peer need not find out by silence
                self._dialled.close(ErrorCode.NO_ERROR, "", trio.current_time())
            carrier.close()
            self._carrier = self._dialled = None
            self._down()
        return closed

    def _dial(self, endpoint: Endpoint, carrier: UdpCarrier, address: Any) -> None:
        session = endpoint.connect(
            address,
            expected_node=self.target.node,
            expected_domain=self._identity.domain,
            now=trio.current_time(),
            token=self._token,
        )
        self._token = b""  # it opens one handshake
        self._carrier = carrier
        self._dialled = Link(
            session,
            self._hello,
            wall_ms=lambda: time.time_ns() // 1_000_000,
            may_speak_for=_anybody,  # what comes from the keeper we chose comes from anywhere
        )
        carrier.wake()

    async def _resolve(self, failures: int) -> tuple[str, int]:
        """One of the name's addresses; another after each failure. Raises OSError."""
        with trio.move_on_after(RESOLVE_TIMEOUT):
            try:
                found = await trio.socket.getaddrinfo(
                    self.target.host, self.target.port, type=socket.SOCK_DGRAM
                )
            except OSError as error:
                raise OSError(error.errno, f"cannot resolve {self.target.host}: {error.strerror}") from error
            host, port = found[failures % len(found)][4][:2]
            return str(host), int(port)
        raise OSError(f"cannot resolve {self.target.host}: no answer in {RESOLVE_TIMEOUT:g} s")

    async def _watch(self) -> LinkClosed:
        """Until the session ends."""
        while not self._ended.is_set():
            with trio.move_on_after(CHECK_INTERVAL):
                await self._ended.wait()
            link = self._dialled
            if link is not None and not self._ended.is_set():
                self._give(link, link.check(trio.current_time()))
        assert self._closed is not None
        return self._closed

    def _on_ready(self, session: AnySession) -> None:
        link = self._dialled
        if link is not None and link.session is session:
            self._give(link, link.process(trio.current_time()))

    def _give(self, link: Link, events: list[LinkEvent]) -> None:
        for event in events:
            if isinstance(event, LinkClosed):
                self._end(event)
            elif isinstance(event, HelloReceived):
                self._up(link)
                self._on_event(link, event)
            else:
                if isinstance(event, GoawayReceived):
                    self._heed(event.goaway)
                self._on_event(link, event)
        if events:
            self._on_idle()
        if link.token:
            self._token, link.token = link.token, b""

    def _up(self, link: Link) -> None:
        """(1)"""
        self.link = link
        self.stats.connects += 1
        self.cause = ""
        log.info("%s", self.describe())
        self._on_up(link)
        self._first.set()

    def _down(self) -> None:
        if self.link is not None:
            self.link = None
            self.stats.lost += 1
            self._on_down()

    def _heed(self, goaway: Goaway) -> None:
        self._slot = goaway.slot_ms / 1000

    def _end(self, closed: LinkClosed) -> None:
        code = closed.code.name if isinstance(closed.code, ErrorCode) else str(closed.code)
        self.cause = f"{code}: {closed.reason}" if closed.reason and closed.reason != code else code
        if closed.code is ErrorCode.GOING_AWAY and closed.reason.isdigit():
            self._slot = int(closed.reason) / 1000
        self._closed = closed
        self._down()
        self._ended.set()

    async def aclose(self) -> None:
        """Let the last receipts arrive, say CLOSE, and stop. `run` is then to be cancelled."""
        self._closing = True
        link = self.link
        if link is None:
            return
        link.flush()
        self.wake()
        with trio.move_on_after(CLOSE_TIMEOUT):
            while link.closed is None and link.unacknowledged_control:  # noqa: ASYNC110 - makes no event
                await trio.sleep(CLOSE_POLL)
        link.close(ErrorCode.NO_ERROR, "", trio.current_time())
        if self._carrier is not None:
            self._carrier.close()


class Dialler:
    """Makes the connections of one process: one identity, one target, a hello each."""

    def __init__(
        self, target: Address, identity: Identity, network_key: bytes | None, *, kind: str, run: int
    ) -> None:
        """`network_key`: instead of those of the identity; None: those, as they are at each dial."""
        self.target = target
        self.identity = identity
        self.run = run
        self._network_keys = identity.network_keys if network_key is None else (network_key,)
        self._own_key = network_key is not None
        self._kind = kind
        self._nonce = os.urandom(16)
        self._contexts = ContextCache(identity, TimeFloor())
        self._stamp = _stamp(identity.files)

    def connection(
        self,
        source: bytes,
        *,
        on_up: Callable[[Link], None],
        on_event: Callable[[Link, LinkEvent], None],
        on_down: Callable[[], None],
        on_idle: Callable[[], None],
        keepalive: float = KEEPALIVE,
    ) -> Connection:
        """A connection that introduces itself with this source (16 bytes). `run` it to dial.

        `keepalive`: seconds of silence after which it asks whether the keeper lives.
        """
        identity = self.identity
        software = f"stp/{SOFTWARE_VERSION}"
        hello = Hello(identity.domain, identity.node, source, self.run, self._nonce, self._kind, software)
        return Connection(
            self.target,
            identity,
            self._contexts,
            hello,
            network_keys=lambda: self._network_keys,
            prepare=self._take_renewed,
            on_up=on_up,
            on_event=on_event,
            on_down=on_down,
            on_idle=on_idle,
            keepalive=keepalive,
        )

    async def _take_renewed(self) -> None:
        """Before each dial: take the identity from its files again, if they have changed."""
        stamp = _stamp(self.identity.files)
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            found = await trio.to_thread.run_sync(Identity.load, self.identity.files)
        except StpError as error:
            log.warning("the renewed identity cannot be used: %s", error)
            return
        if (found.domain, found.node) != (self.identity.domain, self.identity.node):
            log.warning("the identity's files now name %s/%s; restart to use it", found.domain, found.node)
            return
        self._contexts.replace(found)
        if not self._own_key:
            self._network_keys = found.network_keys


def _stamp(files: tuple[str, ...]) -> tuple[int, ...]:
    """Changes when a file does; nothing of a file that is not there."""
    found = []
    for file in files:
        with contextlib.suppress(OSError):
            found.append(os.stat(file).st_mtime_ns)
    return tuple(found)


def _anybody(node: str) -> bool:
    return True
