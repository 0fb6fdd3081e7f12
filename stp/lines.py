"""One session of a connection, what its owner does with it, what is counted, and how it fails."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final

import trio
from attrs import Factory, define

from stp.core.errors import ErrorCode, StpError
from stp.link import Link, LinkClosed, LinkEvent
from stp.ways import Carrier

REFUSALS: Final = frozenset({ErrorCode.AUTH, ErrorCode.EXPIRED, ErrorCode.REVOKED})
"""Codes that say: not with this certificate."""


@define
class ConnectionStatistics:
    """Counts since the start. `rtt` is the smoothed round trip in seconds, 0 before it is known."""

    attempts: int = 0
    connects: int = 0
    lost: int = 0
    moves: int = 0
    """Sessions that took over from one that still carried (5)."""
    rtt: float = 0.0


@define
class Owner:
    """What the owner of a connection does with its sessions; all but `move` and what follows it are asked of one
    session at a time."""

    up: Callable[[Link], None]
    """A session is there; none was."""
    event: Callable[[Link, LinkEvent], None]
    down: Callable[[], None]
    """There is none any more."""
    idle: Callable[[], None] = lambda: None
    """The events of one wake-up were given."""
    move: Callable[[Link], None] = lambda link: None
    """A session is there beside the present one, and takes over: send there what was not sent here, as soon as what
    was sent here is answered. Events of both come until `left`."""
    settled: Callable[[Link], bool] = lambda link: True
    """Is everything answered that was sent on this older session?"""
    left: Callable[[Link], None] = lambda link: None
    """An older session is gone, settled or not: what it left unanswered goes to the present one."""


@define(eq=False)
class Line:
    """One session of a connection and what carries it: dialled, up, or settling beside its successor."""

    link: Link
    carrier: Carrier
    leaf: bytes
    """Our certificate on it."""
    ready: trio.Event = Factory(trio.Event)
    """The peer's HELLO has come, or it ended before."""
    ended: trio.Event = Factory(trio.Event)
    closed: LinkClosed | None = None
    doubted: bool = False
    """Somebody waits for a sign of life on its new port."""
    up_at: float = math.inf
    """When the peer's HELLO came."""
    renew_at: float = math.inf
    """When another is dialled beside it (R-9-4)."""
    settle_by: float = math.inf
    """Its successor is up: when it is closed, settled or not."""
    moved: bool = False
    """The peer has said that it sends nothing more here."""

    @property
    def carrier_name(self) -> str:
        """ "udp", "tls" or "unix"."""
        return self.link.session.carrier


class Unreachable(StpError):  # noqa: N818 - read as a sentence
    """Nobody answered in time. `cause` is the last thing that was seen, in words."""

    def __init__(self, where: str, seconds: float, cause: str) -> None:
        super().__init__(f"{where} did not answer within {seconds:g} s{': ' + cause if cause else ''}")
        self.cause = cause


class Rejected(StpError):  # noqa: N818 - read as a sentence
    """One of the two sides does not accept the other's certificate. `by_peer` says which."""

    def __init__(self, where: str, code: ErrorCode, reason: str, by_peer: bool) -> None:
        who = f"{where} refused us" if by_peer else f"we refuse {where}"
        super().__init__(f"{who}: {reason.removeprefix('refused by the peer: ') or code.name}")
        self.code = code
        self.reason = reason
        self.by_peer = by_peer


def words(closed: LinkClosed) -> str:
    """Why a session ended, for people."""
    code = closed.code.name if isinstance(closed.code, ErrorCode) else str(closed.code)
    return f"{code}: {closed.reason}" if closed.reason and closed.reason != code else code
