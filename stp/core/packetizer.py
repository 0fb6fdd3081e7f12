"""Seals and opens DATA packets, a burst or a receive buffer at a time (protocol §2, §6). Above streams.

(1) No number is used twice: `Sealer.next` only grows, over all keys. No key seals more than `Sealer.limit` packets.
(2) A number opens once; what does not open, or opened before, changes nothing but a counter.
(3) In the two loops there is no object, dict or log line per packet: state is in locals, and bytes in order go
    straight to their stream.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from struct import Struct
from typing import TYPE_CHECKING, Final

from cryptography.exceptions import InvalidTag

from stp.core.acks import AckTracker
from stp.core.errors import ErrorCode, ProtocolError
from stp.core.frames import STREAM, STREAM_HEAD, STREAM_HEAD_SIZE
from stp.core.keys import Aead, DirectionKeys
from stp.core.packet import (
    DATA_BYTE,
    DATA_HEADER_LENGTH,
    DATA_OVERHEAD,
    MAX_PN,
    PHASE_BIT,
    whitener,
)
from stp.core.recovery import FrameOwner
from stp.core.scratch import MIN_BURST, MIN_SIZE, ROOM, Scratch
from stp.core.streams import RecvStream

if TYPE_CHECKING:
    from stp.core.trace import Trace

BULK_OVERHEAD: Final = DATA_OVERHEAD + STREAM_HEAD_SIZE
"""Bytes around the stream bytes of a packet that holds nothing else: 46."""
MIN_SKIP: Final = 256
MAX_SKIP: Final = 131_072
"""Packets between two numbers that are left out on purpose (protocol §2)."""
MAX_SKIPPED: Final = 16
"""Left-out numbers that are remembered; an ACK of an older one is no use to anybody."""

CLOSE_RESERVE: Final = 64
"""Of the packets that a key may seal, those kept for CLOSE: it answers the 1st, 2nd, 4th, … packet of a peer."""

NUMBERS: Final = MAX_PN + 1
"""How many packets one side of a session can number."""

_HEADER: Final = Struct("!BQQ")  # as packet.DATA_HEADER, the CID as a number
_MIN_PACKET: Final = DATA_OVERHEAD + 1
_NO_HEADER: Final = (0, -1, 0)


class PacketBuilder:
    """The frames of one packet while it is being filled."""

    __slots__ = ("frames", "parts", "room", "whole")

    def __init__(self, room: int) -> None:
        self.room = room
        """Bytes of frames that still fit."""
        self.whole = room + DATA_OVERHEAD
        """Bytes that the datagram may have."""
        self.parts: list[bytes] = []
        self.frames: list[tuple[FrameOwner, object]] = []

    def add(self, frame: bytes, owner: FrameOwner, token: object) -> bool:
        """Whether the frame still fitted."""
        if len(frame) > self.room:
            return False
        self.room -= len(frame)
        self.parts.append(frame)
        self.frames.append((owner, token))
        return True

    def pad(self, size: int) -> None:
        """Make the datagram at least `size` bytes large, as far as it may be. Nothing may follow."""
        wanted = min(size - (self.whole - self.room), self.room)
        if wanted > 0:
            self.parts.append(bytes(wanted))
            self.room -= wanted


class Sealer:
    """Our packets: keys of the phase, the peer's CID, numbers."""

    __slots__ = (
        "_aead",
        "_pn_key",
        "_prefix",
        "_random",
        "_scratch",
        "_w",
        "first",
        "limit",
        "next",
        "skip_at",
        "skipped",
        "trace",
    )

    def __init__(
        self,
        keys: DirectionKeys,
        pn_key: bytes,
        cid: bytes,
        random_bytes: Callable[[int], bytes],
        limit: int = NUMBERS,
        scratch: Scratch | None = None,
    ) -> None:
        self._scratch = scratch or Scratch()
        self._pn_key = pn_key
        self._random = random_bytes
        self.trace: Trace | None = None
        """Who is told of every packet; nobody, as a rule."""
        self.next = 0
        self.first = 0
        """The first number of the phase."""
        self.limit = limit
        """Packets that one key may seal."""
        self.skipped: Sequence[int] = ()
        """Numbers left out; an ACK that covers one is a lie."""
        self.skip_at = 0
        """Where a run ends: a number to be left out, or the end of what the key may seal."""
        self._plan_skip()
        self._aead = keys.aead
        self._prefix = bytes((DATA_BYTE,))
        self.use_cid(cid)

    def use_cid(self, cid: bytes) -> None:
        if self.trace is not None:
            self.trace.cid(self._prefix[1:], cid)
        self._prefix = self._prefix[:1] + cid
        self._w = whitener(self._pn_key, cid)

    def use_keys(self, aead: Aead) -> None:
        """The other phase begins, with the next number."""
        self._prefix = bytes((self._prefix[0] ^ PHASE_BIT,)) + self._prefix[1:]
        self._aead = aead
        self.first = self.next

    @property
    def phase(self) -> int:
        """The phase bit of what we seal, 0 or 1."""
        return self._prefix[0] & PHASE_BIT

    def _plan_skip(self) -> None:
        """R-2-6."""
        draw = int.from_bytes(self._random(4), "big")
        self.skip_at = min(self.next + MIN_SKIP + draw % (MAX_SKIP - MIN_SKIP + 1), self._stop())

    def _stop(self) -> int:
        """The first number that is kept for CLOSE or that this key must not seal."""
        return min(self.first + self.limit, NUMBERS) - CLOSE_RESERVE

    def run(self) -> int:
        """How many packets may be sealed in a row from `next` on, at least one; may leave a number out (R-2-4).

        Raises ProtocolError (AEAD_LIMIT): the key, or the numbers, are used up but for CLOSE_RESERVE packets.
        """
        while self.next >= self.skip_at:
            if self.next >= self._stop():
                raise ProtocolError("the key has sealed its fill", ErrorCode.AEAD_LIMIT)
            self.leave_out()
        return self.skip_at - self.next

    def leave_out(self) -> None:
        """Skip a number, and plan the next one to skip."""
        self.skipped = [*self.skipped, self.next][-MAX_SKIPPED:]
        self.next += 1
        self._plan_skip()

    def seal(self, frames: bytes) -> bytes:
        """One packet. Call `run` before."""
        pn = self.next
        self.next = pn + 1
        if self.trace is not None:
            self.trace.sealed(pn, frames)
        aead = self._aead
        header = self._prefix + (pn ^ self._w).to_bytes(8, "big")
        return header + aead.encrypt((aead.iv_int ^ pn).to_bytes(12, "big"), frames, header)

    def seal_burst(
        self, stream: int, offset: int, data: bytes, index: int, length: int, piece: int, fin: bool
    ) -> bytes:
        """`length` bytes of `data` from `index` on, cut into packets of `piece` bytes; at most `run` of them."""
        if self.trace is not None:
            self.trace.sealed_burst(self.next, stream, offset, length, piece, fin)
        parts: list[bytes | memoryview] = []
        full = (length - 1 if fin else length) // piece  # with nothing but bytes in order
        if full >= MIN_BURST and piece >= MIN_SIZE - BULK_OVERHEAD:
            done = self._seal_full(parts, stream, offset, data, index, full, piece)
            index, offset, length = index + done, offset + done, length - done
        prefix, w, iv, encrypt = self._prefix, self._w, self._aead.iv_int, self._aead.encrypt
        head = STREAM_HEAD.pack
        pn = self.next
        add = parts.append
        stop = index + length
        last = stop - piece  # a packet that starts here or above is the last one
        while index < stop:
            header = prefix + (pn ^ w).to_bytes(8, "big")
            add(header)
            kind = 5 if fin and index >= last else 4
            plain = head(kind, stream, offset) + data[index : min(index + piece, stop)]
            add(encrypt((iv ^ pn).to_bytes(12, "big"), plain, header))
            pn += 1
            index += piece
            offset += piece
        self.next = pn
        return b"".join(parts)

    def _seal_full(
        self,
        parts: list[bytes | memoryview],
        stream: int,
        offset: int,
        data: bytes,
        index: int,
        count: int,
        piece: int,
    ) -> int:
        """`count` full packets at once: how many bytes they took, 0 where that cannot be."""
        scratch, prefix = self._scratch, self._prefix
        layout = scratch.layout(piece + BULK_OVERHEAD, count)
        cid = int.from_bytes(prefix[1:], "big")
        sealed = scratch.seal(
            layout, self._aead, prefix[0], cid, self._w, self.next, stream, offset, data, index
        )
        if sealed is None:
            return 0
        parts.append(sealed)
        self.next += count
        return count * piece


class Opener:
    """The peer's packets: keys of the phase, our CIDs."""

    __slots__ = (
        "_cid",
        "_pn_key",
        "_scratch",
        "_w",
        "aead",
        "current",
        "failed",
        "first_byte",
        "lowest",
        "repeated",
    )

    def __init__(
        self, keys: DirectionKeys, pn_key: bytes, cid: bytes, scratch: Scratch | None = None
    ) -> None:
        self._scratch = scratch or Scratch()
        self._pn_key = pn_key
        self.first_byte = DATA_BYTE
        self.aead = keys.aead
        """That of the phase."""
        self.lowest = 0
        """The lowest number that opened in this phase."""
        self.failed = 0
        """Packets to a CID of ours that did not open."""
        self.repeated = 0
        """Packets whose number had opened before or lies below the window."""
        self.use_cid(cid)

    def use_cid(self, cid: bytes) -> None:
        """The peer's packets come to another CID of ours now."""
        self.current = cid
        self._cid = int.from_bytes(cid, "big")
        self._w = whitener(self._pn_key, cid)

    def use_keys(self, aead: Aead, pn: int) -> None:
        """The peer is in the other phase since packet `pn`."""
        self.first_byte ^= PHASE_BIT
        self.aead = aead
        self.lowest = pn

    def of_other_phase(self, datagram: bytes) -> bool:
        """Whether this, to the current CID, could be a packet of the other phase."""
        return len(datagram) >= _MIN_PACKET and datagram[0] ^ self.first_byte == PHASE_BIT

    def number(self, datagram: bytes) -> int:
        """The number of a packet to the current CID."""
        return int.from_bytes(datagram[DATA_HEADER_LENGTH - 8 : DATA_HEADER_LENGTH], "big") ^ self._w

    def _out_of_order(self, pn: int, acks: AckTracker, now: float) -> bool:
        """A packet of this phase opened that is not the next one. Whether it is to be taken."""
        if pn < self.lowest:
            self.lowest = pn
        return self.note(pn, acks, now)

    def note(self, pn: int, acks: AckTracker, now: float) -> bool:
        """A packet opened: tell `acks`, unless its number had opened before (2)."""
        if pn > MAX_PN or not acks.fresh(pn):
            self.repeated += 1
            return False
        if pn < acks.next:
            acks.on_late(pn)
        else:
            acks.on_run(pn, pn + 1, now)
        return True

    def open_buffer(
        self, data: bytes, size: int, recv: dict[int, RecvStream], acks: AckTracker, now: float
    ) -> tuple[int, int, list[tuple[RecvStream, int]], list[bytes], list[bytes]]:
        """Open a buffer of datagrams of `size` bytes each, the last possibly shorter, all of one source.

        Returns: how many opened; how many of these held only bytes in order, which are in their streams now; those
        streams (`merge` them) and by how much `highest` grew; other plaintexts; datagrams to another CID or phase.
        """
        header, head = _HEADER.unpack_from, STREAM_HEAD.unpack_from
        (decrypt, iv), cid, first, w = self.aead.opening(), self._cid, self.first_byte, self._w
        run = expected = acks.next
        touched: list[tuple[RecvStream, int]] = []
        rest: list[bytes] = []
        strange: list[bytes] = []
        stream: RecvStream | None = None
        number, at, limit, total, opened, absorbed = -1, -1, 0, len(data), 0, 0
        if total >= MIN_BURST * size:
            opened, absorbed = self._open_full(data, size, recv, expected, touched, rest)
            expected += opened
        for start in range(opened * size, total, size):
            kind, to, wire = header(data, start) if total - start >= _MIN_PACKET else _NO_HEADER
            if to != cid or kind != first:
                strange.append(data[start : start + size])
                continue
            pn, body = wire ^ w, start + DATA_HEADER_LENGTH
            try:
                plain = decrypt((iv ^ pn).to_bytes(12, "big"), data[body : start + size], data[start:body])
            except InvalidTag:
                self.failed += 1
                continue
            if pn == expected:
                expected = pn + 1
            else:
                if expected > run:
                    acks.on_run(run, expected, now)
                fresh = self._out_of_order(pn, acks, now)
                run = expected = acks.next
                if not fresh:
                    continue
            opened += 1
            length = len(plain) - STREAM_HEAD_SIZE
            if length > 0 and plain[0] == 4:
                _, wanted, offset = head(plain)
                if wanted != number:
                    if stream is not None:
                        touched.append((stream, _settle(stream, at)))
                    number, stream = wanted, recv.get(wanted)
                    at, limit = (-1, 0) if stream is None else (stream.next, stream.limit)
                if offset == at and length <= limit - at:
                    stream.chunks.append(plain[STREAM_HEAD_SIZE:])  # type: ignore[union-attr]
                    at += length
                    absorbed += 1
                    continue
            rest.append(plain)
        if stream is not None:
            touched.append((stream, _settle(stream, at)))
        if expected > run:
            acks.on_run(run, expected, now)
        return opened, absorbed, touched, rest, strange

    def _open_full(
        self,
        data: bytes,
        size: int,
        recv: dict[int, RecvStream],
        pn: int,
        touched: list[tuple[RecvStream, int]],
        rest: list[bytes],
    ) -> tuple[int, int]:
        """The full packets of a buffer at once, if they are the next in sequence: how many opened, 0 if they are not;
        how many of these held only bytes in order, which are in their streams now."""
        if size < MIN_SIZE or len(data) > ROOM:
            return 0, 0
        scratch = self._scratch
        layout = scratch.layout(size, len(data) // size)
        if not scratch.open(layout, self.aead, self.first_byte, self._cid, self._w, pn, data):
            return 0, 0
        count, said = layout.count, scratch.said(layout)
        found = scratch.one_stream(layout, said)
        if found is not None:
            number, offset, chunk = found
            stream = recv.get(number)
            if stream is not None and offset == stream.next and len(chunk) <= stream.limit - offset:
                stream.chunks.append(chunk)
                touched.append((stream, _settle(stream, offset + len(chunk))))
                return count, count
        absorbed = 0
        for n in range(count):
            kind, number, offset, chunk = said[4 * n : 4 * n + 4]
            stream = recv.get(number) if kind == STREAM else None
            if stream is not None and offset == stream.next and len(chunk) <= stream.limit - offset:
                stream.chunks.append(chunk)
                touched.append((stream, _settle(stream, offset + len(chunk))))
                absorbed += 1
            else:
                rest.append(scratch.plaintext(layout, n))
        return count, absorbed


def _settle(stream: RecvStream, at: int) -> int:
    """Write back how far the loop came; by how much the highest offset grew."""
    stream.next = at
    grown = at - stream.highest
    if grown <= 0:
        return 0
    stream.highest = at
    return grown
