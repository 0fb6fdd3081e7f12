"""Those who dial a real listener, well-behaved and not, over plain sockets and without a loop of their own."""

from __future__ import annotations

import contextlib
import os
import random
import select
import socket
import struct
import time
from collections.abc import Callable
from pathlib import Path

from stp.core import frames, packet
from stp.core.crypto_stream import CryptoSender
from stp.core.endpoint import Endpoint
from stp.core.events import NewToken
from stp.core.handshake import TlsSettings, make_context
from stp.core.initspace import ClientHandshake
from stp.core.keys import initial_keys
from stp.core.packet import INIT_DATAGRAM, TAG_LENGTH
from stp.core.params import TransportHello, TransportParameters
from stp.core.session import Session
from stp.core.states import State
from stp.identity import Identity
from tests.identity_kit import NETWORK_KEY
from tests.real.listener import NODE, endpoint

Address = tuple[str, int]
_IN_PKTINFO = struct.Struct("=i4s4s")
IP_PKTINFO = 8


class Dialler:
    """One session and its socket; `pump` does what a carrier does."""

    def __init__(self, bundle: Path, to: Address, *, host: str = "127.0.0.1") -> None:
        self.to = to
        self.socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.socket.bind((host, 0))
        self.socket.setblocking(False)
        self.endpoint: Endpoint = endpoint(bundle, accept=False)
        self.session: Session
        self.echoed = 0
        self.sent: list[bytes] = []
        self.token = b""

    def connect(self, *, token: bytes = b"", limit: float = 5.0) -> float:
        """Seconds until connected. Raises TimeoutError."""
        self.session = self.endpoint.connect(self.to, expected_node=NODE, now=time.monotonic(), token=token)
        return self.until(lambda: self.session.state is State.ESTABLISHED, limit)

    def until(self, condition: Callable[[], bool], limit: float) -> float:
        start = time.monotonic()
        self.pump()
        while not condition():
            left = start + limit - time.monotonic()
            if left <= 0:
                raise TimeoutError(f"not within {limit} s")
            due = self.endpoint.next_timeout()
            wait = left if due is None else min(left, max(0.0, due - time.monotonic()))
            select.select([self.socket], [], [], wait)
            self.pump()
        return time.monotonic() - start

    def pump(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while True:
                data, addr = self.socket.recvfrom(65_536)
                self.endpoint.receive(data, addr, time.monotonic())
        self.endpoint.handle_timeout(time.monotonic())
        for session in self.endpoint.take_ready():
            while (event := session.next_event()) is not None:
                if isinstance(event, NewToken):
                    self.token = event.token
            for stream in list(session._streams.recv):
                self.echoed += len(session.read(stream)) if not stream else 0
        for sent in self.endpoint.datagrams_to_send(time.monotonic()):
            size = sent.segment_size or len(sent.data)
            for at in range(0, len(sent.data), size):
                self.raw(sent.data[at : at + size])

    def raw(self, datagram: bytes) -> None:
        self.sent.append(datagram)
        with contextlib.suppress(BlockingIOError):
            self.socket.sendto(datagram, self.to)

    def ask(self, limit: float = 5.0) -> float:
        """Seconds for a few bytes there and back."""
        wanted = self.echoed + 8
        self.session.write(0, b"12345678")
        return self.until(lambda: self.echoed >= wanted, limit)

    def packet(self, *said: frames.Frame) -> bytes:
        """A DATA packet by hand, under the keys of the session."""
        space = self.session._data
        assert space is not None
        space.sealer.run()
        return space.sealer.seal(b"".join(frame.encode() for frame in said))

    def close(self) -> None:
        self.socket.close()


class Spoofer:
    """Sends from any address of 127/8, which needs no privilege."""

    def __init__(self, to: Address) -> None:
        self.to = to
        self.socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 << 20)
        self.socket.bind(("0.0.0.0", 0))
        self.sent = 0

    def send(self, datagram: bytes, number: int) -> None:
        """From the address with that number: 127.1.0.0 is the first."""
        source = (0x7F010000 + number).to_bytes(4, "big")
        ancillary = [(socket.IPPROTO_IP, IP_PKTINFO, _IN_PKTINFO.pack(0, source, bytes(4)))]
        self.socket.sendmsg([datagram], ancillary, 0, self.to)
        self.sent += 1

    def close(self) -> None:
        self.socket.close()


def tokenless_inits(count: int) -> list[bytes]:
    """INITs that open and ask for state."""
    rng = random.Random(1)
    made = []
    for _ in range(count):
        dcid = rng.randbytes(8)
        header = packet.init_header(dcid, rng.randbytes(8), b"", 7)
        room = INIT_DATAGRAM - len(header) - TAG_LENGTH
        made.append(
            header + initial_keys(dcid, NETWORK_KEY).client.seal(7, bytes(room - 1) + b"\x01", header)
        )
    return made


class Quitter:
    """A client that gets as far as state on the listener, its first flight taken, and falls silent.

    Cheap to make: all of them show the same ClientHello.
    """

    hello = b""

    def __init__(self, bundle: Path) -> None:
        self.cid, self.dcid = os.urandom(8), os.urandom(8)
        if not Quitter.hello:
            credentials = Identity.load(bundle).credentials
            made = ClientHandshake(
                make_context(TlsSettings(credentials), server=False),
                credentials.chain_der[0],
                expected_node=NODE,
                expected_domain=None,
                cid=self.cid,
                parameters=TransportParameters(),
                network_key=NETWORK_KEY,
                token=b"",
                random_bytes=os.urandom,
                now=0.0,
            )
            Quitter.hello = made._client_hello

    def first(self) -> bytes:
        """Draws a Retry."""
        return self._init(self.dcid, b"", frames.Ping().encode())

    def flight(self, retry: bytes) -> list[bytes]:
        """What follows the Retry: hello and ClientHello, in two datagrams."""
        answer = packet.parse_retry(retry)
        hello = TransportHello(
            original_dcid=self.dcid, cid=self.cid, retry_scid=answer.scid, parameters=TransportParameters()
        ).encode()
        stream = CryptoSender()
        stream.write(len(hello).to_bytes(2, "big") + hello + Quitter.hello)
        datagrams = []
        while stream.has_pending():
            offset, data = stream.next_chunk(1000)
            datagrams.append(self._init(answer.scid, answer.token, frames.Crypto(offset, data).encode()))
        return datagrams

    def _init(self, dcid: bytes, token: bytes, payload: bytes) -> bytes:
        header = packet.init_header(dcid, self.cid, token, int.from_bytes(os.urandom(3), "big"))
        padded = payload.ljust(INIT_DATAGRAM - len(header) - TAG_LENGTH, b"\0")
        number = int.from_bytes(header[-4:], "big")
        return header + initial_keys(dcid, NETWORK_KEY).client.seal(number, padded, header)
