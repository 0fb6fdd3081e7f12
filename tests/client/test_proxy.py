"""HTTP CONNECT: what proxies answer, which proxy is meant, and a session through a real one (R-11-3)."""

from __future__ import annotations

import base64
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from functools import partial

import pytest
import trio

from stp import proxy as proxy_module
from stp.core.errors import ErrorCode
from stp.proxy import MAX_REPLY, Asker, Proxy, ProxyError, connect_through, parse_proxy, proxy_for
from tests.carrier_kit import Owner, dial, listening, running

OK = b"HTTP/1.1 200 Connection established\r\nVia: 1.1 proxy\r\n\r\n"


def pieces(data: bytes, size: int) -> Iterator[bytes]:
    for at in range(0, len(data), size):
        yield data[at : at + size]


def ask(answer: bytes, size: int = 0, proxy: Proxy | None = None) -> Asker:
    """An asker that was told `answer`, `size` bytes at a time, until it knew."""
    asker = Asker(proxy or Proxy("proxy.lan"), "gw.example", 8443)
    for piece in pieces(answer, size or len(answer) or 1):
        if asker.granted:
            break
        asker.receive(piece)
    return asker


def test_what_is_asked() -> None:
    asker = Asker(Proxy("proxy.lan", 3128, "user:pass:word"), "gw.example", 8443)
    head = asker.request.decode()
    assert head.startswith("CONNECT gw.example:8443 HTTP/1.1\r\nHost: gw.example:8443\r\n")
    assert f"Proxy-Authorization: Basic {base64.b64encode(b'user:pass:word').decode()}\r\n" in head
    assert head.endswith("\r\n\r\n")
    assert b"[2001:db8::1]:8443" in Asker(Proxy("proxy.lan"), "2001:db8::1", 8443).request
    assert b"Authorization" not in Asker(Proxy("proxy.lan"), "gw.example", 8443).request


@pytest.mark.parametrize("host", ["gw example", "gw\r\nX: y", "gü.example", ""])
def test_a_target_that_no_request_can_name(host: str) -> None:
    if not host:
        assert b"CONNECT :8443" in Asker(Proxy("proxy.lan"), host, 8443).request
        return
    with pytest.raises(ProxyError, match="cannot be asked of a proxy"):
        Asker(Proxy("proxy.lan"), host, 8443)


@pytest.mark.parametrize("size", [0, 1, 7])
@pytest.mark.parametrize(
    "before", [b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 3, b"HTTP/1.1 103 Early\r\na: b\r\n\r\n"]
)
@pytest.mark.parametrize(
    "answer", [OK, b"HTTP/1.0 200 OK\r\n\r\n", b"HTTP/1.1 204\r\nContent-Length: 9\r\n\r\n"]
)
def test_granted(answer: bytes, before: bytes, size: int) -> None:
    """RFC 9110 §9.3.6: any 2xx, and Content-Length in it means nothing."""
    assert ask(before + answer, size).granted


def test_what_follows_at_once_is_nobodys() -> None:
    """The dialling side of TLS speaks first: bytes that come with the grant are not the target's."""
    with pytest.raises(ProxyError, match="spoke before it was asked"):
        ask(OK + b"\x16")
    assert ask(OK + b"\x16", 1).granted  # these come to TLS, which refuses them


@pytest.mark.parametrize("size", [0, 1])
@pytest.mark.parametrize(
    ("status", "advice"),
    [
        (b"407 Proxy Authentication Required\r\nProxy-Authenticate: Basic", "wants a user and a password"),
        (b"403 Forbidden", "ask its operator"),
        (b"405 Method Not Allowed", "does not know CONNECT"),
        (b"502 Bad Gateway", "cannot reach it"),
        (b"503 Service Unavailable", "cannot reach it"),
        (b"504 Gateway Timeout", "cannot reach it"),
        (b"418 I am a teapot", "with 418: I am a teapot"),
        (b"500 ", "does not say why"),
        (b"302 Found\r\nLocation: http://login.lan/", "with 302: Found"),
    ],
)
def test_refused(status: bytes, advice: str, size: int) -> None:
    with pytest.raises(ProxyError, match=advice) as told:
        ask(b"HTTP/1.1 " + status + b"\r\nContent-Length: 3\r\n\r\nno!", size)
    assert "proxy.lan:80" in str(told.value)
    assert "gw.example:8443" in str(told.value)


def test_a_password_that_is_not_taken_is_not_shown() -> None:
    proxy = parse_proxy("http://user:secret@proxy.lan")
    with pytest.raises(ProxyError, match="does not take the user") as told:
        ask(b"HTTP/1.1 407 No\r\n\r\n", proxy=proxy)
    assert "secret" not in f"{told.value} {proxy} {proxy!r}"


@pytest.mark.parametrize("size", [0, 1])
@pytest.mark.parametrize(
    "answer",
    [
        b"SSH-2.0-OpenSSH_9.2\r\n\r\n",
        b"\x15\x03\x01\x00\x02\x02\x46" * 9 + b"\n\n",
        b"HTTP/1.1 abc\r\n\r\n",
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nno colon\r\n\r\n",
        b"\r\n\r\n" * 20 + b"nonsense\r\n\r\n",
    ],
)
def test_garbage(answer: bytes, size: int) -> None:
    with pytest.raises(ProxyError):
        ask(answer, size)


@pytest.mark.parametrize(
    "piece",
    [b"a" * 999, b"x-header: y\r\n", b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 100 C\r\n\r\nHTTP/1.1 1"],
)
def test_endless_answers_are_cut_off(piece: bytes) -> None:
    """MAX_REPLY bytes, whatever they are: a proxy that talks on and on is no way."""
    asker = Asker(Proxy("proxy.lan"), "gw.example", 8443)
    fed = 0
    if piece.startswith(b"x-"):
        asker.receive(b"HTTP/1.1 200 OK\r\n")
    with pytest.raises(ProxyError):
        while fed <= 4 * MAX_REPLY:
            asker.receive(piece)
            fed += len(piece)
    assert fed <= MAX_REPLY


@pytest.mark.parametrize("said", [b"", b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 100 Continue\r\n\r\n"])
def test_a_proxy_that_closes(said: bytes) -> None:
    asker = ask(said)
    with pytest.raises(ProxyError, match="closed without an answer"):
        asker.receive(b"")


# -- which proxy


@pytest.mark.parametrize(
    ("url", "found"),
    [
        ("http://proxy.lan:3128", Proxy("proxy.lan", 3128)),
        ("http://proxy.lan/", Proxy("proxy.lan", 80)),
        ("proxy.lan:3128", Proxy("proxy.lan", 3128)),
        ("http://[2001:db8::1]:3128", Proxy("2001:db8::1", 3128)),
        ("http://me:a%40b%3Ac@proxy.lan:1", Proxy("proxy.lan", 1, "me:a@b:c")),
        ("http://me@proxy.lan", Proxy("proxy.lan", 80, "me:")),
    ],
)
def test_addresses_of_proxies(url: str, found: Proxy) -> None:
    assert parse_proxy(url) == found


@pytest.mark.parametrize(
    "url",
    ["https://proxy.lan", "socks5://proxy.lan", "http://", "http://proxy.lan:99999", "http://[::1", "ftp:x"],
)
def test_what_is_no_proxy(url: str) -> None:
    with pytest.raises(ProxyError):
        parse_proxy(url)


def test_the_password_stands_in_no_error() -> None:
    for url in ("https://u:secret@proxy.lan", "http://u:secret@proxy.lan:x", "http://u:secret@"):
        with pytest.raises(ProxyError) as told:
            parse_proxy(url)
        assert "secret" not in str(told.value)


@pytest.mark.parametrize(
    ("host", "environment", "proxied"),
    [
        ("gw.example", {}, False),
        ("gw.example", {"STP_PROXY": "http://p"}, True),
        ("gw.example", {"STP_PROXY": "", "https_proxy": "http://p"}, True),
        ("gw.example", {"HTTPS_PROXY": "http://p"}, True),
        ("gw.example", {"http_proxy": "http://p"}, False),
        ("localhost", {"STP_PROXY": "http://p"}, False),
        ("127.0.0.9", {"STP_PROXY": "http://p"}, False),
        ("::1", {"STP_PROXY": "http://p"}, False),
        ("gw.example", {"https_proxy": "http://p", "no_proxy": "other, example"}, False),
        ("gw.example", {"https_proxy": "http://p", "no_proxy": ".example"}, False),
        ("gw.example", {"https_proxy": "http://p", "no_proxy": "*.Example"}, False),
        ("GW.example.", {"https_proxy": "http://p", "NO_PROXY": "gw.example"}, False),
        ("gw.example", {"https_proxy": "http://p", "no_proxy": "*"}, False),
        ("gw.example", {"https_proxy": "http://p", "no_proxy": "ample, ,w.example"}, True),
        ("10.1.2.3", {"https_proxy": "http://p", "no_proxy": "10.0.0.0/8"}, False),
        ("10.1.2.3", {"https_proxy": "http://p", "no_proxy": "10.2.0.0/16,10.0.0.0/99"}, True),
        ("gw.example", {"https_proxy": "http://p", "no_proxy": "10.0.0.0/8"}, True),
        ("2001:db8::1", {"https_proxy": "http://p", "no_proxy": "[2001:db8::1]"}, False),
    ],
)
def test_proxy_for(host: str, environment: dict[str, str], proxied: bool) -> None:
    assert (proxy_for(host, environment) is not None) is proxied


# -- through a real one


class ConnectProxy:
    """A small HTTP proxy that knows CONNECT and one user."""

    def __init__(self, to: dict[str, tuple[str, int]], user: str = "") -> None:
        self._to = to
        self._expected = b"Basic " + base64.b64encode(user.encode()) if user else b""
        self.served = 0

    async def serve(self, stream: trio.SocketStream) -> None:
        async with stream:
            head = b""
            while b"\r\n\r\n" not in head:
                head += await stream.receive_some()
            target = head.split()[1].decode()
            if self._expected not in head:
                await stream.send_all(b"HTTP/1.1 407 Who are you\r\nProxy-Authenticate: Basic\r\n\r\n")
                return
            if target not in self._to:
                await stream.send_all(b"HTTP/1.1 502 Bad Gateway\r\n\r\n")
                return
            other = await trio.open_tcp_stream(*self._to[target])
            self.served += 1
            await stream.send_all(OK)
            async with other, trio.open_nursery() as nursery:
                nursery.start_soon(self._pump, stream, other)
                nursery.start_soon(self._pump, other, stream)

    async def _pump(self, here: trio.SocketStream, there: trio.SocketStream) -> None:
        try:
            async for data in here:
                await there.send_all(data)
            await there.send_eof()
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            return


@asynccontextmanager
async def proxying(proxy: ConnectProxy) -> AsyncIterator[int]:
    async with trio.open_nursery() as nursery:
        (listener,) = await nursery.start(
            partial(trio.serve_tcp, proxy.serve, 0, host="127.0.0.1", handler_nursery=nursery)
        )
        yield listener.socket.getsockname()[1]
        nursery.cancel_scope.cancel()


async def test_a_session_through_a_proxy_that_wants_a_password() -> None:
    keeper, device = Owner(echo=True), Owner()
    async with listening(keeper) as (_, port):
        proxy = ConnectProxy({"gw.example:8443": ("127.0.0.1", port)}, "user:pass")
        async with proxying(proxy) as at:
            known = Proxy("127.0.0.1", at, "user:pass")
            carrier = await dial(device, 0, stream=await connect_through(known, "gw.example", 8443))
            async with running(carrier):
                await device.connected()
                stream = carrier.session.open_stream()
                data = os.urandom(50_000)
                carrier.session.write(stream, data)
                carrier.wake()
                await device.until(lambda: data in device.received.values())
                carrier.session.close(ErrorCode.NO_ERROR, "", now=trio.current_time())
                carrier.wake()
                await device.closed()
            with pytest.raises(ProxyError, match="407"):
                await connect_through(Proxy("127.0.0.1", at, "user:guess"), "gw.example", 8443)
            with pytest.raises(ProxyError, match="502"):
                await connect_through(known, "gw.example", 22)
            assert proxy.served == 1


async def test_proxies_that_are_not_there_or_mute(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proxy_module, "PROXY_TIMEOUT", 0.05)
    mute = await trio.open_tcp_listeners(0, host="127.0.0.1")
    at = mute[0].socket.getsockname()[1]
    with pytest.raises(ProxyError, match="did not answer within"):
        await connect_through(Proxy("127.0.0.1", at), "gw.example", 8443)
    await mute[0].aclose()
    with pytest.raises(ProxyError, match="cannot connect to the proxy"):
        await connect_through(Proxy("127.0.0.1", at), "gw.example", 8443)
    with pytest.raises(ProxyError, match="has no host name"):
        await connect_through(Proxy("a" * 70), "gw.example", 8443)
