"""Promises of stpd.probes, over real sockets."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
from attrs import Factory, define

from stpd import httpd, probes
from stpd.probes import ProbeServer
from tests.manage.daemon_double import dial, opened


@define
class Daemon:
    """What probes ask."""

    sick: list[str] = Factory(list)
    busy: list[str] = Factory(list)
    scrapes: int = 0

    def unhealthy(self) -> list[str]:
        return self.sick

    def unready(self) -> list[str]:
        return self.busy

    async def metrics(self) -> bytes:
        await trio.lowlevel.checkpoint()
        self.scrapes += 1
        return b"stpd_up 1\n"


@asynccontextmanager
async def probing(daemon: Daemon) -> AsyncIterator[tuple[ProbeServer, int]]:
    server = ProbeServer(probed=daemon)
    async with trio.open_nursery() as nursery:
        address = await nursery.start(server.serve, "127.0.0.1", 0)
        try:
            yield server, int(address.rpartition(":")[2])
        finally:
            nursery.cancel_scope.cancel()
            while opened:
                await trio.aclose_forcefully(opened.pop())


async def ask(port: int, path: str, method: str = "GET") -> tuple[int, str]:
    stream = await dial(port)
    await stream.send_all(f"{method} {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n".encode())
    data = b""
    with trio.fail_after(5):
        while piece := await stream.receive_some(65536):
            data += piece
    head, _, body = data.partition(b"\r\n\r\n")
    return int(head.split()[1]), body.decode()


async def test_health_and_readiness_are_two_questions() -> None:
    """probes (1), (2)."""
    daemon = Daemon()
    async with probing(daemon) as (_, port):
        assert await ask(port, "/health") == (200, "healthy\n")
        assert await ask(port, "/ready") == (200, "ready\n")
        daemon.busy = ["draining"]
        assert await ask(port, "/health") == (200, "healthy\n")
        assert await ask(port, "/ready") == (503, "draining\n")
        daemon.sick = ["no commit for 12 s", "the disk is gone"]
        assert await ask(port, "/health") == (503, "no commit for 12 s\nthe disk is gone\n")


async def test_a_head_has_no_body_and_the_same_status() -> None:
    daemon = Daemon(busy=["starting"])
    async with probing(daemon) as (_, port):
        assert await ask(port, "/ready", "HEAD") == (503, "")


async def test_metrics_are_made_at_most_so_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """probes (4)."""
    monkeypatch.setattr(probes, "METRICS_INTERVAL", 3600.0)
    daemon = Daemon()
    async with probing(daemon) as (server, port):
        for _ in range(3):
            assert await ask(port, "/metrics") == (200, "stpd_up 1\n")
        assert daemon.scrapes == 1
        monkeypatch.setattr(probes, "METRICS_INTERVAL", 0.0)
        await ask(port, "/metrics")
        assert daemon.scrapes == 2
        assert server.statistics.requests == 4


async def test_scrapes_at_the_same_time_are_one() -> None:
    """probes (4)."""
    daemon = Daemon()
    async with probing(daemon) as (_, port), trio.open_nursery() as nursery:
        for _n in range(5):
            nursery.start_soon(ask, port, "/metrics")
    assert daemon.scrapes == 1


@pytest.mark.parametrize(
    ("method", "path", "status"), [("GET", "/", 404), ("GET", "/v1/status", 404), ("POST", "/health", 405)]
)
async def test_nothing_else_is_there(method: str, path: str, status: int) -> None:
    async with probing(Daemon()) as (_, port):
        assert (await ask(port, path, method))[0] == status


async def test_bodies_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(httpd, "LINGER", 0.05)
    async with probing(Daemon()) as (_, port):
        stream = await dial(port)
        await stream.send_all(b"GET /health HTTP/1.1\r\nhost: x\r\ncontent-length: 5\r\n\r\nhello")
        assert b" 413 " in await stream.receive_some(65536)


async def test_connections_are_bounded_and_silence_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """probes (3), httpd (1)."""
    monkeypatch.setattr(probes, "MAX_CONNECTIONS", 3)
    monkeypatch.setattr(httpd, "HEAD_TIMEOUT", 0.2)
    async with probing(Daemon()) as (server, port):
        silent = [await dial(port) for _ in range(5)]
        with trio.fail_after(5):
            for stream in silent:
                try:
                    assert await stream.receive_some(1) == b""
                except trio.BrokenResourceError:
                    pass
        assert server.statistics.refused_busy == 2
        assert await ask(port, "/health") == (200, "healthy\n")


async def test_broken_clients_harm_nobody() -> None:
    """probes (3)."""
    async with probing(Daemon()) as (server, port):
        for said in (b"", b"GET /heal", b"\x16\x03\x01\x02\x00", b"GET /metrics HTTP/1.1\r\nhost: x\r\n\r\n"):
            stream = await dial(port)
            await stream.send_all(said)
            stream.setsockopt(trio.socket.SOL_SOCKET, trio.socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            await trio.aclose_forcefully(stream)
        assert await ask(port, "/health") == (200, "healthy\n")
        assert server.statistics.failed == 0
