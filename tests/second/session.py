"""§4 to §9 on the client's side: handshake, streams, acknowledgements, close; over one UDP socket.

What is left out, because the text lets a client leave it out: sending packets above 1,200 bytes, DATAGRAM. Keys
are updated when a caller says so (the text wants it after 2^20 packets or an hour). Congestion control is a window
that never grows beyond its first size.
"""

from __future__ import annotations

import hmac
import os
import random
import socket
import time
from collections.abc import Callable

from tests.second import frames as f
from tests.second import packets
from tests.second.hello import Malformed, make_hello, read_hello
from tests.second.keys import ApplicationKeys, InitialKeys, context_hash
from tests.second.space import INITIAL_PTO, Space
from tests.second.streams import Closed, Incoming, Streams
from tests.second.tls import Bundle, Tls

ROOM = packets.MINIMUM - 17 - packets.TAG
"""Bytes of frames in a DATA packet (R-6-7)."""
WINDOW_PACKETS = 10
HANDSHAKE_LIMIT = 10.0
PROTOCOL, FLOW = 0x0A, 0x03
QUIET = (f.ACK, f.CLOSE)
"""Frames that nobody acknowledges."""
IN_INIT = (f.PING, f.ACK, f.CRYPTO, f.CLOSE)


class Session:
    """A client's session. `drop` may lose a datagram, either way: it is asked for each."""

    def __init__(
        self, bundle: Bundle, *, token: bytes = b"", drop: Callable[[], bool] = lambda: False
    ) -> None:
        self.bundle = bundle
        self._drop = drop
        self._socket = self._dial()
        self._tls = Tls(bundle)
        self._tls_sent = bytearray(self._tls.output())
        self.original_dcid = self._dcid = os.urandom(8)
        self._own_cids = {0: os.urandom(8)}
        self._peer_cids: dict[int, tuple[bytes, bytes]] = {}
        """By seq: CID and reset token."""
        self._seq = 0
        self._retry_scid = b""
        self._token = token
        """A NEW_TOKEN of an earlier session, later what a Retry brought."""
        self._adopted = False
        self._initial: InitialKeys | None = InitialKeys(self._dcid, bundle.network_key)
        self._init = Space(random.getrandbits(31))
        self._crypto_in = Incoming()
        self._crypto_at = 0
        self._hc = self._hs = b""
        self._keys: ApplicationKeys | None = None
        self._data = Space(0)
        self.streams = Streams(self._data.queue)
        self._skip_at = random.randrange(256, 131073)
        self._phase_first = 0
        self._early: list[bytes] = []
        self._hint: tuple[float, Closed] | None = None
        self.connected = False
        self.token = b""
        self.closed: Closed | None = None
        self.counts = {"retry": 0, "dropped": 0, "not opened": 0, "timeouts": 0, "challenges": 0}

    # -- what the message layer asks

    @property
    def suite(self) -> str:
        return self._tls.suite

    @property
    def group(self) -> str:
        return self._tls.group

    def connect(self, timeout: float = HANDSHAKE_LIMIT) -> None:
        """Until HANDSHAKE_DONE (R-4-6). Raises Closed, SSL.Error or TimeoutError."""
        self._say_hello()
        deadline = time.monotonic() + timeout
        while not self.connected:
            if time.monotonic() > deadline:
                raise TimeoutError("handshake")
            self.step(deadline - time.monotonic())

    def step(self, timeout: float) -> None:
        """Send what may be sent, wait for one burst or a timer, take it in. Raises Closed."""
        now = time.monotonic()
        self._flush(now)
        ends = [now + timeout]
        ends += [end for space in (self._init, self._data) if (end := space.deadline()) is not None]
        if self._hint is not None:
            ends.append(self._hint[0])
        self._socket.settimeout(max(0.001, min(ends) - now))
        try:
            while True:
                self._receive(self._socket.recv(65536))
                self._socket.settimeout(0.0)
        except (TimeoutError, BlockingIOError, ConnectionRefusedError):
            pass
        except Malformed as error:
            self.close(FLOW if str(error) == "FLOW" else PROTOCOL, str(error))
            raise
        now = time.monotonic()
        for space in (self._init, self._data):
            before = space.backoff
            space.on_timeout(now)
            self.counts["timeouts"] += space.backoff > before
        if self._hint is not None and now >= self._hint[0]:
            raise self._hint[1]
        self._flush(now)

    def _dial(self) -> socket.socket:
        dialled = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        dialled.connect(self.bundle.upstream)
        return dialled

    def rebind(self) -> None:
        """Another port of ours, as a NAT would give us; the listener asks who is there (R-8-6)."""
        self._socket.close()
        self._socket = self._dial()

    def update_keys(self) -> None:
        """R-9-1: call it at the earliest 3 PTO after a packet of the current phase was acknowledged."""
        assert self._keys is not None
        self._keys.client.update()

    @property
    def phases(self) -> tuple[int, int]:
        """Ours and the peer's, as far as it was heard."""
        assert self._keys is not None
        return self._keys.client.phase, self._keys.server.phase

    @property
    def pto(self) -> float:
        return self._data.pto

    def settled(self) -> bool:
        """Nothing waits to be sent or acknowledged."""
        return not (self.streams.waiting or self._data.queue or self._data.sent)

    def close(self, code: int = 0, reason: str = "") -> None:
        """§9: say CLOSE, answer the 1st, 2nd, 4th … packet with it again, for 3 PTO."""
        if self.closed is None and self._keys is not None:
            self.closed = Closed(code, reason)
            frame = f.write(f.CLOSE, code, reason.encode())
            self._send_data([frame], keep=False)
            until, heard, answer_at = time.monotonic() + 3 * self._data.pto, 0, 1
            while (left := until - time.monotonic()) > 0:
                self._socket.settimeout(left)
                try:
                    self._socket.recv(65536)
                except (TimeoutError, ConnectionRefusedError):
                    break
                heard += 1
                if heard == answer_at:
                    self._send_data([frame], keep=False)
                    answer_at *= 2
        self.abandon()

    def abandon(self) -> None:
        """Close the socket and say nothing."""
        self._socket.close()

    # -- sending

    def _send(self, datagram: bytes) -> None:
        if self._drop():
            self.counts["dropped"] += 1
            return
        try:
            self._socket.send(datagram)
        except ConnectionRefusedError:
            pass  # somebody says that nobody listens; only the session's own timers decide

    def _say_hello(self) -> None:
        """§4: the INIT stream from its start, under the keys of the present DCID."""
        self._hc = make_hello(self.original_dcid, self._own_cids[0], self._retry_scid)
        self._init.probing = True
        self._init.queue.clear()
        self._init.sent.clear()
        self._crypto_at = 0
        self._queue_crypto(len(self._hc).to_bytes(2, "big") + self._hc + bytes(self._tls_sent))

    def _queue_crypto(self, data: bytes) -> None:
        room = packets.MINIMUM - 43 - packets.TAG - len(self._token) - 7 - 40
        for at in range(0, len(data), room):
            piece = data[at : at + room]
            self._init.queue.append(f.write(f.CRYPTO, self._crypto_at, piece))
            self._crypto_at += len(piece)

    def _flush(self, now: float) -> None:
        if self._initial is not None:
            while self._init.queue or self._init.ack_due:
                kept = [self._init.queue.popleft()] if self._init.queue else []
                self._send_init(kept, now)
        if self._keys is None:
            return
        while self._data.ack_due or (
            len(self._data.sent) < WINDOW_PACKETS and self.streams.fill(ROOM - 15 - 530)
        ):
            room = ROOM - (len(self._ack(self._data)) if self._data.ack_due else 0)
            kept = []
            if len(self._data.sent) < WINDOW_PACKETS:
                self.streams.fill(ROOM - 15 - 530)
                while self._data.queue and room >= len(self._data.queue[0]):
                    kept.append(self._data.queue.popleft())
                    room -= len(kept[-1])
            self._send_data(kept, now)

    @staticmethod
    def _ack(space: Space) -> bytes:
        return f.write_ack(space.received.ranges)

    def _send_init(self, kept: list[bytes], now: float) -> None:
        assert self._initial is not None
        content = b"".join(kept)
        if self._init.ack_due and self._init.received.ranges:
            content = self._ack(self._init) + content
        self._init.ack_due = False
        content += packets.padding(self._token, content)
        number = self._init.next_number
        scid = self._own_cids[0]
        datagram = packets.seal_init(self._initial.client, self._dcid, scid, self._token, number, content)
        self._init.note_sent(now, kept)
        self._send(datagram)

    def _send_data(self, kept: list[bytes], now: float = 0.0, *, keep: bool = True) -> None:
        assert self._keys is not None
        content = b"".join(kept)
        if self._data.ack_due:
            content = self._ack(self._data) + content
            self._data.ack_due = False
        if self._data.next_number == self._skip_at:  # R-2-6
            self._data.skipped.add(self._skip_at)
            self._data.next_number += 1
            self._skip_at += random.randrange(256, 131073)
        datagram = packets.seal_data(self._keys.client, self._dcid, self._data.next_number, content)
        self._data.note_sent(now, kept if keep else [])
        self._send(datagram)

    # -- receiving

    def _receive(self, datagram: bytes) -> None:
        if not datagram or self._drop():
            self.counts["dropped"] += 1
        elif datagram[0] & 0x80:
            found = packets.read_long(datagram)
            if isinstance(found, packets.Retry):
                self._on_retry(found)
            elif found is not None and self._initial is not None:
                self._on_init(found, self._initial)
        elif self._keys is None:
            self._early = [*self._early, datagram][-16:]
        else:
            self._on_short(datagram, self._keys)

    def _on_retry(self, retry: packets.Retry) -> None:
        """R-4-16: the first that verifies, and none after a server INIT."""
        if self._retry_scid or self._adopted or self._initial is None or retry.dcid != self._own_cids[0]:
            return
        if not hmac.compare_digest(retry.tag, self._initial.retry_tag(self.original_dcid, retry.covered)):
            return
        self.counts["retry"] += 1
        self._retry_scid = self._dcid = retry.scid
        self._token = retry.token
        self._initial = InitialKeys(self._dcid, self.bundle.network_key)
        self._say_hello()

    def _on_init(self, init: packets.Init, initial: InitialKeys) -> None:
        content = initial.server.open(init.number, init.header, init.sealed)
        if content is None or init.dcid != self._own_cids[0] or init.number in self._init.received:
            return
        self._init.received.add(init.number)
        if not self._adopted:  # R-4-15
            self._adopted, self._dcid = True, init.scid
        for frame in f.read(content):
            if frame[0] not in IN_INIT:
                raise Malformed("INIT frame")
            self._init.ack_due |= frame[0] not in QUIET
            if frame[0] == f.ACK:
                self._init.on_ack(frame[2], frame[1], time.monotonic())
            elif frame[0] == f.CLOSE:
                self._hint = (time.monotonic() + 3 * INITIAL_PTO, Closed(frame[1], frame[2].decode()))
            elif frame[0] == f.CRYPTO:
                self._crypto_in.add(frame[1], frame[2])
        self._advance_tls()

    def _advance_tls(self) -> None:
        buffer = self._crypto_in.buffer
        if not self._hs:
            if len(buffer) < 2 or len(buffer) < 2 + int.from_bytes(buffer[:2], "big"):
                return
            size = int.from_bytes(buffer[:2], "big")
            self._hs = bytes(buffer[2 : 2 + size])
            del buffer[: 2 + size]
        if not buffer or self._keys is not None:
            buffer.clear()
            return
        try:
            self._tls.feed(bytes(buffer))
        finally:  # an alert too is output, and goes before the error does
            buffer.clear()
            if output := self._tls.output():
                self._queue_crypto(output)
                self._flush(time.monotonic())
        if self._tls.done:
            self._derive()

    def _derive(self) -> None:
        """R-4-4, R-4-8, then §3."""
        hello = read_hello(self._hs)
        if (hello[2], hello[3], hello[4]) != (self.original_dcid, self._dcid, self._retry_scid):
            raise Malformed("the echoes differ")
        if self._tls.peer != (self.bundle.domain, self.bundle.upstream_node):
            raise Closed(0x20, f"this is {self._tls.peer}, not {self.bundle.upstream_node}")
        context = context_hash(self._hc, self._hs, *self._tls.leaves())
        self._keys = ApplicationKeys(self._tls.export(context), self._tls.suite)
        for seq in (1, 2, 3):  # R-5-4
            self._issue_cid(seq)
        early, self._early = self._early, []
        for datagram in early:
            self._on_short(datagram, self._keys)

    def _issue_cid(self, seq: int) -> None:
        self._own_cids[seq] = os.urandom(8)
        self._data.queue.append(f.write(f.NEW_CID, seq, 0, self._own_cids[seq], os.urandom(16)))

    def _open(self, data: packets.Data, keys: ApplicationKeys) -> bytes | None:
        """R-9-2."""
        server = keys.server
        if data.phase == server.phase:
            return server.current.open(data.number, data.header, data.sealed)
        if data.number < self._phase_first:
            previous = server.previous
            return None if previous is None else previous.open(data.number, data.header, data.sealed)
        content = server.next.open(data.number, data.header, data.sealed)
        if content is not None:
            server.update()
            if keys.client.phase != server.phase:  # else it follows an update of ours
                keys.client.update()
            self._phase_first = data.number
        return content

    def _on_short(self, datagram: bytes, keys: ApplicationKeys) -> None:
        data = packets.read_data(keys.server, datagram)
        known = data is not None and data.cid in self._own_cids.values()
        content = self._open(data, keys) if data is not None and known else None
        if data is None or content is None:
            self.counts["not opened"] += 1
            tokens = [token for _, token in self._peer_cids.values()]
            if self.connected and packets.may_be_reset(datagram, tokens):
                raise Closed(-1, "RESET")
            return
        if data.number not in self._data.received:
            self._data.received.add(data.number)
            for frame in f.read(content):
                self._data.ack_due |= frame[0] not in QUIET
                self._on_frame(frame)

    def _on_frame(self, frame: f.Frame) -> None:
        kind, *fields = frame
        self.streams.on_frame(frame)
        self.counts["challenges"] += kind == f.PATH_CHALLENGE
        if kind == f.ACK:
            self._data.on_ack(fields[1], fields[0], time.monotonic())
        elif kind == f.HANDSHAKE_DONE:
            self.connected, self._initial = True, None
            self._init.probing = False
            self._init.sent.clear()
            self._peer_cids.setdefault(0, (self._dcid, fields[0]))
        elif kind == f.NEW_CID:
            self._on_new_cid(*fields)
        elif kind == f.RETIRE_CID and self._own_cids.pop(fields[0], None):
            self._issue_cid(max(self._own_cids) + 1)
        elif kind == f.NEW_TOKEN:
            self.token = fields[0]

    def _on_new_cid(self, seq: int, retire_prior_to: int, cid: bytes, token: bytes) -> None:
        self._peer_cids[seq] = (cid, token)
        for old in [old for old in self._peer_cids if old < retire_prior_to]:
            del self._peer_cids[old]
            self._data.queue.append(f.write(f.RETIRE_CID, old))
        if self._seq < retire_prior_to:
            self._seq = min(self._peer_cids)
            self._dcid = self._peer_cids[self._seq][0]
