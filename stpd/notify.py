"""What systemd is told, and when it wants to hear from us: sd_notify(3), in the few lines we need.

(1) Without NOTIFY_SOCKET nothing is sent and nothing fails: the daemon runs the same by hand.
(2) Sending never blocks and never raises; what the socket did not take is counted.
(3) The watchdog is fed by whoever can tell that work goes on: `watchdog` sends, it does not decide.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping
from typing import Final

MAX_STATUS: Final = 500
"""Characters of a status line; `systemctl status` shows one line."""


class Notifier:
    """A datagram socket towards the service manager, or nothing at all; (1)."""

    def __init__(self, environment: Mapping[str, str] | None = None) -> None:
        environment = os.environ if environment is None else environment
        self.watchdog_interval = _watchdog_interval(environment)
        """Seconds between two `watchdog` calls, half of what the unit allows; None: it asks for none."""
        self.failed = 0
        """Messages that could not be sent."""
        address = environment.get("NOTIFY_SOCKET", "")
        self._socket: socket.socket | None = None
        if address[:1] not in ("/", "@"):
            return
        made = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        made.setblocking(False)
        try:
            made.connect("\0" + address[1:] if address[0] == "@" else address)
        except OSError:
            made.close()
            self.failed += 1
        else:
            self._socket = made

    @property
    def active(self) -> bool:
        return self._socket is not None

    def ready(self, status: str = "") -> None:
        """We serve: after start, and again after a reload."""
        self._send("READY=1", status)

    def reloading(self) -> None:
        """A reload has begun; `ready` ends it. systemd wants to know since when (Type=notify-reload)."""
        self._send(f"RELOADING=1\nMONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}")

    def stopping(self, status: str = "") -> None:
        self._send("STOPPING=1", status)

    def status(self, status: str) -> None:
        """One line for `systemctl status`."""
        self._send("", status)

    def watchdog(self) -> None:
        """Work goes on; (3)."""
        self._send("WATCHDOG=1")

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _send(self, message: str, status: str = "") -> None:
        if self._socket is None:
            return
        if status:
            line = " ".join(status.split())[:MAX_STATUS]
            message = f"{message}\nSTATUS={line}" if message else f"STATUS={line}"
        try:
            self._socket.send(message.encode())
        except OSError:
            self.failed += 1


def _watchdog_interval(environment: Mapping[str, str]) -> float | None:
    """sd_watchdog_enabled(3): WATCHDOG_USEC, if WATCHDOG_PID is absent or us; half of it."""
    try:
        microseconds = int(environment.get("WATCHDOG_USEC", "0"))
        process = int(environment.get("WATCHDOG_PID", "0"))
    except ValueError:
        return None
    if microseconds <= 0 or process not in (0, os.getpid()):
        return None
    return microseconds / 2e6
