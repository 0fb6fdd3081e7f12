"""Which class a record belongs to, and which lanes a set of filters can meet (protocol §10).

A batch's prefix decides; publishers batch per class, so it does. Where it cannot, the class of the lane that the
record travels on is taken: a keeper further up may have other rules, and a record never changes its lane.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Protocol

from attrs import define

from stp.control import ClassRule
from stp.topics import Decision, FilterSet

LANES: Final = (1, 2, 3, 4)
"""command, event, telemetry, bulk (protocol §10)."""

LANE_NAMES: Final = {1: "command", 2: "event", 3: "telemetry", 4: "bulk"}

CLASS_MEMO_LIMIT: Final = 8_192
"""(lane, prefix) pairs whose class is remembered; above it the memory is emptied and fills again."""


class ClassSettings(Protocol):
    """What this file needs of one ``[[class]]`` table. Times are seconds."""

    @property
    def name(self) -> str: ...
    @property
    def filters(self) -> Sequence[str]: ...
    @property
    def lane(self) -> int: ...
    @property
    def durability(self) -> str: ...
    @property
    def ttl(self) -> float: ...
    @property
    def linger(self) -> float: ...


@define
class MessageClass:
    """One class, compiled. ``ttl`` in seconds, 0 = none (R-10-25)."""

    name: str
    lane: int
    memory: bool
    ttl: float
    filters: FilterSet


class Classes:
    """All classes of this node, first match first."""

    def __init__(self, settings: Sequence[ClassSettings]) -> None:
        self._settings = tuple(settings)
        self.all = tuple(
            MessageClass(one.name, one.lane, one.durability == "memory", one.ttl, FilterSet(one.filters))
            for one in settings
        )
        self._by_lane = {lane: [one for one in self.all if one.lane == lane] for lane in LANES}
        self._fallback = {
            lane: MessageClass(LANE_NAMES[lane], lane, memory=False, ttl=0.0, filters=FilterSet(["#"]))
            for lane in LANES
        }
        self._memo: dict[tuple[int, str], MessageClass] = {}

    def of(self, lane: int, prefix: str) -> MessageClass:
        """The class of a record on *lane* with this common *prefix*. Never opens a batch; memoised (R-10-2).

        A class is met where all topics under the prefix match it; where none is met whole, the first durable one
        that may match is taken, and where none may, the lane's own. A memory class needs the whole prefix: what
        might belong to a durable class is kept.
        """
        key = (lane, prefix)
        known = self._memo.get(key)
        if known is None:
            if len(self._memo) >= CLASS_MEMO_LIMIT:
                self._memo.clear()
            known = self._memo[key] = self._find(lane, prefix)
        return known

    def announced(self) -> list[ClassRule]:
        """The rules as HELLO tells them to publishers, who sort and batch by them."""
        return [
            ClassRule(
                name=one.name,
                filters=tuple(one.filters),
                lane=one.lane,
                ttl_ms=round(one.ttl * 1000),
                linger_ms=round(one.linger * 1000),
                durability=one.durability,
            )
            for one in self._settings
        ]

    def _find(self, lane: int, prefix: str) -> MessageClass:
        maybe: MessageClass | None = None
        for one in self._by_lane[lane]:
            decision = one.filters.decide(prefix)
            if decision is Decision.ALL:
                return one
            if decision is Decision.OPEN and maybe is None and not one.memory:
                maybe = one
        return maybe or self._fallback[lane]
