"""Who may publish, subscribe and speak for others: access rules compiled per node (protocol §10, default deny).

(1) A batch is let through whole or not at all: by its prefix where that decides, else by every topic in it.
(2) A refusal names the rules that were asked, or says that none names the node.
(3) Roles come from this node's own register of enrolments, never from the wire.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import Final, Protocol

from attrs import define, field

from stp.batch import open_batch
from stp.records import VOID, RecordHead, batches_of
from stp.topics import Decision, FilterSet

PREFIX_MEMO_LIMIT: Final = 4_096
"""Prefixes whose decision one grant remembers; above it the memory is emptied and fills again."""

GRANT_LIMIT: Final = 20_000
"""Compiled grants kept; more nodes than that are compiled again when they come back."""


class Rule(Protocol):
    """What this file needs to know of one ``[[access]]`` table."""

    @property
    def name(self) -> str: ...
    @property
    def nodes(self) -> Sequence[str]: ...
    @property
    def role(self) -> str | None: ...
    @property
    def publish(self) -> Sequence[str]: ...
    @property
    def subscribe(self) -> Sequence[str]: ...
    @property
    def speaks_for(self) -> Sequence[str]: ...


def covers(allowed: str, wanted: str) -> bool:
    """Does every topic that *wanted* matches also match *allowed*? Both are filters (protocol §10).

    ``+`` covers any one level but ``#``; ``#`` covers the rest, the parent included. A wanted filter whose first
    level is a wildcard never matches ``$`` topics, so an allowed ``#`` covers it.
    """
    have, want = allowed.split("/"), wanted.split("/")
    if want[0].startswith("$") and have[0] in ("#", "+"):
        return False
    for index, level in enumerate(have):
        if level == "#":
            return True
        if index >= len(want):
            return False
        if want[index] == "#" or (level != "+" and level != want[index]):
            return False
    # "a/b" does not cover "a/b/#": only "a/b/#" or something wider does.
    return len(want) == len(have)


@define
class Grant:
    """What one node may do, compiled from the rules that name it."""

    node: str
    role: str | None
    rules: tuple[str, ...]
    publish: FilterSet
    subscribe: tuple[str, ...]
    reads: FilterSet
    """The same as one question: may the node see this topic? A batch that it may see in part is cut (R-10-30)."""
    speaks_for: tuple[str, ...]
    _memo: dict[str, Decision] = field(factory=dict)

    def refusal_to_publish(self, record: bytes, head: RecordHead) -> str | None:
        """None when the whole record may pass, else the reason, naming the rules asked. A void carries nothing.

        R-10-31.
        """
        if head.kind == VOID:
            return None
        decision = self._decide(head.prefix)
        if decision is Decision.ALL:
            return None
        for batch in batches_of(record, head):
            topic = self._first_denied(batch)
            if topic is not None:
                return self._denied(f"publish {topic}")
        return None

    def refusal_to_subscribe(self, wanted: Sequence[str]) -> str | None:
        """None when all filters lie within what the node may read, else the reason."""
        for one in wanted:
            if not any(covers(allowed, one) for allowed in self.subscribe):
                return self._denied(f"subscribe {one}")
        return None

    def may_speak_for(self, node: str) -> bool:
        """May records whose source belongs to *node* come through this peer (``speaks_for``)? Its own always may."""
        return node == self.node or any(fnmatchcase(node, glob) for glob in self.speaks_for)

    def _decide(self, prefix: str) -> Decision:
        known = self._memo.get(prefix)
        if known is None:
            if len(self._memo) >= PREFIX_MEMO_LIMIT:
                self._memo.clear()
            known = self._memo[prefix] = self.publish.decide(prefix)
        return known

    def _first_denied(self, batch: bytes) -> str | None:
        """The first topic in *batch* that may not be published; None when all may."""
        opened = open_batch(batch)
        decision = self._decide(opened.head.prefix)
        if decision is Decision.ALL:
            return None
        if decision is Decision.NONE:
            return opened.topics[0]
        return next(
            (topic for topic in dict.fromkeys(opened.topics) if not self.publish.matches(topic)), None
        )

    def _denied(self, what: str) -> str:
        if not self.rules:
            return f"default deny: no access rule names {self.node}"
        names = ", ".join(self.rules)
        return f"rule {names}: {self.node} may not {what}"[:240]


class Access:
    """The rules of this node. Reloading makes a new one; sessions ask again, so a change holds at once (R-4-9)."""

    def __init__(
        self,
        rules: Sequence[Rule],
        *,
        role_of: Callable[[str], str | None] = lambda node: None,
    ) -> None:
        """*role_of* tells the role a node was enrolled with, from this node's own register (3)."""
        self._rules = tuple(rules)
        self._role_of = role_of
        self._grants: dict[str, Grant] = {}

    def grant(self, node: str) -> Grant:
        """The compiled grant of *node* (its certificate's name)."""
        known = self._grants.get(node)
        role = self._role_of(node)
        if known is None or known.role != role:
            if len(self._grants) >= GRANT_LIMIT:
                self._grants.clear()
            known = self._grants[node] = self._compile(node, role)
        return known

    def _compile(self, node: str, role: str | None) -> Grant:
        mine = [rule for rule in self._rules if _names(rule, node, role)]
        subscribe = tuple(_own(one, node) for rule in mine for one in rule.subscribe)
        return Grant(
            node,
            role,
            tuple(rule.name for rule in mine),
            FilterSet([_own(one, node) for rule in mine for one in rule.publish]),
            subscribe,
            FilterSet(subscribe),
            tuple(glob for rule in mine for glob in rule.speaks_for),
        )


def _names(rule: Rule, node: str, role: str | None) -> bool:
    if rule.role is not None and rule.role != role:
        return False
    return any(fnmatchcase(node, glob) for glob in rule.nodes)


def _own(text: str, node: str) -> str:
    return text.replace("{node}", node)
