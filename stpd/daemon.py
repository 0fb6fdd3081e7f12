"""The daemon: one nursery, its parts, its signals, and an end that loses nothing.

(1) It says it is ready only when the store is open and every address is bound.
(2) SIGTERM: take no new sessions, commit what is queued, GOAWAY, close, exit 0 within STOP_TIMEOUT.
(3) SIGHUP: read the configuration again; what is wrong changes nothing, what needs a restart is named.
(4) The death of a session ends that session; the death of a part ends the daemon loudly.
"""

from __future__ import annotations

import hashlib
import os
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Final

import structlog
import trio

from stp.batch import node_id
from stp.carriers.udp import LOOPBACK_DATAGRAM, UdpCarrier, sizes_for
from stp.control import Hello
from stp.core.endpoint import Endpoint, EndpointConfig
from stp.core.errors import ErrorCode, HandshakeRefused
from stp.core.handshake import PeerIdentity
from stp.core.verbs import AnySession
from stp.echo import ECHO_TOTAL, Allowance, Responder
from stp.identity import (
    ContextCache,
    Identity,
    TimeFloor,
    kernel_synchronised,
)
from stp.kept_tokens import KeptTokens
from stp.lifetimes import Expiry
from stp.networks import Here, Networks
from stpd import __version__, logs
from stpd.access import Access
from stpd.checks import split_address
from stpd.config import Config, ConfigError, changes, load
from stpd.dialling import UpstreamDialler
from stpd.doors import StreamDoors
from stpd.events import EventBus
from stpd.fallback import Fallback
from stpd.kept import count_run, listener_secrets
from stpd.keys import JoinTokens, NodeRegistry
from stpd.lifetimes import Lifetimes
from stpd.limits import PeerLimit
from stpd.managed import Managed
from stpd.notify import Notifier
from stpd.pki import CertificateAuthority
from stpd.relay import Relay
from stpd.router import Classes
from stpd.services import Services
from stpd.sessions import CHECK_INTERVAL, Sessions
from stpd.status import ReloadReport
from stpd.store.base import StoreError
from stpd.store.sqlite import SqliteStore
from stpd.throttle import Throttle
from stpd.tracing import Tracing
from stpd.turns import Mover, Turns
from stpd.uplink import Uplink, targets_of

log = structlog.get_logger("stpd")

STOP_TIMEOUT: Final = 8.0
"""Seconds from SIGTERM to the end, at most; systemd is told 10."""

LAST_WORDS: Final = 0.25
"""Seconds given to GOAWAY and CLOSE to leave before the sockets close."""


SWITCH_INTERVAL: Final = 0.0005
"""Seconds that one thread may hold the interpreter while another wants it. The store's writer asks for it after every
statement; at Python's 5 ms a commit under load waits longer for that than for the disk."""


class StartupError(Exception):
    """The daemon cannot start. `cause` and `advice` are one line each; `status` is the exit status."""

    def __init__(self, cause: str, advice: str, status: int = 71) -> None:
        super().__init__(f"{cause}\n  {advice}")
        self.cause, self.advice, self.status = cause, advice, status


class Daemon:
    """One running stpd. Make it, then `await run()`."""

    version = __version__
    STALLED_AFTER: Final = 10.0
    """Seconds that records may wait for the writer before the node calls itself unhealthy."""

    def __init__(self, config: Config, path: Path, identity: Identity) -> None:
        self.config = config
        self.identity = identity
        self.ready = False
        self.draining = False
        self.started_ms = self.wall_ms()
        self.full_since_ms = 0
        self.events = EventBus(self.wall_ms)
        self.uplink: Uplink | None = None
        self.tokens: JoinTokens | None = None
        self.authority: CertificateAuthority | None = None
        self.handshakes_refused = 0
        self._notifier = Notifier()
        self._throttle = Throttle()
        self._echo_allowance = Allowance(0)
        self._path = path
        self._state = Path(config.state_dir)
        self._carriers: list[UdpCarrier] = []
        self.doors = StreamDoors(self)
        self._dialler = UpstreamDialler(self)
        self._endpoints: list[Endpoint] = []
        self._endpoint_configs: list[EndpointConfig] = []
        self.turns = Turns(self._movers)
        self._stop = trio.Event()
        self._stop_code = ErrorCode.RESTARTING
        self._waiting_since: float | None = None
        self._commits_seen = 0

    # -- small facts

    @staticmethod
    def wall_ms() -> int:
        return time.time_ns() // 1_000_000

    def addresses(self) -> list[str]:
        """Where it listens, as people write it."""
        return [f"udp {_text(carrier.local_address)}" for carrier in self._carriers] + self.doors.addresses()

    def local_address(self, session: AnySession) -> str:
        """Where that session leaves this machine, as far as its socket knows; "" over other carriers."""
        for endpoint, carrier in zip(self._endpoints, self.carriers(), strict=False):
            if any(one is session for one in endpoint.sessions):
                return _text(carrier.local_address)
        return ""

    def receive_buffer(self) -> int:
        return min((one.statistics().receive_buffer for one in self._carriers), default=0)

    def clock_synchronised(self) -> bool:
        return self.config.transport.clock == "trusted" or kernel_synchronised()

    def role_of(self, node: str) -> str | None:
        return self.registry.role_of(node)

    def known_gateways(self) -> list[str]:
        return [one.node for one in self.registry.nodes() if one.role == "gateway"]

    def log_drops(self) -> int:
        return logs.statistics().dropped

    def store_stalled_for(self) -> float:
        """Seconds that records have waited without a commit; 0 when the writer moves."""
        return 0.0 if self._waiting_since is None else trio.current_time() - self._waiting_since

    def carriers(self) -> list[UdpCarrier]:
        return [*self._carriers, *self._dialler.carriers]

    def endpoints(self) -> list[Endpoint]:
        return list(self._endpoints)

    def _movers(self) -> list[Mover]:
        return [*self._carriers, *self._dialler.movers, *self.doors.listeners]

    # -- life

    async def run(self) -> None:
        """Start, serve until told to stop, stop. Raises StartupError, or what killed a part."""
        self._prepare()
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP) as signals:
            try:
                async with trio.open_nursery() as nursery:
                    await self._start(nursery)
                    nursery.start_soon(self._on_signals, signals)
                    self.ready = True
                    self._notifier.ready(f"serving on {', '.join(self.addresses()) or 'no UDP address'}")
                    log.info(
                        "ready",
                        node=self.identity.node,
                        role=self.config.role,
                        listen=self.addresses(),
                        version=self.version,
                    )
                    await self._stop.wait()
                    await self._wind_down()
                    nursery.cancel_scope.cancel()
            finally:
                await self._release()
        log.info("stopped")

    def _prepare(self) -> None:
        """What needs no event loop: directories, registers, counters."""
        try:
            self._state.mkdir(parents=True, exist_ok=True, mode=0o750)
            self._run_number = count_run(self._state / "run")
            self._secrets = listener_secrets(self._state / "listener.key")
        except OSError as error:
            raise StartupError(
                f"state_dir {self._state} cannot be written: {error.strerror}",
                "make it, or give it to the user that stpd runs as",
                73,
            ) from error
        self._nonce = os.urandom(16)
        self.tracing = Tracing(
            self.config.transport.qlog, self._state / "qlog", self.identity.node, self.wall_ms
        )
        self.registry = NodeRegistry(self._state / "nodes.json")
        if self.config.enrol.ca is not None:
            self.authority = CertificateAuthority.load(self.config.enrol.ca)
            self.tokens = JoinTokens(self._state / "keys.json", self.authority.der)
        self.floor = TimeFloor(self._state / "time-floor")
        self.upstream_tokens = KeptTokens(self._state / "upstream-tokens.json")
        self._place = Here(Networks(self._state / "networks.json"))
        self._dialler.place = self._place
        self.contexts = ContextCache(self.identity, self.floor, synchronised=self.clock_synchronised)
        self.expiry = Expiry(synchronised=self.clock_synchronised)
        self.lifetimes = Lifetimes(self.registry, self.expiry)
        self.access = Access(self.config.access, role_of=self.role_of)
        self.classes = Classes(self.config.classes)

    async def _start(self, nursery: trio.Nursery) -> None:
        store = self.config.store
        assert store.path is not None
        own = node_id(self.identity.domain, self.identity.node)
        try:
            self.store = await SqliteStore.open(
                store.path,
                node_id=own,
                budget_bytes=store.budget,
                reserve_bytes=store.reserve,
                retention_s=store.retention,
                cache_bytes=store.cache,
            )
        except StoreError as error:
            raise StartupError(str(error), "nothing was changed", 73) from error
        self._memory_source = os.urandom(16)
        self.relay = Relay(
            self.store,
            self.classes,
            node_id=own,
            memory_source=self._memory_source,
            on_refused=self._on_refused,
            wake=self.turns.wake,
            send=self.turns.send,
        )
        self.sessions = Sessions(
            self.relay,
            self.store,
            domain=self.identity.domain,
            access=lambda: self.access,
            hello=self._hello,
            name_of_source=self._name_of_source,
            events=self.events,
            spawn=nursery.start_soon,
            later=lambda delay, function: nursery.start_soon(_call_later, delay, function),
            wall_ms=self.wall_ms,
            max_subscriptions=self.config.limits.subscriptions_per_session,
            ttl_of=lambda lane, prefix: self.classes.of(lane, prefix).ttl,
            limit_of=self._limit_of,
            responder=self._make_responder,
        )
        nursery.start_soon(self.store.watch)
        await self._bind(nursery)
        self.managed = Managed(self)
        self.services = Services(self)
        try:
            await self.services.start(nursery)
        except OSError as error:
            raise StartupError(
                error.strerror or str(error), "another process holds that port, or the address is not ours"
            ) from error
        await self._start_uplink(nursery)
        nursery.start_soon(self._tick)

    async def _bind(self, nursery: trio.Nursery) -> None:
        for address in self.config.listen.udp:
            host, port = split_address(address)
            try:
                carrier, _ = await self.open_udp(host, port, accept=True)
            except OSError as error:
                raise StartupError(
                    f"cannot listen on UDP {host}:{port}: {error.strerror or error}",
                    "another stpd runs there, or the address is not this machine's: see listen.udp",
                ) from error
            self._carriers.append(carrier)
            await nursery.start(carrier.run)
        try:
            await self.doors.start(nursery)
        except OSError as error:
            advice = "see listen.tls and listen.unix; another stpd may be running"
            raise StartupError(error.strerror or str(error), advice) from error

    async def open_udp(self, host: str, port: int, *, accept: bool) -> tuple[UdpCarrier, Endpoint]:
        """A socket, which the caller runs, and who is behind it. Raises OSError."""
        config = self.endpoint_config(accept=accept)
        endpoint = Endpoint(config)
        carrier = await UdpCarrier.bind(
            endpoint, host, port, on_ready=self.sessions.on_ready, movable=not accept
        )
        carrier.turn_begins, carrier.turn_ends = partial(self.turns.begin, self.store), self.turns.end
        self._endpoints.append(endpoint)
        self._endpoint_configs.append(config)
        return carrier, endpoint

    def endpoint_config(self, *, accept: bool) -> EndpointConfig:
        limits, largest = self.config.limits, self.config.transport.max_datagram
        return EndpointConfig(
            tls=self.contexts.tls,
            leaf_der=self.contexts.leaf_der,
            network_keys=self.identity.network_keys,
            accept=accept,
            authorise=self.authorise,
            random_bytes=os.urandom,
            on_refused=self.on_handshake_refused,
            max_datagram=max(LOOPBACK_DATAGRAM, largest),
            sizes_for=partial(sizes_for, largest=largest),
            instance=len(self._endpoints) & 0xFF,
            observer=self.tracing.observer,
            cid_key=self._secrets[:32],
            reset_key=self._secrets[32:],
            token_key=hashlib.sha256(b"stpd token key" + self._secrets[32:]).digest(),
            token_epoch=time.time() - trio.current_time(),
            total_rate=limits.handshakes_per_second,
            address_rate=limits.handshakes_per_address,
            max_half_open=limits.half_open,
            address_half_open=limits.half_open_per_address,
            congestion=self.config.transport.congestion,
        )

    async def _start_uplink(self, nursery: trio.Nursery) -> None:
        targets = targets_of(self.config.upstreams, self.identity, self.upstream_tokens)
        if not targets:
            return
        try:
            await self._dialler.start(nursery)
        except OSError as error:
            advice = "see the limits of the system on open files and ports"
            raise StartupError(f"no socket to dial with: {error.strerror or error}", advice) from error
        transport = self.config.transport
        self.uplink = Uplink(
            targets,
            self.sessions,
            self.store,
            dial=self._dialler.udp,
            fallback=Fallback(self._dialler, probe=transport.probe, stable=transport.stable),
            class_of=lambda lane, prefix: self.classes.of(lane, prefix).name,
            on_custody=self.relay.on_custody,
            on_time_heard=self.floor.heard,
            events=self.events,
            wall_ms=self.wall_ms,
            rehandshake=lambda: self.config.transport.rehandshake,
            left=self.expiry.left,
            keep_token=lambda target: nursery.start_soon(
                trio.to_thread.run_sync, self.upstream_tokens.put, target.url, target.token
            ),
            on_revoked=self._learn_revoked,
        )
        self.relay.custody_route = self.uplink.takes_class
        nursery.start_soon(self.uplink.run)

    # -- what parts ask

    def _hello(self) -> Hello:
        return Hello(
            domain=self.identity.domain,
            node=self.identity.node,
            store=self.store.store_id,
            run=self._run_number,
            nonce=self._nonce,
            kind=self.config.role,
            software=f"stpd/{self.version}",
            time_ms=self.wall_ms(),
            classes=self.classes.announced(),
        )

    def _name_of_source(self, source: bytes) -> str | None:
        if source in (self.store.store_id, self._memory_source):
            return self.identity.node
        return self.store.node_of_source(source)

    def _limit_of(self, node: str) -> PeerLimit | None:
        """What one peer may send. A gateway speaks for all its devices: its limit is its store's."""
        limits = self.config.limits
        limit = PeerLimit(limits.peer_messages_per_second, limits.peer_bytes_per_second)
        return limit if limit and self.role_of(node) != "gateway" else None

    def _make_responder(self) -> Responder:
        """For one session: its own allowance of echoes, and the one that all share."""
        rate = self.config.limits.echo_bytes_per_second
        if self._echo_allowance.rate != rate * ECHO_TOTAL:
            self._echo_allowance = Allowance(rate * ECHO_TOTAL)
        return Responder(rate, self._echo_allowance)

    def authorise(self, peer: PeerIdentity) -> str | None:
        """May this certificate's owner have a session? None, or the reason why not. Raises HandshakeRefused."""
        if peer.domain != self.identity.domain:
            return f"domain {peer.domain} is not {self.identity.domain}"
        if self.registry.is_revoked(peer.serial):
            raise HandshakeRefused("this certificate was revoked", ErrorCode.REVOKED)
        if self.expiry.passed(peer.not_after):  # TLS judges by the time its context was made
            raise HandshakeRefused("this certificate has expired", ErrorCode.EXPIRED)
        if self.draining:
            return "this node is going away"
        if len(self.sessions.peers) >= self.config.limits.sessions > 0:
            return f"this node serves {self.config.limits.sessions} sessions already"
        return None

    def on_handshake_refused(self, address: Any, peer: PeerIdentity | None, reason: str) -> None:
        node = peer.node if peer is not None else ""
        self.handshakes_refused += 1
        host = address[0] if isinstance(address, tuple) else address
        silent = self._throttle.passes(("handshake", host, node, reason), trio.current_time())
        if silent is None:
            return
        log.warning("handshake_refused", address=_text(address), node=node, reason=reason, more=silent)
        text = f"refused {node or 'a peer'} from {_text(address)}: {reason}"
        self.events.publish("session.refused", text, node=node)

    def _on_refused(self, node: str, code: Any, reason: str) -> None:
        silent = self._throttle.passes((node, code, reason), trio.current_time())
        if silent is not None:
            name = str(getattr(code, "name", code))
            log.warning("record_refused", peer=node, code=name, reason=reason, more=silent)

    # -- time and signals

    async def _tick(self) -> None:
        """Once a second: deadlines, the state of the store, the watchdog."""
        while True:
            await trio.sleep(CHECK_INTERVAL)
            self.sessions.check()
            self.end_sessions()
            await self.lifetimes.save()
            self.tracing.check(trio.current_time())
            await self._place.keep()
            self._look_at_store()
            if self.store_stalled_for() < 30.0:
                self._notifier.watchdog()

    def end_sessions(self) -> None:
        """Of certificates that ran out or were revoked: within a second, or at once by whoever changes that."""
        self.lifetimes.check(self.sessions.peers.values())
        self.turns.wake()

    def _learn_revoked(self, serials: dict[int, int]) -> None:
        self.lifetimes.learn(serials)
        self.end_sessions()

    def _look_at_store(self) -> None:
        numbers = self.store.statistics()
        moves = numbers.commits != self._commits_seen or not numbers.queue_records
        self._commits_seen = numbers.commits
        if moves:
            self._waiting_since = None
        elif self._waiting_since is None:
            self._waiting_since = trio.current_time()
        full = self.store.full
        if full and not self.full_since_ms:
            self.full_since_ms = self.wall_ms()
            log.error("store_full", used=self.store.usage().used, reason=self.store.degraded or "budget")
            self.events.publish("store.full", "the store is full: publishers wait")
        elif not full and self.full_since_ms:
            self.full_since_ms = 0
            log.info("store_has_room")
            self.events.publish("store.free", "the store has room again")

    async def _on_signals(self, signals: Any) -> None:
        async for number in signals:
            if number == signal.SIGHUP:
                await self.reload()
            else:
                log.info("stopping", signal=signal.Signals(number).name)
                self._stop.set()

    def begin_drain(self) -> None:
        """Send everybody elsewhere and end."""
        self._stop_code = ErrorCode.GOING_AWAY
        self.events.publish("drain", "draining: no new sessions, then the end")
        log.info("draining")
        self._stop.set()

    async def _wind_down(self) -> None:
        """Promise (2)."""
        self.draining = True
        for config in self._endpoint_configs:
            config.accept = False
        self.doors.stop_accepting()
        if self.uplink is not None:
            self.uplink.stop()
        self._notifier.stopping("stopping")
        with trio.move_on_after(STOP_TIMEOUT) as scope:
            self.sessions.say_goodbye("draining" if self._stop_code is ErrorCode.GOING_AWAY else "restarting")
            self.turns.wake()
            await self.store.flush()
            self.relay.flush()
            await trio.sleep(LAST_WORDS)
            self.sessions.close_all(self._stop_code, "0")
            self.turns.wake()
            await trio.sleep(LAST_WORDS)
        if scope.cancelled_caught:
            log.warning("stop_hurried", after_s=STOP_TIMEOUT)

    async def _release(self) -> None:
        with trio.CancelScope(shield=True):
            for carrier in self._carriers:
                carrier.close()
            self._dialler.close()
            self.doors.close()
            if hasattr(self, "tracing"):
                await trio.to_thread.run_sync(self.tracing.close)
            if hasattr(self, "store"):
                await self.store.aclose()

    # -- reload

    async def reload(self) -> ReloadReport:
        """Promise (3). Access rules, log level, certificates and revocations take effect at once."""
        self._notifier.reloading()
        report = ReloadReport()
        try:
            fresh = await trio.to_thread.run_sync(load, self._path)
            identity = await trio.to_thread.run_sync(Identity.load, fresh.identity)
            await trio.to_thread.run_sync(self.registry.reread)
            if (identity.domain, identity.node) != (self.identity.domain, self.identity.node):
                report.problems.append("the identity names another node: that needs a restart")
        except ConfigError as error:
            report.problems.extend(str(problem) for problem in error.problems)
        except Exception as error:
            report.problems.append(str(error))
        if not report.problems:
            self._apply(fresh, identity, report)
        self._notifier.ready()
        log.info(
            "reloaded" if not report.problems else "reload_refused",
            changed=report.changed,
            restart_needed=report.restart_needed,
            problems=report.problems,
        )
        self.events.publish("config.reloaded", "; ".join(report.problems) or "configuration read again")
        return report

    def _apply(self, fresh: Config, identity: Identity, report: ReloadReport) -> None:
        report.changed, report.restart_needed = changes(self.config, fresh)
        renewed = identity.leaf_der != self.identity.leaf_der
        if renewed:
            report.changed.append("certificate")
        if identity.network_keys != self.identity.network_keys:
            report.changed.append("network keys")
            for config in self._endpoint_configs:
                config.network_keys = identity.network_keys
        logs.set_level(fresh.log.level)
        self.config.access, self.config.log, self.config.identity = fresh.access, fresh.log, fresh.identity
        self.config.transport.rehandshake = fresh.transport.rehandshake
        self.identity = identity
        self.contexts.replace(identity)
        self.access = Access(fresh.access, role_of=self.role_of)
        self.sessions.refresh_grants()
        self.end_sessions()
        if renewed and self.uplink is not None:
            self.uplink.renewed()


async def _call_later(delay: float, function: Callable[[], None]) -> None:
    await trio.sleep(delay)
    function()


def _text(address: Any) -> str:
    if isinstance(address, tuple):
        host = str(address[0])
        return f"[{host}]:{address[1]}" if ":" in host else f"{host}:{address[1]}"
    return str(address)


def run(config: Config, path: Path, make: Callable[[Config, Path, Identity], Daemon] = Daemon) -> None:
    """Load the identity and run to the end. Raises StartupError and IdentityError."""
    sys.setswitchinterval(SWITCH_INTERVAL)
    identity = Identity.load(config.identity)
    daemon = make(config, path, identity)
    trio.run(daemon.run)
