"""/health, /ready and /metrics over plain HTTP: for service managers, load balancers and Prometheus.

Read-only, without a password, hence without secrets: on loopback unless the configuration says otherwise.

(1) /health is 200 while the daemon lives and moves, else 503 with the reasons, one per line.
(2) /ready is 200 once all is open and bound, and no longer when draining.
(3) At most MAX_CONNECTIONS at once; a slow client is cut off (`stpd.httpd`), a broken one harms nobody.
(4) An answer that takes work is made at most once per METRICS_INTERVAL, however many ask.
"""

import math
from typing import Final, Protocol

import structlog
import trio
from attrs import Factory, define

from stpd import httpd
from stpd.httpd import Request, RequestError, Response

log = structlog.get_logger("stpd.probes")

MAX_CONNECTIONS: Final = 64
MAX_BODY: Final = 0
"""Nothing is to be said here."""
METRICS_INTERVAL: Final = 0.25
"""Seconds for which the last /metrics is good enough."""
METRICS_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"


class Probed(Protocol):
    """What the probes ask the daemon. Nothing of it blocks the loop."""

    def unhealthy(self) -> list[str]:
        """Why the daemon does not progress, in words; empty: it does."""

    def unready(self) -> list[str]:
        """Why no traffic should come here now; empty: let it come."""

    async def metrics(self) -> bytes:
        """The metrics as Prometheus reads them; see `stpd.metrics`."""


@define(eq=False, kw_only=True)
class ProbeServer:
    """Answers probes."""

    probed: Probed
    statistics: httpd.ServerStatistics = Factory(httpd.ServerStatistics)
    _metrics: bytes = b""
    _made_at: float = -math.inf
    _making: trio.Lock = Factory(trio.Lock)

    async def serve(
        self, host: str, port: int, *, task_status: trio.TaskStatus[str] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Listen and serve until cancelled; started with the address in use. Raises OSError."""
        listeners = await httpd.open_listener(host, port, "health")
        task_status.started(httpd.address_text(listeners[0].socket.getsockname()))
        await httpd.serve_forever(listeners, self._connection, self._fault)

    def _fault(self, exc: BaseException) -> None:
        self.statistics.failed += 1
        log.error("probe_failed", exc_info=exc)

    async def _connection(self, stream: trio.SocketStream) -> None:
        stats = self.statistics
        stats.accepted += 1
        if stats.open >= MAX_CONNECTIONS:
            stats.refused_busy += 1
            return
        stats.open += 1
        try:
            await httpd.Connection(stream, self._fault, max_body=MAX_BODY).serve(self._respond)
        finally:
            stats.open -= 1

    async def _respond(self, request: Request) -> Response:
        self.statistics.requests += 1
        if request.method not in ("GET", "HEAD"):
            raise RequestError(
                405, "method_not_allowed", f"{request.method[:20]} is not for probes", "use GET"
            )
        if request.path == "/health":
            return _verdict(self.probed.unhealthy(), "healthy")
        if request.path == "/ready":
            return _verdict(self.probed.unready(), "ready")
        if request.path == "/metrics":
            return Response(body=await self._make_metrics(), content_type=METRICS_TYPE)
        raise RequestError(404, "no_such_path", "nothing here", "there are /health, /ready and /metrics")

    async def _make_metrics(self) -> bytes:
        async with self._making:
            if trio.current_time() - self._made_at >= METRICS_INTERVAL:
                self._metrics = await self.probed.metrics()
                self._made_at = trio.current_time()
            return self._metrics


def _verdict(reasons: list[str], good: str) -> Response:
    text = "\n".join(reasons or [good]) + "\n"
    return Response(status=503 if reasons else 200, body=text.encode(), content_type=httpd.TEXT)
