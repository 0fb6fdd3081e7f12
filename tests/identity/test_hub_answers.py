"""stp/enrol.py against a hub that is ours and yet answers what it should not, and against a disk that says no."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ed25519

from stp.enrol import (
    join,
    join_device,
    key_pem,
    new_key,
    new_token,
    pending_key,
    renew,
    renew_file,
    renewal_host,
    save_bundle,
)
from stp.identity import Identity, Upstream, network_key_pem
from stp.pinned import EX_CANTCREAT, EX_PROTOCOL, EX_USAGE, EnrolError
from stpd.enrol import server_context
from stpd.pki import CertificateAuthority, certificate_pem
from tests.identity.conftest import identity_from


@pytest.fixture(scope="module")
def authority() -> CertificateAuthority:
    return CertificateAuthority.create("site")


@contextmanager
def hub(authority: CertificateAuthority, answer: bytes) -> Iterator[str]:
    """Answers one request with this body and status 200."""
    context = server_context(identity_from(authority, "hub-1", answers=True))
    head = f"HTTP/1.1 200 OK\r\ncontent-length: {len(answer)}\r\nconnection: close\r\n\r\n".encode()
    listener = socket.create_server(("127.0.0.1", 0))

    def run() -> None:
        connection, _ = listener.accept()
        with connection, context.wrap_socket(connection, server_side=True) as tls:
            tls.recv(65536)
            tls.sendall(head + answer)

    thread = threading.Thread(target=run)
    thread.start()
    yield f"127.0.0.1:{listener.getsockname()[1]}"
    thread.join(5)
    listener.close()


def granted(authority: CertificateAuthority, key: Any, node: str = "sensor-1", **changes: object) -> bytes:
    leaf = authority.issue(key.public_key(), "site", node, answers=False)
    answer = {
        "node": node,
        "role": "device",
        "chain": certificate_pem(leaf),
        "anchors": authority.pem,
        "network_key": network_key_pem(bytes(32)),
        "upstream": {"node": "hub-1", "url": "stp://hub-1@127.0.0.1:9000"},
        "time": 1.8e9,
    }
    return json.dumps(answer | changes).encode()


def test_a_good_answer_is_taken(authority: CertificateAuthority) -> None:
    key = new_key()
    with hub(authority, granted(authority, key)) as host:
        grant = join(new_token(authority.der).encode(), host, "sensor-1", key)
    assert Identity.parse([("g", grant.bundle(key_pem(key)))]).node == "sensor-1"


@pytest.mark.parametrize(
    ("changes", "cause"),
    [
        ({"chain": ""}, "unusable"),
        ({"network_key": network_key_pem(bytes(5))}, "unusable"),
        ({"anchors": ""}, "unusable"),
        ({"anchors": CertificateAuthority.create("site").pem}, "without the CA that the token pins"),
        ({"upstream": None}, "makes no sense"),
        ({"time": "soon"}, "makes no sense"),
    ],
)
def test_answers_that_are_not_taken(
    authority: CertificateAuthority, changes: dict[str, object], cause: str
) -> None:
    key = new_key()
    with (
        hub(authority, granted(authority, key, **changes)) as host,
        pytest.raises(EnrolError, match=cause) as caught,
    ):
        join(new_token(authority.der).encode(), host, "sensor-1", key)
    assert caught.value.exit_code == EX_PROTOCOL


def test_another_name_or_key_is_not_taken(authority: CertificateAuthority) -> None:
    key = new_key()
    with (
        hub(authority, granted(authority, key, "sensor-2")) as host,
        pytest.raises(EnrolError, match="not for"),
    ):
        join(new_token(authority.der).encode(), host, "sensor-1", key)
    with (
        hub(authority, granted(authority, new_key())) as host,
        pytest.raises(EnrolError, match="no certificate match"),
    ):
        join(new_token(authority.der).encode(), host, "sensor-1", key)


@pytest.mark.parametrize("answer", [b"", b"[]", b"not json", b"5", b"{}"])
def test_answers_that_are_no_grant(authority: CertificateAuthority, answer: bytes) -> None:
    with hub(authority, answer) as host, pytest.raises(EnrolError, match="makes no sense"):
        join(new_token(authority.der).encode(), host, "sensor-1", new_key())


# -- where to renew ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "host"),
    [
        ("stp://hub-1@hub.example:9000", "hub.example:8443"),
        ("stp://hub-1@[2001:db8::1]:9000", "[2001:db8::1]:8443"),
    ],
)
def test_a_device_renews_where_it_joined(url: str, host: str) -> None:
    assert renewal_host(Upstream("hub-1", url)) == host


@pytest.mark.parametrize("upstream", [None, Upstream("hub-1", "http://x")])
def test_a_device_that_does_not_know_asks_for_a_host(upstream: Upstream | None) -> None:
    with pytest.raises(EnrolError) as caught:
        renewal_host(upstream)
    assert (caught.value.exit_code, caught.value.advice) == (EX_USAGE, "give --host HOST")


def test_only_ecdsa_identities_are_renewed(authority: CertificateAuthority) -> None:
    identity = identity_from(authority, "sensor-1", answers=False)
    identity.credentials.key_der = ed25519.Ed25519PrivateKey.generate().private_bytes(
        serialization.Encoding.DER, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    with pytest.raises(EnrolError, match="only ECDSA"):
        renew(identity, "127.0.0.1:1", new_key())


def test_renewing_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(EnrolError, match="no such file") as caught:
        renew_file(tmp_path / "none.pem")
    assert caught.value.exit_code == EX_USAGE


# -- the disk ----------------------------------------------------------------------------------------------


def test_a_pending_key_is_found_again_and_a_damaged_one_replaced(tmp_path: Path) -> None:
    path = tmp_path / "new" / "d.pem.joining"
    first = pending_key(path)
    assert key_pem(pending_key(path)) == key_pem(first)
    path.write_text("half a file")
    second = pending_key(path)
    assert key_pem(second) != key_pem(first)
    assert key_pem(pending_key(path)) == key_pem(second)


def test_a_disk_that_says_no_is_named(tmp_path: Path, authority: CertificateAuthority) -> None:
    (tmp_path / "file").touch()
    token = new_token(authority.der).encode()
    with pytest.raises(EnrolError, match="cannot be written") as caught:
        join_device(token, "127.0.0.1:1", "sensor-1", tmp_path / "file" / "d.pem")
    assert caught.value.exit_code == EX_CANTCREAT
    key = new_key()
    with hub(authority, granted(authority, key)) as host:
        grant = join(token, host, "sensor-1", key)
    with pytest.raises(EnrolError, match="cannot be written"):
        save_bundle(tmp_path / "none" / "d.pem", grant, key, tmp_path / "pending")
