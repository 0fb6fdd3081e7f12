"""The uplink: one custody route upwards over the first upstream that answers, the primary preferred.

(1) There is one hop and one cursor, whichever upstream serves it: what is not in custody is sent again to the next.
(2) Waiting between attempts grows with jitter to RETRY_MAX; one attempt is under way at a time.
(3) A refusal (another name, another CA, expired) is said in words, logged once per change, and tried again slowly.
(4) A session is broken only after the next one carries (R-9-4): by age, when our certificate was renewed, and
    whenever somebody asks for it. That is no outage, and told as none.
(5) Where UDP does not answer, TLS is dialled as its rival: the first HELLO wins, and the other is closed. Only when
    both failed is the next upstream's turn. Later, too, a session goes where it gets through (stpd/fallback.py).
"""

from __future__ import annotations

import errno
import math
import random
from collections.abc import Callable, Sequence
from functools import partial
from typing import Final

import structlog
import trio
from attrs import Factory, define

from stp.control import Goaway, Hello, Status, Subscribe, Subscribed
from stp.core.errors import ErrorCode
from stp.core.verbs import AnySession
from stp.identity import Address, Identity, Upstream, parse_url
from stp.kept_tokens import KeptTokens
from stp.lifetimes import REHANDSHAKE, renew_in
from stp.link import Link, LinkClosed
from stp.racing import TLS, UDP, tls_after
from stpd.events import EventBus
from stpd.fallback import Dial, Fallback, OtherWay
from stpd.hops import Feed
from stpd.peers import Peer
from stpd.router import LANES
from stpd.schema import UpstreamConfig
from stpd.sessions import Sessions
from stpd.status import LaneLag, UpstreamStatus
from stpd.store.base import Hop, Store

log = structlog.get_logger("stpd.uplink")

HOP: Final = "uplink"
"""The custody route's name in the store (R-10-41)."""

RETRY_FIRST: Final = 0.1
RETRY_MAX: Final = 5.0
"""Seconds between two attempts: the first wait and the longest, each times 0.5 to 1.5."""

RETRY_REFUSED: Final = 15.0
"""Seconds after a refusal: only a person, or a clock, can change it."""

DNS_TIMEOUT: Final = 5.0
"""Seconds a name may take to resolve."""

REPORT_INTERVAL: Final = 5.0
"""Seconds between two STATUS records that tell the upstream our backlog."""

STEADY: Final = 5.0
"""Seconds a session must have lasted for the wait to start small again."""

YOUNG: Final = 10.0
KNOWN_TIMEOUT: Final = 1.0
"""Seconds: a session younger than the first waits, up to the second, for its HELLO to arrive before it is left."""

POLL: Final = 0.005
"""Seconds between looks at what makes no event."""

RENEWAL_RETRY: Final = 60.0
"""Seconds until the next attempt when a fresh session could not be had; half to whole of it."""

REFUSALS: Final = frozenset({ErrorCode.AUTH, ErrorCode.EXPIRED, ErrorCode.REVOKED})


@define
class Target:
    """One configured upstream, in order of preference."""

    address: Address
    url: str
    classes: frozenset[str]
    """Class names that go there; empty: all."""
    subscribe: tuple[str, ...]
    token: bytes = b""
    """Its last NEW_TOKEN: good for one handshake, in which we count as ourselves and not as our address."""


def targets_of(upstreams: Sequence[UpstreamConfig], identity: Identity, tokens: KeptTokens) -> list[Target]:
    """What a configuration names or, where it names nothing, enrolment did. Raises IdentityError."""
    enrolled = identity.upstream
    if not upstreams and enrolled is not None:
        upstreams = (UpstreamConfig(url=enrolled.url, node=enrolled.node),)
    found = []
    for one in upstreams:
        address = parse_url(one.url, Upstream(one.node, one.url) if one.node else enrolled)
        if one.node:
            address.node = one.node
        subscribe = tuple(filter_.replace("{node}", identity.node) for filter_ in one.subscribe)
        found.append(Target(address, one.url, frozenset(one.classes), subscribe, tokens.take(one.url)))
    return found


@define
class Race:
    """One attempt over UDP and, where that does not answer, TLS (5)."""

    open: set[str] = Factory(lambda: {UDP})
    """Carriers over which it may succeed yet."""
    whys: list[str] = Factory(list)
    """Why the others failed."""
    answered: trio.Event = Factory(trio.Event)
    """The first HELLO has come."""
    rival: Peer | None = None
    """Over TLS, while the session over UDP has not answered."""


class Uplink:
    """Dials, attaches the custody feed, subscribes to what comes down, and dials again. Run it in the nursery."""

    def __init__(
        self,
        targets: Sequence[Target],
        sessions: Sessions,
        store: Store,
        *,
        dial: Callable[[tuple[str, int], str, bytes], AnySession],
        class_of: Callable[[int, str], str],
        on_custody: Callable[[int, int], None],
        on_time_heard: Callable[[float], None],
        events: EventBus,
        wall_ms: Callable[[], int],
        jitter: Callable[[], float] = random.random,
        rehandshake: Callable[[], float] = lambda: REHANDSHAKE,
        left: Callable[[Link], float | None] = lambda link: None,
        on_revoked: Callable[[dict[int, int]], object] = lambda serials: None,
        keep_token: Callable[[Target], object] = lambda target: None,
        fallback: Fallback | None = None,
    ) -> None:
        """*dial(address, node, token)* starts a session; *on_time_heard* takes the upstream's clock (Unix s);
        *rehandshake()* says after how many seconds a session is replaced by a fresh one, ± 10 %; *left(link)* how
        many seconds its peer's certificate has left; *keep_token(target)* keeps a new one across restarts.
        *fallback*: None where there is no way but *dial*, which is UDP.
        """
        self.targets = list(targets)
        self.stopping = False
        self.state = "waiting"
        self.since_ms = wall_ms()
        self.attempts = 0
        self.last_error = ""
        self.next_attempt_ms = 0
        self.peer: Peer | None = None
        self.feed: Feed | None = None
        self._current = 0
        self._sessions = sessions
        self._store = store
        self._dial = dial
        self._class_of = class_of
        self._on_custody = on_custody
        self._on_time_heard = on_time_heard
        self._events = events
        self._wall_ms = wall_ms
        self._jitter = jitter
        self._rehandshake = rehandshake
        self._left = left
        self._on_revoked = on_revoked
        self._token_kept = keep_token
        self._fallback, self._race = fallback, Race()
        self._address: tuple[str, int] | None = None
        self._beside: Peer | None = None
        """Dialled while `peer` is up; takes over when its HELLO has come."""
        self._beside_ready, self._beside_lock = trio.Event(), trio.Lock()
        self._up_at = self._renew_at = math.inf
        self._news, self._again = trio.Event(), trio.Event()
        self._closed = trio.Event()
        self._slot_s = 0.0
        self._reported = ""
        self._refused = False
        store.add_hop(Hop(name=HOP, kind="uplink", created_ms=wall_ms()))

    def stop(self) -> None:
        """Dial no more; the present session stays until somebody closes it."""
        self.stopping = True

    def takes_class(self, name: str) -> bool:
        """Does the current upstream take this class? Then custody is its word, not ours."""
        classes = self.targets[self._current].classes
        return not classes or name in classes

    def _takes(self, lane: int, prefix: str) -> bool:
        return self.takes_class(self._class_of(lane, prefix))

    # -- the loop

    async def run(self) -> None:
        """Dial again and again. Returns after `stop`, when the session under way has ended."""
        while not self.stopping:
            started = trio.current_time()
            refused = await self._attempt(self.targets[self._current])
            if trio.current_time() - started > STEADY and self.attempts == 0:
                delay = RETRY_FIRST
            else:
                self.attempts += 1
                delay = min(RETRY_MAX, RETRY_FIRST * 2 ** min(self.attempts, 16))
            if refused:
                delay = RETRY_REFUSED
            delay = max(delay * (0.5 + self._jitter()), self._slot_s)
            self._slot_s = 0.0
            self._current = (self._current + 1) % len(self.targets) if self.attempts else 0
            self._enter("refused" if refused else "waiting")
            self.next_attempt_ms = self._wall_ms() + round(delay * 1000)
            self._again = trio.Event()
            with trio.move_on_after(delay):
                await self._again.wait()

    async def _attempt(self, target: Target) -> bool:
        """One session, from dialling to its end. True when it was refused."""
        self._enter("connecting")
        self._closed, self._race = trio.Event(), Race()
        self._address, self._refused, self._renew_at = None, False, math.inf
        no_udp = await self._dial_first(target)
        raced = self._fallback is not None and target.address.tls > 0
        if no_udp and not raced:
            self._failed(no_udp)
            return False
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._report)
                nursery.start_soon(self._keep_fresh)
                if self._fallback is not None and raced:
                    nursery.start_soon(self._dial_rival, target.address, self._fallback.way, no_udp)
                    nursery.start_soon(self._fallback.watch, self, target.address)
                await self._closed.wait()
                nursery.cancel_scope.cancel()
        finally:
            self.feed = None
            self._keep_token(target)
        return self._refused

    async def _dial_first(self, target: Target) -> str:
        """Over UDP. Why there is no session to wait for, or ""."""
        try:
            session = await self._dial_udp(target)
        except OSError as error:
            self._keep_token(target)
            self.peer = None
            return str(error)
        self.peer = self._sessions.adopt(session, upstream=self)
        return ""

    async def _dial_udp(self, target: Target) -> AnySession:
        """Raises OSError, in words."""
        try:
            address = await self.address_of(target.address)
        except OSError as error:
            why = f"cannot resolve {target.address.host}: {error.strerror or error}"
            raise OSError(error.errno, why) from error
        try:
            return self._dial(address, target.address.node, self._take_token(target))
        except OSError as error:
            why = f"cannot dial {address[0]}:{address[1]}: {error.strerror or error}"
            raise OSError(error.errno, why) from error

    async def _dial_rival(self, address: Address, way: OtherWay, no_udp: str) -> None:
        """TLS as a rival of UDP, when that has had its time (5)."""
        if not no_udp:
            with trio.move_on_after(tls_after(way.remembered())):
                await self._race.answered.wait()
        if self._race.answered.is_set():
            return
        self._race.open.add(TLS)
        if no_udp:
            self._no_way(UDP, no_udp)
        try:
            session = await way.tls(address)
        except OSError as error:
            self._no_way(TLS, error.strerror or str(error))
            return
        rival = self._sessions.adopt(session, upstream=self)
        if self._race.answered.is_set():
            rival.link.close(ErrorCode.NO_ERROR, "", trio.current_time())
        else:
            self._race.rival = rival

    def _no_way(self, carrier: str, why: str) -> None:
        """One carrier of the attempt under way has failed; with the last, the attempt."""
        self._race.open.discard(carrier)
        self._race.whys.append(f"over TLS: {why}" if carrier == TLS else why)
        if not self._race.open and not self._race.answered.is_set():
            self._failed("; ".join(self._race.whys))
            self._closed.set()

    def _take_token(self, target: Target) -> bytes:
        """The newest token that the target gave us; it is used up."""
        self._keep_token(target)
        token, target.token = target.token, b""
        return token

    def _keep_token(self, target: Target) -> None:
        if self.peer is not None and self.peer.link.token:
            target.token, self.peer.link.token = self.peer.link.token, b""
            self._token_kept(target)

    # -- a second session beside the present one

    async def dial_beside(self, dial: Dial | None = None, *, carrier: str = "") -> bool:
        """Dial a second session beside the present one, and move over to it when its HELLO has come (4).

        *dial* starts it; by default it goes over *carrier*, and that is by default the present session's. Both
        directions go on over the new session lane by lane, when what was sent on the old one is settled; the old one
        then closes.

        True: moved. False: there was nothing to move from, or the attempt failed; the present session stands as it
        was. A caller that is cancelled gives the attempt up. Raises OSError when it could not begin.
        """
        async with self._beside_lock:
            await self._until_known()
            if not self.may_move() or self.peer is None:
                return False
            if dial is None:
                dial = self._dial_over(carrier or self.peer.session.carrier, self.targets[self._current])
            session = await dial()
            beside = self._sessions.adopt(session, upstream=self, continues=self.peer)
            if not self.may_move():
                beside.link.close(ErrorCode.NO_ERROR, "", trio.current_time())
                return False
            self._beside = beside
            ready = self._beside_ready = trio.Event()
            try:
                await ready.wait()
            finally:
                if self._beside is beside:
                    self._beside = None
                    beside.link.close(ErrorCode.NO_ERROR, "", trio.current_time())
            return self.peer is beside

    def _dial_over(self, carrier: str, target: Target) -> Dial:
        if carrier == TLS and self._fallback is not None:
            return partial(self._fallback.way.tls, target.address)
        return partial(self._dial_udp, target)

    async def _until_known(self) -> None:
        """A session that is to be continued must be known to the upstream: our HELLO may be under way yet."""
        peer = self.peer
        if peer is not None and trio.current_time() - self._up_at < YOUNG:
            with trio.move_on_after(KNOWN_TIMEOUT):
                while peer.link.closed is None and peer.link.unacknowledged_control:  # noqa: ASYNC110
                    await trio.sleep(POLL)

    def may_move(self) -> bool:
        """Is there a session that another may take over from?"""
        return self.state == "connected" and self.peer is not None and not self.stopping

    def renewed(self) -> None:
        """Our certificate was renewed: a fresh session shall show it, and what was refused may be let in now."""
        self._renew(trio.current_time())
        self._again.set()

    def _renew(self, at: float) -> None:
        self._renew_at = at
        self._news.set()

    async def _keep_fresh(self) -> None:
        """(4), from one session to the next; cancelled when there is none any more."""
        while True:
            self._news = trio.Event()
            with trio.move_on_at(self._renew_at):
                await self._news.wait()
            if trio.current_time() < self._renew_at:
                continue
            self._renew_at = math.inf
            try:
                fresh = await self.dial_beside()
            except OSError as error:
                log.warning("uplink_not_renewed", reason=error.strerror or str(error))
                fresh = False
            if not fresh:
                self._renew_at = trio.current_time() + RENEWAL_RETRY * (0.5 + self._jitter() / 2)

    def _set_age(self, peer: Peer) -> None:
        self._up_at = trio.current_time()
        wait = renew_in(self._rehandshake(), self._left(peer.link), self._jitter())
        self._renew(trio.current_time() + wait)

    async def address_of(self, target: Address) -> tuple[str, int]:
        """The same one during an attempt and the sessions that come of it. Raises OSError."""
        if self._address is None:
            with trio.move_on_after(DNS_TIMEOUT):
                try:
                    found = await trio.socket.getaddrinfo(
                        target.host, target.port, type=trio.socket.SOCK_DGRAM
                    )
                except UnicodeError as error:  # a label of over 63 characters, for one
                    raise OSError(errno.EINVAL, f"it is no host name: {error}") from error
                self._address = str(found[0][4][0]), int(found[0][4][1])
        if self._address is None:
            raise OSError(f"no answer from the resolver within {DNS_TIMEOUT:g} s")
        return self._address

    async def _report(self) -> None:
        """Tell the upstream how far behind we are; level and unchanged, there is nothing to tell."""
        told = -1
        while True:
            await trio.sleep(REPORT_INTERVAL)
            self._keep_token(self.targets[self._current])
            peer = self.peer
            if peer is None or peer.link.peer is None or peer.link.closed is not None:
                continue
            lanes = [self._store.behind(HOP, lane) for lane in LANES]
            messages = sum(one.messages for one in lanes)
            if messages == told == 0:
                continue
            told = messages
            peer.link.send(
                Status(
                    {
                        "messages": messages,
                        "bytes": sum(one.bytes for one in lanes),
                        "oldest_age_s": round(max(one.oldest_age for one in lanes), 1),
                        "cause": "full store" if self._store.full else "",
                        "unexplained": self._store.ledger().unexplained,
                    }
                )
            )

    # -- what the session says

    def on_hello(self, peer: Peer) -> None:
        """The upstream is there and is who it should be: send what waits, ask for what is ours."""
        target = self.targets[self._current]
        hello = peer.link.peer
        assert hello is not None
        if peer is self._beside:
            self._move(peer, target, hello)
            return
        if peer is not self.peer and peer is not self._race.rival:
            return  # it has lost, and is closed already
        self._win(peer)
        self.attempts = 0
        self.last_error = ""
        self._reported = ""
        self._enter("connected")
        self._set_age(peer)
        if hello.time_ms > 0:
            self._on_time_heard(hello.time_ms / 1000)
        carrier = peer.session.carrier
        log.info("uplink_connected", upstream=hello.node, url=target.url, carrier=carrier)
        over = " over TLS: UDP does not get through" if carrier == TLS else ""
        self._events.publish("uplink.connected", f"connected to {hello.node}{over}", node=hello.node)
        self.feed = self._sessions.attach_uplink(peer, HOP, takes=self._takes, on_custody=self._on_custody)
        self._subscribe(peer, target)

    def _win(self, peer: Peer) -> None:
        """The first HELLO of an attempt has come: no rival is needed any more (5)."""
        loser = self._race.rival if peer is self.peer else self.peer
        self.peer, self._race.rival = peer, None
        self._race.answered.set()
        if loser is not None and loser.link.closed is None:
            loser.link.close(ErrorCode.NO_ERROR, "", trio.current_time())
        self._carried(peer)

    def _carried(self, peer: Peer) -> None:
        if self._fallback is not None:
            self._fallback.way.worked(peer.session.carrier)

    def _tell_carrier(self, older: Peer, peer: Peer, node: str) -> None:
        was, now = older.session.carrier, peer.session.carrier
        if was != now:
            log.info("uplink_moved", upstream=node, carrier=now, was=was)
            self._events.publish("uplink.moved", f"{node} is reached over {now} now, not {was}", node=node)

    def _move(self, peer: Peer, target: Target, hello: Hello) -> None:
        """The session beside the present one is up: it continues it, or replaces it if the upstream has changed."""
        older, self.peer, self._beside = self.peer, peer, None
        self._set_age(peer)
        self._carried(peer)
        if older is not None:
            self._tell_carrier(older, peer, hello.node)
        if hello.time_ms > 0:
            self._on_time_heard(hello.time_ms / 1000)
        if peer.older is None:
            if older is not None:
                older.link.close(ErrorCode.NO_ERROR, "moved", trio.current_time())
            self.feed = self._sessions.attach_uplink(
                peer, HOP, takes=self._takes, on_custody=self._on_custody
            )
        self._subscribe(peer, target)
        self._beside_ready.set()

    def _subscribe(self, peer: Peer, target: Target) -> None:
        if target.subscribe:
            peer.link.send(Subscribe(id="down", filters=target.subscribe, name="down", start="earliest"))

    def on_subscribed(self, answer: Subscribed) -> None:
        if not answer.ok:
            self.last_error = f"the upstream refuses what we subscribe to: {answer.error}"
            log.error("uplink_subscribe_refused", reason=answer.error)

    def on_goaway(self, peer: Peer, goaway: Goaway) -> None:
        if peer is not self.peer:
            return
        self._slot_s = goaway.slot_ms / 1000
        log.info("uplink_goaway", reason=goaway.reason, slot_ms=goaway.slot_ms)

    def on_revoked(self, serials: dict[int, int]) -> None:
        """Serial -> Unix seconds: what may not come in here either."""
        self._on_revoked(serials)

    def on_closed(self, peer: Peer, closed: LinkClosed) -> None:
        was = self.state
        code = closed.code.name if isinstance(closed.code, ErrorCode) else str(closed.code)
        if peer is self._beside:
            self._beside = None
            self._beside_ready.set()
            log.warning("uplink_not_renewed", reason=f"{code.lower()} {closed.reason}".strip())
            return
        why = f"{code.lower()}: {closed.reason}" if closed.reason else code.lower()
        if not self._race.answered.is_set() and peer in (self.peer, self._race.rival):
            self._refused = self._refused or closed.code in REFUSALS
            self._no_way(UDP if peer is self.peer else TLS, why)
        if closed.code is ErrorCode.RESTARTING and peer is self.peer:
            self.attempts = 0
        if peer is not self.peer or not self._race.answered.is_set():
            return  # a rival, or one that has settled
        self._refused = closed.code in REFUSALS
        self._failed(why)
        if was == "connected":
            node = self.targets[self._current].address.node
            self._events.publish("uplink.lost", f"lost {node}: {self.last_error}", node=node)
        self._closed.set()

    def _failed(self, why: str) -> None:
        self.last_error = why
        if why != self._reported:  # promise (3): one line per change, not per attempt
            self._reported = why
            log.warning("uplink_down", url=self.targets[self._current].url, reason=why)

    def _enter(self, state: str) -> None:
        if state != self.state:
            self.state, self.since_ms = state, self._wall_ms()

    # -- for people

    def statuses(self) -> list[UpstreamStatus]:
        """One per configured upstream; the current one carries the backlog."""
        return [self._status(index, target) for index, target in enumerate(self.targets)]

    def _status(self, index: int, target: Target) -> UpstreamStatus:
        status = UpstreamStatus(node=target.address.node, url=target.url, state="standby")
        if index != self._current:
            return status
        lanes = []
        for lane in LANES:
            behind = self._store.behind(HOP, lane)
            lanes.append(
                LaneLag(
                    lane=lane,
                    messages=behind.messages,
                    bytes=behind.bytes,
                    oldest_age_s=round(behind.oldest_age, 1),
                )
            )
        status.state, status.since_ms = self.state, self.since_ms
        status.attempts, status.last_error = self.attempts, self.last_error
        status.next_attempt_ms = self.next_attempt_ms if self.state in ("waiting", "refused") else 0
        status.lanes = lanes
        status.behind_messages = sum(one.messages for one in lanes)
        status.behind_bytes = sum(one.bytes for one in lanes)
        status.oldest_age_s = max(one.oldest_age_s for one in lanes)
        if status.behind_messages:
            status.behind_since_ms = self._wall_ms() - round(status.oldest_age_s * 1000)
        if self.peer is not None and self.state == "connected":
            found = self.peer.session.statistics()
            status.rtt_ms = round(found.rtt * 1000, 3)
            address = self.peer.session.addr
            status.address = f"{address[0]}:{address[1]}"
            status.carrier = self.peer.session.carrier
        status.custody_messages = sum(one.custody for one in self._store.ledger().hops if one.hop == HOP)
        return status
