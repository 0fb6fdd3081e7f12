"""A seeded network in simulated time for endpoints of stp.core: no socket, no clock, no sleep.

    net = Network(seed=7, delay=0.015, loss=0.3)          # what every direction is like unless `link` says otherwise
    hub = net.listener("hub-1")                           # a Host with a listening Endpoint; accepts everybody
    edge = net.dialler("edge-1")                          # a Host that only dials
    session = edge.connect(hub)                           # stp.core.session.Session; expects the hub's node name
    peer = net.establish(session)                         # runs until both ends are connected: the hub's Session
    lane = session.open_stream()
    session.write(lane, b"...")
    net.run(lambda: hub.received(peer, lane) == b"...", limit=5.0)
    net.run_for(1.0)

Time starts at START and moves from event to event. `run` stops as soon as its condition holds and fails the test when
`limit` simulated seconds pass without.

Link conditions (class Conditions) belong to one direction: `net.link(edge, hub).loss = 0.5`; they may change at any
time. On the way a datagram meets, in this order: `mtu`, `drop` (its number in that direction, from 0), `hook` (a man
in the middle: one datagram in, any number out), `loss` (with `burst`: up to so many in a row, at the same average),
`corrupt` (one bit flipped), `duplicate`, the queue of a `bandwidth`, then `delay` and `jitter` (which reorders).
What arrives at one instant from one source in equal sizes is handed over as one buffer, as UDP GRO does.

A Host reads all streams at once and gives the credit back (`auto_read`, `auto_credit`: switch off to stall), keeps
`events(session)` and `received(session, stream)`, and calls `on_ready` instead if it is set.
`net.rebind(edge, port=…, ip=…)` gives a host another address as the others see it: what was sent to the old one is
lost from then on, as behind a NAT, or with `keep` still arrives. A host that `moves` takes a new port when its
endpoint suspects the path. `net.inject(data, source=…, to=host)` delivers anything from any address.
`net.log` has every datagram that left: (time, source, to, data).

Identities are made once per test session (tests/identity_kit.py). OpenSSL draws its own randomness: handshakes differ
in a few bytes between runs of one seed, everything else does not.
"""

from __future__ import annotations

import functools
import random
from collections import Counter, deque
from collections.abc import Callable
from heapq import heappop, heappush
from typing import Any

from attrs import define, evolve, field
from OpenSSL import SSL

from stp.core.endpoint import Endpoint, EndpointConfig
from stp.core.errors import UsageError
from stp.core.events import Connected, Event, SessionClosed
from stp.core.handshake import TlsCredentials, TlsSettings, make_context
from stp.core.keepalive import KeepaliveLearner
from stp.core.session import Session
from stp.core.states import State
from tests.identity_kit import NETWORK_KEY, Flaw, parts_of, shared

START = 1000.0
MAX_STEPS_AT_ONE_INSTANT = 20_000

Address = tuple[str, int]
Hook = Callable[[bytes, int], list[bytes]]
"""(datagram, its number in that direction) -> what goes on."""


@define
class Conditions:
    """One direction of a link. Times are seconds, sizes bytes, probabilities 0..1."""

    delay: float = 0.01
    jitter: float = 0.0
    """Added to the delay at random, so that datagrams overtake one another."""
    loss: float = 0.0
    burst: int = 1
    """Longest run of losses."""
    corrupt: float = 0.0
    duplicate: float = 0.0
    bandwidth: float = 0.0
    """Bytes a second, 0 for no limit."""
    queue: int = 25
    """Datagrams that wait for the bandwidth; more are dropped."""
    mtu: int = 65_507
    """Largest UDP payload that passes."""
    drop: set[int] = field(factory=set)
    hook: Hook | None = None
    # what the link remembers
    count: int = 0
    lost: int = 0
    _losing: int = 0
    _leaving: deque[float] = field(factory=deque)


@functools.cache
def credentials(node: str, flaw: Flaw = Flaw.NONE) -> TlsCredentials:
    return TlsCredentials(*parts_of(shared().bundle(node, flaw)))


@functools.cache
def context(node: str, flaw: Flaw, server: bool) -> SSL.Context:
    return make_context(TlsSettings(credentials(node, flaw)), server)


class Host:
    """An endpoint with an address on the network."""

    def __init__(self, net: Network, node: str, addr: Address, flaw: Flaw, options: dict[str, Any]) -> None:
        self.net = net
        self.node = node
        self.addr = addr
        rng = random.Random(f"{net.seed} {node} {addr}")
        self.refusals: list[tuple[Any, Any, str]] = []
        config: dict[str, Any] = {
            "tls": functools.partial(context, node, flaw),
            "leaf_der": credentials(node, flaw).chain_der[0],
            "network_keys": (NETWORK_KEY,),
            "random_bytes": rng.randbytes,
            "on_refused": lambda *args: self.refusals.append(args),
        }
        self.endpoint = Endpoint(EndpointConfig(**(config | options)))
        self.seen_as = addr
        """Its address to the others (Network.rebind)."""
        self.moves = False
        self.auto_read = True
        self.auto_credit = True
        self.on_ready: Callable[[Session], None] | None = None
        self.sessions: list[Session] = []
        """Every session that ever had news, oldest first."""
        self._events: dict[Session, list[Event]] = {}
        self._received: dict[Session, dict[int, bytearray]] = {}

    def connect(
        self,
        to: Host,
        *,
        node: str | None = None,
        domain: str | None = None,
        token: bytes = b"",
        keepalive: KeepaliveLearner | None = None,
    ) -> Session:
        """Dial; `node` is whom to expect, by default who it is."""
        session = self.endpoint.connect(
            to.addr,
            expected_node=node or to.node,
            expected_domain=domain,
            now=self.net.now,
            token=token,
            keepalive=keepalive,
        )
        self.sessions.append(session)
        return session

    def events(self, session: Session) -> list[Event]:
        return self._events.get(session, [])

    def received(self, session: Session, stream: int) -> bytes:
        return bytes(self._received.get(session, {}).get(stream, b""))

    def received_length(self, session: Session, stream: int) -> int:
        return len(self._received.get(session, {}).get(stream, b""))

    def connected(self) -> list[Session]:
        return [s for s in self.sessions if any(isinstance(e, Connected) for e in self.events(s))]

    def closed(self, session: Session) -> SessionClosed | None:
        return next((e for e in self.events(session) if isinstance(e, SessionClosed)), None)

    def serve(self, session: Session) -> None:
        """What a reader does that is never busy."""
        if session not in self.sessions:
            self.sessions.append(session)
        if self.on_ready is not None:
            self.on_ready(session)
            return
        while (event := session.next_event()) is not None:
            self._events.setdefault(session, []).append(event)
        if self.auto_read:
            self.read_all(session)

    def look_at_paths(self) -> None:
        """What a driver does that can take a new socket."""
        for session in self.endpoint.take_suspects() if self.moves else ():
            self.net.rebind(self)
            session.migrate(same_host=True, now=self.net.now)

    def read_all(self, session: Session) -> None:
        for stream in list(session._streams.recv):
            data = session.read(stream)
            if not data:
                continue
            got = self._received.setdefault(session, {}).setdefault(stream, bytearray())
            got += data
            if stream and self.auto_credit:
                session.advance_credit(stream, len(got))


class Network:
    """Hosts, links and the time."""

    def __init__(self, seed: int = 0, **conditions: Any) -> None:
        self.seed = seed
        self.rng = random.Random(seed)
        self.now = START
        self.hosts: dict[Address, Host] = {}
        self._outside: dict[Address, Host] = {}
        self._ports = 20_000
        self.log: list[tuple[float, Address, Address, bytes]] = []
        self.keep_log = True
        self.delivered: Counter[Address] = Counter()
        self._default = Conditions(**conditions)
        self._links: dict[tuple[Address, Address], Conditions] = {}
        self._queue: list[tuple[float, int, Address, Address, bytes]] = []
        self._order = 0

    # -- building

    def host(self, node: str, *, addr: Address | None = None, flaw: Flaw = Flaw.NONE, **options: Any) -> Host:
        """`options` are fields of EndpointConfig."""
        addr = addr or (f"192.0.2.{len(self.hosts) + 1}", 9000)
        if addr in self.hosts:
            raise UsageError(f"two hosts at {addr}")
        self.hosts[addr] = Host(self, node, addr, flaw, options)
        return self.hosts[addr]

    def listener(self, node: str = "hub-1", **options: Any) -> Host:
        return self.host(node, accept=True, **options)

    def dialler(self, node: str = "edge-1", **options: Any) -> Host:
        return self.host(node, **options)

    def link(self, source: Host | Address, to: Host | Address) -> Conditions:
        """The conditions of one direction; change them at will."""
        key = (_address(source), _address(to))
        if key not in self._links:
            self._links[key] = evolve(self._default, drop=set(self._default.drop), leaving=deque())
        return self._links[key]

    def both(self, a: Host, b: Host) -> tuple[Conditions, Conditions]:
        return self.link(a, b), self.link(b, a)

    def rebind(
        self, host: Host, *, port: int | None = None, ip: str | None = None, keep: bool = False
    ) -> Address:
        """`host` is seen at another address from now on, by default at another port. Returns it."""
        if keep:
            self._outside[host.seen_as] = host
        else:
            self._outside = {seen: one for seen, one in self._outside.items() if one is not host}
        self._ports += 1
        host.seen_as = (ip or host.seen_as[0], port or self._ports)
        self._outside[host.seen_as] = host
        return host.seen_as

    def at(self, addr: Address) -> Host | None:
        """Who gets what is sent to this address."""
        host = self.hosts.get(addr)
        if host is not None and host.seen_as == addr:
            return host
        return self._outside.get(addr)

    def share(self, to: Host, *sources: Host) -> Conditions:
        """One link and one queue for all of `sources` on their way to `to`."""
        link = self.link(sources[0], to)
        for source in sources[1:]:
            self._links[source.addr, to.addr] = link
        return link

    # -- running

    def run(self, until: Callable[[], bool], *, limit: float = 30.0) -> float:
        """Run until the condition holds; the simulated seconds that took. Fails after `limit` of them."""
        start = self.now
        if not self._run(until, start + limit):
            raise AssertionError(f"not within {limit} simulated seconds; {self.describe()}")
        return self.now - start

    def run_for(self, seconds: float) -> None:
        end = self.now + seconds
        self._run(lambda: False, end)
        self.now = end

    def establish(self, session: Session, *, limit: float = 30.0) -> Session:
        """Run until both ends are connected; the other end's session."""

        def other() -> Session | None:
            hub = self.hosts.get(session.addr)
            found = [s for s in hub.connected() if s.id == session.id] if hub is not None else []
            return found[0] if found else None

        self.run(lambda: session.state is State.ESTABLISHED and other() is not None, limit=limit)
        found = other()
        assert found is not None
        return found

    def inject(self, data: bytes, *, source: Host | Address, to: Host) -> None:
        """Deliver this now, from wherever."""
        to.endpoint.receive(data, _address(source), self.now)
        self.flush()

    def forge(self, data: bytes, *, source: Address, to: Host, after: float) -> None:
        """Deliver this after so many seconds, from wherever."""
        self._order += 1
        heappush(self._queue, (self.now + after, self._order, source, to.seen_as, data))

    def describe(self) -> str:
        states = [f"{h.node}: {[s.state.name for s in h.sessions]}" for h in self.hosts.values()]
        return "; ".join(states)

    def flush(self) -> None:
        """Let every host see its news and send what it may send now."""
        for host in self.hosts.values():
            for session in host.endpoint.take_ready():
                host.serve(session)
            host.look_at_paths()
            for sent in host.endpoint.datagrams_to_send(self.now):
                size = sent.segment_size or len(sent.data)
                for start in range(0, len(sent.data), size):
                    self._send(host.addr, sent.addr, sent.data[start : start + size])

    def _run(self, until: Callable[[], bool], end: float) -> bool:
        steps = 0
        instant = self.now
        while True:
            self.flush()
            if until():
                return True
            due = [t for h in self.hosts.values() if (t := h.endpoint.next_timeout()) is not None]
            if self._queue:
                due.append(self._queue[0][0])
            if not due or min(due) > end:
                return False
            self.now = max(self.now, min(due))
            steps = steps + 1 if self.now == instant else 0
            instant = self.now
            assert steps < MAX_STEPS_AT_ONE_INSTANT, "time stands still"
            self._deliver()
            for host in self.hosts.values():
                at = host.endpoint.next_timeout()
                if at is not None and at <= self.now:
                    host.endpoint.handle_timeout(self.now)

    # -- the wire

    def _send(self, source: Address, to: Address, data: bytes) -> None:
        host, target = self.hosts.get(source), self.at(to)
        link = self.link(source, to if target is None else target)
        source = source if host is None else host.seen_as
        number, link.count = link.count, link.count + 1
        if self.keep_log:
            self.log.append((self.now, source, to, data))
        if len(data) > link.mtu or number in link.drop:
            link.lost += 1
            return
        for datagram in link.hook(data, number) if link.hook is not None else [data]:
            self._transfer(link, source, to, datagram)

    def _transfer(self, link: Conditions, source: Address, to: Address, data: bytes) -> None:
        rng = self.rng
        if link._losing:
            link._losing -= 1
            link.lost += 1
            return
        if link.loss and rng.random() < _start_of_loss(link):
            link._losing = rng.randint(1, link.burst) - 1
            link.lost += 1
            return
        if link.corrupt and rng.random() < link.corrupt:
            data = flip_bit(data, rng.randrange(8 * len(data)))
        for _ in range(2 if link.duplicate and rng.random() < link.duplicate else 1):
            leaves = self.now
            if link.bandwidth:
                waiting = link._leaving
                while waiting and waiting[0] <= self.now:
                    waiting.popleft()
                if len(waiting) > link.queue:  # one of them is on the wire
                    link.lost += 1
                    continue
                leaves = (waiting[-1] if waiting else self.now) + len(data) / link.bandwidth
                waiting.append(leaves)
            arrives = leaves + link.delay + (rng.random() * link.jitter if link.jitter else 0.0)
            self._order += 1
            heappush(self._queue, (arrives, self._order, source, to, data))

    def _deliver(self) -> None:
        """Everything that is due, joined as GRO joins."""
        joined: list[bytes] = []
        route: tuple[Address, Address] | None = None
        while self._queue and self._queue[0][0] <= self.now:
            _, _, source, to, data = heappop(self._queue)
            full = route == (source, to) and len(joined[-1]) == len(joined[0]) >= len(data)
            if not full or sum(map(len, joined)) + len(data) > 65_000:
                self._hand_over(route, joined)
                joined, route = [], (source, to)
            joined.append(data)
        self._hand_over(route, joined)

    def _hand_over(self, route: tuple[Address, Address] | None, joined: list[bytes]) -> None:
        if route is None:
            return
        source, to = route
        host = self.at(to)
        if host is None:
            return
        self.delivered[host.addr] += len(joined)
        size = len(joined[0]) if len(joined) > 1 else 0
        host.endpoint.receive(b"".join(joined), source, self.now, size)


def _start_of_loss(link: Conditions) -> float:
    """The probability that a run of losses starts here, so that `loss` is the share of datagrams lost."""
    mean = (1 + link.burst) / 2
    return link.loss / (mean - link.loss * (mean - 1))


def _address(host: Host | Address) -> Address:
    return host.addr if isinstance(host, Host) else host


def flip_bit(data: bytes, bit: int) -> bytes:
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)
