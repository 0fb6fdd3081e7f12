"""A listener in a process of its own, with the limits of the protocol, and what tests ask of it.

    with Listener(tmp_path, "edge-1", "edge-2") as hub:        # makes identities of these nodes, too
        hub.ask()["rss"]                                       # resident bytes; see `answer` for the rest

It sends back on stream 0 what it reads there, and reads all other streams.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, TypeVar

import attrs
import trio
from OpenSSL import SSL

from stp.carriers.udp import UdpCarrier
from stp.core.endpoint import Endpoint, EndpointConfig
from stp.core.events import StreamOpened, StreamReadable
from stp.core.session import Session
from stp.identity import ContextCache, Identity, TimeFloor
from tests.identity_kit import shared


class Closes(Protocol):
    def close(self) -> object: ...


Kept = TypeVar("Kept", bound=Closes)

NODE = "hub-1"
HOST = "127.0.0.1"


def endpoint(bundle: Path, *, accept: bool, **options: Any) -> Endpoint:
    identity = Identity.load(bundle)
    contexts = ContextCache(identity, TimeFloor())
    return Endpoint(
        EndpointConfig(
            tls=contexts.tls,
            leaf_der=identity.leaf_der,
            network_keys=identity.network_keys,
            accept=accept,
            random_bytes=os.urandom,
            **options,
        )
    )


def answer(listening: Endpoint, thorough: bool) -> dict[str, Any]:
    """Counts of the endpoint, resident bytes, CPU seconds; when thorough, after a collection, TLS objects alive."""
    spent = time.process_time()
    if thorough:
        gc.collect()
    with open("/proc/self/statm", encoding="ascii") as found:
        resident = int(found.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    tls = sum(isinstance(one, SSL.Connection) for one in gc.get_objects()) if thorough else -1
    return {**attrs.asdict(listening.statistics()), "rss": resident, "cpu": spent, "tls": tls}


async def serve(bundle: Path) -> None:
    """Prints its port, then an answer for each line on stdin."""
    listening = endpoint(bundle, accept=True, cid_key=b"c" * 32, reset_key=b"r" * 32)
    taken: dict[tuple[Session, int], int] = {}

    def on_ready(session: Session) -> None:
        while (event := session.next_event()) is not None:
            if not isinstance(event, StreamReadable | StreamOpened) or not session.live:
                continue
            data = session.read(event.stream)
            if not event.stream:
                session.write(0, data[: session.room(0)])
            elif data:
                taken[session, event.stream] = taken.get((session, event.stream), 0) + len(data)
                session.advance_credit(event.stream, taken[session, event.stream])

    carrier = await UdpCarrier.bind(listening, HOST, on_ready=on_ready)
    async with trio.open_nursery() as nursery:
        await nursery.start(carrier.run)
        print(carrier.local_address[1], flush=True)
        async for asked in trio.lowlevel.FdStream(os.dup(0)):
            print(json.dumps(answer(listening, asked == b"!\n")), flush=True)
        nursery.cancel_scope.cancel()


class Listener:
    """The process, and the bundles of those who dial it."""

    def __init__(self, directory: Path, *nodes: str) -> None:
        self.bundles: dict[str, Path] = {}
        for node in (NODE, *nodes):
            self.bundles[node] = directory / f"{node}.pem"
            self.bundles[node].write_bytes(shared().bundle(node))
        command = [sys.executable, "-m", "tests.real.listener", str(self.bundles[NODE])]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        self.address = (HOST, int(self._process.stdout.readline()))
        self._kept = contextlib.ExitStack()

    def keep(self, one: Kept) -> Kept:
        """It is closed when this is."""
        return self._kept.enter_context(contextlib.closing(one))

    def ask(self, *, thorough: bool = False) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("!\n" if thorough else "?\n")
        self._process.stdin.flush()
        found: dict[str, Any] = json.loads(self._process.stdout.readline())
        return found

    def settled(self, datagrams: int, seconds: float = 20.0) -> dict[str, Any]:
        """What it says once it has received so many datagrams, or no more come: some may be lost to a full buffer."""
        deadline, seen = time.monotonic() + seconds, -1
        while True:
            found = self.ask()
            if (
                found["datagrams_in"] >= datagrams
                or (found["datagrams_in"] == seen)
                or time.monotonic() > deadline
            ):
                return found
            seen = found["datagrams_in"]
            time.sleep(0.02)

    def __enter__(self) -> Listener:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._kept.close()
        self._process.kill()
        self._process.communicate()


if __name__ == "__main__":
    trio.run(serve, Path(sys.argv[1]))
