"""The `stp` command against the least of a keeper: what it prints, and what it exits with."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
import trio

import stp
from stp import cli
from stp.records import RefusedCode
from tests.client.keeper import Keeper
from tests.identity_kit import Flaw, shared

pytestmark = pytest.mark.real


@pytest.fixture
async def keeper():  # type: ignore[no-untyped-def]
    async with Keeper().running() as one:
        yield one


@pytest.fixture
def bundle(tmp_path: Path) -> str:
    return str(shared().write(tmp_path, "device-1"))


async def run(*arguments: str) -> int:
    """The command in a thread of its own: it runs its own trio."""
    return await trio.to_thread.run_sync(cli.execute, list(arguments), abandon_on_cancel=True)


async def test_pub_and_sub(keeper: Keeper, bundle: str, capfd: pytest.CaptureFixture[str]) -> None:
    options = ("--url", keeper.url, "--identity", bundle)
    assert await run("pub", "event/x", "grüß", *options) == 0
    assert await run("pub", "event/x", "two", "--receipt", "custody", *options) == 0
    assert keeper.messages == [("event/x", "grüß".encode()), ("event/x", b"two")]
    assert await run("sub", "event/#", "--start", "earliest", "--count", "2", *options) == 0
    assert capfd.readouterr().out == "event/x grüß\nevent/x two\n"
    assert await run("sub", "event/#", "--durable", "d", "--start", "earliest", "-n", "1", *options) == 0
    assert await run("sub", "event/#", "--durable", "d", "-n", "1", "-o", "json", *options) == 0
    first, second = capfd.readouterr().out.splitlines()
    assert first == "event/x grüß"
    found = json.loads(second)
    assert (found["topic"], found["payload"], found["lane"]) == ("event/x", "two", 2)


async def test_pub_file_and_lines(
    keeper: Keeper, bundle: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("--url", keeper.url, "--identity", bundle)
    (tmp_path / "photo").write_bytes(b"\xff\x00")
    assert await run("pub", "site-a/photo", "--file", str(tmp_path / "photo"), *options) == 0
    for receipt in ("kept", "custody"):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"one\ntwo\r\nthree")))
        assert await run("pub", "site-a/log", "-", "--receipt", receipt, *options) == 0
    lines = [("site-a/log", line) for line in (b"one", b"two", b"three")]
    assert keeper.messages == [("site-a/photo", b"\xff\x00"), *lines, *lines]


async def test_ping_request_and_bench(keeper: Keeper, bundle: str, capfd: pytest.CaptureFixture[str]) -> None:
    options = ("--url", keeper.url, "--identity", bundle)
    assert await run("ping", "-c", "2", "--interval", "0", "-o", "json", *options) == 0
    pings = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert [ping["node"] for ping in pings] == ["gw-1", "gw-1"]
    assert all(0 < ping["round_trip_ms"] < 1000 for ping in pings)

    async def answer() -> None:
        async for message in valve.subscribe("cmd/#"):
            await message.reply(b"done " + message.payload)

    async with stp.connect(keeper.url, identity=shared().identity("valve-1")) as valve:
        valve.run_in_background(answer)
        await valve.ping()
        assert await run("request", "cmd/valve-1", "open", *options) == 0
        assert capfd.readouterr().out == "done open\n"
    assert await run("bench", "--messages", "500", "-o", "json", *options) == 0
    result = json.loads(capfd.readouterr().out)
    assert result["kept_messages_per_s"] > 0
    assert len(keeper.messages) == 601 + 1


async def test_ping_under_load(keeper: Keeper, bundle: str, capfd: pytest.CaptureFixture[str]) -> None:
    host = keeper.url.removeprefix("stp://")
    options = ("--load", "400kbit", "--for", "0.5s", "--identity", bundle)
    assert await run("ping", host, *options, "-o", "json") == 0
    found = json.loads(capfd.readouterr().out)
    assert (found["node"], found["size"], found["load_bit_s"]) == ("gw-1", 1000, 400_000)
    assert (
        found["sent"] == found["answered"] + found["unanswered"] + found["lost_up"] + found["lost_down"] > 10
    )
    assert 0 < found["rtt_ms"]["min"] <= found["rtt_ms"]["p50"] <= found["rtt_ms"]["p99"]
    assert found["ping_ms"]["idle"] > 0
    assert await run("ping", host, *options, "--size", "200") == 0
    text = capfd.readouterr().out
    assert text.startswith("gw-1: 400 kbit/s of 200-byte datagrams, echoed, for 0.5 s\n")
    assert "jitter" in text
    assert "goodput" in text
    for wrong, words in (
        (("--load", "fast"), "rate such as"),
        (("--load", "1Mbit", "--for", "0s"), "time such as"),
        (("--load", "1Mbit", "--size", "20000"), "a packet here holds"),
    ):
        assert await run("ping", host, "--identity", bundle, *wrong) == 64
        assert words in capfd.readouterr().err


async def test_what_goes_wrong_is_told_in_two_lines(
    keeper: Keeper, bundle: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    keeper.judge = lambda topic: (RefusedCode.DENIED, 0, "rule west") if topic == "site-b/x" else None
    options = ("--url", keeper.url, "--identity", bundle)
    foreign = str(shared().write(tmp_path, "other", Flaw.SERVER_ONLY))
    nobody = ("--url", "stp://gw-1@127.0.0.1:9", "--identity", bundle, "--timeout", "0.1")
    for arguments, status, words in (
        (("pub", "site-b/x", "1", *options), 77, "rule west"),
        (("pub", "site-b/x", "1", "--receipt", "none", *options), 77, "rule west"),
        (("ping", *nobody), 69, "127.0.0.1:9"),
        (("ping", "--url", keeper.url, "--identity", foreign), 77, "refused us"),
        (("ping", "--url", keeper.url.replace("gw-1", "gw-2"), "--identity", bundle), 77, "we refuse"),
        (("ping", "--identity", str(tmp_path / "none.pem")), 78, "none.pem"),
        (("ping", "--url", "http://x", "--identity", bundle), 78, "not an stp:// address"),
        (("pub", "site-a/#", "1", *options), 64, "topic"),
        (("pub", "site-a/x", "--file", str(tmp_path / "none"), *options), 66, "cannot be read"),
        (("request", "cmd/nobody", "--timeout", "0.3", *options), 75, "no reply"),
    ):
        assert await run(*arguments) == status, arguments
        found = capfd.readouterr()
        cause, advice = [line for line in found.err.splitlines() if "refused so far" not in line][-2:]
        assert found.out == ""
        assert cause.startswith("stp: ")
        assert words in cause
        assert advice.startswith("  ")


async def test_a_receipt_that_does_not_come_is_told(
    keeper: Keeper, bundle: str, capfd: pytest.CaptureFixture[str]
) -> None:
    keeper.custody = False
    options = ("--url", keeper.url, "--identity", bundle, "--timeout", "0.2")
    assert await run("pub", "site-a/x", "1", "--receipt", "custody", *options) == 75
    assert "no receipt within 0.2 s" in capfd.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [["pub", "x"], ["pub", "x", "1", "--file", "f"], ["sub"], ["sub", "#", "--start", "then"], ["fly"]],
)
def test_wrong_usage(arguments: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.execute(arguments) == 64
    assert "Error" in capfd.readouterr().err


def test_help_loads_nothing_slow() -> None:
    code = (
        "import sys; from stp import cli; cli.execute(['--help']);"
        "print([m for m in ('trio', 'OpenSSL', 'cryptography', 'stp.client') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert "stp pub site-a" in done.stdout
