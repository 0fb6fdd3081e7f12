"""Real processes whose certificates are renewed, run out and are revoked under traffic (fault 25, R-9-4, R-9-5)."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import trio
from cryptography import x509

import stp
from bench.fleet import Fleet, Node, free_port
from stp.core.errors import ErrorCode
from stp.identity import Identity
from stpd.keys import NodeRegistry
from stpd.pki import key_id
from tests.real.traffic import Traffic

pytestmark = [pytest.mark.real, pytest.mark.slow]

CLOCK = '[transport]\nclock = "trusted"\n'
YEAR_MS = 300 * 86_400_000


class Site:
    """A hub that signs, and a gateway below it; whoever is made here is in the hub's registry."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet = fleet
        self.enrol = free_port(socket.SOCK_STREAM)
        fleet.ca.save(fleet.directory)
        signs = f'[enrol]\nlisten = "127.0.0.1:{self.enrol}"\nca = "{fleet.directory}"\n'
        self.hub = fleet.hub(extra=signs + CLOCK)
        self.gateway = fleet.gateway(upstream=self.hub, extra=CLOCK)
        (self.hub.directory / "state").mkdir()

    def note(self, bundle: Path, role: str) -> None:
        """As if it had enrolled at the hub, whose registry this file is."""
        identity = Identity.load(bundle)
        leaf = x509.load_der_x509_certificate(identity.leaf_der)
        registry = NodeRegistry(self.hub.directory / "state" / "nodes.json")
        registry.enrol(
            identity.node,
            role,
            key=key_id(leaf.public_key()),  # type: ignore[arg-type]
            serial=identity.serial,
            not_after=identity.not_after.timestamp(),
        )

    def start(self, seconds: float = 86400.0) -> None:
        """The gateway's certificate ends so many seconds after the hub was up: a busy machine is slow to start."""
        self.hub.start()
        gateway = self.gateway
        self.fleet.issue(gateway.name, gateway.role, gateway.identity, self.hub, timedelta(seconds=seconds))
        self.note(gateway.identity, gateway.role)
        hang_up(self.hub)
        gateway.start()

    def device(self, name: str, seconds: float = 86400.0) -> Path:
        path = self.fleet.directory / f"{name}.pem"
        return self.fleet.issue(name, "device", path, self.gateway, timedelta(seconds=seconds))

    def renew(self) -> str:
        """`stpd renew` for the gateway, as its timer runs it."""
        command = [
            "renew",
            "--config",
            str(self.gateway.config),
            "--host",
            f"127.0.0.1:{self.enrol}",
            "--force",
        ]
        done = subprocess.run(
            [sys.executable, "-m", "stpd", *command], capture_output=True, text=True, timeout=30
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def session_of(self, node: str, at: Node) -> dict[str, Any] | None:
        """What `stpctl sessions show` says of the newest session of a node."""
        found = [one for one in at.ctl("sessions", "list") if one["node"] == node and one["state"] == "open"]
        try:
            return at.ctl("sessions", "show", found[-1]["id"]) if found else None
        except RuntimeError:  # it ended between the two questions
            return None


def hang_up(node: Node) -> None:
    assert node.process is not None
    os.kill(node.process.pid, signal.SIGHUP)


def events(node: Node, *names: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in node.log.read_text().splitlines() if line.startswith("{")]
    return [line for line in lines if line["event"] in names]


async def until(found: Callable[[], Any], seconds: float) -> Any:
    """What it gives once it gives something; AssertionError after so many seconds."""
    deadline = time.monotonic() + seconds
    while not (value := await trio.to_thread.run_sync(found)):
        assert time.monotonic() < deadline, "it did not come to that"
        await trio.sleep(0.05)
    return value


async def test_a_certificate_is_renewed_under_traffic_and_nobody_notices(tmp_path: Path) -> None:
    """Nine seconds of life, `stpd renew` and SIGHUP under load: a fresh session, no outage, nothing lost."""
    with Fleet(tmp_path) as fleet:
        site = Site(fleet)
        site.start(9)
        end = Identity.load(site.gateway.identity).not_after.timestamp()
        async with Traffic(fleet, site.gateway, site.hub, publishers=2, workers=2) as traffic:
            before = await until(lambda: site.session_of("edge-1", site.hub), 10)
            now_ms = time.time() * 1000
            assert before["certificate_not_after_ms"] < now_ms + 9000
            await trio.to_thread.run_sync(site.renew)
            hang_up(site.gateway)

            def fresh() -> dict[str, Any] | None:
                found = site.session_of("edge-1", site.hub)
                return found if found and found["certificate_not_after_ms"] > now_ms + YEAR_MS else None

            after = await until(fresh, 10)
            assert after["id"] != before["id"]
            await trio.sleep(max(0.0, end + 1.5 - time.time()))
            assert (await trio.to_thread.run_sync(site.session_of, "edge-1", site.hub))["id"] == after["id"]
            await traffic.stop(timeout=30)
        traffic.check()
        assert sum(traffic.published.values()) > 100
        kept = site.gateway.directory / "state" / "upstream-tokens.json"
        assert kept.stat().st_mode & 0o777 == 0o600
        assert len(events(site.hub, "session_moves")) == 1
        assert not events(site.gateway, "uplink_down")
        assert [one["node"] for one in events(site.hub, "session_closed") if one["code"] == "EXPIRED"] == []
        assert site.hub.ctl("ledger", "show")["unexplained"] == 0


async def test_fault_25_a_certificate_that_lapsed_is_renewed_and_lets_the_gateway_in_again(
    tmp_path: Path,
) -> None:
    """Its session ends at notAfter; `stpd renew` and SIGHUP bring it back at once. A reload ends what it revokes."""
    with Fleet(tmp_path) as fleet:
        site = Site(fleet)
        site.start(5)
        end = Identity.load(site.gateway.identity).not_after.timestamp()
        (closed,) = await until(lambda: events(site.hub, "session_closed"), 30)
        assert closed["code"] == "EXPIRED"
        assert 0 <= time.time() - end < 4
        await trio.to_thread.run_sync(site.renew)
        hang_up(site.gateway)
        back = time.monotonic()
        session = await until(lambda: site.session_of("edge-1", site.hub), 10)
        assert session["certificate_not_after_ms"] > time.time() * 1000 + YEAR_MS
        assert time.monotonic() - back < 5
        # somebody restored or edited the hub's registry: a reload ends the sessions of what it revokes
        NodeRegistry(site.hub.directory / "state" / "nodes.json").revoke("edge-1")
        hang_up(site.hub)
        started = time.monotonic()
        _, closed = await until(lambda: len(found := events(site.hub, "session_closed")) > 1 and found, 20)
        assert (closed["node"], closed["code"]) == ("edge-1", "REVOKED")
        assert time.monotonic() - started < 5
        await until(lambda: [e for e in events(site.gateway, "uplink_down") if "revoked" in e["reason"]], 20)


async def keep_publishing(identity: Path, url: str, ends: list[str]) -> None:
    """A device that goes on until nobody lets it in, and what it is told then."""
    async with stp.connect(url, identity=identity, close_timeout=0.1) as client:
        while True:
            await client.publish("site/temp", b"21.5", receipt=None)
            ends.append(client.state)
            await trio.sleep(0.05)


async def test_fault_25_expired_and_revoked_devices_are_out(tmp_path: Path) -> None:
    """At a gateway that is told by the hub. The revoked one stays out when both start anew, without the hub."""
    with Fleet(tmp_path) as fleet:
        site = Site(fleet)
        stolen = site.device("stolen-1")
        site.note(stolen, "device")
        site.start()
        await until(lambda: site.session_of("edge-1", site.hub), 15)
        short = site.device("short-1", 6)
        end = Identity.load(short).not_after.timestamp()
        said: dict[str, list[str]] = {"short-1": [], "stolen-1": []}
        async with trio.open_nursery() as nursery:
            nursery.start_soon(keep_publishing, short, site.gateway.url, said["short-1"])
            nursery.start_soon(keep_publishing, stolen, site.gateway.url, said["stolen-1"])
            await until(lambda: site.session_of("stolen-1", site.gateway), 15)
            done = await trio.to_thread.run_sync(
                lambda: site.hub.ctl("nodes", "revoke", "stolen-1", "--reason", "stolen", "--yes")
            )
            revoked_at = time.monotonic()
            assert len(done["serials"]) == 1

            def closed(code: str) -> list[dict[str, Any]]:
                return [one for one in events(site.gateway, "session_closed") if one["code"] == code]

            (out,) = await until(lambda: closed("REVOKED"), 20)
            took = time.monotonic() - revoked_at
            assert (out["node"], took < 5) == ("stolen-1", True)
            (out,) = await until(lambda: closed("EXPIRED"), 20)
            assert out["node"] == "short-1"
            assert 0 <= time.time() - end < 4
            nursery.cancel_scope.cancel()
        with pytest.raises(stp.Rejected) as refused:
            async with stp.connect(site.gateway.url, identity=stolen):
                pytest.fail("it came in")
        assert refused.value.code is ErrorCode.REVOKED
        (listed,) = [one for one in site.hub.ctl("nodes", "list") if one["node"] == "stolen-1"]
        assert (listed["revoked"], listed["reason"]) == (True, "stolen")
        changes = [one["path"] for one in events(site.hub, "operator_change")]
        assert changes == ["/v1/revocations"]
        for node in (site.gateway, site.hub):
            assert node.stop() == 0
        site.gateway.start()
        with pytest.raises(stp.Rejected) as refused:
            async with stp.connect(site.gateway.url, identity=stolen):
                pytest.fail("it came in while the hub was away")
        assert refused.value.code is ErrorCode.REVOKED
        async with stp.connect(site.gateway.url, identity=site.device("good-1")) as client:
            await client.publish("site/temp", b"21.5", receipt="kept")
