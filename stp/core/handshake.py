"""TLS contexts, peer identities and the handshake as ordered bytes (protocol §4). Interface first; see initspace.py."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from typing import TYPE_CHECKING

from attrs import define

from stp.core.keys import SessionKeys
from stp.core.params import TransportHello

if TYPE_CHECKING:
    from OpenSSL import SSL


@define
class TlsCredentials:
    chain_der: tuple[bytes, ...]
    key_der: bytes
    anchors_der: tuple[bytes, ...]


@define
class TlsSettings:
    credentials: TlsCredentials
    verify_time: datetime | None = None
    aes_preferred: bool = True


@define
class PeerIdentity:
    domain: str
    node: str
    leaf_der: bytes
    serial: int
    not_after: datetime
    chain_der: tuple[bytes, ...]


@define
class HandshakeResult:
    peer: PeerIdentity
    suite: str
    keys: SessionKeys
    hello: TransportHello


def identity_of(leaf_der: bytes) -> tuple[str, str]:
    raise NotImplementedError


def make_context(settings: TlsSettings, server: bool) -> SSL.Context:
    raise NotImplementedError


Authorise = Callable[[PeerIdentity], "str | None"]
