"""Topics and filters: MQTT's grammar, and what a prefix says about a filter (protocol §10). Sans-IO.

(1) A topic is 1..512 bytes of UTF-8 without NUL, `+` and `#`; a filter is as long and has its wildcards alone
    in a level, `#` only in the last.
(2) A topic that begins with `$` matches no filter whose first level is a wildcard.
(3) `Decision.ALL` and `Decision.NONE` hold for every topic the prefix can stand for; where one topic could
    make a difference the answer is OPEN. `FilterSet` answers as its filters would one by one, or OPEN.
(4) A prefix that is not empty and does not end with '/' is a whole topic. `stp.batch` and `stp.records`
    refuse bytes that say otherwise, so that access may rest on a prefix.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from enum import IntEnum
from typing import AnyStr, Final

from attrs import define, field

from stp.core.errors import MessageError

MAX_TOPIC: Final = 512
"""Bytes of UTF-8 in a topic or a filter (protocol §10)."""

MEMO: Final = 1024
"""Decisions a FilterSet remembers; it forgets all of them when there are more."""


class TopicError(MessageError):
    """A topic or a filter that breaks the grammar."""


class Decision(IntEnum):
    """What a prefix says about the topics behind it."""

    NONE = 0
    ALL = 1
    OPEN = 2
    """Look at each topic."""


def _check_length(text: str, what: str) -> None:
    try:
        size = len(text.encode())
    except UnicodeEncodeError as exc:
        raise TopicError(f"{what} is not UTF-8: {exc.reason}") from None
    if not 0 < size <= MAX_TOPIC:
        raise TopicError(f"{what} has {size} bytes, not 1 to {MAX_TOPIC}")
    if "\0" in text:
        raise TopicError(f"{what} {text!r} has a NUL")


def check_topic(topic: str) -> None:
    """Raise TopicError unless one may publish to `topic`."""
    _check_length(topic, "topic")
    if "+" in topic or "#" in topic:
        raise TopicError(f"topic {topic!r} has a wildcard; only filters may")


def check_filter(filter: str) -> None:
    """Raise TopicError unless one may subscribe to `filter`."""
    _check_length(filter, "filter")
    levels = filter.split("/")
    for level in levels:
        if len(level) > 1 and ("+" in level or "#" in level):
            raise TopicError(f"filter {filter!r}: a wildcard stands alone in its level")
    if "#" in levels[:-1]:
        raise TopicError(f"filter {filter!r}: '#' stands only at the end")


def matches(filter: str, topic: str) -> bool:
    """Does a good filter let a good topic through? For one of each; `FilterSet` is faster for many (R-10-1)."""
    wanted = filter.split("/")
    levels = topic.split("/")
    if topic[:1] == "$" and wanted[0] in ("+", "#"):
        return False
    for n, level in enumerate(wanted):
        if level == "#":
            return True
        if n == len(levels) or level not in ("+", levels[n]):
            return False
    return len(wanted) == len(levels)


def prefix_decides(filter: str, prefix: str) -> Decision:
    """What `filter` says about every topic that `prefix` stands for.

    `prefix` is a batch's or a record's: empty, or up to and with a '/', or else the topic itself.
    """
    if prefix and prefix[-1] != "/":
        return Decision.ALL if matches(filter, prefix) else Decision.NONE
    wanted = filter.split("/")
    levels = prefix.split("/")[:-1]  # complete ones; at least one more follows, perhaps empty
    if prefix[:1] == "$" and wanted[0] in ("+", "#"):
        return Decision.NONE
    for n, level in enumerate(levels):
        if n == len(wanted):
            return Decision.NONE
        if wanted[n] == "#":
            return Decision.ALL
        if wanted[n] not in ("+", level):
            return Decision.NONE
    if len(wanted) == len(levels):
        return Decision.NONE
    # At the root '#' depends on whether the topic begins with '$'.
    return Decision.ALL if levels and wanted[len(levels)] == "#" else Decision.OPEN


def _pattern(filter: str) -> str:
    """A regular expression for a filter with wildcards; linear, since every level ends at a '/'."""
    guard = r"(?!\$)" if filter[0] in "+#" else ""
    if filter == "#":
        return guard + ".*"
    tail = ""
    if filter.endswith("/#"):
        filter, tail = filter[:-2], "(?:/.*)?"
    levels = ("[^/]*" if level == "+" else re.escape(level) for level in filter.split("/"))
    return guard + "/".join(levels) + tail


def _distinct(filters: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(filters))


@define(eq=False)
class FilterSet:
    """Several filters as one question: does any of them let this topic through?

    Raises TopicError for a bad filter. Duplicates count once; an empty set matches nothing and is false.
    """

    filters: tuple[str, ...] = field(converter=_distinct)
    _exact: frozenset[str] = field(init=False, repr=False)
    _wild: re.Pattern[str] | None = field(init=False, repr=False)
    _memo: dict[str, Decision] = field(init=False, repr=False, factory=dict)

    def __attrs_post_init__(self) -> None:
        for one in self.filters:
            check_filter(one)
        wild = [one for one in self.filters if "+" in one or "#" in one]
        self._exact = frozenset(self.filters).difference(wild)
        self._wild = re.compile("|".join(f"(?:{_pattern(one)})" for one in wild), re.DOTALL) if wild else None

    def __bool__(self) -> bool:
        return bool(self.filters)

    def matches(self, topic: str) -> bool:
        """Does any filter match? `topic` is a good one (`check_topic`)."""
        if topic in self._exact:
            return True
        return self._wild is not None and self._wild.fullmatch(topic) is not None

    def decide(self, prefix: str) -> Decision:
        """What the set says about every topic `prefix` stands for; remembered, since prefixes repeat."""
        known = self._memo.get(prefix)
        if known is not None:
            return known
        answers = {prefix_decides(one, prefix) for one in self.filters}
        if Decision.ALL in answers:
            answer = Decision.ALL
        else:
            answer = Decision.OPEN if Decision.OPEN in answers else Decision.NONE
        if len(self._memo) >= MEMO:
            self._memo.clear()
        self._memo[prefix] = answer
        return answer


def shared(low: AnyStr, high: AnyStr, slash: AnyStr) -> AnyStr:
    """What two texts share: all if they are equal, else up to and with the last common '/'."""
    if low == high:
        return low
    end = 0
    while True:
        cut = low.find(slash, end) + 1
        if not cut or not high.startswith(low[end:cut], end):
            return low[:end]
        end = cut


def common_prefix(topics: Sequence[str] | Iterable[str]) -> str:
    """The topic if all are equal, else what they share up to and with the last '/' (protocol §10, R-10-5)."""
    topics = topics if isinstance(topics, Sequence) else list(topics)
    if not topics:
        return ""
    # What the least and the greatest share, everything between them shares too.
    return shared(min(topics), max(topics), "/")
