"""The management API: one table of versioned JSON endpoints over mutual TLS, and a stream of events.

(1) Nobody is served without a certificate of an operator: URI SAN stp-operator://<domain>/<name>?role=<role>,
    signed by an anchor of ours, for our domain, not revoked. A node's certificate, though signed by the same
    anchor, opens nothing.
(2) A role may do what the table says, and what lesser roles may.
(3) Every change an operator makes, or is refused, stands in the log with the operator's name.
(4) Before TLS has proved who is there, a connection costs one of MAX_UNAUTHENTICATED places and TLS_TIMEOUT.
(5) A client that breaks, or a handler that raises, ends its connection and nothing else.
(6) A watcher of events that is slow misses some and is told how many; the daemon never waits for it.
"""

import inspect
import json
import os
import ssl
import time
from collections.abc import Awaitable, Callable
from enum import IntEnum
from typing import Any, Final, Protocol, TypeAlias, TypeVar
from urllib.parse import parse_qs, unquote, urlsplit

import structlog
import trio
from attrs import Factory, define

from stp.identity import BUILD_TIME
from stpd import httpd
from stpd.events import EventWatcher, TooManyWatchersError
from stpd.httpd import Request, RequestError, Response, json_response
from stpd.status import (
    BufferStatus,
    DaemonStatus,
    EdgeStatus,
    KeyStatus,
    LedgerStatus,
    NewKey,
    NodeStatus,
    PathStatus,
    ReaderStatus,
    ReloadReport,
    Revocation,
    SessionStatus,
    TraceStatus,
    UpstreamStatus,
    to_dict,
)

log = structlog.get_logger("stpd.api")

MAX_UNAUTHENTICATED: Final = 64
"""Connections in the middle of their TLS handshake (4)."""
MAX_UNAUTHENTICATED_PER_ADDRESS: Final = 16
MAX_CONNECTIONS: Final = 128
"""Connections of operators."""
TLS_TIMEOUT: Final = 10.0
"""Seconds for a TLS handshake."""
EVENT_HEARTBEAT: Final = 15.0
"""Seconds of silence after which a watcher is sent an empty line, so that both sides notice a dead line."""
ENCODE_AT_ONCE: Final = 200
"""Status objects turned into JSON before the loop gets its turn: about 4 ms."""
MAX_KEY_USES: Final = 1_000_000
MAX_KEY_TTL: Final = 10 * 365 * 86400.0
"""Seconds an enrolment key may live."""
MAX_TAGS: Final = 16
MAX_REASON: Final = 200
"""Characters of the reason for a revocation."""
NO_CHECK_TIME: Final = ssl.VerifyFlags(0x200000)
"""OpenSSL's X509_V_FLAG_NO_CHECK_TIME, which Python does not name."""

T = TypeVar("T")
Answer: TypeAlias = T | Awaitable[T]
"""Sync or async, as suits the daemon."""


class NotFoundError(Exception):
    """There is no such session, reader or key. The text says what was looked for."""


class RefusedError(Exception):
    """The daemon's state forbids it, or a value makes no sense. The text says why; nothing was changed."""


class Managed(Protocol):
    """What the daemon offers to operators. Sync methods must not block; async ones get REQUEST_TIMEOUT."""

    def status(self) -> Answer[DaemonStatus]:
        """The daemon in one view."""

    def sessions(self) -> Answer[list[SessionStatus]]:
        """All live sessions."""

    def session(self, session_id: str) -> Answer[SessionStatus]:
        """One session by its id in hexadecimal, or by a unique beginning of it. Raises NotFoundError."""

    def path(self, session_id: str) -> Answer[PathStatus]:
        """The way to a session's peer, in numbers. Raises NotFoundError."""

    def trace(self, session_id: str, seconds: float) -> Answer[TraceStatus]:
        """Write an event log of one session for so long. Raises NotFoundError, RefusedError."""

    def kick(self, session_id: str) -> Answer[None]:
        """Close a session; its peer may come back at once. Raises NotFoundError."""

    def edges(self) -> Answer[list[EdgeStatus]]:
        """Nodes below this one, connected or not."""

    def upstreams(self) -> Answer[list[UpstreamStatus]]:
        """Nodes above this one, the primary first."""

    def readers(self) -> Answer[list[ReaderStatus]]:
        """Durable subscriptions."""

    def remove_reader(self, name: str) -> Answer[None]:
        """Forget a durable subscription and what waits for it. Raises NotFoundError."""

    def buffer(self) -> Answer[BufferStatus]:
        """The store."""

    def ledger(self) -> Answer[LedgerStatus]:
        """Where every message is."""

    def keys_create(self, role: str, uses: int, ttl_s: float, tags: list[str]) -> Answer[NewKey]:
        """Make an enrolment key: good for `uses` nodes (0: any number) and `ttl_s` seconds (0: for ever).

        Raises RefusedError where this node does not enrol.
        """

    def keys_list(self) -> Answer[list[KeyStatus]]:
        """Enrolment keys, without their secrets."""

    def keys_revoke(self, key_id: str) -> Answer[None]:
        """End an enrolment key; nodes that joined with it stay. Raises NotFoundError."""

    def nodes(self) -> Answer[list[NodeStatus]]:
        """Nodes that enrolled here."""

    def node_revoke(self, node: str, reason: str) -> Answer[Revocation]:
        """End a node's certificates, sessions and name. Raises NotFoundError; RefusedError without a CA here."""

    def node_forget(self, node: str) -> Answer[Revocation]:
        """The same, but free its name for whoever joins under it. Raises as `node_revoke`."""

    def reload(self) -> Answer[ReloadReport]:
        """Read configuration, certificates and revocations again. What is wrong changes nothing."""

    def drain(self) -> Answer[None]:
        """Take no new sessions, send the present ones elsewhere, then end. Returns at once."""

    def events(self) -> EventWatcher:
        """Begin to watch what happens. Raises TooManyWatchersError."""


# Operators ---------------------------------------------------------------------------------------------


class Role(IntEnum):
    """What an operator may do; a greater one may do what lesser ones may (2)."""

    VIEWER = 1
    OPERATOR = 2


@define(kw_only=True)
class Operator:
    """Who is asking, by certificate."""

    name: str
    role: Role
    serial: int


class NotAnOperatorError(Exception):
    """The certificate is genuine and no operator's. The text says what is wrong with it."""


def operator_of(certificate: dict[str, Any], domain: str) -> Operator:
    """Read what `SSLSocket.getpeercert` tells of a verified certificate. Raises NotAnOperatorError (1)."""
    uris = [value for kind, value in certificate.get("subjectAltName", ()) if kind == "URI"]
    found = [urlsplit(uri) for uri in uris if uri.startswith("stp-operator://")]
    if len(uris) != 1 or len(found) != 1:
        raise NotAnOperatorError("this certificate is not an operator's")
    uri = found[0]
    if uri.netloc != domain:
        raise NotAnOperatorError(f"this operator is of another domain than {domain}")
    roles = parse_qs(uri.query).get("role", [])
    name = unquote(uri.path.removeprefix("/"))
    if len(roles) != 1 or roles[0].upper() not in Role.__members__ or not name:
        raise NotAnOperatorError("this certificate names no role that is known here: viewer or operator")
    return Operator(name=name, role=Role[roles[0].upper()], serial=int(certificate["serialNumber"], 16))


# The table ---------------------------------------------------------------------------------------------


@define(kw_only=True)
class Call:
    """One request on its way to its handler."""

    managed: Managed
    operator: Operator
    request: Request
    argument: str = ""
    """What stood for the {…} in the path."""


Handler: TypeAlias = Callable[[Call], Awaitable[Response]]


def _view(ask: Callable[[Call], Any]) -> Handler:
    """A handler that answers with what `ask` finds out."""

    async def handle(call: Call) -> Response:
        answer = await _answer(ask(call))
        if isinstance(answer, list):
            return Response(body=await _encode(answer))
        return json_response(to_dict(answer))

    return handle


async def _encode(items: list[Any]) -> bytes:
    """A list as JSON. Ten thousand sessions take a fifth of a second: others get their turn in between."""
    parts = []
    for start in range(0, len(items), ENCODE_AT_ONCE):
        parts.append(json.dumps(to_dict(items[start : start + ENCODE_AT_ONCE]))[1:-1])
        await trio.lowlevel.checkpoint()
    return f"[{', '.join(parts)}]\n".encode()


def _change(ask: Callable[[Call], Any]) -> Handler:
    """A handler that does something and has nothing to tell."""

    async def handle(call: Call) -> Response:
        await _answer(ask(call))
        return json_response({"done": True})

    return handle


async def _answer(value: Any) -> Any:
    return await value if inspect.isawaitable(value) else value


async def _create_key(call: Call) -> Response:
    role, uses, ttl_s, tags = _key_wishes(call.request.json())
    key = await _answer(call.managed.keys_create(role, uses, ttl_s, tags))
    return json_response(to_dict(key), 201)


def _key_wishes(body: Any) -> tuple[str, int, float, list[str]]:
    """Read {"role", "uses", "ttl_s", "tags"}. Raises RequestError."""
    hint = 'send {"role": "gateway", "uses": 1, "ttl_s": 86400, "tags": []}'
    if not isinstance(body, dict) or body.keys() - {"role", "uses", "ttl_s", "tags"}:
        raise RequestError(400, "bad_request", "the body is not what this needs", hint)
    role, uses = body.get("role"), body.get("uses", 1)
    ttl_s, tags = body.get("ttl_s", 86400), body.get("tags", [])
    good = (
        isinstance(role, str)
        and 0 < len(role) <= 32
        and type(uses) is int
        and 0 <= uses <= MAX_KEY_USES
        and type(ttl_s) in (int, float)
        and 0 <= ttl_s <= MAX_KEY_TTL
        and isinstance(tags, list)
        and len(tags) <= MAX_TAGS
        and all(isinstance(tag, str) and 0 < len(tag) <= 64 for tag in tags)
    )
    if not good:
        raise RequestError(400, "bad_request", "a value is missing, of the wrong kind or out of range", hint)
    assert isinstance(role, str)
    return role, uses, float(ttl_s), tags


async def _revoke_node(call: Call) -> Response:
    """Read {"node", "reason"}. Raises RequestError."""
    body = call.request.json()
    node = body.get("node") if isinstance(body, dict) else None
    reason = body.get("reason", "") if isinstance(body, dict) else None
    if not isinstance(node, str) or not isinstance(reason, str) or len(reason) > MAX_REASON or len(body) > 2:
        hint = 'send {"node": "edge-1", "reason": "stolen"}'
        raise RequestError(400, "bad_request", "the body is not what this needs", hint)
    return json_response(to_dict(await _answer(call.managed.node_revoke(node, reason))))


async def _begin_trace(call: Call) -> Response:
    body = call.request.json()
    seconds = body.get("for_s") if isinstance(body, dict) else None
    if type(seconds) not in (int, float):
        raise RequestError(400, "bad_request", "for_s is missing or no number", 'send {"for_s": 60}')
    assert isinstance(seconds, int | float)
    return json_response(to_dict(await _answer(call.managed.trace(call.argument, float(seconds)))), 201)


async def _watch_events(call: Call) -> Response:
    try:
        watcher = call.managed.events()
    except TooManyWatchersError as exc:
        raise RequestError(503, "busy", str(exc), "end another `stpctl events -f` first") from None
    return Response(content_type="application/x-ndjson", stream=lambda send: _send_events(watcher, send))


async def _send_events(watcher: EventWatcher, send: httpd.Send) -> None:
    """Send events until the client leaves or the daemon stops (6)."""
    try:
        await send(b"\n")
        while True:
            line = b"\n"
            with trio.move_on_after(EVENT_HEARTBEAT):
                line = json.dumps(to_dict(await watcher.receive())).encode() + b"\n"
            await send(line)
    finally:
        watcher.close()


# (method, path) -> (least role, handler). The whole management API, on one screen.
HANDLERS: Final[dict[tuple[str, str], tuple[Role, Handler]]] = {
    ("GET", "/v1/status"): (Role.VIEWER, _view(lambda c: c.managed.status())),
    ("GET", "/v1/sessions"): (Role.VIEWER, _view(lambda c: c.managed.sessions())),
    ("GET", "/v1/sessions/{id}"): (Role.VIEWER, _view(lambda c: c.managed.session(c.argument))),
    ("DELETE", "/v1/sessions/{id}"): (Role.OPERATOR, _change(lambda c: c.managed.kick(c.argument))),
    ("GET", "/v1/paths/{id}"): (Role.VIEWER, _view(lambda c: c.managed.path(c.argument))),
    ("POST", "/v1/traces/{id}"): (Role.OPERATOR, _begin_trace),
    ("GET", "/v1/edges"): (Role.VIEWER, _view(lambda c: c.managed.edges())),
    ("GET", "/v1/upstreams"): (Role.VIEWER, _view(lambda c: c.managed.upstreams())),
    ("GET", "/v1/readers"): (Role.VIEWER, _view(lambda c: c.managed.readers())),
    ("DELETE", "/v1/readers/{name}"): (Role.OPERATOR, _change(lambda c: c.managed.remove_reader(c.argument))),
    ("GET", "/v1/buffer"): (Role.VIEWER, _view(lambda c: c.managed.buffer())),
    ("GET", "/v1/ledger"): (Role.VIEWER, _view(lambda c: c.managed.ledger())),
    ("GET", "/v1/keys"): (Role.VIEWER, _view(lambda c: c.managed.keys_list())),
    ("POST", "/v1/keys"): (Role.OPERATOR, _create_key),
    ("DELETE", "/v1/keys/{id}"): (Role.OPERATOR, _change(lambda c: c.managed.keys_revoke(c.argument))),
    ("GET", "/v1/nodes"): (Role.VIEWER, _view(lambda c: c.managed.nodes())),
    ("DELETE", "/v1/nodes/{name}"): (Role.OPERATOR, _view(lambda c: c.managed.node_forget(c.argument))),
    ("POST", "/v1/revocations"): (Role.OPERATOR, _revoke_node),
    ("POST", "/v1/reload"): (Role.OPERATOR, _view(lambda c: c.managed.reload())),
    ("POST", "/v1/drain"): (Role.OPERATOR, _change(lambda c: c.managed.drain())),
    ("GET", "/v1/events"): (Role.VIEWER, _watch_events),
}


def find(method: str, path: str) -> tuple[Role, Handler, str]:
    """The row for a request, and what stands for its {…}. Raises RequestError: 404, or 405."""
    head, _, tail = path.rpartition("/")
    allowed = []
    for (wanted, pattern), (role, handler) in HANDLERS.items():
        stem, _, last = pattern.rpartition("/")
        variable = last.startswith("{")
        if pattern == path or (variable and stem == head and tail):
            if wanted == method:
                return role, handler, tail if variable else ""
            allowed.append(wanted)
    if allowed:
        hint = "allowed: " + ", ".join(allowed)
        raise RequestError(405, "method_not_allowed", f"{method} is not for {path[:100]}", hint)
    raise RequestError(404, "no_such_path", f"there is no {path[:100]}", "paths begin with /v1/")


# The server --------------------------------------------------------------------------------------------


@define(kw_only=True)
class ApiStatistics(httpd.ServerStatistics):
    """Counters since the start."""

    not_operators: int = 0
    """Connections with a genuine certificate that is no operator's."""
    denied: int = 0
    """Requests beyond the operator's role."""


@define(eq=False, kw_only=True)
class ManagementServer:
    """Makes operators out of connections and answers out of the table."""

    managed: Managed
    context: Callable[[], ssl.SSLContext]
    """Asked for every connection, so that a reload holds from the next one on; see `make_context`."""
    domain: str
    is_revoked: Callable[[int], bool] = lambda serial: False
    """By serial number; asked for every request."""
    clock: Callable[[], float] = time.time
    """Unix seconds."""
    statistics: ApiStatistics = Factory(ApiStatistics)
    _waiting: dict[str, int] = Factory(dict)

    async def serve(
        self, host: str, port: int, *, task_status: trio.TaskStatus[str] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Listen and serve until cancelled; started with the address in use. Raises OSError if it cannot bind."""
        listeners = await httpd.open_listener(host, port, "management")
        task_status.started(httpd.address_text(listeners[0].socket.getsockname()))
        await httpd.serve_forever(listeners, self._connection, self._fault)

    def _fault(self, exc: BaseException) -> None:
        self.statistics.failed += 1
        log.error("connection_failed", exc_info=exc)

    async def _connection(self, raw: trio.SocketStream) -> None:
        stats = self.statistics
        stats.accepted += 1
        address = str(raw.socket.getpeername()[0])
        waiting = self._waiting.get(address, 0)
        if (
            sum(self._waiting.values()) >= MAX_UNAUTHENTICATED
            or waiting >= MAX_UNAUTHENTICATED_PER_ADDRESS
            or stats.open >= MAX_CONNECTIONS
        ):
            stats.refused_busy += 1
            return
        self._waiting[address] = waiting + 1
        try:
            stream = await self._handshake(raw, address)
        finally:
            self._waiting[address] -= 1
            if not self._waiting[address]:
                del self._waiting[address]
        if stream is None:
            return
        stats.open += 1
        try:
            await self._operate(stream, address)
        finally:
            stats.open -= 1
            with trio.move_on_after(httpd.CLOSE_TIMEOUT, shield=True):
                await stream.aclose()

    async def _handshake(
        self, raw: trio.SocketStream, address: str
    ) -> trio.SSLStream[trio.SocketStream] | None:
        context = self.context()
        judge_by_clock(context, self.clock())
        stream = trio.SSLStream(raw, context, server_side=True, https_compatible=True)
        try:
            with trio.fail_after(TLS_TIMEOUT):
                await stream.do_handshake()
        except (trio.TooSlowError, *httpd.GONE) as exc:
            self.statistics.failed_tls += 1
            log.info("operator_refused", address=address, reason=_tls_reason(exc))
            if isinstance(exc.__cause__, ssl.SSLError):
                await _say_why(stream)
            return None
        return stream

    async def _operate(self, stream: trio.SSLStream[trio.SocketStream], address: str) -> None:
        certificate: dict[str, Any] = stream.getpeercert()
        http = httpd.Connection(stream, self._fault)
        try:
            operator = operator_of(certificate, self.domain)
        except NotAnOperatorError as exc:
            self.statistics.not_operators += 1
            log.warning("operator_refused", address=address, reason=str(exc))
            refusal = RequestError(403, "not_an_operator", str(exc), "use the bundle that stpd init made")

            async def refuse(_: Request) -> Response:
                raise refusal

            await http.serve(refuse)
            return

        async def respond(request: Request) -> Response:
            return await self._respond(operator, request)

        await http.serve(respond)

    async def _respond(self, operator: Operator, request: Request) -> Response:
        self.statistics.requests += 1
        try:
            response = await self._dispatch(operator, request)
        except RequestError as error:
            self._audit(operator, request, error.status)
            raise
        self._audit(operator, request, response.status)
        return response

    def _audit(self, operator: Operator, request: Request, status: int) -> None:
        if request.method not in ("GET", "HEAD"):  # (3)
            log.info(
                "operator_change",
                operator=operator.name,
                role=operator.role.name.lower(),
                method=request.method,
                path=request.path,
                status=status,
            )

    async def _dispatch(self, operator: Operator, request: Request) -> Response:
        if self.is_revoked(operator.serial):
            raise RequestError(403, "revoked", "this operator's certificate was revoked", "ask for a new one")
        role, handler, argument = find(request.method, request.path)
        if operator.role < role:
            self.statistics.denied += 1
            message = (
                f"this needs the role {role.name.lower()}; {operator.name} is {operator.role.name.lower()}"
            )
            raise RequestError(403, "forbidden", message, "ask somebody with that role")
        call = Call(managed=self.managed, operator=operator, request=request, argument=argument)
        try:
            with trio.fail_after(httpd.REQUEST_TIMEOUT):
                return await handler(call)
        except NotFoundError as exc:
            raise RequestError(404, "not_found", str(exc), "list them first") from None
        except RefusedError as exc:
            raise RequestError(409, "refused", str(exc)) from None
        except trio.TooSlowError:
            message = f"no answer within {httpd.REQUEST_TIMEOUT:.0f} s"
            raise RequestError(504, "timeout", message, "look at the daemon's log") from None


async def _say_why(stream: trio.SSLStream[trio.SocketStream]) -> None:
    """Send the TLS alert, which trio leaves in its buffer, and read on until the client has it (RFC 8446 §6.2).

    Without it a refused operator sees a connection that closes, and no reason.
    """
    alert: ssl.MemoryBIO = stream._outgoing
    raw = stream.transport_stream
    with trio.move_on_after(httpd.CLOSE_TIMEOUT):
        try:
            await raw.send_all(alert.read())
            await raw.send_eof()
            while await raw.receive_some(httpd.READ_SIZE):
                pass
        except httpd.GONE:
            pass


def _tls_reason(exc: BaseException) -> str:
    """Why a handshake failed, for the log."""
    cause = exc.__cause__
    if isinstance(exc, trio.TooSlowError):
        return "the TLS handshake took too long"
    if isinstance(cause, ssl.SSLError):
        return str(getattr(cause, "verify_message", "") or cause.reason or "TLS failed")
    return "the connection broke in the TLS handshake"


def judge_by_clock(context: ssl.SSLContext, now: float) -> None:
    """Let a machine whose clock shows a time before this program was built leave dates alone.

    Such a clock would refuse every certificate as not valid yet, and lock out who could set it.
    """
    if now < BUILD_TIME:
        context.verify_flags |= NO_CHECK_TIME
    else:
        context.verify_flags &= ~NO_CHECK_TIME


def make_context(chain_pem: bytes, key_pem: bytes, anchors_pem: bytes) -> ssl.SSLContext:
    """TLS 1.3 with certificates on both sides. Raises ssl.SSLError where they do not fit together.

    No tickets: a resumed session would skip the look at the certificate. The key passes through memory only.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_mode = ssl.CERT_REQUIRED
    context.num_tickets = 0
    context.load_verify_locations(cadata=anchors_pem.decode("ascii"))
    fd = os.memfd_create("management-identity")
    try:
        os.write(fd, key_pem + b"\n" + chain_pem)
        context.load_cert_chain(f"/proc/self/fd/{fd}")
    finally:
        os.close(fd)
    return context
