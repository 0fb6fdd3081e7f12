"""A hub's and a gateway's enrolment service on real sockets, with a clock that tests set."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pytest
import trio
from attrs import define, field

from stp.enrol import new_key
from stp.identity import Identity, network_key_pem
from stpd.enrol import EnrolmentDoor
from stpd.issuing import Forward, Issuer
from stpd.keys import JoinTokens, NodeRegistry
from stpd.pki import CertificateAuthority, certificate_pem, private_pem, wall_clock

T = TypeVar("T")


@define
class Clock:
    """Unix seconds; runs only when told to."""

    now: float = field(factory=wall_clock)

    def __call__(self) -> float:
        return self.now


@define
class Site:
    """A hub that signs, its clock, and the port of its door once `open` was called."""

    directory: Path
    nursery: trio.Nursery
    clock: Clock
    authority: CertificateAuthority
    identity: Identity
    tokens: JoinTokens
    registry: NodeRegistry
    door: EnrolmentDoor
    port: int = 0

    @classmethod
    def make(cls, directory: Path, nursery: trio.Nursery, clock: Clock | None = None) -> Site:
        directory.mkdir(exist_ok=True)
        clock = clock or Clock()
        authority = CertificateAuthority.create("site", clock)
        identity = identity_from(authority, "hub-1", answers=True)
        tokens = JoinTokens(directory / "tokens.json", authority.der, clock)
        registry = NodeRegistry(directory / "nodes.json", clock)
        issuer = Issuer(lambda: identity, registry, authority, tokens, clock=clock)
        door = EnrolmentDoor(issuer)
        return cls(directory, nursery, clock, authority, identity, tokens, registry, door)

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self.port}"

    async def open(self) -> Site:
        self.port = await serve(self.nursery, self.door)
        return self

    async def gateway(self, identity: Identity) -> tuple[EnrolmentDoor, str]:
        """The door of a gateway that passes on to this hub, and its host:port."""
        registry = NodeRegistry(self.directory / f"{identity.node}-nodes.json", self.clock)
        forward = Forward("127.0.0.1", self.port)
        door = EnrolmentDoor(Issuer(lambda: identity, registry, forward=forward, clock=self.clock))
        return door, f"127.0.0.1:{await serve(self.nursery, door)}"


def identity_from(authority: CertificateAuthority, node: str, *, answers: bool) -> Identity:
    key = new_key()
    leaf = authority.issue(key.public_key(), "site", node, answers=answers)
    parts = [
        private_pem(key).decode(),
        certificate_pem(leaf),
        authority.pem,
        network_key_pem(bytes(range(32))),
    ]
    return Identity.parse([(f"{node}.pem", "".join(parts).encode())])


async def serve(nursery: trio.Nursery, door: EnrolmentDoor) -> int:
    listeners = await nursery.start(door.serve, "127.0.0.1:0")
    port: int = listeners[0].socket.getsockname()[1]
    return port


async def in_thread(function: Callable[..., T], *args: object, **options: object) -> T:
    """Client code blocks; the service under test runs in this thread."""
    return await trio.to_thread.run_sync(functools.partial(function, *args, **options))


@pytest.fixture
async def site(tmp_path: Path, nursery: trio.Nursery) -> Site:
    return await Site.make(tmp_path / "hub", nursery).open()
