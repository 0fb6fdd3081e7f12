"""One socket's worth of sessions: datagrams to sessions, handshakes in and out, one heap of timers. The top of core.

    endpoint.receive(data, addr, now)                 1. input: the network,
    endpoint.handle_timeout(now)                         time, or verbs of sessions
    for session in endpoint.take_ready(): ...         2. events and bytes for their owners
    for t in endpoint.datagrams_to_send(now): ...     3. output, to be sent in this order
    deadline = endpoint.next_timeout()                4. valid only after 3

(1) A stranger whose address is not validated costs no state: at most a Retry, smaller than what it sent.
(2) What is not for us, or does not open, gets no answer and no exception: a counter, by reason.
(3) Unfinished handshakes are bounded in number, per address and in all (admission.py), and in time.
(4) A session that is CLOSED leaves nothing behind: no CID, no timer of any weight, no handshake.
"""

from __future__ import annotations

from collections.abc import Callable
from heapq import heappop, heappush
from typing import Any, Final

from attrs import Factory, define, evolve

from stp.core import packet
from stp.core.admission import (
    ADDRESS_HALF_OPEN,
    ADDRESS_RATE,
    HALF_OPEN,
    TOTAL_RATE,
    Admission,
    address_key,
)
from stp.core.congestion import Congestion, NewReno
from stp.core.cubic import Cubic
from stp.core.errors import ErrorCode, PacketError, UsageError
from stp.core.events import EndpointTotals
from stp.core.flow import WindowBudget
from stp.core.handshake import PeerIdentity
from stp.core.initspace import HANDSHAKE_DEADLINE, ClientHandshake, FirstInit, ServerHandshake, open_first
from stp.core.keepalive import KeepaliveLearner
from stp.core.output import Transmit
from stp.core.packet import InitPacket
from stp.core.params import TransportParameters
from stp.core.path import DEAD_TIME, KEEPALIVE
from stp.core.phases import KeyLimits
from stp.core.resets import Resetter
from stp.core.session import Session
from stp.core.sizing import BASE_DATAGRAM
from stp.core.states import Agenda, SessionContext, State
from stp.core.tokens import BAD_RETRY, NodeToken, RetryToken, TokenKeeper
from stp.core.tolerant import Tolerant
from stp.core.trace import Sink

CONTROLLERS: Final[dict[str, Callable[[int], Congestion]]] = {
    "tolerant": Tolerant,
    "cubic": Cubic,
    "newreno": NewReno,
}
"""By the names that EndpointConfig.congestion may have."""
WINDOW_BUDGET: Final = 256 * 1024 * 1024
"""Bytes by which the windows of all sessions may grow together."""
MAX_ANSWERS: Final = 1024
"""Retries that wait to be sent; more are dropped."""


def allow(peer: PeerIdentity) -> str | None:
    """Everybody whose chain is good may in."""
    return None


@define(kw_only=True)
class EndpointConfig:
    """What an endpoint needs from its owner. Times are seconds."""

    tls: Callable[[bool], Any]
    """server -> SSL.Context; called for each handshake, so that reloads and the verification time take effect."""
    leaf_der: bytes | Callable[[], bytes]
    """Our own certificate, the one that `tls` gives."""
    network_keys: tuple[bytes, ...] = ()
    """The first is used to send, all are accepted; () stands for none."""
    accept: bool = False
    authorise: Callable[[PeerIdentity], str | None] = allow
    random_bytes: Callable[[int], bytes]
    on_refused: Callable[[Any, PeerIdentity | None, str], None] | None = None
    congestion: str = "tolerant"
    """Which controller new sessions have, one of CONTROLLERS."""
    max_datagram: int = 1472
    """Bytes of UDP payload that we are ready to receive."""
    datagram: int = BASE_DATAGRAM
    """Bytes of UDP payload that our full packets have at first."""
    largest: int = BASE_DATAGRAM
    """Bytes up to which paths are probed for more (protocol §6); not above `datagram`: they are not."""
    sizes_for: Callable[[Any], tuple[int, int]] | None = None
    """Both by address, (at first, at most): the driver knows what a path may carry. It wins over the two above."""
    keepalive: float = KEEPALIVE
    dead_time: float = DEAD_TIME
    handshake_deadline: float = HANDSHAKE_DEADLINE
    max_half_open: int = HALF_OPEN
    address_half_open: int = ADDRESS_HALF_OPEN
    address_rate: float = ADDRESS_RATE
    """Handshakes a second of one address, or of one node with a NEW_TOKEN."""
    total_rate: float = TOTAL_RATE
    """Handshakes a second in all."""
    window_budget: int = WINDOW_BUDGET
    key_limits: KeyLimits = Factory(KeyLimits)
    observer: Callable[[Session, bytes], Sink | None] | None = None
    """(session, its first DCID): who wants its event log, if anybody. Asked once: when we dial, or let a peer in."""
    """How long keys last (protocol §9)."""
    instance: int = 0
    """u8: which of several listeners behind one address issued a CID (protocol §8)."""
    cid_key: bytes = b""
    """b"": made at start. With `reset_key` kept across restarts, peers can be told of a restart."""
    reset_key: bytes = b""
    token_key: bytes = b""
    """b"": made at start. Kept across restarts, it lets peers come back by the NEW_TOKEN they have."""
    token_epoch: float = 0.0
    """With `token_key`: `now` plus this goes on over a restart. Seconds."""


@define
class EndpointStatistics:
    """Counts since the start. What was dropped for no session is in one of `dropped_…`."""

    sessions: int = 0
    half_open: int = 0
    datagrams_in: int = 0
    bytes_in: int = 0
    datagrams_out: int = 0
    bytes_out: int = 0
    dials: int = 0
    handshakes_started: int = 0
    handshakes_confirmed: int = 0
    handshakes_evicted: int = 0
    retries_sent: int = 0
    resets_sent: int = 0
    resets_received: int = 0
    """RESETs that ended a session of ours."""
    dropped_garbage: int = 0
    """Neither INIT nor RETRY nor DATA, or too short for what it says."""
    dropped_unknown_cid: int = 0
    dropped_bad_init: int = 0
    """INITs that open under no key of ours, or break the rules for INITs."""
    dropped_bad_retry: int = 0
    dropped_bad_token: int = 0
    """Retry tokens that are late, of another address or forged."""
    dropped_not_accepting: int = 0
    dropped_admission: int = 0
    """Above a limit of protocol §4."""
    dropped_answers: int = 0
    black_holes: int = 0
    """How often full packets of a session stopped arriving, and became smaller (protocol §6)."""


@define(eq=False)
class _Unfinished:
    """A listener's handshake that is not confirmed."""

    dcids: tuple[bytes, ...]
    key: bytes
    by_token: bool


class Endpoint:
    """Sessions over one socket, dialled and accepted. UsageError for a configuration that cannot be."""

    def __init__(self, config: EndpointConfig) -> None:
        if config.congestion not in CONTROLLERS:
            raise UsageError(f"congestion {config.congestion!r}: one of {', '.join(CONTROLLERS)} is wanted")
        random_bytes = config.random_bytes
        self._config = config
        self._cid_key = config.cid_key or random_bytes(32)
        self._reset_key = config.reset_key or random_bytes(32)
        self._resetter = (
            Resetter(self._cid_key, self._reset_key, config.instance, random_bytes)
            if config.accept and config.cid_key and config.reset_key
            else None
        )
        self._dialled: set[Session] = set()
        self._tokens = TokenKeeper(random_bytes, config.token_key, config.token_epoch)
        self._admission = Admission(
            address_rate=config.address_rate,
            address_half_open=config.address_half_open,
            total_rate=config.total_rate,
        )
        self._agenda: Agenda[Session] = Agenda()
        self._context = SessionContext(
            agenda=self._agenda,
            cid_source=self._new_cid_and_token,
            random_bytes=random_bytes,
            congestion=CONTROLLERS[config.congestion],
            budget=WindowBudget(config.window_budget),
            on_cids=self._on_cids,
            reset_token=self._reset_token,
            on_refused=config.on_refused,
            node_token=self._node_token if config.accept else None,
            sizes_for=config.sizes_for or (lambda addr: (config.datagram, config.largest)),
            keepalive=config.keepalive,
            dead_time=config.dead_time,
            key_limits=config.key_limits,
            observer=config.observer,
        )
        self._by_cid: dict[bytes, Session] = {}
        self._by_init: dict[bytes, Session] = {}
        self._cids: dict[Session, list[bytes]] = {}
        self._unfinished: dict[Session, _Unfinished] = {}
        self._answers: list[Transmit] = []
        self._heap: list[tuple[float, int, Session]] = []
        self._black_holes = 0  # of sessions that are gone
        self._pushes = 0  # keeps the heap from comparing sessions
        self._counts = EndpointStatistics()
        self._totals = EndpointTotals()

    # -- the owner's side

    @property
    def sessions(self) -> list[Session]:
        """Those that are not over, handshakes included."""
        return [s for s in self._cids if s.live]

    def connect(
        self,
        addr: Any,
        *,
        expected_node: str,
        now: float,
        expected_domain: str | None = None,
        token: bytes = b"",
        rtt: float | None = None,
        keepalive: KeepaliveLearner | None = None,
    ) -> Session:
        """Dial. `token`: the last NewToken of that peer; `rtt`: remembered, seconds; `keepalive`: of the network that
        we are in, instead of EndpointConfig.keepalive."""
        config = self._config
        cid = self._new_cid()
        handshake = ClientHandshake(
            config.tls(False),
            self._leaf(),
            expected_node=expected_node,
            expected_domain=expected_domain,
            cid=cid,
            parameters=self._parameters(),
            network_key=config.network_keys[0] if config.network_keys else b"",
            token=token,
            random_bytes=config.random_bytes,
            now=now,
            rtt=rtt,
            deadline=config.handshake_deadline,
        )
        session = Session(self._context, handshake, addr, dialling=True, now=now, keepalive=keepalive)
        self._counts.dials += 1
        self._dialled.add(session)
        self._adopt(session, cid)
        return session

    @property
    def has_news(self) -> bool:
        """Whether `take_ready` would name a session."""
        return bool(self._agenda.ready)

    @property
    def has_work(self) -> bool:
        """Whether there is news, or something that `datagrams_to_send` should look at."""
        agenda = self._agenda
        return bool(agenda.ready or agenda.to_send or self._answers)

    def take_ready(self) -> list[Session]:
        """Sessions with news for their owners since the last call, each once."""
        ready, self._agenda.ready = self._agenda.ready, []
        for session in ready:
            session.in_ready = False
        return ready

    def take_suspects(self) -> list[Session]:
        """Dialled sessions that hear nothing, since the last call: give them another local address (`migrate`), and
        this signal comes again, ever later, until one helps or the session is dead (R-8-8). Nobody has to."""
        if not self._agenda.suspects:
            return []
        suspects, self._agenda.suspects = self._agenda.suspects, {}
        return [session for session in suspects if session.live]

    def close_all(self, code: ErrorCode, reason: str, now: float) -> None:
        for session in list(self._cids):
            session.close(code, reason, now)

    def statistics(self) -> EndpointStatistics:
        """A snapshot."""
        self._counts.sessions = len(self._cids)
        self._counts.half_open = len(self._unfinished)
        self._counts.black_holes = self._black_holes + sum(s.black_holes for s in self._cids)
        return self._counts

    def totals(self) -> EndpointTotals:
        """Sums over all sessions since the start."""
        found = evolve(self._totals)
        for session in self._cids:
            session.add_totals(found)
        return found

    # -- input

    def receive(self, data: bytes | memoryview, addr: Any, now: float, segment_size: int = 0) -> None:
        """One datagram, or with `segment_size` several of that size in one buffer, the last maybe shorter."""
        if not isinstance(data, bytes):
            data = bytes(data)
        size = segment_size or len(data)
        counts = self._counts
        counts.bytes_in += len(data)
        counts.datagrams_in += -(-len(data) // size) if size else 1
        session = self._by_cid.get(data[1:9])
        if session is not None and packet.is_data(data):
            for strange in session.receive_data(data, size, addr, now):
                self._receive_strange(strange, addr, now, session)
        else:
            for start in range(0, len(data) or 1, size or 1):
                self._receive_strange(data[start : start + size], addr, now, None)

    def _receive_strange(self, datagram: bytes, addr: Any, now: float, known: Session | None) -> None:
        """A datagram by itself; `known` has looked at it already."""
        if packet.is_data(datagram):
            session = self._by_cid.get(datagram[1:9])
            if session is None:
                self._receive_unknown(datagram, addr, now)
            elif session is known:
                self._counts.dropped_unknown_cid += 1
            else:
                session.receive_data(datagram, len(datagram), addr, now)
        elif datagram[:1] == b"\xc0":
            self._receive_init(datagram, addr, now)
        elif datagram[:1] == b"\xe0":
            self._receive_retry(datagram, addr, now)
        else:
            self._counts.dropped_garbage += 1

    def _receive_unknown(self, datagram: bytes, addr: Any, now: float) -> None:
        """A DATA packet for nobody here: a peer's RESET, or something of our former life."""
        if len(datagram) >= packet.MIN_RESET:
            token = datagram[-packet.TAG_LENGTH :]
            for session in self._dialled:
                if session.addr == addr and session.receive_reset(token, now):
                    self._counts.resets_received += 1
                    return
        self._counts.dropped_unknown_cid += 1
        if self._resetter is None or len(self._answers) >= MAX_ANSWERS:
            return
        reset = self._resetter.answer(datagram, addr, now)
        if reset is not None:
            self._counts.resets_sent += 1
            self._answers.append(Transmit(addr, reset))

    def _receive_init(self, datagram: bytes, addr: Any, now: float) -> None:
        try:
            received = packet.parse_init(datagram)
            session = self._by_init.get(received.dcid) or self._by_cid.get(received.dcid)
            if (session is None or not session.dialling) and len(datagram) < packet.INIT_DATAGRAM:
                self._counts.dropped_bad_init += 1
            elif session is not None:
                session.receive_init(received, addr, now)
            elif not self._config.accept:
                self._counts.dropped_not_accepting += 1
            else:
                self._receive_first(received, addr, now)
        except PacketError:
            self._counts.dropped_bad_init += 1

    def _receive_retry(self, datagram: bytes, addr: Any, now: float) -> None:
        try:
            received = packet.parse_retry(datagram)
            session = self._by_cid.get(received.dcid)
            if session is None:
                self._counts.dropped_bad_retry += 1
            else:
                session.receive_retry(received, addr, now)
        except PacketError:
            self._counts.dropped_bad_retry += 1

    def _receive_first(self, received: InitPacket, addr: Any, now: float) -> None:
        """An INIT of nobody we know: Retry, silence, or state. Raises PacketError (R-4-26)."""
        first = open_first(received, self._config.network_keys)
        verdict = self._tokens.read(received.token, addr, received.dcid, now)
        if verdict is BAD_RETRY:
            self._counts.dropped_bad_token += 1
        elif verdict is None:
            self._send_retry(received, first, addr, now)
        else:
            self._accept(received, first, verdict, addr, now)

    def _send_retry(self, received: InitPacket, first: FirstInit, addr: Any, now: float) -> None:
        if len(self._answers) >= MAX_ANSWERS:
            self._counts.dropped_answers += 1
            return
        cid = self._new_cid()
        token = self._tokens.seal_retry(addr, received.dcid, cid, now)
        retry = packet.build_retry(received.scid, cid, token, first.keys.retry_key, received.dcid)
        self._answers.append(Transmit(addr, retry))
        self._counts.retries_sent += 1

    def _accept(
        self, received: InitPacket, first: FirstInit, verdict: RetryToken | NodeToken, addr: Any, now: float
    ) -> None:
        """State for a peer that has shown who, or at least where, it is."""
        config = self._config
        by_token = isinstance(verdict, NodeToken)
        key = verdict.node if isinstance(verdict, NodeToken) else address_key(addr)
        if not self._admission.admit(key, now, by_token=by_token):
            self._counts.dropped_admission += 1
            return
        if isinstance(verdict, NodeToken):
            self._tokens.spend(verdict, now)
        self._make_room(by_token)
        retried = isinstance(verdict, RetryToken)
        handshake = ServerHandshake(
            config.tls(True),
            self._leaf(),
            first=first,
            received=received,
            original_dcid=verdict.original_dcid if isinstance(verdict, RetryToken) else received.dcid,
            cid=received.dcid if retried else self._new_cid(),
            retried=retried,
            validated=retried,
            token_node=verdict.node if isinstance(verdict, NodeToken) else b"",
            authorise=config.authorise,
            parameters=self._parameters(),
            random_bytes=config.random_bytes,
            now=now,
            deadline=config.handshake_deadline,
        )
        session = Session(self._context, handshake, addr, dialling=False, now=now)
        self._unfinished[session] = _Unfinished(handshake.dcids, key, by_token)
        for dcid in handshake.dcids:
            self._by_init[dcid] = session
        self._counts.handshakes_started += 1
        self._adopt(session, handshake.cid)
        session.receive_init(received, addr, now)

    def _make_room(self, by_token: bool) -> None:
        """Evict the stalest unfinished handshake if there are too many (3)."""
        limit = self._config.max_half_open
        rest = [s for s, u in self._unfinished.items() if not u.by_token]
        stalest = None
        if not by_token and len(rest) >= limit - limit // 2:
            stalest = rest[0]
        elif len(self._unfinished) >= limit:
            stalest = rest[0] if rest else next(iter(self._unfinished))
        if stalest is not None:
            self._counts.handshakes_evicted += 1
            stalest.abandon()
            self._look_after(stalest)

    def on_too_large(self, addr: Any, size: int, now: float) -> None:
        """The kernel will not send datagrams of `size` bytes to `addr`: the first hop's own word. Rare."""
        for session in list(self._cids):
            if session.addr == addr:
                session.on_too_large(size, now)

    # -- output and time

    def datagrams_to_send(self, now: float) -> list[Transmit]:
        """What is to be sent now, in this order."""
        out, self._answers = self._answers, []
        sessions, self._agenda.to_send = self._agenda.to_send, []
        for session in sessions:
            session.in_to_send = False
            session.datagrams_to_send(now, out)
            self._look_after(session)
        counts = self._counts
        for sent in out:
            size = len(sent.data)
            counts.bytes_out += size
            counts.datagrams_out += -(-size // sent.segment_size) if sent.segment_size else 1
        return out

    def next_timeout(self) -> float | None:
        """When to call `handle_timeout`; None: nobody waits for anything."""
        heap = self._heap
        while heap and heap[0][2].armed != heap[0][0]:
            heappop(heap)
        return heap[0][0] if heap else None

    def handle_timeout(self, now: float) -> None:
        """Call at or after `next_timeout`; earlier does no harm."""
        heap = self._heap
        while heap and heap[0][0] <= now:
            at, _, session = heappop(heap)
            if session.armed != at:
                continue  # armed earlier meanwhile
            session.armed = None
            due = session.next_timeout()
            if due is None:
                continue
            if due <= now:
                session.handle_timeout(now)  # this arms it again, by way of datagrams_to_send
            else:
                self._arm(session, due)

    # -- inside

    def _leaf(self) -> bytes:
        leaf = self._config.leaf_der
        return leaf if isinstance(leaf, bytes) else leaf()

    def _parameters(self) -> TransportParameters:
        return TransportParameters(max_datagram=self._config.max_datagram)

    def _new_cid(self) -> bytes:
        while True:
            cid = packet.make_cid(self._cid_key, self._config.instance, self._config.random_bytes(4))
            if cid not in self._by_cid:
                return cid

    def _new_cid_and_token(self) -> tuple[bytes, bytes]:
        cid = self._new_cid()
        return cid, self._reset_token(cid)

    def _reset_token(self, cid: bytes) -> bytes:
        return packet.reset_token(self._reset_key, cid)

    def _node_token(self, peer: PeerIdentity, now: float) -> bytes:
        return self._tokens.seal_node(peer.domain, peer.node, now)

    def _on_cids(self, session: Session, made: list[bytes], gone: list[bytes]) -> None:
        mine = self._cids[session]
        for cid in made:
            self._by_cid[cid] = session
            mine.append(cid)
        for cid in gone:
            self._by_cid.pop(cid, None)
            mine.remove(cid)

    def _adopt(self, session: Session, cid: bytes) -> None:
        if cid in self._by_cid:
            raise UsageError("a CID is used twice")
        self._by_cid[cid] = session
        self._cids[session] = [cid]
        session.in_to_send = True
        self._agenda.to_send.append(session)

    def _look_after(self, session: Session) -> None:
        """After a session was touched: forget its handshake or all of it, or set its timer."""
        if session.handshake is None and session in self._unfinished:
            unfinished = self._unfinished.pop(session)
            self._admission.on_over(unfinished.key)
            self._counts.handshakes_confirmed += session.state is State.ESTABLISHED
            for dcid in unfinished.dcids:
                self._by_init.pop(dcid, None)
        if session.state is State.CLOSED:
            if session in self._cids:
                self._black_holes += session.black_holes
                session.add_totals(self._totals)
            for cid in self._cids.pop(session, ()):
                self._by_cid.pop(cid, None)
            session.armed = None
            self._dialled.discard(session)
            self._agenda.suspects.pop(session, None)
            return
        due = session.next_timeout()
        if due is not None and (session.armed is None or due < session.armed):
            self._arm(session, due)

    def _arm(self, session: Session, due: float) -> None:
        session.armed = due
        self._pushes += 1
        heappush(self._heap, (due, self._pushes, session))
