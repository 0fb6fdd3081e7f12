"""The other carriers through real processes: TLS on TCP and the Unix socket, with receipts, kills included (R-11)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio

import stp
from bench.fleet import DOMAIN, Fleet, Node
from stp.carriers.door import MAX_PER_ADDRESS, MAX_UNPROVEN
from stp.carriers.tls import TlsCarrier
from stp.client import Client
from stp.core.verbs import AnySession
from stp.ways import Carrier
from tests.carrier_kit import raw

pytestmark = [pytest.mark.real, pytest.mark.slow]


@asynccontextmanager
async def over_tls(gateway: Node, identity: Path) -> AsyncIterator[Client]:
    """A client of which every dial goes to the gateway's TLS port."""
    client = Client(
        gateway.url,
        stp.Identity.load(identity),
        "",
        None,
        memory=1 << 22,
        compress=False,
        on_refused=None,
        kind="client",
    )
    connection = client._connection

    async def dial(on_ready: Any, failures: int = 0) -> tuple[AnySession, Carrier]:
        carrier = await TlsCarrier.dial(
            "127.0.0.1",
            gateway.tls_port,
            tls=connection.ways.contexts.tls,
            leaf_der=connection.ways.contexts.leaf_der,
            expected_node=gateway.name,
            expected_domain=DOMAIN,
            on_ready=on_ready,
        )
        return carrier.session, carrier

    connection.dial_udp = dial
    async with trio.open_nursery() as nursery:
        client.start(nursery)
        await client.wait_connected(10.0)
        yield client
        await client.aclose()
        nursery.cancel_scope.cancel()


def carriers_of(gateway: Node) -> dict[str, str]:
    """Node -> what carries its session, as operators see it."""
    return {one["node"]: one["carrier"] for one in gateway.ctl("sessions", "list")}


async def test_devices_come_by_every_way_and_survive_kills(tmp_path: Path) -> None:
    """UDP, TLS and the Unix socket at one gateway; each message kept, and at the reader once, through a kill."""
    with Fleet(tmp_path) as fleet:
        gateway = fleet.gateway(upstream=None)
        gateway.start()
        device = fleet.device("sensor-1", gateway)
        seen: dict[str, list[int]] = {"udp": [], "tls": [], "unix": []}
        async with (
            stp.connect(gateway.url, identity=fleet.device("reader-1", gateway)) as reader,
            stp.connect(gateway.url, identity=fleet.device("sensor-2", gateway)) as udp,
            over_tls(gateway, device) as tls,
            stp.connect(gateway.local_url) as unix,
            trio.open_nursery() as nursery,
        ):

            async def read() -> None:
                async for message in reader.subscribe("way/#", durable="ways", start="earliest"):
                    seen[message.topic.rpartition("/")[2]].append(int(message.payload))

            nursery.start_soon(read)
            found = await trio.to_thread.run_sync(carriers_of, gateway)
            assert found["sensor-1"] == "tls"
            assert found["sensor-2"] == "udp"
            assert found[unix.identity.node] == "unix"
            for n in range(30):
                if n == 15:
                    gateway.kill()
                    await trio.to_thread.run_sync(gateway.start)
                for name, session in (("udp", udp), ("tls", tls), ("unix", unix)):
                    with trio.fail_after(20):
                        await session.publish(f"way/{name}", str(n).encode(), receipt="kept")
            with trio.move_on_after(20):
                while sum(map(len, seen.values())) < 90:
                    await trio.sleep(0.02)
            assert all(sorted(numbers) == list(range(30)) for numbers in seen.values())
            nursery.cancel_scope.cancel()
        assert gateway.ctl("ledger", "show")["unexplained"] == 0
        text = gateway.get("/metrics")[1]
        assert 'stpd_stream_bytes_total{carrier="tls",direction="rx"}' in text
        assert 'stpd_door_connections_total{carrier="unix",result="accepted"}' in text
        listening = gateway.ctl("status")["listen"]
        assert [one.partition(" ")[0] for one in listening] == ["udp", "tls", "unix"]
        assert gateway.stop() == 0
        assert not gateway.socket.exists()


def test_the_shell_needs_no_identity_on_this_machine(tmp_path: Path) -> None:
    """`stp pub`, `stp sub` and `stp ping` by the Unix socket alone."""
    with Fleet(tmp_path) as fleet:
        gateway = fleet.gateway(upstream=None)
        gateway.start()
        environment = {**os.environ, "HOME": str(tmp_path), "STP_URL": gateway.local_url}
        environment.pop("STP_IDENTITY", None)
        run = partial(subprocess.run, env=environment, capture_output=True, text=True, timeout=30)
        command = [sys.executable, "-m", "stp.cli"]
        reader = subprocess.Popen(
            [*command, "sub", "a/#", "-n", "1", "-o", "json"],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        done = run([*command, "ping", "-c", "1"])
        assert done.returncode == 0, done.stderr
        deadline = time.monotonic() + 10
        while len(gateway.ctl("sessions", "list")) < 1 and time.monotonic() < deadline:
            time.sleep(0.05)
        while reader.poll() is None and time.monotonic() < deadline:
            done = run([*command, "pub", "a/b", "hello", "--receipt", "kept"])
            assert done.returncode == 0, done.stderr
        out, err = reader.communicate(timeout=10)
        assert reader.returncode == 0, err
        assert json.loads(out.splitlines()[0])["topic"] == "a/b"
        done = run([*command, "ping", "--url", f"stp+unix://{tmp_path}/none.sock", "--timeout", "0.5"])
        assert done.returncode == 69
        assert "none.sock did not answer" in done.stderr


async def test_fault_29_slowloris_on_8443_of_a_gateway(tmp_path: Path) -> None:
    """R-11-3: 64 who say nothing stand at the door; a real device gets in, and what was refused is counted."""
    with Fleet(tmp_path) as fleet:
        gateway = fleet.gateway(upstream=None)
        gateway.start()
        strangers = [
            raw(gateway.tls_port, f"127.0.0.{2 + n // MAX_PER_ADDRESS}") for n in range(MAX_UNPROVEN)
        ]
        try:
            with trio.fail_after(9.0):  # they would all be gone after ten
                async with over_tls(gateway, fleet.device("sensor-1", gateway)) as session:
                    await session.publish("a", b"x", receipt="kept")
            text = gateway.get("/metrics")[1]
            assert 'stpd_door_connections_total{carrier="tls",result="accepted"}' in text
        finally:
            for sock in strangers:
                sock.close()
