"""§4.1: the hello, a sequence of TLVs."""

from __future__ import annotations

from tests.second.keys import VERSION


class Malformed(Exception):
    """The peer broke the text."""


def write_tlvs(values: dict[int, bytes]) -> bytes:
    return b"".join(
        bytes([kind]) + len(value).to_bytes(2, "big") + value for kind, value in sorted(values.items())
    )


def read_tlvs(data: bytes) -> dict[int, bytes]:
    """R-4-2: types ascend strictly. Raises Malformed."""
    found: dict[int, bytes] = {}
    at, last = 0, -1
    while at < len(data):
        size = int.from_bytes(data[at + 1 : at + 3], "big")
        value = data[at + 3 : at + 3 + size]
        if len(data) < at + 3 or len(value) != size or data[at] <= last:
            raise Malformed("TLVs")
        found[data[at]] = value
        last = data[at]
        at += 3 + size
    return found


def make_hello(
    original_dcid: bytes, own_cid: bytes, retry_scid: bytes = b"", parameters: dict[int, bytes] | None = None
) -> bytes:
    versions = VERSION.to_bytes(4, "big")
    return write_tlvs(
        {1: versions, 2: original_dcid, 3: own_cid, 4: retry_scid, 5: write_tlvs(parameters or {})}
    )


def read_hello(hello: bytes) -> dict[int, bytes]:
    """R-4-1, R-4-2, R-4-3. Raises Malformed."""
    found = read_tlvs(hello)
    if len(hello) > 1024 or not {1, 2, 3, 4, 5} <= found.keys():
        raise Malformed("hello")
    return found
