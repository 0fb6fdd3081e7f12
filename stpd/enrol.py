"""The enrolment door: HTTP/1.1 over TLS 1.3 on 8443, for strangers with a token (protocol §11).

What is asked and answered stands in `stpd.issuing`; here are the socket and its limits.

(1) At most MAX_CONNECTIONS at once and MAX_PER_ADDRESS from one address; one more is closed unread.
(2) One request per connection, complete and answered within DEADLINE, its body at most MAX_BODY bytes.
(3) TRIES_PER_MINUTE per address, FORWARDED_PER_MINUTE for a gateway that shows who it is. A try that
    succeeded is given back: the limit is for those who guess.
(4) The table of addresses is bounded; the one not heard from for longest goes first.
(5) An address is an IPv4 /32 or an IPv6 /64.
"""

from __future__ import annotations

import json
import math
import os
import ssl
import tempfile
from collections import OrderedDict
from ipaddress import IPv6Address, ip_address
from typing import Any, Final

import h11
import structlog
import trio
from attrs import define, field

from stp.enrol import Refusal, parse_host
from stp.identity import Identity, pem_block
from stp.pinned import ALPN, MAX_BODY
from stpd.issuing import FORWARDER_HEADER, SIGNATURE_HEADER, Answer, Issuer, answer_of
from stpd.keys import RefusedError

log = structlog.get_logger("stpd.enrol")

MAX_CONNECTIONS: Final = 64
MAX_PER_ADDRESS: Final = 8
DEADLINE: Final = 10.0
"""Seconds from accept to the last byte of the answer."""
TRIES_PER_MINUTE: Final = 5
FORWARDED_PER_MINUTE: Final = 60
MAX_ADDRESSES: Final = 4096
MAX_HEADERS: Final = 16 * 1024
WORKERS: Final = 4
"""Requests being signed, or asked of the hub, at once."""
LINGER: Final = 1.0
"""Seconds for which the rest of a refused body is read, so that the answer is not lost in a TCP reset."""

REASONS: Final = {
    200: b"OK",
    400: b"Bad Request",
    403: b"Forbidden",
    404: b"Not Found",
    405: b"Method Not Allowed",
}


@define
class DoorStatistics:
    """Counts since start, and what is open now."""

    open: int = 0
    accepted: int = 0
    refused_full: int = 0
    """Closed unread because MAX_CONNECTIONS or MAX_PER_ADDRESS were open."""
    refused_tries: int = 0
    late: int = 0
    """Not through within DEADLINE."""
    broken: int = 0
    """TLS or HTTP that was none, or a connection that broke."""


class Tries:
    """Token buckets by address; (3), (4). Not for threads (R-11-8)."""

    def __init__(self, limit: int = MAX_ADDRESSES) -> None:
        self._limit = limit
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()
        self._told: OrderedDict[str, float] = OrderedDict()

    def take(self, key: str, per_minute: int, now: float) -> float:
        """0.0: go ahead. Otherwise the seconds to wait."""
        left, since = self._buckets.pop(key, (float(per_minute), now))
        left = min(float(per_minute), left + (now - since) * per_minute / 60.0)
        wait = 0.0 if left >= 1.0 else (1.0 - left) * 60.0 / per_minute
        self._buckets[key] = (left - 1.0 if not wait else left, now)
        if len(self._buckets) > self._limit:
            self._buckets.popitem(last=False)
        return wait

    def give_back(self, key: str) -> None:
        if key in self._buckets:
            left, since = self._buckets[key]
            self._buckets[key] = (left + 1.0, since)

    def worth_telling(self, key: str, now: float) -> bool:
        """True once a minute for an address that goes on trying: the log is no toy of strangers."""
        if now - self._told.get(key, -math.inf) < 60.0:
            return False
        self._told[key] = now
        if len(self._told) > self._limit:
            self._told.popitem(last=False)
        return True

    def __len__(self) -> int:
        return len(self._buckets)


def address_key(host: str) -> str:
    """(5)"""
    try:
        address = ip_address(host.partition("%")[0])
    except ValueError:
        return host
    if not isinstance(address, IPv6Address):
        return str(address)
    if address.ipv4_mapped is not None:
        return str(address.ipv4_mapped)
    return str(IPv6Address(int(address) >> 64 << 64))


def server_context(identity: Identity) -> ssl.SSLContext:
    """TLS 1.3 with our certificate and our anchors after it (joiners know the CA by its fingerprint only).

    Asks for no client certificate. No callbacks, no tickets. Raises ssl.SSLError, OSError.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.num_tickets = 0
    context.set_alpn_protocols([ALPN.decode()])
    own = identity.credentials
    blocks = [pem_block("PRIVATE KEY", own.key_der)]
    blocks += [pem_block("CERTIFICATE", der) for der in (*own.chain_der, *own.anchors_der)]
    load_chain(context, "".join(blocks).encode())
    return context


def load_chain(context: ssl.SSLContext, pem: bytes) -> None:
    """`load_cert_chain` from memory: the key touches no disk where the kernel has memfd_create."""
    if hasattr(os, "memfd_create"):
        fd = os.memfd_create("identity", os.MFD_CLOEXEC)
        with os.fdopen(fd, "wb") as memory:
            memory.write(pem)
            memory.flush()
            context.load_cert_chain(f"/proc/self/fd/{fd}")
        return
    with tempfile.NamedTemporaryFile() as file:  # mode 0600
        file.write(pem)
        file.flush()
        context.load_cert_chain(file.name)


class Begun(trio.abc.HalfCloseableStream):
    """A stream of which somebody has read a part already."""

    def __init__(self, stream: trio.SocketStream, first: bytes) -> None:
        self._stream = stream
        self._first = first

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await self._stream.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        await self._stream.wait_send_all_might_not_block()

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        if not self._first:
            return await self._stream.receive_some(max_bytes)
        size = len(self._first) if max_bytes is None else max_bytes
        found, self._first = self._first[:size], self._first[size:]
        await trio.lowlevel.checkpoint()
        return found

    async def send_eof(self) -> None:
        await self._stream.send_eof()

    async def aclose(self) -> None:
        await self._stream.aclose()


@define
class _Request:
    path: str = ""
    host: str = ""
    forwarder: str = ""
    signature: str = ""
    body: bytes = b""
    whole: bool = True
    """False: the answer is known before the body was read."""


@define
class EnrolmentDoor:
    """Serves one Issuer on any number of listeners."""

    issuer: Issuer
    deadline: float = DEADLINE
    statistics: DoorStatistics = field(factory=DoorStatistics)
    _tries: Tries = field(factory=Tries)
    _open: dict[str, int] = field(factory=dict)
    _workers: trio.CapacityLimiter = field(factory=lambda: trio.CapacityLimiter(WORKERS))
    _context: tuple[Identity, ssl.SSLContext] | None = None

    async def serve(
        self,
        listen: str,
        *,
        task_status: trio.TaskStatus[list[trio.SocketListener]] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Listen on "host:port" until cancelled. Raises OSError naming the address where that fails."""
        host, port = parse_host(listen)
        try:
            listeners = await trio.open_tcp_listeners(port, host=host)
        except OSError as exc:
            raise OSError(exc.errno, f"enrol.listen: cannot listen on {listen}: {exc.strerror}") from exc
        self.tls()  # a bad identity is an error now, not at the first joiner
        await trio.serve_listeners(self._admit, listeners, task_status=task_status)

    def tls(self) -> ssl.SSLContext:
        """The context of the identity as of now."""
        identity = self.issuer.identity()
        if self._context is None or self._context[0] is not identity:
            self._context = identity, server_context(identity)
        return self._context[1]

    async def serve_begun(self, stream: trio.SocketStream, first: bytes, host: str) -> None:
        """A connection that somebody else accepted, who has read `first` of it. Closes it."""
        await self._admit(Begun(stream, first), host)

    async def _admit(self, stream: trio.SocketStream | Begun, host: str = "") -> None:
        """One connection from its first byte to its last; raises nothing but cancellation."""
        if isinstance(stream, trio.SocketStream):
            try:
                host = stream.socket.getpeername()[0]
            except OSError:
                await trio.aclose_forcefully(stream)
                return
        key = address_key(host)
        mine = self._open.get(key, 0)
        if mine >= MAX_PER_ADDRESS or self.statistics.open >= MAX_CONNECTIONS:
            self.statistics.refused_full += 1
            await trio.aclose_forcefully(stream)
            return
        self.statistics.accepted += 1
        self.statistics.open += 1
        self._open[key] = mine + 1
        try:
            with trio.move_on_after(self.deadline) as scope:
                await self._converse(stream, host, key)
            if scope.cancelled_caught:
                self.statistics.late += 1
        finally:
            self.statistics.open -= 1
            self._open[key] -= 1
            if not self._open[key]:
                del self._open[key]
            with trio.CancelScope(shield=True):
                await trio.aclose_forcefully(stream)

    async def _converse(self, socket: trio.SocketStream | Begun, host: str, key: str) -> None:
        try:
            stream = trio.SSLStream(socket, self.tls(), server_side=True, https_compatible=True)
            http = h11.Connection(h11.SERVER, max_incomplete_event_size=MAX_HEADERS)
            status, body = await self._answer(stream, http, host, key)
            await _respond(stream, http, status, body)
            if http.their_state is h11.SEND_BODY:
                await socket.send_eof()
                await _drain(stream)
        except (
            trio.BrokenResourceError,
            trio.ClosedResourceError,
            h11.ProtocolError,
            ssl.SSLError,
            OSError,
        ) as exc:
            self.statistics.broken += 1
            log.debug("enrol_connection_broken", address=host, reason=type(exc).__name__)

    async def _answer(
        self, stream: trio.SSLStream[trio.SocketStream | Begun], http: h11.Connection, host: str, key: str
    ) -> Answer:
        request, early = await _read(stream, http)
        if early is not None:
            return early
        charged, rate = key, TRIES_PER_MINUTE
        node = self.issuer.forwarder(request.body, request.forwarder, request.signature)
        if node is not None:
            charged, rate = f"node:{node}", FORWARDED_PER_MINUTE
        wait = self._tries.take(charged, rate, trio.current_time())
        if wait:
            self.statistics.refused_tries += 1
            if self._tries.worth_telling(charged, trio.current_time()):
                log.warning("enrol_too_many_tries", address=host, forwarder=node)
            return answer_of(
                RefusedError(
                    Refusal.TOO_MANY, "too many tries from this address", f"try again in {math.ceil(wait)} s"
                )
            )
        status, body = await trio.to_thread.run_sync(
            lambda: self.issuer.answer(request.path, request.body, host=request.host, address=host),
            limiter=self._workers,
            abandon_on_cancel=True,  # what it wrote by then stands, and asking again costs nothing
        )
        if status == 200:
            self._tries.give_back(charged)
        return status, body


async def _read(
    stream: trio.SSLStream[trio.SocketStream | Begun], http: h11.Connection
) -> tuple[_Request, Answer | None]:
    """One request, or what to answer without having read all of it. Raises h11.RemoteProtocolError."""
    request, body = _Request(), bytearray()
    while True:
        event = http.next_event()
        if event is h11.NEED_DATA:
            if http.they_are_waiting_for_100_continue:
                await stream.send_all(
                    http.send(h11.InformationalResponse(status_code=100, headers=[])) or b""
                )
            http.receive_data(bytes(await stream.receive_some(16384)))
        elif isinstance(event, h11.Request):
            if event.method != b"POST":
                return request, (405, _plain("only POST is answered here"))
            request.path = event.target.decode("ascii", "replace")
            for name, value in event.headers:
                _note_header(request, name, value)
            if not _fits(event):
                return request, (413, _plain(f"the body is longer than {MAX_BODY} bytes"))
        elif isinstance(event, h11.Data):
            body += event.data
            if len(body) > MAX_BODY:
                return request, (413, _plain(f"the body is longer than {MAX_BODY} bytes"))
        elif isinstance(event, h11.EndOfMessage):
            request.body = bytes(body)
            return request, None
        else:
            raise h11.RemoteProtocolError("hung up before the request was complete")


def _note_header(request: _Request, name: bytes, value: bytes) -> None:
    text = value.decode("latin-1")
    if name == b"host":
        request.host = text[:300]
    elif name == FORWARDER_HEADER.encode():
        request.forwarder = text
    elif name == SIGNATURE_HEADER.encode():
        request.signature = text


def _fits(event: h11.Request) -> bool:
    declared = next((value for name, value in event.headers if name == b"content-length"), b"0")
    return len(declared) <= 10 and int(declared) <= MAX_BODY


def _plain(cause: str) -> dict[str, Any]:
    return {"error": Refusal.BAD_REQUEST.value, "cause": cause, "advice": "use stp join or stpd join"}


async def _respond(
    stream: trio.SSLStream[trio.SocketStream | Begun], http: h11.Connection, status: int, body: dict[str, Any]
) -> None:
    content = json.dumps(body).encode()
    response = h11.Response(
        status_code=status,
        reason=REASONS.get(status, b"Refused"),
        headers=[
            ("content-type", "application/json"),
            ("content-length", str(len(content))),
            ("cache-control", "no-store"),
            ("connection", "close"),
        ],
    )
    out = (http.send(response) or b"") + (http.send(h11.Data(data=content)) or b"")
    await stream.send_all(out + (http.send(h11.EndOfMessage()) or b""))


async def _drain(stream: trio.SSLStream[trio.SocketStream | Begun]) -> None:
    """Read on for a moment: closing on unread bytes sends a reset that overtakes the answer."""
    with trio.move_on_after(LINGER):
        read = 0
        while read < 4 * MAX_BODY:
            chunk = await stream.receive_some(16384)
            if not chunk:
                return
            read += len(chunk)
