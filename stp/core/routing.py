"""Frames that name a stream or its credit, to their owner: the same over datagrams and over a stream.

(1) ProtocolError is the only exception that any bytes can raise here.
"""

from __future__ import annotations

from collections.abc import Iterable
from struct import error as struct_error
from typing import Protocol

from stp.core import frames
from stp.core.errors import FrameEncodingError, ProtocolError
from stp.core.events import Event, StreamOpened, StreamReset, StreamStopped
from stp.core.frames import STREAM_HEAD, STREAM_HEAD_SIZE, STREAM_LENGTH_HEAD, STREAM_LENGTH_HEAD_SIZE
from stp.core.streamset import MAX_DATA, MAX_STREAM_DATA, StreamSet


class Listener(Protocol):
    """Who is told."""

    def on_event(self, event: Event) -> None: ...

    def on_readable(self, stream: int) -> None: ...


def take_stream(plain: bytes, pos: int, kind: int, streams: StreamSet, inbox: Listener) -> int:
    """The STREAM frame at `pos`, without an object: there is one in every small packet. Its end.

    Raises ProtocolError.
    """
    number: int
    offset: int
    length: int
    try:
        if kind >= frames.STREAM_LENGTH:
            _, number, offset, length = STREAM_LENGTH_HEAD.unpack_from(plain, pos)
            pos += STREAM_LENGTH_HEAD_SIZE
        else:
            _, number, offset = STREAM_HEAD.unpack_from(plain, pos)
            pos += STREAM_HEAD_SIZE
            length = len(plain) - pos
    except struct_error:
        raise FrameEncodingError("STREAM cut short") from None
    end = pos + length
    if end > len(plain):
        raise FrameEncodingError("STREAM longer than its packet")
    fin = kind & frames.FIN_BIT == 1
    if fin and not number:
        raise ProtocolError("FIN of the control stream")
    stream = streams.recv.get(number)
    if stream is None:
        stream, opened = streams.receiver(number)
        announce(opened, inbox)
        if stream is None:
            return end
    grown = stream.insert(offset, plain[pos:end], fin)
    if grown and number:
        streams.on_bytes(grown)
    if stream.chunks or stream.complete:
        inbox.on_readable(number)
    return end


def announce(opened: Iterable[int], inbox: Listener) -> None:
    for number in opened:
        inbox.on_event(StreamOpened(number))


def take_stream_frame(
    frame: frames.Frame, streams: StreamSet, inbox: Listener, now: float, rtt: float
) -> bool:
    """A frame about streams or credit, STREAM itself apart. False: it is about something else."""
    match frame:
        case frames.MaxData():
            streams.peer_limit = max(streams.peer_limit, frame.max)
        case frames.MaxStreamData():
            streams.on_max_stream_data(frame.stream, frame.max)
        case frames.MaxStreams():
            streams.on_max_streams(frame.kind, frame.max)
        case frames.DataBlocked():
            streams.on_blocked(MAX_DATA, 0)
        case frames.StreamDataBlocked():
            streams.on_blocked(MAX_STREAM_DATA, frame.stream)
        case frames.StreamsBlocked():
            pass  # credit for streams is given back as they end
        case frames.ResetStream():
            heard, opened = streams.on_reset(frame, now, rtt)
            announce(opened, inbox)
            if heard:
                inbox.on_event(StreamReset(frame.stream, frame.code))
        case frames.StopSending():
            if streams.on_stop(frame):
                inbox.on_event(StreamStopped(frame.stream, frame.code))
        case _:
            return False
    return True
