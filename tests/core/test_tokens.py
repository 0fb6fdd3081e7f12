"""stp.core.tokens: its four promises."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stp.core import tokens
from stp.core.tokens import BAD_RETRY, NodeToken, RetryToken, TokenKeeper, token_node

ADDR = ("192.0.2.1", 4000)
ODCID, CID = b"original", b"new  cid"


def keeper(seed: int = 0) -> TokenKeeper:
    return TokenKeeper(random.Random(seed).randbytes)


def spent(k: TokenKeeper, token: bytes, now: float) -> bytes | None:
    """The node of a token that is used now; None for one that is not good."""
    verdict = k.read(token, ADDR, b"whatever", now)
    if not isinstance(verdict, NodeToken):
        return None
    k.spend(verdict, now)
    return verdict.node


def test_a_retry_token_names_the_original_dcid() -> None:
    k = keeper()
    token = k.seal_retry(ADDR, ODCID, CID, 100.0)
    assert 1 <= len(token) <= 256
    assert k.read(token, ADDR, CID, 110.0) == RetryToken(ODCID)
    assert k.read(token, ADDR, CID, 101.0) == RetryToken(ODCID)


@pytest.mark.parametrize(
    ("addr", "dcid", "now"),
    [
        (("192.0.2.2", 4000), CID, 101.0),
        (("192.0.2.1", 4001), CID, 101.0),
        (ADDR, b"other  .", 101.0),
        (ADDR, CID, 110.1),
    ],
)
def test_a_retry_token_is_bound(addr: tuple[str, int], dcid: bytes, now: float) -> None:
    """Promise (2)."""
    k = keeper()
    assert k.read(k.seal_retry(ADDR, ODCID, CID, 100.0), addr, dcid, now) is BAD_RETRY


EDGE = token_node("test", "edge-1")


def test_a_node_token_opens_once_from_anywhere() -> None:
    """Promise (3): a gateway roams. Until it is admitted it may try again."""
    k = keeper()
    token = k.seal_node("test", "edge-1", 0.0)
    for port in range(3):
        verdict = k.read(token, ("198.51.100.7", port), b"whatever", 3600.0)
        assert isinstance(verdict, NodeToken)
        assert verdict.node == EDGE
    assert spent(k, token, 3600.0) == EDGE
    assert k.read(token, ADDR, b"whatever", 3600.0) is None
    assert k.used == 1
    assert token_node("test", "edge-1") != token_node("test", "edge-2")


def test_a_node_token_lives_a_day() -> None:
    k = keeper()
    early, late = (k.seal_node("test", "edge-1", 0.0) for _ in range(2))
    assert k.read(early, ADDR, CID, tokens.NODE_LIFETIME) is not None
    assert k.read(late, ADDR, CID, tokens.NODE_LIFETIME + 1) is None


def test_keys_change_daily_and_the_last_one_still_opens() -> None:
    k = keeper()
    k.seal_node("test", "x", 0.0)
    token = k.seal_node("test", "edge-1", tokens.NODE_LIFETIME - 1)
    other = k.seal_node("test", "edge-1", tokens.NODE_LIFETIME - 1)
    assert spent(k, token, tokens.NODE_LIFETIME - 1) == EDGE
    assert spent(k, other, tokens.NODE_LIFETIME + 5) == EDGE
    assert spent(k, token, tokens.NODE_LIFETIME + 5) is None  # remembered across the change
    assert spent(k, token, 2 * tokens.NODE_LIFETIME - 2) is None
    assert spent(k, token, 2 * tokens.NODE_LIFETIME + 6) is None
    assert k.used == 1  # that of the day before


def test_a_full_memory_changes_the_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Promise (3): whatever was used stays used."""
    monkeypatch.setattr(tokens, "MAX_USED", 4)
    k = keeper()
    made = [k.seal_node("test", "edge-1", 0.0) for _ in range(6)]
    assert all(spent(k, t, 1.0) == EDGE for t in made[:4])
    assert (k.exhausted, k.used) == (1, 0)
    assert all(spent(k, t, 1.0) is None for t in made)
    assert spent(k, k.seal_node("test", "edge-1", 1.0), 1.0) == EDGE


def test_the_same_secret_opens_after_a_restart() -> None:
    """Promise (1): the clock of the new life has another beginning, and `epoch` makes up for it."""
    secret = bytes(range(32))
    before = TokenKeeper(random.Random(1).randbytes, secret, epoch=1e9)
    token = before.seal_node("test", "edge-1", 500.0)
    late = before.seal_node("test", "edge-1", 500.0)
    for restarted in (
        TokenKeeper(random.Random(2).randbytes, secret, epoch=0.0),
        TokenKeeper(random.Random(2).randbytes, secret, epoch=1e9 + 30 * 86_400),
        TokenKeeper(random.Random(2).randbytes, bytes(32), epoch=1e9 + 1000),
        TokenKeeper(random.Random(2).randbytes),
    ):
        assert restarted.read(token, ADDR, CID, 7.0) is None
    after = TokenKeeper(random.Random(2).randbytes, secret, epoch=1e9 + 1000)
    assert spent(after, token, 7.0) == EDGE
    assert spent(after, token, 7.0) is None
    assert after.read(late, ADDR, CID, tokens.NODE_LIFETIME) is None


def test_another_keeper_cannot_read_it() -> None:
    a, b = keeper(1), keeper(2)
    b.seal_node("test", "x", 0.0)
    assert b.read(a.seal_retry(ADDR, ODCID, CID, 0.0), ADDR, CID, 0.0) is BAD_RETRY
    assert b.read(a.seal_node("test", "edge-1", 0.0), ADDR, CID, 0.0) is None
    assert b.read(b"", ADDR, CID, 0.0) is None


@given(st.binary(max_size=120), st.integers(0, 3))
def test_any_bytes_are_read_in_peace(data: bytes, kind: int) -> None:
    """Promise (4, R-4-22)."""
    k = keeper()
    k.seal_node("test", "x", 0.0)
    verdict = k.read(bytes([kind]) + data, ADDR, CID, 0.0)
    assert verdict is (BAD_RETRY if kind == 1 else None)


@given(st.integers(0, 59), st.integers(1, 255))
def test_every_bit_is_covered(place: int, flip: int) -> None:
    """Promise (1)."""
    k = keeper()
    token = bytearray(k.seal_node("test", "edge-1", 0.0))
    token[place % len(token)] ^= flip
    assert k.read(bytes(token), ADDR, CID, 0.0) in (None, BAD_RETRY)
