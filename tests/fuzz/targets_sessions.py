"""Doors of the transport that need a session: raw datagrams, and frames behind a good AEAD."""

from __future__ import annotations

from stp.batch import encode_batch
from stp.control import Introduce, Subscribe, encode_control
from stp.core.session import Session
from stp.link import RecordReceived
from stp.records import RefusedCode, encode_record, encode_void
from tests.client.joined import hello, joined
from tests.client.joined import link as make_link
from tests.fuzz.engine import Target
from tests.fuzz.pair import EDGE, HUB, Pair, split
from tests.fuzz.vectors import seeds

SOURCE = b"d" * 16
MAX_SESSIONS = 600
"""What replayed first packets may make a listener hold: its half-open limit, and a few that close."""


class Closed(Exception):
    """The session ended with a code: the peer broke the protocol."""


def datagrams() -> Target:
    """Anything may arrive on the socket. The live session between the two does not care."""
    pair = Pair()
    pair.connect()
    stream = pair.sessions[1].open_stream()
    pair.sessions[1].write(stream, b"hello" * 500)
    while pair.carry():
        pass
    recorded = list(pair.sent)

    def feed(data: bytes) -> None:
        strange = (f"203.0.113.{sum(data) % 250}", 1000 + len(data))
        answered = 0
        for target, address in ((pair.hub, EDGE), (pair.hub, strange), (pair.edge, HUB)):
            target.receive(data, address, pair.now)
            for one in target.datagrams_to_send(pair.now):
                answered += len(one.data) if one.addr == strange else 0
                for datagram in split(one):
                    other, came_from = (pair.edge, HUB) if target is pair.hub else (pair.hub, EDGE)
                    if one.addr in (HUB, EDGE):
                        other.receive(datagram, came_from, pair.now)
        assert answered <= 3 * len(data), "more than three times what a stranger sent"
        pair.advance(0.001)
        assert all(session.live for session in pair.sessions), "a stranger ended a session"
        assert len(pair.hub.sessions) < MAX_SESSIONS

    return Target(
        name="datagrams",
        feed=feed,
        seeds=[
            *recorded,
            b"".join(recorded[-2:]),
            *seeds("data_packets", "init_packets", "retry", field="packet"),
        ],
        promised=(),
    )


def drain(session: Session) -> None:
    """What an owner does: takes events, reads streams, gives credit."""
    while (event := session.next_event()) is not None:
        stream = getattr(event, "stream", None)
        if stream is not None and session.live and not session.ended(stream):
            session.read(stream)


def sealed(name: str, *, dialling: bool) -> Target:
    """Frames of a peer that holds the keys. `dialling`: that peer is the one that dialled."""
    pair = Pair()

    def fresh() -> None:
        pair.renew()
        pair.connect()

    fresh()

    def feed(data: bytes) -> None:
        victim = pair.sessions[not dialling]
        if not victim.live:
            fresh()
            victim = pair.sessions[not dialling]
        target, address = (pair.hub, EDGE) if dialling else (pair.edge, HUB)
        target.receive(pair.seal(data, dialling=dialling), address, pair.now)
        for session in target.take_ready():
            drain(session)
        target.datagrams_to_send(pair.now)
        pair.advance(0.0005)
        if not victim.live:
            raise Closed

    def data_on(stream: int, offset: int, data: bytes, *, fin: int = 0) -> bytes:
        return (
            bytes([6 + fin])
            + stream.to_bytes(4, "big")
            + offset.to_bytes(8, "big")
            + len(data).to_bytes(2, "big")
            + data
        )

    mine = 2 if dialling else 3
    valid = seeds("frames")
    return Target(
        name=name,
        feed=feed,
        seeds=[
            b"\x01",
            data_on(mine, 0, b"abc") + data_on(mine, 3, b"def"),
            data_on(mine, 1000, b"x" * 900) + b"\x01",
            data_on(mine + 4, 0, b"over", fin=1) + data_on(0, 0, b"control"),
            *valid,
            *(first + second for first, second in zip(valid, valid[5:], strict=False)),
        ],
        promised=(Closed,),
    )


def sealed_by_client() -> Target:
    return sealed("sealed-up", dialling=True)


def sealed_by_server() -> Target:
    return sealed("sealed-down", dialling=False)


def chunk(channel: int, data: bytes) -> bytes:
    return bytes([channel]) + len(data).to_bytes(2, "big") + data


def link() -> Target:
    """The message layer behind a good HELLO: chunks of bytes on stream 0 (channel 0) and on lanes (1 and up)."""

    def feed(data: bytes) -> None:
        left, right = joined()
        gateway = make_link(right, hello("gateway", b"g" * 16))
        left.write(0, encode_control(hello("device", SOURCE)))
        now, answer = 0.0, 0
        while True:
            left.deliver()
            for event in gateway.process(now):
                if isinstance(event, RecordReceived):
                    answer += 1
                    if answer % 5:
                        gateway.settle(event.lane, event.place, custody=answer % 2 == 0)
                    else:
                        gateway.refuse(event.lane, event.place, RefusedCode.FULL, retry_after_ms=5)
            gateway.flush()
            if right.closed is not None:
                raise Closed
            if len(data) < 4:
                break
            stream, size = 2 + 4 * (data[0] % 6 - 1) if data[0] % 6 else 0, int.from_bytes(data[1:3], "big")
            left.outbox.setdefault(stream, bytearray()).extend(data[3 : 3 + size])
            data, now = data[3 + size :], now + 0.2
        gateway.check(now + 40.0)

    batch = encode_batch(["a/b", "a/c"], [b"1", b"22"], time_ms=1, publisher=bytes(16), run=1, sequence=1)
    own = [encode_record(3, SOURCE, n, [batch]) for n in (1, 2, 3)]
    foreign = encode_record(3, b"f" * 16, 1, [batch])
    void = encode_void(3, SOURCE, 4, 9, 1, 6)
    introduce = encode_control(Introduce({b"f" * 16: "other"}))
    subscribe = encode_control(Subscribe(id="1", filters=("a/#",)))
    lane = chunk(1, b"\x01\x03" + own[0])
    controls = [chunk(0, one) for one in seeds("control_records")[1:]]
    return Target(
        name="link",
        feed=feed,
        seeds=[
            lane,
            lane + chunk(1, b"".join(own[1:]) + void) + chunk(0, subscribe),
            lane + chunk(1, own[1][:30]) + chunk(1, own[1][30:] + own[1]),
            chunk(1, b"\x01\x03" + foreign) + chunk(0, introduce),
            chunk(1, b"\x01\x01" + encode_record(1, SOURCE, 1, [batch]))
            + chunk(2, b"\x01\x04")
            + chunk(3, b"\x02\0\2{}"),
            *controls,
            b"".join(controls),
        ],
        promised=(Closed,),
        words=[own[0], void, foreign, b"\x01\x03", subscribe],
    )
