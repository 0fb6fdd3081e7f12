"""docs/protocol.md and the tree agree.

(1) Every rule is cited by its number where the code keeps it, and in a test; §12.2 names those that are not kept yet.
(2) What §12.2 names exists. What it leaves out as a whole is not cited as kept; what it leaves out in part is, for
    the other part.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parent.parent
PROTOCOL: Final = ROOT / "docs" / "protocol.md"
RULE: Final = re.compile(r"\bR-\d+-\d+\b")
DEFINED: Final = re.compile(r"^\* \*\*(R-\d+-\d+)\*\*", re.MULTILINE)
RANGE: Final = re.compile(r"R-(\d+)-(\d+) to R-\1-(\d+)")
NO_TEST: Final = frozenset({"second"})
"""Directories below tests/ whose modules, but for their tests, are no tests of ours."""


@cache
def text() -> str:
    return PROTOCOL.read_text(encoding="utf-8")


def rules() -> list[str]:
    return DEFINED.findall(text())


def left_out() -> set[str]:
    """The rules in the table of §12.2, but for those that are left out in part."""
    return {rule for rule, whole in table().items() if whole}


def table() -> dict[str, bool]:
    """§12.2: rule -> whether all of it is left out."""
    _, _, section = text().partition("\n### 12.2 ")
    section, _, _ = section.partition("\n## ")
    found: dict[str, bool] = {}
    for row in re.findall(r"^\| ([^|]+) \|", section, re.MULTILINE):
        named = set(RULE.findall(row))
        for chapter, first, last in RANGE.findall(row):
            named.update(f"R-{chapter}-{number}" for number in range(int(first), int(last) + 1))
        found.update(dict.fromkeys(named, "in part" not in row))
    return found


@cache
def cited(*tops: str) -> dict[str, list[str]]:
    """Rule -> files that cite it by its number."""
    found: dict[str, list[str]] = {}
    for top in tops:
        for path in sorted((ROOT / top).rglob("*.py")):
            if path.parent.name in NO_TEST and not path.name.startswith("test_"):
                continue
            for rule in set(RULE.findall(path.read_text(encoding="utf-8"))):
                found.setdefault(rule, []).append(str(path.relative_to(ROOT)))
    return found


def in_code() -> dict[str, list[str]]:
    return cited("stp", "stpd", "stpctl")


def in_tests() -> dict[str, list[str]]:
    return cited("tests")


def test_every_rule_has_code() -> None:
    """(1)"""
    assert not [rule for rule in rules() if rule not in in_code() and rule not in left_out()]


def test_every_rule_has_a_test() -> None:
    """(1)"""
    assert not [rule for rule in rules() if rule not in in_tests() and rule not in left_out()]


def test_what_is_left_out_exists() -> None:
    """(2)"""
    assert table(), "§12.2 is not read as it should be"
    assert table().keys() <= set(rules())


def test_what_is_left_out_is_not_cited_as_kept() -> None:
    """(2): with code and a test it is kept, and its line is to go, or to say *in part*."""
    assert {
        rule: in_code()[rule] + in_tests()[rule]
        for rule in left_out()
        if rule in in_code() and rule in in_tests()
    } == {}
