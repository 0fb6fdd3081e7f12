"""One bulk transfer between two processes, over STP and over what one would use instead.

Each kind is a pair of coroutine functions, `serve` and `send`, run in a process of its own by bench.transport:

    python -m bench.carriers serve KIND DIRECTORY SIZE PACKET      prints the port, then seconds and bytes as JSON
    python -m bench.carriers send KIND DIRECTORY SIZE PACKET PORT

The receiver measures, from the first byte to the last. Packets have PACKET bytes of UDP payload, if the kind can make
them so large; TLS on TCP, which has none, writes as many bytes at a time. Everything is authenticated and encrypted;
but for DTLS, which promises no delivery, all bytes arrive.
"""

from __future__ import annotations

import asyncio
import functools
import json
import os
import socket
import ssl
import sys
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import trio

from stp.carriers.udp import LOOPBACK_DATAGRAM, UdpCarrier
from stp.core.endpoint import Endpoint, EndpointConfig
from stp.core.errors import ErrorCode
from stp.core.events import Connected, SessionClosed, StreamOpened, StreamReadable, StreamWritable
from stp.core.session import Session
from stp.identity import ContextCache, Identity, TimeFloor

HOST: Final = "127.0.0.1"
PACKET = 1200
"""Bytes; the command line says otherwise."""
QUIC_PACKET: Final = 16_000
"""Bytes: both QUIC libraries write lengths in two bytes, of which QUIC takes two bits."""
DTLS_RECORD: Final = 16_384
"""Bytes of plaintext that a DTLS record holds at most: larger packets it cannot make."""
CHUNK: Final = 64 * 1024
"""Bytes of one write; a stream says that it is writable from that much room on."""
LIMITS: Final = ("max_half_open", "address_half_open", "address_rate", "total_rate")
"""What an endpoint lets strangers do (protocol §4, Limits)."""
QUIET: Final = 0.5
"""Seconds without a packet after which a DTLS transfer counts as over."""


class Meter:
    """Bytes, and the time (of the clock, of the CPU) between the first and the last of them."""

    def __init__(self) -> None:
        self.bytes = 0
        self.first = self.last = 0.0
        self.cpu = 0.0

    def add(self, size: int) -> None:
        self.last = time.perf_counter()
        if not self.bytes:
            self.first = self.last
            self.cpu = time.process_time()
        self.bytes += size

    def report(self) -> None:
        cpu = time.process_time() - self.cpu
        found = {"bytes": self.bytes, "seconds": self.last - self.first, "cpu_seconds": cpu}
        print(json.dumps(found), flush=True)


def say_port(port: int) -> None:
    print(port, flush=True)


# -- STP


def stp_endpoint(
    directory: Path, name: str, *, accept: bool, unlimited: bool = False, congestion: str = ""
) -> Endpoint:
    """`unlimited`: any number of handshakes of one address, and one TLS context for all of them.

    `congestion`: one of the endpoint's controllers, by default the default.
    """
    lifted: dict[str, Any] = dict.fromkeys(LIMITS, 1_000_000) if unlimited else {}
    if congestion:
        lifted["congestion"] = congestion
    identity = Identity.load(directory / f"{name}.pem")
    contexts = ContextCache(identity, TimeFloor())
    return Endpoint(
        EndpointConfig(
            tls=functools.cache(contexts.tls) if unlimited else contexts.tls,
            leaf_der=identity.leaf_der,
            network_keys=identity.network_keys,
            accept=accept,
            random_bytes=os.urandom,
            datagram=PACKET,
            max_datagram=max(PACKET, LOOPBACK_DATAGRAM),
            **lifted,
        )
    )


async def serve_stp(directory: Path, size: int) -> None:
    meter, over = Meter(), trio.Event()
    taken: dict[int, int] = {}

    def on_ready(session: Session) -> None:
        while (event := session.next_event()) is not None:
            match event:
                case StreamReadable(stream=stream) | StreamOpened(stream=stream):
                    data = session.read(stream)
                    if data:
                        meter.add(len(data))
                        if meter.bytes >= size:
                            session.close(ErrorCode.NO_ERROR, "all here", trio.current_time())
                            over.set()
                            return
                        taken[stream] = taken.get(stream, 0) + len(data)
                        session.advance_credit(stream, taken[stream])
                case SessionClosed(code=code, reason=reason) if not over.is_set():
                    raise RuntimeError(f"session closed: {code} {reason}")

    carrier = await UdpCarrier.bind(stp_endpoint(directory, "server", accept=True), HOST, on_ready=on_ready)
    async with trio.open_nursery() as nursery:
        await nursery.start(carrier.run)
        say_port(carrier.local_address[1])
        await over.wait()
        carrier.close()
    meter.report()


async def send_stp(directory: Path, size: int, port: int) -> None:
    endpoint = stp_endpoint(directory, "client", accept=False)
    chunk, over = bytes(CHUNK), trio.Event()
    left = size
    stream = -1

    def on_ready(session: Session) -> None:
        nonlocal left, stream
        while (event := session.next_event()) is not None:
            match event:
                case Connected():
                    stream = session.open_stream()
                case SessionClosed(code=ErrorCode.NO_ERROR):
                    over.set()
                    return
                case SessionClosed(code=code, reason=reason):
                    raise RuntimeError(f"session closed: {code} {reason}")
                case StreamWritable():
                    pass
        while stream >= 0 and left and session.room(stream) >= CHUNK:
            session.write(stream, chunk)
            left -= CHUNK

    carrier = await UdpCarrier.bind(endpoint, HOST, on_ready=on_ready)
    async with trio.open_nursery() as nursery:
        await nursery.start(carrier.run)
        endpoint.connect((HOST, port), expected_node="server", now=trio.current_time())
        carrier.wake()
        await over.wait()
        carrier.close()


# -- QUIC, twice: qh3 is a fork of aioquic with the same interface


def quic_modules(kind: str) -> tuple[ModuleType, ModuleType, ModuleType]:
    from importlib import import_module

    return (
        import_module(f"{kind}.asyncio"),
        import_module(f"{kind}.quic.configuration"),
        import_module(f"{kind}.quic.events"),
    )


def quic_configuration(configuration: ModuleType, *, client: bool) -> Any:
    return configuration.QuicConfiguration(
        is_client=client,
        alpn_protocols=["bench"],
        max_datagram_size=min(PACKET, QUIC_PACKET),
        max_data=16 * 1024 * 1024,
        max_stream_data=16 * 1024 * 1024,
        verify_mode=ssl.CERT_NONE,
    )


async def serve_quic(kind: str, directory: Path, size: int) -> None:
    quic, configuration, events = quic_modules(kind)
    meter, over = Meter(), asyncio.Event()

    class Receiver(quic.QuicConnectionProtocol):  # type: ignore[misc, name-defined]
        def quic_event_received(self, event: Any) -> None:
            if isinstance(event, events.StreamDataReceived):
                meter.add(len(event.data))
                if meter.bytes >= size:
                    over.set()

    settings = quic_configuration(configuration, client=False)
    settings.load_cert_chain(str(directory / "server.crt"), str(directory / "server.key"))
    server = await quic.serve(HOST, 0, configuration=settings, create_protocol=Receiver)
    say_port(server._transport.get_extra_info("sockname")[1])
    await over.wait()
    meter.report()
    await asyncio.sleep(0.05)  # the last ACKs
    server.close()


async def send_quic(kind: str, directory: Path, size: int, port: int) -> None:
    quic, configuration, events = quic_modules(kind)
    over = asyncio.Event()

    class Sender(quic.QuicConnectionProtocol):  # type: ignore[misc, name-defined]
        def quic_event_received(self, event: Any) -> None:
            if isinstance(event, events.ConnectionTerminated):
                over.set()

    settings = quic_configuration(configuration, client=True)
    settings.server_name = "server"
    async with quic.connect(HOST, port, configuration=settings, create_protocol=Sender) as protocol:
        stream = protocol._quic.get_next_available_stream_id(is_unidirectional=True)
        protocol._quic.send_stream_data(stream, bytes(size), end_stream=True)
        protocol.transmit()
        await over.wait()


# -- DTLS, of trio


def dtls_context(directory: Path) -> Any:
    from OpenSSL import SSL

    context = SSL.Context(SSL.DTLS_METHOD)
    context.use_certificate_file(str(directory / "server.crt"))
    context.use_privatekey_file(str(directory / "server.key"))
    return context


def dtls_endpoint() -> trio.DTLSEndpoint:
    sock = trio.socket.socket(type=trio.socket.SOCK_DGRAM)
    sock.setsockopt(trio.socket.SOL_SOCKET, trio.socket.SO_RCVBUF, 8 * 1024 * 1024)
    return trio.DTLSEndpoint(sock, incoming_packets_buffer=10_000)


async def serve_dtls(directory: Path, size: int) -> None:
    meter = Meter()
    endpoint = dtls_endpoint()
    await endpoint.socket.bind((HOST, 0))
    say_port(endpoint.socket.getsockname()[1])

    async def receive(channel: trio.DTLSChannel) -> None:
        await channel.do_handshake()
        meter.add(len(await channel.receive()))
        while meter.bytes < size:
            with trio.move_on_after(QUIET) as scope:
                meter.add(len(await channel.receive()))
            if scope.cancelled_caught:
                break
        nursery.cancel_scope.cancel()

    async with trio.open_nursery() as nursery:
        await endpoint.serve(dtls_context(directory), receive)
    meter.report()


async def send_dtls(directory: Path, size: int, port: int) -> None:
    from OpenSSL import SSL

    endpoint = dtls_endpoint()
    channel = endpoint.connect((HOST, port), SSL.Context(SSL.DTLS_METHOD))
    await channel.do_handshake()
    channel.set_ciphertext_mtu(PACKET)
    packet = bytes(min(channel.get_cleartext_mtu(), DTLS_RECORD))
    for _ in range(0, size, len(packet)):
        await channel.send(packet)
    await trio.sleep(2 * QUIET)


# -- TLS on TCP, of the standard library


def serve_tls(directory: Path, size: int) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(directory / "server.crt", directory / "server.key")
    meter = Meter()
    with socket.create_server((HOST, 0)) as listener:
        say_port(listener.getsockname()[1])
        plain, _ = listener.accept()
        with context.wrap_socket(plain, server_side=True) as stream:
            while meter.bytes < size:
                data = stream.recv(CHUNK)
                if not data:
                    break
                meter.add(len(data))
            meter.report()
            stream.sendall(b"all here")


def send_tls(directory: Path, size: int, port: int) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with context.wrap_socket(socket.create_connection((HOST, port))) as stream:
        piece = bytes(PACKET)
        for _ in range(0, size, PACKET):
            stream.sendall(piece)
        stream.recv(CHUNK)


KINDS: Final = ("stp", "aioquic", "qh3", "dtls", "tls")


def main(argv: list[str]) -> None:
    global PACKET
    verb, kind, directory, size, PACKET = argv[0], argv[1], Path(argv[2]), int(argv[3]), int(argv[4])
    more = (int(argv[5]),) if verb == "send" else ()
    if kind == "tls":
        (send_tls if verb == "send" else serve_tls)(directory, size, *more)
        return
    if kind in ("aioquic", "qh3"):
        quic = send_quic if verb == "send" else serve_quic
        work: Callable[..., Coroutine[Any, Any, None]] = quic  # type: ignore[assignment]
        asyncio.run(work(kind, directory, size, *more))
        return
    table = {
        ("serve", "stp"): serve_stp,
        ("send", "stp"): send_stp,
        ("serve", "dtls"): serve_dtls,
        ("send", "dtls"): send_dtls,
    }
    trio.run(table[verb, kind], directory, size, *more)  # type: ignore[arg-type]


if __name__ == "__main__":
    main(sys.argv[1:])
