"""stp.core.packetizer: promises (1) to (3) of its head."""

from __future__ import annotations

import random

import pytest
from attrs import define
from hypothesis import given
from hypothesis import strategies as st

from stp.core import frames, packet
from stp.core.acks import AckTracker
from stp.core.keys import SUITES, SessionKeys
from stp.core.packetizer import (
    BULK_OVERHEAD,
    MAX_SKIP,
    MAX_SKIPPED,
    MIN_SKIP,
    Opener,
    PacketBuilder,
    Sealer,
)
from stp.core.streams import RecvStream

CID = b"\x01\x02\x03\x04\x05\x06\x07\x08"
DATA = random.Random(3).randbytes(200_000)
PIECE = 1200 - BULK_OVERHEAD
AES = "TLS_AES_128_GCM_SHA256"


def sealer(suite: str = AES) -> Sealer:
    keys = SessionKeys.derive(bytes(32), suite)
    return Sealer(keys.client, keys.client_pn_key, CID, random.Random(1).randbytes)


@define
class Receiver:
    """The other end: an opener with what the loop fills."""

    opener: Opener
    acks: AckTracker
    streams: dict[int, RecvStream]

    def open(
        self, data: bytes, size: int = 1200
    ) -> tuple[int, int, list[tuple[int, int]], list[bytes], list[bytes]]:
        opened, absorbed, touched, rest, strange = self.opener.open_buffer(
            data, size, self.streams, self.acks, 1.0
        )
        for stream, _ in touched:
            stream.merge()
        said: list[tuple[int, int]] = []
        for stream, grown in touched:
            if said and said[-1][0] == stream.id:
                grown += said.pop()[1]
            said.append((stream.id, grown))
        return opened, absorbed, said, rest, strange


def receiver(suite: str = AES, *, window: int = 1 << 20) -> Receiver:
    keys = SessionKeys.derive(bytes(32), suite)
    opener = Opener(keys.client, keys.client_pn_key, CID)
    return Receiver(opener, AckTracker(), {n: RecvStream(n, window) for n in (0, 2, 6)})


def burst(seal: Sealer, offset: int, length: int, *, stream: int = 2, fin: bool = False) -> bytes:
    seal.run()
    return seal.seal_burst(stream, offset, DATA, offset, length, PIECE, fin)


@pytest.mark.parametrize("suite", SUITES)
def test_a_burst_arrives_in_one_go(suite: str) -> None:
    seal, recv = sealer(suite), receiver(suite)
    sealed = burst(seal, 0, 10 * PIECE + 5)
    assert len(sealed) == 10 * 1200 + 5 + BULK_OVERHEAD
    assert recv.open(sealed) == (11, 11, [(2, 10 * PIECE + 5)], [], [])
    assert recv.streams[2].read() == DATA[: 10 * PIECE + 5]
    assert frames.parse_ack(recv.acks.frame(1.0))[1] == [(0, 11)]


def test_a_burst_is_what_single_packets_would_be() -> None:
    """The loop inlines header, nonce and frame: against the plain functions of packet and frames."""
    seal = sealer()
    sealed = burst(seal, 1000, 2 * PIECE + 100, fin=True)
    keys = SessionKeys.derive(bytes(32), AES)
    w = packet.whitener(keys.client_pn_key, CID)
    expected = b""
    for pn, (start, stop) in enumerate(((0, PIECE), (PIECE, 2 * PIECE), (2 * PIECE, 2 * PIECE + 100))):
        frame = frames.Stream(2, 1000 + start, DATA[1000 + start : 1000 + stop], fin=pn == 2).encode_last()
        header = packet.data_header(0, CID, pn ^ w)
        expected += header + keys.client.aead.seal(pn, frame, header)
    assert sealed == expected


@given(st.integers(1, 3000), st.integers(1, 1154), st.booleans())
def test_every_length_is_cut_without_loss(length: int, piece: int, fin: bool) -> None:
    seal, recv = sealer(), receiver()
    seal.run()
    sealed = seal.seal_burst(2, 0, DATA, 0, length, piece, fin)
    opened, absorbed, _, rest, _ = recv.open(sealed, piece + BULK_OVERHEAD)
    assert opened == seal.next == -(-length // piece)
    assert absorbed == opened - fin
    assert len(rest) == fin
    assert sum(len(p) - frames.STREAM_HEAD_SIZE for p in rest) + recv.streams[2].next == length


def test_numbers_are_never_used_twice() -> None:
    """Promise (1), over bursts, single packets and numbers left out (R-2-4)."""
    seal, recv = sealer(), receiver()
    seal.skip_at = 7
    for _ in range(5):
        seal.run()
        recv.open(seal.seal(b"\x01"))
        burst(seal, 0, min(3, seal.run()) * PIECE)
    assert seal.skipped == [7]
    assert recv.opener.repeated == 0


def test_left_out_numbers() -> None:
    """Protocol §2: one every 256 to 131,072 packets, never inside a burst (R-2-6)."""
    seal = sealer()
    gaps, last = [], 0
    for _ in range(200):
        assert MIN_SKIP <= seal.skip_at - last <= MAX_SKIP + 1
        last = seal.skip_at
        seal.next = seal.skip_at - 1
        assert seal.run() == 1
        seal.seal(b"\x01")
        assert seal.run() > 0
        gaps.append(last)
        assert seal.next == last + 1
    assert seal.skipped == gaps[-MAX_SKIPPED:]


def test_a_gap_is_seen_and_the_rest_is_handed_out() -> None:
    seal, recv = sealer(), receiver()
    sealed = burst(seal, 0, 4 * PIECE)
    parts = [sealed[i : i + 1200] for i in range(0, len(sealed), 1200)]
    opened, absorbed, touched, rest, _ = recv.open(parts[0] + parts[2] + parts[3])
    assert (opened, absorbed, touched) == (3, 1, [(2, PIECE)])
    assert len(rest) == 2
    assert frames.parse_ack(recv.acks.frame(1.0))[1] == [(2, 4), (0, 1)]
    opened, absorbed, _, _, _ = recv.open(parts[1])
    assert (opened, absorbed) == (1, 1)
    assert frames.parse_ack(recv.acks.frame(1.0))[1] == [(0, 4)]


@given(st.permutations(range(8)), st.lists(st.integers(0, 7), max_size=8))
def test_each_number_opens_once_in_any_order(order: list[int], again: list[int]) -> None:
    """Promise (2)."""
    seal, recv = sealer(), receiver()
    sealed = burst(seal, 0, 8 * PIECE)
    parts = [sealed[i : i + 1200] for i in range(0, len(sealed), 1200)]
    opened = absorbed = 0
    rest: list[bytes] = []
    for batch in ([*order[:3], *again], order[3:], again):
        found = recv.open(b"".join(parts[n] for n in batch))
        opened += found[0]
        absorbed += found[1]
        rest += found[3]
    assert opened == 8
    assert absorbed + len(rest) == 8
    assert recv.opener.repeated == 2 * len(again)
    assert frames.parse_ack(recv.acks.frame(1.0))[1] == [(0, 8)]


def test_damage_changes_nothing_but_a_counter() -> None:
    """Promise (2): any single bit of a packet."""
    seal, recv = sealer(), receiver()
    seal.run()
    good = seal.seal_burst(2, 0, DATA, 0, 20, PIECE, False)
    for bit in range(8 * len(good)):
        bad = bytearray(good)
        bad[bit // 8] ^= 1 << bit % 8
        opened, absorbed, touched, rest, strange = recv.open(bytes(bad))
        assert (opened, absorbed, touched, rest) == (0, 0, [], [])
        assert bool(strange) is (bit < 9 * 8)
    assert recv.opener.failed == 8 * (len(good) - 9)
    assert recv.acks.next == 0
    assert recv.open(good)[:2] == (1, 1)


def test_a_number_beyond_all_numbers_is_dropped() -> None:
    """The two top bits of the whitened number are the sender's: a peer may set them."""
    seal, recv = sealer(), receiver()
    seal.next = packet.MAX_PN + 1
    assert recv.open(seal.seal(b"\x01"))[0] == 0
    assert recv.opener.repeated == 1
    assert recv.acks.next == 0


def test_what_is_not_for_us_is_handed_back() -> None:
    seal, recv = sealer(), receiver()
    good = seal.seal(b"\x01")
    other = good[:1] + bytes(8) + good[9:]
    next_phase = bytes((good[0] | 1,)) + good[1:]
    for strange in (other, next_phase, good[:33], b"\x40", b"\xc0" + good[1:]):
        assert recv.open(strange, len(strange)) == (0, 0, [], [], [strange])
    assert recv.opener.failed == 0


def test_streams_may_alternate_in_a_buffer() -> None:
    seal, recv = sealer(), receiver()
    seal.run()
    sealed = b""
    for n in range(6):
        sealed += seal.seal_burst((2, 6)[n % 2], n // 2 * PIECE, DATA, n // 2 * PIECE, PIECE, PIECE, False)
    opened, absorbed, touched, rest, _ = recv.open(sealed)
    assert (opened, absorbed, rest) == (6, 6, [])
    assert sum(grown for s, grown in touched if s == 2) == 3 * PIECE
    assert recv.streams[2].read() == recv.streams[6].read() == DATA[: 3 * PIECE]


def test_a_retransmission_in_the_loop_releases_what_waited() -> None:
    seal, recv = sealer(), receiver()
    recv.streams[2].insert(PIECE, DATA[PIECE : 3 * PIECE], False)
    _, _, touched, _, _ = recv.open(burst(seal, 0, PIECE))
    assert touched == [(2, 0)]
    assert recv.streams[2].read() == DATA[: 3 * PIECE]


@pytest.mark.parametrize(
    "plain",
    [
        frames.Stream(2, 0, b"").encode_last(),
        frames.Stream(2, 0, DATA[:10], True).encode_last(),
        frames.Stream(2, 0, DATA[:10]).encode(),
        frames.Stream(2, 5, DATA[:10]).encode_last(),
        frames.Stream(2, 0, DATA[:101]).encode_last(),
        frames.Stream(10, 0, DATA[:10]).encode_last(),
        b"\x04\x00\x00",
        b"\x01",
    ],
    ids=["empty", "end", "with length", "gap", "beyond credit", "unknown stream", "cut short", "ping"],
)
def test_the_loop_leaves_what_is_not_plain_bytes_in_order(plain: bytes) -> None:
    seal, recv = sealer(), receiver(window=100)
    seal.run()
    opened, absorbed, _, rest, _ = recv.open(seal.seal(plain))
    assert (opened, absorbed, rest) == (1, 0, [plain])
    assert recv.streams[2].next == 0


def test_the_peer_may_change_to_another_cid() -> None:
    seal, recv = sealer(), receiver()
    seal.use_cid(bytes(8))
    moved = seal.seal(b"\x01")
    assert recv.open(moved)[4] == [moved]
    recv.opener.use_cid(bytes(8))
    assert recv.open(moved)[0] == 1


def test_the_builder_takes_what_fits() -> None:
    builder = PacketBuilder(10)
    owner = AckTracker()
    assert builder.add(b"12345678", owner, 1)
    assert not builder.add(b"123", owner, 2)
    assert builder.add(b"12", owner, 3)
    assert builder.frames == [(owner, 1), (owner, 3)]
    assert b"".join(builder.parts) == b"1234567812"
