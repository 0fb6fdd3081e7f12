"""stpd/notify.py against a real datagram socket. Promises are those at the head of that file."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from stpd.notify import MAX_STATUS, Notifier


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[socket.socket]:
    """The service manager's end."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as made:
        made.bind(str(tmp_path / "notify"))
        made.settimeout(5)
        yield made


@pytest.fixture
def notifier(manager: socket.socket) -> Iterator[Notifier]:
    made = Notifier({"NOTIFY_SOCKET": manager.getsockname()})
    yield made
    made.close()


def heard(manager: socket.socket) -> str:
    return manager.recv(4096).decode()


def test_messages(manager: socket.socket, notifier: Notifier) -> None:
    assert notifier.active
    notifier.ready("serving on 9000")
    assert heard(manager) == "READY=1\nSTATUS=serving on 9000"
    notifier.ready()
    assert heard(manager) == "READY=1"
    notifier.status("3 edges,\n2 behind")
    assert heard(manager) == "STATUS=3 edges, 2 behind"
    notifier.watchdog()
    assert heard(manager) == "WATCHDOG=1"
    notifier.stopping("draining")
    assert heard(manager) == "STOPPING=1\nSTATUS=draining"
    notifier.status("x" * 10_000)
    assert heard(manager) == "STATUS=" + "x" * MAX_STATUS
    assert notifier.failed == 0


def test_reloading_says_since_when(manager: socket.socket, notifier: Notifier) -> None:
    before = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
    notifier.reloading()
    first, second = heard(manager).split("\n")
    assert first == "RELOADING=1"
    name, _, value = second.partition("=")
    assert name == "MONOTONIC_USEC"
    assert before <= int(value) <= time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000


def test_abstract_addresses() -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as made:
        made.bind("\0stpd-test-" + os.urandom(8).hex())
        made.settimeout(5)
        notifier = Notifier({"NOTIFY_SOCKET": "@" + made.getsockname()[1:].decode()})
        notifier.ready()
        assert heard(made) == "READY=1"
        notifier.close()


@pytest.mark.parametrize("environment", [{}, {"NOTIFY_SOCKET": ""}, {"NOTIFY_SOCKET": "vsock:2:1"}])
def test_without_a_manager_nothing_happens(environment: dict[str, str]) -> None:
    """(1)"""
    notifier = Notifier(environment)
    assert not notifier.active
    notifier.ready()
    notifier.close()
    assert notifier.failed == 0


def test_a_manager_that_is_gone_or_full_does_not_hold_us_up(manager: socket.socket, tmp_path: Path) -> None:
    """(2)"""
    assert Notifier({"NOTIFY_SOCKET": str(tmp_path / "none")}).failed == 1
    notifier = Notifier({"NOTIFY_SOCKET": manager.getsockname()})
    for _ in range(10_000):
        notifier.watchdog()  # nobody reads: the queue fills, and we go on
    assert notifier.failed > 0
    notifier.close()
    notifier.watchdog()


@pytest.mark.parametrize(
    ("environment", "interval"),
    [
        ({}, None),
        ({"WATCHDOG_USEC": "30000000"}, 15.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": str(os.getpid())}, 15.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "1"}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
    ],
)
def test_watchdog_interval(environment: dict[str, str], interval: float | None) -> None:
    assert Notifier(environment).watchdog_interval == interval
