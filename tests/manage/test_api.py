"""Promises of stpd.api and stpd.httpd, over real TLS sockets."""

from __future__ import annotations

import json
import ssl
import time
from pathlib import Path
from typing import Any

import h11
import pytest
import structlog
import trio
from structlog.testing import capture_logs

from stpd import api, httpd
from stpd.api import HANDLERS, Call, NotAnOperatorError, Operator, Role, find, make_context, operator_of
from stpd.httpd import Request, RequestError
from stpd.status import SessionStatus
from tests.identity_kit import DOMAIN, Flaw, shared
from tests.manage.asker import Asker, connect, until
from tests.manage.daemon_double import (
    SECRET,
    Double,
    client_context,
    dial,
    operator_bundle,
    server_context,
    serving,
)

# The table ---------------------------------------------------------------------------------------------


async def test_every_row_of_the_table_answers(tmp_path: Path) -> None:
    double = Double()
    arguments = {"{id}": "ab" * 16, "{name}": "erp"}
    bodies: dict[str, dict[str, Any]] = {
        "/v1/keys": {"role": "gateway"},
        "/v1/revocations": {"node": "edge-1", "reason": "stolen"},
        "/v1/traces/{id}": {"for_s": 60},
    }
    async with serving(double) as (_, port):
        client = await connect(port, tmp_path)
        for method, pattern in HANDLERS:
            if pattern == "/v1/events":
                continue
            stem, _, last = pattern.rpartition("/")
            body = json.dumps(bodies[pattern]).encode() if method == "POST" and pattern in bodies else b""
            status, answer = await client.ask(method, f"{stem}/{arguments.get(last, last)}", body)
            assert status in (200, 201), pattern
            assert answer != {}, pattern
    assert [what for what, *_ in double.done] == [
        "kick",
        "trace",
        "remove_reader",
        "keys_create",
        "keys_revoke",
        "node_forget",
        "node_revoke",
        "reload",
        "drain",
    ]
    assert double.done[3] == ("keys_create", "gateway", 1, 86400.0, [])
    assert double.done[6] == ("node_revoke", "edge-1", "stolen")


@pytest.mark.parametrize(
    "body", [{}, {"node": 3}, {"node": "a", "reason": "x" * 201}, {"node": "a", "why": "", "reason": ""}]
)
async def test_a_revocation_names_a_node(tmp_path: Path, body: dict[str, Any]) -> None:
    double = Double()
    async with serving(double) as (_, port):
        client = await connect(port, tmp_path)
        status, answer = await client.ask("POST", "/v1/revocations", json.dumps(body).encode())
    assert (status, answer["error"]["code"]) == (400, "bad_request")
    assert double.done == []


@pytest.mark.parametrize(
    ("method", "path"), [row for row, (role, _) in HANDLERS.items() if role is Role.OPERATOR]
)
async def test_a_viewer_changes_nothing(tmp_path: Path, method: str, path: str) -> None:
    """api (2), (3): refused, named in the log."""
    double = Double()
    async with serving(double) as (server, port):
        client = await connect(port, tmp_path, operator_bundle("viewer"))
        with capture_logs() as logs:
            status, answer = await client.ask(method, path)
        assert status == 403
        assert answer["error"]["code"] == "forbidden"
        assert server.statistics.denied == 1
        assert (await client.ask("GET", "/v1/status"))[0] == 200
    assert double.done == []
    (line,) = [entry for entry in logs if entry["event"] == "operator_change"]
    assert (line["operator"], line["role"], line["status"]) == ("alice", "viewer", 403)


def test_the_table_has_no_surprises() -> None:
    """Reading is for viewers, changing for operators; every path is versioned."""
    for (method, path), (role, _) in HANDLERS.items():
        assert path.startswith("/v1/")
        assert role is (Role.VIEWER if method == "GET" else Role.OPERATOR)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/nothing", 404),
        ("GET", "/", 404),
        ("GET", "/v1/sessions/", 404),
        ("GET", "/v2/status", 404),
        ("GET", "/v1/keys/x/y", 404),
        ("POST", "/v1/status", 405),
        ("GET", "/v1/readers/erp", 405),
        ("BREW", "/v1/status", 405),
    ],
)
def test_what_is_not_in_the_table(method: str, path: str, status: int) -> None:
    with pytest.raises(RequestError) as caught:
        find(method, path)
    assert caught.value.status == status


async def test_errors_are_json_with_a_hint(tmp_path: Path) -> None:
    async with serving(Double()) as (_, port):
        client = await connect(port, tmp_path)
        for method, path, body, status, code in [
            ("GET", "/v1/sessions/ff", b"", 404, "not_found"),
            ("DELETE", "/v1/readers/none", b"", 404, "not_found"),
            ("POST", "/v1/keys", b'{"role": "king"}', 409, "refused"),
            ("POST", "/v1/keys", b"{", 400, "bad_request"),
            ("POST", "/v1/keys", b"", 400, "bad_request"),
        ]:
            found, answer = await client.ask(method, path, body)
            assert (found, answer["error"]["code"]) == (status, code)
            assert answer["error"]["message"]
            assert set(answer["error"]) == {"code", "message", "hint"}


@pytest.mark.parametrize(
    "wishes",
    [
        {},
        {"role": ""},
        {"role": "x" * 33},
        {"role": 3},
        {"role": "a", "uses": True},
        {"role": "a", "uses": 1.0},
        {"role": "a", "uses": -1},
        {"role": "a", "ttl_s": "1d"},
        {"role": "a", "ttl_s": -1},
        {"role": "a", "ttl_s": 1e300},
        {"role": "a", "ttl_s": float("nan")},
        {"role": "a", "tags": "x"},
        {"role": "a", "tags": [1]},
        {"role": "a", "tags": ["x"] * 17},
        {"role": "a", "more": 1},
        ["role"],
    ],
)
async def test_wishes_for_keys_are_checked(wishes: object) -> None:
    double = Double()
    operator = Operator(name="a", role=Role.OPERATOR, serial=1)
    request = Request(method="POST", path="/v1/keys", body=json.dumps(wishes).encode())
    with pytest.raises(RequestError, match=r"body|value"):
        await HANDLERS["POST", "/v1/keys"][1](Call(managed=double, operator=operator, request=request))
    assert double.done == []


async def test_changes_are_in_the_log_with_the_name_and_without_secrets(tmp_path: Path) -> None:
    """api (3)."""
    async with serving(Double()) as (_, port):
        client = await connect(port, tmp_path)
        with capture_logs() as logs:
            _, key = await client.ask("POST", "/v1/keys", b'{"role": "gateway"}')
            await client.ask("GET", "/v1/status")
    assert key["token"] == SECRET
    (line,) = [entry for entry in logs if entry["event"] == "operator_change"]
    assert (line["operator"], line["method"], line["path"], line["status"]) == (
        "alice",
        "POST",
        "/v1/keys",
        201,
    )
    assert SECRET not in str(logs)


# Who may come in ---------------------------------------------------------------------------------------


async def refused(port: int, directory: Path, bundle: bytes) -> None:
    """With TLS 1.3 the client learns of it when it reads, at the latest."""
    with pytest.raises((trio.BrokenResourceError, h11.RemoteProtocolError, ConnectionError)):
        client = await connect(port, directory, bundle)
        await client.ask("GET", "/v1/status")


@pytest.mark.parametrize("which", ["stranger", "ended", "own"])
async def test_other_certificates_do_not_get_past_tls(tmp_path: Path, which: str) -> None:
    """api (1)."""
    bundle = {
        "stranger": lambda: operator_bundle(kit=shared().stranger),
        "ended": lambda: operator_bundle(ended=True),
        "own": lambda: shared().bundle("edge-1", Flaw.EXPIRED),
    }[which]()
    async with serving(Double()) as (server, port):
        await refused(port, tmp_path, bundle)
        assert server.statistics.failed_tls == 1
        assert server.statistics.requests == 0
        assert (await (await connect(port, tmp_path)).ask("GET", "/v1/status"))[0] == 200


async def test_no_certificate_no_service(tmp_path: Path) -> None:
    """api (1, R-11-9)."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    async with serving(Double()) as (server, port):
        raw = await dial(port)
        client = Asker(trio.SSLStream(raw, context, https_compatible=True))
        with pytest.raises((trio.BrokenResourceError, h11.RemoteProtocolError)):
            await client.ask("GET", "/v1/status")
        await client.stream.aclose()
        assert server.statistics.requests == 0


@pytest.mark.parametrize(
    "bundle",
    [
        lambda: shared().bundle("edge-1"),
        lambda: operator_bundle(uri="stp-operator://elsewhere/alice?role=operator"),
        lambda: operator_bundle(uri="stp-operator://test/alice?role=root"),
        lambda: operator_bundle(uri="stp-operator://test/?role=viewer"),
        lambda: operator_bundle(uri="stp-operator://test/alice?role=viewer&role=operator"),
        lambda: operator_bundle(uri="stp-operator://test/alice"),
    ],
)
async def test_our_certificates_that_are_no_operators_are_told_so(tmp_path: Path, bundle: Any) -> None:
    """api (1): every path, known or not."""
    async with serving(Double()) as (server, port):
        client = await connect(port, tmp_path, bundle())
        for path in ("/v1/status", "/nothing"):
            status, answer = await client.ask("GET", path)
            assert (status, answer["error"]["code"]) == (403, "not_an_operator")
        assert server.statistics.not_operators == 1
        assert server.statistics.requests == 0


def test_a_certificate_with_two_names_is_nobody() -> None:
    """api (1)."""
    names = [
        ("URI", f"stp-operator://{DOMAIN}/a?role=viewer"),
        ("URI", f"stp-operator://{DOMAIN}/b?role=operator"),
    ]
    with pytest.raises(NotAnOperatorError):
        operator_of({"subjectAltName": names, "serialNumber": "01"}, DOMAIN)
    assert operator_of({"subjectAltName": names[:1], "serialNumber": "1F"}, DOMAIN) == Operator(
        name="a", role=Role.VIEWER, serial=31
    )


async def test_revocation_holds_at_once(tmp_path: Path) -> None:
    """api (1): also on a connection that stands."""
    revoked: set[int] = set()
    seen: list[int] = []

    def is_revoked(serial: int) -> bool:
        seen.append(serial)
        return serial in revoked

    async with serving(Double(), is_revoked=is_revoked) as (_, port):
        client = await connect(port, tmp_path)
        assert (await client.ask("GET", "/v1/status"))[0] == 200
        revoked.add(seen[0])
        status, answer = await client.ask("GET", "/v1/status")
        assert (status, answer["error"]["code"]) == (403, "revoked")


async def test_a_machine_without_a_clock_does_not_lock_its_operators_out(tmp_path: Path) -> None:
    """It woke up in 1970, where no certificate is valid yet; once its clock is set dates count again."""
    early = operator_bundle(early=True)
    async with serving(Double()) as (server, port):
        await refused(port, tmp_path, early)
        server.clock = lambda: 42.0
        assert (await (await connect(port, tmp_path, early)).ask("GET", "/v1/status"))[0] == 200
        await refused(port, tmp_path, operator_bundle(kit=shared().stranger))
        server.clock = time.time
        await refused(port, tmp_path, early)


async def test_long_lists_let_others_have_their_turn(tmp_path: Path) -> None:
    class Busy(Double):
        async def sessions(self) -> list[SessionStatus]:
            return [SessionStatus(id=f"{n:032x}") for n in range(1001)]

    async with serving(Busy()) as (_, port):
        client = await connect(port, tmp_path)
        _, answer = await client.ask("GET", "/v1/sessions")
        assert [int(one["id"], 16) for one in answer] == list(range(1001))


async def test_a_new_context_holds_from_the_next_connection_on(tmp_path: Path) -> None:
    nodes = ["hub-1"]
    async with serving(Double()) as (server, port):
        server.context = lambda: server_context(nodes[0])
        first = await connect(port, tmp_path)
        nodes[0] = "hub-2"
        second = await connect(port, tmp_path)
        names = [c.stream.getpeercert()["subjectAltName"][0][1] for c in (first, second)]  # type: ignore[attr-defined]
        assert names == ["stp://test/hub-1", "stp://test/hub-2"]
        assert (await first.ask("GET", "/v1/status"))[0] == 200


def test_no_tickets_and_no_old_tls() -> None:
    context = server_context()
    assert context.num_tickets == 0
    assert context.minimum_version is ssl.TLSVersion.TLSv1_3
    assert context.verify_mode is ssl.CERT_REQUIRED
    bundle = shared().bundle("hub-1")
    other = shared().bundle("hub-2")
    with pytest.raises(ssl.SSLError):
        make_context(bundle, other[: other.index(b"-----BEGIN CERT")], bundle)


# Bad clients -------------------------------------------------------------------------------------------


async def test_fault_29_slow_handshakes_are_cut_off_and_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """api (4)."""
    monkeypatch.setattr(api, "TLS_TIMEOUT", 0.2)
    monkeypatch.setattr(api, "MAX_UNAUTHENTICATED_PER_ADDRESS", 5)
    async with serving(Double()) as (server, port):
        silent = [await dial(port) for _ in range(8)]
        with trio.fail_after(5):
            for stream in silent:
                try:
                    assert await stream.receive_some(1) == b""
                except trio.BrokenResourceError:
                    pass
                await stream.aclose()
        assert server.statistics.refused_busy == 3
        assert server.statistics.failed_tls == 5
        assert (await (await connect(port, tmp_path)).ask("GET", "/v1/status"))[0] == 200
        assert server._waiting == {}


@pytest.mark.parametrize("said", [b"", b"GET /v1/st", b"GET /v1/status HTTP/1.1\r\nhost: x\r\n"])
async def test_slow_heads_are_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: bytes) -> None:
    """httpd (1)."""
    monkeypatch.setattr(httpd, "HEAD_TIMEOUT", 0.1)
    async with serving(Double()) as (_, port):
        client = await connect(port, tmp_path)
        with trio.fail_after(5):
            if said:
                await client.stream.send_all(said)
            assert await client.stream.receive_some(1000) == b""


async def test_slow_bodies_are_answered_408(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """httpd (1)."""
    monkeypatch.setattr(httpd, "BODY_TIMEOUT", 0.1)
    async with serving(Double()) as (_, port):
        client = await connect(port, tmp_path)
        head = h11.Request(
            method="POST", target="/v1/keys", headers=[("host", "x"), ("content-length", "10")]
        )
        await client.stream.send_all(client.http.send(head))
        assert (await client.answer())[0] == 408


@pytest.mark.parametrize(
    ("said", "status"),
    [
        (b"POST /v1/keys HTTP/1.1\r\nhost: x\r\ncontent-length: 70000\r\n\r\n" + b"x" * 70000, 413),
        (b"GET /v1/status HTTP/1.1\r\nhost: x\r\nlong: " + b"x" * 20000, 431),
        (b"hello there\r\n\r\n", 400),
        (b"GET /v1/status HTTP/1.1\r\n\r\n", 400),
        (b"GET /v1/status HTTP/1.1\r\nhost: x\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\n", 400),
        (b"GET http://x/v1/status HTTP/1.1\r\nhost: x\r\n\r\n", 400),
        (b"GET /v1/%0astatus HTTP/1.1\r\nhost: x\r\n\r\n", 400),
        (b"GET /v1/status?" + b"a&" * 40 + b" HTTP/1.1\r\nhost: x\r\n\r\n", 400),
    ],
    ids=["body", "head", "nonsense", "no host", "two lengths", "absolute", "control", "query"],
)
async def test_too_much_or_nonsense_is_answered_and_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: bytes, status: int
) -> None:
    """httpd (2), (4): the answer arrives, though the request was never read to its end."""
    monkeypatch.setattr(httpd, "LINGER", 0.05)
    async with serving(Double()) as (_, port):
        client = await connect(port, tmp_path)
        await client.stream.send_all(said)
        client.http.send(h11.Request(method="GET", target="/", headers=[("host", "x")]))
        found, answer = await client.answer()
        assert found == status
        assert answer["error"]["message"]
        with trio.fail_after(5):
            assert await client.stream.receive_some(1000) == b""
        assert (await (await connect(port, tmp_path)).ask("GET", "/v1/status"))[0] == 200


@pytest.mark.parametrize("when", ["handshake", "request", "answer", "events"])
async def test_a_client_that_breaks_takes_nobody_along(tmp_path: Path, when: str) -> None:
    """api (5): a reset in the middle of things, many times over."""
    double = Double()
    async with serving(double) as (server, port):
        good = await connect(port, tmp_path)
        for _ in range(5):
            raw = await dial(port)
            if when != "handshake":
                tls = trio.SSLStream(raw, client_context(operator_bundle(), tmp_path), https_compatible=True)
                await tls.do_handshake()
                client = Asker(tls)
                if when == "request":
                    await tls.send_all(b"POST /v1/keys HTTP/1.1\r\nhost: x\r\ncontent-length: 9\r\n\r\nx")
                else:
                    await client.send("GET", "/v1/events" if when == "events" else "/v1/status")
                if when == "events":
                    await client.event()
            raw.socket.setsockopt(trio.socket.SOL_SOCKET, trio.socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            raw.socket.close()
            double.bus.publish("drain", "something")
        assert (await good.ask("GET", "/v1/status"))[0] == 200
        assert server.statistics.failed == 0


async def test_a_handler_that_raises_is_a_500_and_a_line_in_the_log(tmp_path: Path) -> None:
    """api (5), httpd (3)."""

    class Broken(Double):
        def buffer(self) -> Any:
            if hasattr(self, "state"):
                raise KeyError("no such thing")
            return super().buffer()

    async with serving(Broken()) as (server, port):
        client = await connect(port, tmp_path)
        with capture_logs() as logs:
            status, answer = await client.ask("GET", "/v1/buffer")
        assert (status, answer["error"]["code"]) == (500, "internal")
        assert "no such thing" not in str(answer)
        assert [entry["event"] for entry in logs] == ["connection_failed"]
        assert server.statistics.failed == 1
        assert (await client.ask("GET", "/v1/status"))[0] == 200


async def test_a_handler_that_hangs_is_a_504(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(httpd, "REQUEST_TIMEOUT", 0.1)

    class Hanging(Double):
        async def reload(self) -> Any:
            await trio.sleep_forever()

    async with serving(Hanging()) as (_, port):
        client = await connect(port, tmp_path)
        assert (await client.ask("POST", "/v1/reload"))[0] == 504


async def test_connections_of_operators_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "MAX_CONNECTIONS", 2)
    async with serving(Double()) as (server, port):
        clients = [await connect(port, tmp_path) for _ in range(2)]
        for client in clients:
            await client.ask("GET", "/v1/status")
        with pytest.raises((trio.BrokenResourceError, ConnectionError)):
            await connect(port, tmp_path)
        assert server.statistics.refused_busy == 1
        await clients[0].stream.aclose()
        await until(lambda: server.statistics.open == 1)
        assert (await (await connect(port, tmp_path)).ask("GET", "/v1/status"))[0] == 200


async def test_an_address_in_use_is_named() -> None:
    async with serving(Double()) as (server, port):
        with pytest.raises(OSError, match=f"127.0.0.1:{port} for management"):
            await server.serve("127.0.0.1", port)


def test_logging_needs_no_configuration() -> None:
    assert structlog.get_logger("stpd.api") is not None
