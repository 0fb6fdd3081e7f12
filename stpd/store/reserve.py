"""Room kept back for what must always commit (promise 5 of base).

On a full disk even a DELETE fails, since the write-ahead log needs room to say it. A file of allocated blocks
is given back to the file system then, and made again when there is room for it.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

NAME: Final = "reserve"


class Reserve:
    """`size` bytes on the store's file system, held by a file. Used by the writer thread."""

    def __init__(self, directory: Path, size: int) -> None:
        self._directory = directory
        self._path = directory / NAME
        self.size = size
        self.held = False

    def take(self, spare: int = 0) -> bool:
        """Allocate it if `spare` bytes remain free besides; True if it is held now."""
        if self.held:
            return True
        try:
            fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                if os.fstat(fd).st_blocks * 512 < self.size:
                    os.ftruncate(fd, 0)
                    if self.free() < self.size + spare:
                        return False
                    os.posix_fallocate(fd, 0, self.size)
                self.held = True
            finally:
                if not self.held:
                    os.ftruncate(fd, 0)
                os.close(fd)
        except OSError:
            pass  # no room, or a limit on the size of files: then it is not held, and the store says so
        return self.held

    def release(self) -> None:
        """Give the blocks back to the file system. Cannot fail for want of room."""
        self.held = False
        try:
            os.truncate(self._path, 0)
        except OSError:
            pass  # not there: nothing to give back

    def free(self) -> int:
        """Bytes that the file system would give us; 0 if it cannot say."""
        try:
            stat = os.statvfs(self._directory)
        except OSError:
            return 0
        return stat.f_bavail * stat.f_frsize
