"""The doors beside STP, wired to the daemon: management, probes and metrics, enrolment."""

from __future__ import annotations

from collections import Counter
from functools import partial
from typing import TYPE_CHECKING, Final

import attrs
import structlog
import trio

from stp.enrol import parse_host
from stp.identity import Identity, pem_block
from stpd import logs
from stpd.api import ManagementServer, make_context
from stpd.checks import split_address
from stpd.enrol import EnrolmentDoor
from stpd.issuing import Forward, Issuer
from stpd.metrics import HopLag, Snapshot, render
from stpd.probes import ProbeServer
from stpd.status import to_dict

if TYPE_CHECKING:
    import ssl

    from stpd.daemon import Daemon

log = structlog.get_logger("stpd.services")

START_TIMEOUT: Final = 10.0
"""Seconds a door may take to bind."""


class Services:
    """Management, probes and enrolment of one daemon."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon
        self._context: tuple[Identity, ssl.SSLContext] | None = None
        self.management: ManagementServer | None = None
        self.enrolment: EnrolmentDoor | None = None
        self.issuer: Issuer | None = None

    async def start(self, nursery: trio.Nursery) -> None:
        """Bind what the configuration names. Raises OSError, with the address in its text."""
        d, config = self._daemon, self._daemon.config
        if config.health.listen:
            probes = ProbeServer(probed=self)
            await nursery.start(probes.serve, *split_address(config.health.listen))
        if config.management.listen:
            self.management = ManagementServer(
                managed=d.managed,
                context=self._management_context,
                domain=d.identity.domain,
                is_revoked=d.registry.is_revoked,
            )
            self._management_context()  # a bad anchor file is an error now, not at the first operator
            await nursery.start(self.management.serve, *split_address(config.management.listen))
        if config.enrol.listen:
            self.issuer = Issuer(
                identity=lambda: d.identity,
                registry=d.registry,
                authority=d.authority,
                tokens=d.tokens,
                forward=self._forward(),
                port=split_address(config.listen.udp[0])[1] if config.listen.udp else 0,
            )
            self.enrolment = EnrolmentDoor(self.issuer)
            if d.doors.serves_enrolment():
                self.enrolment.tls()  # a bad identity is an error now, not at the first joiner
                d.doors.enrol_by(self.enrolment.serve_begun)
            else:
                await nursery.start(partial(self.enrolment.serve, config.enrol.listen))

    def _forward(self) -> Forward | None:
        target = self._daemon.config.enrol.forward
        return Forward(*parse_host(target)) if target else None

    def _management_context(self) -> ssl.SSLContext:
        """The context of the identity as of now; made again when it changed."""
        identity = self._daemon.identity
        if self._context is None or self._context[0] is not identity:
            own = identity.credentials
            anchors = [path.read_bytes() for path in self._daemon.config.management.anchors]
            if not anchors:
                anchors = [pem_block("CERTIFICATE", der).encode() for der in own.anchors_der]
            chain = "".join(pem_block("CERTIFICATE", der) for der in own.chain_der)
            context = make_context(
                chain.encode(), pem_block("PRIVATE KEY", own.key_der).encode(), b"\n".join(anchors)
            )
            self._context = identity, context
        return self._context[1]

    # -- probes

    def unhealthy(self) -> list[str]:
        """For /health: what a restart or a person must look at. A full store is not mended by a restart."""
        d = self._daemon
        stalled = d.store_stalled_for()
        return [f"no commit for {stalled:.0f} s while records wait"] if stalled > d.STALLED_AFTER else []

    def unready(self) -> list[str]:
        d = self._daemon
        if not d.ready:
            return ["starting"]
        return ["draining"] if d.draining else []

    async def metrics(self) -> bytes:
        return await trio.to_thread.run_sync(render, self.snapshot())

    def snapshot(self) -> Snapshot:
        """All numbers of one scrape."""
        d = self._daemon
        status, numbers = d.managed.status(), d.store.statistics()
        written = logs.statistics()
        operations = {
            name: value
            for name, value in to_dict(numbers).items()
            if isinstance(value, int) and not name.startswith(("cache_", "queue_", "wal_"))
        }
        handshakes, drops = self._handshakes()
        traffic, errors = self._traffic()
        return Snapshot(
            status=status,
            ledger=d.managed.ledger(),
            hops=self._hops(),
            sessions_by_role=Counter(d.role_of(peer.node) or "" for peer in d.sessions.peers.values()),
            sessions_by_carrier=Counter(peer.session.carrier for peer in d.sessions.peers.values()),
            sessions_ended={
                "replaced": d.sessions.stats.replaced,
                "moved": d.sessions.stats.moved,
                "expired": d.lifetimes.expired,
                "revoked": d.lifetimes.revoked,
            },
            stream_bytes=d.doors.bytes_by_carrier(),
            doors=d.doors.counts(),
            handshakes=handshakes,
            drops=drops,
            traffic=traffic,
            socket_errors=errors,
            store=operations,
            commit_seconds=numbers.commit_seconds,
            commit_seconds_max=numbers.commit_seconds_max,
            queues={"store": (numbers.queue_records, status.buffer.queue_limit)},
            api=to_dict(self.management.statistics) if self.management is not None else {},
            events={"published": d.events.statistics().published, "dropped": d.events.statistics().dropped},
            qlog=d.tracing.counts(),
            log_written=written.written,
            log_dropped=written.dropped,
        )

    def _hops(self) -> list[HopLag]:
        d = self._daemon
        served = {f.name for p in d.sessions.peers.values() for f in p.feeds.values() if f.durable}
        return [
            HopLag(name=hop.name, kind=hop.kind, connected=hop.name in served, lanes=d.managed.lags(hop.name))
            for hop in d.store.hops.values()
        ]

    def _handshakes(self) -> tuple[dict[str, int], dict[str, int]]:
        handshakes: Counter[str] = Counter()
        drops: Counter[str] = Counter()
        for endpoint in self._daemon.endpoints():
            for name, value in attrs.asdict(endpoint.statistics()).items():
                if name.startswith("dropped_"):
                    drops[name.removeprefix("dropped_")] += value
                elif name.startswith("handshakes_"):
                    handshakes[name.removeprefix("handshakes_")] += value
        handshakes["refused"] = self._daemon.handshakes_refused
        return dict(handshakes), dict(drops)

    def _traffic(self) -> tuple[dict[str, int], dict[str, int]]:
        traffic: Counter[str] = Counter()
        errors: Counter[str] = Counter()
        for endpoint in self._daemon.endpoints():
            traffic["black_holes"] += endpoint.statistics().black_holes
            traffic.update(attrs.asdict(endpoint.totals()))
        for carrier in self._daemon.carriers():
            found = carrier.statistics()
            for name in ("rx_bytes", "tx_bytes", "rx_datagrams", "tx_datagrams"):
                traffic[name] += getattr(found, name)
            errors.update(found.errors)
        return dict(traffic), dict(errors)
