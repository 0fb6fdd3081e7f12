"""What carries framed sessions over stream sockets, dialled or accepted: TLS and Unix sockets share it.

(1) One task per stream reads; a wake-up reads what is there, turns timers, tells owners, sends what is due.
(2) A write is made when the kernel takes it and not before: what it holds is chosen then. One that is cut short waits
    beside reception, and nothing more is asked of its session until it went.
(3) `on_ready` hears of every session to its end, SessionClosed included; what it raises ends `run`.
(4) After its last word a stream is shut for writing and read to its end, LINGER seconds at most: bytes left unread
    would make the kernel reset the connection, and the last word could be lost.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import AsyncIterator, Callable
from typing import Any, Final

import trio
from attrs import define, field

from stp.core.framed import FramedContext, FramedSession
from stp.core.states import State
from stp.core.verbs import AnySession

READ_SIZE: Final = 64 * 1024
READS_PER_TURN: Final = 4
"""Buffers of one stream that are read before others get their turn."""
WRITES_PER_TURN: Final = 16
"""Writes of 16 KiB to one stream before others, and what has arrived meanwhile, get their turn."""
ROUNDS_PER_TURN: Final = 4
"""Times that owners may write on what a write has made room for, before reading goes on."""
LINGER: Final = 1.0
"""Seconds, as in (4)."""
LAST_WRITE: Final = 3.0
"""Seconds that the last bytes of a session may wait for the kernel to take them."""
NOTSENT_LOWAT: Final = 32 * 1024
"""Bytes not sent yet that the kernel holds at most: what a command can wait behind (R-11-2)."""
UNACKED_TIMEOUT: Final = 10.0
"""Seconds that TCP waits for an acknowledgement before it gives the peer up. Twice what UDP waits: TCP's own probes
come more rarely."""

CLOSE_POLL: Final = 0.005
ACCEPT_PAUSE: Final = 0.1
"""Seconds."""


@define
class StreamStatistics:
    """Counts since the carrier was made; sizes in bytes, TLS included."""

    rx_bytes: int = 0
    tx_bytes: int = 0
    rx_reads: int = 0
    tx_writes: int = 0
    tx_blocked: int = 0
    """Writes that had to wait for the kernel."""
    errors: dict[str, int] = field(factory=dict)
    """Reads and writes that failed, by errno name."""


class Stream:
    """A connected socket and the session on it."""

    __slots__ = ("blocked", "ended", "on_proven", "rest", "session", "sock", "timer", "until")

    def __init__(self, sock: socket.socket, session: FramedSession) -> None:
        sock.setblocking(False)
        self.sock = sock
        self.session = session
        self.rest = b""
        """What the kernel did not take of the last write."""
        self.blocked = False
        self.ended = False
        """Nothing more can be read."""
        self.timer = trio.CancelScope()
        self.until: float | None = None
        """When the last bytes of a session that is over have waited long enough."""
        self.on_proven: Callable[[], None] | None = None
        """A listener's: called once the peer has shown who it is, and may come in."""
        session.conn = self


def prepare_tcp(sock: socket.socket) -> None:
    """Options that a kernel may refuse, or not have."""
    for option, value in (
        ("TCP_NODELAY", 1),
        ("TCP_NOTSENT_LOWAT", NOTSENT_LOWAT),
        ("TCP_USER_TIMEOUT", int(UNACKED_TIMEOUT * 1000)),
    ):
        number = getattr(socket, option, None)
        if number is not None:
            try:
                sock.setsockopt(socket.IPPROTO_TCP, number, value)
            except OSError:
                continue


def _nothing() -> None:
    pass


def plain_socket(stream: trio.SocketStream) -> socket.socket:
    """The socket of a trio stream, which is of no further use."""
    return socket.socket(fileno=stream.socket.detach())


class StreamCarrier:
    """Any number of streams, and the agenda that their sessions share."""

    def __init__(self, context: FramedContext, on_ready: Callable[[AnySession], None]) -> None:
        self._context = context
        self._agenda = context.agenda
        self._on_ready = on_ready
        self._streams: set[Stream] = set()
        self._wakeup = trio.Event()
        self._nursery: trio.Nursery | None = None
        self._in_turn = False
        self._closed = False
        self._statistics = StreamStatistics()
        self.turn_begins: Callable[[], None] = _nothing
        self.turn_ends: Callable[[], None] = _nothing
        """Called around what the owners of one wake-up are told."""

    def statistics(self) -> StreamStatistics:
        """Live counters: read, do not keep."""
        return self._statistics

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Carries until cancelled or closed."""
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                nursery.start_soon(self._send_loop)
                await self._start(nursery)
                task_status.started()
        finally:
            self._nursery = None
            self._release()

    async def _start(self, nursery: trio.Nursery) -> None:
        """What runs beside; for those who know where streams come from."""
        raise NotImplementedError

    def wake(self) -> None:
        """Something may have been queued on a session: look at it soon. Cheap, idempotent, trio thread only."""
        if not self._in_turn and (self._agenda.to_send or self._agenda.ready):
            self._wakeup.set()

    def send_now(self) -> None:
        """As `wake`, but what is queued leaves before this returns, as far as the kernel takes it."""
        if self._in_turn or self._closed:
            return
        if not self._agenda.ready:
            self._flush(trio.current_time())
        if self._agenda.ready:
            self._wakeup.set()

    def close(self) -> None:
        """Sends what is due (a CLOSE, as a rule), as far as the kernel takes it, and closes; `run` returns."""
        if self._closed:
            return
        self._flush(trio.current_time())
        self._closed = True
        self._release()
        if self._nursery is not None:
            self._nursery.cancel_scope.cancel()

    async def aclose(self) -> None:
        """As `close`, but first waits, LINGER seconds at most, until the streams of sessions that are over ended."""
        self.send_now()
        with trio.move_on_after(LINGER):
            while self._nursery is not None and not all(one.session.live for one in self._streams):  # noqa: ASYNC110
                await trio.sleep(CLOSE_POLL)
        self.close()

    def _release(self) -> None:
        for stream in list(self._streams):
            self._drop(stream)

    # -- one stream

    async def _serve(self, stream: Stream) -> None:
        """From the first byte to the last. The stream is closed afterwards."""
        session = stream.session
        self._streams.add(stream)
        try:
            self._turn(trio.current_time())
            while not self._is_over(stream):
                with trio.CancelScope(deadline=self._due(stream)) as stream.timer:
                    await trio.lowlevel.wait_readable(stream.sock)
                now = trio.current_time()
                if stream.timer.cancelled_caught:
                    session.handle_timeout(now)
                else:
                    self._read(stream, now)
                if stream.on_proven is not None and session.state is State.ESTABLISHED:
                    stream.on_proven()
                    stream.on_proven = None
                self._turn(now)
            await self._linger(stream)
        except trio.ClosedResourceError:
            return
        finally:
            self._drop(stream)

    def _due(self, stream: Stream) -> float:
        due = stream.session.next_timeout()
        if due is None:
            due = stream.until
        return float("inf") if due is None else due

    def _is_over(self, stream: Stream) -> bool:
        if stream.session.state is not State.CLOSED:
            return False
        if not stream.rest or stream.ended:
            return True
        now = trio.current_time()
        if stream.until is None:
            stream.until = now + LAST_WRITE
        return now >= stream.until

    async def _linger(self, stream: Stream) -> None:
        """(4)"""
        try:
            stream.sock.shutdown(socket.SHUT_WR)
        except OSError:
            return
        with trio.move_on_after(LINGER):
            while not stream.ended:
                await trio.lowlevel.wait_readable(stream.sock)
                self._read(stream, trio.current_time())

    def _drop(self, stream: Stream) -> None:
        """Forget it, and close. A session that is still alive there has lost its connection."""
        if stream not in self._streams:
            return
        self._streams.discard(stream)
        session = stream.session
        session.on_lost("the carrier was closed", trio.current_time())
        session.conn = None
        trio.lowlevel.notify_closing(stream.sock)
        if not stream.ended:
            self._read(stream, trio.current_time())  # what lies there unread would reset the connection
        stream.sock.close()

    def _read(self, stream: Stream, now: float) -> None:
        counts, session = self._statistics, stream.session
        for _ in range(READS_PER_TURN):
            try:
                data = stream.sock.recv(READ_SIZE)
            except BlockingIOError:
                return
            except OSError as exc:
                self._lost(stream, exc, now)
                return
            if not data:
                stream.ended = True
                session.on_lost("the peer closed the connection", now)
                return
            counts.rx_reads += 1
            counts.rx_bytes += len(data)
            session.receive(data, now)
            if len(data) < READ_SIZE:
                return

    def _lost(self, stream: Stream, exc: OSError, now: float) -> None:
        self._count_error(exc)
        stream.ended = True
        stream.rest = b""
        stream.session.on_lost(exc.strerror or str(exc), now)
        stream.timer.deadline = now

    def _count_error(self, exc: OSError) -> None:
        name = errno.errorcode.get(exc.errno or 0, "unknown")
        self._statistics.errors[name] = self._statistics.errors.get(name, 0) + 1

    # -- turns

    async def _send_loop(self) -> None:
        while not self._closed:
            await self._wakeup.wait()
            self._wakeup = trio.Event()
            self._turn(trio.current_time())

    def _turn(self, now: float) -> None:
        """Owners hear, then what is due is sent, and again while that brings news (1)."""
        self._in_turn = True
        try:
            for _ in range(ROUNDS_PER_TURN):
                ready, self._agenda.ready = self._agenda.ready, []
                if ready:
                    self.turn_begins()
                    for session in ready:
                        session.in_ready = False
                        self._on_ready(session)
                    self.turn_ends()
                self._flush(now)
                if not self._agenda.ready:
                    return
        finally:
            self._in_turn = False
        self._wakeup.set()

    def _flush(self, now: float) -> None:
        to_send, self._agenda.to_send = self._agenda.to_send, []
        for session in to_send:
            session.in_to_send = False
            stream: Stream | None = session.conn
            if stream is not None and not stream.blocked:
                self._send(stream, now)

    def _send(self, stream: Stream, now: float) -> None:
        counts, session, sock = self._statistics, stream.session, stream.sock
        for _ in range(WRITES_PER_TURN):
            data = stream.rest or session.next_write(now)
            if not data:
                break
            try:
                sent = sock.send(data)
            except BlockingIOError:
                sent = 0
            except OSError as exc:
                self._read(stream, now)  # the peer's last words may lie there
                self._lost(stream, exc, now)
                return
            counts.tx_writes += 1
            counts.tx_bytes += sent
            stream.rest = data[sent:] if sent < len(data) else b""
            if stream.rest:
                self._block(stream)
                break
        else:
            session.want_to_send()
            self._wakeup.set()
        stream.timer.deadline = now if session.state is State.CLOSED else self._due(stream)

    def _block(self, stream: Stream) -> None:
        """(2)"""
        self._statistics.tx_blocked += 1
        if self._nursery is not None and not self._closed:
            stream.blocked = True
            self._nursery.start_soon(self._unblock, stream)

    async def _unblock(self, stream: Stream) -> None:
        if stream not in self._streams:
            return  # closed before we came to wait
        try:
            await trio.lowlevel.wait_writable(stream.sock)
        except trio.ClosedResourceError:
            return
        stream.blocked = False
        if stream in self._streams:
            self._send(stream, trio.current_time())
            if self._agenda.ready:
                self._wakeup.set()


class DialledCarrier(StreamCarrier):
    """One session that was dialled, and its stream."""

    def __init__(
        self, stream: Stream, context: FramedContext, on_ready: Callable[[AnySession], None]
    ) -> None:
        super().__init__(context, on_ready)
        self.session = stream.session
        """There at once, in State.HANDSHAKE; once it is KEYED its `own` says what the listener calls us."""
        self._streams.add(stream)
        self._stream = stream

    async def _start(self, nursery: trio.Nursery) -> None:
        nursery.start_soon(self._serve_and_end, nursery)

    async def _serve_and_end(self, nursery: trio.Nursery) -> None:
        await self._serve(self._stream)
        self._turn(trio.current_time())
        nursery.cancel_scope.cancel()


async def accepted(
    listener: socket.socket, on_error: Callable[[OSError], None]
) -> AsyncIterator[socket.socket]:
    """Connections, until the listener is closed. What the kernel cannot give, for want of descriptors say, is counted
    and asked for again after ACCEPT_PAUSE."""
    while True:
        try:
            await trio.lowlevel.wait_readable(listener)
            sock, _ = listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            continue
        except trio.ClosedResourceError:
            return
        except OSError as exc:
            if listener.fileno() < 0:
                return
            on_error(exc)
            await trio.sleep(ACCEPT_PAUSE)
            continue
        sock.setblocking(False)
        yield sock


def address_of(sock: socket.socket) -> Any:
    """(host, port) of the other end; "" where it went already."""
    try:
        found = sock.getpeername()
    except OSError:
        return ""
    return found[:2] if isinstance(found, tuple) else found
