"""A man in the middle who has the network key: opens INITs, edits a hello, seals them again."""

from __future__ import annotations

from stp.core import frames, packet
from stp.core.errors import PacketError
from stp.core.keys import initial_keys
from tests.identity_kit import NETWORK_KEY


class HelloEditor:
    """Changes one byte of the client's or the server's hello wherever it passes, lengths left alone.

    `position` in 0..1 chooses the byte. Keys follow the DCIDs of the client's INITs, as both sides' do.
    """

    def __init__(self, *, towards_hub: bool, position: float) -> None:
        self._towards_hub = towards_hub
        self._position = position
        self._dcids: list[bytes] = []
        self.edited = 0

    def from_client(self, datagram: bytes, number: int) -> list[bytes]:
        if datagram[0] != packet.INIT_BYTE:
            return [datagram]
        parsed = packet.parse_init(datagram)
        if parsed.dcid not in self._dcids:
            self._dcids.append(parsed.dcid)
        return [self._edit(datagram, client=True) if self._towards_hub else datagram]

    def from_server(self, datagram: bytes, number: int) -> list[bytes]:
        if datagram[0] != packet.INIT_BYTE or self._towards_hub:
            return [datagram]
        return [self._edit(datagram, client=False)]

    def _edit(self, datagram: bytes, *, client: bool) -> bytes:
        parsed = packet.parse_init(datagram)
        for dcid in self._dcids:
            keys = initial_keys(dcid, NETWORK_KEY)
            aead = keys.client if client else keys.server
            try:
                plain = aead.open(parsed.pn, parsed.sealed, parsed.aad)
            except PacketError:
                continue
            changed = self._edit_frames(plain)
            return parsed.aad + aead.seal(parsed.pn, changed, parsed.aad)
        return datagram

    def _edit_frames(self, plain: bytes) -> bytes:
        out = []
        for frame in frames.decode(plain):
            if isinstance(frame, frames.Crypto) and frame.offset == 0 and frame.data:
                size = int.from_bytes(frame.data[:2], "big")
                at = 2 + int(self._position * size)
                data = bytearray(frame.data)
                data[at] ^= 0x01
                frame.data = bytes(data)
                self.edited += 1
            out.append(frame.encode())
        return b"".join(out)
