"""The Unix carrier: sessions on one host, between processes whom the kernel vouches for (protocol §11, R-11-5).

(1) A socket is bound only in a directory that nobody but root and we can write to, and takes the place of nothing but
    a socket of ours that nobody answers on.
(2) Its mode and group are set before it listens: nobody gets in early.
(3) Who connects is what SO_PEERCRED and SO_PEERGROUPS say, taken when it connects; the hello cannot change it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Final

import trio
from attrs import define, evolve

from stp.carriers.door import Door, DoorStatistics, Place, unlimited
from stp.carriers.streams import DialledCarrier, Stream, StreamCarrier, accepted
from stp.core.channel import PlainChannel
from stp.core.flow import WindowBudget
from stp.core.framed import FOR_EVER, FramedContext, FramedSession
from stp.core.handshake import PeerIdentity
from stp.core.path import KEEPALIVE
from stp.core.verbs import AnySession

MAX_PATH: Final = 107
"""Bytes of a socket's path (unix(7))."""
BACKLOG: Final = 128
DIAL_BUDGET: Final = 64 * 1024 * 1024
SO_PEERGROUPS: Final = 59
"""linux/asm-generic/socket.h; Python does not name it."""
MAX_GROUPS: Final = 1024

_CREDENTIALS: Final = struct.Struct("3i")


@define
class Credentials:
    """Whom the kernel says a connected process belongs to."""

    pid: int
    uid: int
    gid: int
    groups: frozenset[int] = frozenset()
    """`gid` and the supplementary groups."""


def credentials_of(sock: socket.socket) -> Credentials:
    """Raises OSError."""
    pid, uid, gid = _CREDENTIALS.unpack(
        sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    )
    groups = {gid}
    with contextlib.suppress(OSError):  # a kernel before 4.13
        raw = sock.getsockopt(socket.SOL_SOCKET, SO_PEERGROUPS, 4 * MAX_GROUPS)
        groups.update(struct.unpack(f"{len(raw) // 4}I", raw[: len(raw) // 4 * 4]))
    return Credentials(pid, uid, gid, frozenset(groups))


class UnixCarrier(DialledCarrier):
    """A dialled session on a Unix socket: what TlsCarrier is on TCP."""

    @classmethod
    async def dial(
        cls,
        path: str,
        *,
        on_ready: Callable[[AnySession], None],
        expected: tuple[str, str] | None = None,
        keepalive: float = KEEPALIVE,
        random_bytes: Callable[[int], bytes] = os.urandom,
    ) -> UnixCarrier:
        """`expected`: (domain, node) that must listen there; None: whoever does.

        Raises OSError, with the path in its text.
        """
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        try:
            sock.connect(path)  # a Unix socket connects at once or not at all
            context = FramedContext(
                carrier="unix",
                random_bytes=random_bytes,
                budget=WindowBudget(DIAL_BUDGET),
                keepalive=keepalive,
            )
            session = FramedSession(
                context,
                PlainChannel(None),
                path,
                dialling=True,
                now=trio.current_time(),
                expected=expected,
            )
        except BaseException as exc:
            sock.close()
            if isinstance(exc, OSError):
                raise OSError(exc.errno, f"cannot connect to {path}: {exc.strerror or exc}") from exc
            raise
        await trio.lowlevel.checkpoint()
        return cls(Stream(sock, session), context, on_ready)


class UnixListener(StreamCarrier):
    """Sessions that processes of this host dial. Make the socket with `listening_socket`, then keep `run` running.

    `name_of`: the node name of whoever has these credentials, None for nobody's. `own`: our (domain, node).
    """

    def __init__(
        self,
        sock: socket.socket,
        *,
        name_of: Callable[[Credentials], str | None],
        own: tuple[str, str],
        context: FramedContext,
        on_ready: Callable[[AnySession], None],
        door: Door | None = None,
    ) -> None:
        super().__init__(context, on_ready)
        self._sock = sock
        self.path: str = sock.getsockname()
        self._bound = os.stat(self.path).st_ino
        self._name_of = name_of
        self._own = own
        self._door = door or unlimited()
        self.accepting = True

    @property
    def door(self) -> DoorStatistics:
        """Live counters: read, do not keep."""
        return self._door.statistics

    def stop_accepting(self) -> None:
        """New connections are turned away; those that stand go on."""
        self.accepting = False

    async def _start(self, nursery: trio.Nursery) -> None:
        nursery.start_soon(self._accept_loop, nursery)

    def _release(self) -> None:
        super()._release()
        if self._sock.fileno() < 0:
            return
        trio.lowlevel.notify_closing(self._sock)
        self._sock.close()
        with contextlib.suppress(OSError):
            if os.stat(self.path).st_ino == self._bound:
                os.unlink(self.path)

    async def _accept_loop(self, nursery: trio.Nursery) -> None:
        async for sock in accepted(self._sock, self._count_error):
            scope = trio.CancelScope()
            place = None
            if self.accepting:
                place = self._door.enter(self.path, trio.current_time(), scope.cancel)
            if place is None:
                sock.close()
            else:
                nursery.start_soon(self._admit, sock, place, scope)

    async def _admit(self, sock: socket.socket, place: Place, scope: trio.CancelScope) -> None:
        try:
            with scope:
                stream = self._session(sock, place)
                if stream is not None:
                    await self._serve(stream)
                    self._door.statistics.refused += stream.session.refused
        finally:
            self._door.leave(place)
            if sock.fileno() >= 0:
                sock.close()

    def _session(self, sock: socket.socket, place: Place) -> Stream | None:
        """(3). Whom no name is for hears so: the session is refused."""
        try:
            found = credentials_of(sock)
        except OSError as exc:
            self._count_error(exc)
            return None
        domain, own = self._own
        context, node = self._context, self._name_of(found)
        if node is None:
            reason = f"no node name is for uid {found.uid}, gid {found.gid}: see listen.unix"
            context, node = evolve(context, authorise=lambda _: reason), f"uid-{found.uid}"
        session = FramedSession(
            context,
            PlainChannel(PeerIdentity(domain, node, 0, FOR_EVER)),
            f"pid {found.pid} uid {found.uid}",
            dialling=False,
            now=place.since,
            names=(f"stp://{domain}/{own}", f"stp://{domain}/{node}"),
        )
        stream = Stream(sock, session)
        stream.on_proven = lambda: self._door.leave(place)
        return stream


def listening_socket(path: str | Path, *, mode: int = 0o660, gid: int = -1) -> socket.socket:
    """Bind and listen, by (1) and (2); `gid` -1 leaves the group as it is. Raises OSError, in words for people."""
    path = Path(path)
    if len(os.fsencode(path)) > MAX_PATH:
        raise OSError(errno.ENAMETOOLONG, f"{path} is too long for a socket: at most {MAX_PATH} bytes")
    check_directory(path.parent)
    _clear(path)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        before = os.umask(0o177)
        try:
            sock.bind(str(path))
        finally:
            os.umask(before)
        if gid >= 0:
            os.chown(path, -1, gid)
        os.chmod(path, mode)
        sock.listen(BACKLOG)
    except OSError as exc:
        sock.close()
        raise OSError(exc.errno, f"cannot listen on {path}: {exc.strerror or exc}") from exc
    return sock


def check_directory(directory: Path) -> None:
    """(1): whoever may write there could put a socket of their own in place of ours. Raises OSError."""
    try:
        found = os.stat(directory)
    except OSError as exc:
        raise OSError(exc.errno, f"{directory}, where the socket shall stand: {exc.strerror}") from exc
    if not stat.S_ISDIR(found.st_mode):
        raise OSError(errno.ENOTDIR, f"{directory}, where the socket shall stand, is no directory")
    if found.st_uid not in (0, os.geteuid()):
        raise OSError(
            errno.EPERM, f"{directory} belongs to uid {found.st_uid}, neither to root nor to this process"
        )
    if found.st_mode & 0o022:
        raise OSError(errno.EPERM, f"{directory} can be written to by others: chmod go-w {directory}")


def _clear(path: Path) -> None:
    """Remove a socket that an earlier process of ours left behind (1). Raises OSError."""
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(found.st_mode):
        raise OSError(errno.EEXIST, f"{path} is there and is no socket: move it away")
    if found.st_uid not in (0, os.geteuid()):
        raise OSError(errno.EPERM, f"{path} belongs to uid {found.st_uid}: remove it if nobody uses it")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(str(path))
        except (ConnectionRefusedError, FileNotFoundError):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            return
        except OSError as exc:
            raise OSError(
                exc.errno, f"{path} is there, and cannot be asked who it is: {exc.strerror}"
            ) from exc
    raise OSError(errno.EADDRINUSE, f"another process listens on {path}")
