"""The conformance vectors of tests/vectors that concern stp.core: keys, packets, frames, hellos, tokens' packets."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from stp.core import frames, keys, packet
from stp.core.errors import PacketError, ProtocolError
from stp.core.params import TransportHello, TransportParameters, parse_tlvs

unhex = bytes.fromhex


@cache
def vectors() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((Path(__file__).parent.parent / "vectors" / "stp1.json").read_text())
    return found


def cases(key: str) -> list[Any]:
    return [
        pytest.param(case, id=f"{index}-{case.get('name', case.get('sender', ''))}")
        for index, case in enumerate(vectors()[key])
    ]


@pytest.mark.parametrize("case", cases("expand"))
def test_expand(case: dict[str, Any]) -> None:
    assert keys.expand(unhex(case["secret"]), case["label"], case["n"]).hex() == case["out"]


@pytest.mark.parametrize("case", cases("initial_keys"))
def test_initial_keys(case: dict[str, Any]) -> None:
    """R-3-1."""
    made = keys.initial_keys(unhex(case["dcid"]), unhex(case["network_key"]))
    assert made.retry_key.hex() == case["retry_key"]
    for side, aead in (("client", made.client), ("server", made.server)):
        proof = keys.Aead(unhex(case[f"{side}_key"]), unhex(case[f"{side}_iv"]))
        assert aead.seal(7, b"frames", b"header") == proof.seal(7, b"frames", b"header")


def test_context() -> None:
    """R-3-5."""
    case = vectors()["context"]
    found = keys.context(*(unhex(case[k]) for k in ("HC", "HS", "server_leaf", "client_leaf")))
    assert found.hex() == case["context"]
    assert keys.EXPORTER_LABEL.decode() == case["exporter_label"]
    assert case["exporter_length"] == keys.MASTER_LENGTH


def test_session_keys() -> None:
    """R-3-3."""
    case = vectors()["session_keys"]
    made = keys.SessionKeys.derive(unhex(case["master"]), "TLS_AES_128_GCM_SHA256")
    assert made.session_id.hex() == case["session_id"]
    assert made.client.secret.hex() == case["c_ap_0"]
    assert made.server.secret.hex() == case["s_ap_0"]
    assert made.client.next().secret.hex() == case["c_ap_1"]
    assert made.client.next().next().secret.hex() == case["c_ap_2"]
    assert made.server.next().secret.hex() == case["s_ap_1"]


@pytest.mark.parametrize("case", cases("whitening"))
def test_whitening(case: dict[str, Any]) -> None:
    """R-2-3."""
    w = keys.whitener(unhex(case["x_0"]), unhex(case["cid"]))
    assert w == int(case["w"])
    assert (int(case["pn"]) ^ w).to_bytes(8, "big").hex() == case["wire_pn"]


@pytest.mark.parametrize("case", cases("init_packets"))
def test_init_packets(case: dict[str, Any]) -> None:
    """R-2-2."""
    aead = getattr(
        keys.initial_keys(unhex(case["keys_from_dcid"]), unhex(case["network_key"])), case["direction"]
    )
    whole = unhex(case["packet"])
    found = packet.parse_init(whole)
    assert (found.dcid.hex(), found.scid.hex(), found.token.hex(), found.pn) == (
        case["dcid"],
        case["scid"],
        case["token"],
        case["pn"],
    )
    plaintext = aead.open(found.pn, found.sealed, found.aad)
    assert plaintext.rstrip(b"\x00") == unhex(case["frames"]).rstrip(b"\x00")
    header = packet.init_header(found.dcid, found.scid, found.token, found.pn)
    assert header + aead.seal(found.pn, plaintext, header) == whole
    assert len(whole) - len(plaintext) == packet.init_overhead(found.token)


@pytest.mark.parametrize("case", cases("data_packets"))
def test_data_packets(case: dict[str, Any]) -> None:
    """R-2-2."""
    direction = keys.DirectionKeys.derive(unhex(case["x_0"]), case["suite"])
    for _ in range(case["updates"]):
        direction = direction.next()
    whole = unhex(case["packet"])
    phase, cid, wire_pn = packet.parse_data_header(whole)
    w = keys.whitener(unhex(case["x_0"]), cid)
    pn = wire_pn ^ w
    assert (phase, cid.hex(), str(w), str(pn)) == (case["phase"], case["cid"], case["w"], case["pn"])
    header = packet.data_header(phase, cid, wire_pn)
    assert whole.startswith(header)
    assert direction.aead.open(pn, whole[len(header) :], header).hex() == case["frames"]
    assert header + direction.aead.seal(pn, unhex(case["frames"]), header) == whole


@pytest.mark.parametrize("case", cases("retry"))
def test_retry(case: dict[str, Any]) -> None:
    """R-4-16."""
    made = keys.initial_keys(unhex(case["odcid"]), unhex(case["network_key"]))
    assert made.retry_key.hex() == case["retry_key"]
    found = packet.parse_retry(unhex(case["packet"]))
    genuine = packet.retry_is_genuine(found, made.retry_key, unhex(case["odcid"]))
    assert genuine == case["valid"]
    if case["valid"]:
        assert (found.dcid.hex(), found.scid.hex(), found.token.hex()) == (
            case["client_scid"],
            case["new_cid"],
            case["token"],
        )
        again = packet.build_retry(found.dcid, found.scid, found.token, made.retry_key, unhex(case["odcid"]))
        assert again.hex() == case["packet"]


@pytest.mark.parametrize("case", cases("reset"))
def test_reset(case: dict[str, Any]) -> None:
    """R-2-9, R-8-4."""
    token = packet.reset_token(unhex(case["reset_key"]), unhex(case["cid"]))
    assert token.hex() == case["token"]
    made = packet.build_reset(token, case["provoked_by_length"], bytes(range(0xA, 0x30)))
    if case["datagram"] is None:
        assert made is None
        return
    assert made is not None
    assert packet.MIN_RESET <= len(made) < case["provoked_by_length"]
    assert made.endswith(token)
    assert unhex(case["datagram"]).endswith(token)
    assert packet.is_data(made)


@pytest.mark.parametrize("case", cases("cid"))
def test_cid(case: dict[str, Any]) -> None:
    """R-8-1."""
    cid_key, cid = unhex(case["cid_key"]), unhex(case["cid"])
    assert packet.cid_is_ours(cid_key, case["instance"], cid) == case["ours"]
    if case["ours"]:
        assert packet.make_cid(cid_key, case["instance"], unhex(case["r"])) == cid


@pytest.mark.parametrize("case", cases("hello"))
def test_hello(case: dict[str, Any]) -> None:
    """R-4-2, R-4-3."""
    blob = unhex(case["blob"])
    if not case["valid"]:
        with pytest.raises(ProtocolError):
            TransportHello.decode(blob)
        return
    found = TransportHello.decode(blob)
    fields = case["fields"]
    assert b"".join(v.to_bytes(4, "big") for v in found.versions).hex() == fields["1"]
    assert (found.original_dcid.hex(), found.cid.hex(), found.retry_scid.hex()) == (
        fields["2"],
        fields["3"],
        fields["4"],
    )
    defaults = TransportParameters()
    given = {int(k): int(v, 16) for k, v in case["parameters"].items()}
    assert found.parameters == TransportParameters(
        max_datagram=given.get(1, defaults.max_datagram),
        max_ack_delay_ms=given.get(2, defaults.max_ack_delay_ms),
        max_streams_bidi=given.get(3, defaults.max_streams_bidi),
        max_streams_uni=given.get(4, defaults.max_streams_uni),
    )
    if set(fields) == {"1", "2", "3", "4", "5"} and len(given) == 4:
        assert found.encode() == blob
    assert parse_tlvs(blob).keys() == {int(k) for k in fields}


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, list):
        return [[low, high - 1] for low, high in value]  # vectors count both ends in
    return value


@pytest.mark.parametrize("case", cases("frames"))
def test_frames(case: dict[str, Any]) -> None:
    """R-5-1."""
    raw = unhex(case["bytes"])
    (frame,) = frames.decode(raw)
    names = {
        "PADDING": "Padding",
        "PING": "Ping",
        "ACK": "Ack",
        "NEW_CID": "NewCid",
        "RETIRE_CID": "RetireCid",
    }
    expected = names.get(case["name"], case["name"].title().replace("_", ""))
    assert type(frame).__name__ == expected
    found = {name: _plain(getattr(frame, name)) for name in case["fields"]}
    assert found == case["fields"]
    short_form = isinstance(frame, frames.Stream) and raw[0] < frames.STREAM_LENGTH
    assert (frame.encode_last() if short_form else frame.encode()) == raw  # type: ignore[union-attr]


@pytest.mark.parametrize("case", cases("frames_invalid"))
def test_invalid_frames(case: dict[str, Any]) -> None:
    """R-5-2."""
    with pytest.raises(ProtocolError):
        frames.decode(unhex(case["bytes"]))


def test_stream_carrier() -> None:
    case = vectors()["stream_carrier"]
    hello = unhex(case["hello"])
    assert int.from_bytes(hello[:2], "big") == len(hello) - 2
    TransportHello.decode(hello[2:])
    record = unhex(case["record"])
    assert record[4:] == unhex(case["frames"])
    assert [type(f).__name__ for f in frames.decode(record[4:])] == ["Ping", "Stream"]


@pytest.mark.parametrize("case", cases("init_packets"))
def test_every_cut_of_an_init_is_dropped(case: dict[str, Any]) -> None:
    whole = unhex(case["packet"])
    keys_ = keys.initial_keys(unhex(case["keys_from_dcid"]), unhex(case["network_key"]))
    for size in (0, 1, 5, 22, 27, 42, len(whole) // 2, len(whole) - 1):
        with pytest.raises(PacketError):
            found = packet.parse_init(whole[:size])
            getattr(keys_, case["direction"]).open(found.pn, found.sealed, found.aad)
