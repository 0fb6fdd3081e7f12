"""The ledger: where every message went, in plain sums that must balance.

Messages are counted at three places, each in the transaction of the data:

(1) door, per (peer, class):  received = accepted + repeats + refused + corrupt
(2) node, per class:          accepted + originated = stored + live only + no taker
(3) hop, per (hop, lane):     routed = in custody + behind + gone, gone by reason: expired, dropped,
                              filtered, quarantined, crash. What is sent and not yet receipted, or was
                              refused and waits, is still behind: a cursor moves when its fate is decided.

A hop is counted per lane, not per class: a record is a lane's unit, and classes share lanes.

`unexplained` sums what the equations leave over, by magnitude, so that two mistakes never cancel. It is 0, or
it is an incident. What is received and not yet decided (queued for the next commit) is in no sum; the caller
may add it as `pending` for people to see.
"""

from __future__ import annotations

from attrs import Factory, asdict, define


@define
class Door:
    """What came in from one peer in one class, in messages."""

    peer: str
    class_name: str
    received: int = 0
    accepted: int = 0
    repeats: int = 0
    refused: int = 0
    corrupt: int = 0
    pending: int = 0
    """Received and not decided yet; not in `received`. Added by the caller."""

    @property
    def unexplained(self) -> int:
        """Equation (1): positive if messages vanished, negative if they were invented."""
        return self.received - self.accepted - self.repeats - self.refused - self.corrupt

    @property
    def equation(self) -> str:
        return (
            f"door {self.peer}/{self.class_name}: received {self.received} = accepted {self.accepted}"
            f" + repeats {self.repeats} + refused {self.refused} + corrupt {self.corrupt}"
        )


@define
class Node:
    """What this node did with one class, in messages."""

    class_name: str
    accepted: int = 0
    originated: int = 0
    stored: int = 0
    live_only: int = 0
    no_taker: int = 0

    @property
    def unexplained(self) -> int:
        """Equation (2)."""
        return self.accepted + self.originated - self.stored - self.live_only - self.no_taker

    @property
    def equation(self) -> str:
        return (
            f"node {self.class_name}: accepted {self.accepted} + originated {self.originated}"
            f" = stored {self.stored} + live only {self.live_only} + no taker {self.no_taker}"
        )


@define
class HopLane:
    """What became of one lane's messages on their way to one hop, since the hop was added."""

    hop: str
    lane: int
    routed: int = 0
    custody: int = 0
    behind: int = 0
    expired: int = 0
    dropped: int = 0
    filtered: int = 0
    quarantined: int = 0
    crash: int = 0

    @property
    def gone(self) -> int:
        return self.expired + self.dropped + self.filtered + self.quarantined + self.crash

    @property
    def unexplained(self) -> int:
        """Equation (3)."""
        return self.routed - self.custody - self.behind - self.gone

    @property
    def equation(self) -> str:
        return (
            f"hop {self.hop}/lane {self.lane}: routed {self.routed} = custody {self.custody}"
            f" + behind {self.behind} + expired {self.expired} + dropped {self.dropped}"
            f" + filtered {self.filtered} + quarantined {self.quarantined} + crash {self.crash}"
        )


@define
class Ledger:
    """A snapshot; changing it changes nothing but itself."""

    doors: list[Door] = Factory(list)
    nodes: list[Node] = Factory(list)
    hops: list[HopLane] = Factory(list)

    @property
    def unexplained(self) -> int:
        """Messages that no equation accounts for. 0, or an incident."""
        return sum(abs(entry.unexplained) for entry in self._entries())

    def _entries(self) -> list[Door | Node | HopLane]:
        return [*self.doors, *self.nodes, *self.hops]

    def explain(self) -> list[str]:
        """One line per equation that does not balance, for people; empty when all do."""
        return [
            f"{entry.equation} ({entry.unexplained:+d})" for entry in self._entries() if entry.unexplained
        ]

    def to_dict(self) -> dict[str, object]:
        """Plain JSON: the entries as they stand, with their and the total `unexplained`."""
        return {
            "unexplained": self.unexplained,
            "doors": [{**asdict(door), "unexplained": door.unexplained} for door in self.doors],
            "nodes": [{**asdict(node), "unexplained": node.unexplained} for node in self.nodes],
            "hops": [{**asdict(hop), "unexplained": hop.unexplained} for hop in self.hops],
        }
