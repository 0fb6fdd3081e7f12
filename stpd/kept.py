"""Small files of a daemon that outlive a start, beside the store and the registers."""

from __future__ import annotations

import os
from pathlib import Path

from stp.identity import write_atomically


def listener_secrets(path: Path) -> bytes:
    """64 bytes that outlive a start: by them peers learn of it in one round trip (protocol §8). Raises OSError."""
    try:
        found = path.read_bytes()
    except FileNotFoundError:
        found = b""
    if len(found) != 64:
        found = os.urandom(64)
        write_atomically(path, found)
    return found


def count_run(path: Path) -> int:
    """This node's number of starts: HELLO tells a newer session from an older one by it. Raises OSError."""
    try:
        number = int(path.read_text(encoding="ascii")) + 1
    except (FileNotFoundError, ValueError):
        number = 1
    write_atomically(path, f"{number}\n".encode("ascii"), 0o640)
    return number
