"""The UDP carrier: one socket, one Endpoint, no decisions.

(1) One wake-up drains the socket, turns timers, tells the owner which sessions are ready, sends what is due.
(2) Nothing is awaited per datagram. A send that would block waits beside reception, and nothing more is asked
    of the endpoint until it went.
(3) Segmentation offload (GSO, GRO) is an accelerator: without it, or when it fails, datagrams go singly.
(4) A datagram the kernel refuses is lost and counted by errno; recovery sends again what mattered.
(5) A `movable` carrier takes a new local port when its endpoint suspects the path, or when there is a route again
    after there was none; what comes to the old port is still taken for DRAIN_TIME. No session ends by it (R-8-8).
"""

from __future__ import annotations

import errno
import functools
import socket
import struct
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import trio
from attrs import define, field

from stp.core.sizing import BASE_DATAGRAM
from stp.core.states import State

if TYPE_CHECKING:
    from stp.core.endpoint import Endpoint
    from stp.core.output import Transmit
    from stp.core.session import Session

Address: TypeAlias = tuple[str, int] | tuple[str, int, int, int]

RECEIVE_BUFFER: Final = 8 * 1024 * 1024
"""Bytes asked of the kernel; at the default two thirds of a full-rate burst are lost on loopback."""
SEND_BUFFER: Final = 4 * 1024 * 1024
DATAGRAM_BUFFER: Final = 65_536
"""Bytes: the largest GRO buffer and the largest UDP datagram."""
DRAIN_BUFFERS: Final = 64
DRAIN_BYTES: Final = 256 * 1024
"""Buffers or bytes read in one go before timers and sends get their turn: a bulk sender idles without ACKs."""
LOOPBACK_DATAGRAM: Final = 8_972
"""Bytes of UDP payload between two processes of one host, whose path is known: a packet costs what it costs, small
or large. What we say we can receive (`max_datagram`) is no less."""
LARGEST_DATAGRAM: Final = 1_472
"""Bytes of UDP payload up to which paths are probed by default: what Ethernet carries over IPv4."""
DRAIN_TIME: Final = 3.0
"""Seconds for which the socket that was left is still read."""
ROUTE_PAUSE: Final = 1.0
"""Seconds between looks whether there is a route again."""
HEAP_KEPT: Final = 4 * 1024 * 1024
"""Bytes of freed memory that the C library is to keep rather than give back: a burst is 64 KiB, and memory given back
after each comes with page faults the next time."""
RESOLVE_TIMEOUT: Final = 5.0
"""Seconds that a name may take."""

IP_UDP_HEADERS: Final = 48
"""IPv6 and UDP."""
IPV6_EXTRA: Final = 20
"""Bytes by which the header of IPv6 is longer than that of IPv4."""

# linux/udp.h, linux/in.h, linux/in6.h: Python names none of these
SOL_UDP: Final = 17
UDP_SEGMENT: Final = 103
UDP_GRO: Final = 104
SO_RCVBUFFORCE: Final = 33
SO_SNDBUFFORCE: Final = 32
IP_MTU_DISCOVER: Final = 10
IPV6_MTU_DISCOVER: Final = 23
PMTUDISC_PROBE: Final = 3
"""Set DF, ignore what the kernel believes of the path: packet size is the session's business (RFC 8899)."""

_U16: Final = struct.Struct("=H")
_INT: Final = struct.Struct("=i")
_CONTROL_SPACE: Final = socket.CMSG_SPACE(_INT.size)
_ROUTE_ERRORS: Final = frozenset((errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ENETDOWN, errno.EADDRNOTAVAIL))
"""What sends say while this machine has no way to the peer: it changes networks, as a rule."""
_OFFLOAD_ERRORS: Final = frozenset((errno.EIO, errno.EINVAL, errno.EMSGSIZE))


@define
class UdpStatistics:
    """Counts since bind; sizes in bytes."""

    rx_buffers: int = 0
    """Receive calls that brought something: with GRO one brings many datagrams."""
    rx_datagrams: int = 0
    rx_bytes: int = 0
    tx_sends: int = 0
    tx_datagrams: int = 0
    tx_bytes: int = 0
    tx_blocked: int = 0
    gso: bool = False
    gro: bool = False
    receive_buffer: int = 0
    """What the kernel granted of RECEIVE_BUFFER."""
    send_buffer: int = 0
    rebinds: int = 0
    """New local ports taken on the way."""
    errors: dict[str, int] = field(factory=dict)
    """Sends and receives that failed, by errno name."""


def sizes_for(addr: Address, largest: int = LARGEST_DATAGRAM) -> tuple[int, int]:
    """For `EndpointConfig.sizes_for`: bytes of full packets to this address at first, and what they are probed up to.

    `largest` is for IPv4. The loopback is known, and not probed before something is lost there.
    """
    host = addr[0].removeprefix("::ffff:")
    if (host == "::1" or host.startswith("127.")) and _loopback_carries(LOOPBACK_DATAGRAM):
        return LOOPBACK_DATAGRAM, LOOPBACK_DATAGRAM
    return BASE_DATAGRAM, largest - (IPV6_EXTRA if ":" in host else 0)


@functools.cache
def _loopback_carries(size: int) -> bool:
    """Is the loopback device's MTU what it always is, 65,536? Somebody may have changed it."""
    try:
        with open("/sys/class/net/lo/mtu", encoding="ascii") as file:
            return int(file.read()) >= size + IP_UDP_HEADERS
    except (OSError, ValueError):
        return False


class UdpCarrier:
    """Moves datagrams between one socket and one endpoint. Make it with `bind`, then keep `run` running.

    `on_ready(session)` is called, in the trio thread, for every session with something new; what it raises
    ends `run`. After it returns, what it queued is sent.
    """

    def __init__(
        self,
        sock: socket.socket,
        endpoint: Endpoint,
        on_ready: Callable[[Session], None],
        *,
        movable: bool = False,
    ) -> None:
        self.turn_begins: Callable[[], None] = _nothing
        self.turn_ends: Callable[[], None] = _nothing
        """Called around the `on_ready` calls of one wake-up; what the last one queues leaves with the rest."""
        self.on_rebind: Callable[[], None] = _nothing
        """Called when another local port was taken."""
        self._sock = sock
        self._movable = movable
        self._reading = trio.CancelScope()
        self._sources: dict[Address, str] = {}
        self._unrouted: Address | None = None
        self._look_at = 0.0
        self._endpoint = endpoint
        self._on_ready = on_ready
        self._buffer = bytearray(DATAGRAM_BUFFER)
        self._view = memoryview(self._buffer)
        self._wakeup = trio.Event()
        self._timer = trio.CancelScope()
        self._blocked: deque[Transmit] = deque()
        self._nursery: trio.Nursery | None = None
        self._in_turn = False
        self._closed = False
        self._statistics = UdpStatistics()
        _prepare(sock, self._statistics)

    @classmethod
    async def bind(
        cls,
        endpoint: Endpoint,
        host: str = "0.0.0.0",
        port: int = 0,
        *,
        on_ready: Callable[[Session], None],
        movable: bool = False,
    ) -> UdpCarrier:
        """A carrier on that local address; port 0 takes a free one, "::" takes IPv4 too.

        `movable`: it only dials, and may take another port at any time (5). Raises OSError, with the address in its
        text.
        """
        try:
            found = await trio.socket.getaddrinfo(
                host, port, type=socket.SOCK_DGRAM, flags=socket.AI_PASSIVE | socket.AI_NUMERICSERV
            )
            family, _, _, _, address = found[0]
            sock = _open(family, address)
        except OSError as exc:
            raise OSError(exc.errno, f"cannot listen on UDP {host} port {port}: {exc.strerror}") from exc
        return cls(sock, endpoint, on_ready, movable=movable)

    @property
    def local_address(self) -> Address:
        address: Address = self._sock.getsockname()
        return address

    def statistics(self) -> UdpStatistics:
        """Live counters: read, do not keep."""
        return self._statistics

    async def resolve(self, host: str, port: int) -> Address:
        """An address that this socket can send to. Raises OSError, also when the name takes over 5 s."""
        family = self._sock.family
        flags = socket.AI_V4MAPPED if family == socket.AF_INET6 else 0
        with trio.move_on_after(RESOLVE_TIMEOUT):
            try:
                found = await trio.socket.getaddrinfo(
                    host, port, family=family, type=socket.SOCK_DGRAM, flags=flags
                )
            except OSError as exc:
                raise OSError(exc.errno, f"cannot resolve {host}: {exc.strerror}") from exc
            return _ip_address(found[0][4])
        raise OSError(errno.ETIMEDOUT, f"cannot resolve {host}: no answer in {RESOLVE_TIMEOUT:.0f} s")

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Carries until cancelled or closed."""
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                nursery.start_soon(self._receive_loop, self._sock, self._reading)
                nursery.start_soon(self._timer_loop)
                task_status.started()
        finally:
            self._nursery = None

    def wake(self) -> None:
        """Something may have been queued on a session: look at it soon. Cheap, idempotent, trio thread only.

        It costs nothing when nothing was queued here, and within `on_ready`, after which all is sent anyhow.
        """
        if self._in_turn:
            return
        if self._endpoint.has_work:
            self._wakeup.set()
        else:
            self._advance_timer()

    def send_now(self) -> None:
        """As `wake`, for owners who know that nothing more follows at once: what is queued leaves before this
        returns, which spares a turn of the event loop."""
        endpoint = self._endpoint
        if self._in_turn or self._closed or not endpoint.has_work:
            return
        if endpoint.has_news:
            self._wakeup.set()
            return
        self._flush(trio.current_time())
        self._advance_timer()

    def close(self) -> None:
        """Sends what is due (a CLOSE, as a rule) and closes the socket; `run` returns."""
        if self._closed:
            return
        self._flush(trio.current_time())
        self._closed = True
        trio.lowlevel.notify_closing(self._sock)
        self._sock.close()
        self._wakeup.set()
        if self._nursery is not None:
            self._nursery.cancel_scope.cancel()

    async def aclose(self) -> None:
        self.close()
        await trio.lowlevel.checkpoint()

    # -- the two loops

    async def _receive_loop(self, sock: socket.socket, scope: trio.CancelScope) -> None:
        """Reads `sock` until the carrier is closed, or, once another took its place, until `scope` is over."""
        try:
            with scope:
                while not self._closed:
                    try:
                        await trio.lowlevel.wait_readable(sock)
                    except trio.ClosedResourceError:
                        return
                    self._drain(sock)
                    self._turn(trio.current_time())
                    self._advance_timer()
        finally:
            if sock is not self._sock:
                trio.lowlevel.notify_closing(sock)
                sock.close()

    def _advance_timer(self) -> None:
        due = self._endpoint.next_timeout()
        if due is not None and due < self._timer.deadline:
            self._timer.deadline = due

    async def _timer_loop(self) -> None:
        while not self._closed:
            due = self._endpoint.next_timeout()
            self._timer = trio.CancelScope(deadline=float("inf") if due is None else due)
            with self._timer:
                await self._wakeup.wait()
            if self._wakeup.is_set():
                self._wakeup = trio.Event()
            self._turn(trio.current_time())

    def _turn(self, now: float) -> None:
        """Timers, owners, sends (1)."""
        endpoint = self._endpoint
        due = endpoint.next_timeout()
        if due is not None and due <= now:
            endpoint.handle_timeout(now)
        if self._movable:
            self._move(now)
        ready = endpoint.take_ready()
        if ready:
            self._in_turn = True
            self.turn_begins()
            for session in ready:
                self._on_ready(session)
            self.turn_ends()
            self._in_turn = False
        if not self._closed:
            self._flush(trio.current_time())
        if endpoint.has_news:
            self._wakeup.set()  # of what owners did to one another's sessions

    # -- other ports (5)

    def _move(self, now: float) -> None:
        if self._endpoint.take_suspects():
            self.rebind()
        elif self._unrouted is not None and now >= self._look_at:
            self._look_at = now + ROUTE_PAUSE
            if _source(self._unrouted):
                self._unrouted = None
                self.rebind()

    def rebind(self) -> bool:
        """Go on from a new local port: every session that was dialled migrates there. Trio thread only.

        Whether there is a new port; False: the kernel gave none (counted by errno), or the carrier is not `movable`,
        or does not run.
        """
        if not self._movable or self._closed or self._nursery is None:
            return False
        try:
            sock = _open(self._sock.family, (self._sock.getsockname()[0], 0))
        except OSError as exc:
            self._count_error(exc)
            return False
        gso = self._statistics.gso
        _prepare(sock, self._statistics)
        self._statistics.gso &= gso
        self._statistics.rebinds += 1
        now = trio.current_time()
        self._reading.deadline = now + DRAIN_TIME
        self._sock, self._reading = sock, trio.CancelScope()
        self._nursery.start_soon(self._receive_loop, sock, self._reading)
        for session in self._endpoint.sessions:
            if session.dialling and session.state is State.ESTABLISHED:
                session.migrate(same_host=self._same_source(session.addr), now=now)
        if not self._in_turn:
            self._wakeup.set()
        self.on_rebind()
        return True

    def _same_source(self, address: Address) -> bool:
        """Whether the kernel would send from the same local address as when this was asked last."""
        source = _source(address)
        known = self._sources.get(address)
        self._sources = {address: source}
        return bool(source) and source == known

    # -- the socket

    def _drain(self, sock: socket.socket) -> None:
        """Each buffer has a time of its own, taken after it was read: one taken before would make a round trip
        shorter than it was by as long as this process did not run in between."""
        view, counts, receive = self._view, self._statistics, self._endpoint.receive
        clock = trio.lowlevel.current_clock().current_time
        buffers = [self._buffer]
        left = DRAIN_BYTES
        for _ in range(DRAIN_BUFFERS):
            try:
                size, control, _, address = sock.recvmsg_into(buffers, _CONTROL_SPACE)
            except BlockingIOError:
                return
            except OSError as exc:
                self._count_error(exc)
                continue
            segment = _INT.unpack_from(control[0][2])[0] if control else 0
            counts.rx_buffers += 1
            counts.rx_bytes += size
            if 0 < segment < size:
                counts.rx_datagrams += -(-size // segment)
                receive(view[:size], address, clock(), segment)
            else:
                counts.rx_datagrams += 1
                receive(view[:size], address, clock(), 0)
            left -= size
            if left <= 0:
                return

    def _flush(self, now: float) -> None:
        if self._blocked:
            return
        pending = deque(self._endpoint.datagrams_to_send(now))
        self._send_all(pending)

    def _send_all(self, pending: deque[Transmit]) -> None:
        while pending:
            transmit = pending[0]
            try:
                if 0 < transmit.segment_size < len(transmit.data):
                    self._send_burst(transmit)
                else:
                    self._send_one(transmit.data, transmit.addr)
            except BlockingIOError:
                self._statistics.tx_blocked += 1
                self._blocked = pending
                if self._nursery is not None:
                    self._nursery.start_soon(self._unblock)
                return
            pending.popleft()

    async def _unblock(self) -> None:
        """(2): the rest goes when the kernel has room again."""
        try:
            await trio.lowlevel.wait_writable(self._sock)
        except trio.ClosedResourceError:
            if self._closed:
                return
        pending, self._blocked = self._blocked, deque()
        self._send_all(pending)
        if not self._blocked:
            self._wakeup.set()

    def _send_one(self, data: bytes | memoryview, address: Address) -> bool:
        """Whether the kernel took it. Raises BlockingIOError."""
        counts = self._statistics
        try:
            self._sock.sendto(data, address)
        except BlockingIOError:
            raise
        except OSError as exc:
            self._refused(exc, address)
            if exc.errno == errno.EMSGSIZE:
                self._endpoint.on_too_large(address, len(data), trio.current_time())
            return False
        counts.tx_sends += 1
        counts.tx_datagrams += 1
        counts.tx_bytes += len(data)
        return True

    def _send_burst(self, transmit: Transmit) -> None:
        """Many datagrams of one size to one peer (3). Raises BlockingIOError before anything went."""
        counts, data, size = self._statistics, transmit.data, transmit.segment_size
        if counts.gso:
            try:
                self._sock.sendmsg([data], [(SOL_UDP, UDP_SEGMENT, _U16.pack(size))], 0, transmit.addr)
            except BlockingIOError:
                raise
            except OSError as exc:
                self._refused(exc, transmit.addr)
                if exc.errno not in _OFFLOAD_ERRORS:
                    return
            else:
                counts.tx_sends += 1
                counts.tx_datagrams += -(-len(data) // size)
                counts.tx_bytes += len(data)
                return
        if self._send_singly(data, size, transmit.addr) and counts.gso:
            counts.gso = False  # the datagrams were good: it is the offload that fails here

    def _send_singly(self, data: bytes, size: int, address: Address) -> bool:
        """Whether the kernel took all of them. Once one is away, one that would block counts as lost."""
        view = memoryview(data)
        went = True
        for start in range(0, len(data), size):
            try:
                went &= self._send_one(view[start : start + size], address)
            except BlockingIOError as exc:
                if start == 0:
                    raise
                self._count_error(exc)
                return False
        return went

    def _refused(self, exc: OSError, address: Address) -> None:
        """A send failed."""
        self._count_error(exc)
        if exc.errno in _ROUTE_ERRORS:
            self._unrouted = address

    def _count_error(self, exc: OSError) -> None:
        name = errno.errorcode.get(exc.errno or 0, "unknown")
        errors = self._statistics.errors
        errors[name] = errors.get(name, 0) + 1


def _open(family: int, address: tuple[Any, ...]) -> socket.socket:
    """A socket bound to that local address; "::" takes IPv4 too. Raises OSError."""
    sock = socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0 if address[0] == "::" else 1)
        sock.bind(address)
    except BaseException:
        sock.close()
        raise
    return sock


def _source(address: Address) -> str:
    """The local address that the kernel sends to `address` from; "" where it knows no way. Nothing is sent."""
    family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
            sock.connect(address)
            return str(sock.getsockname()[0])
    except OSError:
        return ""


def _nothing() -> None:
    """What most owners want of the beginning and the end of a turn."""


def _ip_address(found: tuple[str, int] | tuple[str, int, int, int] | tuple[int, bytes]) -> Address:
    if isinstance(found[0], int):  # what getaddrinfo gives where Python was built without IPv6
        raise OSError(errno.EAFNOSUPPORT, "address family not supported")
    return found


def _prepare(sock: socket.socket, counts: UdpStatistics) -> None:
    """Socket options, each of which a kernel may refuse: what it granted goes into the statistics."""
    bytes(
        HEAP_KEPT // 2
    )  # glibc, mallopt(3): freeing so large a block raises M_TRIM_THRESHOLD to twice its size
    _try_option(sock, socket.SOL_SOCKET, SO_RCVBUFFORCE, RECEIVE_BUFFER) or _try_option(
        sock, socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER
    )
    _try_option(sock, socket.SOL_SOCKET, SO_SNDBUFFORCE, SEND_BUFFER) or _try_option(
        sock, socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER
    )
    # Linux reports twice what it grants, its own bookkeeping included (socket(7)).
    counts.receive_buffer = sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) // 2
    counts.send_buffer = sock.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) // 2
    if sock.family == socket.AF_INET6:
        _try_option(sock, socket.IPPROTO_IPV6, IPV6_MTU_DISCOVER, PMTUDISC_PROBE)
    _try_option(sock, socket.IPPROTO_IP, IP_MTU_DISCOVER, PMTUDISC_PROBE)
    counts.gso = _try_option(sock, SOL_UDP, UDP_SEGMENT, 1200) and _try_option(sock, SOL_UDP, UDP_SEGMENT, 0)
    counts.gro = _try_option(sock, SOL_UDP, UDP_GRO, 1)


def _try_option(sock: socket.socket, level: int, option: int, value: int) -> bool:
    try:
        sock.setsockopt(level, option, value)
    except OSError:
        return False
    return True
