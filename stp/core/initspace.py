"""The handshake over INIT packets (protocol §4): what endpoint and session hold until confirmation.

How they use it, both sides alike:

    h.receive_init(packet, now)             PacketError: does not open or is not for us: drop and count
    for datagram in h.datagrams_to_send(now): ...        to the address of the handshake
    deadline = h.next_timeout();  h.handle_timeout(now)
    h.state      RUNNING -> DONE (h.keys, h.peer, h.peer_hello are there; go on calling h: it resends) or
                 REFUSED (h.refused says why; a CLOSE may still be to be sent; goes OVER after 3 PTO) or
                 OVER (drop it: h.refused says why, or h.timed_out)

Client: plus `h.receive_retry(packet, now)` (PacketError: ignored). DONE: make DATA keys, send DATA at once,
stay unconnected until HANDSHAKE_DONE; then forget `h`. A DONE client may still become REFUSED: the server
judges our certificate later than we see success.

Server: `first = open_first(packet, network_keys)` (PacketError: silence), then tokens.py decides: Retry, or a
`ServerHandshake` and its `receive_init(packet, now)`. INITs find it by any of `h.dcids`. DONE: the peer is
authorised; handle early DATA; send HANDSHAKE_DONE; forget `h` when the first DATA packet opens.

(1) A datagram that does not open changes nothing.
(2) An unvalidated peer is sent at most 3 × what it sent.
(3) A duplicate provokes an ACK, and CRYPTO again at most once per PTO / 2.
(4) Of one peer at most 16 KiB of CRYPTO and 64 ranges are held, for 10 s or 6 RTT.
(5) An alert that TLS accepts is final; a CLOSE alone is a hint, believed after 3 PTO.
"""

from __future__ import annotations

import hmac
from collections.abc import Callable
from enum import Enum, auto
from typing import TYPE_CHECKING, Final

from attrs import define

from stp.core import frames, packet
from stp.core.crypto_stream import CryptoReceiver, CryptoSender
from stp.core.errors import ErrorCode, HandshakeRefused, PacketError, ProtocolError
from stp.core.handshake import Authorise, Handshake, PeerIdentity
from stp.core.keys import Aead, InitialKeys, SessionKeys, initial_keys
from stp.core.packet import InitPacket, RetryPacket
from stp.core.params import TransportHello, TransportParameters
from stp.core.ranges import RangeSet
from stp.core.tokens import token_node

if TYPE_CHECKING:
    from OpenSSL import SSL

INITIAL_PTO: Final = 0.3
"""Seconds, where no RTT is remembered."""
MIN_PTO: Final = 0.1
"""Seconds: a handshake waits for the peer's public-key work, however near the peer is."""
MAX_PTO: Final = 1.0
"""Seconds, or 2 RTT if longer."""
PROBE_SPREAD: Final = 0.25
"""Part of a PTO by which every probe but the first comes sooner or later: a fleet whose hub was started anew would
come in waves, and a listener that admits so many a second would stand idle between them."""
HANDSHAKE_DEADLINE: Final = 10.0
"""Seconds, or 6 RTT if longer (R-4-18)."""
AMPLIFICATION: Final = 3  # R-4-20
MAX_CLOSE_REASON: Final = 64
"""Bytes of the reason in an INIT CLOSE."""
LINGER_PTOS: Final = 3
PACKET_THRESHOLD: Final = 3
"""RFC 9002 §6.1.1."""

_ACK_RANGES: Final = 16
_MIN_CHUNK: Final = 64  # bytes of CRYPTO below which a datagram is not worth starting


class HandshakeState(Enum):
    RUNNING = auto()
    DONE = auto()
    REFUSED = auto()
    OVER = auto()


@define
class FirstInit:
    """The keys that opened a stranger's INIT: it knows the network key."""

    keys: InitialKeys
    network_key: bytes


def open_first(first: InitPacket, network_keys: tuple[bytes, ...]) -> FirstInit:
    """The keys that open the INIT of a stranger; () stands for no network key. Raises PacketError (R-3-6)."""
    for network_key in network_keys or (b"",):
        keys = initial_keys(first.dcid, network_key)
        try:
            keys.client.open(first.pn, first.sealed, first.aad)
        except PacketError:
            continue
        return FirstInit(keys=keys, network_key=network_key)
    raise PacketError("does not open under any network key")


@define
class _Sent:
    """An INIT in flight: when, and which CRYPTO bytes."""

    at: float
    start: int
    stop: int


def _refused_by_peer(close: frames.Close) -> HandshakeRefused:
    return HandshakeRefused(
        f"refused by the peer: {close.reason or 'no reason given'}", ErrorCode.of(close.code), by_peer=True
    )


class InitHandshake:
    """What both sides share: packet numbers, ACKs, CRYPTO, PTO, refusal. Made through its two subclasses (R-4-21)."""

    def __init__(
        self,
        *,
        dialling: bool,
        cid: bytes,
        keys: InitialKeys,
        random_bytes: Callable[[int], bytes],
        now: float,
        rtt: float | None,
        deadline: float,
    ) -> None:
        self.state = HandshakeState.RUNNING
        self.refused: HandshakeRefused | None = None
        self.timed_out = False
        self.cid = cid
        self.peer_cid: bytes | None = None
        self.rtt = rtt
        self.validated = dialling
        self.original_dcid: bytes
        """The DCID of the client's very first INIT."""
        self._dialling = dialling
        self._tls: Handshake
        self._token = b""
        self._next_pn = int.from_bytes(random_bytes(4), "big") & 0x7FFFFFFF
        self._use_keys(keys)
        self._received = RangeSet(max_ranges=64)
        self._ack_due = False
        self._incoming = CryptoReceiver()
        self._outgoing = CryptoSender()
        self._sent: dict[int, _Sent] = {}
        self._last_sent = now
        self._pto_count = 0
        self._spread = 1.0
        self._random_bytes = random_bytes
        self._ping_due = False
        self._close_due = False
        self._hint: frames.Close | None = None
        self._started = now
        self._patience = deadline
        self._over_at: float | None = None
        self._provoked_at = now
        self._bytes_in = 0
        self._bytes_out = 0

    # -- what the owner reads

    @property
    def keys(self) -> SessionKeys | None:
        """Keys of DATA; None before DONE."""
        return self._tls.result.keys if self._tls.result is not None else None

    @property
    def peer(self) -> PeerIdentity | None:
        """Whom the verified certificate names: there also when we refused it."""
        return self._tls.peer

    @property
    def peer_hello(self) -> TransportHello | None:
        return self._tls.peer_hello

    @property
    def pto(self) -> float:
        """Seconds until the next probe, backed off (protocol §4, R-4-18)."""
        rtt = self.rtt
        base = INITIAL_PTO if rtt is None else max(2 * rtt, MIN_PTO)
        return float(min(base * 2.0**self._pto_count, max(MAX_PTO, 2 * (rtt or 0.0))))

    # -- input

    def receive_init(self, received: InitPacket, now: float) -> None:
        """An INIT datagram, whole. Raises PacketError if it is none of ours; nothing has changed then (R-3-2)."""
        if self.state is HandshakeState.OVER:
            raise PacketError("handshake is over")
        self._check_cids(received)
        plaintext = self._opener.open(received.pn, received.sealed, received.aad)
        self._adopt(received)
        self._bytes_in += len(received.aad) + len(received.sealed)
        known = received.pn in self._received
        self._received.add(received.pn)
        if self.state is HandshakeState.REFUSED:
            self._answer_again(now)
            return
        try:
            eliciting, fresh = self._read_frames(plaintext, known, now)
        except HandshakeRefused as exc:
            self._refuse(exc, now)
            return
        except ProtocolError as exc:
            self._refuse(HandshakeRefused(str(exc), exc.code), now)
            return
        if eliciting:
            self._ack_due = True
            if not fresh:
                self._answer_again(now)

    def close(self, code: ErrorCode, reason: str, now: float) -> None:
        """Give up on our side: an INIT CLOSE goes out, then REFUSED and OVER."""
        if self.state in (HandshakeState.RUNNING, HandshakeState.DONE):
            self._refuse(HandshakeRefused(reason, code), now)

    def handle_timeout(self, now: float) -> None:
        """Call at or after `next_timeout()`."""
        if self.state is HandshakeState.OVER:
            return
        if self._over_at is not None and now >= self._over_at:
            if self.refused is None and self._hint is not None:
                self.refused = _refused_by_peer(self._hint)
            self.state = HandshakeState.OVER
            return
        if now >= self._deadline():
            self.timed_out = self.refused is None
            self.state = HandshakeState.OVER
            return
        due = self._probe_at()
        if due is not None and now >= due:
            self._pto_count += 1
            self._spread = 1 + PROBE_SPREAD * (self._random_bytes(1)[0] / 127.5 - 1)
            self._outgoing.requeue()
            self._ping_due = True
            self._last_sent = now  # also where the amplification limit lets nothing out

    # -- output

    def datagrams_to_send(self, now: float) -> list[bytes]:
        """Sealed INIT datagrams, at most 1,200 bytes each, for the address of this handshake."""
        out: list[bytes] = []
        while self._wants_to_send():
            datagram = self._make_datagram(now)
            if datagram is None:
                break
            out.append(datagram)
        return out

    def next_timeout(self) -> float | None:
        if self.state is HandshakeState.OVER:
            return None
        due = self._deadline()
        for other in (self._over_at, self._probe_at()):
            if other is not None and other < due:
                due = other
        return due

    # -- subclasses

    def check_hello(self, hello: TransportHello) -> None:
        """What the handshake asks of its judge."""
        raise NotImplementedError

    def check_peer(self, peer: PeerIdentity) -> str | None:
        """What the handshake asks of its judge."""
        raise NotImplementedError

    def _check_cids(self, received: InitPacket) -> None:
        raise NotImplementedError

    def _adopt(self, received: InitPacket) -> None:
        """An INIT opened: learn from its header."""

    # -- inside

    def _use_keys(self, keys: InitialKeys) -> None:
        self._sealer: Aead = keys.client if self._dialling else keys.server
        self._opener: Aead = keys.server if self._dialling else keys.client

    def _deadline(self) -> float:
        return self._started + max(self._patience, 6 * (self.rtt or 0.0))

    def _probe_at(self) -> float | None:
        """A client probes until it is confirmed, lest an amplification limit stops both sides for good."""
        if self.state is HandshakeState.REFUSED and self._dialling:
            return None
        if self._dialling or self._sent:
            return self._last_sent + self.pto * self._spread
        return None

    def _read_frames(self, plaintext: bytes, known: bool, now: float) -> tuple[bool, bool]:
        """(ACK-eliciting, brought something new); R-4-14."""
        eliciting = fresh = False
        for frame in frames.decode(plaintext):
            match frame:
                case frames.Padding():
                    pass
                case frames.Ping():
                    eliciting = True
                case frames.Ack(ranges=ranges):
                    self._on_ack(ranges, now)
                case frames.Crypto(offset=offset, data=data):
                    eliciting = True
                    fresh |= self._incoming.add(offset, data) and not known
                case frames.Close():
                    self._on_close(frame, now)
                case _:
                    raise ProtocolError(f"{type(frame).__name__} in an INIT")
        data = self._incoming.take()
        if data:
            self._feed_tls(data)
        return eliciting, fresh

    def _feed_tls(self, data: bytes) -> None:
        try:
            self._tls.receive(data, self)
        except HandshakeRefused as exc:
            if self._hint is not None and self._hint.reason:
                raise _refused_by_peer(self._hint) from exc
            raise
        self._write_tls()
        if self._tls.result is not None and self.state is HandshakeState.RUNNING:
            self.state = HandshakeState.DONE
            self._hint = self._over_at = None  # who finishes TLS did not mean to go

    def _write_tls(self) -> None:
        out = self._tls.take_tls()
        if out:
            self._outgoing.write(out if self._outgoing.length else self._tls.hello_block() + out)

    def _on_ack(self, ranges: list[tuple[int, int]], now: float) -> None:
        """Numbers that we never used are passed over: the peer may have opened an INIT that a third party forged."""
        acked = {pn for pn in self._sent if any(start <= pn < stop for start, stop in ranges)}
        if not acked:
            return
        largest = max(acked)
        if largest == ranges[0][1] - 1:
            self.rtt = max(now - self._sent[largest].at, 0.0)
        for pn in list(self._sent):
            if pn in acked:
                sent = self._sent.pop(pn)
                self._outgoing.on_acked(sent.start, sent.stop)
                self._pto_count = 0
                self.validated = True
            elif pn <= largest - PACKET_THRESHOLD:
                sent = self._sent.pop(pn)
                self._outgoing.on_lost(sent.start, sent.stop)

    def _on_close(self, frame: frames.Close, now: float) -> None:
        """Anyone with the network key could have written it: believed after 3 PTO of nothing better (5, R-4-17)."""
        if self._hint is None:
            self._hint = frame
            self._over_at = now + LINGER_PTOS * self.pto

    def _refuse(self, why: HandshakeRefused, now: float) -> None:
        final_word_was_theirs = self._tls.result is not None and self._dialling
        self.state = HandshakeState.REFUSED
        self.refused = why
        self._write_tls()  # an alert, if TLS made one
        self._close_due = not final_word_was_theirs
        self._ack_due = True
        self._over_at = now + LINGER_PTOS * self.pto

    def _answer_again(self, now: float) -> None:
        """R-4-19."""
        if now - self._provoked_at < self.pto / 2:
            return
        self._provoked_at = now
        self._outgoing.requeue()
        self._ack_due = True
        self._close_due |= self.state is HandshakeState.REFUSED

    def _wants_to_send(self) -> bool:
        if self.state is HandshakeState.OVER:
            return False
        return self._ack_due or self._ping_due or self._close_due or self._outgoing.has_pending()

    def _room(self) -> int:
        """Bytes of frames that the next datagram may hold (2)."""
        size = packet.INIT_DATAGRAM
        if not self.validated:
            size = min(size, AMPLIFICATION * self._bytes_in - self._bytes_out)
        return size - packet.init_overhead(self._token)

    def _make_datagram(self, now: float) -> bytes | None:
        room = self._room()
        if room < _MIN_CHUNK:
            return None
        payload: list[bytes] = []
        start = stop = 0
        if self._received and (self._ack_due or self._outgoing.has_pending()):
            newest_first = [(a, b) for a, b in reversed(self._received.pairs())][:_ACK_RANGES]
            payload.append(frames.encode_ack(0, newest_first))
            room -= len(payload[0])
        close = b""
        if self._close_due and self.refused is not None:
            close = frames.Close(self.refused.code, self.refused.reason).encode(MAX_CLOSE_REASON)
            room -= len(close)
        eliciting = self._outgoing.has_pending() or self._ping_due
        if self._outgoing.has_pending():
            start, data = self._outgoing.next_chunk(room - frames.CRYPTO_HEAD_SIZE)
            stop = start + len(data)
            payload.append(frames.Crypto(start, data).encode())
        elif self._ping_due:
            payload.append(b"\x01")
        payload.append(close)
        self._ack_due = self._ping_due = self._close_due = False
        return self._seal(b"".join(payload), _Sent(now, start, stop) if eliciting else None, now)

    def _seal(self, plaintext: bytes, sent: _Sent | None, now: float) -> bytes:
        destination = self.peer_cid
        assert destination is not None
        header = packet.init_header(destination, self.cid, self._token, self._next_pn)
        if self._dialling:
            plaintext = plaintext.ljust(packet.INIT_DATAGRAM - len(header) - packet.TAG_LENGTH, b"\x00")
        sealed = header + self._sealer.seal(self._next_pn, plaintext, header)
        if sent is not None:
            self._sent[self._next_pn] = sent
            self._last_sent = now
        self._next_pn += 1
        self._bytes_out += len(sealed)
        return sealed


class ClientHandshake(InitHandshake):
    """The dialling side.

    `token`: a NEW_TOKEN of before or b"". `rtt`: remembered, seconds. `expected_domain` None: any.
    """

    def __init__(
        self,
        tls_context: SSL.Context,
        leaf_der: bytes,
        *,
        expected_node: str,
        expected_domain: str | None,
        cid: bytes,
        parameters: TransportParameters,
        network_key: bytes,
        token: bytes,
        random_bytes: Callable[[int], bytes],
        now: float,
        rtt: float | None = None,
        deadline: float = HANDSHAKE_DEADLINE,
    ) -> None:
        self.original_dcid = random_bytes(packet.CID_LENGTH)
        self._initial = initial_keys(self.original_dcid, network_key)
        super().__init__(
            dialling=True,
            cid=cid,
            keys=self._initial,
            random_bytes=random_bytes,
            now=now,
            rtt=rtt,
            deadline=deadline,
        )
        self.peer_cid = self.original_dcid
        self._adopted = False
        self._token = token
        self._network_key = network_key
        self._retry_scid = b""
        self._expected = (expected_domain, expected_node)
        self._parameters = parameters
        self._tls = Handshake(
            tls_context,
            leaf_der,
            dialling=True,
            hello=self._hello(),
        )
        self._client_hello = self._tls.take_tls()
        self._outgoing.write(self._tls.hello_block() + self._client_hello)

    def receive_retry(self, retry: RetryPacket, now: float) -> None:
        """The first Retry that verifies wins. Raises PacketError for any other (R-4-16)."""
        if self._adopted or self._retry_scid or retry.dcid != self.cid:
            raise PacketError("Retry out of place")
        if not packet.retry_is_genuine(retry, self._initial.retry_key, self.original_dcid):
            raise PacketError("Retry with a bad tag")
        self._retry_scid = self.peer_cid = retry.scid
        self._token = retry.token
        self._initial = initial_keys(retry.scid, self._network_key)
        self._use_keys(self._initial)
        self._received.clear()
        self._sent.clear()
        self._pto_count = 0
        self._tls.replace_hello(self._hello())
        self._outgoing = CryptoSender()
        self._outgoing.write(self._tls.hello_block() + self._client_hello)

    def _hello(self) -> TransportHello:
        return TransportHello(
            original_dcid=self.original_dcid,
            cid=self.cid,
            retry_scid=self._retry_scid,
            parameters=self._parameters,
        )

    def _check_cids(self, received: InitPacket) -> None:
        if received.dcid != self.cid or (self._adopted and received.scid != self.peer_cid):
            raise PacketError("INIT for another handshake")

    def _adopt(self, received: InitPacket) -> None:
        """R-4-15."""
        if not self._adopted:
            self._adopted = True
            self.peer_cid = received.scid

    def check_hello(self, hello: TransportHello) -> None:
        """R-4-4."""
        if (hello.original_dcid, hello.cid, hello.retry_scid) != (
            self.original_dcid,
            self.peer_cid,
            self._retry_scid,
        ):
            raise ProtocolError("the server's hello does not echo this handshake")

    def check_peer(self, peer: PeerIdentity) -> str | None:
        """R-4-8."""
        domain, node = self._expected
        if peer.node != node or (domain is not None and peer.domain != domain):
            wanted = node if domain is None else f"{domain}/{node}"
            return f"wanted {wanted}, found {peer.domain}/{peer.node}"
        return None


class ServerHandshake(InitHandshake):
    """The listening side, from the first INIT on that is worth state (R-4-23).

    With a Retry token: `cid` is the INIT's DCID, `original_dcid` the token's, `retried` and `validated` are
    True. With a NEW_TOKEN: `cid` is fresh, `original_dcid` the INIT's DCID, both are False, `token_node`
    is the token's node.
    """

    def __init__(
        self,
        tls_context: SSL.Context,
        leaf_der: bytes,
        *,
        first: FirstInit,
        received: InitPacket,
        original_dcid: bytes,
        cid: bytes,
        retried: bool,
        validated: bool,
        token_node: bytes,
        authorise: Authorise,
        parameters: TransportParameters,
        random_bytes: Callable[[int], bytes],
        now: float,
        deadline: float = HANDSHAKE_DEADLINE,
    ) -> None:
        super().__init__(
            dialling=False,
            cid=cid,
            keys=first.keys,
            random_bytes=random_bytes,
            now=now,
            rtt=None,
            deadline=deadline,
        )
        self.validated = validated
        self.network_key = first.network_key
        self.dcids = (received.dcid,) if received.dcid == cid else (received.dcid, cid)
        self.peer_cid = received.scid
        self.original_dcid = original_dcid
        self._retry_scid = cid if retried else b""
        self._token_node = token_node
        self._authorise = authorise
        self._tls = Handshake(
            tls_context,
            leaf_der,
            dialling=False,
            hello=TransportHello(
                original_dcid=original_dcid, cid=cid, retry_scid=self._retry_scid, parameters=parameters
            ),
        )

    def _check_cids(self, received: InitPacket) -> None:
        if received.scid != self.peer_cid or received.dcid not in self.dcids:
            raise PacketError("INIT for another handshake")

    def check_hello(self, hello: TransportHello) -> None:
        """R-4-4."""
        if (hello.original_dcid, hello.cid, hello.retry_scid) != (
            self.original_dcid,
            self.peer_cid,
            self._retry_scid,
        ):
            raise ProtocolError("the client's hello does not echo this handshake")

    def check_peer(self, peer: PeerIdentity) -> str | None:
        if self._token_node:
            named = token_node(peer.domain, peer.node)
            if not hmac.compare_digest(named, self._token_node):
                return "the token belongs to another node"
        return self._authorise(peer)
