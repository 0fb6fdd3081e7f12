"""stp.core.wire, packet, params and frames: what must hold for any bytes."""

from __future__ import annotations

import pytest
from attrs import evolve
from hypothesis import given
from hypothesis import strategies as st

from stp.core import frames, packet
from stp.core.errors import ErrorCode, FrameEncodingError, PacketError, ProtocolError
from stp.core.params import TransportHello, TransportParameters
from stp.core.wire import Reader

u16, u32, u62 = st.integers(0, 0xFFFF), st.integers(0, 0xFFFFFFFF), st.integers(0, (1 << 62) - 1)
cids = st.binary(min_size=8, max_size=8)
tokens = st.binary(min_size=16, max_size=16)
kinds = st.integers(0, 1)


@st.composite
def acks(draw: st.DrawFn) -> frames.Ack:
    numbers = draw(st.lists(st.integers(1, 50), min_size=2, max_size=2 * 65))
    top = sum(numbers) + draw(st.integers(0, 1 << 40))
    ranges, at = [], top
    for gap, length in zip(numbers[::2], numbers[1::2], strict=False):
        ranges.append((at - length, at))
        at -= length + gap
    return frames.Ack(draw(u32), ranges)


any_frame = st.one_of(
    st.builds(frames.Ping),
    acks(),
    st.builds(frames.Crypto, u32, st.binary(max_size=50)),
    st.builds(frames.Stream, u32, u62, st.binary(max_size=50), st.booleans()),
    st.builds(frames.ResetStream, u32, u16, u62),
    st.builds(frames.StopSending, u32, u16),
    st.builds(frames.MaxData, u62),
    st.builds(frames.MaxStreamData, u32, u62),
    st.builds(frames.MaxStreams, kinds, u32),
    st.builds(frames.DataBlocked, u62),
    st.builds(frames.StreamDataBlocked, u32, u62),
    st.builds(frames.StreamsBlocked, kinds, u32),
    st.builds(frames.NewCid, u32, u32, cids, tokens),
    st.builds(frames.RetireCid, u32),
    st.builds(frames.PathChallenge, cids),
    st.builds(frames.PathResponse, cids),
    st.builds(frames.NewToken, st.binary(min_size=1, max_size=256)),
    st.builds(frames.HandshakeDone, tokens),
    st.builds(frames.Close, u16, st.text(max_size=60)),
)


@given(st.binary(max_size=1500))
def test_any_bytes_are_frames_or_a_protocol_error(data: bytes) -> None:
    code: ErrorCode | None = None
    found: list[frames.Frame] = []
    try:
        found = frames.decode(data)
    except ProtocolError as exc:
        code = exc.code
    assert code is (None if found else ErrorCode.PROTOCOL)


@given(st.lists(any_frame, min_size=1, max_size=6))
def test_frames_come_back_as_they_were(wanted: list[frames.Frame]) -> None:
    assert frames.decode(b"".join(f.encode() for f in wanted)) == wanted


@given(st.lists(any_frame, min_size=1, max_size=4), st.integers(1, 40))
def test_padding_ends_a_packet(wanted: list[frames.Frame], padding: int) -> None:
    found = frames.decode(b"".join(f.encode() for f in wanted) + bytes(padding))
    assert found == [*wanted, frames.Padding(padding)]


@given(any_frame)
def test_a_cut_frame_is_an_error_or_a_shorter_one(frame: frames.Frame) -> None:
    whole = frame.encode()
    for size in range(len(whole)):
        with pytest.raises(FrameEncodingError):
            frames.decode(whole[:size])


@pytest.mark.parametrize("kind", [2, 255])
def test_a_stream_kind_is_one_of_two(kind: int) -> None:
    for frame in (frames.MaxStreams(kind, 1), frames.StreamsBlocked(kind, 1)):
        with pytest.raises(FrameEncodingError, match="kind"):
            frames.decode(frame.encode())


def test_ack_of_64_ranges_beyond_the_first_and_no_more() -> None:
    """R-5-1."""
    ranges = [(1000 - 2 * i, 1001 - 2 * i) for i in range(66)]
    assert frames.parse_ack(frames.encode_ack(0, ranges[:65]))[1] == ranges[:65]
    with pytest.raises(IndexError):
        frames.encode_ack(0, ranges)


def test_close_reason_is_cut_between_characters() -> None:
    whole = frames.Close(1, "ä" * 200).encode()
    (found,) = frames.decode(whole)
    assert found == frames.Close(1, "ä" * 127)
    assert frames.decode(frames.Close(1, "ä" * 9).encode(limit=5)) == [frames.Close(1, "ää")]


def test_parse_ack_reads_at_an_offset() -> None:
    raw = b"\x01" + frames.encode_ack(7, [(5, 9), (1, 3)]) + b"\x01"
    assert frames.parse_ack(raw, 1) == (7, [(5, 9), (1, 3)], len(raw) - 1)


@given(st.binary(max_size=200))
def test_any_bytes_are_a_packet_or_dropped(data: bytes) -> None:
    for parse in (packet.parse_init, packet.parse_retry, packet.parse_data_header):
        try:
            parse(data)
        except PacketError:
            pass
    packet.is_data(data)


@given(st.binary(max_size=40))
def test_any_bytes_behind_a_good_head_are_a_packet_or_dropped(data: bytes) -> None:
    for parse, first in ((packet.parse_init, b"\xc0"), (packet.parse_retry, b"\xe0")):
        try:
            found = parse(first + packet.VERSION_BYTES + bytes(16) + data)
        except PacketError:
            continue
        assert len(found.token) <= packet.MAX_TOKEN  # type: ignore[union-attr]


@given(st.binary(max_size=1100))
def test_any_bytes_are_a_hello_or_a_protocol_error(data: bytes) -> None:
    code = ErrorCode.PROTOCOL
    try:
        TransportHello.decode(data)
    except ProtocolError as exc:
        code = exc.code
    assert code is ErrorCode.PROTOCOL


@given(
    st.builds(
        TransportHello,
        original_dcid=cids,
        cid=cids,
        retry_scid=st.one_of(st.just(b""), cids),
        parameters=st.builds(
            TransportParameters,
            max_datagram=st.integers(1200, 0xFFFF),
            max_ack_delay_ms=st.integers(0, (1 << 14) - 1),
            max_streams_bidi=u32,
            max_streams_uni=u32,
        ),
        versions=st.lists(u32, min_size=1, max_size=5).map(tuple),
    )
)
def test_hellos_come_back_as_they_were(wanted: TransportHello) -> None:
    assert TransportHello.decode(wanted.encode()) == wanted


GOOD = TransportHello(original_dcid=bytes(8), cid=bytes(8))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"versions": ()}, "version list"),
        ({"original_dcid": bytes(7)}, "connection id"),
        ({"cid": bytes(9)}, "connection id"),
        ({"retry_scid": bytes(3)}, "retry connection id"),
        ({"parameters": TransportParameters(max_datagram=1199)}, "max_datagram"),
        ({"parameters": TransportParameters(max_ack_delay_ms=1 << 14)}, "max_ack_delay"),
        ({"versions": (packet.VERSION,) * 300}, "at most 1024"),
    ],
)
def test_a_hello_that_asks_for_too_much_is_refused(change: dict[str, object], words: str) -> None:
    with pytest.raises(FrameEncodingError, match=words):
        TransportHello.decode(evolve(GOOD, **change).encode())


def test_a_parameter_of_the_wrong_size_is_refused() -> None:
    with pytest.raises(FrameEncodingError, match="has 3 bytes, not 2"):
        TransportParameters.decode(b"\x01\x00\x03abc")


@given(st.binary(max_size=30), st.lists(st.integers(0, 12), max_size=6))
def test_reader_gives_every_byte_once_or_raises(data: bytes, sizes: list[int]) -> None:
    reader, found = Reader(data), b""
    for size in sizes:
        before = reader.pos
        try:
            found += reader.take(size)
        except FrameEncodingError:
            assert reader.remaining() < size
            assert reader.pos == before
    assert found + reader.rest() == data
    assert reader.remaining() == 0
    reader.done()


def test_reader_reads_big_endian() -> None:
    reader = Reader(bytes(range(1, 17)))
    assert (reader.u8(), reader.u16(), reader.u32(), reader.u64()) == (
        1,
        0x0203,
        0x04050607,
        0x08090A0B0C0D0E0F,
    )
    with pytest.raises(FrameEncodingError, match="1 bytes too many"):
        reader.done()


def test_an_init_of_another_version_or_with_a_long_token_is_dropped() -> None:
    """R-4-14."""
    good = packet.init_header(bytes(8), bytes(8), b"", 1) + bytes(40)
    packet.parse_init(good)
    with pytest.raises(PacketError, match="version"):
        packet.parse_init(good[:4] + b"\x02" + good[5:])
    with pytest.raises(PacketError, match="cut short"):
        packet.parse_init(packet.init_header(bytes(8), bytes(8), bytes(257), 1) + bytes(40))
    with pytest.raises(PacketError, match="token too long"):
        packet.parse_retry(packet.build_retry(bytes(8), bytes(8), bytes(257), bytes(16), bytes(8)))


def test_whitener_leaves_the_top_two_bits() -> None:
    assert all(packet.whitener(bytes([i]) * 32, bytes(8)) < 1 << 62 for i in range(32))
