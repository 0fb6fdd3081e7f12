"""What idle sessions cost a listener: memory per session and the time until all stand.

    python -m bench.idle [--sessions 1000] [--json]

A listener and a dialler process on loopback. The dialler holds all sessions on one socket, at most `DIALS` handshakes
at a time. Admission limits per address are lifted: this is a thousand gateways behind one NAT. The last line on
stdout is JSON: `kib_per_session` is the growth of the listener's resident memory over the sessions, measured after
garbage collection while all of them stand; `connect_s` runs from the first dial until the last session is connected.
`handshakes_per_s` is what one core could do as a listener: one second over the CPU time that the listener's process
spent per handshake, all of it, the Retry, both certificates and the socket included. Every handshake is a full one:
no session is resumed, and none of the diallers has a NEW_TOKEN.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Final

import trio

from bench.carriers import HOST, stp_endpoint
from bench.transport import make_identities
from stp.carriers.udp import UdpCarrier
from stp.core.events import Connected, SessionClosed
from stp.core.session import Session

DIALS: Final = 32
"""Handshakes under way at once."""
SETTLE: Final = 1.0
"""Seconds after the last handshake until memory is read: INIT state is gone by then."""
LIMIT: Final = 600.0
"""Seconds for everything."""
WARM: Final = 20
"""Sessions made and measured before the count starts: what a process allocates once is not theirs."""


def resident_bytes() -> int:
    with open("/proc/self/statm") as found:
        return int(found.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


async def serve(directory: Path) -> None:
    """Prints its port; then answers each line on stdin with its resident memory and the sessions it holds."""
    endpoint = stp_endpoint(directory, "server", accept=True, unlimited=True)

    def on_ready(session: Session) -> None:
        while session.next_event() is not None:
            pass

    carrier = await UdpCarrier.bind(endpoint, HOST, on_ready=on_ready)
    async with trio.open_nursery() as nursery:
        await nursery.start(carrier.run)
        print(carrier.local_address[1], flush=True)
        asked = trio.lowlevel.FdStream(os.dup(0))
        async for _ in asked:
            gc.collect()
            found = {
                "bytes": resident_bytes(),
                "sessions": len(endpoint.sessions),
                "cpu_s": time.process_time(),
            }
            print(json.dumps(found), flush=True)
        carrier.close()


async def dial(directory: Path, port: int, count: int, server: subprocess.Popen[str]) -> dict[str, float]:
    endpoint = stp_endpoint(directory, "client", accept=False, unlimited=True)
    waiting = connected = 0
    changed = trio.Event()

    def on_ready(session: Session) -> None:
        nonlocal waiting, connected, changed
        while (event := session.next_event()) is not None:
            match event:
                case Connected():
                    waiting -= 1
                    connected += 1
                    changed.set()
                case SessionClosed(code=code, reason=reason):
                    raise RuntimeError(f"session closed: {code} {reason}")

    async def reach(target: int) -> None:
        nonlocal waiting, changed
        while connected < target:
            while waiting < DIALS and connected + waiting < target:
                endpoint.connect((HOST, port), expected_node="server", now=trio.current_time())
                waiting += 1
            carrier.wake()
            changed = trio.Event()
            await changed.wait()

    async def ask() -> dict[str, float]:
        await trio.sleep(SETTLE)
        assert server.stdin is not None
        assert server.stdout is not None
        server.stdin.write("?\n")
        server.stdin.flush()
        found: dict[str, float] = json.loads(await trio.to_thread.run_sync(server.stdout.readline))
        return found

    carrier = await UdpCarrier.bind(endpoint, HOST, on_ready=on_ready)
    with trio.fail_after(LIMIT):
        async with trio.open_nursery() as nursery:
            await nursery.start(carrier.run)
            await reach(WARM)
            before = await ask()
            started, own_cpu = time.perf_counter(), time.process_time()
            await reach(WARM + count)
            took = time.perf_counter() - started
            own_cpu = time.process_time() - own_cpu
            after = await ask()
            carrier.close()
    held = after["sessions"] - before["sessions"]
    cpu = (after["cpu_s"] - before["cpu_s"]) / held
    return {
        "sessions": held,
        "kib_per_session": round((after["bytes"] - before["bytes"]) / 1024 / held, 2),
        "connect_s": round(took, 2),
        "handshakes_per_s": round(1 / cpu),
        "listener_cpu_ms_per_handshake": round(cpu * 1000, 2),
        "dialler_cpu_ms_per_handshake": round(own_cpu / held * 1000, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sessions", type=int, default=1000)
    parser.add_argument(
        "--json", action="store_true", help="accepted for symmetry: the output is JSON anyhow"
    )
    parser.add_argument("--serve", metavar="DIRECTORY", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        trio.run(serve, Path(options.serve))
        return
    with tempfile.TemporaryDirectory() as name:
        make_identities(Path(name))
        command = [sys.executable, "-m", "bench.idle", "--serve", name]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
            try:
                assert server.stdout is not None
                port = int(server.stdout.readline())
                found = trio.run(dial, Path(name), port, options.sessions, server)
            finally:
                server.kill()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
