"""A session to one keeper, kept up: resolve, dial, watch, dial again (protocol §8, §9).

(1) `up` means: handshake confirmed by the peer, and its HELLO here. Before that nothing is reported.
(2) Attempts are spaced by a jittered backoff, BACKOFF_FLOOR to BACKOFF_CEILING; at once, one time, after RESTARTING;
    in the slot that the peer names after GOING_AWAY.
(3) Each attempt has a socket of its own: a new source port outlives a confused NAT.
(4) A first attempt that the peer refuses by certificate is final: Rejected. Later ones are tried on, and told.
(5) Make before break (R-9-4): a session dialled beside the present one takes over when its HELLO has come. The old
    one carries until both sides have settled what they sent on it: nothing is lost, sent twice or overtaken.
(6) UDP first; TLS beside it where nothing answers, and back to UDP when that has stood the test (R-11-4, racing.py).
    Of two that race, only the one that is confirmed first says HELLO: no keeper takes the other for its successor.
(7) A refusal is never hidden by the other carrier: one over UDP ends the attempt; one over TLS does when UDP, in its
    TLS_AFTER seconds, has said nothing.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Final

import trio
from attrs import evolve

from stp.carriers.udp import UdpCarrier
from stp.control import Goaway, Hello
from stp.core.errors import ErrorCode
from stp.core.states import State
from stp.core.verbs import AnySession
from stp.lifetimes import REHANDSHAKE, Expiry, renew_in
from stp.lines import REFUSALS, ConnectionStatistics, Line, Owner, Rejected, Unreachable, words
from stp.link import GoawayReceived, HelloReceived, Link, LinkClosed, LinkEvent, MovedReceived
from stp.racing import SILENCE, TLS, TLS_AFTER, UDP, ProbeBack, tls_after
from stp.ways import Carrier, Dial, Ways, answers

log: Final = logging.getLogger("stp.client")

BACKOFF_FLOOR: Final = 0.05
BACKOFF_CEILING: Final = 5.0
"""Seconds between attempts, before jitter (half to whole of it)."""
MAX_SLOT: Final = 60.0
"""Seconds: the longest reconnect slot of a peer that we heed."""
CHECK_INTERVAL: Final = 1.0
"""Seconds between looks at the link's deadlines."""
CLOSE_TIMEOUT: Final = 1.0
"""Seconds that a closing session waits for its last receipts to arrive."""
CLOSE_POLL: Final = 0.005

RENEWAL_CHECK: Final = 10.0
"""Seconds between looks at the session's age and at the identity's files."""
PROBE_CHECK: Final = 5.0
"""Seconds between looks whether the session is on TLS, and UDP to be probed."""
RENEWAL_RETRY: Final = 60.0
"""Seconds until the next attempt when a fresh session could not be had."""
YOUNG: Final = 10.0
KNOWN_TIMEOUT: Final = 1.0
"""Seconds: a session younger than the first waits, up to the second, for its HELLO to arrive before it is left."""
SETTLE_TIMEOUT: Final = 600.0
"""Seconds that a session may take to settle beside its successor: the application may take records slowly."""


class Connection:
    """One session at a time to one address, and for a moment the one before beside it (5)."""

    def __init__(
        self,
        ways: Ways,
        hello: Hello,
        owner: Owner,
        *,
        prepare: Callable[[], Awaitable[None]],
        rehandshake: float = REHANDSHAKE,
        expiry: Expiry | None = None,
    ) -> None:
        self.target = target = ways.target
        self.where = target.where
        self.ways = ways
        self.dial_udp: Callable[..., Awaitable[tuple[AnySession, Carrier]]] = ways.udp
        self.dial_tls: Dial | None = ways.tls if target.tls and not target.path else None
        """None: there is no other way than UDP, or than the Unix socket."""
        self.link: Link | None = None
        """The link while it is up."""
        self.cause = ""
        """Why the last attempt or session ended, in words."""
        self.stats = ConnectionStatistics()
        self._hello = hello
        self._owner = owner
        self._prepare = prepare
        self._rehandshake = rehandshake
        self._expiry = expiry or Expiry()
        self._line: Line | None = None
        """What is up, or is to be."""
        self._rival: Line | None = None
        """Over TLS, while `_line` has not answered over UDP: the first HELLO wins (6)."""
        self._beside: Line | None = None
        """Dialled while `_line` is up; takes over when its HELLO has come."""
        self._refused: LinkClosed | None = None
        """Over TLS, in the present attempt (7)."""
        self._older: list[Line] = []
        self._beside_lock = trio.Lock()
        self._nursery: trio.Nursery | None = None
        self._slot: float | None = None
        self._first = trio.Event()
        self.rejected: Rejected | None = None
        self._closing = False

    async def run(self) -> None:
        """Keep the session up until cancelled, or until a first attempt was rejected."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            nursery.start_soon(self._keep_fresh)
            nursery.start_soon(self._probe_back)
            await self._keep_up()
            nursery.cancel_scope.cancel()

    async def _keep_up(self) -> None:
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
        """Something was queued on a link."""
        if self._line is not None:
            self._line.carrier.wake()
        for line in self._older:
            line.carrier.wake()

    def send_now(self) -> None:
        """As `wake`, where nothing more follows at once: it leaves before this returns."""
        if self._line is not None:
            self._line.carrier.send_now()
        for line in self._older:
            line.carrier.send_now()

    def statistics(self) -> ConnectionStatistics:
        """A snapshot."""
        rtt = self.link.session.statistics().rtt if self.link is not None else 0.0
        return evolve(self.stats, rtt=rtt or 0.0)

    def _peer_name(self) -> str:
        return f"{self.target.node} at {self.where}"

    def describe(self) -> str:
        """What it is doing, for people."""
        if self.link is not None:
            over_tls = self._line is not None and self._line.carrier_name == TLS
            return f"connected to {self._peer_name()}{' over TLS' if over_tls else ''}"
        return f"waiting for {self.where} to answer{f' ({self.cause})' if self.cause else ''}"

    # -- sessions, one after the other ---------------------------------------------------------------------

    async def _attempt(self, failures: int) -> LinkClosed:
        """Dial, and wait until that session, and every one that took over from it, has ended. Raises OSError."""
        try:
            line: Line | None = await self._open(lambda on_ready: self.dial_udp(on_ready, failures))
        except OSError as error:
            if self.dial_tls is None:
                raise
            self.cause = str(error)
            line = await self._open(self.dial_tls)
        assert line is not None
        self._line = line
        self._serve_soon(line)
        async with trio.open_nursery() as nursery:
            if self.dial_tls is not None and line.carrier_name == UDP:
                nursery.start_soon(self._race, line, tls_after(self.ways.place.carrier()))
            closed = await self._until_over(line)
            nursery.cancel_scope.cancel()
        refused, self._refused = self._refused, None
        if refused is not None:
            self.cause = words(refused)
        return refused or closed

    async def _until_over(self, line: Line | None) -> LinkClosed:
        while True:
            assert line is not None
            await line.ended.wait()
            closed = line.closed
            line = self._wanted()
            if line is None:
                assert closed is not None
                return closed

    async def _race(self, line: Line, after: float) -> None:
        """Dial TLS beside a session over UDP that does not answer (6); again and again where TLS is what worked."""
        assert self.dial_tls is not None
        began, failures, known = trio.current_time(), 0, after == 0
        while True:
            with trio.move_on_after(after):
                await line.ready.wait()
            if self.link is not None or line is not self._line:
                return
            rival: Line | None = None
            try:
                rival = await self._open(self.dial_tls)
            except OSError as error:
                self.cause = str(error)
            if rival is not None:
                if self.link is not None or line is not self._line:
                    rival.carrier.close()
                    return
                self._rival = rival
                self._serve_soon(rival)
                await rival.ready.wait()
                if rival.closed is None or self.link is not None:
                    return
                self.cause = words(rival.closed)
                if rival.closed.code in REFUSALS:
                    await self._give_up(line, rival.closed, began + TLS_AFTER)
                    return
            if not known:
                return
            failures += 1
            after = self._pause(failures)

    async def _give_up(self, line: Line, refused: LinkClosed, when: float) -> None:
        """TLS was refused: what counts, if UDP has not answered until then (7)."""
        with trio.move_on_at(when):
            await line.ready.wait()
        if self.link is None and line.closed is None:
            self._refused = refused
            line.link.close(ErrorCode.NO_ERROR, "", trio.current_time())
            line.carrier.wake()

    def _wanted(self) -> Line | None:
        return self._line

    async def _open(self, dial: Dial, continues: Line | None = None) -> Line:
        """A session that has begun, as yet unserved. Raises OSError."""
        await self._prepare()
        leaf, hello = self.ways.contexts.leaf_der(), self._hello
        if continues is not None:
            hello = evolve(hello, continues=continues.link.session.id or b"")
        if self.target.path:
            dial = self.ways.unix
        session, carrier = await dial(self._on_ready)
        link = Link(
            session,
            hello,
            wall_ms=lambda: time.time_ns() // 1_000_000,
            may_speak_for=_anybody,  # what comes from the keeper we chose comes from anywhere
        )
        line = link.app = Line(link, carrier, leaf)
        session.app = link
        if isinstance(carrier, UdpCarrier):
            carrier.on_rebind = partial(self._doubt, line)
        return line

    def _serve_soon(self, line: Line) -> None:
        assert self._nursery is not None
        self._nursery.start_soon(self._serve, line)

    async def _serve(self, line: Line) -> None:
        """Carry one session to its end."""
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(line.carrier.run)
                line.carrier.wake()
                while not line.ended.is_set():
                    with trio.move_on_after(CHECK_INTERVAL):
                        await line.ended.wait()
                    if not line.ended.is_set():
                        self._check(line)
                    await self.ways.place.keep()
                nursery.cancel_scope.cancel()
        finally:
            # cancelled: the peer need not find out by silence
            line.link.close(ErrorCode.NO_ERROR, "", trio.current_time())
            line.carrier.close()
            if line.closed is None:
                self._end(line, LinkClosed(ErrorCode.NO_ERROR, "", by_peer=False))

    def _check(self, line: Line) -> None:
        """Deadlines, once in CHECK_INTERVAL."""
        now = trio.current_time()
        if line.link.peer is not None and self._expiry.over(line.link):
            line.link.close(ErrorCode.EXPIRED, f"the certificate of {self.target.node} has expired", now)
            line.carrier.wake()
        self._give(line, line.link.check(now))

    # -- a second session beside the present one -----------------------------------------------------------

    async def dial_beside(self, dial: Dial | None = None) -> bool:
        """Dial a second session beside the present one, and move over to it when the peer's HELLO has come (5).

        `dial` begins it, over whatever carrier; by default the present one's. Nothing is interrupted: each lane goes
        on over the new session when what it sent on the old one is answered, in both directions; the old one then
        closes, at the latest after SETTLE_TIMEOUT. The owner hears `move`, never `down`: no reconnect is counted.

        True: moved. False: there was no session to move from, or the attempt failed; the present one stands as it
        was. A caller that is cancelled gives the attempt up. Raises OSError when it could not begin.
        """
        async with self._beside_lock:
            await self._until_known()
            if not self._may_move():
                return False
            present = self._line
            if dial is None and present is not None and present.carrier_name == TLS:
                dial = self.dial_tls
            line = await self._open(dial or self.dial_udp, present)
            if not self._may_move():  # lost meanwhile: `_keep_up` dials by itself
                line.carrier.close()
                return False
            self._beside = line
            self._serve_soon(line)
            try:
                await line.ready.wait()
            finally:
                if self._beside is line:
                    self._beside = None
                    line.link.close(ErrorCode.NO_ERROR, "", trio.current_time())
                    line.carrier.wake()
                    line.ended.set()
            return line.closed is None

    async def _until_known(self) -> None:
        """A session that is to be continued must be known to the peer: its HELLO may be under way yet."""
        line = self._line
        if line is not None and trio.current_time() - line.up_at < YOUNG:
            with trio.move_on_after(KNOWN_TIMEOUT):
                while line.closed is None and line.link.unacknowledged_control:  # noqa: ASYNC110 - makes no event
                    await trio.sleep(CLOSE_POLL)

    def _may_move(self) -> bool:
        return self.link is not None and self._line is not None and not self._closing

    def _move(self, line: Line) -> None:
        """The HELLO of the session beside the present one has come."""
        old = self._line
        assert old is not None
        self._line, self._beside, self.link = line, None, line.link
        old.settle_by = trio.current_time() + SETTLE_TIMEOUT
        self._older.append(old)
        self.stats.moves += 1
        self._set_age(line)
        self._remember(line)
        log.info("moved to a fresh session with %s over %s", self._peer_name(), line.carrier_name)
        self._owner.move(line.link)
        line.ready.set()

    def _settle(self, line: Line) -> None:
        """Close an older session when neither side waits for anything on it."""
        now = trio.current_time()
        if (line.moved and self._owner.settled(line.link)) or now >= line.settle_by:
            line.link.flush()
            line.link.close(ErrorCode.NO_ERROR, "moved", now)
            line.carrier.wake()

    def _set_age(self, line: Line) -> None:
        line.up_at = trio.current_time()
        line.renew_at = line.up_at + renew_in(
            self._rehandshake, self._expiry.left(line.link), random.random()
        )

    async def _keep_fresh(self) -> None:
        """A fresh handshake by age, and when our certificate was renewed (R-9-4)."""
        again = 0.0
        while True:
            await trio.sleep(RENEWAL_CHECK)
            line = self._line
            if self.link is None or line is None or trio.current_time() < again:
                continue
            await self._prepare()
            if trio.current_time() < line.renew_at and self.ways.contexts.leaf_der() == line.leaf:
                continue
            try:
                fresh = await self.dial_beside()
            except OSError as error:
                log.warning("no fresh session with %s: %s", self._peer_name(), error)
                fresh = False
            if not fresh:
                again = trio.current_time() + RENEWAL_RETRY * random.uniform(0.5, 1.0)

    # -- from UDP to TLS, and back (6) -----------------------------------------------------------------------

    def _doubt(self, line: Line) -> None:
        """The session took another local port, because nothing came back. If that does not help, UDP does not."""
        if line is self._line and self.link is not None and self.dial_tls is not None and not line.doubted:
            assert self._nursery is not None
            line.doubted = True
            if self._beside is not None and self._beside.carrier_name == UDP:
                self._beside.ended.set()  # it answers no more than this one does, and TLS need not wait for it
            self._nursery.start_soon(self._leave_if_silent, line)

    async def _leave_if_silent(self, line: Line) -> None:
        heard = line.link.session.statistics().datagrams_in
        await trio.sleep(SILENCE)
        line.doubted = False
        if line is not self._line or line.closed is not None:
            return
        if line.link.session.statistics().datagrams_in != heard:
            return
        log.warning("nothing comes back from %s over UDP: trying TLS", self._peer_name())
        try:
            moved = await self.dial_beside(self.dial_tls)
        except OSError as error:
            log.warning("no way to %s over TLS either: %s", self._peer_name(), error)
            return
        silent = line.link.session.statistics().datagrams_in == heard
        if moved and silent and line.closed is None:  # what it has unanswered goes over the new one
            line.settle_by = trio.current_time()
            self._settle(line)

    async def _probe_back(self) -> None:
        """On TLS: look again and again whether UDP works, and move back."""
        back, since = ProbeBack(random.random), 0.0
        while True:
            line = self._line
            if self.link is None or line is None or line.carrier_name != TLS:
                since = 0.0
                await trio.sleep(PROBE_CHECK)
                continue
            if not since:
                since = line.up_at
                back.begin(since)
            await trio.sleep(min(PROBE_CHECK, max(0.0, back.due - trio.current_time())))
            if trio.current_time() < back.due or line is not self._line:
                continue
            if not await answers(self.dial_udp):
                back.failed(trio.current_time())
            elif back.answered(trio.current_time()):
                try:
                    moved = await self.dial_beside(self.dial_udp)
                except OSError:
                    moved = False
                if moved:
                    back.moved(trio.current_time())
                else:
                    back.failed(trio.current_time())

    # -- what sessions say ---------------------------------------------------------------------------------

    def _on_ready(self, session: AnySession) -> None:
        link = session.app
        if link is None:
            return
        line = link.app
        if (
            self._rival is not None
            and line in (self._line, self._rival)
            and session.state is State.ESTABLISHED
        ):
            self._win(line)
        self._give(line, link.process(trio.current_time()))

    def _give(self, line: Line, events: list[LinkEvent]) -> None:
        link = line.link
        for event in events:
            if isinstance(event, LinkClosed):
                self._end(line, event)
                continue
            if isinstance(event, HelloReceived):
                if line is self._beside:
                    self._move(line)
                elif line is self._line:
                    self._up(line)
            elif isinstance(event, GoawayReceived) and line is self._line:
                self._heed(event.goaway)
            elif isinstance(event, MovedReceived):
                line.moved = True
            if line is self._line or line in self._older:
                self._owner.event(link, event)
        if events:
            self._owner.idle()
        if link.token:
            token, link.token = link.token, b""
            if self._nursery is not None:
                self._nursery.start_soon(
                    trio.to_thread.run_sync, self.ways.tokens.put, self._peer_name(), token
                )
        if line in self._older and line.closed is None:
            self._settle(line)

    def _win(self, line: Line) -> None:
        """The end of a race, before the winner says HELLO (6)."""
        loser = self._rival if line is self._line else self._line
        self._line, self._rival = line, None
        if loser is not None:
            loser.link.close(ErrorCode.NO_ERROR, "", trio.current_time())
            loser.carrier.wake()

    def _remember(self, line: Line) -> None:
        """Which carrier works here: at once, for a process may live shortly."""
        self.ways.place.worked(line.carrier_name)
        if self._nursery is not None and self.ways.place.changed:
            self._nursery.start_soon(self.ways.place.keep)

    def _up(self, line: Line) -> None:
        """(1)"""
        self.link = line.link
        self.stats.connects += 1
        self.cause = ""
        self._set_age(line)
        log.info("%s", self.describe())
        self._remember(line)
        self._owner.up(line.link)
        self._first.set()
        line.ready.set()

    def _heed(self, goaway: Goaway) -> None:
        self._slot = goaway.slot_ms / 1000

    def _end(self, line: Line, closed: LinkClosed) -> None:
        line.closed = closed
        if line in self._older:
            self._older.remove(line)
            if self.link is not None:
                self._owner.left(line.link)
        elif line is self._beside:
            self._beside = None
            log.warning("no fresh session with %s: %s", self._peer_name(), words(closed))
        elif line is self._rival:
            self._rival = None
        elif line is self._line:
            self.cause = words(closed)
            if closed.code is ErrorCode.GOING_AWAY and closed.reason.isdigit():
                self._slot = int(closed.reason) / 1000
            if closed.code in REFUSALS and self._rival is not None:
                self._rival.ended.set()  # (7)
                self._rival = None
            # one that is being dialled is the next attempt
            self._line, self._beside, self._rival = self._beside or self._rival, None, None
            self._down()
        line.ready.set()
        line.ended.set()

    def _down(self) -> None:
        if self.link is not None:
            self.link = None
            self.stats.lost += 1
            older, self._older = self._older, []
            for line in older:
                line.link.close(ErrorCode.NO_ERROR, "", trio.current_time())
                line.carrier.wake()
            self._owner.down()

    async def aclose(self) -> None:
        """Let the last receipts arrive, say CLOSE, and stop. `run` is then to be cancelled."""
        self._closing = True
        if self.link is None or self._line is None:
            return
        lines = [*self._older, self._line]
        for line in lines:
            line.link.flush()
            line.carrier.wake()
        with trio.move_on_after(CLOSE_TIMEOUT):
            while any(line.link.unacknowledged_control for line in lines):  # noqa: ASYNC110 - makes no event
                await trio.sleep(CLOSE_POLL)
        for line in lines:
            line.link.close(ErrorCode.NO_ERROR, "", trio.current_time())
            line.carrier.close()


def _anybody(node: str) -> bool:
    return True
