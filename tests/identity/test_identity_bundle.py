"""stp/identity.py: bundles, addresses, files. Promises are those at the head of that file."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from stp.identity import (
    MAX_BUNDLE,
    Address,
    Identity,
    IdentityError,
    Upstream,
    check_node_name,
    network_key_pem,
    parse_url,
    pem_block,
    upstream_pem,
    write_atomically,
)
from tests.identity_kit import NETWORK_KEY, Flaw, Kit, key_pem, parts_of, pem, shared


@pytest.fixture
def kit() -> Kit:
    return shared()


def test_a_bundle_says_who_we_are(kit: Kit, tmp_path: Path) -> None:
    path = kit.write(tmp_path, "edge-1")
    found = Identity.load(path)
    chain, key, anchors = parts_of(path.read_bytes())
    assert (found.domain, found.node) == ("test", "edge-1")
    assert found.credentials.chain_der == chain
    assert found.credentials.key_der == key
    assert found.credentials.anchors_der == anchors == (kit.der(),)
    assert found.network_keys == (NETWORK_KEY,)
    assert found.leaf_der == chain[0]
    assert found.files == (str(path),)


def test_several_files_in_any_order_are_one_bundle(kit: Kit, tmp_path: Path) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    other = kit.certificate("other", ec.generate_private_key(ec.SECP256R1()))
    files = {
        "anchors.pem": pem(kit.ca),
        "other.pem": pem(other),
        "leaf.pem": pem(kit.certificate("edge-1", key)),
        "key.pem": key_pem(key),
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    found = Identity.load([tmp_path / name for name in files])
    assert found.node == "edge-1"  # the leaf is the one that matches the key, not the first
    assert found.credentials.anchors_der == (kit.der(),)
    assert found.credentials.chain_der[1:] == (other.public_bytes(serialization.Encoding.DER),)


def test_upstream_and_unknown_blocks(kit: Kit) -> None:
    upstream = Upstream("hub-1", "stp://hub-1@hub.example:9000", 1.9e9)
    data = kit.bundle("edge-1") + upstream_pem(upstream).encode() + pem_block("STP LATER", b"x").encode()
    found = Identity.parse([("b", data)])
    assert found.upstream == upstream
    assert found.issued == 1.9e9
    assert kit.identity("edge-1").issued == kit.identity("edge-1").not_before.timestamp()


def test_two_network_keys_keep_their_order_and_three_are_refused(kit: Kit) -> None:
    second = network_key_pem(b"\1" * 32).encode()
    data = kit.bundle("edge-1") + second
    assert Identity.parse([("b", data)]).network_keys == (NETWORK_KEY, b"\1" * 32)
    with pytest.raises(IdentityError, match="more than two network keys"):
        Identity.parse([("b", data + second)])


def cut(data: bytes, label: bytes) -> bytes:
    head, _, rest = data.partition(b"-----BEGIN " + label)
    return head + rest.partition(b"-----END " + label + b"-----\n")[2]


def test_every_fault_has_file_cause_and_advice(kit: Kit, tmp_path: Path) -> None:
    """(1)"""
    good = kit.bundle("edge-1")
    encrypted = ec.generate_private_key(ec.SECP256R1()).private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(b"x"),
    )
    other_key = key_pem(ec.generate_private_key(ec.SECP256R1()))
    faults: dict[str, bytes] = {
        "no private key": cut(good, b"PRIVATE KEY"),
        "2 private keys": good + other_key,
        "no certificate matches": other_key + cut(good, b"PRIVATE KEY"),
        "no anchor": good[: good.rindex(b"-----BEGIN CERT")],
        "certificate in it is damaged": good.replace(
            b"-----BEGIN CERTIFICATE-----\nMII", b"-----BEGIN CERTIFICATE-----\nAII"
        ),
        "private key is encrypted": encrypted + cut(good, b"PRIVATE KEY"),
        "private key is damaged": pem_block("PRIVATE KEY", b"nonsense").encode() + cut(good, b"PRIVATE KEY"),
        "names no node": kit.bundle("edge-1", Flaw.WRONG_URI),
        "names no node: ": kit.bundle("edge-1", Flaw.NO_URI),
        "network key of 5 bytes": good + pem_block("STP NETWORK KEY", b"short").encode(),
        "not base64": good + b"-----BEGIN STP NETWORK KEY-----\n***\n-----END STP NETWORK KEY-----\n",
        "upstream block is damaged": good + pem_block("STP UPSTREAM", b"[]").encode(),
        "larger than": b"x" * (MAX_BUNDLE + 1),
    }
    for cause, data in faults.items():
        path = tmp_path / "b.pem"
        path.write_bytes(data)
        with pytest.raises(IdentityError) as caught:
            Identity.load(path)
        assert cause in caught.value.cause, cause
        assert caught.value.advice
        assert caught.value.file == str(path)


def test_missing_and_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(IdentityError, match="no such file"):
        Identity.load(tmp_path / "none.pem")
    with pytest.raises(IdentityError, match="Is a directory"):
        Identity.load(tmp_path)
    with pytest.raises(IdentityError, match="no identity file is named"):
        Identity.load([])
    closed = tmp_path / "closed.pem"
    closed.touch(0o000)
    if os.geteuid() == 0:
        pytest.skip("root reads everything")
    with pytest.raises(IdentityError, match="not readable by this user"):
        Identity.load(closed)


def test_secrets_do_not_show(kit: Kit) -> None:
    """(4)"""
    found = kit.identity("edge-1")
    text = repr(found) + str(found)
    assert repr(found.credentials.key_der)[2:-1] not in text
    assert repr(NETWORK_KEY)[2:-1] not in text


@pytest.mark.parametrize(
    ("url", "found"),
    [
        ("stp://hub-1@hub.example:9001", Address("hub-1", "hub.example", 9001)),
        ("stp://hub-1@hub.example", Address("hub-1", "hub.example", 9000)),
        ("stp://hub-1@[::1]:9000", Address("hub-1", "::1", 9000)),
        ("stp://10.0.0.1/", Address("known", "10.0.0.1", 9000)),
        ("stp://hub-1@hub.example?tls=443", Address("hub-1", "hub.example", 9000, tls=443)),
        ("stp://hub-1@hub.example:9001/?tls=65535", Address("hub-1", "hub.example", 9001, tls=65_535)),
        ("stp://hub-1@[::1]:9001?tls=0", Address("hub-1", "::1", 9001, tls=0)),
        ("stp://hub-1@hub.example?", Address("hub-1", "hub.example", 9000, tls=8443)),
    ],
)
def test_addresses(url: str, found: Address) -> None:
    assert parse_url(url, Upstream("known", "stp://elsewhere")) == found


@pytest.mark.parametrize(
    "url",
    [
        "",
        "hub.example",
        "http://hub",
        "stp://",
        "stp://h:99999",
        "stp://h:x",
        "stp://n:pw@h",
        "stp://n@h/p",
        "stp://n@h?q",
        "stp://n@h?tls",
        "stp://n@h?tls=",
        "stp://n@h?tls=x",
        "stp://n@h?tls=-1",
        "stp://n@h?tls=65536",
        "stp://n@h?tls=000443",
        "stp://n@h?tls=443&tls=444",
        "stp://n@h?udp=9000",
        "stp://n@h?tls=443#x",
    ],
)
def test_bad_addresses_say_how_to_write_one(url: str) -> None:
    with pytest.raises(IdentityError) as caught:
        parse_url(url, Upstream("known", ""))
    assert "stp://" in caught.value.advice


def test_an_address_without_a_node_needs_one() -> None:
    with pytest.raises(IdentityError, match="which node"):
        parse_url("stp://hub.example")


@pytest.mark.parametrize("name", ["a", "edge-1", "a.b_c-9", "x" * 63])
def test_node_names(name: str) -> None:
    check_node_name(name)


@pytest.mark.parametrize("name", ["", "-a", "a-", "A", "a b", "a/b", "x" * 64, "ä", "a\n", ".."])
def test_bad_node_names(name: str) -> None:
    with pytest.raises(IdentityError, match="not a node name"):
        check_node_name(name)


def test_files_are_replaced_whole_and_private(tmp_path: Path) -> None:
    path = tmp_path / "f"
    write_atomically(path, b"one")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    write_atomically(path, b"two", 0o644)
    assert path.read_bytes() == b"two"
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    with pytest.raises(OSError, match="No such file"):
        write_atomically(tmp_path / "none" / "f", b"x")
    (tmp_path / "dir").mkdir()
    with pytest.raises(OSError, match="Is a directory"):
        write_atomically(tmp_path / "dir", b"x")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dir", "f"]  # no temporary file stays
