"""Make before break: two sessions of the same two nodes side by side, the newer taking over (protocol §9).

(1) The older session carries until everything sent on it is settled, in both directions; each lane goes on over the
    newer one as soon as that is so for the lane (hops (5), outbox (6)). Nothing is lost, sent twice or overtaken.
(2) A session is continued only by one whose HELLO names it, with the same node, kind, source, run and nonce (R-9-7).
    Any other newer session replaces it.
(3) The listening side says MOVED on the older session when it sends nothing more there; the dialling side then closes
    it. At the latest after SETTLE_TIMEOUT either closes it: what it left unanswered is sent again on the newer one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from stp.control import Hello, Moved
from stp.core.errors import ErrorCode
from stp.topics import FilterSet
from stpd.peers import Peer
from stpd.router import LANES

SETTLE_TIMEOUT: Final = 600.0
"""Seconds that a session may take to settle beside its successor: a reader may take records slowly."""


def continued_by(older: Peer, newer: Peer, hello: Hello) -> bool:
    """(2). *hello*: what the peer said on the newer session, which for an upstream we said continues the older."""
    if older.link.closed is not None or older.link.peer is None:
        return False
    was = older.link.peer
    same = (was.node, was.kind, was.store, was.run, was.nonce) == (
        hello.node,
        hello.kind,
        hello.store,
        hello.run,
        hello.nonce,
    )
    said = newer.link.hello.continues if newer.upstream is not None else hello.continues
    return same and bool(said) and said == older.session.id


def pair_of(peer: Peer, hello: Hello, newest: Peer | None) -> tuple[Peer, Peer] | None:
    """Which sessions overlap, the older first, now that *peer*'s HELLO has come; None: it takes over from nobody.

    *newest*: the session of that source whose HELLO came last. It may be the one that continues this: HELLOs of two
    sessions overtake one another.
    """
    said = newest.link.peer if newest is not None and newest.link.closed is None else None
    if newest is not None and said is not None and said.continues and said.continues == peer.session.id:
        return peer, newest
    older = peer.older if peer.upstream is not None else newest
    return (older, peer) if older is not None and continued_by(older, peer, hello) else None


def begin(older: Peer, newer: Peer, now: float) -> None:
    """The HELLO of the newer session is here."""
    older.successor, newer.older = newer, older
    older.moving_since = now
    newer.told_revoked = older.told_revoked


def before(newer: Peer) -> Iterator[Peer]:
    """The sessions that this one continues, the nearest first: SUBSCRIBEs of two of them overtake one another."""
    older = newer.older
    while older is not None and older.successor is not None:
        yield older
        older = older.older


def take_live(newer: Peer) -> None:
    """The live subscriptions of the sessions before go on here; the first SUBSCRIBE of the newer one asks for it."""
    for older in before(newer):
        if "" in older.feeds and "" not in newer.feeds:
            feed = newer.feeds[""] = older.feeds.pop("")
            newer.live, older.live = older.live, {}
            older.leaving.append(feed)
            feed.move(newer.link)


def take_durable(newer: Peer, sub_id: str, name: str, wanted: FilterSet) -> bool:
    """The feed of this durable name goes on here, if a session before served it with the same filters."""
    for older in before(newer):
        for key, feed in older.feeds.items():
            same = feed.filters is not None and feed.filters.filters == wanted.filters
            if feed.durable and feed.name == name and same:
                del older.feeds[key]
                newer.feeds[sub_id] = feed
                older.leaving.append(feed)
                feed.move(newer.link)
                return True
    return False


def take_all(newer: Peer) -> None:
    """Everything that we send on the session before goes on here: the dialling side needs no SUBSCRIBE for that."""
    older = newer.older
    assert older is not None
    for key, feed in older.feeds.items():
        newer.feeds[key] = feed
        older.leaving.append(feed)
        feed.move(newer.link)
    older.feeds.clear()


def on_receipt(older: Peer, lane: int, custody: int) -> None:
    """What a receipt on the older session means to feeds that are leaving it."""
    for feed in older.leaving:
        feed.on_receipt(older.link, lane, custody)


def settle(older: Peer, now: float) -> None:
    """(3): say MOVED, or close, when it is time. Call it after all that came on the older session was handled."""
    link = older.link
    if link.closed is not None:
        return
    if now - older.moving_since >= SETTLE_TIMEOUT:
        link.close(ErrorCode.NO_ERROR, "moved", now)
        return
    for feed in older.leaving:
        feed.cross()
    if older.feeds or any(not link.lane_settled(lane) for lane in LANES):
        return
    if not older.told_moved:
        older.told_moved = True
        link.send(Moved())
    if older.upstream is not None and older.heard_moved:
        link.flush()
        link.close(ErrorCode.NO_ERROR, "moved", now)


def over(older: Peer) -> None:
    """The older session is gone: what it left unanswered goes to the newer one."""
    leaving, older.leaving = older.leaving, []
    for feed in leaving:
        feed.cross()
