"""Asks a daemon, over HTTPS with certificates on both sides.

(1) Nothing is sent before the daemon has proved to be the node that the context names.
(2) Whatever goes wrong is one CommandError: a cause, what to do, an exit status.
"""

import errno
import http.client
import json
import socket
import ssl
import time
from collections.abc import Iterator
from typing import Any, Final
from urllib.parse import quote, urlsplit

from stpctl.contexts import Context
from stpctl.errors import CONFIG, FAILED, REFUSED, UNREACHABLE, CommandError

TIMEOUT: Final = 15.0
"""Seconds for connecting, and for an answer; the daemon's own limit is 10."""
SILENCE: Final = 40.0
"""Seconds without a byte after which a stream of events counts as dead; the daemon speaks every 15."""
MAX_ANSWER: Final = 64 * 1024 * 1024
MAX_EVENT: Final = 256 * 1024
BUILD_TIME: Final = 1_793_491_200
"""Unix seconds, 2026-11-01, as in stp.identity: no clock that shows less is right."""
NO_CHECK_TIME: Final = ssl.VerifyFlags(0x200000)
"""OpenSSL's X509_V_FLAG_NO_CHECK_TIME, which Python does not name."""
OPERATOR_ADVICE: Final = "use the operator bundle that `stpd init` made on that node, or a fresh one"


class Client:
    """One daemon. A connection is made per call: commands are short."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._tls = _tls(context)

    def get(self, *path: str) -> Any:
        """GET /v1/<path…>; the decoded answer."""
        return self._call("GET", path)

    def post(self, *path: str, body: Any = None) -> Any:
        """POST /v1/<path…>; the decoded answer."""
        return self._call("POST", path, body)

    def delete(self, *path: str) -> Any:
        """DELETE /v1/<path…>; the decoded answer."""
        return self._call("DELETE", path)

    def events(self) -> Iterator[dict[str, Any]]:
        """What happens, as it happens. Ends when the daemon does; raises CommandError when the line breaks."""
        connection = self._connect()
        try:
            answer = self._request(connection, "GET", ("events",), None)
            if answer.status != 200:
                raise self._error(answer.status, answer.read(MAX_EVENT))
            if connection.sock is not None:
                connection.sock.settimeout(SILENCE)
            while line := answer.readline(MAX_EVENT):
                if line.strip():
                    yield json.loads(line)
        except (OSError, http.client.HTTPException, ValueError) as exc:
            raise CommandError(
                f"the stream of events broke: {_why(exc)}", "it is taken up again with -f", UNREACHABLE
            ) from None
        finally:
            connection.close()

    # One call ------------------------------------------------------------------------------------------

    def _call(self, method: str, path: tuple[str, ...], body: Any = None) -> Any:
        connection = self._connect()
        try:
            answer = self._request(connection, method, path, body)
            data = answer.read(MAX_ANSWER)
        except (OSError, http.client.HTTPException) as exc:
            raise self._translated(exc) from None
        finally:
            connection.close()
        if answer.status >= 400:
            raise self._error(answer.status, data)
        try:
            return json.loads(data)
        except ValueError:
            raise CommandError(
                "the answer is not JSON", "is something else listening there?", FAILED
            ) from None

    def _connect(self) -> http.client.HTTPSConnection:
        context = self._context
        connection = http.client.HTTPSConnection(
            context.host, context.port, timeout=TIMEOUT, context=self._tls
        )
        try:
            connection.connect()
        except OSError as exc:
            raise self._translated(exc) from None
        try:
            _check_node(connection.sock, context.node)
        except CommandError:
            connection.close()
            raise
        return connection

    def _request(
        self, connection: http.client.HTTPSConnection, method: str, path: tuple[str, ...], body: Any
    ) -> http.client.HTTPResponse:
        target = "/v1/" + "/".join(quote(part, safe="") for part in path)
        data = None if body is None else json.dumps(body).encode()
        headers = {"content-type": "application/json"} if data else {}
        try:
            connection.request(method, target, data, headers)
            return connection.getresponse()
        except (OSError, http.client.HTTPException) as exc:
            raise self._translated(exc) from None

    def _error(self, status: int, data: bytes) -> CommandError:
        """The daemon's own words for a refusal."""
        try:
            told = json.loads(data)["error"]
            message, hint = str(told["message"]), str(told.get("hint") or "")
        except (ValueError, KeyError, TypeError):
            message, hint = f"the daemon answered {status}", ""
        advice = hint or "see the daemon's log"
        return CommandError(message, advice, REFUSED if status == 403 else FAILED)

    def _translated(self, exc: Exception) -> CommandError:
        """A network error in the words of the person who has to mend it."""
        where = f"{self._context.host}:{self._context.port}"
        if isinstance(exc, ssl.SSLCertVerificationError):
            cause = f"the certificate of {where} is not to be trusted: {exc.verify_message}"
            return CommandError(
                cause, "is this context's bundle of the same fleet, and the clock right?", REFUSED
            )
        if isinstance(exc, ssl.SSLError) and "ALERT" in (exc.reason or ""):
            cause = f"{where} refused this operator's certificate: {_judgement(exc.reason)}"
            return CommandError(cause, OPERATOR_ADVICE, REFUSED)
        if isinstance(exc, ssl.SSLError):
            cause = f"no TLS with {where}: {_alert(exc.reason or str(exc))}"
            return CommandError(
                cause, "does stpd's management listen there? see management.listen", UNREACHABLE
            )
        if isinstance(exc, http.client.RemoteDisconnected | ConnectionResetError | BrokenPipeError):
            # With TLS 1.3 a server judges our certificate only after we think all is well.
            cause = f"{where} closed the connection without an answer"
            return CommandError(
                cause, f"it stopped, is busy, or refused the certificate: {OPERATOR_ADVICE}", UNREACHABLE
            )
        return CommandError(f"cannot reach stpd at {where}: {_why(exc)}", _advice(exc), UNREACHABLE)


def _tls(context: Context) -> ssl.SSLContext:
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    tls.minimum_version = ssl.TLSVersion.TLSv1_3
    if time.time() < BUILD_TIME:
        tls.verify_flags |= NO_CHECK_TIME  # this clock would call every certificate not valid yet
    tls.check_hostname = False  # a node is known by its URI, wherever it listens: _check_node
    path = context.certificate
    try:
        tls.load_verify_locations(cafile=path)
        tls.load_cert_chain(path)
    except ssl.SSLError as exc:
        why = _alert(exc.reason or "no key and certificate in it")
        raise CommandError(f"{path} cannot be used: {why}", OPERATOR_ADVICE, CONFIG) from None
    except OSError as exc:
        advice = "run as its owner (sudo), or use another context"
        raise CommandError(f"{path}: {exc.strerror or exc}", advice, CONFIG) from None
    return tls


def _check_node(sock: Any, node: str) -> None:
    """Compare the daemon's certificate with the context (1). Raises CommandError."""
    names = [value for kind, value in sock.getpeercert().get("subjectAltName", ()) if kind == "URI"]
    nodes = [urlsplit(name).path.removeprefix("/") for name in names if name.startswith("stp://")]
    if nodes != [node]:
        found = ", ".join(nodes) or "no node at all"
        raise CommandError(
            f"this is {found} and not {node}",
            "another daemon listens there, or the context is old: stpctl context show",
            REFUSED,
        )


JUDGEMENTS: Final = {
    "unknown ca": "its authority is not known there",
    "decrypt error": "it was signed by another authority of the same name",
    "certificate expired": "it has expired, or one of the clocks is wrong",
    "bad certificate": "it is of no use there, perhaps not valid yet",
}
"""What a TLS alert means for an operator (RFC 8446 §6.2)."""


def _judgement(reason: str) -> str:
    alert = _alert(reason)
    return JUDGEMENTS.get(alert, alert)


def _alert(reason: str) -> str:
    """OpenSSL's TLSV1_ALERT_UNKNOWN_CA as "unknown ca"."""
    text = reason
    for prefix in ("TLSV1_ALERT_", "SSLV3_ALERT_", "TLSV13_ALERT_"):
        text = text.removeprefix(prefix)
    return text.replace("_", " ").lower()


def _why(exc: BaseException) -> str:
    if isinstance(exc, TimeoutError):
        return "no answer in time"
    if isinstance(exc, socket.gaierror):
        return "no such host"
    if isinstance(exc, OSError) and exc.strerror:
        return exc.strerror.lower()
    return str(exc) or type(exc).__name__


def _advice(exc: BaseException) -> str:
    if isinstance(exc, socket.gaierror):
        return "check the url of the context: stpctl context show"
    if isinstance(exc, OSError) and exc.errno == errno.ECONNREFUSED:
        return "is it running? systemctl status stpd; does management.listen say this address?"
    return "is it running, and may this machine reach it? management listens on loopback by default"
