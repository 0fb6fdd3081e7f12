"""The states of a session, what moves it from one to the next, and what all sessions of an endpoint share."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum, auto
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar

from attrs import Factory, define

from stp.core.congestion import Congestion
from stp.core.flow import WindowBudget
from stp.core.handshake import PeerIdentity
from stp.core.path import DEAD_TIME, KEEPALIVE, CidSource
from stp.core.phases import KeyLimits
from stp.core.scratch import Scratch
from stp.core.sizing import BASE_DATAGRAM

if TYPE_CHECKING:
    from stp.core.session import Session
    from stp.core.trace import Sink


class State(Enum):
    HANDSHAKE = auto()
    KEYED = auto()
    """DATA keys are there, the peer's proof (1) is not."""
    ESTABLISHED = auto()
    CLOSING = auto()
    DRAINING = auto()
    CLOSED = auto()


class Input(Enum):
    KEYS = auto()
    PROOF = auto()
    LOCAL_CLOSE = auto()
    PEER_CLOSE = auto()
    SILENCE = auto()
    """Nothing more will come, and there is nobody to say it to."""
    DRAINED = auto()


TRANSITIONS: Final[dict[tuple[State, Input], State]] = {
    (State.HANDSHAKE, Input.KEYS): State.KEYED,
    (State.HANDSHAKE, Input.LOCAL_CLOSE): State.CLOSING,
    (State.HANDSHAKE, Input.SILENCE): State.CLOSED,
    (State.KEYED, Input.PROOF): State.ESTABLISHED,
    (State.KEYED, Input.LOCAL_CLOSE): State.CLOSING,
    (State.KEYED, Input.PEER_CLOSE): State.DRAINING,
    (State.KEYED, Input.SILENCE): State.CLOSED,
    (State.ESTABLISHED, Input.LOCAL_CLOSE): State.CLOSING,
    (State.ESTABLISHED, Input.PEER_CLOSE): State.DRAINING,
    (State.ESTABLISHED, Input.SILENCE): State.CLOSED,
    (State.CLOSING, Input.PEER_CLOSE): State.DRAINING,
    (State.CLOSING, Input.DRAINED): State.CLOSED,
    (State.DRAINING, Input.DRAINED): State.CLOSED,
}
LIVE: Final = frozenset({State.HANDSHAKE, State.KEYED, State.ESTABLISHED})


S = TypeVar("S")


class Agenda(Generic[S]):
    """Which sessions want the owner's and the network's attention; one for all sessions of a carrier."""

    __slots__ = ("ready", "suspects", "to_send")

    def __init__(self) -> None:
        self.suspects: dict[S, None] = {}
        """Dialled sessions that hear nothing, until somebody takes them: another port may help."""
        self.ready: list[S] = []
        self.to_send: list[S] = []


@define
class SessionContext:
    """What all sessions of an endpoint share."""

    agenda: Agenda[Session]
    cid_source: CidSource
    random_bytes: Callable[[int], bytes]
    congestion: Callable[[int], Congestion]
    """Makes a controller for packets of so many bytes."""
    budget: WindowBudget
    on_cids: Callable[[Session, list[bytes], list[bytes]], None]
    """(session, CIDs made, CIDs gone): where datagrams are to be routed."""
    reset_token: Callable[[bytes], bytes]
    on_refused: Callable[[Any, PeerIdentity | None, str], None] | None = None
    """A listener's session ended before it was ESTABLISHED; its owner never hears of it otherwise."""
    node_token: Callable[[PeerIdentity, float], bytes] | None = None
    """Makes a NEW_TOKEN; listeners only."""
    sizes_for: Callable[[Any], tuple[int, int]] = lambda addr: (BASE_DATAGRAM, BASE_DATAGRAM)
    """What a Sizer for this address starts with, and up to what it probes."""
    keepalive: float = KEEPALIVE
    dead_time: float = DEAD_TIME
    key_limits: KeyLimits = Factory(KeyLimits)
    observer: Callable[[Session, bytes], Sink | None] | None = None
    """(session, its first DCID): who wants its event log, if anybody. Asked once: when we dial, or let a peer in."""
    scratch: Scratch = Factory(Scratch)
