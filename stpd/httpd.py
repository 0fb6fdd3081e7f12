"""HTTP/1.1 served within bounds (RFC 9112), by h11 on trio. The API and the probes stand on it.

(1) Who is slow, or says nothing, is cut off: HEAD_TIMEOUT for a request's head, BODY_TIMEOUT for its body.
(2) A head has at most MAX_HEAD bytes, a body at most `max_body`; more is answered 431 or 413 and the end.
(3) Whatever a client does, or a handler raises, ends that connection and nothing else.
(4) A refused body is read on for a moment before the end: a reset would eat the answer that says why.
"""

import json
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import Any, Final
from urllib.parse import parse_qsl, unquote, urlsplit

import h11
import trio
from attrs import Factory, define

HEAD_TIMEOUT: Final = 10.0
"""Seconds for a request's head, from the first moment it could have come (1)."""
BODY_TIMEOUT: Final = 10.0
"""Seconds for a request's body."""
WRITE_TIMEOUT: Final = 30.0
"""Seconds in which a client must take what it is sent."""
REQUEST_TIMEOUT: Final = 10.0
"""Seconds a handler has for its answer."""
LINGER: Final = 1.0
"""Seconds a refused request is read on (4)."""
CLOSE_TIMEOUT: Final = 0.5
"""Seconds for a last chunk and the end of TLS."""
MAX_HEAD: Final = 16 * 1024
MAX_BODY: Final = 64 * 1024
READ_SIZE: Final = 16 * 1024

JSON: Final = "application/json"
TEXT: Final = "text/plain; charset=utf-8"


class RequestError(Exception):
    """The request is answered with `status` and this error; the connection may live on."""

    def __init__(self, status: int, code: str, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.hint = hint

    def body(self) -> dict[str, Any]:
        return {"error": {"code": self.code, "message": str(self), "hint": self.hint}}


class ConnectionOver(Exception):  # noqa: N818 - not an error: the client is done or gone
    """Nothing more can be read here or written there."""


@define(kw_only=True)
class Request:
    """One request, body included. `path` is decoded, without the query."""

    method: str
    path: str
    query: dict[str, str] = Factory(dict)
    headers: dict[str, str] = Factory(dict)
    """Names in lower case; of repeated ones the last."""
    body: bytes = b""

    def json(self) -> Any:
        """The body as JSON, None if it is empty. Raises RequestError."""
        if not self.body:
            return None
        try:
            return json.loads(self.body)
        except (ValueError, RecursionError):
            raise RequestError(400, "bad_request", "the body is not JSON", "send application/json") from None


Send = Callable[[bytes], Awaitable[None]]


@define(kw_only=True)
class Response:
    """One answer: a body, or `stream`, which sends pieces until it returns."""

    status: int = 200
    body: bytes = b""
    content_type: str = JSON
    headers: list[tuple[str, str]] = Factory(list)
    stream: Callable[[Send], Awaitable[None]] | None = None


def json_response(value: Any, status: int = 200) -> Response:
    """`value` as JSON."""
    return Response(status=status, body=json.dumps(value).encode() + b"\n")


def error_response(error: RequestError) -> Response:
    """An error as {"error": {"code", "message", "hint"}}."""
    return json_response(error.body(), error.status)


GONE: Final = (OSError, trio.BrokenResourceError, trio.ClosedResourceError)
"""What a client that is gone looks like."""

Responder = Callable[[Request], Awaitable[Response]]


class Connection:
    """Serves one client on one stream until either has had enough."""

    def __init__(
        self, stream: trio.abc.Stream, on_fault: Callable[[BaseException], None], *, max_body: int = MAX_BODY
    ) -> None:
        """`on_fault` is told of an exception that a responder should not have raised."""
        self._stream = stream
        self._on_fault = on_fault
        self._max_body = max_body
        self._http = h11.Connection(h11.SERVER, max_incomplete_event_size=MAX_HEAD)

    async def serve(self, respond: Responder) -> None:
        """Answer requests one after the other. Raises nothing but Cancelled (3)."""
        try:
            while True:
                await self._one(respond)
                if self._http.our_state is not h11.DONE or self._http.their_state is not h11.DONE:
                    break
                self._http.start_next_cycle()
        except (ConnectionOver, trio.TooSlowError, *GONE):
            pass
        except h11.LocalProtocolError:
            pass  # a stream ended half-way: closing says so

    async def _one(self, respond: Responder) -> None:
        try:
            request = await self._read_request()
        except RequestError as error:
            await self._refuse(error)
            return
        try:
            response = await respond(request)
        except RequestError as error:
            response = error_response(error)
        except Exception as exc:
            self._on_fault(exc)
            hint = "the daemon's log has the details"
            response = error_response(RequestError(500, "internal", "the daemon failed to answer", hint))
        await self._write(request, response)

    # Reading -------------------------------------------------------------------------------------------

    async def _read_request(self) -> Request:
        try:
            with trio.fail_after(HEAD_TIMEOUT):
                head = await self._next_event()
        except trio.TooSlowError:
            raise ConnectionOver from None  # silence, or a slow drip: no word is owed to it
        if not isinstance(head, h11.Request):
            raise ConnectionOver
        try:
            with trio.fail_after(BODY_TIMEOUT):
                body = await self._read_body()
        except trio.TooSlowError:
            raise RequestError(408, "too_slow", "the request's body did not arrive in time") from None
        return _request(head, body)

    async def _read_body(self) -> bytes:
        if self._http.they_are_waiting_for_100_continue:
            await self._send(h11.InformationalResponse(status_code=100, headers=[]))
        parts: list[bytes] = []
        size = 0
        while True:
            event = await self._next_event()
            if isinstance(event, h11.EndOfMessage):
                return b"".join(parts)
            if not isinstance(event, h11.Data):
                raise ConnectionOver
            size += len(event.data)
            if size > self._max_body:
                raise RequestError(413, "too_large", f"a body may have {self._max_body} bytes")
            parts.append(bytes(event.data))

    async def _next_event(self) -> Any:
        while True:
            try:
                event = self._http.next_event()
            except h11.RemoteProtocolError as exc:
                status = exc.error_status_hint
                raise RequestError(status, "bad_request", f"not HTTP/1.1 as it should be: {exc}") from None
            if event is h11.NEED_DATA:
                self._http.receive_data(bytes(await self._stream.receive_some(READ_SIZE)))
                continue
            if event is h11.PAUSED or isinstance(event, h11.ConnectionClosed):
                raise ConnectionOver
            return event

    # Writing -------------------------------------------------------------------------------------------

    async def _refuse(self, error: RequestError) -> None:
        """Answer a request that was not read to its end, and end the connection (4)."""
        if self._http.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            raise ConnectionOver
        response = error_response(error)
        response.headers.append(("connection", "close"))
        await self._write(None, response)
        with trio.move_on_after(LINGER):
            for _ in range(64):
                if not await self._stream.receive_some(READ_SIZE):
                    break
        raise ConnectionOver

    async def _write(self, request: Request | None, response: Response) -> None:
        headers = [("content-type", response.content_type), ("cache-control", "no-store"), *response.headers]
        if response.stream is None:
            headers.append(("content-length", str(len(response.body))))
        reason = HTTPStatus(response.status).phrase
        await self._send(h11.Response(status_code=response.status, headers=headers, reason=reason))
        head_only = request is not None and request.method == "HEAD"
        if response.stream is not None and not head_only:
            await self._write_stream(response.stream)
            return
        if response.body and not head_only:
            await self._send(h11.Data(data=response.body))
        await self._send(h11.EndOfMessage())

    async def _write_stream(self, stream: Callable[[Send], Awaitable[None]]) -> None:
        """Send pieces until the stream ends, the client leaves or we are cancelled; then end it properly."""
        over = False
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._watch_for_end, nursery.cancel_scope)
                await stream(self._send_piece)
                nursery.cancel_scope.cancel()
        except* (trio.TooSlowError, *GONE):
            over = True
        finally:
            if not over:
                with trio.move_on_after(CLOSE_TIMEOUT, shield=True):
                    await self._send(h11.EndOfMessage())
        raise ConnectionOver

    async def _send_piece(self, data: bytes) -> None:
        await self._send(h11.Data(data=data))

    async def _watch_for_end(self, scope: trio.CancelScope) -> None:
        """A client that watches has nothing to say; when it leaves, so do we."""
        try:
            while await self._stream.receive_some(READ_SIZE):
                pass
        except GONE:
            pass
        scope.cancel()

    async def _send(self, event: Any) -> None:
        data = self._http.send(event)
        if data:
            with trio.fail_after(WRITE_TIMEOUT):
                await self._stream.send_all(data)


def _request(head: h11.Request, body: bytes) -> Request:
    target = head.target.decode("ascii", "replace")
    parts = urlsplit(target)
    path = unquote(parts.path, errors="replace")
    if not target.startswith("/") or any(ord(c) < 32 for c in path):
        raise RequestError(400, "bad_request", "not a path", "paths begin with /v1/")
    try:
        query = dict(parse_qsl(parts.query, keep_blank_values=True, max_num_fields=16))
    except ValueError:
        raise RequestError(400, "bad_request", "too many fields in the query") from None
    return Request(
        method=head.method.decode("ascii"),
        path=path,
        query=query,
        headers={n.decode("latin-1").lower(): v.decode("latin-1") for n, v in head.headers},
        body=body,
    )


# Servers -----------------------------------------------------------------------------------------------


@define(kw_only=True)
class ServerStatistics:
    """Counters of one server since its start."""

    accepted: int = 0
    refused_busy: int = 0
    """Connections closed at once, because too many were open."""
    failed_tls: int = 0
    requests: int = 0
    failed: int = 0
    """Connections ended by a fault of ours; each is in the log."""
    open: int = 0


async def open_listener(host: str, port: int, what: str) -> list[trio.SocketListener]:
    """Bind. Raises OSError whose text names address and purpose."""
    try:
        return await trio.open_tcp_listeners(port, host=host or None)
    except OSError as exc:
        raise OSError(exc.errno, f"cannot listen on {host}:{port} for {what}: {exc.strerror or exc}") from exc


def address_text(name: tuple[object, ...]) -> str:
    """A socket's name as "host:port" or "[v6]:port"."""
    host, port = str(name[0]), name[1]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


async def serve_forever(
    listeners: list[trio.SocketListener],
    handle: Callable[[trio.SocketStream], Awaitable[None]],
    on_fault: Callable[[BaseException], None],
    task_status: trio.TaskStatus[list[trio.SocketListener]] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Accept until cancelled. What escapes `handle` goes to `on_fault` and ends that connection only (3)."""

    async def guarded(stream: trio.SocketStream) -> None:
        try:
            await handle(stream)
        except* Exception as group:
            # A nursery inside `handle` wraps even one disconnect into a group; none of it may climb higher.
            on_fault(group)
        finally:
            await trio.aclose_forcefully(stream)

    await trio.serve_listeners(guarded, listeners, task_status=task_status)
