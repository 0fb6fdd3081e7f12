"""The client library and the `stp` command against the daemon itself, in a process of its own."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

import stp
from stp import cli
from tests.identity_kit import shared

pytestmark = [pytest.mark.real, pytest.mark.slow]

CONFIG = """
role = "hub"
state_dir = "state"
identity = ["hub.pem"]
listen.udp = ["127.0.0.1:{udp}"]
management.listen = ""
health.listen = ""
store.budget = "64MiB"
transport.qlog = "qlog"
limits.echo_bytes_per_second = 100000
log.level = "warning"

[[access]]
name = "closed"
nodes = ["closed-*"]
publish = ["{{node}}/#"]
subscribe = ["$inbox/{{node}}/#"]

[[access]]
name = "open"
nodes = ["device-*", "reader-*", "valve-*"]
publish = ["#", "$inbox/#"]
subscribe = ["#", "$inbox/#"]
"""


def free_port() -> int:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


class Daemon:
    """`stpd run` with a directory of its own; may be killed and started again."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.port = free_port()
        (directory / "hub.pem").write_bytes(shared().bundle("hub-1"))
        (directory / "hub.pem").chmod(0o600)
        (directory / "hub.toml").write_text(CONFIG.format(udp=self.port))
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"stp://hub-1@127.0.0.1:{self.port}"

    def start(self) -> None:
        arguments = [sys.executable, "-m", "stpd", "run", "--config", "hub.toml"]
        environment = os.environ | {"PYTHONPATH": str(Path(stp.__file__).parent.parent)}
        with open(self.directory / "log", "ab") as log:
            self.process = subprocess.Popen(arguments, cwd=self.directory, stderr=log, env=environment)

    def stop(self, how: signal.Signals = signal.SIGTERM) -> int:
        assert self.process is not None
        self.process.send_signal(how)
        return self.process.wait(10)


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    one = Daemon(tmp_path_factory.mktemp("hub"))
    one.start()
    yield one
    assert one.stop() == 0, (one.directory / "log").read_text()


def device(node: str) -> stp.Identity:
    return shared().identity(node)


async def test_publish_subscribe_and_receipts(daemon: Daemon) -> None:
    async with (
        stp.connect(daemon.url, identity=device("reader-1")) as reader,
        stp.connect(daemon.url, identity=device("device-1")) as session,
    ):
        subscription = reader.subscribe("site-a/#")
        await subscription.confirmed.wait()
        await session.publish("site-a/temp", b"1", receipt="custody")
        await session.publish_many([("site-a/temp", b"%d" % n) for n in range(2, 3000)], receipt="kept")
        with trio.fail_after(5):
            got = [int((await anext(subscription)).payload) for _ in range(2999)]
        assert got == list(range(1, 3000))


async def test_a_rule_is_named(daemon: Daemon) -> None:
    async with stp.connect(daemon.url, identity=device("closed-1")) as session:
        await session.publish("closed-1/x", b"mine", receipt="kept")
        with pytest.raises(stp.Refused) as caught:
            await session.publish("site-a/x", b"not mine", receipt="kept")
        assert "closed" in caught.value.reason
        with pytest.raises(stp.Refused):
            await anext(session.subscribe("site-a/#"))
        await session.publish("closed-1/x", b"mine again", receipt="kept")


async def test_a_load_is_echoed_within_the_allowance(daemon: Daemon) -> None:
    """R-10-44: what is above it is told apart from loss; and the daemon logs what it was told to log."""
    async with stp.connect(daemon.url, identity=shared().identity("device-1")) as session:
        within = await session.load(50_000, size=500, seconds=0.5)
        assert 40 <= within.sent <= 51
        assert within.answered == within.sent
        beyond = await session.load(500_000, size=1000, seconds=0.5)
        assert beyond.unanswered > beyond.answered > 20
        assert beyond.lost < 0.1
        assert session.send_datagram(b"\x80 nobody takes this")
        assert (await session.ping()).round_trip < 5.0
    assert daemon.stop() == 0  # so that everything is written
    logs = [log.read_bytes() for log in (daemon.directory / "qlog").glob("*-server.sqlog")]
    assert max(log.count(b'"frame_type":"datagram"') for log in logs) > 100
    daemon.start()


async def test_requests(daemon: Daemon) -> None:
    async with (
        stp.connect(daemon.url, identity=device("valve-1")) as valve,
        stp.connect(daemon.url, identity=device("device-1")) as session,
    ):
        commands = valve.subscribe("cmd/valve-1/#")

        async def answer() -> None:
            async for message in commands:
                await message.reply(b"done " + message.payload)

        valve.run_in_background(answer)
        await commands.confirmed.wait()
        for n in range(5):
            reply = await session.request("cmd/valve-1/open", b"%d" % n, timeout=5)
            assert reply.payload == b"done %d" % n
        assert (await session.ping()).round_trip > 0


async def test_a_killed_daemon_loses_and_doubles_nothing(daemon: Daemon) -> None:
    """Publisher and durable reader live on through kill -9; what was taken is there once, in order."""
    async with (
        stp.connect(daemon.url, identity=device("reader-2")) as reader,
        stp.connect(daemon.url, identity=device("device-2"), close_timeout=20) as session,
    ):
        subscription = reader.subscribe("event/2/#", durable="audit")
        await subscription.confirmed.wait()
        got: list[int] = []

        async def read() -> None:
            async for message in subscription:
                got.append(int(message.payload))  # noqa: PERF401 - read while it grows

        reader.run_in_background(read)
        for n in range(600):
            await session.publish("event/2/x", b"%d" % n)
            if n % 10 == 0:
                await trio.sleep(0.005)
            if n == 200:
                await trio.to_thread.run_sync(daemon.stop, signal.SIGKILL)
            if n == 300:
                daemon.start()
        assert await session.drain(20)
        with trio.fail_after(20):
            while len(got) < 600:
                await trio.sleep(0.02)
        await subscription.aclose()
    assert got == list(range(600))


async def test_an_interrupted_command_stops_in_silence(daemon: Daemon, tmp_path: Path) -> None:
    bundle = str(shared().write(tmp_path, "device-4"))
    arguments = ["sub", "event/4/#", "--start", "earliest", "--url", daemon.url, "--identity", bundle]
    async with stp.connect(daemon.url, identity=device("device-4")) as session:
        await session.publish_many([("event/4/x", b"%d" % n) for n in range(1000)], receipt="kept")
    for how, expected in (("interrupt", 130), ("close the pipe", 0)):
        process = await trio.lowlevel.open_process(
            [sys.executable, "-m", "stp.cli", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": str(Path(stp.__file__).parent.parent)},
        )
        assert process.stdout is not None
        assert process.stderr is not None
        with trio.fail_after(20):
            assert (await process.stdout.receive_some(20)).startswith(b"event/4/x 0")
            if how == "interrupt":
                process.send_signal(signal.SIGINT)
            else:
                await process.stdout.aclose()
                async with stp.connect(daemon.url, identity=device("device-5")) as session:
                    await session.publish("event/4/x", b"one more, so that it notices", receipt="kept")
            assert await process.wait() == expected
            assert (await process.stderr.receive_some()).strip() == b""


async def test_the_command(daemon: Daemon, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    options = ("--url", daemon.url, "--identity", str(shared().write(tmp_path, "device-3")))

    async def run(*arguments: str) -> int:
        return await trio.to_thread.run_sync(cli.execute, [*arguments, *options])

    assert await run("pub", "event/3/x", "one", "--receipt", "custody") == 0
    assert await run("pub", "event/3/x", "two") == 0
    assert await run("sub", "event/3/#", "--durable", "d", "--start", "earliest", "-n", "1") == 0
    assert await run("sub", "event/3/#", "--durable", "d", "-n", "1") == 0
    assert capfd.readouterr().out == "event/3/x one\nevent/3/x two\n"
    assert await run("ping", "-c", "1") == 0
    assert await run("bench", "--messages", "2000") == 0
