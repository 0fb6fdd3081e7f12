"""Access rules: promises of stpd/access.py."""

from __future__ import annotations

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stp.batch import encode_batch
from stp.records import encode_record, encode_void, read_record
from stp.topics import matches
from stpd.access import PREFIX_MEMO_LIMIT, Access, Grant, covers
from stpd.schema import AccessRule

NODE = bytes(16)
SOURCE = os.urandom(16)


def record(*batches: list[str]) -> bytes:
    encoded = [
        encode_batch(topics, [b"x"] * len(topics), time_ms=1, publisher=NODE, run=1, sequence=number)
        for number, topics in enumerate(batches, 1)
    ]
    return encode_record(3, SOURCE, 1, encoded)


def refusal(grant: Grant, data: bytes) -> str | None:
    return grant.refusal_to_publish(data, read_record(data))


RULES = [
    AccessRule(
        name="sensors", nodes=("sensor-*",), publish=("site-a/{node}/#",), subscribe=("cmd/{node}/#",)
    ),
    AccessRule(
        name="gateways", role="gateway", publish=("#",), subscribe=("cmd/{node}/#",), speaks_for=("edge-*",)
    ),
]


def test_default_deny_says_that_no_rule_names_the_node() -> None:
    """Promise (2)."""
    assert (
        refusal(Access(RULES).grant("stranger"), record(["a/b"]))
        == "default deny: no access rule names stranger"
    )


def test_refusal_names_the_rule() -> None:
    """Promise (2)."""
    grant = Access(RULES).grant("sensor-1")
    assert refusal(grant, record(["site-a/sensor-1/temp"])) is None
    said = refusal(grant, record(["site-b/temp"]))
    assert said == "rule sensors: sensor-1 may not publish site-b/temp"


def test_one_denied_topic_refuses_the_whole_record() -> None:
    """Promise (1): the prefix does not decide, so every topic is asked (R-10-31)."""
    grant = Access(RULES).grant("sensor-1")
    mixed = record(["site-a/sensor-1/t", "site-a/sensor-2/t"])
    said = refusal(grant, mixed)
    assert said is not None
    assert "site-a/sensor-2/t" in said
    two_batches = record(["site-a/sensor-1/t"], ["site-a/sensor-3/t"])
    said = refusal(grant, two_batches)
    assert said is not None
    assert "sensor-3" in said


def test_role_comes_from_the_register_and_may_change() -> None:
    """Promise (3, R-4-9)."""
    roles: dict[str, str] = {}
    access = Access(RULES, role_of=roles.get)
    assert refusal(access.grant("factory7"), record(["x/y"])) is not None
    roles["factory7"] = "gateway"
    assert refusal(access.grant("factory7"), record(["x/y"])) is None


def test_void_carries_nothing_and_passes() -> None:
    data = encode_void(3, SOURCE, 5, 9, 1, 4)
    assert refusal(Access([]).grant("anyone"), data) is None


def test_subscribe_needs_a_filter_within_the_grant() -> None:
    grant = Access(RULES).grant("sensor-1")
    assert grant.refusal_to_subscribe(["cmd/sensor-1/light"]) is None
    assert grant.refusal_to_subscribe(["cmd/sensor-1/#"]) is None
    said = grant.refusal_to_subscribe(["cmd/sensor-1/#", "cmd/+/light"])
    assert said == "rule sensors: sensor-1 may not subscribe cmd/+/light"


def test_speaks_for() -> None:
    """R-10-27."""
    grant = Access(RULES, role_of=lambda node: "gateway").grant("regional")
    assert grant.may_speak_for("regional")
    assert grant.may_speak_for("edge-12")
    assert not grant.may_speak_for("hub-1")
    assert not Access(RULES).grant("sensor-1").may_speak_for("sensor-2")


def test_memo_is_bounded() -> None:
    grant = Access(RULES).grant("sensor-1")
    for number in range(PREFIX_MEMO_LIMIT + 10):
        refusal(grant, record([f"site-a/sensor-1/{number}"]))
    assert len(grant._memo) <= PREFIX_MEMO_LIMIT


@pytest.mark.parametrize(
    ("allowed", "wanted", "yes"),
    [
        ("#", "a/b", True),
        ("#", "#", True),
        ("#", "$inbox/x", False),
        ("+/b", "$x/b", False),
        ("$inbox/#", "$inbox/x/#", True),
        ("a/#", "a", True),
        ("a/#", "a/#", True),
        ("a/+", "a/#", False),
        ("a/+", "a/+", True),
        ("a/b", "a/+", False),
        ("a/+/c", "a/b/c", True),
        ("a/b", "a/b/#", False),
        ("a/b/c", "a/b", False),
    ],
)
def test_covers(allowed: str, wanted: str, yes: bool) -> None:
    assert covers(allowed, wanted) is yes


levels = st.lists(st.sampled_from(["a", "b", "+", "$s"]), min_size=1, max_size=4)


@given(
    levels,
    st.booleans(),
    levels,
    st.booleans(),
    st.lists(st.sampled_from(["a", "b", "$s"]), min_size=1, max_size=4),
)
def test_what_is_covered_never_matches_more(
    have: list[str], have_rest: bool, want: list[str], want_rest: bool, topic: list[str]
) -> None:
    """Safety: a filter that is let through never reads a topic outside the grant."""
    allowed = "/".join([*have, "#"] if have_rest else have)
    wanted = "/".join([*want, "#"] if want_rest else want)
    name = "/".join(topic)
    if covers(allowed, wanted) and matches(wanted, name):
        assert matches(allowed, name)
