"""stp.carriers.tls on sockets of this machine (R-11-1, R-11-2, R-11-3)."""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
from typing import Any

import pytest
import trio

from stp.carriers.door import MAX_PER_ADDRESS, MAX_UNPROVEN, Door
from stp.carriers.streams import NOTSENT_LOWAT
from stp.carriers.tls import connect_tcp
from stp.core.errors import ErrorCode, LocalCause
from stp.core.events import Connected, SessionClosed, StreamWritable
from stp.core.framed import MAX_WRITE
from stp.core.states import State
from tests.carrier_kit import EDGE, HUB, Owner, dial, listening, raw, running
from tests.identity_kit import DOMAIN, Flaw

pytestmark = pytest.mark.real


async def test_two_nodes_talk_and_part() -> None:
    """R-11-1: data both ways, then CLOSE with its reason, then nothing is left open."""
    hub, edge = Owner(echo=True), Owner()
    async with listening(hub) as (listener, port):
        carrier = await dial(edge, port)
        session = carrier.session
        assert session.state is State.HANDSHAKE
        async with running(carrier):
            await edge.connected()
            assert session.peer is not None
            assert (session.peer.domain, session.peer.node) == (DOMAIN, HUB)
            assert session.addr == ("127.0.0.1", port)
            stream = session.open_stream()
            session.write(stream, bytes(300_000) + b"end")
            carrier.wake()
            await edge.until(lambda: edge.got(session, 3)[-3:] == b"end")
            assert len(edge.got(session, 3)) == 300_003
            assert hub.sessions[0].id == session.id
            assert hub.sessions[0].peer is not None
            assert hub.sessions[0].peer.node == EDGE
            session.close(ErrorCode.GOING_AWAY, "250")
            await carrier.aclose()
        assert await hub.closed() == SessionClosed(ErrorCode.GOING_AWAY, "250", by_peer=True)
        assert await edge.closed() == SessionClosed(ErrorCode.GOING_AWAY, "250", by_peer=False)
        assert listener.door.accepted == 1
        assert listener.door.waiting == 0
        assert listener.statistics().rx_bytes > 300_000
        assert carrier.statistics().tx_bytes > 300_000
        await hub.until(lambda: not listener._streams)


async def test_what_was_said_before_a_close_arrives() -> None:
    """(4): both sides write to the last moment; the CLOSE and all before it is read, not lost in a reset."""
    for _ in range(10):
        hub, edge = Owner(echo=True), Owner()
        async with listening(hub) as (_, port):
            carrier = await dial(edge, port)
            async with running(carrier):
                await edge.connected()
                stream = carrier.session.open_stream()
                carrier.session.write(stream, bytes(50_000))
                carrier.send_now()
                carrier.session.close(ErrorCode.NO_ERROR, "bye")
                carrier.close()
            assert (await hub.closed()).reason == "bye"
            assert len(hub.got(hub.sessions[0], stream)) == 50_000


async def test_the_wrong_node_is_refused_here() -> None:
    hub, edge = Owner(), Owner()
    async with listening(hub) as (_, port), running(await dial(edge, port, expected_node="hub-2")):
        closed = await edge.closed()
    assert closed.code is ErrorCode.AUTH
    assert "wanted" in closed.reason
    assert not hub.events


async def test_a_refused_certificate_is_told_in_words() -> None:
    """The alert is not lost in the reset that follows it."""
    refusals: list[Any] = []
    hub, edge = Owner(), Owner()
    async with listening(hub, on_refused=lambda *args: refusals.append(args)) as (listener, port):
        async with running(await dial(edge, port, flaw=Flaw.EXPIRED)):
            closed = await edge.closed()
        assert (closed.code, closed.by_peer) == (ErrorCode.AUTH, True)
        assert "certificate expired" in closed.reason
        await hub.until(lambda: listener.door.refused == 1)
    assert "certificate has expired" in refusals[0][2]
    assert refusals[0][0][0] == "127.0.0.1"


async def test_one_who_may_not_come_hears_why() -> None:
    hub, edge = Owner(), Owner()
    async with (
        listening(hub, authorise=lambda peer: "not today") as (_, port),
        running(await dial(edge, port)),
    ):
        closed = await edge.closed()
    assert closed == SessionClosed(ErrorCode.AUTH, "not today", by_peer=True)


async def test_a_listener_that_dies_is_noticed() -> None:
    hub, edge = Owner(), Owner()
    async with listening(hub) as (listener, port):
        carrier = await dial(edge, port)
        async with running(carrier):
            await edge.connected()
            for stream in list(listener._streams):
                stream.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                stream.ended = True
                listener._drop(stream)
            closed = await edge.closed()
    assert closed.code is LocalCause.CONNECTION_LOST


async def test_nobody_there_is_an_error_with_the_address() -> None:
    with pytest.raises(OSError, match=r"cannot connect to TCP 127\.0\.0\.1 port 1:"):
        await connect_tcp("127.0.0.1", 1)


async def test_a_stream_that_is_open_already_is_taken() -> None:
    """As one through a proxy is."""
    hub, edge = Owner(), Owner()
    async with listening(hub) as (_, port):
        stream = await trio.open_tcp_stream("127.0.0.1", port)
        async with running(await dial(edge, 1, stream=stream)):
            await edge.connected()


async def test_a_command_overtakes_bulk() -> None:
    """R-11-2: a reader that stalls and comes back meets the command behind what the kernel held, not behind all."""
    hub, edge = Owner(), Owner()
    async with listening(hub) as (listener, port):
        carrier = await dial(edge, port)
        async with running(carrier):
            await edge.connected()
            session = carrier.session
            bulk, command = session.open_stream(weight=4), session.open_stream(weight=64)
            (server,) = listener._streams
            for stream in (server, carrier._stream):
                held = stream.sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT)  # type: ignore[attr-defined]
                assert held == NOTSENT_LOWAT == 32 * 1024
            server.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16_384)
            carrier._stream.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65_536)
            hub.held = True
            session.write(bulk, bytes(1_000_000))
            carrier.wake()
            await edge.until(lambda: carrier._stream.blocked or session.unsent(bulk) < 500_000)
            before = 1_000_000 - session.unsent(bulk)
            session.write(command, b"stop!")
            carrier.wake()
            hub.held = False
            order: list[tuple[int, int]] = []
            take = hub.read

            def read(known: Any) -> None:
                take(known)
                order.append((len(hub.got(known, bulk)), len(hub.got(known, command))))

            hub.read = read  # type: ignore[method-assign]
            hub.on_ready(hub.sessions[0])
            await hub.until(lambda: any(row[1] for row in order))
            at = next(row[0] for row in order if row[1])
            assert at <= before + 2 * MAX_WRITE + NOTSENT_LOWAT


async def test_writers_go_on_when_there_is_room() -> None:
    """Ten megabytes through windows and kernel buffers, both told when to go on."""
    hub, edge = Owner(), Owner()
    async with listening(hub) as (_, port):
        carrier = await dial(edge, port)
        async with running(carrier):
            await edge.connected()
            session = carrier.session
            stream, left = session.open_stream(), 10_000_000
            while left:
                size = min(session.room(stream), left)
                if size:
                    session.write(stream, bytes(size))
                    left -= size
                    carrier.send_now()
                else:
                    seen = len(edge.of(StreamWritable))
                    await edge.until(lambda seen=seen: len(edge.of(StreamWritable)) > seen)  # type: ignore[misc]
            await hub.until(lambda: len(hub.got(hub.sessions[0], stream)) == 10_000_000)
        assert carrier.statistics().tx_bytes > 10_000_000


async def test_other_protocols_go_elsewhere_by_alpn() -> None:
    """One port, two protocols (R-11-6): what offers `other/1` is handed on with its first bytes; the rest is STP."""
    met: list[bytes] = []

    async def other(stream: trio.SocketStream, first: bytes, address: Any) -> None:
        met.append(first)
        await stream.send_all(b"not TLS at all")
        await stream.aclose()

    hub = Owner()
    async with listening(hub, elsewhere={b"other/1": other}) as (listener, port):

        def call() -> str:
            plain = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            plain.check_hostname, plain.verify_mode = False, ssl.CERT_NONE
            plain.set_alpn_protocols(["x", "other/1"])
            with raw(port) as sock:
                try:
                    plain.wrap_socket(sock)
                except ssl.SSLError as exc:
                    return exc.reason or ""
            return ""

        assert await trio.to_thread.run_sync(call) == "WRONG_VERSION_NUMBER"
        assert len(met) == 1
        assert met[0][0] == 22
        edge = Owner()
        async with running(await dial(edge, port)):
            await edge.connected()
        assert listener.door.waiting == 0


async def test_what_is_no_tls_is_dropped() -> None:
    hub = Owner()
    async with listening(hub) as (listener, port):
        with raw(port) as sock:
            sock.sendall(b"GET / HTTP/1.1\r\n\r\n")
            await hub.until(lambda: listener.door.broken == 1)
            assert await trio.to_thread.run_sync(sock.recv, 100) == b""
        with raw(port) as sock:
            pass
        await hub.until(lambda: listener.door.broken == 2 and not listener.door.waiting)


async def test_fault_29_slowloris_on_8443() -> None:
    """R-11-3: 64 strangers who say nothing, each gone in time; a real client gets in although they stand there."""
    hub, edge = Owner(), Owner()
    stale, patience = 0.5, 1.0
    door = Door(stale_after=stale, address_rate=1000.0, total_rate=1000.0)
    async with listening(hub, handshake_timeout=patience, door=door) as (listener, port):
        began = trio.current_time()
        strangers = contextlib.ExitStack()
        for n in range(MAX_UNPROVEN):
            strangers.enter_context(raw(port, f"127.0.0.{2 + n // MAX_PER_ADDRESS}"))
        await hub.until(lambda: listener.door.waiting == MAX_UNPROVEN)
        strangers.enter_context(raw(port, "127.0.0.2"))
        strangers.enter_context(raw(port, "127.0.0.3"))
        await hub.until(lambda: listener.door.refused_address == 2)
        strangers.enter_context(raw(port, "127.0.0.99"))
        await hub.until(lambda: listener.door.refused_full == 1)
        assert listener.door.waiting == MAX_UNPROVEN
        with trio.fail_after(patience):
            while not edge.of(Connected):  # as a client does, which tries again
                async with running(await dial(edge, port)):
                    await edge.until(lambda: bool(edge.of(Connected) or edge.of(SessionClosed)))
                    if edge.of(Connected):
                        assert listener.door.evicted == 1
                        break
                edge.events.clear()
                await trio.sleep(0.1)
        await hub.until(lambda: not listener.door.waiting)
        assert trio.current_time() - began < patience + 1.0
        assert listener.door.late + listener.door.evicted == MAX_UNPROVEN
        strangers.close()


async def test_fault_29_a_hello_byte_by_byte_is_late() -> None:
    """R-11-3: what drips is no better than silence."""
    hub = Owner()
    async with listening(hub, handshake_timeout=0.5) as (listener, port):
        with raw(port) as sock:
            began = trio.current_time()
            sock.sendall(b"\x16\x03\x01\x05\xdc\x01\x00\x05\xd8")
            while not listener.door.late:
                try:
                    sock.sendall(b"\x03")
                except OSError:
                    break
                await trio.sleep(0.02)
            await hub.until(lambda: not listener.door.waiting)
            assert 0.4 < trio.current_time() - began < 2.0


async def test_a_thread_of_dials_at_once() -> None:
    """Places are given back: thirty sessions come through a door of eight per address."""
    hub = Owner()
    door = Door(address_rate=1000.0, total_rate=1000.0)
    async with listening(hub, door=door) as (listener, port):
        limit = trio.CapacityLimiter(4)

        async def one() -> None:
            async with limit:
                edge = Owner()
                async with running(await dial(edge, port)):
                    await edge.connected()

        async with trio.open_nursery() as nursery:
            for _ in range(30):
                nursery.start_soon(one)
        assert len(hub.of(Connected)) == 30
        assert listener.door.refused_address == 0
    assert threading.active_count() < 20
