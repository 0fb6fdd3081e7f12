"""A session that moves: to where its peer is seen, or to another way of our own (protocol §8; RFC 9000 §8.2, §9).

         newest packet from elsewhere                 a response in time
    SETTLED ---------------------------> ON TRIAL ---------------------------> SETTLED on the new path
       ^                                    |
       +------------------------------------+
         3 PTO without a response, or the peer is heard at the old address

(1) Only a listener follows its peer, and only the packet with the highest number yet moves it (R-8-6).
(2) On trial no more than AMPLIFICATION × what came from there leaves, and the last validated path is kept (R-8-6).
(3) A trial ends within TRIAL_PTOS PTO (R-8-7). Who failed one while the peer was at the old address is not tried
    again for a while, then ever more rarely.
(4) Known are two paths at most, their last challenges, and MAX_REFUSED addresses, whatever the peer does.
(5) Congestion control and round trip start anew on a path, unless only the port changed; a trial that fails gives
    back those of the old path (R-8-7).

There is one of these only for sessions that have moved. Above output.py, below the data space.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, Protocol

from attrs import define

from stp.core import frames
from stp.core.congestion import Congestion
from stp.core.output import Output
from stp.core.packetizer import Sealer
from stp.core.path import Path, RemoteCids, host_of
from stp.core.recovery import K_INITIAL_RTT, Recovery, RttEstimator

TRIAL_PTOS: Final = 3
"""PTOs that a new path has for its response (R-8-7); one challenge leaves in each."""
CHALLENGE: Final = 8
"""Bytes."""
MAX_CHALLENGES: Final = 4
"""Challenges to one path that may still be answered."""
MAX_REFUSED: Final = 8
"""Addresses remembered for having failed."""
REFUSED_TIME: Final = 1.0
"""Seconds that an address is not tried after it failed, twice as long after each further time …"""
REFUSED_MOST: Final = 64.0
"""… up to this many."""


class Counts(Protocol):
    """What is counted; SessionStatistics says what each means."""

    migrations: int
    path_validations: int
    path_reverts: int
    rebinds: int


def add_moves(totals: Counts, found: Counts) -> None:
    """Add those of one session to those of all."""
    totals.migrations += found.migrations
    totals.path_validations += found.path_validations
    totals.path_reverts += found.path_reverts
    totals.rebinds += found.rebinds


@define
class _Refusal:
    until: float
    times: int


class Ground(Protocol):
    """The data space, as far as it matters here."""

    path: Path
    recovery: Recovery
    output: Output
    sealer: Sealer
    remote_cids: RemoteCids


class Migration:
    """Made by the data space at the first change of path."""

    __slots__ = (
        "_challenged_at",
        "_counts",
        "_kept",
        "_make_congestion",
        "_make_path",
        "_old_answers",
        "_pto",
        "_random",
        "_refused",
        "_space",
        "_tries",
        "_until",
        "previous",
    )

    def __init__(
        self,
        space: Ground,
        *,
        make_path: Callable[[Any, float], Path],
        make_congestion: Callable[[int], Congestion],
        random_bytes: Callable[[int], bytes],
        counts: Counts,
    ) -> None:
        """`make_path(addr, now)`; `counts` are the session's."""
        self._space = space
        self._make_path = make_path
        self._make_congestion = make_congestion
        self._random = random_bytes
        self._counts = counts
        self.previous: Path | None = None
        """The last validated path, while the present one is on trial."""
        self._kept = (space.recovery.rtt, space.recovery.congestion)
        self._until = 0.0
        self._pto = 0.0
        self._challenged_at = 0.0
        self._tries = 0
        self._old_answers = False
        self._refused: dict[Any, _Refusal] = {}

    # -- a listener

    def follow(self, addr: Any, size: int, now: float, *, fresh_cid: bool) -> None:
        """The packet with the highest number yet came from `addr`, in a buffer of `size` bytes (1).

        `fresh_cid`: to another CID than the ones before: the peer moved on purpose, and unseen (RFC 9000 §9.5).
        """
        space, previous = self._space, self.previous
        if previous is not None and addr == previous.addr:
            self._old_answers = True  # the peer is where it was (RFC 9000 §9.3.3)
            self._go_back(now)
            return
        refusal = self._refused.get(addr)
        if refusal is not None and now < refusal.until:
            return
        path = self._make_path(addr, now)
        path.limited, path.received = True, size
        recovery = space.recovery
        if previous is None:
            previous = self.previous = space.path
            previous.challenges = ()
            self._kept = (recovery.rtt, recovery.congestion)
            self._challenged_at = -1.0
            self._old_answers = False
        rtt, congestion = self._kept
        if host_of(addr) == host_of(previous.addr):
            self._pto = rtt.pto()
        else:
            delay, self._pto = rtt.max_ack_delay, rtt.pto()
            rtt, congestion = self._fresh(delay), self._make_congestion(path.datagram)
            self._pto = max(self._pto, rtt.pto())
        if fresh_cid:
            self._renew_cid()
        self._use(path, rtt, congestion)
        self._counts.migrations += 1
        self._until = now + TRIAL_PTOS * self._pto
        self._tries = 0
        self._challenge(now)

    def _challenge(self, now: float) -> None:
        """Ask at the new address, and at the old one, at most once per PTO: is the peer there?"""
        space, previous = self._space, self.previous
        self._tries += 1
        space.output.challenge(self._question(space.path), space.path.datagram)
        if previous is not None and (self._challenged_at < 0.0 or now >= self._challenged_at + self._pto):
            self._challenged_at = now
            space.output.answer(self._question(previous), previous.addr, 0)

    def _question(self, path: Path) -> bytes:
        asked = self._random(CHALLENGE)
        path.challenges = (*path.challenges, asked)[-MAX_CHALLENGES:]
        return frames.PathChallenge(asked).encode()

    def on_response(self, data: bytes, now: float) -> None:
        """PATH_RESPONSE came, by whatever path (RFC 9000 §8.2.3). One that nobody asked for is no news."""
        path = self._space.path
        if path.limited and data in path.challenges:
            path.limited = False
            path.challenges = ()
            self.previous = None
            self._refused.pop(path.addr, None)
            self._counts.path_validations += 1
            if not path.asked_full:
                self._space.output.challenge(self._question(path), path.datagram)
        elif self.previous is not None and data in self.previous.challenges:
            self._old_answers = True

    def _go_back(self, now: float) -> None:
        """To the last validated path: the trial is over (3)."""
        failed, previous = self._space.path, self.previous
        assert previous is not None
        if self._old_answers:
            self._refuse(failed.addr, now)
        self.previous = None
        previous.challenges = ()
        self._use(previous, *self._kept)
        self._counts.path_reverts += 1

    def _refuse(self, addr: Any, now: float) -> None:
        refusal = self._refused.pop(addr, _Refusal(0.0, 0))
        refusal.until = now + min(REFUSED_TIME * 2**refusal.times, REFUSED_MOST)
        refusal.times = min(refusal.times + 1, 16)
        self._refused[addr] = refusal
        while len(self._refused) > MAX_REFUSED:
            del self._refused[next(iter(self._refused))]

    # -- a dialling side

    def move(self, addr: Any, *, same_host: bool, now: float) -> None:
        """Our own address changed, or is about to: what leaves from now on takes another way to `addr`."""
        recovery = self._space.recovery
        path = self._make_path(addr, now)
        rtt, congestion = recovery.rtt, recovery.congestion
        if not same_host:
            rtt, congestion = self._fresh(rtt.max_ack_delay), self._make_congestion(path.datagram)
        self._renew_cid()
        self._use(path, rtt, congestion)
        recovery.probe()
        self._space.output.say(frames.Ping().encode())
        self._counts.migrations += 1
        self._counts.rebinds += 1

    # -- both

    def _use(self, path: Path, rtt: RttEstimator, congestion: Congestion) -> None:
        space = self._space
        space.path = path
        space.recovery.move(space.sealer.next, rtt, congestion, path.sizer)
        space.output.use_path(path)

    def _renew_cid(self) -> None:
        """R-8-10."""
        space = self._space
        if space.remote_cids.renew():
            space.sealer.use_cid(space.remote_cids.current[1])

    def _fresh(self, max_ack_delay: float) -> RttEstimator:
        return RttEstimator(None, max_ack_delay, guess=K_INITIAL_RTT)

    def next_timeout(self) -> float | None:
        """When to call `handle_timeout`: while a trial lasts."""
        if self.previous is None:
            return None
        return self._until - (TRIAL_PTOS - self._tries) * self._pto

    def handle_timeout(self, now: float) -> None:
        due = self.next_timeout()
        if due is None or now < due:
            return
        if self._tries >= TRIAL_PTOS:
            self._go_back(now)
        else:
            self._challenge(now)
