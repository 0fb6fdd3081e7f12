"""stp/pinned.py: whom a joiner talks to, and what it says when that fails. Promises are those at the head of it."""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trio

from stp.enrol import join_device, new_token, parse_host, refused
from stp.pinned import (
    EX_NOPERM,
    EX_PROTOCOL,
    EX_TEMPFAIL,
    EX_UNAVAILABLE,
    EX_USAGE,
    EnrolError,
    by_anchors,
    by_pin,
    exchange,
    pin_of,
)
from stpd.enrol import server_context
from stpd.pki import CertificateAuthority
from tests.identity.conftest import Site, identity_from, in_thread

HOUR = 3600.0


@contextmanager
def server(conversation: Callable[[socket.socket], None]) -> Iterator[int]:
    """One connection, handled by `conversation` in a thread; then it is closed."""
    listener = socket.create_server(("127.0.0.1", 0))

    def run() -> None:
        try:
            connection, _ = listener.accept()
        except OSError:
            return
        with connection:
            try:
                conversation(connection)
            except OSError:
                pass

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join(5)


@pytest.fixture(scope="module")
def authority() -> CertificateAuthority:
    return CertificateAuthority.create("site")


def tls_server(authority: CertificateAuthority, answer: bytes) -> Callable[[socket.socket], None]:
    context = server_context(identity_from(authority, "hub-1", answers=True))

    def run(connection: socket.socket) -> None:
        with context.wrap_socket(connection, server_side=True) as tls:
            tls.recv(65536)
            tls.sendall(answer)
            tls.unwrap()

    return run


def fails(
    port: int, authority: CertificateAuthority, timeout: float = 5.0, host: str = "127.0.0.1"
) -> EnrolError:
    with pytest.raises(EnrolError) as caught:
        exchange(host, port, "/v1/enrol", b"{}", by_anchors([authority.der]), timeout=timeout)
    assert "\n" not in caught.value.cause
    assert "\n" not in caught.value.advice
    return caught.value


def test_nobody_listens(authority: CertificateAuthority) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    error = fails(port, authority)
    assert (error.exit_code, error.cause) == (EX_UNAVAILABLE, f"nothing listens at 127.0.0.1:{port}")


def test_no_such_name(authority: CertificateAuthority) -> None:
    error = fails(8443, authority, host="no-such-host.invalid")
    assert (error.exit_code, "no-such-host.invalid" in error.cause) == (EX_UNAVAILABLE, True)


def test_a_port_that_speaks_something_else(authority: CertificateAuthority) -> None:
    with server(lambda s: s.sendall(b"SSH-2.0-OpenSSH_9.2\r\n")) as port:
        error = fails(port, authority)
    assert (error.exit_code, "does not speak TLS" in error.cause) == (EX_PROTOCOL, True)


def test_a_port_that_says_nothing(authority: CertificateAuthority) -> None:
    done = threading.Event()
    with server(lambda s: done.wait(5) and None) as port:
        error = fails(port, authority, timeout=0.2)
        done.set()
    assert (error.exit_code, "no answer in time" in error.cause or "timed out" in error.cause) == (
        EX_TEMPFAIL,
        True,
    )


def test_a_port_that_hangs_up(authority: CertificateAuthority) -> None:
    with server(lambda s: s.recv(1) and None) as port:
        error = fails(port, authority)
    assert error.exit_code == EX_TEMPFAIL


def test_an_old_tls_is_refused(authority: CertificateAuthority) -> None:
    def old(connection: socket.socket) -> None:
        context = server_context(identity_from(authority, "hub-1", answers=True))
        context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_2
        with context.wrap_socket(connection, server_side=True):
            pass

    with server(old) as port:
        error = fails(port, authority)
    assert error.exit_code == EX_PROTOCOL


@pytest.mark.parametrize(
    ("answer", "cause", "code"),
    [
        (b"", "hung up", EX_TEMPFAIL),
        (b"HTTP/1.1 200 OK\r\n", "hung up", EX_TEMPFAIL),
        (b"220 mail ready\r\n\r\n", "does not answer in HTTP", EX_PROTOCOL),
        (b"HTTP/1.1 200 OK\r\n\r\n" + b"x" * 70000, "answers without end", EX_PROTOCOL),
    ],
)
def test_answers_that_are_none(authority: CertificateAuthority, answer: bytes, cause: str, code: int) -> None:
    with server(tls_server(authority, answer)) as port:
        error = fails(port, authority)
    assert (error.exit_code, cause in error.cause) == (code, True)


async def test_a_token_goes_to_nobody_else(site: Site, nursery: trio.Nursery, tmp_path: Path) -> None:
    """(1): a hub with the same names and another CA sees no byte of it (R-11-7)."""
    other = await Site.make(tmp_path / "other", nursery).open()
    made = site.tokens.create("device", 1, HOUR)
    with pytest.raises(EnrolError) as caught:
        await in_thread(join_device, made.token, other.host, "sensor-1", tmp_path / "d.pem")
    assert (caught.value.exit_code, "not of the fleet" in caught.value.cause) == (EX_PROTOCOL, True)
    assert other.door.statistics.accepted == 1
    assert other.door.issuer.statistics.refused == 0
    assert site.tokens.list()[0].used == 0


async def test_a_device_cannot_play_the_hub(site: Site, tmp_path: Path) -> None:
    """(1), (2): right CA, wrong purpose. Python's own server would not mind; the joiner does."""
    device = identity_from(site.authority, "hub-1", answers=False)
    site.door.issuer.identity = lambda: device
    made = site.tokens.create("device", 1, HOUR)
    with pytest.raises(EnrolError, match="is a device and answers as if it were a hub"):
        await in_thread(join_device, made.token, site.host, "sensor-1", tmp_path / "d.pem")


async def test_another_domain_is_refused(site: Site) -> None:
    with pytest.raises(EnrolError, match="belongs to site, not to elsewhere"):
        await in_thread(
            exchange, "127.0.0.1", site.port, "/", b"", by_anchors([site.authority.der]), domain="elsewhere"
        )


def test_pins(authority: CertificateAuthority) -> None:
    assert by_pin(pin_of(authority.der))(authority.der)
    assert not by_pin(pin_of(authority.der))(authority.der + b"x")
    assert new_token(authority.der).pin == pin_of(authority.der)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("hub", ("hub", 8443)),
        ("hub.example.net:443", ("hub.example.net", 443)),
        ("10.0.0.1", ("10.0.0.1", 8443)),
        ("[::1]:9", ("::1", 9)),
        ("[fe80::1%eth0]", ("fe80::1%eth0", 8443)),
        ("::1", ("::1", 8443)),
        ("2001:db8::5", ("2001:db8::5", 8443)),
    ],
)
def test_hosts(text: str, found: tuple[str, int]) -> None:
    assert parse_host(text) == found


BAD_HOSTS = ["", "a b", "hub:", "hub:x", "hub:99999", "https://hub", "hub/x", "u@hub", "[::1", "a:1:2"]


@pytest.mark.parametrize("text", BAD_HOSTS)
def test_bad_hosts(text: str) -> None:
    with pytest.raises(EnrolError, match="is not a host") as caught:
        parse_host(text)
    assert caught.value.exit_code == EX_USAGE


def test_a_refusal_is_shown_in_one_clean_line() -> None:
    """What a server says is not to be trusted with the terminal."""
    error = refused({"error": "x", "cause": "a\n\x1b[2Jb" + "c" * 1000, "advice": 5})
    assert error.cause.startswith("a [2Jb")
    assert "\x1b" not in error.cause
    assert len(error.cause) <= 300
    assert (error.advice, error.exit_code) == ("5", EX_NOPERM)
    assert refused({}).cause
