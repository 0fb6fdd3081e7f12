"""stp.carriers.unix on sockets of this machine (R-11-5)."""

from __future__ import annotations

import errno
import os
import socket
import stat
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from stp.carriers.unix import (
    MAX_PATH,
    Credentials,
    UnixCarrier,
    UnixListener,
    check_directory,
    credentials_of,
    listening_socket,
)
from stp.core.errors import ErrorCode
from stp.core.events import SessionClosed
from tests.carrier_kit import HUB, Owner, framed, running
from tests.identity_kit import DOMAIN

pytestmark = pytest.mark.real


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "stp.sock"


@asynccontextmanager
async def listening(
    owner: Owner, path: Path, name_of: Callable[[Credentials], str | None] = lambda _: "local", **options: Any
) -> AsyncIterator[UnixListener]:
    listener = UnixListener(
        listening_socket(path),
        name_of=name_of,
        own=(DOMAIN, HUB),
        context=framed("unix", **options),
        on_ready=owner.on_ready,
    )
    async with running(listener):
        yield listener


async def test_the_kernel_says_who_it_is_and_the_listener_what_it_is_called(path: Path) -> None:
    """(3): no certificate, no key; the name comes from the credentials."""
    hub, edge, seen = Owner(echo=True), Owner(), []

    def name_of(found: Credentials) -> str:
        seen.append(found)
        return f"uid-{found.uid}"

    async with listening(hub, path, name_of) as listener:
        carrier = await UnixCarrier.dial(str(path), on_ready=edge.on_ready)
        session = carrier.session
        async with running(carrier):
            await edge.connected()
            assert session.own == (DOMAIN, f"uid-{os.getuid()}")
            assert session.peer is not None
            assert session.peer.node == HUB
            assert session.carrier == "unix"
            stream = session.open_stream()
            session.write(stream, bytes(2_000_000)[: session.room(stream)])
            carrier.wake()
            await edge.until(lambda: len(edge.got(session, 3)) == 1 << 20)
            (peer,) = hub.sessions
            assert peer.peer is not None
            assert peer.peer.node == f"uid-{os.getuid()}"
            assert peer.addr == f"pid {os.getpid()} uid {os.getuid()}"
            session.close(ErrorCode.NO_ERROR, "done")
            await carrier.aclose()
        assert (await hub.closed()).reason == "done"
        assert listener.door.accepted == 1
    assert seen == [Credentials(os.getpid(), os.getuid(), os.getgid(), seen[0].groups)]
    assert os.getgid() in seen[0].groups
    assert set(os.getgroups()) <= seen[0].groups
    assert path.name not in os.listdir(path.parent)


async def test_whom_no_rule_names_stays_outside(path: Path) -> None:
    refusals: list[Any] = []
    hub, edge = Owner(), Owner()
    async with listening(
        hub, path, lambda _: None, on_refused=lambda *args: refusals.append(args)
    ) as listener:
        async with running(await UnixCarrier.dial(str(path), on_ready=edge.on_ready)):
            closed = await edge.closed()
        assert (closed.code, closed.by_peer) == (ErrorCode.AUTH, True)
        assert f"uid {os.getuid()}" in closed.reason
        await hub.until(lambda: listener.door.refused == 1)
    assert f"uid {os.getuid()}" in refusals[0][2]


async def test_one_who_may_not_come_hears_why(path: Path) -> None:
    hub, edge = Owner(), Owner()
    async with (
        listening(hub, path, authorise=lambda peer: f"{peer.node} was revoked"),
        running(await UnixCarrier.dial(str(path), on_ready=edge.on_ready)),
    ):
        assert await edge.closed() == SessionClosed(ErrorCode.AUTH, "local was revoked", by_peer=True)


async def test_the_wrong_listener_is_refused(path: Path) -> None:
    hub, edge = Owner(), Owner()
    async with listening(hub, path):
        carrier = await UnixCarrier.dial(str(path), on_ready=edge.on_ready, expected=(DOMAIN, "hub-2"))
        async with running(carrier):
            closed = await edge.closed()
    assert closed.code is ErrorCode.AUTH


async def test_nobody_there_is_an_error_with_the_path(path: Path) -> None:
    with pytest.raises(OSError, match=r"cannot connect to .*stp\.sock"):
        await UnixCarrier.dial(str(path), on_ready=Owner().on_ready)


def test_mode_and_group_are_set(path: Path) -> None:
    """(2)"""
    with listening_socket(path, mode=0o640, gid=os.getgid()):
        found = os.stat(path)
        assert stat.S_IMODE(found.st_mode) == 0o640
        assert found.st_gid == os.getgid()


def test_a_socket_that_was_left_behind_gives_way(path: Path) -> None:
    """(1): as after a kill. One that answers does not."""
    first = listening_socket(path)
    with pytest.raises(OSError, match="another process listens on") as caught:
        listening_socket(path)
    assert caught.value.errno == errno.EADDRINUSE
    first.close()
    assert path.exists()
    listening_socket(path).close()


def test_what_is_no_socket_stays(path: Path) -> None:
    path.write_text("something of somebody's")
    with pytest.raises(OSError, match="is no socket"):
        listening_socket(path)
    assert path.read_text() == "something of somebody's"


def test_a_directory_that_others_can_write_to_is_refused(tmp_path: Path) -> None:
    """(1)"""
    for mode in (0o775, 0o757, 0o1777):
        tmp_path.chmod(mode)
        with pytest.raises(OSError, match="chmod go-w"):
            listening_socket(tmp_path / "stp.sock")
    tmp_path.chmod(0o755)
    check_directory(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a directory away")
def test_a_directory_of_somebody_else_is_refused(tmp_path: Path) -> None:
    os.chown(tmp_path, 12345, -1)
    with pytest.raises(OSError, match="belongs to uid 12345"):
        listening_socket(tmp_path / "stp.sock")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a socket away")
def test_a_socket_of_somebody_else_is_not_removed(path: Path) -> None:
    listening_socket(path).close()
    os.chown(path, 12345, -1)
    with pytest.raises(OSError, match="belongs to uid 12345"):
        listening_socket(path)
    assert path.exists()


def test_where_there_is_no_directory(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="where the socket shall stand"):
        listening_socket(tmp_path / "no" / "stp.sock")
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="no directory"):
        listening_socket(tmp_path / "file" / "stp.sock")


def test_a_path_can_be_too_long(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=f"at most {MAX_PATH} bytes"):
        listening_socket(tmp_path / ("x" * 120))


def test_credentials_are_the_kernels() -> None:
    left, right = socket.socketpair(socket.AF_UNIX)
    with left, right:
        assert credentials_of(left).uid == os.getuid()
