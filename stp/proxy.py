"""HTTP CONNECT: TCP through the proxy that a network insists on (RFC 9110 §9.3.6, protocol R-11-3).

(1) The proxy's answer is untrusted: h11 reads it, MAX_REPLY bytes at most, and what is wrong with it is ProxyError.
(2) Credentials go to the proxy and nowhere else: no error and no repr shows them.
"""

from __future__ import annotations

import base64
import errno
import ipaddress
from collections.abc import Mapping
from typing import Final
from urllib.parse import unquote, urlsplit

import h11
import trio
from attrs import define, field

MAX_REPLY: Final = 16 * 1024
"""Bytes of the proxy's answer, with its headers and everything that it says before."""
PROXY_TIMEOUT: Final = 10.0
"""Seconds to connect to the proxy and to have its answer."""
DEFAULT_PORT: Final = 80
"""That of http (RFC 9110 §4.2.1)."""
VARIABLES: Final = ("STP_PROXY", "https_proxy", "HTTPS_PROXY")
EXCEPT_FOR: Final = ("no_proxy", "NO_PROXY")


class ProxyError(OSError):
    """The proxy is no way: what it said, and what to do."""


@define
class Proxy:
    """One proxy, from `http://[user:password@]host[:port]`."""

    host: str
    port: int = DEFAULT_PORT
    credentials: str = field(default="", repr=False)
    """`user:password`, or ""."""

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


def parse_proxy(url: str) -> Proxy:
    """Raises ProxyError."""
    try:
        parts = urlsplit(url if "://" in url else f"http://{url}")
        host, port = parts.hostname, parts.port
    except ValueError as exc:
        raise ProxyError(errno.EINVAL, f"the proxy's address cannot be read: {exc}") from exc
    if parts.scheme != "http" or not host:
        raise ProxyError(errno.EINVAL, "the proxy must be http://[user:password@]host[:port]")
    credentials = ""
    if parts.username is not None:
        credentials = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
    return Proxy(host, port or DEFAULT_PORT, credentials)


def proxy_for(host: str, environment: Mapping[str, str]) -> Proxy | None:
    """The proxy that the environment names for `host`; None: none. Loopback never has one. Raises ProxyError."""
    url = next((environment[name] for name in VARIABLES if environment.get(name)), "")
    host = host.lower().rstrip(".")
    if not url or host in ("localhost", "::1") or host.startswith("127."):
        return None
    for name in EXCEPT_FOR:
        if any(_covers(one.strip().lower(), host) for one in environment.get(name, "").split(",")):
            return None
    return parse_proxy(url)


def _covers(entry: str, host: str) -> bool:
    """Does an entry of `no_proxy` mean `host`? `*`, a name and all below it, an address, a network (10.0.0.0/8)."""
    if entry == "*":
        return True
    suffix = entry.removeprefix("*").removeprefix(".").strip("[]")
    if not suffix:
        return False
    if "/" in suffix:
        try:
            return ipaddress.ip_address(host) in ipaddress.ip_network(suffix, strict=False)
        except ValueError:
            return False
    return host == suffix or host.endswith(f".{suffix}")


async def connect_through(proxy: Proxy, host: str, port: int) -> trio.SocketStream:
    """A TCP stream to host:port through `proxy`. Raises ProxyError, OSError."""
    with trio.move_on_after(PROXY_TIMEOUT):
        try:
            stream = await trio.open_tcp_stream(proxy.host, proxy.port)
        except OSError as exc:
            text = f"cannot connect to the proxy {proxy}: {exc.strerror or exc}"
            raise ProxyError(exc.errno or errno.EHOSTUNREACH, text) from exc
        except UnicodeError as exc:  # a label of over 63 characters, for one
            raise ProxyError(errno.EINVAL, f"the proxy {proxy} has no host name: {exc}") from exc
        try:
            await _ask(stream, proxy, host, port)
        except BaseException:
            await trio.aclose_forcefully(stream)
            raise
        return stream
    raise ProxyError(errno.ETIMEDOUT, f"the proxy {proxy} did not answer within {PROXY_TIMEOUT:g} s")


async def _ask(stream: trio.SocketStream, proxy: Proxy, host: str, port: int) -> None:
    asker = Asker(proxy, host, port)
    try:
        await stream.send_all(asker.request)
        while not asker.granted:
            asker.receive(await stream.receive_some(MAX_REPLY))
    except trio.BrokenResourceError as exc:
        raise ProxyError(errno.ECONNRESET, f"the proxy {proxy} broke the connection") from exc


class Asker:
    """The sans-IO half of one CONNECT."""

    def __init__(self, proxy: Proxy, host: str, port: int) -> None:
        self._proxy = proxy
        self._where = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        self._http = h11.Connection(h11.CLIENT, max_incomplete_event_size=MAX_REPLY)
        self._left = MAX_REPLY
        self.granted = False
        """What follows on the stream is the target's."""
        headers = [("Host", self._where), ("User-Agent", "stp")]
        if proxy.credentials:
            encoded = base64.b64encode(proxy.credentials.encode()).decode()
            headers.append(("Proxy-Authorization", f"Basic {encoded}"))
        try:
            request = h11.Request(method="CONNECT", target=self._where, headers=headers)
            self.request = self._http.send(request) + self._http.send(h11.EndOfMessage())
        except (h11.LocalProtocolError, UnicodeEncodeError) as exc:
            raise ProxyError(errno.EINVAL, f"{self._where!r} cannot be asked of a proxy: {exc}") from exc

    def receive(self, data: bytes) -> None:
        """What the proxy said; b"" when it has closed. Raises ProxyError; then, and once `granted`, ask no more."""
        if not data:
            raise ProxyError(errno.ECONNRESET, f"the proxy {self._proxy} closed without an answer")
        self._left -= len(data)
        if self._left < 0:
            raise ProxyError(errno.EMSGSIZE, f"the proxy {self._proxy} talks, and does not answer")
        try:
            self._http.receive_data(data)
            event = self._http.next_event()
            while isinstance(event, h11.InformationalResponse):
                event = self._http.next_event()
        except h11.RemoteProtocolError as exc:
            raise ProxyError(
                errno.EPROTO, f"the proxy {self._proxy} does not speak HTTP: {str(exc)[:80]}"
            ) from exc
        if isinstance(event, h11.Response):
            self._judge(event)

    def _judge(self, answer: h11.Response) -> None:
        code = answer.status_code
        if 200 <= code < 300:
            if self._http.trailing_data[0]:
                raise ProxyError(errno.EPROTO, f"the proxy {self._proxy} spoke before it was asked")
            self.granted = True
            return
        advice = {
            407: self._unknown(),
            403: "its rules do not allow it: ask its operator",
            405: "it does not know CONNECT",
            502: "it cannot reach it",
            503: "it cannot reach it",
            504: "it cannot reach it",
        }.get(code, answer.reason.decode("latin-1")[:80] or "it does not say why")
        raise ProxyError(
            errno.ECONNREFUSED, f"the proxy {self._proxy} refused {self._where} with {code}: {advice}"
        )

    def _unknown(self) -> str:
        where = "STP_PROXY, http://user:password@host:port"
        if self._proxy.credentials:
            return f"it does not take the user and the password of {where} (only Basic is spoken)"
        return f"it wants a user and a password: put them into {where}"
