"""Classes by lane and prefix."""

from __future__ import annotations

from stpd.router import CLASS_MEMO_LIMIT, Classes
from stpd.schema import BUILT_IN_CLASSES, ClassConfig


def test_built_in_classes_take_every_topic() -> None:
    classes = Classes(BUILT_IN_CLASSES)
    assert classes.of(1, "cmd/edge-1/light").name == "command"
    assert classes.of(3, "site-a/kitchen/").name == "telemetry"
    assert classes.of(4, "site-a/").name == "bulk"
    assert classes.of(2, "").name == "event"


def test_a_record_never_leaves_its_lane() -> None:
    """A command's topic on the telemetry lane is telemetry: the lane was decided by its publisher's keeper.

    R-10-2.
    """
    assert Classes(BUILT_IN_CLASSES).of(3, "cmd/x/y").lane == 3


def test_memory_needs_the_whole_prefix() -> None:
    """What might belong to a durable class is kept (R-10-30)."""
    live = ClassConfig(name="live", filters=("site/live/#",), lane=3, durability="memory")
    classes = Classes([live, *BUILT_IN_CLASSES])
    assert classes.of(3, "site/live/").memory
    assert not classes.of(3, "site/").memory
    assert not classes.of(3, "").memory


def test_a_lane_without_a_class_is_durable() -> None:
    lane = Classes([]).of(2, "x")
    assert (lane.name, lane.memory) == ("event", False)


def test_announced_rules_carry_milliseconds() -> None:
    rules = Classes(BUILT_IN_CLASSES).announced()
    assert {rule.name: rule.linger_ms for rule in rules}["telemetry"] == 20
    assert {rule.name: rule.ttl_ms for rule in rules}["command"] == 3_600_000


def test_memo_is_bounded() -> None:
    classes = Classes(BUILT_IN_CLASSES)
    for number in range(CLASS_MEMO_LIMIT + 5):
        classes.of(3, f"p{number}/")
    assert len(classes._memo) <= CLASS_MEMO_LIMIT
