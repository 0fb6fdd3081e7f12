"""What ends a command, and with which exit status."""

from typing import Final

OK: Final = 0
FAILED: Final = 1
"""The daemon answered, and the answer is no: nothing by that name, not now, its own fault."""
USAGE: Final = 64
UNREACHABLE: Final = 69
"""Nobody answers at that address, or not in time."""
REFUSED: Final = 77
"""A certificate or a role is not good enough, on either side."""
CONFIG: Final = 78
"""No context, or one that cannot be used."""

EXPLAINED: Final = """\
Exit status: 0 done, 1 failed, 64 wrong usage, 69 daemon unreachable, 77 refused (certificate or role),
78 no usable context."""


class CommandError(Exception):
    """One line of cause, one of what to do, and the exit status."""

    def __init__(self, cause: str, advice: str, status: int) -> None:
        super().__init__(cause)
        self.cause = cause
        self.advice = advice
        self.status = status
