"""Control records: round trips, refusal, cutting (promises of stp/control.py)."""

from __future__ import annotations

import json
import struct
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stp.control import (
    GOAWAY,
    HELLO,
    INTRODUCE,
    MAX_CONTROL,
    MAX_RANGES,
    RECEIPT,
    REFUSED,
    STATUS,
    SUBSCRIBE,
    SUBSCRIBED,
    ClassRule,
    Control,
    ControlCutter,
    DrainCredit,
    Goaway,
    Hello,
    Introduce,
    Moved,
    Receipt,
    Refused,
    Revoked,
    Status,
    Subscribe,
    Subscribed,
    Unsubscribe,
    decode_control,
    encode_control,
)
from stp.core.errors import LimitError, ProtocolError, UsageError

quick = settings(deadline=None, max_examples=60)

u32 = st.integers(0, 0xFFFF_FFFF)
u64 = st.integers(0, 0xFFFF_FFFF_FFFF_FFFF)
ids = st.binary(min_size=16, max_size=16)
text = st.text(max_size=12)
texts = st.lists(text, max_size=3).map(tuple)
lanes = st.integers(1, 4)
rules = st.builds(ClassRule, text, texts, lanes, u32, u32, text)


def receipt(lane: int, bounds: list[int]) -> Receipt:
    custody, *rest = sorted(bounds)
    pairs = list(zip(rest[::2], rest[1::2], strict=False))
    return Receipt(lane, max(bounds), custody, pairs)


controls: st.SearchStrategy[Control] = st.one_of(
    st.builds(
        Hello,
        text,
        text,
        ids,
        u64,
        ids,
        text,
        text,
        texts,
        u64,
        u64,
        st.none() | st.lists(rules, max_size=2),
        st.just(b"") | ids,
    ),
    st.builds(receipt, lanes, st.lists(u64, min_size=1, max_size=12, unique=True)),
    st.builds(Refused, lanes, u64, st.integers(0, 0xFFFF), u32, text),
    st.builds(
        Subscribe,
        text,
        texts,
        st.none() | text,
        st.sampled_from(["now", "earliest"]) | u64,
        st.none() | st.floats(0, 1e9) | u32,
        st.none() | text,
    ),
    st.builds(Unsubscribe, text),
    st.builds(Subscribed, text),
    st.builds(lambda id, error: Subscribed(id, False, error), text, text),
    st.builds(DrainCredit, lanes, u32),
    st.builds(Status, st.dictionaries(text, st.none() | u64 | text | st.lists(text, max_size=2), max_size=3)),
    st.builds(Goaway, text, u64),
    st.builds(Introduce, st.dictionaries(ids, text, max_size=3)),
    st.builds(Moved),
    st.builds(Revoked, st.dictionaries(st.integers(0, 2**160 - 1), u64, max_size=3)),
)


@given(st.lists(controls, max_size=5), st.integers(1, 50))
@quick
def test_round_trip_in_pieces(sent: list[Control], step: int) -> None:
    """(3), (1)"""
    stream = b"".join(map(encode_control, sent))
    cutter = ControlCutter()
    cut = [one for at in range(0, len(stream), step) for one in cutter.feed(stream[at : at + step])]
    assert [decode_control(kind, body) for kind, body in cut] == sent
    assert cutter.incomplete == 0


@given(st.integers(0, 14), st.binary(max_size=80) | st.text(max_size=40).map(str.encode))
@quick
def test_any_body_decodes_or_is_a_protocol_error(kind: int, body: bytes) -> None:
    """(1)"""
    try:
        decoded = decode_control(kind, body)
    except ProtocolError:
        return
    assert (decoded is None) == (not 1 <= kind <= 12)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=6,
)
KEYS = """id ok error filters name start max_lag group domain node store run nonce kind classes lane ttl
linger features reason slot_ms"""
keys = st.sampled_from(KEYS.split())


@given(
    st.sampled_from([HELLO, SUBSCRIBE, 5, STATUS, GOAWAY, INTRODUCE, SUBSCRIBED]),
    st.dictionaries(keys, json_values, max_size=8),
)
@quick
def test_any_json_decodes_or_is_a_protocol_error(kind: int, fields: dict[str, Any]) -> None:
    """(1): and what decodes can be encoded again."""
    try:
        decoded = decode_control(kind, json.dumps(fields).encode())
    except ProtocolError:
        return
    assert decoded is not None
    again = encode_control(decoded)
    assert decode_control(again[4], again[5:]) == decoded


@pytest.mark.parametrize(
    "body",
    [
        b"[" * 16_000,
        b'{"a":' * 3_000,
        b'{"a":' + b"9" * 5_000 + b"}",
        b'{"a":NaN}',
        b'{"a":1e999}',
        b'{"a":"\\ud800"}',
        b"\xff",
        b"",
        b"null",
    ],
)
def test_bad_json(body: bytes) -> None:
    """(1): no RecursionError, no number of five thousand digits, no half of a surrogate pair to pass on."""
    for kind in (HELLO, STATUS, SUBSCRIBE):
        with pytest.raises(ProtocolError):
            decode_control(kind, body)


HELLO_FIELDS: dict[str, Any] = {
    "domain": "d",
    "node": "n",
    "store": "00" * 16,
    "run": 1,
    "nonce": "11" * 16,
    "kind": "client",
}


@pytest.mark.parametrize(
    "changed",
    [
        {"domain": 1},
        {"store": "00" * 15},
        {"store": "0 " * 16},
        {"store": "00 " * 16},
        {"nonce": "zz" * 16},
        {"run": -1},
        {"run": True},
        {"run": 1.5},
        {"run": 1 << 64},
        {"features": "all"},
        {"features": [1]},
        {"classes": {}},
        {"classes": [1]},
        {"classes": [{"name": "a", "filters": [], "lane": 5}]},
        {"classes": [{"name": "a", "filters": [], "lane": 1, "ttl": -1}]},
    ],
)
def test_a_bad_hello(changed: dict[str, Any]) -> None:
    decode_control(HELLO, json.dumps(HELLO_FIELDS | {"later": {}}).encode())  # (2)
    with pytest.raises(ProtocolError):
        decode_control(HELLO, json.dumps(HELLO_FIELDS | changed).encode())


@pytest.mark.parametrize("missing", HELLO_FIELDS)
def test_a_hello_without(missing: str) -> None:
    fields = {key: value for key, value in HELLO_FIELDS.items() if key != missing}
    with pytest.raises(ProtocolError):
        decode_control(HELLO, json.dumps(fields).encode())


@pytest.mark.parametrize(
    "fields",
    [
        {"id": 1, "filters": [], "start": "now"},
        {"id": "1", "filters": "a", "start": "now"},
        {"id": "1", "filters": [], "start": "tomorrow"},
        {"id": "1", "filters": [], "start": None},
        {"id": "1", "filters": [], "start": -1},
        {"id": "1", "filters": [], "start": "now", "max_lag": -1},
        {"id": "1", "filters": [], "start": "now", "max_lag": True},
        {"id": "1", "filters": [], "start": "now", "name": 3},
    ],
)
def test_a_bad_subscribe(fields: dict[str, Any]) -> None:
    with pytest.raises(ProtocolError):
        decode_control(SUBSCRIBE, json.dumps(fields).encode())


@pytest.mark.parametrize(
    "body",
    [
        struct.pack("!BQQB", 0, 1, 1, 0),
        struct.pack("!BQQB", 5, 1, 1, 0),
        struct.pack("!BQQBQQ", 1, 9, 4, 1, 3, 6),
        struct.pack("!BQQBQQ", 1, 9, 4, 1, 6, 6),
        struct.pack("!BQQBQQQQ", 1, 9, 4, 2, 6, 8, 7, 9),
        struct.pack("!BQQBQQ", 1, 9, 4, 0, 6, 8),
    ],
)
def test_a_bad_receipt(body: bytes) -> None:
    with pytest.raises(ProtocolError):
        decode_control(RECEIPT, body)


def test_more_ranges_than_fit_are_left_for_the_next_receipt() -> None:
    ranges = [(n, n + 1) for n in range(2, 1002, 2)]
    body = encode_control(Receipt(1, 2000, 1, ranges))[5:]
    assert decode_control(RECEIPT, body) == Receipt(1, 2000, 1, ranges[:MAX_RANGES])


def test_a_long_reason_is_cut_between_characters() -> None:
    body = encode_control(Refused(1, 2, 3, 4, "x" + "é" * 300))[5:]
    assert decode_control(REFUSED, body) == Refused(1, 2, 3, 4, "x" + "é" * 127)
    with pytest.raises(ProtocolError):
        decode_control(REFUSED, body + b"\xff")
    with pytest.raises(ProtocolError):
        decode_control(REFUSED, b"\x09" + body[1:])


@pytest.mark.parametrize(
    "control",
    [
        Receipt(1, -1, 0),
        Receipt(256, 1, 1),
        Refused(1, 1 << 64, 1),
        DrainCredit(1, 1 << 32),
        Status({"a": "x" * MAX_CONTROL}),
        Status({"a": float("nan")}),
        Status({"a": object()}),
        Goaway("\ud800"),
    ],
)
def test_what_cannot_be_sent_is_a_usage_error(control: Control) -> None:
    with pytest.raises(UsageError):
        encode_control(control)


def test_the_cutter_refuses_what_no_record_can_be() -> None:
    """(1)"""
    assert ControlCutter().feed(struct.pack("!I", MAX_CONTROL)) == []
    with pytest.raises(LimitError):
        ControlCutter().feed(struct.pack("!I", MAX_CONTROL + 1))
    with pytest.raises(ProtocolError):
        ControlCutter().feed(bytes(4))


def test_unknown_types_are_for_later_versions() -> None:
    """(2)"""
    assert decode_control(0, b"\xff") is None
    assert decode_control(200, b"{}") is None
