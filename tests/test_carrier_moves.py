"""UdpCarrier, promise (5): other local ports under living sessions, on real sockets of this machine."""

from __future__ import annotations

import errno
import functools
import os
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio

from stp.carriers import udp
from stp.carriers.udp import Address, UdpCarrier
from stp.core.endpoint import Endpoint, EndpointConfig
from stp.core.events import SessionClosed
from stp.core.session import Session
from stp.core.states import State
from tests.identity_kit import NETWORK_KEY
from tests.sim import Flaw, context, credentials

pytestmark = pytest.mark.real

SIZE = 2_000_000


def endpoint(node: str, *, accept: bool) -> Endpoint:
    return Endpoint(
        EndpointConfig(
            tls=functools.partial(context, node, Flaw.NONE),
            leaf_der=credentials(node).chain_der[0],
            network_keys=(NETWORK_KEY,),
            random_bytes=os.urandom,
            accept=accept,
        )
    )


class Pair:
    """A listener that takes all bytes, and a dialler behind a movable carrier."""

    def __init__(self) -> None:
        self.near, self.far = endpoint("edge-1", accept=False), endpoint("hub-1", accept=True)
        self.peers: list[Session] = []
        self.closed: list[SessionClosed] = []
        self.got = bytearray()
        self.changed = trio.Event()

    def take(self, session: Session) -> None:
        if session not in self.peers:
            self.peers.append(session)
        while (event := session.next_event()) is not None:
            if isinstance(event, SessionClosed):
                self.closed.append(event)
        for stream in list(session._streams.recv):
            data = session.read(stream)
            self.got += data
            if stream and data:
                session.advance_credit(stream, len(self.got))
        self.tell()

    def serve(self, session: Session) -> None:
        while (event := session.next_event()) is not None:
            if isinstance(event, SessionClosed):
                self.closed.append(event)
        self.tell()

    def tell(self) -> None:
        self.changed.set()
        self.changed = trio.Event()

    async def until(self, condition: Any, seconds: float = 15.0) -> None:
        with trio.fail_after(seconds):
            while not condition():
                with trio.move_on_after(0.05):
                    await self.changed.wait()

    @asynccontextmanager
    async def connected(self) -> AsyncIterator[Session]:
        async with trio.open_nursery() as nursery:
            self.hub = await UdpCarrier.bind(self.far, "127.0.0.1", on_ready=self.take)
            self.edge = await UdpCarrier.bind(self.near, "127.0.0.1", on_ready=self.serve, movable=True)
            for carrier in (self.hub, self.edge):
                await nursery.start(carrier.run)
            to, now = self.hub.local_address, trio.current_time()
            self.session = self.near.connect(to, expected_node="hub-1", now=now)
            self.edge.wake()
            await self.until(lambda: self.session.state is State.ESTABLISHED and self.peers)
            try:
                yield self.session
            finally:
                self.edge.close()
                self.hub.close()

    async def feed(self, data: bytes) -> None:
        lane = self.session.open_stream()
        sent = 0
        while sent < len(data):
            room = self.session.room(lane)
            if room:
                self.session.write(lane, data[sent : sent + room])
                sent += room
                self.edge.wake()
            with trio.move_on_after(0.01):
                await self.changed.wait()


async def test_a_session_outlives_new_ports_under_traffic() -> None:
    """Five of them, with megabytes on the way: nothing is lost, one session on either side."""
    pair = Pair()
    data = os.urandom(SIZE)
    async with pair.connected() as session, trio.open_nursery() as nursery:
        nursery.start_soon(pair.feed, data)
        ports = set()
        for n in range(5):
            await pair.until(lambda n=n: len(pair.got) >= n * SIZE // 6)
            ports.add(pair.edge.local_address[1])
            assert pair.edge.rebind()
            await pair.until(lambda n=n: pair.far.totals().path_validations == n + 1)
        await pair.until(lambda: len(pair.got) >= SIZE)
        assert pair.got == data
        assert len(ports) == 5
        assert pair.peers[0].addr == pair.edge.local_address
        assert session.statistics().rebinds == pair.edge.statistics().rebinds == 5
        assert pair.far.totals().path_validations == 5
        assert not pair.closed
        assert len(pair.peers) == 1


async def test_the_socket_that_was_left_is_drained_and_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(udp, "DRAIN_TIME", 0.2)
    pair = Pair()
    async with pair.connected() as session:
        old, descriptors = pair.edge._sock, len(os.listdir("/proc/self/fd"))
        assert pair.edge.rebind()
        assert old.fileno() >= 0
        await pair.until(lambda: old.fileno() < 0)
        assert len(os.listdir("/proc/self/fd")) == descriptors
        assert session.state is State.ESTABLISHED


async def test_a_suspect_path_is_left() -> None:
    """What leaves from the old port vanishes: the session goes on from another within a second or so (R-8-8)."""
    pair = Pair()
    async with pair.connected() as session, trio.open_nursery() as nursery:
        deaf = pair.edge.local_address
        receive = pair.far.receive

        def filtered(data: bytes, addr: Address, now: float, size: int = 0) -> None:
            if addr != deaf:
                receive(data, addr, now, size)

        pair.far.receive = filtered  # type: ignore[method-assign, assignment]
        data = os.urandom(200_000)
        nursery.start_soon(pair.feed, data)
        await pair.until(lambda: len(pair.got) >= len(data), 5.0)
        assert pair.got == data
        assert session.statistics().rebinds >= 1
        assert not pair.closed


async def test_a_new_route_is_a_new_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sends fail while the machine changes networks; once there is a way again the session takes it."""
    monkeypatch.setattr(udp, "ROUTE_PAUSE", 0.001)
    pair = Pair()
    async with pair.connected() as session, trio.open_nursery() as nursery:
        down = True
        source = udp._source
        monkeypatch.setattr(udp, "_source", lambda address: "" if down else source(address))
        real = pair.edge._sock

        class Unplugged:
            """The socket of a machine without a route."""

            def __getattr__(self, name: str) -> Any:
                if down and name in ("sendto", "sendmsg"):
                    raise OSError(errno.ENETUNREACH, "no route")
                return getattr(real, name)

        pair.edge._sock = Unplugged()  # type: ignore[assignment]
        pair.edge._movable = True
        data = os.urandom(SIZE)
        nursery.start_soon(pair.feed, data)
        await pair.until(lambda: pair.edge.statistics().errors.get("ENETUNREACH", 0) > 0)
        down = False
        await pair.until(lambda: len(pair.got) >= len(data), 8.0)
        assert pair.got == data
        assert pair.edge.statistics().rebinds >= 1
        assert session.statistics().migrations >= 1
        real.close()


async def test_who_must_not_or_cannot_move_stays() -> None:
    pair = Pair()
    async with pair.connected():
        assert not pair.hub.rebind()  # a listener
        pair.edge._nursery, kept = None, pair.edge._nursery
        assert not pair.edge.rebind()  # not running
        pair.edge._nursery = kept

        def refuse(*_args: Any) -> socket.socket:
            raise OSError(errno.EMFILE, "too many")

        opened, udp._open = udp._open, refuse  # type: ignore[assignment]
        try:
            assert not pair.edge.rebind()
        finally:
            udp._open = opened
        assert pair.edge.statistics().errors == {"EMFILE": 1}
    assert not pair.edge.rebind()  # closed
