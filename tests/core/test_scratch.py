"""stp.core.scratch: bursts sealed and opened at once are those that go packet by packet; nothing else is taken."""

from __future__ import annotations

import random

import pytest

from stp.core.acks import AckTracker
from stp.core.frames import Ping, Stream
from stp.core.keys import Aead, SessionKeys
from stp.core.packetizer import BULK_OVERHEAD, Opener, Sealer
from stp.core.scratch import MAX_LAYOUTS, MIN_SIZE, ROOM, Scratch
from stp.core.streams import RecvStream

SUITES = ["TLS_AES_128_GCM_SHA256", "TLS_AES_256_GCM_SHA384", "TLS_CHACHA20_POLY1305_SHA256"]
CID = b"\x07\x51CID..\x01"
DATA = random.Random(4).randbytes(300_000)


class Pair:
    """A sealer and an opener of one direction."""

    def __init__(self, suite: str = SUITES[0], *, window: int = 1 << 20) -> None:
        keys = SessionKeys.derive(bytes(range(32)), suite)
        self.sealer = Sealer(keys.client, keys.client_pn_key, CID, random.Random(1).randbytes)
        self.opener = Opener(keys.client, keys.client_pn_key, CID)
        self.acks = AckTracker()
        self.streams = {n: RecvStream(n, window) for n in (2, 6)}

    def burst(self, offset: int, length: int, size: int, *, stream: int = 2, fin: bool = False) -> bytes:
        self.sealer.run()
        return self.sealer.seal_burst(stream, offset, DATA, offset, length, size - BULK_OVERHEAD, fin)

    def open(self, data: bytes, size: int) -> tuple[int, int, list[bytes], list[bytes]]:
        opened, absorbed, touched, rest, strange = self.opener.open_buffer(
            data, size, self.streams, self.acks, 1.0
        )
        for stream, _ in touched:
            stream.merge()
        return opened, absorbed, rest, strange


@pytest.fixture
def one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """A `cryptography` that cannot work in place."""
    monkeypatch.setattr(Aead, "cipher", lambda self: object())


@pytest.mark.parametrize("suite", SUITES)
@pytest.mark.parametrize("size", [MIN_SIZE, 1200, 1472, 8972])
@pytest.mark.parametrize("fin", [False, True])
@pytest.mark.parametrize("more", [0, 1, 500])
def test_the_same_bytes_as_packet_by_packet(
    suite: str, size: int, fin: bool, more: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """R-2-2: at once here, one by one there, and each opens what the other sealed."""
    piece = size - BULK_OVERHEAD
    bursts = [(0, 7 * piece + more), (7 * piece + more, 5 * piece)]
    quick, slow = Pair(suite), Pair(suite)
    sealed = [quick.burst(offset, length, size, fin=fin) for offset, length in bursts]
    with monkeypatch.context() as patch:
        patch.setattr(Aead, "cipher", lambda self: object())
        assert [slow.burst(offset, length, size, fin=fin) for offset, length in bursts] == sealed
        assert quick.sealer.next == slow.sealer.next
        for one in sealed:
            slow.open(one, size)
    for one in sealed:
        quick.open(one, size)
    taken = 12 * piece + more
    if not fin:
        assert quick.streams[2].read() == slow.streams[2].read() == DATA[:taken]
    assert quick.streams[2].next == slow.streams[2].next
    assert quick.acks.next == slow.acks.next == quick.sealer.next


def test_any_flipped_bit_is_found_and_costs_its_packet_only() -> None:
    """Promise (2) of packetizer.py, in whatever packet and part of it."""
    rng = random.Random(2)
    for _ in range(60):
        pair = Pair()
        sealed = bytearray(pair.burst(0, 9 * 1154, 1200))
        bit = (
            rng.randrange(8 * len(sealed))
            if rng.random() < 0.7
            else 8 * 1200 * rng.randrange(9) + rng.randrange(136)
        )
        sealed[bit // 8] ^= 1 << bit % 8
        opened, absorbed, rest, strange = pair.open(bytes(sealed), 1200)
        broken = bit // 8 // 1200
        assert (opened, absorbed) == (8, broken)
        assert len(rest) == 8 - broken
        assert pair.opener.failed + len(strange) == 1
        assert pair.streams[2].read() == DATA[: broken * 1154]


def test_a_buffer_opens_once() -> None:
    pair = Pair()
    sealed = pair.burst(0, 9 * 1154, 1200)
    assert pair.open(sealed, 1200)[:2] == (9, 9)
    assert pair.open(sealed, 1200) == (0, 0, [], [])
    assert pair.opener.repeated == 9


def test_streams_that_alternate_and_frames_of_other_kinds() -> None:
    """What is in order goes to its stream, the rest is handed on as it was."""
    pair = Pair()
    sealed, offsets, others = b"", {2: 0, 6: 0}, []
    for n in range(12):
        stream = (2, 2, 6)[n % 3]
        if n in (4, 7):
            pair.sealer.run()
            others.append(
                Stream(stream, offsets[stream] + 5, b"x" * 1000).encode() if n == 4 else Ping().encode()
            )
            others[-1] = others[-1].ljust(1167, b"\0")
            sealed += pair.sealer.seal(others[-1])
            continue
        sealed += pair.burst(offsets[stream], 1154, 1200, stream=stream)
        offsets[stream] += 1154
    opened, absorbed, rest, strange = pair.open(sealed, 1200)
    assert (opened, absorbed, rest, strange) == (12, 10, others, [])
    for number, length in offsets.items():
        assert pair.streams[number].read() == DATA[:length]


@pytest.mark.parametrize("window", [4000, 9 * 1154 - 1])
def test_credit_is_kept(window: int) -> None:
    """R-7-5 is the session's to punish: what exceeds credit is not in the stream."""
    pair = Pair(window=window)
    opened, absorbed, rest, _ = pair.open(pair.burst(0, 9 * 1154, 1200), 1200)
    assert opened == 9
    assert absorbed == window // 1154
    assert len(rest) == 9 - absorbed


def test_what_is_too_small_or_too_large_goes_packet_by_packet() -> None:
    pair = Pair()
    assert pair.open(pair.burst(0, 20 * 100, 100 + BULK_OVERHEAD), 100 + BULK_OVERHEAD)[:2] == (20, 20)
    sealed = b"".join(pair.burst(2000 + n * 11_540, 11_540, 1200) for n in range(6))
    assert len(sealed) > ROOM
    assert pair.open(sealed, 1200)[:2] == (60, 60)
    assert pair.streams[2].read() == DATA[: 2000 + 6 * 11_540]


@pytest.mark.usefixtures("one_by_one")
def test_an_older_cryptography_will_do() -> None:
    pair = Pair()
    assert pair.open(pair.burst(0, 20 * 1154, 1200), 1200)[:2] == (20, 20)
    assert pair.streams[2].read() == DATA[: 20 * 1154]


def test_layouts_are_bounded() -> None:
    """Promise (3)."""
    scratch = Scratch()
    for size in range(MIN_SIZE, MIN_SIZE + 3 * MAX_LAYOUTS):
        scratch.layout(size, 4)
        scratch._slices(size)
    assert len(scratch._layouts) <= MAX_LAYOUTS
    assert len(scratch._views) <= MAX_LAYOUTS
