"""The ends of bench.link, each a process in a network namespace: receivers and senders over STP and over TCP.

    python -m bench.link_ends serve stp|tcp DIRECTORY SIZE     READY, then what came as JSON
    python -m bench.link_ends send  stp|tcp DIRECTORY '{…}'    sends until killed

A receiver reports once SIZE bytes came, or with SIZE 0 when a line comes on stdin: for each flow, in the order in
which they came, pairs of time (monotonic, which all processes of a machine share) and bytes so far.
"""

from __future__ import annotations

import json
import os
import socket
import struct
import sys
import time
from pathlib import Path
from typing import Any, Final

import trio
from attrs import define

from bench.carriers import stp_endpoint
from bench.wire import ADDRESS, B
from stp.carriers.udp import UdpCarrier
from stp.core.errors import ErrorCode
from stp.core.events import Connected, SessionClosed, StreamOpened, StreamReadable
from stp.core.session import Session

PORT: Final = 9000
GRAIN: Final = 0.01
"""Seconds between two entries of a flow."""
PRIORITY: Final = -15
"""What a busy machine is late counts as round trip: this is to measure the link."""
STARVED: Final = 120.0
"""Seconds after which a receiver gives up, however little came."""
COMMAND: Final = 1024
STAMP: Final = struct.Struct("!d")
COMMAND_WEIGHT: Final = 16
"""Of the lane of commands beside bulk's 1, as in stp.lanes."""


@define
class Plan:
    """What a sender does."""

    congestion: str = ""
    """STP: the endpoint's controller ("": the default). TCP: the kernel's."""
    size: int = 0
    """Bytes; 0: without end."""
    command_every: float = 0.0
    """Seconds between two commands of 1 KiB on a stream of their own; 0: none."""


class Flow:
    """What came of one sender."""

    def __init__(self) -> None:
        self.total = 0
        self.entries: list[tuple[float, int]] = []

    def add(self, size: int) -> None:
        now = time.monotonic()
        self.total += size
        if self.entries and now - self.entries[-1][0] < GRAIN and len(self.entries) > 1:
            self.entries[-1] = (now, self.total)
        else:
            self.entries.append((now, self.total))


class Receiver:
    """All flows of one server, and when to report."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.flows: list[Flow] = []
        self.commands: list[float] = []
        """Seconds from writing to reading, of each command."""
        self.over = trio.Event()

    def flow(self) -> Flow:
        self.flows.append(Flow())
        return self.flows[-1]

    def look(self) -> None:
        if self.size and sum(flow.total for flow in self.flows) >= self.size:
            self.over.set()

    async def wait(self) -> None:
        print("READY", flush=True)
        with trio.move_on_after(STARVED):
            if self.size:
                await self.over.wait()
            else:
                await trio.to_thread.run_sync(sys.stdin.readline, abandon_on_cancel=True)
        found = {"flows": [flow.entries for flow in self.flows], "commands": self.commands}
        print(json.dumps(found), flush=True)


# -- STP


async def serve_stp(directory: Path, size: int) -> None:
    receiver = Receiver(size)
    flows: dict[Session, Flow] = {}
    taken: dict[tuple[Session, int], int] = {}
    partial: dict[Session, bytes] = {}

    def on_ready(session: Session) -> None:
        while (event := session.next_event()) is not None:
            match event:
                case Connected():
                    flows[session] = receiver.flow()
                case StreamReadable(stream=stream) | StreamOpened(stream=stream):
                    data = session.read(stream)
                    if not data:
                        continue
                    key = session, stream
                    taken[key] = taken.get(key, 0) + len(data)
                    session.advance_credit(stream, taken[key])
                    if stream == min(s for one, s in taken if one is session):
                        flows[session].add(len(data))
                    else:
                        commands(session, data)
        receiver.look()

    def commands(session: Session, data: bytes) -> None:
        data = partial.get(session, b"") + data
        while len(data) >= COMMAND:
            receiver.commands.append(time.monotonic() - STAMP.unpack_from(data)[0])
            data = data[COMMAND:]
        partial[session] = data

    endpoint = stp_endpoint(directory, "server", accept=True)
    carrier = await UdpCarrier.bind(endpoint, "0.0.0.0", PORT, on_ready=on_ready)
    async with trio.open_nursery() as nursery:
        await nursery.start(carrier.run)
        await receiver.wait()
        carrier.close()


class StpSender:
    """Bulk on one stream, commands on another."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.left = plan.size or 1 << 50
        self.bulk = self.commands = -1
        self.connected = trio.Event()
        self.session: Session | None = None
        self.chunk = bytes(64 * 1024)

    def on_ready(self, session: Session) -> None:
        while (event := session.next_event()) is not None:
            match event:
                case Connected():
                    self.session = session
                    self.bulk = session.open_stream()
                    if self.plan.command_every:
                        self.commands = session.open_stream(weight=COMMAND_WEIGHT)
                    self.connected.set()
                case SessionClosed(code=code, reason=reason) if code != ErrorCode.NO_ERROR:
                    raise RuntimeError(f"session closed: {code} {reason}")
        while self.bulk >= 0 and self.left and (room := min(session.room(self.bulk), self.left)) > 0:
            room = min(room, len(self.chunk))
            session.write(self.bulk, self.chunk[:room])
            self.left -= room

    async def command(self, carrier: UdpCarrier) -> None:
        await self.connected.wait()
        assert self.session is not None
        while True:
            await trio.sleep(self.plan.command_every)
            self.session.write(self.commands, STAMP.pack(time.monotonic()).ljust(COMMAND, b"c"))
            carrier.send_now()


async def send_stp(directory: Path, plan: Plan) -> None:
    sender = StpSender(plan)
    endpoint = stp_endpoint(directory, "client", accept=False, congestion=plan.congestion)
    carrier = await UdpCarrier.bind(endpoint, "0.0.0.0", on_ready=sender.on_ready)
    async with trio.open_nursery() as nursery:
        await nursery.start(carrier.run)
        endpoint.connect((ADDRESS[B], PORT), expected_node="server", now=trio.current_time())
        carrier.wake()
        if plan.command_every:
            nursery.start_soon(sender.command, carrier)


# -- TCP


async def serve_tcp(directory: Path, size: int) -> None:
    receiver = Receiver(size)

    async def take(stream: trio.SocketStream) -> None:
        flow = receiver.flow()
        while data := await stream.receive_some(65_536):
            flow.add(len(data))
            receiver.look()

    async with trio.open_nursery() as nursery:
        await nursery.start(trio.serve_tcp, take, PORT)
        await receiver.wait()
        nursery.cancel_scope.cancel()


async def send_tcp(directory: Path, plan: Plan) -> None:
    sock = socket.socket()
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, (plan.congestion or "cubic").encode())
    sock.connect((ADDRESS[B], PORT))
    left, chunk = plan.size or 1 << 50, bytes(64 * 1024)
    try:
        while left > 0:
            left -= sock.send(chunk[:left])
        sock.shutdown(socket.SHUT_WR)
        sock.recv(1)
    except ConnectionError:
        pass  # the receiver has what it wanted


ROLES: Final[dict[tuple[str, str], Any]] = {
    ("serve", "stp"): serve_stp,
    ("serve", "tcp"): serve_tcp,
    ("send", "stp"): send_stp,
    ("send", "tcp"): send_tcp,
}


def main(argv: list[str]) -> None:
    try:
        os.nice(PRIORITY)
    except OSError:
        pass  # a container may forbid it
    verb, kind, directory, given = argv[0], argv[1], Path(argv[2]), json.loads(argv[3])
    trio.run(ROLES[verb, kind], directory, given if verb == "serve" else Plan(**given))


if __name__ == "__main__":
    main(sys.argv[1:])
