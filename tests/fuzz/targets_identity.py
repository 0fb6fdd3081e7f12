"""Doors of identity: tokens on the wire, pasted tokens, addresses, PEM bundles, certificate requests."""

from __future__ import annotations

import random
from contextlib import suppress

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from OpenSSL import crypto

from stp.core.errors import PacketError
from stp.core.handshake import UNREADABLE
from stp.core.tokens import NodeToken, RetryToken, TokenKeeper
from stp.enrol import JoinToken, key_pem, make_csr, new_key, new_token, parse_host
from stp.identity import Identity, IdentityError, parse_url
from stp.pinned import EnrolError, by_anchors, check_server
from stpd.checks import split_address
from stpd.pki import PkiError, read_chain, read_request
from tests.fuzz.engine import Target
from tests.identity_kit import Flaw, parts_of, shared

ADDRESS = ("192.0.2.1", 4711)
DCID, NEW_CID = b"original", b"givenout"
PEM_WORDS = [
    *(b"-----BEGIN CERTIFICATE-----\n", b"-----END CERTIFICATE-----\n", b"-----BEGIN PRIVATE KEY-----\n"),
    *(b"-----BEGIN STP NETWORK KEY-----\n", b"-----", b"\n", b"\r\n", b"=", b"\0", b"\xff"),
]


def tokens() -> Target:
    """No bytes but those that were sealed are worth anything."""
    keeper = TokenKeeper(random.Random(1).randbytes)
    sealed = [keeper.seal_retry(ADDRESS, DCID, NEW_CID, float(n)) for n in range(4)]
    sealed += [keeper.seal_node("test", f"gw-{n}", 0.0) for n in range(4)]

    def feed(data: bytes) -> None:
        verdict = keeper.read(data, ADDRESS, NEW_CID, 5.0)
        if not isinstance(verdict, RetryToken | NodeToken):
            raise PacketError("worth nothing")
        assert data in sealed, "forged"

    return Target(name="tokens", feed=feed, seeds=sealed, promised=(PacketError,))


def pasted() -> Target:
    """What people paste: join tokens, hosts, addresses, URLs."""
    readers = (JoinToken.decode, parse_host, parse_url, split_address)

    def feed(data: bytes) -> None:
        text = data.decode("utf-8", "surrogateescape")
        accepted = 0
        for read in readers:
            with suppress(EnrolError, IdentityError, ValueError):
                read(text)
                accepted += 1
        if not accepted:
            raise ValueError("nobody can read this")

    return Target(
        name="pasted",
        feed=feed,
        seeds=[
            new_token(b"a certificate").encode().encode(),
            b"hub.example:8443",
            b"[2001:db8::1%eth0]:8443",
            b"stp://hub@hub.example:9000",
            b"stp://hub@[::1]",
            b"0.0.0.0:9000",
        ],
        promised=(ValueError,),
        words=[
            b"stp://",
            b"stpj1.",
            b":",
            b"@",
            b"[",
            b"]",
            b"%",
            b"::",
            b"65536",
            b"-1",
            "١".encode(),
            b"/",
            b"?",
        ],
    )


def bundle() -> Target:
    def feed(data: bytes) -> None:
        Identity.parse([("bundle.pem", data)])

    kit = shared()
    whole = kit.bundle("gw-1", upstream=("hub", "stp://hub@127.0.0.1:9000", 1.7e9))
    return Target(
        name="bundle",
        feed=feed,
        seeds=[whole, kit.bundle("hub"), b"\n".join(reversed(whole.split(b"\n\n")))],
        promised=(IdentityError,),
        words=PEM_WORDS,
    )


def strangers() -> Target:
    """The chain that a server shows before anybody knows who it is: u16 length, DER, again and again."""
    ca = shared().der()

    def feed(data: bytes) -> None:
        chain = []
        while data and len(chain) < 4:
            size = int.from_bytes(data[:2], "big")
            with suppress(crypto.Error, *UNREADABLE):  # what cannot even be loaded never gets so far
                crypto.load_certificate(crypto.FILETYPE_ASN1, data[2 : 2 + size])
                chain.append(x509.load_der_x509_certificate(data[2 : 2 + size]))
            data = data[2 + size :]
        check_server(chain, by_anchors([ca]))

    def chained(*ders: bytes) -> bytes:
        return b"".join(len(der).to_bytes(2, "big") + der for der in ders)

    leaves = [parts_of(shared().bundle("hub", flaw))[0][0] for flaw in Flaw]
    return Target(
        name="strangers",
        feed=feed,
        seeds=[chained(leaf, ca) for leaf in leaves],
        promised=(EnrolError,),
    )


def requests() -> Target:
    """What a stranger with a token sends: a certificate request, and a chain for renewal."""

    def feed(data: bytes) -> None:
        text = data.decode("utf-8", "surrogateescape")
        accepted = 0
        for read in (read_request, read_chain):
            with suppress(PkiError):
                read(text)
                accepted += 1
        if not accepted:
            raise ValueError("nobody can read this")

    key = new_key()
    whole = shared().bundle("gw-1")
    chain = whole[whole.index(b"-----BEGIN CERT") : whole.index(b"-----BEGIN STP")]
    return Target(
        name="requests",
        feed=feed,
        seeds=[make_csr(key, "gw-1").public_bytes(Encoding.PEM), chain, key_pem(key)],
        promised=(ValueError,),
        words=PEM_WORDS,
    )
