"""stp.core.clienthello: what a stranger asks for on 8443, read before TLS is (R-4-11)."""

from __future__ import annotations

import random
import ssl

import pytest

from stp.core.channel import TlsChannel
from stp.core.clienthello import MAX_CLIENT_HELLO, MAX_PIECES, offered_protocols
from stp.core.errors import FrameEncodingError
from tests.core.framed_kit import EDGE, leaf
from tests.identity_kit import Flaw
from tests.sim import context


def hello_of(*names: str) -> bytes:
    """What the standard library's client says first."""
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    if names:
        made.set_alpn_protocols(list(names))
    out = ssl.MemoryBIO()
    tls = made.wrap_bio(ssl.MemoryBIO(), out, server_hostname="gw.example")
    with pytest.raises(ssl.SSLWantReadError):
        tls.do_handshake()
    return out.read()


def records(message: bytes, *sizes: int) -> bytes:
    """The same handshake message in records of these sizes, the last as often as it takes."""
    out, pos, n = b"", 0, 0
    while pos < len(message):
        size = sizes[min(n, len(sizes) - 1)]
        piece = message[pos : pos + size]
        out += b"\x16\x03\x01" + len(piece).to_bytes(2, "big") + piece
        pos, n = pos + size, n + 1
    return out


def test_names_are_found_in_order() -> None:
    assert offered_protocols(hello_of("stp-enrol/1")) == [b"stp-enrol/1"]
    assert offered_protocols(hello_of("h2", "http/1.1")) == [b"h2", b"http/1.1"]
    assert offered_protocols(hello_of()) == []


def test_our_own_hello_offers_stp() -> None:
    """With a hybrid key share: it does not fit one packet."""
    first = TlsChannel(context(EDGE, Flaw.NONE, False), leaf(EDGE), dialling=True).take()
    assert len(first) > 1200
    assert offered_protocols(first) == [b"stp/1"]


def test_it_may_come_in_any_pieces() -> None:
    whole = hello_of("stp-enrol/1")
    assert all(offered_protocols(whole[:n]) is None for n in range(len(whole)))
    cut = records(whole[5:], 3, 100)
    assert offered_protocols(cut) == [b"stp-enrol/1"]
    assert all(offered_protocols(cut[:n]) is None for n in range(0, len(cut), 7))
    assert offered_protocols(whole + b"and more") == [b"stp-enrol/1"]


@pytest.mark.parametrize(
    "data",
    [
        b"G",
        b"GET / HTTP/1.1\r\n",
        b"\x15\x03\x01\x00\x02\x02\x28",
        b"\x16\x02\x01\x00\x05",
        b"\x16\x03\x01\x00\x00",
        b"\x16\x03\x01\x40\x01",
        b"\x16\x03\x01\x00\x04\x02\x00\x00\x00",
        b"\x16\x03\x01\x00\x04\x01\x00\x40\x01",
        b"\x16\x03\x01\x00\x04\x01\x00\x00\x00",
        records(hello_of()[5:], 1),
    ],
)
def test_what_is_none_is_said_at_once(data: bytes) -> None:
    with pytest.raises(FrameEncodingError):
        offered_protocols(data)


def test_a_hello_without_extensions_offers_nothing() -> None:
    body = bytes(34) + b"\x00" + b"\x00\x02\x13\x01" + b"\x01\x00"
    assert offered_protocols(records(b"\x01" + len(body).to_bytes(3, "big") + body, 1000)) == []


def test_what_is_looked_at_is_bounded() -> None:
    """(2)"""
    head = b"\x01" + MAX_CLIENT_HELLO.to_bytes(3, "big")
    assert offered_protocols(records(head + bytes(1000), 100)) is None
    with pytest.raises(FrameEncodingError, match="too many pieces"):
        offered_protocols(records(head + bytes(100 * MAX_PIECES), 100))


@pytest.mark.parametrize("seed", range(5))
def test_any_bytes_give_names_or_one_error(seed: int) -> None:
    """(1)"""
    rng = random.Random(seed)
    whole = hello_of("stp-enrol/1", "x")
    for _ in range(300):
        data = bytearray(whole)
        for _ in range(rng.randrange(1, 4)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        del data[rng.randrange(1, len(data)) :]
        try:
            found = offered_protocols(bytes(data))
        except FrameEncodingError:
            continue
        assert found is None or isinstance(found, list)
