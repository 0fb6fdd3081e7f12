"""Listeners and dialled sessions on sockets of this machine, for the tests of the stream carriers."""

from __future__ import annotations

import os
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import trio

from stp.carriers.door import Door
from stp.carriers.streams import StreamCarrier
from stp.carriers.tls import TlsCarrier, TlsListener, listening_sockets
from stp.core.events import Connected, Event, SessionClosed
from stp.core.flow import WindowBudget
from stp.core.framed import FramedContext
from stp.core.verbs import AnySession
from tests.identity_kit import DOMAIN, Flaw
from tests.sim import context, credentials

HUB, EDGE = "hub-1", "edge-1"


class Owner:
    """Hears sessions out. `echo`: sends back what it reads, on a stream of its own for each."""

    def __init__(self, *, echo: bool = False) -> None:
        self.echo = echo
        self.sessions: list[AnySession] = []
        self.events: list[Event] = []
        self.received: dict[tuple[int, int], bytearray] = {}
        self.held = False
        """Takes nothing and gives no credit."""
        self._changed = trio.Event()
        self._answers: dict[tuple[int, int], int] = {}

    def on_ready(self, session: AnySession) -> None:
        if session not in self.sessions:
            self.sessions.append(session)
        while (event := session.next_event()) is not None:
            self.events.append(event)
        if not self.held:
            self.read(session)
        self._changed.set()
        self._changed = trio.Event()

    def read(self, session: AnySession) -> None:
        for stream in list(session._streams.recv):
            data = session.read(stream)
            if not data:
                continue
            key = id(session), stream
            got = self.received.setdefault(key, bytearray())
            got += data
            if stream:
                session.advance_credit(stream, len(got))
            if self.echo and session.live and stream:
                if key not in self._answers:
                    self._answers[key] = session.open_stream()
                session.write(self._answers[key], data)

    def got(self, session: AnySession, stream: int) -> bytes:
        return bytes(self.received.get((id(session), stream), b""))

    def of(self, kind: type[Any]) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]

    async def until(self, condition: Callable[[], bool], seconds: float = 10.0) -> None:
        with trio.fail_after(seconds):
            while not condition():
                changed = self._changed
                with trio.move_on_after(0.05):  # what is asked may change without a word to us
                    await changed.wait()

    async def connected(self) -> None:
        await self.until(lambda: bool(self.of(Connected) or self.of(SessionClosed)))
        assert self.of(Connected), self.events

    async def closed(self) -> SessionClosed:
        await self.until(lambda: bool(self.of(SessionClosed)))
        found: SessionClosed = self.of(SessionClosed)[0]
        return found


def framed(carrier: str, **options: Any) -> FramedContext:
    return FramedContext(carrier=carrier, random_bytes=os.urandom, budget=WindowBudget(64 << 20), **options)


@asynccontextmanager
async def listening(
    owner: Owner, *, flaw: Flaw = Flaw.NONE, elsewhere: Any = None, door: Door | None = None, **options: Any
) -> AsyncIterator[tuple[TlsListener, int]]:
    """A TLS listener called HUB on a free port of loopback."""
    sockets = await listening_sockets("127.0.0.1", 0)
    listener = TlsListener(
        sockets,
        tls=partial(context, HUB, flaw),
        leaf_der=credentials(HUB, flaw).chain_der[0],
        context=framed("tls", **options),
        on_ready=owner.on_ready,
        elsewhere=elsewhere,
        door=door,
    )
    async with running(listener):
        yield listener, sockets[0].getsockname()[1]


@asynccontextmanager
async def running(carrier: StreamCarrier) -> AsyncIterator[None]:
    async with trio.open_nursery() as nursery:
        await nursery.start(carrier.run)
        yield
        carrier.close()
        nursery.cancel_scope.cancel()


async def dial(owner: Owner, port: int, *, flaw: Flaw = Flaw.NONE, **options: Any) -> TlsCarrier:
    options = {"expected_node": HUB, "expected_domain": DOMAIN} | options
    return await TlsCarrier.dial(
        "127.0.0.1",
        port,
        tls=partial(context, EDGE, flaw),
        leaf_der=credentials(EDGE, flaw).chain_der[0],
        on_ready=owner.on_ready,
        **options,
    )


def raw(port: int, source: str = "127.0.0.1") -> socket.socket:
    """A TCP connection that says nothing, from one of this machine's many loopback addresses."""
    return socket.create_connection(("127.0.0.1", port), timeout=5, source_address=(source, 0))
