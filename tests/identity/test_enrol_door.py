"""stpd/enrol.py: limits of the door, and what strangers send to it. Promises are those at the head of that file."""

from __future__ import annotations

import base64
import json
import socket
import ssl
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs

from stp.enrol import join_device
from stp.identity import Identity
from stp.pinned import EX_TEMPFAIL, MAX_BODY, EnrolError, by_anchors, exchange
from stpd.enrol import (
    FORWARDED_PER_MINUTE,
    MAX_CONNECTIONS,
    MAX_HEADERS,
    MAX_PER_ADDRESS,
    TRIES_PER_MINUTE,
    EnrolmentDoor,
    Tries,
    address_key,
    server_context,
)
from stpd.issuing import FORWARDER_HEADER, SIGNATURE_HEADER, Issuer, forward_headers
from stpd.keys import JoinTokens, NodeRegistry
from stpd.pki import CertificateAuthority
from tests.identity.conftest import Clock, Site, identity_from, in_thread

HOUR = 3600.0


async def post(site: Site, path: str, body: bytes, **options: object) -> tuple[int, dict[str, str]]:
    status, answer = await in_thread(
        exchange, "127.0.0.1", site.port, path, body, by_anchors([site.authority.der]), **options
    )
    return status, json.loads(answer)


@contextmanager
def tcp(port: int, count: int) -> Iterator[list[socket.socket]]:
    sockets = [socket.create_connection(("127.0.0.1", port)) for _ in range(count)]
    try:
        yield sockets
    finally:
        for one in sockets:
            one.close()


async def until(condition: Callable[[], bool]) -> None:
    """What another task brings about, without saying so."""
    with trio.fail_after(5):
        while not condition():
            await trio.sleep(0.005)


async def ends(one: socket.socket) -> bool:
    """Whether the other side hangs up on us (or resets) within five seconds."""
    stream = trio.SocketStream(trio.socket.from_stdlib_socket(one))
    with trio.move_on_after(5):
        try:
            while await stream.receive_some(1024):
                pass
        except trio.BrokenResourceError:
            pass
        return True
    return False


# -- (1), (2): connections and deadlines -------------------------------------------------------------------


async def test_fault_29_slow_connections_are_bounded_and_end(site: Site, tmp_path: Path) -> None:
    site.door.deadline = 0.3
    statistics = site.door.statistics
    with tcp(site.port, MAX_PER_ADDRESS + 3) as sockets:
        await until(lambda: statistics.accepted + statistics.refused_full == len(sockets))
        assert statistics.open == MAX_PER_ADDRESS
        assert statistics.refused_full == 3
        await until(lambda: statistics.open == 0)
        assert statistics.late == MAX_PER_ADDRESS
        for one in sockets:
            assert await ends(one)
    made = site.tokens.create("device", 1, HOUR)
    site.door.deadline = 10.0
    await in_thread(join_device, made.token, site.host, "sensor-1", tmp_path / "d.pem")


async def test_fault_29_half_a_request_ends_too(site: Site) -> None:
    """The handshake is done, the headers come one byte at a time: one deadline for all of it."""
    site.door.deadline = 0.3
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    stream = trio.SSLStream(await trio.open_tcp_stream("127.0.0.1", site.port), context)
    with trio.fail_after(5), pytest.raises(trio.BrokenResourceError):
        while True:
            await stream.send_all(b"P")
            await trio.sleep(0.02)
    await trio.aclose_forcefully(stream)
    assert site.door.statistics.late == 1


async def test_no_more_than_64_in_all(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """All from one address here, so that address's own limit is put out of the way."""
    monkeypatch.setattr("stpd.enrol.MAX_PER_ADDRESS", 1000)
    with tcp(site.port, MAX_CONNECTIONS + 2):
        statistics = site.door.statistics
        await until(lambda: statistics.accepted + statistics.refused_full == MAX_CONNECTIONS + 2)
        assert (statistics.open, statistics.refused_full) == (MAX_CONNECTIONS, 2)


async def test_what_is_no_tls_is_counted_and_survived(site: Site, tmp_path: Path) -> None:
    with tcp(site.port, 1) as (one,):
        one.sendall(b"GET / HTTP/1.1\r\n\r\n")
        assert await ends(one)
    assert site.door.statistics.broken == 1
    made = site.tokens.create("device", 1, HOUR)
    await in_thread(join_device, made.token, site.host, "sensor-1", tmp_path / "d.pem")


async def test_a_port_that_is_taken_is_named(site: Site) -> None:
    door = EnrolmentDoor(site.door.issuer)
    with pytest.raises(OSError, match=rf"enrol\.listen: cannot listen on 127\.0\.0\.1:{site.port}"):
        await door.serve(site.host)


# -- what is asked -----------------------------------------------------------------------------------------


async def test_requests_that_make_no_sense(site: Site) -> None:
    """R-11-8."""
    cases = [
        ("/v1/enrol", b"not json"),
        ("/v1/enrol", b"[]"),
        ("/v1/enrol", b'{"token": 1, "name": "n", "csr": "", "kind": "device"}'),
        ("/v2/enrol", b"{}"),
    ]
    for path, body in cases:
        status, answer = await post(site, path, body)
        assert (status, answer["error"]) == (400, "bad-request")
        assert answer["cause"]
        assert answer["advice"]
    status, answer = await post(site, "/v1/enrol", b"x" * (MAX_BODY + 1))
    assert (status, answer["error"]) == (413, "bad-request")
    assert site.door.issuer.statistics.refused == len(cases)


async def talk(site: Site, request: bytes) -> bytes:
    """Raw bytes over TLS; all that comes back."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    tcp_stream = await trio.open_tcp_stream("127.0.0.1", site.port)
    stream = trio.SSLStream(tcp_stream, context, https_compatible=True)
    got = b""
    with trio.fail_after(5):
        try:
            await stream.send_all(request)
            while chunk := await stream.receive_some(65536):
                got += chunk
        except trio.BrokenResourceError:
            pass
        finally:
            await trio.aclose_forcefully(stream)
    return got


async def test_only_post_is_answered(site: Site) -> None:
    assert b"405" in (await talk(site, b"GET / HTTP/1.1\r\nhost: h\r\n\r\n")).splitlines()[0]


async def test_a_chunked_body_without_end_is_cut_off(site: Site) -> None:
    head = b"POST /v1/enrol HTTP/1.1\r\nhost: h\r\ntransfer-encoding: chunked\r\n\r\n"
    chunk = b"4000\r\n" + b"x" * 0x4000 + b"\r\n"
    assert b"413" in (await talk(site, head + chunk * 5)).splitlines()[0]


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"POST /v1/enrol HTTP/1.1\r\n" + b"x" * (MAX_HEADERS + 70000),
        b"\x00\xff\x16\x03",
        b"POST /v1/enrol HTTP/1.1\r\nhost: h\r\ncontent-length: ten\r\n\r\n",
        b"POST /v1/enrol HTTP/1.1\r\nhost: h\r\ncontent-length: 10\r\n\r\nshort",
    ],
)
async def test_what_is_no_http_gets_no_answer(site: Site, request_bytes: bytes) -> None:
    site.door.deadline = 0.5
    assert await talk(site, request_bytes) == b""
    await until(lambda: site.door.statistics.open == 0)
    assert site.door.statistics.broken + site.door.statistics.late == 1


async def test_expect_100_continue(site: Site) -> None:
    head = b"POST /v1/enrol HTTP/1.1\r\nhost: h\r\nexpect: 100-continue\r\ncontent-length: 2\r\n\r\n"
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    stream = trio.SSLStream(
        await trio.open_tcp_stream("127.0.0.1", site.port), context, https_compatible=True
    )
    with trio.fail_after(5):
        await stream.send_all(head)
        assert (await stream.receive_some(65536)).startswith(b"HTTP/1.1 100")
        await stream.send_all(b"{}")
        assert (await stream.receive_some(65536)).startswith(b"HTTP/1.1 400")
    await trio.aclose_forcefully(stream)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    path=st.sampled_from(["/v1/enrol", "/v1/renew", "/", "/v1/enrol?x"]),
    fields=st.one_of(
        st.binary(max_size=200),
        st.dictionaries(
            st.sampled_from(["token", "name", "csr", "kind", "chain", "signature"]),
            st.one_of(st.text(max_size=60), st.integers(), st.none()),
        ),
        st.fixed_dictionaries({k: st.text(max_size=60) for k in ("token", "name", "csr", "kind")}),
        st.fixed_dictionaries({k: st.text(max_size=60) for k in ("chain", "csr", "signature")}),
    ),
    host=st.text(max_size=40),
)
def test_any_request_gets_an_answer(
    fields: bytes | dict[str, object], path: str, host: str, tmp_path: Path
) -> None:
    """Nothing a stranger sends raises, or gets a certificate."""
    body = fields if isinstance(fields, bytes) else json.dumps(fields).encode()
    issuer = shared_issuer(tmp_path)
    with capture_logs():
        status, answer = issuer.answer(path, body, host=host, address="192.0.2.1")
    assert status in (400, 403, 409)
    assert set(answer) == {"error", "cause", "advice"}


ISSUERS: list[Issuer] = []


def shared_issuer(directory: Path) -> Issuer:
    if not ISSUERS:
        clock = Clock()
        authority = CertificateAuthority.create("site", clock)
        identity = identity_from(authority, "hub-1", answers=True)
        tokens = JoinTokens(directory / "t.json", authority.der, clock)
        ISSUERS.append(Issuer(lambda: identity, NodeRegistry(directory / "n.json", clock), authority, tokens))
    return ISSUERS[0]


# -- (3), (4), (5): tries ----------------------------------------------------------------------------------


async def test_five_wrong_tries_a_minute(site: Site, tmp_path: Path) -> None:
    """R-11-8."""
    body = json.dumps({"token": "stpj1.x", "name": "n", "csr": "", "kind": "device"}).encode()
    for _ in range(TRIES_PER_MINUTE):
        assert (await post(site, "/v1/enrol", body))[0] == 400
    status, answer = await post(site, "/v1/enrol", body)
    assert (status, answer["error"]) == (429, "too-many")
    assert "try again in" in answer["advice"]
    made = site.tokens.create("device", 1, HOUR)
    with pytest.raises(EnrolError) as caught:
        await in_thread(join_device, made.token, site.host, "sensor-1", tmp_path / "d.pem")
    assert caught.value.exit_code == EX_TEMPFAIL
    assert site.door.statistics.refused_tries == 2


async def test_tries_that_succeed_are_given_back(site: Site, tmp_path: Path) -> None:
    made = site.tokens.create("device", 0, HOUR)
    for n in range(TRIES_PER_MINUTE + 3):
        await in_thread(join_device, made.token, site.host, f"sensor-{n}", tmp_path / f"{n}.pem")


async def test_a_gateway_is_charged_for_what_it_passes_on(site: Site) -> None:
    """One joiner who guesses does not lock out the others behind the same gateway, nor the gateway's address."""
    edge = identity_from(site.authority, "edge-1", answers=True)
    bad = b"{}"
    for _ in range(TRIES_PER_MINUTE * 2):
        assert (await post(site, "/v1/enrol", bad, headers=forward_headers(edge, bad)))[0] == 400
    for _ in range(TRIES_PER_MINUTE):
        assert (await post(site, "/v1/enrol", bad))[0] == 400
    assert (await post(site, "/v1/enrol", bad))[0] == 429


def other_body(site: Site) -> list[tuple[str, str]]:
    edge = identity_from(site.authority, "edge-1", answers=True)
    return forward_headers(edge, b"[]")


def a_device(site: Site) -> list[tuple[str, str]]:
    return forward_headers(identity_from(site.authority, "sensor-1", answers=False), b"{}")


def a_stranger(site: Site) -> list[tuple[str, str]]:
    return forward_headers(identity_from(CertificateAuthority.create("site"), "edge-1", answers=True), b"{}")


def revoked(site: Site) -> list[tuple[str, str]]:
    edge = identity_from(site.authority, "edge-1", answers=True)
    site.registry.enrol("edge-1", "gateway", key="k", serial=edge.serial, not_after=2e9)
    site.registry.revoke("edge-1")
    return forward_headers(edge, b"{}")


def nonsense(site: Site) -> list[tuple[str, str]]:
    return [(FORWARDER_HEADER, base64.b64encode(b"x").decode()), (SIGNATURE_HEADER, "***")]


@pytest.mark.parametrize("headers", [other_body, a_device, a_stranger, revoked, nonsense])
async def test_a_forged_forwarder_is_charged_to_its_address(site: Site, headers: object) -> None:
    """issuing (4)"""
    shown = headers(site)  # type: ignore[operator]
    for _ in range(TRIES_PER_MINUTE):
        assert (await post(site, "/v1/enrol", b"{}", headers=shown))[0] == 400
    assert (await post(site, "/v1/enrol", b"{}", headers=shown))[0] == 429


def test_tries_refill() -> None:
    tries = Tries()
    assert [tries.take("a", 5, 0.0) for _ in range(6)] == [0, 0, 0, 0, 0, pytest.approx(12.0)]
    assert tries.take("b", 5, 0.0) == 0
    assert tries.take("a", 5, 11.9) > 0
    assert tries.take("a", 5, 12.1) == 0
    assert tries.take("a", 5, 12.1) > 0
    assert [tries.take("a", 5, 1e6) for _ in range(5)] == [0] * 5  # never more than a minute's worth
    assert tries.take("a", 5, 1e6) > 0
    assert FORWARDED_PER_MINUTE > TRIES_PER_MINUTE


def test_the_table_of_addresses_is_bounded() -> None:
    tries = Tries(limit=100)
    tries.take("busy", 1, 0.0)
    for n in range(1000):
        tries.take(str(n), 5, 0.0)
        assert tries.take("busy", 1, 0.0) > 0  # heard from all the time: it stays
    assert len(tries) == 100
    tries.give_back("gone")


@pytest.mark.parametrize(
    ("host", "key"),
    [
        ("192.0.2.7", "192.0.2.7"),
        ("::ffff:192.0.2.7", "192.0.2.7"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::"),
        ("2001:db8:1:2:ffff::1", "2001:db8:1:2::"),
        ("fe80::1%eth0", "fe80::"),
        ("@unix", "@unix"),
    ],
)
def test_addresses_are_counted_by_prefix(host: str, key: str) -> None:
    """(5)"""
    assert address_key(host) == key


# -- the identity ------------------------------------------------------------------------------------------


async def test_a_new_identity_is_served_at_once(site: Site) -> None:
    first = site.door.tls()
    assert site.door.tls() is first
    fresh = identity_from(site.authority, "hub-1", answers=True)
    site.door.issuer.identity = lambda: fresh
    assert site.door.tls() is not first
    assert (await post(site, "/v1/enrol", b"{}"))[0] == 400


async def test_the_key_reaches_no_disk(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a temporary file")

    monkeypatch.setattr("tempfile.NamedTemporaryFile", refuse)
    server_context(site.identity)


async def test_without_memfd_it_works_as_well(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("os.memfd_create")
    context = server_context(site.identity)
    assert context.verify_mode is ssl.CERT_NONE
    assert context.num_tickets == 0
    assert isinstance(site.identity, Identity)
