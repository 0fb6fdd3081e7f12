"""The demo's processes: the real commands, in a directory of their own, on free ports of 127.0.0.1."""

from __future__ import annotations

import ctypes
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

import trio

BIN: Final = Path(sys.executable).parent
READY_TIMEOUT: Final = 20.0
"""Seconds a daemon has to say that it is ready."""
DEATH_SIGNAL: Final = 1
"""PR_SET_PDEATHSIG of prctl(2)."""
LIBC: Final = ctypes.CDLL(None)


class Failed(Exception):  # noqa: N818 - read as a sentence
    """The demo cannot go on. The text says what happened, for people."""


def free_ports(count: int) -> list[int]:
    """Ports of 127.0.0.1 that nobody has, for UDP and TCP alike."""
    held: list[socket.socket] = []
    ports: list[int] = []
    while len(ports) < count:
        tcp, udp = socket.socket(), socket.socket(type=socket.SOCK_DGRAM)
        held += [tcp, udp]
        tcp.bind(("127.0.0.1", 0))
        try:
            udp.bind(tcp.getsockname())
        except OSError:
            continue
        ports.append(tcp.getsockname()[1])
    for one in held:
        one.close()
    return ports


INTERRUPTS: Final = frozenset({signal.SIGINT, signal.SIGTERM})


def die_with_parent() -> None:
    """Run in a child before its program: when the demo is killed, so is everything that it started."""
    LIBC.prctl(DEATH_SIGNAL, signal.SIGKILL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, INTERRUPTS)


class Fleet:
    """Where the files are, what runs, and what was typed."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.health: dict[str, int] = {}
        self.environment = {**os.environ, "XDG_CONFIG_HOME": str(home), "PATH": f"{BIN}:{os.environ['PATH']}"}
        (home / "stpctl" / "contexts").mkdir(parents=True)

    async def command(self, line: str, *, quiet: bool = False, shown: str = "") -> str:
        """Type a command; what it prints. Raises Failed with its words if it does not end well."""
        if not quiet:
            typed(shown or line)
        words = shlex.split(line)
        done = await trio.run_process(
            [str(BIN / words[0]), *words[1:]],
            capture_stdout=True,
            capture_stderr=True,
            check=False,
            cwd=self.home,
            env=self.environment,
        )
        if done.returncode:
            said = (done.stderr or done.stdout).decode(errors="replace").strip()
            raise Failed(f"`{line}` ended with status {done.returncode}:\n{said}")
        return done.stdout.decode()

    async def ask(self, line: str) -> Any:
        """What a command prints with -o json; None if the daemon does not answer."""
        try:
            return json.loads(await self.command(f"{line} -o json", quiet=True))
        except (Failed, ValueError):
            return None

    async def start(self, name: str, line: str) -> None:
        """Start a daemon and wait until it is ready."""
        typed(f"{line} &")
        self.processes[name] = self._spawn(name, shlex.split(line))
        with trio.move_on_after(READY_TIMEOUT):
            while self.processes[name].poll() is None:
                if await self._is_ready(name):
                    return
                await trio.sleep(0.05)
        last = (self.home / f"{name}.log").read_text(errors="replace").splitlines()[-12:]
        raise Failed("\n".join([f"{name} did not become ready; the end of its log:", *last]))

    def _spawn(self, name: str, words: list[str]) -> subprocess.Popen[bytes]:
        # Python swallows a Ctrl-C that hits a fork: it waits until the fork is over.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, INTERRUPTS)
        try:
            return self._fork(name, words)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def _fork(self, name: str, words: list[str]) -> subprocess.Popen[bytes]:
        with (self.home / f"{name}.log").open("ab") as log:
            return subprocess.Popen(
                [str(BIN / words[0]), *words[1:]],
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                cwd=self.home,
                env=self.environment,
                preexec_fn=die_with_parent,
            )

    async def _is_ready(self, name: str) -> bool:
        try:
            stream = await trio.open_tcp_stream("127.0.0.1", self.health[name])
            async with stream:
                await stream.send_all(b"GET /ready HTTP/1.1\r\nHost: demo\r\nConnection: close\r\n\r\n")
                return b" 200 " in await stream.receive_some(256)
        except OSError:
            return False

    def kill(self, name: str) -> None:
        """SIGKILL: no goodbye, nothing written."""
        process = self.processes.pop(name)
        typed(f"kill -9 {process.pid}")
        process.kill()
        process.wait()

    def stop(self) -> None:
        """End whatever runs, politely first."""
        for process in self.processes.values():
            process.terminate()
        for process in self.processes.values():
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self.processes.clear()


def typed(line: str) -> None:
    """Show a command as it would be typed."""
    print(f"\033[2m$\033[0m {line}" if sys.stdout.isatty() else f"$ {line}", flush=True)
