"""The handshake over INIT packets (protocol §4): what endpoint.py and session.py hold until confirmation.

How they use it, both sides alike:

    h.receive_init(packet, now)             PacketError: does not open or is not for us: drop and count
    for datagram in h.datagrams_to_send(now): ...        to the address of the handshake
    deadline = h.next_timeout();  h.handle_timeout(now)
    h.state      RUNNING -> DONE (h.result is there; go on calling h: it still resends) or
                 REFUSED (h.refused says why; a CLOSE is still to be sent; goes OVER after 3 PTO) or
                 OVER (drop it: lingered, or timed out: h.timed_out)
    h.rtt        measured, seconds, or None
    h.peer_cid   where DATA goes: the peer's CID (client: adopted from the first server INIT that opens)
    h.cid        our own CID, the one in our hello; the peer sends DATA to it

Client: `ClientHandshake(...)`, plus `h.receive_retry(packet, now)` (PacketError: ignored). DONE: make DATA keys, send
DATA at once, stay unconnected until HANDSHAKE_DONE; then forget `h`. A DONE client may still become REFUSED: the
server judges our certificate later than we see success.

Server: `first = open_first(packet, network_keys)` (PacketError: silence), then tokens.py decides: Retry
(`packet.build_retry(packet.scid, new_cid, token, first.keys.retry_key, packet.dcid)`) or
`ServerHandshake(...)` + `h.receive_init(packet, now)`. INITs find it by any of `h.dcids`. DONE: the peer is authorised, make DATA
keys, handle early DATA; send HANDSHAKE_DONE; forget `h` when the first DATA packet opens.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum, auto
from typing import TYPE_CHECKING

from attrs import define

from stp.core.keys import InitialKeys, SessionKeys
from stp.core.packet import InitPacket, RetryPacket
from stp.core.params import TransportHello, TransportParameters

if TYPE_CHECKING:
    from OpenSSL import SSL

    from stp.core.errors import HandshakeRefused


class HandshakeState(Enum):
    RUNNING = auto()
    DONE = auto()
    REFUSED = auto()
    OVER = auto()


@define
class FirstInit:
    keys: InitialKeys
    network_key: bytes


def open_first(packet: InitPacket, network_keys: tuple[bytes, ...]) -> FirstInit:
    """The keys that open the INIT of a stranger; () stands for no network key. Raises PacketError."""
    raise NotImplementedError


class InitHandshake:
    state: HandshakeState
    refused: HandshakeRefused | None
    timed_out: bool
    rtt: float | None
    cid: bytes
    peer_cid: bytes | None
    peer_hello: TransportHello | None  # .parameters: what the peer takes
    keys: SessionKeys | None  # there from DONE on

    def receive_init(self, packet: InitPacket, now: float) -> None: ...
    def datagrams_to_send(self, now: float) -> list[bytes]: ...
    def next_timeout(self) -> float | None: ...
    def handle_timeout(self, now: float) -> None: ...
    def close(self, code: int, reason: str, now: float) -> None:
        """Give up on our side: an INIT CLOSE goes out, then REFUSED and OVER as above."""


class ClientHandshake(InitHandshake):
    def __init__(
        self,
        context: SSL.Context,
        leaf_der: bytes,
        *,
        expected_node: str,
        expected_domain: str | None,
        cid: bytes,
        parameters: TransportParameters,
        network_key: bytes,
        token: bytes,
        random_bytes: Callable[[int], bytes],
        now: float,
        rtt: float | None = None,
        deadline: float = 10.0,
    ) -> None: ...

    def receive_retry(self, packet: RetryPacket, now: float) -> None: ...


class ServerHandshake(InitHandshake):
    dcids: tuple[bytes, ...]

    def __init__(
        self,
        context: SSL.Context,
        leaf_der: bytes,
        *,
        first: FirstInit,
        packet: InitPacket,
        original_dcid: bytes,  # from the Retry token; packet.dcid without one
        cid: bytes,  # with a Retry token: packet.dcid; else a fresh one
        retried: bool,
        validated: bool,  # address known to be the peer's: a Retry token. A NEW_TOKEN: False, at most 3 x
        token_node: bytes,  # NodeToken.node: the certificate must name it; b"" without one
        authorise: Callable[..., str | None],
        parameters: TransportParameters,
        random_bytes: Callable[[int], bytes],
        now: float,
        deadline: float = 10.0,
    ) -> None: ...
