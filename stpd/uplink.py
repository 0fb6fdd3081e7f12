"""The uplink: one custody route upwards over the first upstream that answers, the primary preferred.

(1) There is one hop and one cursor, whichever upstream serves it: what is not in custody is sent again to the next.
(2) Waiting between attempts grows with jitter to RETRY_MAX; one attempt is under way at a time.
(3) A refusal (another name, another CA, expired) is said in words, logged once per change, and tried again slowly.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Final

import structlog
import trio
from attrs import define

from stp.control import Goaway, Status, Subscribe, Subscribed
from stp.core.errors import ErrorCode
from stp.core.verbs import AnySession
from stp.identity import Address
from stp.link import LinkClosed
from stpd.events import EventBus
from stpd.hops import Feed
from stpd.peers import Peer
from stpd.router import LANES
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
    ) -> None:
        """*dial(address, node, token)* starts a session; *on_time_heard* takes the upstream's clock (Unix s)."""
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
        self._closed = trio.Event()
        self._slot_s = 0.0
        self._behind_since_ms = 0
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
            await trio.sleep(delay)

    async def _attempt(self, target: Target) -> bool:
        """One session, from dialling to its end. True when it was refused."""
        self._enter("connecting")
        try:
            address = await self._resolve(target.address)
        except OSError as error:
            self._failed(f"cannot resolve {target.address.host}: {error.strerror or error}")
            return False
        self._closed = trio.Event()
        try:
            session = self._dial(address, target.address.node, target.token)
        except OSError as error:
            self._failed(f"cannot dial {address[0]}:{address[1]}: {error.strerror or error}")
            return False
        target.token = b""
        self.peer = self._sessions.adopt(session, upstream=self)
        self._refused = False
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._report)
                await self._closed.wait()
                nursery.cancel_scope.cancel()
        finally:
            self.feed = None
            target.token = self.peer.link.token
        return self._refused

    async def _resolve(self, target: Address) -> tuple[str, int]:
        with trio.move_on_after(DNS_TIMEOUT):
            found = await trio.socket.getaddrinfo(target.host, target.port, type=trio.socket.SOCK_DGRAM)
            return str(found[0][4][0]), int(found[0][4][1])
        raise OSError(f"no answer from the resolver within {DNS_TIMEOUT:g} s")

    async def _report(self) -> None:
        """Tell the upstream how far behind we are; level and unchanged, there is nothing to tell."""
        told = -1
        while True:
            await trio.sleep(REPORT_INTERVAL)
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
        self.attempts = 0
        self.last_error = ""
        self._reported = ""
        self._enter("connected")
        if hello.time_ms > 0:
            self._on_time_heard(hello.time_ms / 1000)
        log.info("uplink_connected", upstream=hello.node, url=target.url)
        self._events.publish("uplink.connected", f"connected to {hello.node}", node=hello.node)
        self.feed = self._sessions.attach_uplink(peer, HOP, takes=self._takes, on_custody=self._on_custody)
        if target.subscribe:
            peer.link.send(Subscribe(id="down", filters=target.subscribe, name="down", start="earliest"))

    def on_subscribed(self, answer: Subscribed) -> None:
        if not answer.ok:
            self.last_error = f"the upstream refuses what we subscribe to: {answer.error}"
            log.error("uplink_subscribe_refused", reason=answer.error)

    def on_goaway(self, goaway: Goaway) -> None:
        self._slot_s = goaway.slot_ms / 1000
        log.info("uplink_goaway", reason=goaway.reason, slot_ms=goaway.slot_ms)

    def on_closed(self, closed: LinkClosed) -> None:
        was = self.state
        code = closed.code.name if isinstance(closed.code, ErrorCode) else str(closed.code)
        self._refused = closed.code in REFUSALS
        self._failed(f"{code.lower()}: {closed.reason}" if closed.reason else code.lower())
        if was == "connected":
            node = self.targets[self._current].address.node
            self._events.publish("uplink.lost", f"lost {node}: {self.last_error}", node=node)
        if closed.code is ErrorCode.RESTARTING:
            self.attempts = 0
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
        status.custody_messages = sum(one.custody for one in self._store.ledger().hops if one.hop == HOP)
        return status
