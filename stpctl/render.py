"""Numbers and tables as people read them.

(1) What a peer chose (names, reasons) cannot drive the terminal: control characters are written out.
"""

import json
import re
import time
from collections.abc import Sequence
from typing import Any, Final

CONTROL: Final = re.compile(r"[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\u2028\u2029]")


LANES: Final = {1: "command", 2: "event", 3: "telemetry", 4: "bulk"}


def lane_name(lane: int) -> str:
    """The lane as people call it."""
    return LANES.get(lane, str(lane))


def clean(value: Any) -> str:
    """Text without control characters (1)."""
    return CONTROL.sub(lambda m: f"\\x{ord(m[0]):02x}", str(value))


def span(seconds: float) -> str:
    """A span of time in its two greatest units: "3 h 12 min"."""
    seconds = max(0.0, seconds)
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    whole = int(seconds)
    parts = (("d", whole // 86400), ("h", whole // 3600 % 24), ("min", whole // 60 % 60), ("s", whole % 60))
    first = next(n for n, (_, count) in enumerate(parts) if count)
    return " ".join(f"{count} {unit}" for unit, count in parts[first : first + 2] if count)


def size(count: float) -> str:
    """Bytes with three digits: "1.25 MB"."""
    value, unit = float(count), "B"
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value < 999.5 or unit == "TB":
            break
        value /= 1000
    digits = 0 if unit == "B" or value >= 100 else 1 if value >= 10 else 2
    return f"{value:.{digits}f} {unit}"


def number(count: int) -> str:
    """12,345"""
    return f"{count:,}"


def count_of(count: int, word: str) -> str:
    """ "1 message", "2,000 messages" """
    return f"{number(count)} {word}{'' if count == 1 else 's'}"


def instant(at_ms: int, now_ms: int) -> str:
    """A time of day; with the date where it is not today's. Local time. "never" for 0."""
    if not at_ms:
        return "never"
    at, now = time.localtime(at_ms / 1000), time.localtime(now_ms / 1000)
    return time.strftime("%H:%M:%S" if at[:3] == now[:3] else "%Y-%m-%d %H:%M", at)


def table(headings: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Columns as wide as they need; numbers stand to the right. Empty: the headings only."""
    cells = [[clean(cell) for cell in row] for row in rows]
    widths = [
        max([len(h), *(len(row[n]) for row in cells)]) if cells else len(h) for n, h in enumerate(headings)
    ]
    right = [
        bool(rows) and all(isinstance(row[n], int | float) for row in rows) for n in range(len(headings))
    ]
    lines = []
    for row in [[h.upper() for h in headings], *cells]:
        padded = [
            cell.rjust(width) if to_right else cell.ljust(width)
            for cell, width, to_right in zip(row, widths, right, strict=True)
        ]
        lines.append("  ".join(padded).rstrip())
    return "\n".join(lines)


def pairs(items: Sequence[tuple[str, Any]]) -> str:
    """One name and value a line."""
    width = max((len(name) for name, _ in items), default=0)
    return "\n".join(f"{name.ljust(width)}  {clean(value)}" for name, value in items)


def as_json(value: Any) -> str:
    """For programs."""
    return json.dumps(value, indent=2)
