"""stp.carriers.udp on real sockets of this machine, with an endpoint that only counts and echoes."""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable
from typing import Any

import pytest
import trio
from attrs import define, field

from stp.carriers import udp
from stp.carriers.udp import LOOPBACK_DATAGRAM, UdpCarrier, sizes_for

pytestmark = pytest.mark.real


@define
class Sent:
    addr: Any
    data: bytes
    segment_size: int = 0


@define
class Recorder:
    """An endpoint as a carrier sees it."""

    received: list[bytes] = field(factory=list)
    outgoing: list[Sent] = field(factory=list)
    ready: list[Any] = field(factory=list)
    deadline: float | None = None
    fired: list[float] = field(factory=list)
    refused: list[tuple[Any, int]] = field(factory=list)
    echo: bool = False
    arrived: trio.Event = field(factory=trio.Event)
    rang: trio.Event = field(factory=trio.Event)

    def receive(self, data: memoryview, addr: Any, now: float, segment_size: int = 0) -> None:
        whole = bytes(data)
        size = segment_size or len(whole)
        pieces = [whole[i : i + size] for i in range(0, len(whole), size)]
        self.received += pieces
        if self.echo:
            self.outgoing += [Sent(addr, piece) for piece in pieces]
        self.arrived.set()

    def on_too_large(self, addr: Any, size: int, now: float) -> None:
        self.refused.append((addr, size))

    def datagrams_to_send(self, now: float) -> list[Sent]:
        out, self.outgoing = self.outgoing, []
        return out

    def next_timeout(self) -> float | None:
        return self.deadline

    def handle_timeout(self, now: float) -> None:
        self.fired.append(now)
        self.deadline = None
        self.rang.set()

    @property
    def has_news(self) -> bool:
        return bool(self.ready)

    @property
    def has_work(self) -> bool:
        return bool(self.ready or self.outgoing)

    def take_ready(self) -> list[Any]:
        out, self.ready = self.ready, []
        return out

    def take_suspects(self) -> list[Any]:
        return []

    async def wait(self, count: int) -> None:
        with trio.fail_after(5):
            while len(self.received) < count:
                self.arrived = trio.Event()
                await self.arrived.wait()


def ignore(_session: Any) -> None:
    pass


async def bind(
    endpoint: Recorder, host: str = "127.0.0.1", on_ready: Callable[[Any], None] = ignore
) -> UdpCarrier:
    return await UdpCarrier.bind(endpoint, host, 0, on_ready=on_ready)  # type: ignore[arg-type]


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
async def test_datagrams_go_and_come_back(host: str, nursery: trio.Nursery) -> None:
    near, far = Recorder(), Recorder(echo=True)
    a, b = await bind(near, host), await bind(far, host)
    for carrier in (a, b):
        await nursery.start(carrier.run)
    near.outgoing = [Sent(b.local_address, b"ping %d" % i) for i in range(3)]
    a.wake()
    await near.wait(3)
    assert near.received == [b"ping 0", b"ping 1", b"ping 2"]
    assert a.statistics().tx_datagrams == 3
    assert a.statistics().rx_bytes == 18
    a.close()
    b.close()


async def test_owners_may_touch_each_other(nursery: trio.Nursery) -> None:
    """What one session's owner queues within `on_ready` leaves; news it makes for another is told, too."""
    near, far = Recorder(), Recorder()
    told: list[str] = []

    def on_ready(session: str) -> None:
        told.append(session)
        near.outgoing.append(Sent(b.local_address, session.encode()))
        if session == "first":
            near.ready.append("second")
        a.wake()

    a, b = await bind(near, on_ready=on_ready), await bind(far)
    for carrier in (a, b):
        await nursery.start(carrier.run)
    near.ready = ["first"]
    a.wake()
    await far.wait(2)
    assert told == ["first", "second"]
    assert far.received == [b"first", b"second"]
    a.close()
    b.close()


async def test_any_address_takes_both_families(nursery: trio.Nursery) -> None:
    far = Recorder()
    b = await bind(far, "::")
    await nursery.start(b.run)
    for family, host in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")):
        with socket.socket(family, socket.SOCK_DGRAM) as sock:
            sock.sendto(host.encode(), (host, b.local_address[1]))
    await far.wait(2)
    assert sorted(far.received) == [b"127.0.0.1", b"::1"]
    assert (await b.resolve("127.0.0.1", 9000))[0] == "::ffff:127.0.0.1"
    b.close()


@pytest.mark.parametrize("offload", [True, False])
async def test_a_burst_arrives_as_its_datagrams(offload: bool, nursery: trio.Nursery) -> None:
    """Promise (3): the same datagrams with and without offload, also where the last one is short."""
    near, far = Recorder(), Recorder()
    a, b = await bind(near), await bind(far)
    if not offload:
        a.statistics().gso = False
    for carrier in (a, b):
        await nursery.start(carrier.run)
    burst = b"".join(bytes([i]) * 1200 for i in range(40)) + b"tail"
    near.outgoing = [Sent(b.local_address, burst, 1200)]
    a.wake()
    await far.wait(41)
    assert far.received == [bytes([i]) * 1200 for i in range(40)] + [b"tail"]
    assert a.statistics().tx_datagrams == 41
    assert b.statistics().rx_datagrams == 41
    if a.statistics().gso:
        assert a.statistics().tx_sends == 1
    else:
        assert a.statistics().tx_sends == 41
    a.close()
    b.close()


@pytest.mark.parametrize("code", [errno.EIO, errno.EINVAL])
async def test_broken_offload_is_given_up(code: int, nursery: trio.Nursery) -> None:
    """Promise (3): a driver that refuses GSO costs nothing but speed."""
    near, far = Recorder(), Recorder()
    a, b = await bind(near), await bind(far)
    a.statistics().gso = True

    class Refusing:
        """The real socket, but for sendmsg."""

        def __getattr__(self, name: str) -> Any:
            return getattr(real, name)

        def sendmsg(self, *_args: Any) -> int:
            raise OSError(code, "no offload here")

        def fileno(self) -> int:
            return real.fileno()

    real = a._sock
    a._sock = Refusing()  # type: ignore[assignment]
    for carrier in (a, b):
        await nursery.start(carrier.run)
    near.outgoing = [Sent(b.local_address, bytes(3600), 1200), Sent(b.local_address, bytes(2400), 1200)]
    a.wake()
    await far.wait(5)
    assert not a.statistics().gso
    assert a.statistics().errors == {errno.errorcode[code]: 1}
    nursery.cancel_scope.cancel()
    real.close()
    b.close()


async def test_a_datagram_too_large_is_lost_and_counted(nursery: trio.Nursery) -> None:
    """Promise (4)."""
    near = Recorder()
    a = await bind(near)
    await nursery.start(a.run)
    near.outgoing = [Sent(a.local_address, bytes(65_530)), Sent(a.local_address, b"after it")]
    a.wake()
    await near.wait(1)
    assert near.received == [b"after it"]
    assert a.statistics().errors == {"EMSGSIZE": 1}
    a.close()


async def test_timers_fire_and_move_forward(nursery: trio.Nursery) -> None:
    near = Recorder()
    a = await bind(near)
    await nursery.start(a.run)
    start = trio.current_time()
    near.deadline = start + 0.02
    a.wake()
    with trio.fail_after(5):
        await near.rang.wait()
    assert near.fired[0] >= start + 0.02
    a.close()


async def test_owner_hears_of_ready_sessions_and_its_answer_goes_at_once(nursery: trio.Nursery) -> None:
    """Promise (1)."""
    near, far = Recorder(), Recorder()
    b = await bind(far)
    heard = []

    def on_ready(session: Any) -> None:
        heard.append(session)
        near.outgoing.append(Sent(b.local_address, b"answer"))

    a = await bind(near, on_ready=on_ready)
    for carrier in (a, b):
        await nursery.start(carrier.run)
    near.ready = ["session"]
    far.outgoing = [Sent(a.local_address, b"question")]
    b.wake()
    await far.wait(1)
    assert heard == ["session"]
    assert far.received == [b"answer"]
    a.close()
    b.close()


async def test_a_full_send_buffer_does_not_stop_reception(nursery: trio.Nursery) -> None:
    """Promise (2): blocked bytes wait, in order, and nothing more is taken from the endpoint meanwhile."""
    near, far = Recorder(), Recorder()
    a, b = await bind(near), await bind(far)
    full = True

    class Full:
        """The real socket, but its send buffer is full until we say otherwise."""

        def __getattr__(self, name: str) -> Any:
            return getattr(real, name)

        def sendto(self, data: bytes, address: Any) -> int:
            if full:
                raise BlockingIOError
            return real.sendto(data, address)

        def fileno(self) -> int:
            return real.fileno()

    real = a._sock
    a._sock = Full()  # type: ignore[assignment]
    for carrier in (a, b):
        await nursery.start(carrier.run)
    near.outgoing = [Sent(b.local_address, b"first"), Sent(b.local_address, b"second")]
    a.wake()
    far.outgoing = [Sent(a.local_address, b"still heard")]
    b.wake()
    await near.wait(1)
    near.outgoing = [Sent(b.local_address, b"third")]
    a.wake()
    for _ in range(10):
        await trio.lowlevel.checkpoint()
    assert near.outgoing  # not taken while the kernel has no room
    full = False
    await far.wait(3)
    assert far.received == [b"first", b"second", b"third"]
    assert a.statistics().tx_blocked >= 1
    nursery.cancel_scope.cancel()
    real.close()
    b.close()


async def test_an_address_in_use_is_named() -> None:
    near = Recorder()
    a = await bind(near)
    with pytest.raises(OSError, match=rf"cannot listen on UDP 127.0.0.1 port {a.local_address[1]}: "):
        await UdpCarrier.bind(near, "127.0.0.1", a.local_address[1], on_ready=ignore)  # type: ignore[arg-type]
    a.close()


async def test_close_sends_what_is_due_and_ends_run() -> None:
    near, far = Recorder(), Recorder()
    a, b = await bind(near), await bind(far)
    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            await nursery.start(a.run)
            near.outgoing = [Sent(b.local_address, b"CLOSE")]
            a.close()
            a.close()
    async with trio.open_nursery() as nursery:
        await nursery.start(b.run)
        await far.wait(1)
        b.close()
    assert far.received == [b"CLOSE"]


def test_what_the_kernel_granted_is_told() -> None:
    counts = udp.UdpStatistics()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        udp._prepare(sock, counts)
    assert 0 < counts.receive_buffer <= udp.RECEIVE_BUFFER


async def test_a_name_that_does_not_resolve_is_named() -> None:
    a = await bind(Recorder())
    with pytest.raises(OSError, match=r"cannot resolve no\.such\.host\.invalid"):
        await a.resolve("no.such.host.invalid", 9000)
    assert await a.resolve("127.0.0.1", 9000) == ("127.0.0.1", 9000)
    await a.aclose()
    await a.aclose()


async def test_a_slow_name_has_a_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    async def never(*_args: Any, **_options: Any) -> Any:
        await trio.sleep_forever()

    a = await bind(Recorder())
    monkeypatch.setattr(udp, "RESOLVE_TIMEOUT", 0.01)
    monkeypatch.setattr(trio.socket, "getaddrinfo", never)
    with pytest.raises(OSError, match="no answer in"):
        await a.resolve("slow.example", 9000)
    a.close()


async def test_a_burst_of_bulk_does_not_starve_the_timers(nursery: trio.Nursery) -> None:
    """Promise (1): reception pauses after DRAIN_BYTES, and goes on at once."""
    far = Recorder()
    b = await bind(far)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        for _ in range(300):
            sock.sendto(bytes(1400), b.local_address)
    turns = 0
    turn = b._turn

    def counted(now: float) -> None:
        nonlocal turns
        turns += 1
        turn(now)

    b._turn = counted  # type: ignore[method-assign]
    await nursery.start(b.run)
    await far.wait(300)
    assert turns >= 300 // udp.DRAIN_BUFFERS
    b.close()


@pytest.mark.parametrize(
    ("host", "sizes"),
    [
        ("127.0.0.1", (LOOPBACK_DATAGRAM, LOOPBACK_DATAGRAM)),
        ("::1", (LOOPBACK_DATAGRAM, LOOPBACK_DATAGRAM)),
        ("::ffff:127.0.0.9", (LOOPBACK_DATAGRAM, LOOPBACK_DATAGRAM)),
        ("192.0.2.1", (1200, 1472)),
        ("2001:db8::1", (1200, 1452)),
        ("::ffff:192.0.2.1", (1200, 1472)),
    ],
)
def test_only_the_loopback_is_known_to_carry_more(host: str, sizes: tuple[int, int]) -> None:
    """R-6-7: elsewhere packets begin with 1,200 bytes, and are probed up to what Ethernet carries."""
    assert sizes_for((host, 9000)) == sizes
