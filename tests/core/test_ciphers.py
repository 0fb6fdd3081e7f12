"""stp.core.keys: what its vectors (test_vectors_core.py) do not show."""

from __future__ import annotations

import gc

import pytest

from stp.core import keys
from stp.core.keys import WARM, Aead


def ready(aead: Aead) -> bool:
    return any(found is not None and found() is aead for found in keys._warm)


def test_a_cipher_is_ready_from_its_first_packet_on() -> None:
    aead = Aead(bytes(16), bytes(12))
    assert not ready(aead)
    sealed = aead.seal(1, b"frames", b"header")
    assert ready(aead)
    assert aead.encrypt is aead.encrypt
    assert aead.open(1, sealed, b"header") == b"frames"


@pytest.mark.parametrize("chacha", [False, True])
def test_at_most_so_many_ciphers_are_ready_and_the_others_still_work(chacha: bool) -> None:
    """Promise (3)."""
    first = Aead(bytes(32), bytes(12), chacha=chacha)
    sealed = first.seal(1, b"frames", b"header")
    others = [Aead(n.to_bytes(16, "big"), bytes(12)) for n in range(WARM)]
    for aead in others:
        aead.seal(1, b"frames", b"header")
    assert len(keys._warm) <= WARM
    assert not ready(first)
    assert ready(others[0])
    assert first.seal(1, b"frames", b"header") == sealed
    assert ready(first)
    assert not ready(others[0])


def test_a_key_that_is_gone_is_kept_by_nobody() -> None:
    aead = Aead(bytes(16), bytes(12))
    aead.seal(1, b"", b"")
    before = sum(found() is not None for found in keys._warm)
    del aead
    gc.collect()
    assert sum(found() is not None for found in keys._warm) == before - 1


def test_there_is_no_other_attribute() -> None:
    with pytest.raises(AttributeError, match="sealing"):
        _ = Aead(bytes(16), bytes(12)).sealing  # type: ignore[attr-defined]
