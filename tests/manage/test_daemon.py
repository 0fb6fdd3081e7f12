"""stpd as people run it: its files from `stpd init`, its process, stpctl beside it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import trio
from attrs import define, field

import stp

pytestmark = [pytest.mark.real, pytest.mark.slow]

START_LIMIT = 20.0
"""Seconds a daemon gets to answer, on a machine with other things to do."""


def free_ports(count: int) -> list[int]:
    """Ports that nobody has right now."""
    held = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [s.getsockname()[1] for s in held]
    for s in held:
        s.close()
    return ports


@define
class Stpd:
    """One daemon, its directory, and the home of its operator."""

    name: str
    directory: Path
    udp: int
    management: int
    health: int
    enrol: int
    environment: dict[str, str]
    process: subprocess.Popen[bytes] | None = None
    lines: list[dict[str, object]] = field(factory=list)

    @property
    def config(self) -> Path:
        return self.directory / ("hub.toml" if (self.directory / "hub.toml").exists() else "gateway.toml")

    @property
    def addresses(self) -> list[str]:
        return [
            f"--listen=127.0.0.1:{self.udp}",
            f"--enrol=127.0.0.1:{self.enrol}",
            f"--management=127.0.0.1:{self.management}",
            f"--health=127.0.0.1:{self.health}",
        ]

    def run(self, module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", module, *arguments]
        return subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=60)

    def stpctl(self, *arguments: str) -> str:
        """What a command prints; it must do what it was told."""
        done = self.run("stpctl", "--context", self.name, *arguments)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def start(self) -> None:
        log = (self.directory / "log").open("ab")
        command = [sys.executable, "-m", "stpd", "run", "--config", str(self.config)]
        self.process = subprocess.Popen(command, env=self.environment, stderr=log)
        log.close()
        deadline = time.monotonic() + START_LIMIT
        while self.get("/ready")[0] != 200:
            assert self.process.poll() is None, (self.directory / "log").read_text()
            assert time.monotonic() < deadline, (self.directory / "log").read_text()
            time.sleep(0.02)

    def stop(self, how: signal.Signals = signal.SIGTERM) -> int:
        if self.process is None:
            return 0
        self.process.send_signal(how)
        status = self.process.wait(20)
        self.process = None
        return status

    def log(self) -> list[dict[str, object]]:
        return [json.loads(line) for line in (self.directory / "log").read_text().splitlines()]

    def get(self, path: str) -> tuple[int, bytes]:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.health}{path}", timeout=10) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read()
        except OSError:
            return 0, b""


def place(home: Path, name: str) -> Stpd:
    udp, management, health, enrol = free_ports(4)
    environment = {**os.environ, "XDG_CONFIG_HOME": str(home), "TZ": "UTC"}
    environment.pop("STPCTL_CONTEXT", None)
    return Stpd(name, home / name, udp, management, health, enrol, environment)


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Stpd]:
    """A hub that runs, made as the README says."""
    one = place(tmp_path, "hub-1")
    made = one.run(
        "stpd",
        "init",
        "hub",
        "--name",
        "hub-1",
        "--domain",
        "test",
        "--dir",
        str(one.directory),
        *one.addresses,
    )
    assert made.returncode == 0, made.stderr
    one.start()
    yield one
    one.stop(signal.SIGKILL)


@pytest.fixture
def edge(hub: Stpd, tmp_path: Path) -> Iterator[Stpd]:
    """A gateway that joined it, and runs."""
    one = place(tmp_path, "edge-1")
    token = hub.stpctl("keys", "create", "--role", "gateway").strip()
    at = ["--hub", f"127.0.0.1:{hub.enrol}", "--name", "edge-1", "--dir", str(one.directory)]
    joined = one.run("stpd", "join", token, *at, *one.addresses)
    assert joined.returncode == 0, joined.stderr
    context = json.loads((hub.directory / "context.json").read_text())
    context |= {"name": "edge-1", "node": "edge-1", "url": f"https://127.0.0.1:{one.management}"}
    (tmp_path / "stpctl" / "contexts" / "edge-1.json").write_text(json.dumps(context))
    one.start()
    yield one
    one.stop(signal.SIGKILL)


VIEWS = ["status", "sessions list", "edges list", "edges lag", "upstreams list", "readers list"]
VIEWS += ["buffer show", "ledger show", "keys list", "nodes list"]


def test_a_new_hub_answers_every_question_and_ends_as_told(hub: Stpd) -> None:
    for view in VIEWS:
        hub.stpctl(*view.split())
        json.loads(hub.stpctl(*view.split(), "-o", "json"))
    assert hub.stpctl("status").startswith("Hub hub-1 (test): ready, up ")
    assert "every message is accounted for" in hub.stpctl("status")
    assert hub.get("/health") == (200, b"healthy\n")
    checked = hub.run("stpd", "check", "--config", str(hub.config))
    assert (checked.returncode, checked.stderr) == (0, "")
    hub.stpctl("drain", "--yes")
    assert hub.process is not None
    assert hub.process.wait(20) == 0
    refused = hub.run("stpctl", "status")
    assert refused.returncode == 69
    changes = [line for line in hub.log() if line["event"] == "operator_change"]
    assert [(line["operator"], line["path"]) for line in changes] == [("admin", "/v1/drain")]


def test_metrics_satisfy_prometheus(hub: Stpd) -> None:
    status, data = hub.get("/metrics")
    assert status == 200
    assert b"\nstpd_unexplained_messages 0.0\n" in data
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed (Debian: prometheus)")
    judged = subprocess.run([promtool, "check", "metrics"], input=data, capture_output=True)
    assert (judged.returncode, judged.stdout + judged.stderr) == (0, b"")


def test_reload_takes_the_good_and_refuses_the_bad(hub: Stpd) -> None:
    good = hub.config.read_text()
    hub.config.write_text(good.replace('level = "info"', 'level = "debug"').replace('"10GB"', '"9GB"'))
    told = hub.stpctl("reload")
    assert "in force: log.level" in told
    assert "needs a restart: store.budget" in told
    hub.config.write_text(good.replace('"10GB"', '"ten"'))
    refused = hub.run("stpctl", "reload")
    assert refused.returncode == 1
    assert "store.budget" in refused.stderr
    assert hub.run("stpd", "check", "--config", str(hub.config)).returncode == 78
    assert hub.get("/ready")[0] == 200


def test_keys_let_in_once_and_are_never_shown_again(hub: Stpd, edge: Stpd) -> None:
    (key,) = json.loads(hub.stpctl("keys", "list", "-o", "json"))
    assert (key["role"], key["uses"], key["used"]) == ("gateway", 1, 1)
    assert "used up" in hub.stpctl("keys", "list")
    token = hub.stpctl("keys", "create", "--ttl", "1h").strip()
    listed = hub.stpctl("keys", "list", "-o", "json")
    assert token not in listed
    assert token not in (hub.directory / "log").read_text()
    fresh = next(k for k in json.loads(listed) if not k["used"])
    hub.stpctl("keys", "revoke", fresh["id"])
    assert "revoked" in hub.stpctl("keys", "list")


def test_without_an_upstream_table_the_enrolled_one_is_dialled(hub: Stpd, edge: Stpd) -> None:
    assert edge.stop() == 0
    head, _, tail = edge.config.read_text().partition("\n[[upstream]]")
    edge.config.write_text(head + tail[tail.index("\n[[") :])
    edge.start()
    until(edge, lambda text: "Uplink hub-1: connected" in text)


def test_a_gateway_whose_hub_is_away_says_so_in_words(hub: Stpd, edge: Stpd, tmp_path: Path) -> None:
    """Who is behind, by how many messages, and why; and that it is level again when the hub is back."""
    device = tmp_path / "sensor-1.pem"
    token = hub.stpctl("keys", "create", "--role", "device").strip()
    join = f"import stp.enrol as e; e.join_device({token!r}, '127.0.0.1:{edge.enrol}', 'sensor-1', {str(device)!r})"
    subprocess.run([sys.executable, "-c", join], check=True, timeout=60)
    until(edge, lambda text: "Uplink hub-1: connected" in text)
    hub.stop(signal.SIGKILL)
    publish(f"stp://edge-1@127.0.0.1:{edge.udp}", device, 20)
    told = until(edge, lambda text: "behind by 20 messages" in text and "because: " in text)
    assert "Uplink hub-1: connected" not in told
    assert "every message is accounted for" in told
    lag = [line for line in edge.get("/metrics")[1].decode().splitlines() if "stpd_hop_lag_messages{" in line]
    assert sum(float(line.split()[-1]) for line in lag) == 20
    hub.start()
    until(edge, lambda text: "Uplink hub-1: connected" in text and "; level." in text)
    doors = json.loads(hub.stpctl("ledger", "show", "-o", "json"))["doors"]
    assert [(d["peer"], d["accepted"]) for d in doors] == [("edge-1", 20)]
    (seen,) = json.loads(hub.stpctl("sessions", "list", "-o", "json"))
    assert (seen["node"], seen["role"]) == ("edge-1", "gateway")
    hub.stpctl("sessions", "kick", seen["id"][:8])
    assert "edge-1" in hub.stpctl("edges", "list")


def publish(url: str, identity: Path, count: int) -> None:
    """Messages of a device, each kept by the gateway."""

    async def main() -> None:
        async with stp.connect(url, identity=str(identity)) as session:
            for n in range(count):
                await session.publish("plant/temp", b"%d" % n, receipt="kept")

    trio.run(main)


def until(one: Stpd, good: Callable[[str], bool]) -> str:
    """`stpctl status` once it reads as it should."""
    deadline = time.monotonic() + 30
    while not good(text := one.stpctl("status")):
        assert time.monotonic() < deadline, text
        time.sleep(0.1)
    return text
