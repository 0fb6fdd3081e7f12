"""Seeds from the conformance vectors: valid bytes, and near misses that somebody thought of."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any, Final

PATH: Final = Path(__file__).resolve().parent.parent / "vectors" / "stp1.json"


@cache
def _all() -> dict[str, Any]:
    return json.loads(PATH.read_bytes())  # type: ignore[no-any-return]


def seeds(*sections: str, field: str = "bytes") -> list[bytes]:
    """The bytes of every vector in `sections`."""
    return [bytes.fromhex(vector[field]) for section in sections for vector in _all()[section]]


def words(section: str, field: str) -> list[bytes]:
    """A text field of every vector in `section`, as UTF-8."""
    return [vector[field].encode() for vector in _all()[section]]
