"""stpctl against the real management server: what it shows, what it does, how it fails."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from statistics import median
from subprocess import DEVNULL, PIPE

import pytest
import trio
from attrs import define
from structlog.testing import capture_logs

from stpctl.__main__ import run as run_stpctl
from stpctl.commands import root
from stpctl.errors import CONFIG, FAILED, REFUSED, UNREACHABLE, USAGE
from stpd.events import MAX_WATCHERS
from tests.identity_kit import shared
from tests.manage.daemon_double import (
    NODE,
    SECRET,
    Double,
    operator_bundle,
    server_context,
    serving,
    write_context,
)


@define
class Outcome:
    status: int
    out: str
    err: str


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty home; local time is UTC; the server's log stays out of the way."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.delenv("STPCTL_CONTEXT", raising=False)
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    with capture_logs():
        yield tmp_path


async def stpctl(capsys: pytest.CaptureFixture[str], *arguments: str) -> Outcome:
    """One command, in this process, in a thread of its own: the server runs in ours."""
    capsys.readouterr()
    status = await trio.to_thread.run_sync(run_stpctl, list(arguments))
    out, err = capsys.readouterr()
    return Outcome(status, out, err)


def one_line_each(err: str) -> bool:
    """A line of cause, a line of what to do."""
    return re.fullmatch(r"stpctl: [^\n]+\n  [^\n]+\n", err) is not None


# What it shows -----------------------------------------------------------------------------------------

VIEWS = {
    "nodes list": ["edge-1", "connected", "edge-2", "revoked: stolen"],
    "status": [
        "Hub hub-1 (test): ready, up 1 h",
        "1 session",
        "every message is accounted for",
        "edge-2 (corrupt)",
    ],
    "sessions list": ["ID", "abababab", "edge-1", "192.0.2.1:9"],
    "sessions show abab": ["abababab", "edge-1", "since"],
    "path show abab": [
        "edge-1: UDP from 192.0.2.7:9000, asked by 192.0.2.1:9, up 1 min",
        "20.50 ms",
        "1.00 %",
        "Limited by the congestion window",
        "2 updates",
    ],
    "edges list": ["edge-1", "edge-2", "WAITING DOWN"],
    "edges lag": [
        "edge-2: away since",
        "down: behind by 12 messages (3.40 kB)",
        "because the hub was away",
        "1 of 2",
    ],
    "upstreams list": ["hub-0", "connected", "3.5"],
    "readers list": ["erp", "app-1", "#"],
    "buffer show": ["5.00 MB of 1.00 GB", "In quarantine, 1 records", "corrupt"],
    "ledger show": ["Door:", "edge-1", "Hops:", "Every message is accounted for."],
    "keys list": ["0123456789", "gateway", "good", "site a"],
}


@pytest.mark.parametrize("command", VIEWS)
async def test_views(home: Path, capsys: pytest.CaptureFixture[str], command: str) -> None:
    async with serving(Double()) as (_, port):
        write_context(home, port)
        shown = await stpctl(capsys, *command.split())
        assert (shown.status, shown.err) == (0, "")
        for part in VIEWS[command]:
            assert part in shown.out
        told = await stpctl(capsys, *command.split(), "-o", "json")
        assert told.status == 0
        assert json.loads(told.out) is not None


CHANGES = {
    "sessions kick abab": ("kick", "abab"),
    "path trace abab --for 5m": ("trace", "abab", 300.0),
    "readers remove erp --yes": ("remove_reader", "erp"),
    "keys revoke 0123456789": ("keys_revoke", "0123456789"),
    "keys create --role app --uses 3 --ttl 2h --tag a --tag b": ("keys_create", "app", 3, 7200.0, ["a", "b"]),
    "nodes revoke edge-1 --reason stolen --yes": ("node_revoke", "edge-1", "stolen"),
    "nodes forget edge-1 --yes": ("node_forget", "edge-1"),
    "reload": ("reload",),
    "drain --yes": ("drain",),
}


@pytest.mark.parametrize("command", CHANGES)
async def test_changes(home: Path, capsys: pytest.CaptureFixture[str], command: str) -> None:
    double = Double()
    async with serving(double) as (_, port):
        write_context(home, port)
        outcome = await stpctl(capsys, *command.split())
        assert outcome.status == 0
        assert double.done == [CHANGES[command]]
        as_json = await stpctl(capsys, *command.split(), "-o", "json")
        json.loads(as_json.out)


async def test_a_new_key_stands_alone_on_stdout(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """So that a script can take it: KEY=$(stpctl keys create)."""
    async with serving(Double()) as (_, port):
        write_context(home, port)
        made = await stpctl(capsys, "keys", "create")
        assert made.out == SECRET + "\n"
        assert SECRET not in made.err
        assert "stpd join" in made.err


async def test_what_cannot_be_taken_back_is_asked_about(
    home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    double = Double()
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n"))
    async with serving(double) as (_, port):
        write_context(home, port)
        for command in ("drain", "readers remove erp"):
            outcome = await stpctl(capsys, *command.split())
            assert outcome.status == USAGE
            assert "--yes" in outcome.err
    assert double.done == []


async def test_a_refused_reload_fails_and_says_why(
    home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from stpd.status import ReloadReport

    class Refusing(Double):
        async def reload(self) -> ReloadReport:
            return ReloadReport(problems=["store.budget: 10 is not a size"])

    async with serving(Refusing()) as (_, port):
        write_context(home, port)
        outcome = await stpctl(capsys, "reload")
    assert outcome.status == FAILED
    assert "nothing was changed" in outcome.err
    assert "store.budget" in outcome.err


# How it fails ------------------------------------------------------------------------------------------


async def test_nobody_there(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        write_context(home, unused.getsockname()[1])
        outcome = await stpctl(capsys, "status")
    assert outcome.status == UNREACHABLE
    assert one_line_each(outcome.err)
    assert "connection refused" in outcome.err
    assert "systemctl status stpd" in outcome.err


async def test_something_else_there(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    async def say_hello(stream: trio.SocketStream) -> None:
        await stream.send_all(b"220 mail.example.net\r\n")
        await stream.aclose()

    async with trio.open_nursery() as nursery:
        (listener,) = await nursery.start(partial(trio.serve_tcp, say_hello, 0, host="127.0.0.1"))
        write_context(home, listener.socket.getsockname()[1])
        outcome = await stpctl(capsys, "status")
        nursery.cancel_scope.cancel()
    assert outcome.status == UNREACHABLE
    assert one_line_each(outcome.err)


@pytest.mark.parametrize("which", ["stranger", "ended", "node", "viewer", "revoked"])
async def test_refused_by_the_daemon(home: Path, capsys: pytest.CaptureFixture[str], which: str) -> None:
    """With TLS 1.3 the client thinks all is well until it reads; people are told the truth all the same."""
    from tests.identity_kit import pem

    stranger = operator_bundle(kit=shared().stranger) + pem(shared().ca)  # trusts us, we do not trust it
    bundle, command, word = {
        "stranger": (stranger, "status", "another authority"),
        "ended": (operator_bundle(ended=True), "status", "it has expired"),
        "node": (shared().bundle("edge-1"), "status", "not an operator's"),
        "viewer": (operator_bundle("viewer"), "reload", "needs the role operator; alice is viewer"),
        "revoked": (operator_bundle(), "status", "was revoked"),
    }[which]
    async with serving(Double(), is_revoked=lambda serial: which == "revoked") as (_, port):
        write_context(home, port, bundle=bundle)
        outcome = await stpctl(capsys, command)
    assert outcome.status == REFUSED, outcome.err
    assert one_line_each(outcome.err)
    assert word in outcome.err


@pytest.mark.parametrize("which", ["stranger", "other node"])
async def test_refused_by_the_operators_side(
    home: Path, capsys: pytest.CaptureFixture[str], which: str
) -> None:
    """client (1): nothing is asked of a daemon that is not the one meant."""
    bundle = operator_bundle(kit=shared().stranger) if which == "stranger" else b""
    async with serving(Double()) as (server, port):
        write_context(home, port, bundle=bundle, node="hub-7" if which == "other node" else NODE)
        outcome = await stpctl(capsys, "drain", "--yes")
        assert server.statistics.requests == 0
    assert outcome.status == REFUSED
    assert one_line_each(outcome.err)
    assert ("hub-1 and not hub-7" if which == "other node" else "not to be trusted") in outcome.err


async def test_what_the_daemon_says_no_to(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    async with serving(Double()) as (_, port):
        write_context(home, port)
        for command in ("sessions show ff", "readers remove none --yes", "keys create --role king"):
            outcome = await stpctl(capsys, *command.split())
            assert (outcome.status, outcome.out) == (FAILED, "")
            assert one_line_each(outcome.err)


@pytest.mark.parametrize(
    "command",
    [
        "stat",
        "sessions",
        "sessions show",
        "path",
        "path show",
        "path trace abab --for soon",
        "status -o xml",
        "status -w 0",
        "keys create --uses -1",
        "keys create --ttl x",
    ],
)
async def test_wrong_usage(home: Path, capsys: pytest.CaptureFixture[str], command: str) -> None:
    assert (await stpctl(capsys, *command.split())).status == USAGE


async def test_an_operators_machine_without_a_clock(
    home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from stp.identity import BUILD_TIME
    from stpctl import client

    assert client.BUILD_TIME == BUILD_TIME
    tomorrow = server_context(NODE, early=True)
    async with serving(Double()) as (server, port):
        server.context = lambda: tomorrow
        write_context(home, port)
        refused = await stpctl(capsys, "status")
        assert (refused.status, "not yet valid" in refused.err) == (REFUSED, True)
        monkeypatch.setattr("time.time", lambda: 42.0)
        assert (await stpctl(capsys, "status")).status == 0


# Events ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("output", ["table", "json"])
async def test_so_many_events_and_no_more(
    home: Path, capsys: pytest.CaptureFixture[str], output: str
) -> None:
    double = Double()
    got: list[Outcome] = []

    async def watch() -> None:
        got.append(await stpctl(capsys, "events", "-n", "2", "-o", output))

    async with serving(double) as (_, port), trio.open_nursery() as nursery:
        write_context(home, port)
        nursery.start_soon(watch)
        with trio.fail_after(10):
            while not double.bus.statistics().watchers:
                await trio.sleep(0.001)
        for n in range(3):
            double.bus.publish("session.open", f"number {n}\x1b[2J")
    assert (got[0].status, got[0].err) == (0, "")
    lines = got[0].out.splitlines()
    assert ["number 0" in lines[0], "number 1" in lines[1], len(lines)] == [True, True, 2]
    assert "\x1b" not in got[0].out
    if output == "json":
        assert json.loads(lines[0])["kind"] == "session.open"


async def test_a_stream_that_ends_is_told(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    double = Double()
    got: list[Outcome] = []

    async def watch() -> None:
        got.append(await stpctl(capsys, "events"))

    async with trio.open_nursery() as nursery, serving(double) as (_, port):
        write_context(home, port)
        nursery.start_soon(watch)
        with trio.fail_after(10):
            while not double.bus.statistics().watchers:
                await trio.sleep(0.001)
    assert got[0].status == UNREACHABLE
    assert one_line_each(got[0].err)


async def test_too_many_watchers_is_no_reason_to_try_for_ever(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    double = Double()
    watchers = [double.events() for _ in range(MAX_WATCHERS)]
    async with serving(double) as (_, port):
        write_context(home, port)
        outcome = await stpctl(capsys, "events", "-f")
    assert (outcome.status, len(watchers)) == (FAILED, MAX_WATCHERS)
    assert one_line_each(outcome.err)


# Contexts ----------------------------------------------------------------------------------------------


async def test_which_context_is_meant(
    home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """--context, then $STPCTL_CONTEXT, then the one in use, then the only one."""

    async def meant(*arguments: str) -> str:
        outcome = await stpctl(capsys, *arguments, "context", "show", "-o", "json")
        return str(json.loads(outcome.out)["name"]) if outcome.status == 0 else outcome.err

    assert "no context in" in await meant()
    write_context(home, 1, name="a")
    assert await meant() == "a"
    write_context(home, 2, name="b")
    write_context(home, 3, name="c")
    assert "3 contexts and none is chosen: a, b, c" in await meant()
    assert (await stpctl(capsys, "context", "use", "a")).status == 0
    assert await meant() == "a"
    monkeypatch.setenv("STPCTL_CONTEXT", "b")
    assert await meant() == "b"
    assert await meant("--context", "c") == "c"
    path = str(write_context(home / "elsewhere", 4, name="d"))
    assert await meant("--context", path) == "d"
    listed = await stpctl(capsys, "context", "list")
    assert re.search(r"^\*\s+b\s", listed.out, re.M)
    assert (await stpctl(capsys, "context", "use", "zz")).status == CONFIG
    monkeypatch.delenv("STPCTL_CONTEXT")
    assert await meant() == "a"


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("{", "not JSON"),
        ("[]", "needs url"),
        ('{"url": "https://h"}', "needs url"),
        ('{"url": "http://h", "node": "n", "certificate": "c"}', "not an address"),
        ('{"url": "https://h:x", "node": "n", "certificate": "c"}', "not an address"),
        ('{"url": "https://h:1", "node": "n", "certificate": "c"}', "No such file"),
        ('{"url": "https://h:1", "node": "n", "certificate": "bad.json"}', "cannot be used"),
    ],
)
async def test_contexts_that_cannot_be_used(
    home: Path, capsys: pytest.CaptureFixture[str], text: str, word: str
) -> None:
    path = write_context(home, 1).with_name("bad.json")
    path.write_text(text)
    outcome = await stpctl(capsys, "--context", "bad", "status")
    assert (outcome.status, outcome.out) == (CONFIG, "")
    assert one_line_each(outcome.err)
    assert word in outcome.err


async def test_a_home_that_cannot_be_written(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_context(home, 1)
    (home / "stpctl" / "current").mkdir()
    outcome = await stpctl(capsys, "context", "use", NODE)
    assert outcome.status == CONFIG
    assert one_line_each(outcome.err)


async def test_a_broken_context_does_not_hide_the_others(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_context(home, 1, name="a").with_name("b.json").write_text("{")
    listed = await stpctl(capsys, "context", "list")
    assert listed.status == 0
    assert re.search(r"^ +a ", listed.out, re.M)
    assert "not JSON" in listed.out


@pytest.mark.parametrize("name", ["..", ".hidden", "a b", ""])
async def test_names_of_contexts_stay_in_their_directory(
    home: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    outcome = await stpctl(capsys, "--context", name, "status")
    assert outcome.status == CONFIG


async def test_no_view_shows_a_key(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_context(home, 1)
    for output in ("table", "json"):
        shown = await stpctl(capsys, "context", "show", "-o", output)
        assert shown.status == 0
        assert "PRIVATE" not in shown.out


# The real thing ----------------------------------------------------------------------------------------


def test_help_names_every_exit_status(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_stpctl(["--help"]) == 0
    text = capsys.readouterr().out
    for status in (0, FAILED, USAGE, UNREACHABLE, REFUSED, CONFIG):
        assert re.search(rf"\b{status} \w", text)
    for name, command in root.commands.items():
        assert command.help, name
        assert name in text


@pytest.mark.slow
@pytest.mark.real
def test_help_is_there_at_once() -> None:
    """Promise: ≤ 150 ms cold on a quiet machine; a busy one gets three times that."""
    times = []
    for _ in range(7):
        started = time.perf_counter()
        subprocess.run([sys.executable, "-m", "stpctl", "--help"], check=True, capture_output=True)
        times.append(time.perf_counter() - started)
    print(f"stpctl --help: median {1000 * median(times):.0f} ms, best {1000 * min(times):.0f} ms")
    assert median(times) < 0.45
    loaded = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "stpctl", "--help"],
        check=True,
        capture_output=True,
        text=True,
    ).stderr
    assert not re.search(r"\b(trio|structlog|cryptography|attr|ssl|http\.client)$", loaded, re.M)


@pytest.mark.real
async def test_as_a_process(home: Path) -> None:
    async with serving(Double()) as (_, port):
        write_context(home, port)
        done = await trio.run_process([sys.executable, "-m", "stpctl", "status"], capture_stdout=True)
        assert b"Hub hub-1" in done.stdout


@pytest.mark.real
async def test_a_reader_that_has_enough_is_no_error(home: Path) -> None:
    """stpctl sessions list | head -0"""
    async with serving(Double()) as (_, port):
        write_context(home, port)
        reader, writer = os.pipe()
        os.close(reader)
        done = await trio.run_process(
            [sys.executable, "-m", "stpctl", "sessions", "list"],
            stdout=writer,
            capture_stderr=True,
            check=False,
        )
        os.close(writer)
        assert done.stderr == b""


@pytest.mark.real
async def test_watching_events_survives_a_restart_of_the_daemon(home: Path) -> None:
    async with trio.open_nursery() as nursery:
        first = Double()
        async with serving(first) as (_, port):
            write_context(home, port)
            command = [sys.executable, "-m", "stpctl", "events", "-f", "-o", "json"]
            process = await nursery.start(
                partial(trio.run_process, command, stdout=PIPE, stderr=PIPE, check=False)
            )
            with trio.fail_after(20):
                while not first.bus.statistics().watchers:
                    await trio.sleep(0.01)
                first.bus.publish("session.open", "before")
                assert json.loads(await process.stdout.receive_some())["text"] == "before"
        assert b"again in 1 s" in await process.stderr.receive_some()
        second = Double()
        async with serving(second) as (_, other):
            write_context(home, other)
            process.send_signal(signal.SIGINT)
            with trio.fail_after(20):
                await process.wait()
        assert process.returncode == 130


@pytest.mark.real
async def test_watch_looks_again(home: Path) -> None:
    async with trio.open_nursery() as nursery:
        async with serving(Double()) as (server, port):
            write_context(home, port)
            command = [sys.executable, "-m", "stpctl", "status", "-w", "0.1"]
            process = await nursery.start(partial(trio.run_process, command, stdout=DEVNULL, check=False))
            with trio.fail_after(20):
                while server.statistics.requests < 3:
                    await trio.sleep(0.01)
            process.send_signal(signal.SIGINT)
            with trio.fail_after(20):
                await process.wait()
        assert process.returncode == 130
