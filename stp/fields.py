"""JSON objects that a peer sent, read field by field: one door, one error (protocol §10). Sans-IO."""

from __future__ import annotations

import json
from typing import Any, Final, NoReturn, cast

from stp.core.errors import ProtocolError

MAX_U64: Final = 0xFFFF_FFFF_FFFF_FFFF


def to_json(fields: Any) -> bytes:
    return json.dumps(fields, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


class Fields:
    """A JSON object from the peer, read field by field; raises ProtocolError only."""

    __slots__ = ("_fields", "_what")

    def __init__(self, fields: object, what: str) -> None:
        if not isinstance(fields, dict):
            raise ProtocolError(f"{what} is not a JSON object")
        self._fields = cast("dict[str, object]", fields)
        self._what = what

    @classmethod
    def parse(cls, body: bytes, what: str) -> Fields:
        try:
            value = json.loads(body.decode(), parse_constant=_no_constant)
            to_json(value)  # half a surrogate pair or 1e999 would only fail when we pass it on
            return cls(value, what)
        except (ValueError, RecursionError) as exc:
            raise ProtocolError(f"{what} is not JSON: {exc}") from None

    def all(self) -> dict[str, Any]:
        return self._fields

    def _wrong(self, key: str, wanted: str) -> NoReturn:
        raise ProtocolError(f"{self._what}: {key} is not {wanted}")

    def text(self, key: str, default: str | None = None) -> str:
        value = self._fields.get(key, default)
        if not isinstance(value, str):
            self._wrong(key, "a text")
        return value

    def optional_text(self, key: str) -> str | None:
        return None if self._fields.get(key) is None else self.text(key)

    def number(self, key: str, default: int | None = None, least: int = 0, most: int = MAX_U64) -> int:
        value = self._fields.get(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            self._wrong(key, f"a whole number from {least} to {most}")
        return value

    def seconds(self, key: str) -> float | None:
        value = self._fields.get(key)
        if value is None:
            return None
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= MAX_U64:
            self._wrong(key, "a number of seconds")
        return value

    def texts(self, key: str, default: list[str] | None = None) -> tuple[str, ...]:
        values = self._fields.get(key, default)
        if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
            self._wrong(key, "a list of texts")
        return tuple(values)

    def id16(self, key: str) -> bytes:
        value = id16_of(self.text(key))
        if value is None:
            self._wrong(key, "16 bytes in hex")
        return value

    def objects(self, key: str) -> list[Fields] | None:
        values = self._fields.get(key)
        if values is None:
            return None
        if not isinstance(values, list):
            self._wrong(key, "a list")
        return [Fields(value, f"{self._what}: {key}") for value in values]


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def id16_of(text: str) -> bytes | None:
    """16 bytes from exactly 32 hex digits; bytes.fromhex alone would also take blanks."""
    try:
        value = bytes.fromhex(text)
    except ValueError:
        return None
    return value if len(text) == 32 and len(value) == 16 else None
