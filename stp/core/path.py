"""Where the peer is: its address, what fits into a datagram, the CIDs of both sides, signs of life (protocol §8).

(1) We issue at most ACTIVE_CIDS; a retired one is replaced, so that the peer can always move on.
(2) What the peer makes us remember is bounded: ACTIVE_CIDS of its CIDs, MAX_RETIRING answers.
(3) Only what comes from the peer is a sign of life; what we send never is.
(4) A retired CID of ours opens packets for a while yet; at most LINGERING of them do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, Protocol

from stp.core.errors import LimitError, ProtocolError
from stp.core.frames import NewCid, RetireCid
from stp.core.sizing import Sizer

ACTIVE_CIDS: Final = 4
EXTRA_CIDS: Final = ACTIVE_CIDS - 1
MAX_RETIRING: Final = 200
"""RETIRE_CID frames that may wait for their acknowledgement (protocol §7, R-7-6)."""

LINGERING: Final = ACTIVE_CIDS
"""Retired CIDs of ours whose packets are still taken …"""
LINGER_PTOS: Final = 3
"""… for so many PTOs (R-8-10)."""
AMPLIFICATION: Final = 3
"""Times what came from an address may be sent there before it is validated (R-8-6)."""

KEEPALIVE: Final = 25.0
"""Seconds of silence before a PING, where nothing is known of the network yet (keepalive.py)."""
KEEPALIVE_LEAST: Final = 15.0
"""Seconds: with less, an idle session would cost a megabyte a day."""
KEEPALIVE_MOST: Final = 110.0
LISTENER_PATIENCE: Final = 5.0
"""Seconds by which a listener waits longer than any dialling side, so that one side pings, not both."""
PING_REPEAT: Final = 5.0
"""Seconds between the PINGs of an idle session that are not answered."""
MAX_UNANSWERED: Final = 3
"""PINGs of an idle session without an answer, and the peer is dead."""
DEAD_PTOS: Final = 6
DEAD_TIME: Final = 5.0
"""Under traffic the peer is dead after max(DEAD_PTOS PTO, DEAD_TIME seconds) without an ACK."""
SHORT_SILENCE: Final = 0.4
"""Seconds: in shorter ones nothing can have been asked of the peer in vain."""
FOUND_WITHIN: Final = 5.0
"""Seconds from the end of a silence to the listener's question that it provoked."""
SUSPECT_PTOS: Final = 3
SUSPECT_TIME: Final = 0.5
"""Under traffic a path is suspect after max(SUSPECT_PTOS PTO, SUSPECT_TIME seconds) without an ACK, and after twice,
four times … as long again."""

CidSource = Callable[[], tuple[bytes, bytes]]
"""Makes a CID of ours and its reset token."""


class Path:
    """One way to the peer, and what is known of it. Replaced, not changed, when either side moves."""

    __slots__ = ("addr", "asked_full", "challenges", "limited", "received", "sent", "sizer")

    def __init__(self, addr: Any, sizer: Sizer) -> None:
        self.addr = addr
        """What the driver calls an address; compared, never looked into but by `host_of`."""
        self.sizer = sizer
        self.limited = False
        """Not validated: no more than `allowance` may leave."""
        self.received = 0
        self.sent = 0
        """Bytes from and to there, counted while `limited`."""
        self.challenges: tuple[bytes, ...] = ()
        """What PATH_CHALLENGEs to there asked for, the latest last."""
        self.asked_full = False
        """One of these left in a full packet."""

    @property
    def datagram(self) -> int:
        """Bytes of UDP payload that full packets have now."""
        return self.sizer.datagram

    def allowance(self) -> int:
        """Bytes that may leave to an address that is not validated (R-8-6)."""
        return AMPLIFICATION * self.received - self.sent


def host_of(addr: Any) -> Any:
    """An address without its port, where it has one."""
    return addr[0] if isinstance(addr, tuple) else addr


class LocalCids:
    """CIDs that we issued: the peer puts them on its packets. Owns NEW_CID (R-5-4)."""

    __slots__ = ("_source", "_tokens", "active", "lingering", "next_seq", "pending")

    def __init__(self, first: bytes, source: CidSource) -> None:
        self.active: dict[int, bytes] = {0: first}
        self.lingering: tuple[tuple[float, bytes], ...] = ()
        """Retired CIDs and until when they open packets (4), the oldest first."""
        self.next_seq = 1
        self._source = source
        self._tokens: dict[int, bytes] = {}
        self.pending: list[int] = []

    def issue(self, count: int) -> list[bytes]:
        """Make up to `count` more (1); they are announced with the next packets."""
        made = []
        for _ in range(min(count, ACTIVE_CIDS - len(self.active))):
            cid, self._tokens[self.next_seq] = self._source()
            self.active[self.next_seq] = cid
            self.pending.append(self.next_seq)
            self.next_seq += 1
            made.append(cid)
        return made

    def retire(self, seq: int, used: bytes) -> bytes | None:
        """RETIRE_CID came in a packet to the CID `used`: the one that is gone, None if it was already.

        Raises ProtocolError (RFC 9000 §19.16).
        """
        if seq >= self.next_seq:
            raise ProtocolError(f"RETIRE_CID {seq} was never issued")
        if self.active.get(seq) == used:
            raise ProtocolError(f"RETIRE_CID {seq} came on that very CID")
        self._tokens.pop(seq, None)
        return self.active.pop(seq, None)

    def linger(self, cid: bytes, until: float) -> list[bytes]:
        """Packets to the retired `cid` are taken until then. Returns those that make room for it (4)."""
        kept = (*self.lingering, (until, cid))
        self.lingering = kept[-LINGERING:]
        return [gone for _, gone in kept[:-LINGERING]]

    def forget(self, now: float) -> list[bytes]:
        """Those whose time is over."""
        gone = [cid for until, cid in self.lingering if until <= now]
        if gone:
            self.lingering = tuple(one for one in self.lingering if one[0] > now)
        return gone

    def ours(self, cid: bytes) -> bool:
        """Whether packets to this CID are for us."""
        return cid in self.active.values() or any(cid == known for _, known in self.lingering)

    def next_frame(self) -> tuple[bytes, int] | None:
        """The next NEW_CID to write and its token for `on_sent`, `on_acked` and `on_lost`."""
        while self.pending:
            seq = self.pending[0]
            cid, reset = self.active.get(seq), self._tokens.get(seq)
            if cid is not None and reset is not None:
                return NewCid(seq, 0, cid, reset).encode(), seq
            self.pending.pop(0)  # retired or acknowledged meanwhile
        return None

    def on_sent(self) -> None:
        self.pending.pop(0)

    def on_acked(self, token: object) -> None:
        if isinstance(token, int):
            self._tokens.pop(token, None)
            if not self._tokens:
                self._tokens = {}  # an emptied one keeps its room

    def on_lost(self, token: object) -> None:
        if isinstance(token, int) and token in self._tokens and token not in self.pending:
            self.pending.append(token)


class RemoteCids:
    """CIDs that the peer issued: we put them on our packets. Owns RETIRE_CID."""

    __slots__ = ("_retire_prior_to", "_retiring", "current", "pending", "spare", "tokens")

    def __init__(self, first: bytes) -> None:
        self.current: tuple[int, bytes] = (0, first)
        self.spare: dict[int, bytes] = {}
        self.tokens: dict[int, bytes] = {}
        """Reset tokens of what is not retired."""
        self._retire_prior_to = 0
        self._retiring: dict[int, None] = {}  # empty ones take a third of an empty set
        self.pending: list[int] = []

    def on_new_cid(self, frame: NewCid) -> bool:
        """NEW_CID came. Whether `current` changed because the peer retired it.

        Raises ProtocolError, and LimitError for more than we agreed to keep (2).
        """
        if frame.retire_prior_to > frame.seq:
            raise ProtocolError("NEW_CID retires itself")
        known = self.current[1] if frame.seq == self.current[0] else self.spare.get(frame.seq)
        if known is not None and known != frame.cid:
            raise ProtocolError(f"NEW_CID {frame.seq} again with another CID")
        if known is None and frame.seq >= self._retire_prior_to and frame.seq not in self._retiring:
            self.spare[frame.seq] = frame.cid
            self.tokens[frame.seq] = frame.token
        moved = False
        if frame.retire_prior_to > self._retire_prior_to:
            self._retire_prior_to = frame.retire_prior_to
            for seq in [s for s in self.spare if s < frame.retire_prior_to]:
                del self.spare[seq]
                self._retire(seq)
            if self.current[0] < frame.retire_prior_to:
                moved = self.renew()
        if len(self.spare) + 1 > ACTIVE_CIDS:
            raise LimitError(f"more than {ACTIVE_CIDS} active CIDs")
        return moved

    def renew(self) -> bool:
        """Use a fresh CID and retire the present one. False: the peer has given us no other."""
        if not self.spare:
            return False
        self._retire(self.current[0])
        seq = min(self.spare)
        self.current = (seq, self.spare.pop(seq))
        return True

    def _retire(self, seq: int) -> None:
        self.tokens.pop(seq, None)
        self._retiring[seq] = None
        self.pending.append(seq)
        if len(self._retiring) > MAX_RETIRING:
            raise LimitError(f"more than {MAX_RETIRING} CIDs to retire")

    def next_frame(self) -> tuple[bytes, int] | None:
        if not self.pending:
            return None
        return RetireCid(self.pending[0]).encode(), self.pending[0]

    def on_sent(self) -> None:
        self.pending.pop(0)

    def on_acked(self, token: object) -> None:
        if isinstance(token, int):
            self._retiring.pop(token, None)

    def on_lost(self, token: object) -> None:
        if isinstance(token, int) and token in self._retiring and token not in self.pending:
            self.pending.append(token)


class SilenceJudge(Protocol):
    """Who learns how long an idle session may be silent (keepalive.KeepaliveLearner)."""

    interval: float

    def on_answer(self, silence: float) -> None: ...

    def on_forgotten(self, silence: float) -> None: ...


class Liveness:
    """Whether the peer is still there (3).

    An owner that expects something (a receipt, the next message of a flow) is told of a peer's end sooner: the first
    PING leaves after that many seconds of silence, the next after twice as many, up to the keep-alive.
    """

    __slots__ = (
        "_gap",
        "_gap_at",
        "_judge",
        "_patience",
        "_pinged_at",
        "_suspicions",
        "_unanswered",
        "heard_at",
        "keepalive",
    )

    def __init__(self, keepalive: float, now: float, judge: SilenceJudge | None = None) -> None:
        """`judge`: learns from silences, and its `interval` stands for `keepalive`; dialling sides only."""
        self.keepalive = keepalive if judge is None else judge.interval
        self.heard_at = now
        """When the last packet of the peer opened."""
        self._judge = judge
        self._pinged_at = now
        self._unanswered = 0
        self._suspicions = 0
        self._gap = 0.0  # seconds of the last silence
        self._gap_at = now  # when it ended
        self._patience = self.keepalive

    def expect(self, seconds: float | None) -> None:
        """Something should come within about `seconds`; None: nothing in particular."""
        self._patience = self.keepalive if seconds is None else min(seconds, self.keepalive)

    def on_heard(self, now: float) -> None:
        """A packet of the peer opened."""
        if self._unanswered or now - self.heard_at > SHORT_SILENCE:
            self._end_silence(now)
        self.heard_at = now

    def _end_silence(self, now: float) -> None:
        self._gap, self._gap_at = now - self.heard_at, now
        answered, self._unanswered, self._suspicions = self._unanswered, 0, 0
        if self._judge is not None and answered == 1:
            self._judge.on_answer(self._pinged_at - self.heard_at)
            self._heed()
        elif self._judge is not None and answered == MAX_UNANSWERED:  # the last one left from a new port
            self._judge.on_forgotten(self._gap)
            self._heed()

    def on_found_anew(self, now: float) -> None:
        """The listener asks whether we are where it sees us now: something on the way forgot us (R-8-9)."""
        if self._judge is not None and self._gap and now - self._gap_at < FOUND_WITHIN:
            self._judge.on_forgotten(self._gap)
            self._gap = 0.0
            self._heed()

    def on_moved(self) -> None:
        """We have changed our address ourselves: what the listener asks now is no news."""
        self._gap = 0.0

    def _heed(self) -> None:
        assert self._judge is not None
        impatient = self._patience < self.keepalive
        self.keepalive = self._judge.interval
        self._patience = min(self._patience, self.keepalive) if impatient else self.keepalive

    def next_ping(self) -> float:
        """When the idle session must ping, or be given up."""
        if self._unanswered:
            return self._pinged_at + PING_REPEAT
        return self.heard_at + self._patience

    def on_ping_time(self, now: float) -> bool:
        """The time of `next_ping` has come: True, send a PING; False, the peer is dead."""
        if self._unanswered >= MAX_UNANSWERED:
            return False
        self._unanswered += 1
        self._pinged_at = now
        self._patience = min(2 * self._patience, self.keepalive)
        return True

    @property
    def impatient(self) -> bool:
        """The owner waits for the peer, as `expect` was told."""
        return self._patience < self.keepalive

    @property
    def doubtful(self) -> bool:
        """All PINGs of an idle session but the last are unanswered: what is left to try is another port."""
        return self._unanswered == MAX_UNANSWERED

    def suspect_at(self, waiting_since: float, pto: float) -> float:
        """When a path is suspect on which packets are under way since `waiting_since` without an ACK."""
        patience = max(SUSPECT_PTOS * pto, SUSPECT_TIME) * float(2**self._suspicions)
        return max(waiting_since, self.heard_at) + patience

    def on_suspicion(self) -> None:
        """Somebody was told that the path is suspect: the next time comes later."""
        self._suspicions += 1

    def dead_at(self, waiting_since: float, pto: float, dead_time: float) -> float:
        """When a peer is dead that leaves packets under way since `waiting_since` without an ACK."""
        return max(waiting_since, self.heard_at) + max(DEAD_PTOS * pto, dead_time)
