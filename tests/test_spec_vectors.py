"""§13 of docs/protocol.md: every value in it, against stp and against the second client, which share no code.

(1) The section is what tests.spec_vectors makes of tests/vectors/stp1.json.
(2) Both implementations read every example as the text says, and make the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import re
from functools import cache
from typing import Any

import pytest

from stp.batch import check_batch, node_id, open_batch
from stp.control import ControlCutter, decode_control, encode_control
from stp.core import frames as our_frames
from stp.core import keys as our_keys
from stp.core import packet
from stp.core.params import TransportHello, parse_tlvs
from stp.records import RecordCutter, RecordKind, batches_of, check_batches
from stp.records import read_record as our_record
from stp.topics import common_prefix
from tests import spec_vectors
from tests.second import frames as their_frames
from tests.second import hello as their_hello
from tests.second import keys as their_keys
from tests.second import messages as their_messages
from tests.second import packets as their_packets
from tests.spec_vectors import Case

unhex = bytes.fromhex


@cache
def found() -> dict[str, list[Case]]:
    return spec_vectors.parse(spec_vectors.section())


def cases(number: str, *, having: str = "") -> pytest.MarkDecorator:
    chosen = [case for case in found()[number] if having in case or not having]
    assert chosen, f"§{number} holds no {having or 'case'}"
    return pytest.mark.parametrize("case", chosen, ids=[f"{number}-{index}" for index in range(len(chosen))])


def test_the_section_is_what_the_vectors_make() -> None:
    """(1): after a change, `python -m tests.spec_vectors`."""
    assert spec_vectors.section() == spec_vectors.render(spec_vectors.vectors())
    assert list(found()) == [f"13.{number}" for number in range(1, 13)]


@cases("13.1", having="secret")
def test_expand(case: Case) -> None:
    for expand in (our_keys.expand, their_keys.expand):
        assert expand(unhex(case["secret"]), case["label"], int(case["n"])).hex() == case["out"]


@cases("13.1", having="dcid")
def test_initial_keys(case: Case) -> None:
    dcid, network_key = unhex(case["dcid"]), unhex(case["network_key"])
    ours, theirs = our_keys.initial_keys(dcid, network_key), their_keys.InitialKeys(dcid, network_key)
    assert theirs.client_secret.hex() == case["c_in"]
    assert theirs.server_secret.hex() == case["s_in"]
    assert ours.retry_key.hex() == theirs.retry_key.hex() == case["retry_key"]
    for side in ("client", "server"):
        one, two = getattr(ours, side), getattr(theirs, side)
        assert one.iv_int.to_bytes(12, "big").hex() == two.iv.hex() == case[f"{side}_iv"]
        assert two.key.hex() == case[f"{side}_key"]
        assert one.seal(7, b"frames", b"header") == two.seal(7, b"header", b"frames")
    salt = their_keys.extract(hashlib.sha256(b"STP/1 initial salt").digest(), network_key)
    assert their_keys.extract(salt, unhex("53545001") + dcid).hex() == case["initial"]


@cases("13.2", having="context")
def test_context(case: Case) -> None:
    parts = [unhex(case[name]) for name in ("HC", "HS", "server_leaf", "client_leaf")]
    assert our_keys.context(*parts).hex() == their_keys.context_hash(*parts).hex() == case["context"]


@cases("13.2", having="master")
def test_session_keys(case: Case) -> None:
    master = unhex(case["master"])
    ours = our_keys.SessionKeys.derive(master, "TLS_AES_128_GCM_SHA256")
    theirs = their_keys.ApplicationKeys(master, "TLS_AES_128_GCM_SHA256")
    assert ours.session_id.hex() == theirs.session_id.hex() == case["session_id"]
    for letter, one, two in (("c", ours.client, theirs.client), ("s", ours.server, theirs.server)):
        for update in range(3):
            if wanted := case.get(f"{letter}_ap_{update}"):
                assert one.secret.hex() == two.secret.hex() == wanted
            one = one.next()
            two.update()


@cases("13.3")
def test_init(case: Case) -> None:
    dcid, network_key = unhex(case["keys_from_dcid"]), unhex(case["network_key"])
    ours = getattr(our_keys.initial_keys(dcid, network_key), case["direction"])
    theirs = getattr(their_keys.InitialKeys(dcid, network_key), case["direction"])
    plain, token, number = unhex(case["frames"]), unhex(case["token"]), int(case["pn"])
    cids = unhex(case["dcid"]), unhex(case["scid"])
    if case["direction"] == "client":
        plain += their_packets.padding(token, plain)
    made = their_packets.seal_init(theirs, *cids, token, number, plain)
    header = packet.init_header(*cids, token, number)
    assert header + ours.seal(number, plain, header) == made
    if "packet" in case:
        assert made.hex() == case["packet"]
    else:
        assert len(made) == packet.INIT_DATAGRAM
        assert (header.hex(), made[-16:].hex()) == (case["header"], case["tag"])
        assert hashlib.sha256(made).hexdigest() == case["packet_sha256"]
    read = their_packets.read_long(made)
    assert isinstance(read, their_packets.Init)
    assert theirs.open(read.number, read.header, read.sealed) == plain
    parsed = packet.parse_init(made)
    assert ours.open(parsed.pn, parsed.sealed, parsed.aad) == plain


@cases("13.4")
def test_retry(case: Case) -> None:
    odcid, network_key, raw = unhex(case["odcid"]), unhex(case["network_key"]), unhex(case["packet"])
    ours = our_keys.initial_keys(odcid, network_key).retry_key
    parts = [unhex(case[name]) for name in ("client_scid", "new_cid", "token")]
    assert packet.build_retry(parts[0], parts[1], parts[2], ours, odcid) == raw
    assert packet.retry_is_genuine(packet.parse_retry(raw), ours, odcid)
    read = their_packets.read_long(raw)
    assert isinstance(read, their_packets.Retry)
    assert [read.dcid, read.scid, read.token] == parts
    assert their_keys.InitialKeys(odcid, network_key).retry_tag(odcid, read.covered) == read.tag


@cases("13.5")
def test_data(case: Case) -> None:
    x_0, cid, plain, raw = (unhex(case[name]) for name in ("x_0", "cid", "frames", "packet"))
    number, phase = int(case["pn"]), int(case["phase"])
    ours, theirs = our_keys.DirectionKeys.derive(x_0, case["suite"]), their_keys.Direction(x_0, case["suite"])
    for _ in range(int(case["updates"])):
        ours = ours.next()
        theirs.update()
    w = our_keys.whitener(x_0, cid)
    assert w == theirs.whitening(cid) == int(case["w"])
    assert (theirs.current.key.hex(), theirs.current.iv.hex()) == (case["key"], case["iv"])
    assert ours.aead.iv_int.to_bytes(12, "big") == theirs.current.iv
    header = packet.data_header(phase, cid, number ^ w)
    assert header + ours.aead.seal(number, plain, header) == raw
    assert their_packets.seal_data(theirs, cid, number, plain) == raw
    read = their_packets.read_data(theirs, raw)
    assert read is not None
    assert (read.phase, read.cid, read.number) == (phase, cid, number)
    assert theirs.current.open(number, read.header, read.sealed) == plain


@cases("13.6", having="cid_key")
def test_cid(case: Case) -> None:
    key, instance, r = unhex(case["cid_key"]), int(case["instance"]), unhex(case["r"])
    assert packet.make_cid(key, instance, r).hex() == case["cid"]
    assert their_packets.listener_cid(key, instance, r).hex() == case["cid"]


@cases("13.6", having="reset_key")
def test_reset(case: Case) -> None:
    key, cid, datagram = (unhex(case[name]) for name in ("reset_key", "cid", "datagram"))
    token = packet.reset_token(key, cid)
    assert token.hex() == their_packets.reset_token(key, cid).hex() == case["token"]
    assert their_packets.may_be_reset(datagram, [token])
    assert not their_packets.may_be_reset(datagram[:4] + token, [token]), "R-2-9: 21 bytes at least"
    random = datagram[:-16]
    assert packet.build_reset(token, 1200, random) == datagram


@cases("13.7")
def test_hello(case: Case) -> None:
    raw = unhex(case["hello"])
    types = {int(name[5:]): unhex(value) for name, value in case.items() if name.startswith("type_")}
    inner = {int(name[10:]): unhex(value) for name, value in case.items() if name.startswith("parameter_")}
    assert parse_tlvs(raw) == their_hello.read_hello(raw) == types
    assert parse_tlvs(types[5]) == their_hello.read_tlvs(types[5]) == inner
    assert their_hello.write_tlvs(types) == raw
    ours = TransportHello.decode(raw)
    assert (ours.original_dcid, ours.cid, ours.retry_scid) == (types[2], types[3], types[4])


def said(text: str) -> dict[str, Any]:
    """A row's last column: names and values; hexadecimal stands in backquotes."""
    values: dict[str, Any] = {}
    for part in filter(None, text.split(", ")):
        name, _, value = part.partition(" ")
        if value.startswith("`"):
            values[name] = value.strip("`").removeprefix("-")
        elif "–" in value:
            values[name] = [tuple(map(int, pair.split("–"))) for pair in value.split()]
        else:
            values[name] = {"true": True, "false": False}[value] if value.isalpha() else int(value)
    return values


@cases("13.8")
def test_frames(case: Case) -> None:
    raw, says = unhex(case["bytes"]), said(case["says"])
    (ours,) = our_frames.decode(raw)
    for name, value in says.items():
        has = getattr(ours, {"limit": "max"}.get(name, name))
        has = [(low, high - 1) for low, high in has] if name == "ranges" else has
        if isinstance(has, bytes) and case["name"] != "CLOSE":
            has = has.hex()
        assert has == value, name
    theirs = their_frames.read(raw)
    if case["name"] == "PADDING":
        assert theirs == []
    elif case["name"] == "ACK":
        assert theirs == [(their_frames.ACK, says["delay_us"], says["ranges"])]
        assert their_frames.write_ack(says["ranges"], says["delay_us"]) == raw
    else:
        ((kind, *fields),) = theirs
        assert kind & ~1 == getattr(their_frames, case["name"], their_frames.STREAM) & ~1 or kind in (4, 5)
        assert kind == getattr(their_frames, case["name"], kind) or case["name"] == "STREAM"
        shown = [value.hex() if isinstance(value, bytes) else value for value in fields]
        if case["name"] == "CLOSE":
            shown[-1] = fields[-1].decode()
        assert shown == [value for name, value in says.items() if name != "fin"]
        assert "fin" not in says or says["fin"] == bool(kind & 1)
        assert their_frames.write(kind, *fields) == raw


@cases("13.9", having="uri")
def test_node_id(case: Case) -> None:
    domain, name = case["uri"].removeprefix("stp://").split("/")
    assert node_id(domain, name).hex() == their_messages.node_id(domain, name).hex() == case["id"]


@cases("13.9", having="batch")
def test_batch(case: Case) -> None:
    raw = unhex(case["batch"])
    check_batch(raw)
    ours, theirs = open_batch(raw), their_messages.read_batch(raw)
    head = ours.head
    fields = [
        head.flags,
        head.count,
        head.time_ms,
        head.ttl_ms,
        head.publisher.hex(),
        head.run,
        head.sequence,
        head.prefix,
    ]
    names = ("flags", "count", "time_ms", "ttl_ms", "publisher", "run", "sequence", "prefix")
    assert [str(value) for value in fields] == [case[name] for name in names]
    same = [theirs.flags, theirs.ttl_ms, theirs.publisher.hex(), theirs.run, theirs.sequence]
    assert same == [head.flags, head.ttl_ms, head.publisher.hex(), head.run, head.sequence]
    assert theirs.prefix.decode() == case["prefix"]
    if not head.flags & their_messages.EXCERPT:
        assert common_prefix(ours.topics) == case["prefix"]
        assert (
            their_messages.common_prefix([topic.encode() for topic in ours.topics]).decode() == case["prefix"]
        )
    assert raw[-4:].hex() == case["crc"]
    assert [m.topic for m in theirs.messages] == ours.topics
    assert [m.payload for m in theirs.messages] == ours.payloads
    assert [m.time_ms for m in theirs.messages] == ours.times_ms
    assert [m.at for m in theirs.messages] == list(ours.indices)
    for name, value in case.items():
        what, _, number = name.partition("_")
        if what == "topic":
            assert ours.topics[int(number)] == value
        elif what == "payload":
            assert ours.payloads[int(number)].hex() == value
        elif what == "index":
            assert ours.indices[int(number)] == int(value)
    if head.flags == 0 and head.ttl_ms == 0:
        pairs = list(zip(ours.topics, ours.payloads, strict=True))
        made = their_messages.write_batch(
            pairs,
            time_ms=head.time_ms,
            publisher=head.publisher,
            run=head.run,
            sequence=head.sequence,
        )
        assert made == raw


@cases("13.10")
def test_record(case: Case) -> None:
    raw = unhex(case["record"])
    (cut,) = RecordCutter().feed(raw)
    ours, theirs = our_record(bytes(cut)), their_messages.read_record(raw)
    assert RecordKind(ours.kind).name.lower() == case["kind"]
    assert (ours.lane, ours.source.hex(), ours.number) == (
        int(case["lane"]),
        case["source"],
        int(case["number"]),
    )
    assert (theirs.kind, theirs.lane, theirs.source, theirs.number) == (
        ours.kind,
        ours.lane,
        ours.source,
        ours.number,
    )
    assert ours.crc == theirs.crc == int(case["crc"], 16)
    assert [hop.hex() for hop in ours.hops] == [hop.hex() for hop in theirs.hops] == case["hops"].split()
    assert ours.age_ds == theirs.age_ds == int(case["age_ds"])
    if case["kind"] == "void":
        assert ours.to == theirs.to == int(case["to"])
        return
    check_batches(raw, ours)
    assert [bytes(batch) for batch in batches_of(raw, ours)] == theirs.batches
    assert len(theirs.batches) == int(case["batches"])
    assert ours.prefix == theirs.prefix.decode() == case["prefix"]
    if not theirs.hops:
        again = their_messages.write_record(
            theirs.lane, theirs.source, theirs.number, theirs.batches[0], theirs.prefix
        )
        assert again == raw


@cases("13.11")
def test_control(case: Case) -> None:
    raw, says = unhex(case["bytes"]), json.loads(case["body"])
    ((kind, body),) = ControlCutter().feed(raw)
    ours = decode_control(kind, body)
    assert ours is not None
    assert type(ours).__name__ == re.sub("_", "", case["record"].title())
    assert decode_control(kind, encode_control(ours)[5:]) == ours
    kind, body = raw[4], raw[5:]
    assert int.from_bytes(raw[:4], "big") == len(raw) - 4
    match case["record"]:
        case "RECEIPT":
            lane, kept, custody, ranges = their_messages.read_receipt(body)
            assert [lane, kept, custody] == [says[name] for name in ("lane", "kept", "custody")]
            assert [list(pair) for pair in ranges] == says["ranges"]
            assert ranges or their_messages.write_receipt(lane, kept, custody) == raw
        case "REFUSED":
            names = ("lane", "place", "code", "retry_after_ms", "reason")
            assert list(their_messages.read_refused(body)) == [says[name] for name in names]
        case "DRAIN_CREDIT":
            assert their_messages.read_drain_credit(body) == (says["lane"], says["bytes_per_second"])
        case _:
            assert json.loads(body) == says
            assert json.loads(their_messages.write_control(kind, says)[5:]) == says


@cases("13.12", having="first_bytes")
def test_lane(case: Case) -> None:
    raw = unhex(case["first_bytes"])
    assert raw[:2] == bytes([1, int(case["lane"])])
    assert int(case["stream"]) & 3 == 2, "unidirectional, and opened by the dialling side"
    (cut,) = RecordCutter().feed(raw[2:])
    assert our_record(bytes(cut)).lane == their_messages.read_record(raw[2:]).lane == int(case["lane"])


@cases("13.12", having="hello")
def test_tls_carrier(case: Case) -> None:
    hello, record, plain = (unhex(case[name]) for name in ("hello", "record", "frames"))
    assert len(hello) == 2 + int.from_bytes(hello[:2], "big")
    assert their_hello.read_hello(hello[2:]) == parse_tlvs(hello[2:])
    assert record == len(plain).to_bytes(4, "big") + plain
    ping, (kind, stream, offset, data) = their_frames.read(plain)
    assert ping == (their_frames.PING,)
    _, ours = our_frames.decode(plain)
    assert isinstance(ours, our_frames.Stream)
    assert (kind, stream, offset, data) == (their_frames.STREAM, ours.stream, ours.offset, ours.data)
