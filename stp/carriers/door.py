"""Who may stand at a door for streams and has not shown yet who it is (protocol §11, R-11-3).

(1) At most `most` at once and `most_per_address` from one IPv4 /32 or IPv6 /64; one more from a crowded address is
    turned away unread.
(2) When all places are taken, whoever has stood there longest makes way, if that is over STALE_AFTER seconds: an
    honest peer needs a fraction of that, so 64 who only stand there do not lock it out.
(3) What is turned away is counted by reason.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from attrs import define

from stp.core.admission import ADDRESS_RATE, TOTAL_RATE, Admission, address_key

MAX_UNPROVEN: Final = 64
MAX_PER_ADDRESS: Final = 8
STALE_AFTER: Final = 2.0


@define
class DoorStatistics:
    """Counts since the start, and how many stand there now."""

    waiting: int = 0
    accepted: int = 0
    refused_full: int = 0
    """All places were taken, and nobody was stale."""
    refused_address: int = 0
    refused_rate: int = 0
    """More handshakes a second than one address, or all together, may begin (protocol §4, limits)."""
    evicted: int = 0
    """Had to make way (2)."""
    late: int = 0
    """Did not show who it is in time."""
    broken: int = 0
    """Went away, or said what is no TLS."""
    refused: int = 0
    """Showed who it is, and may not come in."""


@define(eq=False)
class Place:
    """Somebody at the door. `make_way` ends its attempt."""

    key: bytes
    since: float
    make_way: Callable[[], None] | None
    """None: it must not be sent away any more."""


class Door:
    """The places before it."""

    def __init__(
        self,
        *,
        most: int = MAX_UNPROVEN,
        most_per_address: int = MAX_PER_ADDRESS,
        stale_after: float = STALE_AFTER,
        address_rate: float = ADDRESS_RATE,
        total_rate: float = TOTAL_RATE,
    ) -> None:
        self.statistics = DoorStatistics()
        self._most = most
        self._per_address = most_per_address
        self._stale_after = stale_after
        self._admission = Admission(
            address_rate=address_rate, address_half_open=most_per_address, total_rate=total_rate
        )
        self._places: dict[Place, None] = {}  # the oldest first
        self._by_key: dict[bytes, int] = {}

    def enter(self, address: Any, now: float, make_way: Callable[[], None]) -> Place | None:
        """A place for a new connection, or None: turn it away. `leave` the place in the end, once."""
        counts, key = self.statistics, address_key(address)
        if self._by_key.get(key, 0) >= self._per_address:
            counts.refused_address += 1
            return None
        if len(self._places) >= self._most and not self._evict(now):
            counts.refused_full += 1
            return None
        if not self._admission.admit(key, now):
            counts.refused_rate += 1
            return None
        place = Place(key, now, make_way)
        self._places[place] = None
        self._by_key[key] = self._by_key.get(key, 0) + 1
        counts.accepted += 1
        counts.waiting = len(self._places)
        return place

    def leave(self, place: Place) -> None:
        """It has shown who it is, or is gone."""
        if place not in self._places:
            return
        del self._places[place]
        self._admission.on_over(place.key)
        left = self._by_key[place.key] - 1
        if left:
            self._by_key[place.key] = left
        else:
            del self._by_key[place.key]
        self.statistics.waiting = len(self._places)

    def _evict(self, now: float) -> bool:
        """(2)"""
        for place in self._places:
            if now - place.since < self._stale_after:
                return False
            if place.make_way is not None:
                make_way = place.make_way
                self.statistics.evicted += 1
                self.leave(place)
                make_way()
                return True
        return False


def unlimited() -> Door:
    """For a door that only this machine can reach: places are bounded, rates are not."""
    return Door(most_per_address=MAX_UNPROVEN, address_rate=1e6, total_rate=1e6)
