"""stpd.localnames and stpd.doors: which node a local user is, and which doors are one (R-11-5)."""

from __future__ import annotations

import os
import pwd

import pytest

from stp.carriers.unix import Credentials
from stpd.doors import same_door
from stpd.localnames import group_id, name_of, user_name
from stpd.schema import LocalName, UnixConfig

NOBODY = 4_000_000_000
ROOT = Credentials(1, 0, 0, frozenset({0, 5}))


def test_by_default_a_user_is_the_node_of_that_name() -> None:
    assert name_of(ROOT, UnixConfig().map, "gw-1") == "root"
    mine = pwd.getpwuid(os.getuid()).pw_name
    assert user_name(os.getuid()) == mine


def test_a_user_without_a_name_is_a_number() -> None:
    assert user_name(NOBODY) == str(NOBODY)
    assert name_of(Credentials(1, NOBODY, 1), UnixConfig().map, "gw-1") == str(NOBODY)


@pytest.mark.parametrize(
    ("rules", "name"),
    [
        ([LocalName(node="a", user="root"), LocalName(node="b")], "a"),
        ([LocalName(node="a", user="0"), LocalName(node="b")], "a"),
        ([LocalName(node="a", user="somebody"), LocalName(node="b")], "b"),
        ([LocalName(node="{user}.local", group="5")], "root.local"),
        ([LocalName(node="a", group="6")], None),
        ([LocalName(node="a", group="there-is-no-such-group")], None),
        ([LocalName(node="Not a name")], None),
        ([LocalName(node="gw-1")], None),
        ([], None),
    ],
)
def test_the_first_rule_that_fits_decides(rules: list[LocalName], name: str | None) -> None:
    """(1), (2): nobody becomes this node itself."""
    assert name_of(ROOT, rules, "gw-1") == name


def test_groups_are_names_or_numbers() -> None:
    assert group_id("") == -1
    assert group_id("42") == 42
    assert group_id("root") == 0
    with pytest.raises(OSError, match=r"listen\.unix\.group"):
        group_id("there-is-no-such-group")


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("0.0.0.0:8443", "0.0.0.0:8443", True),
        ("[::]:8443", "0.0.0.0:8443", True),
        ("127.0.0.1:8443", "0.0.0.0:8443", True),
        ("127.0.0.1:8443", "192.0.2.1:8443", False),
        ("127.0.0.1:8443", "127.0.0.1:8444", False),
        ("127.0.0.1:0", "127.0.0.1:0", False),
        ("127.0.0.1:8443", "", False),
    ],
)
def test_which_addresses_are_one_door(one: str, other: str, same: bool) -> None:
    """R-11-6: the enrolment service and TLS sessions share a port."""
    assert same_door(one, other) is same
