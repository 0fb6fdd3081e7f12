"""Key phases of a session: when our keys change, and which keys a packet of the other phase needs (protocol §9).

Above the packetizer, below the data space. Nothing here is done per packet: the loops of the packetizer compare the
phase bit, and only what differs comes here.

(1) We begin an update only after confirmation, when a phase is used up, the peer's answer to the last one is here, a
    packet of the current phase was acknowledged and KEEP_PTOS PTO went by since.
(2) The peer's update moves both directions, once, by a packet that opened; nothing else moves them.
(3) Keys that are gone open nothing: previous ones after KEEP_PTOS PTO, older ones at once.
(4) A key seals at most what its cipher allows, the CLOSE packets at the end included (packetizer.Sealer).
"""

from __future__ import annotations

from typing import Final

from attrs import define
from cryptography.exceptions import InvalidTag

from stp.core.acks import AckTracker
from stp.core.errors import ErrorCode, ProtocolError
from stp.core.keys import SECRET_LENGTH, Aead, DirectionKeys, SessionKeys
from stp.core.packet import DATA_HEADER_LENGTH, MAX_PN
from stp.core.packetizer import NUMBERS, Opener, Sealer

UPDATE_PACKETS: Final = 1 << 20
UPDATE_BYTES: Final = 1 << 36
UPDATE_SECONDS: Final = 3600.0
"""What a phase lasts at most; then the sender updates its keys (R-9-1)."""
KEEP_PTOS: Final = 3
"""PTOs for which the previous keys are kept, and that a sender waits before the next update."""

_NEVER: Final = float("inf")


@define
class KeyLimits:
    """How long keys last. The defaults are the protocol's; tests set lower ones."""

    packets: int = UPDATE_PACKETS
    bytes: int = UPDATE_BYTES
    """Of UDP payload, as if every packet were full."""
    seconds: float = UPDATE_SECONDS
    seal_limit: int | None = None
    """Packets that one key may seal; None: what the cipher allows."""
    fail_limit: int | None = None
    """Packets of a session that may fail to open; None: what the cipher allows."""


@define
class Previous:
    """The peer's keys of the phase before."""

    aead: Aead
    until: float
    """When they are to be forgotten."""


class Phases:
    """The secrets of both directions. An idle session keeps these, and neither next nor previous keys."""

    __slots__ = (
        "_acked_at",
        "_limits",
        "_next",
        "_secrets",
        "_suite",
        "due_at",
        "packets",
        "previous",
        "unanswered",
        "updates",
    )

    def __init__(
        self, keys: SessionKeys, mine: DirectionKeys, theirs: DirectionKeys, limits: KeyLimits, datagram: int
    ) -> None:
        self._suite = keys.suite
        self._secrets = mine.secret + theirs.secret  # in one object: there may be ten thousand idle sessions
        self._limits = limits
        self.packets = 0
        """Packets after which a phase is used up."""
        self.use_size(datagram)
        self.due_at = _NEVER
        """When the phase is used up by age; never before confirmation."""
        self.unanswered = False
        """We began an update, and nothing of the peer's new phase has come."""
        self.updates = 0
        """Updates of the peer's keys, whoever began them."""
        self._acked_at: float | None = None
        self._next: DirectionKeys | None = None
        self.previous: Previous | None = None
        """`drop` is to be called at its `until`."""

    def use_size(self, datagram: int) -> None:
        """Full packets have `datagram` bytes."""
        self.packets = min(self._limits.packets, self._limits.bytes // datagram)

    def drop(self, now: float) -> None:
        """Forget the previous keys if their time has come (3)."""
        if self.previous is not None and now >= self.previous.until:
            self.previous = None

    def confirm(self, now: float) -> None:
        """The handshake is confirmed: from now on we may begin updates."""
        self.due_at = now + self._limits.seconds

    def begin(self, sealer: Sealer, largest_acked: int, pto: float, now: float) -> None:
        """The phase is used up, by `packets` or `due_at`: begin an update, or wait until that is allowed (1).

        R-9-1.
        """
        if self.due_at == _NEVER or self.unanswered or largest_acked < sealer.first:
            return
        if self._acked_at is None:
            self._acked_at = now
        elif now >= self._acked_at + KEEP_PTOS * pto:
            self._move(sealer, now)
            self.unanswered = True

    def on_ack(self, stop: int, sealer: Sealer) -> None:
        """An ACK came while `unanswered`, of numbers below `stop`, in a packet under the peer's old keys.

        Raises ProtocolError: who opened a packet of our new phase has moved its own keys before it could answer.
        """
        if stop > sealer.first:
            raise ProtocolError("an old key acknowledges a newer one", ErrorCode.KEY_UPDATE)

    def open(
        self, datagram: bytes, opener: Opener, sealer: Sealer, acks: AckTracker, pto: float, now: float
    ) -> bytes | None:
        """A packet to the current CID that has the other phase bit: what it says, if it opens and is fresh (R-9-2).

        Raises ProtocolError (KEY_UPDATE).
        """
        pn = opener.number(datagram)
        plain: bytes | None
        if pn < opener.lowest:
            plain = self._open_previous(pn, datagram, now)
        else:
            if (
                self._next is None
            ):  # made when first asked for: the bit is in the clear, so this tells nothing new
                self._next = DirectionKeys.after(self._secrets[SECRET_LENGTH:], self._suite)
            plain = _open(self._next.aead, pn, datagram)
            if plain is not None and pn <= MAX_PN:
                self._follow(pn, opener, sealer, acks, pto, now)
            elif plain is None and self._open_previous(pn, datagram, now) is not None:
                raise ProtocolError("an old key with a higher number", ErrorCode.KEY_UPDATE)
        if plain is None:
            opener.failed += 1
            return None
        return plain if opener.note(pn, acks, now) else None

    def _open_previous(self, pn: int, datagram: bytes, now: float) -> bytes | None:
        previous = self.previous
        if previous is None or now >= previous.until:
            return None
        return _open(previous.aead, pn, datagram)

    def _follow(
        self, pn: int, opener: Opener, sealer: Sealer, acks: AckTracker, pto: float, now: float
    ) -> None:
        """The peer's next keys opened packet `pn`: both directions move on, ours unless it has already (2)."""
        assert self._next is not None
        if pn < acks.next:
            raise ProtocolError("an old key with a higher number", ErrorCode.KEY_UPDATE)
        if not self.unanswered and sealer.next == sealer.first:
            # What we have sent nothing in, we have acknowledged nothing of.
            raise ProtocolError("an update before the last one was answered", ErrorCode.KEY_UPDATE)
        self.previous = Previous(opener.aead, now + KEEP_PTOS * pto)
        opener.use_keys(self._next.aead, pn)
        self._secrets = self._secrets[:SECRET_LENGTH] + self._next.secret
        self._next = None
        self.updates += 1
        if self.unanswered:
            self.unanswered = False
        else:
            self._move(sealer, now)

    def _move(self, sealer: Sealer, now: float) -> None:
        """Our next phase begins."""
        keys = DirectionKeys.after(self._secrets[:SECRET_LENGTH], self._suite)
        self._secrets = keys.secret + self._secrets[SECRET_LENGTH:]
        sealer.use_keys(keys.aead)
        self._acked_at = None
        if self.due_at != _NEVER:
            self.due_at = now + self._limits.seconds


def seal_limit(keys: SessionKeys, limits: KeyLimits) -> int:
    """Packets that one key may seal (R-9-3)."""
    if limits.seal_limit is not None:
        return limits.seal_limit
    return NUMBERS if keys.seal_limit is None else keys.seal_limit


def fail_limit(keys: SessionKeys, limits: KeyLimits) -> int:
    """Failed opens that end a session (R-9-3)."""
    return keys.fail_limit if limits.fail_limit is None else limits.fail_limit


def _open(aead: Aead, pn: int, datagram: bytes) -> bytes | None:
    header = datagram[:DATA_HEADER_LENGTH]
    try:
        return aead.decrypt((aead.iv_int ^ pn).to_bytes(12, "big"), datagram[DATA_HEADER_LENGTH:], header)
    except InvalidTag:
        return None
