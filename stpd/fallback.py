"""The uplink's other way: TLS on TCP where UDP does not get through, and back to UDP (protocol §11, R-11-4).

(1) A session over UDP that took another local port, and heard nothing for SILENCE seconds after it, is left for one
    over TLS at once, for no answer comes there any more. What it had unanswered is sent again on the new one.
(2) On TLS, UDP is probed by bare handshakes (stp/racing.py), and moved back to as any session is: without a gap.
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable
from typing import Final, Protocol, TypeAlias

import structlog
import trio

from stp.core.errors import ErrorCode
from stp.core.verbs import AnySession
from stp.identity import Address
from stp.racing import PROBE_FIRST, PROBE_MOST, SILENCE, STABLE, TLS, UDP, ProbeBack
from stpd.peers import Peer

log = structlog.get_logger("stpd.uplink")

LOOK: Final = 1.0
"""Seconds between looks whether the uplink is on TLS."""

Dial: TypeAlias = Callable[[], Awaitable[AnySession]]
"""Starts a session. Raises OSError."""


class OtherWay(Protocol):
    """What there is beside a dial over UDP."""

    on_rebind: Callable[[], None]
    """Called when UDP took another local port."""

    async def tls(self, target: Address) -> AnySession:
        """Starts a session over TLS. Raises OSError."""

    async def probe(self, address: tuple[str, int], node: str) -> bool:
        """Is a handshake over UDP answered there?"""

    def remembered(self) -> str:
        """The carrier that worked last in this network: "udp", "tls" or ""."""

    def worked(self, carrier: str) -> None:
        """A session is up over it."""

    def wake(self) -> None:
        """Something was queued."""


class Uplinked(Protocol):
    """The uplink, as it is seen from here."""

    peer: Peer | None

    def may_move(self) -> bool: ...
    async def address_of(self, target: Address) -> tuple[str, int]: ...
    async def dial_beside(self, dial: Dial | None = None, *, carrier: str = "") -> bool: ...


class Fallback:
    """Watches the sessions of one attempt of the uplink, and moves them from carrier to carrier."""

    def __init__(
        self,
        way: OtherWay,
        *,
        jitter: Callable[[], float] = random.random,
        probe: float = PROBE_FIRST,
        stable: float = STABLE,
    ) -> None:
        """*probe*, *stable*: seconds, as in stp/racing.py."""
        self.way = way
        self._jitter = jitter
        self._probe = probe
        self._stable = stable
        self._rebound = trio.Event()
        way.on_rebind = self._on_rebind

    def _on_rebind(self) -> None:
        self._rebound.set()

    async def watch(self, uplink: Uplinked, target: Address) -> None:
        """(1) and (2), until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._leave_silent, uplink)
            nursery.start_soon(self._probe_back, uplink, target)

    async def _leave_silent(self, uplink: Uplinked) -> None:
        """(1)"""
        self._rebound = trio.Event()
        while True:
            await self._rebound.wait()
            self._rebound = trio.Event()
            peer = uplink.peer
            if peer is None or not uplink.may_move() or peer.session.carrier != UDP:
                continue
            heard = peer.session.statistics().datagrams_in
            await trio.sleep(SILENCE)
            if peer is not uplink.peer or peer.link.closed is not None:
                continue
            if peer.session.statistics().datagrams_in != heard:
                continue
            log.warning("uplink_silent", upstream=peer.node, carrier=UDP, action="trying TLS")
            try:
                moved = await uplink.dial_beside(carrier=TLS)
            except OSError as error:
                log.warning("uplink_no_other_way", upstream=peer.node, reason=error.strerror or str(error))
                continue
            if moved and peer.link.closed is None:
                peer.link.close(ErrorCode.NO_ERROR, "moved", trio.current_time())
                self.way.wake()

    async def _probe_back(self, uplink: Uplinked, target: Address) -> None:
        """(2)"""
        back: ProbeBack | None = None
        while True:
            await trio.sleep(LOOK if back is None else max(0.0, back.due - trio.current_time()))
            peer = uplink.peer
            if peer is None or not uplink.may_move() or peer.session.carrier != TLS:
                back = None
            elif back is None:
                back = ProbeBack(
                    self._jitter, first=self._probe, most=max(self._probe, PROBE_MOST), stable=self._stable
                )
                back.begin(trio.current_time())
            elif not await self._try_udp(uplink, target, back):
                back.failed(trio.current_time())

    async def _try_udp(self, uplink: Uplinked, target: Address, back: ProbeBack) -> bool:
        """One probe, and the move if it is time for it. Whether all of it went well."""
        try:
            if not await self.way.probe(await uplink.address_of(target), target.node):
                return False
            return not back.answered(trio.current_time()) or await uplink.dial_beside(carrier=UDP)
        except OSError:
            return False
