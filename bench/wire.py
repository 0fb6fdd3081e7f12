"""Two network namespaces and a narrow link between them: a bandwidth, a queue, a delay, loss. Needs root.

    with Wire(Conditions(rate=1_250_000, delay=0.015, queue=25)) as wire:
        server = wire.popen(B, [...])               # listens on ADDRESS[B]
        client = wire.popen(A, [...])               # has ADDRESS[A]; real sockets and the real TCP at both ends
        wire.set(loss=0.02)                         # for both directions, from now on

Each namespace has one TUN device; a process of ours carries IP packets from one to the other, as the kernel's netem
would where it is built in: first `loss`, then a FIFO of `queue` packets before a transmitter of `rate` bytes a second
(IP headers count), then `delay`. It asks for a real-time priority, since what it is late counts as round trip.

(1) Nothing is left behind, whatever happens: a namespace has no name and lives in a descriptor of this process,
    devices go with the wire's process, and that one ends when this one does.
(2) A direction is a FIFO: the wire itself reorders nothing.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import random
import select
import struct
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

from attrs import asdict, define

A: Final = 0
B: Final = 1
ADDRESS: Final = ("10.77.0.1", "10.77.0.2")
DEVICE: Final = "stp0"
MTU: Final = 1500

CLONE_NEWNET: Final = 0x40000000
TUNSETIFF: Final = 0x400454CA
IFF_TUN_NO_PI: Final = 0x0001 | 0x1000
PRIORITY: Final = 10
PACKETS_AT_ONCE: Final = 64
"""Read from one side before the other gets its turn."""


class WireError(Exception):
    """There can be no link here: why, and what to do."""


@define
class Conditions:
    """Of each direction. Times are seconds."""

    rate: float = 1_250_000.0
    """Bytes a second, IP headers included."""
    delay: float = 0.015
    queue: int = 25
    """Packets that wait for the transmitter; more are dropped."""
    loss: float = 0.0
    """Probability, 0..1."""
    up: bool = True
    """False: a black hole."""


@define
class Counts:
    """Of one direction."""

    packets: int = 0
    bytes: int = 0
    lost: int = 0
    """By `loss` and black holes."""
    dropped: int = 0
    """At a full queue."""
    longest: int = 0
    """Most packets that waited."""
    largest: int = 0
    """Bytes of the largest packet."""


# -- the parent's side


class Wire:
    """A context manager. Raises WireError where namespaces or TUN devices are not to be had."""

    def __init__(self, conditions: Conditions, seed: int = 1) -> None:
        self._conditions = conditions
        self._seed = seed
        self._namespaces: list[int] = []
        self._process: subprocess.Popen[str] | None = None
        self.children: list[subprocess.Popen[str]] = []

    def __enter__(self) -> Wire:
        if os.geteuid():
            raise WireError("network namespaces need root: run it with sudo")
        tuns: list[int] = []
        try:
            for side in (A, B):
                with _new_namespace() as namespace:
                    self._namespaces.append(namespace)
                    tuns.append(_make_device(ADDRESS[side]))
            started = json.dumps({"tuns": tuns, "seed": self._seed, "conditions": asdict(self._conditions)})
            self._process = subprocess.Popen(
                [sys.executable, "-m", "bench.wire", started],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                pass_fds=tuns,
                text=True,
            )
        except BaseException:
            self.__exit__()
            raise
        finally:
            for tun in tuns:
                os.close(tun)
        return self

    def __exit__(self, *_: object) -> None:
        for child in self.children:
            child.kill()
            child.communicate()
        if self._process is not None:
            self._process.communicate()  # closes its stdin, upon which it ends
        for namespace in self._namespaces:
            os.close(namespace)
        self._namespaces.clear()

    def popen(self, side: int, command: Sequence[str], **options: Any) -> subprocess.Popen[str]:
        """A process in that namespace; it is killed when the wire goes."""
        with _inside(self._namespaces[side]):
            child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, **options)
        self.children.append(child)
        return child

    def set(self, **changes: Any) -> None:
        """New conditions, from now on."""
        self._ask(changes)

    def counts(self) -> tuple[Counts, Counts]:
        """So far: from A to B, from B to A."""
        there, back = self._ask({})
        return Counts(**there), Counts(**back)

    def _ask(self, changes: dict[str, Any]) -> Any:
        process = self._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps(changes) + "\n")
        process.stdin.flush()
        answer = process.stdout.readline()
        if not answer:
            raise WireError("the wire's process is gone: its last words are on stderr")
        return json.loads(answer)


def unavailable() -> str | None:
    """Why there can be no wire here, for tests that are to be skipped."""
    try:
        with _new_namespace() as namespace:
            os.close(namespace)
            os.close(_make_device(ADDRESS[A]))
    except WireError as exc:
        return str(exc)
    return None


@contextmanager
def _new_namespace() -> Iterator[int]:
    """This thread is in a new namespace meanwhile; its descriptor, which keeps it alive."""
    home = os.open(f"/proc/self/task/{threading.get_native_id()}/ns/net", os.O_RDONLY)
    try:
        _call("unshare", CLONE_NEWNET)
        try:
            yield os.open(f"/proc/self/task/{threading.get_native_id()}/ns/net", os.O_RDONLY)
        finally:
            _call("setns", home, CLONE_NEWNET)
    finally:
        os.close(home)


@contextmanager
def _inside(namespace: int) -> Iterator[None]:
    """This thread is in `namespace` meanwhile, and what it starts stays there."""
    home = os.open(f"/proc/self/task/{threading.get_native_id()}/ns/net", os.O_RDONLY)
    try:
        _call("setns", namespace, CLONE_NEWNET)
        try:
            yield
        finally:
            _call("setns", home, CLONE_NEWNET)
    finally:
        os.close(home)


def _call(name: str, *args: int) -> None:
    """A system call that Python names from 3.12 on."""
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, name)(*args):
        reason = os.strerror(ctypes.get_errno())
        raise WireError(f"no network namespaces here ({name}: {reason}): run it as root, outside a sandbox")


def _make_device(address: str) -> int:
    """A TUN device with that address in the present namespace, up; it goes with the descriptor."""
    try:
        tun = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    except OSError as exc:
        raise WireError(
            f"no TUN device here ({exc}): the kernel needs CONFIG_TUN, a container --device"
        ) from exc
    try:
        fcntl.ioctl(tun, TUNSETIFF, struct.pack("16sH22x", DEVICE.encode(), IFF_TUN_NO_PI))
        for command in (
            f"link set {DEVICE} mtu {MTU} txqueuelen 1000 up",
            f"addr add {address}/24 dev {DEVICE}",
        ):
            subprocess.run(["ip", *command.split()], check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as exc:
        os.close(tun)
        said = exc.stderr.strip() if isinstance(exc, subprocess.CalledProcessError) else exc
        raise WireError(f"cannot set up a TUN device ({said}): iproute2 and root are needed") from exc
    return tun


# -- the wire's process


class Direction:
    """One way through the wire."""

    def __init__(self, source: int, to: int, seed: int) -> None:
        self.source, self.to = source, to
        self.counts = Counts()
        self._random = random.Random(seed).random
        self._leaving: deque[float] = deque()
        self._flying: deque[tuple[float, bytes]] = deque()

    def take(self, conditions: Conditions, now: float) -> None:
        """What the source's kernel has for us."""
        for _ in range(PACKETS_AT_ONCE):
            try:
                packet = os.read(self.source, 65_536)
            except BlockingIOError:
                return
            counts, leaving = self.counts, self._leaving
            counts.packets += 1
            counts.bytes += len(packet)
            counts.largest = max(counts.largest, len(packet))
            if not conditions.up or (conditions.loss and self._random() < conditions.loss):
                counts.lost += 1
                continue
            while leaving and leaving[0] <= now:
                leaving.popleft()
            if len(leaving) > conditions.queue:  # the first of them is on the wire
                counts.dropped += 1
                continue
            leaves = (leaving[-1] if leaving else now) + len(packet) / conditions.rate
            leaving.append(leaves)
            counts.longest = max(counts.longest, len(leaving) - 1)
            self._flying.append((leaves + conditions.delay, packet))

    def deliver(self, now: float) -> float | None:
        """Hand over what has arrived; when the next packet does."""
        flying = self._flying
        while flying and flying[0][0] <= now:
            try:
                os.write(self.to, flying.popleft()[1])
            except OSError:
                self.counts.lost += 1  # the other kernel has no room, or its device went
        return flying[0][0] if flying else None


def carry(tuns: list[int], seed: int, conditions: Conditions) -> None:
    """Until stdin ends. A line there is new conditions and is answered with the counts."""
    try:
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(PRIORITY))
    except OSError:
        pass  # a container may forbid it: round trips are longer on a busy machine then
    a, b = tuns
    ways = (Direction(a, b, seed), Direction(b, a, seed + 1))
    while True:
        due = [at for way in ways if (at := way.deliver(time.monotonic())) is not None]
        wait = max(0.0, min(due) - time.monotonic()) if due else None
        ready, _, _ = select.select([a, b, 0], [], [], wait)
        now = time.monotonic()
        for way in ways:
            if way.source in ready:
                way.take(conditions, now)
        if 0 in ready:
            line = sys.stdin.readline()
            if not line:
                return
            for name, value in json.loads(line).items():
                setattr(conditions, name, value)
            print(json.dumps([asdict(way.counts) for way in ways]), flush=True)


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    carry(given["tuns"], given["seed"], Conditions(**given["conditions"]))
