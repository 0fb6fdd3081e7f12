"""`stp path` against real daemons: UDP open, closed, swallowed; a wrong key, a wrong name, a narrow path.

Promises as in stp.pathfinder and stp.path_cli.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bench.fleet import Fleet, Node, free_port
from stp.identity import network_key_pem
from tests.real.namespaces import FAR, Namespaces, why_not

pytestmark = [pytest.mark.real, pytest.mark.slow]


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    with Fleet(tmp_path_factory.mktemp("fleet")) as fleet:
        node = fleet.gateway("edge-1", upstream=None)
        node.start()
        yield node


def path(url: str, identity: Path, *prefix: str, **environment: str) -> tuple[int, dict[str, Any], str]:
    """(exit code, what it found, stderr) of `stp path -o json`, which must keep its deadline (1)."""
    command = [
        *prefix,
        sys.executable,
        "-m",
        "stp.cli",
        "path",
        url,
        "--identity",
        str(identity),
        "-o",
        "json",
    ]
    began = time.monotonic()
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
        env={**os.environ, **environment},
    )
    assert time.monotonic() - began < 15, "10 s, and the start of a process"
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout), done.stderr


def device(node: Node) -> Path:
    return node.fleet.device("sensor-1", node)


def test_udp_open(gateway: Node) -> None:
    """Both ways stand and are measured, and the keeper's message layer hears of nobody (2)."""
    code, found, said = path(f"{gateway.url}?tls={gateway.tls_port}", device(gateway))
    assert "session_open" not in gateway.log.read_text(), "that is logged when a HELLO came"
    udp, tls = found["udp"], found["tls"]
    assert (code, found["works"], found["client"], found["next"]) == (0, True, "UDP", [])
    assert found["summary"].startswith("UDP works: ")
    assert found["summary"].endswith("packets of 8,972 bytes.")
    assert udp["sent"] >= 20
    assert udp["lost"] == 0
    assert 0 < udp["rtt_ms"]["min"] <= udp["rtt_ms"]["p50"] < 1000
    assert 0 < tls["tcp_ms"] <= tls["connected_ms"]
    assert tls["rtt_ms"]["p50"] > 0
    assert "measuring" in said


def test_udp_closed(gateway: Node) -> None:
    """The kernel's word is told, and TLS carries."""
    port = free_port(socket.SOCK_DGRAM)
    code, found, _ = path(f"stp://edge-1@127.0.0.1:{port}?tls={gateway.tls_port}", device(gateway))
    assert (code, found["udp"]["fault"], found["tls"]["works"]) == (0, "port closed", True)
    assert "look at its listen.udp" in found["next"][0]
    assert found["client"].startswith("TLS, after 3 s")


def test_udp_swallowed(gateway: Node) -> None:
    """A bound socket that says nothing: silence, and TLS carries."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as mute:
        mute.bind(("127.0.0.1", 0))
        url = f"stp://edge-1@127.0.0.1:{mute.getsockname()[1]}?tls={gateway.tls_port}"
        code, found, said = path(url, device(gateway))
    assert (code, found["udp"]["fault"], found["tls"]["works"]) == (0, "no answer", True)
    assert found["summary"].startswith("UDP does not work (no answer), TLS does")
    assert "no answer over UDP yet" in said


def test_wrong_network_key(gateway: Node, tmp_path: Path) -> None:
    """It looks as a blocked port does, and both are named; without TLS nothing works: 69."""
    other = tmp_path / "device.pem"
    head, _, tail = device(gateway).read_text().partition("-----BEGIN STP NETWORK KEY-----")
    rest = tail.partition("-----END STP NETWORK KEY-----")[2]
    assert tail
    other.write_text(head + network_key_pem(os.urandom(32)) + rest)
    other.chmod(0o600)
    code, found, _ = path(f"{gateway.url}?tls=0", other)
    assert (code, found["works"], found["udp"]["fault"]) == (69, False, "no answer")
    assert (found["tls"]["fault"], found["tls"]["port"]) == ("not tried", None)
    assert "compare network keys" in found["next"][0]


def test_wrong_node_and_another_fleet(gateway: Node, tmp_path: Path) -> None:
    url = f"stp://edge-2@127.0.0.1:{gateway.port}?tls={gateway.tls_port}"
    code, found, _ = path(url, device(gateway))
    assert (code, found["udp"]["fault"], found["udp"]["found_node"]) == (69, "wrong node", "edge-1")
    assert found["next"] == [f"write stp://edge-1@127.0.0.1:{gateway.port}, if that is the node you mean"]
    with Fleet(tmp_path) as other:
        code, found, _ = path(
            f"{gateway.url}?tls={gateway.tls_port}", other.issue("sensor-1", "device", tmp_path / "d", None)
        )
    assert (code, found["tls"]["fault"]) == (69, "refused by us")


def test_a_name_that_leads_nowhere_and_a_proxy_that_is_none(gateway: Node) -> None:
    code, found, _ = path("stp://edge-1@nowhere.invalid?tls=0", device(gateway))
    assert (code, found["udp"]["fault"], found["name"]["addresses"]) == (69, "name not resolved", [])
    proxy = f"http://127.0.0.1:{free_port(socket.SOCK_STREAM)}"
    code, found, _ = path("stp://edge-1@nowhere.invalid", device(gateway), STP_PROXY=proxy)
    assert (code, found["tls"]["fault"], found["tls"]["proxy"]) == (69, "proxy refused", proxy[7:])


REASON = why_not()


@pytest.mark.skipif(bool(REASON), reason=REASON)
def test_a_narrow_path_is_measured(tmp_path: Path) -> None:
    """A router that passes 1,400 bytes: 1,372 of UDP payload, found by probing; a host that is not there."""
    with Namespaces() as net, Fleet(tmp_path) as fleet:
        net.set_mtu(1400)
        hub = fleet.hub()
        text = hub.config.read_text()
        for port, kind in ((hub.port, "udp"), (hub.tls_port, "tls")):
            text = text.replace(f'{kind} = ["127.0.0.1:{port}"]', f'{kind} = ["{FAR}:{port}"]')
        hub.config.write_text(text)
        hub.start(wait=False, prefix=("ip", "netns", "exec", net.far))
        until_ready(hub)
        near = ("ip", "netns", "exec", net.near)
        code, found, _ = path(f"stp://hub-1@{FAR}:{hub.port}?tls={hub.tls_port}", device(hub), *near)
        assert code == 0
        assert 1352 <= found["udp"]["packet_bytes"] <= 1372
        assert found["remembered"]["network"]
        code, found, _ = path("stp://hub-1@10.213.3.1", device(hub), *near)
        assert (code, found["udp"]["fault"], found["tls"]["fault"]) == (69, "no route", "no route")


def until_ready(hub: Node) -> None:
    deadline = time.monotonic() + 20
    while '"ready"' not in hub.log.read_text():
        assert time.monotonic() < deadline, hub.tail()
        time.sleep(0.02)
