"""stp.core.ranges against a plain set of ints."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stp.core.ranges import RangeSet

steps = st.lists(
    st.tuples(st.sampled_from(["add", "remove", "below"]), st.integers(0, 60), st.integers(0, 12)),
    max_size=40,
)


def spans(numbers: set[int]) -> list[tuple[int, int]]:
    found: list[tuple[int, int]] = []
    for n in sorted(numbers):
        if found and found[-1][1] == n:
            found[-1] = (found[-1][0], n + 1)
        else:
            found.append((n, n + 1))
    return found


@given(steps)
def test_it_is_a_set(done: list[tuple[str, int, int]]) -> None:
    """Promise (1), after every step."""
    ranges, model = RangeSet(), set[int]()
    for verb, start, length in done:
        if verb == "add":
            ranges.add(start, start + length)
            model |= set(range(start, start + length))
        elif verb == "remove":
            ranges.remove(start, start + length)
            model -= set(range(start, start + length))
        else:
            ranges.discard_below(start)
            model = {n for n in model if n >= start}
        assert ranges.pairs() == spans(model)
        assert list(ranges) == ranges.pairs()
        assert ranges.size() == len(model)
        assert (len(ranges), bool(ranges)) == (len(spans(model)), bool(model))
        assert all((n in ranges) == (n in model) for n in range(75))
        if model:
            assert (ranges.first(), ranges.last()) == (spans(model)[0], spans(model)[-1])


def test_one_number_is_enough() -> None:
    ranges = RangeSet()
    for n in (3, 1, 2, 9):
        ranges.add(n)
    assert ranges == RangeSet([(1, 4), (9, 10)])
    assert ranges != RangeSet([(1, 4)])
    assert ranges != [(1, 4), (9, 10)]
    assert repr(ranges) == "RangeSet([(1, 4), (9, 10)])"
    assert ranges.pop_first() == (1, 4)
    ranges.clear()
    assert not ranges


def test_the_lowest_range_is_forgotten_and_counted() -> None:
    """Promise (3)."""
    ranges = RangeSet(max_ranges=3)
    for n in (10, 20, 30, 40, 50):
        ranges.add(n, n + 4)
    assert ranges.pairs() == [(30, 34), (40, 44), (50, 54)]
    assert ranges.forgotten == 8
    ranges.add(5)
    assert ranges.pairs() == [(30, 34), (40, 44), (50, 54)]


def test_it_is_no_key() -> None:
    with pytest.raises(TypeError):
        hash(RangeSet())
