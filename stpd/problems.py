"""What is wrong with a configuration, and how people are told.

(1) A value that may be a secret is never repeated in a message.
"""

import difflib
import re
from collections.abc import Iterable
from typing import Any, Final

from attrs import define

SECRET: Final = re.compile(r"-----BEGIN|[A-Za-z0-9+_=-]{24,}")
"""What may be a key, a token or a password: long runs of what base64 is made of."""


@define(kw_only=True)
class Problem:
    """One thing that is wrong, or unwise, in a configuration."""

    path: str
    """Where: "store.budget", "class[2].filters[0]"; empty: the file as a whole."""
    message: str
    hint: str = ""
    """What to do."""
    warning: bool = False
    """The daemon runs all the same."""

    def __str__(self) -> str:
        """All on one line."""
        where = f"{self.path}: " if self.path else ""
        return f"{where}{self.message}" + (f" ({self.hint})" if self.hint else "")


class BadValueError(ValueError):
    """One value is not what its key takes."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


def shown(value: Any) -> str:
    """A value as it may stand in a message: short, and nothing that may be a secret (3)."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, dict):
        return "a table"
    if isinstance(value, list):
        return "a list"
    if not isinstance(value, str):
        return str(value)
    if SECRET.search(value):
        return "what stands there"
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in value[:60])
    return f'"{text}"' + ("…" if len(value) > 60 else "")


def nearest(word: str, known: Iterable[str]) -> str:
    """'did you mean "x"?' for the nearest of `known`, or the empty string."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f'did you mean "{near[0]}"?' if near else ""


def render(file: str, problems: list[Problem]) -> str:
    """All problems for people: one line each of where and what, one of what to do."""
    errors = sum(not p.warning for p in problems)
    warnings = len(problems) - errors
    counts = [
        f"{n} {word}{'s' if n > 1 else ''}" for n, word in ((errors, "error"), (warnings, "warning")) if n
    ]
    lines = [f"{file}: {' and '.join(counts) or 'good'}"]
    for p in sorted(problems, key=lambda p: p.warning):
        where = f"{p.path}: " if p.path else ""
        lines.append(f"  {'warning' if p.warning else 'error':7}  {where}{p.message}")
        if p.hint:
            lines.append(f"           {p.hint}")
    return "\n".join(lines)
