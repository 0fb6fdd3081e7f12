"""A stream of bytes from one process to another over the UDP carrier, as tests of paths need it.

    python -m tests.real.mover serve DIRECTORY HOST SIZE          prints its port; at the end a line of JSON
    python -m tests.real.mover send DIRECTORY HOST SIZE PORT RATE  prints "size N" whenever that changes; then JSON

DIRECTORY is one of bench.transport.make_identities. RATE is bytes a second.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import trio

from stp.carriers.udp import LOOPBACK_DATAGRAM, UdpCarrier, sizes_for
from stp.core.endpoint import Endpoint, EndpointConfig
from stp.core.errors import ErrorCode
from stp.core.events import Connected, SessionClosed
from stp.core.session import Session
from stp.identity import ContextCache, Identity, TimeFloor

STEP = 0.01
"""Seconds between two writes."""


def endpoint(directory: Path, name: str, *, accept: bool) -> Endpoint:
    identity = Identity.load(directory / f"{name}.pem")
    contexts = ContextCache(identity, TimeFloor())
    return Endpoint(
        EndpointConfig(
            tls=contexts.tls,
            leaf_der=identity.leaf_der,
            network_keys=identity.network_keys,
            accept=accept,
            random_bytes=os.urandom,
            max_datagram=LOOPBACK_DATAGRAM,
            sizes_for=sizes_for,
        )
    )


def block(number: int, size: int) -> bytes:
    return hashlib.sha256(number.to_bytes(8, "big")).digest() * (size // 32)


async def serve(directory: Path, host: str, size: int) -> None:
    digest, over = hashlib.sha256(), trio.Event()
    got, stall, last = 0, 0.0, 0.0
    ended: Any = None

    def on_ready(session: Session) -> None:
        nonlocal got, stall, last, ended
        while (event := session.next_event()) is not None:
            if isinstance(event, SessionClosed):
                ended = event
                over.set()
        for stream in list(session._streams.recv):
            data = session.read(stream)
            if data and stream:
                now = trio.current_time()
                stall, last = max(stall, now - (last or now)), now
                digest.update(data)
                got += len(data)
                session.advance_credit(stream, got)
        if got >= size and session.live:
            session.close(ErrorCode.NO_ERROR, "all here", trio.current_time())

    carrier = await UdpCarrier.bind(endpoint(directory, "server", accept=True), host, on_ready=on_ready)
    async with trio.open_nursery() as nursery:
        await nursery.start(carrier.run)
        print(carrier.local_address[1], flush=True)
        await over.wait()
        carrier.close()
    print(json.dumps({"bytes": got, "stall": stall, "sha": digest.hexdigest(), "code": int(ended.code)}))


async def send(directory: Path, host: str, size: int, port: int, rate: int) -> None:
    digest, over = hashlib.sha256(), trio.Event()
    connected = trio.Event()
    near = endpoint(directory, "client", accept=False)
    code = -1

    def on_ready(session: Session) -> None:
        nonlocal code
        while (event := session.next_event()) is not None:
            if isinstance(event, Connected):
                connected.set()
            elif isinstance(event, SessionClosed):
                code = int(event.code) if isinstance(event.code, ErrorCode) else -1
                over.set()

    carrier = await UdpCarrier.bind(near, "0.0.0.0", on_ready=on_ready)
    async with trio.open_nursery() as nursery:
        await nursery.start(carrier.run)
        session = near.connect((host, port), expected_node="server", now=trio.current_time())
        carrier.wake()
        await connected.wait()
        stream, written, number, known = session.open_stream(), 0, 0, 0
        while not over.is_set():
            step = int(rate * STEP) // 32 * 32
            if written < size and session.live and session.room(stream) >= step:
                data = block(number, min(step, size - written))
                session.write(stream, data)
                digest.update(data)
                written, number = written + len(data), number + 1
                carrier.wake()
            found = session.statistics()
            if found.datagram != known:
                known = found.datagram
                print(f"size {known}", flush=True)
            await trio.sleep(STEP)
        carrier.close()
    said = {"written": written, "sha": digest.hexdigest(), "code": code, "datagram": found.datagram}
    errors = carrier.statistics().errors
    print(
        json.dumps(said | {"black_holes": found.black_holes, "probes": found.size_probes, "errors": errors})
    )


if __name__ == "__main__":
    _, role, where, address, total, *more = sys.argv
    work = {"serve": serve, "send": send}[role]
    trio.run(work, Path(where), address, int(total), *map(int, more))
