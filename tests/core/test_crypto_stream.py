"""stp.core.crypto_stream: its two promises."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stp.core.crypto_stream import MAX_CRYPTO, MAX_GAPS, CryptoReceiver, CryptoSender
from stp.core.errors import LimitError, UsageError

DATA = random.Random(1).randbytes(600)
pieces = st.lists(st.tuples(st.integers(0, 599), st.integers(0, 80)), max_size=40)


@given(pieces)
def test_bytes_come_out_once_and_in_order(found: list[tuple[int, int]]) -> None:
    """Promise (1), against the set of offsets seen."""
    receiver, seen, out = CryptoReceiver(), set[int](), b""
    for start, size in found:
        piece = DATA[start : start + size]
        fresh = set(range(start, start + len(piece))) - seen
        assert receiver.add(start, piece) == bool(fresh)
        seen |= fresh
        out += receiver.take()
        prefix = next(n for n in range(601) if n not in seen)
        assert out == DATA[:prefix]
        assert receiver.take() == b""


def test_the_first_copy_of_a_byte_counts() -> None:
    receiver = CryptoReceiver()
    assert receiver.add(2, b"cd")
    assert not receiver.add(2, b"XY")
    assert receiver.add(0, b"abXYe")
    assert receiver.take() == b"abcde"


def test_a_receiver_is_bounded() -> None:
    receiver = CryptoReceiver()
    assert receiver.add(MAX_CRYPTO - 1, b"x")
    with pytest.raises(LimitError, match="16384 bytes"):
        receiver.add(MAX_CRYPTO, b"x")
    for i in range(MAX_GAPS):
        receiver.add(10 + 2 * i, b"x")
    with pytest.raises(LimitError, match="64 pieces"):
        receiver.add(5000, b"x")


@given(st.lists(st.tuples(st.sampled_from("awlr"), st.integers(1, 90)), max_size=60), st.integers(0, 2**32))
def test_a_sender_forgets_nothing_and_repeats_nothing_acknowledged(
    script: list[tuple[str, int]], seed: int
) -> None:
    """Promise (2): write, send, lose, acknowledge in any order; in the end all of it has arrived."""
    rng, sender = random.Random(seed), CryptoSender()
    written, arrived = b"", bytearray()
    acked: set[int] = set()
    flying: list[tuple[int, bytes]] = []

    def send(room: int) -> None:
        start, chunk = sender.next_chunk(room)
        assert chunk
        assert len(chunk) <= room
        assert not acked & set(range(start, start + len(chunk)))
        flying.append((start, chunk))

    def land(lost: bool) -> None:
        start, chunk = flying.pop(rng.randrange(len(flying)))
        if lost:
            sender.on_lost(start, start + len(chunk))
            return
        arrived.extend(bytes(max(0, start + len(chunk) - len(arrived))))
        arrived[start : start + len(chunk)] = chunk
        acked.update(range(start, start + len(chunk)))
        sender.on_acked(start, start + len(chunk))

    for verb, size in script:
        if verb == "w":
            piece = rng.randbytes(size)
            sender.write(piece)
            written += piece
        elif verb == "r":
            sender.requeue()
        elif sender.has_pending() and rng.random() < 0.7:
            send(size)
        elif flying:
            land(lost=verb == "l")
    while sender.has_pending() or flying:
        if sender.has_pending():
            send(50)
        else:
            land(lost=False)
    assert bytes(arrived) == written
    assert sender.length == len(written)


def test_a_sender_is_bounded() -> None:
    sender = CryptoSender()
    sender.write(bytes(MAX_CRYPTO))
    with pytest.raises(UsageError, match="own handshake"):
        sender.write(b"x")
