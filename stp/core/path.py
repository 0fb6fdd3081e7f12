"""Where the peer is: its address, what fits into a datagram, the CIDs of both sides, signs of life (protocol §8).

(1) We issue at most ACTIVE_CIDS; a retired one is replaced, so that the peer can always move on.
(2) What the peer makes us remember is bounded: ACTIVE_CIDS of its CIDs, MAX_RETIRING answers.
(3) Only what comes from the peer is a sign of life; what we send never is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from stp.core.errors import LimitError, ProtocolError
from stp.core.frames import NewCid, RetireCid
from stp.core.sizing import Sizer

ACTIVE_CIDS: Final = 4
EXTRA_CIDS: Final = ACTIVE_CIDS - 1
MAX_RETIRING: Final = 200
"""RETIRE_CID frames that may wait for their acknowledgement (protocol §7, R-7-6)."""

KEEPALIVE: Final = 25.0
"""Seconds of silence before a PING, where nothing is known of the network yet (keepalive.py)."""
KEEPALIVE_LEAST: Final = 15.0
"""Seconds: with less, an idle session would cost a megabyte a day."""
KEEPALIVE_MOST: Final = 110.0
LISTENER_PATIENCE: Final = 5.0
"""Seconds by which a listener waits longer, so that one side pings, not both."""
PING_REPEAT: Final = 5.0
"""Seconds between the PINGs of an idle session that are not answered."""
MAX_UNANSWERED: Final = 3
"""PINGs of an idle session without an answer, and the peer is dead."""
DEAD_PTOS: Final = 6
DEAD_TIME: Final = 5.0
"""Under traffic the peer is dead after max(DEAD_PTOS PTO, DEAD_TIME seconds) without an ACK."""

CidSource = Callable[[], tuple[bytes, bytes]]
"""Makes a CID of ours and its reset token."""


class Path:
    """The way to the peer. One per session until a session can move."""

    __slots__ = ("addr", "sizer")

    def __init__(self, addr: Any, sizer: Sizer) -> None:
        self.addr = addr
        """What the driver calls an address; compared, never looked into."""
        self.sizer = sizer

    @property
    def datagram(self) -> int:
        """Bytes of UDP payload that full packets have now."""
        return self.sizer.datagram


class LocalCids:
    """CIDs that we issued: the peer puts them on its packets. Owns NEW_CID (R-5-4)."""

    __slots__ = ("_source", "_tokens", "_unacked", "active", "next_seq", "pending")

    def __init__(self, first: bytes, source: CidSource) -> None:
        self.active: dict[int, bytes] = {0: first}
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
            if self.current[0] < frame.retire_prior_to and self.spare:
                self._retire(self.current[0])
                seq = min(self.spare)
                self.current = (seq, self.spare.pop(seq))
                moved = True
        if len(self.spare) + 1 > ACTIVE_CIDS:
            raise LimitError(f"more than {ACTIVE_CIDS} active CIDs")
        return moved

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


class Liveness:
    """Whether the peer is still there (3).

    An owner that expects something (a receipt, the next message of a flow) is told of a peer's end sooner: the first
    PING leaves after that many seconds of silence, the next after twice as many, up to the keep-alive.
    """

    __slots__ = ("_heard_at", "_patience", "_pinged_at", "_unanswered", "keepalive")

    def __init__(self, keepalive: float, now: float) -> None:
        self.keepalive = keepalive
        self._heard_at = now
        self._pinged_at = now
        self._unanswered = 0
        self._patience = keepalive

    def expect(self, seconds: float | None) -> None:
        """Something should come within about `seconds`; None: nothing in particular."""
        self._patience = self.keepalive if seconds is None else min(seconds, self.keepalive)

    def on_heard(self, now: float) -> None:
        """A packet of the peer opened."""
        self._heard_at = now
        self._unanswered = 0

    def next_ping(self) -> float:
        """When the idle session must ping, or be given up."""
        if self._unanswered:
            return self._pinged_at + PING_REPEAT
        return self._heard_at + self._patience

    def on_ping_time(self, now: float) -> bool:
        """The time of `next_ping` has come: True, send a PING; False, the peer is dead."""
        if self._unanswered >= MAX_UNANSWERED:
            return False
        self._unanswered += 1
        self._pinged_at = now
        self._patience = min(2 * self._patience, self.keepalive)
        return True

    def dead_at(self, waiting_since: float, pto: float, dead_time: float) -> float:
        """When a peer is dead that leaves packets under way since `waiting_since` without an ACK."""
        return max(waiting_since, self._heard_at) + max(DEAD_PTOS * pto, dead_time)
