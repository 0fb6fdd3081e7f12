"""What the owner of a session may ask of it, whatever carries it (protocol §5, §7, §11).

`core.session.Session` has these verbs over datagrams, `core.framed.FramedSession` over a stream of bytes; links,
relays and whoever else works with messages name this type and no other.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from stp.core.errors import ErrorCode
from stp.core.events import Event, SessionStatistics
from stp.core.handshake import PeerIdentity
from stp.core.streams import DEFAULT_WEIGHT

if TYPE_CHECKING:
    from stp.core.states import State


class AnySession(Protocol):
    """One association of two nodes. The docstrings of `Session` say what each verb does and raises."""

    app: Any
    """The owner's; never looked into."""

    @property
    def dialling(self) -> bool: ...

    @property
    def state(self) -> State: ...

    @property
    def id(self) -> bytes | None: ...

    @property
    def suite(self) -> str:
        """The TLS suite; "" before the keys, and where the kernel is the only party between (Unix)."""

    @property
    def peer(self) -> PeerIdentity | None: ...

    @property
    def addr(self) -> Any: ...

    @property
    def live(self) -> bool: ...

    @property
    def carrier(self) -> str:
        """ "udp", "tls" or "unix"."""

    def open_stream(self, *, weight: int = DEFAULT_WEIGHT, bidirectional: bool = False) -> int: ...

    def write(self, stream: int, data: bytes, fin: bool = False) -> None: ...

    def room(self, stream: int) -> int: ...

    def unsent(self, stream: int) -> int: ...

    def read(self, stream: int) -> bytes: ...

    def ended(self, stream: int) -> bool: ...

    def advance_credit(self, stream: int, taken: int) -> None: ...

    def reset_stream(self, stream: int, code: int) -> None: ...

    def stop_stream(self, stream: int, code: int) -> None: ...

    def next_event(self) -> Event | None: ...

    def close(self, code: ErrorCode, reason: str = "", now: float | None = None) -> None: ...

    def expect(self, seconds: float | None) -> None: ...

    def statistics(self) -> SessionStatistics: ...
