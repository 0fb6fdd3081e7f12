"""Whose records a peer may send us in one session (protocol §10).

(1) A source belongs to the node that first introduced it; what the owner knows counts before what the peer
    says.
(2) A peer may send the records of its own node's sources, and of nodes it may speak for. Nothing is kept of
    others but their ids, at most MAX_FOREIGN, so that they can be refused at once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from stp.core.errors import LimitError

MAX_SOURCES: Final = 65_536
"""Sources allowed in one session (each some 150 bytes), else LIMIT."""
MAX_FOREIGN: Final = 1_024
"""Sources remembered as not allowed; more are simply unknown, and wait before they are refused."""


class Sources:
    """The sources of one session's peer. `allowed` is public for the hot path: read it, never write it."""

    __slots__ = ("_foreign", "_introduced", "_may_speak_for", "_name_of", "_node", "allowed")

    def __init__(self, name_of: Callable[[bytes], str | None], may_speak_for: Callable[[str], bool]) -> None:
        self._name_of = name_of
        self._may_speak_for = may_speak_for
        self._node = ""
        self._introduced: dict[bytes, str] = {}
        self._foreign: set[bytes] = set()
        self.allowed: set[bytes] = set()

    def hello(self, node: str, source: bytes) -> bool:
        """The peer's own source, by its HELLO; False when it belongs to another node."""
        self._node = node
        return self.introduce(source, node)

    def introduce(self, source: bytes, node: str) -> bool:
        """True when the peer said something new, and may send this source's records."""
        if source in self.allowed or source in self._foreign:
            return False
        self._introduced[source] = node
        if self.may_send(source):
            return True
        del self._introduced[source]
        return False

    def may_send(self, source: bytes) -> bool | None:
        """None: nobody has said whose it is. LimitError for too many (R-10-27)."""
        if source in self.allowed:
            return True
        if source in self._foreign:
            return False
        node = self.node_of(source)
        if node is None:
            return None
        if node != self._node and not self._may_speak_for(node):
            if len(self._foreign) < MAX_FOREIGN:
                self._foreign.add(source)
            return False
        if len(self.allowed) >= MAX_SOURCES:
            raise LimitError(f"more than {MAX_SOURCES} sources in one session")
        self.allowed.add(source)
        return True

    def node_of(self, source: bytes) -> str | None:
        """The node that a source belongs to, as far as anybody has said."""
        return self._name_of(source) or self._introduced.get(source)
