"""What the trio thread hands to the writer besides records, and what it hears back.

Changes gather until the next commit takes them. They are data, not calls: a commit that fails puts them back in
front of what came since (`Changes.add`), so that nothing is counted twice or lost.
"""

from __future__ import annotations

from attrs import Factory, define

from stpd.store.base import Append, Hop, Outcome, Quarantined, Stored
from stpd.store.tally import Tally


@define
class Move:
    """A cursor goes forward to `pos`; what became of the messages on the way."""

    pos: int = 0
    custody: int = 0
    filtered: int = 0
    expired: int = 0
    quarantined: int = 0
    dropped: int = 0

    def add(self, later: Move) -> None:
        self.pos = max(self.pos, later.pos)
        self.custody += later.custody
        self.filtered += later.filtered
        self.expired += later.expired
        self.quarantined += later.quarantined
        self.dropped += later.dropped

    @property
    def messages(self) -> int:
        return self.custody + self.filtered + self.expired + self.quarantined + self.dropped


@define
class Aside:
    """A record to keep aside: in the log it stays as it is."""

    entry: Quarantined
    record: bytes


@define
class Changes:
    tally: Tally = Factory(Tally)
    hops: list[tuple[str, Hop | None]] = Factory(list)
    """In order; None removes."""
    moves: dict[tuple[str, int], Move] = Factory(dict)
    sources: dict[bytes, str] = Factory(dict)
    asides: list[Aside] = Factory(list)
    damaged: list[Stored] = Factory(list)
    """Voids that a reader handed out in place of damaged rows."""

    def __bool__(self) -> bool:
        return bool(self.tally or self.hops or self.moves or self.sources or self.asides or self.damaged)

    def add(self, later: Changes) -> None:
        """Append what came later."""
        self.tally.add(later.tally)
        for name, hop in later.hops:
            self.change_hop(name, hop)
        for (name, lane), move in later.moves.items():
            self.move(name, lane, move)
        self.sources.update(later.sources)
        self.asides.extend(later.asides)
        self.damaged.extend(later.damaged)

    def change_hop(self, name: str, hop: Hop | None) -> None:
        """Add or change a hop; None removes it, and with it the moves that it made."""
        self.hops.append((name, hop))
        if hop is None:
            for key in [key for key in self.moves if key[0] == name]:
                del self.moves[key]

    def move(self, name: str, lane: int, move: Move) -> None:
        known = self.moves.get((name, lane))
        if known is None:
            self.moves[name, lane] = move
        else:
            known.add(move)


@define
class LaneState:
    """Where a lane stands, as its row in the table says."""

    lane: int
    last: int
    number: int
    """The last number given under the store's own source."""
    messages: int
    bytes: int
    base: int
    """The position before the first one kept."""
    base_messages: int
    base_bytes: int
    oldest_ms: int = 0
    """at_ms of the first record kept; 0 if there is none. Not in the table."""

    def copy(self) -> LaneState:  # copy.copy() takes ten times as long
        return LaneState(
            self.lane, self.last, self.number, self.messages, self.bytes, self.base, self.base_messages,
            self.base_bytes, self.oldest_ms,
        )  # fmt: skip


@define
class CursorState:
    """Where a hop stands on a lane, as its row in the table says."""

    hop: str
    lane: int
    pos: int
    messages: int
    """The lane's sum of messages at `pos`."""
    bytes: int
    start: int
    """The lane's sum of messages where the hop began."""
    custody: int = 0
    filtered: int = 0
    expired: int = 0
    quarantined: int = 0
    dropped: int = 0
    forced: int = 0
    """Messages in `dropped` that were taken from its reach; a late advance over them takes them back."""
    next_ms: int = 0
    """at_ms of the first record behind the cursor; 0 if level. Not in the table."""

    def copy(self) -> CursorState:
        return CursorState(
            self.hop, self.lane, self.pos, self.messages, self.bytes, self.start, self.custody, self.filtered,
            self.expired, self.quarantined, self.dropped, self.forced, self.next_ms,
        )  # fmt: skip


@define
class Result:
    """What one commit (or its failure) means for the trio thread."""

    decided: list[tuple[Append, Outcome]] = Factory(list)
    """In the order of append()."""
    stored: list[Stored] = Factory(list)
    tally: Tally = Factory(Tally)
    """What the records added to the ledger; not what came in as Changes."""
    lanes: list[LaneState] = Factory(list)
    cursors: list[CursorState] = Factory(list)
    """Those that changed."""
    hops: list[str] = Factory(list)
    """Names of the hops that were added, changed or removed, once per change."""
    quarantined: list[Quarantined] | None = None
    """All of it, if it changed."""
    forgotten: list[bytes] = Factory(list)
    """Sources that belong to nobody any more."""
    used: int = 0
    degraded: str = ""
    failed: bool = False
    """Everything queued up to now fails too."""
    ended: bool = False
    """The writer's last word."""
