"""The ends of a daemon's sessions: certificates that ran out, or were revoked here or above (protocol §9, R-9-5).

(1) `check`, once a second, ends what has expired, and what was revoked since it last looked: CLOSE EXPIRED, REVOKED.
(2) A hub tells the keepers below it which certificates it revoked: all that still count when they connect, and
    each new one at once (REVOKED, R-9-5). A gateway keeps the list across restarts and passes it on in turn.
(3) What a keeper is told is bounded: the registry keeps the serials that count longest. What cannot be written is
    kept in memory and tried again; it is in force all the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import islice
from typing import Final

import structlog
import trio

from stp.control import MAX_SERIALS, Revoked
from stp.core.errors import ErrorCode
from stp.lifetimes import Expiry
from stpd.keys import NodeRegistry
from stpd.peers import KEEPER_KINDS, Peer

log = structlog.get_logger("stpd.lifetimes")

SAVE_RETRY: Final = 30.0
"""Seconds between attempts to write what was learned."""


class Lifetimes:
    """Watches the sessions of one daemon."""

    def __init__(
        self, registry: NodeRegistry, expiry: Expiry, *, now: Callable[[], float] = trio.current_time
    ) -> None:
        self.expired = 0
        self.revoked = 0
        """Sessions ended since the start."""
        self._registry = registry
        self._expiry = expiry
        self._now = now
        self._checked = -1
        self._told: dict[int, int] = {}
        """By session: which state of the registry its keeper knows."""
        self._save_at = 0.0

    def check(self, peers: Iterable[Peer]) -> None:
        """(1), (2)."""
        now, generation = self._now(), self._registry.generation
        changed, self._checked = generation != self._checked, generation
        for peer in peers:
            link = peer.link
            if link.closed is not None or peer.session.peer is None:
                continue
            if self._expiry.over(link):
                self.expired += 1
                link.close(ErrorCode.EXPIRED, f"the certificate of {peer.node} has expired", now)
            elif changed and self._is_revoked(peer):
                self.revoked += 1
                link.close(ErrorCode.REVOKED, f"the certificate of {peer.node} was revoked", now)
            elif link.peer is not None and link.peer.kind in KEEPER_KINDS and peer.upstream is None:
                self._tell(peer, generation)

    def _is_revoked(self, peer: Peer) -> bool:
        identity = peer.session.peer
        return identity is not None and self._registry.is_revoked(identity.serial)

    def _tell(self, peer: Peer, generation: int) -> None:
        """A keeper below hears what it does not know yet (2)."""
        if peer.told_revoked == generation:
            return
        serials = self._registry.revoked_since(peer.told_revoked)
        peer.told_revoked = generation
        pairs = iter(serials.items())
        while part := dict(islice(pairs, MAX_SERIALS)):
            peer.link.send(Revoked(part))

    def learn(self, serials: dict[int, int]) -> None:
        """An upstream says which certificates are revoked. In force at once; the next `save` writes it (3)."""
        if self._registry.learn(serials):
            log.info("revocations_learned", serials=len(serials))

    async def save(self) -> None:
        """Write what was learned and is not on disk yet; call it once a second."""
        now = self._now()
        if not self._registry.unsaved or now < self._save_at:
            return
        try:
            await trio.to_thread.run_sync(self._registry.save)
        except OSError as error:
            self._save_at = now + SAVE_RETRY
            log.warning("revocations_not_saved", reason=error.strerror or str(error), again_in_s=SAVE_RETRY)
