"""How commands print: data on stdout, everything else on stderr."""

from __future__ import annotations

import json
import sys
from typing import Any


def emit(line: str) -> None:
    """Data: one line, at once."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def emit_json(**fields: Any) -> None:
    """Data: one object on one line."""
    emit(json.dumps(fields, ensure_ascii=False))


def say(text: str) -> None:
    """A word to whoever waits, or what went wrong."""
    sys.stderr.write(f"stp: {text}\n")
    sys.stderr.flush()


def ms(seconds: float) -> float:
    """Milliseconds as they stand in JSON."""
    return round(seconds * 1000, 3)
