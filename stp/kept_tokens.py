"""NEW_TOKENs kept across restarts, so that whoever comes back is known by name at once (R-4-24).

(1) One token per peer, the newest, is given out once. What a crash leaves in the file may be shown twice: the second
    time it counts as no token, which costs a Retry and nothing else.
(2) The file has mode 0600, is replaced as a whole, once a session, and is not synced: flash wears. At most MAX_PEERS
    tokens are kept, the newest.
(3) It is advice. A file that is missing, not readable or damaged means no token, and one that cannot be written that
    none will be kept: both are counted, neither raises.
"""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Final

from stp.identity import write_atomically

MAX_PEERS: Final = 16
MAX_TOKEN: Final = 256
"""Bytes (R-4-14)."""
MAX_FILE: Final = 64 * 1024
"""Bytes; a longer file is not ours."""
FORMAT: Final = 1


class KeptTokens:
    """The file, and what it holds. One per process and path; `put` may be called in a worker thread."""

    def __init__(self, path: str | Path | None = None) -> None:
        """`path` None: kept for as long as this object lives. Blocking, as `put`."""
        self._path = Path(path) if path is not None else None
        self._lock = threading.Lock()
        self.read_errors = 0
        """Times the file was there and could not be understood."""
        self.write_errors = 0
        self._kept = self._read()
        self._given: set[str] = set()

    def take(self, peer: str) -> bytes:
        """The token for this peer, b"" if there is none; it is used up (1)."""
        with self._lock:
            token = b"" if peer in self._given else self._kept.get(peer, b"")
            self._given.add(peer)
            return token

    def put(self, peer: str, token: bytes) -> None:
        """A new one came: keep it, and write the file, with what other processes wrote meanwhile. Blocking."""
        if not 0 < len(token) <= MAX_TOKEN:
            return
        with self._lock:
            kept = {**self._kept, **self._read()}
            kept.pop(peer, None)
            kept[peer] = token
            for old in list(kept)[: max(0, len(kept) - MAX_PEERS)]:
                del kept[old]
            self._kept = kept
            self._given.discard(peer)
            if self._path is None:
                return
            shown = {name: one.hex() for name, one in kept.items()}
            try:
                data = json.dumps({"format": FORMAT, "tokens": shown}, indent=1).encode() + b"\n"
                write_atomically(self._path, data, sync=False)
            except OSError:
                self.write_errors += 1

    def _read(self) -> dict[str, bytes]:
        if self._path is None:
            return {}
        try:
            with open(self._path, "rb") as file:
                return parse(file.read(MAX_FILE + 1))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError):
            self.read_errors += 1
            return {}


def parse(data: bytes) -> dict[str, bytes]:
    """The file's bytes: peer -> token. Raises ValueError for what is no such file."""
    if len(data) > MAX_FILE:
        raise ValueError("too long")
    try:
        found = json.loads(data)
    except RecursionError:
        raise ValueError("too deep") from None
    entries = found.get("tokens") if isinstance(found, dict) and found.get("format") == FORMAT else None
    if not isinstance(entries, dict) or not all(isinstance(one, str) for one in entries.values()):
        raise ValueError("another format")
    read = {peer: bytes.fromhex(text) for peer, text in entries.items()}
    return {peer: token for peer, token in list(read.items())[-MAX_PEERS:] if 0 < len(token) <= MAX_TOKEN}
