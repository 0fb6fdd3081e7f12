"""Two hosts and a router between them, each a network namespace: real sockets, real kernels' opinions of packets.

    with Namespaces() as net:
        net.popen(net.near, ["python", "-m", …])          # a process on one of the hosts, at NEAR or FAR
        net.set_mtu(1280)                                 # what the router passes on from now on, in both directions

Needs root and iproute2; `why_not()` says what is missing.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from types import TracebackType
from typing import Any

NEAR = "10.213.1.2"
FAR = "10.213.2.2"


def why_not() -> str:
    """A reason to skip, "" if namespaces work here."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "there is no iproute2"
    name = f"stp-try-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    if made.returncode:
        return f"no network namespaces here: {made.stderr.strip()}"
    subprocess.run(["ip", "netns", "del", name], check=True)
    return ""


class Namespaces:
    def __init__(self) -> None:
        self.near, self.router, self.far = (f"stp-{side}-{os.getpid()}" for side in ("near", "router", "far"))

    def __enter__(self) -> Namespaces:
        try:
            for name in (self.near, self.router, self.far):
                self._ip("netns", "add", name)
                self._ip("-n", name, "link", "set", "lo", "up")
            for side, name, address in (("near", self.near, NEAR), ("far", self.far, FAR)):
                network, _, _ = address.rpartition(".")
                pair = f"eth0 netns {name} type veth peer name {side} netns {self.router}"
                self._ip("link", "add", *pair.split())
                self._ip("-n", name, "address", "add", f"{address}/24", "dev", "eth0")
                self._ip("-n", self.router, "address", "add", f"{network}.1/24", "dev", side)
                self._ip("-n", name, "link", "set", "eth0", "up")
                self._ip("-n", self.router, "link", "set", side, "up")
                self._ip("-n", name, "route", "add", "default", "via", f"{network}.1")
            self.run(self.router, ["sysctl", "-qw", "net.ipv4.ip_forward=1"])
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._remove()

    def _remove(self) -> None:
        for name in (self.near, self.router, self.far):
            with contextlib.suppress(subprocess.CalledProcessError):
                self._ip("netns", "del", name)

    def _ip(self, *words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True)

    def set_mtu(self, mtu: int) -> None:
        """Of the router's links, whose other ends keep theirs: who sends more hears of it by loss only."""
        for side in ("near", "far"):
            self._ip("-n", self.router, "link", "set", side, "mtu", str(mtu))

    def set_first_hop(self, mtu: int) -> None:
        """Of the near host's own link: its kernel refuses to send more."""
        self._ip("-n", self.near, "link", "set", "eth0", "mtu", str(mtu))

    def run(self, where: str, command: list[str]) -> None:
        subprocess.run(["ip", "netns", "exec", where, *command], check=True)

    def popen(self, where: str, command: list[str], **options: Any) -> subprocess.Popen[str]:
        return subprocess.Popen(
            ["ip", "netns", "exec", where, *command], stdout=subprocess.PIPE, text=True, **options
        )
