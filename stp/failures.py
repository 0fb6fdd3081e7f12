"""How a command ends when it does not end well: an exit code of sysexits(3), one line of cause, one of what to do."""

from __future__ import annotations

from typing import Final

EX_USAGE: Final = 64
EX_NOINPUT: Final = 66
EX_UNAVAILABLE: Final = 69
EX_TEMPFAIL: Final = 75
EX_NOPERM: Final = 77
EX_CONFIG: Final = 78
INTERRUPTED: Final = 130
"""128 + SIGINT, as shells have it."""


class Failure(Exception):  # noqa: N818 - it is a result, with an exit code
    """One line of cause, one of what to do. Without a cause there is nothing to add to what was printed."""

    def __init__(self, cause: str, advice: str, status: int) -> None:
        super().__init__(cause)
        self.cause, self.advice, self.status = cause, advice, status
