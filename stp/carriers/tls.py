"""The TLS carrier: one session over TLS on TCP, where UDP does not get through (protocol §11).

Made with `dial`, which connects the TCP stream; `run` then makes the handshake and carries until the session ends.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

import trio
from attrs import define, field

from stp.core.path import KEEPALIVE

if TYPE_CHECKING:
    from stp.core.verbs import AnySession

CONNECT_TIMEOUT: Final = 5.0
"""Seconds that resolving a name and connecting TCP may take."""


@define
class StreamStatistics:
    """Counts of a carrier over byte streams, since it was made; sizes in bytes as TCP carries them."""

    rx_bytes: int = 0
    tx_bytes: int = 0
    tx_blocked: int = 0
    """Writes that had to wait for the kernel."""
    errors: dict[str, int] = field(factory=dict)
    """Reads and writes that failed, by errno name."""


class TlsCarrier:
    """A dialled session and its TCP stream: `session` is there at once, in State.HANDSHAKE."""

    session: AnySession

    @classmethod
    async def dial(
        cls,
        host: str,
        port: int,
        *,
        tls: Callable[[bool], Any],
        leaf_der: bytes | Callable[[], bytes],
        expected_node: str,
        expected_domain: str,
        on_ready: Callable[[AnySession], None],
        stream: trio.SocketStream | None = None,
        keepalive: float = KEEPALIVE,
        random_bytes: Callable[[int], bytes] = os.urandom,
    ) -> TlsCarrier:
        """Connect TCP to host:port, or take `stream`, which is connected already (through a proxy, say) and is then
        the carrier's to close.

        `tls` and `leaf_der` are those of EndpointConfig. Raises OSError, with the address in its text, also after
        CONNECT_TIMEOUT.
        """
        raise NotImplementedError

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Carries until the session is over, `close`, or cancellation. `on_ready(session)` hears of all that is new,
        SessionClosed included: a connection that breaks ends the session with a LocalCause."""
        raise NotImplementedError

    def wake(self) -> None:
        """Something may have been queued on the session: send it soon. As UdpCarrier.wake."""
        raise NotImplementedError

    def send_now(self) -> None:
        """What is queued leaves before this returns, as far as the kernel takes it."""
        raise NotImplementedError

    def close(self) -> None:
        """Sends what is due (a CLOSE, as a rule) as far as the kernel takes it, and closes; `run` returns."""
        raise NotImplementedError

    async def aclose(self) -> None:
        """As `close`, but waits a moment until the peer has what was sent."""
        raise NotImplementedError

    def statistics(self) -> StreamStatistics:
        """Live counters: read, do not keep."""
        raise NotImplementedError
