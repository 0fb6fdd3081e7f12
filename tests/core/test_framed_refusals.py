"""Who is refused over a byte stream, by whom, and what both sides hear of it (R-11-1, R-9-5)."""

from __future__ import annotations

from stp.core.errors import ErrorCode, HandshakeRefused
from stp.core.events import (
    SessionClosed,
)
from stp.core.handshake import PeerIdentity
from stp.core.states import State
from tests.core.framed_kit import ADDRESS, EDGE, HUB, Pair
from tests.identity_kit import DOMAIN, Flaw


def test_another_node_than_the_expected_one_is_refused_before_it_hears_of_us() -> None:
    """R-4-8: any gateway's certificate would pass for the hub's otherwise. It never sees our Finished."""
    pair = Pair(4, expected=(DOMAIN, "hub-2"))
    pair.settle()
    closed = pair.edge.closed
    assert closed is not None
    assert closed.code is ErrorCode.AUTH
    assert closed.reason == f"wanted {DOMAIN}/hub-2, found {DOMAIN}/{HUB}"
    assert not pair.hub.session._channel.ready


def test_a_peer_that_may_not_come_hears_why() -> None:
    """R-11-1: CLOSE(AUTH) instead of HANDSHAKE_DONE; on the listener nobody hears of a session."""
    pair = Pair(5, authorise=lambda peer: f"no place for {peer.node}")
    pair.settle()
    closed = pair.edge.closed
    assert closed == SessionClosed(ErrorCode.AUTH, f"no place for {EDGE}", by_peer=True)
    assert pair.hub.heard == []
    assert [(a, p and p.node, r) for a, p, r in pair.refusals] == [(ADDRESS, EDGE, f"no place for {EDGE}")]
    assert pair.hub.session.state is State.CLOSED


def test_a_revoked_peer_is_told_so() -> None:
    """R-9-5: the refusal has a code of its own."""

    def revoked(peer: PeerIdentity) -> str | None:
        raise HandshakeRefused("this certificate was revoked", ErrorCode.REVOKED)

    pair = Pair(5, authorise=revoked)
    pair.settle()
    closed = pair.edge.closed
    assert closed is not None
    assert (closed.code, closed.reason) == (ErrorCode.REVOKED, "this certificate was revoked")
    assert len(pair.refusals) == 1


def test_a_certificate_that_ran_out_is_refused_in_words() -> None:
    """Under TLS 1.3 the dialler learns it by an alert after its own handshake is over."""
    pair = Pair(6, edge_flaw=Flaw.EXPIRED)
    pair.settle()
    closed = pair.edge.closed
    assert closed is not None
    assert (closed.code, closed.by_peer) == (ErrorCode.AUTH, True)
    assert "certificate expired" in closed.reason
    assert len(pair.refusals) == 1
    assert "untrusted certificate" in pair.refusals[0][2]


def test_a_unix_listener_of_another_name_is_refused() -> None:
    pair = Pair(7, carrier="unix", expected=(DOMAIN, "hub-2"))
    pair.settle()
    assert pair.edge.closed is not None
    assert pair.edge.closed.reason == f"wanted {DOMAIN}/hub-2, found {DOMAIN}/{HUB}"


def test_a_listener_that_tells_nobody_refuses_all_the_same() -> None:
    pair = Pair(42, authorise=lambda peer: "no")
    pair.hub.context.on_refused = None
    pair.settle()
    assert pair.hub.session.refused
    assert pair.edge.closed == SessionClosed(ErrorCode.AUTH, "no", by_peer=True)
