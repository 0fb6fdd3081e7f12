"""The daemon's parts under what the shipped units allow: system calls, address families, no W+X memory; row 48.

The system call filter is read from the unit and taken apart by systemd-analyze; tests/systemd/sandbox.py applies it.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from stp.enrol import join_device
from stp.identity import Identity
from stpd import setup

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
UNIT = ROOT / "systemd" / "stpd-hub.service"
CANNOT = 75

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd-analyze here"),
]


@functools.cache
def group(name: str) -> frozenset[str]:
    """All system calls of a group of systemd's, or the one of that name."""
    if not name.startswith("@"):
        return frozenset({name})
    listed = subprocess.run(
        ["systemd-analyze", "syscall-filter", name], capture_output=True, text=True, timeout=30, check=True
    ).stdout
    members = [line.strip() for line in listed.splitlines()[1:]]
    return frozenset().union(*(group(m) for m in members if m and not m.startswith("#")))


@functools.cache
def rules() -> str:
    """The unit's SystemCallFilter and RestrictAddressFamilies, for sandbox.py."""
    allowed: set[str] = set()
    families: list[int] = []
    for line in UNIT.read_text().splitlines():
        key, _, value = line.partition("=")
        if key == "SystemCallFilter" and value.startswith("~"):
            allowed = allowed.difference(*(group(name) for name in value[1:].split()))
        elif key == "SystemCallFilter":
            allowed |= frozenset().union(*(group(name) for name in value.split())) | group("@default")
        elif key == "RestrictAddressFamilies":
            families = [int(getattr(socket, name)) for name in value.split()]
    assert {"read", "recvmsg", "socket", "execve"} <= allowed
    assert "mount" not in allowed
    return json.dumps({"calls": sorted(allowed), "families": families})


def sandboxed(*command: str) -> list[str]:
    return [sys.executable, str(HERE / "sandbox.py"), rules(), sys.executable, *command]


def run(code: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        sandboxed("-c", code), cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    if done.returncode == CANNOT:
        pytest.skip(done.stderr.strip())
    return done


def test_the_sandbox_holds() -> None:
    """What the tests below pass under does refuse what it should."""
    code = """
import ctypes, mmap, socket, os
def refused(f, *a, **k):
    try: f(*a, **k)
    except (PermissionError, OSError): return True
print(refused(mmap.mmap, -1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC),
      refused(socket.socket, socket.AF_NETLINK, socket.SOCK_RAW), refused(os.chroot, "/"),
      refused(os.nice, 1), bool(socket.socket(socket.AF_INET).close() or True))
"""
    done = run(code)
    assert done.stdout.split() == ["True"] * 5, done.stderr


def test_fault_48_a_python_callback_would_fail_here() -> None:
    """Why no callback goes into OpenSSL: libffi cannot make one without writable code (R-4-11)."""
    code = """
from OpenSSL import SSL
try:
    SSL.Context(SSL.TLS_METHOD).set_verify(SSL.VERIFY_PEER, lambda *a: True)
except MemoryError:
    print("MemoryError")
"""
    done = run(code)
    if done.returncode == 0 and not done.stdout:
        pytest.skip("this libffi makes callbacks without writable code")
    assert done.stdout == "MemoryError\n", done.stderr


def test_fault_48_a_whole_handshake() -> None:
    """R-4-11."""
    code = """
from stp.identity import ContextCache, TimeFloor
from tests.identity_kit import shake, shared
client, server = (ContextCache(shared().identity(n), TimeFloor()) for n in ("edge-1", "hub-1"))
print(shake(client.tls(False), server.tls(True)))
"""
    done = run(code)
    assert done.stdout == "('', '')\n", done.stderr


@pytest.mark.slow
def test_fault_48_the_daemon_serves_and_enrols(tmp_path: Path) -> None:
    """A hub as `stpd init` leaves it: it says READY, signs a device and ends in order."""
    ports = [free_port() for _ in range(4)]
    udp, enrol, management, health = (f"127.0.0.1:{port}" for port in ports)
    done = setup.init_hub(
        "hub-1",
        tmp_path / "hub",
        addresses=setup.Addresses(udp=udp, enrol=enrol, management=management, health=health),
        context=False,
    )
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(30)
        with (tmp_path / "log").open("wb") as log:
            daemon = subprocess.Popen(
                sandboxed("-m", "stpd", "run", "--config", str(done.config)),
                cwd=ROOT,
                env=os.environ | {"NOTIFY_SOCKET": str(tmp_path / "notify")},
                stderr=log,
            )
        try:
            wait_for_ready(manager, daemon, tmp_path / "log")
            token = make_token(tmp_path / "hub")
            path = join_device(token, enrol, "sensor-7", tmp_path / "device.pem")
            assert Identity.load(path).node == "sensor-7"
        finally:
            daemon.terminate()
            daemon.wait(20)
        assert daemon.returncode == 0, (tmp_path / "log").read_text()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def wait_for_ready(manager: socket.socket, daemon: subprocess.Popen[bytes], log: Path) -> None:
    manager.settimeout(0.2)
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        if daemon.poll() == CANNOT:
            pytest.skip(log.read_text().strip())
        assert daemon.poll() is None, log.read_text()
        try:
            if manager.recv(4096).startswith(b"READY=1"):
                return
        except TimeoutError:
            continue
    raise AssertionError(f"not ready; {log.read_text()}")


def make_token(directory: Path) -> str:
    """By the management API, as stpctl does it, from outside the sandbox."""
    asked = ("keys", "create", "--role", "device", "-o", "json")
    made = subprocess.run(
        [sys.executable, "-m", "stpctl", "--context", str(directory / "context.json"), *asked],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert made.returncode == 0, made.stderr
    token: str = json.loads(made.stdout)["token"]
    return token
