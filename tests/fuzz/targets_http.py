"""The HTTP doors: management requests by an operator, and enrolment bodies by a stranger with a token."""

from __future__ import annotations

import atexit
import json
import re
import tempfile
from pathlib import Path
from typing import Any

import structlog
import trio
from cryptography.hazmat.primitives.serialization import Encoding

from stp.enrol import make_csr, new_key
from stp.proxy import Asker, Proxy, ProxyError
from stpd.api import ManagementServer, Operator, Role
from stpd.events import TooManyWatchersError
from stpd.httpd import Connection, Request, Response
from stpd.issuing import Issuer
from stpd.keys import JoinTokens, NodeRegistry
from stpd.pki import CertificateAuthority
from tests.fuzz.engine import Target
from tests.identity_kit import shared

HEAD = b" HTTP/1.1\r\nHost: stpd\r\n"
WORDS = [
    *(
        b"GET ",
        b"POST ",
        b"DELETE ",
        b"/v1/",
        b"/v1/keys",
        b"%2e%2e/",
        b"%00",
        b"\r\n",
        b"\r\n\r\n",
        b"HTTP/1.1",
    ),
    *(
        b"Content-Length: 5\r\n",
        b"Transfer-Encoding: chunked\r\n",
        b"Expect: 100-continue\r\n",
        b"Host: x\r\n",
    ),
    *(
        b"Connection: close\r\n",
        b"[" * 5000,
        b"{",
        b"}",
        b"1e999",
        b"NaN",
        b'"role"',
        b"ffff\r\n",
        b"0\r\n\r\n",
    ),
]
LENGTH = re.compile(rb"Content-Length: \d+")


def measure(data: bytes) -> bytes:
    """The first request's Content-Length made right."""
    head, gap, body = data.partition(b"\r\n\r\n")
    return LENGTH.sub(b"Content-Length: %d" % len(body), head, count=1) + gap + body


class Quiet(ManagementServer):
    """Keeps no audit log of what never was."""

    def _audit(self, operator: Operator, request: Request, status: int) -> None:
        pass


class Refused(Exception):
    """Nothing was answered with success."""


class Wire(trio.abc.Stream):
    """A client that sends `data` in pieces, closes its side, and keeps what it is told."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._step = 1 + (sum(data[-2:]) if data else 0)
        self.answer = b""

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        chunk, self._data = self._data[: self._step], self._data[self._step :]
        return chunk

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        self.answer += data

    async def wait_send_all_might_not_block(self) -> None:
        pass

    async def aclose(self) -> None:
        pass


class Nothing:
    """A daemon with nothing in it: every question has an empty answer."""

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments: []

    def events(self) -> Any:
        raise TooManyWatchersError("one is too many")


def management() -> Target:
    """Whatever an operator sends, the handlers raise only what becomes an answer."""
    faults: list[BaseException] = []
    server = Quiet(managed=Nothing(), context=lambda: None, domain="test")  # type: ignore[arg-type]
    operator = Operator(name="fuzz", role=Role.OPERATOR, serial=1)

    async def respond(request: Request) -> Response:
        return await server._respond(operator, request)

    def feed(data: bytes) -> None:
        wire = Wire(data)
        faults.clear()
        trio.run(Connection(wire, faults.append).serve, respond)
        if faults:
            raise faults[0]
        if wire.answer and not wire.answer.startswith(b"HTTP/1.1 "):
            raise AssertionError(f"answered {wire.answer[:40]!r}")
        if b"HTTP/1.1 20" not in wire.answer:
            raise Refused

    body = b'{"role": "gateway", "uses": 1, "ttl_s": 86400, "tags": ["a"]}'
    create = b"POST /v1/keys" + HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body
    chunked = (
        b"POST /v1/keys"
        + HEAD
        + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n" % len(body)
        + body
        + b"\r\n0\r\n\r\n"
    )
    gets = [
        b"GET " + path + HEAD + b"\r\n"
        for path in (b"/v1/status", b"/v1/sessions/a%20b?x=1&y", b"/v1/events")
    ]
    return Target(
        name="management",
        feed=feed,
        seeds=[*gets, gets[0] * 3, create, chunked, create + gets[0], b"DELETE /v1/keys/a1" + HEAD + b"\r\n"],
        promised=(Refused,),
        words=WORDS,
        repair=measure,
    )


def enrolment() -> Target:
    """What a stranger posts to the enrolment door, with a token that is good and a name that is free."""
    directory = tempfile.TemporaryDirectory(prefix="stpd-fuzz-")
    atexit.register(directory.cleanup)
    home = Path(directory.name)
    authority = CertificateAuthority.create("test")
    tokens = JoinTokens(home / "keys.json", authority.der)
    token = tokens.create("device", 0, 3600.0).token
    registry = NodeRegistry(home / "nodes.json")
    identity = shared().identity("hub")
    issuer = Issuer(identity=lambda: identity, registry=registry, authority=authority, tokens=tokens)

    def feed(data: bytes) -> None:
        path, _, body = data.partition(b"\n")
        with structlog.testing.capture_logs():
            status, answer = issuer.answer(
                path.decode("latin-1"), body, host="hub.example", address="192.0.2.1"
            )
        json.dumps(answer)
        assert status in (200, 400, 403, 409), answer
        if status != 200:
            raise Refused

    key = new_key()
    csr = make_csr(key, "dev-1").public_bytes(Encoding.PEM).decode()
    chain = shared().bundle("gw-1").decode()
    enrol = {"token": token, "name": "dev-1", "csr": csr, "kind": "device"}
    renew = {"csr": csr, "chain": chain[chain.index("-----BEGIN CERT") :], "signature": "MEUCIQ=="}
    return Target(
        name="enrolment",
        feed=feed,
        seeds=[
            b"/v1/enrol\n" + json.dumps(enrol).encode(),
            b"/v1/enrol\n" + json.dumps({**enrol, "name": "../x"}).encode(),
            b"/v1/renew\n" + json.dumps(renew).encode(),
        ],
        promised=(Refused,),
        words=[*WORDS[-9:], b'"token"', b'"csr"', b'"name": 1', b"\\n", b"\\ud800", b"/v1/renew\n", b"null"],
    )


def proxy() -> Target:
    """What a proxy answers to CONNECT, in pieces of 1 to 256 bytes."""

    def feed(data: bytes) -> None:
        asker = Asker(Proxy("proxy.lan", 3128, "user:secret"), "gw.example", 8443)
        step = data[-1] + 1 if data else 1
        try:
            for at in range(0, len(data), step):
                asker.receive(data[at : at + step])
                if asker.granted:
                    return
            asker.receive(b"")
        except ProxyError as error:
            if "secret" in str(error) or len(str(error)) > 500:
                raise AssertionError(f"this is for people: {error}") from error
            raise

    return Target(
        name="proxy",
        feed=feed,
        seeds=[
            b"HTTP/1.1 200 Connection established\r\nVia: 1.1 proxy\r\n\r\n",
            b"HTTP/1.0 200 OK\r\n\r\n",
            b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n",
            b'HTTP/1.1 407 No\r\nProxy-Authenticate: Basic realm="x"\r\nContent-Length: 2\r\n\r\nno',
            b"HTTP/1.1 502 Bad Gateway\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        ],
        promised=(ProxyError,),
        words=[
            *WORDS[7:],
            b"HTTP/1.1 101 Switching\r\n",
            b"HTTP/1.1 100 C\r\n\r\n",
            b"x" * 20_000,
            b" 99999",
            b"\x00",
        ],
    )
