"""Doors of the transport that need no session: headers, hellos, frames."""

from __future__ import annotations

from stp.core import frames, packet
from stp.core.errors import PacketError, ProtocolError
from stp.core.params import TransportHello
from tests.fuzz.engine import Target
from tests.fuzz.vectors import seeds


def headers() -> Target:
    def feed(data: bytes) -> None:
        refused = 0
        for parse in (packet.parse_init, packet.parse_retry, packet.parse_data_header):
            try:
                parse(data)
            except PacketError:
                refused += 1
        if refused == 3:
            raise PacketError("none of the three")

    valid = seeds("init_packets", "data_packets", "retry", field="packet")
    return Target(name="headers", feed=feed, seeds=valid, promised=(PacketError,))


def hello() -> Target:
    def feed(data: bytes) -> None:
        found = TransportHello.decode(data)
        assert TransportHello.decode(found.encode()) == found

    return Target(name="hello", feed=feed, seeds=seeds("hello", field="blob"), promised=(ProtocolError,))


def frame_codec() -> Target:
    def feed(data: bytes) -> None:
        for frame in frames.decode(data):
            frame.encode()

    return Target(
        name="frames",
        feed=feed,
        seeds=[*seeds("frames"), b"".join(seeds("frames")[1:4]), *seeds("frames_invalid")],
        promised=(ProtocolError,),
    )
