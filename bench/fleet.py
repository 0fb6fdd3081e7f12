"""A fleet of real processes on this machine: hubs and gateways from generated identities and configurations.

    with Fleet(directory) as fleet:
        hub = fleet.hub("hub-1")
        gateway = fleet.gateway("edge-1", upstream=hub)
        hub.start(); gateway.start()
        url, identity = gateway.url, fleet.device("sensor-1", gateway)

Ports are free ones of 127.0.0.1; nothing is left running when the context ends. Logs are files beside the state.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, Final

from cryptography.hazmat.primitives.asymmetric import ec

from stp.identity import Upstream, network_key_pem, upstream_pem
from stpd.pki import NODE_LIFETIME, CertificateAuthority, certificate_pem, private_pem

DOMAIN: Final = "bench.local"
START_TIMEOUT: Final = 20.0
"""Seconds a daemon may take to say that it is ready."""


def free_port(kind: socket.SocketKind) -> int:
    """A port of 127.0.0.1 that nobody holds at this moment."""
    with socket.socket(socket.AF_INET, kind) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Node:
    """One stpd process: start, stop, kill, ask."""

    def __init__(self, fleet: Fleet, name: str, role: str, extra: str, upstream: Node | None) -> None:
        self.fleet, self.name, self.role = fleet, name, role
        self.directory = fleet.directory / name
        self.directory.mkdir(parents=True)
        self.port = free_port(socket.SOCK_DGRAM)
        self.health_port = free_port(socket.SOCK_STREAM)
        self.tls_port = free_port(socket.SOCK_STREAM)
        self.socket = (self.directory / "stp.sock").resolve()
        self.management_port = free_port(socket.SOCK_STREAM)
        self.process: subprocess.Popen[bytes] | None = None
        self.config = self.directory / f"{role}.toml"
        self.log = self.directory / "log.txt"
        self.identity = fleet.issue(name, role, self.directory / "identity.pem", upstream)
        self.write_config(extra, upstream)

    @property
    def url(self) -> str:
        return f"stp://{self.name}@127.0.0.1:{self.port}"

    @property
    def local_url(self) -> str:
        """For programs of this machine, without an identity."""
        return f"stp+unix://{self.socket}"

    def write_config(self, extra: str = "", upstream: Node | None = None) -> None:
        """*extra*: TOML after the generated part; it may hold tables but not those generated here."""
        lines = [
            f'role = "{self.role}"',
            'state_dir = "state"',
            'identity = ["identity.pem"]',
            f'[listen]\nudp = ["127.0.0.1:{self.port}"]\ntls = ["127.0.0.1:{self.tls_port}"]',
            f'unix = {{ path = "{self.socket}", mode = "0600" }}',
            f'[management]\nlisten = "127.0.0.1:{self.management_port}"',
            f'[health]\nlisten = "127.0.0.1:{self.health_port}"',
        ]
        if upstream is not None:
            lines.append(
                f'[[upstream]]\nurl = "{upstream.url}"\nsubscribe = ["cmd/{{node}}/#", "$inbox/{{node}}/#"]'
            )
        if "[[access]]" not in extra:
            lines.append('[[access]]\nname = "all"\nnodes = ["*"]\npublish = ["#", "$inbox/#"]')
            lines.append('subscribe = ["#", "$inbox/#", "cmd/#"]')
        self.config.write_text("\n".join([*lines, extra, ""]))

    def start(
        self, *, env: dict[str, str] | None = None, wait: bool = True, prefix: tuple[str, ...] = ()
    ) -> None:
        """Run it. Raises RuntimeError with the end of its log when it does not become ready."""
        with self.log.open("ab") as out:
            self.process = subprocess.Popen(
                [*prefix, sys.executable, "-m", "stpd", "run", "--config", str(self.config)],
                stdout=out,
                stderr=out,
                env={**os.environ, **(env or {})},
            )
        if wait:
            self.wait_ready()

    def wait_ready(self, timeout: float = START_TIMEOUT) -> None:
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            if self.process is not None and self.process.poll() is not None:
                break
            if self.get("/ready")[0] == 200:
                return
            time.sleep(0.02)
        raise RuntimeError(f"{self.name} is not ready:\n{self.tail()}")

    def tail(self, lines: int = 20) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def get(self, path: str) -> tuple[int, str]:
        """(status, body) of the health port; (0, why) when it does not answer."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.health_port}{path}", timeout=5) as answer:
                return int(answer.status), answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()
        except OSError as error:
            return 0, str(error)

    def ctl(self, *words: str, timeout: float = 20.0) -> Any:
        """`stpctl WORDS -o json`, decoded. Raises RuntimeError with its words when it fails."""
        done = subprocess.run(
            [sys.executable, "-m", "stpctl", *words, "-o", "json"],
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
            env={**os.environ, **self.fleet.operator_env(self)},
        )
        if done.returncode:
            raise RuntimeError(f"stpctl {' '.join(words)}: {done.stderr.strip() or done.stdout.strip()}")
        return json.loads(done.stdout) if done.stdout.strip() else None

    def kill(self) -> None:
        """SIGKILL, now."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def stop(self, timeout: float = 12.0) -> int:
        """SIGTERM; the exit status."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            return -signal.SIGKILL

    @property
    def running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def cpu_seconds(self) -> float:
        """User and system time of the running process."""
        assert self.process is not None
        stat = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(stat[11]) + int(stat[12])) / os.sysconf("SC_CLK_TCK")

    def rss_bytes(self) -> int:
        assert self.process is not None
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")


class Fleet:
    """A CA, a network key, and the nodes made from them under one directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.directory.mkdir(parents=True, exist_ok=True)
        self.nodes: list[Node] = []
        self.ca = CertificateAuthority.create(DOMAIN)
        self._network_key = os.urandom(32)

    def hub(self, name: str = "hub-1", extra: str = "") -> Node:
        return self._add(Node(self, name, "hub", extra, None))

    def gateway(self, name: str = "edge-1", *, upstream: Node | None, extra: str = "") -> Node:
        return self._add(Node(self, name, "gateway", extra, upstream))

    def device(self, name: str, upstream: Node) -> Path:
        """A device's bundle that dials *upstream*."""
        path = self.directory / f"{name}.pem"
        return path if path.exists() else self.issue(name, "device", path, upstream)

    def issue(
        self,
        name: str,
        role: str,
        path: Path,
        upstream: Node | None,
        lifetime: timedelta = NODE_LIFETIME,
    ) -> Path:
        key = ec.generate_private_key(ec.SECP256R1())
        leaf = self.ca.issue(key.public_key(), DOMAIN, name, answers=role != "device", lifetime=lifetime)
        parts = [
            private_pem(key).decode(),
            certificate_pem(leaf),
            self.ca.pem,
            network_key_pem(self._network_key),
        ]
        if upstream is not None:
            parts.append(upstream_pem(Upstream(upstream.name, f"stp://127.0.0.1:{upstream.port}")))
        path.write_text("".join(parts))
        path.chmod(0o600)
        return path

    def operator_env(self, node: Node) -> dict[str, str]:
        """The environment in which stpctl speaks to *node* as an operator."""
        home = self.directory / "operator"
        contexts = home / "stpctl" / "contexts"
        bundle = home / "operator.pem"
        if not bundle.exists():
            contexts.mkdir(parents=True)
            key = ec.generate_private_key(ec.SECP256R1())
            leaf = self.ca.issue_operator(key.public_key(), DOMAIN, "tester", "operator")
            bundle.write_text(private_pem(key).decode() + certificate_pem(leaf) + self.ca.pem)
            bundle.chmod(0o600)
        context = {
            "name": node.name,
            "url": f"https://127.0.0.1:{node.management_port}",
            "node": node.name,
            "certificate": str(bundle),
        }
        (contexts / f"{node.name}.json").write_text(json.dumps(context))
        return {"XDG_CONFIG_HOME": str(home), "STPCTL_CONTEXT": node.name}

    def _add(self, node: Node) -> Node:
        self.nodes.append(node)
        return node

    def __enter__(self) -> Fleet:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for node in self.nodes:
            if node.process is not None:
                with contextlib.suppress(OSError):
                    node.process.kill()
                node.process.wait()
