"""Sets of whole numbers kept as half-open ranges.

(1) Ranges are ascending, never empty, never touch.
(2) Adding at or above the top costs O(1): packet numbers come that way.
(3) At most `max_ranges` ranges are kept. Above it the lowest is forgotten and counted in `forgotten`.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator


class RangeSet:
    """A set of ints as ascending (start, stop) pairs, `start <= n < stop`.

    `max_ranges` bounds memory against a peer that leaves gaps on purpose; 0 means unbounded.
    """

    __slots__ = ("_starts", "_stops", "forgotten", "max_ranges")

    def __init__(self, pairs: Iterable[tuple[int, int]] = (), *, max_ranges: int = 0) -> None:
        self._starts: list[int] = []
        self._stops: list[int] = []
        self.max_ranges = max_ranges
        self.forgotten = 0
        for start, stop in pairs:
            self.add(start, stop)

    def add(self, start: int, stop: int = -1) -> None:
        """Add start..stop-1; without `stop`, the one number `start`. An empty range adds nothing."""
        if stop < 0:
            stop = start + 1
        if stop <= start:
            return
        starts, stops = self._starts, self._stops
        if not stops or start > stops[-1]:
            starts.append(start)
            stops.append(stop)
        elif start >= starts[-1]:
            if stop > stops[-1]:
                stops[-1] = stop
            return
        else:
            first = bisect_left(stops, start)
            last = bisect_right(starts, stop)
            if first < last:
                start = min(start, starts[first])
                stop = max(stop, stops[last - 1])
            starts[first:last] = [start]
            stops[first:last] = [stop]
        if self.max_ranges and len(starts) > self.max_ranges:
            self.forgotten += stops[0] - starts[0]
            del starts[0], stops[0]

    def discard_below(self, limit: int) -> None:
        """Forget every number below `limit`."""
        starts, stops = self._starts, self._stops
        gone = bisect_right(stops, limit)
        del starts[:gone], stops[:gone]
        if starts and starts[0] < limit:
            starts[0] = limit

    def remove(self, start: int, stop: int) -> None:
        """Forget start..stop-1."""
        if stop <= start:
            return
        starts, stops = self._starts, self._stops
        first = bisect_right(stops, start)
        last = bisect_left(starts, stop)
        if first >= last:
            return
        left, right = starts[first], stops[last - 1]
        keep = [(a, b) for a, b in ((left, min(start, right)), (max(stop, left), right)) if a < b]
        starts[first:last] = [a for a, _ in keep]
        stops[first:last] = [b for _, b in keep]

    def pop_first(self) -> tuple[int, int]:
        """Take the lowest range out. IndexError if there is none."""
        return self._starts.pop(0), self._stops.pop(0)

    def first(self) -> tuple[int, int]:
        """The lowest range. IndexError if there is none."""
        return self._starts[0], self._stops[0]

    def last(self) -> tuple[int, int]:
        """The highest range. IndexError if there is none."""
        return self._starts[-1], self._stops[-1]

    def pairs(self) -> list[tuple[int, int]]:
        """All ranges, ascending."""
        return list(zip(self._starts, self._stops, strict=True))

    def size(self) -> int:
        """How many numbers are in the set."""
        return sum(self._stops) - sum(self._starts)

    def clear(self) -> None:
        self._starts.clear()
        self._stops.clear()

    def __contains__(self, number: int) -> bool:
        index = bisect_right(self._starts, number) - 1
        return index >= 0 and number < self._stops[index]

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return iter(self.pairs())

    def __len__(self) -> int:
        """The number of ranges, not of numbers."""
        return len(self._starts)

    def __bool__(self) -> bool:
        return bool(self._starts)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, RangeSet):
            return NotImplemented
        return self._starts == other._starts and self._stops == other._stops

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"RangeSet({self.pairs()!r})"
