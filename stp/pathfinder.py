"""What works between here and a keeper: its name, UDP, TLS, tried side by side and measured (protocol §8, §11).

(1) All of it takes at most DEADLINE seconds, whatever does not answer.
(2) No HELLO is sent: the keeper's message layer hears of nobody, and nothing of anybody's is replaced or published.
(3) Nothing that a client remembers is used up or changed: no token is taken, the file of networks is only read.
(4) A refusal that anybody on the way could have written (ICMP) never outweighs an answer.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable
from enum import StrEnum
from typing import Final

import trio
from attrs import define, evolve, field, fields

from stp.carriers.udp import sizes_for
from stp.core.endpoint import EndpointConfig
from stp.core.errors import ErrorCode, HandshakeRefused, LocalCause
from stp.core.events import Connected, DatagramReceived, SessionClosed
from stp.core.verbs import AnySession
from stp.echo import ECHO_REPLY, ECHO_REQUEST, FIRST_APPLICATION_KIND, HEAD, MIN_SIZE
from stp.identity import Address, ContextCache, Identity, TimeFloor, network_key_id
from stp.networks import Network, Networks, here
from stp.proxy import ProxyError, proxy_for
from stp.ways import Carrier, Dial, Ways

DEADLINE: Final = 10.0
"""Seconds for everything (1)."""
RESOLVE_TIMEOUT: Final = 3.0
"""Seconds for a name server."""
ANSWER_TIMEOUT: Final = 5.0
"""Seconds for a handshake, from its first packet or from the first SYN."""
SERIES_TIME: Final = 3.0
"""Seconds of round trips, and of asking how large packets may be."""
SERIES_PAUSE: Final = 0.05
"""Seconds between two."""
LAST_REPLIES: Final = 0.3
"""Seconds that replies under way are waited for, at least."""
ECHO_SIZE: Final = 100
"""Bytes of each echo: what a small message has."""
MAX_ADDRESSES: Final = 4
"""Addresses of one name that are tried over UDP, side by side."""
DOOR_KNOCKS: Final = 3
DOOR_PAUSE: Final = 0.3
"""Datagrams, and seconds between them, that ask whether a host says "nobody here"."""
BELIEVED: Final = 1.5
"""Seconds after which a host's word that nobody listens is believed, if nobody answered meanwhile (4)."""

# linux/in.h, linux/in6.h: tell of routers' words too, not only of the host's own
_IP_RECVERR: Final = (socket.IPPROTO_IP, 11)
_IPV6_RECVERR: Final = (socket.IPPROTO_IPV6, 25)


class Fault(StrEnum):
    """Why a way does not work. The values are part of `-o json`."""

    NONE = ""
    NOT_TRIED = "not tried"
    NO_NAME = "name not resolved"
    SILENCE = "no answer"
    PORT_CLOSED = "port closed"
    NO_ROUTE = "no route"
    FORBIDDEN = "forbidden here"
    PROXY = "proxy refused"
    REFUSED_BY_PEER = "refused by peer"
    REFUSED_BY_US = "refused by us"
    WRONG_NODE = "wrong node"
    OTHER = "other"


_OF_ERRNO: Final = {
    errno.ECONNREFUSED: Fault.PORT_CLOSED,
    errno.ENETUNREACH: Fault.NO_ROUTE,
    errno.EHOSTUNREACH: Fault.NO_ROUTE,
    errno.ENETDOWN: Fault.NO_ROUTE,
    errno.EADDRNOTAVAIL: Fault.NO_ROUTE,
    errno.EAFNOSUPPORT: Fault.NO_ROUTE,
    errno.EPERM: Fault.FORBIDDEN,
    errno.EACCES: Fault.FORBIDDEN,
    errno.ETIMEDOUT: Fault.SILENCE,
}


@define
class Resolution:
    """What the name servers said. Seconds."""

    addresses: tuple[str, ...] = ()
    seconds: float = 0.0
    problem: str = ""
    """In the resolver's words; "" when there are addresses."""


@define
class Way:
    """One carrier to one address: whether it works, or why not. Times are seconds, sizes bytes, 0 is unknown."""

    carrier: str
    address: str = ""
    port: int = 0
    fault: Fault = Fault.NOT_TRIED
    reason: str = ""
    """In the words of whoever knows more: the other side, the kernel, the proxy."""
    found: str = ""
    """The node that answered, where it is another than was asked for."""
    proxy: str = ""
    """Host and port of the HTTP proxy that TCP goes through."""
    tcp: float = 0.0
    """Until TCP stood, the proxy's answer included."""
    connected: float = 0.0
    """Until the session stood, `tcp` included."""
    rtt_min: float = 0.0
    rtt_p50: float = 0.0
    """Of echoes of ECHO_SIZE bytes; of acknowledgements where the keeper echoes none."""
    sent: int = 0
    lost: int = 0
    """Echoes without a reply, in either direction, but for those that the keeper did not want to answer."""
    datagram: int = 0
    """Bytes of UDP payload of full packets, as far as they were found to pass."""
    datagram_most: int = 0
    """Up to which size was asked."""
    congestion: str = ""
    """The congestion controller."""

    @property
    def works(self) -> bool:
        return self.fault is Fault.NONE


@define
class Memory:
    """What is remembered of the network that we are in."""

    network: str = ""
    """Its key; "" without a default route."""
    file: str = ""
    known: Network = field(factory=Network)


@define
class Findings:
    """All that was found."""

    target: Address
    resolution: Resolution
    udp: list[Way]
    """One for each address that was tried, in the resolver's order; never empty."""
    tls: Way
    memory: Memory
    key_ids: tuple[str, ...] = ()
    """What our network keys are called."""

    @property
    def best_udp(self) -> Way:
        """One that works, else the one that says most."""
        return min(self.udp, key=lambda way: _TELLING.index(way.fault))


_TELLING: Final = (
    Fault.NONE,
    Fault.WRONG_NODE,
    Fault.REFUSED_BY_PEER,
    Fault.REFUSED_BY_US,
    Fault.OTHER,
    Fault.FORBIDDEN,
    Fault.PORT_CLOSED,
    Fault.SILENCE,
    Fault.NO_ROUTE,
    Fault.PROXY,
    Fault.NO_NAME,
    Fault.NOT_TRIED,
)


async def find(target: Address, identity: Identity, say: Callable[[str], None]) -> Findings:
    """Try everything. `say` is told, in words, what is waited for. Raises nothing but what is our own fault."""
    end = trio.current_time() + DEADLINE
    resolution = await resolve(target)
    tls = Way("tls", port=target.tls)
    if not resolution.addresses:
        udp = [Way("udp", port=target.port, fault=Fault.NO_NAME, reason=resolution.problem)]
    else:
        tried = resolution.addresses[:MAX_ADDRESSES]
        udp = [Way("udp", address=address, port=target.port) for address in tried]
    finder = _Finder(target, identity, end, say)
    async with trio.open_nursery() as nursery:
        if resolution.addresses:
            for way in udp:
                nursery.start_soon(finder.try_udp, way)
        if target.tls:  # a proxy may know names that we do not
            nursery.start_soon(finder.try_tls, tls, resolution)
        nursery.start_soon(finder.tell, [*udp, tls])
    memory = await trio.to_thread.run_sync(
        remembered, identity
    )  # now the gateway's hardware address is known
    names = tuple(network_key_id(key) for key in identity.network_keys)
    return Findings(target, resolution, udp, tls, memory, names)


def remembered(identity: Identity) -> Memory:
    """What a client under this identity knows of this network (3). Blocking."""
    file = f"{identity.files[0]}.networks" if identity.files else ""
    key = here()
    return Memory(key, file, Networks(file or None).get(key))


async def resolve(target: Address) -> Resolution:
    """All addresses of its name, each once."""
    began = trio.current_time()
    with trio.move_on_after(RESOLVE_TIMEOUT):
        try:
            found = await trio.socket.getaddrinfo(target.host, target.port, type=socket.SOCK_DGRAM)
        except OSError as exc:
            return Resolution((), trio.current_time() - began, exc.strerror or str(exc))
        hosts = [str(one[4][0]) for one in found if one[0] in (socket.AF_INET, socket.AF_INET6)]
        return Resolution(tuple(dict.fromkeys(hosts)), trio.current_time() - began)
    return Resolution((), RESOLVE_TIMEOUT, f"no name server answered within {RESOLVE_TIMEOUT:g} s")


class _Finder:
    """Tries one way at a time per task; each writes into its `Way`."""

    def __init__(self, target: Address, identity: Identity, end: float, say: Callable[[str], None]) -> None:
        self._target = target
        self._identity = identity
        self._end = end
        self._say = say
        self._measuring = False
        self._contexts = ContextCache(identity, TimeFloor())

    def _ways(self, target: Address) -> Ways:
        keys = self._identity.network_keys
        return Ways(target, self._identity, self._contexts, network_keys=lambda: keys)

    async def tell(self, ways: list[Way]) -> None:
        """What is waited for, to somebody who waits."""
        await trio.sleep(1.0)
        waiting = [way for way in ways if way.fault is Fault.NOT_TRIED and way.port and not way.connected]
        names = " and ".join(dict.fromkeys("UDP" if way.carrier == "udp" else "TLS" for way in waiting))
        if names:
            self._say(f"no answer over {names} yet, waiting up to {ANSWER_TIMEOUT:g} s")

    async def try_udp(self, way: Way) -> None:
        attempt = _Attempt(way)

        async def knock_beside() -> None:
            attempt.refused = await knock(way.address, way.port)
            if attempt.refused is not None:
                await trio.sleep_until(attempt.began + BELIEVED)
                attempt.answered.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(knock_beside)
            await self._try(attempt, self._ways(evolve(self._target, host=way.address)).udp)
            nursery.cancel_scope.cancel()

    async def try_tls(self, way: Way, resolution: Resolution) -> None:
        try:
            proxy = proxy_for(self._target.host, os.environ)
        except ProxyError as exc:
            way.fault, way.reason = Fault.PROXY, _words(exc)
            return
        way.proxy = str(proxy) if proxy is not None else ""
        if proxy is None and not resolution.addresses:
            way.fault, way.reason = Fault.NO_NAME, resolution.problem
            return
        await self._try(_Attempt(way), self._ways(self._target).tls)

    async def _try(self, attempt: _Attempt, dial: Dial) -> None:
        """Dial, wait for an answer, measure."""
        way, began = attempt.way, attempt.began
        dialled: tuple[AnySession, Carrier] | None = None
        with trio.move_on_at(began + ANSWER_TIMEOUT):
            try:
                dialled = await dial(attempt.on_ready)
            except HandshakeRefused as exc:  # it is our own credentials that cannot be used
                way.fault, way.reason = Fault.REFUSED_BY_US, exc.reason
            except OSError as exc:
                way.fault, way.reason = fault_of(exc), _words(exc)
        if dialled is None:
            if way.fault is Fault.NOT_TRIED:
                way.fault = Fault.SILENCE
            return
        session, carrier = dialled
        if way.carrier == "tls":
            way.tcp = trio.current_time() - began
            way.address = way.address or str(session.addr[0])
        async with trio.open_nursery() as nursery:
            nursery.start_soon(carrier.run)
            carrier.wake()
            with trio.move_on_at(began + ANSWER_TIMEOUT):
                await attempt.answered.wait()
            attempt.judge(session, self._target.node)
            if way.works:
                if not self._measuring:
                    self._measuring = True
                    self._say(f"measuring for {SERIES_TIME:g} s")
                await attempt.measure(session, carrier, self._end)
            session.close(ErrorCode.NO_ERROR, "", now=trio.current_time())
            carrier.close()
            nursery.cancel_scope.cancel()


class _Attempt:
    """One session, from its first packet to its last echo."""

    def __init__(self, way: Way) -> None:
        self.way = way
        self.began = trio.current_time()
        self.answered = trio.Event()
        """It stands, or it is over, or there is no sense in waiting on."""
        self.refused: OSError | None = None
        """What the host, or a router, or our kernel says of plain datagrams."""
        self._closed: SessionClosed | None = None
        self._waiting: dict[int, float] = {}
        self._round_trips: list[float] = []
        self._unwilling = 0

    def on_ready(self, session: AnySession) -> None:
        while (event := session.next_event()) is not None:
            match event:
                case Connected():
                    self.way.connected = trio.current_time() - self.began
                    self.answered.set()
                case SessionClosed():
                    self._closed = event
                    self.answered.set()
                case DatagramReceived(data=data):
                    self._on_echo(data, trio.current_time())
                case _:
                    pass

    def judge(self, session: AnySession, node: str) -> None:
        """What the answer, or its absence, means."""
        way, closed = self.way, self._closed
        if closed is None and way.connected:
            way.fault = Fault.NONE
        elif closed is not None and closed.code is not LocalCause.HANDSHAKE_TIMEOUT:
            way.reason = closed.reason.removeprefix("refused by the peer: ") or str(closed.code)
            if closed.by_peer:
                way.fault = Fault.REFUSED_BY_PEER
            elif isinstance(closed.code, LocalCause):
                way.fault = Fault.OTHER
            elif session.peer is not None and session.peer.node != node:
                way.fault, way.found = Fault.WRONG_NODE, session.peer.node
            else:
                way.fault = Fault.REFUSED_BY_US
        elif self.refused is not None:
            way.fault, way.reason = fault_of(self.refused), _words(self.refused)
        else:
            way.fault = Fault.SILENCE

    async def measure(self, session: AnySession, carrier: Carrier, end: float) -> None:
        """Echoes, and on UDP full packets beside them as long as larger ones may pass."""
        way = self.way
        if way.carrier == "udp":
            way.datagram_most = sizes_for(session.addr)[1]
            way.congestion = str(fields(EndpointConfig).congestion.default)
        stop = min(trio.current_time() + SERIES_TIME, end - LAST_REPLIES)
        while session.live and (now := trio.current_time()) < stop:
            head = HEAD.pack(ECHO_REQUEST, way.sent, int(now * 1e6), 0, 0)
            if session.send_datagram(head.ljust(ECHO_SIZE, b"\0")):
                self._waiting[way.sent] = now
                way.sent += 1
            if session.statistics().datagram < way.datagram_most:
                session.send_datagram(bytes([FIRST_APPLICATION_KIND]).ljust(session.max_datagram_size, b"\0"))
            carrier.wake()
            await trio.sleep(SERIES_PAUSE)
        with trio.move_on_at(min(end, trio.current_time() + max(LAST_REPLIES, 4 * session.statistics().rtt))):
            while session.live and self._waiting:  # noqa: ASYNC110 - makes no event
                await trio.sleep(SERIES_PAUSE)
        self._sum_up(session)

    def _on_echo(self, data: bytes, now: float) -> None:
        if len(data) < MIN_SIZE or data[0] != ECHO_REPLY:
            return
        _, number, _, _, unwilling = HEAD.unpack_from(data)
        left_at = self._waiting.pop(number, None)
        if left_at is not None:
            self._round_trips.append(now - left_at)
            self._unwilling = max(self._unwilling, unwilling)

    def _sum_up(self, session: AnySession) -> None:
        way, found, trips = self.way, session.statistics(), sorted(self._round_trips)
        way.datagram = found.datagram
        if trips:
            way.rtt_min, way.rtt_p50 = trips[0], trips[len(trips) // 2]
            way.lost = max(0, len(self._waiting) - self._unwilling)
        else:  # a keeper may be told to echo nothing: acknowledgements then
            way.rtt_min, way.rtt_p50, way.lost = found.rtt_min, found.rtt, found.datagrams_lost
        if self._closed is not None:
            way.fault = Fault.OTHER
            words = self._closed.reason or str(self._closed.code)
            way.reason = f"the session stood, and ended while it was measured: {words}"


async def knock(address: str, port: int) -> OSError | None:
    """Plain datagrams to that port, which a keeper drops in silence.

    What the kernel says of them, or hears of them by ICMP; None: nothing."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with trio.socket.socket(family, socket.SOCK_DGRAM) as sock:
        try:
            sock.setsockopt(*(_IPV6_RECVERR if family == socket.AF_INET6 else _IP_RECVERR), 1)
            await sock.connect((address, port))
            for _ in range(DOOR_KNOCKS):
                await sock.send(b"\0")
                with trio.move_on_after(DOOR_PAUSE):
                    await sock.recv(1)
        except OSError as exc:
            return exc
    return None


def fault_of(exc: OSError) -> Fault:
    """By the number that stands in the error, or in what it was raised from."""
    if isinstance(exc, ProxyError):
        return Fault.PROXY
    return _OF_ERRNO.get(_number(exc), Fault.OTHER)


def _number(exc: BaseException | None) -> int:
    """trio connects to several addresses at once, and says what each said."""
    while exc is not None:
        inner = exc.__cause__
        if isinstance(inner, BaseExceptionGroup):
            inner = inner.exceptions[0]
        if inner is None:
            break
        exc = inner
    return (exc.errno or 0) if isinstance(exc, OSError) else 0


def _words(exc: OSError) -> str:
    if isinstance(exc, ProxyError) or not _number(exc):
        return exc.strerror or str(exc)
    return os.strerror(_number(exc))
