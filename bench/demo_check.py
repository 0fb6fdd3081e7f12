"""What the demo's subscriber counts: lost, doubled, out of order. It asks nobody."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

from attrs import Factory, define


@define
class Counter:
    """One device's numbered messages, from both ends."""

    sent: int = 0
    seen: set[int] = Factory(set)
    doubled: int = 0
    reordered: int = 0
    highest: int = 0
    text: str = ""
    shown: int = 0

    def next(self) -> int:
        """The number for the next message."""
        self.sent += 1
        return self.sent

    def arrived(self, number: int, text: str = "") -> None:
        if number in self.seen:
            self.doubled += 1
            return
        self.reordered += number < self.highest
        self.seen.add(number)
        self.highest = max(self.highest, number)
        self.text = text

    @property
    def lost(self) -> int:
        return self.sent - len(self.seen)

    def cell(self) -> str:
        """What came since the last look."""
        came, self.shown = len(self.seen) - self.shown, len(self.seen)
        if not came:
            return "-"
        return f"{self.text}  [{self.highest}]" + (f" +{came}" if came > 2 else "")


@define
class Bulk:
    """A file in numbered pieces: eight bytes of number, then content."""

    path: Path
    limit: int
    chunk: int
    sent: int = 0
    total: int = 0
    """Pieces there are, once the file is being read."""
    seen: dict[int, bytes] = Factory(dict)
    doubled: int = 0
    reordered: int = 0
    highest: int = 0
    digest: str = ""

    def pieces(self) -> Iterator[bytes]:
        content = self.path.read_bytes()[: self.limit]
        self.digest = hashlib.sha256(content).hexdigest()
        self.total = -(-len(content) // self.chunk)
        for number in range(1, self.total + 1):
            self.sent = number
            yield number.to_bytes(8, "big") + content[(number - 1) * self.chunk : number * self.chunk]

    def arrived(self, payload: bytes) -> None:
        number = int.from_bytes(payload[:8], "big")
        if number in self.seen:
            self.doubled += 1
            return
        self.reordered += number < self.highest
        self.highest = max(self.highest, number)
        self.seen[number] = payload[8:]

    def complete(self) -> bool:
        return self.total > 0 and len(self.seen) == self.total

    def intact(self) -> bool:
        joined = hashlib.sha256()
        for number in sorted(self.seen):
            joined.update(self.seen[number])
        return joined.hexdigest() == self.digest

    def verdict(self) -> str:
        return f"SHA-256 {self.digest[:12]}… {'as sent' if self.intact() else 'DIFFERS'}"

    def cell(self) -> str:
        if not self.total:
            return "-"
        return f"{sum(map(len, self.seen.values())) / 1e6:.1f} MB {100 * len(self.seen) // self.total:>3} %"


@define
class Tally:
    """All counters, by topic."""

    counters: dict[str, Counter]

    def complete(self) -> bool:
        return all(not counter.lost for counter in self.counters.values())

    def behind(self) -> int:
        """Messages on their way, beyond the one that always is."""
        return sum(max(counter.lost - 1, 0) for counter in self.counters.values())

    def totals(self, bulk: Bulk) -> tuple[int, int, int]:
        """Lost, doubled, reordered, over everything."""
        every = [*self.counters.values(), bulk]
        lost = sum(counter.lost for counter in self.counters.values()) + bulk.sent - len(bulk.seen)
        return lost, sum(one.doubled for one in every), sum(one.reordered for one in every)
