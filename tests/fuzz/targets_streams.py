"""Doors of the stream carriers: ClientHellos, what a stranger says to TLS, and units of a peer that is in."""

from __future__ import annotations

from stp.core import frames
from stp.core.clienthello import offered_protocols
from stp.core.errors import FrameEncodingError
from tests.core.framed_kit import End, Pair
from tests.fuzz.engine import Target
from tests.fuzz.targets_sessions import Closed, drain
from tests.fuzz.vectors import seeds

MAX_KEPT = 64 * 1024 + 4 + 2 * 70_000
"""Bytes that a peer in mid-unit may make us hold: the unit, and what one read brought behind it."""


def client_hello() -> Target:
    """What anybody may say first on 8443."""
    first = Pair(1).edge.session.next_write(0.0)
    cut = b"".join(
        b"\x16\x03\x01" + len(piece).to_bytes(2, "big") + piece
        for piece in (first[at : at + 400] for at in range(5, len(first), 400))
    )

    def feed(data: bytes) -> None:
        found = offered_protocols(data)
        assert found is None or all(isinstance(name, bytes) for name in found)

    return Target(
        name="client-hello",
        feed=feed,
        seeds=[first, cut],
        promised=(FrameEncodingError,),
        words=(b"stp-enrol/1", b"\x00\x10\x00"),
    )


def tls_stranger() -> Target:
    """A stranger in a TLS handshake with the listener: it ends or waits, and nobody becomes anybody."""
    first = Pair(2).edge.session.next_write(0.0)

    def feed(data: bytes) -> None:
        pair = Pair(3)
        hub = pair.hub.session
        for at in range(0, len(data), 5000):
            hub.receive(data[at : at + 5000], pair.now)
            while hub.next_write(pair.now):
                pass
        assert hub.peer is None
        assert not pair.hub.heard
        if not hub.live:
            raise Closed

    return Target(name="tls-stranger", feed=feed, seeds=[first], promised=(Closed,))


def units(name: str, *, dialling: bool, raw: bool = False) -> Target:
    """Frames of a peer that is in. `dialling`: that peer is the one that dialled; `raw`: the lengths are its, too."""
    holder: list[Pair] = []

    def end_of(pair: Pair) -> End:
        return pair.hub if dialling else pair.edge

    def feed(data: bytes) -> None:
        if not holder or not end_of(holder[0]).session.live:
            holder[:] = [Pair(4, carrier="unix", expected=None).establish()]
            holder[0].settle()
        pair = holder[0]
        victim = end_of(pair)
        session = victim.session
        wire = data if raw else framed(data)
        for at in range(0, len(wire), 9000):
            session.receive(wire[at : at + 9000], pair.now)
            while victim.context.agenda.ready:
                victim.context.agenda.ready.pop().in_ready = False
                drain(session)
            while session.next_write(pair.now):
                pass
            pair.now += 0.0005
        assert len(session._reader._partial) <= MAX_KEPT
        if not session.live:
            raise Closed
        if session._reader._partial:
            holder.clear()  # it would swallow the next input

    def data_on(stream: int, offset: int, data: bytes) -> bytes:
        return frames.Stream(stream, offset, data).encode()

    mine = 2 if dialling else 3
    valid = [
        b"\x01",
        data_on(mine, 0, b"abc") + data_on(mine, 3, b"def"),
        data_on(mine, 1000, b"x" * 900) + b"\x01",
        data_on(0, 0, b"control"),
        frames.PathChallenge(b"12345678").encode(),
        frames.Datagram(b"hello").encode(),
        frames.MaxStreamData(0, 1 << 30).encode() + frames.MaxData(1 << 30).encode(),
        frames.ResetStream(mine + 4, 7, 0).encode(),
    ]
    if raw:
        valid = [framed(one) for one in valid] + [b"".join(map(framed, valid))]
    else:
        valid += seeds("frames")[:6]
    return Target(name=name, feed=feed, seeds=valid, promised=(Closed,))


def framed(unit: bytes) -> bytes:
    return len(unit).to_bytes(4, "big") + unit


def units_of_client() -> Target:
    return units("units-up", dialling=True)


def units_of_server() -> Target:
    return units("units-down", dialling=False)


def unit_stream() -> Target:
    return units("unit-stream", dialling=True, raw=True)
