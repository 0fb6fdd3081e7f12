"""A daemon as the management API sees it, without the daemon; and operators with certificates.

The sockets, TLS and HTTP around it are real.
"""

from __future__ import annotations

import functools
import json
import ssl
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import trio
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from stpd.api import ManagementServer, NotFoundError, RefusedError, make_context
from stpd.events import EventBus, EventWatcher
from stpd.status import (
    BufferLane,
    BufferStatus,
    DaemonStatus,
    DoorCounts,
    EdgeStatus,
    HopCounts,
    KeyStatus,
    LedgerStatus,
    NewKey,
    NodeCounts,
    NodeStatus,
    PathStatus,
    QuarantinedRecord,
    ReaderStatus,
    ReloadReport,
    Revocation,
    SessionStatus,
    TraceStatus,
    UpstreamStatus,
)
from tests.identity_kit import DOMAIN, Flaw, Kit, key_pem, pem, shared

NODE = "hub-1"
SECRET = "stpj1.c2VjcmV0LXNlY3JldC1zZWNyZXQ"


def now_ms() -> int:
    return time.time_ns() // 1_000_000


class Double:
    """Answers like a daemon; notes what it was told to do."""

    def __init__(self) -> None:
        self.bus = EventBus(now_ms)
        self.done: list[tuple[object, ...]] = []
        self.state = DaemonStatus(
            role="hub",
            node=NODE,
            domain=DOMAIN,
            version="0.1.0",
            now_ms=now_ms(),
            started_ms=now_ms() - 3_600_000,
            ready=True,
            sessions=1,
            buffer=self.buffer(),
        )
        self.hang = trio.Event()

    def status(self) -> DaemonStatus:
        return self.state

    async def sessions(self) -> list[SessionStatus]:
        await trio.lowlevel.checkpoint()
        return [
            SessionStatus(
                id="ab" * 16, node="edge-1", role="gateway", address="192.0.2.1:9", since_ms=now_ms()
            )
        ]

    def session(self, session_id: str) -> SessionStatus:
        if not ("ab" * 16).startswith(session_id):
            raise NotFoundError(f"no session {session_id}")
        return SessionStatus(id="ab" * 16, node="edge-1", since_ms=now_ms())

    def path(self, session_id: str) -> PathStatus:
        self.session(session_id)
        return PathStatus(
            session="ab" * 16,
            node="edge-1",
            carrier="udp",
            local_address="192.0.2.7:9000",
            address="192.0.2.1:9",
            since_ms=now_ms() - 60_000,
            now_ms=now_ms(),
            datagram_bytes=1452,
            rtt_ms=20.5,
            rtt_min_ms=20.0,
            packets_out=1000,
            packets_lost=10,
            loss_percent=1.0,
            congestion_state="congestion avoidance",
            congestion_window_bytes=58_080,
            limited_by="congestion window",
            cipher="TLS_AES_256_GCM_SHA384",
            key_updates=2,
        )

    def trace(self, session_id: str, seconds: float) -> TraceStatus:
        self.session(session_id)
        if seconds > 3600:
            raise RefusedError("a log lasts up to 3600 s")
        self.done.append(("trace", session_id, seconds))
        return TraceStatus(session="ab" * 16, path="/var/lib/stpd/qlog/abab-server.sqlog", until_ms=now_ms())

    def kick(self, session_id: str) -> None:
        self.session(session_id)
        self.done.append(("kick", session_id))

    def edges(self) -> list[EdgeStatus]:
        return [
            EdgeStatus(node="edge-1", role="gateway", connected=True, address="192.0.2.1:9"),
            EdgeStatus(
                node="edge-2",
                last_seen_ms=now_ms() - 5000,
                behind_messages=12,
                behind_bytes=3400,
                oldest_age_s=61,
                reported_messages=9,
                reported_cause="the hub was away",
                reported_ms=now_ms(),
            ),
        ]

    def upstreams(self) -> list[UpstreamStatus]:
        return [
            UpstreamStatus(
                node="hub-0", url="stp://hub-0@h", state="connected", since_ms=now_ms(), rtt_ms=3.5
            )
        ]

    def readers(self) -> list[ReaderStatus]:
        return [ReaderStatus(name="erp", node="app-1", filters=["#"], created_ms=now_ms(), behind_messages=3)]

    def remove_reader(self, name: str) -> None:
        if name != "erp":
            raise NotFoundError(f"no reader {name}")
        self.done.append(("remove_reader", name))

    def buffer(self) -> BufferStatus:
        aside = QuarantinedRecord(lane=3, pos=7, reason="corrupt", peer="edge-2", messages=4, at_ms=now_ms())
        return BufferStatus(
            path="/var/lib/stpd/store.db",
            used_bytes=5_000_000,
            budget_bytes=1_000_000_000,
            lanes=[BufferLane(lane=3, first=1, last=9, messages=100, bytes=5_000_000, oldest_age_s=90)],
            quarantined=[aside],
            quarantined_records=1,
        )

    def ledger(self) -> LedgerStatus:
        return LedgerStatus(
            doors=[DoorCounts(peer="edge-1", class_name="telemetry", received=5, accepted=5)],
            nodes=[NodeCounts(class_name="telemetry", accepted=5, stored=5)],
            hops=[HopCounts(hop="erp", kind="reader", lane=3, routed=5, custody=2, behind=3)],
        )

    def keys_create(self, role: str, uses: int, ttl_s: float, tags: list[str]) -> NewKey:
        if role == "king":
            raise RefusedError("there is no such role")
        self.done.append(("keys_create", role, uses, ttl_s, tags))
        return NewKey(id="0123456789", token=SECRET, expires_ms=now_ms() + int(ttl_s * 1000))

    def keys_list(self) -> list[KeyStatus]:
        return [KeyStatus(id="0123456789", role="gateway", uses=1, created_ms=now_ms(), tags=["site a"])]

    def keys_revoke(self, key_id: str) -> None:
        self.done.append(("keys_revoke", key_id))

    def nodes(self) -> list[NodeStatus]:
        return [
            NodeStatus(node="edge-1", role="gateway", not_after_ms=now_ms() + 86_400_000, connected=True),
            NodeStatus(node="edge-2", role="gateway", not_after_ms=now_ms(), revoked=True, reason="stolen"),
        ]

    def node_revoke(self, node: str, reason: str) -> Revocation:
        self.done.append(("node_revoke", node, reason))
        return Revocation(node=node, serials=["1f"], sessions=1)

    def node_forget(self, node: str) -> Revocation:
        self.done.append(("node_forget", node))
        return Revocation(node=node, serials=["1f"])

    async def reload(self) -> ReloadReport:
        self.done.append(("reload",))
        return ReloadReport(changed=["log.level"], restart_needed=["store.budget"])

    def drain(self) -> None:
        self.done.append(("drain",))

    def events(self) -> EventWatcher:
        return self.bus.watch()


# Certificates ------------------------------------------------------------------------------------------


@functools.cache
def operator_bundle(
    role: str = "operator", *, uri: str = "", kit: Kit | None = None, ended: bool = False, early: bool = False
) -> bytes:
    """Key, certificate and anchor of an operator, as one PEM; `uri` in place of the right one."""
    kit = kit or shared()
    key = ec.generate_private_key(ec.SECP256R1())
    now = datetime.now(UTC)
    name = uri or f"stp-operator://{kit.domain}/alice?role={role}"
    certificate = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "alice")]))
        .issuer_name(kit.ca.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now + timedelta(hours=1) if early else now - timedelta(days=2))
        .not_valid_after(now - timedelta(days=1) if ended else now + timedelta(days=1))
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName([x509.UniformResourceIdentifier(name)]), critical=False)
        .sign(kit.ca_key, hashes.SHA256())
    )
    return key_pem(key) + pem(certificate) + pem(kit.ca)


@functools.cache
def server_context(node: str = NODE, *, early: bool = False) -> ssl.SSLContext:
    bundle = shared().bundle(node, Flaw.NOT_YET_VALID if early else Flaw.NONE)
    certificates = bundle.index(b"-----BEGIN CERTIFICATE")
    end = bundle.rindex(b"-----END CERTIFICATE-----") + 26
    return make_context(bundle[certificates:end], bundle[:certificates], pem(shared().ca))


def client_context(bundle: bytes, directory: Path) -> ssl.SSLContext:
    path = directory / "client.pem"
    path.write_bytes(bundle)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.load_verify_locations(cadata=pem(shared().ca).decode())
    context.load_cert_chain(path)
    return context


opened: list[trio.SocketStream] = []
"""Connections of clients; `serving` closes them at its end."""


async def dial(port: int) -> trio.SocketStream:
    stream = await trio.open_tcp_stream("127.0.0.1", port)
    opened.append(stream)
    return stream


@asynccontextmanager
async def serving(double: Double, **more: object) -> AsyncIterator[tuple[ManagementServer, int]]:
    """A management server on a free port of loopback."""
    server = ManagementServer(managed=double, context=server_context, domain=DOMAIN, **more)  # type: ignore[arg-type]
    async with trio.open_nursery() as nursery:
        address = await nursery.start(server.serve, "127.0.0.1", 0)
        try:
            yield server, int(address.rpartition(":")[2])
        finally:
            nursery.cancel_scope.cancel()
            while opened:
                await trio.aclose_forcefully(opened.pop())


def write_context(
    directory: Path, port: int, *, name: str = NODE, bundle: bytes = b"", node: str = NODE
) -> Path:
    """A context of stpctl below `directory`, to be its XDG_CONFIG_HOME; the path of the context."""
    contexts = directory / "stpctl" / "contexts"
    contexts.mkdir(parents=True, exist_ok=True)
    (contexts / f"{name}.pem").write_bytes(bundle or operator_bundle())
    path = contexts / f"{name}.json"
    path.write_text(
        json.dumps(
            {"name": name, "url": f"https://127.0.0.1:{port}", "node": node, "certificate": f"{name}.pem"}
        )
    )
    return path
