"""Topics and filters: grammar, and what may be decided by a prefix (promises of stp/topics.py)."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stp.topics import (
    MAX_TOPIC,
    MEMO,
    Decision,
    FilterSet,
    TopicError,
    check_filter,
    check_topic,
    common_prefix,
    matches,
    prefix_decides,
)

quick = settings(deadline=None, max_examples=150)

# Few words, so that filters and topics meet; with empty levels and `$` where they make a difference.
words = st.sampled_from(["", "a", "b", "ab", "$", "$sys", "é", "."])
topics = st.lists(words, min_size=1, max_size=5).map("/".join).filter(bool)
filters = st.builds(
    lambda levels, tail: "/".join([*levels, *tail]),
    st.lists(words | st.just("+"), max_size=4),
    st.sampled_from([[], ["#"], ["+"], ["a"]]),
).filter(bool)


@pytest.mark.parametrize(
    "topic", ["a", "/", "a//b", "$sys/x", "é/ü", "x" * MAX_TOPIC, "é" * (MAX_TOPIC // 2)]
)
def test_good_topics(topic: str) -> None:
    check_topic(topic)
    check_filter(topic)


@pytest.mark.parametrize(
    "topic", ["", "a/+", "#", "a#b", "a\0b", "x" * (MAX_TOPIC + 1), "é" * (MAX_TOPIC // 2 + 1), "\ud800"]
)
def test_bad_topics(topic: str) -> None:
    """(1, R-10-1)"""
    with pytest.raises(TopicError):
        check_topic(topic)


@pytest.mark.parametrize(
    "filter", ["", "a+", "+a/b", "#/a", "a/#/b", "##", "a/b#", "a\0", "\udfff", "x" * 513]
)
def test_bad_filters(filter: str) -> None:
    """(1)"""
    with pytest.raises(TopicError):
        check_filter(filter)
    with pytest.raises(TopicError):
        FilterSet(["a", filter])


@given(filters, topics)
@quick
def test_both_matchers_agree(filter: str, topic: str) -> None:
    assert FilterSet([filter]).matches(topic) is matches(filter, topic)


@given(st.lists(filters, max_size=5), topics)
@quick
def test_a_set_matches_what_any_filter_matches(chosen: list[str], topic: str) -> None:
    assert FilterSet(chosen).matches(topic) is any(matches(one, topic) for one in chosen)


@given(filters, st.lists(topics, min_size=1, max_size=6))
@quick
def test_a_decision_holds_for_every_topic(filter: str, chosen: list[str]) -> None:
    """(3, R-10-30)"""
    prefix = common_prefix(chosen)
    answer = prefix_decides(filter, prefix)
    found = {matches(filter, topic) for topic in chosen}
    if answer is not Decision.OPEN:
        assert found == {answer is Decision.ALL}


@given(st.lists(filters, max_size=4), topics)
@quick
def test_a_set_decides_as_its_filters_do(chosen: list[str], topic: str) -> None:
    """(3)"""
    prefix = topic[: topic.rfind("/") + 1]
    answers = [prefix_decides(one, prefix) for one in chosen]
    expected = (
        Decision.ALL
        if Decision.ALL in answers
        else Decision.OPEN
        if Decision.OPEN in answers
        else Decision.NONE
    )
    both = FilterSet(chosen)
    assert both.decide(prefix) is expected
    assert both.decide(prefix) is expected  # from memory


@given(filters, topics)
@quick
def test_a_whole_topic_is_always_decided(filter: str, topic: str) -> None:
    """(4)"""
    if not topic.endswith("/"):
        assert (prefix_decides(filter, topic) is Decision.ALL) is matches(filter, topic)


def test_no_leading_wildcard_reaches_dollar_topics() -> None:
    """(2, R-10-1)"""
    for filter in ("#", "+/a", "+/#", "+"):
        assert not matches(filter, "$sys/a")
        assert not matches(filter, "$sys")
        assert prefix_decides(filter, "$sys/") is Decision.NONE
    assert prefix_decides("#", "") is Decision.OPEN
    assert prefix_decides("a/+/#", "a/$x/") is Decision.ALL


def test_decisions_are_remembered_within_bounds() -> None:
    wanted = FilterSet(["a/#"])
    for n in range(3 * MEMO):
        assert wanted.decide(f"a/{n}/") is Decision.ALL
        assert len(wanted._memo) <= MEMO


def test_an_empty_set_is_false_and_matches_nothing() -> None:
    nothing = FilterSet([])
    assert not nothing
    assert not nothing.matches("a")
    assert nothing.decide("a/") is Decision.NONE
    assert FilterSet(["a", "a"]).filters == ("a",)


@given(st.lists(topics, max_size=8))
@quick
def test_common_prefix(chosen: list[str]) -> None:
    """R-10-5."""
    prefix = common_prefix(chosen)
    assert all(topic.startswith(prefix) for topic in chosen)
    if len(set(chosen)) == 1:
        assert prefix == chosen[0]
    elif chosen:
        assert not prefix or prefix.endswith("/")
        longer = {topic[: topic.find("/", len(prefix)) + 1] for topic in chosen}
        assert len(longer) > 1 or longer == {""}  # nothing longer is shared
